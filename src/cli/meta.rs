//! What the program says about itself: version, schema, completions, manual; and a hidden helper.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use serde_json::json;

use super::{Cli, Global, ui};
use crate::build::builder::Builder;
use crate::config::types::BuilderRef;
use crate::oci::compress::{Compression, LayerWriter};
use crate::oci::layer::{Anything, PackOptions, pack as pack_layer};

/// `--version`, with `--json` also what is inside the binary.
pub fn version(global: &Global) -> Result<u8> {
    let mut builders = serde_json::Map::new();
    for name in Builder::names() {
        if let Some(builder) = Builder::load(&BuilderRef::Embedded(name.to_string()))? {
            builders.insert(name.to_string(), json!(builder.digest()));
        }
    }
    let value = json!({"schema": 1, "version": env!("CARGO_PKG_VERSION"), "commit": env!("PIPELINE_COMMIT"), "builders": builders, "init": crate::disk::init::digest()});
    ui::answer(global, &value, || format!("pipeline {}\n", env!("PIPELINE_VERSION")))?;
    Ok(0)
}

#[derive(Debug, clap::Args)]
pub struct SchemaArgs {
    #[arg(value_enum, default_value = "pipeline")]
    of: SchemaOf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SchemaOf {
    /// The pipeline file.
    Pipeline,
    /// A file of vm-tests/.
    VmTest,
}

pub fn schema(args: &SchemaArgs) -> Result<u8> {
    let schema = match args.of {
        SchemaOf::Pipeline => crate::config::schema(),
        SchemaOf::VmTest => crate::vm::test::schema(),
    };
    print!("{}", serde_json::to_string_pretty(&schema)? + "\n");
    Ok(0)
}

#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    shell: clap_complete::Shell,
}

pub fn completions(args: &CompletionsArgs) -> Result<u8> {
    clap_complete::generate(args.shell, &mut Cli::command(), "pipeline", &mut std::io::stdout());
    Ok(0)
}

/// The manual page of the program, with every verb in it (roff, for `man -l -`).
pub fn man() -> Result<u8> {
    let mut command = Cli::command();
    command.build();
    let mut out = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        let man = clap_mangen::Man::new(verb.clone());
        out.extend_from_slice(format!(".SH \"PIPELINE {}\"\n", verb.get_name().to_uppercase()).as_bytes());
        man.render_description_section(&mut out)?;
        man.render_options_section(&mut out)?;
        for inner in verb.get_subcommands().filter(|inner| inner.get_name() != "help") {
            out.extend_from_slice(format!(".SS \"pipeline {} {}\"\n", verb.get_name(), inner.get_name()).as_bytes());
            out.extend_from_slice(format!("{}\n", inner.get_about().map(ToString::to_string).unwrap_or_default()).as_bytes());
        }
    }
    use std::io::Write as _;
    std::io::stdout().write_all(&out)?;
    Ok(0)
}

#[derive(Debug, clap::Args)]
pub struct PackArgs {
    dir: PathBuf,
    out: PathBuf,
}

/// Packs a folder the way a step's layer is packed, and says how long it took.
pub fn pack(args: &PackArgs) -> Result<u8> {
    let started = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut writer = LayerWriter::new(fs_err::File::create(&args.out)?, Compression::Zstd, threads);
    let options =
        PackOptions { dir: args.dir.clone(), lowers: vec![], epoch: 0, skip: vec![], skip_content: vec![], skip_empty: vec![] };
    pack_layer(&options, &mut writer, &mut Anything).context("cannot pack")?;
    let written = writer.finish()?;
    println!(
        "{}",
        json!({"diff_id": written.diff_id, "digest": written.digest, "size": written.size, "seconds": started.elapsed().as_secs_f64()})
    );
    Ok(0)
}
