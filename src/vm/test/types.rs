//! A checked vm-test: no string here needs checking twice.

use std::path::PathBuf;
use std::time::Duration;

use crate::vm::http::Request;
use crate::vm::settings::{Board, Bus, Card, Credential, Disk, Firmware};

/// A vm-test.
#[derive(Debug, Clone, PartialEq)]
pub struct VmTest {
    /// The file's name without `.yaml`.
    pub name: String,
    pub file: PathBuf,
    pub disk: Option<DiskName>,
    pub machine: Hardware,
    /// At least one.
    pub firmware: Vec<Firmware>,
    pub allow_panic: bool,
    pub steps: Vec<Step>,
}

/// Which disk boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskName {
    Artifact(String),
    File(PathBuf),
}

/// The machine without its first disk and its firmware.
#[derive(Debug, Clone, PartialEq)]
pub struct Hardware {
    /// Of the first disk.
    pub bus: Bus,
    /// Of the first disk, in bytes.
    pub size: Option<u64>,
    pub disks: Vec<Disk>,
    pub board: Board,
    pub cpu: Option<String>,
    /// Bytes.
    pub memory: u64,
    pub cpus: u32,
    pub card: Card,
    pub credentials: Vec<Credential>,
    /// Ports of the guest, sorted, those of `http` steps included.
    pub forward: Vec<u16>,
    pub qemu: Vec<String>,
}

/// A step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// In the file, from 1.
    pub line: usize,
    /// For reports, like ``wait-for console `login:` ``.
    pub title: String,
    pub timeout: Duration,
    pub action: Action,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Boot,
    WaitFor(Condition),
    Http {
        port: u16,
        request: Request,
        status: u16,
        body: Expect,
    },
    Run {
        argv: Vec<String>,
        status: i32,
        stdout: Expect,
        stderr: Expect,
        save: Option<String>,
    },
    File {
        path: String,
        exists: bool,
        content: Expect,
        mode: Option<u32>,
        owner: Option<String>,
    },
    Write {
        path: String,
        text: String,
        mode: u32,
    },
    Type(String),
    Reboot {
        hard: bool,
        wait: Option<bool>,
    },
    PowerCut {
        start: bool,
    },
    PowerOff,
    /// The file's name, without a folder.
    Screenshot(String),
    Flip {
        disk: usize,
        partition: Option<Which>,
        place: Place,
    },
}

/// What is waited for.
#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    Console { text: String, count: u32 },
    Agent,
    Unit { name: String, state: String },
    Port(u16),
    Running,
    Command(Vec<String>),
    Panic,
    Off,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    Number(u32),
    Name(String),
}

/// A byte of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Offset(u64),
    /// The first of this text.
    Text(String),
}

/// What a text must be like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expect {
    /// Exactly this.
    pub equals: Option<String>,
    /// This, apart from line ends at the end.
    pub reads: Option<String>,
    pub contains: Option<String>,
    pub contains_not: Option<String>,
}

impl Expect {
    /// Whether anything is expected.
    pub fn is_anything(&self) -> bool {
        *self == Self::default()
    }

    /// What was expected of `text`, when it is otherwise; `fill` puts variables in.
    pub fn unmet(&self, text: &[u8], fill: &dyn Fn(&str) -> String) -> Option<String> {
        let holds =
            |wanted: &str| wanted.is_empty() || text.windows(wanted.len().max(1)).any(|window| window == wanted.as_bytes());
        let trimmed = String::from_utf8_lossy(text);
        let trimmed = trimmed.trim_end_matches(['\n', '\r']);
        let rules: [(&Option<String>, &str, &dyn Fn(&str) -> bool); 4] = [
            (&self.equals, "exactly", &|wanted| text == wanted.as_bytes()),
            (&self.reads, "the text", &|wanted| trimmed == wanted.trim_end_matches(['\n', '\r'])),
            (&self.contains, "a text with", &|wanted| holds(wanted)),
            (&self.contains_not, "a text without", &|wanted| !holds(wanted)),
        ];
        rules.iter().find_map(|(wanted, words, met)| {
            let wanted = fill(wanted.as_deref()?);
            (!met(&wanted)).then(|| format!("{words} {wanted:?}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_met_and_what_is_not() {
        let some = |text: &str| Some(text.to_owned());
        let cases = [
            (Expect { equals: some("a\n"), ..Expect::default() }, "a\n", None),
            (Expect { equals: some("a"), ..Expect::default() }, "a\n", Some("exactly \"a\"")),
            (Expect { equals: some(""), ..Expect::default() }, "x", Some("exactly \"\"")),
            (Expect { reads: some("a"), ..Expect::default() }, "a\r\n", None),
            (Expect { reads: some("${ID}"), ..Expect::default() }, "7f\n", None),
            (Expect { reads: some("a"), ..Expect::default() }, " a", Some("the text \"a\"")),
            (Expect { contains: some("b"), contains_not: some("c"), ..Expect::default() }, "abc", Some("a text without \"c\"")),
            (Expect { contains: some("d"), ..Expect::default() }, "abc", Some("a text with \"d\"")),
            (Expect { contains: some("long"), ..Expect::default() }, "lo", Some("a text with \"long\"")),
            (Expect { contains: some(""), ..Expect::default() }, "", None),
            (Expect::default(), "anything", None),
        ];
        for (expect, text, unmet) in cases {
            let found = expect.unmet(text.as_bytes(), &|text| text.replace("${ID}", "7f"));
            assert_eq!(found.as_deref(), unmet, "{expect:?} {text:?}");
        }
    }
}
