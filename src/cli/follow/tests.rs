//! Views as a daemon gives them, and what is made of them.

use jiff::Timestamp;

use super::{Follower, Until, Wanted, promise};
use crate::cli::daemon::tests::view;
use crate::oci::digest::Digest;
use crate::rollout::view::{Color, InstanceView, Outcome, Pair, Phase, Progress, Promise, Result as Ended, Side, Step, View};

pub(in crate::cli) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

pub(in crate::cli) fn digest(digit: char) -> Digest {
    format!("sha256:{}", digit.to_string().repeat(64)).parse().unwrap()
}

/// Release `digit`, with configuration `c`.
pub(in crate::cli) fn side(color: Color, digit: char, healthy: u32) -> Side {
    let generation = digit.to_string().repeat(12);
    let instance = |number: u32| InstanceView {
        id: format!("shop-prod-{generation}-main-{number}"),
        target: "main".into(),
        kind: "local".into(),
        status: "running".into(),
        healthy: number < healthy,
        restarts: 0,
        last_probe: (number >= healthy).then(|| "status 503".into()),
        memory: Some(12_000_000),
        notes: Vec::new(),
    };
    Side {
        color,
        generation: generation.clone(),
        release: digest(digit),
        version: format!("1.{digit}"),
        config: digest('c'),
        instances: (0..2).map(instance).collect(),
        healthy,
        wanted: 2,
        since: at(0),
        requests: 7,
        errors: 0,
        in_flight: 0,
        websockets: 0,
        streams: 0,
        warm_until: None,
    }
}

pub(in crate::cli) fn rollout(digit: char, since: i64, phase: Phase, steps: &[(Phase, f64, &str)]) -> Progress {
    let step = |(phase, seconds, text): &(Phase, f64, &str)| Step {
        phase: *phase,
        at: at(since),
        seconds: *seconds,
        text: (*text).into(),
    };
    Progress {
        generation: digit.to_string().repeat(12),
        version: format!("1.{digit}"),
        release: digest(digit),
        config: digest('c'),
        phase,
        since: at(since),
        deadline: None,
        paused: false,
        steps: steps.iter().map(step).collect(),
        outcome: None,
    }
}

fn ended(rollout: Progress, result: Ended, reason: &str) -> Progress {
    let log = if result == Ended::Failed { vec!["boom".to_owned()] } else { Vec::new() };
    Progress { outcome: Some(Outcome { result, reason: reason.into(), log }), ..rollout }
}

fn wanted(until: Until) -> Wanted {
    Wanted { name: "shop/prod".into(), release: digest('2'), config: digest('c'), since: at(10), until }
}

/// Shows the views one after another: all lines, and how it ended.
fn shown(wanted: &Wanted, views: &[View]) -> (Vec<String>, Option<(bool, String)>) {
    let mut follower = Follower::default();
    let mut lines = Vec::new();
    for view in views {
        let (more, end) = follower.see(view, wanted);
        lines.extend(more);
        if let Some(end) = end {
            return (lines, Some((end.good, end.text)));
        }
    }
    (lines, None)
}

fn running(live: Option<Side>, other: Option<Side>, rollout: Option<Progress>) -> View {
    View { live, other, rollout, ..view("shop/prod") }
}

#[test]
fn a_rollout_from_start_to_end() {
    let (blue, green) = (side(Color::Blue, '1', 2), |healthy| side(Color::Green, '2', healthy));
    let start = (Phase::Starting, 0.0, "starting 2 instances of green");
    let healthy = (Phase::Starting, 4.2, "healthy 2/2");
    let switch = (Phase::Switching, 0.0, "green serves");
    let before = ended(rollout('1', 0, Phase::Done, &[]), Ended::Succeeded, "");
    let views = [
        running(Some(blue.clone()), None, Some(before)),
        running(Some(blue.clone()), Some(green(0)), Some(rollout('2', 10, Phase::Starting, &[start]))),
        running(Some(blue.clone()), Some(green(1)), Some(rollout('2', 10, Phase::Starting, &[start]))),
        running(Some(blue.clone()), Some(green(1)), Some(rollout('2', 10, Phase::Starting, &[start]))),
        running(Some(blue.clone()), Some(green(2)), Some(rollout('2', 10, Phase::PreSwitch, &[start, healthy]))),
        running(Some(green(2)), Some(blue.clone()), Some(rollout('2', 10, Phase::Watching, &[start, healthy, switch]))),
        running(
            Some(green(2)),
            Some(blue),
            Some(ended(rollout('2', 10, Phase::Done, &[start, healthy, switch]), Ended::Succeeded, "")),
        ),
    ];
    let lines = [
        "starting: starting 2 instances of green",
        "healthy 0/2: shop-prod-222222222222-main-0 says status 503",
        "healthy 1/2: shop-prod-222222222222-main-1 says status 503",
        "starting: healthy 2/2 (4.2 s)",
        "switching: green serves",
    ];
    let end = Some((true, "shop/prod: 1.2 serves (green, healthy 2/2)".to_owned()));
    assert_eq!(shown(&wanted(Until::Done), &views), (lines.map(str::to_owned).to_vec(), end.clone()));
    assert_eq!(shown(&wanted(Until::Done), &views[..6]).1, None);
    // A rollback waits for the switch only.
    assert_eq!(shown(&wanted(Until::Switch), &views[..6]).1, end);
    assert_eq!(shown(&wanted(Until::Switch), &views[..5]).1, None);
}

#[test]
fn ends_of_all_kinds() {
    let (blue, green) = (side(Color::Blue, '1', 2), side(Color::Green, '2', 2));
    let case =
        |live: Option<&Side>, rollout: Option<Progress>| shown(&wanted(Until::Done), &[running(live.cloned(), None, rollout)]).1;
    let wants = |digit: char, live: Option<&Side>, rollout: Option<Progress>| {
        let wants = Some(Pair { release: digest(digit), version: format!("1.{digit}"), config: digest('c') });
        shown(&wanted(Until::Done), &[View { wanted: wants, ..running(live.cloned(), None, rollout) }]).1
    };
    let ours = |result, reason: &str| Some(ended(rollout('2', 10, Phase::Failed, &[]), result, reason));
    let bad = |text: &str| Some((false, text.to_owned()));
    let serves = Some((true, "shop/prod: 1.2 serves (green, healthy 2/2)".to_owned()));
    let cases = [
        (
            case(Some(&blue), ours(Ended::Failed, "never healthy: status 503")),
            bad("shop/prod: the rollout of 1.2 failed: never healthy: status 503; 1.1 serves"),
        ),
        (case(None, ours(Ended::Failed, "")), bad("shop/prod: the rollout of 1.2 failed; nothing serves")),
        (case(Some(&blue), ours(Ended::Aborted, "by ada")), bad("shop/prod: the rollout of 1.2 was aborted: by ada; 1.1 serves")),
        (
            case(Some(&blue), ours(Ended::Superseded, "")),
            bad("shop/prod: the rollout of 1.2 was superseded by a newer decision; 1.1 serves"),
        ),
        // Nothing had to be done, with and without a rollout before.
        (case(Some(&green), None), serves.clone()),
        (case(Some(&green), Some(ended(rollout('1', 3, Phase::Done, &[]), Ended::Succeeded, ""))), serves),
        // Somebody else's goes on; ours is to come.
        (case(Some(&blue), Some(rollout('3', 9, Phase::Starting, &[]))), None),
        (case(Some(&blue), Some(ended(rollout('2', 3, Phase::Failed, &[]), Ended::Failed, "an old try"))), None),
        (
            wants('3', Some(&blue), Some(rollout('3', 12, Phase::Starting, &[]))),
            bad("shop/prod: a newer decision took this one's place: 1.3 is wanted"),
        ),
        (wants('3', Some(&blue), None), bad("shop/prod: a newer decision took this one's place: 1.3 is wanted")),
        // One that began in the second of the decision goes first; the daemon cannot begin ours at once.
        (wants('2', Some(&blue), Some(rollout('3', 10, Phase::Watching, &[]))), None),
        (wants('2', Some(&blue), Some(ended(rollout('3', 10, Phase::Done, &[]), Ended::Succeeded, ""))), None),
        // Ours failed, and the daemon has told the ledger.
        (wants('1', Some(&blue), ours(Ended::Failed, "x")), bad("shop/prod: the rollout of 1.2 failed: x; 1.1 serves")),
        (case(None, None), None),
    ];
    for (index, (found, expected)) in cases.into_iter().enumerate() {
        assert_eq!(found, expected, "case {index}");
    }
    // The clock went back: the rollout that was shown is still ours when it ends.
    let views = [rollout('2', 4, Phase::Starting, &[]), ended(rollout('2', 4, Phase::Failed, &[]), Ended::Failed, "late")];
    let views = views.map(|rollout| running(Some(blue.clone()), None, Some(rollout)));
    assert_eq!(shown(&wanted(Until::Done), &views).1, bad("shop/prod: the rollout of 1.2 failed: late; 1.1 serves"));
    let mut follower = Follower::default();
    let view = running(Some(blue), None, ours(Ended::Failed, "x"));
    assert_eq!(follower.see(&view, &wanted(Until::Done)).1.unwrap().log, ["boom"]);
}

#[test]
fn waiting_is_told_once() {
    let blue = side(Color::Blue, '1', 2);
    let earlier = running(Some(blue.clone()), None, Some(rollout('3', 9, Phase::Watching, &[])));
    let paused = Progress { paused: true, ..rollout('2', 10, Phase::Waiting, &[]) };
    let paused = View { message: Some("the other half of `both` is missing".into()), ..running(Some(blue), None, Some(paused)) };
    let (lines, end) = shown(&wanted(Until::Done), &[earlier.clone(), earlier, paused]);
    assert_eq!(
        lines,
        [
            "the rollout of 1.3 goes first: watching",
            "paused in waiting: `pipeline rollout resume shop/prod` goes on",
            "the other half of `both` is missing",
        ]
    );
    assert_eq!(end, None);
}

#[test]
fn rollbacks_are_foretold() {
    let promised = |warm, seconds, text: &str, other: Option<Side>| View {
        rollback: Promise { warm, seconds, text: text.into() },
        ..running(Some(side(Color::Green, '2', 2)), other, None)
    };
    let blue = || Some(side(Color::Blue, '1', 2));
    let warm = promised(true, Some(0.4), "1.1 is warm", blue());
    let cases = [
        (promise(&warm, None), "1.1 (blue) is warm: under a second"),
        (promise(&warm, Some(&digest('1'))), "1.1 (blue) is warm: under a second"),
        (promise(&warm, Some(&digest('9'))), "nothing is warm for it: about 1 s"),
        (promise(&promised(false, Some(6.3), "", blue()), None), "nothing is warm for it: about 7 s"),
        (promise(&promised(false, Some(6.3), "`data` is exclusive: about 7 s", None), None), "`data` is exclusive: about 7 s"),
        (
            promise(&promised(false, None, "", None), None),
            "nothing is warm for it, and how long it takes to start is not known yet",
        ),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
}
