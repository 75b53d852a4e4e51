//! The keys `environments`, `people`, `ledger` and `registry` of the pipeline file, as they are written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Rollout, Route, Target, VolumeForm};

/// A place a release is promoted to: what comes before it, what it asks of a release, and where that runs.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// The environments a release comes from. Without: releases enter the graph here.
    #[serde(default)]
    pub from: Option<Upstream>,
    /// Whether a new release comes by itself as soon as the gates allow it. Default: false.
    #[serde(default)]
    pub automatic: Option<bool>,
    /// What must be so before a release may come; asked in this order.
    #[serde(default)]
    pub gates: Vec<Gate>,
    /// Configuration: variables of the program, part of what is promoted and rolled back.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// Secrets of the program by name: where each one is, never what it is.
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretRef>,
    /// Where the release runs: `local`, `docker`, `vm` with settings. Without: the environment is a pointer only.
    #[serde(default)]
    pub target: Option<Target>,
    /// Several targets by name, in place of `target`.
    #[serde(default)]
    pub targets: BTreeMap<String, Target>,
    /// Requests that reach the release.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Data that outlives releases, by name.
    #[serde(default)]
    pub volumes: BTreeMap<String, VolumeForm>,
    /// How one release takes the place of another.
    #[serde(default)]
    pub rollout: Option<Rollout>,
    /// A name that environments of several pipelines share: they switch as one, or not at all.
    #[serde(default)]
    pub together: Option<String>,
    /// Releases of this environment that `prune` keeps, the newest ones. Default: 10.
    #[serde(default)]
    #[schemars(range(min = 1, max = 50))]
    pub keep: Option<u32>,
}

/// One environment, several of which any will do, or a rule.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Upstream {
    Rule(UpstreamRule),
    Any(Vec<String>),
    One(String),
}

/// Exactly one of `any` and `all`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamRule {
    /// A release that was in one of these may come.
    #[serde(default)]
    pub any: Vec<String>,
    /// A release that was in each of these may come.
    #[serde(default)]
    pub all: Vec<String>,
}

/// Where a secret is: exactly one of `file`, `env` and `stored`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum SecretRef {
    Reference(SecretPlace),
    /// Refused: a value has no place in a file that is committed.
    Value(String),
}

/// Exactly one of `file`, `env` and `stored`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretPlace {
    /// A file on the machine that runs the release, an absolute path.
    #[serde(default)]
    pub file: Option<String>,
    /// A variable of the program that serves the environment.
    #[serde(default)]
    pub env: Option<String>,
    /// `true`: `pipeline secret set` keeps it; nothing is promoted here before it is set.
    #[serde(default)]
    pub stored: Option<bool>,
}

/// A question that is asked before a release may come: exactly one check, and a name when there are two of a kind.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// What `--override` and messages call it. Default: the check's own name.
    #[serde(default)]
    pub name: Option<String>,
    /// Why it is there, shown beside its answer.
    #[serde(default)]
    pub description: Option<String>,
    /// `true`: the release is healthy in the environment it comes from.
    #[serde(default)]
    pub healthy: Option<bool>,
    /// How long the release must have been healthy there without a break, like `10m` or `24h`.
    #[serde(default)]
    pub soak: Option<String>,
    /// How many people must approve, or how many of which role.
    #[serde(default)]
    pub approve: Option<Approve>,
    /// When releases may come.
    #[serde(default)]
    pub window: Option<Window>,
    /// `true`: the release is signed by the key `cosign.pub` beside the pipeline file; or which keys.
    #[serde(default)]
    pub signed: Option<Signed>,
    /// Who built the release, from what.
    #[serde(default)]
    pub provenance: Option<Provenance>,
    /// What may be in the release.
    #[serde(default)]
    pub sbom: Option<Sbom>,
    /// A program: status 0 allows, 1 denies, anything else counts as unknown.
    #[serde(default)]
    pub command: Option<Command>,
    /// A request that must be answered.
    #[serde(default)]
    pub http: Option<Http>,
    /// A vm-test that boots the release's own disk, a file relative to the pipeline file.
    #[serde(default, rename = "vm-test")]
    pub vm_test: Option<String>,
    /// How much may change in comparison with the release that is there.
    #[serde(default)]
    pub budget: Option<Budget>,
    /// A test report that must be attached to the release.
    #[serde(default)]
    pub report: Option<Report>,
}

/// A number, or a number and a role.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Approve {
    Count(u32),
    Rule(ApproveRule),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApproveRule {
    /// How many different people.
    #[schemars(range(min = 1))]
    pub count: u32,
    /// The role they have. Default: `approve`.
    #[serde(default)]
    pub role: Option<String>,
}

/// A text, or a list of them.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Windows of time by recurrence rules (RFC 5545, section 3.3.10).
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Rules of the windows in which releases may come, like `FREQ=WEEKLY;BYDAY=MO,TU,WE,TH;BYHOUR=9`.
    #[serde(default)]
    pub allow: Option<OneOrMany>,
    /// Rules of the windows in which none may; they win.
    #[serde(default)]
    pub deny: Option<OneOrMany>,
    /// The first day and time rules count from, local, like `2026-01-05T09:00`.
    #[serde(default)]
    pub start: Option<String>,
    /// How long each window is, like `8h`.
    pub duration: String,
    /// Whose clocks, like `Europe/Berlin`. Default: UTC.
    #[serde(default)]
    pub timezone: Option<String>,
    /// Days, or days and times, on which no window of these rules begins, like `2026-12-24`.
    #[serde(default)]
    pub except: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Signed {
    Own(bool),
    Keys(SignedKeys),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignedKeys {
    /// Public keys, one of which must have signed: PEM files relative to the pipeline file, or the text of one.
    pub keys: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Builders that are trusted; `*` at the end stands for anything. Default: any.
    #[serde(default)]
    pub builders: Vec<String>,
    /// Repositories the source may come from; `*` at the end stands for anything. Default: any.
    #[serde(default)]
    pub sources: Vec<String>,
    /// `true`: nothing that was built from had changes that were not committed.
    #[serde(default)]
    pub clean: Option<bool>,
    /// Public keys, one of which must have signed the provenance: PEM files relative to the pipeline file, or the text of one.
    #[serde(default)]
    pub keys: Vec<String>,
    /// `true` instead of `keys`: nobody needs to have signed it, so that anybody who may push may have written it.
    #[serde(default)]
    pub unsigned: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sbom {
    /// What must not be in it.
    #[serde(default)]
    pub deny: Option<SbomDeny>,
    /// Packages that, when they are in it, have at least this version (as Debian compares them).
    #[serde(default)]
    pub minimum: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SbomDeny {
    /// Names, or `KIND:NAME` like `npm:left-pad`; `*` at the end stands for anything.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Licences by their SPDX names, like `AGPL-3.0*`; `unknown`: packages that say none.
    #[serde(default)]
    pub licences: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// The program and its arguments, or a text for `sh -c`. A program named by a relative path with a `/` is a script beside the
    /// pipeline file and goes into the ledger with it. It starts in an empty folder.
    pub run: OneOrMany,
    /// How long it may take, like `30s`. Default: 60s.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// The address that is asked with GET; redirects are not followed.
    pub url: String,
    /// The status that allows. Default: any from 200 to 299.
    #[serde(default)]
    #[schemars(range(min = 100, max = 599))]
    pub status: Option<u16>,
    /// How long an answer may take, like `5s`. Default: 10s.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// At least one of `size` and `packages`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Bytes that the release does not share with the one that is there, like `50M`.
    #[serde(default)]
    pub size: Option<String>,
    /// Packages added, removed or of another version.
    #[serde(default)]
    pub packages: Option<u32>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// The name the report was attached with.
    pub name: String,
    /// What it must say. Default: `pass`.
    #[serde(default)]
    pub result: Option<String>,
}

/// Somebody who may decide.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Person {
    /// The public ssh key decisions are signed with, one line like `ssh-ed25519 AAAA… name`.
    #[serde(default)]
    pub key: Option<String>,
    /// `admin`, `promote`, `approve`, `override`, `report`, or names of your own for `approve` gates.
    #[serde(default)]
    pub roles: Vec<String>,
}

/// The address of the Git repository of the ledger, or settings.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Ledger {
    Settings(LedgerSettings),
    Remote(String),
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LedgerSettings {
    /// The Git repository everybody shares. Default: none, the ledger is on this machine only.
    #[serde(default)]
    pub remote: Option<String>,
    /// Whether decisions are signed also where no `people` ask for it. Default: false.
    #[serde(default)]
    pub sign: Option<bool>,
}
