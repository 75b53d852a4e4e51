//! Which service a request belongs to: the compiled form of a [`Table`].
//!
//! The most specific host wins (the name itself, then the longest `*.suffix`, then any), within
//! it the longest path prefix on segment borders; a host that has no prefix for a path falls back
//! to the less specific ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::pool::{Instance as State, Pool};
use super::{Mode, Table};
use crate::config::types::{Redirect, Route};
use crate::error::Problem;

/// Everything a request needs to know; never changed, only replaced.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    exact: HashMap<Box<str>, Paths>,
    /// By suffix without the `*`, the longest first.
    wildcards: Vec<(Box<str>, Paths)>,
    any: Paths,
}

/// Prefixes, the longest first.
type Paths = Vec<Entry>;

#[derive(Debug)]
struct Entry {
    path: Box<str>,
    strip: bool,
    redirect: Option<Redirect>,
    service: Arc<ServiceView>,
    /// Its pool in place of the live one.
    preview: Option<PoolView>,
}

/// A service as one table has it.
#[derive(Debug)]
pub(super) struct ServiceView {
    pub name: String,
    pub mode: Mode,
    pub live: Option<PoolView>,
}

/// A pool and its instances as one table has them.
#[derive(Debug, Clone)]
pub(super) struct PoolView {
    pub pool: Arc<Pool>,
    pub instances: Arc<[Arc<State>]>,
}

/// What a request meets.
#[derive(Debug)]
pub(super) enum Found<'a> {
    Nothing,
    Redirect(&'a Redirect, /* what is left of the path */ &'a str),
    Maintenance(&'a str),
    Hold(&'a ServiceView, Duration),
    /// The service has no live pool, or one without instances.
    Down(&'a ServiceView),
    Pool(&'a PoolView, /* bytes to strip from the path */ usize),
}

impl Snapshot {
    /// `pools` gives a pool's view. Errors are two claims of one route.
    pub fn compile(table: &Table, mut pools: impl FnMut(&str, &str) -> Option<PoolView>) -> Result<Self> {
        let mut snapshot = Snapshot::default();
        let mut wildcards: BTreeMap<Box<str>, Paths> = BTreeMap::new();
        for (name, service) in &table.services {
            let live = service.live.as_deref().and_then(|live| pools(name, live));
            let view = Arc::new(ServiceView { name: name.clone(), mode: service.mode.clone(), live });
            let preview = service.preview.as_ref().map(|(route, pool)| (route, pools(name, pool)));
            let routes = service.routes.iter().map(|route| (route, None));
            // A preview whose pool is not there is down, not the live one.
            let preview = preview.into_iter().map(|(route, pool)| (route, Some(pool)));
            for (route, preview) in routes.chain(preview) {
                let paths = match route.host.as_deref().map(|host| (host, host.strip_prefix('*'))) {
                    None => &mut snapshot.any,
                    Some((_, Some(suffix))) => wildcards.entry(suffix.to_ascii_lowercase().into()).or_default(),
                    Some((host, None)) => snapshot.exact.entry(host.to_ascii_lowercase().into()).or_default(),
                };
                insert(paths, route, &view, preview)?;
            }
        }
        snapshot.wildcards = wildcards.into_iter().collect();
        snapshot.wildcards.sort_by_key(|(suffix, _)| std::cmp::Reverse(suffix.len()));
        Ok(snapshot)
    }

    /// `host` is lower case and without a port; `path` begins with `/`.
    pub fn find<'a>(&'a self, host: &str, path: &'a str) -> Found<'a> {
        let host = host.strip_suffix('.').unwrap_or(host);
        let exact = self.exact.get(host).and_then(|paths| longest(paths, path));
        let wildcard = || {
            let mut matching = self.wildcards.iter().filter(|(suffix, _)| host.len() > suffix.len() && host.ends_with(&**suffix));
            matching.find_map(|(_, paths)| longest(paths, path))
        };
        match exact.or_else(wildcard).or_else(|| longest(&self.any, path)) {
            None => Found::Nothing,
            Some(entry) => entry.found(path),
        }
    }
}

impl Entry {
    fn found<'a>(&'a self, path: &'a str) -> Found<'a> {
        if let Some(redirect) = &self.redirect {
            let rest = if self.path.len() > 1 { &path[self.path.len()..] } else { path };
            return Found::Redirect(redirect, rest);
        }
        let strip = if self.strip && self.path.len() > 1 { self.path.len() } else { 0 };
        // A preview is looked at while its service is held or in maintenance, too: that is what it is for.
        if let Some(preview) = &self.preview {
            return if preview.instances.is_empty() { Found::Down(&self.service) } else { Found::Pool(preview, strip) };
        }
        match &self.service.mode {
            Mode::Maintenance { message } => Found::Maintenance(message),
            Mode::Hold { longest } => Found::Hold(&self.service, *longest),
            Mode::Serve => match &self.service.live {
                Some(live) if !live.instances.is_empty() => Found::Pool(live, strip),
                _ => Found::Down(&self.service),
            },
        }
    }
}

fn longest<'a>(paths: &'a Paths, path: &str) -> Option<&'a Entry> {
    paths.iter().find(|entry| covers(&entry.path, path))
}

/// `/a` covers `/a` and `/a/b`, not `/ab`.
fn covers(prefix: &str, path: &str) -> bool {
    prefix.len() <= 1 || path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn insert(paths: &mut Paths, route: &Route, service: &Arc<ServiceView>, preview: Option<Option<PoolView>>) -> Result<()> {
    let path: Box<str> = route.path.trim_end_matches('/').into();
    if let Some(other) = paths.iter().find(|entry| entry.path == path) {
        let claim = format!("{}{}", route.host.as_deref().unwrap_or("*"), route.path);
        let (first, second) = (&other.service.name, &service.name);
        let message = match first == second {
            true => format!("`{first}` claims the route `{claim}` twice"),
            false => format!("`{first}` and `{second}` both claim the route `{claim}`"),
        };
        return Err(Problem::failed(message).hint("give one of them another host or another path").into());
    }
    let preview = preview.map(|preview| preview.unwrap_or_else(|| PoolView::empty(&service.name)));
    let entry = Entry { path, strip: route.strip, redirect: route.redirect.clone(), service: service.clone(), preview };
    let at = paths.partition_point(|other| other.path.len() > entry.path.len());
    paths.insert(at, entry);
    Ok(())
}

impl PoolView {
    /// Of a pool that is not in the table.
    fn empty(service: &str) -> Self {
        Self { pool: Arc::new(Pool::new(service, "", 0)), instances: Arc::new([]) }
    }
}
