//! Everything slow, each in a thread of its own: starts, stops, checks, questions of health, what the ledger is told.
//!
//! What is under way has a name, and nothing is begun twice: so there are never more threads than instances and environments.
//! What fails is tried again by the next pass that wants it still, after a pause that grows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::model::{Listing, Model, Shared};
use crate::config::types::Ask;
use crate::rollout::generation::Generation;
use crate::rollout::health::{ANSWER, Answer, Check, STATUS_LINE_MAX};
use crate::rollout::plan::Action;
use crate::rollout::target::{Address, Running, Target};

/// Lines that are kept of an instance that failed.
const LOG_LINES: usize = 30;
/// Bytes of them.
const LOG_BYTES: usize = 64 * 1024;
/// Pause between two looks at a target while something goes on there, and while nothing does.
const LOOKS: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// Begins what `action` says, when it is not under way.
pub fn begin(shared: &Arc<Shared>, model: &mut Model, name: &str, action: Action) {
    match action {
        Action::Prepare { generation } => prepare(shared, model, name, &generation),
        Action::Start { generation, id } => start(shared, model, name, &generation, &id),
        Action::Stop { id, forget, .. } => stop(shared, model, &id, forget),
        Action::Forget { generation } => forget(shared, model, name, &generation),
        Action::Check { generation, after } => check(shared, model, name, &generation, after),
        Action::Log { id, .. } => log(shared, model, name, &id),
        Action::Tell(verdict) => {
            let world = shared.world.clone();
            let (key, name) = (format!("tell {name}"), name.to_owned());
            spawn(shared, model, key, move |shared, key| {
                let told = world.tell(&name, &verdict);
                let mut model = shared.model();
                let failed = told.is_err().then(|| model.failed(key));
                let cache = model.cache(&name);
                match told {
                    Ok(text) => {
                        (cache.told, cache.untold) = (Some(verdict.at), None);
                        shared.world.note(&format!("{name}: {text}"));
                        model.failed.remove(key);
                        model.asked += 1;
                    }
                    Err(error) => {
                        let text = format!("the ledger cannot be told why the rollout failed: {error:#}");
                        if failed == Some(1) {
                            shared.world.warn(&format!("{name}: {text}"));
                        }
                        cache.untold = Some(text);
                    }
                }
            });
        }
        Action::Report(status) => {
            let Some(place) = model.reading.as_ref().and_then(|reading| reading.environments.get(name)) else { return };
            let Some(generation) = &place.wanted.generation else { return };
            let pair = (generation.release, generation.config.digest());
            let (key, name) = (format!("report {name}"), name.to_owned());
            spawn(shared, model, key, move |shared, key| {
                let told = shared.world.report(&name, pair, status);
                let mut model = shared.model();
                match told {
                    Ok(()) => {
                        // Not again before the ledger was read with it.
                        model.failed.insert(key.to_owned(), (0, Instant::now() + REPORTED));
                        model.asked += 1;
                    }
                    Err(error) => {
                        if model.failed(key) == 1 {
                            shared.world.warn(&format!("{name}: the ledger cannot be told that it is {status}: {error:#}"));
                        }
                    }
                }
            });
        }
    }
}

/// Pause after a report until the next.
const REPORTED: Duration = Duration::from_secs(3);

/// Runs `work` in a thread, when nothing of this name is under way and it may be tried again.
fn spawn(shared: &Arc<Shared>, model: &mut Model, key: String, work: impl FnOnce(&Arc<Shared>, &str) + Send + 'static) {
    if !model.may(&key) {
        return;
    }
    model.busy.insert(key.clone());
    let (owner, name) = (shared.clone(), key.clone());
    let thread = std::thread::Builder::new().name(name.chars().take(15).collect());
    let spawned = thread.spawn(move || {
        let under_way = UnderWay(&owner, &name);
        work(&owner, &name);
        drop(under_way);
    });
    if let Err(error) = spawned {
        model.busy.remove(&key);
        model.failed(&key);
        shared.world.warn(&format!("cannot start a thread: {error}"));
    }
}

/// Something under way: it is not any more when this is dropped, by a panic too.
struct UnderWay<'a>(&'a Shared, &'a str);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.model().busy.remove(self.1);
        self.0.wake();
    }
}

fn known(model: &Model, name: &str, generation: &str) -> Option<Generation> {
    model.state.environments.get(name)?.known(generation).cloned()
}

fn prepare(shared: &Arc<Shared>, model: &mut Model, name: &str, id: &str) {
    let Some(generation) = known(model, name, id) else { return };
    let name = name.to_owned();
    spawn(shared, model, format!("prepare {name} {id}"), move |shared, key| {
        let prepared = shared.world.prepare(&name, &generation);
        let mut model = shared.model();
        match &prepared {
            Ok(_) => drop(model.failed.remove(key)),
            Err(_) => drop(model.failed(key)),
        }
        model.cache(&name).prepared.insert(generation.id.clone(), prepared);
    });
}

fn start(shared: &Arc<Shared>, model: &mut Model, name: &str, generation: &str, id: &str) {
    let Some(generation) = known(model, name, generation) else { return };
    let Some(place) = generation.places(name).into_iter().find(|place| place.id == id) else { return };
    let name = name.to_owned();
    spawn(shared, model, format!("start {id}"), move |shared, key| {
        let started = (|| {
            let settings = generation.targets.get(&place.target).ok_or_else(|| anyhow::anyhow!("there is no such target"))?;
            let target = shared.world.target(settings)?;
            let secrets = shared.world.secrets(&generation)?;
            let spec = generation.spec(&name, &place, &shared.world.volumes(), secrets)?;
            target.start(&spec)?;
            // It is there now, and the plan must not miss it before the next look.
            Ok::<_, anyhow::Error>((super::world::key(settings), target.list()))
        })();
        let mut model = shared.model();
        match started {
            Ok((target, found)) => {
                model.failed.remove(key);
                model.listed(&target, found);
                model.cache(&name).start_errors.remove(&place.id);
            }
            Err(error) => {
                let count = model.failed(key);
                model.cache(&name).start_errors.insert(place.id.clone(), (format!("{error:#}"), count));
                shared.world.warn(&format!("`{}` cannot be started: {error:#}", place.id));
            }
        }
    });
}

fn stop(shared: &Arc<Shared>, model: &mut Model, id: &str, forget: bool) {
    let Some((found, target)) = model.find(id) else { return };
    // Nothing of its own is stopped by the plan while it is being started.
    if model.busy.contains(&format!("start {id}")) {
        return;
    }
    let place = model.reading.as_ref().and_then(|reading| reading.environments.get(&found.environment));
    let written = place.and_then(|place| place.wanted.settings.grace);
    let grace = written.map_or_else(|| target.grace(), |grace| grace.duration());
    spawn(shared, model, format!("stop {id}"), move |shared, key| {
        let stopped = target.stop(&found.id, grace).and_then(|()| if forget { target.forget(&found.id) } else { Ok(()) });
        let listed = target.list();
        let mut model = shared.model();
        model.pulses.remove(&found.id);
        let settings = model.lists.iter().find(|(_, listing)| Arc::ptr_eq(&listing.target, &target)).map(|(key, _)| key.clone());
        if let Some(settings) = settings {
            model.listed(&settings, listed);
        }
        match stopped {
            Ok(()) => drop(model.failed.remove(key)),
            Err(error) => {
                if model.failed(key) == 1 {
                    shared.world.warn(&format!("`{}` cannot be stopped: {error:#}", found.id));
                }
            }
        }
    });
}

fn forget(shared: &Arc<Shared>, model: &mut Model, name: &str, id: &str) {
    let Some(generation) = known(model, name, id) else { return };
    let name = name.to_owned();
    spawn(shared, model, format!("forget {name} {id}"), move |shared, key| {
        let mut wrong = None;
        for place in generation.places(&name) {
            let Some(settings) = generation.targets.get(&place.target) else { continue };
            let forgotten = shared.world.target(settings).and_then(|target| target.forget(&place.id));
            wrong = wrong.or(forgotten.err());
        }
        let mut model = shared.model();
        // A log that stays is no reason to remember for ever what it was of.
        let give_up = wrong.is_some() && model.failed(key) >= 5;
        if wrong.is_none() || give_up {
            model.failed.remove(key);
            model.cache(&name).forgotten.insert(generation.id.clone());
        }
    });
}

fn log(shared: &Arc<Shared>, model: &mut Model, name: &str, id: &str) {
    let Some((found, target)) = model.find(id) else {
        model.cache(name).logs.insert(id.to_owned(), Vec::new());
        return;
    };
    let name = name.to_owned();
    spawn(shared, model, format!("log {id}"), move |shared, _| {
        let mut bytes: Vec<u8> = Vec::new();
        let result = target.logs(&found.id, LOG_LINES, false, &mut |chunk| {
            bytes.extend_from_slice(chunk);
            bytes.len() < LOG_BYTES
        });
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.drain(..lines.len().saturating_sub(LOG_LINES));
        if let Err(error) = result {
            lines.push(format!("(its log cannot be read: {error:#})"));
        }
        shared.model().cache(&name).logs.insert(found.id.clone(), lines);
    });
}

/// Runs the checks somebody wrote, one after the other, upon each instance of green.
fn check(shared: &Arc<Shared>, model: &mut Model, name: &str, id: &str, after: bool) {
    let Some(generation) = known(model, name, id) else { return };
    let Some(place) = model.reading.as_ref().and_then(|reading| reading.environments.get(name)) else { return };
    let settings = &place.wanted.settings;
    let checks = if after { settings.post_switch.clone() } else { settings.pre_switch.clone() };
    let all: Vec<_> = model.lists.values().flat_map(|listing| listing.found.clone()).collect();
    let own = all.into_iter().filter(|found| found.generation == id && found.environment == name);
    let addresses: Vec<(String, Address, u16)> = own
        .filter_map(|found| {
            let port = generation.programs.get(&found.target)?.port?;
            Some((found.id, found.address?, port))
        })
        .collect();
    let name = name.to_owned();
    spawn(shared, model, format!("check {name} {id} {after}"), move |shared, _| {
        let mut result = Ok(String::new());
        for check in &checks {
            let timeout = check.timeout.duration();
            result = match &check.ask {
                Ask::Http(path) => addresses.iter().try_fold(String::new(), |_, (instance, address, port)| {
                    let check = Check::Http(path.clone());
                    match wait_for(ask(shared, &check, address, *port, timeout)) {
                        Answer::Good => Ok(format!("{path} is good")),
                        Answer::Bad(why) | Answer::Silent(why) => Err(format!("`{instance}`: {why}")),
                    }
                }),
                Ask::Command(words) => {
                    let first = addresses.iter().find_map(|(_, address, _)| match address {
                        Address::Tcp(address) => Some(address.to_string()),
                        Address::Shim(_) => None,
                    });
                    let (pipeline, environment) = name.split_once('/').unwrap_or((&name, ""));
                    let mut variables: BTreeMap<String, String> = BTreeMap::from([
                        ("PIPELINE_NAME".into(), pipeline.into()),
                        ("PIPELINE_ENVIRONMENT".into(), environment.into()),
                        ("PIPELINE_GENERATION".into(), generation.id.clone()),
                        ("PIPELINE_RELEASE".into(), generation.release.to_string()),
                        ("PIPELINE_VERSION".into(), generation.version.clone()),
                    ]);
                    variables.extend(first.map(|first| ("PIPELINE_ADDRESS".into(), first)));
                    shared.world.run(words, &variables, timeout)
                }
            };
            if result.is_err() {
                break;
            }
        }
        shared.model().cache(&name).checked.insert((generation.id.clone(), after), result);
    });
}

/// Runs a future to its end in this thread.
fn wait_for(future: impl Future<Output = Answer>) -> Answer {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => Answer::Silent(error.to_string()),
    }
}

/// Sees to it that every target is looked at, and every instance asked how it does.
pub fn look_after(shared: &Arc<Shared>, model: &mut Model) {
    for (key, settings) in model.targets() {
        if model.lists.contains_key(&key) {
            continue;
        }
        let name = format!("target {key}");
        if !model.may(&name) {
            continue;
        }
        match shared.world.target(&settings) {
            Ok(target) => {
                let listing = Listing { at: None, found: Vec::new(), error: None, target: target.clone() };
                model.lists.insert(key.clone(), listing);
                let owner = shared.clone();
                let thread = std::thread::Builder::new().name("target".into());
                if thread.spawn(move || look(&owner, &key, target.as_ref())).is_err() {
                    model.failed(&name);
                }
            }
            Err(error) => {
                if model.failed(&name) == 1 {
                    shared.world.warn(&format!("the target `{key}` cannot be used: {error:#}"));
                }
            }
        }
    }
    let mut asked = Vec::new();
    for found in model.lists.values().flat_map(|listing| &listing.found) {
        let over_port = found.address.is_some() && found.status == Running::Running;
        if let Some((check, port)) = model.check(found)
            && check != Check::Runs
            && over_port
            && !model.busy.contains(&format!("ask {}", found.id))
        {
            asked.push((found.id.clone(), check, port));
        }
    }
    for (id, check, port) in asked {
        if let Ok(handle) = tokio::runtime::Handle::try_current() {
            model.busy.insert(format!("ask {id}"));
            model.pulses.entry(id.clone()).or_default();
            handle.spawn(watch(shared.clone(), id, check, port.unwrap_or_default()));
        }
    }
    let there: std::collections::BTreeSet<&String> =
        model.lists.values().flat_map(|listing| &listing.found).map(|found| &found.id).collect();
    model.pulses.retain(|id, _| there.contains(id));
    let now = Instant::now();
    // What failed and is not wanted any more is not remembered for ever.
    model.failed.retain(|_, (_, next)| now.saturating_duration_since(*next) < Duration::from_secs(600));
}

/// Looks at one target until the daemon ends.
fn look(shared: &Arc<Shared>, key: &str, target: &dyn Target) {
    loop {
        let found = target.list();
        let mut model = shared.model();
        if model.resting {
            return;
        }
        let changed = model.listed(key, found);
        let busy = model.busy.iter().any(|name| name.starts_with("start ") || name.starts_with("stop "));
        let active = model.state.environments.values().any(|environment| environment.active().is_some());
        drop(model);
        if changed {
            shared.wake();
        }
        std::thread::sleep(if busy || active || changed { LOOKS[0] } else { LOOKS[1] });
    }
}

/// Asks one instance until it is gone.
async fn watch(shared: Arc<Shared>, id: String, check: Check, port: u16) {
    loop {
        let found = shared.model().find(&id);
        let Some((found, target)) = found.filter(|(found, _)| found.status == Running::Running) else { break };
        let Some(address) = found.address else { break };
        let answer = match &check {
            Check::Command(words) => {
                let (words, asked) = (words.clone(), id.clone());
                let asked = tokio::task::spawn_blocking(move || target.check(&asked, &words, ANSWER)).await;
                match asked {
                    Ok(Ok(checked)) if checked.good => Answer::Good,
                    Ok(Ok(checked)) => Answer::Bad(checked.last),
                    // An engine that is away says nothing about the program.
                    Ok(Err(_)) if shared.model().is_doubtful(&id) => {
                        tokio::time::sleep(LOOKS[1]).await;
                        continue;
                    }
                    Ok(Err(error)) => Answer::Silent(format!("{error:#}")),
                    Err(error) => Answer::Silent(error.to_string()),
                }
            }
            _ => ask(&shared, &check, &address, port, ANSWER).await,
        };
        let pause = {
            let mut model = shared.model();
            if model.resting {
                break;
            }
            let steady = model.now(shared.world.as_ref()).steady;
            let is_doubtful = answer == Answer::Good && model.is_doubtful(&id);
            let pulse = model.pulses.entry(id.clone()).or_default();
            let is_believed = !is_doubtful || pulse.healthy == Some(true);
            let changed = is_believed && pulse.heard(&check, &answer, steady);
            let pause = pulse.pause();
            drop(model);
            if changed {
                shared.wake();
            }
            pause
        };
        tokio::time::sleep(pause).await;
    }
    shared.model().busy.remove(&format!("ask {id}"));
}

/// One question over the network.
async fn ask(shared: &Shared, check: &Check, address: &Address, port: u16, timeout: Duration) -> Answer {
    let asked = async {
        let mut stream = match (shared.dial.0)(address.clone(), port).await {
            Ok(stream) => stream,
            Err(error) => return Answer::Silent(error.to_string()),
        };
        let Some(request) = check.request() else { return Answer::Good };
        if let Err(error) = stream.write_all(request.as_bytes()).await {
            return Answer::Silent(error.to_string());
        }
        let mut line = Vec::new();
        let mut bytes = [0; 256];
        while !line.contains(&b'\n') && line.len() < STATUS_LINE_MAX {
            match stream.read(&mut bytes).await {
                Ok(0) => break,
                Ok(count) => line.extend_from_slice(&bytes[..count]),
                Err(error) if line.is_empty() => return Answer::Silent(error.to_string()),
                Err(_) => break,
            }
        }
        let end = line.iter().position(|byte| *byte == b'\n').unwrap_or(line.len());
        check.judge(&line[..end])
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(answer) => answer,
        // Somebody took the connection and says nothing.
        Err(_) => Answer::Bad(format!("no answer within {} s", timeout.as_secs())),
    }
}
