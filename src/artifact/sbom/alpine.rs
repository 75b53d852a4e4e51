//! Packages of apk: its database of one-letter fields (apk's "APKINDEX" format).

use anyhow::Result;

use super::{Found, Kind, Package, System, licences, purl, text};
use crate::disk::tree::Tree;

const DATABASES: [&str; 2] = ["lib/apk/db/installed", "usr/lib/apk/db/installed"];

pub(super) fn find(tree: &Tree, system: &System, found: &mut Found) -> Result<()> {
    let Some((path, id)) = DATABASES.iter().find_map(|path| Some((path, tree.resolve(path.as_bytes())?))) else { return Ok(()) };
    let Some(database) = text(tree, path.as_bytes(), id, found)? else { return Ok(()) };
    for paragraph in database.split("\n\n") {
        let field = |letter: &str| paragraph.lines().find_map(|line| line.strip_prefix(letter)?.strip_prefix(':')).map(str::trim);
        let (Some(name), Some(version)) = (field("P"), field("V")) else { continue };
        let mut qualifiers = Vec::new();
        qualifiers.extend(field("A").map(|architecture| ("arch", architecture)));
        qualifiers.extend(system.distribution.as_deref().map(|distribution| ("distro", distribution)));
        found.packages.push(Package {
            kind: Kind::Apk,
            purl: purl(Kind::Apk, Some(system.id.as_deref().unwrap_or("alpine")), name, version, &qualifiers),
            licence: field("L").and_then(licences::of_metadata),
            supplier: field("m").map(str::to_owned),
            found: (*path).to_owned(),
            name: name.to_owned(),
            version: version.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::purls;

    #[test]
    fn a_database() {
        let database = "C:Q1x=\nP:musl\nV:1.2.5-r0\nA:x86_64\nL:MIT\nm:A B <a@example.org>\nF:lib\n\nP:zlib\nV:1.3-r0\n\n";
        let expected = ["pkg:apk/alpine/musl@1.2.5-r0?arch=x86_64", "pkg:apk/alpine/zlib@1.3-r0"];
        assert_eq!(purls(&[("lib/apk/db/installed", database)]), expected);
    }
}
