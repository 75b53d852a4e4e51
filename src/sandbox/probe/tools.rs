//! Checks of the programs and files that builds use, each with the Debian package that brings it.

use std::path::PathBuf;

use super::{Check, ProbeEnv, State, install, read};
use crate::cmd::{self, Cmd};

/// `--perms`, without which a tmpfs is not for everybody: bubblewrap 0.5.
const BWRAP: (u32, u32) = (0, 5);

struct Tool {
    program: &'static str,
    package: &'static str,
    /// What does not work without it; a tool without this is needed by every build.
    optional: Option<&'static str>,
}

const fn needed(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package, optional: None }
}

const fn optional(program: &'static str, package: &'static str, without: &'static str) -> Tool {
    Tool { program, package, optional: Some(without) }
}

const TOOLS: [Tool; 6] = [
    needed("runc", "runc"),
    needed("mmdebstrap", "mmdebstrap"),
    needed("apt-get", "apt"),
    needed("dpkg-deb", "dpkg"),
    optional("git", "git", "credentials by Git's helpers"),
    optional("skopeo", "skopeo", "copying images with other tools, and a part of the tests"),
];

/// Where distributions keep the certificates of authorities.
const CA_BUNDLES: [&str; 3] = ["ssl/certs/ca-certificates.crt", "pki/tls/certs/ca-bundle.crt", "ssl/cert.pem"];

pub(super) fn all(env: &ProbeEnv) -> Vec<Check> {
    let mut checks = vec![bwrap(env)];
    checks.extend(TOOLS.iter().map(|tool| self::tool(env, tool)));
    let keyrings = ["usr/share/keyrings/debian-archive-keyring.gpg", "usr/share/keyrings/debian-archive-keyring.pgp"];
    let apt_helper = ["usr/lib/apt/apt-helper"];
    checks.push(file("apt-helper", "apt", &apt_helper.map(|path| env.top.join(path))));
    checks.push(file("debian-archive-keyring", "debian-archive-keyring", &keyrings.map(|path| env.top.join(path))));
    checks.push(file("CA certificates", "ca-certificates", &CA_BUNDLES.map(|path| env.etc.join(path))));
    checks
}

fn absent(name: &'static str, package: &'static str) -> Check {
    Check { package: Some(package), ..Check::bad(name, State::Missing, "not installed", install(&[package])) }
}

fn tool(env: &ProbeEnv, tool: &Tool) -> Check {
    match (cmd::find(tool.program, &env.path), tool.optional) {
        (Some(path), _) => Check::ok(tool.program, format!("`{}`", path.display())),
        (None, None) => absent(tool.program, tool.package),
        (None, Some(without)) => Check {
            state: State::Warning,
            detail: format!("not installed; needed for {without}"),
            ..absent(tool.program, tool.package)
        },
    }
}

fn file(name: &'static str, package: &'static str, candidates: &[PathBuf]) -> Check {
    match candidates.iter().find(|path| fs_err::metadata(path).is_ok_and(|metadata| metadata.len() > 0)) {
        Some(path) => Check::ok(name, format!("`{}`", path.display())),
        None => absent(name, package),
    }
}

fn bwrap(env: &ProbeEnv) -> Check {
    const NAME: &str = "bwrap";
    const PACKAGE: &str = "bubblewrap";
    let Some(path) = cmd::find(NAME, &env.path) else { return absent(NAME, PACKAGE) };
    let printed = match Cmd::new(&path).arg("--version").text() {
        Ok(printed) => printed.trim().to_owned(),
        Err(error) => return Check::bad(NAME, State::Refused, error.to_string(), format!("{} --reinstall", install(&[PACKAGE]))),
    };
    let mut numbers = printed.rsplit(' ').next().unwrap_or_default().split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= BWRAP {
        return Check::ok(NAME, format!("{printed} at `{}`", path.display()));
    }
    let detail = format!("{printed} at `{}` is too old", path.display());
    Check {
        package: Some(PACKAGE),
        ..Check::bad(NAME, State::Missing, detail, format!("use bubblewrap {}.{} or newer (Debian 12 has 0.8)", BWRAP.0, BWRAP.1))
    }
}

/// Whether this is a Debian or something made from it, whose packages the fixes name.
pub(super) fn distribution(env: &ProbeEnv) -> Check {
    const NAME: &str = "distribution";
    let release = read(&env.etc.join("os-release")).unwrap_or_default();
    let value = |key: &str| {
        release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or_default().trim_matches('"')
    };
    let name = if value("PRETTY_NAME").is_empty() { "unknown" } else { value("PRETTY_NAME") };
    if [value("ID"), value("ID_LIKE")].iter().flat_map(|ids| ids.split(' ')).any(|id| id == "debian") {
        return Check::ok(NAME, format!("{name} on {}", std::env::consts::ARCH));
    }
    Check::bad(
        NAME,
        State::Warning,
        format!("{name} is not made from Debian"),
        "the commands below name Debian's packages; find the same programs in yours",
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    fn row(machine: &Machine, name: &str) -> Check {
        all(&machine.env).into_iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn files_and_their_packages() {
        let machine = Machine::new();
        for (name, path, package) in [
            ("apt-helper", "usr/lib/apt/apt-helper", "apt"),
            ("debian-archive-keyring", "usr/share/keyrings/debian-archive-keyring.pgp", "debian-archive-keyring"),
            ("CA certificates", "etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
        ] {
            let check = row(&machine, name);
            assert_eq!((check.state, check.package), (State::Missing, Some(package)), "{name}");
            assert_eq!(check.fix, Some(format!("sudo apt-get install --no-install-recommends {package}")));
            // An empty bundle is as good as none.
            machine.write(path, "");
            assert_eq!(row(&machine, name).state, State::Missing);
            machine.write(path, "x");
            assert_eq!(row(&machine, name), Check::ok(name_of(name), format!("`{}`", machine.dir.path().join(path).display())));
        }
    }

    fn name_of(name: &str) -> &'static str {
        ["apt-helper", "debian-archive-keyring", "CA certificates"].into_iter().find(|known| *known == name).unwrap()
    }

    #[test]
    fn programs_and_their_packages() {
        let machine = Machine::new();
        for tool in &TOOLS {
            // Those of the machine the test runs on may be found in /usr/sbin, which is always searched.
            if !std::path::Path::new("/usr/sbin").join(tool.program).exists() {
                let check = row(&machine, tool.program);
                let state = if tool.optional.is_none() { State::Missing } else { State::Warning };
                assert_eq!((check.state, check.package), (state, Some(tool.package)));
            }
            machine.program(tool.program, 0o755, "");
            assert_eq!(
                row(&machine, tool.program),
                Check::ok(tool.program, format!("`{}`", machine.dir.path().join("bin").join(tool.program).display()))
            );
        }
    }

    #[test]
    fn distributions() {
        let machine = Machine::new();
        for (release, state, detail) in [
            ("PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nID=debian\n", State::Ok, "Debian GNU/Linux 13 (trixie) on x86_64"),
            ("ID=pop\nID_LIKE=\"ubuntu debian\"\nPRETTY_NAME=Pop\n", State::Ok, "Pop on x86_64"),
            ("ID=fedora\nPRETTY_NAME=Fedora\n", State::Warning, "Fedora is not made from Debian"),
            ("", State::Warning, "unknown is not made from Debian"),
        ] {
            machine.write("etc/os-release", release);
            let check = distribution(&machine.env);
            assert_eq!((check.state, check.detail.as_str()), (state, detail));
        }
    }

    #[test]
    fn bwrap_must_know_perms() {
        let machine = Machine::new();
        assert_eq!((row(&machine, "bwrap").state, row(&machine, "bwrap").package), (State::Missing, Some("bubblewrap")));
        for (script, state) in [
            ("echo bubblewrap 0.8.0", State::Ok),
            ("echo bubblewrap 0.11.0", State::Ok),
            ("echo bubblewrap 1.0", State::Ok),
            ("echo bubblewrap 0.4.1", State::Missing),
            ("exit 127", State::Refused),
        ] {
            machine.program("bwrap", 0o755, script);
            assert_eq!(row(&machine, "bwrap").state, state, "{script}");
        }
    }
}
