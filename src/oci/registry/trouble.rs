//! What a request to a registry ended with: one classification for the errors of the protocol
//! crate, of HTTP and of sockets. It decides what is tried again, and is told without URLs
//! (a redirect's may be signed) and without anything that was sent.

use std::error::Error;
use std::time::Duration;

use oci_client::errors::{DigestError, OciDistributionError, OciErrorCode};

/// Pauses before another try: a registry that restarts or limits its rate is usually back within
/// seconds, and a build that waits longer than this without a word looks hung.
pub(super) const RETRY_PAUSES: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(4)];

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    #[error("it answered with status {code}{}", words(.message))]
    Status { code: u16, message: String },
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

    /// Whether trying the whole command again later may help.
    pub(super) fn is_transient(&self) -> bool {
        self.may_pass() || matches!(self, Trouble::Unreachable(_))
    }

    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Trouble::Status { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// An answer that is not a success, with what its body says.
    pub(super) fn from_status(code: u16, body: &str) -> Self {
        Trouble::Status { code, message: first_words(body) }
    }
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

impl From<OciDistributionError> for Trouble {
    fn from(error: OciDistributionError) -> Self {
        match error {
            OciDistributionError::RequestError(error) => error.into(),
            OciDistributionError::IoError(error) => error.into(),
            OciDistributionError::DigestError(error) => error.into(),
            OciDistributionError::ServerError { code, message, .. } => Trouble::from_status(code, &message),
            OciDistributionError::UnauthorizedError { .. } => Trouble::Status { code: 401, message: String::new() },
            OciDistributionError::AuthenticationFailure(body) => Trouble::from_status(401, &body),
            OciDistributionError::RegistryError { envelope, .. } => {
                let message = envelope.errors.iter().map(|error| error.message.as_str()).filter(|message| !message.is_empty());
                let message = message.collect::<Vec<_>>().join("; ");
                // The crate keeps the code of the protocol and drops the one of HTTP.
                let code = envelope.errors.first().map_or(400, |error| match &error.code {
                    OciErrorCode::Unauthorized => 401,
                    OciErrorCode::Denied => 403,
                    OciErrorCode::BlobUnknown
                    | OciErrorCode::ManifestBlobUnknown
                    | OciErrorCode::ManifestUnknown
                    | OciErrorCode::NameUnknown
                    | OciErrorCode::NotFound => 404,
                    OciErrorCode::Toomanyrequests => 429,
                    _ => 400,
                });
                Trouble::Status { code, message: message.chars().filter(|c| !c.is_control()).collect() }
            }
            other => Trouble::Other(format!("the answer does not follow the distribution protocol: {other}")),
        }
    }
}

impl From<DigestError> for Trouble {
    fn from(error: DigestError) -> Self {
        match error {
            DigestError::VerificationError { expected, actual } => Trouble::Digest { expected, actual },
            other => Trouble::Other(other.to_string()),
        }
    }
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
                Err(inner) => match inner.downcast::<DigestError>() {
                    Ok(error) => (*error).into(),
                    Err(inner) => Trouble::Broken(inner.to_string()),
                },
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
        assert_eq!(Trouble::from_status(403, "no\u{1b}[31m").to_string(), "it answered with status 403 (no[31m)");
        assert_eq!(Trouble::from_status(502, "<html>").to_string(), "it answered with status 502");
    }
}
