//! A command of this machine that a shim owns, as QEMU.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::StopBy;
use super::server::Job;
use super::supervisor::{Own, refuse};
use crate::cmd::Cmd;
use crate::rollout::target::Secret;
use crate::sandbox::Exit;

pub(super) struct Command {
    work: PathBuf,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    stop: StopBy,
    secrets: Vec<(String, Secret)>,
    path: OsString,
    output: OwnedFd,
    running: Option<(Child, OwnedFd)>,
    /// The command that asks it to end.
    asking: Option<Child>,
}

impl Command {
    pub(super) fn new(
        dir: &Path,
        argv: Vec<String>,
        env: Vec<(String, String)>,
        stop: StopBy,
        secrets: Vec<(String, Secret)>,
        path: &OsStr,
        output: OwnedFd,
    ) -> Self {
        let work = dir.join("work");
        Self { work, argv, env, stop, secrets, path: path.into(), output, running: None, asking: None }
    }

    fn command(&self, argv: &[String], output: &OwnedFd) -> Result<Cmd> {
        let mut files: Vec<OwnedFd> = Vec::new();
        let mut words = Vec::new();
        for word in argv {
            let mut word = word.replace("{work}", &self.work.to_string_lossy());
            for (name, secret) in &self.secrets {
                let place = format!("{{secret:{name}}}");
                if word.contains(&place) {
                    let file = in_memory(secret)?;
                    word = word.replace(&place, &format!("/proc/self/fd/{}", file.as_raw_fd()));
                    files.push(file);
                }
            }
            words.push(word);
        }
        let (program, rest) = words.split_first().context("a command")?;
        let mut cmd = Cmd::new(program).args(rest).env_clear().env("PATH", &self.path).dir(&self.work);
        for (name, value) in &self.env {
            cmd = cmd.env(name, value);
        }
        for file in files {
            cmd = cmd.pass(file);
        }
        Ok(cmd.stdout(Stdio::from(output.try_clone()?)).stderr(Stdio::from(output.try_clone()?)))
    }
}

/// A file that is nowhere but in memory, with the secret in it and read from its start.
fn in_memory(secret: &Secret) -> Result<OwnedFd> {
    use std::io::{Seek as _, Write as _};
    let file = rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC).context("cannot make a file in memory")?;
    let mut file = std::fs::File::from(file);
    file.write_all(secret.bytes()).and_then(|()| file.rewind()).context("cannot write a file in memory")?;
    Ok(file.into())
}

impl Own for Command {
    fn prepare(&mut self) -> Result<Vec<String>> {
        fs_err::create_dir_all(&self.work)?;
        Ok(Vec::new())
    }

    fn start(&mut self, output: &OwnedFd) -> Result<()> {
        let child = self.command(&self.argv, output)?.spawn()?;
        let pidfd =
            rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("cannot watch the command")?;
        self.running = Some((child, pidfd));
        Ok(())
    }

    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        self.running.iter().map(|(_, pidfd)| pidfd.as_fd()).collect()
    }

    fn look(&mut self) -> Result<Option<Exit>> {
        if let Some(asking) = &mut self.asking
            && !matches!(asking.try_wait(), Ok(None))
        {
            self.asking = None;
        }
        let Some((child, _)) = &mut self.running else { return Ok(None) };
        let Some(status) = child.try_wait().context("cannot wait for the command")? else { return Ok(None) };
        self.running = None;
        Ok(Some(match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(0)),
        }))
    }

    fn ask_to_end(&mut self) -> Result<()> {
        let Some((child, _)) = &self.running else { return Ok(()) };
        match &self.stop {
            StopBy::Signal(signal) => {
                let signal = Signal::from_named_raw(*signal).context("no such signal")?;
                rustix::process::kill_process(Pid::from_child(child), signal).context("cannot signal the command")
            }
            StopBy::Run(argv) => {
                self.asking = Some(self.command(argv, &self.output)?.spawn()?);
                Ok(())
            }
        }
    }

    fn kill(&mut self) -> Result<()> {
        match &mut self.running {
            Some((child, _)) => child.kill().context("cannot kill the command"),
            None => Ok(()),
        }
    }

    fn work(&mut self, job: Job) {
        if let Job::Beside { reply, .. } = job {
            refuse(&reply, "nothing can be run beside this instance");
        }
    }

    fn memory(&self) -> Option<u64> {
        let (child, _) = self.running.as_ref()?;
        super::program::memory_of(child.id(), 0)
    }

    fn remove(&mut self) -> Result<()> {
        if let Some((mut child, _)) = self.running.take() {
            let _ = child.kill();
            child.wait().context("cannot wait for the command")?;
        }
        if let Some(mut asking) = self.asking.take() {
            let _ = asking.kill();
            let _ = asking.wait();
        }
        match fs_err::remove_dir_all(&self.work) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}
