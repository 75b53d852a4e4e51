//! The templates inside the binary: the folder `templates/`, as it was when the program was compiled.
//!
//! Names that end with `.tera` are rendered; everything else is taken as it is.

use anyhow::{Context as _, Result};
use include_dir::{Dir, include_dir};
use serde::Serialize;

/// The folder `templates/`.
static TEMPLATES: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/templates");

/// The text of the template `name`, like `host/modules.txt`.
///
/// # Errors
/// A bug of ours: no such file, or not UTF-8.
pub fn text(name: &str) -> Result<&'static str> {
    TEMPLATES
        .get_file(name)
        .and_then(include_dir::File::contents_utf8)
        .with_context(|| format!("the program has no template `{name}`"))
}

/// The template `name` with the fields of `values` in it; nothing is escaped.
///
/// # Errors
/// A template that is not one, or a field it wants and `values` has not: a bug of ours.
pub fn render(name: &str, values: &impl Serialize) -> Result<String> {
    let context = tera::Context::from_serialize(values).with_context(|| format!("the values of template `{name}`"))?;
    tera::Tera::one_off(text(name)?, &context, false).with_context(|| format!("cannot render template `{name}`"))
}

/// All files below the folder `name`: path from it, and bytes; sorted by path.
pub fn files(name: &str) -> Vec<(String, &'static [u8])> {
    fn collect(dir: &Dir<'static>, top: &str, found: &mut Vec<(String, &'static [u8])>) {
        for file in dir.files() {
            let path = file.path().to_string_lossy();
            found.push((path.trim_start_matches(top).trim_start_matches('/').to_string(), file.contents()));
        }
        for below in dir.dirs() {
            collect(below, top, found);
        }
    }
    let mut found = Vec::new();
    if let Some(dir) = TEMPLATES.get_dir(name) {
        collect(dir, name, &mut found);
    }
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_rendered_without_escaping() {
        let values =
            serde_json::json!({ "ports": [{ "protocol": "tcp", "ports": "22" }, { "protocol": "udp", "ports": "53-54" }] });
        let text = render("host/nftables.conf.tera", &values).unwrap();
        assert!(text.contains("\t\ttcp dport 22 accept\n\t\tudp dport 53-54 accept\n\t}"), "{text}");
        assert!(render("host/nftables.conf.tera", &serde_json::json!({})).is_err());
        assert!(super::text("nowhere").is_err());
        assert!(files("host/tree").iter().any(|(path, _)| path == "etc/fstab"));
    }
}
