//! Machines that other programs start and stop, as libvirt's `virsh` in a script.
//!
//! | placeholder | stands for |
//! |---|---|
//! | `{id}` | the instance, `[a-z0-9-]` |
//! | `{disk}` | its disk, qcow2, over the release's; removed when it has stopped |
//! | `{base}` | the release's disk, raw, never to be written |
//! | `{memory}`, `{cpus}` | MiB and number |
//! | `{port}` | the app's port, or nothing |
//! | `{credentials}` | a folder in memory with a file for each systemd credential |
//! | `{volume}` | the disk of its volume, qcow2, or nothing |
//! | `{grace}` | seconds it has to end by itself (`stop`) |
//!
//! `start` returns when the machine runs, `stop` when it does not. `address` prints `ADDRESS` or `ADDRESS:PORT`, and fails
//! when the machine does not run.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cmd::Cmd;
use crate::error::Problem;

/// How long `address` may take: everybody waits for it.
pub const ADDRESS: Duration = Duration::from_secs(10);
/// How long `start` may take.
pub const START: Duration = Duration::from_secs(300);

/// The words with their placeholders filled in.
///
/// # Errors
/// A placeholder nobody knows.
pub fn fill(argv: &[String], values: &[(&str, String)]) -> Result<Vec<String>> {
    argv.iter().map(|word| fill_word(word, values)).collect()
}

fn fill_word(word: &str, values: &[(&str, String)]) -> Result<String> {
    let (mut text, mut rest) = (String::new(), word);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').unwrap_or(("", after));
        let Some((_, value)) = values.iter().find(|(known, _)| *known == name) else {
            let known: Vec<String> = values.iter().map(|(name, _)| format!("{{{name}}}")).collect();
            return Err(Problem::usage(format!("`{word}` has a placeholder that nobody knows"))
                .hint(format!("there are: {}", known.join(" ")))
                .into());
        };
        text = text + before + value;
        rest = after;
    }
    Ok(text + rest)
}

/// Runs a program to its end, within `limit`; its standard output.
pub fn run(argv: &[String], limit: Duration) -> Result<String> {
    anyhow::ensure!(!argv.is_empty(), Problem::usage("a command of the target is empty"));
    Cmd::new("timeout").args(["--kill-after=5", &limit.as_secs().max(1).to_string()]).args(argv).text()
}

/// What `address` printed.
///
/// # Errors
/// It is no address; it has no port and the app neither.
pub fn address(text: &str, port: Option<u16>) -> Result<SocketAddr> {
    let text = text.trim();
    if let Ok(whole) = text.parse() {
        return Ok(whole);
    }
    let address: IpAddr = text.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| {
        Problem::failed(format!("`address` of the target printed `{text}`, which is neither ADDRESS nor ADDRESS:PORT"))
    })?;
    Ok(SocketAddr::new(address, port.context("the app has no port, and `address` printed none")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders() {
        let values = [("id", "a-0".to_string()), ("disk", "/d/{id}".to_string())];
        let fill =
            |word: &str| fill(&[word.to_string()], &values).map(|words| words[0].clone()).map_err(|error| error.to_string());
        assert_eq!(fill("virsh"), Ok("virsh".into()));
        // A value is not looked at again.
        assert_eq!(fill("--name={id},{disk}}"), Ok("--name=a-0,/d/{id}}".into()));
        for wrong in ["{what}", "{", "{id", "{}"] {
            assert_eq!(fill(wrong), Err(format!("`{wrong}` has a placeholder that nobody knows")));
        }
    }

    #[test]
    fn addresses() {
        let cases = [
            ("192.168.122.7\n", Some("192.168.122.7:80")),
            ("192.168.122.7:8080", Some("192.168.122.7:8080")),
            ("[fd00::7]:8080", Some("[fd00::7]:8080")),
            ("fd00::7", Some("[fd00::7]:80")),
            ("", None),
            ("shop.test", None),
        ];
        for (text, expected) in cases {
            assert_eq!(address(text, Some(80)).ok(), expected.map(|text| text.parse().unwrap()), "{text}");
        }
        assert!(address("10.0.0.1", None).is_err());
    }
}
