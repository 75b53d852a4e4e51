//! Credentials for registries, from the files that `docker login` and `podman login` write.
//!
//! In: the paths of the files, in the order they are asked. Out: the credential of the most
//! specific entry for a repository (`quay.io/team/app`, then `quay.io/team`, then `quay.io`),
//! and where it came from. What is secret is never in an error, a note or a `Debug` output.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use serde::Deserialize;

use crate::cmd::{self, Cmd};
use crate::error::Problem;

/// How long a helper may take: some ask a person, or a key ring that has to be opened first.
const HELPER_LIMIT: Duration = Duration::from_secs(60);

/// The key `docker login` uses for Docker Hub, and the name its helpers are asked for.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a credential helper prints when it has nothing (docker-credential-helpers, `errors.go`).
const HELPER_NOT_FOUND: &str = "credentials not found";

/// The user name by which a helper says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// What is shown to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Anonymous,
    Password {
        user: String,
        password: String,
    },
    /// A refresh token: exchanged at the registry's token service.
    Identity(String),
    /// A token sent as it is.
    Bearer(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Anonymous => "Anonymous",
            Credential::Password { .. } => "Password(…)",
            Credential::Identity(_) => "Identity(…)",
            Credential::Bearer(_) => "Bearer(…)",
        })
    }
}

/// The answer for one repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub credential: Credential,
    /// Where it came from, for people: the file and, if one was asked, the helper.
    pub origin: Option<String>,
    /// What was tried and did not work (a helper that is not installed), for hints.
    pub notes: Vec<String>,
}

/// A login that was given by itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Given {
    /// `HOST[:PORT][/NAMESPACE]` it is for: it is shown to nobody else.
    pub key: String,
    pub user: String,
    pub password: String,
    /// Where it came from, for messages.
    pub origin: String,
}

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Given(for {}, …)", self.key)
    }
}

/// The credential files, and where helpers are looked for.
#[derive(Debug, Clone)]
pub struct Credentials {
    files: Vec<PathBuf>,
    path: std::ffi::OsString,
    given: Option<Given>,
    helper_limit: Duration,
}

/// Docker's `config.json` and podman's `auth.json`: the keys used here.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct File {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Credentials {
    /// `files` are asked in order; helpers are found on `path` (the value of `PATH`).
    pub fn new(files: Vec<PathBuf>, path: impl AsRef<OsStr>) -> Self {
        Self { files, path: path.as_ref().to_owned(), given: None, helper_limit: HELPER_LIMIT }
    }

    /// Goes before what the files say.
    #[must_use]
    pub fn with(self, given: Option<Given>) -> Self {
        Self { given, ..self }
    }

    /// The files, for messages.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The credential for `repository` on `registry`. A missing file is no error; one that is
    /// not readable or not JSON is.
    pub fn find(&self, registry: &str, repository: &str) -> Result<Found> {
        if let Some(given) = &self.given
            && keys(registry, repository).contains(&normalise(&given.key))
        {
            let credential = Credential::Password { user: given.user.clone(), password: given.password.clone() };
            return Ok(Found { credential, origin: Some(given.origin.clone()), notes: Vec::new() });
        }
        let mut files = Vec::new();
        for path in &self.files {
            if let Some(file) = read(path)? {
                files.push((path, file));
            }
        }
        let mut notes = Vec::new();
        for key in keys(registry, repository) {
            for (path, file) in &files {
                if let Some((credential, origin)) = self.in_file(path, file, &key, &mut notes)? {
                    return Ok(Found { credential, origin: Some(origin), notes });
                }
            }
        }
        Ok(Found { credential: Credential::Anonymous, origin: None, notes })
    }

    /// The credential for exactly `key`: a helper named for it, the file's general helper, then the file's own entry.
    fn in_file(&self, path: &Path, file: &File, key: &str, notes: &mut Vec<String>) -> Result<Option<(Credential, String)>> {
        let named = file.cred_helpers.iter().find(|(name, _)| normalise(name) == key).map(|(_, helper)| helper);
        // The general helper knows registries, not repositories.
        let general = file.creds_store.as_ref().filter(|_| !key.contains('/'));
        for helper in named.into_iter().chain(general).filter(|helper| !helper.is_empty()) {
            let program = format!("docker-credential-{helper}");
            match self.ask(&program, key) {
                Ok(Some(credential)) => return Ok(Some((credential, format!("`{program}` (named in `{}`)", path.display())))),
                Ok(None) => {}
                Err(error) => {
                    let note = format!("{error}, which `{}` names for its credentials", path.display());
                    if !notes.contains(&note) {
                        notes.push(note);
                    }
                }
            }
        }
        for (_, auth) in file.auths.iter().filter(|(name, _)| normalise(name) == key) {
            if let Some(credential) =
                credential(auth).with_context(|| format!("cannot use the entry for `{key}` in `{}`", path.display()))?
            {
                return Ok(Some((credential, format!("`{}`", path.display()))));
            }
        }
        Ok(None)
    }

    /// `docker-credential-X get`: the server on standard input, JSON on standard output.
    /// Errors hold neither of the two outputs: a helper may print what is secret.
    fn ask(&self, program: &str, key: &str) -> Result<Option<Credential>> {
        let Some(found) = cmd::find(program, &self.path) else {
            return Err(Problem::failed(format!("`{program}` is not installed")).into());
        };
        let server = if key == "docker.io" { DOCKER_HUB_KEY } else { key };
        let Some(output) = Cmd::new(found).arg("get").input(server.as_bytes()).output_within(self.helper_limit)? else {
            let seconds = self.helper_limit.as_secs();
            return Err(Problem::failed(format!("`{program} get` did not end within {seconds} s")).into());
        };
        if !output.status.success() {
            if String::from_utf8_lossy(&output.stdout).contains(HELPER_NOT_FOUND) {
                return Ok(None);
            }
            return Err(Problem::failed(format!("`{program} get` ended with {}", cmd::describe(output.status))).into());
        }
        let answer: HelperAnswer = serde_json::from_slice(&output.stdout)
            .map_err(|_| Problem::failed(format!("`{program} get` printed something else than the expected JSON")))?;
        Ok(match answer {
            HelperAnswer { secret, .. } if secret.is_empty() => None,
            HelperAnswer { username, secret } if username == TOKEN_USER => Some(Credential::Identity(secret)),
            HelperAnswer { username, secret } => Some(Credential::Password { user: username, password: secret }),
        })
    }
}

/// The keys to look for, most specific first.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let registry = normalise(registry);
    let mut keys = Vec::new();
    let mut rest = repository;
    while !rest.is_empty() {
        keys.push(format!("{registry}/{rest}"));
        rest = rest.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    keys.push(registry);
    keys
}

/// A key as both tools write it, reduced to `HOST[:PORT][/NAMESPACE]`. With a scheme it is
/// Docker's and names a host only (`https://index.docker.io/v1/`).
fn normalise(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let name = match bare {
        Some(url) => url.split('/').next().unwrap_or(url),
        None => key.trim_end_matches('/'),
    };
    let (host, namespace) = name.split_once('/').map_or((name, None), |(host, namespace)| (host, Some(namespace)));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    match namespace {
        None | Some("v1" | "v2") => host.to_owned(),
        Some(namespace) => format!("{host}/{namespace}"),
    }
}

fn read(path: &Path) -> Result<Option<File>> {
    let bytes = match fs_err::read(path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => {
            return Err(anyhow::Error::new(error).context(Problem::failed("cannot read the credentials for registries")));
        }
    };
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    // serde's own words quote the value it tripped over, which may be the password: only the position is told.
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Problem::failed(format!(
            "`{}` is not a valid credentials file, line {} column {}",
            path.display(),
            error.line(),
            error.column()
        ))
        .hint("`docker login` and `podman login` write it; repair it or move it away")
        .into()
    })
}

/// What an entry of `auths` holds; nothing when the secret is in a helper.
fn credential(auth: &Auth) -> Result<Option<Credential>> {
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    if let Some(token) = given(&auth.identitytoken) {
        return Ok(Some(Credential::Identity(token)));
    }
    if let Some(token) = given(&auth.registrytoken) {
        return Ok(Some(Credential::Bearer(token)));
    }
    if let Some(encoded) = given(&auth.auth) {
        let bad = || Problem::failed("its `auth` is not base64 of `user:password`").hint("log in again to have it written anew");
        let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).map_err(|_| bad())?;
        let text = String::from_utf8(decoded).map_err(|_| bad())?;
        let (user, password) = text.split_once(':').ok_or_else(bad)?;
        // Old versions of Docker padded the password with zero bytes.
        return Ok(Some(Credential::Password { user: user.into(), password: password.trim_matches('\0').into() }));
    }
    match (given(&auth.username), given(&auth.password)) {
        (Some(user), Some(password)) => Ok(Some(Credential::Password { user, password })),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password { user: user.into(), password: password.into() }
    }

    fn auth(user: &str, password: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
    }

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs_err::write(&path, text).unwrap();
            path
        }

        fn helper(&self, name: &str, script: &str) {
            let path = self.file(&format!("docker-credential-{name}"), &format!("#!/bin/sh\n{script}\n"));
            fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn find(&self, files: &[PathBuf], registry: &str, repository: &str) -> Found {
            Credentials::new(files.to_vec(), self.0.path()).find(registry, repository).unwrap()
        }
    }

    #[test]
    fn keys_of_both_tools_mean_the_same() {
        for (key, expected) in [
            ("https://index.docker.io/v1/", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("docker.io", "docker.io"),
            ("docker.io/library", "docker.io/library"),
            ("https://registry.example.com/v2/", "registry.example.com"),
            ("http://127.0.0.1:5000", "127.0.0.1:5000"),
            ("registry.example.com/v2/", "registry.example.com"),
            ("quay.io/team/app", "quay.io/team/app"),
        ] {
            assert_eq!(normalise(key), expected, "{key}");
        }
        assert_eq!(keys("quay.io", "team/app"), ["quay.io/team/app", "quay.io/team", "quay.io"]);
    }

    #[test]
    fn the_most_specific_entry_wins_whatever_the_file() {
        let dir = Dir::new();
        let first = dir.file("auth.json", &format!(r#"{{"auths":{{"quay.io":{{"auth":"{}"}}}}}}"#, auth("host", "1")));
        let second = dir.file(
            "config.json",
            &format!(
                r#"{{"auths":{{"quay.io/team":{{"auth":"{}"}},"quay.io/team/app":{{"auth":"{}"}},"quay.io":{{"auth":"{}"}},
                "https://index.docker.io/v1/":{{"auth":"{}"}},"empty.io":{{}},"identity.io":{{"auth":"{}","identitytoken":"t"}},
                "bearer.io":{{"registrytoken":"b"}},"plain.io":{{"username":"u","password":"p"}}}},"HttpHeaders":{{"a":"b"}}}}"#,
                auth("team", "2"),
                auth("app", "a:b"),
                auth("late", "3"),
                auth("hub", "4\0\0"),
                auth("i", ""),
            ),
        );
        let files = [dir.0.path().join("absent.json"), first, second];
        for (registry, repository, expected) in [
            ("quay.io", "team/app", password("app", "a:b")),
            ("quay.io", "team/other", password("team", "2")),
            ("quay.io", "teamwork/app", password("host", "1")),
            ("docker.io", "library/debian", password("hub", "4")),
            ("empty.io", "x", Credential::Anonymous),
            ("identity.io", "x", Credential::Identity("t".into())),
            ("bearer.io", "x", Credential::Bearer("b".into())),
            ("plain.io", "x", password("u", "p")),
            ("unknown.io", "x", Credential::Anonymous),
        ] {
            assert_eq!(dir.find(&files, registry, repository).credential, expected, "{registry}/{repository}");
        }
        assert_eq!(dir.find(&files, "quay.io", "team/x").origin, Some(format!("`{}`", files[2].display())));
        assert_eq!(dir.find(&files, "unknown.io", "x").origin, None);
    }

    #[test]
    fn what_is_given_goes_first_and_only_where_it_is_for() {
        let dir = Dir::new();
        let file = dir.file("auth.json", &format!(r#"{{"auths":{{"quay.io/team/app":{{"auth":"{}"}}}}}}"#, auth("file", "1")));
        let given = Given { key: "quay.io/team".into(), user: "ci".into(), password: "s3cret".into(), origin: "the test".into() };
        assert_eq!(format!("{given:?}"), "Given(for quay.io/team, …)");
        let credentials = Credentials::new(vec![file], "").with(Some(given));
        for (registry, repository, expected) in [
            ("quay.io", "team/app", password("ci", "s3cret")),
            ("quay.io", "team", password("ci", "s3cret")),
            ("quay.io", "teamwork/app", Credential::Anonymous),
            ("docker.io", "team/app", Credential::Anonymous),
        ] {
            assert_eq!(credentials.find(registry, repository).unwrap().credential, expected, "{registry}/{repository}");
        }
    }

    #[test]
    fn helpers_are_asked_and_a_missing_one_is_a_note() {
        let dir = Dir::new();
        // Prints who was asked for as the user, so that the test sees standard input.
        dir.helper("echo", r#"read server; printf '{"ServerURL":"x","Username":"%s","Secret":"s3cret"}' "$server""#);
        dir.helper("token", r#"cat >/dev/null; echo '{"Username":"<token>","Secret":"refresh"}'"#);
        dir.helper("empty", "cat >/dev/null; echo credentials not found in native keychain; exit 1");
        dir.helper("broken", "cat >/dev/null; echo s3cret >&2; exit 4");
        dir.helper("garbage", "cat >/dev/null; echo s3cret");
        let file = dir.file(
            "config.json",
            &format!(
                r#"{{"credsStore":"echo","credHelpers":{{"a.io":"token","b.io":"empty","c.io":"broken","d.io":"absent","e.io":"garbage"}},
                "auths":{{"deep.io/team":{{"auth":"{}"}}}}}}"#,
                auth("team", "2")
            ),
        );
        let files = [file.clone()];
        assert_eq!(dir.find(&files, "docker.io", "library/debian").credential, password(DOCKER_HUB_KEY, "s3cret"));
        assert_eq!(dir.find(&files, "a.io", "x").credential, Credential::Identity("refresh".into()));
        assert_eq!(dir.find(&files, "b.io", "x").credential, password("b.io", "s3cret"));
        assert_eq!(dir.find(&files, "deep.io", "team/x").credential, password("team", "2"));
        assert_eq!(
            dir.find(&files, "a.io", "x").origin,
            Some(format!("`docker-credential-token` (named in `{}`)", file.display()))
        );
        let named = format!("which `{}` names for its credentials", file.display());
        for (registry, note) in [
            ("c.io", "`docker-credential-broken get` ended with status 4"),
            ("d.io", "`docker-credential-absent` is not installed"),
            ("e.io", "`docker-credential-garbage get` printed something else than the expected JSON"),
        ] {
            assert_eq!(dir.find(&files, registry, "x").notes, [format!("{note}, {named}")], "{registry}");
        }
        // One that never ends keeps nobody waiting for ever, nor from what is said elsewhere.
        dir.helper("slow", "exec sleep 300");
        let auths = format!(r#"{{"credHelpers":{{"f.io":"slow"}},"auths":{{"f.io":{{"auth":"{}"}}}}}}"#, auth("me", "3"));
        let slow = dir.file("slow.json", &auths);
        let limited =
            Credentials { helper_limit: Duration::from_millis(50), ..Credentials::new(vec![slow.clone()], dir.0.path()) };
        let found = limited.find("f.io", "x").unwrap();
        assert_eq!(found.credential, password("me", "3"));
        let note = "`docker-credential-slow get` did not end within 0 s";
        assert_eq!(found.notes, [format!("{note}, which `{}` names for its credentials", slow.display())]);
    }

    #[test]
    fn a_broken_file_is_named_and_nothing_secret_is_shown() {
        let dir = Dir::new();
        for (text, expected) in [
            (r#"{"auths": "s3cret"}"#, "is not a valid credentials file, line 1 column 18"),
            (r#"{"auths": {"x.io": {"auth": "czNjcmV0"}}}"#, "its `auth` is not base64 of `user:password`"),
            (r#"{"auths": {"x.io": {"auth": "s3cret!"}}}"#, "its `auth` is not base64 of `user:password`"),
        ] {
            let file = dir.file("config.json", text);
            let error = Credentials::new(vec![file], "").find("x.io", "y").unwrap_err();
            let shown = format!("{error:#} {error:?}");
            assert!(shown.contains(expected) && shown.contains("config.json"), "{shown}");
            assert!(!shown.contains("s3cret") && !shown.contains("czNjcmV0"), "{shown}");
        }
        assert_eq!(format!("{:?}", password("me", "s3cret")), "Password(…)");
        assert_eq!(dir.find(&[dir.file("empty.json", "\n")], "x.io", "y").credential, Credential::Anonymous);
    }
}
