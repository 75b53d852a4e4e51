//! Registry tags that follow environments, with Debian's `docker-registry`; what `prune` leaves; signatures and reports of
//! releases, with the program as people call it.

mod common;
#[path = "registry/servers.rs"]
#[allow(dead_code, reason = "shared with the tests of registries")]
mod servers;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use common::{Answer, Project, Run, me};
use pipeline::artifact::image::{self, Layer, Recipe, RunConfig};
use pipeline::artifact::keys::{PrivateKey, write_pair};
use pipeline::artifact::release::{self, Entry, Kind};
use pipeline::artifact::store::{Descriptor, REF_NAME, Store};
use pipeline::artifact::{referrer, sbom, sign};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use serde_json::Value;
use servers::{Answer as Http, OCI_INDEX, Server, free_port, scripted};

/// A pipeline with environments in the ledger, a registry's repository for it, and releases made of small images.
struct Shop {
    project: Project,
    key: PrivateKey,
    port: u16,
}

impl Shop {
    fn new(port: u16, environments: &str) -> Self {
        let project = Project::tiny(me());
        let text = project.read("pipeline.yaml");
        project.write("pipeline.yaml", format!("{text}registry: 127.0.0.1:{port}/team/tiny\nenvironments:\n{environments}"));
        let shop = Self { project, key: PrivateKey::generate(), port };
        write_pair(&shop.project.dir, "ours", &shop.key, None).unwrap();
        shop.verb(&["environment", "apply"]).ok();
        shop
    }

    fn verb<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Run {
        self.project.pipeline(args).env("GIT_AUTHOR_NAME", "alice").env("GIT_AUTHOR_EMAIL", "alice@example.org")
    }

    fn json(&self, args: &[&str]) -> Value {
        self.verb(&["--json"]).args(args).ok().json()
    }

    fn store(&self) -> Store {
        Store::open(&self.project.root).unwrap()
    }

    /// A signed release `tiny:VERSION` of an image with a layer all of them share and one of its own.
    fn release(&self, version: &str) -> Digest {
        self.release_with(version, "etc/version", version.as_bytes())
    }

    /// The same with another file in its own layer.
    fn release_with(&self, version: &str, path: &str, content: &[u8]) -> Digest {
        let store = self.store();
        let common: Vec<u8> = (0..20_000_u32).flat_map(u32::to_le_bytes).collect();
        let layers = [("usr/common", common), (path, content.to_vec())].map(|(path, content)| {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            builder.append_data(&mut header, path, content.as_slice()).unwrap();
            let layer = builder.into_inner().unwrap();
            let diff_id = store.put(&layer).unwrap();
            let descriptor = Descriptor::new("application/vnd.oci.image.layer.v1.tar", diff_id, layer.len() as u64);
            Layer { descriptor, diff_id, created_by: "test".into() }
        });
        let recipe = Recipe { config: RunConfig::default(), layers: layers.into(), annotations: BTreeMap::new(), created: 0 };
        let image = image::write(&store, &recipe).unwrap();
        let entries = vec![Entry { digest: image.digest, size: image.size, kind: Kind::Image, name: "tiny".into() }];
        let recipe = release::Recipe { name: "tiny".into(), version: version.into(), revision: Some("c0ffee".into()), entries };
        let release = release::write(&store, &recipe).unwrap();
        sign::sign_release(&store, &release.digest, "tiny", &self.key).unwrap();
        for tag in [version, "latest"] {
            store.tag(&release::tag("tiny", tag), &release).unwrap();
        }
        release.digest
    }

    fn promote(&self, to: &str, version: &str) -> Run {
        self.verb(&["promote", "tiny", "--to", to, "--release", version])
    }

    fn status(&self, environment: &str) -> Value {
        self.json(&["status", &format!("tiny/{environment}")])["environments"][0].clone()
    }

    /// Where the registry's tag stands, as skopeo sees it; nothing when there is none.
    fn tag(&self, tag: &str) -> Option<Digest> {
        let reference = format!("docker://127.0.0.1:{}/team/tiny:{tag}", self.port);
        let command = Cmd::new("skopeo").args(["inspect", "--raw", "--tls-verify=false", &reference]);
        command.output().ok().filter(|output| output.status.success()).map(|output| Digest::of(&output.stdout))
    }

    /// Points a tag at a release that the registry has, as somebody would who does it by hand: with one plain request.
    fn move_by_hand(&self, tag: &str, release: &Digest) {
        let bytes = self.store().read(release).unwrap();
        let head = format!(
            "PUT /v2/team/tiny/manifests/{tag} HTTP/1.0\r\nHost: 127.0.0.1:{}\r\nContent-Type: {OCI_INDEX}\r\nContent-Length: {}\r\n\r\n",
            self.port,
            bytes.len()
        );
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(&[head.as_bytes(), &bytes].concat()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(" 201 "), "{answer}");
        assert_eq!(self.tag(tag), Some(*release));
    }
}

fn sent(answer: &Answer) -> Vec<(String, String, u64)> {
    let value = answer.json();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let row = |row: &Value| (text(&row["environment"]), text(&row["became"]), row["sent"].as_u64().unwrap_or(0));
    value["tags"].as_array().unwrap().iter().map(row).collect()
}

const TWO: &str = "  dev: {}\n  prod: { from: dev }\n";

#[test]
fn tags_follow_decisions_and_move_only_what_is_missing() {
    let port = free_port();
    let shop = Shop::new(port, TWO);
    let _server = Server::start_on(port, &shop.project.beside("server"), "");
    let one = shop.release("1.0");
    let answer = shop.promote("dev", "1.0").arg("--json").ok();
    let first = sent(&answer);
    assert_eq!((first[0].0.as_str(), first[0].1.as_str(), first.len()), ("dev", "set", 1));
    assert!(first[0].2 > 80_000, "{first:?}");
    assert_eq!((shop.tag("dev"), shop.tag("prod")), (Some(one), None));
    // What is there already stays where it is.
    let answer = shop.promote("prod", "1.0").arg("--json").ok();
    assert_eq!(sent(&answer), [("prod".into(), "set".into(), 0), ("dev".into(), "stands".into(), 0)]);
    assert_eq!(shop.tag("prod"), Some(one));
    let two = shop.release("1.1");
    let answer = shop.promote("dev", "1.1").arg("--json").ok();
    let row = sent(&answer).remove(0);
    assert!(row.1 == "set" && row.2 > 0 && row.2 < 20_000, "the shared layer went again: {row:?}");
    shop.promote("prod", "1.1").ok().prints("done: ").says(&format!("team/tiny:prod` stands for 1.1 ({}) now", two.short()));
    assert_eq!((shop.tag("dev"), shop.tag("prod")), (Some(two), Some(two)));
    // Signatures went along, where cosign looks.
    assert!(shop.tag(&format!("sha256-{}.sig", two.hex())).is_some());
    shop.verb(&["rollback", "tiny/prod", "--reason", "slow"]).ok();
    assert_eq!((shop.tag("dev"), shop.tag("prod")), (Some(two), Some(one)));
    assert_eq!(shop.status("prod")["tag"]["state"], "set");
}

#[test]
fn a_tag_moved_by_hand_is_told_and_stays() {
    let port = free_port();
    let shop = Shop::new(port, TWO);
    let _server = Server::start_on(port, &shop.project.beside("server"), "");
    let one = shop.release("1.0");
    for to in ["dev", "prod"] {
        shop.promote(to, "1.0").ok();
    }
    let (strange, three) = (shop.release("1.1"), shop.release("1.2"));
    shop.promote("dev", "1.1").ok();
    // It was never in prod.
    shop.move_by_hand("prod", &strange);
    shop.promote("dev", "1.2").ok();
    let answer = shop.promote("prod", "1.2").ok();
    answer.prints("done: ").says("SOMEBODY MOVED the tag").says(&strange.to_string()).says("environment tags tiny/prod --retag");
    assert_eq!(shop.tag("prod"), Some(strange), "it was overwritten");
    assert_eq!((&shop.status("prod")["tag"]["state"], &shop.status("prod")["version"]), (&"moved".into(), &"1.2".into()));
    shop.verb(&["status", "tiny/prod"]).ok().prints("SOMEBODY MOVED the tag");
    shop.verb(&["environment", "tags", "tiny"]).run().code(1).prints("MOVED by somebody to");
    assert_eq!(shop.tag("prod"), Some(strange));
    shop.verb(&["environment", "tags", "tiny/prod", "--retag"]).ok().prints("set");
    assert_eq!(shop.tag("prod"), Some(three));
    shop.verb(&["environment", "tags", "tiny"]).ok();
    // Back to what was there before is by hand too.
    shop.move_by_hand("prod", &one);
    shop.verb(&["environment", "tags", "tiny/prod"]).run().code(1).prints("MOVED by somebody to");
}

/// Nobody decided anything since: `status` asks where the tags stand, once a minute at most.
#[test]
fn status_finds_a_tag_that_was_moved() {
    let port = free_port();
    let shop = Shop::new(port, TWO);
    let dir = shop.project.beside("server");
    let server = Server::start_on(port, &dir, "");
    let one = shop.release("1.0");
    for to in ["dev", "prod"] {
        shop.promote(to, "1.0").ok();
    }
    let strange = shop.release("1.1");
    shop.promote("dev", "1.1").ok();
    // As if the last look were long ago.
    let later = || {
        let path = shop.project.root.join("state/tags.json");
        let mut tags: Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
        for (_, tag) in tags["tags"].as_object_mut().unwrap() {
            tag["asked"] = "2020-01-01T00:00:00Z".into();
        }
        fs_err::write(&path, tags.to_string()).unwrap();
    };
    let state = |args: &[&str]| {
        let value = shop.verb(&["--json", "status", "tiny/prod"]).args(args).ok().json();
        (value["environments"][0]["tag"]["state"].clone(), value["not_looked_at"].as_array().unwrap().len())
    };
    shop.move_by_hand("prod", &strange);
    assert_eq!(state(&["--offline"]), ("set".into(), 0));
    let told = shop.verb(&["status"]).ok();
    told.prints("SOMEBODY MOVED the tag").says("SOMEBODY MOVED the tag").says(&strange.to_string()).says("--retag");
    assert_eq!(shop.tag("prod"), Some(strange), "it was overwritten");
    // Moved back by hand: seen, but not within the minute.
    shop.move_by_hand("prod", &one);
    assert_eq!(state(&[]), ("moved".into(), 0));
    later();
    assert_eq!(state(&[]), ("set".into(), 0));
    // A registry that is away, and one that does not answer, change nothing.
    drop(server);
    later();
    let told = shop.verb(&["status", "tiny/prod"]).ok();
    told.prints("1.0").says("not looked at where these tags stand: `127.0.0.1:").says_not("SOMEBODY");
    later();
    assert_eq!(state(&[]), ("set".into(), 1));
    later();
    let _silent = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    shop.verb(&["status", "tiny/prod"]).ok().prints("1.0").says("no answer within 2 s");
    assert_eq!(state(&[]), ("set".into(), 0), "it was asked again within the minute");
}

#[test]
fn a_registry_that_is_away_changes_no_decision() {
    let port = free_port();
    let shop = Shop::new(port, TWO);
    let (dir, one) = (shop.project.beside("server"), shop.release("1.0"));
    let two = shop.release("1.1");
    {
        let _server = Server::start_on(port, &dir, "");
        for (to, version) in [("dev", "1.0"), ("prod", "1.0"), ("dev", "1.1")] {
            shop.promote(to, version).ok();
        }
    }
    shop.promote("prod", "1.1").ok().prints("done: ").says("does not stand for 1.1").says("sets it");
    shop.verb(&["rollback", "tiny/prod"]).ok().prints("done: ");
    assert_eq!(shop.status("prod")["version"], "1.0");
    shop.promote("prod", "1.1").run().code(1);
    shop.verb(&["clear", "tiny/prod", "1.1"]).ok();
    shop.promote("prod", "1.1").arg("--lift").ok().says("does not stand for 1.1");
    assert_eq!(shop.status("prod")["tag"]["state"], "later");
    shop.verb(&["environment", "tags", "tiny"]).run().code(75);
    let _server = Server::start_on(port, &dir, "");
    assert_eq!(shop.tag("prod"), Some(one));
    shop.verb(&["environment", "tags", "tiny"]).ok();
    assert_eq!(shop.tag("prod"), Some(two));
    assert_eq!(shop.status("prod")["tag"]["state"], "set");
}

/// The decision stands, and what the registry said is told with whether trying again may help.
#[test]
fn a_registry_that_refuses_changes_no_decision() {
    for (status, code) in [(401, 1), (404, 1), (500, 75)] {
        let server = scripted(move |_, _| Http::status(status));
        let shop = Shop::new(server.port, TWO);
        shop.release("1.0");
        shop.promote("dev", "1.0").ok().prints("done: ").says("does not stand for 1.0");
        assert_eq!((&shop.status("dev")["version"], &shop.status("dev")["tag"]["state"]), (&"1.0".into(), &"later".into()));
        shop.verb(&["environment", "tags", "tiny"]).run().code(code).prints("not set yet");
    }
}

/// Killed at each of its writes from before the decision to after the tag: the next `status` does the rest.
#[test]
fn a_tag_that_a_killed_run_left_is_set_by_the_next() {
    let port = free_port();
    let shop = Shop::new(port, "  prod: {}\n");
    let _server = Server::start_on(port, &shop.project.beside("server"), "");
    let (mut decided, mut left) = (0, 0);
    for nth in 1.. {
        let version = format!("1.{nth}");
        let release = shop.release(&version);
        let answer = shop.promote("prod", &version).arg("--fault").arg(nth.to_string()).run();
        let killed = answer.status.code().is_none_or(|code| code == 137);
        assert!(killed || answer.status.success(), "{nth}: {}", answer.stderr);
        let before = shop.tag("prod");
        let state = shop.status("prod");
        if state["version"].as_str() == Some(&version) {
            decided += 1;
            left += usize::from(before != Some(release));
            assert_eq!(shop.tag("prod"), Some(release), "killed at point {nth}");
            assert_eq!(state["tag"]["state"], "set");
        } else {
            assert!(killed, "{nth}");
        }
        if !killed {
            break;
        }
    }
    assert!(decided > 3 && left > 2, "{decided} kills after the decision, {left} left a tag");
    shop.verb(&["ledger", "verify"]).ok();
}

#[test]
fn prune_leaves_what_a_rollback_needs() {
    // Nobody listens there: tags are not what is looked at.
    let shop = Shop::new(free_port(), "  dev: { keep: 2 }\n  prod: { from: dev, automatic: true, keep: 2 }\n");
    let text = shop.project.read("pipeline.yaml");
    shop.project
        .write("pipeline.yaml", text.lines().filter(|line| !line.starts_with("registry:")).collect::<Vec<_>>().join("\n"));
    shop.verb(&["environment", "apply"]).ok();
    let releases: Vec<Digest> = (1..=100)
        .map(|number| {
            let version = format!("1.{number}");
            let release = shop.release(&version);
            shop.promote("dev", &version).ok();
            release
        })
        .collect();
    let names = |store: &Store| -> BTreeSet<String> {
        store.index().unwrap().manifests.iter().map(|it| it.annotations[REF_NAME].clone()).collect()
    };
    let before = names(&shop.store());
    let would = shop.json(&["artifact", "prune", "--dry-run", "--keep", "1"]);
    assert_eq!(names(&shop.store()), before);
    let tags: Vec<&str> = would["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap()).collect();
    assert!(tags.contains(&"tiny:1.1.release") && !tags.contains(&"tiny:1.100.release"), "{tags:?}");
    let done = shop.json(&["artifact", "prune", "--keep", "1"]);
    assert_eq!((&done["tags"], &done["bytes"]), (&would["tags"], &would["bytes"]));
    let store = shop.store();
    let after = names(&store);
    let kept: Vec<&String> = after.iter().filter(|name| name.ends_with(".release")).collect();
    assert_eq!(kept, ["tiny:1.100.release", "tiny:1.98.release", "tiny:1.99.release", "tiny:latest.release"]);
    for (number, release) in releases.iter().enumerate() {
        let stays = number >= 97;
        assert_eq!(store.blob(release).exists(), stays, "1.{}", number + 1);
        let attached = after.iter().filter(|name| name.starts_with(&format!("sha256-{}.", release.hex()))).count();
        assert_eq!(attached, if stays { 2 } else { 0 }, "1.{}", number + 1);
        if stays {
            assert_eq!(release::check(&store, release).unwrap(), Vec::<String>::new());
            assert!(!referrer::blobs(&store, release).unwrap().iter().any(|blob| !store.has(&blob.digest, blob.size)));
        }
    }
    drop(store);
    // Twice back: both are whole, with their signatures.
    for expected in ["1.99", "1.98"] {
        shop.verb(&["rollback", "tiny/prod"]).ok();
        assert_eq!(shop.status("prod")["version"], expected);
        shop.verb(&["artifact", "verify", "--key", "ours.pub", &format!("tiny:{expected}")]).ok();
        let again = shop.json(&["artifact", "prune", "--keep", "1"]);
        assert!(!again["tags"].as_array().unwrap().iter().any(|tag| *tag == format!("tiny:{expected}.release").as_str()));
    }
    shop.verb(&["ledger", "verify"]).ok();
}

#[test]
fn what_somebody_approved_stays_and_a_broken_ledger_stops_prune() {
    let shop = Shop::new(free_port(), "  dev: { keep: 1 }\n  prod: { from: dev, keep: 1, gates: [ { approve: 1 } ] }\n");
    for version in ["1.0", "1.1", "1.2", "1.3", "1.4"] {
        shop.release(version);
        shop.promote("dev", version).ok();
        if version == "1.0" {
            shop.verb(&["approve", "tiny", "--for", "prod", "--release", "1.0"]).ok();
        }
    }
    let pruned = shop.json(&["artifact", "prune", "--dry-run"]);
    let tags: Vec<&str> = pruned["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap()).collect();
    let releases: Vec<&str> = tags.into_iter().filter(|tag| tag.ends_with(".release")).collect();
    assert_eq!(releases, ["tiny:1.1.release", "tiny:1.2.release"]);
    // A ledger that cannot be read needs nobody knows what.
    let head = shop.project.root.join("state/ledger/ledger.git/HEAD");
    fs_err::rename(&head, head.with_extension("away")).unwrap();
    let before = shop.store().index().unwrap().manifests.len();
    let answer = shop.verb(&["artifact", "prune"]).run();
    assert!(!answer.status.success(), "{}", answer.stdout);
    assert_eq!(shop.store().index().unwrap().manifests.len(), before);
}

#[test]
fn releases_are_signed_verified_and_shown() {
    let shop = Shop::new(free_port(), "  dev: {}\n  prod: { from: dev, gates: [ { report: { name: e2e } } ] }\n");
    let release = shop.release("1.0");
    shop.verb(&["keys", "generate", "other"]).ok();
    let verify = |key: &str| shop.verb(&["artifact", "verify", "--key", key, "tiny:1.0"]);
    shop.verb(&["verify", &format!("tiny@{release}"), "--key", "ours.pub"]).ok();
    verify("ours.pub").ok().prints("good: every byte is as its digest says, and signed");
    verify("other.pub")
        .run()
        .code(1)
        .prints("NOT GOOD")
        .prints("the image `tiny`: ")
        .prints("not signed by a key that was given");
    let signed = shop.json(&["artifact", "sign", &format!("tiny@{release}"), "--key", "other.key"]);
    assert_eq!((signed["signed"].as_array().unwrap().len(), &signed["signed"][0]), (2, &release.to_string().into()));
    verify("other.pub").ok();
    let shown = shop.json(&["artifact", "show", "tiny:1.0"]);
    assert_eq!((&shown["kind"], &shown["version"], &shown["revision"]), (&"release".into(), &"1.0".into(), &"c0ffee".into()));
    assert_eq!((shown["entries"].as_array().unwrap().len(), &shown["entries"][0]["kind"]), (1, &"image".into()));
    let kinds: Vec<&str> = shown["attached"].as_array().unwrap().iter().map(|it| it["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["sig", "bundle", "bundle"]);
    shop.verb(&["artifact", "show", "tiny:1.0"]).ok().prints("sig: 2 signatures").prints("says it is by ");
    assert_eq!(shop.json(&["artifact", "list"])["images"].as_array().unwrap().len(), 2);
    assert_eq!(shop.json(&["artifact", "list", "--all"])["images"].as_array().unwrap().len(), 8);

    // Reports: JUnit speaks for itself, and the newest counts.
    shop.promote("dev", "1.0").ok();
    let report = |file: &str, more: &[&str]| shop.verb(&["artifact", "report", "tiny:1.0", file, "--name", "e2e"]).args(more);
    shop.promote("prod", "1.0").run().code(1);
    shop.project.write("bad.xml", "<testsuite tests='1'><testcase name='a'><failure/></testcase></testsuite>");
    shop.project.write("good.xml", "<testsuite tests='1'><testcase name='a'/></testsuite>");
    shop.project.write("cut.xml", "<testsuite tests='1'><testcase name='a'/>");
    shop.project.write("log.txt", "all good\n");
    report("bad.xml", &[]).ok().prints("e2e says fail");
    shop.promote("prod", "1.0").run().code(1).prints("fail");
    report("bad.xml", &["--result", "pass"]).run().code(2).says("says that 1 tests failed");
    report("cut.xml", &[]).run().code(2).says("it ends inside `<testsuite>`");
    report("log.txt", &[]).run().code(2).says("--result pass");
    report("good.xml", &[]).ok().prints("e2e says pass");
    report("log.txt", &["--result", "fail"]).ok();
    shop.promote("prod", "1.0").run().code(1);
    report("log.txt", &["--result", "pass"]).ok();
    shop.promote("prod", "1.0").ok();

    // One byte of one blob.
    let layer = {
        let store = shop.store();
        let entry = release::read(&store, &release).unwrap().entries[0].digest;
        let layer = image::manifest(&store, &entry).unwrap().layers[1].digest;
        let mut bytes = fs_err::read(store.blob(&layer)).unwrap();
        bytes[600] ^= 1;
        fs_err::write(store.blob(&layer), bytes).unwrap();
        layer
    };
    verify("ours.pub").run().code(1).prints(&layer.to_string()).prints("is corrupt");
}

/// Packages are those of the bytes: whoever may push may attach another list.
#[test]
fn a_list_of_packages_that_somebody_attached_changes_no_answer() {
    let gate = "sbom: { deny: { packages: [\"npm:left-pad\"] } }";
    let shop = Shop::new(free_port(), &format!("  dev: {{}}\n  prod: {{ from: dev, gates: [ {{ {gate} }} ] }}\n"));
    let cases: [(&str, &str, &[u8], i32, &str); 3] = [
        ("1.0", "etc/version", b"1.0", 0, "ok  sbom  0 packages"),
        (
            "1.1",
            "app/node_modules/left-pad/package.json",
            br#"{"name":"left-pad","version":"1.3.0"}"#,
            1,
            "NO  sbom  package `left-pad` is denied",
        ),
        (
            "1.2",
            "var/lib/rpm/rpmdb.sqlite",
            b"x",
            1,
            "??  sbom  the list is not complete: nothing here reads the packages of `var/lib/rpm`",
        ),
    ];
    for (version, path, content, code, answer) in cases {
        let release = shop.release_with(version, path, content);
        let store = shop.store();
        let entry = release::read(&store, &release).unwrap().entries[0].clone();
        let subject = sbom::subject(&store, &entry.digest, "tiny", "0.1.0").unwrap();
        let forged = sbom::Inventory::default().spdx(&subject).unwrap();
        let types = (sbom::SPDX_TYPE, sbom::SPDX_TYPE);
        referrer::attach(&store, &entry.descriptor(), &referrer::Kind::Spdx, types, &forged, &BTreeMap::new()).unwrap();
        shop.promote("dev", version).ok();
        shop.promote("prod", version).run().code(code).prints(answer);
    }
}

/// Two people with two keys over one reference: the bytes they sign are the same, and both signatures stay.
#[test]
fn a_second_signer_takes_no_signature_away() {
    let port = free_port();
    let shops = [Shop::new(port, TWO), Shop::new(port, TWO)];
    let _server = Server::start_on(port, &shops[0].project.beside("server"), "");
    let releases = shops.each_ref().map(|shop| shop.release("1.0"));
    assert_eq!(releases[0], releases[1]);
    let target = format!("127.0.0.1:{port}/team/tiny:1.0");
    let signatures = |tag: &str| -> usize {
        let reference = format!("docker://127.0.0.1:{port}/team/tiny:{tag}");
        let raw = Cmd::new("skopeo").args(["inspect", "--raw", "--tls-verify=false", &reference]).text().unwrap();
        let manifest: Value = serde_json::from_str(&raw).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let all: BTreeSet<&str> = layers.iter().map(|layer| layer["annotations"][sign::SIGNATURE].as_str().unwrap()).collect();
        let payloads: BTreeSet<&str> = layers.iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
        assert_eq!((payloads.len(), all.len()), (1, layers.len()));
        layers.len()
    };
    let entry = release::read(&shops[0].store(), &releases[0]).unwrap().entries[0].digest;
    let tags = [releases[0], entry].map(|digest| format!("sha256-{}.sig", digest.hex()));
    // The first one's push at the end does not know the second one's.
    for (shop, expected) in [(0, 1), (1, 2), (0, 2)] {
        shops[shop].verb(&["artifact", "push", "tiny:1.0", &target]).ok();
        assert_eq!(tags.each_ref().map(|tag| signatures(tag)), [expected; 2]);
    }
    let keys = shops.each_ref().map(|shop| shop.project.path("ours.pub"));
    let third = shops[0].project.beside("third");
    let elsewhere = |args: &[&str]| shops[0].project.bare(&["--root"]).arg(&third).args(args);
    elsewhere(&["artifact", "pull", &target, "tiny:1.0"]).ok();
    for key in &keys {
        elsewhere(&["artifact", "verify", "tiny:1.0", "--key", key.to_str().unwrap()]).ok();
    }
}

/// Attachments that are there and are not what they should be: through the store, with each gate's own reader.
#[test]
fn what_is_attached_and_broken_allows_nothing() {
    let gates = "signed: { keys: [other.pub] } }, { provenance: { unsigned: true } }, { report: { name: e2e }";
    let shop = Shop::new(free_port(), "  dev: {}\n");
    shop.verb(&["keys", "generate", "other"]).ok();
    shop.project.edit(
        "pipeline.yaml",
        "  dev: {}\n",
        &format!("  dev: {{}}\n  prod: {{ from: dev, gates: [ {{ {gates} }} ] }}\n"),
    );
    shop.verb(&["environment", "apply"]).ok();
    let ask = || -> Vec<(String, String, String)> {
        let answer = shop.promote("prod", "1.0").args(&["--json", "--dry-run"]).run();
        answer.code(1);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let value = answer.json();
        let answers = value["outcome"]["plan"]["answers"].as_array().unwrap();
        answers.iter().map(|it| (text(&it["gate"]), text(&it["verdict"]), text(&it["reason"]))).collect()
    };
    let release = shop.release("1.0");
    shop.promote("dev", "1.0").ok();
    let bare = ask();
    let junk: [&[u8]; 3] = [b"", b"{\"", b"{\"payload\": 7, \"predicateType\": [], \"spdxVersion\": {}}"];
    for bytes in junk {
        {
            let store = shop.store();
            let index = release::read(&store, &release).unwrap();
            let subject = Descriptor::new(OCI_INDEX, release, fs_err::metadata(store.blob(&release)).unwrap().len());
            let entry = &index.entries[0];
            let image = Descriptor::new("application/vnd.oci.image.manifest.v1+json", entry.digest, entry.size);
            let attach = |subject: &Descriptor, kind: referrer::Kind, media_type: &str| {
                referrer::attach(&store, subject, &kind, (media_type, media_type), bytes, &BTreeMap::new()).unwrap();
            };
            attach(&subject, referrer::Kind::Bundle, "application/vnd.dev.sigstore.bundle.v0.3+json");
            attach(&subject, referrer::Kind::Provenance, "application/vnd.in-toto+json");
            attach(&image, referrer::Kind::Spdx, "application/spdx+json");
            referrer::attach_report(&store, &subject, ("e2e", "perhaps"), "application/xml", bytes).unwrap();
        }
        let broken = ask();
        for ((gate, verdict, reason), before) in broken.iter().zip(&bare) {
            assert_ne!(verdict, "allow", "{gate}: {reason}");
            assert!(!reason.is_empty() && before.1 != "allow", "{gate}: {reason}");
            // What cannot be read is passed over, and told; a report says something else than that there is none.
            assert!(gate != "report" || *reason != before.2, "{gate}: {reason}");
        }
        assert_eq!(broken.len(), 3);
    }
}

/// What another machine signed and reported arrives as it was.
#[test]
fn a_release_comes_back_with_its_signatures_and_reports() {
    let port = free_port();
    let shop = Shop::new(port, TWO);
    let _server = Server::start_on(port, &shop.project.beside("server"), "");
    let release = shop.release("1.0");
    shop.project.write("good.xml", "<testsuite tests='1'><testcase name='a'/></testsuite>");
    shop.verb(&["artifact", "report", "tiny:1.0", "good.xml", "--name", "e2e"]).ok();
    shop.promote("dev", "1.0").ok();
    let other = shop.project.beside("other");
    let elsewhere = |args: &[&str]| shop.project.bare(&["--root"]).arg(&other).args(args).env("GIT_AUTHOR_NAME", "bob");
    elsewhere(&["artifact", "pull", &format!("127.0.0.1:{port}/team/tiny:dev"), "tiny:1.0"]).ok();
    let shown = elsewhere(&["--json", "artifact", "show", &format!("tiny@{release}")]).ok().json();
    let attached: Vec<(String, String)> = shown["attached"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["kind"].as_str().unwrap().into(), it["result"].as_str().unwrap_or_default().into()))
        .collect();
    let expected =
        [("sig", ""), ("bundle", ""), ("report.e2e", "pass")].map(|(kind, result)| (kind.to_owned(), result.to_owned()));
    assert_eq!(attached, expected);
    elsewhere(&["artifact", "verify", "--key", "ours.pub", &release.to_string()]).ok();
    // Both sign again, each for itself: a pull brings them together, and a push loses none.
    elsewhere(&["keys", "generate", "theirs"]).ok();
    elsewhere(&["artifact", "sign", &release.to_string(), "--key", "theirs.key"]).ok();
    shop.verb(&["keys", "generate", "more"]).ok();
    shop.verb(&["artifact", "sign", "tiny:1.0", "--key", "more.key"]).ok();
    shop.verb(&["artifact", "push", "tiny:1.0", &format!("127.0.0.1:{port}/team/tiny:1.0")]).ok();
    elsewhere(&["artifact", "pull", &format!("127.0.0.1:{port}/team/tiny:1.0"), "tiny:1.0"]).ok();
    for key in ["ours.pub", "theirs.pub", "more.pub"] {
        elsewhere(&["artifact", "verify", "--key", key, &release.to_string()]).ok();
    }
    elsewhere(&["artifact", "push", &release.to_string(), &format!("127.0.0.1:{port}/team/tiny:1.0")]).ok();
}
