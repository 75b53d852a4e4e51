//! CycloneDX 1.6 as JSON (ECMA-424).

use anyhow::Result;
use serde_json::{Value, json};

use super::{Inventory, Package, Subject, licences};
use crate::artifact::image;
use crate::oci::digest::Digest;

/// Names of our own properties (CycloneDX property taxonomy: a namespace before the colon).
const FOUND: &str = "pipeline:found";
const UNREAD: &str = "pipeline:unread";

/// The document; the same inventory and subject give the same bytes.
pub(super) fn encode(inventory: &Inventory, subject: &Subject) -> Result<Vec<u8>> {
    let reference = format!("artifact:{}", subject.digest);
    let components: Vec<Value> = inventory.packages.iter().map(component).collect();
    let complete = if inventory.unread.is_empty() { "complete" } else { "incomplete" };
    let mut artifact = json!({
        "type": "container",
        "bom-ref": reference,
        "name": subject.name,
        "version": subject.digest,
        "hashes": [{"alg": "SHA-256", "content": subject.digest.hex()}],
    });
    if !inventory.unread.is_empty() {
        let unread: Vec<Value> = inventory.unread.iter().map(|path| json!({"name": UNREAD, "value": path})).collect();
        artifact["properties"] = unread.into();
    }
    let document = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": format!("urn:uuid:{}", uuid(&subject.digest)),
        "version": 1,
        "metadata": {
            "timestamp": subject.created,
            "tools": {"components": [{"type": "application", "name": "pipeline", "version": subject.tool_version}]},
            "component": artifact,
        },
        "components": components,
        "compositions": [{"aggregate": complete, "assemblies": [reference]}],
    });
    Ok(serde_json::to_vec(&image::sorted(document))?)
}

/// A UUID of version 8 that follows from the artifact (RFC 9562, section 5.8).
fn uuid(digest: &Digest) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.bytes()[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn component(package: &Package) -> Value {
    let mut value = json!({
        "type": "library",
        "bom-ref": package.purl,
        "name": package.name,
        "purl": package.purl,
        "properties": [{"name": FOUND, "value": package.found}],
    });
    if !package.version.is_empty() {
        value["version"] = package.version.as_str().into();
    }
    if let Some(supplier) = &package.supplier {
        value["supplier"] = json!({"name": supplier});
    }
    if let Some(licence) = &package.licence {
        value["licenses"] = json!([choice(licence)]);
    }
    value
}

/// One of SPDX's by id, another one by name, anything joined as an expression.
fn choice(expression: &str) -> Value {
    match licences::names(expression).as_slice() {
        [name] if name == expression && !name.contains(' ') => match name.strip_prefix("LicenseRef-") {
            Some(name) => json!({"license": {"name": name}}),
            None => json!({"license": {"id": name}}),
        },
        _ => json!({"expression": expression}),
    }
}

#[cfg(test)]
mod tests {
    use super::super::spdx::tests::example;
    use super::*;

    #[test]
    fn the_document_follows_from_the_artifact() {
        let (inventory, subject) = example();
        let bytes = encode(&inventory, &subject).unwrap();
        assert_eq!(bytes, encode(&inventory, &subject).unwrap());
        let document: Value = serde_json::from_slice(&bytes).unwrap();
        let serial = document["serialNumber"].as_str().unwrap();
        assert_eq!((serial.len(), &serial[23..24]), (45, "8"));
        let licences: Vec<&Value> =
            document["components"].as_array().unwrap().iter().map(|component| &component["licenses"]).collect();
        let expected = [
            &Value::Null,
            &json!([{"expression": "GPL-3.0-or-later AND LicenseRef-public-domain"}]),
            &json!([{"license": {"id": "MIT"}}]),
            &json!([{"license": {"name": "x"}}]),
        ];
        assert_eq!(licences, expected);
        assert_eq!(document["compositions"][0]["aggregate"], "incomplete");
    }
}
