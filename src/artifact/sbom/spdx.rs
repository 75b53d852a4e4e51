//! SPDX 2.3 as JSON (spdx.github.io/spdx-spec/v2.3), written and read back.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Inventory, Kind, Package, Subject, licences};
use crate::artifact::image;
use crate::error::Problem;
use crate::oci::digest::Digest;

const DOCUMENT: &str = "SPDXRef-DOCUMENT";
const ARTIFACT: &str = "SPDXRef-artifact";
const UNKNOWN: &str = "NOASSERTION";
/// Before the path a package was read from.
const FOUND: &str = "found at /";
/// Before the list of what was not read.
const UNREAD: &str = "not complete: not read were /";

/// The document; the same inventory and subject give the same bytes.
pub(super) fn encode(inventory: &Inventory, subject: &Subject) -> Result<Vec<u8>> {
    let hex = subject.digest.hex();
    let mut packages = vec![json!({
        "SPDXID": ARTIFACT,
        "name": subject.name,
        "versionInfo": subject.digest,
        "downloadLocation": UNKNOWN,
        "filesAnalyzed": false,
        "checksums": [{"algorithm": "SHA256", "checksumValue": hex}],
        "primaryPackagePurpose": "CONTAINER",
        "licenseConcluded": UNKNOWN,
        "licenseDeclared": UNKNOWN,
        "copyrightText": UNKNOWN,
    })];
    let mut relationships = vec![relationship(DOCUMENT, "DESCRIBES", ARTIFACT)];
    let mut texts = std::collections::BTreeMap::new();
    for package in &inventory.packages {
        let id = identifier(package);
        relationships.push(relationship(ARTIFACT, "CONTAINS", &id));
        for name in package.licence.iter().flat_map(|licence| licences::references(licence)) {
            texts.entry(name).or_insert_with(|| package.name.clone());
        }
        packages.push(of_package(package, &id));
    }
    let mut document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": DOCUMENT,
        "name": subject.name,
        // Unique, as the specification asks, and yet the same for the same artifact.
        "documentNamespace": format!("https://spdx.org/spdxdocs/{}-{hex}", subject.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-")),
        "creationInfo": {"created": subject.created, "creators": [format!("Tool: pipeline-{}", subject.tool_version)]},
        "packages": packages,
        "relationships": relationships,
    });
    if !texts.is_empty() {
        let texts: Vec<Value> = texts
            .iter()
            .map(|(id, package)| {
                let name = id.trim_start_matches("LicenseRef-");
                json!({"licenseId": id, "name": name, "extractedText": format!("The licence that the package {package} calls {name}; its text is with the package.")})
            })
            .collect();
        document["hasExtractedLicensingInfos"] = texts.into();
    }
    if !inventory.unread.is_empty() {
        document["comment"] = format!("{UNREAD}{}", inventory.unread.join(", /")).into();
    }
    Ok(serde_json::to_vec(&image::sorted(document))?)
}

fn relationship(from: &str, kind: &str, to: &str) -> Value {
    json!({"spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to})
}

/// Letters, digits, `.` and `-`; the digits of the package URL's digest make it unique.
fn identifier(package: &Package) -> String {
    let name: String = package.name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    format!("SPDXRef-{}-{name}-{}", package.kind, &Digest::of(&package.purl).hex()[..16])
}

fn of_package(package: &Package, id: &str) -> Value {
    let mut value = json!({
        "SPDXID": id,
        "name": package.name,
        "downloadLocation": UNKNOWN,
        "filesAnalyzed": false,
        "licenseConcluded": UNKNOWN,
        "licenseDeclared": package.licence.as_deref().filter(|licence| licences::is_valid(licence)).unwrap_or(UNKNOWN),
        "copyrightText": UNKNOWN,
        "sourceInfo": format!("{FOUND}{}", package.found),
        "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": package.purl}],
    });
    if !package.version.is_empty() {
        value["versionInfo"] = package.version.as_str().into();
    }
    if let Some(supplier) = &package.supplier {
        value["supplier"] = format!("Organization: {supplier}").into();
    }
    value
}

/// The inventory of a document written by [`encode`] for the artifact `digest`.
pub(super) fn parse(bytes: &[u8], digest: &Digest) -> Result<Inventory> {
    let document: Value = serde_json::from_slice(bytes).context("no JSON")?;
    let version = document["spdxVersion"].as_str().context("no SPDX document")?;
    anyhow::ensure!(version.starts_with("SPDX-2."), "a document of the version `{version}`, and 2 is known");
    let mut inventory = Inventory::default();
    let mut about = None;
    for package in document["packages"].as_array().into_iter().flatten() {
        if package["SPDXID"] == ARTIFACT {
            about = package["versionInfo"].as_str();
            continue;
        }
        inventory.packages.push(package_of(package)?);
    }
    if about != Some(digest.to_string().as_str()) {
        return Err(Problem::failed(format!("it is about {} and not about {digest}", about.unwrap_or("nothing"))).into());
    }
    let unread = document["comment"].as_str().and_then(|comment| comment.strip_prefix(UNREAD));
    inventory.unread = unread.into_iter().flat_map(|list| list.split(", /")).map(str::to_owned).collect();
    Ok(inventory)
}

fn package_of(value: &Value) -> Result<Package> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let references = value["externalRefs"].as_array().into_iter().flatten();
    let purl = references.filter(|it| it["referenceType"] == "purl").find_map(|it| it["referenceLocator"].as_str());
    let purl = purl.with_context(|| format!("a package without a package URL: {}", value["SPDXID"]))?;
    let kind = purl.strip_prefix("pkg:").and_then(|rest| rest.split('/').next());
    Ok(Package {
        kind: Kind::ALL
            .into_iter()
            .find(|known| Some(known.name()) == kind)
            .with_context(|| format!("a package of the unknown kind `{purl}`"))?,
        purl: purl.to_owned(),
        name: text("name").with_context(|| format!("`{purl}` without a name"))?,
        version: text("versionInfo").unwrap_or_default(),
        licence: text("licenseDeclared").filter(|licence| licence != UNKNOWN),
        supplier: text("supplier").and_then(|supplier| supplier.strip_prefix("Organization: ").map(str::to_owned)),
        found: text("sourceInfo").and_then(|found| found.strip_prefix(FOUND).map(str::to_owned)).unwrap_or_default(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One of everything a document may hold.
    pub fn example() -> (Inventory, Subject) {
        let package = |kind: Kind, name: &str, version: &str, licence: Option<&str>| Package {
            kind,
            name: name.into(),
            version: version.into(),
            purl: format!("pkg:{kind}/{}@{version}", name.replace('@', "%40")),
            licence: licence.map(str::to_owned),
            supplier: (kind == Kind::Deb).then(|| "A B <a@example.org>".to_owned()),
            found: "var/lib/x".into(),
        };
        let mut packages = vec![
            package(Kind::Deb, "libstdc++6", "1:2", Some("GPL-3.0-or-later AND LicenseRef-public-domain")),
            package(Kind::Deb, "base-files", "1", None),
            package(Kind::Npm, "@s/c", "1.0.0", Some("MIT")),
            package(Kind::Golang, "github.com/a/b", "", Some("LicenseRef-x")),
        ];
        packages.sort();
        let subject = Subject {
            name: "shop".into(),
            digest: Digest::of("shop"),
            created: "2026-11-21T13:00:00Z".into(),
            tool_version: "0.1.0".into(),
        };
        (Inventory { packages, unread: vec!["usr/lib/x".into(), "var/lib/rpm".into()] }, subject)
    }

    #[test]
    fn a_document_comes_back() {
        let (inventory, subject) = example();
        let bytes = encode(&inventory, &subject).unwrap();
        assert_eq!(bytes, encode(&inventory, &subject).unwrap());
        assert_eq!(parse(&bytes, &subject.digest).unwrap(), inventory);
        let document: Value = serde_json::from_slice(&bytes).unwrap();
        let references: Vec<&str> = document["hasExtractedLicensingInfos"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["licenseId"].as_str().unwrap())
            .collect();
        assert_eq!(references, ["LicenseRef-public-domain", "LicenseRef-x"]);
        let cases = [
            (parse(&bytes, &Digest::of("other")), "and not about"),
            (parse(b"{}", &subject.digest), "no SPDX document"),
            (parse(br#"{"spdxVersion":"SPDX-3.0"}"#, &subject.digest), "and 2 is known"),
        ];
        for (result, expected) in cases {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
