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
    let out = std::env::var("OUT_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=init");
    let status = Command::new(std::env::var("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", "2024", "-C", "opt-level=s", "-C", "panic=abort", "-C", "codegen-units=1", "-C", "strip=symbols"])
        .args(["-C", "target-feature=+crt-static", "-C", "relocation-model=static", "--crate-name", "pipeline_init"])
        .env("PIPELINE_INIT_VERSION", std::env::var("CARGO_PKG_VERSION").unwrap_or_default())
        .args(["-o", &format!("{out}/pipeline-init"), "init/main.rs"])
        .status();
    assert!(status.is_ok_and(|status| status.success()), "init/ does not compile");
}
