//! What a release is made of: signed by whom, whole, and built from what its provenance says.

use serde_json::Value;

use super::common::me;
use super::shop::{Shop, answers};

/// What is in the store and what was promised of it.
#[test]
fn releases_that_are_not_what_they_should_be() {
    let shop = Shop::without(
        me(),
        "environments:\n  dev: {}\n  prod:\n    from: dev\n    gates:\n    - signed: { keys: [keys/team.pub] }\n    - provenance: { clean: true, unsigned: true }\n    - name: late\n      provenance: { clean: true, keys: [keys/team.pub] }\n",
    );
    let keys = shop.project.path("keys");
    shop.project.write("keys/none", "");
    for name in ["team", "other"] {
        shop.verb(&["keys", "generate", name, "--output"]).arg(&keys).ok();
    }
    shop.project.write(".gitignore", "/base.tar\n/keys\n");
    shop.project.git(&["init", "--quiet"]);
    shop.project.git(&["add", "--all"]);
    shop.project.git(&["commit", "--quiet", "--message", "all"]);
    shop.verb(&["environment", "apply"]).ok();
    let make = |version: &str, key: Option<&str>| -> String {
        let key = key.map(|key| keys.join(format!("{key}.key")));
        let args: Vec<&str> = key.iter().flat_map(|key| ["--key", key.to_str().unwrap()]).collect();
        let run = shop.build(version, &["--json"]).args(&args);
        if !version.ends_with("dirty") {
            shop.project.git(&["commit", "--quiet", "--all", "--message", version]);
        }
        let answer = run.ok();
        shop.verb(&["promote", "--to", "dev", "--release", version]).ok();
        answer.json()["release"]["release"]["digest"].as_str().unwrap().into()
    };
    let promote = |version: &str| {
        let answer = shop.verb(&["--json", "promote", "--to", "prod", "--release", version]).run();
        let found = answers(&answer);
        let value = answer.json();
        let reason = value["outcome"]["plan"]["answers"][0]["reason"].as_str().unwrap().to_owned();
        (answer.status.code().unwrap(), found, reason)
    };
    let verdicts = |all: [&str; 3]| {
        ["signed", "provenance", "late"].iter().zip(all).map(|(gate, verdict)| format!("{gate} {verdict}")).collect::<Vec<_>>()
    };
    let refused = |version: &str, all: [&str; 3], why: &str| {
        let before = shop.tip();
        let (code, found, reason) = promote(version);
        assert_eq!((code, found), (1, verdicts(all)), "{version}: {reason}");
        assert!(reason.contains(why), "{version}: {reason}");
        assert_eq!(shop.tip(), before);
    };
    make("1.0-unsigned", None);
    refused("1.0-unsigned", ["deny", "allow", "deny"], "no signature by a key that counts");
    make("1.1-other", Some("other"));
    refused("1.1-other", ["deny", "allow", "deny"], "no signature by a key that counts");
    make("1.2-dirty", Some("team"));
    refused("1.2-dirty", ["allow", "deny", "deny"], "by one of 1 keys");
    // One byte of one blob; then the blob is gone.
    let digest = make("1.3", Some("team"));
    let blob = |digest: &str| shop.project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let read = |digest: &str| -> Value { serde_json::from_slice(&fs_err::read(blob(digest)).unwrap()).unwrap() };
    let image = read(&digest)["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let layer = read(&image)["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_owned();
    let good = fs_err::read(blob(&layer)).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs_err::write(blob(&layer), &bad).unwrap();
    refused("1.3", ["unknown", "allow", "allow"], &layer[..19]);
    fs_err::remove_file(blob(&layer)).unwrap();
    refused("1.3", ["unknown", "allow", "allow"], &layer[..19]);
    shop.project.write("blob", &good);
    fs_err::rename(shop.project.path("blob"), blob(&layer)).unwrap();
    assert_eq!(promote("1.3").0, 0);
    assert_eq!(shop.version("prod"), "1.3");
    shop.is_sound();
}

/// Whatever the gates are: what is missing or was changed goes nowhere.
#[test]
fn a_release_that_is_not_whole_goes_nowhere() {
    let shop = Shop::new(me(), "environments:\n  dev: {}\n  prod: { from: dev, gates: [ { healthy: true } ] }\n");
    let digest = shop.release("1.0");
    shop.verb(&["promote", "--to", "dev"]).ok();
    let blob = |digest: &str| shop.project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let read = |digest: &str| -> Value { serde_json::from_slice(&fs_err::read(blob(digest)).unwrap()).unwrap() };
    let image = read(&digest)["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let manifest = read(&image);
    let layer = manifest["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_owned();
    let config = manifest["config"]["digest"].as_str().unwrap().to_owned();
    for part in [&layer, &config, &image, &digest] {
        let good = fs_err::read(blob(part)).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        for (what, bytes) in [("one byte", Some(&bad)), ("gone", None)] {
            match bytes {
                Some(bytes) => fs_err::write(blob(part), bytes).unwrap(),
                None => fs_err::remove_file(blob(part)).unwrap(),
            }
            if part == &digest && bytes.is_none() {
                // A release that is not here at all is for its registry to be whole.
                shop.verb(&["promote", "--to", "prod", "--dry-run"]).ok();
                continue;
            }
            for args in [&["promote", "--to", "prod"][..], &["promote", "--to", "prod", "--dry-run"]] {
                let answer = shop.nothing_changes(|| shop.verb(args).run());
                answer.code(1).says(&format!("release {digest} is not whole in the store of this machine")).says(part);
                assert_eq!(shop.version("prod"), "nothing", "{what} of {part}");
            }
        }
        shop.project.write("blob", &good);
        fs_err::rename(shop.project.path("blob"), blob(part)).unwrap();
    }
    shop.verb(&["promote", "--to", "prod"]).ok();
    assert_eq!(shop.version("prod"), "1.0");
    shop.is_sound();
}

/// The gate as the documentation writes it, over what `build --release` makes.
#[test]
fn provenance_is_as_it_is_documented_and_knows_what_is_not_committed() {
    let gate = "provenance: { builders: [\"pipeline@*\"], clean: true, keys: [keys/team.pub] }";
    let shop = Shop::without(me(), &format!("environments:\n  dev: {{}}\n  prod: {{ from: dev, gates: [ {{ {gate} }} ] }}\n"));
    let keys = shop.project.path("keys");
    shop.project.write("keys/none", "");
    shop.verb(&["keys", "generate", "team", "--output"]).arg(&keys).ok();
    shop.project.write(".gitignore", "/base.tar\n/keys\n");
    shop.project.git(&["init", "--quiet"]);
    shop.verb(&["environment", "apply"]).ok();
    let key = keys.join("team.key");
    let dirty = "made from a source with changes that are not committed";
    let meddle: [(&str, &dyn Fn(), &str); 6] = [
        ("1.0", &|| {}, ""),
        ("1.1", &|| shop.project.write("pipeline.yaml", shop.project.read("pipeline.yaml") + "# changed\n"), dirty),
        (
            "1.2",
            &|| shop.project.write("builder/s2i/bin/assemble", shop.project.read("builder/s2i/bin/assemble") + "# x\n"),
            dirty,
        ),
        ("1.3", &|| shop.project.write("builder/s2i/bin/new", "#!/bin/sh\n"), dirty),
        ("1.4", &|| shop.project.write("src/new.html", "<p>\n"), dirty),
        ("1.5", &|| shop.project.write("beside", "of no use to the build\n"), ""),
    ];
    for (version, change, expected) in meddle {
        let run = shop.build(version, &["--key", key.to_str().unwrap()]);
        shop.project.git(&["add", "--all"]);
        shop.project.git(&["commit", "--quiet", "--message", version]);
        change();
        run.ok();
        shop.verb(&["promote", "--to", "dev", "--release", version]).ok();
        let answer = shop.verb(&["--json", "promote", "--to", "prod", "--release", version]).run();
        let found = answer.json()["outcome"]["plan"]["answers"][0].clone();
        if expected.is_empty() {
            assert_eq!(found["verdict"], "allow", "{version}: {found}");
            let reason = found["reason"].as_str().unwrap();
            assert!(reason.starts_with(&format!("built by `pipeline@{}` from ", env!("CARGO_PKG_VERSION"))), "{reason}");
        } else {
            assert_eq!((&found["verdict"], &found["reason"]), (&"deny".into(), &expected.into()), "{version}");
        }
    }
    shop.is_sound();
}
