//! The servers of the registry tests: a real one, a proxy that cuts connections, and one that
//! answers what a closure says. And the image that is pushed.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Fails with the Debian package when `program` is not there.
pub fn tool(program: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    assert!(pipeline::cmd::find(program, &path).is_some(), "`{program}` is missing: apt-get install {package}");
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A small OCI layout: `image` for linux/amd64, `index` with linux/arm64 beside it, `plain` without zstd.
pub struct Layout {
    dir: PathBuf,
    pub layers: Vec<Vec<u8>>,
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    pub arm_manifest: Vec<u8>,
    pub index: Vec<u8>,
}

fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        let blobs = dir.join("blobs/sha256");
        fs_err::create_dir_all(&blobs).unwrap();
        fs_err::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let put = |bytes: &[u8]| fs_err::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();

        // Larger than what fits into socket buffers, so that a cut connection is felt; hard to compress.
        let noise: Vec<u8> =
            (0..200_000_u64).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (n << 7)).to_le_bytes()).collect();
        let plain = [tar("etc/one", b"one\n"), tar("etc/two", b"two\n"), tar("var/noise", &noise)];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&plain[0]).unwrap();
        let layers = vec![gzip.finish().unwrap(), zstd::encode_all(plain[1].as_slice(), 3).unwrap(), plain[2].clone()];
        let types = ["tar+gzip", "tar+zstd", "tar"].map(|kind| format!("application/vnd.oci.image.layer.v1.{kind}"));
        let diff_ids: Vec<String> = plain.iter().map(|bytes| Digest::of(bytes).to_string()).collect();

        let document = |architecture: &str, wanted: &[usize]| {
            let diff_ids: Vec<&String> = wanted.iter().map(|&layer| &diff_ids[layer]).collect();
            let config = serde_json::json!({"architecture": architecture, "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
            let config = serde_json::to_vec(&config).unwrap();
            let descriptors: Vec<_> = wanted.iter().map(|&layer| descriptor(&types[layer], &layers[layer])).collect();
            // Odd white space: it must survive.
            let manifest = serde_json::to_vec_pretty(&serde_json::json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
                "config": descriptor("application/vnd.oci.image.config.v1+json", &config), "layers": descriptors}));
            (config, manifest.unwrap())
        };
        let (config, manifest) = document("amd64", &[0, 1, 2]);
        let (arm_config, arm_manifest) = document("arm64", &[0]);
        // What Docker's dialect can say: it has no zstd.
        let (plain_config, plain_manifest) = document("amd64", &[0, 2]);
        let entry = |bytes: &[u8], architecture: &str| {
            let mut entry = descriptor(OCI_MANIFEST, bytes);
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
            entry
        };
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry(&arm_manifest, "arm64"), entry(&manifest, "amd64")]});
        let index = serde_json::to_vec(&index).unwrap();
        for bytes in layers.iter().chain([&config, &manifest, &arm_config, &arm_manifest, &plain_config, &plain_manifest, &index])
        {
            put(bytes);
        }
        let named = |kind: &str, bytes: &[u8], name: &str| {
            let mut entry = descriptor(kind, bytes);
            entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
            entry
        };
        let top = [
            named(OCI_MANIFEST, &manifest, "image"),
            named(OCI_MANIFEST, &plain_manifest, "plain"),
            named(OCI_INDEX, &index, "index"),
        ];
        let top = serde_json::json!({"schemaVersion": 2, "manifests": top});
        fs_err::write(dir.join("index.json"), top.to_string()).unwrap();
        Self { dir: dir.into(), layers, config, manifest, arm_manifest, index }
    }
}

fn descriptor(kind: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()})
}

/// Debian's `docker-registry` on a port of its own.
pub struct Server {
    pub port: u16,
    data: PathBuf,
    child: Child,
}

impl Server {
    /// `extra` goes to the end of the configuration, where `http:` is the open section.
    pub fn start(dir: &Path, extra: &str) -> Self {
        Self::start_on(free_port(), dir, extra)
    }

    /// The same on a port that was chosen before, or after the one on it ended.
    pub fn start_on(port: u16, dir: &Path, extra: &str) -> Self {
        tool("docker-registry", "docker-registry");
        tool("skopeo", "skopeo");
        let data = dir.join("data");
        fs_err::create_dir_all(dir).unwrap();
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}",
            data.display()
        );
        fs_err::write(&config, text).unwrap();
        let log = fs_err::File::create(dir.join("registry.log")).unwrap().into_parts().0;
        let command = Cmd::new("docker-registry").arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::from(log));
        let child = command.spawn().unwrap();
        let patience = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                Instant::now() < patience,
                "docker-registry did not start:\n{}",
                fs_err::read_to_string(dir.join("registry.log")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, data, child }
    }

    pub fn push(&self, layout: &Layout, tag: &str, name: &str, options: &[&str], login: Option<&str>) {
        // An empty home and no runtime directory: nobody's own login plays a part.
        let home = self.data.parent().unwrap();
        let mut command = Cmd::new("skopeo").env("HOME", home).env_remove("XDG_RUNTIME_DIR").env_remove("REGISTRY_AUTH_FILE");
        command = command.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]).args(options);
        if let Some(login) = login {
            command = command.args(["--dest-creds", login]);
        }
        command
            .arg(format!("oci:{}:{tag}", layout.dir.display()))
            .arg(format!("docker://127.0.0.1:{}/{name}", self.port))
            .run()
            .unwrap();
    }

    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        let hex = digest.hex();
        self.data.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    pub fn blob(&self, digest: Digest) -> Vec<u8> {
        fs_err::read(self.blob_path(digest)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One request as a server saw it.
#[derive(Debug, Clone)]
pub struct Request {
    pub port: u16,
    method: String,
    pub path: String,
    headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Reads one request; nothing when the other side closes without one.
    fn read(stream: &mut TcpStream, port: u16) -> Option<Self> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte).ok()? == 0 {
                return None;
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.lines();
        let mut first = lines.next()?.split(' ');
        let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
        let path = path.split('?').next()?.to_owned();
        let headers: BTreeMap<String, String> =
            lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        stream.read_exact(&mut body).ok()?;
        Some(Self { port, method, path, headers, body: String::from_utf8(body).unwrap() })
    }
}

pub struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, headers: String::new(), body: body.into() }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::ok("") }
    }

    pub fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
        self
    }
}

pub struct Scripted {
    pub port: u16,
    log: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    /// `METHOD PATH` of each request.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// Answers what `script` says, which gets the request and the log up to and with it.
pub fn scripted(script: impl Fn(&Request, &[String]) -> Answer + Send + 'static) -> Scripted {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let log = Arc::new(Mutex::new(Vec::new()));
    let kept = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let Some(request) = Request::read(&mut stream, port) else { continue };
            let mut log = kept.lock().unwrap();
            log.push(format!("{} {}", request.method, request.path));
            let answer = script(&request, &log);
            let head = format!(
                "HTTP/1.1 {} X\r\nconnection: close\r\ncontent-length: {}\r\n{}\r\n",
                answer.status,
                answer.body.len(),
                answer.headers
            );
            let _ = stream.write_all(&[head.as_bytes(), &answer.body].concat());
        }
    });
    Scripted { port, log }
}

/// A request for the blob that is cut.
#[derive(Debug, Clone)]
pub struct Proxied {
    pub range: Option<String>,
}

pub struct Proxy {
    pub port: u16,
    seen: Arc<Mutex<Vec<Proxied>>>,
}

impl Proxy {
    pub fn seen(&self) -> Vec<Proxied> {
        self.seen.lock().unwrap().clone()
    }
}

/// Hands requests on to `upstream`, and closes the first answer with `blob` after `limit` bytes.
/// Without `ranges` it hides the range that is asked for, so that all of the blob comes again.
pub fn cutting_proxy(upstream: u16, blob: Digest, limit: usize, ranges: bool) -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, kept) = (stream.unwrap(), kept.clone());
            std::thread::spawn(move || hand_on(stream, port, upstream, blob, limit, ranges, &kept));
        }
    });
    Proxy { port, seen }
}

fn hand_on(
    mut stream: TcpStream,
    port: u16,
    upstream: u16,
    blob: Digest,
    limit: usize,
    ranges: bool,
    seen: &Mutex<Vec<Proxied>>,
) {
    let Some(mut request) = Request::read(&mut stream, port) else { return };
    let mut allowed = u64::MAX;
    if request.path.contains(&blob.to_string()) {
        let mut seen = seen.lock().unwrap();
        if seen.is_empty() {
            allowed = limit as u64;
        }
        seen.push(Proxied { range: request.header("range").map(str::to_owned) });
    }
    if !ranges {
        request.headers.remove("range");
    }
    request.headers.insert("connection".into(), "close".into());
    let headers: String = request.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let mut server = TcpStream::connect(("127.0.0.1", upstream)).unwrap();
    server.write_all(format!("{} {} HTTP/1.1\r\n{headers}\r\n", request.method, request.path).as_bytes()).unwrap();
    let _ = std::io::copy(&mut server.take(allowed), &mut stream);
}

/// A proxy for uploads.
pub struct Uploads {
    pub port: u16,
    cut: Arc<Mutex<bool>>,
}

impl Uploads {
    /// Whether an upload was cut.
    pub fn cut(&self) -> bool {
        *self.cut.lock().unwrap()
    }
}

/// Hands bytes on to `upstream` both ways, and closes the first request with a body of more than
/// `limit` bytes after so many of it.
pub fn cutting_uploads(upstream: u16, limit: usize) -> Uploads {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let cut = Arc::new(Mutex::new(false));
    let kept = cut.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, cut) = (client.unwrap(), kept.clone());
            let mut server = TcpStream::connect(("127.0.0.1", upstream)).unwrap();
            let (mut back, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut to_client);
                let _ = to_client.shutdown(std::net::Shutdown::Both);
            });
            std::thread::spawn(move || {
                let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
                while let Ok(read @ 1..) = client.read(&mut buffer) {
                    passed += read;
                    let mut cut = cut.lock().unwrap();
                    if passed > limit && !*cut {
                        *cut = true;
                        let _ = client.shutdown(std::net::Shutdown::Both);
                        break;
                    }
                    if server.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    Uploads { port, cut }
}
