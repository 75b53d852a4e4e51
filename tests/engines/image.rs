//! Images made by hand: layers of each compression, on busybox.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use pipeline::artifact::image::{self, Layer, Recipe, RunConfig};
use pipeline::artifact::store::{Descriptor, Store};
use pipeline::oci::compress::Compression;
use pipeline::oci::digest::Digest;

use crate::common::{tiny_base, tool};

/// The program: says its version, its variables and its secret, writes to its volume, and ends when asked to.
pub const RUN: &str = "#!/bin/sh
trap 'echo asked to end; exit 0' TERM
mkdir /tmp/www
echo \"version $VERSION\" > /tmp/www/index.html
id -u > /tmp/www/uid
cat \"$KEY_FILE\" > /tmp/www/secret
cat /data/seed > /tmp/www/seed
echo \"$VERSION\" >> /data/versions || echo no volume
touch /forbidden || echo root is read-only
echo started $VERSION
echo to stderr >&2
httpd -f -p 8080 -h /tmp/www &
while [ ! -e /tmp/end ]; do sleep 0.2; done
exit 3
";

fn layer(store: &Store, tar: &[u8], compression: Compression) -> Layer {
    let blob = match compression {
        Compression::Zstd => zstd::encode_all(tar, 3).unwrap(),
        Compression::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(tar).unwrap();
            gzip.finish().unwrap()
        }
        Compression::None => tar.to_vec(),
    };
    let digest = store.put(&blob).unwrap();
    let descriptor = Descriptor::new(compression.media_type(), digest, blob.len() as u64);
    Layer { descriptor, diff_id: Digest::of(tar), created_by: "test".into() }
}

fn tar(files: &[(&str, u32, u64, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, mode, owner, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(if path.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(*mode);
        header.set_uid(*owner);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, path, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

/// An image whose program answers with `version`: a base in zstd, its files in gzip, its version in a plain layer.
pub fn image(store: &Store, version: &str) -> Digest {
    tool("busybox", "busybox-static");
    let files = tar(&[("start", 0o755, 0, RUN.as_bytes()), ("data/", 0o750, 1001, b""), ("data/seed", 0o640, 1001, b"seed")]);
    let recipe = Recipe {
        config: RunConfig {
            user: "default".into(),
            env: Some(vec!["PATH=/bin".into(), format!("VERSION={version}")]),
            cmd: Some(vec!["/start".into()]),
            volumes: Some(BTreeMap::from([("/data".into(), serde_json::json!({}))])),
            working_dir: "/tmp".into(),
            ..RunConfig::default()
        },
        layers: vec![
            layer(store, tiny_base(), Compression::Zstd),
            layer(store, &files, Compression::Gzip),
            layer(store, &tar(&[("version", 0o644, 0, version.as_bytes())]), Compression::None),
        ],
        annotations: BTreeMap::new(),
        created: 1_700_000_000,
    };
    image::write(store, &recipe).unwrap().digest
}

/// The body of a page; `None` when nobody answers.
pub fn page(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.trim_end().to_owned())
}

/// Asks until there is an answer.
#[track_caller]
pub fn until<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + patience;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
