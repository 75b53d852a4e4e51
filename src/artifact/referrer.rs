//! What is said about an artifact: manifests with a `subject`, kept in the store beside it.
//!
//! An OCI layout finds nothing by subject, so each is tagged by the digest it is about; adding one
//! never changes what it is about (image specification 1.1, "Image Manifest", `subject`).
//!
//! ```text
//! sha256-HEX.sig             cosign's signatures, all in one manifest, where cosign 2 looks
//! sha256-HEX.bundle[.N]      a signature as Sigstore bundle, where cosign 3 looks
//! sha256-HEX.sbom.spdx[.N]   SPDX          sha256-HEX.sbom.cdx[.N]   CycloneDX
//! sha256-HEX.provenance[.N]  SLSA          sha256-HEX.report.NAME[.N]   a test report
//! ```
//! The first of a kind has no number, the next is `.2`. What was attached stays; the highest number is the newest.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::json;

use super::store::{Descriptor, Hold, INDEX_TYPE, Index, Lock, MANIFEST_TYPE, REF_NAME, Store};
use super::{dsse, image, provenance, sbom};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Media type of the configuration of what is no image (image specification 1.1, "Guidance for an Empty Descriptor").
pub const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(super) const EMPTY: &[u8] = b"{}";
/// `artifactType` of a test report.
pub const REPORT_TYPE: &str = "application/vnd.pipeline.report.v1";
/// Annotation with a report's name.
const REPORT: &str = "io.pipeline.report";
/// Annotation with how the tests ended: `pass` or `fail`.
pub const REPORT_RESULT: &str = "io.pipeline.report.result";
/// Annotation that counts the reports of a name: the highest number is the newest, wherever they were attached.
const REPORT_SEQUENCE: &str = "io.pipeline.report.sequence";
/// A tag has at most 128 characters (distribution specification); a report's name gets these.
const REPORT_NAME: usize = 40;

/// What is attached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// cosign's own form; at most one manifest.
    Signature,
    Bundle,
    Spdx,
    CycloneDx,
    Provenance,
    /// Test report of this name.
    Report(String),
}

impl Kind {
    /// # Errors
    /// A name that is empty, too long, or holds something else than small letters, digits and `-`.
    pub fn report(name: &str) -> Result<Self> {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > REPORT_NAME || !name.bytes().all(good) {
            return Err(Problem::usage(format!("`{name}` is no name of a report"))
                .hint(format!("small letters, digits and `-`, at most {REPORT_NAME}"))
                .into());
        }
        Ok(Self::Report(name.to_owned()))
    }

    fn parse(text: &str) -> Option<(Self, u32)> {
        let fixed = [
            ("sig", Self::Signature),
            ("bundle", Self::Bundle),
            ("sbom.spdx", Self::Spdx),
            ("sbom.cdx", Self::CycloneDx),
            ("provenance", Self::Provenance),
        ];
        let (kind, rest) = if let Some(rest) = text.strip_prefix("report.") {
            let end = rest.find('.').unwrap_or(rest.len());
            (Self::report(&rest[..end]).ok()?, &rest[end..])
        } else {
            fixed.into_iter().find_map(|(name, kind)| Some((kind, text.strip_prefix(name)?)))?
        };
        let number = match rest {
            "" => 1,
            rest => rest.strip_prefix('.')?.parse().ok().filter(|number| *number > 1)?,
        };
        Some((kind, number))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signature => f.write_str("sig"),
            Self::Bundle => f.write_str("bundle"),
            Self::Spdx => f.write_str("sbom.spdx"),
            Self::CycloneDx => f.write_str("sbom.cdx"),
            Self::Provenance => f.write_str("provenance"),
            Self::Report(name) => write!(f, "report.{name}"),
        }
    }
}

/// Something attached to an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub kind: Kind,
    /// Counts from 1 per kind.
    pub number: u32,
    /// In the store.
    pub tag: String,
    /// Of its manifest, with `artifactType` and annotations as a referrers list wants them
    /// (distribution specification 1.1, "Listing Referrers").
    pub manifest: Descriptor,
    /// What is attached; several only for [`Kind::Signature`].
    pub content: Vec<Descriptor>,
    /// Whether the manifest names its subject; cosign's own form does not.
    pub is_referrer: bool,
}

impl Attached {
    /// The bytes of what is attached.
    pub fn read(&self, store: &Store) -> Result<Vec<u8>> {
        let content = self.content.first().with_context(|| format!("`{}` holds nothing", self.tag))?;
        store.read(&content.digest)
    }

    /// Which of the reports of its name it is; `None`: it does not say.
    pub fn sequence(&self) -> Option<u64> {
        self.manifest.annotations.get(REPORT_SEQUENCE)?.parse().ok()
    }
}

/// A manifest as far as this file reads it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default)]
    subject: Option<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// The tag of the `number`th attachment of a kind.
pub fn tag(subject: &Digest, kind: &Kind, number: u32) -> String {
    let number = if number > 1 { format!(".{number}") } else { String::new() };
    format!("sha256-{}.{kind}{number}", subject.hex())
}

/// What a tag is an attachment of; `None` for any other tag.
pub fn parse_tag(tag: &str) -> Option<(Digest, Kind, u32)> {
    let (hex, rest) = tag.strip_prefix("sha256-")?.split_once('.')?;
    let digest: Digest = hex.parse().ok()?;
    let (kind, number) = Kind::parse(rest)?;
    Some((digest, kind, number))
}

/// One at a time attaches, so that two never take the same number.
pub(super) fn lock(store: &Store) -> Result<Lock> {
    Lock::wait(&store.root().join("referrers.lock"), Hold::Exclusive)
}

/// Attaches `bytes` to the artifact `subject`. The same bytes again change nothing. Undone by removing the tag.
///
/// # Errors
/// The subject is not in the store.
pub fn attach(
    store: &Store,
    subject: &Descriptor,
    kind: &Kind,
    (artifact_type, media_type): (&str, &str),
    bytes: &[u8],
    annotations: &BTreeMap<String, String>,
) -> Result<Descriptor> {
    let descriptor = put(store, subject, (artifact_type, media_type), bytes, annotations)?;
    let _lock = lock(store)?;
    tag_next(store, &subject.digest, kind, &descriptor)?;
    Ok(descriptor)
}

/// The manifest that says `bytes` about `subject`, without a tag.
fn put(
    store: &Store,
    subject: &Descriptor,
    (artifact_type, media_type): (&str, &str),
    bytes: &[u8],
    annotations: &BTreeMap<String, String>,
) -> Result<Descriptor> {
    if !store.has(&subject.digest, subject.size) {
        return Err(Problem::failed(format!("{} is not in the store, so nothing can be said about it", subject.digest)).into());
    }
    let content = Descriptor::new(media_type, store.put(bytes)?, bytes.len() as u64);
    let config = Descriptor::new(EMPTY_TYPE, store.put(EMPTY)?, EMPTY.len() as u64);
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifact_type,
        "config": config,
        "layers": [content],
        "subject": Descriptor::new(subject.media_type.clone(), subject.digest, subject.size),
    });
    if !annotations.is_empty() {
        manifest["annotations"] = serde_json::to_value(annotations)?;
    }
    let manifest = serde_json::to_vec(&image::sorted(manifest))?;
    Ok(Descriptor {
        artifact_type: Some(artifact_type.to_owned()),
        ..Descriptor::new(MANIFEST_TYPE, store.put(&manifest)?, manifest.len() as u64)
    })
}

/// Gives a manifest that is in the store the next free tag of its kind, unless it has one; its tag. Under [`lock`].
fn tag_next(store: &Store, subject: &Digest, kind: &Kind, manifest: &Descriptor) -> Result<String> {
    let mut number = 1;
    loop {
        let tag = tag(subject, kind, number);
        match store.tagged(&tag)? {
            Some(there) if there.digest == manifest.digest => return Ok(tag),
            Some(_) => number += 1,
            None => {
                store.tag(&tag, manifest)?;
                return Ok(tag);
            }
        }
    }
}

/// Attaches a test report of this name with its result, `pass` or `fail`: `media_type` is its own, such as
/// `application/xml` of JUnit's. It becomes the newest of its name; the same as the newest changes nothing.
pub fn attach_report(
    store: &Store,
    subject: &Descriptor,
    (name, result): (&str, &str),
    media_type: &str,
    bytes: &[u8],
) -> Result<Descriptor> {
    let kind = Kind::report(name)?;
    let _lock = lock(store)?;
    let there = attached(store, &subject.digest)?;
    let there: Vec<&Attached> = there.iter().filter(|it| it.kind == kind).collect();
    let newest = there.iter().filter_map(|it| it.sequence()).max().unwrap_or(0);
    let is_same = |it: &&&Attached| {
        it.manifest.annotations.get(REPORT_RESULT).is_some_and(|there| there == result)
            && it.content.first().is_some_and(|there| there.digest == Digest::of(bytes) && there.media_type == media_type)
    };
    if let [only] = there.iter().filter(|it| it.sequence().unwrap_or(newest) == newest).collect::<Vec<_>>().as_slice()
        && is_same(only)
    {
        return Ok(Descriptor { annotations: BTreeMap::new(), ..only.manifest.clone() });
    }
    let annotations = BTreeMap::from([
        (REPORT.to_string(), name.to_string()),
        (REPORT_RESULT.to_string(), result.to_string()),
        (REPORT_SEQUENCE.to_string(), newest.saturating_add(1).to_string()),
    ]);
    let descriptor = put(store, subject, (REPORT_TYPE, media_type), bytes, &annotations)?;
    tag_next(store, &subject.digest, &kind, &descriptor)?;
    Ok(descriptor)
}

/// Tags a referrer that came from elsewhere; its manifest and blobs are in the store already. The
/// tag, or `None` when it is of a kind this program does not know: then it stays without one.
///
/// # Errors
/// It is no manifest, or about another artifact.
pub fn adopt(store: &Store, subject: &Digest, manifest: &Descriptor) -> Result<Option<String>> {
    let bytes = store.read(&manifest.digest)?;
    let read: Manifest = serde_json::from_slice(&bytes).with_context(|| format!("{} is not a manifest", manifest.digest))?;
    if read.subject.is_none_or(|named| named.digest != *subject) {
        return Err(Problem::failed(format!("{} is not about {subject}", manifest.digest)).into());
    }
    let artifact_type = read.artifact_type.unwrap_or(read.config.media_type);
    let predicate = read.annotations.get(dsse::PREDICATE).map(String::as_str);
    let kind = match artifact_type.as_str() {
        dsse::BUNDLE_TYPE if predicate == Some(provenance::PREDICATE) => Kind::Provenance,
        dsse::BUNDLE_TYPE => Kind::Bundle,
        dsse::STATEMENT_TYPE => Kind::Provenance,
        sbom::SPDX_TYPE => Kind::Spdx,
        sbom::CYCLONEDX_TYPE => Kind::CycloneDx,
        REPORT_TYPE => match read.annotations.get(REPORT).map(|name| Kind::report(name)) {
            Some(Ok(kind)) => kind,
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    let descriptor =
        Descriptor { artifact_type: Some(artifact_type), ..Descriptor::new(MANIFEST_TYPE, manifest.digest, bytes.len() as u64) };
    let _lock = lock(store)?;
    tag_next(store, subject, &kind, &descriptor).map(Some)
}

/// Everything attached to an artifact that can be read, sorted by kind and number. What cannot says nothing, and keeps
/// nothing else from being heard: anybody who may push may attach; see [`look`].
pub fn attached(store: &Store, subject: &Digest) -> Result<Vec<Attached>> {
    Ok(look(store, subject)?.0)
}

/// The same, and why others were passed over.
pub fn look(store: &Store, subject: &Digest) -> Result<(Vec<Attached>, Vec<String>)> {
    let (mut found, mut broken) = (Vec::new(), Vec::new());
    for descriptor in store.index()?.manifests {
        let Some(tag) = descriptor.annotations.get(REF_NAME) else { continue };
        let Some((_, kind, number)) = parse_tag(tag).filter(|(digest, ..)| digest == subject) else { continue };
        match open(store, subject, tag, &descriptor) {
            Ok((manifest, content, is_referrer)) => {
                found.push(Attached { kind, number, tag: tag.clone(), manifest, content, is_referrer });
            }
            Err(error) => broken.push(format!("`{tag}` was passed over: {error:#}")),
        }
    }
    found.sort_by(|a, b| (&a.kind, a.number).cmp(&(&b.kind, b.number)));
    Ok((found, broken))
}

/// What a tag leads to: the manifest as a list of referrers has it, what it holds, whether it names its subject.
fn open(store: &Store, subject: &Digest, tag: &str, descriptor: &Descriptor) -> Result<(Descriptor, Vec<Descriptor>, bool)> {
    let manifest: Manifest = serde_json::from_slice(&store.read(&descriptor.digest)?)
        .with_context(|| format!("it is not a manifest: {}", descriptor.digest))?;
    let is_referrer = match manifest.subject {
        Some(named) if named.digest != *subject => {
            anyhow::bail!("it is about another artifact: {}; `pipeline artifact untag {tag}` removes it", named.digest)
        }
        other => other.is_some(),
    };
    let shown = Descriptor {
        artifact_type: Some(manifest.artifact_type.unwrap_or(manifest.config.media_type)),
        annotations: manifest.annotations,
        ..Descriptor::new(MANIFEST_TYPE, descriptor.digest, descriptor.size)
    };
    Ok((shown, manifest.layers, is_referrer))
}

/// The newest attachment of a kind.
pub fn newest(store: &Store, subject: &Digest, kind: &Kind) -> Result<Option<Attached>> {
    Ok(attached(store, subject)?.into_iter().rfind(|attached| attached.kind == *kind))
}

/// The tag under which a registry without the referrers API lists them (distribution specification
/// 1.1, "Referrers Tag Schema").
pub fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// The referrers of an artifact as a registry lists them, sorted by digest: what goes to [`fallback_tag`].
pub fn index(store: &Store, subject: &Digest) -> Result<Index> {
    let mut manifests: Vec<Descriptor> =
        attached(store, subject)?.into_iter().filter(|attached| attached.is_referrer).map(|attached| attached.manifest).collect();
    manifests.sort_by_key(|descriptor| descriptor.digest);
    Ok(Index { schema_version: 2, media_type: Some(INDEX_TYPE.into()), manifests })
}

/// Every blob of what is attached to an artifact, each once: what `push` sends and `prune` keeps.
pub fn blobs(store: &Store, subject: &Digest) -> Result<Vec<Descriptor>> {
    let mut found = Vec::new();
    for attached in attached(store, subject)? {
        let manifest: Manifest = serde_json::from_slice(&store.read(&attached.manifest.digest)?)?;
        found.push(attached.manifest);
        found.push(manifest.config);
        found.extend(manifest.layers);
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|descriptor| seen.insert(descriptor.digest));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read_as_they_are_written() {
        let digest = Digest::of("x");
        let kinds = [
            Kind::Signature,
            Kind::Bundle,
            Kind::Spdx,
            Kind::CycloneDx,
            Kind::Provenance,
            Kind::report("smoke-2").unwrap(),
            Kind::report("7").unwrap(),
        ];
        for kind in kinds {
            for number in [1, 2, 17] {
                let tag = tag(&digest, &kind, number);
                assert!(tag.len() <= 128);
                assert_eq!(parse_tag(&tag), Some((digest, kind.clone(), number)), "{tag}");
            }
        }
        let hex = digest.hex();
        for other in ["shop:1", "sha256-12.sig", "sig"].map(String::from).into_iter().chain(
            ["", ".", ".signature", ".sig.1", ".sig.x", ".report.", ".report.A", ".att", ".sbom"]
                .map(|rest| format!("sha256-{hex}{rest}")),
        ) {
            assert_eq!(parse_tag(&other), None, "{other}");
        }
        for bad in ["", "A", "a.b", "a/b", &"x".repeat(41)] {
            assert!(Kind::report(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn attachments_add_up_and_never_change_the_subject() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let subject = Descriptor::new(MANIFEST_TYPE, store.put(b"subject").unwrap(), 7);
        let add = |kind: &Kind, text: &str| {
            let annotations = BTreeMap::from([("a".to_string(), "b".to_string())]);
            attach(&store, &subject, kind, ("application/x", "text/plain"), text.as_bytes(), &annotations).unwrap()
        };
        let report = Kind::report("smoke").unwrap();
        let one = add(&report, "one");
        assert_eq!(add(&report, "one"), one);
        add(&report, "two");
        add(&Kind::Spdx, "bom");
        let found = attached(&store, &subject.digest).unwrap();
        let told: Vec<(String, Vec<u8>)> =
            found.iter().map(|it| (it.tag.replace(&subject.digest.hex(), "X"), it.read(&store).unwrap())).collect();
        let expected = [("sha256-X.sbom.spdx", "bom"), ("sha256-X.report.smoke", "one"), ("sha256-X.report.smoke.2", "two")];
        assert_eq!(told, expected.map(|(tag, text)| (tag.to_string(), text.as_bytes().to_vec())));
        assert_eq!(newest(&store, &subject.digest, &report).unwrap().unwrap().read(&store).unwrap(), b"two");
        assert_eq!(attached(&store, &Digest::of("other")).unwrap(), vec![]);
        store.verify(&subject.digest).unwrap();
        let index = index(&store, &subject.digest).unwrap();
        assert_eq!(index.manifests.len(), 3);
        assert!(
            index.manifests.iter().all(|it| it.artifact_type.as_deref() == Some("application/x") && it.annotations["a"] == "b")
        );
        // Three manifests, three contents, one empty configuration.
        assert_eq!(blobs(&store, &subject.digest).unwrap().len(), 7);
        let elsewhere = Descriptor::new(MANIFEST_TYPE, Digest::of("other"), 5);
        let error = attach(&store, &elsewhere, &report, ("x", "y"), b"", &BTreeMap::new()).unwrap_err();
        assert!(error.to_string().contains("is not in the store"), "{error}");
        // A tag on what is about something else is noticed.
        store.tag(&tag(&Digest::of("other"), &report, 1), &one).unwrap();
        let strange = tag(&Digest::of("other"), &report, 1);
        let (found, broken) = look(&store, &Digest::of("other")).unwrap();
        assert!(found.is_empty() && broken.len() == 1, "{broken:?}");
        assert!(broken[0].starts_with(&format!("`{strange}` was passed over: it is about another artifact")), "{broken:?}");
        // So is one that cannot be read; the others are still heard.
        let broken = Descriptor::new(MANIFEST_TYPE, store.put(b"[]").unwrap(), 2);
        store.tag(&tag(&subject.digest, &Kind::Provenance, 1), &broken).unwrap();
        let (found, broken) = look(&store, &subject.digest).unwrap();
        assert!(found.len() == 3 && broken.len() == 1 && broken[0].contains("it is not a manifest"), "{broken:?}");
    }

    /// The newest is the newest elsewhere too, although tags there are numbered in another order.
    #[test]
    fn reports_are_counted_by_themselves() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [here, there] = dirs.each_ref().map(|dir| Store::open(dir.path()).unwrap());
        let subject = Descriptor::new(MANIFEST_TYPE, there.put(b"subject").unwrap(), 7);
        let report = |result: &str, text: &str| {
            attach_report(&there, &subject, ("smoke", result), "text/plain", text.as_bytes()).unwrap().digest
        };
        let first = report("pass", "one");
        assert_eq!(report("pass", "one"), first, "the same again changes nothing");
        let second = report("fail", "two");
        let third = report("pass", "one");
        assert!(third != first, "said again after another one it is the newest");
        // Other names count apart.
        attach_report(&there, &subject, ("other", "pass"), "text/plain", b"x").unwrap();
        let all = attached(&there, &subject.digest).unwrap();
        for blob in blobs(&there, &subject.digest).unwrap() {
            here.put(&there.read(&blob.digest).unwrap()).unwrap();
        }
        for attached in all.iter().rev() {
            adopt(&here, &subject.digest, &attached.manifest).unwrap().unwrap();
        }
        let report = Kind::report("smoke").unwrap();
        let mut seen: Vec<(Option<u64>, Digest)> = attached(&here, &subject.digest)
            .unwrap()
            .iter()
            .filter(|it| it.kind == report)
            .map(|it| (it.sequence(), it.manifest.digest))
            .collect();
        assert_eq!(seen.iter().map(|(_, digest)| *digest).collect::<Vec<_>>(), [third, second, first], "by the tags");
        seen.sort();
        assert_eq!(seen, [(Some(1), first), (Some(2), second), (Some(3), third)]);
    }

    /// What another machine attached arrives as it was, whatever order it comes in.
    #[test]
    fn what_was_attached_elsewhere_is_adopted() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [here, there] = dirs.each_ref().map(|dir| Store::open(dir.path()).unwrap());
        let subject = Descriptor::new(MANIFEST_TYPE, there.put(b"subject").unwrap(), 7);
        attach_report(&there, &subject, ("smoke", "pass"), "application/xml", b"<a/>").unwrap();
        attach_report(&there, &subject, ("smoke", "pass"), "application/xml", b"<b/>").unwrap();
        for (kind, kind_type, predicate) in [
            (Kind::Bundle, dsse::BUNDLE_TYPE, "https://sigstore.dev/cosign/sign/v1"),
            (Kind::Provenance, dsse::BUNDLE_TYPE, provenance::PREDICATE),
            (Kind::Provenance, dsse::STATEMENT_TYPE, ""),
            (Kind::Spdx, sbom::SPDX_TYPE, ""),
            (Kind::CycloneDx, sbom::CYCLONEDX_TYPE, ""),
        ] {
            let annotations = BTreeMap::from([(dsse::PREDICATE.to_string(), predicate.to_string())]);
            attach(&there, &subject, &kind, (kind_type, kind_type), kind_type.as_bytes(), &annotations).unwrap();
        }
        let stranger =
            attach(&there, &subject, &Kind::report("x").unwrap(), ("application/other", "a/b"), b"", &BTreeMap::new()).unwrap();
        for blob in blobs(&there, &subject.digest).unwrap() {
            here.put(&there.read(&blob.digest).unwrap()).unwrap();
        }
        let all = attached(&there, &subject.digest).unwrap();
        for attached in all.iter().chain(&all) {
            let tag = adopt(&here, &subject.digest, &attached.manifest).unwrap();
            let known = attached.manifest.digest != stranger.digest;
            assert_eq!(tag.as_ref(), known.then_some(&attached.tag));
        }
        assert_eq!(attached(&here, &subject.digest).unwrap().len(), all.len() - 1);
        let error = adopt(&here, &Digest::of("other"), &all[0].manifest).unwrap_err();
        assert!(error.to_string().contains("is not about"), "{error}");
    }

    /// Two at once never take the same tag, which would lose one of them.
    #[test]
    fn many_attach_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let subject = Descriptor::new(MANIFEST_TYPE, store.put(b"subject").unwrap(), 7);
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let (store, subject) = (Store::open(dir.path()).unwrap(), &subject);
                scope.spawn(move || {
                    let text = format!("report {writer}");
                    attach(&store, subject, &Kind::report("r").unwrap(), ("a", "b"), text.as_bytes(), &BTreeMap::new()).unwrap();
                });
            }
        });
        let mut texts: Vec<Vec<u8>> =
            attached(&store, &subject.digest).unwrap().iter().map(|it| it.read(&store).unwrap()).collect();
        texts.sort();
        assert_eq!(texts, (0..8).map(|writer| format!("report {writer}").into_bytes()).collect::<Vec<_>>());
    }
}
