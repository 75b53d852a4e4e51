//! Checks of what the user has: ranges of subordinate ids and the programs that map them.

use super::{Check, ProbeEnv, State, install, read};
use crate::cmd;

/// Ids an image may use: all of 16 bits.
const IDS: u64 = 65536;
/// The first id useradd gives out (`SUB_UID_MIN` of Debian's login.defs).
const FIRST: u64 = 100_000;

/// A range of `/etc/subuid`: owner as written, first id, count.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    owner: String,
    start: u64,
    count: u64,
}

fn ranges(text: &str) -> Vec<Range> {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.trim().split(':');
            let (owner, start, count) = (parts.next()?, parts.next()?, parts.next()?);
            Some(Range { owner: owner.into(), start: start.parse().ok()?, count: count.parse().ok()? })
        })
        .collect()
}

/// The first id from which [`IDS`] ids are nobody's.
fn free_start(taken: &[Range]) -> u64 {
    let mut taken: Vec<&Range> = taken.iter().collect();
    taken.sort_by_key(|range| range.start);
    taken.iter().fold(FIRST, |start, range| {
        let overlaps = range.start < start + IDS && start < range.start.saturating_add(range.count);
        if overlaps { range.start.saturating_add(range.count) } else { start }
    })
}

/// An ordinary user needs a range in both files; root needs a namespace that has the ids.
pub(super) fn id_ranges(env: &ProbeEnv) -> Check {
    const NAME: &str = "subordinate ids";
    if env.is_root() {
        return own_map(env, NAME);
    }
    let files = ["subuid", "subgid"].map(|name| ranges(&read(&env.etc.join(name)).unwrap_or_default()));
    let ours = |range: &&Range| range.owner == env.user_name || range.owner == env.uid.to_string();
    let found = files.each_ref().map(|file| file.iter().filter(ours).find(|range| range.count >= IDS));
    if let [Some(uids), Some(gids)] = found {
        return Check::ok(NAME, format!("{} users from {}, {} groups from {}", uids.count, uids.start, gids.count, gids.start));
    }
    let start = free_start(&files.concat());
    let range = format!("{start}-{}", start + IDS - 1);
    let missing: Vec<(&str, &str)> = [("--add-subuids", "`/etc/subuid`"), ("--add-subgids", "`/etc/subgid`")]
        .into_iter()
        .zip(found)
        .filter_map(|(names, found)| found.is_none().then_some(names))
        .collect();
    let places: Vec<&str> = missing.iter().map(|(_, file)| *file).collect();
    let options: Vec<String> = missing.iter().map(|(option, _)| format!("{option} {range}")).collect();
    Check::bad(
        NAME,
        State::Missing,
        format!("`{}` has no range of {IDS} subordinate ids in {}", env.user_name, places.join(" and ")),
        format!("sudo usermod {} {}", options.join(" "), env.user_name),
    )
}

/// Root in a container may be root of a small user namespace.
fn own_map(env: &ProbeEnv, name: &'static str) -> Check {
    let count = |file: &str| -> u64 {
        let map = read(&env.proc.join("self").join(file)).unwrap_or_default();
        map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum()
    };
    let least = count("uid_map").min(count("gid_map"));
    if least >= IDS {
        return Check::ok(name, "root has all ids");
    }
    Check::bad(
        name,
        State::Refused,
        format!("root here has {least} ids only, of the {IDS} an image may use"),
        "start the container as a user with subordinate ids, or as root",
    )
}

/// `no_new_privs` makes `newuidmap` an ordinary program.
pub(super) fn no_new_privileges(env: &ProbeEnv) -> Check {
    const NAME: &str = "new privileges";
    if env.is_root() || env.status("NoNewPrivs").as_deref() != Some("1") {
        return Check::ok(NAME, "allowed");
    }
    Check::bad(
        NAME,
        State::Refused,
        "no_new_privs is set: `newuidmap` and `newgidmap` cannot do their work",
        "start without `--security-opt no-new-privileges` (Docker), `allowPrivilegeEscalation: false` (Kubernetes), NoNewPrivileges= (systemd)",
    )
}

/// `newuidmap` and `newgidmap`: present, and setuid or with file capabilities.
pub(super) fn id_mapper(env: &ProbeEnv, program: &'static str) -> Check {
    use std::os::unix::fs::PermissionsExt as _;
    const PACKAGE: &str = "uidmap";
    if env.is_root() {
        return Check::ok(program, "root does not need it");
    }
    let Some(path) = cmd::find(program, &env.path) else {
        let fix = install(&[PACKAGE]);
        return Check { package: Some(PACKAGE), ..Check::bad(program, State::Missing, "not installed", fix) };
    };
    let setuid = fs_err::metadata(&path).is_ok_and(|metadata| metadata.permissions().mode() & 0o4000 != 0);
    let capable = xattr::get(&path, "security.capability").is_ok_and(|value| value.is_some());
    if setuid || capable {
        let how = if setuid { "setuid" } else { "with file capabilities" };
        return Check::ok(program, format!("`{}`, {how}", path.display()));
    }
    Check::bad(
        program,
        State::Refused,
        format!("`{}` is neither setuid nor has file capabilities", path.display()),
        format!("sudo chmod u+s {}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    #[test]
    fn ranges_by_name_or_number() {
        for (subuid, subgid, detail, fix) in [
            ("ann:100000:65536\n", "1000:200000:70000\n", "65536 users from 100000, 70000 groups from 200000", None),
            ("# c\n\nann:100000:10\nann:300000:65536\n", "ann:1:65536", "65536 users from 300000, 65536 groups from 1", None),
            (
                "bob:100000:65536\n",
                "",
                "`ann` has no range of 65536 subordinate ids in `/etc/subuid` and `/etc/subgid`",
                Some("sudo usermod --add-subuids 165536-231071 --add-subgids 165536-231071 ann"),
            ),
            (
                "ann:100000:65536\n",
                "ann:100000:65535\n",
                "`ann` has no range of 65536 subordinate ids in `/etc/subgid`",
                Some("sudo usermod --add-subgids 165536-231071 ann"),
            ),
            (
                "garbage\nann:x:y\n",
                "",
                "`ann` has no range of 65536 subordinate ids in `/etc/subuid` and `/etc/subgid`",
                Some("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ann"),
            ),
        ] {
            let machine = Machine::new();
            machine.write("etc/subuid", subuid).write("etc/subgid", subgid);
            let check = id_ranges(&machine.env);
            assert_eq!((check.detail.as_str(), check.fix.as_deref()), (detail, fix));
            assert_eq!(check.state, if fix.is_none() { State::Ok } else { State::Missing });
        }
    }

    #[test]
    fn a_new_range_collides_with_none() {
        for (taken, expected) in [
            (vec![], 100_000),
            (vec![(100_000, 65536), (165_536, 65536)], 231_072),
            (vec![(165_536, 65536), (100_000, 65536)], 231_072),
            (vec![(300_000, 10)], 100_000),
            (vec![(165_535, 1)], 165_536),
            (vec![(100_000, 300_000), (100_000, 1)], 400_000),
            (vec![(0, 100_000)], 100_000),
        ] {
            let taken: Vec<Range> = taken.into_iter().map(|(start, count)| Range { owner: "x".into(), start, count }).collect();
            assert_eq!(free_start(&taken), expected, "{taken:?}");
        }
    }

    #[test]
    fn root_needs_the_ids_in_its_own_namespace() {
        let mut machine = Machine::new();
        machine.env.uid = 0;
        assert_eq!(id_ranges(&machine.env).state, State::Ok);
        machine.write("proc/self/uid_map", "0 1000 1\n1 100000 65536\n").write("proc/self/gid_map", "0 1000 1\n1 100000 65536\n");
        assert_eq!(id_ranges(&machine.env).state, State::Ok);
        machine.write("proc/self/gid_map", "0 1000 1\n");
        assert_eq!(id_ranges(&machine.env).detail, "root here has 1 ids only, of the 65536 an image may use");
    }

    #[test]
    fn mappers_must_be_able_to_map() {
        let mut machine = Machine::new();
        let check = id_mapper(&machine.env, "newuidmap");
        assert_eq!((check.state, check.package), (State::Missing, Some("uidmap")));
        machine.program("newuidmap", 0o755, "");
        let path = machine.dir.path().join("bin/newuidmap");
        let check = id_mapper(&machine.env, "newuidmap");
        assert_eq!((check.state, check.fix), (State::Refused, Some(format!("sudo chmod u+s {}", path.display()))));
        machine.program("newuidmap", 0o4755, "");
        assert_eq!(id_mapper(&machine.env, "newuidmap"), Check::ok("newuidmap", format!("`{}`, setuid", path.display())));
        machine.env.uid = 0;
        assert_eq!(id_mapper(&machine.env, "newgidmap").state, State::Ok);
    }

    #[test]
    fn no_new_privs_is_seen() {
        let mut machine = Machine::new();
        assert_eq!(no_new_privileges(&machine.env).state, State::Ok);
        machine.write("proc/self/status", "NoNewPrivs:\t1\n");
        assert_eq!(no_new_privileges(&machine.env).state, State::Refused);
        machine.env.uid = 0;
        assert_eq!(no_new_privileges(&machine.env).state, State::Ok);
    }
}
