//! Finds what a host is made of: the images of its apps, its ports and user ids, its files.

use std::collections::BTreeMap;
use std::io::{BufReader, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result};

use super::apps::{AppInput, check_ports, exposed_port, identity, uid_bases};
use super::{Machine, configuration, packages};
use crate::artifact::image;
use crate::artifact::store::{Store, write_cache};
use crate::build::plan::{Part, Step};
use crate::build::record::StepRecord;
use crate::build::{Build, Images, Prepared, look_up, prepare};
use crate::config::types::{App, AppImage, Host, Pipeline};
use crate::error::Problem;
use crate::oci::compress::Compression;
use crate::oci::digest::Digest;

/// The pipeline in `file`, for its application image alone.
///
/// # Errors
/// Usage: what is wrong in it, or that it makes no application image.
pub fn pipeline(file: &Path) -> Result<Pipeline> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let pipeline = crate::config::load(file, folder)?;
    if !pipeline.has_image() {
        return Err(Problem::usage(format!("pipeline `{}` makes a host only, so it is no app", pipeline.name))
            .hint("an app is a pipeline with a `runtime`")
            .into());
    }
    Ok(Pipeline { host: None, ..pipeline })
}

/// The apps of `host`, sorted by name, as far as their images are known without building.
pub(in crate::build) fn apps(build: &Build<'_>, host: &Host, locked: bool, images: &Images) -> Result<Vec<AppInput>> {
    let bases = uid_bases(&host.apps);
    let mut inputs = Vec::new();
    for app in &host.apps {
        let mut input = AppInput {
            app: app.clone(),
            image: None,
            stand_in: None,
            port: app.port,
            image_port: None,
            uid_base: bases.get(&app.name).copied().unwrap_or_default(),
            ids: None,
        };
        match &app.image {
            // Known when this pipeline is prepared.
            AppImage::Own => {}
            AppImage::Pipeline(file) => match images.get(file) {
                Some(digest) => set_image(build, &mut input, *digest)?,
                None => {
                    let prepared = prepare(build, &pipeline(file)?, locked)?;
                    expect_image(build, &mut input, &prepared)?;
                }
            },
            AppImage::Tag(tag) => {
                let found = build.store.tagged(tag)?;
                let descriptor = found.ok_or_else(|| {
                    let name = tag.split(':').next().unwrap_or_default();
                    not_there(app, tag).hint(format!(
                        "build it (`pipeline build {name}`), load it (`pipeline artifact load`), or tag one (`pipeline artifact tag`)"
                    ))
                })?;
                set_image(build, &mut input, descriptor.digest)?;
            }
            AppImage::Digest(name, digest) => {
                if !build.store.blob(digest).is_file() {
                    return Err(not_there(app, &format!("{name}@{digest}"))
                        .hint("build, pull or load it first: `pipeline artifact pull`, `pipeline artifact load`")
                        .into());
                }
                set_image(build, &mut input, *digest)?;
            }
        }
        inputs.push(input);
    }
    inputs.sort_by(|a, b| a.app.name.cmp(&b.app.name));
    Ok(inputs)
}

fn not_there(app: &App, wanted: &str) -> Problem {
    Problem::failed(format!("the app `{}` is not built: the store has no image `{wanted}`", app.name))
}

/// Fills in what an image in the store says.
fn set_image(build: &Build<'_>, input: &mut AppInput, digest: Digest) -> Result<()> {
    let (_, config) = image::read(build.store, &digest)?;
    input.image = Some(digest);
    input.image_port = exposed_port(&config.config);
    input.port = input.app.port.or(input.image_port);
    let ids = ids(build.store, &digest, &config.config.user);
    input.ids = Some(ids.with_context(|| format!("the user of app `{}`", input.app.name))?);
    Ok(())
}

/// Ids of the user of an image. Where they need its tables, these are looked for in its layers once.
fn ids(store: &Store, digest: &Digest, user: &str) -> Result<(u32, u32)> {
    if let Some(ids) = plain_ids(user) {
        return Ok(ids);
    }
    let cache = store.cache("listings").join(format!("user-{}.json", digest.hex()));
    if let Some(ids) = fs_err::read(&cache).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
        return Ok(ids);
    }
    let layers = image::layers(store, digest)?;
    let runs = identity(user, &file(store, &layers, "etc/passwd")?, &file(store, &layers, "etc/group")?)?;
    write_cache(&cache, &serde_json::to_vec(&(runs.uid, runs.gid))?)?;
    Ok((runs.uid, runs.gid))
}

/// `UID:GID`, both numbers.
fn plain_ids(user: &str) -> Option<(u32, u32)> {
    let (uid, gid) = user.split_once(':')?;
    Some((uid.parse().ok()?, gid.parse().ok()?))
}

/// A file of an image, by the uppermost layer that has it; empty for none.
fn file(store: &Store, layers: &[image::Layer], path: &str) -> Result<String> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let removed = [format!("{folder}/.wh.{name}"), format!("{folder}/.wh..wh..opq")];
    for layer in layers.iter().rev() {
        let compression = Compression::of_media_type(&layer.descriptor.media_type)
            .with_context(|| format!("the unknown media type `{}`", layer.descriptor.media_type))?;
        let blob = fs_err::File::open(store.blob(&layer.descriptor.digest))?;
        let mut archive = tar::Archive::new(compression.reader(BufReader::new(blob))?);
        let mut is_removed = false;
        for entry in archive.entries()? {
            let mut entry = entry?;
            let found = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_string();
            if found == path && entry.header().entry_type().is_file() {
                let mut text = Vec::new();
                entry.read_to_end(&mut text)?;
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            is_removed |= removed.contains(&found);
        }
        if is_removed {
            break;
        }
    }
    Ok(String::new())
}

/// Fills in what is known of the image `prepared` will make; all of it, when nothing would run.
fn expect_image(build: &Build<'_>, input: &mut AppInput, prepared: &Prepared) -> Result<()> {
    let steps: Vec<Step> = prepared.plan()?.into_iter().filter(|step| step.part != Part::Host).collect();
    let found: Option<Vec<StepRecord>> = look_up(build, &steps)?.into_iter().collect();
    input.stand_in = steps.last().map(|step| step.key);
    let builder = prepared.builder.as_ref().and_then(|builder| builder.meta.port);
    input.image_port = prepared.pipeline.image.port.or(builder);
    if let Some(records) = found {
        let recipe = crate::build::image::recipe(prepared, &steps, &records)?;
        let digest = image::descriptor(&recipe)?.digest;
        if build.store.blob(&digest).is_file() {
            return set_image(build, input, digest);
        }
        input.image = Some(digest);
        input.image_port = exposed_port(&recipe.config);
    }
    input.port = input.app.port.or(input.image_port);
    let user = prepared.pipeline.image.user.clone().or_else(|| Some(prepared.builder.as_ref()?.meta.user.clone()));
    input.ids = user.as_deref().and_then(plain_ids);
    Ok(())
}

/// Puts the machine into `prepared`, whose own image may be one of its apps.
pub(in crate::build) fn machine(build: &Build<'_>, prepared: &mut Prepared, host: &Host, mut apps: Vec<AppInput>) -> Result<()> {
    for input in apps.iter_mut().filter(|input| input.app.image == AppImage::Own) {
        expect_image(build, input, prepared)?;
    }
    check_ports(&apps)?;
    note_twins(build, &apps);
    let configuration = configuration::folder(&prepared.pipeline, host, &apps)?;
    prepared.machine = Some(Machine { packages: packages::folder(host)?, configuration, apps });
    Ok(())
}

/// One image as two apps is fine, but each holds its own data.
fn note_twins(build: &Build<'_>, apps: &[AppInput]) {
    let mut seen: BTreeMap<Digest, &str> = BTreeMap::new();
    for app in apps {
        if let Some(other) = app.image.and_then(|digest| seen.insert(digest, &app.app.name)) {
            build.progress.note(format!("the apps `{other}` and `{}` are the same image; each has its own data", app.app.name));
        }
    }
}

/// Tells the host's apps the digest of this pipeline's own image; whether any of them is it and did not know.
pub(in crate::build) fn own_image(build: &Build<'_>, prepared: &mut Prepared, digest: Digest) -> Result<bool> {
    let (Some(host), Some(mut machine)) = (prepared.pipeline.host.clone(), prepared.machine.take()) else { return Ok(false) };
    let mut news = false;
    for input in machine.apps.iter_mut().filter(|input| input.app.image == AppImage::Own) {
        let before = (input.image, input.port, input.ids);
        set_image(build, input, digest)?;
        news |= before != (input.image, input.port, input.ids);
    }
    if news {
        check_ports(&machine.apps)?;
        machine.configuration = configuration::folder(&prepared.pipeline, &host, &machine.apps)?;
    }
    prepared.machine = Some(machine);
    Ok(news)
}
