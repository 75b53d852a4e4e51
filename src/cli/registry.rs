//! `pipeline artifact push|pull|copy`: artifacts on their way to and from registries.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::{Global, artifact, report, ui};
use crate::artifact::remote;
use crate::build::base;
use crate::oci::registry::{Pushed, Reach, Reference};
use crate::progress::{Event, Outcome, Progress as _};

#[derive(Debug, clap::Args)]
pub struct PushArgs {
    /// NAME, NAME:TAG or a digest
    artifact: String,
    /// Where it goes, like registry.example/team/shop:1.4
    reference: Reference,
    /// A repository of the same registry that may hold some of the layers, like team/base: they are not sent then
    #[arg(long, value_name = "REPOSITORY")]
    mount_from: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct PullArgs {
    /// Like docker.io/library/debian:13
    reference: Reference,
    /// NAME:TAG it gets in the store (default: by the reference)
    name: Option<String>,
    /// Of an image for several platforms all of them, not linux/amd64's only
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
pub struct CopyArgs {
    /// Like registry.example/team/shop:1.4
    from: Reference,
    /// Like registry.example/live/shop:1.4
    to: Reference,
}

pub fn push(global: &Global, around: &ui::Surroundings, args: &PushArgs) -> Result<u8> {
    let (name, descriptor) = artifact::find(&around.store, &args.artifact)?;
    let registry = base::registry(&around.build())?;
    let pushed = told(around, &args.reference, &format!("push of {name}"), || {
        let mount_from = args.mount_from.clone();
        let pushed = remote::push(&around.store, &registry, &descriptor.digest, &args.reference, mount_from, &around.progress)?;
        let bytes = pushed.blobs.sent_bytes;
        Ok((pushed, bytes))
    })?;
    show(global, &json!({"schema": 1, "name": name, "pushed": pushed}), &pushed)
}

pub fn copy(global: &Global, around: &ui::Surroundings, args: &CopyArgs) -> Result<u8> {
    let registry = base::registry(&around.build())?;
    let pushed = told(around, &args.to, &format!("copy of {}", args.from), || {
        let pushed = registry.copy(&args.from, &args.to, &around.progress)?;
        let bytes = pushed.blobs.sent_bytes;
        Ok((pushed, bytes))
    })?;
    show(global, &json!({"schema": 1, "from": args.from.to_string(), "pushed": pushed}), &pushed)
}

pub fn pull(global: &Global, around: &ui::Surroundings, args: &PullArgs) -> Result<u8> {
    if let Some(name) = &args.name {
        artifact::check_tag(name)?;
    }
    let reach = if args.all { Reach::All } else { Reach::Machine };
    let registry = base::registry(&around.build())?;
    let pulled = told(around, &args.reference, "pull", || {
        let pulled = remote::pull(&around.store, &registry, &args.reference, args.name.as_deref(), reach, &around.progress)?;
        let bytes = pulled.fetched.bytes;
        Ok((pulled, bytes))
    })?;
    if pulled.fetched.left_out > 0 {
        let others = pulled.fetched.left_out;
        around.progress.note(format!("{others} entries for other platforms were left out; `--all` takes them along"));
    }
    let (name, digest) = pulled.names.first().map_or((String::new(), pulled.fetched.root.digest), Clone::clone);
    let names: Vec<_> = pulled.names.iter().map(|(name, digest)| json!({"name": name, "digest": digest})).collect();
    let value = json!({
        "schema": 1,
        "name": name,
        "digest": digest,
        "pinned": pulled.fetched.pinned,
        "names": names,
        "registry": pulled.fetched.registry,
        "attached": pulled.fetched.attached,
        "bytes": pulled.fetched.bytes,
    });
    ui::answer(global, &value, || {
        let names: String = pulled.names.iter().map(|(name, digest)| format!("{name} {digest}\n")).collect();
        let attached = pulled.fetched.attached.len();
        if attached == 0 { names } else { format!("{names}{attached} attached: signatures, SBOMs or reports\n") }
    })?;
    Ok(0)
}

fn show(global: &Global, value: &serde_json::Value, pushed: &Pushed) -> Result<u8> {
    ui::answer(global, value, || {
        let blobs = &pushed.blobs;
        let mut text = format!("{}\n", pushed.reference);
        if let Some(tag) = &pushed.tag {
            let was = match tag.before {
                Some(before) if before == tag.now => "stands already".into(),
                Some(before) => format!("moved from {}", before.short()),
                None => "new".into(),
            };
            text.push_str(&format!("tag {}: {was}\n", tag.name));
        }
        text.push_str(&format!(
            "blobs: {} sent ({}), {} mounted, {} there; {} attached\n",
            blobs.sent,
            report::bytes(blobs.sent_bytes),
            blobs.mounted,
            blobs.there,
            pushed.attached
        ));
        text
    })?;
    Ok(0)
}

/// Shows `work` as a step named for the reference; it answers its value and the bytes it moved.
fn told<T>(
    around: &ui::Surroundings,
    reference: &Reference,
    because: &str,
    work: impl FnOnce() -> Result<(T, u64)>,
) -> Result<T> {
    let (step, started) = (reference.to_string(), Instant::now());
    around.progress.event(Event::StepStart { step: step.clone(), because: because.into() });
    let result = work();
    let (outcome, bytes) = match &result {
        Ok((_, bytes)) => (Outcome::Ran, *bytes),
        Err(_) => (Outcome::Failed, 0),
    };
    around.progress.event(Event::StepEnd { step, outcome, seconds: started.elapsed().as_secs_f64(), bytes });
    around.progress.finish();
    Ok(result?.0)
}
