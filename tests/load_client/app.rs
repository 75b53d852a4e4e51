//! The test upstream itself: good when it should be, ending well, misbehaving as asked.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use clap::Parser as _;

use super::load::upstream::{self, UpstreamArgs};
use super::{only, run};

#[derive(Debug, clap::Parser)]
struct Upstream {
    #[command(flatten)]
    args: UpstreamArgs,
}

// -- the upstream -------------------------------------------------------------------------------------

/// The test upstream in a thread; sending true is its SIGTERM, and its status is awaited by joining.
fn upstream(words: &str) -> (SocketAddr, tokio::sync::watch::Sender<bool>, thread::JoinHandle<String>) {
    let args = Upstream::try_parse_from(format!("upstream {words}").split_whitespace()).unwrap().args;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, stop) = tokio::sync::watch::channel(false);
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let served = tokio::task::LocalSet::new().block_on(&runtime, async {
            upstream::serve(tokio::net::TcpListener::from_std(listener).unwrap(), &args, args.version.clone().unwrap(), stop)
                .await
        });
        format!("{:?}", served.unwrap())
    });
    (address, sender, thread)
}

#[test]
fn a_good_upstream_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, report) = (dir.path().join("answers"), dir.path().join("report.json"));
    let (address, stop, thread) = upstream("--version v1");
    let words = format!(
        "--mix h1,upload,ws,sse,large --connections 10 --seconds 2 --large-rate 16777216 --answers {} --report {}",
        answers.display(),
        report.display()
    );
    let found = run(address, &words);
    assert_eq!(found.lost, 0, "{found}");
    for kind in ["h1", "upload", "ws", "sse", "large"] {
        let figures = only(&found, kind);
        assert!(figures.good > 0 && figures.connections == 2 && figures.restarts == 0, "{kind}: {found}");
    }
    assert!(only(&found, "ws").messages > 0 && only(&found, "sse").messages > 0, "{found}");
    assert_eq!(found.close_codes, [("1000".into(), 2)].into(), "{found}");
    assert!(found.versions.keys().eq(["v1"]), "{found}");
    // What is written is what was found, an answer a line, within the time of the run.
    let written: serde_json::Value = serde_json::from_slice(&fs_err::read(report).unwrap()).unwrap();
    assert_eq!(written, serde_json::to_value(&found).unwrap());
    let lines = fs_err::read_to_string(answers).unwrap();
    assert_eq!(lines.lines().count() as u64, found.versions["v1"].requests, "{found}");
    for line in lines.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let [sent, answered, accepted] = [words[0], words[1], words[4]].map(|word| word.parse::<u64>().unwrap());
        assert!(found.started <= sent && sent <= answered && answered <= found.ended, "{line}");
        assert!(accepted == 0 && ["ws", "sse"].contains(&words[3]) || sent <= accepted && accepted <= answered, "{line}");
        assert!(words.len() == 5 && words[2] == "v1" && found.kinds.contains_key(words[3]), "{line}");
    }
    stop.send_replace(true);
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
}

#[test]
fn an_upstream_that_is_told_to_end_ends_everything_well() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let (address, stop, thread) = upstream("--version v1");
    let download = thread::spawn(move || run(address, "--mix large --connections 1 --limit 1"));
    let streams = {
        let words = format!("--mix ws,sse --connections 4 --limit 1 --interval 5 --ready-file {}", ready.display());
        thread::spawn(move || run(address, &words))
    };
    while !ready.exists() {
        thread::sleep(Duration::from_millis(5));
    }
    stop.send_replace(true);
    let (streams, download) = (streams.join().unwrap(), download.join().unwrap());
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
    assert_eq!((streams.lost, download.lost), (0, 0), "{streams}\n{download}");
    assert_eq!((only(&streams, "ws").restarts, only(&streams, "sse").restarts), (2, 2), "{streams}");
    assert_eq!(streams.close_codes, [("1001".into(), 2)].into(), "{streams}");
}

#[test]
fn an_upstream_misbehaves_as_asked() {
    // (arguments, lost of 12 requests)
    let cases = [("--error-every 3", 4), ("--error-every 1", 12), ("--latency 1", 0)];
    for (words, lost) in cases {
        let (address, stop, thread) = upstream(&format!("--version v1 {words}"));
        let report = run(address, "--mix h1 --connections 1 --limit 12");
        assert_eq!((report.requests, report.lost), (12, lost), "{words}: {report}");
        stop.send_replace(true);
        assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
    }
    let (address, _stop, thread) = upstream("--version v1 --die-after 0.2");
    let report = run(address, "--mix ws --connections 1 --limit 2");
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(3))");
    assert_eq!(report.lost, 2, "{report}");
    for (words, expected) in
        [("", "HTTP/1.1 200"), ("--healthy-after 60", "HTTP/1.1 503"), ("--unhealthy-after 0", "HTTP/1.1 503")]
    {
        let (address, _stop, _thread) = upstream(&format!("--version v1 {words}"));
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: load\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(expected), "{words}: {answer}");
    }
}
