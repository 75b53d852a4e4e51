//! What gates are shown of a release: its signatures, provenance, bills of materials and reports in the store, and the world.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::change;
use super::gate::{self, Difference, Ended, Evidence, Package, ProvenanceSeen, ReportSeen, SignatureSeen, Tested};
use crate::artifact::keys::PublicKey;
use crate::artifact::referrer::{self, Kind as Attachment};
use crate::artifact::sbom::{self, Inventory, licences};
use crate::artifact::sign::{self, Verdict};
use crate::artifact::store::Store;
use crate::artifact::{provenance, release};
use crate::config::types::{Command, Http, VmTestFile};
use crate::error::Problem;
use crate::oci::digest::Digest;

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
}

impl FromStore<'_> {
    fn keys(keys: &[String]) -> Result<Vec<PublicKey>> {
        keys.iter().map(|key| PublicKey::from_pem(key)).collect()
    }

    /// The release, and that every byte of it is what its digest says.
    fn whole(&self, digest: &Digest) -> Result<release::Release> {
        if let Some(wrong) = release::check(self.store, digest)?.into_iter().next() {
            bail!(Problem::failed(wrong));
        }
        release::read(self.store, digest)
    }

    fn inventory(&self, digest: &Digest) -> Result<Inventory> {
        sbom::of_release(self.store, digest)?.with_context(|| {
            Problem::failed(format!("release {} has no list of packages for each of its artifacts", digest.short()))
        })
    }
}

impl Evidence for FromStore<'_> {
    fn signatures(&self, release: &Digest, keys: &[String]) -> Result<Vec<SignatureSeen>> {
        self.whole(release)?;
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
        let found = provenance::read(self.store, release, &known)?;
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
        let packages = self.inventory(release)?.packages.into_iter();
        Ok(packages
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
        for attached in referrer::attached(self.store, release)? {
            let Attachment::Report(name) = attached.kind else { continue };
            let result = attached.manifest.annotations.get(referrer::REPORT_RESULT).cloned().unwrap_or_default();
            seen.push(ReportSeen { name, result });
        }
        Ok(seen)
    }

    fn difference(&self, from: &Digest, to: &Digest) -> Result<Difference> {
        difference(self.store, from, to)
    }

    fn run_command(&self, command: &Command, variables: &BTreeMap<String, String>) -> Result<Ended> {
        gate::command::run(command, variables, self.cwd)
    }

    fn http(&self, request: &Http, headers: &BTreeMap<String, String>) -> Result<u16> {
        gate::http::ask(request, headers, self.network)
    }

    fn vm_test(&self, release: &Digest, test: &VmTestFile) -> Result<Tested> {
        let release = self.whole(release)?;
        let disk = release.entries.iter().find(|entry| entry.kind == release::Kind::Disk);
        let disk = disk.with_context(|| Problem::failed(format!("release {} has no disk to boot", release.version)))?;
        (self.boot)(&disk.digest, test)
    }
}

/// What `to` has that `from` does not: bytes of blobs, and packages added, removed or of another version.
///
/// # Errors
/// One of them is not in the store, or has no list of packages.
pub fn difference(store: &Store, from: &Digest, to: &Digest) -> Result<Difference> {
    let bytes = change::bytes(store, Some(from), to)?;
    let packages = change::packages(store, Some(from), to)?.len() as u64;
    Ok(Difference { bytes, packages })
}
