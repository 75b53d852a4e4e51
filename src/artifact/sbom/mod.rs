//! Bill of materials: which packages are in an artifact, under which licences.
//!
//! In: the merged tree of an image or host (a disk is looked at through the host it was made from).
//! Out: an [`Inventory`], written as SPDX 2.3 and as CycloneDX 1.6, both attached to the artifact.
//! Nothing in them is of the moment: the date is the image's, identifiers follow from digests, so
//! the same artifact gives the same bytes.
//!
//! Read: the databases of dpkg and apk; Python's `.dist-info` and `.egg-info`; `node_modules`;
//! what Go programs say of themselves; lock files (`Cargo.lock` always, those of Python and
//! npm where nothing of theirs is installed). Missing: RPM databases, Java archives, crates of a
//! program without its `Cargo.lock`. A package database that is there and cannot be read is named in [`Inventory::unread`], and both
//! documents then say that they are not complete.

mod alpine;
mod cyclonedx;
mod debian;
mod go;
mod language;
pub mod licences;
mod lock;
mod spdx;

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::referrer::{self, Kind as Attachment};
use super::release;
use super::store::{Descriptor, Store};
use super::{disk, image};
use crate::disk::tree::{Kind as NodeKind, NodeId, Tree};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::oci::flatten::flatten;

/// `artifactType` and media type of the SPDX document.
pub const SPDX_TYPE: &str = "application/spdx+json";
/// `artifactType` and media type of the CycloneDX document.
pub const CYCLONEDX_TYPE: &str = "application/vnd.cyclonedx+json";
/// Files of package metadata are small; a larger one is not read, and named as unread.
const LARGEST: u64 = 64 << 20;

/// Where a package comes from; its name is the type in its package URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Deb,
    Apk,
    Pypi,
    Npm,
    Cargo,
    Golang,
}

impl Kind {
    const ALL: [Kind; 6] = [Kind::Deb, Kind::Apk, Kind::Pypi, Kind::Npm, Kind::Cargo, Kind::Golang];

    /// Type of a package URL (package-url specification, "Known types").
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Deb => "deb",
            Kind::Apk => "apk",
            Kind::Pypi => "pypi",
            Kind::Npm => "npm",
            Kind::Cargo => "cargo",
            Kind::Golang => "golang",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    pub kind: Kind,
    pub name: String,
    pub version: String,
    /// Package URL.
    pub purl: String,
    /// SPDX expression; licences SPDX does not list are `LicenseRef-…`. `None`: not known.
    pub licence: Option<String>,
    /// Name and e-mail of who packaged it, as the package says.
    pub supplier: Option<String>,
    /// Path in the tree it was read from.
    pub found: String,
}

/// What is in an artifact.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Sorted, each package URL once.
    pub packages: Vec<Package>,
    /// Package databases and metadata that are there and were not read, sorted.
    pub unread: Vec<String>,
}

/// What a document says about the artifact itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// For people, such as `shop`.
    pub name: String,
    /// Of its manifest.
    pub digest: Digest,
    /// RFC 3339, UTC, whole seconds: the image's own date.
    pub created: String,
    /// Of this program.
    pub tool_version: String,
}

/// What was found on the way through a tree.
#[derive(Debug, Default)]
struct Found {
    packages: Vec<Package>,
    unread: Vec<String>,
}

/// The packages in a tree.
pub fn of_tree(tree: &Tree) -> Result<Inventory> {
    let system = System::of(tree)?;
    let mut found = Found::default();
    debian::find(tree, &system, &mut found)?;
    alpine::find(tree, &system, &mut found)?;
    for database in ["var/lib/rpm", "usr/lib/sysimage/rpm"] {
        let files = tree.resolve(database.as_bytes()).map_or(0, |id| tree.children(id).count());
        if files > 0 {
            found.unread.push(database.to_owned());
        }
    }
    let paths = tree.walk();
    language::find(tree, &paths, &mut found)?;
    lock::find(tree, &paths, &mut found)?;
    go::find(tree, &paths, &mut found)?;
    found.packages.sort();
    let mut seen = std::collections::BTreeSet::new();
    found.packages.retain(|package| seen.insert(package.purl.clone()));
    found.unread.sort();
    found.unread.dedup();
    Ok(Inventory { packages: found.packages, unread: found.unread })
}

/// The packages in an image, host or disk of the store.
pub fn of_artifact(store: &Store, digest: &Digest, threads: usize) -> Result<Inventory> {
    let blobs = image::blobs(store, &tree_of(store, digest)?)?;
    of_tree(&flatten(&blobs, &store.temp_dir(), threads)?)
}

/// What [`computed`] remembers of an artifact.
#[derive(Serialize, Deserialize)]
struct Computed {
    /// The program that looked: another one may see more.
    program: String,
    inventory: Inventory,
}

/// The same, looked at once: a digest has the same packages each time. What is remembered is this machine's own and
/// never what somebody attached; the bytes may be gone or broken since, see [`super::whole`].
pub fn computed(store: &Store, digest: &Digest, threads: usize) -> Result<Inventory> {
    let folder = store.cache("inventories");
    let path = folder.join(format!("{}.json", digest.hex()));
    let program = env!("PIPELINE_VERSION");
    let known = fs_err::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Computed>(&bytes).ok());
    if let Some(known) = known.filter(|known| known.program == program) {
        return Ok(known.inventory);
    }
    let inventory = of_artifact(store, digest, threads)?;
    let computed = Computed { program: program.to_owned(), inventory };
    // A cache that cannot be written costs the next one time, and nothing else.
    let _ = fs_err::create_dir_all(&folder)
        .map_err(anyhow::Error::from)
        .and_then(|()| super::store::write_cache(&path, &serde_json::to_vec(&computed)?));
    Ok(computed.inventory)
}

/// The packages in all artifacts of a release of the store, from their bytes.
///
/// # Errors
/// One of them cannot be read.
pub fn computed_of_release(store: &Store, digest: &Digest, threads: usize) -> Result<Inventory> {
    let mut all = Inventory::default();
    for entry in release::read(store, digest)?.entries {
        all.add(computed(store, &entry.digest, threads)?);
    }
    Ok(all)
}

/// The image with the artifact's files.
fn tree_of(store: &Store, digest: &Digest) -> Result<Digest> {
    Ok(disk::read(store, digest)?.map_or(*digest, |disk| disk.config.host))
}

/// What the documents say about an artifact of the store.
pub fn subject(store: &Store, digest: &Digest, name: &str, tool_version: &str) -> Result<Subject> {
    let manifest = image::manifest(store, &tree_of(store, digest)?)?;
    let config: Value =
        serde_json::from_slice(&store.read(&manifest.config.digest)?).context("the image's configuration is broken")?;
    let created = match config["created"].as_str() {
        // Others write fractions of seconds, which SPDX does not allow.
        Some(text) => text.parse::<jiff::Timestamp>().with_context(|| format!("`{text}` is no date"))?.as_second(),
        None => 0,
    };
    Ok(Subject { name: name.into(), digest: *digest, created: image::timestamp(created)?, tool_version: tool_version.into() })
}

impl Inventory {
    /// Puts another artifact's packages to these.
    pub fn add(&mut self, other: Self) {
        self.packages.extend(other.packages);
        self.unread.extend(other.unread);
        self.packages.sort();
        self.packages.dedup_by(|a, b| a.purl == b.purl);
        self.unread.sort();
        self.unread.dedup();
    }

    /// SPDX 2.3 as JSON.
    pub fn spdx(&self, subject: &Subject) -> Result<Vec<u8>> {
        spdx::encode(self, subject)
    }

    /// CycloneDX 1.6 as JSON.
    pub fn cyclonedx(&self, subject: &Subject) -> Result<Vec<u8>> {
        cyclonedx::encode(self, subject)
    }
}

/// Attaches both documents to an artifact of the store, and tells what is in it. Undone by removing the tags.
pub fn attach(store: &Store, artifact: &Descriptor, name: &str, tool_version: &str, threads: usize) -> Result<Inventory> {
    let inventory = computed(store, &artifact.digest, threads)?;
    let subject = subject(store, &artifact.digest, name, tool_version)?;
    let documents = [
        (Attachment::Spdx, SPDX_TYPE, inventory.spdx(&subject)?),
        (Attachment::CycloneDx, CYCLONEDX_TYPE, inventory.cyclonedx(&subject)?),
    ];
    for (kind, media_type, bytes) in documents {
        referrer::attach(store, artifact, &kind, (media_type, media_type), &bytes, &BTreeMap::new())?;
    }
    Ok(inventory)
}

/// The inventory that was attached to an artifact, from its newest SPDX document; `None` when there is none. Anybody may have
/// written it: what decides looks at the bytes, see [`computed`].
///
/// # Errors
/// The document is broken or about another artifact.
pub fn read(store: &Store, digest: &Digest) -> Result<Option<Inventory>> {
    let Some(attached) = referrer::newest(store, digest, &Attachment::Spdx)? else { return Ok(None) };
    let inventory = spdx::parse(&attached.read(store)?, digest)
        .with_context(|| Problem::failed(format!("the bill of materials `{}` is broken", attached.tag)))?;
    Ok(Some(inventory))
}

/// What was attached about all artifacts of a release (see [`read`]); `None` when one of them has nothing.
pub fn of_release(store: &Store, digest: &Digest) -> Result<Option<Inventory>> {
    let mut all = Inventory::default();
    for entry in release::read(store, digest)?.entries {
        let Some(inventory) = read(store, &entry.digest)? else { return Ok(None) };
        all.add(inventory);
    }
    Ok(Some(all))
}

/// The operating system in a tree, as far as package URLs name it (os-release(5)).
#[derive(Debug, Default)]
struct System {
    /// Such as `debian`.
    id: Option<String>,
    /// Such as `debian-13`.
    distribution: Option<String>,
}

impl System {
    fn of(tree: &Tree) -> Result<Self> {
        for path in ["etc/os-release", "usr/lib/os-release"] {
            if let Some(bytes) = tree.read(path.as_bytes())? {
                return Ok(Self::parse(&String::from_utf8_lossy(&bytes)));
            }
        }
        Ok(Self::default())
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim().trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
        };
        let id = field("ID");
        let distribution = match (&id, field("VERSION_ID").or_else(|| field("VERSION_CODENAME"))) {
            (Some(id), Some(version)) => Some(format!("{id}-{version}")),
            _ => None,
        };
        Self { id, distribution }
    }
}

/// A package URL (package-url specification): namespace and qualifiers may be absent.
fn purl(kind: Kind, namespace: Option<&str>, name: &str, version: &str, qualifiers: &[(&str, &str)]) -> String {
    let mut url = format!("pkg:{kind}/");
    if let Some(namespace) = namespace {
        let parts: Vec<String> = namespace.split('/').filter(|part| !part.is_empty()).map(escaped).collect();
        url.push_str(&parts.join("/"));
        url.push('/');
    }
    url.push_str(&escaped(name));
    if !version.is_empty() {
        url.push('@');
        url.push_str(&escaped(version));
    }
    let qualifiers: Vec<String> = qualifiers.iter().map(|(key, value)| format!("{key}={}", escaped(value))).collect();
    if !qualifiers.is_empty() {
        url.push('?');
        url.push_str(&qualifiers.join("&"));
    }
    url
}

/// Percent-encoded but for what the specification leaves as it is.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The text of a node of metadata; `None`, and named as unread, when it is too large or no file.
fn text(tree: &Tree, path: &[u8], id: NodeId, found: &mut Found) -> Result<Option<String>> {
    let NodeKind::File(file) = &tree.node(id).kind else { return Ok(None) };
    if file.size > LARGEST {
        found.unread.push(shown(path));
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&tree.read_file(file)?).into_owned()))
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Fields of a paragraph in the form of RFC 822, as dpkg, Python and others write it. Names are
/// compared without regard to case; lines that go on keep their line ends, without the leading space.
fn field(paragraph: &str, wanted: &str) -> Option<String> {
    let mut lines = paragraph.lines();
    while let Some(line) = lines.next() {
        let Some((name, value)) = line.split_once(':') else { continue };
        if line.starts_with([' ', '\t']) || !name.eq_ignore_ascii_case(wanted) {
            continue;
        }
        let mut value = value.trim().to_owned();
        for more in lines.by_ref().take_while(|line| line.starts_with([' ', '\t'])) {
            value.push('\n');
            value.push_str(more.trim());
        }
        return Some(value);
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::disk::tree::{Extent, File, Meta, Node, Source};

    /// A tree of files; a content that starts with `-> ` is a symbolic link.
    pub fn tree(files: &[(&str, &[u8])]) -> Tree {
        let mut tree = Tree::default();
        for (path, bytes) in files {
            let kind = if let Some(target) = bytes.strip_prefix(b"-> ") {
                NodeKind::Symlink(target.to_vec())
            } else {
                let source = tree.add_source(Source::Memory((*bytes).into()));
                let size = bytes.len() as u64;
                NodeKind::File(File { size, extents: vec![Extent { offset: 0, length: size, source, source_offset: 0 }] })
            };
            let meta = Meta { mode: 0o755, ..Meta::default() };
            tree.put(path.as_bytes(), Node { meta: meta.clone(), kind }, &meta);
        }
        tree
    }

    /// Package URLs of the packages in a tree.
    pub fn purls(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<(&str, &[u8])> = files.iter().map(|(path, text)| (*path, text.as_bytes())).collect();
        of_tree(&tree(&files)).unwrap().packages.into_iter().map(|package| package.purl).collect()
    }

    #[test]
    fn package_urls_are_encoded() {
        let cases = [
            (
                purl(Kind::Deb, Some("debian"), "libstdc++6", "1:2.0+dfsg-1~deb13u1", &[("arch", "amd64")]),
                "pkg:deb/debian/libstdc%2B%2B6@1:2.0%2Bdfsg-1~deb13u1?arch=amd64",
            ),
            (purl(Kind::Npm, Some("@scope"), "name", "1.0.0", &[]), "pkg:npm/%40scope/name@1.0.0"),
            (purl(Kind::Golang, Some("github.com/a"), "b", "v1.0.0", &[]), "pkg:golang/github.com/a/b@v1.0.0"),
            (purl(Kind::Cargo, None, "serde", "", &[]), "pkg:cargo/serde"),
        ];
        for (found, expected) in cases {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn fields_are_read_with_what_follows_them() {
        let text = "Package: a\nversion: 1\nDescription: short\n long\n\tlonger\nPackage: b\n";
        assert_eq!(field(text, "Package").as_deref(), Some("a"));
        assert_eq!(field(text, "Version").as_deref(), Some("1"));
        assert_eq!(field(text, "Description").as_deref(), Some("short\nlong\nlonger"));
        assert_eq!(field(text, "long"), None);
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let inventory = of_tree(&tree(&[("var/lib/rpm/rpmdb.sqlite", b"x")])).unwrap();
        assert_eq!(inventory, Inventory { packages: vec![], unread: vec!["var/lib/rpm".into()] });
    }
}
