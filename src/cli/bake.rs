//! `pipeline bake`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Global, artifact, disk, report, signals, ui};
use crate::artifact::disk::Disk;
use crate::bake::{self, Bake, Baked, Described, Wish};
use crate::build::base;
use crate::disk::export::Format;
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress as _;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:TAG of a host that was built; default: the pipeline of this folder
    #[arg(conflicts_with = "image")]
    name: Option<String>,
    /// Bake this image instead: `oci:DIR[:TAG]` or one in a registry, with a kernel in /usr/lib/modules/*/vmlinuz or /boot
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Formats to write: raw, qcow2, vmdk, vhd, gce; default: those of the pipeline file, or qcow2
    #[arg(long, value_delimiter = ',', value_name = "FORMAT")]
    format: Vec<String>,
    /// Folder the files are written to
    #[arg(long, short, value_name = "DIR", default_value = "out")]
    output: PathBuf,
    /// Keep the places that files have on this disk, so that an update moves little
    #[arg(long, value_name = "DISK")]
    previous: Option<String>,
    /// Show the partition table, what goes where and how full it is, and stop
    #[arg(long)]
    plan: bool,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    signals::watch()?;
    let (name, host) = host(&around, &args)?;
    let previous = match &args.previous {
        Some(wanted) => Some(previous(&around, wanted)?),
        None => None,
    };
    let formats = parse_formats(&args.format)?;
    let bake = Bake { store: &around.store, progress: &around.progress, threads: around.host.threads, path: &around.host.path };
    let wish = Wish { name: name.clone(), host, previous };
    if args.plan {
        let planned = bake::plan_of(&bake, &wish);
        around.progress.finish();
        let (table, warnings) = planned?;
        for warning in &warnings {
            around.progress.warn(warning.clone());
        }
        ui::answer(global, &json!({"schema": 1, "name": name, "host": host, "table": table, "warnings": warnings}), || {
            disk::table(&table)
        })?;
        return Ok(0);
    }
    let baked = bake_and_export(&bake, &wish, formats, &args.output).with_context(|| format!("cannot bake `{name}`"));
    around.progress.finish();
    let (baked, files) = baked?;
    answer(global, &baked, &files)?;
    Ok(0)
}

/// Bakes the host of `NAME:latest` and exports nothing.
pub fn only(around: &ui::Surroundings, name: &str) -> Result<()> {
    let tag = format!("{name}:latest");
    let host = around.store.tagged(&format!("{tag}.host"))?.context("a host that was just built")?;
    let bake = Bake { store: &around.store, progress: &around.progress, threads: around.host.threads, path: &around.host.path };
    let wish = Wish { name: tag.clone(), host: host.digest, previous: None };
    let baked = bake::bake(&bake, &wish).and_then(|baking| baking.finish(&around.store));
    around.progress.finish();
    baked.map(drop).with_context(|| format!("cannot bake `{tag}`"))
}

/// The exports are written while the store waits for its disk.
fn bake_and_export(bake: &Bake<'_>, wish: &Wish, mut formats: Vec<Format>, dir: &Path) -> Result<(Baked, Vec<Written>)> {
    let baking = bake::bake(bake, wish)?;
    if formats.is_empty() {
        formats = parse_formats(&baking.config.formats)?;
    }
    if formats.is_empty() {
        formats.push(Format::Qcow2);
    }
    let file_name = wish.name.split(':').next().unwrap_or(&wish.name);
    let files = export(bake, &baking.described(), &formats, dir, file_name)?;
    Ok((baking.finish(bake.store)?, files))
}

/// Name and manifest of the host image that is meant.
fn host(around: &ui::Surroundings, args: &Args) -> Result<(String, Digest)> {
    if let Some(reference) = &args.image {
        let (name, digest) = base::fetch(&around.build(), reference, &around.cwd)?;
        return Ok((name, digest));
    }
    let name = match &args.name {
        Some(name) => name.clone(),
        None => around.pipeline(None)?.name.to_string(),
    };
    let with_tag = if name.contains(':') { name.clone() } else { format!("{name}:latest") };
    let tag = if with_tag.ends_with(".host") { with_tag.clone() } else { format!("{with_tag}.host") };
    if let Some(descriptor) = around.store.tagged(&tag)? {
        return Ok((with_tag.trim_end_matches(".host").to_string(), descriptor.digest));
    }
    if name.starts_with("sha256:") {
        let (_, descriptor) = artifact::find(&around.store, &name)?;
        return Ok((format!("disk-{}:latest", descriptor.digest.short().trim_start_matches("sha256:")), descriptor.digest));
    }
    let base = name.split(':').next().unwrap_or(&name);
    let problem = Problem::usage(format!("the store has no host `{tag}`"));
    Err(match around.pipeline(Some(base)) {
        Ok(_) => problem.hint(format!("build it first: `pipeline build {base}`")),
        Err(_) => problem.hint("`pipeline artifact list` shows what there is; `--image` bakes an image of another tool"),
    }
    .into())
}

fn previous(around: &ui::Surroundings, wanted: &str) -> Result<Disk> {
    let (name, descriptor) = match around.store.tagged(&disk_tag(wanted))? {
        Some(descriptor) => (disk_tag(wanted), descriptor),
        None => artifact::find(&around.store, wanted)?,
    };
    let disk = crate::artifact::disk::read(&around.store, &descriptor.digest)?
        .ok_or_else(|| Problem::usage(format!("`{name}` is no disk")).hint("`pipeline artifact list` shows the disks"))?;
    around.progress.note(format!("files keep their places of {name} {}", disk.digest));
    Ok(disk)
}

/// The tag of a disk by the name of its pipeline.
pub fn disk_tag(name: &str) -> String {
    let with_tag = if name.contains(':') { name.to_string() } else { format!("{name}:latest") };
    if with_tag.ends_with(".disk") { with_tag } else { format!("{with_tag}.disk") }
}

fn parse_formats(names: &[String]) -> Result<Vec<Format>> {
    let mut formats: Vec<Format> = Vec::new();
    for name in names {
        let format: Format = name.parse()?;
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    Ok(formats)
}

/// A file that was written.
struct Written {
    format: Format,
    path: PathBuf,
    bytes: u64,
    seconds: f64,
}

fn export(bake: &Bake<'_>, disk: &Described<'_>, formats: &[Format], dir: &Path, name: &str) -> Result<Vec<Written>> {
    fs_err::create_dir_all(dir)?;
    let mut files = Vec::new();
    for format in formats {
        let path = dir.join(format!("{name}.{}", format.extension()));
        let started = std::time::Instant::now();
        bake::export(bake, disk, *format, &path)?;
        let bytes = fs_err::metadata(&path)?.len();
        files.push(Written { format: *format, path, bytes, seconds: started.elapsed().as_secs_f64() });
    }
    Ok(files)
}

fn answer(global: &Global, baked: &Baked, files: &[Written]) -> Result<()> {
    let rows: Vec<_> = files
        .iter()
        .map(|file| json!({"format": file.format.to_string(), "path": file.path, "bytes": file.bytes, "seconds": file.seconds}))
        .collect();
    let value = json!({
        "schema": 1,
        "name": baked.name,
        "digest": baked.disk.digest,
        "host": baked.disk.config.host,
        "root_hash": baked.disk.config.root_hash,
        "cached": baked.cached,
        "seconds": baked.seconds,
        "phases": baked.phases,
        "files": rows,
    });
    ui::answer(global, &value, || {
        let how = if baked.cached { "unchanged".to_string() } else { format!("{:.1} s", baked.seconds) };
        let mut text = format!("{} {} ({how})\n", baked.name, baked.disk.digest);
        for file in files {
            text.push_str(&format!("  {} {} ({:.1} s)\n", file.path.display(), report::bytes(file.bytes), file.seconds));
        }
        text
    })
}
