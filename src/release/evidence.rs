//! What gates are shown of a release: its signatures, provenance, bills of materials and reports in the store, and the world.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::change;
use super::gate::{self, Difference, Ended, Evidence, Package, ProvenanceSeen, ReportSeen, SignatureSeen, Tested};
use crate::artifact::keys::PublicKey;
use crate::artifact::referrer::{self, Kind as Attachment};
use crate::artifact::sbom::{self, Inventory, licences};
use crate::artifact::sign::{self, Verdict};
use crate::artifact::store::Store;
use crate::artifact::{provenance, release, whole};
use crate::config::types::{Command, Http, VmTestFile};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress;

/// Boots the disk of a release and runs a test in it: digest of the disk's manifest, the test.
pub type Boot<'a> = dyn Fn(&Digest, &VmTestFile) -> Result<Tested> + 'a;

/// Evidence from the store of this machine.
#[expect(missing_debug_implementations, reason = "a closure has none")]
pub struct FromStore<'a> {
    pub store: &'a Store,
    /// Working folder of programs.
    pub cwd: &'a Path,
    pub network: &'a gate::http::Network,
    pub boot: &'a Boot<'a>,
    /// For reading packages out of layers.
    pub threads: usize,
    pub progress: &'a dyn Progress,
    /// What was said already; begins empty.
    pub told: RefCell<BTreeSet<String>>,
}

impl FromStore<'_> {
    fn keys(keys: &[String]) -> Result<Vec<PublicKey>> {
        keys.iter().map(|key| PublicKey::from_pem(key)).collect()
    }

    /// The release, and that every byte of it is what its digest says.
    fn whole_release(&self, digest: &Digest) -> Result<release::Release> {
        if let Some(wrong) = whole::check(self.store, digest)?.into_iter().next() {
            bail!(Problem::failed(wrong).hint("build or pull it again; what is broken is replaced then"));
        }
        release::read(self.store, digest)
    }

    /// The packages of a release by its own bytes. What is attached is not asked: whoever may push to the registry may have
    /// written it.
    fn inventory(&self, digest: &Digest) -> Result<Inventory> {
        self.whole_release(digest)?;
        sbom::computed_of_release(self.store, digest, self.threads)
            .with_context(|| Problem::failed(format!("cannot list the packages of release {}", digest.short())))
    }

    /// Says what was passed over among what is attached, once.
    fn tell(&self, broken: Vec<String>) {
        for text in broken {
            if self.told.borrow_mut().insert(text.clone()) {
                self.progress.warn(text);
            }
        }
    }
}

impl Evidence for FromStore<'_> {
    fn whole(&self, release: &Digest) -> Result<()> {
        // One that was never here is for its registry to be whole.
        if !self.store.blob(release).exists() {
            return Ok(());
        }
        self.whole_release(release)
            .map(drop)
            .with_context(|| Problem::failed(format!("release {release} is not whole in the store of this machine")))
    }

    fn signatures(&self, release: &Digest, keys: &[String]) -> Result<Vec<SignatureSeen>> {
        self.whole_release(release)?;
        self.tell(referrer::look(self.store, release)?.1);
        let known = Self::keys(keys)?;
        let mut seen = Vec::new();
        for signature in sign::seen(self.store, release, &known)? {
            let (fingerprint, over) = match signature.verdict {
                Verdict::Valid(fingerprint) => (fingerprint, *release),
                // Over what does not matter, only that it is something else.
                Verdict::OtherArtifact(fingerprint) => (fingerprint, Digest::of(signature.tag.as_bytes())),
                Verdict::OtherKey | Verdict::Broken(_) => continue,
            };
            let index = known.iter().position(|key| key.fingerprint() == fingerprint);
            if let Some(key) = index.and_then(|index| keys.get(index)) {
                seen.push(SignatureSeen { key: key.clone(), over });
            }
        }
        Ok(seen)
    }

    fn provenance(&self, release: &Digest, keys: &[String]) -> Result<Vec<ProvenanceSeen>> {
        let known = Self::keys(keys)?;
        self.tell(referrer::look(self.store, release)?.1);
        let (found, broken) = provenance::look(self.store, release, &known)?;
        self.tell(broken);
        let key =
            |fingerprint: &_| known.iter().position(|key| key.fingerprint() == *fingerprint).map(|index| keys[index].clone());
        Ok(found
            .into_iter()
            .map(|found| ProvenanceSeen {
                builder: found.builder,
                dirty: found.source.as_ref().is_none_or(|source| source.dirty || source.commit.is_none()),
                source: found.source.map(|source| source.repository).unwrap_or_default(),
                key: found.signed_by.as_ref().and_then(key),
                subject: Some(*release),
            })
            .collect())
    }

    fn sbom(&self, release: &Digest) -> Result<Vec<Package>> {
        let Inventory { packages, unread } = self.inventory(release)?;
        if !unread.is_empty() {
            let paths: Vec<String> = unread.iter().map(|path| format!("`{path}`")).collect();
            bail!(Problem::failed(format!("the list is not complete: nothing here reads the packages of {}", paths.join(", "))));
        }
        Ok(packages
            .into_iter()
            .map(|package| Package {
                kind: package.kind.to_string(),
                name: package.name,
                version: package.version,
                licences: package.licence.as_deref().map(licences::names).unwrap_or_default(),
            })
            .collect())
    }

    fn reports(&self, release: &Digest) -> Result<Vec<ReportSeen>> {
        let mut seen = Vec::new();
        let (attached, broken) = referrer::look(self.store, release)?;
        self.tell(broken);
        for attached in attached {
            let sequence = attached.sequence();
            let Attachment::Report(name) = attached.kind else { continue };
            let result = attached.manifest.annotations.get(referrer::REPORT_RESULT).cloned().unwrap_or_default();
            seen.push(ReportSeen { name, result, sequence });
        }
        Ok(seen)
    }

    fn difference(&self, from: &Digest, to: &Digest) -> Result<Difference> {
        difference(self.store, from, to, self.threads)
    }

    fn run_command(&self, command: &Command, variables: &BTreeMap<String, String>) -> Result<Ended> {
        gate::command::run(command, variables, self.cwd)
    }

    fn http(&self, request: &Http, headers: &BTreeMap<String, String>) -> Result<u16> {
        gate::http::ask(request, headers, self.network)
    }

    fn vm_test(&self, release: &Digest, test: &VmTestFile) -> Result<Tested> {
        let release = self.whole_release(release)?;
        let disk = release.entries.iter().find(|entry| entry.kind == release::Kind::Disk);
        let disk = disk.with_context(|| Problem::failed(format!("release {} has no disk to boot", release.version)))?;
        (self.boot)(&disk.digest, test)
    }
}

/// What `to` has that `from` does not: bytes of blobs, and packages added, removed or of another version, by their bytes.
///
/// # Errors
/// One of them is not in the store.
pub fn difference(store: &Store, from: &Digest, to: &Digest, threads: usize) -> Result<Difference> {
    let bytes = change::bytes(store, Some(from), to)?;
    let unread = RefCell::new(BTreeSet::new());
    let computed = |digest: &Digest| {
        let inventory = sbom::computed_of_release(store, digest, threads)?;
        unread.borrow_mut().extend(inventory.unread.iter().cloned());
        Ok(inventory)
    };
    let packages = change::packages(&computed, Some(from), to)?.len() as u64;
    Ok(Difference { bytes, packages, unread: unread.into_inner().into_iter().collect() })
}
