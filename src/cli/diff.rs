//! `pipeline artifact diff`: what changed, in the form `rpm-ostree db diff` users know.

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Global, artifact, report, ui};
use crate::bake::contents::{Difference, Moved, contents, difference};

/// Files named when not all are asked for.
const SHOWN: usize = 20;

pub fn run(global: &Global, around: &ui::Surroundings, from: &str, to: &str, files: bool) -> Result<u8> {
    let (from_name, from) = artifact::find(&around.store, from)?;
    let (to_name, to) = artifact::find(&around.store, to)?;
    let look = |name: &str, digest| {
        contents(&around.store, digest, around.host.threads).with_context(|| format!("cannot look into `{name}`"))
    };
    let found = if from.digest == to.digest {
        Difference::default()
    } else {
        difference(&look(&from_name, &from.digest)?, &look(&to_name, &to.digest)?)
    };
    let side = |name: &str, digest| json!({"name": name, "digest": digest});
    let value = json!({"schema": 1, "from": side(&from_name, from.digest), "to": side(&to_name, to.digest), "difference": found});
    ui::answer(global, &value, || {
        let head = format!("from: {from_name} {}\nto:   {to_name} {}\n", from.digest, to.digest);
        if from.digest == to.digest { head + "they are the same\n" } else { head + &text(&found, files) }
    })?;
    Ok(0)
}

fn text(difference: &Difference, all: bool) -> String {
    let mut text = String::new();
    let mut section = |title: &str, rows: Vec<String>| {
        if !rows.is_empty() {
            text.push_str(&format!("{title}:\n"));
            rows.iter().for_each(|row| text.push_str(&format!("  {row}\n")));
        }
    };
    let moved = |rows: &[Moved]| rows.iter().map(|row| format!("{} {} -> {}", row.name, row.from, row.to)).collect();
    let named = |rows: &[(String, String)]| rows.iter().map(|(name, version)| format!("{name}-{version}")).collect();
    section("Upgraded", moved(&difference.upgraded));
    section("Downgraded", moved(&difference.downgraded));
    section("Removed", named(&difference.removed));
    section("Added", named(&difference.added));
    if difference.kernel_from != difference.kernel_to {
        let list = |kernels: &[String]| if kernels.is_empty() { "none".to_string() } else { kernels.join(", ") };
        section("Kernel", vec![format!("{} -> {}", list(&difference.kernel_from), list(&difference.kernel_to))]);
    }
    let files = [
        ("Files added", &difference.files_added),
        ("Files removed", &difference.files_removed),
        ("Files changed", &difference.files_changed),
    ];
    for (title, paths) in files {
        let shown = if all { paths.len() } else { SHOWN };
        let mut rows: Vec<String> = paths.iter().take(shown).map(|path| format!("/{path}")).collect();
        if paths.len() > shown {
            rows.push(format!("… and {} more; `--files` names them all", paths.len() - shown));
        }
        section(&format!("{title} ({})", paths.len()), rows);
    }
    if (difference.bytes_from, difference.bytes_to) != (0, 0) {
        text.push_str(&format!("Size: {} -> {}\n", report::bytes(difference.bytes_from), report::bytes(difference.bytes_to)));
    }
    text
}
