//! A ledger in memory and made-up evidence, for the tests of this folder.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use jiff::Timestamp;

use super::decision::{Decision, Frozen, Kind, Refused};
use super::gate::{Difference, Ended, Evidence, Package, ProvenanceSeen, ReportSeen, SignatureSeen, Tested};
use super::policy::Policy;
use super::promotion::{Action, Candidate, Plan, Request, plan};
use super::state::{Inputs, State, View};
use crate::config::types::{Command, Http, VmTestFile};
use crate::oci::digest::Digest;

pub const KEY: &str = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0=\n-----END PUBLIC KEY-----\n";

/// A moment of the day everything here happens on.
pub fn at(clock: &str) -> Timestamp {
    format!("2026-11-20T{clock}:00Z").parse().unwrap()
}

/// A release by its version.
pub fn release(version: &str) -> Digest {
    Digest::of(version)
}

pub fn candidate(version: &str) -> Candidate {
    Candidate { release: release(version), version: version.into(), author: Some("ada".into()) }
}

/// Answers that are set; an unset one is an error.
#[derive(Debug, Default)]
pub struct Fake {
    pub signatures: Option<Vec<SignatureSeen>>,
    pub provenance: Option<Vec<ProvenanceSeen>>,
    pub sbom: Option<Vec<Package>>,
    pub reports: Option<Vec<ReportSeen>>,
    pub difference: Option<Difference>,
    pub command: Option<Ended>,
    pub http: Option<u16>,
    pub vm_test: Option<Tested>,
    pub error: String,
    pub asked: RefCell<Vec<&'static str>>,
}

impl Fake {
    fn give<T: Clone>(&self, what: &'static str, value: &Option<T>) -> Result<T> {
        self.asked.borrow_mut().push(what);
        match value {
            Some(value) => Ok(value.clone()),
            None => bail!("{}", self.error),
        }
    }
}

impl Evidence for Fake {
    fn whole(&self, _: &Digest) -> Result<()> {
        Ok(())
    }
    fn signatures(&self, _: &Digest, _: &[String]) -> Result<Vec<SignatureSeen>> {
        self.give("signatures", &self.signatures)
    }
    fn provenance(&self, _: &Digest, _: &[String]) -> Result<Vec<ProvenanceSeen>> {
        self.give("provenance", &self.provenance)
    }
    fn sbom(&self, _: &Digest) -> Result<Vec<Package>> {
        self.give("sbom", &self.sbom)
    }
    fn reports(&self, _: &Digest) -> Result<Vec<ReportSeen>> {
        self.give("reports", &self.reports)
    }
    fn difference(&self, _: &Digest, _: &Digest) -> Result<Difference> {
        self.give("difference", &self.difference)
    }
    fn run_command(&self, _: &Command, _: &BTreeMap<String, String>) -> Result<Ended> {
        self.give("command", &self.command)
    }
    fn http(&self, _: &Http, _: &BTreeMap<String, String>) -> Result<u16> {
        self.give("http", &self.http)
    }
    fn vm_test(&self, _: &Digest, _: &VmTestFile) -> Result<Tested> {
        self.give("vm-test", &self.vm_test)
    }
}

/// A ledger of the pipeline `shop`.
#[derive(Debug)]
pub struct World {
    pub policy: Policy,
    pub states: BTreeMap<String, State>,
    pub frozen: Frozen,
    pub evidence: Fake,
    /// Who asks, and whether they sign.
    pub actor: (&'static str, bool),
}

/// `people` of which each has a key of their own.
pub const PEOPLE: &str = "people:
  ada: { key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB, roles: [admin, promote, approve] }
  bob: { key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIC, roles: [approve, qa] }
  eve: { key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMD, roles: [promote, override, approve, qa] }
";

impl World {
    /// With the environments and people of `yaml`, applied at 08:00.
    pub fn new(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["cosign.pub", "smoke.yaml"] {
            fs_err::write(folder.path().join(name), "").unwrap();
        }
        let text = format!("name: shop\nbase: {{ debian: trixie }}\nhost: {{}}\nimage: {{ command: [/bin/true] }}\n{yaml}");
        let pipeline = crate::config::parse(&folder.path().join("pipeline.yaml"), &text, &[]).unwrap();
        let read = |path: &Path| Ok(if path.ends_with("cosign.pub") { KEY.into() } else { "name: smoke\n".into() });
        let policy = Policy::of(&pipeline, None, &read).unwrap();
        let apply = Decision::new(Kind::Apply, "ada", at("08:00"));
        let policy = policy.after(None, &apply, true).unwrap();
        let states = policy.environments.keys().map(|name| (name.clone(), State::created(&policy, name, &apply))).collect();
        let evidence = Fake { error: "cannot look".into(), ..Fake::default() };
        Self { policy, states, frozen: Frozen::default(), evidence, actor: ("eve", true) }
    }

    pub fn view(&self) -> View<'_> {
        View { policy: &self.policy, states: &self.states, frozen: &self.frozen }
    }

    pub fn state(&self, environment: &str) -> &State {
        &self.states[environment]
    }

    pub fn request<'r>(&self, environment: &'r str, action: Action, time: &str) -> Request<'r> {
        Request {
            environment,
            action,
            actor: self.actor.0,
            signed: self.actor.1,
            reason: "",
            overrides: &[],
            lift: false,
            automatic: false,
            time: at(time),
        }
    }

    pub fn plan(&self, request: &Request<'_>) -> Result<Plan, Refused> {
        plan(self.view(), request, &self.evidence)
    }

    /// Plans and, when it is allowed, commits.
    pub fn run(&mut self, request: &Request<'_>) -> Result<Plan, Refused> {
        let plan = self.plan(request)?;
        if plan.allowed {
            self.commit(request.environment, &plan.decision)?;
        }
        Ok(plan)
    }

    /// Promotes, which must be allowed.
    pub fn promote(&mut self, environment: &str, version: &str, time: &str) {
        let request = self.request(environment, Action::Promote(candidate(version)), time);
        let plan = self.run(&request).unwrap();
        assert!(plan.allowed, "{plan:#?}");
    }

    /// A decision that is not planned.
    pub fn decide(&mut self, environment: &str, kind: Kind, time: &str, set: impl FnOnce(&mut Decision)) -> Result<(), Refused> {
        let mut decision = Decision::new(kind, self.actor.0, at(time));
        set(&mut decision);
        self.commit(environment, &decision)
    }

    /// An approval of the pair that `version` would be there.
    pub fn approve(&mut self, who: &'static str, environment: &str, version: &str, time: &str) -> Result<(), Refused> {
        let actor = self.actor;
        self.actor.0 = who;
        let config = self.states[environment].configuration(&self.policy.environments[environment]).digest();
        let done = self.decide(environment, Kind::Approve, time, |decision| {
            decision.to = Some(release(version));
            decision.config = Some(config);
        });
        self.actor = actor;
        done
    }

    pub fn commit(&mut self, environment: &str, decision: &Decision) -> Result<(), Refused> {
        let inputs = Inputs { view: self.view(), signed: self.actor.1, previous: Some("0123") };
        let after = self.states[environment].after(decision, inputs)?;
        // What is written is what is read, and gives the same bytes.
        let bytes = after.bytes();
        let read = State::parse(&bytes).unwrap();
        assert_eq!((&read, read.bytes()), (&after, bytes));
        self.states.insert(environment.into(), after);
        Ok(())
    }
}
