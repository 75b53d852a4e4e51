//! Checks of where and how an environment runs: targets, routes, volumes and rollout settings.

use std::collections::BTreeMap;

use super::Checker;
use super::release::empty_keys;
use crate::config::diagnostic::{quoted, suggestion};
use crate::config::file;
use crate::config::syntax::{self, Wrong};
use crate::config::types::{
    Ask, Docker, Environment, Local, Pipeline, REDIRECT, Redirect, RolloutCheck, RolloutSettings, Route, Seconds, Target,
    VM_MEMORY, Vm, VmCommand, Volume, VolumeSpec, Watch,
};
use crate::config::yaml::Place;

/// Time of a check of kind `http` when nothing is written.
const HTTP_TIMEOUT: Seconds = Seconds(10);
/// Time of a check of kind `command` when nothing is written.
const COMMAND_TIMEOUT: Seconds = Seconds(60);
/// Statuses that send a client elsewhere (RFC 9110, section 15.4); the others need no address or mean a cache.
const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// What can run somewhere: which artifacts a pipeline makes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Makes {
    pub image: bool,
    pub disk: bool,
}

impl Checker<'_> {
    /// `target` and `targets` of the environment at `place`.
    pub(super) fn targets(
        &mut self,
        one: Option<file::Target>,
        many: BTreeMap<String, file::Target>,
        place: &Place<'_>,
        makes: Makes,
    ) -> BTreeMap<String, Target> {
        if place.key("target").is_there() && place.key("targets").is_there() {
            let hint = Some("keep `targets` when there are several".into());
            self.findings.add(&place.label("targets"), "an environment has `target` or `targets`, not both", hint);
        }
        let mut checked = BTreeMap::new();
        if place.key("target").is_there() {
            let target = self.target(one.unwrap_or_default(), &place.key("target"), makes);
            checked.insert("main".to_owned(), target);
        }
        for name in empty_keys(&place.key("targets")) {
            self.target(file::Target::default(), &place.key("targets").key(&name), makes);
        }
        for (name, target) in many {
            self.environment_name(&name, &place.key("targets"));
            let target = self.target(target, &place.key("targets").key(&name), makes);
            checked.insert(name, target);
        }
        checked
    }

    /// A stand-in where no kind, or several, are written.
    fn target(&mut self, written: file::Target, place: &Place<'_>, makes: Makes) -> Target {
        // `local:` without settings is one too.
        let empty = empty_keys(place);
        let is_there = |kind: &&str| place.key(kind).is_there() || empty.iter().any(|key| key == kind);
        let kinds: Vec<&str> = Target::KINDS.into_iter().filter(is_there).collect();
        let kind = match kinds.as_slice() {
            [kind] => *kind,
            [] => {
                self.findings.add_missing(place, format!("a target is one of {}", quoted(Target::KINDS)), None);
                return Target::Local(Local::default());
            }
            [_, second, ..] => {
                let hint = Some("several are written by name: `targets: { web: { local: {} }, … }`".into());
                self.findings.add(&place.label(second), "a target is of one kind", hint);
                return Target::Local(Local::default());
            }
        };
        match kind {
            "vm" if !makes.disk => {
                let hint = Some("add `host:`, or use `local` or `docker`".into());
                self.findings.add(&place.label(kind), "`vm` runs disks, and this pipeline makes none", hint);
            }
            "local" | "docker" if !makes.image => {
                let hint = Some("use `vm`, which runs its disk".into());
                self.findings.add(&place.label(kind), format!("`{kind}` runs images, and this pipeline makes none"), hint);
            }
            _ => {}
        }
        let here = place.key(kind);
        match kind {
            "local" => {
                let local = written.local.unwrap_or_default();
                let memory = self.memory(local.memory, &here);
                let cpus = self.processors(local.cpus, &here);
                Target::Local(Local { instances: local.instances.unwrap_or(1), memory, cpus, pids: local.pids })
            }
            "docker" => Target::Docker(self.docker(written.docker.unwrap_or_default(), &here)),
            _ => Target::Vm(self.vm(written.vm.unwrap_or_default(), &here)),
        }
    }

    fn docker(&mut self, docker: file::Docker, place: &Place<'_>) -> Docker {
        if let Some(host) = &docker.host {
            self.note(&place.key("host"), engine(host));
        }
        if let Some(network) = &docker.network {
            self.note(&place.key("network"), syntax::file_name(network));
        }
        Docker {
            instances: docker.instances.unwrap_or(1),
            memory: self.memory(docker.memory, place),
            cpus: self.processors(docker.cpus, place),
            host: docker.host,
            network: docker.network,
        }
    }

    fn vm(&mut self, vm: file::Vm, place: &Place<'_>) -> Vm {
        if let Some(app) = &vm.app {
            self.note(&place.key("app"), syntax::file_name(app));
        }
        let command = vm.command.map(|written| {
            let parts = [("start", &written.start), ("stop", &written.stop), ("address", &written.address)];
            for (key, argv) in parts {
                let here = place.key("command").key(key);
                if argv.first().is_none_or(String::is_empty) {
                    self.findings.add(&here, format!("`{key}` names no program"), None);
                }
                self.command(argv, &here);
            }
            VmCommand { start: written.start, stop: written.stop, address: written.address }
        });
        Vm {
            instances: vm.instances.unwrap_or(1),
            memory: self.memory(vm.memory, place).unwrap_or(VM_MEMORY),
            cpus: vm.cpus.unwrap_or(1),
            app: vm.app,
            command,
        }
    }

    fn memory(&mut self, text: Option<String>, place: &Place<'_>) -> Option<u64> {
        text.and_then(|text| self.note(&place.key("memory"), syntax::size(&text)))
    }

    fn processors(&mut self, cpus: Option<f64>, place: &Place<'_>) -> Option<f64> {
        let cpus = cpus?;
        self.note(&place.key("cpus"), super::host::percent(cpus))?;
        Some(cpus)
    }

    /// `routes` of the environment `name` at `place`.
    pub(super) fn routes(&mut self, written: Vec<file::Route>, name: &str, place: &Place<'_>, no_target: bool) -> Vec<Route> {
        if no_target && !written.is_empty() {
            let hint = Some("say where it runs: `target: { local: {} }`".into());
            self.findings.add(&place.label("routes"), format!("nothing of `{name}` runs, so no request can reach it"), hint);
        }
        let list = place.key("routes");
        written.into_iter().enumerate().map(|(index, route)| self.route(route, &list.item(index))).collect()
    }

    fn route(&mut self, written: file::Route, place: &Place<'_>) -> Route {
        // A wrong one stays as it is written: it claims nothing that another route has.
        let host = written.host.map(|text| self.note(&place.key("host"), host(&text)).unwrap_or(text));
        let path = written.path.map(|text| self.note(&place.key("path"), prefix(&text)).unwrap_or(text));
        let path = path.unwrap_or_else(|| "/".into());
        let strip = written.strip.unwrap_or(false);
        if strip && path == "/" {
            self.findings.add(&place.label("strip"), "there is nothing to take away from `/`", None);
        }
        let redirect = written.redirect.map(|redirect| self.redirect(redirect, &place.key("redirect")));
        if strip && redirect.is_some() {
            let hint = Some("a URL that ends with `/` gets the rest of the path".into());
            self.findings.add(&place.label("strip"), "no program sees the path of a redirect", hint);
        }
        Route { host, path, strip, redirect }
    }

    fn redirect(&mut self, written: file::Redirect, place: &Place<'_>) -> Redirect {
        let (to, status, at) = match written {
            file::Redirect::To(to) => (to, None, place.clone()),
            file::Redirect::Rule(rule) => (rule.to, rule.status, place.key("to")),
        };
        let rest = to.strip_prefix("https://").or_else(|| to.strip_prefix("http://"));
        let visible = !to.contains(|c: char| c.is_whitespace() || c.is_control()) && to.is_ascii();
        let elsewhere = rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
        if !visible || !(elsewhere || to.starts_with('/')) {
            let hint = Some("like `https://shop.test/`".into());
            self.findings.add(&at, format!("`{to}` is not a URL to go to"), hint);
        }
        if let Some(status) = status.filter(|status| !REDIRECTS.contains(status)) {
            let known: Vec<String> = REDIRECTS.iter().map(u16::to_string).collect();
            let hint = Some(format!("possible are {}", quoted(known)));
            self.findings.add(&place.key("status"), format!("{status} sends nobody elsewhere"), hint);
        }
        Redirect { to, status: status.unwrap_or(REDIRECT) }
    }

    /// `volumes` of the environment at `place`; `declared` are the image's, as far as the pipeline file says.
    pub(super) fn environment_volumes(
        &mut self,
        written: BTreeMap<String, file::VolumeForm>,
        place: &Place<'_>,
        targets: &BTreeMap<String, Target>,
        declared: &[String],
    ) -> BTreeMap<String, VolumeSpec> {
        let list = place.key("volumes");
        if targets.is_empty() && !written.is_empty() {
            let hint = Some("say where it runs: `target: { local: {} }`".into());
            self.findings.add(&place.label("volumes"), "nothing runs here, so nothing has volumes", hint);
        }
        let instances: u32 = targets.values().map(Target::instances).sum();
        let mut checked: BTreeMap<String, VolumeSpec> = BTreeMap::new();
        for (name, form) in written {
            self.note(&list.label(&name), syntax::file_name(&name));
            let (spec, at) = match form {
                file::VolumeForm::Mode(mode) => (VolumeSpec { mode, path: None }, list.key(&name)),
                file::VolumeForm::Rule(rule) => {
                    let here = list.key(&name).key("path");
                    rule.path.as_ref().map(|path| self.note(&here, syntax::image_path(path)));
                    (VolumeSpec { mode: rule.mode, path: rule.path }, list.key(&name).key("mode"))
                }
            };
            if spec.mode == Volume::Exclusive && instances > 1 {
                let message = format!("`{name}` is for one program at a time, and {instances} instances run here");
                let hint = Some("run one, or write `shared` when several may write at once".into());
                self.findings.add(&at, message, hint);
            }
            if spec.place(&name, declared).is_none() && !declared.is_empty() {
                let hint = Some(format!("write it: `{name}: {{ mode: …, path: {} }}`", declared[0]));
                let message = format!("which volume of the image is `{name}`: {}?", quoted(declared));
                self.findings.add(&list.label(&name), message, hint);
            }
            let same = |(other, there): (&String, &VolumeSpec)| {
                let place = there.place(other, declared);
                (place.is_some() && place == spec.place(&name, declared)).then(|| other.clone())
            };
            if let Some(other) = checked.iter().find_map(same) {
                self.findings.add(&list.label(&name), format!("`{other}` and `{name}` are at one place in the image"), None);
            }
            checked.insert(name, spec);
        }
        checked
    }

    /// `rollout` of the environment at `place`.
    pub(super) fn rollout(&mut self, written: Option<file::Rollout>, place: &Place<'_>, no_target: bool) -> RolloutSettings {
        let Some(written) = written else { return RolloutSettings::default() };
        if no_target {
            let hint = Some("say where it runs: `target: { local: {} }`".into());
            self.findings.add(&place.label("rollout"), "nothing runs here, so nothing is rolled out", hint);
        }
        let place = &place.key("rollout");
        let default = RolloutSettings::default();
        let deadline = self.duration(written.deadline, &place.key("deadline"), default.deadline.duration());
        let grace = written.grace.map(|text| self.period(Some(text), &place.key("grace"), Seconds(0)));
        RolloutSettings {
            grace,
            deadline: Seconds(deadline.as_secs()),
            drain: self.period(written.drain, &place.key("drain"), default.drain),
            streams: self.period(written.streams, &place.key("streams"), default.streams),
            warm: self.period(written.warm, &place.key("warm"), default.warm),
            warm_memory: written.warm_memory.and_then(|text| self.note(&place.key("warm_memory"), syntax::size(&text))),
            hold: self.period(written.hold, &place.key("hold"), default.hold),
            preview: written.preview.map(|route| self.preview(route, &place.key("preview"))),
            pre_switch: self.rollout_checks(written.pre_switch, &place.key("pre_switch")),
            post_switch: self.rollout_checks(written.post_switch, &place.key("post_switch")),
            watch: self.watch(written.watch.unwrap_or_default(), &place.key("watch")),
            on_failure: written.on_failure.unwrap_or_default(),
        }
    }

    fn preview(&mut self, route: file::Route, place: &Place<'_>) -> Route {
        let route = self.route(route, place);
        if route.redirect.is_some() {
            self.findings.add(&place.label("redirect"), "a preview shows the new release, and a redirect shows none", None);
        }
        if route.host.is_none() && route.path == "/" {
            let hint = Some("like `preview: { host: next.shop.test }`".into());
            self.findings.add_missing(place, "a preview needs `host` or `path`", hint);
        }
        route
    }

    /// A duration, or `0s`.
    fn period(&mut self, text: Option<String>, place: &Place<'_>, default: Seconds) -> Seconds {
        match text {
            Some(text) if text == "0s" => Seconds(0),
            text => Seconds(self.duration(text, place, default.duration()).as_secs()),
        }
    }

    fn rollout_checks(&mut self, written: Vec<file::RolloutCheck>, place: &Place<'_>) -> Vec<RolloutCheck> {
        let mut checked = Vec::new();
        for (index, check) in written.into_iter().enumerate() {
            let here = place.item(index);
            let (ask, default) = match self.exactly_one(&here, "a check", &["http", "command"]) {
                Some("http") => {
                    let path = check.http.unwrap_or_default();
                    self.url_path(&path, &here.key("http"));
                    (Ask::Http(path), HTTP_TIMEOUT)
                }
                Some(_) => {
                    let run = match check.command {
                        Some(file::OneOrMany::Many(argv)) => argv,
                        Some(file::OneOrMany::One(script)) if !script.trim().is_empty() => {
                            vec!["sh".into(), "-c".into(), script]
                        }
                        _ => Vec::new(),
                    };
                    if run.is_empty() {
                        self.findings.add(&here.key("command"), "the command is empty", None);
                    }
                    self.command(&run, &here.key("command"));
                    (Ask::Command(run), COMMAND_TIMEOUT)
                }
                None => continue,
            };
            let timeout = self.duration(check.timeout, &here.key("timeout"), default.duration());
            checked.push(RolloutCheck { ask, timeout: Seconds(timeout.as_secs()) });
        }
        checked
    }

    fn watch(&mut self, written: file::Watch, place: &Place<'_>) -> Watch {
        let default = Watch::default();
        if let Some(errors) = written.errors.filter(|errors| !(0.0..=1.0).contains(errors)) {
            let hint = Some("from 0 to 1: 0.01 is one of a hundred".into());
            self.findings.add(&place.key("errors"), format!("{errors} is not a share"), hint);
        }
        if let Some(latency) = written.latency.filter(|latency| !(1.0..=1000.0).contains(latency)) {
            let hint = Some("from 1: 3 allows three times the old release's".into());
            self.findings.add(&place.key("latency"), format!("{latency} is not a factor"), hint);
        }
        Watch {
            period: self.period(written.period, &place.key("period"), default.period),
            errors: written.errors.unwrap_or(default.errors),
            latency: written.latency.unwrap_or(default.latency),
            minimum: written.minimum.unwrap_or(default.minimum),
        }
    }

    pub(super) fn together(&mut self, group: Option<&String>, place: &Place<'_>, no_target: bool) {
        let Some(group) = group else { return };
        self.note(&place.key("together"), syntax::file_name(group));
        if no_target {
            let hint = Some("say where it runs: `target: { local: {} }`".into());
            self.findings.add(&place.label("together"), "nothing runs here, so nothing switches", hint);
        }
    }

    /// Two routes of the file that are one; `place` is that of `environments`.
    pub(super) fn clashes(&mut self, environments: &BTreeMap<String, Environment>, place: &Place<'_>) {
        let names: Vec<(&str, &Environment)> = environments.iter().map(|(name, policy)| (name.as_str(), policy)).collect();
        for Clash { claim, first, second, at } in clashes(&names) {
            let here = match at {
                Some(index) => place.key(&second).key("routes").item(index),
                None => place.key(&second).key("rollout").key("preview"),
            };
            let message = if first == second {
                format!("`{claim}` is here twice")
            } else {
                format!("`{claim}` is a route of `{first}` already")
            };
            self.findings.add(&here, message, Some("another `host` or `path` tells requests apart".into()));
        }
    }
}

/// A route that two environments claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clash {
    /// Like `shop.test/api`.
    pub claim: String,
    /// The environment that has it, by the name that was given.
    pub first: String,
    /// The environment that claims it too.
    pub second: String,
    /// Which of the second's routes; `None`: its preview.
    pub at: Option<usize>,
}

/// The same (host, path) in two routes or previews, in order of `environments` (each with its name).
pub fn clashes(environments: &[(&str, &Environment)]) -> Vec<Clash> {
    let mut known: BTreeMap<String, &str> = BTreeMap::new();
    let mut found = Vec::new();
    for (name, environment) in environments {
        let routes = environment.routes.iter().enumerate().map(|(index, route)| (Some(index), route));
        for (at, route) in routes.chain(environment.rollout.preview.iter().map(|route| (None, route))) {
            let claim = route.claim();
            match known.get(&claim) {
                Some(first) => found.push(Clash { claim, first: (*first).into(), second: (*name).into(), at }),
                None => drop(known.insert(claim, name)),
            }
        }
    }
    found
}

/// What is not wrong but worth knowing before an environment runs, one text each.
pub fn warnings(pipeline: &Pipeline) -> Vec<String> {
    let declared = &pipeline.image.volumes;
    let mut found = Vec::new();
    for (name, environment) in &pipeline.releases.environments {
        if environment.targets.is_empty() {
            continue;
        }
        let covered: Vec<&str> = environment.volumes.iter().filter_map(|(name, spec)| spec.place(name, declared)).collect();
        for path in declared.iter().filter(|path| !covered.contains(&path.trim_end_matches('/'))) {
            let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            found.push(format!(
                "what the image writes to `{path}` in `{name}` is gone with each instance; `volumes: {{ {last}: exclusive }}` keeps it"
            ));
        }
        for (volume, _) in environment.volumes.iter().filter(|(name, spec)| spec.place(name, declared).is_none()) {
            found.push(format!(
                "the volume `{volume}` of `{name}` has no `path`, and the pipeline file declares no volumes; it works only when the image itself declares a fitting one"
            ));
        }
    }
    found
}

/// The groups of `together` that one environment of `wanted` is alone in; `others`: all environments of other pipelines.
pub fn alone<'e>(wanted: &'e BTreeMap<String, Environment>, others: &[&Environment]) -> Vec<(&'e str, &'e str)> {
    let group = |environment: &'e Environment| environment.together.as_deref();
    let members = |name: &str| {
        let all = wanted.values().chain(others.iter().copied());
        all.filter(|environment| environment.together.as_deref() == Some(name)).count()
    };
    let named = wanted.iter().filter_map(|(name, environment)| Some((name.as_str(), group(environment)?)));
    named.filter(|(_, group)| members(group) == 1).collect()
}

/// A name requests are for, lower case.
fn host(text: &str) -> Result<String, Wrong> {
    let wrong = |hint: &str| Wrong { message: format!("`{text}` is not the name of a host"), hint: Some(hint.into()) };
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('.').unwrap_or(&lower);
    if text.contains("://") || text.contains('/') {
        return Err(wrong("the name alone, like `shop.test`; `path` has the rest"));
    }
    if text.contains(':') {
        return Err(wrong("without a port: routes are the same on every listener"));
    }
    if lower == "*" {
        return Err(wrong("leave `host` away for any"));
    }
    if !text.is_ascii() {
        return Err(wrong("in its ASCII form, which begins with `xn--`"));
    }
    let name = lower.strip_prefix("*.").unwrap_or(lower);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(wrong("like `shop.test`, or `*.shop.test` for all names below it"));
    }
    Ok(lower.to_owned())
}

/// What paths begin with: without `/` at the end.
fn prefix(text: &str) -> Result<String, Wrong> {
    let wrong = |hint: &str| Err(Wrong { message: format!("`{text}` is not a path of a URL"), hint: Some(hint.into()) });
    if !text.starts_with('/') {
        return wrong("it begins with `/`, like `/api`");
    }
    if text.contains(['?', '#', '*', '\\', '%']) || text.contains(|c: char| c.is_whitespace() || c.is_control() || !c.is_ascii())
    {
        return wrong("plain segments, like `/api/v1`, without patterns, escapes and queries");
    }
    let path = text.strip_suffix('/').unwrap_or(text);
    if path.split('/').skip(1).any(|segment| matches!(segment, "" | "." | "..")) {
        return wrong("without empty segments, `.` and `..`");
    }
    Ok(if path.is_empty() { "/".into() } else { path.to_owned() })
}

/// The address of a container engine.
fn engine(text: &str) -> Result<(), Wrong> {
    let wrong = |message: String, hint: &str| Err(Wrong { message, hint: Some(hint.into()) });
    match text.split_once("://") {
        Some(("unix", path)) if path.starts_with('/') && path.len() > 1 => Ok(()),
        Some(("tcp" | "http" | "https" | "ssh", _)) => wrong(
            format!("`{text}` is an engine across a network, and whoever reaches it is root there"),
            "use its socket: `unix:///run/docker.sock`; for another machine run `pipeline serve` there",
        ),
        Some((scheme, _)) => wrong(
            format!("`{text}` is not the address of an engine"),
            &suggestion(scheme, &["unix"], "like `unix:///run/docker.sock`; known are").unwrap_or_default(),
        ),
        None => wrong(format!("`{text}` is not the address of an engine"), "like `unix:///run/docker.sock`"),
    }
}

#[cfg(test)]
mod tests;
