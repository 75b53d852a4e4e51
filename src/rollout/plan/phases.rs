//! The way forward of a rollout: each phase, and what ends it.

use super::{Environment, Failure, Instance, Look, Rollout, Warm};
use crate::rollout::generation::Place;
use crate::rollout::view::{Phase, Result as Ending};

/// Ends of the program until green counts as one that does not start: with the supervisors' pauses about 4 s.
const RESTARTS_MAX: u32 = 3;
/// How often an instance is tried to be started.
const STARTS_MAX: u32 = 5;
/// How often green may fall ill between its first health and the switch.
const RELAPSES_MAX: u32 = 5;
/// How long, in milliseconds, an instance may be ill after the switch before that counts: a lost probe is no illness.
const ILL_MAX: u64 = 3_000;
/// Milliseconds by which green has to be slower than blue to be worse at all: what is very fast doubles by itself.
const SLOWER_MIN: f64 = 25.0;

impl Environment {
    /// One transition of the rollout that goes on.
    pub(super) fn rollout_step(&mut self, look: Look<'_>) -> bool {
        let Some(rollout) = self.active() else { return false };
        let (phase, green) = (rollout.phase, rollout.generation.clone());
        if phase == Phase::RollingBack {
            return self.back_step(look);
        }
        if look.seen.read_only.is_some() {
            return false;
        }
        if let Some(abort) = self.abort.take() {
            let reason = if abort.reason.is_empty() { String::new() } else { format!(": {}", abort.reason) };
            self.fail(look, Ending::Aborted, format!("aborted by {}{reason}", abort.by), None);
            return true;
        }
        let wanted = look.target().map(|generation| (generation.id.as_str(), generation.version.as_str()));
        if let Some((_, version)) = wanted.filter(|(id, _)| *id != green) {
            return self.supersede(look, version);
        }
        match phase {
            Phase::Waiting => self.wait(look),
            Phase::Starting => self.start(look),
            Phase::PreSwitch => self.check(look),
            Phase::Switching => self.switch(look),
            Phase::PostSwitch => self.check_again(look),
            Phase::Watching => self.watch(look),
            Phase::RollingBack | Phase::Done | Phase::Failed => false,
        }
    }

    /// A newer decision takes the place of the rollout. Where blue was stopped for it, it first comes back.
    fn supersede(&mut self, look: Look<'_>, version: &str) -> bool {
        let Some(rollout) = self.active() else { return false };
        let reason = format!("the ledger wants {version} now");
        if self.live.is_none() && rollout.exclusive && rollout.from.is_some() {
            self.fail(look, Ending::Superseded, reason, None);
        } else {
            // Blue of this rollout stays until the next one has begun, which may be about going back to it.
            let (switched, from) = (rollout.switched.is_some(), rollout.from.clone());
            self.end(look, Ending::Superseded, &reason);
            if let Some(generation) = from.filter(|_| switched) {
                self.keep_warm(look, generation);
            }
        }
        true
    }

    pub(super) fn keep_warm(&mut self, look: Look<'_>, generation: String) {
        let warm = look.settings().warm.0.saturating_mul(1000);
        let exclusive = self.rollout.as_ref().is_some_and(|rollout| rollout.exclusive);
        self.warm = (!exclusive && warm > 0).then(|| Warm { generation, until: look.now.steady.saturating_add(warm) });
    }

    pub(super) fn enter(&mut self, look: Look<'_>, phase: Phase, text: impl Into<String>) {
        if let Some(rollout) = &mut self.rollout {
            (rollout.phase, rollout.entered) = (phase, look.now.steady);
        }
        self.note(look.now, text);
    }

    /// Turns round.
    pub(super) fn fail(&mut self, look: Look<'_>, result: Ending, reason: impl Into<String>, instance: Option<String>) {
        let reason = reason.into();
        if let Some(rollout) = &mut self.rollout {
            let logged = instance.is_none();
            rollout.failure = Some(Failure { result, reason: reason.clone(), instance, log: Vec::new(), logged });
        }
        self.enter(look, Phase::RollingBack, reason);
    }

    fn wait(&mut self, look: Look<'_>) -> bool {
        if self.peer_failed(look) {
            return true;
        }
        if self.paused.is_some() {
            return false;
        }
        self.enter(look, Phase::Starting, "start");
        true
    }

    /// Something that belongs together with this failed: not at all, then.
    fn peer_failed(&mut self, look: Look<'_>) -> bool {
        let Some(peer) = &look.seen.peers.failed else { return false };
        self.fail(look, Ending::Failed, format!("it switches together with {peer}"), None);
        true
    }

    /// Until all instances are healthy.
    fn start(&mut self, look: Look<'_>) -> bool {
        if self.peer_failed(look) {
            return true;
        }
        let Some(rollout) = self.active() else { return false };
        let (entered, id, began) = (rollout.entered, rollout.generation.clone(), rollout.began);
        let blue = rollout.from.clone().filter(|_| rollout.exclusive);
        let Some(generation) = self.known(&id).cloned() else { return false };
        if let Some(Err(unprepared)) = look.seen.prepared.get(&id).filter(|_| !generation.is_prepared())
            && unprepared.is_final
        {
            self.fail(look, Ending::Failed, unprepared.reason.clone(), None);
            return true;
        }
        // Blue gives way, as late as possible: not before it is known that green can be started at all.
        if generation.is_prepared() && self.live.is_some() && self.live == blue {
            self.live = None;
            self.health = None;
            self.enter(look, Phase::Starting, "requests wait: blue gives its volumes to green");
            return true;
        }
        if generation.is_prepared() && look.all_healthy(&generation) {
            let (healthy, wanted) = look.healthy(&generation);
            self.last_start = Some(look.now.steady.saturating_sub(began));
            self.enter(look, Phase::PreSwitch, format!("healthy {healthy}/{wanted}"));
            return true;
        }
        let own =
            |(id, instance): (&String, &Instance)| (instance.generation == generation.id).then(|| (id.clone(), instance.clone()));
        let mut own = look.seen.instances.iter().filter_map(own);
        if let Some((instance, found)) = own.find(|(_, found)| !found.healthy && found.restarts >= RESTARTS_MAX) {
            let last = found.last.map(|last| format!("; the last probe: {last}")).unwrap_or_default();
            let reason = format!("`{instance}` ended {} times before it was healthy{last}", found.restarts);
            self.fail(look, Ending::Failed, reason, Some(instance));
            return true;
        }
        let places = generation.places(look.name);
        let refused = places.iter().find_map(|place| Some((place, look.seen.start_errors.get(&place.id)?)));
        if let Some((place, (error, _))) = refused.filter(|(_, (_, tries))| *tries >= STARTS_MAX) {
            self.fail(look, Ending::Failed, format!("`{}` cannot be started: {error}", place.id), None);
            return true;
        }
        let deadline = super::start_limit(&look.settings(), Some(&generation), blue.is_some());
        if look.now.steady.saturating_sub(entered) < deadline {
            return false;
        }
        let (healthy, wanted) = look.healthy(&generation);
        let ill = places.iter().find(|place| !look.seen.instances.get(&place.id).is_some_and(|instance| instance.healthy));
        let said = ill.and_then(|place| look.seen.instances.get(&place.id)?.last.clone());
        let unprepared =
            look.seen.prepared.get(&id).and_then(|prepared| prepared.as_ref().err()).map(|error| error.reason.clone());
        let why = unprepared.filter(|_| !generation.is_prepared()).or(said).or(refused.map(|(_, (error, _))| error.clone()));
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let reason = format!("{healthy}/{wanted} healthy after {} s{why}", deadline / 1000);
        let there = ill.map(|place| place.id.clone()).filter(|id| look.seen.instances.contains_key(id));
        self.fail(look, Ending::Failed, reason, there);
        true
    }

    /// Green fell ill before the switch: back to waiting for its health.
    fn relapsed(&mut self, look: Look<'_>) -> bool {
        let Some(rollout) = &mut self.rollout else { return false };
        let Some(known) = self.generations.get(&rollout.generation) else { return false };
        let places = known.generation.places(look.name);
        let Some(ill) = places.iter().find(|place| look.ill(place).is_some()) else { return false };
        rollout.relapses += 1;
        let relapses = rollout.relapses;
        let last = look.seen.instances.get(&ill.id).and_then(|instance| instance.last.clone());
        let last = last.map(|last| format!(": {last}")).unwrap_or_default();
        if relapses > RELAPSES_MAX {
            let reason = format!("`{}` fell ill {relapses} times before the switch{last}", ill.id);
            self.fail(look, Ending::Failed, reason, Some(ill.id.clone()));
        } else {
            self.enter(look, Phase::Starting, format!("`{}` is not healthy any more{last}", ill.id));
        }
        true
    }

    /// The checks before the switch, and who has to wait there.
    fn check(&mut self, look: Look<'_>) -> bool {
        if self.peer_failed(look) || self.relapsed(look) {
            return true;
        }
        let Some(rollout) = self.active() else { return false };
        if !self.known(&rollout.generation).is_some_and(|green| look.all_healthy(green)) {
            return false;
        }
        if !look.settings().pre_switch.is_empty() {
            match look.seen.checked.get(&(rollout.generation.clone(), false)) {
                None => return false,
                Some(Ok(_)) => {}
                Some(Err(why)) => {
                    self.fail(look, Ending::Failed, format!("the check before the switch says no: {why}"), None);
                    return true;
                }
            }
        }
        if self.paused.is_some() {
            return false;
        }
        self.enter(look, Phase::Switching, "ready to switch");
        true
    }

    /// Whether it would switch now if it were alone.
    pub fn is_ready(&self, look: Look<'_>) -> bool {
        let green = self.active().filter(|rollout| rollout.phase == Phase::Switching && self.paused.is_none());
        green.and_then(|rollout| self.known(&rollout.generation)).is_some_and(|green| look.all_healthy(green))
    }

    /// Whether nothing is to switch here.
    pub fn is_settled(&self, look: Look<'_>) -> bool {
        let wanted = look.target().map(|generation| &generation.id);
        self.active().is_none_or(|rollout| rollout.switched.is_some())
            && (wanted.is_none() || wanted == self.live.as_ref() || wanted == self.given_up.as_ref())
    }

    fn switch(&mut self, look: Look<'_>) -> bool {
        if self.peer_failed(look) || self.relapsed(look) {
            return true;
        }
        if !self.is_ready(look) || !look.seen.peers.ready {
            return false;
        }
        let Some(rollout) = &mut self.rollout else { return false };
        let blue = rollout.from.clone();
        rollout.baseline = blue.as_ref().map(|blue| look.seen.figures.get(blue).copied().unwrap_or_default());
        rollout.switched = Some(look.now.steady);
        let green = rollout.generation.clone();
        self.make_live(look, green, None);
        self.enter(look, Phase::PostSwitch, "switched");
        true
    }

    pub(super) fn make_live(&mut self, look: Look<'_>, id: String, forced: Option<String>) {
        if let Some(known) = self.generations.get_mut(&id) {
            known.since = look.now.wall;
        }
        self.live = Some(id);
        self.forced = forced;
        self.health = None;
    }

    /// The switch has to have it; then the checks after it.
    fn check_again(&mut self, look: Look<'_>) -> bool {
        if self.went_wrong(look) {
            return true;
        }
        let Some(rollout) = self.active() else { return false };
        if look.seen.serving.as_deref() != Some(&rollout.generation) {
            let Some(error) = &look.seen.switch_error else { return false };
            self.fail(look, Ending::Failed, format!("the switch does not take it: {error}"), None);
            return true;
        }
        if !look.settings().post_switch.is_empty() {
            match look.seen.checked.get(&(rollout.generation.clone(), true)) {
                None => return false,
                Some(Ok(_)) => {}
                Some(Err(why)) => {
                    self.fail(look, Ending::Failed, format!("the check after the switch says no: {why}"), None);
                    return true;
                }
            }
        }
        self.enter(look, Phase::Watching, "watch");
        true
    }

    /// What ends a rollout after the switch: an illness, or a failure of one that switched with it.
    fn went_wrong(&mut self, look: Look<'_>) -> bool {
        if self.peer_failed(look) {
            return true;
        }
        let Some(rollout) = self.active() else { return false };
        let Some(green) = self.known(&rollout.generation) else { return false };
        let places = green.places(look.name);
        let sick: Vec<_> = places.iter().filter_map(|place| Some((place, look.ill(place)?))).collect();
        let all = sick.len() == places.len();
        let Some((place, _)) = sick.iter().find(|(_, time)| all || *time >= ILL_MAX) else { return false };
        let last = look.seen.instances.get(&place.id).and_then(|instance| instance.last.clone());
        let last = last.map(|last| format!(": {last}")).unwrap_or_default();
        let reason = format!("`{}` is not healthy any more after the switch{last}", place.id);
        let instance = look.seen.instances.contains_key(&place.id).then(|| place.id.clone());
        self.fail(look, Ending::Failed, reason, instance);
        true
    }

    fn watch(&mut self, look: Look<'_>) -> bool {
        if self.went_wrong(look) {
            return true;
        }
        let Some(rollout) = self.active() else { return false };
        if let Some(why) = worse(rollout, look) {
            self.fail(look, Ending::Failed, why, None);
            return true;
        }
        if rollout.watched {
            if !look.seen.peers.watched {
                return false;
            }
            if let Some(blue) = rollout.from.clone() {
                self.keep_warm(look, blue);
            }
            self.end(look, Ending::Succeeded, "");
            return true;
        }
        let watch = look.settings().watch;
        // A rollback is not watched: what it left was worse, and what it came to was watched when it came first.
        let period = if rollout.from.is_none() || rollout.is_rollback { 0 } else { watch.period.0.saturating_mul(1000) };
        if look.now.steady.saturating_sub(rollout.entered) < period {
            return false;
        }
        let green = look.seen.figures.get(&rollout.generation).copied().unwrap_or_default();
        let text = match period {
            0 => "nothing to compare with".into(),
            _ if green.requests < watch.minimum => format!("{} requests are too few to compare", green.requests),
            _ => format!("as good as blue: {} of {} requests failed", green.errors, green.requests),
        };
        if let Some(rollout) = &mut self.rollout {
            rollout.watched = true;
        }
        self.note(look.now, text);
        true
    }
}

/// Why green does worse than blue did.
fn worse(rollout: &Rollout, look: Look<'_>) -> Option<String> {
    let blue = rollout.baseline.filter(|_| rollout.from.is_some() && !rollout.is_rollback)?;
    let watch = look.settings().watch;
    let green = look.seen.figures.get(&rollout.generation).copied().unwrap_or_default();
    if watch.period.0 == 0 || green.requests < watch.minimum.max(1) {
        return None;
    }
    let allowed = blue.share() + watch.errors;
    if green.share() > allowed {
        return Some(format!(
            "{} of {} requests failed after the switch, {:.1} % where {:.1} % are allowed",
            green.errors,
            green.requests,
            green.share() * 100.0,
            allowed * 100.0
        ));
    }
    let (was, is) = (blue.p99.filter(|_| blue.requests >= watch.minimum.max(1))?, green.p99?);
    (is > was * watch.latency && is - was > SLOWER_MIN)
        .then(|| format!("the 99th percentile of latency is {is:.0} ms after the switch and was {was:.0} ms"))
}

impl Look<'_> {
    /// For how many milliseconds an instance has been ill; `None`: it is well, or nobody knows yet. What is not there is ill.
    fn ill(&self, place: &Place) -> Option<u64> {
        match self.seen.instances.get(&place.id) {
            None => (!self.seen.blind.contains(&place.target)).then_some(ILL_MAX),
            Some(instance) if instance.healthy => None,
            Some(instance) => instance.ill_since.map(|since| self.now.steady.saturating_sub(since)),
        }
    }
}
