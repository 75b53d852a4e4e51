//! Debian trees from pinned packages, the same bytes on any day and machine.
//!
//! apt resolves, in a root of its own that knows the suite's archives and none of this machine's
//! packages ([`apt`], [`resolve`]); the answer is a [`Set`](super::lock::Set) in `pipeline.lock`.
//! From there on nothing is looked up: the locked `.deb`s are fetched by digest ([`fetch`]), put
//! into a throw-away repository ([`repository`]) and unpacked by mmdebstrap, or installed by the
//! tree's own apt ([`bootstrap`]). A written list removes what still moves ([`normalise`]), and
//! a scan refuses what may never be in a layer ([`scan`]).
//!
//! ```text
//! mirrors ─▶ apt root ─▶ resolve ─▶ Set (pipeline.lock)
//!                                    │
//!                  fetch ◀───────────┘
//!                    ▼
//!                repository ─▶ bootstrap | install_script ─▶ normalise ─▶ layer (scan)
//! ```
//!
//! The commands and scripts are run by others, in the namespaces of the sandbox; everything here
//! is the host side.

pub mod apt;
pub mod bootstrap;
pub mod fetch;
pub mod mirrors;
pub mod normalise;
pub mod repository;
pub mod resolve;
pub mod scan;

/// The only architecture built for now (DESIGN, section 7, contract 13).
pub const ARCHITECTURE: &str = "amd64";

#[cfg(test)]
mod tests {
    //! These ask the mirror this machine's apt is configured with, as a build does.

    use super::apt::Apt;
    use super::fetch::Gone;
    use super::mirrors::{Archives, request};
    use super::repository::{installed, status};
    use crate::build::lock::{self, Package, Request, Set};
    use crate::config::types::Suite;
    use crate::oci::digest::Digest;

    const NOW: &str = "2026-01-01T00:00:00Z";

    fn names(set: &Set) -> Vec<&str> {
        set.packages.iter().map(|package| package.name.as_str()).collect()
    }

    /// A package that is pinned at a version no archive ever had.
    fn never_was(package: &Package) -> Package {
        Package {
            version: "0.1-never".into(),
            sha256: Digest::of("never"),
            path: package.path.replace(".deb", "-never.deb"),
            ..package.clone()
        }
    }

    #[test]
    fn sets_are_resolved_fetched_and_renewed_from_the_mirror() {
        let cache = tempfile::tempdir().unwrap();
        let archives = Archives::new(Suite::Trixie, None, None, &[]).unwrap();
        let mut apt = Apt::open(&archives, cache.path()).unwrap();
        let packages = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();

        // A base: the essential packages and apt, and nothing that is only recommended.
        let base = apt.resolve(&request("trixie", &packages(&["netbase"]), &[], None), "", NOW).unwrap();
        let found = names(&base.set);
        assert!(
            ["apt", "base-files", "dpkg", "libc6", "netbase", "usr-is-merged"].iter().all(|name| found.contains(name)),
            "{found:?}"
        );
        assert!(["usrmerge", "ca-certificates", "perl"].iter().all(|name| !found.contains(name)), "{found:?}");
        assert!(base.set.packages.is_sorted_by(|a, b| a.name < b.name));
        assert_eq!(installed(&base.status()).len(), found.len());
        assert!(
            base.set
                .packages
                .iter()
                .all(|package| package.sha256 != Digest::of("") && package.size > 0 && package.path.starts_with("pool/"))
        );

        // On top of it: only what is missing.
        let on_top: Request = request("trixie", &packages(&["ca-certificates", "netbase"]), &[], Some(base.set.request.key()));
        let top = apt.resolve(&on_top, &base.status(), NOW).unwrap().set;
        assert!(
            names(&top).contains(&"openssl") && !names(&top).contains(&"netbase") && !names(&top).contains(&"libc6"),
            "{:?}",
            names(&top)
        );

        // Two small packages for real.
        let two = request("trixie", &packages(&["netbase", "media-types"]), &[], Some("image".into()));
        let set = apt.lock(&two, "", NOW, cache.path()).unwrap();
        assert_eq!(names(&set), ["media-types", "netbase"]);
        assert!(set.epoch() > 1_500_000_000, "{set:?}");
        assert_eq!(installed(&status(&[&set], cache.path()).unwrap()).len(), 2);
        let text = lock::format(&lock::Lock { sets: [(two.key(), set.clone())].into(), ..Default::default() });
        let host = archives.sources[0].uri.split('/').nth(2).unwrap();
        assert!(!text.contains("://") && (host.is_empty() || !text.contains(host)), "{text}");

        // One is no longer there: it is named, and only it is renewed. The other one stays at a
        // version the archive has no more.
        let older = super::repository::tests::build_deb(cache.path(), "media-types", "0.5", "");
        let locked = Set { packages: vec![older.clone(), never_was(&set.packages[1])], ..set.clone() };
        let error = apt.fetch(&locked, cache.path()).unwrap_err();
        let gone = error.downcast_ref::<Gone>().expect("a typed error").packages.clone();
        assert_eq!(gone, locked.packages[1..]);
        let update = apt.update_missing(&locked, &gone, "", NOW, cache.path()).unwrap();
        assert_eq!(update.set.packages, [older, set.packages[1].clone()]);
        assert_eq!(update.changes, lock::diff(&locked, &update.set));
        assert_eq!((update.changes.len(), update.everything), (1, false));

        // What does not exist names what does.
        let error = apt.resolve(&request("trixie", &packages(&["ca-certificate"]), &[], None), "", NOW).unwrap_err();
        assert_eq!((error.to_string().as_str(), crate::error::exit_code(&error)), ("unknown package `ca-certificate`", 2));
        assert_eq!(crate::error::hints(&error), ["the nearest name to `ca-certificate` is `ca-certificates`"]);
    }

    #[test]
    fn an_archive_that_does_not_answer_is_transient() {
        let cache = tempfile::tempdir().unwrap();
        // Port 9 (discard) of this machine: refused at once.
        let nobody = "http://127.0.0.1:9/debian";
        let archives = Archives::new(Suite::Sid, Some(nobody), None, &[]).unwrap();
        let mut apt = Apt::open(&archives, cache.path()).unwrap();
        let error = apt.resolve(&request("sid", &["bash".into()], &[], None), "", NOW).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 75, "{error:#}");
        assert!(error.to_string().contains(nobody), "{error:#}");
    }

    #[test]
    fn an_archive_signed_by_somebody_else_is_refused() {
        let cache = tempfile::tempdir().unwrap();
        let mut archives = Archives::new(Suite::Sid, None, None, &[]).unwrap();
        let keyring = cache.path().join("empty.gpg");
        fs_err::write(&keyring, "").unwrap();
        archives.sources[0].signed_by = keyring;
        let mut apt = Apt::open(&archives, cache.path()).unwrap();
        let error = apt.resolve(&request("sid", &["bash".into()], &[], None), "", NOW).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 1, "{error:#}");
        assert!(error.to_string().contains("signature"), "{error:#}");
    }
}
