//! `pipeline artifact verify --key`, `sign`, `report`, and `show` of a release: what is said about artifacts.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Global, artifact, report, ui};
use crate::artifact::keys::{Fingerprint, PublicKey};
use crate::artifact::referrer::{self, Kind};
use crate::artifact::release::{self, Release};
use crate::artifact::store::{Descriptor, Store};
use crate::artifact::{remote, sign};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::release::junit;

#[derive(Debug, clap::Args)]
pub struct SignArgs {
    /// NAME, NAME:TAG or a digest; of a release everything in it is signed
    artifact: String,
    /// Private key, as `pipeline keys generate` or cosign wrote it
    #[arg(long, value_name = "FILE", env = super::release::KEY)]
    key: PathBuf,
    /// Repository the signature names. Default: the pipeline's `registry`, else its name
    #[arg(long, value_name = "REPOSITORY")]
    reference: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// NAME, NAME:VERSION or NAME:DIGEST
    release: String,
    /// What the tests wrote, such as JUnit XML
    file: PathBuf,
    /// The report's name, as the gate `report` asks for it
    #[arg(long, value_name = "NAME")]
    name: String,
    /// How the tests ended; default: what the JUnit XML says
    #[arg(long, value_name = "RESULT", value_parser = ["pass", "fail"])]
    result: Option<String>,
}

/// The answer of `artifact verify --key`.
#[derive(Debug, Serialize)]
struct Checked {
    schema: u32,
    name: String,
    digest: Digest,
    /// Documents and blobs whose bytes were read.
    blobs: usize,
    signed: Vec<SignedBy>,
    /// Everything that is wrong; empty when all is well.
    problems: Vec<String>,
}

/// An artifact and the keys, of those that were given, that signed it.
#[derive(Debug, Serialize)]
struct SignedBy {
    what: String,
    digest: Digest,
    keys: Vec<String>,
}

/// Reads every byte of an artifact and looks for signatures by one of `keys` over it, and over everything in it when it is a
/// release; exit status 1 when something is wrong.
pub fn verify(global: &Global, store: &Store, wanted: &str, files: &[PathBuf]) -> Result<u8> {
    let (name, descriptor) = artifact::find(store, wanted)?;
    let keys: Vec<PublicKey> = files.iter().map(|file| PublicKey::load(file)).collect::<Result<_>>()?;
    let digest = descriptor.digest;
    let mut checked = Checked { schema: 1, name, digest, blobs: 0, signed: Vec::new(), problems: Vec::new() };
    let release =
        descriptor.artifact_type.as_deref().filter(|it| *it == release::RELEASE_TYPE).map(|_| release::read(store, &digest));
    let release = release.transpose()?;
    let mut subjects = vec![(checked.name.clone(), digest)];
    if let Some(release) = &release {
        checked.problems = release::check(store, &digest)?;
        subjects.extend(release.entries.iter().map(|entry| (format!("the {} `{}`", entry.kind, entry.name), entry.digest)));
    }
    let reached = remote::reach_what_is_there(store, &digest);
    checked.blobs = reached.documents.len() + reached.blobs.len();
    if release.is_none() {
        let all = reached.documents.iter().chain(reached.blobs.keys());
        checked.problems.extend(all.filter_map(|blob| whole(store, blob)));
    }
    for (what, digest) in subjects {
        let seen = store.verify(&digest).and_then(|()| sign::require(store, &digest, &keys));
        match seen {
            Ok(signers) => {
                checked.signed.push(SignedBy { what, digest, keys: signers.iter().map(Fingerprint::to_string).collect() });
            }
            Err(error) => {
                let problem = format!("{what}: {error:#}");
                // Broken bytes were told above.
                if !checked.problems.iter().any(|told| told.contains(&error.to_string())) {
                    checked.problems.push(problem);
                }
            }
        }
    }
    ui::answer(global, &checked, || checked_text(&checked))?;
    Ok(u8::from(!checked.problems.is_empty()))
}

fn whole(store: &Store, blob: &Digest) -> Option<String> {
    if !store.blob(blob).exists() {
        return Some(format!("blob {blob} is not in the store"));
    }
    store.verify(blob).err().map(|error| error.to_string())
}

fn checked_text(checked: &Checked) -> String {
    let mut text = format!("{} {}\n", checked.name, checked.digest);
    for signed in &checked.signed {
        let _ = writeln!(text, "  {} {}: signed by {}", signed.what, signed.digest.short(), signed.keys.join(", "));
    }
    for problem in &checked.problems {
        let _ = writeln!(text, "  WRONG: {problem}");
    }
    let verdict = match checked.problems.len() {
        0 => "good: every byte is as its digest says, and signed".to_owned(),
        number => format!("NOT GOOD: {number} problems"),
    };
    text + &format!("{verdict} ({} blobs read)\n", checked.blobs)
}

pub fn sign(global: &Global, around: &ui::Surroundings, args: &SignArgs) -> Result<u8> {
    let (name, descriptor) = artifact::find(&around.store, &args.artifact)?;
    let key = super::release::private_key(around, &args.key)?;
    let pipeline = name.split(':').next().unwrap_or_default();
    let configured = || around.pipeline(Some(pipeline)).ok().and_then(|pipeline| pipeline.releases.registry);
    let reference = args.reference.clone().or_else(configured).unwrap_or_else(|| pipeline.to_owned());
    let is_release = descriptor.artifact_type.as_deref() == Some(release::RELEASE_TYPE);
    let signed: Vec<Descriptor> = if is_release {
        sign::sign_release(&around.store, &descriptor.digest, &reference, &key)?
    } else {
        sign::sign(&around.store, &descriptor, &reference, &key)?;
        vec![descriptor]
    };
    let digests: Vec<Digest> = signed.iter().map(|descriptor| descriptor.digest).collect();
    let fingerprint = key.public().fingerprint().to_string();
    let value = json!({"schema": 1, "name": name, "key": fingerprint, "reference": reference, "signed": digests});
    ui::answer(global, &value, || {
        let lines: String = digests.iter().map(|digest| format!("{digest}\n")).collect();
        format!("{lines}signed by {fingerprint} as {reference}\n")
    })?;
    Ok(0)
}

/// Attaches a report to a release, with its result: the one of a JUnit report is its own.
pub fn attach(global: &Global, around: &ui::Surroundings, args: &ReportArgs) -> Result<u8> {
    let ReportArgs { release: wanted, file, name, result } = args;
    let (pipeline, version) =
        wanted.split_once([':', '@']).map_or((wanted.as_str(), None), |(name, version)| (name, Some(version)));
    let version = version.map(|version| version.strip_suffix(".release").unwrap_or(version));
    let release = super::release::find(&around.store, pipeline, version)?;
    let bytes = fs_err::read(file).map_err(|error| Problem::usage(error.to_string()))?;
    let result = result_of(file, &bytes, result.as_deref())?;
    let media_type = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xml") => "application/xml",
        Some("json") => "application/json",
        _ => "text/plain",
    };
    let attached = referrer::attach_report(&around.store, &release.descriptor(), (name, result), media_type, &bytes)?;
    let value = json!({"schema": 1, "release": release.digest, "report": name, "result": result, "digest": attached.digest});
    ui::answer(global, &value, || format!("{pipeline} {}: {name} says {result}\n", release.version))?;
    Ok(0)
}

/// `pass` or `fail`: as given, or as JUnit XML says; what it says cannot be talked away.
fn result_of(file: &Path, bytes: &[u8], given: Option<&str>) -> Result<&'static str> {
    let counts = std::str::from_utf8(bytes).context("it is no text").and_then(junit::parse);
    let named = || format!("`{}`", file.display());
    match (given, counts.map(|counts| (counts, counts.passed()))) {
        (Some("pass"), Ok((counts, Some(false)))) => Err(Problem::usage(format!(
            "{} says that {} tests failed, and cannot be attached as `pass`",
            named(),
            counts.failures
        ))
        .into()),
        (Some("pass"), _) => Ok("pass"),
        (Some(_), _) | (None, Ok((_, Some(false)))) => Ok("fail"),
        (None, Ok((_, Some(true)))) => Ok("pass"),
        (None, Ok((_, None))) => Err(Problem::usage(format!("{} has no tests", named()))
            .hint("`--result pass` or `--result fail` says how they ended")
            .into()),
        (None, Err(error)) => Err(error.context(format!("cannot tell the result of {}", named()))),
    }
}

/// `artifact show` of a release.
pub fn show(global: &Global, store: &Store, name: &str, release: &Release) -> Result<u8> {
    let entries: Result<Vec<Value>> = release
        .entries
        .iter()
        .map(|entry| {
            let reached = remote::reach_what_is_there(store, &entry.digest);
            let bytes = entry.size + reached.blobs.values().sum::<u64>();
            let attached = attached(store, &entry.digest)?;
            Ok(json!({"kind": entry.kind, "name": entry.name, "digest": entry.digest, "bytes": bytes, "attached": attached}))
        })
        .collect();
    let value = json!({
        "schema": 1,
        "name": name,
        "kind": "release",
        "digest": release.digest,
        "version": release.version,
        "revision": release.revision,
        "entries": entries?,
        "attached": attached(store, &release.digest)?,
    });
    ui::answer(global, &value, || show_text(&value))?;
    Ok(0)
}

/// What is attached to an artifact, with what it says of itself: nothing of it is checked.
fn attached(store: &Store, subject: &Digest) -> Result<Vec<Value>> {
    let found = referrer::attached(store, subject)?;
    let value = |it: referrer::Attached| {
        let bundle = || it.read(store).ok().and_then(|bytes| claimed(&bytes));
        json!({
            "kind": it.kind.to_string(),
            "number": it.number,
            "digest": it.manifest.digest,
            "signatures": matches!(it.kind, Kind::Signature | Kind::Bundle).then_some(it.content.len()),
            "claims_key": matches!(it.kind, Kind::Bundle | Kind::Provenance).then(bundle).flatten(),
            "result": it.manifest.annotations.get(referrer::REPORT_RESULT),
            "sequence": it.sequence(),
        })
    };
    Ok(found.into_iter().map(value).collect())
}

/// The key a bundle says it was signed with.
fn claimed(bundle: &[u8]) -> Option<String> {
    let bundle: Value = serde_json::from_slice(bundle).ok()?;
    let hint = STANDARD.decode(bundle["verificationMaterial"]["publicKey"]["hint"].as_str()?).ok()?;
    let digest: Digest = hex::encode(hint).parse().ok()?;
    Some(Fingerprint(digest).to_string())
}

fn show_text(value: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut lines = vec![format!("{} {}", text(&value["name"]), text(&value["digest"]))];
    lines.push(format!("  version: {}", text(&value["version"])));
    if let Some(revision) = value["revision"].as_str() {
        lines.push(format!("  commit: {revision}"));
    }
    let tell = |lines: &mut Vec<String>, attached: &Value, indent: &str| {
        for it in attached.as_array().into_iter().flatten() {
            let mut line = format!("{indent}{}", text(&it["kind"]));
            if let Some(signatures) = it["signatures"].as_u64().filter(|number| *number > 1) {
                let _ = write!(line, ": {signatures} signatures");
            }
            if let Some(key) = it["claims_key"].as_str() {
                let _ = write!(line, ": says it is by {key}");
            }
            if let Some(result) = it["result"].as_str() {
                let _ = write!(line, ": {result}");
            }
            lines.push(line);
        }
    };
    tell(&mut lines, &value["attached"], "  ");
    for entry in value["entries"].as_array().into_iter().flatten() {
        let size = report::bytes(entry["bytes"].as_u64().unwrap_or(0));
        lines.push(format!("  {} {} {} {size}", text(&entry["kind"]), text(&entry["name"]), text(&entry["digest"])));
        tell(&mut lines, &entry["attached"], "    ");
    }
    lines.push("  `pipeline artifact verify --key FILE` checks who signed".into());
    lines.join("\n") + "\n"
}
