//! The two files that tell which kernel modules the initrd has and which devices ask for them.
//!
//! `/modules.list` has a line `NAME FILE DEPENDENCIES` for each module: the name, in which `-` and `_` are the same,
//! the file below `/modules`, the names of what must be loaded before, separated by commas, or `-`.
//! `/modules.alias` has the lines `alias PATTERN NAME` of the kernel's own `modules.alias` for these modules.

use std::collections::HashMap;

/// Lines of `/modules.list`.
pub fn parse_list(text: &str) -> HashMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (name, file) = (words.next()?.replace('-', "_"), words.next()?.to_string());
        let dependencies = words.next().filter(|word| *word != "-").unwrap_or_default();
        let dependencies = dependencies.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_"));
        Some((name, (file, dependencies.collect())))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(line).collect()
}

/// Lines of `/modules.alias`: pattern and module.
pub fn parse_aliases(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let mut words = line.strip_prefix("alias ")?.split_ascii_whitespace();
        Some((words.next()?.to_string(), words.next()?.replace('-', "_")))
    };
    text.lines().filter_map(line).collect()
}

/// Whether `text` fits a pattern of `*`, `?` and `[set]`, as in fnmatch(3).
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when it does not fit: after the last `*`, with one character more in it.
    let mut star: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            None if t == text.len() => return true,
            Some(b'?') if t < text.len() => Some(p + 1),
            Some(b'[') if t < text.len() => in_set(pattern, p, text[t]),
            Some(byte) if text.get(t) == Some(byte) => Some(p + 1),
            _ => None,
        };
        match (step, star) {
            (Some(next), _) => (p, t) = (next, t + 1),
            (None, Some((after, from))) if from < text.len() => {
                star = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
            _ => return false,
        }
    }
}

/// The place behind the set that starts at `at`, when `byte` is in it.
fn in_set(pattern: &[u8], at: usize, byte: u8) -> Option<usize> {
    let end = at + 1 + pattern[at + 1..].iter().position(|each| *each == b']')?;
    let mut set = &pattern[at + 1..end];
    while let [first, rest @ ..] = set {
        if let [b'-', last, rest @ ..] = rest {
            if (first..=last).contains(&&byte) {
                return Some(end + 1);
            }
            set = rest;
        } else if *first == byte {
            return Some(end + 1);
        } else {
            set = rest;
        }
    }
    None
}
