//! Waits until an application is healthy: the unit before `boot-complete.target` that makes its health count.
//!
//! The checks are those of the image: a path that answers 2xx or 3xx, a connection that is accepted, a command that
//! exits with 0. They are repeated until one succeeds or the time is over.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Between two checks.
const PAUSE: Duration = Duration::from_millis(250);
/// How long one check may take; a program that is still starting under emulation answers slowly.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an answer that are looked at: the status line is in front.
const HEAD: usize = 512;

/// `http PORT PATH SECONDS`, `tcp PORT SECONDS` or `command SECONDS PROGRAM [ARGUMENT…]`.
///
/// # Errors
/// What the last check said when the time was over, or words that are none of these.
pub fn wait(words: &[&str]) -> Result<(), String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("`{text}` is no number"));
    let port = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is no port"));
    match words {
        ["http", on, path, seconds] => {
            let port = port(on)?;
            until(number(seconds)?, || http(port, path))
        }
        ["tcp", on, seconds] => {
            let port = port(on)?;
            until(number(seconds)?, || connect(port).map(drop))
        }
        ["command", seconds, program, arguments @ ..] => until(number(seconds)?, || command(program, arguments)),
        _ => Err("usage: pipeline-init health http PORT PATH SECONDS | tcp PORT SECONDS | command SECONDS PROGRAM …".into()),
    }
}

fn until(seconds: u64, check: impl Fn() -> Result<(), String>) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        let Err(reason) = check() else { return Ok(()) };
        if Instant::now() >= end {
            return Err(format!("not healthy after {seconds} s: {reason}"));
        }
        std::thread::sleep(PAUSE);
    }
}

fn connect(port: u16) -> Result<TcpStream, String> {
    let address = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| format!("port {port}: {error}"))?;
    let limits = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    limits.map_err(|error| format!("port {port}: {error}"))?;
    Ok(stream)
}

fn http(port: u16, path: &str) -> Result<(), String> {
    let mut stream = connect(port)?;
    let request =
        format!("GET {path} HTTP/1.0\r\nHost: localhost:{port}\r\nUser-Agent: pipeline-health\r\nConnection: close\r\n\r\n");
    let failed = |error: std::io::Error| format!("http://localhost:{port}{path}: {error}");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut head = Vec::new();
    let mut buffer = [0; HEAD];
    while head.len() < HEAD && !head.contains(&b'\n') {
        match stream.read(&mut buffer).map_err(failed)? {
            0 => break,
            read => head.extend_from_slice(&buffer[..read]),
        }
    }
    match status(&head) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("http://localhost:{port}{path} answers {status}")),
        None => Err(format!("http://localhost:{port}{path}: what answers does not speak HTTP")),
    }
}

/// The status of an answer that begins with `head` (RFC 9112, section 4).
pub fn status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let version = words.next()?;
    let status = words.next()?;
    (version.starts_with("HTTP/") && status.len() == 3).then(|| status.parse().ok()).flatten()
}

fn command(program: &str, arguments: &[&str]) -> Result<(), String> {
    let ended = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status();
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{program}`: {status}")),
        Err(error) => Err(format!("`{program}` cannot be started: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines() {
        let cases: [(&[u8], Option<u16>); 6] = [
            (b"HTTP/1.1 200 OK\r\nA: b\r\n", Some(200)),
            (b"HTTP/1.0 503\r\n", Some(503)),
            (b"SSH-2.0-OpenSSH\r\n", None),
            (b"HTTP/1.1 20 x\n", None),
            (b"HTTP/1.1 \xff\n", None),
            (b"", None),
        ];
        for (head, expected) in cases {
            assert_eq!(status(head), expected, "{head:?}");
        }
    }

    /// Serves `answer` to the third connection and hangs up on the first two.
    #[test]
    fn waits_for_a_server_that_comes_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let server = std::thread::spawn(move || {
            for count in 0..3 {
                let (mut stream, _) = listener.accept().unwrap();
                if count == 2 {
                    let mut request = [0; 256];
                    let read = stream.read(&mut request).unwrap();
                    stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
                    return String::from_utf8_lossy(&request[..read]).into_owned();
                }
            }
            String::new()
        });
        wait(&["http", &port, "/healthz", "30"]).unwrap();
        assert!(server.join().unwrap().starts_with("GET /healthz HTTP/1.0\r\n"));
        let error = wait(&["tcp", &port, "0"]).unwrap_err();
        assert!(error.starts_with(&format!("not healthy after 0 s: port {port}: ")), "{error}");
        wait(&["command", "1", "true"]).unwrap();
        assert!(wait(&["command", "0", "false"]).unwrap_err().contains("`false`: exit status: 1"));
        assert!(wait(&["ping"]).unwrap_err().starts_with("usage: "));
    }
}
