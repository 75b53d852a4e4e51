//! Pushes, copies and complete pulls, between stores, Debian's `docker-registry` (which has no list
//! of referrers) and a registry in memory. `skopeo` looks at what arrived.

use std::collections::BTreeSet;
use std::path::Path;

use pipeline::artifact::remote;
use pipeline::artifact::store::{Descriptor, Store};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use pipeline::oci::registry::{Pushed, Reach, RegistryOptions};
use pipeline::progress::{Event, Progress, Silent};

use super::faulty::{Asked, Fault, Faulty};
use super::servers::{Layout, OCI_INDEX, OCI_MANIFEST, Server};
use super::{reference, registry, told};

const RELEASE: &str = "application/vnd.pipeline.release.v1";
const SPDX: &str = "application/spdx+json";

pub fn store(dir: &Path) -> Store {
    Store::open(dir).unwrap()
}

/// A store with what the layout holds.
pub fn filled(dir: &Path) -> (Store, Layout) {
    let layout = Layout::new(&dir.join("layout"));
    let store = store(&dir.join("store"));
    for blob in fs_err::read_dir(dir.join("layout/blobs/sha256")).unwrap() {
        store.put(&fs_err::read(blob.unwrap().path()).unwrap()).unwrap();
    }
    (store, layout)
}

fn descriptor(kind: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()})
}

/// A manifest of one layer in the store; with `subject` a referrer to it.
pub fn artifact(store: &Store, content: &[u8], artifact_type: &str, subject: Option<&[u8]>) -> Vec<u8> {
    store.put(content).unwrap();
    store.put(b"{}").unwrap();
    let mut value = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": artifact_type,
        "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"), "layers": [descriptor("text/plain", content)],
    });
    if let Some(subject) = subject {
        value["subject"] = descriptor(OCI_MANIFEST, subject);
    }
    let bytes = serde_json::to_vec(&value).unwrap();
    store.put(&bytes).unwrap();
    bytes
}

fn tag(store: &Store, name: &str, kind: &str, bytes: &[u8]) {
    store.tag(name, &Descriptor::new(kind, Digest::of(bytes), bytes.len() as u64)).unwrap();
}

pub fn push(store: &Store, bytes: &[u8], port: u16, rest: &str) -> anyhow::Result<Pushed> {
    push_with(store, bytes, port, rest, &RegistryOptions::default(), None)
}

pub fn push_with(
    store: &Store,
    bytes: &[u8],
    port: u16,
    rest: &str,
    options: &RegistryOptions,
    mount_from: Option<&str>,
) -> anyhow::Result<Pushed> {
    let to = reference(port, rest);
    remote::push(store, &registry(options), &Digest::of(bytes), &to, mount_from.map(str::to_owned), &Silent)
}

fn skopeo(args: &[&str]) -> Vec<u8> {
    let home = tempfile::tempdir().unwrap();
    let command = Cmd::new("skopeo").env("HOME", home.path()).env_remove("XDG_RUNTIME_DIR").env_remove("REGISTRY_AUTH_FILE");
    let output = command.arg("--insecure-policy").args(args).output().unwrap();
    assert!(output.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn raw(port: u16, rest: &str) -> Vec<u8> {
    skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://127.0.0.1:{port}/{rest}")])
}

/// Sent, mounted, there.
pub fn counts(pushed: &Pushed) -> (usize, usize, usize) {
    (pushed.blobs.sent, pushed.blobs.mounted, pushed.blobs.there)
}

#[test]
fn a_push_sends_what_is_missing_and_skopeo_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let server = Server::start(dir.path(), "");
    // Three layers, two configurations.
    let pushed = push(&store, &layout.index, server.port, "team/app:1").unwrap();
    assert_eq!((counts(&pushed), pushed.documents), ((5, 0, 0), 3));
    let tag = pushed.tag.unwrap();
    assert_eq!((tag.name.as_str(), tag.before, tag.now), ("1", None, Digest::of(&layout.index)));
    assert_eq!(raw(server.port, "team/app:1"), layout.index);
    let copied = dir.path().join("copied");
    skopeo(&[
        "copy",
        "--all",
        "--src-tls-verify=false",
        &format!("docker://127.0.0.1:{}/team/app:1", server.port),
        &format!("dir:{}", copied.display()),
    ]);
    for layer in &layout.layers {
        assert_eq!(fs_err::read(copied.join(Digest::of(layer).hex())).unwrap(), *layer);
    }

    // Again: nothing moves. A line edited: one layer, the configuration, the manifest.
    let pushed = push(&store, &layout.index, server.port, "team/app:1").unwrap();
    assert_eq!((counts(&pushed), pushed.documents), ((0, 0, 5), 0));
    assert_eq!(pushed.tag.unwrap().before, Some(Digest::of(&layout.index)));
    let mut edited: serde_json::Value = serde_json::from_slice(&layout.manifest).unwrap();
    for (part, bytes) in [("/config", &b"{\"os\":\"linux\"}"[..]), ("/layers/1", b"edited")] {
        let part = edited.pointer_mut(part).unwrap();
        *part = descriptor(part["mediaType"].as_str().unwrap(), bytes);
        store.put(bytes).unwrap();
    }
    let edited = serde_json::to_vec(&edited).unwrap();
    store.put(&edited).unwrap();
    let pushed = push(&store, &edited, server.port, "team/app:1").unwrap();
    assert_eq!((counts(&pushed), pushed.documents, pushed.blobs.sent_bytes), ((2, 0, 2), 1, 20));
    assert_eq!(pushed.tag.unwrap().before, Some(Digest::of(&layout.index)));
    assert_eq!(raw(server.port, "team/app:1"), edited);

    // By digest, without a tag; and by another one.
    let to = format!("team/app@{}", Digest::of(&layout.manifest));
    assert_eq!(push(&store, &layout.manifest, server.port, &to).unwrap().tag, None);
    let error = push(&store, &edited, server.port, &to).unwrap_err();
    assert!(error.to_string().contains("names another digest than what is pushed"), "{error}");
}

#[test]
fn blobs_of_another_repository_are_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let server = Server::start(dir.path(), "");
    push(&store, &layout.manifest, server.port, "base:1").unwrap();
    let options = RegistryOptions::default();
    let pushed = push_with(&store, &layout.manifest, server.port, "shop:1", &options, Some("base")).unwrap();
    assert_eq!(counts(&pushed), (0, 4, 0));
    // A repository that is not there is no reason not to push.
    let pushed = push_with(&store, &layout.manifest, server.port, "other:1", &options, Some("nowhere")).unwrap();
    assert_eq!(counts(&pushed), (4, 0, 0));
    for name in ["shop:1", "other:1"] {
        assert_eq!(raw(server.port, name), layout.manifest);
    }
}

/// An image with a signature beside it, an SBOM that refers to it, and a note about the SBOM.
fn attached(dir: &Path) -> (Store, Layout, Vec<Vec<u8>>) {
    let (store, layout) = filled(dir);
    let image = Digest::of(&layout.manifest).hex();
    let signature = artifact(&store, b"signature", "application/vnd.dev.cosign", None);
    tag(&store, &format!("sha256-{image}.sig"), OCI_MANIFEST, &signature);
    let sbom = artifact(&store, b"sbom", SPDX, Some(&layout.manifest));
    tag(&store, &format!("sha256-{image}.sbom.spdx"), OCI_MANIFEST, &sbom);
    let note = artifact(&store, b"note", "text/x-note", Some(&sbom));
    tag(&store, &format!("sha256-{}.other", Digest::of(&sbom).hex()), OCI_MANIFEST, &note);
    (store, layout, vec![signature, sbom, note])
}

#[test]
fn what_is_attached_goes_along_to_both_kinds_of_registry_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout, parts) = attached(dir.path());
    let image = Digest::of(&layout.manifest);
    let old = Server::start(dir.path(), "");
    let new = Faulty::start(true, |_| None);
    let client = registry(&RegistryOptions::default());
    for (port, has_list) in [(old.port, false), (new.port, true)] {
        for _ in 0..2 {
            let pushed = push(&store, &layout.manifest, port, "team/app:1").unwrap();
            assert_eq!(pushed.attached, 3);
        }
        let app = reference(port, "team/app:1");
        let tags: BTreeSet<String> = client.tags(&app).unwrap().into_iter().collect();
        let (sig, list) = (format!("sha256-{}.sig", image.hex()), format!("sha256-{}", image.hex()));
        assert_eq!((tags.contains(&sig), tags.contains(&list)), (true, !has_list), "{tags:?}");
        let found = client.referrers(&app, &image, None).unwrap();
        assert_eq!(found.iter().map(|entry| entry.descriptor.digest).collect::<Vec<_>>(), [Digest::of(&parts[1])]);
        assert_eq!(found[0].artifact_type.as_deref(), Some(SPDX));
        assert_eq!(client.referrers(&app, &image, Some("text/x-note")).unwrap(), []);
        assert_eq!(client.referrers(&app, &Digest::of(&parts[1]), Some("text/x-note")).unwrap().len(), 1);

        let other = self::store(&dir.path().join(format!("other-{port}")));
        let pulled = remote::pull(&other, &client, &app, Some("app:2"), Reach::Machine, &Silent).unwrap();
        assert_eq!(pulled.names, [("app:2".to_owned(), image)]);
        for name in [&sig, &format!("sha256-{}.sbom.spdx", image.hex()), &format!("sha256-{}.other", Digest::of(&parts[1]).hex())]
        {
            assert_eq!(other.tagged(name).unwrap().unwrap().digest, store.tagged(name).unwrap().unwrap().digest, "{name}");
        }
        for bytes in parts.iter().chain(&layout.layers).chain([&layout.config, &layout.manifest]) {
            other.verify(&Digest::of(bytes)).unwrap();
        }
        // The same once more fetches nothing and names nothing twice.
        let names = other.index().unwrap().manifests.len();
        let pulled = remote::pull(&other, &client, &app, Some("app:2"), Reach::Machine, &Silent).unwrap();
        assert_eq!((pulled.fetched.bytes, other.index().unwrap().manifests.len()), (0, names));
    }
    // What the fallback tag holds is an index that every client can read.
    let list: serde_json::Value = serde_json::from_slice(&raw(old.port, &format!("team/app:sha256-{}", image.hex()))).unwrap();
    assert_eq!(list["manifests"].as_array().unwrap().len(), 1);
    assert_eq!(list["manifests"][0]["artifactType"], SPDX);
}

#[test]
fn a_signature_that_only_one_side_has_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout, _) = attached(dir.path());
    let server = Faulty::start(true, |_| None);
    push(&store, &layout.manifest, server.port, "app:1").unwrap();
    let name = format!("sha256-{}.sig", Digest::of(&layout.manifest).hex());
    let theirs = artifact(&store, b"another signature", "application/vnd.dev.cosign", None);
    tag(&store, &name, OCI_MANIFEST, &theirs);
    let client = registry(&RegistryOptions::default());
    let ours = client.digest(&reference(server.port, &format!("app:{name}"))).unwrap().unwrap();
    // What the registry has is added to what the store has, and goes along.
    push(&store, &layout.manifest, server.port, "app:1").unwrap();
    let both = store.read(&store.tagged(&name).unwrap().unwrap().digest).unwrap();
    let both: serde_json::Value = serde_json::from_slice(&both).unwrap();
    let layers = |manifest: &[u8]| {
        let manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
        manifest["layers"].as_array().unwrap().clone()
    };
    assert_eq!(both["layers"].as_array().unwrap()[..], [layers(&theirs), layers(&store.read(&ours).unwrap())].concat());
    let now = client.digest(&reference(server.port, &format!("app:{name}"))).unwrap();
    assert_eq!(now, Some(store.tagged(&name).unwrap().unwrap().digest));
    // Between two registries nobody puts them together, and nothing is lost either.
    let other = Faulty::start(true, |_| None);
    let theirs = self::store(&dir.path().join("theirs"));
    for bytes in layout.layers.iter().chain([&layout.config, &layout.manifest]) {
        theirs.put(bytes).unwrap();
    }
    let third = artifact(&theirs, b"a third signature", "application/vnd.dev.cosign", None);
    tag(&theirs, &name, OCI_MANIFEST, &third);
    push(&theirs, &layout.manifest, other.port, "app:1").unwrap();
    let copied = client.copy(&reference(server.port, "app:1"), &reference(other.port, "app:1"), &Silent);
    let (code, message, hint) = told(&copied.unwrap_err());
    assert_eq!(code, 1);
    assert!(message.contains(&format!("`{name}`")) && message.contains("would be lost"), "{message}");
    assert!(hint.contains("pull"), "{hint}");
}

/// Whoever may push may attach anything: what is broken, gone or about something else keeps nothing else from coming.
#[test]
fn what_others_attached_wrongly_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout, parts) = attached(dir.path());
    let server = Faulty::start(true, |_| None);
    push(&store, &layout.manifest, server.port, "app:1").unwrap();
    let image = Digest::of(&layout.manifest);
    let listed = |bytes: &[u8]| {
        let mut state = server.state.lock().unwrap();
        state.manifests.insert(format!("app/{}", Digest::of(bytes)), (OCI_MANIFEST.into(), bytes.to_vec()));
        Digest::of(bytes)
    };
    let other = listed(&artifact(&store, b"about another", SPDX, Some(b"another")));
    let broken = listed(br#"{"schemaVersion":2,"config":[]}"#);
    let sbom = Digest::of(&parts[1]);
    let gone = Digest::of("gone");
    let entries: Vec<serde_json::Value> = [other, broken, gone, sbom]
        .iter()
        .map(|digest| serde_json::json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": 1}))
        .collect();
    let list = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
    let list: &'static str = Box::leak(list.into_boxed_str());
    let asked = format!("/referrers/{image}");
    server.script(move |request: &Asked| request.is("GET", &asked).then_some(Fault::Answer(200, "", list)));
    let told = Told::default();
    let there = self::store(&dir.path().join("there"));
    let client = registry(&RegistryOptions::default());
    remote::pull(&there, &client, &reference(server.port, "app:1"), Some("app:1"), Reach::All, &told).unwrap();
    assert_eq!(there.tagged(&format!("sha256-{}.sbom.spdx", image.hex())).unwrap().unwrap().digest, sbom);
    let told = told.0.into_inner().unwrap();
    assert_eq!(told.len(), 3, "{told:?}");
    for (text, digest, why) in [
        (&told[0], other, "and is about something else"),
        (&told[1], broken, "was passed over"),
        (&told[2], gone, "and is not there"),
    ] {
        assert!(text.contains(&digest.to_string()) && text.contains(why), "{text}");
    }
}

/// A tag where the list of referrers should be, and an index among them whose parts are gone, stop nothing either.
#[test]
fn a_list_of_referrers_that_is_none_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout, parts) = attached(dir.path());
    for has_list in [false, true] {
        let server = Faulty::start(has_list, |_| None);
        push(&store, &layout.manifest, server.port, "app:1").unwrap();
        let image = Digest::of(&layout.manifest);
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(OCI_MANIFEST, b"gone")],
            "subject": descriptor(OCI_MANIFEST, &layout.manifest),
        });
        let index = index.to_string().into_bytes();
        let name = if has_list { Digest::of(&index).to_string() } else { format!("sha256-{}", image.hex()) };
        let bytes = if has_list { index.clone() } else { layout.manifest.clone() };
        let kind = if has_list { OCI_INDEX } else { OCI_MANIFEST };
        server.state.lock().unwrap().manifests.insert(format!("app/{name}"), (kind.into(), bytes));
        let there = self::store(&dir.path().join(format!("there-{has_list}")));
        let told = Told::default();
        let client = registry(&RegistryOptions::default());
        remote::pull(&there, &client, &reference(server.port, "app:1"), Some("app:1"), Reach::All, &told).unwrap();
        let signature = there.tagged(&format!("sha256-{}.sig", image.hex())).unwrap().unwrap();
        assert_eq!(signature.digest, Digest::of(&parts[0]));
        assert_eq!(there.tagged(&format!("sha256-{}.sbom.spdx", image.hex())).unwrap().is_some(), has_list);
        let told = told.0.into_inner().unwrap();
        let expected = if has_list { Digest::of(&index).to_string() } else { format!("the referrers of {image}") };
        assert!(told.len() == 1 && told[0].contains(&expected) && told[0].contains("passed over"), "{told:?}");
    }
}

/// Keeps warnings.
#[derive(Default)]
struct Told(std::sync::Mutex<Vec<String>>);

impl Progress for Told {
    fn event(&self, event: Event) {
        if let Event::Warning { text } = event {
            self.0.lock().unwrap().push(text);
        }
    }
}

#[test]
fn a_copy_mounts_within_a_registry_and_streams_between_two() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout, parts) = attached(dir.path());
    let first = Server::start(&dir.path().join("first"), "");
    let second = Faulty::start(true, |_| None);
    push(&store, &layout.manifest, first.port, "dev/app:1").unwrap();
    let client = registry(&RegistryOptions::default());
    let from = reference(first.port, "dev/app:1");
    let copied = client.copy(&from, &reference(first.port, "live/app:1"), &Silent).unwrap();
    assert_eq!((copied.blobs.sent, copied.attached), (0, 3));
    assert!(copied.blobs.mounted >= 4, "{copied:?}");
    assert_eq!(raw(first.port, "live/app:1"), layout.manifest);
    let copied = client.copy(&from, &reference(second.port, "app:2"), &Silent).unwrap();
    assert_eq!((copied.blobs.there, copied.blobs.mounted, copied.attached), (0, 0, 3));
    let state = second.state.lock().unwrap();
    for bytes in layout.layers.iter().chain([&layout.config]) {
        assert_eq!(state.blobs[&Digest::of(bytes)], *bytes);
    }
    for bytes in parts.iter().chain([&layout.manifest]) {
        assert_eq!(state.manifests[&format!("app/{}", Digest::of(bytes))].1, *bytes);
    }
}

#[test]
fn an_index_is_pulled_whole_or_for_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let server = Server::start(dir.path(), "");
    server.push(&layout, "index", "team/multi:1", &["--all", "--preserve-digests"], None);
    let client = registry(&RegistryOptions::default());
    let multi = reference(server.port, "team/multi:1");
    let (image, index) = (Digest::of(&layout.manifest), Digest::of(&layout.index));
    let ours = store(&dir.path().join("ours"));
    let pulled = remote::pull(&ours, &client, &multi, None, Reach::Machine, &Silent).unwrap();
    assert_eq!((pulled.names, pulled.fetched.left_out), (vec![("multi:1".to_owned(), image)], 1));
    assert_eq!((pulled.fetched.pinned, pulled.fetched.root.digest), (index, image));
    assert!(!ours.blob(&Digest::of(&layout.arm_manifest)).exists());

    // One that is for other machines only: refused, unless it is wanted as it is.
    let mut others: serde_json::Value = serde_json::from_slice(&layout.index).unwrap();
    others["manifests"].as_array_mut().unwrap().truncate(1);
    let (source, _) = filled(&dir.path().join("source"));
    let others = serde_json::to_vec(&others).unwrap();
    source.put(&others).unwrap();
    push(&source, &others, server.port, "team/others:1").unwrap();
    let arm = reference(server.port, "team/others:1");
    let error = remote::pull(&ours, &client, &arm, None, Reach::Machine, &Silent).unwrap_err();
    assert!(error.to_string().ends_with("has no image for `linux/amd64`; it has `linux/arm64`"), "{error}");
    let pulled = remote::pull(&ours, &client, &arm, None, Reach::All, &Silent).unwrap();
    assert_eq!(pulled.names, [("others:1.index".to_owned(), Digest::of(&others))]);

    let whole = store(&dir.path().join("whole"));
    let pulled = remote::pull(&whole, &client, &multi, None, Reach::All, &Silent).unwrap();
    assert_eq!(pulled.names, [("multi:1".to_owned(), image), ("multi:1.index".to_owned(), index)]);
    let reached = remote::reach(&whole, &index).unwrap();
    assert_eq!(reached.documents, BTreeSet::from([image, index, Digest::of(&layout.arm_manifest)]));
    let platform = whole.tagged("multi:1").unwrap().unwrap().platform;
    assert_eq!(platform, Some(serde_json::json!({"architecture": "amd64", "os": "linux"})));
    let copied = dir.path().join("copied");
    let from = format!("oci:{}:multi:1.index", whole.layout().display());
    skopeo(&["copy", "--all", &from, &format!("dir:{}", copied.display())]);
    assert_eq!(fs_err::read(copied.join("manifest.json")).unwrap(), layout.index);
}

#[test]
fn a_release_gets_the_names_of_its_artifacts() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let disk = artifact(&store, b"disk", "application/vnd.pipeline.disk.v1", None);
    let entry = |bytes: &[u8], kind: &str, name: &str, platform: serde_json::Value| {
        let mut entry = descriptor(OCI_MANIFEST, bytes);
        entry["artifactType"] = format!("application/vnd.pipeline.{kind}.v1").into();
        entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        entry["platform"] = platform;
        entry
    };
    let entries = [
        entry(&layout.manifest, "image", "shop", serde_json::json!({"os": "linux", "architecture": "amd64"})),
        entry(&disk, "disk", "shop.disk", serde_json::json!({"os": "unknown", "architecture": "unknown"})),
    ];
    let release = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "artifactType": RELEASE, "manifests": entries});
    let release = serde_json::to_vec(&release).unwrap();
    store.put(&release).unwrap();
    let server = Server::start(dir.path(), "");
    push(&store, &release, server.port, "team/shop:1.4").unwrap();
    let other = self::store(&dir.path().join("other"));
    let client = registry(&RegistryOptions::default());
    // All of it, though an image for this machine is in it.
    let pulled = remote::pull(&other, &client, &reference(server.port, "team/shop:1.4"), None, Reach::Machine, &Silent).unwrap();
    let expected = [("shop:1.4", &layout.manifest), ("shop:1.4.disk", &disk), ("shop:1.4.release", &release)];
    assert_eq!(pulled.names, expected.map(|(name, bytes)| (name.to_owned(), Digest::of(bytes))));
    assert_eq!(other.tagged("shop:1.4.release").unwrap().unwrap().media_type, OCI_INDEX);
}

#[test]
fn tags_are_listed_read_and_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (store, layout) = filled(dir.path());
    let real = Server::start(dir.path(), "");
    let paged = Faulty::start(true, |_| None);
    let client = registry(&RegistryOptions::default());
    for port in [real.port, paged.port] {
        push(&store, &layout.manifest, port, "app:1.4").unwrap();
        push(&store, &layout.arm_manifest, port, "app:arm").unwrap();
        let app = reference(port, "app:1.4");
        let (image, arm) = (Digest::of(&layout.manifest), Digest::of(&layout.arm_manifest));
        let set = client.tag(&app, "prod").unwrap();
        assert_eq!((set.before, set.now), (None, image));
        let set = client.tag(&app.at(arm), "prod").unwrap();
        assert_eq!((set.before, set.now), (Some(image), arm));
        assert_eq!(client.digest(&app.with_tag("prod").unwrap()).unwrap(), Some(arm));
        assert_eq!(client.digest(&app.with_tag("none").unwrap()).unwrap(), None);
        let mut tags = client.tags(&app).unwrap();
        tags.sort();
        assert_eq!(tags, ["1.4", "arm", "prod"]);
    }
}
