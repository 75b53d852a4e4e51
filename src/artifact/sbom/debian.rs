//! Packages of dpkg: the `status` database, and the `status.d` folder of images without dpkg.

use anyhow::Result;

use super::{Found, Kind, Package, System, field, licences, purl, text};
use crate::disk::tree::Tree;

/// Where the database is; a host of ours keeps it outside `/var`, which is another partition.
const DATABASES: [&str; 2] = ["usr/lib/pipeline/dpkg", "var/lib/dpkg"];

pub(super) fn find(tree: &Tree, system: &System, found: &mut Found) -> Result<()> {
    for database in DATABASES {
        let path = format!("{database}/status");
        if let Some(id) = tree.resolve(path.as_bytes())
            && let Some(status) = text(tree, path.as_bytes(), id, found)?
        {
            add(tree, system, found, &path, &status, true)?;
            break;
        }
    }
    let folder = "var/lib/dpkg/status.d";
    let Some(id) = tree.resolve(folder.as_bytes()) else { return Ok(()) };
    for (name, id) in tree.children(id).map(|(name, id)| (name.to_vec(), id)).collect::<Vec<_>>() {
        let path = format!("{folder}/{}", String::from_utf8_lossy(&name));
        if !path.ends_with(".md5sums")
            && let Some(status) = text(tree, path.as_bytes(), id, found)?
        {
            add(tree, system, found, &path, &status, false)?;
        }
    }
    Ok(())
}

/// Adds the installed packages of a database. In `status.d` no state is given: what is there is installed.
fn add(tree: &Tree, system: &System, found: &mut Found, path: &str, status: &str, with_state: bool) -> Result<()> {
    for paragraph in status.split("\n\n") {
        let (Some(name), Some(version)) = (field(paragraph, "Package"), field(paragraph, "Version")) else { continue };
        if with_state && !field(paragraph, "Status").is_some_and(|state| state.ends_with(" installed")) {
            continue;
        }
        let architecture = field(paragraph, "Architecture").unwrap_or_default();
        let mut qualifiers = Vec::new();
        if !architecture.is_empty() {
            qualifiers.push(("arch", architecture.as_str()));
        }
        qualifiers.extend(system.distribution.as_deref().map(|distribution| ("distro", distribution)));
        found.packages.push(Package {
            kind: Kind::Deb,
            purl: purl(Kind::Deb, Some(system.id.as_deref().unwrap_or("debian")), &name, &version, &qualifiers),
            licence: licence(tree, &name)?,
            supplier: field(paragraph, "Maintainer"),
            found: path.to_owned(),
            name,
            version,
        });
    }
    Ok(())
}

/// What the package's copyright file says; it may lie in another package's folder (Debian Policy, section 12.5).
fn licence(tree: &Tree, package: &str) -> Result<Option<String>> {
    let copyright = tree.read(format!("usr/share/doc/{package}/copyright").as_bytes())?;
    Ok(copyright.and_then(|bytes| licences::of_copyright(&String::from_utf8_lossy(&bytes))))
}

#[cfg(test)]
mod tests {
    use super::super::tests::purls;

    #[test]
    fn installed_packages_only() {
        let status = "Package: a\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 2\n\nPackage: half\nStatus: install ok half-installed\nVersion: 2\n";
        let release = "NAME=x\nID=debian\nVERSION_ID=\"13\"\n";
        let expected = ["pkg:deb/debian/a@1?arch=amd64&distro=debian-13"];
        assert_eq!(purls(&[("var/lib/dpkg/status", status), ("etc/os-release", release)]), expected);
        assert_eq!(purls(&[("usr/lib/pipeline/dpkg/status", status), ("etc/os-release", release)]), expected);
        assert_eq!(
            purls(&[("var/lib/dpkg/status.d/b", "Package: b\nVersion: 3\n"), ("var/lib/dpkg/status.d/b.md5sums", "x")]),
            ["pkg:deb/debian/b@3"]
        );
    }
}
