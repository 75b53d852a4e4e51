//! What a request to a registry ended with: one classification for the answers of the protocol,
//! the errors of HTTP and those of sockets. It decides what is tried again and after which pause,
//! and is told without URLs (a redirect's may be signed) and without anything that was sent.

use std::error::Error;
use std::time::Duration;

/// Pauses before another try: a registry that restarts or limits its rate is usually back within
/// seconds, and a build that waits longer than this without a word looks hung.
pub(super) const RETRY_PAUSES: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(4)];
/// A registry that wants a longer pause than this (`Retry-After`) is told of, not waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Bytes that are read of an answer that is no success: a sentence is all that is told of it.
const BODY_LIMIT: usize = 64 << 10;

/// What an answer that is no success says beside its words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// `Retry-After` (RFC 9110, section 10.2.3).
    pub retry_after: Option<Duration>,
    /// `WWW-Authenticate`, one text for each header.
    pub challenges: Vec<String>,
    /// The protocol's error codes (distribution specification, "Error Codes"): `DENIED`, `DIGEST_INVALID`, …
    pub codes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    #[error("it answered with status {code}{}{}", words(.message), patience(.said))]
    Status { code: u16, message: String, said: Box<Said> },
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    #[error("its certificate was not accepted: {0}")]
    Certificate(String),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("it did not answer in time")]
    Timeout,
    #[error("the content does not have its digest: expected `{expected}`, got `{actual}`")]
    Digest { expected: String, actual: String },
    #[error("it sent more than the {0} bytes of the manifest")]
    TooLong(u64),
    #[error("{0}")]
    Other(String),
}

fn words(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

impl Trouble {
    /// The written list of what is tried again: broken connections (reset, ended early), timeouts,
    /// too many requests, and what a registry's front servers answer while it is overloaded or restarting.
    /// A refused connection, an unknown host or a bad certificate is not: it will be the same in a second.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Trouble::Broken(_) | Trouble::Timeout => true,
            Trouble::Status { code, .. } => matches!(code, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether something came that is not what was asked for.
    pub(super) fn is_wrong(&self) -> bool {
        matches!(self, Trouble::Digest { .. } | Trouble::TooLong(_))
    }

    /// Whether trying the whole command again later may help.
    pub(super) fn is_transient(&self) -> bool {
        self.may_pass() || matches!(self, Trouble::Unreachable(_))
    }

    /// How long to wait before the next try when `failures` came before this one; nothing when it is not tried again.
    pub(super) fn pause(&self, failures: usize) -> Option<Duration> {
        let pause = *RETRY_PAUSES.get(failures).filter(|_| self.may_pass())?;
        match self {
            Trouble::Status { said, .. } => match said.retry_after {
                Some(asked) => (asked <= LONGEST_PAUSE).then(|| asked.max(pause)),
                None => Some(pause),
            },
            _ => Some(pause),
        }
    }

    /// Whether the answer has the protocol's error code `code`.
    pub(super) fn has_code(&self, code: &str) -> bool {
        matches!(self, Trouble::Status { said, .. } if said.codes.iter().any(|said| said == code))
    }

    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Trouble::Status { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// An answer that is not a success, with what its body says.
    pub(super) fn from_status(code: u16, body: &str) -> Self {
        let said = Said { codes: error_codes(body), ..Said::default() };
        Trouble::Status { code, message: first_words(body), said: Box::new(said) }
    }

    /// The same with what the headers say.
    pub(super) async fn from_response(mut response: reqwest::Response) -> Self {
        let headers = response.headers().clone();
        let mut body = Vec::new();
        while let (true, Ok(Some(bytes))) = (body.len() < BODY_LIMIT, response.chunk().await) {
            body.extend_from_slice(&bytes);
        }
        let mut trouble = Trouble::from_status(response.status().as_u16(), &String::from_utf8_lossy(&body));
        if let Trouble::Status { said, .. } = &mut trouble {
            let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            said.retry_after = text("retry-after").and_then(|after| retry_after(after, text("date")));
            said.challenges =
                headers.get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect();
        }
        trouble
    }
}

fn patience(said: &Said) -> String {
    said.retry_after.map_or_else(String::new, |asked| format!(" and asks to wait {} s", asked.as_secs()))
}

/// Seconds, or a date: then measured by the server's own clock, since ours may differ.
fn retry_after(after: &str, now: Option<&str>) -> Option<Duration> {
    if let Ok(seconds) = after.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let parse = |text: &str| jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok();
    let seconds = parse(after)?.as_second() - parse(now?)?.as_second();
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

fn error_codes(body: &str) -> Vec<String> {
    let value: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let errors = value["errors"].as_array().into_iter().flatten();
    errors.filter_map(|error| error["code"].as_str()).map(str::to_owned).collect()
}

/// The registry's own words: the messages of the protocol's error list, or the first line of text.
fn first_words(body: &str) -> String {
    /// Enough for a sentence; some registries answer with a page.
    const LIMIT: usize = 200;
    let text = match serde_json::from_str::<serde_json::Value>(body) {
        Ok(value) => value["errors"].as_array().map_or_else(
            || {
                ["details", "message", "error_description", "error"]
                    .iter()
                    .find_map(|key| value[key].as_str())
                    .unwrap_or("")
                    .to_owned()
            },
            |errors| errors.iter().filter_map(|error| error["message"].as_str()).collect::<Vec<_>>().join("; "),
        ),
        Err(_) if body.trim_start().starts_with('<') => String::new(),
        Err(_) => body.lines().next().unwrap_or("").trim().to_owned(),
    };
    text.chars().filter(|c| !c.is_control()).take(LIMIT).collect()
}

impl From<reqwest::Error> for Trouble {
    fn from(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let deepest = deepest(&error);
        if let Some(trouble) = tls_trouble(&error) {
            return trouble;
        }
        if error.is_timeout() && !error.is_connect() {
            Trouble::Timeout
        } else if error.is_connect() {
            let reset = io_kinds(&error).contains(&std::io::ErrorKind::ConnectionReset);
            if reset { Trouble::Broken(deepest) } else { Trouble::Unreachable(deepest) }
        } else if error.is_redirect() || error.is_builder() || error.is_status() {
            Trouble::Other(deepest)
        } else {
            // What is left happened on an open connection: while sending, or while the body came.
            Trouble::Broken(deepest)
        }
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        let kind = error.kind();
        match error.into_inner() {
            None => match kind {
                std::io::ErrorKind::TimedOut => Trouble::Timeout,
                _ => Trouble::Broken(kind.to_string()),
            },
            Some(inner) => match inner.downcast::<reqwest::Error>() {
                Ok(error) => (*error).into(),
                Err(inner) => Trouble::Broken(inner.to_string()),
            },
        }
    }
}

/// The causes of an error; those wrapped in an I/O error too, which hides them from `source()`.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> Vec<&'a (dyn Error + 'static)> {
    let mut causes = vec![];
    let mut next = Some(error);
    while let Some(error) = next {
        causes.push(error);
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = wrapped.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    causes
}

fn deepest(error: &(dyn Error + 'static)) -> String {
    causes(error).last().map_or_else(String::new, ToString::to_string)
}

fn io_kinds(error: &(dyn Error + 'static)) -> Vec<std::io::ErrorKind> {
    causes(error).iter().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind).collect()
}

fn tls_trouble(error: &(dyn Error + 'static)) -> Option<Trouble> {
    causes(error).iter().find_map(|cause| match cause.downcast_ref::<rustls::Error>() {
        Some(rustls::Error::InvalidCertificate(why)) => Some(Trouble::Certificate(why.to_string())),
        Some(rustls::Error::InvalidMessage(_)) => Some(Trouble::Other("it does not speak TLS".into())),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_listed_troubles_are_tried_again() {
        let status = |code| Trouble::from_status(code, "");
        for (trouble, may_pass, transient) in [
            (status(429), true, true),
            (status(503), true, true),
            (status(500), true, true),
            (status(408), true, true),
            (status(501), false, false),
            (status(401), false, false),
            (status(404), false, false),
            (Trouble::Timeout, true, true),
            (std::io::Error::from(std::io::ErrorKind::ConnectionReset).into(), true, true),
            (std::io::Error::from(std::io::ErrorKind::TimedOut).into(), true, true),
            (Trouble::Unreachable("refused".into()), false, true),
            (Trouble::Certificate("expired".into()), false, false),
            (Trouble::Digest { expected: "a".into(), actual: "b".into() }, false, false),
            (Trouble::Other("odd".into()), false, false),
        ] {
            assert_eq!((trouble.may_pass(), trouble.is_transient()), (may_pass, transient), "{trouble:?}");
        }
    }

    #[test]
    fn a_pause_is_as_long_as_the_registry_asks_within_reason() {
        let date = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        for (after, now, expected) in [
            ("7", None, Some(7)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", date, Some(10)),
            ("Sun, 06 Nov 1994 08:49:27 GMT", date, Some(0)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", None, None),
            ("soon", date, None),
        ] {
            assert_eq!(retry_after(after, now), expected.map(Duration::from_secs), "{after}");
        }
        let asking = |code, seconds| {
            let said = Said { retry_after: Some(Duration::from_secs(seconds)), ..Said::default() };
            Trouble::Status { code, message: String::new(), said: Box::new(said) }
        };
        for (trouble, failures, expected) in [
            (asking(429, 7), 0, Some(Duration::from_secs(7))),
            (asking(429, 2), 2, Some(RETRY_PAUSES[2])),
            (asking(429, 61), 0, None),
            (asking(403, 1), 0, None),
            (Trouble::Timeout, 1, Some(RETRY_PAUSES[1])),
            (Trouble::Timeout, 3, None),
        ] {
            assert_eq!(trouble.pause(failures), expected, "{trouble:?}");
        }
        assert_eq!(asking(429, 61).to_string(), "it answered with status 429 and asks to wait 61 s");
    }

    #[test]
    fn the_registrys_words_are_kept_short() {
        for (body, expected) in [
            (r#"{"errors":[{"code":"DENIED","message":"no"},{"code":"X","message":"really"}]}"#, "no; really"),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            ("plain text\nmore", "plain text"),
            ("<html><body>502</body></html>", ""),
            ("", ""),
        ] {
            assert_eq!(first_words(body), expected, "{body}");
        }
        assert_eq!(first_words(&"x".repeat(1000)).len(), 200);
        let trouble = Trouble::from_status(400, r#"{"errors":[{"code":"DIGEST_INVALID","message":"no"}]}"#);
        assert!(trouble.has_code("DIGEST_INVALID") && !trouble.has_code("DENIED"));
        assert_eq!(Trouble::from_status(403, "no\u{1b}[31m").to_string(), "it answered with status 403 (no[31m)");
        assert_eq!(Trouble::from_status(502, "<html>").to_string(), "it answered with status 502");
    }
}
