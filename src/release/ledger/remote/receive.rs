//! Pushes to a repository of this machine through `git receive-pack`, as Git itself does: hooks run, and the old value of
//! the branch is compared under its lock (gitprotocol-pack(5), "Pushing Data To a Server").

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use git2::{Oid, Repository};

use super::network::with_words;
use super::{BRANCH, Push, RemoteError, pack};
use crate::cmd::Cmd;

/// Variables by which Git programs would take another repository, or another protocol, than the one meant.
const FOREIGN: [&str; 8] = [
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
    "GIT_PROTOCOL",
];

/// What the other side says of the push.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    /// `None`: it says nothing of the pack.
    unpacked: Option<String>,
    /// `None`: it says nothing of our branch.
    branch: Option<Result<(), String>>,
}

/// Moves the branch of the repository in `folder` from `expected` to `id`.
pub(super) fn push(folder: &Path, url: &str, repository: &Repository, expected: Option<Oid>, id: Oid) -> Result<(), Push> {
    if let Err(error) = fs_err::metadata(folder) {
        return Err(Push::Failed(RemoteError::Unreachable { url: url.to_owned(), words: error.to_string() }));
    }
    let mut cmd = Cmd::new("git").args(["-c", "core.fsync=all", "receive-pack"]).arg(folder);
    for name in FOREIGN {
        cmd = cmd.env_remove(name);
    }
    let mut child = cmd.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut words = Vec::new();
    let spoken = match (child.stdin.take(), child.stdout.take()) {
        (Some(stdin), Some(stdout)) => speak(stdout, stdin, &mut words, repository, expected, id),
        _ => Err(anyhow::anyhow!("receive-pack has no pipes").into()),
    };
    if spoken.is_err() {
        // It may wait for more of us.
        let _ = child.kill();
    }
    let output = child.wait_with_output().context("cannot wait for `git receive-pack`")?;
    words.extend_from_slice(&output.stderr);
    let url = url.to_owned();
    let report = match spoken {
        Ok(report) => report,
        Err(moved @ Push::Moved { .. }) => return Err(moved),
        // It said why it ended before we understood.
        Err(Push::Failed(error)) => {
            let text = with_words(&error.to_string(), &output.stderr);
            return Err(Push::Failed(RemoteError::Refused { url, words: text }));
        }
    };
    let failed = match (report.unpacked.as_deref(), report.branch) {
        (Some("ok"), Some(Ok(()))) if output.status.success() => return Ok(()),
        (_, Some(Err(why))) => return Err(Push::refused(&url, &why, &words)),
        (Some(why), None) if why != "ok" => RemoteError::Refused { url, words: with_words(why, &words) },
        _ => RemoteError::Unreachable { url, words: with_words("it did not say whether it took the decision", &words) },
    };
    Err(Push::Failed(failed))
}

/// The whole conversation.
fn speak(
    mut from: impl Read,
    mut to: impl Write,
    words: &mut Vec<u8>,
    repository: &Repository,
    expected: Option<Oid>,
    id: Oid,
) -> Result<Report, Push> {
    let there = read_tip(&mut from)?;
    if there != expected {
        // A flush: nothing to push.
        let _ = to.write_all(b"0000");
        return Err(Push::Moved { tip: there, words: String::new() });
    }
    let pack = pack::build_for(repository, id, expected)?;
    let old = expected.unwrap_or(Oid::ZERO_SHA1);
    let agent = concat!("pipeline/", env!("CARGO_PKG_VERSION"));
    let command = format!("{old} {id} {BRANCH}\0 report-status side-band-64k agent={agent}");
    let send = |to: &mut dyn Write| -> std::io::Result<()> {
        write!(to, "{:04x}{command}0000", command.len() + 4)?;
        to.write_all(&pack)?;
        to.flush()
    };
    send(&mut to).context("cannot send the decision")?;
    drop(to);
    let mut report = Vec::new();
    while let Some(packet) = read_packet(&mut from)? {
        match packet.split_first() {
            Some((1, rest)) => report.extend_from_slice(rest),
            Some((_, rest)) => words.extend_from_slice(rest),
            None => {}
        }
    }
    Ok(parse_report(&report)?)
}

/// Reads what receive-pack lists first, and finds the branch.
fn read_tip(from: &mut impl Read) -> Result<Option<Oid>> {
    let mut tip = None;
    let mut first = true;
    while let Some(packet) = read_packet(from)? {
        let text = String::from_utf8_lossy(&packet);
        let (line, capabilities) = text.split_once('\0').map_or((text.as_ref(), None), |(line, rest)| (line, Some(rest)));
        if first {
            let known: Vec<&str> = capabilities.unwrap_or_default().split_whitespace().collect();
            ensure!(known.contains(&"report-status") && known.contains(&"side-band-64k"), "this receive-pack is too old");
            let format = known.iter().find_map(|word| word.strip_prefix("object-format=")).unwrap_or("sha1");
            ensure!(format == "sha1", "the repository there has {format} names, and ours sha1");
            first = false;
        }
        if let Some((id, name)) = line.trim_end().split_once(' ')
            && name == BRANCH
        {
            tip = Some(Oid::from_str(id)?);
        }
    }
    Ok(tip)
}

/// One packet (gitprotocol-common(5), "pkt-line Format"); `None` for a flush.
fn read_packet(from: &mut impl Read) -> Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    from.read_exact(&mut length).context("receive-pack stopped talking")?;
    let length = std::str::from_utf8(&length).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
    match length {
        Some(0) => Ok(None),
        Some(length @ 4..=65520) => {
            let mut packet = vec![0; length - 4];
            from.read_exact(&mut packet).context("receive-pack stopped talking")?;
            Ok(Some(packet))
        }
        _ => bail!("receive-pack says something that is no packet"),
    }
}

/// The report in band 1: packets of its own (gitprotocol-pack(5), "Report Status").
fn parse_report(mut bytes: &[u8]) -> Result<Report> {
    let mut report = Report::default();
    while !bytes.is_empty() {
        let Some(packet) = read_packet(&mut bytes)? else { break };
        let text = String::from_utf8_lossy(&packet);
        let words: Vec<&str> = text.trim_end().splitn(3, ' ').collect();
        match words.as_slice() {
            ["unpack", rest @ ..] => report.unpacked = Some(rest.join(" ")),
            ["ok", name, ..] if *name == BRANCH => report.branch = Some(Ok(())),
            ["ng", name, rest @ ..] if *name == BRANCH => report.branch = Some(Err(rest.join(" "))),
            _ => {}
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(text: &str) -> String {
        format!("{:04x}{text}", text.len() + 4)
    }

    #[test]
    fn reports() {
        let ok = |branch| Report { unpacked: Some("ok".into()), branch };
        for (lines, expected) in [
            (vec!["unpack ok\n", "ok refs/heads/main\n"], ok(Some(Ok(())))),
            (
                vec!["unpack ok\n", "ng refs/heads/main pre-receive hook declined\n"],
                ok(Some(Err("pre-receive hook declined".into()))),
            ),
            (vec!["unpack ok\n", "ok refs/heads/other\n"], ok(None)),
            (vec!["unpack index-pack failed\n"], Report { unpacked: Some("index-pack failed".into()), branch: None }),
            (vec![], Report::default()),
        ] {
            let text: String = lines.iter().map(|line| packet(line)).collect();
            assert_eq!(parse_report(format!("{text}0000").as_bytes()).unwrap(), expected, "{lines:?}");
        }
        assert!(parse_report(b"zzzz").is_err());
        assert!(parse_report(b"0010unpack").is_err());
    }

    #[test]
    fn what_is_listed_first() {
        let id = "a".repeat(40);
        let zero = "0".repeat(40);
        let capabilities = "report-status side-band-64k object-format=sha1";
        let listed = |lines: &[String]| {
            let text: String = lines.iter().map(|line| packet(line)).collect();
            read_tip(&mut format!("{text}0000").as_bytes())
        };
        let one = [format!("{id} refs/heads/main\0{capabilities}\n")];
        assert_eq!(listed(&one).unwrap(), Some(Oid::from_str(&id).unwrap()));
        let other = [format!("{id} refs/heads/a\0{capabilities}\n"), format!("{id} refs/heads/main\n")];
        assert_eq!(listed(&other).unwrap(), Some(Oid::from_str(&id).unwrap()));
        assert_eq!(listed(&[format!("{zero} capabilities^{{}}\0{capabilities}\n")]).unwrap(), None);
        assert!(listed(&[format!("{zero} capabilities^{{}}\0report-status\n")]).is_err());
        assert!(listed(&[format!("{zero} capabilities^{{}}\0report-status side-band-64k object-format=sha256\n")]).is_err());
        assert!(read_tip(&mut &b"0040x"[..]).is_err());
    }
}
