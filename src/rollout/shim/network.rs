//! The way out of a program's network: slirp4netns or pasta, whichever is installed.
//!
//! Each runs outside, as the user of the shim and bound to it, and makes a device in the program's network
//! namespace behind which it speaks for this machine. Nothing gets in this way; this machine's own
//! loopback is not reached either.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cmd::{self, Cmd};

/// slirp4netns' own name server (slirp4netns(1), "DNS": 10.0.2.3).
const SLIRP_NAME_SERVER: &str = "10.0.2.3";
/// The address of ours that pasta listens to for names and asks this machine's name server instead.
const PASTA_NAME_SERVER: &str = "169.254.53.53";
/// Until the device is there.
const READY: Duration = Duration::from_secs(10);

/// A way out that is open as long as this lives.
#[derive(Debug)]
pub struct Way {
    child: Child,
    name: &'static str,
    name_server: &'static str,
}

/// Opens a way out of the network of the unshare process `pid`; `Err` tells in one sentence why there is none.
pub fn open(pid: u32, path: &OsStr) -> Result<Way, String> {
    let mut why = Vec::new();
    for (name, start) in [("slirp4netns", slirp as fn(&Path, u32) -> Result<Way>), ("pasta", pasta)] {
        match cmd::find(name, path) {
            Some(program) => match start(&program, pid) {
                Ok(way) => return Ok(way),
                Err(error) => why.push(format!("{name}: {error:#}")),
            },
            None => why.push(format!("{name} is not installed")),
        }
    }
    Err(format!("no way out to the network: {}", why.join("; ")))
}

impl Way {
    /// Which program it is.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What resolv.conf(5) says inside: the way's name server and this machine's search list.
    pub fn resolv_conf(&self, own: &str) -> String {
        let keep = |line: &&str| ["search ", "domain ", "options "].iter().any(|start| line.starts_with(start));
        let kept: String = own.lines().filter(keep).map(|line| format!("{line}\n")).collect();
        format!("nameserver {}\n{kept}", self.name_server)
    }

    /// Whether it still runs.
    pub fn is_open(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn namespaces(pid: u32) -> (PathBuf, PathBuf) {
    (format!("/proc/{pid}/ns/net").into(), format!("/proc/{pid}/ns/user").into())
}

fn slirp(program: &Path, pid: u32) -> Result<Way> {
    let (net, user) = namespaces(pid);
    let (ready, theirs) = std::io::pipe().context("cannot make a pipe")?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&theirs).to_string();
    let child = Cmd::new(program)
        .args(["--configure", "--mtu=65520", "--disable-host-loopback", "--ready-fd"])
        .arg(number)
        .arg("--userns-path")
        .arg(user)
        .arg("--netns-type=path")
        .arg(net)
        .arg("tap0")
        .pass(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut way = Way { child, name: "slirp4netns", name_server: SLIRP_NAME_SERVER };
    let mut fds = [PollFd::new(&ready, PollFlags::IN)];
    let timeout = Timespec { tv_sec: i64::try_from(READY.as_secs())?, tv_nsec: 0 };
    poll(&mut fds, Some(&timeout)).context("cannot wait for it")?;
    let mut byte = [0; 1];
    if fds[0].revents().contains(PollFlags::IN) && rustix::io::read(&ready, &mut byte)? == 1 {
        drain(&mut way.child);
        return Ok(way);
    }
    Err(failed(way))
}

fn pasta(program: &Path, pid: u32) -> Result<Way> {
    let (net, user) = namespaces(pid);
    let mut command = Cmd::new(program)
        .args(["--config-net", "--foreground", "--quiet", "--no-map-gw", "--dns-forward", PASTA_NAME_SERVER])
        .args(["--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"])
        // Addresses as slirp4netns has them: with this machine's own, as pasta likes it, this machine is not reached.
        .args(["--ipv4-only", "--address", "10.0.2.100", "--netmask", "24", "--gateway", "10.0.2.2"])
        .args(["--ns-ifname", "tap0"]);
    if rustix::process::geteuid().is_root() {
        // It gives up root by itself, and then could not open the namespaces.
        command = command.args(["--runas", "0:0"]);
    }
    let command = command.arg("--userns").arg(user).arg("--netns").arg(net);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut way = Way { child, name: "pasta", name_server: PASTA_NAME_SERVER };
    let patience = Instant::now() + READY;
    while way.is_open() && Instant::now() < patience {
        if has_route(pid) {
            drain(&mut way.child);
            return Ok(way);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(failed(way))
}

/// Whether the network of a process has a route out (proc(5), /proc/net/route: a head line, one line a route).
fn has_route(pid: u32) -> bool {
    fs_err::read_to_string(format!("/proc/{pid}/net/route")).is_ok_and(|text| text.lines().count() > 1)
}

/// The last words of one that did not come up.
fn failed(mut way: Way) -> anyhow::Error {
    use std::io::Read as _;
    let _ = way.child.kill();
    let mut text = String::new();
    if let Some(mut stderr) = way.child.stderr.take() {
        let _ = stderr.read_to_string(&mut text);
    }
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim().to_string();
    anyhow::anyhow!(last)
}

/// Reads and forgets what it says from now on, so that it never waits for a reader.
fn drain(child: &mut Child) {
    if let Some(mut stderr) = child.stderr.take() {
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_installed_is_told() {
        let told = open(1, OsStr::new("/nonexistent"));
        // cmd::find looks into /usr/sbin and /sbin too, where neither is.
        assert_eq!(told.unwrap_err(), "no way out to the network: slirp4netns is not installed; pasta is not installed");
    }
}
