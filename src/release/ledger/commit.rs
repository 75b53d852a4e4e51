//! A commit of the ledger, as text and as a value.
//!
//! Commits are written and read here byte for byte: the signature covers the commit without its `gpgsig` header (Git's
//! `Documentation/gitformat-signature.txt`), and thousands are read for a history.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail, ensure};
use git2::Oid;
use jiff::Timestamp;

use crate::error::Problem;
use crate::release::sshsig::{self, Signer};

/// The namespace of SSH signatures that Git makes and checks (ssh-keygen(1), `-Y sign`).
pub const NAMESPACE: &str = "git";

/// Who decided, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    pub name: String,
    pub email: String,
    /// Full seconds; what is below is cut off.
    pub time: Timestamp,
}

/// One commit of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub id: Oid,
    /// `None` for the first one.
    pub parent: Option<Oid>,
    /// Further parents; a sound ledger has none.
    pub merged: Vec<Oid>,
    pub tree: Oid,
    pub author: Author,
    pub committer: Author,
    /// The author's time.
    pub time: Timestamp,
    /// The first line of the message.
    pub subject: String,
    /// What is between the subject and the trailers: the reason. Without blank lines around it.
    pub body: String,
    /// The last paragraph, when all of it is `Key: value`; in order, a key may come again.
    pub trailers: Vec<(String, String)>,
    /// The armoured signature.
    pub signature: Option<String>,
    pub message: String,
    /// What the signature is over.
    payload: Vec<u8>,
}

/// What a commit's signature says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signed {
    /// There is none.
    No,
    /// It is good, and made with this one of the keys that were given.
    By { key: usize },
    /// It is good, and made with a key that is not among them.
    Stranger { fingerprint: String },
    /// It is over other bytes, or no SSH signature of Git.
    Bad { why: String },
}

impl Commit {
    /// The value of the first trailer called `key`.
    pub fn trailer(&self, key: &str) -> Option<&str> {
        self.trailers.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// Checks the signature against public keys, lines as in `id_ed25519.pub`. Lines that are no keys match nothing.
    pub fn signed<K: AsRef<str>>(&self, keys: &[K]) -> Signed {
        let Some(signature) = &self.signature else { return Signed::No };
        match sshsig::verify(signature, NAMESPACE, &self.payload) {
            Err(error) => Signed::Bad { why: format!("{error:#}") },
            Ok(signer) => match keys.iter().position(|key| signer.is(key.as_ref())) {
                Some(key) => Signed::By { key },
                None => Signed::Stranger { fingerprint: signer.fingerprint },
            },
        }
    }

    /// Reads the bytes of the commit `id`.
    ///
    /// # Errors
    /// Headers that are missing or malformed, and text that is not UTF-8.
    pub(super) fn parse(id: Oid, bytes: &[u8]) -> Result<Self> {
        let end = bytes.windows(2).position(|pair| pair == b"\n\n").context("a commit without a message")?;
        let message = std::str::from_utf8(&bytes[end + 2..]).context("a message that is not UTF-8")?.to_owned();
        let headers = std::str::from_utf8(&bytes[..end]).context("headers that are not UTF-8")?;
        let (mut tree, mut parents, mut author, mut committer) = (None, Vec::new(), None, None);
        let mut signature: Option<String> = None;
        let mut payload = Vec::with_capacity(bytes.len());
        let mut in_signature = false;
        for line in headers.split('\n') {
            if let Some(more) = line.strip_prefix(' ') {
                match &mut signature {
                    Some(text) if in_signature => {
                        text.push('\n');
                        text.push_str(more);
                    }
                    _ => push_line(&mut payload, line),
                }
                continue;
            }
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            in_signature = key == "gpgsig";
            match key {
                "gpgsig" => {
                    ensure!(signature.is_none(), "two signatures");
                    signature = Some(value.to_owned());
                    continue;
                }
                "tree" => tree = Some(Oid::from_str(value)?),
                "parent" => parents.push(Oid::from_str(value)?),
                "author" => author = Some(parse_author(value)?),
                "committer" => committer = Some(parse_author(value)?),
                _ => {}
            }
            push_line(&mut payload, line);
        }
        payload.extend_from_slice(&bytes[end + 1..]);
        let author = author.context("a commit without an author")?;
        let (subject, body, trailers) = split_message(&message);
        let mut parents = parents.into_iter();
        Ok(Self {
            id,
            parent: parents.next(),
            merged: parents.collect(),
            tree: tree.context("a commit without a tree")?,
            time: author.time,
            author,
            committer: committer.context("a commit without a committer")?,
            subject,
            body,
            trailers,
            signature: signature.map(|text| text + "\n"),
            message,
            payload,
        })
    }
}

fn push_line(payload: &mut Vec<u8>, line: &str) {
    payload.extend_from_slice(line.as_bytes());
    payload.push(b'\n');
}

/// `Name <e-mail> SECONDS +0000`.
fn parse_author(text: &str) -> Result<Author> {
    let wrong = || format!("`{text}` is no author");
    let (name, rest) = text.split_once('<').with_context(wrong)?;
    let (email, when) = rest.split_once('>').with_context(wrong)?;
    let seconds = when.split_whitespace().next().with_context(wrong)?.parse().with_context(wrong)?;
    Ok(Author { name: name.trim_end().into(), email: email.into(), time: Timestamp::from_second(seconds).with_context(wrong)? })
}

/// Subject, body and trailers.
fn split_message(message: &str) -> (String, String, Vec<(String, String)>) {
    let message = message.trim_end();
    let (subject, rest) = message.split_once('\n').unwrap_or((message, ""));
    let rest = rest.trim_start_matches('\n');
    let (before, last) = rest.rsplit_once("\n\n").unwrap_or(("", rest));
    match parse_trailers(last) {
        Some(trailers) => (subject.into(), before.trim_end_matches('\n').into(), trailers),
        None => (subject.into(), rest.into(), Vec::new()),
    }
}

/// The lines of a paragraph that is nothing but trailers (git-interpret-trailers(1)).
fn parse_trailers(paragraph: &str) -> Option<Vec<(String, String)>> {
    let mut trailers: Vec<(String, String)> = Vec::new();
    for line in paragraph.lines() {
        if line.starts_with(' ') {
            let (_, value) = trailers.last_mut()?;
            value.push(' ');
            value.push_str(line.trim());
            continue;
        }
        let (key, value) = line.split_once(':')?;
        let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if !is_key {
            return None;
        }
        trailers.push((key.into(), value.trim().into()));
    }
    (!trailers.is_empty()).then_some(trailers)
}

/// The bytes of a new commit, signed when there is a signer.
///
/// # Errors
/// A name or message that Git cannot hold; a signer that cannot sign.
pub(super) fn write(tree: Oid, parent: Option<Oid>, author: &Author, message: &str, signer: Option<&Signer>) -> Result<Vec<u8>> {
    let who = format_author(author)?;
    if message.contains('\0') {
        bail!(Problem::failed("a reason cannot hold a zero byte"));
    }
    let mut headers = format!("tree {tree}\n");
    if let Some(parent) = parent {
        writeln!(headers, "parent {parent}")?;
    }
    write!(headers, "author {who}\ncommitter {who}\n")?;
    let message = format!("\n{}\n", message.trim_end());
    if let Some(signer) = signer {
        let signature = signer.sign(NAMESPACE, format!("{headers}{message}").as_bytes()).context("cannot sign the decision")?;
        writeln!(headers, "gpgsig {}", signature.trim_end().replace('\n', "\n "))?;
    }
    Ok(format!("{headers}{message}").into_bytes())
}

/// The author as a commit names it; fsck: `missingEmail`, `badName`, `missingNameBeforeEmail`.
fn format_author(author: &Author) -> Result<String> {
    let Author { name, email, time } = author;
    let name = name.trim();
    for (what, text) in [("name", name), ("e-mail address", email.as_str())] {
        if text.contains(['<', '>', '\n', '\r', '\0']) {
            bail!(
                Problem::usage(format!("the {what} {text:?} cannot be written to the ledger"))
                    .hint("set another one with `git config --global user.name` and `user.email`")
            );
        }
    }
    if name.is_empty() {
        bail!(Problem::usage("a decision needs a name").hint("set yours with `git config --global user.name NAME`"));
    }
    ensure!(time.as_second() >= 0, "a decision cannot be from before 1970");
    Ok(format!("{name} <{email}> {} +0000", time.as_second()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: &str = "shop/prod: promote 1.4 (sha256:0123456789ab)\n\nWe need it.\nNot: a trailer\n\nReally.\n\n\
        Decision: promote\nGate: soak allow in shop/stage for 12m\nGate: approve overridden 0 of 1 approvals\n and more\nTo: none\n";

    fn author() -> Author {
        Author { name: "Alice Ä".into(), email: "alice@example.org".into(), time: "2026-11-21T13:00:00Z".parse().unwrap() }
    }

    #[test]
    fn what_is_written_is_read() {
        let tree = Oid::from_str(&"1".repeat(40)).unwrap();
        let parent = Oid::from_str(&"2".repeat(40)).unwrap();
        let bytes = write(tree, Some(parent), &author(), MESSAGE, None).unwrap();
        let commit = Commit::parse(tree, &bytes).unwrap();
        assert_eq!((commit.tree, commit.parent, &commit.author, &commit.committer), (tree, Some(parent), &author(), &author()));
        assert_eq!(
            (commit.subject.as_str(), commit.body.as_str()),
            (MESSAGE.lines().next().unwrap(), "We need it.\nNot: a trailer\n\nReally.")
        );
        let pairs: Vec<(&str, &str)> = commit.trailers.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let expected = [
            ("Decision", "promote"),
            ("Gate", "soak allow in shop/stage for 12m"),
            ("Gate", "approve overridden 0 of 1 approvals and more"),
            ("To", "none"),
        ];
        assert_eq!(pairs, expected);
        assert_eq!((commit.trailer("To"), commit.trailer("From")), (Some("none"), None));
        assert_eq!((commit.message.as_str(), &commit.payload, commit.signed::<&str>(&[])), (MESSAGE, &bytes, Signed::No));
        let first = Commit::parse(tree, &write(tree, None, &author(), "x", None).unwrap()).unwrap();
        assert_eq!((first.parent, first.subject.as_str(), first.body.as_str(), first.trailers), (None, "x", "", vec![]));
    }

    #[test]
    fn messages_fall_into_three() {
        for (message, subject, body, trailers) in [
            ("a\n", "a", "", 0),
            ("a\n\nb: c\n", "a", "", 1),
            ("a\n\nb: c\nno trailer\n", "a", "b: c\nno trailer", 0),
            ("a\n\nb\n\n\n\nc: d\n", "a", "b", 1),
            ("a\n\n c: d\n", "a", " c: d", 0),
            ("", "", "", 0),
        ] {
            let split = split_message(message);
            assert_eq!((split.0.as_str(), split.1.as_str(), split.2.len()), (subject, body, trailers), "{message:?}");
        }
    }

    #[test]
    fn names_git_cannot_hold() {
        let tree = Oid::from_str(&"1".repeat(40)).unwrap();
        for (name, email, fine) in [
            ("Alice", "", true),
            ("Alice", "a@b", true),
            ("  ", "a@b", false),
            ("A <x> B", "a@b", false),
            ("A\nparent 1", "a@b", false),
            ("A", "a@b> 0 +0000\nx", false),
        ] {
            let author = Author { name: name.into(), email: email.into(), ..author() };
            assert_eq!(write(tree, None, &author, "m", None).is_ok(), fine, "{name:?} {email:?}");
        }
        assert!(write(tree, None, &author(), "a\0b", None).is_err());
        assert!(write(tree, None, &Author { time: "1969-01-01T00:00:00Z".parse().unwrap(), ..author() }, "m", None).is_err());
    }

    #[test]
    fn malformed_commits() {
        let id = Oid::from_str(&"1".repeat(40)).unwrap();
        let good = format!("tree {id}\nauthor a <b> 1 +0000\ncommitter a <b> 1 +0000\n\nm\n");
        assert!(Commit::parse(id, good.as_bytes()).is_ok());
        for (find, replace) in [
            ("tree ", "wood "),
            ("author a", "authors a"),
            ("<b>", "b"),
            (" 1 +0000", " x"),
            ("\n\n", "\n"),
            (" 1 ", " 99999999999999 "),
        ] {
            assert!(Commit::parse(id, good.replacen(find, replace, 1).as_bytes()).is_err(), "{find}");
        }
        let twice = good.replace("\n\n", "\ngpgsig a\n b\ngpgsig c\n\n");
        assert!(Commit::parse(id, twice.as_bytes()).is_err());
        let odd = good.replace("\n\n", "\nencoding x\n y\ngpgsig a\n b\nother\n\n");
        let commit = Commit::parse(id, odd.as_bytes()).unwrap();
        assert_eq!(commit.signature.as_deref(), Some("a\nb\n"));
        assert_eq!(String::from_utf8(commit.payload.clone()).unwrap(), odd.replace("gpgsig a\n b\n", ""));
        assert!(matches!(commit.signed::<&str>(&[]), Signed::Bad { .. }));
    }
}
