//! Signatures, provenance and bills of materials against outside witnesses: Debian trixie's
//! cosign with a real registry on 127.0.0.1; dpkg, pip, npm and python-debian; the validators of
//! SPDX and CycloneDX.

#[path = "registry/servers.rs"]
#[allow(dead_code, reason = "this suite uses the registry only")]
mod servers;
#[path = "signing/witness.rs"]
mod witness;

#[path = "signing/materials.rs"]
mod materials;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pipeline::artifact::image::{self, Layer, Recipe, RunConfig};
use pipeline::artifact::keys::{self, PrivateKey, PublicKey};
use pipeline::artifact::provenance::{self, Builder, Facts, Source};
use pipeline::artifact::referrer::{self, Kind};
use pipeline::artifact::release::{self, Entry};
use pipeline::artifact::sign::{self, Verdict};
use pipeline::artifact::store::{Descriptor, MANIFEST_TYPE, Store};
use pipeline::artifact::{dsse, sbom};
use pipeline::oci::digest::Digest;
use servers::Server;
use witness::{Cosign, Http};

/// An image of one layer with one file.
fn image(store: &Store, content: &[u8]) -> Descriptor {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    builder.append_data(&mut header, "etc/motd", content).unwrap();
    let layer = builder.into_inner().unwrap();
    let digest = store.put(&layer).unwrap();
    let descriptor = Descriptor::new("application/vnd.oci.image.layer.v1.tar", digest, layer.len() as u64);
    let layers = vec![Layer { descriptor, diff_id: digest, created_by: "test".into() }];
    image::write(store, &Recipe { config: RunConfig::default(), layers, annotations: BTreeMap::new(), created: 0 }).unwrap()
}

/// A release of an application's image and a host's.
fn release(store: &Store) -> Descriptor {
    let entry = |kind, content: &[u8]| {
        let image = image(store, content);
        Entry { digest: image.digest, size: image.size, kind, name: "shop".into() }
    };
    let entries = vec![entry(release::Kind::Image, b"app"), entry(release::Kind::Host, b"host")];
    let recipe = release::Recipe { name: "shop".into(), version: "1.4".into(), revision: Some("c0ffee".into()), entries };
    let descriptor = release::write(store, &recipe).unwrap();
    store.tag(&release::tag("shop", "1.4"), &descriptor).unwrap();
    descriptor
}

fn facts(release: &Descriptor) -> Facts {
    Facts {
        subjects: vec![("shop".into(), release.digest)],
        source: Some(Source {
            repository: "https://git.example/team/shop".into(),
            commit: Some("c0ffee".into()),
            dirty: false,
            path: String::new(),
        }),
        builder: Builder { id: provenance::builder_id("0.1.0"), version: "0.1.0".into(), digest: Digest::of("pipeline") },
        materials: Vec::new(),
        parameters: BTreeMap::from([("pipeline".into(), "shop".into())]),
        internal: BTreeMap::new(),
        started: None,
        finished: None,
        invocation: None,
    }
}

/// Everything in the store about the release: what `push` sends.
fn push_release(http: &Http, repository: &str, store: &Store, digest: &Digest) {
    let release = release::read(store, digest).unwrap();
    for entry in &release.entries {
        http.push(repository, store, &entry.descriptor());
        http.push_attached(repository, store, &entry.digest);
    }
    http.push(repository, store, &release.descriptor());
    http.push_attached(repository, store, digest);
}

#[test]
fn signing_and_reporting_never_change_a_release() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let release = release(&store);
    let before = store.read(&release.digest).unwrap();
    let (one, two) = (PrivateKey::generate(), PrivateKey::generate());
    for _ in 0..2 {
        sign::sign(&store, &release, "shop", &one).unwrap();
    }
    let after_one = referrer::attached(&store, &release.digest).unwrap();
    sign::sign(&store, &release, "shop", &two).unwrap();
    referrer::attach_report(&store, &release, ("smoke", "pass"), "application/xml", b"<testsuite/>").unwrap();
    provenance::attach(&store, &release, &facts(&release), Some(&one)).unwrap();
    assert_eq!(after_one.len(), 2, "a second signature of one key is none");
    assert_eq!(referrer::attached(&store, &release.digest).unwrap().len(), 5);
    assert_eq!(store.read(&release.digest).unwrap(), before);
    assert_eq!(store.tagged("shop:1.4.release").unwrap().unwrap().digest, release.digest);
    assert_eq!(self::release(&store).digest, release.digest, "made again it is the same");
    assert_eq!(release::check(&store, &release.digest).unwrap(), Vec::<String>::new());
    let keys = [one.public(), two.public()];
    assert_eq!(sign::require(&store, &release.digest, &keys).unwrap(), [keys[0].fingerprint(), keys[1].fingerprint()]);
}

#[test]
fn cosign_verifies_what_we_sign() {
    let dir = tempfile::tempdir().unwrap();
    let cosign = Cosign::new(dir.path());
    let server = Server::start(dir.path(), "");
    let http = Http { port: server.port };
    let store = Store::open(&dir.path().join("root")).unwrap();
    let key = PrivateKey::generate();
    let (_, public) = keys::write_pair(dir.path(), "ours", &key, Some(b"secret")).unwrap();
    let (_, other) = keys::write_pair(dir.path(), "other", &PrivateKey::generate(), None).unwrap();

    let release = release(&store);
    let image = release::read(&store, &release.digest).unwrap().entry(release::Kind::Image, "shop").unwrap().descriptor();
    let signed = sign::sign_release(&store, &release.digest, "registry.example/team/shop", &key).unwrap();
    assert_eq!((signed.len(), signed[0].digest), (3, release.digest));
    provenance::attach(&store, &release, &facts(&release), Some(&key)).unwrap();
    // A report that is no bundle lies between: cosign has to pass over it.
    referrer::attach_report(&store, &release, ("smoke", "pass"), "application/xml", b"<testsuite/>").unwrap();
    push_release(&http, "team/shop", &store, &release.digest);
    // The store with all its attachments is still a layout others read.
    store.tag("shop:1.4", &image).unwrap();
    let copied = format!("docker://127.0.0.1:{}/team/copied:1", server.port);
    witness::run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--dest-tls-verify=false",
            "--preserve-digests",
            &format!("oci:{}:shop:1.4", store.layout().display()),
            &copied,
        ],
    );

    for subject in &signed {
        let reference = format!("127.0.0.1:{}/team/shop@{}", server.port, subject.digest);
        let verified = cosign.verify(&public, &reference).expect("cosign accepts it");
        assert!(verified.contains(&subject.digest.to_string()) && verified.contains("registry.example/team/shop"), "{verified}");
        let refused = cosign.verify(&other, &reference).unwrap_err();
        assert!(refused.contains("no matching signatures"), "{refused}");
        let statement =
            cosign.verify_bundle(&public, &reference, "https://sigstore.dev/cosign/sign/v1").expect("cosign accepts the bundle");
        assert!(statement.contains("payloadType"), "{statement}");
        let refused = cosign.verify_bundle(&other, &reference, "https://sigstore.dev/cosign/sign/v1").unwrap_err();
        assert!(refused.contains("no matching attestations") || refused.contains("signature"), "{refused}");
    }
    let reference = format!("127.0.0.1:{}/team/shop@{}", server.port, release.digest);
    let told = cosign.verify_bundle(&public, &reference, "slsaprovenance1").expect("cosign accepts the provenance");
    let envelope: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    let statement = STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap();
    assert_eq!(statement, provenance::statement(&facts(&release)).unwrap().encode().unwrap());

    // One byte of the signature, under digests that fit.
    let tag = referrer::tag(&image.digest, &Kind::Signature, 1);
    let bytes = store.read(&store.tagged(&tag).unwrap().unwrap().digest).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let place = &mut manifest["layers"][0]["annotations"][sign::SIGNATURE];
    let mut signature = STANDARD.decode(place.as_str().unwrap()).unwrap();
    *signature.last_mut().unwrap() ^= 1;
    *place = STANDARD.encode(signature).into();
    let forged = serde_json::to_vec(&manifest).unwrap();
    http.put_manifest("team/shop", &tag, MANIFEST_TYPE, &forged);
    let reference = format!("127.0.0.1:{}/team/shop@{}", server.port, image.digest);
    assert!(cosign.verify(&public, &reference).unwrap_err().contains("no matching signatures"));
    let forged = Descriptor::new(MANIFEST_TYPE, store.put(&forged).unwrap(), forged.len() as u64);
    store.tag(&tag, &forged).unwrap();
    let verdicts: Vec<Verdict> =
        sign::seen(&store, &image.digest, &[key.public()]).unwrap().into_iter().map(|seen| seen.verdict).collect();
    assert_eq!(verdicts, [Verdict::OtherKey, Verdict::Valid(key.public().fingerprint())]);
}

#[test]
fn we_verify_what_cosign_signs() {
    let dir = tempfile::tempdir().unwrap();
    let cosign = Cosign::new(dir.path());
    let server = Server::start(dir.path(), "");
    let http = Http { port: server.port };
    let store = Store::open(&dir.path().join("root")).unwrap();
    let release = release(&store);
    let ours = PrivateKey::generate();
    sign::sign(&store, &release, "registry.example/team/shop", &ours).unwrap();
    push_release(&http, "team/shop", &store, &release.digest);
    let reference = format!("127.0.0.1:{}/team/shop@{}", server.port, release.digest);

    // A pair of cosign's own, read by us.
    let (private, public) = cosign.generate("theirs", "pass word");
    let theirs = PrivateKey::load(&private, || Ok(b"pass word".to_vec())).unwrap();
    assert_eq!(theirs.public(), PublicKey::load(&public).unwrap());
    assert_eq!(theirs.public().to_pem().unwrap(), fs_err::read_to_string(&public).unwrap());
    let error = PrivateKey::load(&private, || Ok(b"password".to_vec())).unwrap_err();
    assert!(format!("{error:#}").contains("the password of the key is wrong"), "{error:#}");
    // A pair of ours, read by cosign: it signs bytes that we check, and the other way round.
    let (private_ours, public_ours) = keys::write_pair(dir.path(), "ours", &ours, Some(b"secret")).unwrap();
    let blob = dir.path().join("blob");
    fs_err::write(&blob, "some bytes").unwrap();
    let signature = STANDARD.decode(cosign.sign_blob(&private_ours, "secret", &blob).trim()).unwrap();
    assert!(ours.public().verifies(b"some bytes", &signature) && !ours.public().verifies(b"other bytes", &signature));
    cosign.verify_blob(&public_ours, &STANDARD.encode(ours.sign(b"some bytes")), &blob).expect("cosign accepts it");
    assert!(cosign.verify_blob(&public, &STANDARD.encode(ours.sign(b"some bytes")), &blob).is_err());

    // cosign signs the release beside our signature, and says something about it as a bundle.
    cosign.sign(&private, "pass word", &reference);
    cosign.attest(&private, "pass word", &reference);
    let tag = referrer::tag(&release.digest, &Kind::Signature, 1);
    let fetched = http.pull("team/shop", &tag, &store);
    sign::adopt(&store, &release.digest, &fetched).unwrap();
    let keys = [ours.public(), theirs.public()];
    let seen = sign::seen(&store, &release.digest, &keys).unwrap();
    let verdicts: Vec<&Verdict> =
        seen.iter().filter(|seen| seen.form == sign::Form::SimpleSigning).map(|seen| &seen.verdict).collect();
    let valid = keys.each_ref().map(|key| Verdict::Valid(key.fingerprint()));
    assert_eq!(verdicts, [&valid[0], &valid[1]]);
    // Ours are added to theirs.
    let third = PrivateKey::generate();
    sign::sign(&store, &release, "registry.example/team/shop", &third).unwrap();
    let keys = [ours.public(), theirs.public(), third.public()];
    assert_eq!(sign::require(&store, &release.digest, &keys).unwrap().len(), 3);

    let mut opened = 0;
    for referrer in http.referrers("team/shop", &release.digest) {
        let manifest = http.pull("team/shop", &referrer.to_string(), &store);
        let manifest: serde_json::Value = serde_json::from_slice(&store.read(&manifest.digest).unwrap()).unwrap();
        let layer: Descriptor = serde_json::from_value(manifest["layers"][0].clone()).unwrap();
        if layer.media_type != dsse::BUNDLE_TYPE {
            continue;
        }
        let bundle = dsse::open(&store.read(&layer.digest).unwrap(), &[theirs.public()]).unwrap();
        assert!(bundle.statement.is_about(&release.digest));
        if bundle.statement.predicate_type == provenance::PREDICATE {
            assert_eq!(bundle.signed_by, Some(theirs.public().fingerprint()));
            let manifest = Descriptor::new(MANIFEST_TYPE, referrer, 0);
            assert!(referrer::adopt(&store, &release.digest, &manifest).unwrap().unwrap().ends_with(".provenance"));
            opened += 1;
        }
    }
    assert_eq!(opened, 1, "cosign's bundle is there");
    let found = provenance::read(&store, &release.digest, &[theirs.public()]).unwrap();
    assert_eq!((found.len(), found[0].signed_by, found[0].builder.as_str()), (1, Some(theirs.public().fingerprint()), "x"));
}

/// The documents of a real tree, against the tools whose packages are in it.
#[test]
fn materials_are_what_the_tools_say() {
    materials::check();
}

/// The gate's view: what was attached is read back, for the whole release.
#[test]
fn the_inventory_of_a_release_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let release = release(&store);
    assert_eq!(sbom::of_release(&store, &release.digest).unwrap(), None);
    for entry in release::read(&store, &release.digest).unwrap().entries {
        sbom::attach(&store, &entry.descriptor(), "shop", "0.1.0", 2).unwrap();
    }
    assert_eq!(sbom::of_release(&store, &release.digest).unwrap(), Some(sbom::Inventory::default()));
}
