//! What was counted for one pool: requests, errors, and how long answers took, in fixed memory.

use std::fmt;
use std::time::{Duration, Instant};

/// Parts of each power of two in a [`Histogram`]; the error of a quantile is below 1/16.
const PARTS: usize = 16;
/// Powers of two of microseconds above the first [`PARTS`] values: up to about an hour.
const OCTAVES: usize = 28;
const BUCKETS: usize = PARTS * (OCTAVES + 1);

/// Durations in log-linear buckets: below 16 µs exact, above with an error below 1/16. About 3.7 KiB.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    /// Of all that was recorded, microseconds.
    sum: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, sum: 0 }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram {{ count: {}, p50: {:?} ms, p99: {:?} ms }}", self.count, self.p50(), self.p99())
    }
}

fn bucket(micros: u64) -> usize {
    if micros < PARTS as u64 {
        return micros as usize;
    }
    let octave = 63 - micros.leading_zeros() as usize; // at least 4
    let part = (micros >> (octave - 4)) as usize & (PARTS - 1);
    ((octave - 3) * PARTS + part).min(BUCKETS - 1)
}

/// The smallest value, in microseconds, that is above the bucket.
fn above(bucket: usize) -> u64 {
    if bucket < PARTS {
        return bucket as u64 + 1;
    }
    let (octave, part) = (bucket / PARTS + 3, bucket % PARTS);
    (PARTS as u64 + part as u64 + 1) << (octave - 4)
}

impl Histogram {
    pub fn record(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(micros);
    }

    /// How many durations were recorded.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Of all durations.
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum)
    }

    /// The duration that the share `of` (0 to 1) of all do not exceed, rounded up to a bucket's end; `None` without any.
    pub fn quantile(&self, of: f64) -> Option<Duration> {
        if self.count == 0 {
            return None;
        }
        let rank = ((self.count as f64 * of).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Some(Duration::from_micros(above(index)));
            }
        }
        None
    }

    /// Median in milliseconds.
    pub fn p50(&self) -> Option<f64> {
        self.quantile(0.5).map(|took| took.as_secs_f64() * 1e3)
    }

    /// 99th percentile in milliseconds.
    pub fn p99(&self) -> Option<f64> {
        self.quantile(0.99).map(|took| took.as_secs_f64() * 1e3)
    }

    /// How many did not exceed `limit`, up to the width of a bucket.
    pub fn at_most(&self, limit: Duration) -> u64 {
        let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
        (0..BUCKETS).take_while(|index| above(*index) <= micros + 1).map(|index| self.buckets[index]).sum()
    }

    pub fn add(&mut self, other: &Histogram) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// What came after `earlier`, a state of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        Histogram {
            buckets: pairs.map(|(now, then)| now.saturating_sub(*then)).collect(),
            count: self.count.saturating_sub(earlier.count),
            sum: self.sum.saturating_sub(earlier.sum),
        }
    }
}

/// What one pool did since it was first in a table; everything but the three `…now` numbers only grows.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Requests it was given.
    pub requests: u64,
    /// Answers of 5xx, and requests that failed: no answer, or a body that broke off on the instance's side.
    pub errors: u64,
    /// Connections to an instance that could not be made.
    pub connect_failures: u64,
    /// Requests sent again, to another instance or over another connection, because they were never sent or could do no harm.
    pub retries: u64,
    /// Requests in flight now; WebSockets and event streams are not among them.
    pub in_flight: u64,
    /// WebSockets and other upgraded connections now.
    pub websockets: u64,
    /// Event streams (`text/event-stream`) now.
    pub streams: u64,
    /// Time from the request to the head of its answer.
    pub latency: Histogram,
    /// When it was given its first request, and its last.
    pub first: Option<Instant>,
    pub last_accepted: Option<Instant>,
}

impl Figures {
    /// What came after `earlier`, figures of the same pool; the numbers of what is in flight and the instants are those of now.
    #[must_use]
    pub fn since(&self, earlier: &Figures) -> Figures {
        Figures {
            requests: self.requests.saturating_sub(earlier.requests),
            errors: self.errors.saturating_sub(earlier.errors),
            connect_failures: self.connect_failures.saturating_sub(earlier.connect_failures),
            retries: self.retries.saturating_sub(earlier.retries),
            latency: self.latency.since(&earlier.latency),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        for micros in (0..5000).chain([1 << 20, (1 << 20) + 77, 1 << 31, u64::MAX / 2]) {
            let index = bucket(micros);
            assert!(index < BUCKETS);
            if index < BUCKETS - 1 {
                assert!(micros < above(index), "{micros} is below the end of its bucket");
                assert!(index == 0 || micros >= above(index - 1), "{micros} is not in the bucket before");
                assert!(above(index) as f64 <= (micros + 1) as f64 * 1.07, "{micros} is rounded by less than 1/16");
            }
        }
    }

    #[test]
    fn quantiles_and_differences() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.p50(), None);
        (1..=1000).for_each(|millis| histogram.record(Duration::from_millis(millis)));
        let earlier = histogram.clone();
        let (p50, p99) = (histogram.p50().unwrap(), histogram.p99().unwrap());
        assert!((500.0..535.0).contains(&p50) && (990.0..1060.0).contains(&p99), "{p50} {p99}");
        assert_eq!(histogram.at_most(Duration::from_secs(3600)), 1000);
        (0..10).for_each(|_| histogram.record(Duration::from_micros(3)));
        let later = histogram.since(&earlier);
        assert_eq!(
            (later.count(), later.sum(), later.quantile(1.0)),
            (10, Duration::from_micros(30), Some(Duration::from_micros(4)))
        );
    }
}
