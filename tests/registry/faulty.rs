//! A registry in memory that follows the distribution protocol 1.1 until it is told not to.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use pipeline::oci::digest::Digest;

/// What to do instead of the right thing.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Status, headers (each line ended), body.
    Answer(u16, &'static str, &'static str),
    /// Takes this many bytes of the request's body, keeps them, and closes the connection.
    CutBody(usize),
    /// Answers rightly, and closes after this many bytes of the answer's body.
    CutAnswer(usize),
    /// Answers with the last byte of the body changed.
    Lie,
}

/// A request without its body.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Asked {
    pub fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.path.contains(part)
    }
}

type Script = Box<dyn FnMut(&Asked) -> Option<Fault> + Send>;

#[derive(Default)]
pub struct State {
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    /// By `REPOSITORY/TAG` and `REPOSITORY/DIGEST`.
    pub manifests: BTreeMap<String, (String, Vec<u8>)>,
    uploads: BTreeMap<String, Vec<u8>>,
    begun: usize,
    pub log: Vec<Asked>,
    /// Bytes of uploads that were received.
    pub received: usize,
    pub has_referrers: bool,
    script: Option<Script>,
}

pub struct Faulty {
    pub port: u16,
    pub state: Arc<Mutex<State>>,
}

impl Faulty {
    pub fn start(has_referrers: bool, script: impl FnMut(&Asked) -> Option<Fault> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State { has_referrers, script: Some(Box::new(script)), ..State::default() }));
        let kept = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), kept.clone());
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Self { port, state }
    }

    /// `METHOD PATH` of the requests for which `keep` says so.
    pub fn asked(&self, keep: impl Fn(&Asked) -> bool) -> Vec<Asked> {
        self.state.lock().unwrap().log.iter().filter(|asked| keep(asked)).cloned().collect()
    }

    pub fn script(&self, script: impl FnMut(&Asked) -> Option<Fault> + Send + 'static) {
        self.state.lock().unwrap().script = Some(Box::new(script));
    }
}

struct Reply {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

fn reply(status: u16, headers: impl Into<String>, body: impl Into<Vec<u8>>) -> Reply {
    Reply { status, headers: headers.into(), body: body.into() }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap().split(' ');
    let (method, path) = (first.next().unwrap().to_owned(), first.next().unwrap().to_owned());
    let headers: BTreeMap<String, String> =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let asked = Asked { method, path, headers };
    let length: usize = asked.headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let fault = {
        let mut state = state.lock().unwrap();
        state.log.push(asked.clone());
        state.script.as_mut().and_then(|script| script(&asked))
    };
    let wanted = if let Some(Fault::CutBody(taken)) = &fault { length.min(*taken) } else { length };
    let mut body = vec![0; wanted];
    if stream.read_exact(&mut body).is_err() {
        return;
    }
    let mut limit = usize::MAX;
    let answer = match fault {
        Some(Fault::Answer(status, headers, text)) => reply(status, headers, text),
        Some(Fault::CutBody(_)) => {
            keep_part(&asked, &body, &mut state.lock().unwrap());
            return;
        }
        other => {
            let mut answer = right(&asked, body, &mut state.lock().unwrap());
            match other {
                Some(Fault::Lie) => *answer.body.last_mut().unwrap() ^= 1,
                Some(Fault::CutAnswer(bytes)) => limit = bytes,
                _ => {}
            }
            answer
        }
    };
    let length = if answer.headers.contains("content-length") {
        String::new()
    } else {
        format!("content-length: {}\r\n", answer.body.len())
    };
    let head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n{length}{}\r\n", answer.status, answer.headers);
    let body = if asked.method == "HEAD" { &[][..] } else { &answer.body[..limit.min(answer.body.len())] };
    let _ = stream.write_all(&[head.as_bytes(), body].concat());
}

fn upload_id(asked: &Asked) -> String {
    asked.path.split("/uploads/").nth(1).unwrap().split('?').next().unwrap().to_owned()
}

fn keep_part(asked: &Asked, body: &[u8], state: &mut State) {
    state.received += body.len();
    if asked.path.contains("/uploads/") {
        state.uploads.entry(upload_id(asked)).or_default().extend_from_slice(body);
    }
}

fn query(path: &str, key: &str) -> Option<String> {
    let query = path.split_once('?')?.1;
    let value = query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.replace("%3A", ":").replace("%2F", "/"))
}

/// What a good registry answers.
fn right(asked: &Asked, body: Vec<u8>, state: &mut State) -> Reply {
    let path = asked.path.split('?').next().unwrap().trim_start_matches("/v2/").to_owned();
    let method = asked.method.as_str();
    let gone = || reply(404, "", "");
    if path.is_empty() {
        return reply(200, "", "{}");
    }
    if let Some((repository, _)) = path.split_once("/blobs/uploads/") {
        return upload(asked, repository, body, state);
    }
    if let Some((_, digest)) = path.split_once("/blobs/") {
        let Some(blob) = state.blobs.get(&digest.parse().unwrap()) else { return gone() };
        let start: Option<usize> =
            asked.headers.get("range").map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        return match start {
            Some(start) => {
                let range = format!("content-range: bytes {start}-{}/{}\r\n", blob.len() - 1, blob.len());
                reply(206, range, &blob[start..])
            }
            None => reply(200, format!("content-length: {}\r\n", blob.len()), blob.clone()),
        };
    }
    if let Some((repository, name)) = path.split_once("/manifests/") {
        if method != "PUT" {
            let Some((kind, bytes)) = state.manifests.get(&format!("{repository}/{name}")) else { return gone() };
            let digest = Digest::of(bytes);
            return reply(200, format!("content-type: {kind}\r\ndocker-content-digest: {digest}\r\n"), bytes.clone());
        }
        let digest = Digest::of(&body);
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let kind = asked.headers["content-type"].clone();
        let parts = value["layers"].as_array().into_iter().flatten().chain(value.get("config"));
        let blobs = parts.clone().all(|part| state.blobs.contains_key(&part["digest"].as_str().unwrap().parse().unwrap()));
        let mut children = value["manifests"].as_array().into_iter().flatten();
        // The list of the fallback scheme names what is there as well.
        let children =
            children.all(|child| state.manifests.contains_key(&format!("{repository}/{}", child["digest"].as_str().unwrap())));
        if !blobs || !children {
            return reply(400, "", r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"children first"}]}"#);
        }
        for name in [name.to_owned(), digest.to_string()] {
            state.manifests.insert(format!("{repository}/{name}"), (kind.clone(), body.clone()));
        }
        let subject = value["subject"]["digest"].as_str().filter(|_| state.has_referrers);
        let subject = subject.map_or(String::new(), |subject| format!("oci-subject: {subject}\r\n"));
        return reply(201, format!("docker-content-digest: {digest}\r\n{subject}"), "");
    }
    if let Some((repository, subject)) = path.split_once("/referrers/") {
        if !state.has_referrers {
            return gone();
        }
        let entries: Vec<serde_json::Value> = state
            .manifests
            .iter()
            .filter(|(name, _)| name.starts_with(&format!("{repository}/sha256:")))
            .filter_map(|(_, (kind, bytes))| {
                let value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
                (value["subject"]["digest"] == subject).then(|| {
                    serde_json::json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len(), "artifactType": value["artifactType"]})
                })
            })
            .collect();
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": super::OCI_INDEX, "manifests": entries});
        return reply(200, format!("content-type: {}\r\n", super::OCI_INDEX), index.to_string());
    }
    if let Some(repository) = path.strip_suffix("/tags/list") {
        // Two a page, whatever is asked for.
        let own = format!("{repository}/");
        let tags: Vec<&str> =
            state.manifests.keys().filter_map(|name| name.strip_prefix(&own)).filter(|tag| !tag.contains(':')).collect();
        let after = query(&asked.path, "last").unwrap_or_default();
        let page: Vec<&str> = tags.iter().copied().filter(|tag| *tag > after.as_str()).take(2).collect();
        let more = tags.last() != page.last();
        let link = page
            .last()
            .filter(|_| more)
            .map(|last| format!("link: </v2/{repository}/tags/list?last={last}&n=2>; rel=\"next\"\r\n"));
        return reply(200, link.unwrap_or_default(), serde_json::json!({"name": repository, "tags": page}).to_string());
    }
    gone()
}

fn upload(asked: &Asked, repository: &str, body: Vec<u8>, state: &mut State) -> Reply {
    let place = |id: &str| format!("location: /v2/{repository}/blobs/uploads/{id}?state=x\r\n");
    if asked.method == "POST" {
        let mounted = query(&asked.path, "mount").and_then(|digest| digest.parse().ok());
        if mounted.is_some_and(|digest| state.blobs.contains_key(&digest)) {
            return reply(201, "", "");
        }
        state.begun += 1;
        let id = format!("u{}", state.begun);
        state.uploads.insert(id.clone(), Vec::new());
        return reply(202, place(&id), "");
    }
    let id = upload_id(asked);
    let Some(have) = state.uploads.get(&id).map(Vec::len) else { return reply(404, "", "") };
    let range = |end: usize| format!("{}range: 0-{}\r\n", place(&id), end.saturating_sub(1));
    if asked.method == "GET" {
        return reply(204, range(have), "");
    }
    if let Some(part) = asked.headers.get("content-range") {
        let start: usize = part.split('-').next().unwrap().parse().unwrap();
        if start != have {
            return reply(416, range(have), "");
        }
    }
    keep_part(asked, &body, state);
    let Some(digest) = query(&asked.path, "digest") else { return reply(202, range(have + body.len()), "") };
    let bytes = state.uploads.remove(&id).unwrap();
    if Digest::of(&bytes).to_string() != digest {
        return reply(400, "", r#"{"errors":[{"code":"DIGEST_INVALID","message":"other bytes"}]}"#);
    }
    state.blobs.insert(Digest::of(&bytes), bytes);
    reply(201, "", "")
}
