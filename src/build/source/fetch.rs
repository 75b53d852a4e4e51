//! Brings a Git repository to a folder: the source of a pipeline with `source.git`.
//!
//! Below the cache folder:
//!
//! ```text
//! mirrors/<hex>.git      bare, one for each URL; shallow where the server can and the history is not needed
//! mirrors/<hex>.lock     held while its mirror is used
//! checkouts/<commit>     the files of a commit, without `.git`
//! checkouts/<commit>-sub the same with its submodules
//! checkouts/<name>.boot  the boot of the machine it was made in
//! making/                unfinished checkouts, each with a lock beside it
//! ```
//!
//! A fetch asks the remote for its references, gets what is missing into the mirror, and writes the files beside their
//! place, which they get by rename. A commit given in full that is there already costs no network. History is deepened
//! until the last commit that changed the source's folder is known, as the image's dates come from it.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use fs_err as fs;
use git2::{ErrorClass, ErrorCode, FetchOptions, ObjectType, Oid, Repository};
use rustix::fs::FlockOperation;

use super::git::{GitState, Last, last_commit, without_credentials};
use super::listing::as_path;
use super::scan::words;
use super::snapshot::boot_id;
use crate::error::{Problem, nearest};
use crate::git;
use crate::oci::digest::Digest;

/// Commits to fetch of a branch or tag, one attempt after the other, until the folder's last change is among them;
/// after these, all. Two tell whether the newest commit changes anything.
const DEPTHS: [i32; 2] = [2, 64];

/// Submodules in submodules; more is taken for a circle.
const MAX_NESTING: usize = 10;

/// A repository and what is wanted of it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `https://`, `ssh://`, `git://`, `file://`, `user@host:path` or a path.
    pub url: &'a str,
    /// Branch, tag, or commit, which may be abbreviated. `None`: the remote's `HEAD`.
    pub reference: Option<&'a str>,
    /// The folder whose last change is asked for; the checkout is of the whole tree.
    pub dir: Option<&'a Path>,
    pub submodules: bool,
    /// Private keys to offer over SSH after the agent's; those that do not exist are passed over.
    pub ssh_keys: &'a [PathBuf],
    /// Where mirrors and checkouts are kept.
    pub cache: &'a Path,
}

/// The files of a commit. They are shared; nobody may write to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkout {
    pub path: PathBuf,
    pub commit: String,
    /// About [`Request::dir`].
    pub state: GitState,
}

/// What a reference stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Resolved {
    commit: Oid,
    /// Full name on the remote, to fetch by; `None` for a commit.
    name: Option<String>,
    branch: Option<String>,
}

/// Gets the files of `request`.
///
/// # Errors
/// A [`Problem`]: transient when the remote cannot be reached, failed when it does not have the repository or the
/// reference or wants other credentials.
pub fn fetch(request: &Request<'_>) -> Result<Checkout> {
    fetch_nested(request, 0).with_context(|| format!("cannot fetch the source from `{}`", without_credentials(request.url)))
}

/// The commit that `request.reference` is now, without getting its files; `None` for an abbreviated commit, which only
/// [`fetch`] can complete. A full commit is not looked for.
pub fn resolve(request: &Request<'_>) -> Result<Option<String>> {
    if let Some(full) = request.reference.filter(|reference| is_commit(reference, 40)) {
        return Ok(Some(full.to_owned()));
    }
    let mirror = Mirror::open(request)?;
    Ok(mirror.resolve()?.map(|resolved| resolved.commit.to_string()))
}

fn fetch_nested(request: &Request<'_>, nesting: usize) -> Result<Checkout> {
    let mut mirror = Mirror::open(request)?;
    mirror.history = nesting == 0;
    let taken = match mirror.take() {
        // Nothing the user or the remote did: the mirror is broken, perhaps by a power cut.
        Err(error) if is_broken(&error) => {
            mirror = mirror.anew()?;
            mirror.take()?
        }
        taken => taken?,
    };
    let Taken { resolved, last, path, making } = taken;
    // A submodule may be of the same repository.
    drop(mirror);
    if let Some(making) = making {
        if request.submodules {
            add_submodules(request, resolved.commit, &making.tree(), nesting)?;
        }
        making.finish(&path)?;
    }
    let commit = resolved.commit.to_string();
    let state = GitState {
        head: commit.clone(),
        branch: resolved.branch,
        origin: Some(without_credentials(request.url)),
        last_commit: last.commit,
        changed: 0,
        cut: last.cut,
    };
    Ok(Checkout { path, commit, state })
}

/// What a mirror gave: the files are in `path`, or in `making` on their way there.
struct Taken {
    resolved: Resolved,
    last: Last,
    path: PathBuf,
    making: Option<Making>,
}

fn is_broken(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<git2::Error>()) && !error.chain().any(|cause| cause.is::<Problem>())
}

/// The bare repository that stands for a remote, locked.
struct Mirror<'a> {
    request: &'a Request<'a>,
    repository: Repository,
    /// Whether the folder's last change has to be found.
    history: bool,
    _lock: fs::File,
}

impl<'a> Mirror<'a> {
    fn open(request: &'a Request<'a>) -> Result<Self> {
        let folder = request.cache.join("mirrors");
        fs::create_dir_all(&folder)?;
        let name = Digest::of(request.url).short();
        let lock =
            lock(&folder.join(format!("{name}.lock")), FlockOperation::LockExclusive)?.context("a lock that waits is got")?;
        let path = folder.join(format!("{name}.git"));
        let repository = match Repository::open_bare(&path) {
            // Without this folder libgit2 would write packs to `/`.
            Ok(repository) if fs::symlink_metadata(path.join("objects/pack")).is_ok() => repository,
            _ => init(&path)?,
        };
        Ok(Self { request, repository, history: true, _lock: lock })
    }

    /// The same mirror, empty.
    fn anew(self) -> Result<Self> {
        Ok(Self { repository: init(self.repository.path())?, ..self })
    }

    fn take(&mut self) -> Result<Taken> {
        let (resolved, last) = match self.known()? {
            Some(known) => known,
            None => self.get()?,
        };
        let name = format!("{}{}", resolved.commit, if self.request.submodules { "-sub" } else { "" });
        let path = self.request.cache.join("checkouts").join(name);
        let making = if is_whole(&path) { None } else { Some(Making::begin(self.request.cache)?) };
        if let Some(making) = &making {
            self.write(resolved.commit, &making.tree())?;
        }
        Ok(Taken { resolved, last, path, making })
    }

    /// What needs no network: a full commit whose history is here as far as it matters.
    fn known(&self) -> Result<Option<(Resolved, Last)>> {
        let Some(full) = self.request.reference.filter(|reference| is_commit(reference, 40)) else { return Ok(None) };
        let resolved = Resolved { commit: Oid::from_str(full)?, name: None, branch: None };
        Ok(self.last(&resolved)?.filter(|last| self.enough(last)).map(|last| (resolved, last)))
    }

    fn enough(&self, last: &Last) -> bool {
        !last.cut || !self.history
    }

    /// The last change of the wanted folder; `None` when the commit is not here.
    fn last(&self, resolved: &Resolved) -> Result<Option<Last>> {
        let commit = match self.repository.find_commit(resolved.commit) {
            Ok(commit) => commit,
            Err(error) if error.code() == ErrorCode::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let dir: PathBuf =
            self.request.dir.into_iter().flat_map(Path::components).filter(|part| part.as_os_str() != ".").collect();
        if !dir.as_os_str().is_empty() && !commit.tree()?.get_path(&dir).is_ok_and(|entry| entry.kind() == Some(ObjectType::Tree))
        {
            let commit = resolved.commit.to_string();
            return Err(Problem::failed(format!("there is no folder `{}` in commit {}", dir.display(), &commit[..12]))
                .hint("`source.dir` is relative to the top of the repository")
                .into());
        }
        Ok(Some(last_commit(&self.repository, resolved.commit, &dir)?))
    }

    /// Asks the remote, and gets what is missing here.
    fn get(&mut self) -> Result<(Resolved, Last)> {
        let resolved = match self.resolve()? {
            Some(resolved) => resolved,
            None => self.complete()?,
        };
        if let Some(last) = self.last(&resolved)?.filter(|last| self.enough(last)) {
            return Ok((resolved, last));
        }
        let id = resolved.commit.to_string();
        let spec = match &resolved.name {
            Some(name) => format!("+{name}:{}", if name == "HEAD" { "refs/pipeline/head" } else { name }),
            None => format!("+{id}:refs/pipeline/{id}"),
        };
        for depth in DEPTHS {
            // A server that cannot send a part, or a commit that no reference names, sends all.
            match self.download(std::slice::from_ref(&spec), depth) {
                Err(error) if is_transient(&error) => return Err(self.problem(error)),
                Err(_) => break,
                Ok(()) => {}
            }
            if let Some(last) = self.last(&resolved)?.filter(|last| self.enough(last)) {
                return Ok((resolved, last));
            }
        }
        self.download_all()?;
        match self.last(&resolved)? {
            Some(last) => Ok((resolved, last)),
            None if resolved.name.is_some() => Err(git2::Error::from_str("the mirror lacks a commit that was fetched").into()),
            None => Err(self.not_found(&[]).into()),
        }
    }

    /// Finds the commit that begins with the wanted reference; needs all of them.
    fn complete(&mut self) -> Result<Resolved> {
        self.download_all()?;
        let wanted = self.request.reference.unwrap_or_default();
        match self.repository.revparse_single(&format!("{wanted}^{{commit}}")) {
            Ok(commit) => Ok(Resolved { commit: commit.id(), name: None, branch: None }),
            Err(error) if error.code() == ErrorCode::Ambiguous => {
                Err(Problem::failed(format!("several commits begin with `{wanted}`"))
                    .hint("give more of its digits in `source.ref`")
                    .into())
            }
            Err(_) => Err(self.not_found(&self.references()?).into()),
        }
    }

    fn download_all(&mut self) -> Result<()> {
        // git2: the depth that completes a shallow repository.
        let depth = if self.repository.is_shallow() { i32::MAX } else { 0 };
        let specs = ["+HEAD:refs/pipeline/head", "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"].map(str::to_owned);
        self.download(&specs, depth).map_err(|error| self.problem(error))
    }

    fn download(&mut self, specs: &[String], depth: i32) -> Result<(), git2::Error> {
        let mut options = FetchOptions::new();
        options
            .remote_callbacks(git::callbacks(self.request.ssh_keys))
            .proxy_options(git::proxy())
            .depth(depth)
            .download_tags(git2::AutotagOption::None);
        let mut remote = self.repository.remote_anonymous(self.request.url)?;
        remote.fetch(specs, Some(&mut options), None)?;
        drop((remote, options));
        // It remembers commits as they were when their parents were missing.
        self.repository = Repository::open_bare(self.repository.path())?;
        Ok(())
    }

    /// The remote's references: full names and commits, tags peeled.
    fn references(&self) -> Result<Vec<(String, Oid, Option<String>)>> {
        let ask = || -> Result<_, git2::Error> {
            let mut remote = self.repository.remote_anonymous(self.request.url)?;
            let connection =
                remote.connect_auth(git2::Direction::Fetch, Some(git::callbacks(self.request.ssh_keys)), Some(git::proxy()))?;
            let target = |head: &git2::RemoteHead<'_>| head.symref_target().map(str::to_owned);
            Ok(connection.list()?.iter().map(|head| (head.name().to_owned(), head.oid(), target(head))).collect::<Vec<_>>())
        };
        ask().map_err(|error| self.problem(error))
    }

    /// The wanted reference on the remote; `None` when it can only be an abbreviated commit.
    fn resolve(&self) -> Result<Option<Resolved>> {
        let references = self.references()?;
        let find = |name: &str| {
            let peeled = references.iter().find(|(known, ..)| known.strip_suffix("^{}") == Some(name));
            peeled.or_else(|| references.iter().find(|(known, ..)| known == name))
        };
        let Some(wanted) = self.request.reference else {
            let Some((_, commit, target)) = find("HEAD") else {
                return Err(self.without_head(&references).into());
            };
            let branch = target.as_deref().and_then(|target| target.strip_prefix("refs/heads/")).map(str::to_owned);
            let name = target.clone().filter(|_| branch.is_some()).unwrap_or_else(|| "HEAD".into());
            return Ok(Some(Resolved { commit: *commit, name: Some(name), branch }));
        };
        for name in [format!("refs/heads/{wanted}"), format!("refs/tags/{wanted}"), wanted.to_owned(), format!("refs/{wanted}")] {
            if let Some((_, commit, _)) = find(&name).filter(|_| name.starts_with("refs/")) {
                let branch = name.strip_prefix("refs/heads/").map(str::to_owned);
                return Ok(Some(Resolved { commit: *commit, name: Some(name), branch }));
            }
        }
        if is_commit(wanted, 40) {
            return Ok(Some(Resolved { commit: Oid::from_str(wanted)?, name: None, branch: None }));
        }
        if is_commit(wanted, 4) {
            return Ok(None);
        }
        Err(self.not_found(&references).into())
    }

    fn not_found(&self, references: &[(String, Oid, Option<String>)]) -> Problem {
        let wanted = self.request.reference.unwrap_or("HEAD");
        let short =
            |name: &'_ str| name.strip_prefix("refs/heads/").or_else(|| name.strip_prefix("refs/tags/")).map(str::to_owned);
        let names: Vec<String> = references.iter().filter_map(|(name, ..)| short(name.trim_end_matches("^{}"))).collect();
        let problem =
            Problem::failed(format!("`{}` has no branch, tag or commit `{wanted}`", without_credentials(self.request.url)));
        match nearest(wanted, names.iter().map(String::as_str)) {
            Some(near) => problem.hint(format!("did you mean `{near}`?")),
            None => problem.hint("`git ls-remote` shows what there is; set `source.ref`"),
        }
    }

    fn without_head(&self, references: &[(String, Oid, Option<String>)]) -> Problem {
        let url = without_credentials(self.request.url);
        if references.is_empty() {
            return Problem::failed(format!("the repository `{url}` is empty")).hint("push a commit to it first");
        }
        let branches: Vec<&str> = references.iter().filter_map(|(name, ..)| name.strip_prefix("refs/heads/")).take(5).collect();
        Problem::failed(format!("the HEAD of `{url}` is a branch that does not exist")).hint(format!(
            "name one in `source.ref`, like {}",
            branches.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        ))
    }

    /// Writes the files of a commit as they are in the repository: no attribute or setting changes their bytes.
    fn write(&self, commit: Oid, to: &Path) -> Result<()> {
        let tree = self.repository.find_commit(commit)?.tree()?;
        write_tree(&self.repository, &tree, to).context("cannot write the files of the commit")
    }

    fn problem(&self, error: git2::Error) -> anyhow::Error {
        // Not the remote's doing: see `is_broken`.
        match error.class() {
            ErrorClass::Filesystem | ErrorClass::Odb | ErrorClass::Indexer | ErrorClass::Zlib | ErrorClass::Object => {
                error.into()
            }
            _ => explain(self.request.url, &error).into(),
        }
    }
}

/// A new, bare and empty repository in the place of whatever is there.
fn init(path: &Path) -> Result<Repository> {
    if fs::symlink_metadata(path).is_ok() {
        fs::remove_dir_all(path)?;
    }
    let mut options = git2::RepositoryInitOptions::new();
    Repository::init_opts(path, options.bare(true).external_template(false))
        .with_context(|| format!("cannot make `{}`", path.display()))
}

/// Writes a tree to the new folder `to`; a submodule becomes an empty folder.
fn write_tree(repository: &Repository, tree: &git2::Tree<'_>, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for entry in tree {
        let name = entry.name_bytes();
        // What Git never writes either (fsck: hasDot, hasDotdot, hasDotgit, fullPathname).
        if matches!(name, b"" | b"." | b"..") || name.eq_ignore_ascii_case(b".git") || name.contains(&b'/') {
            return Err(Problem::failed(format!("the commit holds a file called `{}`", String::from_utf8_lossy(name))).into());
        }
        let path = to.join(as_path(name));
        match (entry.kind(), entry.filemode()) {
            (Some(ObjectType::Tree), _) => write_tree(repository, &repository.find_tree(entry.id())?, &path)?,
            (Some(ObjectType::Commit), _) => fs::create_dir(&path)?,
            (_, 0o120_000) => fs::os::unix::fs::symlink(as_path(repository.find_blob(entry.id())?.content()), &path)?,
            (_, mode) => {
                let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
                file.write_all(repository.find_blob(entry.id())?.content())?;
                let mode = if mode & 0o100 == 0 { 0o644 } else { 0o755 };
                file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
            }
        }
    }
    Ok(())
}

/// Whether trying again may help. libgit2 tells network errors by its words only.
fn is_transient(error: &git2::Error) -> bool {
    const WORDS: [&str; 14] = [
        "resolve address",
        "failed to connect",
        "could not connect",
        "timed out",
        "timeout",
        "refused",
        "reset",
        "unreachable",
        "closed",
        "early eof",
        "unexpected eof",
        "status code: 429",
        "status code: 5",
        "broken pipe",
    ];
    let message = error.message().to_lowercase();
    let network = matches!(
        error.class(),
        ErrorClass::Net | ErrorClass::Http | ErrorClass::Ssh | ErrorClass::Os | ErrorClass::Ssl | ErrorClass::None
    );
    !matches!(error.code(), ErrorCode::Auth | ErrorCode::Certificate)
        && network
        && WORDS.iter().any(|word| message.contains(word))
}

fn explain(url: &str, error: &git2::Error) -> Problem {
    let shown = without_credentials(url);
    let message = error.message().trim();
    if is_transient(error) {
        return Problem::transient(format!("cannot reach `{shown}`: {message}"))
            .hint("check the address and the network, then try again");
    }
    let denied = ["status code: 401", "status code: 403", "authentication"].iter().any(|word| message.contains(word));
    if error.code() == ErrorCode::Auth || denied {
        let hint = if url.starts_with("http") {
            "store its user name and token with a Git credential helper: `git credential approve`"
        } else {
            "load a key it knows into the SSH agent with `ssh-add`"
        };
        return Problem::failed(format!("`{shown}` refuses access: {message}")).hint(hint);
    }
    if error.code() == ErrorCode::Certificate || error.class() == ErrorClass::Ssl {
        return Problem::failed(format!("`{shown}` cannot prove who it is: {message}"))
            .hint("for SSH add its key to ~/.ssh/known_hosts, for HTTPS its CA to the system's");
    }
    let missing = ["status code: 404", "not found", "not exist", "not exported", "resolve path", "could not find repository"];
    if error.code() == ErrorCode::NotFound || missing.iter().any(|word| message.to_lowercase().contains(word)) {
        return Problem::failed(format!("there is no repository `{shown}`, or not for us: {message}"))
            .hint("check `source.git` and your rights to it");
    }
    Problem::failed(format!("`{shown}` cannot be fetched: {message}"))
}

/// Whether `text` are `least` to 40 digits of a commit's id.
fn is_commit(text: &str, least: usize) -> bool {
    (least..=40).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Gets the submodules of the tree in `to` and puts their files into place.
fn add_submodules(request: &Request<'_>, commit: Oid, to: &Path, nesting: usize) -> Result<()> {
    for Submodule { path, url, commit } in submodules(request, commit, to)? {
        if nesting == MAX_NESTING {
            return Err(
                Problem::failed(format!("submodules are nested more than {MAX_NESTING} deep at `{}`", path.display())).into()
            );
        }
        let sub = Request { url: &url, reference: Some(&commit), dir: None, ..*request };
        let taken =
            fetch_nested(&sub, nesting + 1).with_context(|| format!("cannot fetch the submodule `{}`", path.display()))?;
        copy_tree(&taken.path, &to.join(&path)).with_context(|| format!("cannot copy the submodule `{}`", path.display()))?;
    }
    Ok(())
}

struct Submodule {
    path: PathBuf,
    url: String,
    commit: String,
}

/// The submodules of the commit written to `to`, by its tree and its `.gitmodules`.
fn submodules(request: &Request<'_>, commit: Oid, to: &Path) -> Result<Vec<Submodule>> {
    let mirror = Mirror::open(request)?;
    let tree = mirror.repository.find_commit(commit)?.tree()?;
    let mut links = Vec::new();
    tree.walk(git2::TreeWalkMode::PreOrder, |folder, entry| {
        if entry.kind() == Some(ObjectType::Commit) {
            links.push((format!("{folder}{}", String::from_utf8_lossy(entry.name_bytes())), entry.id().to_string()));
        }
        git2::TreeWalkResult::Ok
    })?;
    if links.is_empty() {
        return Ok(Vec::new());
    }
    let urls = urls(&to.join(".gitmodules"))?;
    let found = links.into_iter().map(|(path, commit)| {
        let Some((_, url)) = urls.iter().find(|(known, _)| *known == path) else {
            return Err(Problem::failed(format!("`.gitmodules` has no URL for the submodule `{path}`"))
                .hint("repair `.gitmodules`, or set `source.submodules: false`")
                .into());
        };
        Ok(Submodule { url: join_url(request.url, url)?, path: path.into(), commit })
    });
    found.collect()
}

/// Path and URL of each submodule in a `.gitmodules` (gitmodules(5)).
fn urls(file: &Path) -> Result<Vec<(String, String)>> {
    if !fs::symlink_metadata(file).is_ok_and(|stat| stat.is_file()) {
        return Ok(Vec::new());
    }
    let config = git2::Config::open(file)?;
    let mut urls = Vec::new();
    let mut entries = config.entries(Some("submodule\\..*\\.path")).context("cannot read `.gitmodules`")?;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = String::from_utf8_lossy(entry.name_bytes()).into_owned();
        let path = String::from_utf8_lossy(entry.value_bytes()).into_owned();
        if let Ok(url) = config.get_string(&format!("{}.url", name.trim_end_matches(".path"))) {
            urls.push((path, url));
        }
    }
    Ok(urls)
}

/// A submodule's URL, which may be relative to its parent's. A repository from elsewhere cannot name one of this machine.
fn join_url(parent: &str, url: &str) -> Result<String> {
    let joined = if url.starts_with("./") || url.starts_with("../") {
        let mut base = parent.trim_end_matches('/').to_owned();
        let mut rest = url;
        loop {
            if let Some(tail) = rest.strip_prefix("./") {
                rest = tail;
            } else if let Some(tail) = rest.strip_prefix("../") {
                rest = tail;
                let cut = base.rfind(['/', ':']).with_context(|| format!("the submodule URL `{url}` leads out of `{parent}`"))?;
                // `host:path`: the colon stays.
                base.truncate(if base[cut..].starts_with(':') { cut + 1 } else { cut });
            } else {
                break;
            }
        }
        let slash = if base.ends_with([':', '/']) { "" } else { "/" };
        format!("{base}{slash}{rest}")
    } else {
        url.to_owned()
    };
    if is_local(&joined) && !is_local(parent) {
        return Err(
            Problem::failed(format!("the submodule URL `{joined}` is a path of this machine, its repository is not")).into()
        );
    }
    Ok(joined)
}

/// Whether a URL is a path: `file://`, or without scheme and without `host:` before the first slash.
fn is_local(url: &str) -> bool {
    url.starts_with("file:") || (!url.contains("://") && !url.split('/').next().unwrap_or_default().contains(':'))
}

/// Copies files, links and folders.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_symlink() {
            fs::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else {
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}

/// A checkout being written. What a killed process leaves is removed by the next one.
struct Making {
    dir: PathBuf,
    _lock: fs::File,
}

impl Making {
    fn begin(cache: &Path) -> Result<Self> {
        let folder = cache.join("making");
        fs::create_dir_all(&folder)?;
        // One at a time looks for leftovers, so that none takes a new folder for one.
        let _cleaning = lock(&folder.join("lock"), FlockOperation::LockExclusive)?;
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() && lock(&path.join("lock"), FlockOperation::NonBlockingLockExclusive)?.is_some() {
                fs::remove_dir_all(&path)?;
            }
        }
        let dir = tempfile::Builder::new().prefix("checkout-").tempdir_in(&folder).context("cannot make a folder")?.keep();
        let lock = lock(&dir.join("lock"), FlockOperation::LockExclusive)?.context("a new lock is free")?;
        Ok(Self { dir, _lock: lock })
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// Puts the tree in its place, unless another process was faster with the same.
    fn finish(self, place: &Path) -> Result<()> {
        fs::create_dir_all(place.parent().context("a checkout has a folder")?)?;
        if fs::symlink_metadata(place).is_ok() {
            if is_whole(place) {
                return Ok(());
            }
            fs::rename(place, self.dir.join("old"))?;
        }
        match fs::rename(self.tree(), place) {
            Err(_) if is_whole(place) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(()) => Ok(fs::write(place.with_extension("boot"), boot_id())?),
        }
    }
}

/// Whether a checkout is finished and was made in this boot of the machine: nothing is synced, so one from before a power
/// cut may have holes. It is written again from the mirror then, where every object has its checksum.
fn is_whole(checkout: &Path) -> bool {
    fs::read_to_string(checkout.with_extension("boot")).is_ok_and(|boot| boot == boot_id())
        && fs::symlink_metadata(checkout).is_ok()
}

impl Drop for Making {
    fn drop(&mut self) {
        // What stays is removed by the next one.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Locks a file, which is made when missing; `None` when it should not wait and somebody holds it.
fn lock(path: &Path, how: FlockOperation) -> Result<Option<fs::File>> {
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => bail!("cannot lock `{}`: {}", path.display(), words(&error.into())),
    }
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
