//! Key pairs that sign artifacts: ECDSA on P-256 with SHA-256, in the files of cosign.
//!
//! ```text
//! NAME.key   -----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----   JSON: scrypt parameters, nonce, NaCl secretbox of PKCS#8 DER
//!            -----BEGIN PRIVATE KEY-----                      PKCS#8 DER, without a password
//!            -----BEGIN EC PRIVATE KEY-----                   SEC 1 DER, read only
//! NAME.pub   -----BEGIN PUBLIC KEY-----                       SubjectPublicKeyInfo DER (RFC 5480)
//! ```
//! The encrypted form is go-securesystemslib's `encrypted` package, which cosign uses. Signatures
//! are deterministic (RFC 6979): signing the same bytes twice gives the same signature.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crypto_secretbox::aead::{Aead as _, KeyInit as _};
use crypto_secretbox::{Nonce, XSalsa20Poly1305};
use fs_err::os::unix::fs::OpenOptionsExt as _;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p256::pkcs8::der::pem::{self, LineEnding};
use p256::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::Problem;
use crate::fault;
use crate::oci::digest::Digest;

/// Labels of an encrypted private key: of today's cosign, and of cosign before 2.0.
const ENCRYPTED: [&str; 2] = ["ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY"];
const PLAIN: &str = "PRIVATE KEY";
const SEC1: &str = "EC PRIVATE KEY";
const PUBLIC: &str = "PUBLIC KEY";

/// scrypt's cost of a new key, as log2(N): what cosign writes.
const LOG_N: u8 = 16;
/// Costs that are read, as cosign does: another one may be an attack on time and memory.
const KNOWN_LOG_N: [u8; 3] = [15, 16, 17];
const SCRYPT_R: u32 = 8;
const SCRYPT_P: u32 = 1;

/// Which public key: the SHA-256 of its DER form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub Digest);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The half that signs. Its bytes are overwritten when it is dropped and never shown.
#[derive(Clone)]
pub struct PrivateKey(SigningKey);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(of {})", self.public().fingerprint())
    }
}

/// The half that checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

/// What an encrypted key file holds (go-securesystemslib, `encrypted.data`).
#[derive(Serialize, Deserialize)]
struct Sealed {
    kdf: Kdf,
    cipher: Cipher,
    ciphertext: String,
}

#[derive(Serialize, Deserialize)]
struct Kdf {
    name: String,
    params: Params,
    salt: String,
}

#[derive(Serialize, Deserialize)]
struct Params {
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
}

#[derive(Serialize, Deserialize)]
struct Cipher {
    name: String,
    nonce: String,
}

impl PrivateKey {
    /// A new key from the kernel's randomness.
    pub fn generate() -> Self {
        loop {
            let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(rand::random());
            // Refused when it is zero or not below the order of the curve: one in 2^32.
            if let Ok(key) = SigningKey::from_slice(&*bytes) {
                return Self(key);
            }
        }
    }

    /// Reads a key file. `password` is asked only when the file is encrypted.
    ///
    /// # Errors
    /// No private key, one of another kind than P-256, a wrong password, scrypt costs cosign does not write.
    pub fn from_pem(text: &str, password: impl FnOnce() -> Result<Vec<u8>>) -> Result<Self> {
        let (label, bytes) = decode_pem(text, "private key")?;
        let bytes = Zeroizing::new(bytes);
        let key = if ENCRYPTED.contains(&label.as_str()) {
            let password = Zeroizing::new(password()?);
            SigningKey::from_pkcs8_der(&open(&bytes, &password)?).map_err(|_| other_kind())?
        } else if label == PLAIN {
            SigningKey::from_pkcs8_der(&bytes).map_err(|_| other_kind())?
        } else if label == SEC1 {
            p256::SecretKey::from_sec1_der(&bytes).map_err(|_| other_kind())?.into()
        } else {
            let hint = "the private key is the file that ends in `.key`; make a pair with `pipeline keys generate`";
            return Err(Problem::usage(format!("a `{label}` is no private key this program signs with")).hint(hint).into());
        };
        Ok(Self(key))
    }

    /// [`PrivateKey::from_pem`] of a file.
    pub fn load(path: &Path, password: impl FnOnce() -> Result<Vec<u8>>) -> Result<Self> {
        let text = Zeroizing::new(fs_err::read_to_string(path)?);
        Self::from_pem(&text, password).with_context(|| format!("cannot use the key `{}`", path.display()))
    }

    /// The key file, encrypted with `password` as cosign does it (an empty password is one, too).
    pub fn to_pem(&self, password: &[u8]) -> Result<Zeroizing<String>> {
        let der = self.0.to_pkcs8_der().context("cannot encode the key")?;
        let (salt, nonce): ([u8; 32], [u8; 24]) = (rand::random(), rand::random());
        let key = derive(password, &salt, LOG_N)?;
        let ciphertext = XSalsa20Poly1305::new((&*key).into())
            .encrypt(Nonce::from_slice(&nonce), der.as_bytes())
            .map_err(|_| anyhow::anyhow!("cannot encrypt the key"))?;
        let sealed = Sealed {
            kdf: Kdf {
                name: "scrypt".into(),
                params: Params { n: 1 << LOG_N, r: SCRYPT_R, p: SCRYPT_P },
                salt: STANDARD.encode(salt),
            },
            cipher: Cipher { name: "nacl/secretbox".into(), nonce: STANDARD.encode(nonce) },
            ciphertext: STANDARD.encode(ciphertext),
        };
        encode_pem(ENCRYPTED[0], &serde_json::to_vec(&sealed)?).map(Zeroizing::new)
    }

    /// The key file without a password.
    pub fn to_plain_pem(&self) -> Result<Zeroizing<String>> {
        let der = self.0.to_pkcs8_der().context("cannot encode the key")?;
        encode_pem(PLAIN, der.as_bytes()).map(Zeroizing::new)
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(*self.0.verifying_key())
    }

    /// The signature over `message`: ASN.1 DER of ECDSA over its SHA-256.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature: DerSignature = self.0.sign(message);
        signature.as_bytes().to_vec()
    }
}

impl PublicKey {
    /// Reads a `PUBLIC KEY`.
    ///
    /// # Errors
    /// Something else than an ECDSA key on P-256.
    pub fn from_pem(text: &str) -> Result<Self> {
        let (label, bytes) = decode_pem(text, "public key")?;
        if label != PUBLIC {
            let hint = "the public key is the file that ends in `.pub`";
            return Err(Problem::usage(format!("a `{label}` is no public key")).hint(hint).into());
        }
        VerifyingKey::from_public_key_der(&bytes).map(Self).map_err(|_| other_kind().into())
    }

    /// [`PublicKey::from_pem`] of a file.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_pem(&fs_err::read_to_string(path)?).with_context(|| format!("cannot use the key `{}`", path.display()))
    }

    pub fn to_pem(&self) -> Result<String> {
        encode_pem(PUBLIC, &self.der()?)
    }

    fn der(&self) -> Result<Vec<u8>> {
        Ok(self.0.to_public_key_der().context("cannot encode the key")?.into_vec())
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(Digest::of(self.der().unwrap_or_default()))
    }

    /// What a Sigstore bundle calls the key by: base64 of the fingerprint's bytes.
    pub fn hint(&self) -> String {
        STANDARD.encode(self.fingerprint().0.bytes())
    }

    /// Whether `signature` (ASN.1 DER) is this key's over `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        DerSignature::from_bytes(signature).is_ok_and(|signature| self.0.verify(message, &signature).is_ok())
    }
}

/// Writes `NAME.key` (mode 0600) and `NAME.pub` into `dir`, encrypted unless there is no password.
/// To undo it, remove both files.
///
/// # Errors
/// One of the files is there already: a key is never overwritten.
pub fn write_pair(dir: &Path, name: &str, key: &PrivateKey, password: Option<&[u8]>) -> Result<(PathBuf, PathBuf)> {
    let (private, public) = (dir.join(format!("{name}.key")), dir.join(format!("{name}.pub")));
    for path in [&private, &public] {
        if path.symlink_metadata().is_ok() {
            return Err(Problem::failed(format!("`{}` is there already", path.display()))
                .hint("what it signed cannot be checked without it: choose another name, or move it away")
                .into());
        }
    }
    let text = password.map_or_else(|| key.to_plain_pem(), |password| key.to_pem(password))?;
    write_new(&private, text.as_bytes(), 0o600)?;
    write_new(&public, key.public().to_pem()?.as_bytes(), 0o644)?;
    super::store::sync_dir(dir)?;
    Ok((private, public))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    fault::point("write a key");
    let mut file = fs_err::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(())
}

fn decode_pem(text: &str, wanted: &str) -> Result<(String, Vec<u8>)> {
    pem::decode_vec(text.trim_start().as_bytes()).map(|(label, bytes)| (label.to_owned(), bytes)).map_err(|error| {
        Problem::usage(format!("this is no {wanted}: {error}"))
            .hint("it starts with a line like `-----BEGIN PUBLIC KEY-----`")
            .into()
    })
}

fn encode_pem(label: &str, bytes: &[u8]) -> Result<String> {
    pem::encode_string(label, LineEnding::LF, bytes).context("cannot encode the key")
}

fn other_kind() -> Problem {
    Problem::usage("the key is not an ECDSA key on the curve P-256, the only kind that is used")
        .hint("`cosign generate-key-pair` and `pipeline keys generate` make such keys")
}

fn derive(password: &[u8], salt: &[u8], log_n: u8) -> Result<Zeroizing<[u8; 32]>> {
    let params = scrypt::Params::new(log_n, SCRYPT_R, SCRYPT_P).context("scrypt refuses its parameters")?;
    let mut key = Zeroizing::new([0; 32]);
    scrypt::scrypt(password, salt, &params, &mut *key).context("scrypt failed")?;
    Ok(key)
}

/// Decrypts the content of an encrypted key file.
fn open(bytes: &[u8], password: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let broken = || Problem::usage("the encrypted key is broken").hint("take the file from where it was made, or from a copy");
    let sealed: Sealed = serde_json::from_slice(bytes).map_err(|_| broken())?;
    let params = &sealed.kdf.params;
    let log_n = KNOWN_LOG_N.into_iter().find(|log_n| 1 << log_n == params.n);
    let known = sealed.kdf.name == "scrypt" && sealed.cipher.name == "nacl/secretbox";
    let (Some(log_n), true) = (log_n, known && (params.r, params.p) == (SCRYPT_R, SCRYPT_P)) else {
        return Err(Problem::usage("the key is encrypted in a way that cosign does not write")
            .hint("scrypt with N 32768, 65536 or 131072, r 8, p 1 and `nacl/secretbox` are known")
            .into());
    };
    let decode = |text: &str| STANDARD.decode(text).map_err(|_| broken());
    let nonce: [u8; 24] = decode(&sealed.cipher.nonce)?.try_into().map_err(|_| broken())?;
    let key = derive(password, &decode(&sealed.kdf.salt)?, log_n)?;
    XSalsa20Poly1305::new((&*key).into())
        .decrypt(Nonce::from_slice(&nonce), decode(&sealed.ciphertext)?.as_slice())
        .map(Zeroizing::new)
        .map_err(|_| Problem::failed("the password of the key is wrong, or its file was changed").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_password() -> Result<Vec<u8>> {
        panic!("asked for a password")
    }

    #[test]
    fn a_pair_comes_back_from_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let key = PrivateKey::generate();
        let (private, public) = write_pair(dir.path(), "plain", &key, None).unwrap();
        assert_eq!(PrivateKey::load(&private, no_password).unwrap().public(), key.public());
        assert_eq!(PublicKey::load(&public).unwrap(), key.public());
        let (private, _) = write_pair(dir.path(), "sealed", &key, Some(b"secret")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs_err::metadata(&private).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(PrivateKey::load(&private, || Ok(b"secret".to_vec())).unwrap().public(), key.public());
        let error = PrivateKey::load(&private, || Ok(b"Secret".to_vec())).unwrap_err();
        assert!(format!("{error:#}").ends_with("the password of the key is wrong, or its file was changed"), "{error:#}");
        let error = write_pair(dir.path(), "sealed", &key, None).unwrap_err();
        assert!(error.to_string().ends_with("sealed.key` is there already"), "{error}");
    }

    #[test]
    fn signatures_are_deterministic_and_bound_to_key_and_message() {
        let (one, two) = (PrivateKey::generate(), PrivateKey::generate());
        let signature = one.sign(b"message");
        assert_eq!(signature, one.sign(b"message"));
        assert!(one.public().verifies(b"message", &signature));
        assert!(!one.public().verifies(b"massage", &signature) && !two.public().verifies(b"message", &signature));
        assert!(!one.public().verifies(b"message", b"") && !one.public().verifies(b"message", &[0x30, 0]));
    }

    #[test]
    fn files_that_are_no_keys_are_told_apart() {
        let key = PrivateKey::generate();
        let sealed = key.to_pem(b"x").unwrap();
        let costly = {
            let (_, bytes) = decode_pem(&sealed, "private key").unwrap();
            let text = String::from_utf8(bytes).unwrap().replace("65536", "1073741824");
            encode_pem(ENCRYPTED[0], text.as_bytes()).unwrap()
        };
        let cases = [
            (String::new(), "this is no private key"),
            ("hello".into(), "this is no private key"),
            (key.public().to_pem().unwrap(), "a `PUBLIC KEY` is no private key"),
            (encode_pem(PLAIN, b"junk").unwrap(), "not an ECDSA key on the curve P-256"),
            (encode_pem(ENCRYPTED[0], b"{}").unwrap(), "the encrypted key is broken"),
            (costly, "in a way that cosign does not write"),
        ];
        for (text, expected) in cases {
            let error = PrivateKey::from_pem(&text, || Ok(b"x".to_vec())).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = PublicKey::from_pem(&sealed).unwrap_err();
        assert!(error.to_string().contains("is no public key"), "{error}");
    }
}
