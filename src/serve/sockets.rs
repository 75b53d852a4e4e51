//! Listener sockets that outlive the daemon: the holder, and the hand-over to the next daemon.
//!
//! The holder is a tiny process that has a second handle of every listener. When the daemon is killed, connections wait in
//! the kernel's queue until the next one takes the same sockets from it. It ends when it is told to.
//!
//! ```text
//! RUN/hold     take\n → the listeners, or nothing · keep\n + listeners → ok\n · quit\n
//! RUN/replace  replace\n → the listeners; then ready\n → the old daemon drains and ends
//! ```

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::cmd::Cmd;
use crate::error::Problem;
use crate::rollout::switch::{Listener, listen};

/// How long the other side may take to say anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the user asked for: name, address, TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub name: String,
    pub address: SocketAddr,
    pub tls: bool,
}

/// The listeners in `held` that are wanted, by address and kind, and new ones for the rest; with `all` also what nobody
/// asked for.
pub fn take_or_bind(mut held: Vec<Listener>, wanted: &[Wanted], all: bool) -> Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for want in wanted {
        let is = |listener: &Listener| {
            // Port 0 was any port: the one that it became.
            let same = |found: SocketAddr| found == want.address || want.address.port() == 0 && found.ip() == want.address.ip();
            listener.tls == want.tls && listener.name == want.name && listener.address().is_ok_and(same)
        };
        let found = held.iter().position(is).map(|index| held.swap_remove(index));
        listeners.push(found.map_or_else(|| Listener::bind(&want.name, want.address, want.tls), Ok)?);
    }
    listeners.extend(held.into_iter().filter(|_| all));
    Ok(listeners)
}

/// What the holder at `path` has; nothing when there is none.
pub fn take(path: &Path) -> Vec<Listener> {
    let taken = || -> Result<Vec<Listener>> {
        let stream = connect(path)?;
        (&stream).write_all(b"take\n")?;
        listen::receive(&stream)
    };
    taken().unwrap_or_default()
}

/// Gives the holder at `path` the listeners, in place of those it has; one is started when there is none.
pub fn keep(path: &Path, program: &Path, listeners: &[Listener]) -> Result<()> {
    if UnixStream::connect(path).is_err() {
        start(path, program)?;
    }
    let stream = connect(path)?;
    (&stream).write_all(b"keep\n")?;
    listen::send(&stream, listeners)?;
    let mut answer = [0; 3];
    (&stream).read_exact(&mut answer).context("the holder of the sockets does not answer")
}

/// Ends the holder.
pub fn quit(path: &Path) {
    if let Ok(stream) = connect(path) {
        let _ = (&stream).write_all(b"quit\n");
        let _ = (&stream).read(&mut [0]);
    }
}

fn connect(path: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn start(path: &Path, program: &Path) -> Result<()> {
    let null = || {
        fs_err::File::options().read(true).write(true).open("/dev/null").map(|file| std::process::Stdio::from(file.into_file()))
    };
    let mut child = Cmd::new(program)
        .arg(VERB)
        .arg(path)
        .stdin(null()?)
        .stdout(null()?)
        .stderr(null()?)
        .spawn()
        .context("cannot start the holder of the sockets")?;
    // It is reaped when it ends before us.
    std::thread::Builder::new().name("holder".into()).spawn(move || child.wait())?;
    let until = Instant::now() + PATIENCE;
    while UnixStream::connect(path).is_err() {
        if Instant::now() > until {
            bail!(Problem::failed("the holder of the sockets does not come up"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The hidden verb of the holder.
pub const VERB: &str = "__hold";

/// The holder: `pipeline __hold PATH`. It stays when its parent goes.
pub fn hold(path: &Path) -> Result<()> {
    rustix::process::set_parent_process_death_signal(None).context("cannot stay without the daemon")?;
    let _ = rustix::process::setsid();
    let listener = socket(path)?;
    let mut held: Vec<Listener> = Vec::new();
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let _ = stream.set_write_timeout(Some(PATIENCE));
        match word(&stream).as_deref() {
            Ok("take") if !held.is_empty() => drop(listen::send(&stream, &held)),
            Ok("keep") => {
                if let Ok(listeners) = listen::receive(&stream) {
                    held = listeners;
                    let _ = (&stream).write_all(b"ok\n");
                }
            }
            Ok("quit") => {
                let _ = fs_err::remove_file(path);
                return Ok(());
            }
            _ => {}
        }
    }
    Ok(())
}

/// One line, byte by byte: what follows it may carry sockets.
fn word(stream: &UnixStream) -> Result<String> {
    let mut word = Vec::new();
    let mut byte = [0];
    while word.len() < 16 {
        (&*stream).read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&word).into_owned());
        }
        word.push(byte[0]);
    }
    bail!("no word")
}

/// A socket for this user alone, in place of one that a killed process left.
pub fn socket(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir)?;
    }
    let _ = fs_err::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("cannot make the socket `{}`", path.display()))?;
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The side of the new daemon.
#[derive(Debug)]
pub struct Successor(UnixStream);

impl Successor {
    /// Asks the daemon at `path` for its listeners. From its answer on it changes nothing any more, and goes on serving.
    ///
    /// # Errors
    /// There is none, or it does not let go.
    pub fn ask(path: &Path) -> Result<(Self, Vec<Listener>)> {
        let stream = connect(path).map_err(|error| {
            Problem::failed(format!("no daemon to replace answers at `{}`: {error}", path.display()))
                .hint("start it without `--replace`")
        })?;
        (&stream).write_all(b"replace\n")?;
        let listeners = listen::receive(&stream)?;
        Ok((Self(stream), listeners))
    }

    /// The new one serves: the old one may go.
    pub fn ready(self) -> Result<()> {
        (&self.0).write_all(b"ready\n").context("cannot tell the old daemon that it may go")
    }
}

/// The side of the old daemon: waits for a successor. `rest` lets go of the state; `again` takes it back when the successor
/// did not come up. Returns when one has taken over.
pub fn wait_for_successor(listener: &UnixListener, listeners: &[Listener], rest: &dyn Fn(), again: &dyn Fn()) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let _ = stream.set_read_timeout(Some(PATIENCE));
        if !word(&stream).is_ok_and(|word| word == "replace") {
            continue;
        }
        rest();
        // It may have much to look at before it is ready.
        let _ = stream.set_read_timeout(Some(PATIENCE * 6));
        let mut line = String::new();
        let sent = listen::send(&stream, listeners);
        if sent.is_ok() && BufReader::new(&stream).read_line(&mut line).is_ok() && line == "ready\n" {
            return;
        }
        again();
    }
}
