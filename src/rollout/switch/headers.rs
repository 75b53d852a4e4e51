//! Fields on their way through: checked, rid of what belongs to one hop, and with what the switch knows added.

use std::fmt::Write as _;
use std::net::IpAddr;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Uri, Version, request};

use super::Network;
use super::upstream::Framing;

/// The client's side of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client {
    pub address: IpAddr,
    pub tls: bool,
    /// Whether what it says about forwarding is believed.
    pub trusted: bool,
}

/// What a request may have at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    pub bytes: usize,
    pub count: usize,
}

/// Status and reason of a refusal.
pub(super) type Refusal = (u16, &'static str);

/// Fields that are about one connection only, whether `Connection` names them or not (RFC 9110, section 7.6.1).
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONNECTION
            | header::TE
            | header::TRAILER
            | header::TRANSFER_ENCODING
            | header::UPGRADE
            | header::PROXY_AUTHORIZATION
            | header::PROXY_AUTHENTICATE
    ) || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
}

/// Fields a trailer never carries on (RFC 9110, section 6.5.1).
pub(super) fn may_be_trailer(name: &HeaderName) -> bool {
    let framing = matches!(
        *name,
        header::CONTENT_LENGTH | header::HOST | header::CONTENT_TYPE | header::CONTENT_ENCODING | header::CONTENT_RANGE
    );
    let control = matches!(
        *name,
        header::AUTHORIZATION
            | header::COOKIE
            | header::SET_COOKIE
            | header::EXPECT
            | header::MAX_FORWARDS
            | header::CACHE_CONTROL
    );
    !framing && !control && !is_hop_by_hop(name)
}

/// `name: value CRLF`.
pub(super) fn field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// The options of all `Connection` fields, without `close` and `keep-alive`.
fn named_by_connection(headers: &HeaderMap) -> Vec<&[u8]> {
    let mut named = Vec::new();
    for value in headers.get_all(header::CONNECTION) {
        let options = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        named.extend(options.filter(|option| {
            !option.is_empty() && !option.eq_ignore_ascii_case(b"keep-alive") && !option.eq_ignore_ascii_case(b"close")
        }));
    }
    named
}

fn lists(headers: &HeaderMap, name: HeaderName, wanted: &[u8]) -> bool {
    let mut values = headers.get_all(name).iter();
    values
        .any(|value| value.as_bytes().split(|byte| *byte == b',').any(|option| option.trim_ascii().eq_ignore_ascii_case(wanted)))
}

/// Whether an HTTP/1.1 request asks for another protocol, and which; never HTTP/2, which is not this hop's to offer.
pub(super) fn upgrade(parts: &request::Parts) -> Option<&HeaderValue> {
    let value = parts.headers.get(header::UPGRADE)?;
    let asked = parts.version == Version::HTTP_11 && lists(&parts.headers, header::CONNECTION, b"upgrade");
    (asked && !lists(&parts.headers, header::UPGRADE, b"h2c")).then_some(value)
}

/// Refuses what cannot be forwarded safely, and gives host (lower case, without port) and authority (as it came).
pub(super) fn check(parts: &request::Parts, most: Most) -> Result<(String, Bytes), Refusal> {
    let headers = &parts.headers;
    let size = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    if headers.len() > most.count || size > most.bytes {
        return Err((431, "the header fields are too many or too large"));
    }
    if parts.method == Method::CONNECT {
        return Err((405, "CONNECT is not for a switch"));
    }
    if parts.version < Version::HTTP_2 {
        let (length, encoded) = (headers.contains_key(header::CONTENT_LENGTH), headers.contains_key(header::TRANSFER_ENCODING));
        if length && encoded {
            return Err((400, "both content-length and transfer-encoding"));
        }
        let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
        if encoded
            && !(encodings.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"))
                && encodings.next().is_none())
        {
            return Err((501, "a transfer-encoding other than chunked"));
        }
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let named = hosts.next();
    if hosts.next().is_some() {
        return Err((400, "more than one host"));
    }
    let authority = match (parts.uri.authority(), named) {
        // The target in absolute form wins over the field (RFC 9112, section 3.2.2); in HTTP/2 they must agree (RFC 9113, section 8.3.1).
        (Some(authority), Some(named))
            if parts.version >= Version::HTTP_2 && !authority.as_str().as_bytes().eq_ignore_ascii_case(named.as_bytes()) =>
        {
            return Err((400, "`:authority` and `host` differ"));
        }
        (Some(authority), _) => Bytes::copy_from_slice(authority.as_str().as_bytes()),
        (None, Some(named)) => Bytes::copy_from_slice(named.as_bytes()),
        (None, None) if parts.version >= Version::HTTP_11 => return Err((400, "no host")),
        (None, None) => Bytes::new(),
    };
    let host = host_of(&authority).ok_or((400, "the host is malformed"))?;
    Ok((host, authority))
}

/// The name of `NAME[:PORT]` in lower case; `None` when it is none (RFC 3986, section 3.2.2).
fn host_of(authority: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(authority).ok()?;
    let end = match text.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => text.find(':').unwrap_or(text.len()),
    };
    let (host, port) = text.split_at(end);
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%[]:".contains(&byte);
    let port_is_good = port.is_empty() || port[1..].bytes().all(|byte| byte.is_ascii_digit()) && port.starts_with(':');
    (host.bytes().all(allowed) && port_is_good).then(|| host.to_ascii_lowercase())
}

/// Path and query as the instance gets them; `strip` bytes of the path are taken away.
fn target(uri: &Uri, method: &Method, strip: usize) -> String {
    let whole = uri.path_and_query().map_or("/", |target| target.as_str());
    if method == Method::OPTIONS && whole == "*" {
        return "*".into();
    }
    let left = &whole[strip.min(whole.len())..];
    if left.starts_with('/') { left.to_owned() } else { format!("/{left}") }
}

/// Head of the request for an instance: request line and fields (HTTP/1.1).
pub(super) struct Outgoing<'a> {
    pub parts: &'a request::Parts,
    pub authority: &'a [u8],
    pub client: Client,
    pub strip: usize,
    /// How the body's end is known; `None`: there is no body.
    pub body: Option<Framing>,
}

impl Outgoing<'_> {
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        let (parts, headers) = (self.parts, &self.parts.headers);
        out.extend_from_slice(parts.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(target(&parts.uri, &parts.method, self.strip).as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        field(&mut out, b"host", self.authority);
        let named = named_by_connection(headers);
        let mut cookies: Vec<u8> = Vec::new();
        for (name, value) in headers {
            if is_hop_by_hop(name)
                || self.is_replaced(name)
                || named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str().as_bytes()))
            {
                continue;
            }
            // HTTP/2 sends cookies in crumbs, which belong into one field (RFC 9113, section 8.2.3).
            if *name == header::COOKIE {
                if !cookies.is_empty() {
                    cookies.extend_from_slice(b"; ");
                }
                cookies.extend_from_slice(value.as_bytes());
                continue;
            }
            field(&mut out, name.as_str().as_bytes(), value.as_bytes());
        }
        if !cookies.is_empty() {
            field(&mut out, b"cookie", &cookies);
        }
        match self.body {
            Some(Framing::Length(length)) => field(&mut out, b"content-length", length.to_string().as_bytes()),
            Some(_) => field(&mut out, b"transfer-encoding", b"chunked"),
            None => {}
        }
        if let Some(protocol) = upgrade(parts) {
            field(&mut out, b"connection", b"upgrade");
            field(&mut out, b"upgrade", protocol.as_bytes());
        } else if lists(headers, header::TE, b"trailers") {
            field(&mut out, b"connection", b"te");
            field(&mut out, b"te", b"trailers");
        }
        self.write_forwarded(&mut out);
        out.extend_from_slice(b"\r\n");
        out
    }

    /// Fields the switch writes itself.
    fn is_replaced(&self, name: &HeaderName) -> bool {
        match name.as_str() {
            "host" | "content-length" | "x-forwarded-for" | "forwarded" => true,
            "x-forwarded-proto" | "x-forwarded-host" => {
                !self.client.trusted || self.parts.headers.get_all(name).iter().count() > 1
            }
            "x-forwarded-port" | "x-forwarded-server" | "x-forwarded-prefix" | "x-forwarded-ssl" | "x-forwarded-scheme"
            | "x-real-ip" => !self.client.trusted,
            _ => false,
        }
    }

    /// X-Forwarded-For, -Proto, -Host and Forwarded (RFC 7239). What came from a trusted forwarder is continued.
    fn write_forwarded(&self, out: &mut Vec<u8>) {
        let headers = &self.parts.headers;
        let mut continued = |name: &'static str, own: &str| {
            let mut value = Vec::with_capacity(64);
            if self.client.trusted {
                for before in headers.get_all(name) {
                    value.extend_from_slice(before.as_bytes());
                    value.extend_from_slice(b", ");
                }
            }
            value.extend_from_slice(own.as_bytes());
            field(out, name.as_bytes(), &value);
        };
        let address = self.client.address;
        let mut text = String::with_capacity(40);
        let _ = write!(text, "{address}");
        continued("x-forwarded-for", &text);
        let proto = if self.client.tls { "https" } else { "http" };
        let host = std::str::from_utf8(self.authority).unwrap_or_default();
        text.clear();
        let _ = match address {
            IpAddr::V4(address) => write!(text, "for={address};proto={proto}"),
            IpAddr::V6(address) => write!(text, "for=\"[{address}]\";proto={proto}"),
        };
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if !host.is_empty() {
            let quote = if host.bytes().all(is_token) { "" } else { "\"" };
            let _ = write!(text, ";host={quote}{host}{quote}");
        }
        continued("forwarded", &text);
        let kept = |name| self.client.trusted && headers.get_all(name).iter().count() == 1;
        if !kept("x-forwarded-proto") {
            field(out, b"x-forwarded-proto", proto.as_bytes());
        }
        if !kept("x-forwarded-host") && !host.is_empty() {
            field(out, b"x-forwarded-host", host.as_bytes());
        }
        if self.strip > 0 && !kept("x-forwarded-prefix") {
            field(out, b"x-forwarded-prefix", &self.parts.uri.path().as_bytes()[..self.strip.min(self.parts.uri.path().len())]);
        }
    }
}

/// Takes out of an answer what belongs to the instance's connection. `upgraded`: a 101, whose upgrade is the client's, too.
pub(super) fn clean_answer(headers: &mut HeaderMap, upgraded: bool) {
    let protocol = if upgraded { headers.remove(header::UPGRADE) } else { None };
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> =
            named_by_connection(headers).into_iter().filter_map(|name| HeaderName::from_bytes(name).ok()).collect();
        named.iter().for_each(|name| drop(headers.remove(name)));
        headers.remove(header::CONNECTION);
    }
    // `trailer` stays: it only announces, and without it HTTP/1.1 clients get no trailers.
    for name in [header::TE, header::UPGRADE, header::PROXY_AUTHENTICATE] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    if let Some(protocol) = protocol {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// Whether `address` is of one of the networks; an IPv4 address in IPv6 form counts as what it is.
pub(super) fn is_trusted(address: IpAddr, networks: &[Network]) -> bool {
    networks.iter().any(|network| network.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn parts(builder: request::Builder) -> request::Parts {
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn hosts() {
        for (authority, wanted) in [
            ("Shop.Test", Some("shop.test")),
            ("shop.test:8080", Some("shop.test")),
            ("[::1]:80", Some("[::1]")),
            ("", Some("")),
            ("shop.test:80a", None),
            ("a b", None),
            ("a/b", None),
            ("a@b", None),
            ("[::1", None),
            ("[::1]x", None),
            ("shop.test\u{e9}", None),
        ] {
            assert_eq!(host_of(authority.as_bytes()).as_deref(), wanted, "{authority}");
        }
    }

    #[test]
    fn requests_that_are_refused() {
        let get = || Request::get("/").header("host", "a");
        for (request, status) in [
            (get().header("host", "b"), 400),
            (Request::get("/"), 400),
            (get().header("content-length", "1").header("transfer-encoding", "chunked"), 400),
            (get().header("transfer-encoding", "gzip, chunked"), 501),
            (get().header("transfer-encoding", "chunked").header("transfer-encoding", "chunked"), 501),
            (Request::connect("a:80").header("host", "a"), 405),
            (Request::get("http://a/").header("host", "b").version(Version::HTTP_2), 400),
            (get().header("x", "y".repeat(5000)), 431),
            ((0..101).fold(get(), |request, number| request.header(format!("x-{number}"), "y")), 431),
        ] {
            let parts = parts(request);
            let refusal = check(&parts, Most { bytes: 4096, count: 100 });
            assert_eq!(refusal.as_ref().map_err(|refusal| refusal.0), Err(status), "{parts:?}: {refusal:?}");
        }
        let absolute = parts(Request::get("http://B.test:81/").header("host", "a"));
        let wanted = ("b.test".to_owned(), Bytes::from_static(b"B.test:81"));
        assert_eq!(check(&absolute, Most { bytes: 4096, count: 100 }), Ok(wanted), "the target in absolute form wins");
    }

    fn written(request: request::Builder, trusted: bool, strip: usize, body: Option<Framing>) -> Vec<String> {
        let client = Client { address: "192.0.2.7".parse().unwrap(), tls: true, trusted };
        let parts = parts(request);
        let text = Outgoing { parts: &parts, authority: b"shop.test:8443", client, strip, body }.write();
        let text = String::from_utf8(text).unwrap();
        text.strip_suffix("\r\n\r\n").unwrap().split("\r\n").map(str::to_owned).collect()
    }

    #[test]
    fn what_an_instance_gets() {
        let request = || {
            let request = Request::post("/api/x?y=1").version(Version::HTTP_2);
            let request = request.header("cookie", "a=1").header("x-own", "1").header("cookie", "b=2").header("te", "trailers");
            let request =
                request.header("connection", "X-Named, keep-alive").header("x-named", "gone").header("keep-alive", "timeout=5");
            request
                .header("x-forwarded-for", "10.0.0.1")
                .header("forwarded", "for=10.0.0.1")
                .header("x-forwarded-proto", "gopher")
                .header("x-real-ip", "10.0.0.1")
        };
        let own = [
            "POST /x?y=1 HTTP/1.1",
            "host: shop.test:8443",
            "x-own: 1",
            "cookie: a=1; b=2",
            "transfer-encoding: chunked",
            "connection: te",
            "te: trailers",
        ];
        let host = "x-forwarded-host: shop.test:8443";
        let untrusted = [
            "x-forwarded-for: 192.0.2.7",
            "forwarded: for=192.0.2.7;proto=https;host=\"shop.test:8443\"",
            "x-forwarded-proto: https",
            host,
            "x-forwarded-prefix: /api",
        ];
        assert_eq!(written(request(), false, 4, Some(Framing::Chunked)), [&own[..], &untrusted].concat());
        let trusted = written(request(), true, 0, Some(Framing::Length(3)));
        for line in [
            "POST /api/x?y=1 HTTP/1.1",
            "content-length: 3",
            "x-forwarded-for: 10.0.0.1, 192.0.2.7",
            "forwarded: for=10.0.0.1, for=192.0.2.7;proto=https;host=\"shop.test:8443\"",
            "x-forwarded-proto: gopher",
            "x-real-ip: 10.0.0.1",
        ] {
            assert!(trusted.iter().any(|written| written == line), "{line} in {trusted:?}");
        }
        let upgrade = written(Request::get("/").header("connection", "Upgrade").header("upgrade", "websocket"), false, 0, None);
        assert_eq!(&upgrade[2..4], ["connection: upgrade", "upgrade: websocket"]);
        let h2c = written(
            Request::get("/")
                .header("connection", "Upgrade, HTTP2-Settings")
                .header("upgrade", "h2c")
                .header("http2-settings", "x"),
            false,
            0,
            None,
        );
        assert!(h2c[2].starts_with("x-forwarded-for"), "{h2c:?}");
    }

    #[test]
    fn what_a_client_gets() {
        let mut headers = HeaderMap::new();
        let fields = [
            ("connection", "x-hop, Keep-Alive"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("upgrade", "websocket"),
            ("x-own", "1"),
            ("trailer", "x-sum"),
        ];
        for (name, value) in fields {
            headers.append(name, value.parse().unwrap());
        }
        let mut upgraded = headers.clone();
        clean_answer(&mut headers, false);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-own", "trailer"]);
        clean_answer(&mut upgraded, true);
        assert_eq!(
            (&upgraded["connection"], &upgraded["upgrade"]),
            (&HeaderValue::from_static("upgrade"), &HeaderValue::from_static("websocket"))
        );
    }
}
