//! Wakes who waits for a machine: rung by the threads that read its console, QMP and guest channel.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A bell; clones ring the same one.
#[derive(Debug, Clone, Default)]
pub struct Bell(Arc<(Mutex<u64>, Condvar)>);

impl Bell {
    /// Something happened.
    pub fn ring(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.1.notify_all();
    }

    /// The number of rings so far; ask before looking at what may change.
    pub fn rings(&self) -> u64 {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when there were more than `seen` rings, or after `timeout`.
    pub fn wait(&self, seen: u64, timeout: Duration) {
        let guard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.1.wait_timeout_while(guard, timeout, |rings| *rings == seen));
    }
}
