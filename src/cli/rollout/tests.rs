//! What people read of an environment.

use super::text;
use crate::cli::daemon::tests::view;
use crate::cli::follow::tests::{at, rollout, side};
use crate::release::decision::Status;
use crate::rollout::view::{Color, Outcome, Phase, Progress, Promise, Result as Ended, Side, View};

#[test]
fn blue_and_green() {
    let warm = Side { warm_until: Some(at(130)), websockets: 2, in_flight: 1, ..side(Color::Blue, '1', 2) };
    let steps = [(Phase::Starting, 4.2, "healthy 2/2"), (Phase::Switching, 0.0, "green serves")];
    let shown = View {
        live: Some(side(Color::Green, '2', 2)),
        other: Some(warm),
        rollout: Some(Progress { deadline: Some(at(40)), ..rollout('2', 10, Phase::Watching, &steps) }),
        health: Status::Healthy,
        rollback: Promise { warm: true, seconds: None, text: "under a second: 1.1 is warm".into() },
        ..view("shop/prod")
    };
    let expected = "\
shop/prod: healthy
  green  live    1.2  healthy 2/2  7 requests, 0 errors
  blue   before  1.1  healthy 2/2  7 requests, 0 errors  1 in flight, 2 WebSockets, warm for 110s
    shop-prod-222222222222-main-0  local  running  healthy  12.0 MB
    shop-prod-222222222222-main-1  local  running  healthy  12.0 MB
    shop-prod-111111111111-main-0  local  running  healthy  12.0 MB
    shop-prod-111111111111-main-1  local  running  healthy  12.0 MB
  rollout of 1.2: watching, 20s left
    starting: healthy 2/2 (4.2 s)
    switching: green serves
  rollback: under a second: 1.1 is warm
";
    assert_eq!(text(&shown, at(20)), expected);
}

#[test]
fn trouble() {
    let outcome = Outcome { result: Ended::Failed, reason: "never healthy".into(), log: vec!["boom".into()] };
    let mut green = side(Color::Green, '2', 0);
    green.instances[1].notes.push("no limits".into());
    let shown = View {
        live: None,
        other: Some(green),
        rollout: Some(Progress { outcome: Some(outcome), ..rollout('2', 10, Phase::Failed, &[]) }),
        maintenance: Some("back at 9".into()),
        message: Some("nothing serves".into()),
        health: Status::Unhealthy,
        ..view("shop/prod")
    };
    let expected = "\
shop/prod: UNHEALTHY
  MAINTENANCE: back at 9
  nothing serves
  green  before  1.2  healthy 0/2  7 requests, 0 errors
    shop-prod-222222222222-main-0  local  running  not healthy  12.0 MB, status 503
    shop-prod-222222222222-main-1  local  running  not healthy  12.0 MB, status 503, no limits
  rollout of 1.2: failed: never healthy
    | boom
";
    assert_eq!(text(&shown, at(20)), expected);
    assert_eq!(text(&view("shop/prod"), at(0)), "shop/prod: health unknown\n  nothing runs\n");
}
