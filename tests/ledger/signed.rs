//! Signatures: made here and checked by Git and ssh-keygen, made by them and checked here.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;

use pipeline::error::exit_code;
use pipeline::release::ledger::{Appended, Ledger, Oid, Signed};
use pipeline::release::sshsig::{self, Signer};

use crate::support::*;

/// A new key; its private half is at the path, its public line is returned.
fn key(place: &Place, name: &str, kind: &[&str], passphrase: &str) -> (PathBuf, String) {
    let path = place.path(name);
    let output = run(plain("ssh-keygen").args(["-q", "-C", "a comment", "-N", passphrase, "-t"]).args(kind).arg("-f").arg(&path));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let public = fs_err::read_to_string(path.with_extension("pub")).unwrap();
    (path, public)
}

fn decide(ledger: &Ledger, signer: Option<&Signer>) -> Oid {
    let tip = ledger.tip().unwrap();
    match ledger.append(tip, &count(ledger, tip, "shop/prod.json", "alice"), &author("alice", 0), signer).unwrap() {
        Appended::Done(id) => id,
        Appended::Lost(_) => panic!("nobody else is here"),
    }
}

/// What `git verify-commit` says, with `allowed` as the file of allowed signers.
fn git_verifies(ledger: &Ledger, allowed: &Path, id: Oid) -> (bool, String) {
    let setting = format!("gpg.ssh.allowedSignersFile={}", allowed.display());
    let output = run(plain("git").arg("-C").arg(ledger.dir()).args(["-c", &setting, "verify-commit", &id.to_string()]));
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn git_and_ssh_keygen_agree() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let kinds: [&[&str]; 5] =
        [&["ed25519"], &["ecdsa", "-b", "256"], &["ecdsa", "-b", "384"], &["ecdsa", "-b", "521"], &["rsa", "-b", "3072"]];
    let (_, stranger) = key(&place, "stranger", &["ed25519"], "");
    let allowed = place.path("allowed");
    for (number, kind) in kinds.iter().enumerate() {
        let (path, public) = key(&place, &format!("key{number}"), kind, "");
        let signer = Signer::open(&path, None).unwrap();
        assert_eq!(signer.public_key(), public.trim().trim_end_matches(" a comment"));
        let id = decide(&ledger, Some(&signer));
        let commit = ledger.commit(id).unwrap();
        assert_eq!(commit.signed(&[stranger.clone(), public.clone()]), Signed::By { key: 1 }, "{kind:?}");
        assert_eq!(commit.signed(std::slice::from_ref(&stranger)), Signed::Stranger { fingerprint: signer.fingerprint() });
        // Git, with the key and with another one.
        fs_err::write(&allowed, format!("alice@example.org {public}")).unwrap();
        let (good, words) = git_verifies(&ledger, &allowed, id);
        assert!(good && words.contains(&signer.fingerprint()) && words.contains("alice@example.org"), "{kind:?}: {words}");
        fs_err::write(&allowed, format!("alice@example.org {stranger}")).unwrap();
        assert!(!git_verifies(&ledger, &allowed, id).0);
        // ssh-keygen over other bytes, both ways.
        let signature = place.path("message.sig");
        fs_err::write(&signature, signer.sign("pipeline", b"bytes").unwrap()).unwrap();
        fs_err::write(&allowed, format!("alice@example.org {public}")).unwrap();
        let verify = |namespace: &str, bytes: &str| {
            let cmd = plain("ssh-keygen").args(["-Y", "verify", "-I", "alice@example.org", "-n", namespace, "-f"]).arg(&allowed);
            run(cmd.arg("-s").arg(&signature).input(bytes)).status.success()
        };
        assert_eq!((verify("pipeline", "bytes"), verify("pipeline", "other"), verify("git", "bytes")), (true, false, false));
        let message = place.path("message");
        let _ = fs_err::remove_file(&signature);
        fs_err::write(&message, "bytes").unwrap();
        let output = run(plain("ssh-keygen").args(["-Y", "sign", "-n", "pipeline", "-f"]).arg(&path).arg(&message));
        assert!(output.status.success());
        let theirs = fs_err::read_to_string(&signature).unwrap();
        assert!(sshsig::verify(&theirs, "pipeline", b"bytes").unwrap().is(&public));
        assert!(sshsig::verify(&theirs, "pipeline", b"other").is_err());
        assert!(sshsig::verify(&theirs, "git", b"bytes").is_err());
    }
    // A commit that Git signed.
    let setting = format!("user.signingkey={}", place.path("key0").display());
    let tip = ledger.tip().unwrap().unwrap().to_string();
    let arguments = ["-c", "gpg.format=ssh", "-c", &setting, "commit-tree", "-S", "-p", &tip, "-m", "by Git", "main^{tree}"];
    let theirs = Oid::from_str(git(ledger.dir(), &arguments).trim()).unwrap();
    let public = fs_err::read_to_string(place.path("key0.pub")).unwrap();
    assert_eq!(ledger.commit(theirs).unwrap().signed(&[public]), Signed::By { key: 0 });
    assert_sound(&ledger, true, "signed");
    assert_eq!(ledger.verify(&mut |_, _, _| Ok(vec![])).unwrap().signed, 5);
}

#[test]
fn a_signature_holds_for_its_commit_only() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let (path, public) = key(&place, "key", &["ed25519"], "");
    let id = decide(&ledger, Some(&Signer::open(&path, None).unwrap()));
    let raw = git(ledger.dir(), &["cat-file", "commit", &id.to_string()]);
    let keys = [public];
    for (from, to) in [
        ("by alice", "by mallory"),
        ("A reason.", "A  reason."),
        ("author alice", "author alicE"),
        ("\n\nshop", "\nx y\n\nshop"),
        ("U1NIU0lH", "U1NIU0lI"),
        ("-----BEGIN SSH", "-----BEGIN PGP"),
    ] {
        let forged =
            git_with(ledger.dir(), &["hash-object", "-t", "commit", "-w", "--stdin", "--literally"], &raw.replacen(from, to, 1));
        let forged = Oid::from_str(forged.trim()).unwrap();
        assert_ne!(forged, id, "{from}");
        assert!(matches!(ledger.commit(forged).unwrap().signed(&keys), Signed::Bad { .. }), "{from}");
        git(ledger.dir(), &["update-ref", "refs/heads/main", &forged.to_string()]);
        let found = findings(&ledger);
        assert!(found.iter().any(|problem| problem.contains("signature")), "{from}: {found:?}");
        git(ledger.dir(), &["update-ref", "refs/heads/main", &id.to_string()]);
    }
    assert_eq!(ledger.commit(id).unwrap().signed(&keys), Signed::By { key: 0 });
    // The signature of one decision on another.
    let other = decide(&ledger, None);
    let signature: String = raw
        .lines()
        .skip_while(|line| !line.starts_with("gpgsig"))
        .take_while(|line| !line.is_empty())
        .map(|line| format!("{line}\n"))
        .collect();
    let bare = git(ledger.dir(), &["cat-file", "commit", &other.to_string()]);
    let forged = git_with(
        ledger.dir(),
        &["hash-object", "-t", "commit", "-w", "--stdin"],
        &bare.replacen("\n\n", &format!("\n{signature}\n"), 1),
    );
    assert!(matches!(ledger.commit(Oid::from_str(forged.trim()).unwrap()).unwrap().signed(&keys), Signed::Bad { .. }));
}

/// An SSH agent that ends with the test.
struct Agent {
    process: Child,
    socket: PathBuf,
}

impl Agent {
    fn start(place: &Place) -> Self {
        let socket = place.path("agent");
        let process = plain("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(std::process::Stdio::null()).spawn().unwrap();
        while !socket.exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Self { process, socket }
    }

    fn add(&self, place: &Place, key: &Path, passphrase: &str) {
        let script = place.path("askpass");
        fs_err::write(&script, format!("#!/bin/sh\necho '{passphrase}'\n")).unwrap();
        fs_err::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
        let cmd =
            plain("ssh-add").env("SSH_AUTH_SOCK", &self.socket).env("SSH_ASKPASS", &script).env("SSH_ASKPASS_REQUIRE", "force");
        let output = run(cmd.arg("-q").arg(key));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn keys_in_an_agent() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let agent = Agent::start(&place);
    for (name, kind) in [("ed25519", &["ed25519"][..]), ("ecdsa", &["ecdsa"]), ("rsa", &["rsa"])] {
        let (path, public) = key(&place, name, kind, "open sesame");
        // Not without the agent, nor before it has the key.
        for error in [Signer::open(&path, None), Signer::open(&path, Some(&agent.socket))].map(Result::unwrap_err) {
            assert_eq!(exit_code(&error), 2, "{error:#}");
        }
        agent.add(&place, &path, "open sesame");
        for file in [path.clone(), path.with_extension("pub")] {
            let signer = Signer::open(&file, Some(&agent.socket)).unwrap();
            let id = decide(&ledger, Some(&signer));
            assert_eq!(ledger.commit(id).unwrap().signed(std::slice::from_ref(&public)), Signed::By { key: 0 }, "{name}");
            let allowed = place.path("allowed");
            fs_err::write(&allowed, format!("alice@example.org {public}")).unwrap();
            let (good, words) = git_verifies(&ledger, &allowed, id);
            assert!(good, "{name}: {words}");
        }
    }
    // An agent that went away decides nothing.
    let signer = Signer::open(&place.path("rsa"), Some(&agent.socket)).unwrap();
    let tip = ledger.tip().unwrap();
    drop(agent);
    let change = count(&ledger, tip, "shop/prod.json", "alice");
    let error = ledger.append(tip, &change, &author("alice", 0), Some(&signer)).unwrap_err();
    assert_eq!((exit_code(&error), ledger.tip().unwrap()), (75, tip), "{error:#}");
    assert_sound(&ledger, true, "an agent");
}

#[test]
fn numbers_of_any_length() {
    let place = Place::new();
    // Half of these have a secret number that is shorter than the field; one signature in 128 has a short half.
    for number in 0..8 {
        let (path, public) = key(&place, &format!("p521-{number}"), &["ecdsa", "-b", "521"], "");
        let signature = Signer::open(&path, None).unwrap().sign("x", b"bytes").unwrap();
        assert!(sshsig::verify(&signature, "x", b"bytes").unwrap().is(&public));
    }
    let (path, public) = key(&place, "p256", &["ecdsa", "-b", "256"], "");
    let signer = Signer::open(&path, None).unwrap();
    for number in 0..600 {
        let bytes = format!("{number}");
        let signature = signer.sign("x", bytes.as_bytes()).unwrap();
        assert!(sshsig::verify(&signature, "x", bytes.as_bytes()).unwrap().is(&public), "{number}");
    }
}

#[test]
fn files_that_are_no_keys() {
    let place = Place::new();
    let path = place.path("file");
    for (text, hint) in [
        ("", "ssh-keygen -t"),
        ("hello\n", "ssh-keygen -t"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII=\n-----END RSA PRIVATE KEY-----\n", "ssh-keygen -p"),
    ] {
        fs_err::write(&path, text).unwrap();
        let error = Signer::open(&path, None).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        assert!(pipeline::error::hints(&error)[0].contains(hint), "{error:?}");
    }
    assert!(Signer::open(&place.path("none"), None).is_err());
    assert!(sshsig::public_key("ssh-ed25519 nonsense").is_err());
    let (_, public) = key(&place, "key", &["ed25519"], "");
    assert!(sshsig::public_key(&public).unwrap().is(&public));
}
