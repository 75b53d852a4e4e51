//! Gates about what a release is: signed, provenance, sbom, budget, report, vm-test.

use super::{Evidence, Package, allow, deny, unknown};
use crate::config::types::{Budget, Provenance, Report, Sbom, Signed, VmTestFile};
use crate::oci::digest::Digest;
use crate::release::decision::Answer;

pub use crate::artifact::version::compare as compare_versions;

/// One of the keys signed exactly this release.
pub(super) fn signed(wanted: &Signed, release: &Digest, evidence: &dyn Evidence) -> Answer {
    let seen = match evidence.signatures(release, &wanted.keys) {
        Ok(seen) => seen,
        Err(error) => return unknown(&error),
    };
    let known: Vec<_> = seen.iter().filter(|seen| wanted.keys.contains(&seen.key)).collect();
    if known.iter().any(|seen| seen.over == *release) {
        return allow(format!("by one of {} keys", wanted.keys.len()));
    }
    match known.first() {
        Some(other) => deny(format!("the signature is over other bytes: `{}`", other.over.short())),
        None if seen.is_empty() => deny("no signature by a key that counts"),
        None => deny("signed by another key"),
    }
}

/// A provenance fulfils everything that is asked.
pub(super) fn provenance(wanted: &Provenance, release: &Digest, evidence: &dyn Evidence) -> Answer {
    // Only a policy of before this was asked for has neither.
    if wanted.keys.is_empty() && !wanted.unsigned {
        let why = "the gate names no `keys`, so anybody may have written a provenance; it needs them, or `unsigned: true`";
        return unknown(&anyhow::anyhow!(why));
    }
    let seen = match evidence.provenance(release, &wanted.keys) {
        Ok(seen) => seen,
        Err(error) => return unknown(&error),
    };
    let mut why = None;
    for one in &seen {
        let wrong = if !wanted.keys.is_empty() && !one.key.as_ref().is_some_and(|key| wanted.keys.contains(key)) {
            "it is not signed by a key that counts".to_owned()
        } else if one.subject.is_some_and(|subject| subject != *release) {
            "it is about something else".to_owned()
        } else if !wanted.builders.is_empty() && !any_fits(&wanted.builders, &one.builder) {
            format!("built by `{}`", one.builder)
        } else if !wanted.sources.is_empty() && !any_fits(&wanted.sources, &one.source) {
            format!("made from `{}`", one.source)
        } else if wanted.clean && one.dirty {
            "made from a source with changes that are not committed".to_owned()
        } else {
            return allow(format!("built by `{}` from `{}`", one.builder, one.source));
        };
        why.get_or_insert(wrong);
    }
    deny(why.unwrap_or_else(|| "there is no provenance".into()))
}

/// Nothing denied is in it, and nothing older than it may be.
pub(super) fn sbom(wanted: &Sbom, release: &Digest, evidence: &dyn Evidence) -> Answer {
    let packages = match evidence.sbom(release) {
        Ok(packages) => packages,
        Err(error) => return unknown(&error),
    };
    let mut found: Vec<String> = packages.iter().filter_map(|package| objection(wanted, package)).collect();
    found.sort_unstable();
    found.dedup();
    match found.as_slice() {
        [] => allow(format!("{} packages", packages.len())),
        [one] => deny(one.clone()),
        [first, others @ ..] => deny(format!("{first}, and {} more", others.len())),
    }
}

fn objection(wanted: &Sbom, package: &Package) -> Option<String> {
    let Package { name, version, licences, kind } = package;
    if any_fits(&wanted.deny.packages, name) || any_fits(&wanted.deny.packages, &format!("{kind}:{name}")) {
        return Some(format!("package `{name}` is denied"));
    }
    let unnamed = ["unknown".to_owned()];
    let licences = if licences.is_empty() { unnamed.as_slice() } else { licences.as_slice() };
    if let Some(licence) = licences.iter().find(|licence| any_fits(&wanted.deny.licences, licence)) {
        return Some(format!("package `{name}` has the licence `{licence}`"));
    }
    let minimum = wanted.minimum.get(name).or_else(|| wanted.minimum.get(&format!("{kind}:{name}")))?;
    (compare_versions(version, minimum).is_lt()).then(|| format!("package `{name}` is {version}, and {minimum} is the least"))
}

/// Whether a pattern is `text`, or its beginning where it ends with `*`.
fn any_fits(patterns: &[String], text: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(beginning) => text.starts_with(beginning),
        None => pattern == text,
    })
}

/// No more changes than may.
pub(super) fn budget(budget: &Budget, from: Option<Digest>, to: &Digest, evidence: &dyn Evidence) -> Answer {
    let Some(from) = from else { return allow("the first release here") };
    let seen = match evidence.difference(&from, to) {
        Ok(seen) => seen,
        Err(error) => return unknown(&error),
    };
    if let Some(size) = budget.size.filter(|size| seen.bytes > *size) {
        return deny(format!("{} bytes are new, and {size} may be", seen.bytes));
    }
    if budget.packages.is_some() && !seen.unread.is_empty() {
        return unknown(&anyhow::anyhow!("nothing here reads the packages of `{}`", seen.unread.join("`, `")));
    }
    if let Some(packages) = budget.packages.filter(|packages| seen.packages > *packages) {
        return deny(format!("{} packages changed, and {packages} may", seen.packages));
    }
    allow(format!("{} bytes and {} packages", seen.bytes, seen.packages))
}

/// The newest report of the name says what it must.
pub(super) fn report(wanted: &Report, release: &Digest, evidence: &dyn Evidence) -> Answer {
    let seen = match evidence.reports(release) {
        Ok(seen) => seen,
        Err(error) => return unknown(&error),
    };
    let named: Vec<_> = seen.iter().filter(|report| report.name == wanted.name).collect();
    let highest = named.iter().filter_map(|report| report.sequence).max();
    // One without a number may be older or newer than any other, and two of the same came from two places.
    let newest: Vec<_> = named.iter().filter(|report| report.sequence.is_none() || report.sequence == highest).collect();
    if let [first, others @ ..] = newest.as_slice()
        && let Some(other) = others.iter().find(|other| other.result != first.result)
    {
        return unknown(&anyhow::anyhow!(
            "reports `{}` say `{}` and `{}`, and nothing tells which is the newest",
            wanted.name,
            first.result,
            other.result
        ));
    }
    match newest.first() {
        Some(report) if report.result == wanted.result => allow(format!("`{}` says {}", report.name, report.result)),
        Some(report) if ["pass", "fail"].contains(&report.result.as_str()) => {
            deny(format!("`{}` says {}", report.name, report.result))
        }
        Some(report) => unknown(&anyhow::anyhow!("`{}` says `{}`, which is no result", report.name, report.result)),
        None => deny(format!("there is no report `{}`", wanted.name)),
    }
}

/// The disk of the release does what the test says.
pub(super) fn vm_test(test: &VmTestFile, release: &Digest, evidence: &dyn Evidence) -> Answer {
    match evidence.vm_test(release, test) {
        Ok(tested) if tested.passed => allow(tested.reason),
        Ok(tested) => deny(tested.reason),
        Err(error) => unknown(&error),
    }
}
