//! The commit message of a decision: a line for people, the reason, and trailers that `git log` can select by.
//!
//! Everything in it is in the committed file too; the message is for whoever reads the history with Git alone.

use super::decision::{Decision, Kind, Verdict};
use super::state::State;

/// The message of the decision that made `after`.
pub fn of_state(after: &State) -> String {
    let decision = &after.decision;
    let what = match (decision.kind, &decision.version, &decision.to) {
        (Kind::Configure, _, None) => "configure, waiting for a promotion".to_owned(),
        (kind, Some(version), Some(release)) => format!("{kind} {version} ({})", release.short()),
        (kind, None, Some(release)) => format!("{kind} {}", release.short()),
        (kind, _, None) => kind.to_string(),
    };
    let mut lines = trailers(decision, &after.pipeline, &after.environment);
    // What it is about (an approval is of a configuration that may be none yet), else what is there.
    let config = decision.config.or_else(|| after.current.as_ref().map(|binding| binding.config.digest()));
    lines.push(("Config", config.map_or_else(none, |digest| digest.to_string())));
    lines.extend(decision.author.as_deref().map(|author| ("Author", one_line(author))));
    whole(&format!("{}: {what}", after.name()), decision, lines)
}

/// The message of a decision that is about a whole pipeline (`environment apply`).
pub fn of_policy(decision: &Decision, pipeline: &str) -> String {
    whole(&format!("{pipeline}: {}", decision.kind), decision, trailers(decision, pipeline, "*"))
}

/// The message of an emergency stop over all pipelines, or of its end.
pub fn of_frozen(decision: &Decision, environment: &str) -> String {
    whole(&format!("*/{environment}: {} all", decision.kind), decision, trailers(decision, "*", environment))
}

fn none() -> String {
    "none".to_owned()
}

fn trailers(decision: &Decision, pipeline: &str, environment: &str) -> Vec<(&'static str, String)> {
    let release = |digest: &Option<crate::oci::digest::Digest>| digest.map_or_else(none, |digest| digest.to_string());
    vec![
        ("Decision", decision.kind.to_string()),
        ("Pipeline", pipeline.to_owned()),
        ("Environment", environment.to_owned()),
        ("Actor", one_line(&decision.actor)),
        ("From", release(&decision.from)),
        ("To", release(&decision.to)),
    ]
}

fn whole(subject: &str, decision: &Decision, mut lines: Vec<(&'static str, String)>) -> String {
    for answer in &decision.gates {
        let loud = if answer.verdict == Verdict::Overridden { "OVERRIDDEN" } else { "" };
        let verdict = if loud.is_empty() { answer.verdict.to_string() } else { loud.to_owned() };
        lines.push(("Gate", format!("{} {verdict} {}", answer.gate, one_line(&answer.reason))));
    }
    if decision.lift {
        lines.push(("Lift", "yes".to_owned()));
    }
    lines.extend(decision.until.map(|until| ("Until", until.to_string())));
    lines.extend(decision.health.map(|status| ("Health", status.to_string())));
    if decision.automatic {
        lines.push(("Automatic", "yes".to_owned()));
    }
    lines.push(("Time", decision.time.to_string()));
    let loud =
        if decision.overrides.is_empty() { String::new() } else { format!(" OVERRIDING {}", decision.overrides.join(", ")) };
    let reason = reason(&decision.reason);
    let gap = if reason.is_empty() { String::new() } else { format!("{reason}\n\n") };
    let trailers: String = lines.into_iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
    format!("{}{loud}\n\n{gap}{trailers}", one_line(subject))
}

/// The reason as it was given, so that no line of it can be taken for a trailer of ours: the trailers are the last
/// paragraph, and blank lines at its end go.
fn reason(text: &str) -> String {
    text.replace('\r', "").trim().to_owned()
}

fn one_line(text: &str) -> String {
    text.split(|c: char| c.is_control()).collect::<Vec<_>>().join(" ").trim().to_owned()
}
