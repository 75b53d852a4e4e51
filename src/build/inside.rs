//! What the unshare process does for a build: functions called by name, because only inside the
//! user namespace do owners, capabilities and overlay marks read as they are meant.
//!
//! Each pair of argument struct and function is one call of [`crate::sandbox::Session::call`].

use std::io::BufReader;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::debian::normalise::Origin;
use super::{debian, secret};
use crate::artifact::tree;
use crate::cmd::{self, Cmd};
use crate::error::Problem;
use crate::fault;
use crate::oci::compress::{Compression, LayerWriter, Written};
use crate::oci::layer::{self, Inspect, PackOptions, Packed};

/// Pack a folder into a file that is there.
#[derive(Serialize, Deserialize)]
pub struct Pack {
    pub options: PackOptions,
    pub out: PathBuf,
    pub compression: Compression,
    pub threads: usize,
    /// Secrets (id and value) that must not be in it.
    pub secrets: Vec<(String, Vec<u8>)>,
    /// Whether private keys, machine ids and seeds are refused.
    pub refuse_identities: bool,
    /// The written list of what moves is applied first, as far as it is for this origin.
    pub normalise: Option<Origin>,
}

impl std::fmt::Debug for Pack {
    /// Never the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pack").field("options", &self.options).finish_non_exhaustive()
    }
}

/// What a pack gave.
#[derive(Debug, Serialize, Deserialize)]
pub struct PackedLayer {
    pub written: Written,
    pub packed: Packed,
}

/// Run a command of this machine as root of the namespace; its output is noted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
}

/// Files put into a folder before a step runs: relative path, bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seed {
    pub dir: PathBuf,
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

/// Read a file of a stack of layers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Read {
    /// Layers, bottom first.
    pub lowers: Vec<PathBuf>,
    /// Relative.
    pub path: PathBuf,
}

/// Copy a folder and give the copy to a user.
#[derive(Debug, Serialize, Deserialize)]
pub struct Copy {
    pub from: PathBuf,
    pub to: PathBuf,
    /// User and group id.
    pub owner: (u32, u32),
}

/// Dispatches a call.
pub fn call(name: &str, args: Value, note: &dyn Fn(&str)) -> Result<Value> {
    fn parse<T: serde::de::DeserializeOwned>(args: Value) -> Result<T> {
        serde_json::from_value(args).context("arguments that are not understood")
    }
    fn answer<T: Serialize>(value: T) -> Result<Value> {
        Ok(serde_json::to_value(value)?)
    }
    match name {
        "pack" => answer(pack(&parse(args)?)?),
        "exec" => answer(exec(&parse(args)?, note)?),
        "seed" => answer(seed(&parse(args)?)?),
        "read" => answer(read(&parse(args)?)?),
        "copy" => answer(copy(&parse(args)?)?),
        "size" => answer(size(&parse::<PathBuf>(args)?)?),
        other => tree::call(other, args),
    }
}

/// Both checks of a layer's content.
struct Checks<'a> {
    secrets: secret::Scan<'a>,
    refuse_identities: bool,
}

impl Inspect for Checks<'_> {
    fn first(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Option<Problem> {
        if !self.refuse_identities {
            return None;
        }
        debian::scan::forbidden(&path.to_string_lossy(), mode, bytes).map(|reason| {
            Problem::failed(format!("`/{}` must not be in a layer: {reason}", path.display()))
                .hint("every machine made from the image would share it; remove it in the script that makes it")
        })
    }

    fn text(&mut self, path: &Path, text: &[u8]) -> Option<Problem> {
        self.secrets.text(path, text)
    }

    fn chunk(&mut self, path: &Path, start: bool, bytes: &[u8]) -> Option<Problem> {
        self.secrets.chunk(path, start, bytes)
    }
}

fn pack(args: &Pack) -> Result<PackedLayer> {
    if let Some(origin) = args.normalise {
        debian::normalise::apply(&args.options.dir, origin)?;
    }
    fault::point("pack a layer");
    let out = fs_err::OpenOptions::new().write(true).truncate(true).open(&args.out)?;
    let values: Vec<secret::Value> =
        args.secrets.iter().map(|(id, bytes)| secret::Value { id: id.clone(), bytes: bytes.clone() }).collect();
    let finder = secret::Finder::new(&values)?;
    let mut checks = Checks { secrets: secret::Scan::new(&finder), refuse_identities: args.refuse_identities };
    let mut writer = LayerWriter::new(out, args.compression, args.threads);
    let packed = layer::pack(&args.options, &mut writer, &mut checks)?;
    let written = writer.finish()?;
    Ok(PackedLayer { written, packed })
}

fn exec(args: &Exec, note: &dyn Fn(&str)) -> Result<()> {
    let (program, rest) = args.argv.split_first().context("a command")?;
    let (reader, writer) = std::io::pipe()?;
    let mut cmd = Cmd::new(program).args(rest).env_clear().stdout(Stdio::from(writer.try_clone()?)).stderr(Stdio::from(writer));
    for (key, value) in &args.env {
        cmd = cmd.env(key, value);
    }
    let line = cmd.line();
    let mut child = cmd.spawn()?;
    let mut last = Vec::new();
    for text in std::io::BufRead::lines(BufReader::new(reader)) {
        let text = text.unwrap_or_default();
        note(&text);
        last.push(text);
        if last.len() > 30 {
            last.remove(0);
        }
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(cmd::failure(&line, status, last.join("\n").as_bytes()).into()) }
}

fn seed(args: &Seed) -> Result<()> {
    for (path, bytes) in &args.files {
        let path = args.dir.join(path);
        if let Some(parent) = path.parent() {
            make_folders(&args.dir, parent)?;
        }
        fs_err::write(&path, bytes)?;
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Makes `path` below `root` with mode 0755 whatever the umask.
fn make_folders(root: &Path, path: &Path) -> Result<()> {
    let relative = path.strip_prefix(root).context("a folder below the root")?;
    let mut made = root.to_path_buf();
    for component in relative.components() {
        made.push(component);
        match fs_err::create_dir(&made) {
            Ok(()) => fs_err::set_permissions(&made, std::fs::Permissions::from_mode(0o755))?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The bytes of a file as the stack of layers shows it; symbolic links are not followed.
fn read(args: &Read) -> Result<Option<Vec<u8>>> {
    for lower in args.lowers.iter().rev() {
        let path = lower.join(&args.path);
        match path.symlink_metadata() {
            Ok(meta) if meta.is_file() => return Ok(Some(fs_err::read(&path)?)),
            Ok(meta) if meta.file_type().is_char_device() && meta.rdev() == 0 => return Ok(None),
            Ok(_) => return Ok(None),
            Err(_) => {}
        }
    }
    Ok(None)
}

fn copy(args: &Copy) -> Result<()> {
    let meta = fs_err::symlink_metadata(&args.from)?;
    if meta.is_dir() {
        fs_err::create_dir_all(&args.to)?;
        for entry in fs_err::read_dir(&args.from)? {
            let name = entry?.file_name();
            copy(&Copy { from: args.from.join(&name), to: args.to.join(&name), owner: args.owner })?;
        }
    } else if meta.is_symlink() {
        fs_err::os::unix::fs::symlink(fs_err::read_link(&args.from)?, &args.to)?;
    } else {
        fs_err::copy(&args.from, &args.to)?;
    }
    let (uid, gid) = args.owner;
    fs_err::os::unix::fs::lchown(&args.to, Some(uid), Some(gid))?;
    if !meta.is_symlink() {
        fs_err::set_permissions(&args.to, meta.permissions())?;
        layer::set_mtime(&args.to, meta.mtime())?;
    }
    Ok(())
}

/// Bytes a tree takes on disk.
fn size(path: &Path) -> Result<u64> {
    let mut total = 0;
    let mut folders = vec![path.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(&folder)? {
            let entry = entry?;
            let meta = entry.path().symlink_metadata()?;
            total += meta.blocks() * 512;
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(total)
}
