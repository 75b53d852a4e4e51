//! Signatures made with SSH keys (OpenSSH's `PROTOCOL.sshsig`), as Git makes them for commits.
//!
//! A key comes from an OpenSSH private key file, or stays in an agent that is asked over its socket (the draft
//! `draft-ietf-sshm-ssh-agent`). Ed25519, ECDSA and RSA keys sign here; keys of an agent may also be in hardware.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use rsa::pkcs1v15::SigningKey;
use rsa::sha2::Sha512;
use rsa::signature::{SignatureEncoding as _, Signer as _};
use rsa::{BigUint, RsaPrivateKey};
use ssh_key::private::{KeypairData, RsaKeypair};
use ssh_key::{Algorithm, HashAlg, LineEnding, Mpint, PrivateKey, PublicKey, Signature, SshSig};

use crate::error::Problem;

/// An agent may ask its user to touch a key or to confirm; after this it is taken for hung.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);
/// The longest answer of an agent that is read; OpenSSH's own limit.
const AGENT_ANSWER_MAX: u32 = 256 * 1024;
/// Numbers of the agent protocol's messages.
const REQUEST_IDENTITIES: u8 = 11;
const IDENTITIES_ANSWER: u8 = 12;
const SIGN_REQUEST: u8 = 13;
const SIGN_RESPONSE: u8 = 14;
/// RSA with SHA-512 instead of SHA-1.
const FLAG_RSA_SHA2_512: u32 = 4;

/// Signs with one key.
#[derive(Debug)]
pub struct Signer {
    public: PublicKey,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Key(Box<PrivateKey>),
    Agent(PathBuf),
}

/// Whose signature it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By {
    /// Type and base64 as in `id_ed25519.pub`, without comment.
    pub key: String,
    /// `SHA256:…`, as ssh-keygen prints it.
    pub fingerprint: String,
}

impl By {
    /// Whether a public key line is of this key; comments do not matter.
    pub fn is(&self, line: &str) -> bool {
        let words = |text: &str| text.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
        words(line) == words(&self.key)
    }
}

impl Signer {
    /// Takes the key of `file`: an OpenSSH private key, or a public key whose private half the agent at the socket `agent`
    /// has. For a private key with a passphrase the agent is asked as well.
    ///
    /// # Errors
    /// A [`Problem`] for a file that is no key, and for a key that cannot be used without the agent.
    pub fn open(file: &Path, agent: Option<&Path>) -> Result<Self> {
        let text = fs_err::read_to_string(file).context("cannot read the signing key")?;
        let shown = file.display();
        if let Ok(public) = PublicKey::from_openssh(text.trim()) {
            return Self::with_agent(public, agent).with_context(|| format!("cannot sign with `{shown}`"));
        }
        let key = PrivateKey::from_openssh(&text).or_else(|error| match pad_scalar(&text) {
            Some(bytes) => PrivateKey::from_bytes(&bytes),
            None => Err(error),
        });
        let key = key.map_err(|error| {
            let problem = Problem::usage(format!("`{shown}` is no OpenSSH key: {error}"));
            match text.contains("PRIVATE KEY-----") {
                true => problem.hint(format!("convert it with `ssh-keygen -p -f {shown}`")),
                false => problem.hint("make one with `ssh-keygen -t ed25519`"),
            }
        })?;
        let public = key.public_key().clone();
        if key.is_encrypted() {
            return Self::with_agent(public, agent).with_context(|| format!("`{shown}` has a passphrase"));
        }
        Ok(Self { public, source: Source::Key(Box::new(key)) })
    }

    fn with_agent(public: PublicKey, agent: Option<&Path>) -> Result<Self> {
        let hint = "load the key into an SSH agent with `ssh-add`";
        let Some(socket) = agent else {
            bail!(Problem::usage("the key can only be used through an SSH agent, and there is none").hint(hint));
        };
        let keys = Agent::connect(socket)?.keys()?;
        if !keys.contains(&public.to_bytes()?) {
            bail!(Problem::usage(format!("the SSH agent does not have the key {}", fingerprint(&public))).hint(hint));
        }
        Ok(Self { public, source: Source::Agent(socket.into()) })
    }

    /// The key as in `id_ed25519.pub`, without comment.
    pub fn public_key(&self) -> String {
        line(&self.public)
    }

    /// `SHA256:…`, as ssh-keygen prints it.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.public)
    }

    /// The armoured signature of `message`, for one use: a signature of another `namespace` does not pass for it.
    ///
    /// # Errors
    /// An agent that refuses or does not answer.
    pub fn sign(&self, namespace: &str, message: &[u8]) -> Result<String> {
        let data = SshSig::signed_data(namespace, HashAlg::Sha512, message)?;
        let signature = match &self.source {
            Source::Key(key) => match key.key_data() {
                KeypairData::Rsa(pair) => sign_rsa(pair, &data)?,
                pair => pair.try_sign(&data)?,
            },
            Source::Agent(socket) => Agent::connect(socket)?.sign(&self.public, &data)?,
        };
        let signature = SshSig::new(self.public.key_data().clone(), namespace, HashAlg::Sha512, signature)?;
        let armoured = signature.to_pem(LineEnding::LF)?;
        // An agent could answer anything; a wrong signature must not get into the ledger.
        verify(&armoured, namespace, message).context("the signature that was made is not good")?;
        Ok(armoured)
    }
}

/// RSA with SHA-512 (RFC 8332). ssh-key 0.6 takes one of the two primes twice, and cannot use a key of its own format.
fn sign_rsa(pair: &RsaKeypair, data: &[u8]) -> Result<Signature> {
    let number = |number: &Mpint| number.as_positive_bytes().map(BigUint::from_bytes_be).context("a negative number in the key");
    let (public, private) = (&pair.public, &pair.private);
    let primes = vec![number(&private.p)?, number(&private.q)?];
    let key = RsaPrivateKey::from_components(number(&public.n)?, number(&public.e)?, number(&private.d)?, primes)?;
    let signature = SigningKey::<Sha512>::new(key).try_sign(data)?;
    Ok(Signature::new(Algorithm::Rsa { hash: Some(HashAlg::Sha512) }, signature.to_vec())?)
}

/// Whose the armoured signature of `message` is.
///
/// # Errors
/// What is no SSH signature, is for another namespace, or is not over these bytes.
pub fn verify(armoured: &str, namespace: &str, message: &[u8]) -> Result<By> {
    let signature = SshSig::from_pem(armoured.trim()).context("this is no SSH signature")?;
    ensure!(signature.namespace() == namespace, "the signature is for `{}`, not for `{namespace}`", signature.namespace());
    let key = PublicKey::from(signature.public_key().clone());
    key.verify(namespace, message, &signature).ok().context("the signature is not over these bytes, or not by this key")?;
    Ok(By { key: line(&key), fingerprint: fingerprint(&key) })
}

/// Type and base64 of a public key line, without comment; for a key a user gives.
///
/// # Errors
/// A [`Problem`] when it is no OpenSSH public key.
pub fn public_key(text: &str) -> Result<By> {
    let key = PublicKey::from_openssh(text.trim()).map_err(|error| {
        Problem::usage(format!("`{}` is no SSH public key: {error}", text.trim()))
            .hint("give the line of a file like `id_ed25519.pub`")
    })?;
    Ok(By { key: line(&key), fingerprint: fingerprint(&key) })
}

fn line(key: &PublicKey) -> String {
    let bare = PublicKey::from(key.key_data().clone());
    bare.to_openssh().unwrap_or_default()
}

fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// The bytes of an ECDSA key file whose secret number is shorter than its field, written as long as that: ssh-key 0.6 cannot
/// read the short ones, which half of the P-521 keys have. `None` when it is anything else, or has a passphrase. The format
/// is OpenSSH's `PROTOCOL.key`.
fn pad_scalar(text: &str) -> Option<Vec<u8>> {
    let armour: String = text.lines().filter(|line| !line.starts_with("-----")).map(str::trim).collect();
    let bytes = base64::engine::general_purpose::STANDARD.decode(armour).ok()?;
    let head = bytes.strip_prefix(b"openssh-key-v1\0")?;
    let (cipher, rest) = string(head).ok()?;
    let (_kdf, rest) = string(rest).ok()?;
    let (_options, rest) = string(rest).ok()?;
    let (_public, rest) = string(rest.strip_prefix(&1_u32.to_be_bytes())?).ok()?;
    let (private, _) = string(rest).ok()?;
    let before = &bytes[..bytes.len() - rest.len()];
    let (checks, numbers) = private.split_at_checked(8)?;
    let (_kind, rest) = string(numbers).ok()?;
    let (curve, rest) = string(rest).ok()?;
    let (_point, rest) = string(rest).ok()?;
    let names = &numbers[..numbers.len() - rest.len()];
    let (scalar, rest) = string(rest).ok()?;
    let (comment, _padding) = string(rest).ok()?;
    let size = match curve {
        b"nistp256" => 32,
        b"nistp384" => 48,
        b"nistp521" => 66,
        _ => return None,
    };
    let scalar = &scalar[scalar.iter().take_while(|byte| **byte == 0).count()..];
    if cipher != b"none" || scalar.len() >= size {
        return None;
    }
    let padded = [vec![0; size - scalar.len()], scalar.to_vec()].concat();
    let mut section = [checks, names, &with_length(&padded)?, &with_length(comment)?].concat();
    let missing = (8 - section.len() % 8) % 8;
    section.extend((1..).take(missing));
    Some([before, &with_length(&section)?].concat())
}

/// Puts the length before the bytes (RFC 4251, section 5).
fn with_length(bytes: &[u8]) -> Option<Vec<u8>> {
    Some([&u32::try_from(bytes.len()).ok()?.to_be_bytes(), bytes].concat())
}

/// A connection to an SSH agent.
struct Agent(UnixStream);

impl Agent {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            Problem::transient(format!("cannot reach the SSH agent at `{}`: {error}", socket.display()))
                .hint("start one with `eval $(ssh-agent)`, then `ssh-add`")
        })?;
        stream.set_read_timeout(Some(AGENT_PATIENCE))?;
        stream.set_write_timeout(Some(AGENT_PATIENCE))?;
        Ok(Self(stream))
    }

    /// Sends a message and returns the body of the answer, which must be of the type `wanted`.
    fn ask(&mut self, kind: u8, body: &[u8], wanted: u8) -> Result<Vec<u8>> {
        let mut message = u32::try_from(body.len() + 1)?.to_be_bytes().to_vec();
        message.push(kind);
        message.extend_from_slice(body);
        self.0.write_all(&message).context("cannot ask the SSH agent")?;
        let mut length = [0; 4];
        self.0.read_exact(&mut length).context("the SSH agent does not answer")?;
        let length = u32::from_be_bytes(length);
        ensure!((1..=AGENT_ANSWER_MAX).contains(&length), "the SSH agent answers with {length} bytes");
        let mut answer = vec![0; usize::try_from(length)?];
        self.0.read_exact(&mut answer).context("the SSH agent cuts its answer")?;
        if answer.remove(0) != wanted {
            bail!(Problem::failed("the SSH agent refuses").hint("`ssh-add -l` lists its keys; it may be locked"));
        }
        Ok(answer)
    }

    /// The public keys it has, encoded.
    fn keys(&mut self) -> Result<Vec<Vec<u8>>> {
        let answer = self.ask(REQUEST_IDENTITIES, &[], IDENTITIES_ANSWER)?;
        let (count, mut rest) = answer.split_first_chunk::<4>().context("a short answer of the SSH agent")?;
        let mut keys = Vec::new();
        for _ in 0..u32::from_be_bytes(*count) {
            let (key, after) = string(rest)?;
            let (_comment, after) = string(after)?;
            keys.push(key.to_vec());
            rest = after;
        }
        Ok(keys)
    }

    fn sign(&mut self, key: &PublicKey, data: &[u8]) -> Result<Signature> {
        let mut body = Vec::new();
        for part in [key.to_bytes()?.as_slice(), data] {
            body.extend(with_length(part).context("too long for the SSH agent")?);
        }
        let flags = if matches!(key.algorithm(), Algorithm::Rsa { .. }) { FLAG_RSA_SHA2_512 } else { 0 };
        body.extend_from_slice(&flags.to_be_bytes());
        let answer = self.ask(SIGN_REQUEST, &body, SIGN_RESPONSE)?;
        let (signature, _) = string(&answer)?;
        Signature::try_from(signature).context("a malformed signature of the SSH agent")
    }
}

/// Splits off a length and as many bytes (RFC 4251, section 5).
fn string(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>().context("a short answer of the SSH agent")?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length))?).context("a short answer of the SSH agent")
}
