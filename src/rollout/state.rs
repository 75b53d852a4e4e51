//! What the daemon has to remember: the state of every environment, whole or not at all.
//!
//! ```text
//! STATE/rollout/state.json            sha256:HEX of what follows the first line
//!                                     {"format":1,"steady":…,"environments":{…}}
//! STATE/rollout/state.json.previous   the one before
//! STATE/rollout/lock                  held by the daemon, with its process id
//! ```
//! Written to a temporary name, synced, and renamed, so that a kill or a full disk leaves the one before. One whose checksum
//! is wrong is never written over: who finds it goes on from the copy before, changes nothing, and says so, until somebody
//! has moved it away.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::plan::Environment;
use crate::artifact::store::sync_dir;
use crate::error::Problem;
use crate::fault;
use crate::oci::digest::Digest;

/// Version of the file.
pub const FORMAT: u32 = 1;
const FILE: &str = "state.json";
const PREVIOUS: &str = "state.json.previous";

/// Everything that is remembered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub format: u32,
    /// The daemon's own clock, in milliseconds; see [`super::plan::Now`].
    pub steady: u64,
    /// By name, `shop/prod`.
    pub environments: BTreeMap<String, Environment>,
}

impl Default for State {
    fn default() -> Self {
        Self { format: FORMAT, steady: 0, environments: BTreeMap::new() }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub enum Loaded {
    /// There is none: this is the first time.
    Fresh,
    Sound(State),
    /// The file is broken, and why; with the copy before when that is sound.
    Corrupt {
        why: String,
        previous: Option<State>,
    },
}

/// The folder with the file.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// `dir` is made when there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
        Ok(Self(dir.to_path_buf()))
    }

    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    pub fn file(&self) -> PathBuf {
        self.0.join(FILE)
    }

    /// # Errors
    /// It cannot be read, or was written by a newer pipeline.
    pub fn load(&self) -> Result<Loaded> {
        let (file, previous) = (self.read(FILE)?, self.read(PREVIOUS)?);
        let sound = |bytes: Option<Vec<u8>>| bytes.map(|bytes| decode(&bytes));
        Ok(match (sound(file), sound(previous)) {
            (None, None) => Loaded::Fresh,
            (Some(Ok(state)), _) => Loaded::Sound(newer(state)?),
            // Somebody has moved the broken one away.
            (None, Some(Ok(state))) => Loaded::Sound(newer(state)?),
            (Some(Err(why)), previous) => {
                let previous = previous.and_then(std::result::Result::ok).map(newer).transpose()?;
                Loaded::Corrupt { why: format!("`{}`: {why}", self.file().display()), previous }
            }
            (None, Some(Err(why))) => {
                Loaded::Corrupt { why: format!("`{}`: {why}", self.0.join(PREVIOUS).display()), previous: None }
            }
        })
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match fs::read(self.0.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes `state`; the one before becomes the previous copy. What was there stays when this fails.
    pub fn save(&self, state: &State) -> Result<()> {
        let path = self.file();
        fault::point("create the state of the rollouts");
        let mut temp = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempfile_in(&self.0)
            .with_context(|| format!("cannot make a file in `{}`", self.0.display()))?;
        let written = temp.write_all(&encode(state)?).and_then(|()| temp.as_file().sync_all());
        written.with_context(|| format!("cannot write `{}`", path.display()))?;
        if path.exists() {
            // A second name first, so that there is a state at every moment.
            let link = self.0.join(".tmp-previous");
            match fs::remove_file(&link) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            fs::hard_link(&path, &link)?;
            fault::point("rename the previous state of the rollouts");
            fs::rename(&link, self.0.join(PREVIOUS))?;
        }
        fault::point("rename the state of the rollouts");
        temp.persist(&path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
        sync_dir(&self.0)
    }

    /// Removes temporary files that a killed process left.
    pub fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(".tmp-") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The file's bytes.
pub fn encode(state: &State) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(state)?;
    let mut bytes = format!("{}\n", Digest::of(&body)).into_bytes();
    bytes.extend(body);
    Ok(bytes)
}

/// The state in a file, or what is wrong with it. A newer one decodes as far as its format.
fn decode(bytes: &[u8]) -> std::result::Result<Parsed, String> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no checksum")?;
    let (line, body) = (&bytes[..end], &bytes[end + 1..]);
    let expected: Digest = std::str::from_utf8(line).ok().and_then(|text| text.parse().ok()).ok_or("it has no checksum")?;
    let found = Digest::of(body);
    if found != expected {
        return Err(format!("its checksum is {}, and {} is written in it", found.short(), expected.short()));
    }
    #[derive(Deserialize)]
    struct Only {
        format: u32,
    }
    let only: Only = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if only.format > FORMAT {
        return Ok(Parsed::Newer(only.format));
    }
    serde_json::from_slice(body).map(|state| Parsed::Known(Box::new(state))).map_err(|error| error.to_string())
}

enum Parsed {
    Known(Box<State>),
    Newer(u32),
}

fn newer(parsed: Parsed) -> Result<State> {
    match parsed {
        Parsed::Known(state) => Ok(*state),
        Parsed::Newer(format) => {
            let problem =
                Problem::usage(format!("the state of the rollouts has format {format}, and this pipeline knows {FORMAT}"));
            bail!(problem.hint("it was written by a newer pipeline: use that one"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(steady: u64) -> State {
        let environment = Environment { maintenance: Some("back soon".into()), ..Environment::default() };
        State { steady, environments: BTreeMap::from([("shop/prod".into(), environment)]), ..State::default() }
    }

    #[test]
    fn what_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().join("rollout")).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Fresh);
        folder.save(&state(1)).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(1)));
        folder.save(&state(2)).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(2)));
        let good = fs::read(folder.file()).unwrap();
        // Every truncation and every flipped byte is noticed, and the one before is there.
        for length in 0..good.len() {
            fs::write(folder.file(), &good[..length]).unwrap();
            let Loaded::Corrupt { previous, .. } = folder.load().unwrap() else { panic!("{length} bytes are taken for a state") };
            assert_eq!(previous, Some(state(1)));
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            fs::write(folder.file(), &bad).unwrap();
            // Digits of a checksum may be of either case.
            if let Loaded::Sound(found) = folder.load().unwrap() {
                assert!(at < 71 && found == state(2), "byte {at}");
            }
        }
        fs::write(folder.file(), b"{}").unwrap();
        let Loaded::Corrupt { why, .. } = folder.load().unwrap() else { panic!() };
        assert!(why.ends_with("it has no checksum"), "{why}");
        // Moved away: the one before counts, and saving goes on.
        fs::rename(folder.file(), dir.path().join("broken")).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(1)));
        folder.save(&state(3)).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(3)));
    }

    #[test]
    fn a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let body = br#"{"format":2,"all":"different"}"#;
        fs::write(folder.file(), [format!("{}\n", Digest::of(body)).as_bytes(), body].concat()).unwrap();
        let error = folder.load().unwrap_err().to_string();
        assert!(error.contains("format 2"), "{error}");
    }

    #[test]
    fn a_disk_that_is_full_keeps_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        folder.save(&state(1)).unwrap();
        // Root writes into what nobody may write: a folder in the way stops everybody.
        fs::create_dir(dir.path().join(".tmp-previous")).unwrap();
        fs::write(dir.path().join(".tmp-previous/x"), b"").unwrap();
        assert!(folder.save(&state(2)).is_err());
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(1)));
        fs::remove_dir_all(dir.path().join(".tmp-previous")).unwrap();
        folder.save(&state(2)).unwrap();
        assert_eq!(folder.load().unwrap(), Loaded::Sound(state(2)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
