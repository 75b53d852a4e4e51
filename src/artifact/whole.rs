//! Whether a release is whole in this store: every blob there, and its bytes what its digest says.
//!
//! Reading gigabytes before each promotion would take longer than the promotion, so what was read and found good is
//! remembered with its stat data, and read again only when that changed (any write changes ctime, which no program can
//! set). As in Git's index, stat data that is as young as the look itself does not count: a write right after it could
//! leave it the same.
//!
//! ```text
//! ROOT/cache/whole/HEX.json     of the release HEX: stat data of each blob that was read and good
//! ```

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::release;
use super::store::{Stamp, Store, write_cache};
use crate::oci::digest::Digest;

/// Format of what is remembered; others are not read.
const VERSION: u32 = 1;

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Known {
    version: u32,
    blobs: BTreeMap<Digest, Stamp>,
}

/// What is wrong with the blobs of a release, all of it; empty when it is whole. See [`release::check`], which reads all bytes
/// each time.
///
/// # Errors
/// The release itself cannot be read: then nothing is known of the rest.
pub fn check(store: &Store, digest: &Digest) -> Result<Vec<String>> {
    let known = load(store, digest);
    let mut start = None;
    let mut good = BTreeMap::new();
    let wrong = release::check_with(store, digest, &mut |blob| {
        let before = store.stamp(blob);
        if let Some(stamp) = before.filter(|stamp| known.blobs.get(blob) == Some(stamp)) {
            good.insert(*blob, stamp);
            return Ok(());
        }
        let start = *start.get_or_insert_with(|| now(store));
        store.verify(blob)?;
        // Changed while it was read, or so young that a change would not show: it is read again the next time.
        if let Some(stamp) =
            before.filter(|stamp| store.stamp(blob) == Some(*stamp) && start.is_some_and(|now| stamp.ctime < now))
        {
            good.insert(*blob, stamp);
        }
        Ok(())
    })?;
    let new = Known { version: VERSION, blobs: good };
    if new != known {
        // A cache that cannot be written costs the next one time, and nothing else.
        let path = path(store, digest);
        let _ = fs_err::create_dir_all(store.cache("whole"))
            .map_err(anyhow::Error::from)
            .and_then(|()| write_cache(&path, &serde_json::to_vec(&new)?));
    }
    Ok(wrong)
}

fn path(store: &Store, digest: &Digest) -> PathBuf {
    store.cache("whole").join(format!("{}.json", digest.hex()))
}

fn load(store: &Store, digest: &Digest) -> Known {
    let bytes = fs_err::read(path(store, digest)).ok();
    let known = bytes.and_then(|bytes| serde_json::from_slice::<Known>(&bytes).ok());
    known.filter(|known| known.version == VERSION).unwrap_or_default()
}

/// The time as the store's file system writes it into files.
fn now(store: &Store) -> Option<(i64, i64)> {
    let meta = tempfile::tempfile_in(store.temp_dir()).ok()?.metadata().ok()?;
    Some((meta.mtime(), meta.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::artifact::release::{Entry, Kind, Recipe};
    use crate::artifact::store::Descriptor;

    fn release(store: &Store) -> Digest {
        let blob = |text: &str| Descriptor::new("x", store.put(text.as_bytes()).unwrap(), text.len() as u64);
        let manifest = serde_json::to_vec(&json!({"config": blob("{}"), "layers": [blob("one"), blob("two")]})).unwrap();
        let digest = store.put(&manifest).unwrap();
        let entry = Entry { digest, size: manifest.len() as u64, kind: Kind::Image, name: "shop".into() };
        let recipe = Recipe { name: "shop".into(), version: "1".into(), revision: None, entries: vec![entry] };
        release::write(store, &recipe).unwrap().digest
    }

    /// Looks until the blobs are old enough to be remembered.
    fn settled(store: &Store, release: &Digest) {
        for _ in 0..1000 {
            assert_eq!(check(store, release).unwrap(), Vec::<String>::new());
            if load(store, release).blobs.len() == 3 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("nothing is remembered");
    }

    #[test]
    fn what_was_good_is_read_again_only_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let release = release(&store);
        settled(&store, &release);
        let one = store.blob(&Digest::of("one"));
        let bytes = fs_err::read(&one).unwrap();
        fs_err::write(&one, "eno").unwrap();
        let wrong = check(&store, &release).unwrap();
        assert!(wrong.len() == 1 && wrong[0].contains(&format!("blob {} is corrupt", Digest::of("one"))), "{wrong:?}");
        assert_eq!(load(&store, &release).blobs.len(), 2, "what is wrong is forgotten");
        assert_eq!(check(&store, &release).unwrap(), wrong, "and stays wrong");
        fs_err::write(&one, bytes).unwrap();
        settled(&store, &release);
        let mut known = load(&store, &release);
        fs_err::write(&one, "eno").unwrap();
        known.blobs.insert(Digest::of("one"), store.stamp(&Digest::of("one")).unwrap());
        write_cache(&path(&store, &release), &serde_json::to_vec(&known).unwrap()).unwrap();
        assert_eq!(check(&store, &release).unwrap(), Vec::<String>::new(), "stat data is what is compared");
        fs_err::remove_file(&one).unwrap();
        let wrong = check(&store, &release).unwrap();
        assert!(wrong.len() == 1 && wrong[0].contains("is not in the store"), "{wrong:?}");
    }
}
