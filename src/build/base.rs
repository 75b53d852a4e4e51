//! What a build stands on, pinned: package sets, images, layouts and tar files.
//!
//! `build` takes what `pipeline.lock` says and resolves only what is not in it; `update` resolves
//! everything anew. Resolving is apt's, behind [`super::debian`]; images come by the distribution
//! protocol into the store.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::debian::apt::Apt;
use super::debian::mirrors::{self, Archives};
use super::debian::{fetch, repository};
use super::lock::{self, Lock, PackageChange, Request, Set};
use super::{Build, host_tree, inside, work};
use crate::artifact::image;
use crate::artifact::remote::Sink;
use crate::artifact::store::{Index, REF_NAME, Store};
use crate::config::registries;
use crate::config::types::{Base, BuilderRef, Configure, Debian, Pipeline};
use crate::error::Problem;
use crate::oci::credentials::Given;
use crate::oci::digest::Digest;
use crate::oci::registry::{Reference, Registry, RegistryOptions};

/// What `ansible-playbook` is in.
const ANSIBLE: &str = "ansible-core";

/// An image that takes the place of a base, in the store or to be pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseImage {
    /// As written.
    pub name: String,
    /// What the lock says: an index or a manifest.
    pub pinned: Digest,
    /// The manifest for this platform; `None` until it is pulled.
    pub manifest: Option<Digest>,
}

/// The package sets of a pipeline: what each asks for, bottom first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRequest {
    /// The step that installs it: `base`, `packages`, `build-packages`, `host-packages`, `host-tools`.
    pub step: &'static str,
    pub request: Request,
}

/// The requests of a pipeline. `image` is the digest of an image or tar base and `suite` its
/// Debian suite, where packages are asked for on top of one.
pub fn requests(pipeline: &Pipeline, builder: Option<&super::builder::Meta>, image: Option<(&Digest, &str)>) -> Vec<SetRequest> {
    let mut requests = Vec::new();
    let mut runtime = pipeline.runtime.packages.clone();
    runtime.extend(builder.map(|meta| meta.packages.clone()).unwrap_or_default());
    let mut building = pipeline.build.packages.clone();
    building.extend(builder.map(|meta| meta.build_packages.clone()).unwrap_or_default());
    if pipeline.configure.iter().any(|configure| matches!(configure, Configure::Ansible(_))) {
        building.push(ANSIBLE.into());
    }
    if !pipeline.has_image() {
        runtime.clear();
        building.clear();
    }
    let replaced = replaced(pipeline);
    let (suite, repositories, on) = match (&pipeline.base, image) {
        (_, Some((digest, suite))) if replaced => (suite.to_string(), Vec::new(), Some(digest.to_string())),
        _ if replaced => return requests,
        (Base::Debian(debian), _) => {
            let request = mirrors::request(debian.suite.as_str(), &debian.packages, &debian.repositories, None);
            let key = request.key();
            requests.push(SetRequest { step: "base", request });
            (debian.suite.to_string(), debian.repositories.clone(), Some(key))
        }
        (Base::Image { packages, .. } | Base::Oci { packages, .. } | Base::Tar { packages, .. }, Some((digest, suite))) => {
            // On a host they are installed with its own.
            runtime.extend(packages.iter().filter(|_| pipeline.has_image()).cloned());
            (suite.to_string(), Vec::new(), Some(digest.to_string()))
        }
        _ => return requests,
    };
    let mut chain = |sets: [(&'static str, Vec<String>); 2]| {
        let mut on = on.clone();
        for (step, packages) in sets {
            if !packages.is_empty() {
                let request = mirrors::request(&suite, &packages, &repositories, on.clone());
                on = Some(request.key());
                requests.push(SetRequest { step, request });
            }
        }
    };
    chain([("packages", runtime), ("build-packages", building)]);
    if let Some(host) = &pipeline.host {
        let mut packages = host_tree::packages::packages(host);
        if let Base::Image { packages: own, .. } | Base::Oci { packages: own, .. } | Base::Tar { packages: own, .. } =
            &pipeline.base
        {
            packages.extend(own.iter().cloned());
        }
        chain([("host-packages", packages), ("host-tools", host_tree::packages::tools(host))]);
    }
    requests
}

/// Whether an S2I builder image takes the place of the base.
pub fn replaced(pipeline: &Pipeline) -> bool {
    matches!(pipeline.runtime.builder, BuilderRef::Image(_))
}

/// Whether a pipeline asks for packages on top of something that is not `debian:`.
pub fn packages_on_image(pipeline: &Pipeline, builder: Option<&super::builder::Meta>) -> bool {
    let own: &[String] = match &pipeline.base {
        _ if replaced(pipeline) => &[],
        Base::Debian(_) | Base::Scratch => return false,
        Base::Image { packages, .. } | Base::Oci { packages, .. } | Base::Tar { packages, .. } => packages,
    };
    !own.is_empty()
        || pipeline.host.is_some()
        || !pipeline.runtime.packages.is_empty()
        || !pipeline.build.packages.is_empty()
        || pipeline.configure.iter().any(|configure| matches!(configure, Configure::Ansible(_)))
        || builder.is_some_and(|meta| !meta.packages.is_empty() || !meta.build_packages.is_empty())
}

/// The archives of a request.
pub fn archives(pipeline: &Pipeline, suite: &str) -> Result<Archives> {
    let suite = crate::config::types::Suite::ALL.into_iter().find(|known| known.as_str() == suite).ok_or_else(|| {
        Problem::usage(format!("packages for the suite `{suite}` cannot be installed"))
            .hint("known suites are bookworm, trixie and sid")
    })?;
    match &pipeline.base {
        Base::Debian(Debian { mirror, security_mirror, repositories, .. }) => {
            Archives::new(suite, mirror.as_deref(), security_mirror.as_deref(), repositories)
        }
        _ => Archives::new(suite, None, None, &[]),
    }
}

/// Resolves one request on top of the sets below it.
///
/// `installed` is the dpkg status of an image base.
pub fn resolve(build: &Build<'_>, pipeline: &Pipeline, request: &Request, below: &[&Set], installed: &str) -> Result<Set> {
    let debs = build.debs();
    let archives = archives(pipeline, &request.suite)?;
    fs_err::create_dir_all(&debs)?;
    build.progress.note(format!("resolving {} from the archives of {}", describe(request), request.suite));
    let mut status = installed.to_string();
    for set in below {
        fetch::fetch(set, &debs, || self::archives(pipeline, &request.suite))?;
    }
    status.push_str(&repository::status(below, &debs)?);
    Apt::open(&archives, &debs)?.lock(request, &status, &now(build)?, &debs)
}

fn describe(request: &Request) -> String {
    match request.packages.as_slice() {
        [] => "the base system".into(),
        packages if packages.len() <= 4 => format!("`{}`", packages.join("`, `")),
        packages => format!("{} packages", packages.len()),
    }
}

fn now(build: &Build<'_>) -> Result<String> {
    image::timestamp(build.host.now)
}

/// The sets below `request`, bottom first.
pub fn below<'a>(lock: &'a Lock, request: &Request) -> Vec<&'a Set> {
    let mut sets = Vec::new();
    let mut on = request.on.clone();
    while let Some(set) = on.and_then(|key| lock.sets.get(&key)) {
        sets.insert(0, set);
        on = set.request.on.clone();
    }
    sets
}

/// Makes sure that every package of the steps that will run is in the cache; what the archives no
/// longer have is resolved anew when `update_missing` says so. Answers whether the lock moved.
pub fn fetch_all(
    build: &Build<'_>,
    pipeline: &Pipeline,
    requests: &[SetRequest],
    lock: &mut Lock,
    update_missing: bool,
    installed: &str,
) -> Result<bool> {
    let debs = build.debs();
    for wanted in requests {
        let key = wanted.request.key();
        let set = lock.sets.get(&key).context("a locked set")?;
        let Err(error) = fetch::fetch(set, &debs, || archives(pipeline, &set.request.suite)) else { continue };
        let Some(gone) = error.downcast_ref::<fetch::Gone>().filter(|_| update_missing) else { return Err(error) };
        let mut status = installed.to_string();
        status.push_str(&repository::status(&below(lock, &wanted.request), &debs)?);
        let mut apt = Apt::open(&archives(pipeline, &set.request.suite)?, &debs)?;
        let update = apt.update_missing(set, &gone.packages, &status, &now(build)?, &debs)?;
        let how = if update.everything { "; the rest did not fit, so all of the set was resolved anew" } else { "" };
        build.progress.warn(format!(
            "{} locked packages are no longer in the archive and were resolved anew{how}: {}",
            gone.packages.len(),
            changes(&update.changes)
        ));
        lock.sets.insert(key, update.set);
        return Ok(true);
    }
    Ok(false)
}

/// `name old → new`, for people.
pub fn changes(changes: &[PackageChange]) -> String {
    let row = |change: &PackageChange| {
        format!("{} {} → {}", change.name, change.old.as_deref().unwrap_or("none"), change.new.as_deref().unwrap_or("none"))
    };
    changes.iter().map(row).collect::<Vec<_>>().join(", ")
}

/// The image a pipeline stands on, by its lock; asks the registry when it is not locked.
pub fn image_of(build: &Build<'_>, pipeline: &Pipeline, lock: &mut Lock, locked: bool, anew: bool) -> Result<Option<BaseImage>> {
    let reference = match (&pipeline.runtime.builder, &pipeline.base) {
        (BuilderRef::Image(reference), _) | (_, Base::Image { reference, .. }) => reference,
        (_, Base::Oci { layout, tag, .. }) => return oci_layout(build.store, layout, tag.as_deref()).map(Some),
        _ => return Ok(None),
    };
    let pinned = match lock.images.get(reference).filter(|_| !anew) {
        Some(digest) => *digest,
        None if locked => return Err(not_locked(&format!("image `{reference}`")).into()),
        None => {
            let parsed: Reference = reference.parse()?;
            let pinned = match parsed.digest() {
                Some(digest) => digest,
                None => registry(build)?.resolve(&parsed)?.digest,
            };
            lock.images.insert(reference.clone(), pinned);
            pinned
        }
    };
    Ok(Some(BaseImage { name: reference.clone(), pinned, manifest: pulled(build.store, &pinned) }))
}

/// The error of `--locked` for what the lock does not hold.
pub fn not_locked(what: &str) -> Problem {
    Problem::usage(format!("{what} is not in `{}`, and `--locked` refuses to resolve", lock::FILE_NAME))
        .hint("run `pipeline build` without `--locked`, or `pipeline update`, and commit the lock")
}

/// Pulls an image into the store unless all of it is there.
pub fn pull(build: &Build<'_>, image: &mut BaseImage) -> Result<()> {
    if image.manifest.is_some() {
        return Ok(());
    }
    let reference: Reference = image.name.parse()?;
    build.progress.note(format!("pulling {}", image.name));
    let pulled = registry(build)?.pull(&reference, Some(image.pinned), &Sink(build.store))?;
    build.store.put(&pulled.config_bytes)?;
    let manifest = build.store.put(&pulled.manifest_bytes)?;
    let note = serde_json::to_vec(&manifest)?;
    crate::artifact::store::write_cache(&pulled_path(build.store, &image.pinned), &note)?;
    image.manifest = Some(manifest);
    Ok(())
}

/// Brings the image `reference` into the store whole: `oci:DIR[:TAG]`, relative to `cwd`, or one in a
/// registry. Answers a name for it (`NAME:TAG`) and its manifest.
pub fn fetch(build: &Build<'_>, reference: &str, cwd: &Path) -> Result<(String, Digest)> {
    if let Some(layout) = reference.strip_prefix("oci:") {
        // A folder of that whole name goes first: names of folders may hold colons.
        let (dir, tag) = match layout.rsplit_once(':') {
            Some((dir, tag)) if !cwd.join(layout).exists() => (dir, Some(tag)),
            _ => (layout, None),
        };
        let image = oci_layout(build.store, &cwd.join(dir), tag)?;
        let name = Path::new(dir).file_name().map_or_else(|| "image".into(), |name| name.to_string_lossy().into_owned());
        return Ok((format!("{name}:{}", tag.unwrap_or("latest")), image.manifest.context("an image of a layout")?));
    }
    let parsed: Reference = reference.parse()?;
    let pinned = match parsed.digest() {
        Some(digest) => digest,
        None => registry(build)?.resolve(&parsed)?.digest,
    };
    let mut image = BaseImage { name: reference.into(), pinned, manifest: pulled(build.store, &pinned) };
    pull(build, &mut image)?;
    let name = parsed.repository().rsplit('/').next().unwrap_or("image").to_string();
    Ok((format!("{name}:{}", parsed.tag().unwrap_or("latest")), image.manifest.context("a pulled image")?))
}

/// The registry client, with the caller's credentials, proxies and `registries.yaml`:
/// `$PIPELINE_REGISTRIES`, else `pipeline/registries.yaml` of the user's configuration, else of `/etc`.
pub fn registry(build: &Build<'_>) -> Result<Registry> {
    let host = build.host;
    let given = |name: &str| host.variables.get(name).filter(|value| !value.is_empty()).cloned();
    let variable = |name: &str| host.variables.get(name).or_else(|| host.variables.get(&name.to_uppercase())).cloned();
    let home = host.home.clone();
    let docker =
        host.variables.get("DOCKER_CONFIG").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(".docker")));
    let mut auth_files: Vec<PathBuf> = host.variables.get("REGISTRY_AUTH_FILE").map(PathBuf::from).into_iter().collect();
    auth_files.extend(host.variables.get("XDG_RUNTIME_DIR").map(|dir| Path::new(dir).join("containers/auth.json")));
    auth_files.extend(home.as_ref().map(|home| home.join(".config/containers/auth.json")));
    let configuration = given("XDG_CONFIG_HOME").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(".config")));
    let usual = configuration.into_iter().chain([PathBuf::from("/etc")]).map(|dir| dir.join("pipeline/registries.yaml"));
    let file = given("PIPELINE_REGISTRIES").map(PathBuf::from).or_else(|| usual.into_iter().find(|file| file.is_file()));
    let settings = file.map(|file| registries::load(&file, Path::new("/"))).transpose()?.unwrap_or_default();
    Registry::new(&RegistryOptions {
        docker_config: docker.map(|dir| dir.join("config.json")),
        auth_files,
        helper_path: host.path.clone(),
        given: given_login(&given)?,
        insecure: settings.insecure,
        mirrors: settings.mirrors,
        part_limit: settings.part_limit,
        ca_bundle: host.variables.get("SSL_CERT_FILE").map(PathBuf::from),
        proxy: crate::oci::registry::Proxy {
            https: variable("https_proxy"),
            http: variable("http_proxy"),
            exceptions: variable("no_proxy"),
        },
    })
}

/// A login out of variables, for CI. It is bound to one registry, so that no other is shown it.
fn given_login(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Given>> {
    match (variable("PIPELINE_REGISTRY"), variable("PIPELINE_REGISTRY_USER"), variable("PIPELINE_REGISTRY_PASSWORD")) {
        (_, None, None) => Ok(None),
        (Some(key), Some(user), Some(password)) => {
            let origin = "`PIPELINE_REGISTRY_USER` and `PIPELINE_REGISTRY_PASSWORD`".into();
            Ok(Some(Given { key, user, password, origin }))
        }
        _ => {
            Err(Problem::usage("`PIPELINE_REGISTRY_USER` and `PIPELINE_REGISTRY_PASSWORD` go together with `PIPELINE_REGISTRY`")
                .hint("set all three; `PIPELINE_REGISTRY` is the HOST[:PORT][/NAMESPACE] the login is for")
                .into())
        }
    }
}

/// Where the manifest of a pinned index is remembered.
fn pulled_path(store: &Store, pinned: &Digest) -> PathBuf {
    store.cache("listings").join(format!("pulled-{}.json", pinned.hex()))
}

/// The manifest of a pinned image, when all its blobs are in the store.
fn pulled(store: &Store, pinned: &Digest) -> Option<Digest> {
    let manifest: Digest = serde_json::from_slice(&fs_err::read(pulled_path(store, pinned)).ok()?).ok()?;
    let layers = image::layers(store, &manifest).ok()?;
    layers.iter().all(|layer| store.has(&layer.descriptor.digest, layer.descriptor.size)).then_some(manifest)
}

/// Takes an image out of an OCI layout into the store.
fn oci_layout(store: &Store, layout: &Path, tag: Option<&str>) -> Result<BaseImage> {
    let shown = layout.display();
    let bytes = fs_err::read(layout.join("index.json")).with_context(|| {
        Problem::usage(format!("`{shown}` is not an OCI image layout"))
            .hint("`base.oci` is a folder with `oci-layout` and `index.json`")
    })?;
    let index: Index =
        serde_json::from_slice(&bytes).with_context(|| Problem::failed(format!("`{shown}/index.json` is broken")))?;
    let names: Vec<String> = index.manifests.iter().filter_map(|entry| entry.annotations.get(REF_NAME).cloned()).collect();
    let entry = match tag {
        Some(tag) => index.manifests.iter().find(|entry| entry.annotations.get(REF_NAME).is_some_and(|name| name == tag)),
        None if index.manifests.len() == 1 => index.manifests.first(),
        None => None,
    };
    let entry = entry.ok_or_else(|| {
        let problem = Problem::usage(match tag {
            Some(tag) => format!("the layout `{shown}` has no image `{tag}`"),
            None => format!("the layout `{shown}` holds {} images", index.manifests.len()),
        });
        if names.is_empty() {
            problem
        } else {
            problem.hint(format!("write one of `{shown}:{}`", names.join(&format!("`, `{shown}:"))))
        }
    })?;
    let blob = |digest: &Digest| layout.join("blobs/sha256").join(digest.hex());
    let take = |digest: &Digest, size: u64| -> Result<()> {
        if store.has(digest, size) { Ok(()) } else { store.put_reader(digest, &mut fs_err::File::open(blob(digest))?) }
    };
    take(&entry.digest, entry.size)?;
    let manifest: image::Manifest = serde_json::from_slice(&store.read(&entry.digest)?)
        .map_err(|error| Problem::failed(format!("`{shown}` holds {}, which is not an image manifest: {error}", entry.digest)))?;
    take(&manifest.config.digest, manifest.config.size)?;
    for layer in &manifest.layers {
        take(&layer.digest, layer.size)?;
    }
    Ok(BaseImage {
        name: tag.map_or_else(|| "oci layout".into(), String::from),
        pinned: entry.digest,
        manifest: Some(entry.digest),
    })
}

/// The dpkg status and the suite of an image or tar base.
pub fn installed(build: &Build<'_>, session: &crate::sandbox::Session, layers: &[image::Layer]) -> Result<(String, String)> {
    let trees: Vec<work::Tree> = layers.iter().map(|layer| work::tree(build.store, session, layer)).collect::<Result<_>>()?;
    let lowers: Vec<PathBuf> = trees.iter().map(|tree| tree.root.clone()).collect();
    let read = |path: &str| -> Result<String> {
        let bytes: Option<Vec<u8>> = session.call("read", &inside::Read { lowers: lowers.clone(), path: path.into() })?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    let mut status = read("var/lib/dpkg/status")?;
    if status.is_empty() {
        return Err(Problem::usage("the base has no dpkg, so no `packages:` can be installed on it")
            .hint("use `base: {debian: …}`, or an image made from Debian")
            .into());
    }
    if !status.ends_with("\n\n") {
        status.push('\n');
    }
    let release = read("usr/lib/os-release")?;
    let suite = mirrors::suite_of(&release).ok_or_else(|| {
        Problem::usage("the base is not a Debian suite whose packages are known")
            .hint("known suites are bookworm, trixie and sid")
    })?;
    Ok((status, suite.to_string()))
}
