//! Trixie's cosign, a plain HTTP client for the registry, and programs in general.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use pipeline::artifact::referrer;
use pipeline::artifact::store::{Descriptor, Hold, Lock, Store};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use serde_json::Value;

use super::servers::tool;

/// Runs a program that has to succeed; its standard output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    Cmd::new(program).args(arguments).text().unwrap()
}

/// A folder that runs of the tests share, made of `parts`; `make` fills it once.
pub fn shared(name: &str, parts: &[&str], make: impl FnOnce(&Path)) -> PathBuf {
    let name = format!("{name}-{}", Digest::of(parts.join("\n")).short());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs_err::create_dir_all(folder).unwrap();
    let _lock = Lock::wait(&folder.join(format!("{name}.lock")), Hold::Exclusive).unwrap();
    let (made, fresh) = (folder.join(&name), folder.join(format!("{name}.new")));
    if !made.exists() {
        let _ = fs_err::remove_dir_all(&fresh);
        fs_err::create_dir(&fresh).unwrap();
        make(&fresh);
        fs_err::rename(&fresh, &made).unwrap();
    }
    made
}

/// The archive this machine's apt uses, as a line for `sources.list` of trixie.
pub fn trixie() -> String {
    tool("apt-get", "apt");
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    assert!(Path::new(keyring).exists(), "`{keyring}` is missing: apt-get install debian-archive-keyring");
    let ask = || {
        let format = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian"];
        run("apt-get", &format).lines().next().map(str::to_owned)
    };
    let archive = ask().or_else(|| {
        run("apt-get", &["-q", "update"]);
        ask()
    });
    format!("deb [signed-by={keyring}] {} trixie main", archive.expect("apt knows a Debian archive"))
}

/// cosign of Debian trixie, fetched once with a private apt; it needs nothing but libc.
pub struct Cosign {
    program: PathBuf,
    home: PathBuf,
}

impl Cosign {
    pub fn new(home: &Path) -> Self {
        let folder = shared("cosign-of-trixie", &[], |folder| {
            let apt = tempfile::tempdir().unwrap();
            for name in ["lists/partial", "archives/partial"] {
                fs_err::create_dir_all(apt.path().join(name)).unwrap();
            }
            fs_err::write(apt.path().join("sources.list"), trixie()).unwrap();
            let dir = apt.path().display();
            let settings = [
                format!("Dir::Etc::sourcelist={dir}/sources.list"),
                "Dir::Etc::sourceparts=-".into(),
                format!("Dir::State::lists={dir}/lists"),
                format!("Dir::Cache={dir}"),
                "Acquire::Languages=none".into(),
                "APT::Sandbox::User=root".into(),
            ];
            let options: Vec<&str> = settings.iter().flat_map(|setting| ["-o", setting]).collect();
            run("apt-get", &[&["-q"], options.as_slice(), &["update"]].concat());
            Cmd::new("apt-get").arg("-q").args(&options).args(["download", "cosign"]).dir(apt.path()).run().unwrap();
            let package = fs_err::read_dir(apt.path())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
                .expect("apt fetched the package");
            Cmd::new("dpkg-deb").arg("-x").arg(package).arg(folder).run().unwrap();
        });
        Self { program: folder.join("usr/bin/cosign"), home: home.into() }
    }

    /// Standard output, or what it said instead.
    fn call(&self, password: &str, arguments: &[&str]) -> Result<String, String> {
        let command =
            Cmd::new(&self.program).args(arguments).env("HOME", &self.home).env("COSIGN_PASSWORD", password).dir(&self.home);
        command.text().map_err(|error| format!("{error:#}"))
    }

    pub fn verify(&self, key: &Path, reference: &str) -> Result<String, String> {
        self.call("", &["verify", "--key", key.to_str().unwrap(), "--insecure-ignore-tlog=true", reference])
    }

    /// cosign 2 checks bundles of statements; a signature as cosign 3 writes it is one of a kind of its own.
    pub fn verify_bundle(&self, key: &Path, reference: &str, kind: &str) -> Result<String, String> {
        // Without it the roots of Sigstore's own services would be fetched; a key pair needs none of them.
        let root = self.home.join("trusted-root.json");
        fs_err::write(&root, r#"{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1"}"#).unwrap();
        let options = ["verify-attestation", "--new-bundle-format", "--insecure-ignore-tlog=true", "--trusted-root"];
        let rest = [root.to_str().unwrap(), "--key", key.to_str().unwrap(), "--type", kind, reference];
        self.call("", &[&options[..], &rest[..]].concat())
    }

    pub fn generate(&self, name: &str, password: &str) -> (PathBuf, PathBuf) {
        self.call(password, &["generate-key-pair", "--output-key-prefix", name]).unwrap();
        (self.home.join(format!("{name}.key")), self.home.join(format!("{name}.pub")))
    }

    pub fn sign(&self, key: &Path, password: &str, reference: &str) {
        self.call(password, &["sign", "--yes", "--tlog-upload=false", "--key", key.to_str().unwrap(), reference]).unwrap();
    }

    /// An SLSA provenance as bundle.
    pub fn attest(&self, key: &Path, password: &str, reference: &str) {
        let predicate = self.home.join("predicate.json");
        let text = r#"{"buildDefinition":{"buildType":"x","externalParameters":{}},"runDetails":{"builder":{"id":"x"}}}"#;
        fs_err::write(&predicate, text).unwrap();
        let options =
            ["attest", "--yes", "--tlog-upload=false", "--new-bundle-format", "--type", "slsaprovenance1", "--predicate"];
        let rest = [predicate.to_str().unwrap(), "--key", key.to_str().unwrap(), reference];
        self.call(password, &[&options[..], &rest[..]].concat()).unwrap();
    }

    pub fn sign_blob(&self, key: &Path, password: &str, blob: &Path) -> String {
        let options = ["sign-blob", "--yes", "--tlog-upload=false", "--key", key.to_str().unwrap(), blob.to_str().unwrap()];
        self.call(password, &options).unwrap()
    }

    pub fn verify_blob(&self, key: &Path, signature: &str, blob: &Path) -> Result<String, String> {
        let options = ["verify-blob", "--insecure-ignore-tlog=true", "--key", key.to_str().unwrap()];
        self.call("", &[&options[..], &["--signature", signature, blob.to_str().unwrap()]].concat())
    }
}

/// As much of the distribution protocol as these tests need.
pub struct Http {
    pub port: u16,
}

impl Http {
    /// Status, headers and body of one request.
    fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{}\r\n{headers}Content-Length: {}\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head, answer[end + 4..].to_vec())
    }

    fn put_blob(&self, repository: &str, bytes: &[u8]) {
        let (status, head, _) = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
        assert_eq!(status, 202, "{head}");
        let place = head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
        let path = &place[place.find("/v2/").unwrap()..];
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={}", Digest::of(bytes));
        let (status, head, body) = self.request("PUT", &path, "Content-Type: application/octet-stream\r\n", bytes);
        assert_eq!(status, 201, "{head}\n{}", String::from_utf8_lossy(&body));
    }

    pub fn put_manifest(&self, repository: &str, reference: &str, media_type: &str, bytes: &[u8]) {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let (status, head, body) = self.request("PUT", &path, &format!("Content-Type: {media_type}\r\n"), bytes);
        assert_eq!(status, 201, "{head}\n{}", String::from_utf8_lossy(&body));
    }

    /// A manifest with its blobs, by digest. What an index names is there already.
    pub fn push(&self, repository: &str, store: &Store, manifest: &Descriptor) {
        let bytes = store.read(&manifest.digest).unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        for blob in value["layers"].as_array().into_iter().flatten().chain([&value["config"]]).filter(|blob| blob.is_object()) {
            self.put_blob(repository, &store.read(&blob["digest"].as_str().unwrap().parse().unwrap()).unwrap());
        }
        self.put_manifest(repository, &manifest.digest.to_string(), &manifest.media_type, &bytes);
    }

    /// What is attached: cosign's signatures under their tag, the referrers in the index of the fallback tag.
    pub fn push_attached(&self, repository: &str, store: &Store, subject: &Digest) {
        for attached in referrer::attached(store, subject).unwrap() {
            self.push(repository, store, &attached.manifest);
            if attached.kind == referrer::Kind::Signature {
                let bytes = store.read(&attached.manifest.digest).unwrap();
                self.put_manifest(repository, &attached.tag, &attached.manifest.media_type, &bytes);
            }
        }
        let index = referrer::index(store, subject).unwrap();
        let bytes = serde_json::to_vec(&index).unwrap();
        self.put_manifest(repository, &referrer::fallback_tag(subject), &index.media_type.unwrap(), &bytes);
    }

    fn get_manifest(&self, repository: &str, reference: &str) -> Vec<u8> {
        let accept = "Accept: application/vnd.oci.image.manifest.v1+json\r\nAccept: application/vnd.oci.image.index.v1+json\r\n";
        let (status, head, body) = self.request("GET", &format!("/v2/{repository}/manifests/{reference}"), accept, b"");
        assert_eq!(status, 200, "{head}");
        body
    }

    /// A manifest and its blobs, into the store.
    pub fn pull(&self, repository: &str, reference: &str, store: &Store) -> Descriptor {
        let bytes = self.get_manifest(repository, reference);
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        for blob in value["layers"].as_array().unwrap().iter().chain([&value["config"]]) {
            let digest: Digest = blob["digest"].as_str().unwrap().parse().unwrap();
            let (status, head, body) = self.request("GET", &format!("/v2/{repository}/blobs/{digest}"), "", b"");
            assert_eq!(status, 200, "{head}");
            assert_eq!(store.put(&body).unwrap(), digest);
        }
        let media_type = value["mediaType"].as_str().unwrap().to_owned();
        Descriptor::new(media_type, store.put(&bytes).unwrap(), bytes.len() as u64)
    }

    /// Digests of the manifests that refer to `subject`.
    pub fn referrers(&self, repository: &str, subject: &Digest) -> Vec<Digest> {
        let bytes = self.get_manifest(repository, &referrer::fallback_tag(subject));
        let index: Value = serde_json::from_slice(&bytes).unwrap();
        index["manifests"].as_array().unwrap().iter().map(|it| it["digest"].as_str().unwrap().parse().unwrap()).collect()
    }
}
