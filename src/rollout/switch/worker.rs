//! A worker: one thread with a runtime of its own, its connections, its copy of the table, its idle connections to instances.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::access::Buffer;
use super::connection::{self, Connection};
use super::table::Snapshot;
use super::{Inner, Listener};

/// How often time-outs and drains are looked at: they are this exact.
pub(super) const TICK: Duration = Duration::from_millis(200);
/// How far the connections of two workers may differ.
const UNEVEN: usize = 4;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Job {
    Listen(Listener, Accepting),
    Serve(Counted, std::net::TcpStream, SocketAddr, /* TLS */ bool),
}

/// What others see of a worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub index: usize,
    pub table: Mutex<Arc<Snapshot>>,
    pub log: Option<Buffer>,
    /// Grows with every request, so that idle instances take turns.
    pub turn: AtomicUsize,
    /// Connections it serves or will at once.
    load: AtomicUsize,
    connections: Mutex<Connections>,
    jobs: UnboundedSender<Job>,
}

#[derive(Debug, Default)]
struct Connections {
    slots: Vec<Option<Arc<Connection>>>,
    free: Vec<usize>,
}

impl Worker {
    pub fn new(index: usize, log: Option<Buffer>, jobs: UnboundedSender<Job>) -> Self {
        let (table, turn, load) = (Mutex::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        Self { index, table, log, turn, load, connections: Mutex::default(), jobs }
    }

    pub fn tell(&self, job: Job) {
        // A worker that ended serves nothing any more.
        let _ = self.jobs.send(job);
    }

    pub fn add_connection(&self, connection: Arc<Connection>) -> usize {
        let mut connections = lock(&self.connections);
        match connections.free.pop() {
            Some(slot) => {
                connections.slots[slot] = Some(connection);
                slot
            }
            None => {
                connections.slots.push(Some(connection));
                connections.slots.len() - 1
            }
        }
    }

    pub fn remove_connection(&self, slot: usize) {
        let mut connections = lock(&self.connections);
        connections.slots[slot] = None;
        connections.free.push(slot);
    }

    /// All connections that speak HTTP now.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        lock(&self.connections).slots.iter().flatten().cloned().collect()
    }

    /// Ends the connection that waits for a request the longest; false when none does.
    fn end_one_idle(&self) -> bool {
        let connections = lock(&self.connections);
        let idle = connections.slots.iter().flatten().filter_map(|connection| Some((connection.idle_since()?, connection)));
        idle.min_by_key(|(since, _)| *since).map(|(_, connection)| connection.kill()).is_some()
    }
}

/// Runs a worker on this thread until the switch stops.
pub(super) fn run(switch: Arc<Inner>, worker: Arc<Worker>, jobs: UnboundedReceiver<Job>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else {
        (switch.settings.told)("a worker of the switch has no runtime: the process has no file descriptors left");
        return;
    };
    let mut stop = switch.stop.subscribe();
    runtime.block_on(async {
        tokio::spawn(take_jobs(switch.clone(), worker.clone(), jobs));
        tokio::spawn(tick(switch.clone(), worker.clone()));
        let _ = stop.wait_for(|stop| *stop).await;
    });
    if let Some(log) = &worker.log {
        log.flush();
    }
    runtime.shutdown_background();
}

async fn take_jobs(switch: Arc<Inner>, worker: Arc<Worker>, mut jobs: UnboundedReceiver<Job>) {
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Listen(listener, accepting) => drop(tokio::spawn(accept(switch.clone(), worker.clone(), listener, accepting))),
            Job::Serve(counted, stream, peer, tls) => {
                if let Ok(stream) = TcpStream::from_std(stream) {
                    serve(counted, stream, peer, tls);
                }
            }
        }
    }
}

fn serve(counted: Counted, stream: TcpStream, peer: SocketAddr, tls: bool) {
    tokio::spawn(async move {
        connection::serve(counted.switch.clone(), counted.worker.clone(), stream, peer, tls).await;
        drop(counted);
    });
}

/// One worker that accepts, or will, at one listener; over when dropped, however that comes.
#[derive(Debug)]
pub(super) struct Accepting(Arc<Inner>);

impl Accepting {
    pub fn begin(switch: &Arc<Inner>) -> Self {
        switch.accepting.fetch_add(1, Ordering::SeqCst);
        Self(switch.clone())
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.accepting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Takes a connection out of the counts when it ends, however that is.
#[derive(Debug)]
pub(super) struct Counted {
    switch: Arc<Inner>,
    worker: Arc<Worker>,
}

impl Counted {
    /// One more connection: a tunnel, which its HTTP connection became.
    pub fn one_more(switch: &Arc<Inner>, worker: &Arc<Worker>) -> Self {
        switch.counters.connections.fetch_add(1, Ordering::Relaxed);
        worker.load.fetch_add(1, Ordering::Relaxed);
        Self { switch: switch.clone(), worker: worker.clone() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.switch.counters.connections.fetch_sub(1, Ordering::Relaxed);
        self.worker.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts until the switch closes; every connection goes to the worker that has the fewest.
async fn accept(switch: Arc<Inner>, worker: Arc<Worker>, listener: Listener, _accepting: Accepting) {
    let (name, tls) = (listener.name, listener.tls);
    let Ok(socket) = listener.socket.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener.socket))
    else {
        (switch.settings.told)(&format!("the listener `{name}` cannot be served"));
        return;
    };
    let mut closing = switch.closing.subscribe();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = closing.wait_for(Option::is_some) => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                make_room(&switch).await;
                hand_out(&switch, &worker, stream, peer, tls);
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            // No file descriptors left, most likely: what ends makes room.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// At the limit, ends connections that wait for a request until one more may be; those behind it wait in the kernel.
async fn make_room(switch: &Inner) {
    let is_full = || switch.counters.connections.load(Ordering::Relaxed) >= switch.settings.limits.connections as u64;
    if is_full() {
        switch.counters.full.fetch_add(1, Ordering::Relaxed);
    }
    while is_full() {
        switch.workers.iter().any(|worker| worker.end_one_idle());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn hand_out(switch: &Arc<Inner>, own: &Arc<Worker>, stream: TcpStream, peer: SocketAddr, tls: bool) {
    switch.counters.connections.fetch_add(1, Ordering::SeqCst);
    switch.counters.accepted.fetch_add(1, Ordering::Relaxed);
    let load = |worker: &Worker| worker.load.load(Ordering::Relaxed);
    let least =
        switch.workers.iter().min_by_key(|worker| load(worker)).filter(|least| load(least) + UNEVEN < load(own)).unwrap_or(own);
    least.load.fetch_add(1, Ordering::Relaxed);
    let counted = Counted { switch: switch.clone(), worker: least.clone() };
    if least.index == own.index {
        serve(counted, stream, peer, tls);
    } else if let Ok(stream) = stream.into_std() {
        least.tell(Job::Serve(counted, stream, peer, tls));
    }
}

/// Looks after time-outs, drains and idle connections.
async fn tick(switch: Arc<Inner>, worker: Arc<Worker>) {
    let mut every = tokio::time::interval(TICK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        every.tick().await;
        let now = switch.clock.tick();
        let pools = switch.pools();
        for view in pools.iter() {
            view.pool.tick(worker.index, now);
            view.instances.iter().for_each(|instance| instance.tick(worker.index, now, switch.settings.timeouts.idle_upstream));
        }
        // None of them is locked while it is ended.
        worker.connections().iter().for_each(|connection| connection.tick(now));
        worker.log.iter().for_each(Buffer::flush);
    }
}
