//! Where an artifact comes from: a SLSA provenance statement (slsa.dev, "Provenance", v1).
//!
//! In: [`Facts`], which the flow that built fills. Out: an in-toto statement, attached to the
//! release; signed, as a Sigstore bundle, when a key is given. Without times the same build gives
//! the same statement.
//!
//! ```text
//! buildDefinition.externalParameters     what the user asked for: pipeline file, parameters, source
//! buildDefinition.internalParameters     what the builder chose
//! buildDefinition.resolvedDependencies   source commit, bases, packages, with digests
//! runDetails.builder                     id, version, digest of this program
//! ```

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::dsse::{self, BUNDLE_TYPE, STATEMENT_TYPE, Statement, Subject};
use super::keys::{Fingerprint, PrivateKey, PublicKey};
use super::referrer::{self, Kind};
use super::store::{Descriptor, Store};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// `predicateType` of SLSA provenance v1.
pub const PREDICATE: &str = "https://slsa.dev/provenance/v1";
/// `buildType`: says how the parameters are to be read.
pub const BUILD_TYPE: &str = "urn:pipeline:build:v1";
/// Name of the dependency that is the source; its annotation says whether files differed from the commit.
const SOURCE: &str = "source";
const DIRTY: &str = "dirty";

/// What the source was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Address of the repository, without credentials, such as `https://git.example/team/shop` or `file:///src/shop`.
    pub repository: String,
    /// Full id of the commit; `None` when the source is in no repository.
    pub commit: Option<String>,
    /// Files differed from the commit.
    pub dirty: bool,
    /// Folder in the repository, empty for its root.
    #[serde(default)]
    pub path: String,
}

/// Something that went into the build.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Material {
    /// For people, such as `base` or a package's name.
    pub name: String,
    /// Package URL, image reference, or another URI.
    pub uri: String,
    pub digest: Digest,
}

/// Who built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Builder {
    /// URI that policies name, such as [`builder_id`] or an address of the CI system.
    pub id: String,
    /// Of this program.
    pub version: String,
    /// Of this program's file.
    pub digest: Digest,
}

/// The id of this program as builder, when nothing better is known: `pipeline@0.1.0`. The commit that `version` may name
/// after a blank is no part of it: it is in [`Builder::version`].
pub fn builder_id(version: &str) -> String {
    format!("pipeline@{}", version.split_whitespace().next().unwrap_or_default())
}

/// What a statement is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Name and digest of the release and of each artifact in it, in any order.
    pub subjects: Vec<(String, Digest)>,
    pub source: Option<Source>,
    pub builder: Builder,
    /// Base images, packages, builders' scripts, the lock; in any order.
    pub materials: Vec<Material>,
    /// What the user asked for: pipeline's name, file and its digest, options.
    pub parameters: BTreeMap<String, Value>,
    /// What the builder chose, for example the step keys.
    pub internal: BTreeMap<String, Value>,
    /// Of the build; with them two builds give two statements.
    pub started: Option<Timestamp>,
    pub finished: Option<Timestamp>,
    /// Names the run, for example the CI job.
    pub invocation: Option<String>,
}

/// The statement.
///
/// # Errors
/// No subject.
pub fn statement(facts: &Facts) -> Result<Statement> {
    if facts.subjects.is_empty() {
        anyhow::bail!(Problem::bug("provenance without a subject"));
    }
    let mut subjects = facts.subjects.clone();
    subjects.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    subjects.dedup();
    let mut external = facts.parameters.clone();
    let mut dependencies = Vec::new();
    if let Some(source) = &facts.source {
        external.insert(SOURCE.into(), serde_json::to_value(source)?);
        dependencies.push(source_dependency(source));
    }
    let mut materials = facts.materials.clone();
    materials.sort();
    materials.dedup();
    dependencies.extend(materials.iter().map(|it| json!({"name": it.name, "uri": it.uri, "digest": dsse::sha256(&it.digest)})));
    let mut definition = json!({
        "buildType": BUILD_TYPE,
        "externalParameters": external,
        "resolvedDependencies": dependencies,
    });
    if !facts.internal.is_empty() {
        definition["internalParameters"] = serde_json::to_value(&facts.internal)?;
    }
    let mut details = json!({
        "builder": {
            "id": facts.builder.id,
            "version": {"pipeline": facts.builder.version},
            "builderDependencies": [{"name": "pipeline", "digest": dsse::sha256(&facts.builder.digest)}],
        },
    });
    let times = [("startedOn", &facts.started), ("finishedOn", &facts.finished)];
    for (name, time) in times {
        if let Some(time) = time {
            details["metadata"][name] = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
        }
    }
    if let Some(invocation) = &facts.invocation {
        details["metadata"]["invocationId"] = invocation.as_str().into();
    }
    let predicate = json!({"buildDefinition": definition, "runDetails": details});
    let subjects = subjects.iter().map(|(name, digest)| Subject::new(name.as_str(), digest)).collect();
    Ok(Statement::new(subjects, PREDICATE, predicate))
}

fn source_dependency(source: &Source) -> Value {
    let commit = source.commit.as_deref();
    // SPDX's form of an address in a version control system.
    let uri = match (commit, source.repository.contains("://")) {
        (Some(commit), true) => format!("git+{}@{commit}", source.repository),
        _ => source.repository.clone(),
    };
    let mut dependency = json!({"name": SOURCE, "uri": uri, "annotations": {DIRTY: source.dirty}});
    if let Some(commit) = commit {
        dependency["digest"] = json!({"gitCommit": commit});
    }
    dependency
}

/// Attaches the statement to `subject`, which has to be one of the facts' subjects; signed when a key is given.
/// Undone by removing the tag.
pub fn attach(store: &Store, subject: &Descriptor, facts: &Facts, key: Option<&PrivateKey>) -> Result<Descriptor> {
    let statement = statement(facts)?;
    if !statement.is_about(&subject.digest) {
        anyhow::bail!(Problem::bug(format!("the provenance is not about {}", subject.digest)));
    }
    let annotations = dsse::annotations(&statement);
    match key {
        Some(key) => {
            let bundle = dsse::seal(&statement, key)?;
            referrer::attach(store, subject, &Kind::Provenance, (BUNDLE_TYPE, BUNDLE_TYPE), &bundle, &annotations)
        }
        None => {
            let annotations = BTreeMap::from([("in-toto.io/predicate-type".to_string(), PREDICATE.to_string())]);
            let types = (STATEMENT_TYPE, STATEMENT_TYPE);
            referrer::attach(store, subject, &Kind::Provenance, types, &statement.encode()?, &annotations)
        }
    }
}

/// What a policy asks of an attached provenance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// Where in the store.
    pub tag: String,
    /// The key that signed it; `None`: unsigned, or by none of the given keys. Then anybody may have written it.
    pub signed_by: Option<Fingerprint>,
    /// Id of the builder.
    pub builder: String,
    /// Version and file of this program, when it was the builder.
    pub version: Option<String>,
    pub digest: Option<Digest>,
    /// `None`: the builder does not say it as this program does.
    pub source: Option<Source>,
}

/// The provenance attached to `digest`, oldest first, with the key among `keys` that signed each. What cannot be read, is
/// about another artifact or is no provenance says nothing; see [`look`].
pub fn read(store: &Store, digest: &Digest, keys: &[PublicKey]) -> Result<Vec<Provenance>> {
    Ok(look(store, digest, keys)?.0)
}

/// The same, and why others were passed over.
pub fn look(store: &Store, digest: &Digest, keys: &[PublicKey]) -> Result<(Vec<Provenance>, Vec<String>)> {
    let (mut found, mut broken) = (Vec::new(), Vec::new());
    for attached in referrer::attached(store, digest)?.into_iter().filter(|it| it.kind == Kind::Provenance) {
        let signed = attached.content.iter().any(|content| content.media_type == BUNDLE_TYPE);
        let opened = attached.read(store).and_then(|bytes| match signed {
            true => dsse::open(&bytes, keys).map(|opened| (opened.statement, opened.signed_by)),
            false => Statement::parse(&bytes).map(|statement| (statement, None)),
        });
        match opened.and_then(|(statement, signed_by)| parse(&statement, digest, &attached.tag, signed_by)) {
            Ok(parsed) => found.push(parsed),
            Err(error) => broken.push(format!("the provenance `{}` was passed over: {error:#}", attached.tag)),
        }
    }
    Ok((found, broken))
}

/// The parts of a predicate that are read back; a predicate of another builder has other parameters.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Predicate {
    build_definition: Definition,
    run_details: Details,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Definition {
    #[serde(default)]
    external_parameters: External,
}

#[derive(Default, Deserialize)]
struct External {
    #[serde(default)]
    source: Option<Source>,
}

#[derive(Deserialize)]
struct Details {
    builder: RunBuilder,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RunBuilder {
    id: String,
    #[serde(default)]
    version: BTreeMap<String, String>,
    #[serde(default)]
    builder_dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    #[serde(default)]
    digest: BTreeMap<String, String>,
}

fn parse(statement: &Statement, digest: &Digest, tag: &str, signed_by: Option<Fingerprint>) -> Result<Provenance> {
    anyhow::ensure!(statement.predicate_type == PREDICATE, "a statement of the type `{}`", statement.predicate_type);
    anyhow::ensure!(statement.is_about(digest), "it is about another artifact");
    let predicate = Predicate::deserialize(&statement.predicate).context("the predicate is not SLSA provenance v1")?;
    let mut builder = predicate.run_details.builder;
    let digest = builder.builder_dependencies.iter().find_map(|it| it.digest.get("sha256")?.parse().ok());
    Ok(Provenance {
        tag: tag.to_owned(),
        signed_by,
        version: builder.version.remove("pipeline"),
        digest,
        builder: builder.id,
        source: predicate.build_definition.external_parameters.source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::MANIFEST_TYPE;

    fn facts(digest: &Digest) -> Facts {
        let material =
            |name: &str| Material { name: name.into(), uri: format!("pkg:deb/debian/{name}@1"), digest: Digest::of(name) };
        Facts {
            subjects: vec![("shop.host".into(), Digest::of("host")), ("shop".into(), *digest)],
            source: Some(Source {
                repository: "https://git.example/team/shop".into(),
                commit: Some("c0ffee".into()),
                dirty: true,
                path: "app".into(),
            }),
            builder: Builder {
                id: builder_id("0.1.0 (c0ffee)"),
                version: "0.1.0 (c0ffee)".into(),
                digest: Digest::of("pipeline"),
            },
            materials: vec![material("zlib1g"), material("base-files")],
            parameters: BTreeMap::from([("pipeline".into(), "shop".into())]),
            internal: BTreeMap::new(),
            started: None,
            finished: None,
            invocation: None,
        }
    }

    #[test]
    fn the_statement_has_slsas_shape() {
        let digest = Digest::of("release");
        let mut facts = facts(&digest);
        let source = json!({"repository": "https://git.example/team/shop", "commit": "c0ffee", "dirty": true, "path": "app"});
        let sha = |text: &str| json!({"sha256": Digest::of(text).hex()});
        let mut subjects =
            vec![json!({"name": "shop", "digest": sha("release")}), json!({"name": "shop.host", "digest": sha("host")})];
        subjects.sort_by_key(|subject| subject["digest"]["sha256"].to_string());
        let mut expected = json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": subjects,
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "buildDefinition": {
                    "buildType": "urn:pipeline:build:v1",
                    "externalParameters": {"pipeline": "shop", "source": source},
                    "resolvedDependencies": [
                        {"name": "source", "uri": "git+https://git.example/team/shop@c0ffee", "digest": {"gitCommit": "c0ffee"}, "annotations": {"dirty": true}},
                        {"name": "base-files", "uri": "pkg:deb/debian/base-files@1", "digest": sha("base-files")},
                        {"name": "zlib1g", "uri": "pkg:deb/debian/zlib1g@1", "digest": sha("zlib1g")},
                    ],
                },
                "runDetails": {"builder": {
                    "id": "pipeline@0.1.0",
                    "version": {"pipeline": "0.1.0 (c0ffee)"},
                    "builderDependencies": [{"name": "pipeline", "digest": sha("pipeline")}],
                }},
            },
        });
        assert_eq!(serde_json::to_value(statement(&facts).unwrap()).unwrap(), expected);
        facts.started = Some("2026-11-21T13:00:00.7Z".parse().unwrap());
        facts.invocation = Some("job-7".into());
        expected["predicate"]["runDetails"]["metadata"] = json!({"startedOn": "2026-11-21T13:00:00Z", "invocationId": "job-7"});
        assert_eq!(serde_json::to_value(statement(&facts).unwrap()).unwrap(), expected);
        facts.subjects.reverse();
        facts.materials.reverse();
        assert_eq!(serde_json::to_value(statement(&facts).unwrap()).unwrap(), expected);
        facts.subjects.clear();
        assert!(statement(&facts).is_err());
    }

    #[test]
    fn it_comes_back_with_who_signed_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let subject = Descriptor::new(MANIFEST_TYPE, store.put(b"release").unwrap(), 7);
        let (key, facts) = (PrivateKey::generate(), facts(&subject.digest));
        attach(&store, &subject, &facts, None).unwrap();
        let signed = attach(&store, &subject, &facts, Some(&key)).unwrap();
        assert_eq!(attach(&store, &subject, &facts, Some(&key)).unwrap(), signed);
        let told = |keys: &[PublicKey]| {
            let found = read(&store, &subject.digest, keys).unwrap();
            let (id, version, digest) = (&facts.builder.id, &facts.builder.version, facts.builder.digest);
            assert!(
                found.iter().all(|it| it.builder == *id && it.version.as_ref() == Some(version) && it.digest == Some(digest))
            );
            assert!(found.iter().all(|it| it.source == facts.source));
            found.into_iter().map(|it| it.signed_by).collect::<Vec<_>>()
        };
        assert_eq!(told(&[key.public()]), [None, Some(key.public().fingerprint())]);
        assert_eq!(told(&[PrivateKey::generate().public()]), [None, None]);
        // About something else, or no provenance at all.
        let other = Descriptor::new(MANIFEST_TYPE, store.put(b"other").unwrap(), 5);
        assert!(attach(&store, &other, &facts, None).is_err());
        let cases = [
            (statement(&facts).unwrap(), "it is about another artifact"),
            (Statement::new(vec![Subject::new("", &other.digest)], "x", json!({})), "a statement of the type `x`"),
            (Statement::new(vec![Subject::new("", &other.digest)], PREDICATE, json!({})), "is not SLSA provenance v1"),
        ];
        for (statement, expected) in cases {
            let types = (STATEMENT_TYPE, STATEMENT_TYPE);
            let bytes = statement.encode().unwrap();
            referrer::attach(&store, &other, &Kind::Provenance, types, &bytes, &BTreeMap::new()).unwrap();
            let (found, broken) = look(&store, &other.digest, &[]).unwrap();
            assert!(found.is_empty() && broken.len() == 1 && broken[0].contains(expected), "{broken:?}");
            let index = store.index().unwrap();
            for descriptor in index.manifests {
                let tag = &descriptor.annotations[crate::artifact::store::REF_NAME];
                if tag.contains(&other.digest.hex()) {
                    store.untag(tag).unwrap();
                }
            }
        }
    }
}
