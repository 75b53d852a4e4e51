//! What the switch counts, as Prometheus reads it (text format 0.0.4).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Inner;
use super::body::METHODS;

/// Counts that belong to no pool.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Client connections now, tunnels among them.
    pub connections: AtomicU64,
    pub accepted: AtomicU64,
    /// Times a connection had to wait because there were as many as may be.
    pub full: AtomicU64,
    pub tls_failures: AtomicU64,
    pub tls_reloads: AtomicU64,
    pub tls_reload_failures: AtomicU64,
    /// Requests that wait for a held service now, and all that ever did.
    pub held: AtomicU64,
    pub held_total: AtomicU64,
    /// Answers without a pool by class of status.
    unrouted: [AtomicU64; 6],
}

impl Counters {
    /// The switch answered by itself.
    pub fn answered_without_pool(&self, status: u16) {
        self.unrouted[usize::from(status / 100).min(5)].fetch_add(1, Ordering::Relaxed);
    }
}

/// Upper bounds of the histogram's buckets, seconds.
const BOUNDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Kinds of what a drain cuts, in the order of [`super::pool::Kind`].
const KINDS: [&str; 3] = ["request", "websocket", "stream"];

/// A value of a label, escaped.
fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ =
            if labels.is_empty() { writeln!(self.0, "{name} {value}") } else { writeln!(self.0, "{name}{{{labels}}} {value}") };
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: &AtomicU64) {
        self.head(name, kind, help);
        self.line(name, "", value.load(Ordering::Relaxed));
    }
}

pub(super) fn text(switch: &Inner) -> String {
    let mut text = Text(String::with_capacity(8 << 10));
    let counters = &switch.counters;
    text.one("pipeline_http_connections", "gauge", "Client connections, tunnels among them.", &counters.connections);
    text.one("pipeline_http_connections_total", "counter", "Client connections that were accepted.", &counters.accepted);
    text.one(
        "pipeline_http_connections_full_total",
        "counter",
        "Times a new connection waited because of the limit.",
        &counters.full,
    );
    text.one("pipeline_http_tls_failures_total", "counter", "TLS handshakes that failed.", &counters.tls_failures);
    text.one("pipeline_http_certificate_reloads_total", "counter", "Certificates that were read again.", &counters.tls_reloads);
    text.one(
        "pipeline_http_certificate_reload_failures_total",
        "counter",
        "New certificates that are broken.",
        &counters.tls_reload_failures,
    );
    text.one("pipeline_http_held_requests", "gauge", "Requests that wait for a held service.", &counters.held);
    text.one(
        "pipeline_http_held_requests_total",
        "counter",
        "Requests that had to wait for a held service.",
        &counters.held_total,
    );
    text.head("pipeline_http_unrouted_requests_total", "counter", "Requests the switch answered without a pool.");
    for (class, count) in counters.unrouted.iter().enumerate().skip(1) {
        text.line("pipeline_http_unrouted_requests_total", &format!("status=\"{class}xx\""), count.load(Ordering::Relaxed));
    }
    if let Some(log) = &switch.log {
        text.head("pipeline_http_access_log_dropped_total", "counter", "Lines of the access log that were lost.");
        text.line("pipeline_http_access_log_dropped_total", "", log.dropped());
    }
    pools(switch, &mut text);
    text.0
}

/// Everything that has the labels service and pool, one metric after the other, as the format asks for.
fn pools(switch: &Inner, text: &mut Text) {
    let views = switch.pools();
    let all: Vec<_> = views
        .iter()
        .map(|view| {
            let labels = format!("service=\"{}\",pool=\"{}\"", label(&view.pool.service), label(&view.pool.name));
            (labels, view.pool.figures(), view.pool.counts())
        })
        .collect();
    text.head("pipeline_http_requests_total", "counter", "Requests by method and status; 499: the client went away.");
    for (labels, _, (statuses, ..)) in &all {
        let mut statuses: Vec<_> = statuses.iter().collect();
        statuses.sort_unstable();
        for ((method, status), count) in statuses {
            let method = METHODS.get(usize::from(*method)).unwrap_or(&"OTHER");
            text.line("pipeline_http_requests_total", &format!("{labels},method=\"{method}\",status=\"{status}\""), count);
        }
    }
    text.head("pipeline_http_request_duration_seconds", "histogram", "Time from a request to the head of its answer.");
    for (labels, figures, _) in &all {
        let name = "pipeline_http_request_duration_seconds";
        for bound in BOUNDS {
            text.line(
                &format!("{name}_bucket"),
                &format!("{labels},le=\"{bound}\""),
                figures.latency.at_most(Duration::from_secs_f64(bound)),
            );
        }
        text.line(&format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), figures.latency.count());
        text.line(&format!("{name}_sum"), labels, figures.latency.sum().as_secs_f64());
        text.line(&format!("{name}_count"), labels, figures.latency.count());
    }
    type Read = fn(&super::figures::Figures) -> u64;
    let simple: [(&str, &str, &str, Read); 6] = [
        ("pipeline_http_in_flight_requests", "gauge", "Requests in flight.", |figures| figures.in_flight),
        ("pipeline_http_websockets", "gauge", "WebSockets and other tunnels.", |figures| figures.websockets),
        ("pipeline_http_streams", "gauge", "Event streams.", |figures| figures.streams),
        ("pipeline_http_errors_total", "counter", "Answers of 5xx and answers that broke off.", |figures| figures.errors),
        ("pipeline_http_connect_failures_total", "counter", "Connections to instances that failed.", |figures| {
            figures.connect_failures
        }),
        ("pipeline_http_retries_total", "counter", "Requests that were sent again.", |figures| figures.retries),
    ];
    for (name, kind, help, read) in simple {
        text.head(name, kind, help);
        all.iter().for_each(|(labels, figures, _)| text.line(name, labels, read(figures)));
    }
    text.head("pipeline_http_websocket_closes_total", "counter", "WebSockets by close code; 0: a code without a name.");
    for (labels, _, (_, closes, _)) in &all {
        let mut closes: Vec<_> = closes.iter().collect();
        closes.sort_unstable();
        closes.iter().for_each(|(code, count)| {
            text.line("pipeline_http_websocket_closes_total", &format!("{labels},code=\"{code}\""), count)
        });
    }
    text.head("pipeline_drain_cut_connections_total", "counter", "What drains ended, gently or not, by kind.");
    for (labels, _, (.., cut)) in &all {
        KINDS.iter().zip(cut).for_each(|(kind, count)| {
            text.line("pipeline_drain_cut_connections_total", &format!("{labels},kind=\"{kind}\""), count)
        });
    }
}
