#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a build script talks to cargo by printing")]
//! Tells the program the commit it is built from, and cargo what the embedded folders are.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=builders");
    println!("cargo:rerun-if-changed=templates");
    // A work tree made by `git worktree` has a file here, and its commit is asked for at each build.
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/refs/heads");
    // Without Git, as in a tarball, the version stands alone.
    let commit =
        Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok().filter(|output| output.status.success());
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default();
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let shown = if commit.is_empty() { version } else { format!("{version} ({commit})") };
    println!("cargo:rustc-env=PIPELINE_VERSION={shown}");
    println!("cargo:rustc-env=PIPELINE_COMMIT={commit}");
}
