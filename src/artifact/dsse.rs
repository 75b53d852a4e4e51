//! Signed statements: in-toto statements in DSSE envelopes in Sigstore bundles.
//!
//! ```text
//! bundle v0.3   verificationMaterial.publicKey.hint, dsseEnvelope      sigstore/protobuf-specs, `Bundle`
//!   envelope    payload, payloadType, one signature over PAE           secure-systems-lab/dsse, "Protocol"
//!     statement subjects by digest, predicateType, predicate           in-toto attestation framework, "Statement"
//! ```
//! No transparency log and no certificate: who trusts the key trusts what it signed, whenever that was.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::image;
use super::keys::{Fingerprint, PrivateKey, PublicKey};
use crate::oci::digest::Digest;

/// Media type and `artifactType` of a bundle.
pub const BUNDLE_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// Media type of an in-toto statement.
pub const STATEMENT_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// Annotations of a bundle's manifest, by which cosign tells what is inside without reading it.
const CONTENT: &str = "dev.sigstore.bundle.content";
pub(super) const PREDICATE: &str = "dev.sigstore.bundle.predicateType";

/// What a statement is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Algorithm and hexadecimal digits.
    pub digest: BTreeMap<String, String>,
}

impl Subject {
    pub fn new(name: impl Into<String>, digest: &Digest) -> Self {
        Self { name: name.into(), digest: sha256(digest) }
    }
}

/// A digest as in-toto writes it: algorithm and digits.
pub fn sha256(digest: &Digest) -> BTreeMap<String, String> {
    BTreeMap::from([("sha256".into(), digest.hex())])
}

/// An in-toto statement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    #[serde(rename = "_type")]
    pub kind: String,
    pub subject: Vec<Subject>,
    pub predicate_type: String,
    #[serde(default)]
    pub predicate: Value,
}

impl Statement {
    pub fn new(subject: Vec<Subject>, predicate_type: &str, predicate: Value) -> Self {
        Self { kind: STATEMENT.into(), subject, predicate_type: predicate_type.into(), predicate }
    }

    /// The same statement gives the same bytes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(&image::sorted(serde_json::to_value(self)?))?)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let statement: Self = serde_json::from_slice(bytes).context("no in-toto statement")?;
        // v0.1 differs in nothing that is read here, and cosign 2 writes it.
        anyhow::ensure!(
            statement.kind == STATEMENT || statement.kind == "https://in-toto.io/Statement/v0.1",
            "a statement of the unknown type `{}`",
            statement.kind
        );
        Ok(statement)
    }

    /// Whether it is about this artifact.
    pub fn is_about(&self, digest: &Digest) -> bool {
        let hex = digest.hex();
        self.subject.iter().any(|subject| subject.digest.get("sha256") == Some(&hex))
    }
}

/// What is signed: DSSE's pre-authentication encoding of type and payload.
fn pae(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

/// The bundle of a statement signed with `key`.
pub fn seal(statement: &Statement, key: &PrivateKey) -> Result<Vec<u8>> {
    let payload = statement.encode()?;
    let signature = key.sign(&pae(STATEMENT_TYPE, &payload));
    let bundle = json!({
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.public().hint()}},
        "dsseEnvelope": {
            "payload": STANDARD.encode(payload),
            "payloadType": STATEMENT_TYPE,
            "signatures": [{"sig": STANDARD.encode(signature)}],
        },
    });
    Ok(serde_json::to_vec(&image::sorted(bundle))?)
}

/// The annotations of a bundle's manifest.
pub fn annotations(statement: &Statement) -> BTreeMap<String, String> {
    BTreeMap::from([(CONTENT.into(), "dsse-envelope".into()), (PREDICATE.into(), statement.predicate_type.clone())])
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    #[serde(default)]
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    sig: String,
}

/// An opened bundle.
#[derive(Debug, Clone, PartialEq)]
pub struct Opened {
    pub statement: Statement,
    /// The first of the given keys that made one of its signatures; `None` when none did: then
    /// nothing in the statement is to be believed.
    pub signed_by: Option<Fingerprint>,
}

/// Opens a bundle and looks which of `keys` signed it.
///
/// # Errors
/// No bundle, or one without an in-toto statement.
pub fn open(bytes: &[u8], keys: &[PublicKey]) -> Result<Opened> {
    let bundle: Bundle = serde_json::from_slice(bytes).context("no Sigstore bundle")?;
    anyhow::ensure!(
        bundle.media_type.starts_with("application/vnd.dev.sigstore.bundle"),
        "a bundle of the unknown type `{}`",
        bundle.media_type
    );
    let envelope = bundle.dsse_envelope.context("a bundle without a DSSE envelope")?;
    anyhow::ensure!(envelope.payload_type == STATEMENT_TYPE, "an envelope of the unknown type `{}`", envelope.payload_type);
    let payload = STANDARD.decode(&envelope.payload).context("the envelope is broken")?;
    let signed = pae(&envelope.payload_type, &payload);
    let signatures: Vec<Vec<u8>> = envelope.signatures.iter().filter_map(|it| STANDARD.decode(&it.sig).ok()).collect();
    let signed_by =
        keys.iter().find(|key| signatures.iter().any(|signature| key.verifies(&signed, signature))).map(PublicKey::fingerprint);
    Ok(Opened { statement: Statement::parse(&payload)?, signed_by })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the DSSE specification, "Test Vectors".
    #[test]
    fn pae_is_the_specifications() {
        assert_eq!(
            pae("http://example.com/HelloWorld", b"hello world"),
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    #[test]
    fn a_bundle_is_believed_only_with_its_key_and_its_bytes() {
        let (key, other) = (PrivateKey::generate(), PrivateKey::generate());
        let digest = Digest::of("artifact");
        let statement = Statement::new(vec![Subject::new("a", &digest)], "https://example.org/v1", json!({"x": 1}));
        let bundle = seal(&statement, &key).unwrap();
        assert_eq!(bundle, seal(&statement, &key).unwrap());
        let opened = open(&bundle, &[other.public(), key.public()]).unwrap();
        assert_eq!((opened.signed_by, &opened.statement), (Some(key.public().fingerprint()), &statement));
        assert!(opened.statement.is_about(&digest) && !opened.statement.is_about(&Digest::of("other")));
        assert_eq!(open(&bundle, &[other.public()]).unwrap().signed_by, None);
        assert_eq!(open(&bundle, &[]).unwrap().signed_by, None);
        // Another payload under the same signature.
        let mut value: Value = serde_json::from_slice(&bundle).unwrap();
        let forged = Statement::new(vec![Subject::new("a", &Digest::of("other"))], "https://example.org/v1", json!({"x": 1}));
        value["dsseEnvelope"]["payload"] = STANDARD.encode(forged.encode().unwrap()).into();
        assert_eq!(open(value.to_string().as_bytes(), &[key.public()]).unwrap().signed_by, None);
        for (pointer, replacement, expected) in [
            ("/mediaType", "text/plain", "of the unknown type `text/plain`"),
            ("/dsseEnvelope/payloadType", "text/plain", "of the unknown type `text/plain`"),
            ("/dsseEnvelope/payload", "%%", "the envelope is broken"),
            ("/dsseEnvelope/payload", "e30=", "no in-toto statement"),
        ] {
            let mut value: Value = serde_json::from_slice(&bundle).unwrap();
            *value.pointer_mut(pointer).unwrap() = replacement.into();
            let error = open(value.to_string().as_bytes(), &[key.public()]).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }
}
