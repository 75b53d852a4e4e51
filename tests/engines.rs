//! The targets `docker` and `vm` against the real thing: a Docker daemon of the test's own, a guest of the appliance; and
//! `pipeline serve` with machines.

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
#[allow(dead_code, reason = "the program has more than these tests need")]
#[path = "load/program.rs"]
mod load;
#[path = "engines/machine.rs"]
mod machine;
#[allow(dead_code, reason = "shared with another test")]
#[path = "rollout/place.rs"]
mod place;
#[path = "engines/served.rs"]
mod served;
