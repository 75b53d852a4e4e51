//! A machine for a person: its console on the terminal, or a shell in it by ssh.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Tools;
use super::machine::{End, Machine, Trouble};
use super::settings::Forward;
use super::work::Folder;
use crate::artifact::disk::App;
use crate::cmd::Cmd;
use crate::error::Problem;

/// Begins a command to us on the console, as in QEMU: ^A.
pub const ESCAPE: u8 = 1;
/// What can follow it.
pub const KEYS: &str = "^A x ends the machine, ^A p presses its power button, ^A r resets it, ^A ^A sends ^A, ^A h shows this";
/// How long a guest that panicked may take to restart itself; hosts of ours do after 5 s.
const RESTART: Duration = Duration::from_secs(30);
/// A guest that panics this often is given up: every slot had its three tries.
const PANICS: usize = 8;
/// How long the guest's ssh may take to answer.
const SSH: Duration = Duration::from_secs(600);
/// How long a guest may take to switch itself off when its ssh session is over.
const POWER_OFF: Duration = Duration::from_secs(120);
/// Lines of the console in an error.
const LINES: usize = 30;

/// What somebody typed to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Leave = 1,
    Power,
    Reset,
    Help,
}

/// How a machine's time on the terminal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The guest switched itself off.
    PowerOff,
    /// By ^A x.
    Key,
}

/// The ports that are forwarded: the wanted ones, and those of the disk's applications on the same number, where that is free.
pub fn forwards(wanted: &[Forward], apps: &[App]) -> Vec<Forward> {
    let mut forwards = wanted.to_vec();
    for guest in apps.iter().filter_map(|app| app.port) {
        if forwards.iter().all(|forward| forward.guest != guest) {
            let is_free = guest >= 1024
                && forwards.iter().all(|forward| forward.host != Some(guest))
                && std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, guest)).is_ok();
            forwards.push(Forward { host: is_free.then_some(guest), guest });
        }
    }
    forwards
}

/// Connects the console with the terminal until the machine ends or ^A x is typed. `input` is what is typed,
/// the console's text went to the sink the machine was prepared with. `say` shows a line to the person.
///
/// # Errors
/// The guest panicked and stays so; QEMU ended by itself; somebody asked to stop.
pub fn console(machine: &mut Machine<'_>, input: Option<std::fs::File>, say: &dyn Fn(&str)) -> Result<Left> {
    let pressed = Arc::new(AtomicU8::new(0));
    if let Some(input) = input {
        let keyboard = machine.keyboard()?;
        let keys = pressed.clone();
        // It ends with the process: a read from a terminal cannot be taken back.
        let copy = move || copy_keys(input, keyboard, &keys);
        std::thread::Builder::new().name("keyboard".into()).spawn(copy).context("cannot start a thread")?;
    }
    machine.panic_allowed = true;
    let forever = Instant::now() + Duration::from_secs(100 * 365 * 24 * 3600);
    let mut panic: Option<(String, Instant, usize)> = None;
    let mut panics = 0;
    let result = machine.wait(forever, |machine| {
        match pressed.swap(0, Ordering::SeqCst) {
            key if key == Key::Leave as u8 => return Ok(Some(Left::Key)),
            key if key == Key::Power as u8 => machine.press_power()?,
            key if key == Key::Reset as u8 => machine.press_reset()?,
            key if key == Key::Help as u8 => say(KEYS),
            _ => {}
        }
        if let Some(line) = machine.new_panic() {
            panics += 1;
            panic = Some((line, Instant::now(), machine.resets()));
        }
        if let Some((line, since, resets)) = &panic {
            let stays = machine.resets() == *resets && since.elapsed() > RESTART;
            if stays || panics >= PANICS {
                return Err(panicked(machine, line));
            }
        }
        Ok((machine.ended() == Some(End::PowerOff)).then_some(Left::PowerOff))
    });
    result.map_err(|trouble| explain(machine, trouble))
}

/// What the machine's end means, with the last of its console.
fn explain(machine: &Machine<'_>, trouble: Trouble) -> anyhow::Error {
    match trouble {
        Trouble::Failed(error) => error,
        other => Problem::failed(format!("{other}{}", last_lines(machine))).into(),
    }
}

fn panicked(machine: &Machine<'_>, line: &str) -> anyhow::Error {
    Problem::failed(format!("the guest panicked: {line}{}", last_lines(machine))).into()
}

fn last_lines(machine: &Machine<'_>) -> String {
    let lines = machine.console().last_lines(LINES);
    if lines.is_empty() {
        "; its console is empty".into()
    } else {
        format!("; the last lines of its console:\n  {}", lines.join("\n  "))
    }
}

/// Copies what is typed; what follows ^A is for us.
fn copy_keys(mut input: std::fs::File, mut keyboard: std::os::unix::net::UnixStream, pressed: &AtomicU8) {
    use std::io::Write as _;
    let mut escaped = false;
    let mut buffer = [0; 4096];
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let (text, key) = split_keys(&buffer[..read], &mut escaped);
        if let Some(key) = key {
            pressed.store(key as u8, Ordering::SeqCst);
        }
        if keyboard.write_all(&text).is_err() {
            return;
        }
    }
}

/// What of `bytes` is for the guest, and the last command to us.
fn split_keys(bytes: &[u8], escaped: &mut bool) -> (Vec<u8>, Option<Key>) {
    let (mut text, mut key) = (Vec::new(), None);
    for byte in bytes {
        if !std::mem::take(escaped) {
            *escaped = *byte == ESCAPE;
            if !*escaped {
                text.push(*byte);
            }
            continue;
        }
        match byte {
            b'x' | b'X' => key = Some(Key::Leave),
            b'p' | b'P' => key = Some(Key::Power),
            b'r' | b'R' => key = Some(Key::Reset),
            b'h' | b'H' | b'?' => key = Some(Key::Help),
            &ESCAPE | b'a' => text.push(ESCAPE),
            other => text.extend([ESCAPE, *other]),
        }
    }
    (text, key)
}

/// A key pair for one machine.
#[derive(Debug)]
pub struct KeyPair {
    /// The file of the private key.
    pub private: PathBuf,
    /// A line for `authorized_keys`.
    pub public: String,
}

/// Makes a key pair in `folder`.
///
/// # Errors
/// `ssh-keygen` is not installed or fails.
pub fn key_pair(tools: &Tools, folder: &Folder) -> Result<KeyPair> {
    let private = folder.path().join("ssh-key");
    let keygen = tools.other("ssh-keygen").ok_or_else(no_ssh)?;
    Cmd::new(keygen).args(["-q", "-t", "ed25519", "-N", "", "-C", "pipeline boot --ssh", "-f"]).arg(&private).run()?;
    let public = fs_err::read_to_string(private.with_extension("pub"))?.trim().to_owned();
    Ok(KeyPair { private, public })
}

fn no_ssh() -> Problem {
    Problem::failed("`ssh` is not installed")
        .hint("install it: Debian and Ubuntu `apt install openssh-client`, Fedora `dnf install openssh-clients`")
}

/// Waits until ssh answers on `port`, opens a session with the terminal attached, and when it is over asks the guest to
/// switch itself off. Returns ssh's exit status, which is the remote command's.
///
/// # Errors
/// ssh does not answer; the guest panics or ends before.
pub fn ssh(machine: &mut Machine<'_>, tools: &Tools, private: &Path, port: u16) -> Result<u8> {
    let ssh = tools.other("ssh").ok_or_else(no_ssh)?;
    let mut asked: Option<Instant> = None;
    let ready = machine.wait(Instant::now() + SSH, |_| {
        if asked.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            return Ok(None);
        }
        asked = Some(Instant::now());
        Ok(speaks_ssh(port).then_some(()))
    });
    match ready {
        Err(Trouble::TimedOut) => {
            let message = format!("ssh of the guest did not answer within {} s{}", SSH.as_secs(), last_lines(machine));
            return Err(Problem::failed(message).hint("does the host have `openssh-server` among its packages?").into());
        }
        result => result.map_err(|trouble| explain(machine, trouble))?,
    }
    let options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "GlobalKnownHostsFile=/dev/null",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "LogLevel=ERROR",
    ];
    let mut command = Cmd::new(ssh).args(["-F", "none", "-p", &port.to_string(), "-i"]).arg(private);
    for option in options {
        command = command.args(["-o", option]);
    }
    let inherit = std::process::Stdio::inherit;
    let command = command.arg("root@127.0.0.1").stdin(inherit()).stdout(inherit()).stderr(inherit());
    let mut child = command.spawn()?;
    let status = machine
        .wait(Instant::now() + Duration::from_secs(100 * 365 * 24 * 3600), |_| child.try_wait().context("cannot wait for ssh"));
    let status = match status {
        Ok(status) => status,
        Err(trouble) => {
            let _ = child.kill();
            let _ = child.wait();
            // The session may just have switched the machine off.
            if machine.ended() == Some(End::PowerOff) {
                return Ok(0);
            }
            return Err(explain(machine, trouble));
        }
    };
    if machine.is_running() {
        machine.press_power()?;
        // One that does not listen to its power button is ended by the caller.
        let _ = machine.wait(Instant::now() + POWER_OFF, |machine| Ok(machine.ended()));
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}

/// Behind a forwarder every connection is accepted, so only the server's first words count (RFC 4253, 4.2).
fn speaks_ssh(port: u16) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else { return false };
    let mut words = [0; 4];
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok() && stream.read_exact(&mut words).is_ok() && &words == b"SSH-"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_for_us_and_for_the_guest() {
        let cases: [(&[&[u8]], &[u8], Option<Key>); 6] = [
            (&[b"root\r\x03"], b"root\r\x03", None),
            (&[b"a\x01x"], b"a", Some(Key::Leave)),
            (&[b"a\x01", b"xb"], b"ab", Some(Key::Leave)),
            (&[b"\x01\x01\x01a"], b"\x01\x01", None),
            (&[b"\x01z"], b"\x01z", None),
            (&[b"\x01h", b"\x01p"], b"", Some(Key::Power)),
        ];
        for (pieces, expected, key) in cases {
            let mut escaped = false;
            let (mut text, mut last) = (Vec::new(), None);
            for piece in pieces {
                let (more, pressed) = split_keys(piece, &mut escaped);
                text.extend(more);
                last = pressed.or(last);
            }
            assert_eq!((text.as_slice(), last), (expected, key), "{pieces:?}");
        }
    }

    #[test]
    fn applications_get_their_own_port_where_it_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = taken.local_addr().unwrap().port();
        let app = |name: &str, port| App { name: name.into(), image: String::new(), port, health: None, uid_base: 0 };
        let apps = [app("a", Some(busy)), app("b", None), app("c", Some(80)), app("d", Some(22))];
        let wanted = [Forward { host: Some(2222), guest: 22 }];
        let expected =
            [Forward { host: Some(2222), guest: 22 }, Forward { host: None, guest: busy }, Forward { host: None, guest: 80 }];
        assert_eq!(forwards(&wanted, &apps), expected);
        drop(taken);
        assert_eq!(forwards(&[], &apps[..1]), [Forward { host: Some(busy), guest: busy }]);
    }
}
