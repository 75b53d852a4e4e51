//! Signatures over artifacts, in both forms that cosign reads.
//!
//! - *Simple signing*, where cosign 2 looks: one image manifest tagged `sha256-HEX.sig`, each layer a
//!   payload that names the artifact's digest, the signature in the layer's annotation (cosign,
//!   "Signature Specification"; containers/image, "atomic container signature").
//! - A *bundle* as referrer, where cosign 3 looks: an in-toto statement with an empty predicate (see [`dsse`]).
//!
//! Signing twice with the same key changes nothing, since signatures are deterministic. Nothing is
//! written to a transparency log: a signature tells *who*, and not *when*.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::dsse::{self, BUNDLE_TYPE, Statement, Subject};
use super::keys::{Fingerprint, PrivateKey, PublicKey};
use super::referrer::{self, Attached, Kind};
use super::store::{Descriptor, MANIFEST_TYPE, Store};
use super::{image, release};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Media type of a payload.
pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation of a payload's descriptor: base64 of the signature.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const PAYLOAD_KIND: &str = "cosign container image signature";
/// `predicateType` of a bundle that only says "signed".
const SIGN_PREDICATE: &str = "https://sigstore.dev/cosign/sign/v1";
/// What Go writes for no time, and so cosign in the configuration of its signatures.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// How a signature is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    SimpleSigning,
    Bundle,
}

/// What a signature turned out to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Made by this key over this artifact.
    Valid(Fingerprint),
    /// None of the given keys made it, or its bytes were changed.
    OtherKey,
    /// Made by this key, but over something else.
    OtherArtifact(Fingerprint),
    /// It cannot be read; why.
    Broken(String),
}

/// A signature found beside an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Seen {
    pub form: Form,
    /// Where in the store.
    pub tag: String,
    pub verdict: Verdict,
}

/// A simple signing payload, as far as it is checked.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    docker_manifest_digest: String,
}

/// Signs the artifact `subject` in both forms. `reference` is the repository it is known by, such as
/// `registry.example/team/shop`; cosign shows it and checks only the digest.
///
/// Undone by removing the tags. The artifact itself is not touched.
pub fn sign(store: &Store, subject: &Descriptor, reference: &str, key: &PrivateKey) -> Result<()> {
    store.verify(&subject.digest).context("what is not whole is not signed")?;
    let statement = Statement::new(vec![Subject::new("", &subject.digest)], SIGN_PREDICATE, json!({}));
    let bundle = dsse::seal(&statement, key)?;
    referrer::attach(store, subject, &Kind::Bundle, (BUNDLE_TYPE, BUNDLE_TYPE), &bundle, &dsse::annotations(&statement))?;
    sign_simply(store, &subject.digest, reference, key)
}

/// Signs a release and every artifact in it, each in both forms; what was signed, the release first.
pub fn sign_release(store: &Store, digest: &Digest, reference: &str, key: &PrivateKey) -> Result<Vec<Descriptor>> {
    let release = release::read(store, digest)?;
    let subjects: Vec<Descriptor> =
        std::iter::once(release.descriptor()).chain(release.entries.iter().map(release::Entry::descriptor)).collect();
    for subject in &subjects {
        sign(store, subject, reference, key).with_context(|| format!("cannot sign {}", subject.digest))?;
    }
    Ok(subjects)
}

/// The bytes cosign signs.
fn payload(digest: &Digest, reference: &str) -> Result<Vec<u8>> {
    let payload = json!({
        "critical": {
            "identity": {"docker-reference": reference},
            "image": {"docker-manifest-digest": digest},
            "type": PAYLOAD_KIND,
        },
        "optional": null,
    });
    Ok(serde_json::to_vec(&image::sorted(payload))?)
}

fn sign_simply(store: &Store, digest: &Digest, reference: &str, key: &PrivateKey) -> Result<()> {
    let payload = payload(digest, reference)?;
    let layer = Descriptor {
        annotations: BTreeMap::from([(SIGNATURE.into(), STANDARD.encode(key.sign(&payload)))]),
        ..Descriptor::new(SIMPLE_SIGNING, store.put(&payload)?, payload.len() as u64)
    };
    add(store, digest, vec![serde_json::to_value(layer)?])
}

/// Adds the signatures of cosign's manifest `manifest`, which came from elsewhere, to those beside
/// the artifact; its blobs are in the store already. They are not checked here: see [`seen`].
pub fn adopt(store: &Store, digest: &Digest, manifest: &Descriptor) -> Result<()> {
    add(store, digest, layers(store, &manifest.digest)?)
}

fn layers(store: &Store, manifest: &Digest) -> Result<Vec<Value>> {
    let manifest: Value = serde_json::from_slice(&store.read(manifest)?).context("the signatures are broken")?;
    Ok(manifest["layers"].as_array().cloned().unwrap_or_default())
}

/// Adds payloads to the manifest of signatures. Others' are kept as they are, whatever their annotations say.
fn add(store: &Store, digest: &Digest, new: Vec<Value>) -> Result<()> {
    let _lock = referrer::lock(store)?;
    let tag = referrer::tag(digest, &Kind::Signature, 1);
    let mut layers = match store.tagged(&tag)? {
        Some(there) => layers(store, &there.digest)?,
        None => Vec::new(),
    };
    let before = layers.len();
    for layer in new {
        let same = |there: &Value| {
            ["/digest", "/annotations/dev.cosignproject.cosign~1signature"]
                .iter()
                .all(|at| there.pointer(at) == layer.pointer(at))
        };
        if !layers.iter().any(same) {
            layers.push(layer);
        }
    }
    if layers.len() == before {
        return Ok(());
    }
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({
        "architecture": "",
        "config": {},
        "created": NO_TIME,
        "history": vec![json!({"created": NO_TIME}); layers.len()],
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = serde_json::to_vec(&image::sorted(config))?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": Descriptor::new(image::CONFIG_TYPE, store.put(&config)?, config.len() as u64),
        "layers": layers,
    });
    let manifest = serde_json::to_vec(&image::sorted(manifest))?;
    store.tag(&tag, &Descriptor::new(MANIFEST_TYPE, store.put(&manifest)?, manifest.len() as u64))
}

/// Every signature beside the artifact `digest`, with what `keys` say of it. Nothing attached: empty.
/// Statements such as provenance are signed as well, but say something else; they do not count here.
pub fn seen(store: &Store, digest: &Digest, keys: &[PublicKey]) -> Result<Vec<Seen>> {
    let mut seen = Vec::new();
    for attached in referrer::attached(store, digest)? {
        let verdicts = match attached.kind {
            Kind::Signature => {
                attached.content.iter().map(|layer| (Form::SimpleSigning, simple(store, digest, layer, keys))).collect()
            }
            Kind::Bundle => vec![(Form::Bundle, bundle(store, digest, &attached, keys))],
            _ => Vec::new(),
        };
        for (form, verdict) in verdicts {
            let verdict = verdict.unwrap_or_else(|error| Verdict::Broken(format!("{error:#}")));
            seen.push(Seen { form, tag: attached.tag.clone(), verdict });
        }
    }
    Ok(seen)
}

fn simple(store: &Store, digest: &Digest, layer: &Descriptor, keys: &[PublicKey]) -> Result<Verdict> {
    anyhow::ensure!(layer.media_type == SIMPLE_SIGNING, "a signature of the unknown type `{}`", layer.media_type);
    let signature = layer.annotations.get(SIGNATURE).context("a payload without a signature")?;
    let signature = STANDARD.decode(signature).context("the signature is broken")?;
    let bytes = store.read(&layer.digest)?;
    let Some(key) = keys.iter().find(|key| key.verifies(&bytes, &signature)) else { return Ok(Verdict::OtherKey) };
    let payload: Payload = serde_json::from_slice(&bytes).context("the payload is no simple signing")?;
    anyhow::ensure!(payload.critical.kind == PAYLOAD_KIND, "a payload of the unknown type `{}`", payload.critical.kind);
    Ok(judge(key.fingerprint(), payload.critical.image.docker_manifest_digest == digest.to_string()))
}

fn bundle(store: &Store, digest: &Digest, attached: &Attached, keys: &[PublicKey]) -> Result<Verdict> {
    let opened = dsse::open(&attached.read(store)?, keys)?;
    let Some(key) = opened.signed_by else { return Ok(Verdict::OtherKey) };
    // A signed statement of another kind says something else than "this artifact is ours".
    let kind = &opened.statement.predicate_type;
    anyhow::ensure!(kind == SIGN_PREDICATE, "a statement of the type `{kind}`, which is no signature");
    Ok(judge(key, opened.statement.is_about(digest)))
}

fn judge(key: Fingerprint, same: bool) -> Verdict {
    if same { Verdict::Valid(key) } else { Verdict::OtherArtifact(key) }
}

/// The keys among `keys` that signed the artifact, each once, in the order of `keys`.
pub fn signers(seen: &[Seen], keys: &[PublicKey]) -> Vec<Fingerprint> {
    let valid = |key: &Fingerprint| seen.iter().any(|it| it.verdict == Verdict::Valid(*key));
    keys.iter().map(PublicKey::fingerprint).filter(valid).collect()
}

/// Checks that the artifact's own bytes are whole and that one of `keys` signed it; which ones.
///
/// # Errors
/// Its bytes were changed; it is not signed; signed by other keys; the signature is over something else.
pub fn require(store: &Store, digest: &Digest, keys: &[PublicKey]) -> Result<Vec<Fingerprint>> {
    store.verify(digest)?;
    let seen = seen(store, digest, keys)?;
    let signers = signers(&seen, keys);
    if !signers.is_empty() {
        return Ok(signers);
    }
    Err(refusal(digest, &seen).into())
}

/// Why these signatures are not enough.
fn refusal(digest: &Digest, seen: &[Seen]) -> Problem {
    if seen.is_empty() {
        return Problem::failed(format!("{digest} is not signed"))
            .hint("sign it with `pipeline artifact sign --key NAME.key`, or pull it with its signatures");
    }
    let reason = |seen: &Seen| match &seen.verdict {
        Verdict::Valid(key) => format!("signed by {key}"),
        Verdict::OtherKey => "made by another key, or changed since".to_owned(),
        Verdict::OtherArtifact(key) => format!("made by {key} over another artifact"),
        Verdict::Broken(why) => format!("broken: {why}"),
    };
    let reasons: Vec<String> = seen.iter().map(|seen| format!("`{}` is {}", seen.tag, reason(seen))).collect();
    Problem::failed(format!("{digest} is not signed by a key that was given: {}", reasons.join("; ")))
        .hint("compare the key with the one that signed; a signature is never repaired, the artifact is signed anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(store: &Store) -> Descriptor {
        Descriptor::new(MANIFEST_TYPE, store.put(b"{\"artifact\":1}").unwrap(), 14)
    }

    #[test]
    fn the_payload_is_cosigns() {
        let digest = Digest::of("x");
        let expected = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"127.0.0.1:5000/shop"}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"cosign container image signature"}},"optional":null}}"#
        );
        assert_eq!(String::from_utf8(payload(&digest, "127.0.0.1:5000/shop").unwrap()).unwrap(), expected);
    }

    #[test]
    fn several_keys_sign_and_signing_again_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let subject = subject(&store);
        let (one, two, three) = (PrivateKey::generate(), PrivateKey::generate(), PrivateKey::generate());
        let keys = [one.public(), two.public(), three.public()];
        sign(&store, &subject, "shop", &one).unwrap();
        sign(&store, &subject, "shop", &two).unwrap();
        let before = fs_err::read(store.layout().join("index.json")).unwrap();
        sign(&store, &subject, "shop", &one).unwrap();
        assert_eq!(fs_err::read(store.layout().join("index.json")).unwrap(), before);
        let seen = seen(&store, &subject.digest, &keys).unwrap();
        let forms: Vec<(Form, &Verdict)> = seen.iter().map(|seen| (seen.form, &seen.verdict)).collect();
        let (first, second) = (Verdict::Valid(keys[0].fingerprint()), Verdict::Valid(keys[1].fingerprint()));
        let expected =
            [(Form::SimpleSigning, &first), (Form::SimpleSigning, &second), (Form::Bundle, &first), (Form::Bundle, &second)];
        assert_eq!(forms, expected);
        assert_eq!(signers(&seen, &keys), [keys[0].fingerprint(), keys[1].fingerprint()]);
        assert_eq!(require(&store, &subject.digest, &keys[1..]).unwrap(), [keys[1].fingerprint()]);
        let error = require(&store, &subject.digest, &keys[2..]).unwrap_err().to_string();
        assert!(error.contains("is not signed by a key that was given") && error.contains("another key"), "{error}");
        let other = store.put(b"other").unwrap();
        assert!(require(&store, &other, &keys).unwrap_err().to_string().ends_with("is not signed"));
    }

    #[test]
    fn one_byte_is_noticed() {
        let key = PrivateKey::generate();
        let keys = [key.public()];
        // What is changed, and what is said of it.
        let cases = ["artifact", "payload", "bundle", "signature"];
        for case in cases {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let subject = subject(&store);
            sign(&store, &subject, "shop", &key).unwrap();
            let attached = referrer::attached(&store, &subject.digest).unwrap();
            let blob = |kind: &Kind| attached.iter().find(|it| it.kind == *kind).unwrap().content[0].digest;
            let flip = |digest: &Digest| {
                let mut bytes = fs_err::read(store.blob(digest)).unwrap();
                let last = bytes.len() - 2;
                bytes[last] ^= 1;
                fs_err::write(store.blob(digest), bytes).unwrap();
            };
            match case {
                "artifact" => flip(&subject.digest),
                "payload" => flip(&blob(&Kind::Signature)),
                "bundle" => flip(&blob(&Kind::Bundle)),
                // Under digests that fit, as an attacker with the registry would do it.
                _ => forge(&store, &subject.digest, |layer| {
                    let text = layer["annotations"][SIGNATURE].as_str().unwrap();
                    let mut bytes = STANDARD.decode(text).unwrap();
                    *bytes.last_mut().unwrap() ^= 1;
                    layer["annotations"][SIGNATURE] = STANDARD.encode(bytes).into();
                }),
            }
            let verdicts: Vec<Verdict> = match seen(&store, &subject.digest, &keys) {
                Ok(seen) => seen.into_iter().map(|seen| seen.verdict).collect(),
                Err(error) => panic!("{case}: {error:#}"),
            };
            let valid = Verdict::Valid(keys[0].fingerprint());
            match case {
                "artifact" => assert!(require(&store, &subject.digest, &keys).unwrap_err().to_string().contains("is corrupt")),
                "signature" => assert_eq!(verdicts, [Verdict::OtherKey, valid]),
                "payload" => {
                    assert!(matches!(&verdicts[0], Verdict::Broken(why) if why.contains("is corrupt")) && verdicts[1] == valid)
                }
                _ => assert!(matches!(&verdicts[1], Verdict::Broken(why) if why.contains("is corrupt")) && verdicts[0] == valid),
            }
        }
    }

    /// Rewrites the signatures' manifest with digests that fit.
    fn forge(store: &Store, subject: &Digest, change: impl Fn(&mut Value)) {
        let tag = referrer::tag(subject, &Kind::Signature, 1);
        let digest = store.tagged(&tag).unwrap().unwrap().digest;
        let mut manifest: Value = serde_json::from_slice(&store.read(&digest).unwrap()).unwrap();
        change(&mut manifest["layers"][0]);
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let descriptor = Descriptor::new(MANIFEST_TYPE, store.put(&bytes).unwrap(), bytes.len() as u64);
        store.tag(&tag, &descriptor).unwrap();
    }

    #[test]
    fn the_right_key_over_other_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (subject, key) = (subject(&store), PrivateKey::generate());
        let other = Descriptor::new(MANIFEST_TYPE, store.put(b"other").unwrap(), 5);
        sign(&store, &other, "shop", &key).unwrap();
        // The signature of the other artifact, laid beside this one in both forms.
        let tag = |digest: &Digest| referrer::tag(digest, &Kind::Signature, 1);
        store.tag(&tag(&subject.digest), &store.tagged(&tag(&other.digest)).unwrap().unwrap()).unwrap();
        let bundle = referrer::newest(&store, &other.digest, &Kind::Bundle).unwrap().unwrap().read(&store).unwrap();
        referrer::attach(&store, &subject, &Kind::Bundle, (BUNDLE_TYPE, BUNDLE_TYPE), &bundle, &BTreeMap::new()).unwrap();
        // A signed statement of another kind about this one is no signature either.
        let statement = Statement::new(vec![Subject::new("", &subject.digest)], "https://slsa.dev/provenance/v1", json!({}));
        let sealed = dsse::seal(&statement, &key).unwrap();
        referrer::attach(&store, &subject, &Kind::Bundle, (BUNDLE_TYPE, BUNDLE_TYPE), &sealed, &BTreeMap::new()).unwrap();
        let verdicts: Vec<Verdict> =
            seen(&store, &subject.digest, &[key.public()]).unwrap().into_iter().map(|seen| seen.verdict).collect();
        let elsewhere = Verdict::OtherArtifact(key.public().fingerprint());
        assert_eq!(verdicts[..2], [elsewhere.clone(), elsewhere]);
        assert!(matches!(&verdicts[2], Verdict::Broken(why) if why.contains("which is no signature")));
        assert!(require(&store, &subject.digest, &[key.public()]).unwrap_err().to_string().contains("over another artifact"));
    }
}
