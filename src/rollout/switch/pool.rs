//! A pool as the switch keeps it: who is in flight, what was counted, how it drains; and its instances.
//!
//! Everything is split by worker, so that a lock is only ever contended by a `set`, a look at the
//! figures, or the worker's own tick. A request is a [`Ticket`] from the moment it is given the
//! pool until the last byte of its answer is handed on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::figures::{Figures, Histogram};
use super::upstream::Upstream;
use super::{Drain, Draining};
use crate::rollout::target::Address;

/// First pause of an instance that could not be connected to; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// An HTTP/2 client that does not read one answer holds it; its whole connection is ended this long after the answer stalled,
const UNREAD_STALLED: Duration = Duration::from_secs(600);
/// or after the deadline of a drain.
const UNREAD_DRAINED: Duration = Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Milliseconds since the switch was made, moved on by the workers' ticks: exact enough for time-outs, and free.
#[derive(Debug)]
pub(super) struct Clock {
    start: Instant,
    millis: AtomicU64,
}

impl Clock {
    pub fn new() -> Self {
        Self { start: Instant::now(), millis: AtomicU64::new(1) }
    }

    pub fn tick(&self) -> u64 {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX) + 1;
        self.millis.fetch_max(now, Ordering::Relaxed);
        now
    }

    /// As of the last tick; never 0.
    pub fn now(&self) -> u64 {
        self.millis.load(Ordering::Relaxed)
    }
}

/// What a ticket is for; decides how it drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Request = 0,
    WebSocket = 1,
    Stream = 2,
}

/// Why a request has to end before it is done. The order is that of strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cut {
    No = 0,
    /// At the next border: between events, between frames.
    Gently = 1,
    /// Nothing moved for too long.
    Stalled = 2,
    /// The deadline of the drain is over.
    Now = 3,
}

impl Cut {
    fn from(value: u8) -> Self {
        match value {
            0 => Cut::No,
            1 => Cut::Gently,
            2 => Cut::Stalled,
            _ => Cut::Now,
        }
    }
}

/// One request, WebSocket or stream in flight. Dropping it takes it out of its pool.
#[derive(Debug)]
pub(super) struct Ticket {
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    worker: usize,
    slot: usize,
    instance: Option<Arc<Instance>>,
}

/// The part of a ticket the worker's tick sees.
#[derive(Debug)]
pub(super) struct Shared {
    kind: AtomicU8,
    cut: AtomicU8,
    /// When it counts as stalled, by the [`Clock`]; 0: never.
    deadline: AtomicU64,
    waker: Mutex<Option<Waker>>,
    /// Ended when the request does not end by itself: its client does not read.
    connection: Option<Arc<Connection>>,
}

impl Shared {
    fn cut(&self, cut: Cut) {
        if self.cut.fetch_max(cut as u8, Ordering::AcqRel) < cut as u8
            && let Some(waker) = lock(&self.waker).take()
        {
            waker.wake();
        }
    }
}

impl Ticket {
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub fn instance(&self) -> Option<&Arc<Instance>> {
        self.instance.as_ref()
    }

    /// Whether it has to end; `context` is woken when that changes.
    pub fn poll_cut(&self, context: &mut Context<'_>) -> Cut {
        {
            let mut waker = lock(&self.shared.waker);
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
        }
        Cut::from(self.shared.cut.load(Ordering::Acquire))
    }

    /// Whether it has to end, as of now.
    pub fn cut(&self) -> Cut {
        Cut::from(self.shared.cut.load(Ordering::Acquire))
    }

    /// It counts as stalled `within` from now, or never.
    pub fn expect_progress(&self, clock: &Clock, within: Option<Duration>) {
        let deadline = within.map_or(0, |within| clock.now() + within.as_millis() as u64);
        if self.shared.cut.load(Ordering::Relaxed) < Cut::Now as u8 {
            self.shared.deadline.store(deadline, Ordering::Relaxed);
        }
        // What moves again was only slow.
        let _ = self.shared.cut.compare_exchange(Cut::Stalled as u8, Cut::No as u8, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// It is a WebSocket or a stream from now on.
    pub fn becomes(&self, kind: Kind) {
        let before = self.shared.kind.swap(kind as u8, Ordering::AcqRel);
        let mut shard = self.pool.shard(self.worker);
        shard.kinds[before as usize] -= 1;
        shard.kinds[kind as usize] += 1;
    }

    /// It goes to `instance`, which is one busier as long as that is so.
    pub fn assign(&mut self, instance: Option<Arc<Instance>>) {
        if let Some(instance) = &instance {
            instance.in_flight.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(before) = std::mem::replace(&mut self.instance, instance) {
            before.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The head of its answer is there.
    pub fn answered(&self, method: u8, status: u16, took: Duration) {
        let mut shard = self.pool.shard(self.worker);
        shard.latency.record(took);
        shard.errors += u64::from(status >= 500);
        *shard.statuses.entry((method, status)).or_default() += 1;
    }

    /// It ended without an answer: the client went away.
    pub fn left(&self, method: u8) {
        *self.pool.shard(self.worker).statuses.entry((method, 499)).or_default() += 1;
    }

    /// The answer broke off on the instance's side.
    pub fn broke(&self) {
        self.pool.shard(self.worker).errors += 1;
    }

    pub fn connect_failed(&self) {
        self.pool.shard(self.worker).connect_failures += 1;
    }

    pub fn retried(&self) {
        self.pool.shard(self.worker).retries += 1;
    }

    /// A WebSocket ended with this close code.
    pub fn closed_with(&self, code: u16) {
        let mut shard = self.pool.shard(self.worker);
        // Codes come from the network: what is not registered is one.
        let code = if matches!(code, 1000..=1015) { code } else { 0 };
        *shard.closes.entry(code).or_default() += 1;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.assign(None);
        let mut shard = self.pool.shard(self.worker);
        shard.tickets[self.slot] = None;
        shard.free.push(self.slot);
        shard.kinds[self.shared.kind.load(Ordering::Acquire) as usize] -= 1;
    }
}

/// A pool's state at one worker.
#[derive(Debug, Default)]
struct Shard {
    tickets: Vec<Option<Arc<Shared>>>,
    free: Vec<usize>,
    /// By [`Kind`].
    kinds: [u64; 3],
    requests: u64,
    errors: u64,
    connect_failures: u64,
    retries: u64,
    cut: [u64; 3],
    latency: Histogram,
    first: Option<Instant>,
    last: Option<Instant>,
    /// By method and status.
    statuses: HashMap<(u8, u16), u64>,
    /// By WebSocket close code; 0 for all that have no name.
    closes: HashMap<u16, u64>,
}

/// A generation of a service.
#[derive(Debug)]
pub(super) struct Pool {
    pub service: String,
    pub name: String,
    shards: Box<[Mutex<Shard>]>,
    drain: Mutex<Option<(Instant, Drain)>>,
}

impl Pool {
    pub fn new(service: &str, name: &str, workers: usize) -> Self {
        let shards = (0..workers).map(|_| Mutex::default()).collect();
        Self { service: service.into(), name: name.into(), shards, drain: Mutex::default() }
    }

    fn shard(&self, worker: usize) -> MutexGuard<'_, Shard> {
        lock(&self.shards[worker])
    }

    /// Counts a request as one of the pool's. Called with the worker's table locked, so that no table changes meanwhile.
    pub fn enter(self: &Arc<Self>, worker: usize, connection: Option<Arc<Connection>>) -> Ticket {
        let shared = Arc::new(Shared {
            kind: AtomicU8::new(Kind::Request as u8),
            cut: AtomicU8::new(Cut::No as u8),
            deadline: AtomicU64::new(0),
            waker: Mutex::default(),
            connection,
        });
        let mut shard = self.shard(worker);
        let slot = shard.free.pop().unwrap_or_else(|| {
            shard.tickets.push(None);
            shard.tickets.len() - 1
        });
        shard.tickets[slot] = Some(shared.clone());
        shard.kinds[Kind::Request as usize] += 1;
        shard.requests += 1;
        let now = Instant::now();
        shard.first.get_or_insert(now);
        shard.last = Some(now);
        drop(shard);
        Ticket { shared, pool: self.clone(), worker, slot, instance: None }
    }

    /// It is live, or looked at: nothing is cut from now on.
    pub fn keep(&self) {
        *lock(&self.drain) = None;
    }

    /// It gets nothing any more. What is in flight ends as `drain` says, beginning now; the first call counts.
    pub fn drain(&self, drain: Drain, clock: &Clock) {
        lock(&self.drain).get_or_insert((Instant::now(), drain));
        let now = clock.tick();
        (0..self.shards.len()).for_each(|worker| self.tick(worker, now));
    }

    /// Whether it gets nothing any more.
    pub fn is_draining(&self) -> bool {
        lock(&self.drain).is_some()
    }

    /// Cuts what is over its time, among the tickets of `worker`. `now` is the clock's.
    pub fn tick(&self, worker: usize, now: u64) {
        let drain = *lock(&self.drain);
        let mut shard = self.shard(worker);
        let shard = &mut *shard;
        for (slot, shared) in shard.tickets.iter().enumerate() {
            let Some(shared) = shared else { continue };
            let deadline = shared.deadline.load(Ordering::Relaxed);
            if deadline != 0 && now > deadline {
                match Cut::from(shared.cut.load(Ordering::Acquire)) {
                    Cut::No | Cut::Gently => {
                        shared.deadline.store(now + UNREAD_STALLED.as_millis() as u64, Ordering::Relaxed);
                        shared.cut(Cut::Stalled);
                    }
                    Cut::Stalled | Cut::Now => shared.connection.iter().for_each(|connection| connection.kill()),
                }
            }
            let Some((since, drain)) = drain else { continue };
            let kind = shared.kind.load(Ordering::Acquire);
            let cut = due(kind, slot, since.elapsed(), &drain);
            let before = Cut::from(shared.cut.load(Ordering::Acquire));
            if cut > before {
                if cut == Cut::Now {
                    shared.deadline.store(now + UNREAD_DRAINED.as_millis() as u64, Ordering::Relaxed);
                }
                shared.cut(cut);
                shard.cut[kind as usize] += u64::from(before != Cut::Gently);
            }
        }
        // A burst long ago does not make every tick slow.
        while shard.tickets.len() > 64 && shard.tickets.last().is_some_and(Option::is_none) {
            let slot = shard.tickets.len() - 1;
            shard.tickets.pop();
            shard.free.retain(|free| *free != slot);
            if shard.tickets.len().is_multiple_of(64) {
                break;
            }
        }
    }

    /// What is left in flight.
    pub fn left(&self) -> Draining {
        let mut left = Draining::default();
        for shard in &self.shards {
            let kinds = lock(shard).kinds;
            left.requests += kinds[0];
            left.websockets += kinds[1];
            left.streams += kinds[2];
        }
        left
    }

    pub fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        for shard in &self.shards {
            let shard = lock(shard);
            figures.requests += shard.requests;
            figures.errors += shard.errors;
            figures.connect_failures += shard.connect_failures;
            figures.retries += shard.retries;
            figures.in_flight += shard.kinds[0];
            figures.websockets += shard.kinds[1];
            figures.streams += shard.kinds[2];
            figures.latency.add(&shard.latency);
            figures.first = [figures.first, shard.first].into_iter().flatten().min();
            figures.last_accepted = figures.last_accepted.max(shard.last);
        }
        figures
    }

    /// Requests by method and status, WebSockets by close code, and what drains cut by kind.
    pub fn counts(&self) -> (HashMap<(u8, u16), u64>, HashMap<u16, u64>, [u64; 3]) {
        let (mut statuses, mut closes, mut cut) = (HashMap::new(), HashMap::new(), [0; 3]);
        for shard in &self.shards {
            let shard = lock(shard);
            shard.statuses.iter().for_each(|(key, count)| *statuses.entry(*key).or_default() += count);
            shard.closes.iter().for_each(|(key, count)| *closes.entry(*key).or_default() += count);
            cut.iter_mut().zip(shard.cut).for_each(|(sum, count)| *sum += count);
        }
        (statuses, closes, cut)
    }
}

/// What a drain that began `since` ago asks of a ticket. Streams and WebSockets are spread evenly over `spread`.
fn due(kind: u8, slot: usize, since: Duration, drain: &Drain) -> Cut {
    if kind == Kind::Request as u8 {
        return if since >= drain.requests { Cut::Now } else { Cut::No };
    }
    // Multiples of the golden ratio, modulo 1, fill the interval evenly however many there are.
    let share = (slot as f64 * 0.618_033_988_749_895).fract();
    match () {
        () if since >= drain.streams => Cut::Now,
        () if since >= drain.spread.min(drain.streams).mul_f64(share) => Cut::Gently,
        () => Cut::No,
    }
}

/// One instance of a pool, with the connections to it that wait for a request.
#[derive(Debug)]
pub(super) struct Instance {
    pub id: String,
    pub address: Address,
    pub port: u16,
    in_flight: AtomicU32,
    failures: AtomicU32,
    /// Avoided until then, by the [`Clock`].
    avoided: AtomicU64,
    /// Its pool has it no more: somebody else may be at its address.
    gone: AtomicBool,
    /// By worker; the one used last is at the end.
    idle: Box<[Mutex<Vec<Upstream>>]>,
}

impl Instance {
    pub fn new(instance: &super::Instance, workers: usize) -> Self {
        Self {
            id: instance.id.clone(),
            address: instance.address.clone(),
            port: instance.port,
            in_flight: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            avoided: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            idle: (0..workers).map(|_| Mutex::default()).collect(),
        }
    }

    pub fn is(&self, other: &super::Instance) -> bool {
        self.id == other.id && self.address == other.address && self.port == other.port
    }

    /// A connection that waits, not idle for longer than `most`.
    pub fn take_idle(&self, worker: usize, now: u64, most: Duration) -> Option<Upstream> {
        let mut idle = lock(&self.idle[worker]);
        while let Some(upstream) = idle.pop() {
            if now.saturating_sub(upstream.idle_since) <= most.as_millis() as u64 && upstream.is_open() {
                return Some(upstream);
            }
        }
        None
    }

    pub fn put_idle(&self, worker: usize, upstream: Upstream, most: usize) {
        let mut idle = lock(&self.idle[worker]);
        if idle.len() < most {
            idle.push(upstream);
        }
    }

    /// Closes what waited for longer than `most`, and what the instance closed.
    pub fn tick(&self, worker: usize, now: u64, most: Duration) {
        let too_old = |upstream: &Upstream| now.saturating_sub(upstream.idle_since) > most.as_millis() as u64;
        lock(&self.idle[worker]).retain(|upstream| !too_old(upstream) && upstream.is_open());
    }

    pub fn connected(&self) {
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
            self.avoided.store(0, Ordering::Relaxed);
        }
    }

    /// It could not be connected to: avoided for a short while.
    pub fn failed(&self, now: u64) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(8);
        let pause = (FIRST_PAUSE * 2u32.pow(failures)).min(LONGEST_PAUSE);
        self.avoided.store(now + pause.as_millis() as u64, Ordering::Relaxed);
    }

    /// Nobody connects to it any more.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn is_avoided(&self, now: u64) -> bool {
        self.avoided.load(Ordering::Relaxed) > now
    }
}

/// The least busy instance that is neither avoided nor `tried`; when there is none, the least busy of the avoided ones
/// that are not tried. `turn` breaks ties, so that idle instances take turns.
pub(super) fn choose(instances: &[Arc<Instance>], tried: &[Arc<Instance>], now: u64, turn: usize) -> Option<Arc<Instance>> {
    let untried = |instance: &&Arc<Instance>| !tried.iter().any(|other| Arc::ptr_eq(other, instance));
    let around = instances.iter().cycle().skip(turn % instances.len().max(1)).take(instances.len());
    around.filter(untried).min_by_key(|instance| (instance.is_avoided(now), instance.in_flight.load(Ordering::Relaxed))).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(number: u16) -> Arc<Instance> {
        let address = Address::Tcp(([127, 0, 0, 1], number).into());
        Arc::new(Instance::new(&super::super::Instance { id: number.to_string(), address, port: number }, 1))
    }

    #[test]
    fn the_least_busy_instance_is_chosen() {
        let all = [instance(0), instance(1), instance(2)];
        let chosen = |tried: &[Arc<Instance>], now, turn| choose(&all, tried, now, turn).map(|instance| instance.port);
        assert_eq!((0..4).map(|turn| chosen(&[], 1, turn).unwrap()).collect::<Vec<_>>(), [0, 1, 2, 0], "idle ones take turns");
        all[0].in_flight.store(2, Ordering::Relaxed);
        all[1].in_flight.store(1, Ordering::Relaxed);
        assert_eq!(chosen(&[], 1, 0), Some(2));
        all[2].failed(1);
        assert_eq!(chosen(&[], 1, 0), Some(1), "a failing one is avoided");
        assert_eq!(chosen(&[], 1000, 0), Some(2), "for a while");
        assert_eq!(chosen(&all[..2], 1, 0), Some(2), "unless there is no other");
        assert_eq!(chosen(&all, 1, 0), None);
        all[2].failed(1000);
        assert!(all[2].is_avoided(1900) && !all[2].is_avoided(2100), "the second pause is twice as long");
        all[2].connected();
        assert!(!all[2].is_avoided(1001));
        assert!(choose(&[], &[], 1, 7).is_none());
    }

    #[test]
    fn draining_is_per_kind_and_spread() {
        let drain =
            Drain { requests: Duration::from_secs(30), streams: Duration::from_secs(60), spread: Duration::from_secs(40) };
        let at = |kind: Kind, slot, seconds| due(kind as u8, slot, Duration::from_secs(seconds), &drain);
        for (kind, slot, seconds, wanted) in [
            (Kind::Request, 0, 29, Cut::No),
            (Kind::Request, 0, 30, Cut::Now),
            (Kind::WebSocket, 0, 0, Cut::Gently),
            (Kind::WebSocket, 1, 24, Cut::No),
            (Kind::WebSocket, 1, 25, Cut::Gently),
            (Kind::Stream, 1, 59, Cut::Gently),
            (Kind::Stream, 1, 60, Cut::Now),
        ] {
            assert_eq!(at(kind, slot, seconds), wanted, "{kind:?} {slot} after {seconds} s");
        }
        let cut_after = |seconds| (0..1000).filter(|slot| at(Kind::Stream, *slot, seconds) == Cut::Gently).count();
        for (seconds, share) in [(10, 250), (20, 500), (30, 750), (40, 1000)] {
            assert!(cut_after(seconds).abs_diff(share) < 20, "{} of 1000 after {seconds} s", cut_after(seconds));
        }
    }

    #[test]
    fn a_ticket_is_counted_until_it_is_dropped() {
        let pool = Arc::new(Pool::new("shop/prod", "a", 2));
        let first = pool.enter(0, None);
        let second = pool.enter(1, None);
        second.becomes(Kind::Stream);
        assert_eq!(pool.left(), Draining { requests: 1, websockets: 0, streams: 1 });
        drop(first);
        assert_eq!(pool.left(), Draining { requests: 0, websockets: 0, streams: 1 });
        drop(second);
        assert_eq!((pool.left(), pool.figures().requests), (Draining::default(), 2));
    }
}
