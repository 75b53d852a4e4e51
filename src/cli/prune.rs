//! `pipeline artifact prune`: what nothing needs any more, the ledger asked.

use anyhow::{Context as _, Result};

use super::desk::Office;
use super::{Global, report, ui};
use crate::build::prune::{self, Needed};
use crate::build::{self};
use crate::release::desk;
use crate::release::ledger::Ledger;

/// Shows or removes what can go. With a ledger that is shared, what others decided is fetched first.
pub fn run(global: &Global, around: &ui::Surroundings, dry_run: bool, keep: usize) -> Result<u8> {
    // Packages stay while a lock file of this folder's pipelines names them.
    let mut locks = Vec::new();
    for name in crate::config::names(&around.cwd) {
        if let Ok(pipeline) = around.pipeline(Some(&name))
            && let Ok(Some(lock)) = build::lock::load(&pipeline.dir)
        {
            locks.push(lock);
        }
    }
    if ledger(around).join("ledger.git").exists()
        && let Ok(office) = Office::open_to_read(global, None)
    {
        office.sit(|desk| desk.sync(true))?;
    }
    let needed = || needed(around).context("nothing is removed, since the ledger says what is needed, and cannot be read");
    let pruned = prune::prune(&around.build(), keep, &locks, &needed, dry_run)?;
    ui::answer(global, &pruned, || {
        let mut text = String::new();
        for tag in &pruned.tags {
            text.push_str(&format!("tag {tag}\n"));
        }
        for item in pruned.unneeded.iter().filter(|item| item.bytes > 0) {
            text.push_str(&format!(
                "{} {} {}\n",
                item.kind,
                item.path.file_name().unwrap_or_default().to_string_lossy(),
                report::bytes(item.bytes)
            ));
        }
        for path in &pruned.in_use {
            text.push_str(&format!("in use, kept: {}\n", path.display()));
        }
        let verb = if dry_run { "would free" } else { "freed" };
        text + &format!("{verb} {} ({} items)\n", report::bytes(pruned.bytes), pruned.unneeded.len() - pruned.in_use.len())
    })?;
    Ok(0)
}

fn ledger(around: &ui::Surroundings) -> std::path::PathBuf {
    around.store.state("ledger")
}

/// What every environment of every pipeline in the ledger needs.
fn needed(around: &ui::Surroundings) -> Result<Needed> {
    let dir = ledger(around);
    let mut needed = Needed::default();
    if !dir.join("ledger.git").exists() {
        return Ok(needed);
    }
    let snapshot = Ledger::open(&dir.join("ledger.git"), &dir.join("seen.json"))?.snapshot()?;
    for name in snapshot.pipelines()? {
        let Some(loaded) = desk::load(&snapshot, &name)? else { continue };
        for (environment, state) in &loaded.states {
            let keep = loaded.policy.environments.get(environment).map_or(u32::MAX, |policy| policy.keep);
            needed.releases.extend(state.needed(keep));
        }
        needed.pipelines.insert(name);
    }
    Ok(needed)
}
