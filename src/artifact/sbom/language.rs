//! Installed packages of languages: Python's metadata folders and npm's `node_modules`.

use anyhow::Result;
use serde_json::Value;

use super::{Found, Kind, Package, field, licences, purl, shown, text};
use crate::disk::tree::{NodeId, Tree};

/// Licences as Python's trove classifiers name them, where the classifier says which one it is.
const CLASSIFIER: &str = "License :: ";
/// The one that does not say which of several it is.
const BSD: &str = "BSD License";

pub(super) fn find(tree: &Tree, paths: &[(Vec<u8>, NodeId)], found: &mut Found) -> Result<()> {
    for (path, id) in paths {
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        let Some((last, above)) = names.split_last() else { continue };
        let above_is = |suffix: &[u8]| above.last().is_some_and(|name| name.ends_with(suffix));
        // `NAME.dist-info/METADATA` (core metadata specifications, "Recording installed projects"),
        // `NAME.egg-info/PKG-INFO`, or a file `NAME.egg-info`.
        let python = (*last == b"METADATA" && above_is(b".dist-info"))
            || (*last == b"PKG-INFO" && above_is(b".egg-info"))
            || last.ends_with(b".egg-info");
        if python {
            if let Some(metadata) = text(tree, path, *id, found)? {
                found.packages.extend(of_python(&metadata, &shown(path)));
            }
        } else if *last == b"package.json"
            && is_module(above)
            && let Some(json) = text(tree, path, *id, found)?
        {
            found.packages.extend(of_node(&json, &shown(path)));
        }
    }
    Ok(())
}

/// Whether this is the folder of a package: `node_modules/NAME` or `node_modules/@SCOPE/NAME`.
fn is_module(folders: &[&[u8]]) -> bool {
    let scoped = |name: &&[u8]| name.starts_with(b"@");
    match folders {
        [.., modules, scope, _] if *modules == b"node_modules" && scoped(scope) => true,
        [.., modules, name] => *modules == b"node_modules" && !scoped(name),
        _ => false,
    }
}

/// A Python project from its metadata (core metadata specifications).
fn of_python(metadata: &str, path: &str) -> Option<Package> {
    let headers = metadata.split("\n\n").next()?;
    let (name, version) = (field(headers, "Name")?, field(headers, "Version")?);
    let licence = field(headers, "License-Expression")
        .and_then(|text| licences::of_metadata(&text))
        .or_else(|| of_classifiers(headers))
        .or_else(|| field(headers, "License").and_then(|text| licences::of_metadata(&text)))
        .or_else(|| classifiers(headers).contains(&BSD).then(|| format!("LicenseRef-{}", BSD.replace(' ', "-"))));
    Some(Package {
        kind: Kind::Pypi,
        purl: pypi(&name, &version),
        licence,
        supplier: field(headers, "Author-email").or_else(|| field(headers, "Author")).filter(|text| !text.contains('\n')),
        found: path.to_owned(),
        name,
        version,
    })
}

/// A package URL of PyPI: the name in small letters, with `-` (package-url specification, "pypi").
pub(super) fn pypi(name: &str, version: &str) -> String {
    purl(Kind::Pypi, None, &name.to_ascii_lowercase().replace(['_', '.'], "-"), version, &[])
}

fn classifiers(headers: &str) -> Vec<&str> {
    let lines = headers.lines().filter_map(|line| line.strip_prefix("Classifier: ")?.strip_prefix(CLASSIFIER));
    lines.map(|name| name.strip_prefix("OSI Approved :: ").unwrap_or(name).trim()).collect()
}

/// What exactly one classifier says; several do not say whether all or any of them hold.
fn of_classifiers(headers: &str) -> Option<String> {
    let mut names = classifiers(headers);
    names.retain(|name| !["OSI Approved", "Other/Proprietary License", BSD].contains(name));
    match names[..] {
        [name] => licences::of_metadata(name),
        _ => None,
    }
}

/// An npm package from its `package.json`.
fn of_node(json: &str, path: &str) -> Option<Package> {
    let value: Value = serde_json::from_str(json.trim_start_matches('\u{feff}')).ok()?;
    let (name, version) = (value["name"].as_str()?, value["version"].as_str()?);
    let one = |value: &Value| value.as_str().or_else(|| value["type"].as_str()).and_then(licences::of_metadata);
    let licence = one(&value["license"]).or_else(|| {
        // An older form: any of the list.
        let all: Option<Vec<String>> = value["licenses"].as_array()?.iter().map(one).collect();
        Some(all?.join(" OR ")).filter(|text| !text.is_empty())
    });
    let author = &value["author"];
    Some(Package {
        kind: Kind::Npm,
        purl: npm(name, version),
        licence,
        supplier: author.as_str().or_else(|| author["name"].as_str()).filter(|text| !text.contains('\n')).map(str::to_owned),
        found: path.to_owned(),
        name: name.to_owned(),
        version: version.to_owned(),
    })
}

/// A package URL of npm: the scope is the namespace.
pub(super) fn npm(name: &str, version: &str) -> String {
    match name.split_once('/') {
        Some((scope, name)) => purl(Kind::Npm, Some(scope), name, version, &[]),
        None => purl(Kind::Npm, None, name, version, &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::purls;
    use super::*;

    #[test]
    fn python_projects() {
        let metadata = "Metadata-Version: 2.4\nName: My.Project_x\nVersion: 1.0\nLicense: a long\n text\nClassifier: License :: OSI Approved :: MIT License\n\nName: not this\n";
        let found = of_python(metadata, "p").unwrap();
        assert_eq!((found.name.as_str(), found.purl.as_str()), ("My.Project_x", "pkg:pypi/my-project-x@1.0"));
        assert_eq!(found.licence.as_deref(), Some("MIT"));
        let cases = [
            ("License-Expression: MIT AND PSF-2.0", Some("MIT AND PSF-2.0")),
            ("License: BSD-3-Clause", Some("BSD-3-Clause")),
            ("Classifier: License :: OSI Approved :: BSD License\nLicense: BSD 3-Clause", Some("BSD-3-Clause")),
            (
                "Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: OSI Approved :: Apache Software License",
                None,
            ),
            ("Classifier: License :: OSI Approved :: Apache Software License", Some("Apache-2.0")),
            ("Classifier: License :: OSI Approved :: BSD License", Some("LicenseRef-BSD-License")),
            ("License: UNKNOWN", None),
        ];
        for (line, expected) in cases {
            let found = of_python(&format!("Name: a\nVersion: 1\n{line}\n"), "p").unwrap();
            assert_eq!(found.licence.as_deref(), expected, "{line}");
        }
        assert_eq!(of_python("Name: a\n", "p"), None);
        assert_eq!(
            purls(&[
                ("usr/lib/python3/dist-packages/a-1.dist-info/METADATA", "Name: a\nVersion: 1\n"),
                ("usr/lib/python3/dist-packages/b.egg-info/PKG-INFO", "Name: b\nVersion: 2\n"),
                ("usr/lib/python3/dist-packages/c.egg-info", "Name: c\nVersion: 3\n"),
                ("usr/share/doc/METADATA", "Name: d\nVersion: 4\n"),
            ]),
            ["pkg:pypi/a@1", "pkg:pypi/b@2", "pkg:pypi/c@3"]
        );
    }

    #[test]
    fn node_modules() {
        let package = |name: &str| format!(r#"{{"name":"{name}","version":"1.2.3","license":"MIT"}}"#);
        let files = [
            ("app/package.json", package("app")),
            ("app/node_modules/a/package.json", package("a")),
            ("app/node_modules/a/lib/package.json", package("inner")),
            ("app/node_modules/a/node_modules/b/package.json", package("b")),
            ("app/node_modules/@s/c/package.json", package("@s/c")),
            ("app/node_modules/@s/package.json", package("no")),
            ("app/node_modules/broken/package.json", "{".into()),
            ("usr/share/nodejs/d/package.json", package("d")),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (*path, text.as_str())).collect();
        assert_eq!(purls(&files), ["pkg:npm/%40s/c@1.2.3", "pkg:npm/a@1.2.3", "pkg:npm/b@1.2.3"]);
        let cases = [
            (r#""license": {"type": "ISC"}"#, Some("ISC")),
            (r#""licenses": [{"type": "MIT"}, {"type": "Apache-2.0"}]"#, Some("MIT OR Apache-2.0")),
            (r#""license": "UNLICENSED""#, None),
        ];
        for (line, expected) in cases {
            let found = of_node(&format!(r#"{{"name":"a","version":"1",{line}}}"#), "p").unwrap();
            assert_eq!(found.licence.as_deref(), expected, "{line}");
        }
    }
}
