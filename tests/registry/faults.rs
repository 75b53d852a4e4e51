//! Registries that fail on purpose: cut uploads, refusals, troubles that pass, lies, mirrors.

use std::path::{Path, PathBuf};

use pipeline::artifact::remote;
use pipeline::artifact::store::Store;
use pipeline::oci::digest::Digest;
use pipeline::oci::registry::{Pushed, Reach, RegistryOptions};
use pipeline::progress::Silent;

use super::faulty::{Asked, Fault, Faulty};
use super::push::{artifact, counts, filled, push, push_with, store};
use super::servers::{Layout, Server};
use super::{reference, registry, told};

/// Pushes through `script`, whose faults come once each in the order of the requests they fit.
fn with_faults(dir: &Path, faults: Vec<(&'static str, &'static str, Fault)>) -> (anyhow::Result<Pushed>, Faulty, Layout) {
    let (store, layout) = filled(dir);
    let mut faults = faults;
    let server = Faulty::start(true, move |asked: &Asked| {
        let position = faults.iter().position(|(method, part, _)| asked.is(method, part))?;
        Some(faults.remove(position).2)
    });
    let pushed = push(&store, &layout.manifest, server.port, "team/app:1");
    (pushed, server, layout)
}

#[test]
fn an_upload_that_was_cut_goes_on_where_the_registry_says() {
    // In the middle of the first request for it, of the second one too, with the last answer lost.
    for (faults, requests) in [
        (vec![("PATCH", "", Fault::CutBody(700_000))], 2),
        (vec![("PATCH", "", Fault::CutBody(700_000)), ("PATCH", "", Fault::CutBody(300_000))], 3),
        (vec![("PATCH", "", Fault::CutBody(0))], 2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (store, layout) = filled(dir.path());
        // Larger than what goes in one request.
        let big = layout.layers[2].repeat(4);
        assert!(big.len() - 1_000_000 > 4 << 20, "what is left goes with PATCH as well");
        let manifest = artifact(&store, &big, "text/x-big", None);
        let (mut left, count) = (faults.clone(), faults.len());
        let server = Faulty::start(true, move |asked: &Asked| {
            let position = left.iter().position(|(method, part, _)| asked.is(method, part))?;
            Some(left.remove(position).2)
        });
        let pushed = push(&store, &manifest, server.port, "app:1").unwrap();
        assert_eq!(pushed.blobs.sent, 2);
        let sent = server.asked(|asked| asked.method == "PATCH");
        assert_eq!(sent.len(), requests);
        let cut: Vec<usize> =
            faults.iter().map(|(_, _, fault)| if let Fault::CutBody(bytes) = fault { *bytes } else { 0 }).collect();
        let mut start = 0;
        for (index, asked) in sent.iter().enumerate() {
            assert_eq!(asked.headers["content-range"], format!("{start}-{}", big.len() - 1), "{index} of {count}");
            start += cut.get(index).copied().unwrap_or(0);
        }
        let state = server.state.lock().unwrap();
        assert_eq!(state.blobs[&Digest::of(&big)], big);
        // Nothing was received twice: the big one, and `{}`.
        assert_eq!(state.received, big.len() + 2);
    }
}

/// A range beyond the blob's end is no reason to count below zero.
#[test]
fn an_upload_that_claims_too_much_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let manifest = artifact(&store, &layout.layers[2].repeat(4), "text/x-big", None);
    for range in ["range: 0-99999999999\r\n", "range: 0-18446744073709551615\r\n"] {
        let headers: &'static str = Box::leak(format!("location: /v2/app/blobs/uploads/x\r\n{range}").into_boxed_str());
        let server = Faulty::start(true, move |asked: &Asked| asked.is("PATCH", "").then_some(Fault::Answer(202, headers, "")));
        let (code, message, _) = told(&push(&store, &manifest, server.port, "app:1").unwrap_err());
        assert_eq!(code, 1);
        assert!(message.contains("it says that it has ") && message.contains(" bytes of "), "{message}");
    }
}

#[test]
fn an_upload_the_registry_forgot_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let faults = vec![
        ("PUT", "/uploads/", Fault::CutBody(10)),
        ("GET", "/uploads/", Fault::Answer(404, "", "")),
        // And one whose answer is lost is found to be there.
        ("PUT", "/manifests/sha256", Fault::CutAnswer(0)),
    ];
    let (pushed, server, layout) = with_faults(dir.path(), faults);
    assert_eq!(counts(&pushed.unwrap()), (4, 0, 0));
    assert_eq!(server.asked(|asked| asked.method == "POST").len(), 5);
    assert_eq!(server.state.lock().unwrap().manifests["team/app/1"].1, layout.manifest);

    // It ran out between two parts; always: then that is told.
    for (times, good) in [(1, true), (usize::MAX, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (store, layout) = filled(dir.path());
        let mut left = times;
        let server = Faulty::start(true, move |asked: &Asked| {
            let second = asked.method == "PATCH" && asked.headers["content-range"].starts_with("300000-");
            (second && left > 0).then(|| {
                left -= 1;
                Fault::Answer(404, "", "")
            })
        });
        let options = RegistryOptions { part_limit: Some(300_000), ..RegistryOptions::default() };
        let pushed = push_with(&store, &layout.manifest, server.port, "app:1", &options, None);
        assert_eq!(pushed.is_ok(), good);
        assert_eq!(server.asked(|asked| asked.method == "POST").len(), if good { 5 } else { 6 });
    }
}

#[test]
fn a_cut_upload_reaches_a_real_registry() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let big = layout.layers[2].repeat(4);
    let manifest = artifact(&store, &big, "text/x-big", None);
    let server = Server::start(dir.path(), "");
    let proxy = super::servers::cutting_uploads(server.port, 1 << 20);
    push(&store, &manifest, proxy.port, "app:1").unwrap();
    assert_eq!(server.blob(Digest::of(&big)), big);
    assert!(proxy.cut(), "the proxy saw no upload to cut");
}

#[test]
fn large_blobs_go_in_parts_where_a_proxy_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    // A limit that is found out, and one that is set.
    for (limit, set) in [(1_100_000, None), (300_000, Some(300_000))] {
        let server = Faulty::start(true, move |asked: &Asked| {
            let length: usize = asked.headers.get("content-length")?.parse().ok()?;
            (length > limit).then_some(Fault::Answer(413, "", "<html>too large</html>"))
        });
        let options = RegistryOptions { part_limit: set, ..RegistryOptions::default() };
        push_with(&store, &layout.manifest, server.port, "app:1", &options, None).unwrap();
        let state = server.state.lock().unwrap();
        assert_eq!(state.blobs[&Digest::of(&layout.layers[2])], layout.layers[2]);
    }
}

#[test]
fn refusals_are_told_with_what_and_why() {
    const DENIED: &str = r#"{"errors":[{"code":"DENIED","message":"no"}]}"#;
    let always = |method: &'static str, part: &'static str, fault: Fault| {
        move |asked: &Asked| asked.is(method, part).then(|| fault.clone())
    };
    for (method, part, fault, code, message, hint) in [
        (
            "POST",
            "/uploads/",
            Fault::Answer(401, "", ""),
            1,
            "did not allow to push `BLOB`: it answered with status 401",
            "the account needs the right to write there",
        ),
        (
            "POST",
            "/uploads/",
            Fault::Answer(403, "", DENIED),
            1,
            "did not allow to push `BLOB`: it answered with status 403 (no)",
            "docker login",
        ),
        (
            "POST",
            "/uploads/",
            Fault::Answer(404, "", ""),
            1,
            "does not take `BLOB`: it answered with status 404",
            "some registries want `team/app` to be made there first",
        ),
        (
            "HEAD",
            "/blobs/",
            Fault::Answer(429, "Retry-After: 3600\r\n", ""),
            75,
            "it answered with status 429 and asks to wait 3600 s",
            "what arrived is not sent again",
        ),
        ("POST", "/uploads/", Fault::Answer(500, "", ""), 75, "it answered with status 500", "run the command again"),
        (
            "PUT",
            "/manifests/sha256",
            Fault::Answer(400, "", r#"{"errors":[{"code":"MANIFEST_INVALID","message":"odd"}]}"#),
            1,
            "cannot push `sha256:",
            "the registry may not know manifests of type `application/vnd.oci.image.manifest.v1+json`",
        ),
        (
            "PUT",
            "/manifests/1",
            Fault::Answer(403, "", DENIED),
            1,
            "refused the tag `1` of `team/app`: it answered with status 403 (no)",
            "choose another tag, or use the digest",
        ),
        (
            "PUT",
            "/manifests/1",
            Fault::Answer(201, "", ""),
            1,
            "said that it set the tag `1` of `team/app`, which stands for nothing",
            "somebody else may have set it",
        ),
        ("PUT", "/manifests/1", Fault::Answer(503, "", ""), 75, "it answered with status 503", "only the tag is missing"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (store, layout) = filled(dir.path());
        let server = Faulty::start(true, always(method, part, fault));
        let error = push(&store, &layout.manifest, server.port, "team/app:1").unwrap_err();
        let (told_code, told_message, hints) = told(&error);
        let blob = layout.layers.iter().chain([&layout.config]).map(|blob| Digest::of(blob).to_string());
        let shown = blob.fold(told_message, |shown, blob| shown.replace(&blob, "BLOB"));
        assert_eq!(told_code, code, "{shown}");
        assert!(shown.contains(message) && shown.contains(&format!("registry `127.0.0.1:{}`", server.port)), "{shown}");
        assert!(hints.contains(hint), "{hints}");
        // Nobody sees what is there only in part.
        assert!(!server.state.lock().unwrap().manifests.contains_key("team/app/1"));
    }
}

#[test]
fn short_troubles_are_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let faults = vec![
        ("HEAD", "/blobs/", Fault::Answer(429, "Retry-After: 1\r\n", "")),
        ("POST", "/uploads/", Fault::Answer(503, "", "")),
        ("PUT", "/uploads/", Fault::Answer(500, "", "")),
        ("PUT", "/manifests/1", Fault::Answer(502, "", "<html>")),
    ];
    let (pushed, server, layout) = with_faults(dir.path(), faults);
    pushed.unwrap();
    assert_eq!(server.state.lock().unwrap().manifests["team/app/1"].1, layout.manifest);
}

#[test]
fn a_damaged_or_missing_blob_of_the_store_is_not_pushed() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    for layer in [1, 2] {
        let server = Faulty::start(true, |_| None);
        let digest = Digest::of(&layout.layers[layer]);
        let mut bytes = layout.layers[layer].clone();
        bytes[0] ^= 1;
        fs_err::write(store.blob(&digest), &bytes).unwrap();
        let (code, message, _) = told(&push(&store, &layout.manifest, server.port, "app:1").unwrap_err());
        assert_eq!(
            (code, message),
            (1, format!("blob `{digest}` is corrupt: its bytes have the digest `{}`", Digest::of(&bytes)))
        );
        assert!(!server.state.lock().unwrap().blobs.contains_key(&digest));
        fs_err::remove_file(store.blob(&digest)).unwrap();
        let (code, message, _) = told(&push(&store, &layout.manifest, server.port, "app:1").unwrap_err());
        assert_eq!(
            (code, message),
            (1, format!("blob {digest} of {} is not in the store, so it cannot be pushed", Digest::of(&layout.manifest)))
        );
        store.put(&layout.layers[layer]).unwrap();
        assert!(server.state.lock().unwrap().manifests.is_empty());
    }
}

/// A registry in memory that holds the layout's image as `team/app:1`.
fn holding(dir: &Path) -> (Faulty, Layout) {
    let (store, layout) = filled(dir);
    let server = Faulty::start(true, |_| None);
    push(&store, &layout.manifest, server.port, "team/app:1").unwrap();
    (server, layout)
}

fn pull_into(dir: PathBuf, port: u16, options: &RegistryOptions) -> (Store, anyhow::Result<remote::Pulled>) {
    let store = store(&dir);
    let pulled = remote::pull(&store, &registry(options), &reference(port, "team/app:1"), None, Reach::All, &Silent);
    (store, pulled)
}

#[test]
fn a_pull_that_failed_goes_on_in_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let (server, layout) = holding(dir.path());
    let large = Digest::of(&layout.layers[2]);
    server.script(move |asked| asked.is("GET", &large.to_string()).then_some(Fault::CutAnswer(100_000)));
    let into = dir.path().join("into");
    let (store, pulled) = pull_into(into.clone(), server.port, &RegistryOptions::default());
    assert_eq!(told(&pulled.unwrap_err()).0, 75);
    assert!(store.tagged("app:1").unwrap().is_none());
    let part = store.temp_dir().join(format!("pull-{}", large.hex()));
    let have = fs_err::metadata(&part).unwrap().len();
    assert!(have >= 100_000 && have < layout.layers[2].len() as u64, "{have}");
    server.script(|_| None);
    let before = server.asked(|asked| asked.is("GET", &large.to_string())).len();
    let (store, pulled) = pull_into(into, server.port, &RegistryOptions::default());
    pulled.unwrap();
    store.verify(&large).unwrap();
    let asked = server.asked(|asked| asked.is("GET", &large.to_string()));
    assert_eq!(
        asked[before..].iter().map(|asked| asked.headers["range"].clone()).collect::<Vec<_>>(),
        [format!("bytes={have}-")]
    );
    assert!(!part.exists());

    // What lies there may be rubbish: then from the start.
    let into = dir.path().join("rubbish");
    let fresh = self::store(&into);
    fs_err::write(fresh.temp_dir().join(format!("pull-{}", large.hex())), "rubbish").unwrap();
    drop(fresh);
    let (store, pulled) = pull_into(into, server.port, &RegistryOptions::default());
    pulled.unwrap();
    store.verify(&large).unwrap();
}

#[test]
fn a_registry_that_lies_is_caught_in_documents_and_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let (server, layout) = holding(dir.path());
    for (part, what) in [
        (Digest::of(&layout.layers[1]).to_string(), Digest::of(&layout.layers[1]).to_string()),
        ("/manifests/1".to_owned(), format!("127.0.0.1:{}/team/app:1", server.port)),
    ] {
        server.script(move |asked| asked.is("GET", &part).then_some(Fault::Lie));
        let (store, pulled) = pull_into(dir.path().join("into"), server.port, &RegistryOptions::default());
        let (code, message, hint) = told(&pulled.unwrap_err());
        assert_eq!(code, 1);
        let expected = format!(
            "registry `127.0.0.1:{}` sent something else than `{what}`: the content does not have its digest",
            server.port
        );
        assert!(message.starts_with(&expected), "{message}");
        assert!(hint.contains("damaged"), "{hint}");
        assert!(store.tagged("app:1").unwrap().is_none() && !store.blob(&Digest::of(&layout.layers[1])).exists());
    }
}

#[test]
fn mirrors_are_asked_in_order_and_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, layout) = holding(dir.path());
    let lying = Faulty::start(true, |asked| asked.is("GET", "/blobs/").then_some(Fault::Lie));
    let good = Faulty::start(true, |_| None);
    for server in [&lying, &good] {
        let (from, mut to) = (origin.state.lock().unwrap(), server.state.lock().unwrap());
        to.blobs = from.blobs.clone();
        to.manifests = from.manifests.iter().map(|(name, kept)| (format!("hub/{name}"), kept.clone())).collect();
    }
    let host = |port: u16| format!("127.0.0.1:{port}");
    let nobody = super::servers::free_port();
    let mirrors = |ports: &[u16]| RegistryOptions {
        mirrors: [(host(origin.port), ports.iter().map(|port| format!("{}/hub", host(*port))).collect())].into(),
        ..RegistryOptions::default()
    };
    for (ports, from) in
        [(vec![nobody, lying.port, good.port], good.port), (vec![lying.port], origin.port), (vec![], origin.port)]
    {
        let (store, pulled) = pull_into(tempfile::tempdir_in(dir.path()).unwrap().keep(), origin.port, &mirrors(&ports));
        assert_eq!(pulled.unwrap().fetched.registry, host(from), "{ports:?}");
        for layer in &layout.layers {
            store.verify(&Digest::of(layer)).unwrap();
        }
    }
    // All of them are told of when none helps; a push asks no mirror.
    let gone = origin.state.lock().unwrap().manifests.split_off("team");
    let (_, pulled) = pull_into(dir.path().join("none"), origin.port, &mirrors(&[nobody, lying.port]));
    let (_, message, hints) = told(&pulled.unwrap_err());
    assert_eq!(message, format!("registry `{0}` has no `{0}/team/app:1`", host(origin.port)));
    for (port, words) in [(nobody, "Connection refused"), (lying.port, "sent something else")] {
        let line = hints.lines().find(|line| line.starts_with(&format!("its mirror `{}/hub` was asked first", host(port))));
        assert!(line.is_some_and(|line| line.contains(words)), "{hints}");
    }
    origin.state.lock().unwrap().manifests = gone;
    let (store, layout) = filled(&dir.path().join("again"));
    let asked = good.asked(|_| true).len();
    push_with(&store, &layout.manifest, origin.port, "team/app:2", &mirrors(&[good.port]), None).unwrap();
    assert_eq!(good.asked(|_| true).len(), asked);
}

#[test]
fn the_right_to_push_is_asked_for_with_its_scopes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let server = Faulty::start(true, |_| None);
    let port = server.port;
    // Reading is free, writing is not: the challenge comes with the first write only.
    server.script(move |asked: &Asked| {
        if asked.path.starts_with("/token") {
            let right = asked.path.contains("scope=repository%3Ateam%2Fapp%3Apull%2Cpush")
                && asked.path.contains("scope=repository%3Abase%3Apull")
                && asked.headers.get("authorization").is_some_and(|login| login.starts_with("Basic "));
            return Some(if right { Fault::Answer(200, "", r#"{"token":"t"}"#) } else { Fault::Answer(401, "", "") });
        }
        let writes = asked.method != "GET" && asked.method != "HEAD";
        let shown = asked.headers.get("authorization").is_some_and(|token| token == "Bearer t");
        let challenge: &'static str =
            format!("www-authenticate: Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"s\"\r\n").leak();
        (writes && !shown).then_some(Fault::Answer(401, challenge, ""))
    });
    let given = pipeline::oci::credentials::Given {
        key: format!("127.0.0.1:{port}"),
        user: "ci".into(),
        password: "s3cret".into(),
        origin: "the test".into(),
    };
    let options = RegistryOptions { given: Some(given), ..RegistryOptions::default() };
    push_with(&store, &layout.manifest, port, "team/app:1", &options, Some("base")).unwrap();
    let (code, message, hints) = told(&push(&store, &layout.arm_manifest, port, "team/app:2").unwrap_err());
    assert_eq!(code, 1);
    assert!(message.contains("did not allow to push") && hints.contains("the right to write"), "{message}\n{hints}");
}
