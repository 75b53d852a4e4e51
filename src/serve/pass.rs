//! The reconciler: again and again from the start, whatever happened: what is wanted, what there is, what follows.
//!
//! A pass is quick: it decides, saves, sets the switch, and hands everything slow to threads, so that a target that hangs
//! keeps only its own instances waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::model::{Model, Plans, Shared};
use super::work;
use crate::rollout::plan::{self, Environment, Peers, Serving};
use crate::rollout::switch::{Drain, Instance, Mode, Service, Table};
use crate::rollout::view::Phase;

/// Pause between passes while something goes on, and while nothing does.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];
/// Rounds of one pass: what one look brings about lets the next one go on.
const ROUNDS: usize = 8;
/// The daemon's clock is written down this often when nothing else is, in milliseconds.
const CLOCK: u64 = 60_000;

/// Passes until the daemon ends.
pub fn run(shared: &Arc<Shared>, ended: &dyn Fn() -> bool) {
    while !ended() {
        let longest = pass(shared);
        let model = shared.model();
        if !ended() {
            drop(shared.wait(model, longest));
        }
    }
}

/// One pass; the longest pause until the next.
pub fn pass(shared: &Arc<Shared>) -> Duration {
    let mut model = shared.model();
    if model.resting {
        return PAUSES[0];
    }
    let knows = model.knows || model.has_looked();
    recover(shared, &mut model);
    look_back(shared, &mut model);
    let done = model.done;
    let mut busy = false;
    for _ in 0..ROUNDS {
        let changed = decide(shared, &mut model);
        let changed = serve(shared, &mut model) || changed;
        if !changed {
            break;
        }
        busy = true;
    }
    busy = act(shared, &mut model) || busy;
    work::look_after(shared, &mut model);
    model.passes += 1;
    model.knows = knows;
    model.last_pass = Instant::now();
    model.last_pass_wall = Some(shared.world.now());
    let passes = model.passes;
    drop(model);
    shared.passed.send_replace(passes);
    shared.looked.send_replace(done);
    if busy { PAUSES[0] } else { PAUSES[1] }
}

/// An environment nobody has a state of, but whose instances run: what is wanted there and runs is live.
fn recover(shared: &Arc<Shared>, model: &mut Model) {
    let Some(reading) = &model.reading else { return };
    let mut found = Vec::new();
    for (name, place) in &reading.environments {
        if model.state.environments.contains_key(name) {
            continue;
        }
        let there: BTreeSet<&str> = model
            .lists
            .values()
            .flat_map(|listing| &listing.found)
            .filter(|found| found.environment == *name)
            .map(|found| found.generation.as_str())
            .collect();
        let candidates = place.wanted.generation.iter().chain(&place.past);
        if let Some(generation) = candidates.into_iter().find(|generation| there.contains(generation.id.as_str())) {
            found.push((name.clone(), generation.clone()));
        }
    }
    for (name, generation) in found {
        // What it is made of has to be known before anybody is sent there.
        let Ok(programs) = shared.world.prepare(&name, &generation) else { continue };
        let (id, since) = (generation.id.clone(), shared.world.now());
        let generation = crate::rollout::generation::Generation { programs, ..generation };
        let known = plan::Known { generation, color: crate::rollout::view::Color::Blue, since };
        let environment = Environment {
            live: Some(id.clone()),
            forced: Some("it ran when the state was lost".into()),
            generations: BTreeMap::from([(id, known)]),
            ..Environment::default()
        };
        shared.world.warn(&format!("`{name}` has no state: what runs there is taken for what is live"));
        model.state.environments.insert(name, environment);
    }
}

/// Once, when the targets have told what there is: what ended before this daemon came is nobody's illness.
fn look_back(shared: &Shared, model: &mut Model) {
    let listed = model.targets().keys().all(|key| model.lists.get(key).is_some_and(|listing| listing.at.is_some()));
    if model.looked_back || !listed || model.reading.is_none() || model.read_only.is_some() {
        return;
    }
    model.looked_back = true;
    for name in model.names() {
        let seen = model.seen(&name, &shared.switch, Peers::default());
        let now = model.now(shared.world.as_ref());
        let mut environment = model.environment(&name);
        if environment.missed(model.look(&name, &seen, now)) {
            shared.world.warn(&format!("what serves `{name}` ended while nobody looked: it is started again, and not watched"));
            model.state.environments.insert(name, environment);
        }
    }
}

/// Plans every environment, and saves what changed; whether anything did.
fn decide(shared: &Shared, model: &mut Model) -> bool {
    let mut after = Plans::new();
    for name in model.names() {
        let peers = peers(model, &name, false);
        after.insert(name.clone(), next(shared, model, &name, peers));
    }
    // Those that belong together: again, when all of them can switch.
    for (_, members) in groups(model) {
        let ready = members.iter().all(|name| {
            let seen = model.seen(name, &shared.switch, Peers::default());
            let look = model.look(name, &seen, model.now(shared.world.as_ref()));
            after.get(name).is_some_and(|environment| environment.is_ready(look) || environment.is_settled(look))
        });
        for name in members.iter().filter(|_| ready) {
            let before = model.environment(name);
            if let Some(planned) = after.get(name).cloned() {
                model.state.environments.insert(name.clone(), planned);
                let peers = peers(model, name, true);
                let planned = next(shared, model, name, peers);
                model.state.environments.insert(name.clone(), before);
                after.insert(name.clone(), planned);
            }
        }
    }
    let before = model.state.clone();
    let mut state = before.clone();
    state.environments.extend(after);
    let wanted = model.reading.as_ref().map(|reading| reading.environments.keys().cloned().collect::<BTreeSet<_>>());
    // What nobody wants and nothing is left of.
    state.environments.retain(|name, environment| {
        let empty = environment.live.is_none() && environment.generations.is_empty();
        let is_wanted = wanted.as_ref().is_none_or(|wanted| wanted.contains(name));
        *environment != Environment::default() && (is_wanted || !empty)
    });
    let changed = state.environments != before.environments;
    state.steady = model.now(shared.world.as_ref()).steady;
    if (!changed && state.steady.saturating_sub(before.steady) < CLOCK) || model.read_only.is_some() {
        // What cannot be saved does not happen, but for what only follows what is seen.
        return false;
    }
    match shared.folder.save(&state) {
        Ok(()) => {
            for (name, environment) in &state.environments {
                let old = before.environments.get(name).cloned().unwrap_or_default();
                model.count(&old, environment, name);
            }
            model.unsaved = None;
            model.state = state;
            changed
        }
        Err(error) => {
            let text = format!("the state cannot be saved: {error:#}");
            if model.unsaved.as_ref() != Some(&text) {
                shared.world.warn(&text);
            }
            model.unsaved = Some(text);
            false
        }
    }
}

fn next(shared: &Shared, model: &mut Model, name: &str, peers: Peers) -> Environment {
    // A state that could not be saved is tried again, with everything that belongs to it.
    let unsaved = model.unsaved.take();
    let seen = model.seen(name, &shared.switch, peers);
    let now = model.now(shared.world.as_ref());
    let planned = plan::next(&model.environment(name), model.look(name, &seen, now));
    model.unsaved = unsaved;
    planned
}

/// The environments that switch together, by the name of their group.
fn groups(model: &Model) -> BTreeMap<String, Vec<String>> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, place) in model.reading.iter().flat_map(|reading| &reading.environments) {
        if let Some(group) = &place.wanted.together {
            groups.entry(group.clone()).or_default().push(name.clone());
        }
    }
    groups
}

/// What `name` has to know of those it belongs together with.
fn peers(model: &Model, name: &str, ready: bool) -> Peers {
    let Some((_, members)) = groups(model).into_iter().find(|(_, members)| members.iter().any(|member| member == name)) else {
        return Peers::default();
    };
    let own = model.environment(name);
    let mut peers = Peers { ready, failed: None, watched: true };
    let Some(rollout) = own.active() else { return peers };
    for other in members.iter().filter(|other| *other != name) {
        let Some(theirs) = model.environment(other).rollout else { continue };
        let same = match rollout.switched {
            Some(switched) => theirs.switched == Some(switched),
            None => theirs.switched.is_none(),
        };
        let over = theirs.ended.is_none_or(|ended| ended >= rollout.began);
        if !same || !over {
            continue;
        }
        let failed = theirs.failure.as_ref().map(|failure| failure.reason.clone());
        let failed = failed.or_else(|| {
            let outcome = theirs.outcome.as_ref()?;
            use crate::rollout::view::Result as Ending;
            matches!(outcome.result, Ending::Failed | Ending::Aborted).then(|| outcome.reason.clone())
        });
        if let Some(why) = failed {
            peers.failed = Some(format!("`{other}`: {why}"));
        }
        if theirs.outcome.is_none() && theirs.switched.is_some() && !theirs.watched {
            peers.watched = false;
        }
    }
    peers
}

/// Gives the switch what follows from the states; whether what is live changed.
fn serve(shared: &Shared, model: &mut Model) -> bool {
    let mut table = Table::default();
    let mut live = BTreeMap::new();
    for name in model.names() {
        let seen = model.seen(&name, &shared.switch, Peers::default());
        let environment = model.environment(&name);
        let now = model.now(shared.world.as_ref());
        let serving = plan::serving(&environment, model.look(&name, &seen, now));
        live.insert(name.clone(), serving.live.clone());
        let Some(place) = model.reading.as_ref().and_then(|reading| reading.environments.get(&name)) else {
            // As long as the ledger was not read, nobody knows the routes. The table before stays.
            if let Some(service) = model.table.services.get(&name).filter(|_| model.reading.is_none()) {
                table.services.insert(name, service.clone());
            }
            continue;
        };
        table.services.insert(name.clone(), service(model, &name, place, &environment, &serving, &seen));
    }
    if model.reading.is_none() || table == model.table {
        let changed = model.serving != live && model.reading.is_some();
        if changed {
            model.serving = live;
        }
        return changed;
    }
    match shared.switch.set(table.clone()) {
        Ok(()) => {
            for (name, id) in live.iter().filter_map(|(name, id)| Some((name, id.as_ref()?))) {
                if model.serving.get(name).and_then(Option::as_ref) != Some(id) {
                    model.bases.insert((name.clone(), id.clone()), shared.switch.figures(name, id));
                }
            }
            let states = &model.state.environments;
            model
                .bases
                .retain(|(name, id), _| states.get(name).is_some_and(|environment| environment.generations.contains_key(id)));
            (model.table, model.switch_error) = (table, None);
            let changed = model.serving != live;
            model.serving = live;
            changed
        }
        Err(error) => {
            let text = format!("{error:#}");
            let changed = model.switch_error.as_ref() != Some(&text);
            if changed {
                shared.world.warn(&format!("the switch does not take what follows: {text}"));
            }
            model.switch_error = Some(text);
            changed
        }
    }
}

/// One environment for the switch.
fn service(
    model: &Model,
    name: &str,
    place: &super::world::Place,
    environment: &Environment,
    serving: &Serving,
    seen: &plan::Seen,
) -> Service {
    let mut pools = BTreeMap::new();
    for id in &serving.pools {
        let Some(generation) = environment.known(id) else { continue };
        let found = model.lists.values().flat_map(|listing| listing.found.iter().map(|found| (found, listing.error.is_some())));
        let own = found.filter(|(found, _)| found.environment == name && found.generation == *id);
        let mut instances = Vec::new();
        for (found, is_doubtful) in own {
            let port = generation.programs.get(&found.target).and_then(|program| program.port);
            if let (Some(address), Some(port)) = (&found.address, port) {
                let healthy = seen.instances.get(&found.id).is_some_and(|instance| instance.healthy);
                let fell_ill = model.pulses.get(&found.id).is_some_and(|pulse| pulse.healthy == Some(false));
                if healthy || !is_doubtful || !fell_ill {
                    instances.push((healthy, Instance { id: found.id.clone(), address: address.clone(), port }));
                }
            }
        }
        // Ill ones get nothing, unless all are.
        let any = instances.iter().any(|(healthy, _)| *healthy);
        let mut pool: Vec<Instance> = instances.into_iter().filter(|(healthy, _)| *healthy || !any).map(|(_, one)| one).collect();
        pool.sort_by(|a, b| a.id.cmp(&b.id));
        pools.insert(id.clone(), pool);
    }
    let settings = &place.wanted.settings;
    let hold = settings.hold.duration();
    let mode = match &serving.maintenance {
        Some(message) => Mode::Maintenance { message: message.clone() },
        None if serving.hold => Mode::Hold { longest: hold },
        None => Mode::Serve,
    };
    // While requests wait, what is in flight may take no longer than they do.
    let most = |time: Duration| if serving.hold { time.min(hold) } else { time };
    let (requests, streams) = (most(settings.drain.duration()), most(settings.streams.duration()));
    let live = serving.live.clone().filter(|live| pools.contains_key(live));
    let preview = serving.preview.as_ref().filter(|id| pools.contains_key(*id));
    let preview = settings.preview.clone().zip(preview.cloned());
    Service { routes: place.routes.clone(), pools, live, preview, mode, drain: Drain { requests, streams, spread: streams / 4 } }
}

/// Hands out what is to be done; whether something goes on.
fn act(shared: &Arc<Shared>, model: &mut Model) -> bool {
    let mut busy = false;
    for name in model.names() {
        let environment = model.environment(&name);
        let seen = model.seen(&name, &shared.switch, Peers::default());
        let now = model.now(shared.world.as_ref());
        let actions = plan::actions(&environment, model.look(&name, &seen, now));
        let waits = environment.active().is_some_and(|rollout| rollout.phase != Phase::Waiting);
        busy = busy || !actions.is_empty() || waits || !seen.draining.is_empty();
        for action in actions {
            work::begin(shared, model, &name, action);
        }
    }
    busy
}
