//! `pipeline artifact push|pull|copy|tag` with the built program and Debian's `docker-registry`.

#![allow(clippy::disallowed_methods, reason = "the program is started as a user starts it")]

#[path = "registry/servers.rs"]
#[allow(dead_code, reason = "shared with the library's tests")]
mod servers;

use std::path::Path;

use pipeline::artifact::store::{Descriptor, Store};
use pipeline::oci::digest::Digest;
use servers::{Layout, OCI_MANIFEST, Server};

/// Runs the program in a folder and an environment of its own; its answer, messages and exit code.
fn pipeline(dir: &Path, variables: &[(&str, &str)], args: &[&str]) -> (String, String, i32) {
    let command = std::process::Command::new(env!("CARGO_BIN_EXE_pipeline"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .envs(variables.iter().copied())
        .current_dir(dir)
        .arg("--root")
        .arg(dir.join("root"))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(command.stdout), text(command.stderr), command.status.code().unwrap())
}

fn json(dir: &Path, variables: &[(&str, &str)], args: &[&str]) -> serde_json::Value {
    let (answer, messages, code) = pipeline(dir, variables, args);
    assert_eq!(code, 0, "{args:?}: {messages}");
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn an_artifact_goes_to_a_registry_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let store = Store::open(&dir.path().join("root")).unwrap();
    for blob in fs_err::read_dir(dir.path().join("layout/blobs/sha256")).unwrap() {
        store.put(&fs_err::read(blob.unwrap().path()).unwrap()).unwrap();
    }
    let image = Digest::of(&layout.manifest);
    store.tag("shop:latest", &Descriptor::new(OCI_MANIFEST, image, layout.manifest.len() as u64)).unwrap();
    drop(store);
    let server = Server::start(&dir.path().join("server"), "");
    let (dir, host) = (dir.path(), format!("127.0.0.1:{}", server.port));
    let at = |rest: &str| format!("{host}/{rest}");

    let answer = json(dir, &[], &["artifact", "push", "shop", &at("team/shop:1.4"), "--json"]);
    assert_eq!(answer["schema"], 1);
    assert_eq!(answer["pushed"]["reference"], at(&format!("team/shop@{image}")));
    assert_eq!((&answer["pushed"]["blobs"]["sent"], &answer["pushed"]["tag"]["before"]), (&4.into(), &serde_json::Value::Null));
    assert_eq!(server.blob(Digest::of(&layout.layers[2])), layout.layers[2]);

    let (answer, messages, code) = pipeline(dir, &[], &["artifact", "copy", &at("team/shop:1.4"), &at("live/shop:1.4")]);
    assert_eq!(code, 0, "{messages}");
    let expected =
        format!("{}\ntag 1.4: new\nblobs: 0 sent (0 B), 4 mounted, 0 there; 0 attached\n", at(&format!("live/shop@{image}")));
    assert_eq!(answer, expected);
    assert!(
        messages.contains(&format!("{}: running, because copy of {}", at("live/shop:1.4"), at("team/shop:1.4"))),
        "{messages}"
    );

    // A second store, through a mirror by the file, under a name of its own.
    let other = dir.join("other");
    fs_err::create_dir_all(other.join(".config/pipeline")).unwrap();
    let nobody = servers::free_port();
    let settings = format!("mirrors: {{ '127.0.0.1:{nobody}': ['{host}/live'] }}\n");
    fs_err::write(other.join(".config/pipeline/registries.yaml"), settings).unwrap();
    let wanted = format!("127.0.0.1:{nobody}/shop:1.4");
    let answer = json(&other, &[], &["artifact", "pull", &wanted, "mine:2", "--json"]);
    assert_eq!(
        (&answer["name"], &answer["digest"], &answer["registry"]),
        (&"mine:2".into(), &image.to_string().into(), &host.clone().into())
    );
    let (_, messages, code) = pipeline(&other, &[], &["artifact", "tag", "mine:2", "mine:3"]);
    assert_eq!(code, 0, "{messages}");
    let answer = json(&other, &[], &["artifact", "list", "--json"]);
    let names: Vec<&str> = answer["images"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["mine:2", "mine:3"]);
    let (_, messages, code) = pipeline(&other, &[], &["artifact", "verify", "mine:3"]);
    assert_eq!(code, 0, "{messages}");
}

#[test]
fn settings_and_logins_come_from_the_environment() {
    const HTPASSWD: &str = "builder:$2y$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy\n";
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let htpasswd = dir.path().join("htpasswd");
    fs_err::write(&htpasswd, HTPASSWD).unwrap();
    let auth = format!("auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n", htpasswd.display());
    let server = Server::start(&dir.path().join("server"), &auth);
    server.push(&layout, "image", "team/app:1", &["--preserve-digests"], Some("builder:s3cret-pass"));
    let host = format!("127.0.0.1:{}", server.port);
    let app = format!("{host}/team/app:1");
    let login = [
        ("PIPELINE_REGISTRY", host.as_str()),
        ("PIPELINE_REGISTRY_USER", "builder"),
        ("PIPELINE_REGISTRY_PASSWORD", "s3cret-pass"),
    ];
    let answer = json(dir.path(), &login, &["artifact", "pull", &app, "--json"]);
    assert_eq!(answer["name"], "app:1");
    for (variables, code, message) in [
        (&login[1..], 2, "go together with `PIPELINE_REGISTRY`"),
        (&login[..2], 2, "go together with `PIPELINE_REGISTRY`"),
        (&[], 1, "did not allow to pull"),
        (&[("PIPELINE_REGISTRIES", "/nowhere/registries.yaml")], 2, "the file nowhere/registries.yaml does not exist"),
    ] {
        let (_, messages, told) = pipeline(dir.path(), variables, &["artifact", "pull", &app]);
        assert_eq!(told, code, "{messages}");
        assert!(messages.contains(message) && !messages.contains("s3cret"), "{messages}");
    }
}
