//! Pulls from and pushes to real registries (Debian's `docker-registry`, filled by `skopeo`) and scripted
//! ones that behave badly on purpose. Everything listens on 127.0.0.1 and dies with its test.

#[path = "registry/faults.rs"]
mod faults;
#[path = "registry/faulty.rs"]
mod faulty;
#[path = "registry/push.rs"]
mod push;
#[path = "registry/servers.rs"]
mod servers;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Result;
use base64::Engine as _;
use pipeline::cmd::Cmd;
use pipeline::error::{exit_code, hints};
use pipeline::oci::digest::Digest;
use pipeline::oci::registry::{BlobSink, Descriptor, Pinned, PulledImage, Reference, Registry, RegistryOptions};
use servers::{Answer, Layout, OCI_INDEX, OCI_MANIFEST, Proxied, Server, cutting_proxy, scripted, tool};

const USER: &str = "builder";
const PASSWORD: &str = "s3cret-pass";
/// `htpasswd -nbB builder s3cret-pass`
const HTPASSWD: &str = "builder:$2y$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy\n";

/// Keeps blobs in memory, and checks their digests as the store does.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<Digest, Vec<u8>>>);

impl Memory {
    fn blobs(&self) -> BTreeMap<Digest, Vec<u8>> {
        self.0.lock().unwrap().clone()
    }
}

impl BlobSink for Memory {
    fn has(&self, digest: &Digest, size: u64) -> bool {
        self.0.lock().unwrap().get(digest).is_some_and(|bytes| bytes.len() as u64 == size)
    }

    fn write(&self, digest: &Digest, size: u64, reader: &mut dyn Read) -> Result<()> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        anyhow::ensure!(Digest::of(&bytes) == *digest && bytes.len() as u64 == size, "the sink got other bytes");
        self.0.lock().unwrap().insert(*digest, bytes);
        Ok(())
    }
}

fn registry(options: &RegistryOptions) -> Registry {
    Registry::new(options).unwrap()
}

fn reference(port: u16, rest: &str) -> Reference {
    format!("127.0.0.1:{port}/{rest}").parse().unwrap()
}

fn pull(port: u16, rest: &str) -> (Result<PulledImage>, Memory) {
    let sink = Memory::default();
    let pulled = registry(&RegistryOptions::default()).pull(&reference(port, rest), None, &sink);
    (pulled, sink)
}

/// The error as `main` prints it, with its exit code.
fn told(error: &anyhow::Error) -> (u8, String, String) {
    (exit_code(error), format!("{error:#}"), hints(error).join("\n"))
}

fn auth_file(dir: &Path, name: &str, key: &str, password: &str) -> std::path::PathBuf {
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
    let path = dir.join(name);
    fs_err::write(&path, format!(r#"{{"auths":{{"{key}":{{"auth":"{auth}"}}}}}}"#)).unwrap();
    path
}

#[test]
fn an_image_comes_byte_for_byte_in_both_dialects() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    server.push(&layout, "image", "team/oci:1", &["--preserve-digests"], None);
    server.push(&layout, "plain", "team/docker:1", &["--format", "v2s2"], None);
    server.push(&layout, "index", "team/multi:1", &["--all", "--preserve-digests"], None);
    let (pulled, sink) = pull(server.port, "team/oci:1");
    let pulled = pulled.unwrap();
    assert_eq!(pulled.manifest_bytes, layout.manifest);
    assert_eq!(
        pulled.manifest,
        Descriptor { media_type: OCI_MANIFEST.into(), digest: Digest::of(&layout.manifest), size: layout.manifest.len() as u64 }
    );
    assert_eq!(pulled.config_bytes, layout.config);
    assert_eq!(
        pulled.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>(),
        layout.layers.iter().map(Digest::of).collect::<Vec<_>>()
    );
    assert_eq!(
        pulled.layers.iter().map(|layer| layer.media_type.rsplit('.').next().unwrap()).collect::<Vec<_>>(),
        ["tar+gzip", "tar+zstd", "tar"]
    );
    assert_eq!(sink.blobs(), layout.layers.iter().map(|layer| (Digest::of(layer), layer.clone())).collect());

    // Docker's dialect: skopeo compresses and describes anew; what the registry holds must come as it is.
    let (pulled, sink) = pull(server.port, "team/docker:1");
    let pulled = pulled.unwrap();
    assert_eq!(pulled.manifest.media_type, "application/vnd.docker.distribution.manifest.v2+json");
    assert_eq!(Digest::of(&pulled.manifest_bytes), pulled.manifest.digest);
    assert_eq!(server.blob(pulled.manifest.digest), pulled.manifest_bytes);
    assert_eq!(sink.blobs().len(), 2);
    for (digest, bytes) in sink.blobs() {
        assert_eq!(server.blob(digest), bytes);
    }

    // An index: the name is pinned by the index's digest, the manifest is linux/amd64's.
    let registry = registry(&RegistryOptions::default());
    let multi = reference(server.port, "team/multi:1");
    let pinned = registry.resolve(&multi).unwrap();
    assert_eq!(pinned, Pinned { digest: Digest::of(&layout.index), media_type: OCI_INDEX.into() });
    let sink = Memory::default();
    let by_pin = registry.pull(&multi, Some(pinned.digest), &sink).unwrap();
    assert_eq!(by_pin.manifest_bytes, layout.manifest);
    assert_eq!(registry.resolve(&multi.at(by_pin.manifest.digest)).unwrap().digest, Digest::of(&layout.manifest));
    let arm = registry.pull(&multi, Some(Digest::of(&layout.arm_manifest)), &sink).unwrap_err();
    assert!(arm.to_string().ends_with("has no image for `linux/amd64`; it has `linux/arm64`"), "{arm}");
}

#[test]
fn what_the_sink_has_is_not_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    server.push(&layout, "image", "a:1", &["--preserve-digests"], None);
    let sink = Memory::default();
    for layer in &layout.layers {
        sink.0.lock().unwrap().insert(Digest::of(layer), layer.clone());
        fs_err::remove_file(server.blob_path(Digest::of(layer))).unwrap();
    }
    let pulled = registry(&RegistryOptions::default()).pull(&reference(server.port, "a:1"), None, &sink).unwrap();
    assert_eq!(pulled.layers.len(), 3);
}

#[test]
fn a_login_is_taken_from_either_file_and_its_absence_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let htpasswd = dir.path().join("htpasswd");
    fs_err::write(&htpasswd, HTPASSWD).unwrap();
    let server = Server::start(dir.path(), &format!("auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n", htpasswd.display()));
    server.push(&layout, "image", "team/app:1", &["--preserve-digests"], Some(&format!("{USER}:{PASSWORD}")));
    let app = reference(server.port, "team/app:1");
    let host = app.registry().to_owned();
    let docker = auth_file(dir.path(), "config.json", &format!("http://{host}"), PASSWORD);
    let podman = auth_file(dir.path(), "auth.json", &format!("{host}/team"), PASSWORD);
    let wrong = auth_file(dir.path(), "wrong.json", &host, "not-the-s3cret");

    for options in [
        RegistryOptions { docker_config: Some(docker.clone()), ..RegistryOptions::default() },
        RegistryOptions { auth_files: vec![dir.path().join("absent.json"), podman.clone()], ..RegistryOptions::default() },
        // The namespace's entry is more specific than the wrong one for the whole registry.
        RegistryOptions { auth_files: vec![wrong.clone(), podman], ..RegistryOptions::default() },
    ] {
        let sink = Memory::default();
        assert_eq!(registry(&options).pull(&app, None, &sink).unwrap().manifest_bytes, layout.manifest);
        assert_eq!(sink.blobs().len(), 3);
    }

    let absent = dir.path().join("absent.json");
    for (options, hint) in [
        (
            RegistryOptions { auth_files: vec![absent.clone()], ..RegistryOptions::default() },
            format!("no credentials for it were found in `{}`", absent.display()),
        ),
        (
            RegistryOptions { docker_config: Some(wrong.clone()), ..RegistryOptions::default() },
            format!("the credentials came from `{}`", wrong.display()),
        ),
    ] {
        let error = registry(&options).pull(&app, None, &Memory::default()).unwrap_err();
        let (code, message, shown) = told(&error);
        assert_eq!(
            (code, message),
            (
                1,
                format!("registry `{host}` did not allow to pull `{app}`: it answered with status 401 (authentication required)")
            )
        );
        assert!(
            shown.starts_with(&hint) && shown.contains(&format!("`docker login {host}` or `podman login {host}`")),
            "{shown}"
        );
        assert!(!format!("{error:?}{shown}").contains("s3cret"), "{error:?}");
    }
}

#[test]
fn a_damaged_blob_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    server.push(&layout, "image", "a:1", &["--preserve-digests"], None);
    let damaged = Digest::of(&layout.layers[1]);
    let mut bytes = server.blob(damaged);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs_err::write(server.blob_path(damaged), &bytes).unwrap();
    let (pulled, sink) = pull(server.port, "a:1");
    let (code, message, _) = told(&pulled.unwrap_err());
    let actual = Digest::of(&bytes);
    let expected = format!(
        "registry `127.0.0.1:{}` sent something else than `{damaged}`: the content does not have its digest: expected `{damaged}`, got `{actual}`",
        server.port
    );
    assert_eq!((code, message), (1, expected));
    assert!(!sink.blobs().contains_key(&damaged));
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    server.push(&layout, "image", "a:1", &["--preserve-digests"], None);
    let large = &layout.layers[2];
    for ranges in [true, false] {
        let proxy = cutting_proxy(server.port, Digest::of(large), large.len() / 2, ranges);
        let (pulled, sink) = pull(proxy.port, "a:1");
        assert_eq!(pulled.unwrap().manifest_bytes, layout.manifest);
        assert_eq!(sink.blobs()[&Digest::of(large)], *large);
        let seen: Vec<Proxied> = proxy.seen();
        assert_eq!(seen.len(), 2, "{seen:?}");
        assert_eq!(seen[0].range, None);
        let start: usize =
            seen[1].range.as_ref().unwrap().strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
        assert!(start > 0 && start <= large.len() / 2, "{seen:?}");
    }
}

#[test]
fn a_registry_that_is_not_there_is_transient() {
    let port = servers::free_port();
    let (pulled, _) = pull(port, "a:1");
    let (code, message, _) = told(&pulled.unwrap_err());
    let expected = format!(
        "cannot pull `127.0.0.1:{port}/a:1` from registry `127.0.0.1:{port}`: it cannot be reached: Connection refused (os error 111)"
    );
    assert_eq!((code, message), (75, expected));

    let unknown: Reference = "no-such-host.invalid/a:1".parse().unwrap();
    let error = registry(&RegistryOptions::default()).resolve(&unknown).unwrap_err();
    let (code, message, _) = told(&error);
    assert_eq!(code, 75);
    assert!(
        message
            .starts_with("cannot pull `no-such-host.invalid/a:1` from registry `no-such-host.invalid`: it cannot be reached: "),
        "{message}"
    );
}

#[test]
fn a_wrong_tag_gets_the_nearest_one() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    for tag in ["trixie", "bookworm"] {
        server.push(&layout, "image", &format!("a:{tag}"), &["--preserve-digests"], None);
    }
    let port = server.port;
    let gone = Digest::of("gone");
    for (rest, hint) in [
        ("a:triixe".to_owned(), "the nearest tag there is `trixie`".to_owned()),
        ("a:42".to_owned(), "tags there: `bookworm`, `trixie`".to_owned()),
        ("b:1".to_owned(), "`b` may not exist there, or need a login".to_owned()),
        (format!("a@{gone}"), "it was pinned and is gone there; `pipeline update` pins what the name stands for now".to_owned()),
    ] {
        let (pulled, _) = pull(port, &rest);
        let (code, message, shown) = told(&pulled.unwrap_err());
        assert_eq!((code, message, shown), (1, format!("registry `127.0.0.1:{port}` has no `127.0.0.1:{port}/{rest}`"), hint));
    }
}

#[test]
fn certificates_are_checked_unless_the_registry_is_listed() {
    tool("openssl", "openssl");
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let (key, certificate) = (dir.path().join("key.pem"), dir.path().join("cert.pem"));
    let request = Cmd::new("openssl").args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "30",
    ]);
    let request = request.args([
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]);
    request.arg("-keyout").arg(&key).arg("-out").arg(&certificate).run().unwrap();
    let tls = format!("  tls: {{ certificate: {}, key: {} }}\n", certificate.display(), key.display());
    let server = Server::start(dir.path(), &tls);
    server.push(&layout, "image", "a:1", &["--preserve-digests"], None);
    let app = reference(server.port, "a:1");
    let trusting = RegistryOptions { ca_bundle: Some(certificate.clone()), ..RegistryOptions::default() };
    let insecure = RegistryOptions { insecure: vec!["127.0.0.1".into()], ..RegistryOptions::default() };
    for options in [trusting, insecure] {
        assert_eq!(registry(&options).resolve(&app).unwrap().digest, Digest::of(&layout.manifest));
    }

    // The same server under a name that its certificate does not hold.
    let options = RegistryOptions { ca_bundle: Some(certificate), ..RegistryOptions::default() };
    let error = registry(&options).resolve(&format!("localhost:{}/a:1", server.port).parse().unwrap()).unwrap_err();
    let (code, message, shown) = told(&error);
    assert_eq!(code, 1);
    let expected = format!("registry `localhost:{}` cannot be trusted: its certificate was not accepted: ", server.port);
    assert!(message.starts_with(&expected), "{message}");
    assert_eq!(shown, "a registry with a certificate of your own authority needs that authority in the CA bundle");
}

/// A manifest with no layers and its configuration, as two answers.
fn tiny() -> (Vec<u8>, Vec<u8>) {
    let config = br#"{"os":"linux","architecture":"amd64"}"#.to_vec();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[]}}"#,
        Digest::of(&config),
        config.len()
    );
    (manifest.into_bytes(), config)
}

#[test]
fn an_identity_token_is_exchanged_and_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let (manifest, config) = tiny();
    let expected = manifest.clone();
    // The first access token is good for the manifest only: it runs out before the configuration.
    let server = scripted(move |request, log| {
        let exchanged = log.iter().filter(|line| line.starts_with("POST /token")).count();
        let bearer = request.header("authorization").unwrap_or_default();
        match request.path.as_str() {
            "/v2/" => Answer::status(401)
                .header("www-authenticate", &format!("Bearer realm=\"http://127.0.0.1:{}/token\",service=\"s\"", request.port)),
            "/token"
                if request.body.contains("grant_type=refresh_token") && request.body.contains("refresh_token=refresh-s3cret") =>
            {
                assert!(request.body.contains("scope=repository%3Ateam%2Fapp%3Apull"), "{}", request.body);
                Answer::ok(format!(r#"{{"access_token":"access{exchanged}"}}"#))
            }
            "/v2/team/app/manifests/1" if bearer == "Bearer access1" => Answer::ok(manifest.clone()),
            path if path.starts_with("/v2/team/app/blobs/") && bearer == "Bearer access2" => Answer::ok(config.clone()),
            _ => Answer::status(401),
        }
    });
    let file = dir.path().join("auth.json");
    let host = format!("127.0.0.1:{}", server.port);
    fs_err::write(&file, format!(r#"{{"auths":{{"{host}":{{"identitytoken":"refresh-s3cret"}}}}}}"#)).unwrap();
    let options = RegistryOptions { auth_files: vec![file.clone()], ..RegistryOptions::default() };
    let pulled = registry(&options).pull(&reference(server.port, "team/app:1"), None, &Memory::default()).unwrap();
    assert_eq!(pulled.manifest_bytes, expected);

    fs_err::write(&file, format!(r#"{{"auths":{{"{host}":{{"identitytoken":"expired-s3cret"}}}}}}"#)).unwrap();
    let error = registry(&options).pull(&reference(server.port, "team/app:1"), None, &Memory::default()).unwrap_err();
    let (code, message, shown) = told(&error);
    assert_eq!(
        (code, message),
        (1, format!("registry `{host}` did not allow to pull `{host}/team/app:1`: it answered with status 401"))
    );
    assert!(shown.starts_with(&format!("the credentials came from `{}`", file.display())), "{shown}");
    assert!(!format!("{error:?}").contains("s3cret"));
}

/// A redirect that keeps the method would repeat the form, and the refresh token in it, at another host.
#[test]
fn credentials_follow_no_redirect_of_the_token_service() {
    let dir = tempfile::tempdir().unwrap();
    for (entry, status) in [
        (r#"{"identitytoken":"refresh-s3cret"}"#, 307),
        (r#"{"identitytoken":"refresh-s3cret"}"#, 308),
        (r#"{"username":"me","password":"s3cret"}"#, 302),
    ] {
        let elsewhere = scripted(|_, _| Answer::ok(r#"{"token":"right"}"#));
        let thief = elsewhere.port;
        let server = scripted(move |request, _| match request.path.as_str() {
            "/v2/" => Answer::status(401)
                .header("www-authenticate", &format!("Bearer realm=\"http://127.0.0.1:{}/token\"", request.port)),
            "/token" => Answer::status(status).header("location", &format!("http://localhost:{thief}/token")),
            _ => Answer::status(401),
        });
        let file = dir.path().join("auth.json");
        fs_err::write(&file, format!(r#"{{"auths":{{"127.0.0.1:{}":{entry}}}}}"#, server.port)).unwrap();
        let options = RegistryOptions { auth_files: vec![file], ..RegistryOptions::default() };
        let error = registry(&options).pull(&reference(server.port, "team/app:1"), None, &Memory::default()).unwrap_err();
        assert!(told(&error).1.contains("its token service sends the credentials on to another address"), "{error:#}");
        assert_eq!(elsewhere.log(), Vec::<String>::new());
    }
}

#[test]
fn a_password_goes_to_the_token_service_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let (manifest, config) = tiny();
    // Where large registries keep their blobs: another host, by a signed address.
    let elsewhere = scripted(move |request, _| match request.header("authorization") {
        None => Answer::ok(config.clone()),
        Some(_) => Answer::status(400),
    });
    let storage = elsewhere.port;
    let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let server = scripted(move |request, _| {
        let authorization = request.header("authorization").unwrap_or_default();
        match request.path.as_str() {
            "/v2/" => Answer::status(401)
                .header("www-authenticate", &format!("Bearer realm=\"http://127.0.0.1:{}/token\"", request.port)),
            "/token" if authorization == basic => Answer::ok(r#"{"token":"right"}"#),
            "/token" => Answer::status(401).body(r#"{"details":"incorrect username or password"}"#),
            _ if authorization != "Bearer right" => Answer::status(401),
            "/v2/team/app/manifests/1" => Answer::ok(manifest.clone()),
            _ => Answer::status(307).header("location", &format!("http://localhost:{storage}/blob?signature=s3cret")),
        }
    });
    let host = format!("127.0.0.1:{}", server.port);
    let app = reference(server.port, "team/app:1");
    let options = RegistryOptions {
        docker_config: Some(auth_file(dir.path(), "config.json", &host, PASSWORD)),
        ..RegistryOptions::default()
    };
    let pulled = registry(&options).pull(&app, None, &Memory::default()).unwrap();
    assert_eq!(pulled.config_bytes, tiny().1);
    assert_eq!(elsewhere.log(), ["GET /blob"]);

    let options = RegistryOptions {
        docker_config: Some(auth_file(dir.path(), "wrong.json", &host, "s3cret")),
        ..RegistryOptions::default()
    };
    let (code, message, _) = told(&registry(&options).pull(&app, None, &Memory::default()).unwrap_err());
    let expected =
        format!("registry `{host}` did not allow to pull `{app}`: it answered with status 401 (incorrect username or password)");
    assert_eq!((code, message), (1, expected));
}

#[test]
fn overloaded_registries_are_tried_again_and_refusals_are_not() {
    let (manifest, config) = tiny();
    for (status, body, tries, code, message) in [
        (429, r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#, 2, 0, ""),
        (503, "<html>", 2, 0, ""),
        (
            403,
            r#"{"errors":[{"code":"DENIED","message":"not yours"}]}"#,
            1,
            1,
            "did not allow to pull `HOST/a:1`: it answered with status 403 (not yours)",
        ),
    ] {
        let (manifest, config) = (manifest.clone(), config.clone());
        let server = scripted(move |request, log| {
            let asked = log.iter().filter(|line| line.contains("/manifests/")).count();
            match request.path.as_str() {
                "/v2/" => Answer::ok(""),
                "/v2/a/manifests/1" if asked == 1 => Answer::status(status).body(body),
                "/v2/a/manifests/1" => Answer::ok(manifest.clone()),
                _ => Answer::ok(config.clone()),
            }
        });
        let (pulled, _) = pull(server.port, "a:1");
        let asked = server.log().iter().filter(|line| line.contains("/manifests/")).count();
        assert_eq!(asked, tries, "{status}");
        match pulled {
            Ok(_) => assert_eq!(code, 0, "{status}"),
            Err(error) => {
                let (told_code, told_message, _) = told(&error);
                let host = format!("127.0.0.1:{}", server.port);
                assert_eq!((told_code, told_message), (code, format!("registry `{host}` {}", message.replace("HOST", &host))));
            }
        }
    }
}

#[test]
fn a_blob_of_another_length_is_refused() {
    let (manifest, config) = tiny();
    let server = scripted(move |request, _| match request.path.as_str() {
        "/v2/" => Answer::ok(""),
        "/v2/a/manifests/1" => Answer::ok(manifest.clone()),
        _ => Answer::ok([config.clone(), b" ".to_vec()].concat()),
    });
    let (pulled, _) = pull(server.port, "a:1");
    let (code, message, _) = told(&pulled.unwrap_err());
    assert_eq!(code, 1);
    assert!(message.ends_with("it sent more than the 37 bytes of the manifest"), "{message}");
}
