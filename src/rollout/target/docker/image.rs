//! An image of the store in the engine: the same bytes, loaded once.
//!
//! The engine is sent what `docker load` reads since ever: configuration, layers, `manifest.json`. Docker before 23 reads
//! neither an OCI layout nor zstd, so layers in zstd are unpacked on the way; those in gzip go as they are. The engine
//! checks each layer against the configuration's diff ids, and the configuration's digest is the image's id there: what
//! has the id has the bytes. Layers another image of ours has brought are left out where the engine can do without.

use std::io::{BufReader, Read, Write};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::artifact::image::{self, Config, Manifest};
use crate::artifact::store::Store;
use crate::docker::{Engine, Image};
use crate::error::{self, Kind, Problem};
use crate::oci::compress::Compression;
use crate::oci::digest::Digest;

/// A registry that is none: what has such a name was loaded by us, and may be removed by us.
pub const REGISTRY: &str = "pipeline.local";

/// The name of an image of ours in the engine.
pub fn tag(environment: &str, digest: &Digest) -> String {
    let pipeline = environment.split('/').next().unwrap_or(environment);
    format!("{REGISTRY}/{pipeline}:{}", &digest.hex()[..12])
}

/// Sees to it that the engine has the image `digest` of the store under the name `tag`; its id there.
///
/// # Errors
/// The store does not have it; the engine's words; what the engine has after that is not the image.
pub fn ensure(engine: &Engine, store: &Store, digest: &Digest, tag: &str) -> Result<(String, Config)> {
    let (manifest, config) = image::read(store, digest)?;
    if let Some(found) = engine.image(tag)?
        && is_same(&found, &manifest, &config)
    {
        return Ok((found.id, config));
    }
    let shared = shared(engine, &config)?;
    let first = load(engine, store, digest, tag, shared);
    let found = match first {
        Err(error) if shared == 0 || error::problem(&error).is_some_and(|problem| problem.kind == Kind::Transient) => {
            return Err(error);
        }
        Err(_) => None,
        Ok(()) => engine.image(tag)?.filter(|found| is_same(found, &manifest, &config)),
    };
    if let Some(found) = found {
        return Ok((found.id, config));
    }
    if shared > 0 {
        load(engine, store, digest, tag, 0)?;
    }
    match engine.image(tag)? {
        Some(found) if is_same(&found, &manifest, &config) => Ok((found.id, config)),
        found => {
            engine.remove_image(tag)?;
            let is = found.map_or("nothing".into(), |found| format!("`{}`", found.id));
            let message = format!(
                "the container engine made {is} of the image {}, whose configuration is {}",
                digest.short(),
                manifest.config.digest
            );
            Err(Problem::failed(message).hint("the image is not started: it is not the one that was tested").into())
        }
    }
}

/// Whether the engine's image is that of the store. Docker's containerd store has ids of its own; there the layers and what
/// the program is started with have to be the same.
fn is_same(found: &Image, manifest: &Manifest, config: &Config) -> bool {
    let run = &config.config;
    let diff_ids = config.rootfs.diff_ids.iter().map(Digest::to_string);
    let same_layers = found.diff_ids.iter().cloned().eq(diff_ids);
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    same_layers
        && (found.id == manifest.config.digest.to_string()
            || (found.user == run.user
                && found.env == list(&run.env)
                && found.command == list(&run.cmd)
                && found.entrypoint == list(&run.entrypoint)
                && found.working_dir == run.working_dir))
}

/// How many of the lowest layers an image of ours in the engine has as well.
fn shared(engine: &Engine, config: &Config) -> Result<usize> {
    let wanted: Vec<String> = config.rootfs.diff_ids.iter().map(Digest::to_string).collect();
    let mut most = 0;
    for name in engine.images(&format!("{REGISTRY}/*"))? {
        let Some(found) = engine.image(&name)? else { continue };
        most = most.max(found.diff_ids.iter().zip(&wanted).take_while(|(has, wants)| has == wants).count());
    }
    Ok(most)
}

fn load(engine: &Engine, store: &Store, digest: &Digest, tag: &str, skip: usize) -> Result<()> {
    engine
        .load(|out| write(store, digest, tag, skip, out))
        .with_context(|| format!("cannot bring the image {} to the container engine", digest.short()))
}

/// Writes the archive, without the files of the lowest `skip` layers.
fn write(store: &Store, digest: &Digest, tag: &str, skip: usize, out: &mut dyn Write) -> Result<()> {
    let manifest = image::manifest(store, digest)?;
    let layers = image::layers(store, digest)?;
    let config = store.read(&manifest.config.digest)?;
    let config_path = format!("{}.json", manifest.config.digest.hex());
    let path = |diff_id: &Digest| format!("{}/layer.tar", diff_id.hex());
    let entry = json!([{
        "Config": config_path,
        "RepoTags": [tag],
        "Layers": layers.iter().map(|layer| path(&layer.diff_id)).collect::<Vec<_>>(),
    }]);
    let mut tar = tar::Builder::new(out);
    append(&mut tar, "manifest.json", &serde_json::to_vec(&entry)?)?;
    append(&mut tar, &config_path, &config)?;
    let mut written = std::collections::BTreeSet::new();
    for layer in layers.iter().skip(skip).filter(|layer| written.insert(layer.diff_id)) {
        let descriptor = &layer.descriptor;
        let media_type = &descriptor.media_type;
        let compression =
            Compression::of_media_type(media_type).with_context(|| format!("a layer of the unknown type `{media_type}`"))?;
        let file = || -> Result<_> { Ok(BufReader::with_capacity(1 << 20, fs_err::File::open(store.blob(&descriptor.digest))?)) };
        let path = path(&layer.diff_id);
        if compression != Compression::Zstd {
            copy(&mut tar, &path, descriptor.size, &mut file()?)?;
            continue;
        }
        let plain = || -> Result<_> { Ok(compression.reader(file()?)?) };
        // A tar says the size of an entry before its bytes, and a zstd stream need not say it at all.
        let size = std::io::copy(&mut plain()?, &mut std::io::sink())
            .with_context(|| format!("cannot decompress layer {}", descriptor.digest))?;
        copy(&mut tar, &path, size, &mut plain()?)?;
    }
    tar.into_inner().context("cannot finish the archive")?;
    Ok(())
}

fn append(tar: &mut tar::Builder<&mut dyn Write>, path: &str, bytes: &[u8]) -> Result<()> {
    copy(tar, path, bytes.len() as u64, &mut &bytes[..])
}

fn copy(tar: &mut tar::Builder<&mut dyn Write>, path: &str, size: u64, data: &mut dyn Read) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    tar.append_data(&mut header, path, data).with_context(|| format!("cannot write `{path}` into the archive"))
}
