//! The targets `docker` and `vm` against the real thing: a Docker daemon of the test's own, a guest of the appliance.

#![allow(clippy::disallowed_methods, reason = "the tests start the tools that are their witnesses")]
#![allow(clippy::print_stderr, reason = "what a failed test is told by")]

mod common;

#[allow(dead_code, reason = "shared with another test")]
#[path = "machines/disk.rs"]
mod disk;
#[path = "engines/docker.rs"]
mod docker;
#[path = "engines/image.rs"]
mod image;
#[path = "engines/machine.rs"]
mod machine;
