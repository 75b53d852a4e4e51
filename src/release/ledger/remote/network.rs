//! Remotes over HTTP and SSH, through libgit2.

use std::cell::{Cell, RefCell};
use std::sync::Once;

use git2::{Direction, ErrorClass, ErrorCode, FetchOptions, Oid, PushOptions, Repository};

use super::{BRANCH, Push, Remote, RemoteError};
use crate::git;

/// A server that does not take the connection for this long is taken for unreachable, in milliseconds.
const CONNECT_MS: i32 = 20_000;
/// The same for one that says nothing; a hook of it may take its time.
const SILENCE_MS: i32 = 60_000;

/// Tells libgit2 not to wait for ever.
fn set_timeouts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[expect(
            unsafe_code,
            reason = "two numbers that are only read when a connection is made, and this is before the first of ours"
        )]
        // They cannot fail.
        unsafe {
            let _ = git2::opts::set_server_connect_timeout_in_milliseconds(CONNECT_MS);
            let _ = git2::opts::set_server_timeout_in_milliseconds(SILENCE_MS);
        }
    });
}

/// The tip there.
pub(super) fn tip(remote: &Remote) -> Result<Option<Oid>, RemoteError> {
    set_timeouts();
    let ask = || -> Result<Option<Oid>, git2::Error> {
        let mut connected = git2::Remote::create_detached(remote.url.as_str())?;
        let connection = connected.connect_auth(Direction::Fetch, Some(git::callbacks(&remote.keys)), Some(git::proxy()))?;
        Ok(find(connection.list()?))
    };
    ask().map_err(|error| explain(&remote.shown(), &error))
}

fn find(heads: &[git2::RemoteHead<'_>]) -> Option<Oid> {
    heads.iter().find(|head| head.name() == BRANCH).map(git2::RemoteHead::oid)
}

/// Gets the branch's objects into packs of `repository`.
pub(super) fn download(remote: &Remote, repository: &Repository) -> Result<(), RemoteError> {
    set_timeouts();
    let get = || -> Result<(), git2::Error> {
        let mut options = FetchOptions::new();
        options
            .remote_callbacks(git::callbacks(&remote.keys))
            .proxy_options(git::proxy())
            .download_tags(git2::AutotagOption::None);
        repository.remote_anonymous(&remote.url)?.download(&[BRANCH], Some(&mut options))
    };
    get().map_err(|error| explain(&remote.shown(), &error))
}

/// Pushes, with the old value the server compares. That libgit2 returns no error says only that the server answered.
pub(super) fn push(remote: &Remote, repository: &Repository, expected: Option<Oid>, id: Oid) -> Result<(), Push> {
    set_timeouts();
    let there = Cell::new(None);
    let answer: RefCell<Option<Result<(), String>>> = RefCell::new(None);
    let words: RefCell<Vec<u8>> = RefCell::new(Vec::new());
    let mut callbacks = git::callbacks(&remote.keys);
    callbacks.push_negotiation(|updates| {
        let old = updates.first().map(git2::PushUpdate::src).filter(|old| !old.is_zero());
        if old == expected {
            return Ok(());
        }
        there.set(Some(old));
        Err(git2::Error::new(ErrorCode::User, ErrorClass::Callback, "the branch is not where it was expected"))
    });
    callbacks.push_update_reference(|name, refused| {
        if name == BRANCH {
            *answer.borrow_mut() = Some(refused.map_or(Ok(()), |why| Err(why.to_owned())));
        }
        Ok(())
    });
    callbacks.sideband_progress(|bytes| {
        words.borrow_mut().extend_from_slice(bytes);
        true
    });
    let send = |callbacks| -> Result<(), git2::Error> {
        let mut options = PushOptions::new();
        options.remote_callbacks(callbacks).proxy_options(git::proxy());
        repository.remote_anonymous(&remote.url)?.push(&[format!("{id}:{BRANCH}")], Some(&mut options))
    };
    let sent = send(callbacks);
    if let Some(tip) = there.get() {
        return Err(Push::Moved { tip, words: String::new() });
    }
    let url = remote.shown();
    let failed = match (sent, answer.into_inner()) {
        (Ok(()), Some(Ok(()))) => return Ok(()),
        (_, Some(Err(why))) => return Err(Push::refused(&url, &why, &words.into_inner())),
        (Ok(()), None) => RemoteError::Unreachable { url, words: "it did not say whether it took the decision".into() },
        (Err(error), _) if error.code() == ErrorCode::NotFastForward => {
            return Err(Push::Moved { tip: None, words: error.message().into() });
        }
        (Err(error), _) => explain(&url, &error),
    };
    Err(Push::Failed(failed))
}

/// A server's verdict and what its hooks said.
pub(super) fn with_words(why: &str, words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    let words: Vec<&str> =
        words.lines().map(|line| line.trim_start_matches("remote:").trim()).filter(|line| !line.is_empty()).collect();
    if words.is_empty() { why.trim().into() } else { format!("{} ({})", words.join("; "), why.trim()) }
}

/// What an error of libgit2 means. One that is about access or about what is there is a closed door; what is about the
/// files here is not the remote's; the rest is the network.
pub(super) fn explain(url: &str, error: &git2::Error) -> RemoteError {
    let words = error.message().trim().to_owned();
    let lower = words.to_lowercase();
    let any = |list: &[&str]| list.iter().any(|part| lower.contains(part));
    let url = url.to_owned();
    // A folder that is not there is a disk that is not mounted, as far as anybody can tell from here.
    if error.class() == ErrorClass::Os && lower.starts_with("failed to resolve path") {
        return RemoteError::Unreachable { url, words };
    }
    let closed = matches!(error.code(), ErrorCode::Auth | ErrorCode::Certificate | ErrorCode::Owner | ErrorCode::NotFound)
        || any(&["status code: 4", "authentication", "not found", "not exist", "not owned", "denied", "invalid credentials"])
            && !any(&["status code: 408", "status code: 429"]);
    if closed {
        return RemoteError::Closed { url, words };
    }
    match error.class() {
        ErrorClass::Filesystem | ErrorClass::Odb | ErrorClass::Indexer | ErrorClass::Zlib | ErrorClass::Object => {
            RemoteError::Other(anyhow::anyhow!(words))
        }
        _ => RemoteError::Unreachable { url, words },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_libgit2_by_their_words() {
        for (code, class, words, expected) in [
            (ErrorCode::GenericError, ErrorClass::Os, "failed to connect to localhost: Connection refused", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Net, "failed to resolve address for git.example.org", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 500", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 429", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 403", "closed"),
            (ErrorCode::Auth, ErrorClass::Callback, "no credentials that it accepts were found", "closed"),
            (ErrorCode::Certificate, ErrorClass::Ssl, "the SSL certificate is invalid", "closed"),
            (ErrorCode::NotFound, ErrorClass::Os, "failed to resolve path '/nowhere': No such file or directory", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Net, "early EOF", "unreachable"),
            (ErrorCode::GenericError, ErrorClass::Odb, "failed to write: No space left on device", "other"),
        ] {
            let found = match explain("u", &git2::Error::new(code, class, words)) {
                RemoteError::Closed { .. } => "closed",
                RemoteError::Unreachable { .. } => "unreachable",
                RemoteError::Other(_) => "other",
                _ => "else",
            };
            assert_eq!(found, expected, "{words}");
        }
    }

    #[test]
    fn a_servers_words() {
        assert_eq!(with_words("hook declined", b""), "hook declined");
        assert_eq!(
            with_words("hook declined\n", b"remote: no prod \nremote:\non Fridays\n"),
            "no prod; on Fridays (hook declined)"
        );
    }
}
