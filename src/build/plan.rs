//! The plan of a build: its steps, each with a key made of everything that goes into it.
//!
//! Pure: [`plan`] gets values and returns a value; `build`, `plan`, `explain` and the tests look
//! at the same one. A step's key is the digest of its ingredients, and the key of the step below
//! is one of them. Never an ingredient: mtime, path, host name, umask, user, clock.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::builder::Builder;
use crate::config::types::{Compression, Configure, Limits, Network, Pipeline};
use crate::oci::digest::{Digest, Hasher};

/// The only platform for now.
pub const PLATFORM: &str = "linux/amd64";
/// Date of layers that no commit and no package dates: 1980-01-02, the first day that both ZIP
/// and every time zone can hold. Seconds since 1970.
pub const FIXED_EPOCH: i64 = 315_619_200;

/// One thing that goes into a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingredient {
    /// Like `variable MODE`, `package python3` or `script assemble`.
    pub name: String,
    pub value: String,
    /// Whether `value` is the digest of a source listing, which `explain` can compare file by file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub listing: bool,
}

/// What a step does. The number in [`Action::version`] goes up when its meaning changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// A Debian tree from locked packages.
    Debian,
    /// The layers of an image or an OCI layout, as they are.
    Image,
    /// A tar file.
    Tar,
    /// Locked packages on the tree below.
    Packages,
    /// The builder's `dependencies` script.
    Dependencies,
    /// The builder's `assemble` script.
    Assemble,
    /// The configure step of this index.
    Configure(usize),
    /// Locked packages of a host, with its kernel in place and the written lists removed.
    HostPackages,
    /// Users, files, units and boot files of a host.
    Host,
    /// The app of this index, merged into one layer.
    App(usize),
}

impl Action {
    const fn version(&self) -> &'static str {
        match self {
            Self::Debian => "debian 1",
            Self::Image => "image 1",
            Self::Tar => "tar 1",
            Self::Packages => "packages 1",
            Self::Dependencies => "dependencies 1",
            Self::Assemble => "assemble 1",
            Self::Configure(_) => "configure 1",
            Self::HostPackages => "host packages 1",
            Self::Host => "host 1",
            Self::App(_) => "app 1",
        }
    }
}

/// Which of a pipeline's images a step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The application image and the host.
    Base,
    /// The application image.
    Image,
    /// The host image.
    Host,
}

impl Part {
    /// Whether a step of `below` is under one of this part.
    pub fn stands_on(self, below: Part) -> bool {
        below == Part::Base || below == self
    }
}

/// A step of the plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// `base`, `packages`, `build-packages`, `dependencies`, `application`, `configure-1`, …
    pub name: String,
    pub action: Action,
    pub part: Part,
    pub key: Digest,
    #[serde(skip)]
    pub ingredients: Vec<Ingredient>,
    /// Whether its layer is in the image; build packages are not.
    pub ships: bool,
    /// Seconds since 1970: every mtime of the layer, and `SOURCE_DATE_EPOCH` of the step.
    pub epoch: i64,
}

/// A set of locked packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetInput {
    pub suite: String,
    /// Name, version and SHA-256 of each package.
    pub packages: Vec<(String, String, String)>,
    pub epoch: i64,
}

/// What stands at the bottom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseInput {
    Debian(SetInput),
    Image { reference: String, digest: Digest },
    Tar { digest: Digest },
    Scratch,
}

/// A file a step is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInput {
    /// As in [`Ingredient::name`].
    pub name: String,
    pub digest: Digest,
}

/// What goes into the steps of a host.
#[derive(Debug)]
pub struct HostInput {
    pub packages: SetInput,
    /// Packages of the step `host-tools`; none: no step.
    pub tools: Option<SetInput>,
    /// Lists, scripts and kernel of `host-packages`.
    pub packages_files: Vec<FileInput>,
    /// Script and files of `host`.
    pub files: Vec<FileInput>,
    /// In the order of their names.
    pub apps: Vec<HostApp>,
}

/// What goes into the step of an app.
#[derive(Debug)]
pub struct HostApp {
    pub name: String,
    /// The image's digest, or what is known of it while it is not built.
    pub image: String,
    /// Settings as text, and the templates.
    pub files: Vec<FileInput>,
}

/// Everything [`plan`] looks at.
#[derive(Debug)]
pub struct Inputs<'a> {
    pub pipeline: &'a Pipeline,
    pub base: BaseInput,
    /// Packages of runtime and builder on top of the base; none: no step.
    pub packages: Option<SetInput>,
    /// Packages only while building; none: no step.
    pub build_packages: Option<SetInput>,
    pub builder: Option<&'a Builder>,
    /// An S2I builder image assembles too, with scripts of its own.
    pub image_builder: bool,
    /// Digest of the source's listing.
    pub source: Option<Digest>,
    /// Digest of the listing of lock files alone.
    pub lock_files: Option<Digest>,
    /// `.s2i/environment` of the source.
    pub s2i_environment: BTreeMap<String, String>,
    /// Fingerprint of each secret.
    pub secrets: Vec<(String, String)>,
    /// Digest of each configure step's file or folder.
    pub configure: Vec<Digest>,
    /// Date of the application layer.
    pub source_epoch: i64,
    /// The machine, when the pipeline makes one.
    pub host: Option<HostInput>,
}

/// The steps, bottom first: what both images stand on, then the application image's, then the host's.
pub fn plan(inputs: &Inputs<'_>) -> Vec<Step> {
    let mut chain = Chain { steps: Vec::new(), part: Part::Base, compression: inputs.pipeline.image.compression };
    match &inputs.base {
        BaseInput::Debian(set) => chain.push("base", Action::Debian, true, set.epoch, packages(set)),
        BaseInput::Image { reference, digest } => {
            let name = format!("image {reference}");
            chain.push("base", Action::Image, true, FIXED_EPOCH, vec![plain("content", digest.to_string()), note(&name)]);
        }
        BaseInput::Tar { digest } => {
            chain.push("base", Action::Tar, true, FIXED_EPOCH, vec![plain("tar file", digest.to_string())])
        }
        BaseInput::Scratch => {}
    }
    if inputs.pipeline.has_image() {
        image_steps(inputs, &mut chain);
    }
    if let Some(host) = &inputs.host {
        host_steps(host, &mut chain);
    }
    chain.steps
}

fn image_steps(inputs: &Inputs<'_>, chain: &mut Chain) {
    chain.part = Part::Image;
    if let Some(set) = &inputs.packages {
        chain.push("packages", Action::Packages, true, set.epoch, packages(set));
    }
    if let Some(set) = &inputs.build_packages {
        chain.push("build-packages", Action::Packages, false, set.epoch, packages(set));
    }
    let build = &inputs.pipeline.build;
    if let Some(builder) = inputs.builder {
        if let (Some(_), Some(lock_files)) = (&builder.meta.dependencies, inputs.lock_files) {
            let mut ingredients = common(inputs, builder);
            // Dependency steps always have the network: that is what they are for.
            ingredients.push(plain("network", "host"));
            ingredients.push(listing("lock files", lock_files));
            ingredients.extend(script(builder, "dependencies"));
            chain.push("dependencies", Action::Dependencies, true, FIXED_EPOCH, ingredients);
        }
        let mut ingredients = common(inputs, builder);
        ingredients.extend(variables("s2i variable", &inputs.s2i_environment));
        ingredients.push(plain("network", network(build.network)));
        ingredients.extend(inputs.source.map(|digest| listing("source", digest)));
        ingredients.extend(builder.scripts.keys().filter(|name| *name != "dependencies").flat_map(|name| script(builder, name)));
        chain.push("application", Action::Assemble, true, inputs.source_epoch, ingredients);
    } else if inputs.image_builder {
        let mut ingredients = settings(inputs);
        ingredients.extend(variables("s2i variable", &inputs.s2i_environment));
        ingredients.push(plain("network", network(build.network)));
        ingredients.extend(inputs.source.map(|digest| listing("source", digest)));
        chain.push("application", Action::Assemble, true, inputs.source_epoch, ingredients);
    }
    for (index, (configure, digest)) in inputs.pipeline.configure.iter().zip(&inputs.configure).enumerate() {
        let mut ingredients = settings(inputs);
        ingredients.push(plain("network", network(build.network)));
        ingredients.push(match configure {
            Configure::Shell(_) => plain("shell script", digest.to_string()),
            Configure::Ansible(path) => {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                plain(format!("playbook {name}"), digest.to_string())
            }
        });
        chain.push(&format!("configure-{}", index + 1), Action::Configure(index), true, inputs.source_epoch, ingredients);
    }
}

fn host_steps(host: &HostInput, chain: &mut Chain) {
    chain.part = Part::Host;
    let files = |files: &[FileInput]| -> Vec<Ingredient> {
        files.iter().map(|file| plain(&file.name, file.digest.to_string())).collect()
    };
    let mut ingredients = packages(&host.packages);
    ingredients.extend(files(&host.packages_files));
    chain.push("host-packages", Action::HostPackages, true, host.packages.epoch, ingredients);
    if let Some(tools) = &host.tools {
        chain.push("host-tools", Action::Packages, false, tools.epoch, packages(tools));
    }
    chain.push("host", Action::Host, true, host.packages.epoch, files(&host.files));
    for (index, app) in host.apps.iter().enumerate() {
        let mut ingredients = vec![plain(format!("app {}", app.name), &app.image)];
        ingredients.extend(files(&app.files));
        // Its files date from its image; the few of ours have a fixed date.
        chain.push(&format!("app-{}", app.name), Action::App(index), true, FIXED_EPOCH, ingredients);
    }
}

struct Chain {
    steps: Vec<Step>,
    part: Part,
    compression: Compression,
}

impl Chain {
    fn push(&mut self, name: &str, action: Action, ships: bool, epoch: i64, mut ingredients: Vec<Ingredient>) {
        // An app's layer is made of its image alone, whatever it lies on.
        let below = self.steps.iter().rev().find(|step| self.part.stands_on(step.part));
        if let Some(below) = below.filter(|_| !matches!(action, Action::App(_))) {
            ingredients.insert(0, plain(format!("step {}", below.name), below.key.to_string()));
        }
        // The layers of an image are taken as they are; all others are blobs of ours.
        if action != Action::Image {
            ingredients.push(plain("compression", if self.compression == Compression::Gzip { "gzip" } else { "zstd" }));
        }
        ingredients.push(plain("date", epoch.to_string()));
        let key = key(&action, &ingredients);
        self.steps.push(Step { name: name.into(), action, part: self.part, key, ingredients, ships, epoch });
    }
}

/// The digest of a step's version, platform and ingredients.
fn key(action: &Action, ingredients: &[Ingredient]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.field("pipeline step").field(action.version()).field(PLATFORM);
    for ingredient in ingredients.iter().filter(|ingredient| !ingredient.value.is_empty()) {
        hasher.field(&ingredient.name).field(&ingredient.value);
    }
    hasher.finish()
}

fn plain(name: impl Into<String>, value: impl Into<String>) -> Ingredient {
    Ingredient { name: name.into(), value: value.into(), listing: false }
}

/// Shown, but no part of the key.
fn note(name: &str) -> Ingredient {
    plain(name, "")
}

fn listing(name: &str, digest: Digest) -> Ingredient {
    Ingredient { name: name.into(), value: digest.to_string(), listing: true }
}

fn packages(set: &SetInput) -> Vec<Ingredient> {
    let mut ingredients = vec![plain("suite", &set.suite)];
    let rows: BTreeSet<_> = set.packages.iter().collect();
    ingredients
        .extend(rows.into_iter().map(|(name, version, sha256)| plain(format!("package {name}"), format!("{version} {sha256}"))));
    ingredients
}

fn variables(kind: &str, variables: &BTreeMap<String, String>) -> Vec<Ingredient> {
    // A length before the value keeps an empty one in the key.
    variables.iter().map(|(name, value)| plain(format!("{kind} {name}"), format!("{}:{value}", value.len()))).collect()
}

fn script(builder: &Builder, name: &str) -> Vec<Ingredient> {
    builder
        .scripts
        .get(name)
        .map(|bytes| plain(format!("builder script {name}"), Digest::of(bytes).to_string()))
        .into_iter()
        .collect()
}

/// What every step of the builder's has in its key.
fn common(inputs: &Inputs<'_>, builder: &Builder) -> Vec<Ingredient> {
    let mut ingredients =
        vec![plain("builder scripts folder", &builder.meta.scripts), plain("builder destination", &builder.meta.destination)];
    ingredients.extend(variables("builder variable", &builder.meta.env));
    ingredients.extend(settings(inputs));
    ingredients
}

fn settings(inputs: &Inputs<'_>) -> Vec<Ingredient> {
    let build = &inputs.pipeline.build;
    let mut ingredients = variables("variable", &build.env);
    ingredients.extend(inputs.secrets.iter().map(|(id, fingerprint)| plain(format!("secret {id}"), fingerprint)));
    if build.limits != Limits::default() {
        ingredients.push(plain("limits", serde_json::to_string(&build.limits).unwrap_or_default()));
    }
    ingredients
}

const fn network(network: Network) -> &'static str {
    match network {
        Network::None => "none",
        Network::Host => "host",
    }
}
