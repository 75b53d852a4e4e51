//! Packages from lock files in the tree.
//!
//! `Cargo.lock` always, since a program tells nothing of its crates; npm's and Python's only where
//! nothing of theirs is installed, since what is installed counts more than what was asked for.

use anyhow::Result;
use serde_json::Value;

use super::language::{npm, pypi};
use super::{Found, Kind, Package, purl, shown, text};
use crate::disk::tree::{NodeId, Tree};

pub(super) fn find(tree: &Tree, paths: &[(Vec<u8>, NodeId)], found: &mut Found) -> Result<()> {
    // Debian's own Python packages say nothing of the application's.
    let python = found.packages.iter().any(|it| it.kind == Kind::Pypi && !it.found.contains("/dist-packages/"));
    for (path, id) in paths {
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], &path[..]),
        };
        let read: fn(&str, &str) -> Vec<Package> = match name {
            b"Cargo.lock" => of_cargo,
            b"poetry.lock" | b"uv.lock" | b"pdm.lock" if !python => of_python,
            b"Pipfile.lock" if !python => of_pipfile,
            b"package-lock.json" | b"npm-shrinkwrap.json" if !is_installed(tree, folder) => of_npm,
            _ => continue,
        };
        if let Some(lock) = text(tree, path, *id, found)? {
            found.packages.extend(read(&lock, &shown(path)));
        }
    }
    Ok(())
}

/// Whether npm has installed something here, or this is itself a part of what it installed.
fn is_installed(tree: &Tree, folder: &[u8]) -> bool {
    let modules = [folder, b"node_modules"].join(&b'/');
    tree.resolve(&modules).is_some() || folder.split(|byte| *byte == b'/').any(|name| name == b"node_modules")
}

fn package(kind: Kind, purl: String, name: &str, version: &str, path: &str) -> Package {
    Package {
        kind,
        purl,
        name: name.to_owned(),
        version: version.to_owned(),
        licence: None,
        supplier: None,
        found: path.to_owned(),
    }
}

/// The `[[package]]` tables of a lock in TOML: name, version, and whether it comes from somewhere else.
fn tables(text: &str) -> impl Iterator<Item = (&str, &str, bool)> {
    text.split("[[package]]").skip(1).filter_map(|table| {
        // Tables below this one have fields of the same names.
        let own = table.split("\n[").next()?;
        let value =
            |name: &str| own.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('=')).map(str::trim);
        let text = |name: &str| Some(value(name)?.trim_matches('"'));
        Some((text("name")?, text("version")?, value("source").is_some()))
    })
}

/// Crates; those of the workspace itself have no source.
fn of_cargo(text: &str, path: &str) -> Vec<Package> {
    tables(text)
        .filter(|(.., from_elsewhere)| *from_elsewhere)
        .map(|(name, version, _)| package(Kind::Cargo, purl(Kind::Cargo, None, name, version, &[]), name, version, path))
        .collect()
}

/// Poetry's, uv's and PDM's locks. uv lists the project itself, with a source that is a folder.
fn of_python(text: &str, path: &str) -> Vec<Package> {
    let own = |name: &str| {
        text.split("[[package]]").any(|table| {
            table.contains(&format!("name = \"{name}\""))
                && ["{ virtual =", "{ editable =", "{ directory ="].iter().any(|source| table.contains(source))
        })
    };
    tables(text)
        .filter(|(name, ..)| !own(name))
        .map(|(name, version, _)| package(Kind::Pypi, pypi(name, version), name, version, path))
        .collect()
}

/// Pipenv's lock; packages for development are not in the image.
fn of_pipfile(text: &str, path: &str) -> Vec<Package> {
    let lock: Value = serde_json::from_str(text).unwrap_or_default();
    let packages = lock["default"].as_object().into_iter().flatten();
    packages
        .filter_map(|(name, entry)| {
            let version = entry["version"].as_str()?.trim_start_matches('=');
            Some(package(Kind::Pypi, pypi(name, version), name, version, path))
        })
        .collect()
}

/// npm's lock, formats 2 and 3 (`packages`); packages for development, and links, are not in the image.
fn of_npm(text: &str, path: &str) -> Vec<Package> {
    let lock: Value = serde_json::from_str(text).unwrap_or_default();
    let packages = lock["packages"].as_object().into_iter().flatten();
    packages
        .filter(|(_, entry)| entry["dev"] != true && entry["link"] != true)
        .filter_map(|(place, entry)| {
            let (_, folder) = place.rsplit_once("node_modules/")?;
            let name = entry["name"].as_str().unwrap_or(folder);
            let version = entry["version"].as_str()?;
            Some(package(Kind::Npm, npm(name, version), name, version, path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::purls;

    const CARGO: &str = "version = 4\n\n[[package]]\nname = \"app\"\nversion = \"0.1.0\"\ndependencies = [\n \"serde\",\n]\n\n[[package]]\nname = \"serde\"\nversion = \"1.0.1\"\nsource = \"registry+https://github.com/rust-lang/crates.io-index\"\n";
    const UV: &str = "version = 1\n\n[[package]]\nname = \"app\"\nversion = \"0.1.0\"\nsource = { virtual = \".\" }\n\n[[package]]\nname = \"idna\"\nversion = \"3.10\"\nsource = { registry = \"x\" }\n\n[package.optional-dependencies]\nname = \"no\"\n";
    const NPM: &str = r#"{"lockfileVersion": 3, "packages": {"": {"name": "app", "version": "1.0.0"}, "node_modules/a": {"version": "1.0.0"},
        "node_modules/a/node_modules/@s/b": {"version": "2.0.0"}, "node_modules/tool": {"version": "3.0.0", "dev": true}, "node_modules/here": {"link": true}}}"#;

    #[test]
    fn locks_of_what_is_not_installed() {
        let cases: [(&[(&str, &str)], &[&str]); 7] = [
            (&[("src/Cargo.lock", CARGO)], &["pkg:cargo/serde@1.0.1"]),
            (&[("app/uv.lock", UV)], &["pkg:pypi/idna@3.10"]),
            (
                &[("app/Pipfile.lock", r#"{"default": {"idna": {"version": "==3.1"}}, "develop": {"x": {"version": "==1"}}}"#)],
                &["pkg:pypi/idna@3.1"],
            ),
            (&[("package-lock.json", NPM)], &["pkg:npm/%40s/b@2.0.0", "pkg:npm/a@1.0.0"]),
            // Something is installed: that counts.
            (
                &[("app/package-lock.json", NPM), ("app/node_modules/c/package.json", r#"{"name":"c","version":"4.0.0"}"#)],
                &["pkg:npm/c@4.0.0"],
            ),
            (&[("app/uv.lock", UV), ("opt/lib/b-1.dist-info/METADATA", "Name: b\nVersion: 1\n")], &["pkg:pypi/b@1"]),
            (&[("a/Cargo.lock", "not toml"), ("package-lock.json", "{")], &[]),
        ];
        for (files, expected) in cases {
            assert_eq!(purls(files), expected, "{files:?}");
        }
    }
}
