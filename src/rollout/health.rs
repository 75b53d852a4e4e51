//! How instances do: when to ask one again, and what its answers come to.
//!
//! Nobody knows how long a program takes to listen, so until it answers at all it is asked every 50 to 100 ms; only answers
//! that say no let the pauses grow, to a second. One that was healthy falls ill with the second failure in a row. Behind a
//! forwarder of a machine a connection says nothing (DESIGN section 7, contract 5): there only an answer counts.

use std::time::Duration;

use super::generation::Program;
use crate::config::types::{HealthCheck, Target};

/// First and longest pause while nobody answers.
const SILENT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(100));
/// First and longest pause after answers that say no.
const BAD: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// Pause between two questions to one that is well.
const WELL: Duration = Duration::from_secs(1);
/// The same where a program has to be started for it.
const WELL_COMMAND: Duration = Duration::from_secs(5);
/// Failures in a row that make ill what was well.
const FAILURES: u32 = 2;
/// Bytes of an answer's first line that are looked at.
pub const STATUS_LINE_MAX: usize = 1024;
/// Longest time an answer may take.
pub const ANSWER: Duration = Duration::from_secs(5);

/// What an instance is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// Whether its program runs: it has no port.
    Runs,
    /// A connection to its port.
    Tcp,
    /// Any answer in HTTP at all.
    Any,
    /// A GET of this path that is answered with 200 to 399.
    Http(String),
    /// A command beside the program.
    Command(Vec<String>),
}

impl Check {
    /// What is asked of `program` in a target of this kind.
    pub fn of(program: &Program, target: &Target) -> Self {
        let forwarded = matches!(target, Target::Vm(_));
        match (program.health.as_ref().map(|health| &health.check), program.port) {
            (Some(HealthCheck::Command(words)), _) => Self::Command(words.clone()),
            (_, None) => Self::Runs,
            (Some(HealthCheck::Http(path)), Some(_)) => Self::Http(path.clone()),
            (Some(HealthCheck::Tcp) | None, Some(_)) => {
                if forwarded {
                    Self::Any
                } else {
                    Self::Tcp
                }
            }
        }
    }

    /// The request that is sent, where one is.
    pub fn request(&self) -> Option<String> {
        let path = match self {
            Self::Any => "/",
            Self::Http(path) => path,
            _ => return None,
        };
        Some(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nuser-agent: pipeline-health\r\nconnection: close\r\n\r\n"))
    }

    /// What the first line of an answer says.
    pub fn judge(&self, line: &[u8]) -> Answer {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end();
        let Some(status) = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse::<u16>().ok()) else {
            let start: String = line.chars().take(40).filter(|c| !c.is_control()).collect();
            return match start.is_empty() {
                true => Answer::Silent("the connection ended without an answer".into()),
                false => Answer::Bad(format!("answered `{start}`, which is not HTTP")),
            };
        };
        match self {
            Self::Http(path) if !(200..400).contains(&status) => Answer::Bad(format!("{path} answered with status {status}")),
            _ => Answer::Good,
        }
    }
}

/// What came of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Good,
    /// The program says no; why.
    Bad(String),
    /// Nobody answers; why.
    Silent(String),
}

/// How one instance did so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pulse {
    /// `None`: it was not asked yet.
    pub healthy: Option<bool>,
    /// Steady time since when it is not.
    pub ill_since: Option<u64>,
    /// What it said last, when that was not good.
    pub last: Option<String>,
    /// Failures in a row, and when the first was.
    failures: u32,
    first_failure: u64,
    pause: Duration,
}

impl Pulse {
    /// Takes an answer to `check`; whether that changed how it does.
    pub fn heard(&mut self, check: &Check, answer: &Answer, steady: u64) -> bool {
        let before = self.healthy;
        let (first, longest, why) = match answer {
            Answer::Good => {
                let pause = if matches!(check, Check::Command(_)) { WELL_COMMAND } else { WELL };
                *self = Self { healthy: Some(true), pause, ..Self::default() };
                return before != self.healthy;
            }
            Answer::Bad(why) => (BAD.0, BAD.1, why),
            Answer::Silent(why) => (SILENT.0, SILENT.1, why),
        };
        if self.failures == 0 {
            self.first_failure = steady;
            self.pause = first;
        } else {
            self.pause = (self.pause * 2).clamp(first, longest);
        }
        self.failures = self.failures.saturating_add(1);
        self.last = Some(why.clone());
        if self.healthy != Some(true) || self.failures >= FAILURES {
            self.healthy = Some(false);
            self.ill_since.get_or_insert(self.first_failure);
        }
        before != self.healthy
    }

    /// When to ask again.
    pub fn pause(&self) -> Duration {
        if self.pause.is_zero() { SILENT.0 } else { self.pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::{Health, Local, Vm};
    use crate::oci::digest::Digest;

    #[test]
    fn what_is_asked() {
        let http = || HealthCheck::Http("/up".into());
        let words = || vec!["true".to_owned()];
        let cases = [
            (None, None, [Check::Runs, Check::Runs]),
            (None, Some(80), [Check::Tcp, Check::Any]),
            (Some(HealthCheck::Tcp), Some(80), [Check::Tcp, Check::Any]),
            (Some(http()), Some(80), [Check::Http("/up".into()), Check::Http("/up".into())]),
            (Some(http()), None, [Check::Runs, Check::Runs]),
            (Some(HealthCheck::Command(words())), None, [Check::Command(words()), Check::Command(words())]),
        ];
        for (check, port, expected) in cases {
            let health = check.map(|check| Health { check, deadline: Duration::ZERO });
            let program = Program { artifact: Digest::of("x"), port, health, volumes: Vec::new() };
            let targets = [Target::Local(Local::default()), Target::Vm(Vm::default())];
            assert_eq!(targets.map(|target| Check::of(&program, &target)), expected);
        }
    }

    #[test]
    fn what_answers_say() {
        let http = Check::Http("/up".into());
        let bad = |text: &str| Answer::Bad(text.into());
        let silent = || Answer::Silent("the connection ended without an answer".into());
        let cases: [(&[u8], Answer, Answer); 8] = [
            (b"HTTP/1.1 200 OK\r\n", Answer::Good, Answer::Good),
            (b"HTTP/1.0 204\r\n", Answer::Good, Answer::Good),
            (b"HTTP/1.1 302 Found\r\n", Answer::Good, Answer::Good),
            (b"HTTP/1.1 199 X\r\n", bad("/up answered with status 199"), Answer::Good),
            (b"HTTP/1.1 400 Bad Request\r\n", bad("/up answered with status 400"), Answer::Good),
            (b"HTTP/1.1 503 \r\n", bad("/up answered with status 503"), Answer::Good),
            (b"", silent(), silent()),
            (b"SSH-2.0-x\r\n", bad("answered `SSH-2.0-x`, which is not HTTP"), bad("answered `SSH-2.0-x`, which is not HTTP")),
        ];
        for (line, expected, any) in cases {
            assert_eq!((http.judge(line), Check::Any.judge(line)), (expected, any), "{line:?}");
        }
    }

    #[test]
    fn pauses_grow_only_after_answers_that_failed() {
        let http = Check::Http("/up".into());
        let mut pulse = Pulse::default();
        let mut pauses = |answer: Answer, count: usize| -> Vec<u128> {
            let one = |_| {
                pulse.heard(&http, &answer, 0);
                pulse.pause().as_millis()
            };
            (0..count).map(one).collect()
        };
        assert_eq!(pauses(Answer::Silent("refused".into()), 4), [50, 100, 100, 100]);
        assert_eq!(pauses(Answer::Bad("status 503".into()), 6), [200, 400, 800, 1000, 1000, 1000]);
        assert_eq!(pauses(Answer::Silent("refused".into()), 1), [100]);
        assert_eq!(pauses(Answer::Good, 2), [1000, 1000]);
    }

    #[test]
    fn two_failures_make_ill_one_answer_makes_well() {
        let http = Check::Http("/up".into());
        let mut pulse = Pulse::default();
        let bad = Answer::Bad("status 500".into());
        let mut states = Vec::new();
        for (answer, steady) in [(&bad, 1), (&Answer::Good, 2), (&bad, 3), (&Answer::Good, 4), (&bad, 5), (&bad, 6), (&bad, 7)] {
            let changed = pulse.heard(&http, answer, steady);
            states.push((pulse.healthy, pulse.ill_since, changed));
        }
        let (well, ill) = (Some(true), Some(false));
        let expected = [
            (ill, Some(1), true),
            (well, None, true),
            (well, None, false),
            (well, None, false),
            (well, None, false),
            (ill, Some(5), true),
            (ill, Some(5), false),
        ];
        assert_eq!(states, expected);
        assert_eq!(pulse.last.as_deref(), Some("status 500"));
    }
}
