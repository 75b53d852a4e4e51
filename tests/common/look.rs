//! Looks at what programs do: pages they serve, things they leave behind.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// `GET path` on 127.0.0.1, asked again until it answers; status and body.
#[track_caller]
pub fn get(port: u16, path: &str) -> (u16, String) {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        match try_get(port, path) {
            Ok(answer) => return answer,
            Err(error) if Instant::now() > patience => panic!("http://127.0.0.1:{port}{path}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn try_get(port: u16, path: &str) -> Result<(u16, String), String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|error| error.to_string())?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes())
        .map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("no status")?;
    Ok((status, body.into()))
}

/// What a build has left behind below `root` and in the kernel; empty is good.
pub fn leftovers(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["cache/work", "store/.tmp"] {
        for entry in fs_err::read_dir(root.join(dir)).into_iter().flatten().flatten() {
            found.push(format!("file {}", entry.path().display()));
        }
    }
    temporary(root, 4, &mut found);
    let text = root.to_str().unwrap();
    for process in fs_err::read_dir("/proc").unwrap().flatten() {
        let dir = process.path();
        if !process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit())
            || process.file_name() == *std::process::id().to_string()
        {
            continue;
        }
        let read = |name: &str| fs_err::read(dir.join(name)).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let holds = |name: &str| fs_err::read_link(dir.join(name)).is_ok_and(|target| target.starts_with(root));
        let open = || {
            fs_err::read_dir(dir.join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .any(|fd| fs_err::read_link(fd.path()).is_ok_and(|target| target.starts_with(root)))
        };
        if cmdline.contains(text) || holds("cwd") || holds("root") || open() {
            found.push(format!("process {} {cmdline}", process.file_name().to_string_lossy()));
        } else if String::from_utf8_lossy(&read("mountinfo")).contains(text) {
            found.push(format!("mounts of process {} {cmdline}", process.file_name().to_string_lossy()));
        }
    }
    found
}

/// Temporary names anywhere in the store, `depth` folders deep, but not in trees.
fn temporary(dir: &Path, depth: u32, found: &mut Vec<String>) {
    for entry in fs_err::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if [".tmp-", ".new-", ".export-", ".tmp."].iter().any(|prefix| name.starts_with(prefix)) {
            found.push(format!("file {}", entry.path().display()));
        }
        if depth > 0 && name != "root" && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            temporary(&entry.path(), depth - 1, found);
        }
    }
}
