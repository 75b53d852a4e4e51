//! `pipeline artifact …`: what is in the store.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Global, report, signals, ui};
use crate::artifact::store::{Descriptor, INDEX_TYPE, REF_NAME, Store};
use crate::artifact::{archive, image, release, remote};
use crate::build::{record, verify};
use crate::error::{Problem, nearest};
use crate::oci::digest::Digest;
use crate::progress::Progress as _;

#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the artifacts in the store
    List {
        /// Also what is attached to them: signatures, SBOMs, provenance, reports
        #[arg(long)]
        all: bool,
    },
    /// Show an artifact: layers, settings, where it came from; of a release what is in it, what is attached and who signed
    Show {
        /// NAME, NAME:TAG or a digest
        image: String,
    },
    /// Show what changed between two artifacts: packages, kernel, files, size
    Diff {
        /// NAME, NAME:TAG or a digest
        from: String,
        /// NAME, NAME:TAG or a digest
        to: String,
        /// Name every file, not only their numbers
        #[arg(long)]
        files: bool,
    },
    /// Write an image to a file that `docker load`, `podman load` and `skopeo` read
    Export {
        /// NAME, NAME:TAG or a digest
        image: String,
        /// The file; `-` for standard output
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
    /// Take images out of an OCI archive
    Load {
        /// The file; `-` for standard input
        file: PathBuf,
    },
    /// Push an artifact, what it names and what is attached to it to a registry
    Push(super::registry::PushArgs),
    /// Pull an artifact, what it names and what is attached to it from a registry
    Pull(super::registry::PullArgs),
    /// Copy an artifact from one place in a registry to another, all of it
    Copy(super::registry::CopyArgs),
    /// Give an image another name
    Tag {
        /// NAME, NAME:TAG or a digest
        image: String,
        /// NAME:TAG
        name: String,
    },
    /// Take a name away from an image
    Untag {
        /// NAME:TAG
        name: String,
    },
    /// Read every byte of an artifact and compare its digest; with keys, also who signed it and, of a release, everything in it
    Verify {
        /// NAME, NAME:TAG or a digest
        image: String,
        /// Public key that has to have signed; of several one is enough
        #[arg(long = "key", value_name = "FILE", conflicts_with = "rebuild")]
        keys: Vec<PathBuf>,
        /// Build the pipeline again from nothing and compare, naming the first file that differs
        #[arg(long)]
        rebuild: bool,
    },
    /// Sign an artifact, where cosign 2 and 3 look; of a release everything in it
    Sign(super::signed::SignArgs),
    /// Attach a test report to a release; the release stays as it is
    Report(super::signed::ReportArgs),
    /// Remove what no tag, no recent build and no environment needs
    Prune {
        /// Show what would go
        #[arg(long)]
        dry_run: bool,
        /// Builds of each pipeline that stay
        #[arg(long, value_name = "N", default_value_t = 3)]
        keep: usize,
    },
}

pub fn run(global: &Global, verb: Verb) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    match verb {
        Verb::List { all } => list(global, &around, all),
        Verb::Show { image } => show(global, &around, &image),
        Verb::Diff { from, to, files } => super::diff::run(global, &around, &from, &to, files),
        Verb::Export { image, output } => export(&around, &image, &output),
        Verb::Load { file } => load(global, &around, &file),
        Verb::Push(args) => super::registry::push(global, &around, &args),
        Verb::Pull(args) => super::registry::pull(global, &around, &args),
        Verb::Copy(args) => super::registry::copy(global, &around, &args),
        Verb::Tag { image, name } => {
            let (_, descriptor) = find(&around.store, &image)?;
            check_tag(&name)?;
            around.store.tag(&name, &Descriptor { annotations: Default::default(), ..descriptor })?;
            Ok(0)
        }
        Verb::Untag { name } => {
            let (name, _) = find(&around.store, &name)?;
            around.store.untag(&name)?;
            Ok(0)
        }
        Verb::Verify { image, keys, .. } if !keys.is_empty() => super::signed::verify(global, &around.store, &image, &keys),
        Verb::Verify { image, rebuild, .. } => verify(global, &around, &image, rebuild),
        Verb::Sign(args) => super::signed::sign(global, &around, &args),
        Verb::Report(args) => super::signed::attach(global, &around, &args),
        Verb::Prune { dry_run, keep } => super::prune::run(global, &around, dry_run, keep),
    }
}

/// `name:tag` as OCI layouts allow it (image layout specification, "org.opencontainers.image.ref.name").
pub fn check_tag(name: &str) -> Result<()> {
    let good = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-/".contains(&c))
            && text.as_bytes()[0].is_ascii_alphanumeric()
    };
    match name.split_once(':') {
        Some((image, tag)) if good(image) && good(tag) => Ok(()),
        _ => Err(Problem::usage(format!("`{name}` is not a name for an image"))
            .hint("write NAME:TAG, from letters, digits, `.`, `_`, `-`")
            .into()),
    }
}

/// An artifact by name, name and tag, or digest (also its start). Where no image bears the name, it is that of a release.
pub fn find(store: &Store, wanted: &str) -> Result<(String, Descriptor)> {
    // `NAME@DIGEST` says the name for people only.
    let wanted = wanted.split_once('@').map_or(wanted, |(_, digest)| digest);
    let index = store.index()?;
    let name = |descriptor: &Descriptor| descriptor.annotations.get(REF_NAME).cloned().unwrap_or_default();
    let with_tag = if wanted.contains(':') { wanted.to_string() } else { format!("{wanted}:latest") };
    for tag in [with_tag.clone(), format!("{with_tag}.release")] {
        if let Some(found) = index.manifests.iter().find(|descriptor| name(descriptor) == tag) {
            return Ok((tag, found.clone()));
        }
    }
    let hex = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    if hex.len() >= 12 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        if let Some(found) = index.manifests.iter().find(|descriptor| descriptor.digest.hex().starts_with(hex)) {
            return Ok((name(found), found.clone()));
        }
        if let Ok(digest) = wanted.parse::<Digest>()
            && store.blob(&digest).exists()
        {
            return Ok((format!("image:{}", digest.short()), remote::described(store, &digest)?));
        }
    }
    let names: Vec<String> = index.manifests.iter().map(name).collect();
    let short = names.iter().filter_map(|name| name.strip_suffix(":latest"));
    let near = nearest(wanted, names.iter().map(String::as_str).chain(short));
    let problem = Problem::usage(format!("the store has no image `{wanted}`"));
    Err(match near {
        Some(near) => problem.hint(format!("did you mean `{near}`?")),
        None if names.is_empty() => problem.hint("the store is empty; `pipeline build` makes an image"),
        None => problem.hint("`pipeline artifact list` shows what there is"),
    }
    .into())
}

#[derive(Serialize)]
struct Listed {
    name: String,
    kind: String,
    digest: Digest,
    /// Bytes of configuration, manifest and layers.
    bytes: u64,
    created: Option<String>,
}

fn list(global: &Global, around: &ui::Surroundings, all: bool) -> Result<u8> {
    let mut rows = Vec::new();
    for descriptor in around.store.index()?.manifests {
        let name = descriptor.annotations.get(REF_NAME).cloned().unwrap_or_default();
        // What is attached to an artifact is told with that.
        if name.starts_with("sha256-") && !all {
            continue;
        }
        let reached = remote::reach(&around.store, &descriptor.digest).with_context(|| format!("artifact `{name}`"))?;
        let bytes = descriptor.size + reached.blobs.values().sum::<u64>();
        let (kind, created) = if descriptor.media_type == INDEX_TYPE {
            (descriptor.artifact_type.clone().unwrap_or_else(|| "index".into()), None)
        } else {
            let manifest = image::manifest(&around.store, &descriptor.digest).with_context(|| format!("artifact `{name}`"))?;
            let created = manifest.annotations.get("org.opencontainers.image.created").cloned();
            (crate::artifact::kind(&manifest, &name), created)
        };
        rows.push(Listed { kind, name, digest: descriptor.digest, bytes, created });
    }
    ui::answer(global, &json!({"schema": 1, "images": rows}), || {
        if rows.is_empty() {
            return "the store is empty\n".into();
        }
        let mut table = vec![["NAME", "KIND", "DIGEST", "SIZE", "DATE"].map(String::from).to_vec()];
        table.extend(rows.iter().map(|row| {
            vec![
                row.name.clone(),
                row.kind.clone(),
                row.digest.short(),
                report::bytes(row.bytes),
                row.created.clone().unwrap_or_default(),
            ]
        }));
        report::table(&table)
    })?;
    Ok(0)
}

fn show(global: &Global, around: &ui::Surroundings, wanted: &str) -> Result<u8> {
    let (name, descriptor) = find(&around.store, wanted)?;
    if descriptor.artifact_type.as_deref() == Some(release::RELEASE_TYPE) {
        return super::signed::show(global, &around.store, &name, &release::read(&around.store, &descriptor.digest)?);
    }
    if let Some(disk) = crate::artifact::disk::read(&around.store, &descriptor.digest)? {
        return super::disk::show(global, &name, &disk);
    }
    let (manifest, _) = image::read(&around.store, &descriptor.digest)?;
    let config: Value = serde_json::from_slice(&around.store.read(&manifest.config.digest)?)?;
    let layers: Vec<Value> = manifest
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            json!({
                "digest": layer.digest,
                "diff_id": config["rootfs"]["diff_ids"][index],
                "bytes": layer.size,
                "media_type": layer.media_type,
                "made_by": config["history"][index]["created_by"],
            })
        })
        .collect();
    let pipeline = name.split(':').next().unwrap_or_default();
    let build = record::builds(&around.store, pipeline)?.into_iter().rev().find(|build| build.digest == descriptor.digest);
    let built = build
        .as_ref()
        .map(|build| json!({"time": image::timestamp(build.time).ok(), "head": build.head, "changed_files": build.changed}));
    let value = json!({"schema": 1, "name": name, "digest": descriptor.digest, "annotations": manifest.annotations, "config": config["config"], "layers": layers, "built": built});
    ui::answer(global, &value, || show_text(&value))?;
    Ok(0)
}

fn show_text(value: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), String::from);
    let mut lines = vec![format!("{} {}", text(&value["name"]), text(&value["digest"]))];
    for (index, layer) in value["layers"].as_array().into_iter().flatten().enumerate() {
        let size = report::bytes(layer["bytes"].as_u64().unwrap_or(0));
        lines.push(format!("  layer {}: {} {size} {}", index + 1, text(&layer["made_by"]), text(&layer["digest"])));
    }
    for (key, entry) in value["config"].as_object().into_iter().flatten() {
        lines.push(format!("  {key}: {entry}"));
    }
    for (key, entry) in value["annotations"].as_object().into_iter().flatten() {
        lines.push(format!("  {key}: {}", text(entry)));
    }
    if let Some(built) = value["built"].as_object() {
        let from = built["head"].as_str().map(|head| format!(" from {head} with {} changed files", built["changed_files"]));
        lines.push(format!("  built: {}{}", text(&built["time"]), from.unwrap_or_default()));
    }
    lines.join("\n") + "\n"
}

fn export(around: &ui::Surroundings, wanted: &str, output: &std::path::Path) -> Result<u8> {
    let (name, descriptor) = find(&around.store, wanted)?;
    if output.as_os_str() == "-" {
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        archive::export(&around.store, &name, &descriptor, &mut stdout)?;
        stdout.flush()?;
        return Ok(0);
    }
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let mut temp = tempfile::Builder::new()
        .prefix(".export-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)
        .with_context(|| format!("cannot make a file in `{}`", dir.display()))?;
    archive::export(&around.store, &name, &descriptor, temp.as_file_mut())
        .with_context(|| format!("cannot write `{}`", output.display()))?;
    temp.as_file().sync_all().with_context(|| format!("cannot write `{}`", output.display()))?;
    temp.persist(output).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", output.display()))?;
    around.progress.note(format!("wrote `{}`", output.display()));
    Ok(0)
}

fn load(global: &Global, around: &ui::Surroundings, file: &std::path::Path) -> Result<u8> {
    let loaded = if file.as_os_str() == "-" {
        archive::load(&around.store, std::io::stdin().lock())
    } else {
        let opened = fs_err::File::open(file).map_err(|error| Problem::usage(error.to_string()))?;
        archive::load(&around.store, std::io::BufReader::new(opened)).with_context(|| format!("cannot load `{}`", file.display()))
    }?;
    let rows: Vec<Value> = loaded.iter().map(|(name, digest)| json!({"name": name, "digest": digest})).collect();
    ui::answer(global, &json!({"schema": 1, "images": rows}), || {
        loaded.iter().map(|(name, digest)| format!("{name} {digest}\n")).collect()
    })?;
    Ok(0)
}

fn verify(global: &Global, around: &ui::Surroundings, wanted: &str, rebuild: bool) -> Result<u8> {
    let (name, descriptor) = find(&around.store, wanted)?;
    let verified = if rebuild {
        if name.ends_with(".disk") {
            return Err(Problem::usage(format!("`{name}` is baked, not built"))
                .hint("verify its host with --rebuild; `pipeline bake` of the same host gives the same disk")
                .into());
        }
        signals::watch()?;
        let pipeline = around.pipeline(name.split(':').next())?;
        // Beside the store: the same file system, and room for a second one.
        let scratch = around.store.cache("work").join(format!("rebuild-{}", std::process::id()));
        let result = verify::rebuild(&around.build(), &pipeline, &descriptor.digest, name.ends_with(".host"), &scratch);
        around.progress.finish();
        result?
    } else {
        verify::blobs(&around.store, &descriptor.digest)?
    };
    let good = verified.difference.is_none();
    ui::answer(global, &verified, || match (&verified.rebuilt, &verified.difference) {
        (None, _) => format!("{name} {}: {} blobs are as their digests say\n", verified.digest, verified.blobs),
        (Some(_), None) => format!(
            "{name} {}: {} blobs are as their digests say, and a build from nothing gives the same image\n",
            verified.digest, verified.blobs
        ),
        (Some(digest), Some(difference)) => {
            format!("{name} {}: a build from nothing gives {digest}\nfirst difference: {difference}\n", verified.digest)
        }
    })?;
    Ok(u8::from(!good))
}
