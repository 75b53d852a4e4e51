//! Points at which a test may end the process, as `kill -9` would.
//!
//! Every write, rename and mount of ours that changes something on disk passes
//! [`point`] just before and after. Off unless [`arm`] was called; then the Nth point kills.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

static REMAINING: AtomicI64 = AtomicI64::new(-1);
static PASSED: AtomicU64 = AtomicU64::new(0);

/// Kills this process with SIGKILL at the `nth` point passed from now (1 is the next one).
pub fn arm(nth: i64) {
    REMAINING.store(nth, Ordering::Relaxed);
}

/// How many points were passed so far.
pub fn passed() -> u64 {
    PASSED.load(Ordering::Relaxed)
}

/// A point named for what happens next to it.
pub fn point(_name: &'static str) {
    PASSED.fetch_add(1, Ordering::Relaxed);
    if REMAINING.load(Ordering::Relaxed) > 0 && REMAINING.fetch_sub(1, Ordering::Relaxed) == 1 {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The init of a process namespace is not reached by its own signals: end it as abruptly.
        #[expect(unsafe_code, reason = "_exit(2) runs nothing more of this process, as SIGKILL does")]
        unsafe {
            libc::_exit(137)
        }
    }
}
