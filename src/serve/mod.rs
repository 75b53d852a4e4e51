//! The daemon: brings what runs to what the ledger says, serves the requests, and tells about it.
//!
//! [`pass`] is the reconciler, [`work`] does what is slow, [`api`] answers on the unix socket, [`https`] lets others in to it,
//! [`show`] makes the answers, [`sockets`] keeps the listeners while one daemon takes the place of another. What it needs of the machine comes in as a
//! [`world::World`]. Instances are not its children: they go on when it ends, and the next one finds them by what their
//! targets list.

mod api;
pub mod https;
mod model;
mod pass;
mod show;
pub mod sockets;
mod work;
pub mod world;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};

use self::https::Door;
use self::model::{Dial, Shared};
use self::show::About;
use self::sockets::Wanted;
use self::world::World;
use crate::error::Problem;
use crate::rollout::state::{Folder, Loaded, State};
use crate::rollout::switch::{self, Listener, Switch};

/// How long what is in flight may take when the daemon ends.
const DRAIN: Duration = Duration::from_secs(30);
/// How long the lock of a daemon that is being replaced may take to be free.
const LOCK: Duration = Duration::from_secs(15);

/// How the daemon is wanted.
#[derive(Debug, Clone)]
pub struct Settings {
    pub version: String,
    /// Folder of the state: `STATE/rollout`.
    pub state: PathBuf,
    /// The socket of the API; the others are beside it.
    pub socket: PathBuf,
    /// Beside those of systemd. Empty with `replace`: those of the daemon before.
    pub listeners: Vec<Wanted>,
    pub replace: bool,
    /// Longest time between a decision made elsewhere and the look at it.
    pub poll: Duration,
    /// This executable, for the holder of the sockets.
    pub program: PathBuf,
    /// Whom the listeners called [`https::NAME`] let in.
    pub door: Door,
}

/// Serves until it is told to end.
///
/// `given`: listeners of systemd; then there is no holder. `ended` answers whether to end.
///
/// # Errors
/// Another daemon serves the same root; an address that cannot be had; a state of a newer pipeline.
pub fn run(
    settings: &Settings,
    world: Arc<dyn World>,
    given: Vec<Listener>,
    switch_settings: switch::Settings,
    dial: switch::Dialer,
    ended: &Arc<AtomicBool>,
) -> Result<()> {
    let run = settings.socket.parent().context("a socket in a folder")?.to_path_buf();
    fs_err::create_dir_all(&run)?;
    let (hold, replace) = (run.join("hold"), run.join("replace"));
    let folder = Folder::open(&settings.state)?;
    // Where systemd keeps them there is no holder: neither of ours nor of the daemon before.
    let by_systemd = !given.is_empty() || settings.replace && std::os::unix::net::UnixStream::connect(&hold).is_err();
    let (successor, held) = match settings.replace {
        true => {
            let (successor, listeners) = sockets::Successor::ask(&replace)?;
            (Some(successor), listeners)
        }
        false => (None, given),
    };
    let lock = lock(&folder.lock(), if successor.is_some() { LOCK } else { Duration::ZERO })?;
    let held = if held.is_empty() { sockets::take(&hold) } else { held };
    // Who takes over and is told no addresses for requests takes them all.
    let as_they_are = successor.is_some() && settings.listeners.iter().all(|wanted| wanted.name == https::NAME);
    let listeners = sockets::take_or_bind(held, &settings.listeners, by_systemd || as_they_are)?;
    let (doors, requests): (Vec<&Listener>, Vec<&Listener>) = listeners.iter().partition(|listener| listener.name == https::NAME);
    let door = if doors.is_empty() { None } else { Some(Arc::new(settings.door.ready()?)) };
    folder.sweep()?;
    let (state, read_only) = load(&folder, world.as_ref())?;
    let switch = Switch::new(switch_settings, dial.clone())?;
    let shared = Arc::new(Shared::new(world, switch.clone(), folder, Dial(dial), state, read_only));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let inside = runtime.enter();
    start(&shared, settings, ended, runtime.handle())?;
    // Nobody is sent anywhere before the table is known.
    runtime.block_on(first_pass(&shared));
    switch.serve(requests.into_iter().map(Listener::try_clone).collect::<Result<_>>()?)?;
    if !by_systemd
        && !listeners.is_empty()
        && let Err(error) = sockets::keep(&hold, &settings.program, &listeners)
    {
        shared.world.warn(&format!("nobody holds the sockets while the daemon is away: {error:#}"));
    }
    let shown =
        listeners.iter().map(|listener| Ok(format!("{} {}", listener.name, listener.address()?))).collect::<Result<Vec<_>>>()?;
    shown.iter().for_each(|listener| shared.world.note(&format!("listening: {listener}")));
    let about = About { version: settings.version.clone(), started: shared.world.now(), poll: settings.poll, listeners: shown };
    let api = api::bind(&settings.socket)?;
    let router = api::router(shared.clone(), Arc::new(about));
    let mut entrances = Vec::new();
    for (listener, door) in doors.into_iter().zip(door.iter().cycle()) {
        let socket = listener.try_clone()?.socket;
        entrances.push(runtime.spawn(https::serve(socket, door.clone(), router.clone(), shared.clone())));
    }
    let server = runtime.spawn(async move { axum::serve(api, router).await });
    if let Some(successor) = successor {
        successor.ready()?;
    }
    let replaced = Arc::new(AtomicBool::new(false));
    let held = Arc::new(Mutex::new(Some(lock)));
    succession(&shared, &replace, listeners, &held, &replaced)?;
    shared.world.ready();
    shared.world.note("serving");
    runtime.block_on(async {
        while !ended.load(Ordering::SeqCst) && !replaced.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        shared.model().resting = true;
        shared.wake();
        // Who comes now is the next daemon's.
        entrances.iter().for_each(tokio::task::JoinHandle::abort);
        if !replaced.load(Ordering::SeqCst) {
            sockets::quit(&hold);
            let _ = fs_err::remove_file(&settings.socket);
            let _ = fs_err::remove_file(&replace);
        }
        ended.store(true, Ordering::SeqCst);
        shared.world.note("ending: what is in flight is waited for, what runs goes on");
        switch.shutdown(DRAIN).await;
        server.abort();
    });
    // The thread that waits for a successor has it too, and is not waited for.
    *held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    drop(inside);
    runtime.shutdown_background();
    Ok(())
}

/// Starts the threads: one that syncs the ledger, one that reads it, one that reconciles.
fn start(shared: &Arc<Shared>, settings: &Settings, ended: &Arc<AtomicBool>, handle: &tokio::runtime::Handle) -> Result<()> {
    let poll = settings.poll;
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name.into()).spawn(work).map(drop);
    let (owner, over) = (shared.clone(), ended.clone());
    let sync = move || {
        while !over.load(Ordering::SeqCst) {
            let synced = owner.world.sync();
            let mut model = owner.model();
            if let Err(error) = synced {
                let text = format!("{error:#}");
                if model.failed("sync") == 1 {
                    owner.world.warn(&format!("the ledger cannot be synced: {text}"));
                }
            } else {
                model.failed.remove("sync");
            }
            model.asked += 1;
            drop(model);
            owner.wake();
            std::thread::sleep(poll);
        }
    };
    spawn("ledger-sync", Box::new(sync)).context("cannot start a thread")?;
    let (owner, over) = (shared.clone(), ended.clone());
    spawn("ledger", Box::new(move || read(&owner, &over, poll))).context("cannot start a thread")?;
    let (owner, over, handle) = (shared.clone(), ended.clone(), handle.clone());
    let passes = move || {
        let _inside = handle.enter();
        pass::run(&owner, &|| over.load(Ordering::SeqCst));
    };
    spawn("reconciler", Box::new(passes)).context("cannot start a thread")
}

/// Reads the ledger whenever somebody asks, and each `poll`.
fn read(shared: &Arc<Shared>, ended: &AtomicBool, poll: Duration) {
    while !ended.load(Ordering::SeqCst) {
        let asked = shared.model().asked;
        let reading = shared.world.read();
        let mut model = shared.model();
        match reading {
            Ok(reading) => model.read(reading),
            Err(error) => {
                let text = format!("{error:#}");
                if model.reading_error.as_ref() != Some(&text) {
                    shared.world.warn(&format!("the ledger cannot be read: {text}"));
                }
                model.reading_error = Some(text);
            }
        }
        model.done = asked;
        shared.wake();
        let until = std::time::Instant::now() + poll;
        while model.asked == model.done && !ended.load(Ordering::SeqCst) {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                break;
            }
            model = shared.wait(model, left.min(Duration::from_millis(500)));
        }
    }
}

/// Waits until the ledger was read, the targets have told what runs, and a pass was made of that; no longer than a moment.
async fn first_pass(shared: &Shared) {
    let until = tokio::time::Instant::now() + Duration::from_secs(5);
    let mut passed = shared.passed.subscribe();
    loop {
        let knows = shared.model().knows;
        if knows || tokio::time::timeout_at(until, passed.changed()).await.is_err() {
            return;
        }
    }
}

/// Lets another daemon take over.
fn succession(
    shared: &Arc<Shared>,
    path: &Path,
    listeners: Vec<Listener>,
    held: &Arc<Mutex<Option<std::fs::File>>>,
    replaced: &Arc<AtomicBool>,
) -> Result<()> {
    let socket = sockets::socket(path)?;
    let (shared, held, replaced) = (shared.clone(), held.clone(), replaced.clone());
    let waits = move || {
        let rest = || {
            shared.model().resting = true;
            *held.lock().unwrap_or_else(PoisonError::into_inner) = None;
        };
        let again = || match self::lock(&shared.folder.lock(), LOCK) {
            Ok(lock) => {
                *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
                let mut model = shared.model();
                // Whoever looked has ended, and is started again.
                model.lists.clear();
                model.busy.retain(|name| !name.starts_with("ask "));
                model.resting = false;
                drop(model);
                shared.world.warn("the daemon that was to take over did not come up: this one goes on");
                shared.wake();
            }
            Err(error) => shared.world.warn(&format!("another daemon has the state: {error:#}")),
        };
        sockets::wait_for_successor(&socket, &listeners, &rest, &again);
        replaced.store(true, Ordering::SeqCst);
    };
    std::thread::Builder::new().name("succession".into()).spawn(waits).context("cannot start a thread")?;
    Ok(())
}

/// The lock of the state, with our process id in it.
///
/// # Errors
/// Another daemon has it, after `longest`.
fn lock(path: &Path, longest: Duration) -> Result<std::fs::File> {
    use fs_err::os::unix::fs::OpenOptionsExt as _;
    let until = std::time::Instant::now() + longest;
    let file = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?.into_file();
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if std::time::Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs_err::read_to_string(path).unwrap_or_default();
                let problem = Problem::failed(format!("a daemon serves this root already: process {}", pid.trim()));
                return Err(problem.hint("`pipeline serve --replace` takes over from it without losing a request").into());
            }
            Err(error) => return Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
        }
    }
    file.set_len(0)?;
    (&file).write_all(format!("{}\n", std::process::id()).as_bytes())?;
    Ok(file)
}

/// The state, or what can be made of it; and why nothing may change.
fn load(folder: &Folder, world: &dyn World) -> Result<(State, Option<String>)> {
    Ok(match folder.load()? {
        Loaded::Fresh => (State::default(), None),
        Loaded::Sound(state) => (state, None),
        Loaded::Corrupt { why, previous } => {
            let from = if previous.is_some() { "the copy before it" } else { "what runs" };
            let text = format!("the state of the rollouts is broken: {why}; what runs is held by {from}, and nothing changes");
            world.warn(&format!("{text}; move the file away and start again to let things change"));
            (previous.unwrap_or_default(), Some(text))
        }
    })
}

#[cfg(test)]
mod tests;
