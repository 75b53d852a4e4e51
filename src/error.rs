//! What went wrong, for a person: one [`Problem`] with a kind, a message and hints.
//!
//! Flows use `anyhow` with context; where the user can act, the root of the chain is a
//! [`Problem`]. Its [`Kind`] is mapped once to an exit code, here.

use std::fmt;

/// Who has to act on a problem. The numbers are the program's exit codes (DESIGN, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Refused or failed as the user's input or code deserved.
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// A bug of ours.
    Bug = 70,
    /// Transient: network, a lock that is held, no space left. Trying again may help.
    Transient = 75,
}

/// A failure the user can act on: lower case, no full stop, names in backticks.
#[derive(Debug, Clone)]
pub struct Problem {
    pub kind: Kind,
    pub message: String,
    /// Next steps, each printed on a line of its own after `hint:`.
    pub hints: Vec<String>,
}

impl Problem {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hints: Vec::new() }
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    pub fn transient(message: impl Into<String>) -> Self {
        Self::new(Kind::Transient, message)
    }

    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Kind::Bug, message).hint("this is a bug in pipeline; please report it with the command line and this message")
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

/// Every [`Problem`] of a chain, outermost first. One attached as context is found through
/// `anyhow`'s own downcast only, one at the root through the chain.
fn problems(error: &anyhow::Error) -> Vec<&Problem> {
    let mut found: Vec<&Problem> = error.downcast_ref::<Problem>().into_iter().collect();
    for problem in error.chain().filter_map(|cause| cause.downcast_ref::<Problem>()) {
        if !found.iter().any(|known| std::ptr::eq(*known, problem)) {
            found.push(problem);
        }
    }
    found
}

/// The problem that decides what the error is.
pub fn problem(error: &anyhow::Error) -> Option<&Problem> {
    problems(error).into_iter().next()
}

/// The exit code of an error chain: the first [`Problem`]'s kind, 75 for a full disk, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match problem(error) {
        _ if is_disk_full(error) => Kind::Transient as u8,
        Some(problem) => problem.kind as u8,
        None => Kind::Failed as u8,
    }
}

/// All hints of the chain, outermost first.
pub fn hints(error: &anyhow::Error) -> Vec<String> {
    let mut hints: Vec<String> = problems(error).into_iter().flat_map(|problem| problem.hints.clone()).collect();
    if is_disk_full(error) {
        hints.insert(0, "free some space, or put the store and the work folder on a larger disk with `--root DIR`; `pipeline artifact prune` lists what can go".into());
    }
    hints
}

/// Whether the chain ends in `ENOSPC` or `EDQUOT`.
pub fn is_disk_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded))
            || cause.to_string().contains("No space left on device")
    })
}

/// The nearest of `names` to `wanted`, for hints: within a third of the length.
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (wanted.len() / 3).max(2);
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_first_problem() {
        let error = anyhow::Error::new(Problem::transient("mirror is down")).context("cannot build `notes`");
        assert_eq!(exit_code(&error), 75);
        let error = anyhow::Error::new(std::io::Error::from_raw_os_error(28)).context("cannot write blob");
        assert_eq!(exit_code(&error), 75);
        assert_eq!(exit_code(&anyhow::anyhow!("plain")), 1);
        let error = anyhow::anyhow!("broken").context(Problem::usage("not a layout").hint("look")).context("outer");
        assert_eq!((exit_code(&error), hints(&error)), (2, vec!["look".to_string()]));
    }

    #[test]
    fn nearest_name() {
        assert_eq!(nearest("triixe", ["trixie", "bookworm"]), Some("trixie"));
        assert_eq!(nearest("zzz", ["trixie", "bookworm"]), None);
    }
}
