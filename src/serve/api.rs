//! The API: HTTP/1.1 with JSON. On a unix socket it is for the command line and whoever may open the socket; over TCP for
//! those whom [`super::https`] lets in.
//!
//! ```text
//! GET  /v1/status                         view::Overview
//! GET  /v1/environments/P/E               view::View
//! GET  /v1/environments/P/E/watch         one View per line, at once and whenever it changes, every 5 s at least
//! POST /v1/poke                           view::Poked, when the ledger has been looked at
//! POST /v1/environments/P/E/rollout       view::Order
//! POST /v1/environments/P/E/maintenance   view::Maintenance
//! GET  /metrics                           Prometheus
//! GET  /healthz                           200 while passes are made, else 503
//! ```
//! The socket is of mode 0600: who may open it may do everything that it offers. It decides nothing that the ledger does:
//! pausing and maintenance are about this machine only.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::body::{Body, Bytes};
use axum::extract::{Path as InPath, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use serde::de::DeserializeOwned;

use super::model::{Model, Shared};
use super::show::{self, About};
use crate::rollout::plan::{Environment, Pause};
use crate::rollout::view::{Do, Maintenance, Order, Poked, Refusal};

/// A view is sent this often although nothing changed, so that a reader knows that somebody is there.
const BEAT: Duration = Duration::from_secs(5);
/// Longest wait for a look at the ledger.
const POKE: Duration = Duration::from_secs(25);
/// Largest body.
const BODY_MAX: usize = 64 * 1024;

#[derive(Debug, Clone)]
struct Api {
    shared: Arc<Shared>,
    about: Arc<About>,
}

/// All paths.
pub fn router(shared: Arc<Shared>, about: Arc<About>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/environments/{pipeline}/{environment}", get(view))
        .route("/v1/environments/{pipeline}/{environment}/watch", get(watch))
        .route("/v1/environments/{pipeline}/{environment}/rollout", post(rollout))
        .route("/v1/environments/{pipeline}/{environment}/maintenance", post(maintenance))
        .route("/v1/poke", post(poke))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .fallback(async || refusal(StatusCode::NOT_FOUND, "there is no such path", &[]))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_MAX))
        .with_state(Api { shared, about })
}

/// Makes the socket `path`, for this user alone. One that is there is taken over in one step.
pub fn bind(path: &Path) -> Result<tokio::net::UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = path.parent().context("a socket in a folder")?;
    fs_err::create_dir_all(dir)?;
    let mut temp = path.as_os_str().to_owned();
    temp.push(format!(".{}", std::process::id()));
    let temp = std::path::PathBuf::from(temp);
    let _ = fs_err::remove_file(&temp);
    let listener =
        tokio::net::UnixListener::bind(&temp).with_context(|| format!("cannot make the socket `{}`", path.display()))?;
    fs_err::set_permissions(&temp, std::fs::Permissions::from_mode(0o600))?;
    fs_err::rename(&temp, path)?;
    Ok(listener)
}

pub fn refusal(status: StatusCode, error: impl Into<String>, hints: &[&str]) -> Response {
    let hints = hints.iter().map(|hint| (*hint).to_owned()).collect();
    (status, Json(Refusal { error: error.into(), hints })).into_response()
}

fn unknown(name: &str) -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        format!("nobody knows `{name}` here"),
        &["`pipeline environment list` shows what the ledger has"],
    )
}

async fn status(State(api): State<Api>) -> Response {
    Json(show::overview(&api.shared, &api.about)).into_response()
}

async fn view(State(api): State<Api>, InPath((pipeline, environment)): InPath<(String, String)>) -> Response {
    let name = format!("{pipeline}/{environment}");
    show::view(&api.shared, &name).map_or_else(|| unknown(&name), |view| Json(view).into_response())
}

async fn watch(State(api): State<Api>, InPath((pipeline, environment)): InPath<(String, String)>) -> Response {
    let name = format!("{pipeline}/{environment}");
    if show::view(&api.shared, &name).is_none() {
        return unknown(&name);
    }
    let passed = api.shared.passed.subscribe();
    let lines = stream::unfold((api, name, passed, None::<Vec<u8>>), async |(api, name, mut passed, last)| {
        let beat = tokio::time::Instant::now() + BEAT;
        loop {
            let view = show::view(&api.shared, &name)?;
            let mut line = serde_json::to_vec(&view).ok()?;
            line.push(b'\n');
            let late = tokio::time::Instant::now() >= beat;
            if late || last.as_ref() != Some(&line) {
                return Some((Ok::<_, std::convert::Infallible>(Bytes::from(line.clone())), (api, name, passed, Some(line))));
            }
            // The daemon that ends drops the sender.
            if let Ok(Err(_)) = tokio::time::timeout_at(beat, passed.changed()).await {
                return None;
            }
            // Passes may follow upon each other quickly; nobody reads faster.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

async fn poke(State(api): State<Api>) -> Response {
    let asked = {
        let mut model = api.shared.model();
        model.asked += 1;
        model.asked
    };
    api.shared.wake();
    let mut looked = api.shared.looked.subscribe();
    let done = tokio::time::timeout(POKE, looked.wait_for(|done| *done >= asked)).await;
    let model = api.shared.model();
    match (done, &model.reading_error) {
        (Ok(Ok(_)), None) => Json(Poked { tip: model.reading.as_ref().and_then(|reading| reading.tip.clone()) }).into_response(),
        (_, Some(error)) => refusal(StatusCode::SERVICE_UNAVAILABLE, format!("the ledger cannot be read: {error}"), &[]),
        _ => refusal(StatusCode::GATEWAY_TIMEOUT, format!("no look at the ledger within {} s", POKE.as_secs()), &[]),
    }
}

async fn metrics(State(api): State<Api>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], show::metrics(&api.shared)).into_response()
}

async fn healthz(State(api): State<Api>) -> Response {
    if show::is_well(&api.shared) {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no passes\n").into_response()
    }
}

fn parse<T: DeserializeOwned>(body: &Bytes) -> std::result::Result<T, Box<Response>> {
    serde_json::from_slice(body)
        .map_err(|error| Box::new(refusal(StatusCode::BAD_REQUEST, format!("the body is not what is expected: {error}"), &[])))
}

async fn rollout(State(api): State<Api>, InPath((pipeline, environment)): InPath<(String, String)>, body: Bytes) -> Response {
    let order: Order = match parse(&body) {
        Ok(order) => order,
        Err(response) => return *response,
    };
    let by = if order.by.is_empty() { "somebody".to_owned() } else { order.by };
    let pause = Pause { by, reason: order.reason };
    change(&api, &format!("{pipeline}/{environment}"), |environment| match order.what {
        Do::Pause => {
            environment.paused = Some(pause);
            Ok(())
        }
        Do::Resume => {
            // What was given up is tried again.
            if environment.paused.is_none() && environment.given_up.is_none() {
                return Err("nothing is paused, and nothing was given up");
            }
            (environment.paused, environment.given_up, environment.verdict) = (None, None, None);
            Ok(())
        }
        Do::Abort => {
            if environment.active().is_none() {
                return Err("no rollout goes on");
            }
            environment.abort = Some(pause);
            Ok(())
        }
    })
}

async fn maintenance(State(api): State<Api>, InPath((pipeline, environment)): InPath<(String, String)>, body: Bytes) -> Response {
    let order: Maintenance = match parse(&body) {
        Ok(order) => order,
        Err(response) => return *response,
    };
    let message = if order.message.is_empty() { "back soon".to_owned() } else { order.message };
    change(&api, &format!("{pipeline}/{environment}"), |environment| {
        environment.maintenance = order.on.then_some(message);
        Ok(())
    })
}

/// Changes the state of an environment: saved before the answer.
fn change(api: &Api, name: &str, change: impl FnOnce(&mut Environment) -> std::result::Result<(), &'static str>) -> Response {
    let mut model = api.shared.model();
    let model: &mut Model = &mut model;
    if !model.names().contains(name) {
        return unknown(name);
    }
    if let Some(why) = &model.read_only {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, format!("nothing changes: {why}"), &[]);
    }
    let mut state = model.state.clone();
    let environment = state.environments.entry(name.to_owned()).or_default();
    if let Err(why) = change(environment) {
        return refusal(StatusCode::CONFLICT, format!("{why} in `{name}`"), &[]);
    }
    state.steady = model.now(api.shared.world.as_ref()).steady;
    if let Err(error) = api.shared.folder.save(&state) {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, format!("the state cannot be saved: {error:#}"), &[]);
    }
    model.state = state;
    api.shared.wake();
    Json(serde_json::json!({})).into_response()
}
