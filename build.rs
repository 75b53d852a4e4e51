#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a build script talks to cargo by printing")]
//! Tells the program the commit it is built from, and cargo what the embedded folders are.

use std::env;
use std::path::Path;
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
    static_init();
}

/// Compiles the static program of a host (`init/`), which `src/disk/init.rs` embeds.
///
/// Its bytes depend on its sources and the compiler alone: paths are mapped, and it knows the version but
/// not the commit.
fn static_init() {
    println!("cargo:rerun-if-changed=init");
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let folder = Path::new(&variable("CARGO_MANIFEST_DIR")).join("init");
    let out = Path::new(&variable("OUT_DIR")).join("pipeline-init");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-name", "pipeline_init", "--crate-type", "bin", "--target", &variable("TARGET")]);
    // Static and at a fixed address, as small as it gets; the kernel starts it before there is a loader.
    for option in [
        "opt-level=s",
        "panic=abort",
        "lto=fat",
        "codegen-units=1",
        "strip=symbols",
        "target-feature=+crt-static",
        "relocation-model=static",
        "link-arg=-Wl,--build-id=none",
    ] {
        rustc.args(["-C", option]);
    }
    rustc.arg("--remap-path-prefix").arg(format!("{}=init", folder.display()));
    rustc.arg("-o").arg(&out).arg(folder.join("main.rs"));
    rustc.env("PIPELINE_INIT_VERSION", variable("CARGO_PKG_VERSION"));
    let status = rustc.status().unwrap_or_else(|error| panic!("rustc cannot be started: {error}"));
    assert!(status.success(), "init/main.rs was not compiled");
}
