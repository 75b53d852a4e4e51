//! What follows from a state: worked out from it and from what is seen alone, so that it is found again after any kill.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{Environment, Look, Verdict};
use crate::release::decision::Status;
use crate::rollout::generation::{Generation, Place};
use crate::rollout::target::Running;
use crate::rollout::view::Phase;

/// Something to do. All may be done twice; what is under way already is not begun again by whoever does them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Find out what the generation is made of.
    Prepare {
        generation: String,
    },
    Start {
        generation: String,
        id: String,
    },
    /// Ask it to end; `forget`: its log goes too.
    Stop {
        target: String,
        id: String,
        forget: bool,
    },
    /// Nothing of the generation is there: remove its logs.
    Forget {
        generation: String,
    },
    /// Run the checks of the settings upon the generation, before or after the switch.
    Check {
        generation: String,
        after: bool,
    },
    /// Fetch the last lines.
    Log {
        generation: String,
        id: String,
    },
    Tell(Verdict),
    Report(Status),
}

/// What the switch is to do for an environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Serving {
    pub live: Option<String>,
    /// Everything that gets or may still have requests, the live one too.
    pub pools: BTreeSet<String>,
    /// Green, before the switch.
    pub preview: Option<String>,
    /// Requests wait: volumes change hands.
    pub hold: bool,
    pub maintenance: Option<String>,
}

/// What is to be done now.
pub fn actions(environment: &Environment, look: Look<'_>) -> Vec<Action> {
    let mut actions = stops(environment, look);
    for known in environment.generations.values() {
        let generation = &known.generation;
        let is_live = environment.live.as_deref() == Some(&generation.id);
        // While nothing may change, only what serves is kept up.
        if !environment.runs(&generation.id) || look.seen.read_only.is_some() && !is_live {
            continue;
        }
        if !generation.is_prepared() {
            actions.push(Action::Prepare { generation: generation.id.clone() });
        } else if starts(environment, generation) && is_free(environment, generation, look) {
            let missing =
                |place: &Place| !look.seen.instances.contains_key(&place.id) && !look.seen.blind.contains(&place.target);
            let places = generation.places(look.name).into_iter().filter(missing);
            actions.extend(places.map(|place| Action::Start { generation: generation.id.clone(), id: place.id }));
        }
    }
    actions.extend(forgets(environment, look));
    if let Some(rollout) = environment.active().filter(|_| look.seen.read_only.is_none()) {
        let settings = look.settings();
        let generation = rollout.generation.clone();
        let check = |after: bool| Action::Check { generation: generation.clone(), after };
        let unasked = |after: bool| !look.seen.checked.contains_key(&(generation.clone(), after));
        match rollout.phase {
            Phase::PreSwitch if !settings.pre_switch.is_empty() && unasked(false) => actions.push(check(false)),
            Phase::PostSwitch if !settings.post_switch.is_empty() && unasked(true) && is_serving(&generation, look) => {
                actions.push(check(true));
            }
            _ => {}
        }
        if let Some(failure) = rollout.failure.as_ref().filter(|failure| !failure.logged)
            && let Some(id) = &failure.instance
            && !look.seen.logs.contains_key(id)
        {
            actions.push(Action::Log { generation: generation.clone(), id: id.clone() });
        }
    }
    actions.extend(environment.verdict.clone().filter(|_| look.seen.read_only.is_none()).map(Action::Tell));
    actions.extend(environment.report(look).map(Action::Report));
    actions
}

fn is_serving(generation: &str, look: Look<'_>) -> bool {
    look.seen.serving.as_deref() == Some(generation)
}

/// What belongs to nothing any more, and what does not come back by itself and stands in the way of a new start.
fn stops(environment: &Environment, look: Look<'_>) -> Vec<Action> {
    let mut actions = Vec::new();
    for (id, instance) in &look.seen.instances {
        if look.seen.blind.contains(&instance.target) {
            continue;
        }
        let generation = environment.known(&instance.generation);
        let is_ours = generation.is_some_and(|generation| generation.places(look.name).iter().any(|place| place.id == *id));
        let runs = is_ours && environment.runs(&instance.generation);
        let ended = matches!(instance.status, Running::Ended { .. });
        let stop = |forget: bool| Action::Stop { target: instance.target.clone(), id: id.clone(), forget };
        if runs && ended && generation.is_some_and(|generation| starts(environment, generation)) {
            actions.push(stop(false));
        } else if !runs && !look.seen.draining.contains(&instance.generation) && look.seen.read_only.is_none() {
            // The log of the last rollout is kept, for people.
            let named = environment.rollout.as_ref().is_some_and(|rollout| rollout.generation == instance.generation);
            // The switch must not have it any more.
            if look.seen.serving.as_deref() != Some(&instance.generation) {
                actions.push(stop(!named));
            }
        }
    }
    actions
}

/// Whether instances of a generation that runs are started when they are missing.
fn starts(environment: &Environment, generation: &Generation) -> bool {
    let is = |id: &Option<String>| id.as_deref() == Some(&generation.id);
    if is(&environment.live) {
        return true;
    }
    let Some(rollout) = environment.active() else { return false };
    let is_green = rollout.generation == generation.id;
    match rollout.phase {
        Phase::Waiting | Phase::Done | Phase::Failed => false,
        // Green stays for its log only.
        Phase::RollingBack => !is_green && is(&rollout.from),
        _ => is_green && !waits_for_blue(environment),
    }
}

/// Whether blue still has what green needs alone.
fn waits_for_blue(environment: &Environment) -> bool {
    environment
        .active()
        .is_some_and(|rollout| rollout.exclusive && environment.live.is_some() && environment.live == rollout.from)
}

/// Whether nothing is there that must not run beside it.
fn is_free(environment: &Environment, generation: &Generation, look: Look<'_>) -> bool {
    if !generation.is_exclusive() {
        return look.seen.instances.values().all(|instance| {
            let other = environment.known(&instance.generation);
            other.is_none_or(|other| !other.excludes(generation))
        });
    }
    // What is not known may hold the volume.
    look.seen.blind.is_empty()
        && look.seen.instances.values().all(|instance| {
            instance.generation == generation.id
                || environment.known(&instance.generation).is_some_and(|other| !other.excludes(generation))
        })
}

fn forgets(environment: &Environment, look: Look<'_>) -> Vec<Action> {
    let unused = environment
        .generations
        .keys()
        .filter(|id| !environment.needs(id) && !look.seen.forgotten.contains(*id) && !look.is_there(id));
    unused.map(|id| Action::Forget { generation: id.clone() }).collect()
}

/// What the switch is to do.
pub fn serving(environment: &Environment, look: Look<'_>) -> Serving {
    let rollout = environment.active();
    let mut pools: BTreeSet<String> = environment.generations.keys().filter(|id| environment.runs(id)).cloned().collect();
    pools.extend(look.seen.draining.iter().filter(|id| environment.generations.contains_key(*id)).cloned());
    let before_switch = rollout.filter(|rollout| rollout.switched.is_none() && !rollout.phase.is_last());
    let preview = before_switch.filter(|rollout| !matches!(rollout.phase, Phase::Waiting | Phase::RollingBack));
    let hold = environment.live.is_none() && rollout.is_some_and(|rollout| rollout.exclusive && rollout.from.is_some());
    Serving {
        live: environment.live.clone(),
        pools,
        preview: preview.map(|rollout| rollout.generation.clone()),
        hold,
        maintenance: environment.maintenance.clone(),
    }
}
