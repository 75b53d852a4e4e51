//! Registry tags that follow the environments: `REGISTRY:ENVIRONMENT` stands for the release that is current there.
//!
//! What a tag has to stand for is read from the ledger, what it was set to is remembered in `STATE/tags.json`; the difference is
//! what is left to do. A process that is killed between a decision and its tag therefore leaves nothing but that difference,
//! and the next one does the rest. Every tag is looked at before it is set: where it stands for something that neither this
//! machine set nor the ledger ever made current since, somebody moved it by hand; it is told, and stays as it is until
//! [`What::Retag`] is asked for. A registry that cannot be reached changes no decision: its tags are set later.
//!
//! [`Mirror::look`] only asks where tags stand that nothing is left to do for, each once a minute at most and all within
//! [`LOOK_TIME`], so that `status` finds what was moved by hand since.
//!
//! Not seen: a tag somebody moved back to what the ledger made current after the last time this machine set it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::desk::{self, Loaded};
use super::ledger::Ledger;
use super::state::Binding;
use crate::artifact::remote;
use crate::artifact::store::{Hold, Lock, Store, write_atomic};
use crate::error::{self, Problem};
use crate::fault;
use crate::oci::digest::Digest;
use crate::oci::registry::{Reference, Registry};
use crate::progress::Progress;

/// Format of `tags.json`.
const FORMAT: u32 = 1;
/// Seconds in which a tag that could not be set is left alone by commands that only look: each attempt waits for retries.
const AGAIN_AFTER: i64 = 60;
/// How long a look at all tags may take: who asks for a status waits for it.
pub const LOOK_TIME: Duration = Duration::from_secs(2);
/// Tags asked for at once; one request each, which registries answer out of an index.
const LOOKERS: usize = 8;

/// What sets tags, with what.
#[expect(missing_debug_implementations, reason = "a closure has none")]
pub struct Mirror<'a> {
    pub store: &'a Store,
    pub ledger: &'a Ledger,
    /// Called when something is to be asked.
    pub registry: &'a dyn Fn() -> Result<Registry>,
    pub now: Timestamp,
    pub progress: &'a dyn Progress,
}

/// A tag, as the ledger wants it.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Like `registry.example/team/shop:prod`.
    pub tag: String,
    pub pipeline: String,
    pub environment: String,
    pub release: Digest,
    pub version: String,
    /// What is and was current, newest first; the first is `release`.
    history: Vec<Stamp>,
}

/// A release, as it became current.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    release: Digest,
    since: Timestamp,
}

impl From<&Binding> for Stamp {
    fn from(binding: &Binding) -> Self {
        Self { release: binding.release, since: binding.since }
    }
}

/// Which tags are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Those that are left and were not tried in the last minute.
    New,
    /// As soon as one is left, or was moved by somebody, all of the pipeline.
    Left,
    /// All.
    All,
    /// All, and those that somebody moved are set too.
    Retag,
}

/// What became of a tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Told {
    pub tag: String,
    pub pipeline: String,
    pub environment: String,
    pub release: Digest,
    pub version: String,
    #[serde(flatten)]
    pub became: Became,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "became")]
pub enum Became {
    /// It stood for `before`; `sent` bytes of blobs were not there.
    Set { before: Option<Digest>, sent: u64 },
    /// It stands for the release already.
    Stands,
    /// Somebody moved it to `to`, and it stays there.
    Moved { to: Digest },
    /// It could not be set; `passes`: trying again may help.
    Later { why: String, passes: bool },
}

/// What is known of a tag without asking anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Known {
    Set,
    Later,
    Moved,
}

/// `tags.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    format: u32,
    tags: BTreeMap<String, Tag>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tag {
    pipeline: String,
    environment: String,
    /// What it was set to, or was seen to be rightly set to.
    set: Option<Stamp>,
    /// What it is being set to; written before, and gone after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    setting: Option<Stamp>,
    /// What somebody moved it to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    moved: Option<Digest>,
    /// When it could not be set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failed: Option<Timestamp>,
    /// When the registry was asked last where it stands, whatever it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    asked: Option<Timestamp>,
}

impl Tag {
    /// Whether this machine or another one that has the ledger may have set it to `digest`.
    fn is_ours(&self, digest: &Digest, history: &[Stamp]) -> bool {
        let same = |stamp: &Option<Stamp>| stamp.is_some_and(|stamp| stamp.release == *digest);
        let since = self.set.and_then(|set| history.iter().position(|stamp| *stamp == set)).unwrap_or(history.len());
        same(&self.set) || same(&self.setting) || history[..since].iter().any(|stamp| stamp.release == *digest)
    }
}

impl Memory {
    fn load(store: &Store) -> Result<Self> {
        let path = path(store);
        let bytes = match fs_err::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            bytes => bytes?,
        };
        let memory: Self = serde_json::from_slice(&bytes).map_err(|error| {
            Problem::failed(format!("`{}` is broken: {error}", path.display()))
                .hint("move it away: what the tags of registries were set to is found out again")
        })?;
        if memory.format > FORMAT {
            return Err(Problem::usage(format!("`{}` was written by a newer pipeline", path.display())).into());
        }
        Ok(memory)
    }

    fn write(&self, store: &Store) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(&Self { format: FORMAT, ..self.clone() })?;
        write_atomic(&path(store), &bytes)
    }

    fn entry(&mut self, wanted: &Wanted) -> &mut Tag {
        self.tags.entry(wanted.tag.clone()).or_insert_with(|| Tag {
            pipeline: wanted.pipeline.clone(),
            environment: wanted.environment.clone(),
            set: None,
            setting: None,
            moved: None,
            failed: None,
            asked: None,
        })
    }

    fn known(&self, wanted: &Wanted) -> Known {
        match self.tags.get(&wanted.tag) {
            Some(tag) if tag.moved.is_some() => Known::Moved,
            Some(tag) if tag.set.is_some_and(|set| set.release == wanted.release) => Known::Set,
            _ => Known::Later,
        }
    }
}

fn path(store: &Store) -> PathBuf {
    store.state("tags.json")
}

/// The tags a pipeline has in its registry: one for each environment with a release; none without `registry`.
pub fn wanted(loaded: &Loaded) -> Vec<Wanted> {
    let Some(registry) = &loaded.policy.registry else { return Vec::new() };
    let states = loaded.states.values();
    let tag = |state: &super::state::State| -> Option<Wanted> {
        let current = state.current.as_ref()?;
        Some(Wanted {
            tag: format!("{registry}:{}", state.environment),
            pipeline: state.pipeline.clone(),
            environment: state.environment.clone(),
            release: current.release,
            version: current.version.clone(),
            history: state.bindings().map(Stamp::from).collect(),
        })
    };
    states.filter_map(tag).collect()
}

/// What is known of these tags, without asking a registry.
pub fn known(store: &Store, wanted: &[Wanted]) -> Result<Vec<Known>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let memory = Memory::load(store)?;
    Ok(wanted.iter().map(|wanted| memory.known(wanted)).collect())
}

impl Mirror<'_> {
    /// Sets the tags of `pipeline`, or only that of `environment`, and tells what became of each that was looked at. What
    /// cannot be set now is no error. Undone by the next decision, or by moving the tag.
    ///
    /// # Errors
    /// The ledger or what is remembered of the tags cannot be read or written.
    pub fn publish(&self, pipeline: &str, environment: Option<&str>, what: What) -> Result<Vec<Told>> {
        if self.to_do(&Memory::load(self.store)?, pipeline, environment, what)?.is_empty() {
            return Ok(Vec::new());
        }
        // Two at once could set an older release after a newer one.
        let lock = self.store.state("tags.lock");
        let _one = match Lock::try_now(&lock, Hold::Exclusive)? {
            Some(lock) => lock,
            None => {
                self.progress.note("waiting for another pipeline that sets tags".into());
                Lock::wait(&lock, Hold::Exclusive)?
            }
        };
        let mut memory = Memory::load(self.store)?;
        let mut told = Vec::new();
        let mut down = BTreeMap::new();
        let mut to_do = self.to_do(&memory, pipeline, environment, what)?;
        to_do.sort_by_key(|wanted| memory.known(wanted) == Known::Set);
        let registry = if to_do.is_empty() { None } else { Some((self.registry)()?) };
        for wanted in to_do {
            let Some(registry) = &registry else { break };
            let was_set = memory.known(&wanted) == Known::Set;
            let became = self.one(registry, &mut memory, &wanted, what == What::Retag, &mut down)?;
            if was_set && what == What::Left && matches!(became, Became::Later { .. }) {
                // It was to be looked at only because another one is left.
                continue;
            }
            self.tell(&wanted, was_set, &became);
            let Wanted { tag, pipeline, environment, release, version, .. } = wanted;
            told.push(Told { tag, pipeline, environment, release, version, became });
        }
        Ok(told)
    }

    /// Asks the registry where those of `wanted` stand that are set as far as is known and were not asked for in the last
    /// minute, and remembers what somebody moved or took away. The tags that could not be looked at, each with the reason.
    ///
    /// # Errors
    /// What is remembered of the tags cannot be read or written.
    pub fn look(&self, wanted: &[Wanted]) -> Result<Vec<(String, String)>> {
        let memory = Memory::load(self.store)?;
        let is_due = |wanted: &&Wanted| {
            let asked = memory.tags.get(&wanted.tag).and_then(|tag| tag.asked);
            memory.known(wanted) != Known::Later
                && asked.is_none_or(|asked| (self.now.as_second() - asked.as_second()).abs() >= AGAIN_AFTER)
        };
        let due: Vec<Wanted> = wanted.iter().filter(is_due).cloned().collect();
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let answers = ask_all(&(self.registry)()?, due.iter().map(|wanted| wanted.tag.clone()).collect());
        // Who sets tags now knows better where they stand.
        let Some(_one) = Lock::try_now(&self.store.state("tags.lock"), Hold::Exclusive)? else { return Ok(Vec::new()) };
        let mut memory = Memory::load(self.store)?;
        let mut missed = Vec::new();
        for wanted in &due {
            if memory.known(wanted) == Known::Later {
                continue;
            }
            let (now, was_moved) = (self.now, memory.known(wanted) == Known::Moved);
            let tag = memory.entry(wanted);
            tag.asked = Some(now);
            match answers.get(&wanted.tag) {
                Some(Ok(Some(there))) if *there == wanted.release => {
                    *tag = Tag { set: wanted.history.first().copied(), moved: None, ..tag.clone() };
                }
                // Another machine set it, and did not get to the last decision: it is behind, and set again.
                Some(Ok(Some(there))) if tag.is_ours(there, &wanted.history) => {
                    *tag = Tag { set: None, moved: None, ..tag.clone() }
                }
                Some(Ok(Some(there))) => {
                    tag.moved = Some(*there);
                    if !was_moved {
                        self.tell(wanted, true, &Became::Moved { to: *there });
                    }
                }
                // Gone: it is set again, as one that never was.
                Some(Ok(None)) => *tag = Tag { set: None, moved: None, ..tag.clone() },
                Some(Err(why)) => missed.push((wanted.tag.clone(), why.clone())),
                None => missed.push((wanted.tag.clone(), format!("no answer within {} s", LOOK_TIME.as_secs()))),
            }
        }
        memory.write(self.store)?;
        Ok(missed)
    }

    /// What the ledger wants now and is to be looked at.
    fn to_do(&self, memory: &Memory, pipeline: &str, environment: Option<&str>, what: What) -> Result<Vec<Wanted>> {
        let Some(loaded) = desk::load(&self.ledger.snapshot()?, pipeline)? else { return Ok(Vec::new()) };
        let mut wanted = wanted(&loaded);
        wanted.retain(|wanted| environment.is_none_or(|environment| wanted.environment == environment));
        let is_left = |wanted: &Wanted| memory.known(wanted) == Known::Later;
        match what {
            What::New => wanted.retain(|wanted| {
                let failed = memory.tags.get(&wanted.tag).and_then(|tag| tag.failed);
                is_left(wanted) && failed.is_none_or(|failed| (self.now.as_second() - failed.as_second()).abs() >= AGAIN_AFTER)
            }),
            What::Left if wanted.iter().all(|wanted| memory.known(wanted) == Known::Set) => wanted.clear(),
            What::Left | What::All | What::Retag => {}
        }
        Ok(wanted)
    }

    fn one(
        &self,
        registry: &Registry,
        memory: &mut Memory,
        wanted: &Wanted,
        retag: bool,
        down: &mut BTreeMap<String, String>,
    ) -> Result<Became> {
        let became = match self.is_anothers(memory, wanted)? {
            Some(why) => Ok(Became::Later { why, passes: false }),
            None => self.ask(registry, memory, wanted, retag, down),
        };
        let became = became.unwrap_or_else(|error| {
            let passes = error::problem(&error).is_some_and(|problem| problem.kind == error::Kind::Transient);
            let why = format!("{error:#}");
            if let Some(host) = wanted.tag.split('/').next().filter(|_| passes) {
                down.insert(host.to_owned(), why.clone());
            }
            Became::Later { why, passes }
        });
        let now = self.now;
        let tag = memory.entry(wanted);
        match &became {
            Became::Set { .. } | Became::Stands => {
                *tag = Tag { set: wanted.history.first().copied(), setting: None, moved: None, failed: None, ..tag.clone() };
            }
            Became::Moved { to } => *tag = Tag { setting: None, moved: Some(*to), failed: None, ..tag.clone() },
            // What is being set stays: it may have arrived.
            Became::Later { .. } => tag.failed = Some(now),
        }
        fault::point("remember a tag");
        memory.write(self.store)?;
        Ok(became)
    }

    /// Two pipelines with one repository would take the tag from each other.
    fn is_anothers(&self, memory: &mut Memory, wanted: &Wanted) -> Result<Option<String>> {
        let other = &memory.entry(wanted).pipeline;
        if *other != wanted.pipeline
            && let Some(loaded) = desk::load(&self.ledger.snapshot()?, other)?
            && self::wanted(&loaded).iter().any(|theirs| theirs.tag == wanted.tag)
        {
            return Ok(Some(format!("the pipeline `{other}` has the same `registry`, and the tag is its")));
        }
        memory.entry(wanted).pipeline.clone_from(&wanted.pipeline);
        Ok(None)
    }

    /// Looks where the tag stands and sets it.
    fn ask(
        &self,
        registry: &Registry,
        memory: &mut Memory,
        wanted: &Wanted,
        retag: bool,
        down: &BTreeMap<String, String>,
    ) -> Result<Became> {
        let reference: Reference = wanted.tag.parse()?;
        if let Some(why) = wanted.tag.split('/').next().and_then(|host| down.get(host)) {
            return Ok(Became::Later { why: why.clone(), passes: true });
        }
        let before = registry.digest(&reference)?;
        let tag = memory.entry(wanted);
        match before {
            Some(there) if there == wanted.release => return Ok(Became::Stands),
            Some(there) if !retag && !tag.is_ours(&there, &wanted.history) => return Ok(Became::Moved { to: there }),
            _ => {}
        }
        tag.setting = wanted.history.first().copied();
        memory.write(self.store)?;
        fault::point("set a registry's tag");
        let sent = self.set(registry, &reference, wanted)?;
        fault::point("a registry's tag is set");
        Ok(Became::Set { before, sent })
    }

    /// Pushes the release with what is attached and points the tag at it; the bytes that were sent.
    fn set(&self, registry: &Registry, reference: &Reference, wanted: &Wanted) -> Result<u64> {
        let in_registry = || registry.tag(&reference.at(wanted.release), &wanted.environment);
        if !self.store.blob(&wanted.release).exists() {
            // Another machine made and pushed it.
            in_registry().with_context(|| {
                Problem::failed(format!("release {} is neither in this store nor in the registry", wanted.release.short()))
                    .hint("a command on the machine that has it sets the tag")
            })?;
            return Ok(0);
        }
        match remote::push(self.store, registry, &wanted.release, reference, None, self.progress) {
            Ok(pushed) => Ok(pushed.blobs.sent_bytes),
            Err(error) if error::exit_code(&error) == error::Kind::Transient as u8 => Err(error),
            // What is attached may be refused where the release itself is there.
            Err(error) => match in_registry() {
                Ok(_) => {
                    self.progress.warn(format!("`{}` is set, and not all that is attached is there: {error:#}", wanted.tag));
                    Ok(0)
                }
                Err(_) => Err(error),
            },
        }
    }

    fn tell(&self, wanted: &Wanted, was_set: bool, became: &Became) {
        let Wanted { tag, pipeline, environment, version, release, .. } = wanted;
        let short = release.short();
        match became {
            Became::Stands => {}
            Became::Set { before, .. } => {
                let before = before.map_or_else(|| "new".to_owned(), |before| format!("it stood for {}", before.short()));
                self.progress.note(format!("`{tag}` stands for {version} ({short}) now; {before}"));
            }
            Became::Moved { to } => self.progress.warn(format!(
                "SOMEBODY MOVED the tag `{tag}` to {to}, which `{pipeline}/{environment}` does not have: that is {version} \
                 ({release}). The tag stays where it is; `pipeline environment tags {pipeline}/{environment} --retag` sets it"
            )),
            Became::Later { why, .. } if was_set => self.progress.warn(format!("the tag `{tag}` could not be looked at: {why}")),
            Became::Later { why, .. } => self.progress.warn(format!(
                "the tag `{tag}` does not stand for {version} ({short}) yet, and the next command that reaches the registry sets \
                 it: {why}"
            )),
        }
    }
}

/// Where tags stand, as far as the registry said within [`LOOK_TIME`]. Requests that are not answered by then end with the
/// program: they only read.
fn ask_all(registry: &Registry, tags: Vec<String>) -> BTreeMap<String, Result<Option<Digest>, String>> {
    let count = tags.len();
    let queue = Arc::new(Mutex::new(tags));
    let (sender, receiver) = channel();
    for _ in 0..LOOKERS.min(count) {
        let (registry, queue, sender) = (registry.clone(), Arc::clone(&queue), sender.clone());
        std::thread::spawn(move || {
            loop {
                let next = queue.lock().ok().and_then(|mut queue| queue.pop());
                let Some(tag) = next else { break };
                let stands = tag.parse::<Reference>().map_err(Into::into).and_then(|reference| registry.digest(&reference));
                if sender.send((tag, stands.map_err(|error| format!("{error:#}")))).is_err() {
                    break;
                }
            }
        });
    }
    drop(sender);
    let end = Instant::now() + LOOK_TIME;
    let mut answers = BTreeMap::new();
    while answers.len() < count {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((tag, answer)) => answers.insert(tag, answer),
            Err(_) => break,
        };
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(name: &str, minute: u8) -> Stamp {
        Stamp { release: Digest::of(name), since: format!("2026-11-21T12:{minute:02}:00Z").parse().unwrap() }
    }

    #[test]
    fn whose_a_tag_is() {
        // Rolled back from `c` to `b`, newest first.
        let history = [stamp("b", 4), stamp("c", 3), stamp("b", 2), stamp("a", 1)];
        // What this machine set last, what it was setting when it was killed, where the tag stands, whether that is ours.
        let cases = [
            (Some(stamp("c", 3)), None, "c", true),
            (Some(stamp("c", 3)), None, "b", true),
            (Some(stamp("c", 3)), None, "a", false),
            (Some(stamp("c", 3)), None, "x", false),
            // Another machine decided since.
            (Some(stamp("b", 2)), None, "c", true),
            (Some(stamp("b", 2)), None, "a", false),
            (Some(stamp("a", 1)), None, "c", true),
            // Killed between the tag and what is remembered of it.
            (Some(stamp("a", 1)), Some(stamp("x", 5)), "x", true),
            // The first time on this machine: anything that was ever current.
            (None, None, "a", true),
            (None, None, "x", false),
            // Longer ago than the ledger remembers.
            (Some(stamp("z", 0)), None, "z", true),
            (Some(stamp("z", 0)), None, "a", true),
        ];
        for (set, setting, there, expected) in cases {
            let tag =
                Tag { pipeline: "shop".into(), environment: "prod".into(), set, setting, moved: None, failed: None, asked: None };
            assert_eq!(tag.is_ours(&Digest::of(there), &history), expected, "{set:?} {setting:?} {there}");
        }
    }

    #[test]
    fn what_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let wanted = Wanted {
            tag: "r.example/shop:prod".into(),
            pipeline: "shop".into(),
            environment: "prod".into(),
            release: Digest::of("b"),
            version: "2".into(),
            history: vec![stamp("b", 2)],
        };
        let mut memory = Memory::load(&store).unwrap();
        assert_eq!(memory.known(&wanted), Known::Later);
        memory.entry(&wanted).set = Some(stamp("a", 1));
        assert_eq!(memory.known(&wanted), Known::Later);
        memory.entry(&wanted).set = Some(stamp("b", 2));
        memory.write(&store).unwrap();
        let mut memory = Memory::load(&store).unwrap();
        assert_eq!(memory.known(&wanted), Known::Set);
        memory.entry(&wanted).moved = Some(Digest::of("x"));
        assert_eq!(memory.known(&wanted), Known::Moved);
        fs_err::write(path(&store), "{\"format\": 2, \"tags\": {}}").unwrap();
        assert!(Memory::load(&store).unwrap_err().to_string().contains("newer pipeline"));
        fs_err::write(path(&store), "{").unwrap();
        assert!(Memory::load(&store).unwrap_err().to_string().contains("is broken"));
    }
}
