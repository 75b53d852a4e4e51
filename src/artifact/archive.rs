//! Images in one file: an OCI image layout as a tar, with the `manifest.json` that `docker load`
//! reads beside it.
//!
//! Docker before 23 cannot read zstd layers, so `manifest.json` points at plain copies of those,
//! outside of the layout: `DIFFID/layer.tar`, as `docker save` names them.
//!
//! The same image gives the same file: sorted entries, no times, no owners.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::image;
use super::store::{Descriptor, Index, REF_NAME, Store};
use crate::error::Problem;
use crate::oci::compress::Compression;
use crate::oci::digest::Digest;

/// Writes the image `descriptor`, named `name` (`NAME:TAG`), to `out`.
pub fn export(store: &Store, name: &str, descriptor: &Descriptor, out: &mut dyn Write) -> Result<()> {
    let manifest = image::manifest(store, &descriptor.digest)?;
    let is_image = manifest.artifact_type.is_none();
    let mut entry = descriptor.clone();
    // The layout's own name is what skopeo finds; the full one is what Docker and containerd tag.
    entry.annotations = BTreeMap::from([
        (REF_NAME.to_string(), name.to_string()),
        ("io.containerd.image.name".to_string(), format!("docker.io/library/{name}")),
    ]);
    let index = Index { manifests: vec![entry], ..Index::default() };
    let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    // Docker and podman read images only; skopeo and oras read the layout.
    let layers = if is_image { image::layers(store, &descriptor.digest)? } else { Vec::new() };
    let is_zstd = |layer: &&image::Layer| Compression::of_media_type(&layer.descriptor.media_type) == Some(Compression::Zstd);
    let plain_path = |layer: &image::Layer| format!("{}/layer.tar", layer.diff_id.hex());
    let docker_path = |layer: &image::Layer| if is_zstd(&layer) { plain_path(layer) } else { path(&layer.descriptor.digest) };
    let docker = json!([{
        "Config": path(&manifest.config.digest),
        "RepoTags": [name],
        "Layers": layers.iter().map(docker_path).collect::<Vec<_>>(),
    }]);
    let mut blobs: BTreeMap<String, (Digest, u64)> = BTreeMap::new();
    for descriptor in std::iter::once(&manifest.config).chain(&manifest.layers).chain(std::iter::once(descriptor)) {
        blobs.insert(path(&descriptor.digest), (descriptor.digest, descriptor.size));
    }
    let mut tar = tar::Builder::new(out);
    for dir in ["blobs/", "blobs/sha256/"] {
        append(&mut tar, dir, tar::EntryType::Directory, 0, &mut std::io::empty())?;
    }
    for (path, (digest, size)) in &blobs {
        store.verify(digest)?;
        append(&mut tar, path, tar::EntryType::Regular, *size, &mut fs_err::File::open(store.blob(digest))?)?;
    }
    let plain: BTreeMap<String, Digest> =
        layers.iter().filter(is_zstd).map(|layer| (plain_path(layer), layer.descriptor.digest)).collect();
    for (path, digest) in &plain {
        append(&mut tar, path.trim_end_matches("layer.tar"), tar::EntryType::Directory, 0, &mut std::io::empty())?;
        let open = || -> Result<_> { Ok(Compression::Zstd.reader(BufReader::new(fs_err::File::open(store.blob(digest))?))?) };
        // A tar says the size of an entry before its bytes, and a zstd stream need not say it at all.
        let size =
            std::io::copy(&mut open()?, &mut std::io::sink()).with_context(|| format!("cannot decompress layer {digest}"))?;
        append(&mut tar, path, tar::EntryType::Regular, size, &mut open()?)?;
    }
    let mut files = vec![("index.json", serde_json::to_vec(&index)?)];
    if is_image {
        files.push(("manifest.json", serde_json::to_vec(&docker)?));
    }
    files.push(("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    for (path, bytes) in files {
        append(&mut tar, path, tar::EntryType::Regular, bytes.len() as u64, &mut &bytes[..])?;
    }
    tar.into_inner().context("cannot finish the archive")?.flush()?;
    Ok(())
}

fn append(
    tar: &mut tar::Builder<&mut dyn Write>,
    path: &str,
    kind: tar::EntryType,
    size: u64,
    data: &mut dyn Read,
) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    tar.append_data(&mut header, path, data).with_context(|| format!("cannot write `{path}` into the archive"))
}

/// Takes the images of an OCI archive into the store and tags them; answers their names.
///
/// # Errors
/// Not an OCI archive; a blob whose bytes do not have its digest; an image with a blob missing.
pub fn load(store: &Store, reader: impl Read) -> Result<Vec<(String, Digest)>> {
    let mut archive = tar::Archive::new(reader);
    let mut index: Option<Index> = None;
    for entry in archive.entries().context("this is not a tar archive")? {
        let mut entry = entry.map_err(|error| Problem::failed(format!("the archive is broken: {error}")))?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_string();
        if let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
            let digest: Digest =
                hex.parse().map_err(|_| Problem::failed(format!("the archive holds `{path}`, which is no digest")))?;
            let size = entry.size();
            if !store.has(&digest, size) || store.verify(&digest).is_err() {
                store.put_reader(&digest, &mut entry)?;
            }
        } else if path == "index.json" {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            index = Some(
                serde_json::from_slice(&bytes)
                    .map_err(|error| Problem::failed(format!("the archive's index.json is broken: {error}")))?,
            );
        }
    }
    let index = index.ok_or_else(|| {
        Problem::failed("the archive has no index.json, so it is no OCI image layout")
            .hint("`docker save` of Docker 25 and newer and `skopeo copy … oci-archive:FILE` write one")
    })?;
    let mut loaded = Vec::new();
    for descriptor in index.manifests {
        let named = descriptor.annotations.get(REF_NAME).cloned();
        let Some(mut name) = named else { continue };
        let manifest = image::manifest(store, &descriptor.digest)?;
        for layer in &manifest.layers {
            if !store.has(&layer.digest, layer.size) {
                return Err(Problem::failed(format!("the archive lacks layer {} of `{name}`", layer.digest)).into());
            }
        }
        if !name.contains(':') {
            // A bare tag, as `skopeo copy … oci-archive:FILE:TAG` writes it, keeps the full name beside it.
            name = descriptor
                .annotations
                .get("io.containerd.image.name")
                .and_then(|full| full.rsplit('/').next())
                .map_or_else(|| format!("loaded:{name}"), String::from);
        }
        let digest = descriptor.digest;
        store.tag(&name, &Descriptor { annotations: BTreeMap::new(), ..descriptor })?;
        loaded.push((name, digest));
    }
    if loaded.is_empty() {
        return Err(Problem::failed("the archive names no image").into());
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::image::{Layer, Recipe, RunConfig};

    #[test]
    fn what_is_exported_loads_again() {
        let dir = tempfile::tempdir().unwrap();
        let one = Store::open(&dir.path().join("one")).unwrap();
        let digest = one.put(b"layer").unwrap();
        let layer = Layer {
            descriptor: Descriptor::new("application/vnd.oci.image.layer.v1.tar", digest, 5),
            diff_id: digest,
            created_by: "x".into(),
        };
        let recipe = Recipe { config: RunConfig::default(), layers: vec![layer], annotations: BTreeMap::new(), created: 0 };
        let descriptor = image::write(&one, &recipe).unwrap();
        let mut first = Vec::new();
        export(&one, "a:1", &descriptor, &mut first).unwrap();
        let mut again = Vec::new();
        export(&one, "a:1", &descriptor, &mut again).unwrap();
        assert!(first == again);
        let two = Store::open(&dir.path().join("two")).unwrap();
        assert_eq!(load(&two, &first[..]).unwrap(), [("a:1".to_string(), descriptor.digest)]);
        assert_eq!(two.tagged("a:1").unwrap().unwrap().digest, descriptor.digest);
        assert_eq!(two.read(&digest).unwrap(), b"layer");
        assert!(load(&two, &b"nothing"[..]).is_err());
    }
}
