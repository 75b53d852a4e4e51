//! What every connection to a Git server needs, through libgit2: credentials and the machine's proxy.

use std::cell::Cell;
use std::path::PathBuf;

use git2::{Cred, CredentialType, ErrorClass, ErrorCode, ProxyOptions, RemoteCallbacks};

/// Answers the server's wishes: the SSH agent, then those of `keys` that are there, one by one; Git's credential helpers over
/// HTTP. Host keys are looked up in `~/.ssh/known_hosts`, by libgit2.
pub fn callbacks(keys: &[PathBuf]) -> RemoteCallbacks<'_> {
    let keys: Vec<&PathBuf> = keys.iter().filter(|key| fs_err::metadata(key).is_ok()).collect();
    let (attempt, helped) = (Cell::new(0), Cell::new(false));
    let mut callbacks = RemoteCallbacks::new();
    callbacks.credentials(move |url, user, allowed| {
        let name = user.unwrap_or("git");
        if allowed.contains(CredentialType::USERNAME) {
            return Cred::username(name);
        }
        if allowed.contains(CredentialType::SSH_KEY) {
            let number = attempt.replace(attempt.get() + 1);
            if number == 0 {
                return Cred::ssh_key_from_agent(name);
            }
            if let Some(key) = keys.get(number - 1) {
                return Cred::ssh_key(name, None, key, None);
            }
        }
        if allowed.contains(CredentialType::USER_PASS_PLAINTEXT) && !helped.replace(true) {
            let helped = git2::Config::open_default().and_then(|config| Cred::credential_helper(&config, url, user));
            if helped.is_ok() {
                return helped;
            }
        }
        Err(git2::Error::new(ErrorCode::Auth, ErrorClass::Callback, "no credentials that it accepts were found"))
    });
    callbacks
}

/// The proxy that Git's settings or the environment name.
pub fn proxy() -> ProxyOptions<'static> {
    let mut options = ProxyOptions::new();
    options.auto();
    options
}
