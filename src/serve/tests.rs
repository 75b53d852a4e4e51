//! The daemon with the real switch, the real API, and instances that are little HTTP servers of this process.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Instant;

use jiff::Timestamp;

use super::world::{Place, Reading};
use super::*;
use crate::config::types::{self as config, Health, HealthCheck, Local, RolloutSettings, Route, Seconds, Volume, VolumeSpec};
use crate::oci::digest::Digest;
use crate::release::decision::{Configuration, Status};
use crate::rollout::generation::{Generation, Program};
use crate::rollout::plan::{Unprepared, Verdict, VerdictKind, Wanted as Goal};
use crate::rollout::target::{Address, Checked, Found, InstanceSpec, Running, Secret, Target};
use crate::rollout::view::{Overview, Phase, Result as Ending, View};

const NAME: &str = "shop/prod";

/// One instance: a server that says its version, or that it is not well.
#[derive(Debug)]
struct House {
    found: Found,
    stop: Arc<AtomicBool>,
}

/// A target whose instances are threads; they outlive every daemon of a test, as real ones do.
#[derive(Debug, Default)]
struct Village {
    houses: Mutex<BTreeMap<String, House>>,
    /// Versions (by artifact) that are never well.
    sick: Mutex<BTreeSet<Digest>>,
    starts: AtomicU64,
    /// How long those that were stopped might have taken.
    graces: Mutex<Vec<Duration>>,
    /// No call comes back.
    hangs: AtomicBool,
    /// Nobody says what there is.
    away: AtomicBool,
    /// How long it takes to say what there is, and how often it is said before nobody does.
    says: Mutex<Option<(Duration, u32)>>,
}

impl Village {
    fn hang(&self) {
        while self.hangs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn there(&self) -> Vec<String> {
        self.houses.lock().unwrap().values().map(|house| house.found.generation.clone()).collect()
    }
}

fn answer(mut stream: TcpStream, text: &str, well: bool) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut path = String::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line == "\r\n" {
                break;
            }
            if path.is_empty() {
                path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            }
        }
        let status = if well || path != "/up" { "200 OK" } else { "503 Unwell" };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        if stream.write_all(head.as_bytes()).is_err() {
            return;
        }
    }
}

impl Target for Village {
    fn start(&self, spec: &InstanceSpec) -> Result<()> {
        self.hang();
        let mut houses = self.houses.lock().unwrap();
        if houses.contains_key(&spec.id) {
            return Ok(());
        }
        self.starts.fetch_add(1, Ordering::SeqCst);
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, well) = (stop.clone(), !self.sick.lock().unwrap().contains(&spec.artifact));
        let text = spec.env["VERSION"].clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let text = text.clone();
                std::thread::spawn(move || answer(stream.unwrap(), &text, well));
            }
        });
        let found = Found {
            id: spec.id.clone(),
            environment: spec.environment.clone(),
            generation: spec.generation.clone(),
            target: spec.target.clone(),
            number: spec.number,
            status: Running::Running,
            restarts: 0,
            address: Some(Address::Tcp(address)),
            memory: Some(1000),
            notes: Vec::new(),
        };
        houses.insert(spec.id.clone(), House { found, stop });
        Ok(())
    }

    fn list(&self) -> Result<Vec<Found>> {
        self.hang();
        let says =
            self.says.lock().unwrap().as_mut().map(|(pause, times)| (*pause, std::mem::replace(times, times.saturating_sub(1))));
        if let Some((pause, times)) = says {
            std::thread::sleep(pause);
            anyhow::ensure!(times > 0, "nobody answers any more");
        }
        anyhow::ensure!(!self.away.load(Ordering::SeqCst), "nobody answers");
        Ok(self.houses.lock().unwrap().values().map(|house| house.found.clone()).collect())
    }

    fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        self.hang();
        self.graces.lock().unwrap().push(grace);
        if let Some(house) = self.houses.lock().unwrap().remove(id) {
            house.stop.store(true, Ordering::SeqCst);
            if let Some(Address::Tcp(address)) = house.found.address {
                let _ = TcpStream::connect(address);
            }
        }
        Ok(())
    }

    fn forget(&self, _id: &str) -> Result<()> {
        Ok(())
    }

    fn check(&self, _id: &str, _argv: &[String], _timeout: Duration) -> Result<Checked> {
        Ok(Checked { good: true, last: String::new() })
    }

    fn logs(&self, id: &str, _lines: usize, _follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        sink(format!("{id} says that it is not well\n").as_bytes());
        Ok(())
    }

    fn exec(&self, _id: &str, _argv: &[String], _interactive: bool) -> Result<i32> {
        Ok(0)
    }
}

/// The ledger and everything else.
#[derive(Debug, Default)]
struct Town {
    reading: Mutex<Reading>,
    village: Arc<Village>,
    other: Arc<Village>,
    told: Mutex<Vec<(VerdictKind, String, Vec<String>)>>,
    volumes: PathBuf,
    said: Mutex<Vec<String>>,
}

impl Town {
    fn want(&self, name: &str, goal: Goal, route: &str) {
        let route = Route { host: Some(route.into()), ..Route::default() };
        let place = Place { wanted: goal, routes: vec![route], past: Vec::new() };
        self.reading.lock().unwrap().environments.insert(name.into(), place);
    }
}

impl World for Town {
    fn target(&self, settings: &config::Target) -> Result<Arc<dyn Target>> {
        Ok(if settings.kind() == "docker" { self.other.clone() } else { self.village.clone() })
    }

    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn read(&self) -> Result<Reading> {
        Ok(self.reading.lock().unwrap().clone())
    }

    fn tell(&self, environment: &str, verdict: &Verdict) -> Result<String> {
        self.told.lock().unwrap().push((verdict.kind.clone(), verdict.reason.clone(), verdict.log.clone()));
        if let VerdictKind::Rollback(release, _) = verdict.kind {
            let number = (1..10u8).find(|number| Digest::of([*number]) == release).unwrap();
            let instances = 2;
            let route = if environment == NAME { "shop.test" } else { "cart.test" };
            self.want(environment, goal(generation(number, instances, false), true), route);
        }
        Ok("told".into())
    }

    fn report(&self, environment: &str, _pair: (Digest, Digest), status: Status) -> Result<()> {
        self.reading.lock().unwrap().environments.get_mut(environment).unwrap().wanted.health = status;
        Ok(())
    }

    fn prepare(&self, _environment: &str, generation: &Generation) -> Result<BTreeMap<String, Program>, Unprepared> {
        let health = Some(Health { check: HealthCheck::Http("/up".into()), deadline: Duration::ZERO });
        let program = Program { artifact: generation.release, port: Some(80), health, volumes: Vec::new() };
        Ok(generation.targets.keys().map(|target| (target.clone(), program.clone())).collect())
    }

    fn secrets(&self, _generation: &Generation) -> Result<BTreeMap<String, Secret>> {
        Ok(BTreeMap::new())
    }

    fn volumes(&self) -> PathBuf {
        self.volumes.clone()
    }

    fn run(&self, _words: &[String], _variables: &BTreeMap<String, String>, _timeout: Duration) -> Result<String, String> {
        Ok(String::new())
    }

    fn warn(&self, text: &str) {
        self.said.lock().unwrap().push(text.to_owned());
    }

    fn note(&self, _text: &str) {}

    fn ready(&self) {}
}

fn generation(number: u8, instances: u32, exclusive: bool) -> Generation {
    let release = Digest::of([number]);
    let mode = if exclusive { Volume::Exclusive } else { Volume::Shared };
    let values = BTreeMap::from([("VERSION".to_owned(), format!("1.{number}"))]);
    Generation {
        id: release.short(),
        release,
        version: format!("1.{number}"),
        config: Configuration { values, secrets: BTreeMap::new() },
        targets: BTreeMap::from([("main".to_owned(), config::Target::Local(Local { instances, ..Local::default() }))]),
        volumes: BTreeMap::from([("data".to_owned(), VolumeSpec { mode, path: Some("/data".into()) })]),
        programs: BTreeMap::new(),
    }
}

fn goal(generation: Generation, is_rollback: bool) -> Goal {
    // Long enough for a machine that does much else; what is never well is not waited for so long.
    let deadline = Seconds(if generation.version == "1.3" || generation.version == "1.5" { 2 } else { 60 });
    let mut settings = RolloutSettings { deadline, ..RolloutSettings::default() };
    settings.watch.period = Seconds(1);
    settings.grace = (generation.version == "1.3").then_some(Seconds(5));
    Goal { generation: Some(generation), is_rollback, health: Status::Unknown, settings, together: None }
}

/// A daemon in a thread.
struct Daemon {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Daemon {
    fn end(self) {
        self.ended.store(true, Ordering::SeqCst);
        self.thread.join().unwrap().unwrap();
    }
}

struct Field {
    town: Arc<Town>,
    dir: tempfile::TempDir,
    address: SocketAddr,
    listener: Listener,
}

impl Field {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind("http", ([127, 0, 0, 1], 0).into(), false).unwrap();
        let address = listener.address().unwrap();
        let town = Arc::new(Town { volumes: dir.path().join("volumes"), ..Town::default() });
        Self { town, dir, address, listener }
    }

    fn serve(&self, replace: bool) -> Daemon {
        let settings = Settings {
            version: "1".into(),
            state: self.dir.path().join("state"),
            socket: self.dir.path().join("run/sock"),
            listeners: Vec::new(),
            replace,
            poll: Duration::from_millis(200),
            program: "/nowhere".into(),
            door: Door::default(),
        };
        let given = if replace { Vec::new() } else { vec![self.listener.try_clone().unwrap()] };
        let ended = Arc::new(AtomicBool::new(false));
        let (town, over) = (self.town.clone(), ended.clone());
        let thread = std::thread::spawn(move || {
            let dial: switch::Dialer = Arc::new(|address, _| {
                Box::pin(async move {
                    let Address::Tcp(address) = address else { unreachable!() };
                    tokio::net::TcpStream::connect(address).await
                })
            });
            let switch_settings = switch::Settings::new(std::time::SystemTime::now, |_| {});
            run(&settings, town, given, switch_settings, dial, &over)
        });
        Daemon { ended, thread }
    }

    /// One request to the API.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let until = Instant::now() + Duration::from_secs(20);
        let mut stream = loop {
            match UnixStream::connect(self.dir.path().join("run/sock")) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < until, "the API does not come up: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn view(&self, name: &str) -> Option<View> {
        let (status, body) = self.ask("GET", &format!("/v1/environments/{name}"), "");
        (status == 200).then(|| serde_json::from_str(&body).unwrap())
    }

    /// Waits until `is` holds of the view.
    fn until(&self, name: &str, what: &str, is: impl Fn(&View) -> bool) -> View {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let view = self.view(name);
            if let Some(view) = view.as_ref().filter(|view| is(view)) {
                return view.clone();
            }
            assert!(Instant::now() < until, "{what} does not come: {view:#?} {:#?}", self.town.said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn until_live(&self, version: &str, ending: Ending) -> View {
        self.until(NAME, version, |view| {
            let over = view.rollout.as_ref().and_then(|rollout| rollout.outcome.as_ref()).map(|outcome| outcome.result);
            view.live.as_ref().is_some_and(|live| live.version == version) && over == Some(ending)
        })
    }

    /// Status and body of one page.
    fn page(&self) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split(' ').nth(1).unwrap().to_owned() + " " + text.rsplit("\r\n").next().unwrap()
    }

    fn promote(&self, number: u8, is_rollback: bool) {
        self.town.want(NAME, goal(generation(number, 2, false), is_rollback), "shop.test");
        let (status, body) = self.ask("POST", "/v1/poke", "");
        assert_eq!(status, 200, "{body}");
    }

    /// A client that keeps its connection and counts what it gets, until it is told to end. Everything but 200 is lost.
    fn client(&self) -> (Arc<AtomicBool>, JoinHandle<(BTreeMap<String, u64>, Vec<String>)>) {
        let (stop, address) = (Arc::new(AtomicBool::new(false)), self.address);
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut got, mut lost) = (BTreeMap::new(), Vec::new());
            let mut stream: Option<BufReader<TcpStream>> = None;
            while !ended.load(Ordering::SeqCst) {
                let mut one = || -> std::io::Result<(u16, String, bool)> {
                    if stream.is_none() {
                        stream = Some(BufReader::new(TcpStream::connect(address)?));
                    }
                    let reader = stream.as_mut().unwrap();
                    reader.get_mut().write_all(b"GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n")?;
                    let (mut status, mut length, mut close) = (0, 0, false);
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line)? == 0 {
                            return Err(std::io::ErrorKind::UnexpectedEof.into());
                        }
                        let line = line.trim_end().to_ascii_lowercase();
                        if line.is_empty() {
                            break;
                        }
                        if let Some(rest) = line.strip_prefix("http/1.1 ") {
                            status = rest[..3].parse().unwrap();
                        }
                        if let Some(rest) = line.strip_prefix("content-length: ") {
                            length = rest.parse().unwrap();
                        }
                        close |= line == "connection: close";
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body)?;
                    Ok((status, String::from_utf8(body).unwrap(), close))
                };
                match one() {
                    Ok((200, body, close)) => {
                        *got.entry(body).or_default() += 1;
                        if close {
                            stream = None;
                        }
                    }
                    other => {
                        lost.push(format!("{other:?}"));
                        stream = None;
                    }
                }
            }
            (got, lost)
        });
        (stop, thread)
    }
}

#[test]
fn promote_roll_back_fail_restart_replace_without_a_lost_request() {
    let place = Field::new();
    place.town.want(NAME, goal(generation(1, 2, false), false), "shop.test");
    let first = place.serve(false);
    let view = place.until_live("1.1", Ending::Succeeded);
    assert_eq!((view.live.as_ref().map(|live| (live.healthy, live.wanted)), view.health), (Some((2, 2)), Status::Healthy));
    let (stop, client) = place.client();
    // Forward, with blue warm.
    place.promote(2, false);
    let view = place.until_live("1.2", Ending::Succeeded);
    assert_eq!((view.other.as_ref().map(|blue| blue.version.as_str()), view.rollback.warm), (Some("1.1"), true));
    // Back: nothing is started.
    let starts = place.town.village.starts.load(Ordering::SeqCst);
    place.promote(1, true);
    let view = place.view(NAME).unwrap();
    assert_eq!(view.live.unwrap().version, "1.1", "the poke answers when the switch has happened");
    place.until_live("1.1", Ending::Succeeded);
    assert_eq!(place.town.village.starts.load(Ordering::SeqCst), starts);
    // One that is never well: the ledger is told, blue never stopped.
    place.town.village.sick.lock().unwrap().insert(generation(3, 2, false).release);
    place.promote(3, false);
    place.until_live("1.1", Ending::Failed);
    place.until(NAME, "the verdict", |_| !place.town.told.lock().unwrap().is_empty());
    let told = place.town.told.lock().unwrap().clone();
    let back = VerdictKind::Rollback(Digest::of([1]), generation(1, 2, false).config.digest());
    assert_eq!((told.len(), &told[0].0), (1, &back));
    assert_eq!(told[0].1, "0/2 healthy after 2 s: /up answered with status 503");
    assert!(told[0].2[0].ends_with("says that it is not well"), "{told:?}");
    // What was warm was stopped for 1.3, in the time that its settings give.
    let graces = place.town.village.graces.lock().unwrap().clone();
    assert!(graces.len() >= 2 && graces[..2].iter().all(|grace| grace.as_secs() == 5), "{graces:?}");
    // Another daemon beside is refused, with the process.
    let beside = place.serve(false).thread.join().unwrap().unwrap_err().to_string();
    assert_eq!(beside, format!("a daemon serves this root already: process {}", std::process::id()));
    // Another takes over.
    let second = place.serve(true);
    first.thread.join().unwrap().unwrap();
    let view = place.until_live("1.1", Ending::Failed);
    assert_eq!(view.live.unwrap().healthy, 2);
    place.promote(4, false);
    place.until_live("1.4", Ending::Succeeded);
    let counted = "pipeline_promotion_total{stage=\"shop/prod\",result=\"promoted\"} 1\n";
    assert!(place.ask("GET", "/metrics", "").1.contains(counted));
    stop.store(true, Ordering::SeqCst);
    let (got, lost) = client.join().unwrap();
    assert_eq!(lost, [""; 0], "{got:?}");
    assert_eq!(got.keys().collect::<Vec<_>>(), ["1.1", "1.2", "1.4"]);
    // It ends, and what runs goes on; the next one finds it.
    let starts = place.town.village.starts.load(Ordering::SeqCst);
    second.end();
    let there = place.town.village.there();
    assert!(there.contains(&generation(4, 2, false).id), "{there:?}");
    let third = place.serve(false);
    place.until(NAME, "health", |view| view.live.as_ref().is_some_and(|live| live.healthy == 2 && live.version == "1.4"));
    assert_eq!(place.town.village.starts.load(Ordering::SeqCst), starts);
    // What the API says of it all.
    let overview: Overview = serde_json::from_str(&place.ask("GET", "/v1/status", "").1).unwrap();
    assert_eq!((overview.format, overview.environments.len()), (1, 1));
    let (status, text) = place.ask("GET", "/metrics", "");
    assert!(status == 200 && text.contains("pipeline_stage_info{stage=\"shop/prod\""), "{text}");
    assert!(!text.contains("pipeline_promotion_total{"), "this daemon has seen no decision: {text}");
    assert_eq!(place.ask("GET", "/healthz", "").0, 200);
    assert_eq!(place.ask("GET", "/v1/environments/shop/none", "").0, 404);
    assert_eq!(place.ask("POST", "/v1/environments/shop/prod/rollout", r#"{"do":"abort"}"#).0, 409);
    assert_eq!(place.ask("POST", "/v1/environments/shop/prod/rollout", r#"{"do":"fly"}"#).0, 400);
    third.end();
}

#[test]
fn a_target_that_hangs_keeps_only_its_own_waiting() {
    let place = Field::new();
    let docker = config::Target::Docker(config::Docker::default());
    let stuck = Generation { targets: BTreeMap::from([("main".to_owned(), docker)]), ..generation(5, 1, false) };
    place.town.other.hangs.store(true, Ordering::SeqCst);
    place.town.want("cart/prod", goal(stuck, false), "cart.test");
    place.town.want(NAME, goal(generation(1, 2, false), false), "shop.test");
    let daemon = place.serve(false);
    place.until_live("1.1", Ending::Succeeded);
    let view = place.view("cart/prod").unwrap();
    assert_eq!(view.live, None);
    assert_eq!(place.ask("GET", "/healthz", "").0, 200);
    place.town.other.hangs.store(false, Ordering::SeqCst);
    // Its rollout failed meanwhile, or goes on; somebody tries again.
    place.until("cart/prod", "an end or a start", |view| {
        view.live.is_some() || view.rollout.as_ref().is_some_and(|one| one.phase == Phase::Failed)
    });
    place.ask("POST", "/v1/environments/cart/prod/rollout", r#"{"do":"resume"}"#);
    place.until("cart/prod", "what hung", |view| view.live.is_some());
    daemon.end();
}

#[test]
fn a_daemon_serves_when_it_knows_what_runs_and_not_before() {
    let place = Field::new();
    place.town.want(NAME, goal(generation(1, 2, false), false), "shop.test");
    let daemon = place.serve(false);
    place.until_live("1.1", Ending::Succeeded);
    let serves = |what: &str| {
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            assert_eq!(place.page(), "200 1.1", "{what}");
        }
    };
    daemon.end();
    // Whoever takes its time is waited for.
    let village = &place.town.village;
    for pause in 0..40 {
        *village.says.lock().unwrap() = Some((Duration::from_millis(pause), u32::MAX));
        let daemon = place.serve(false);
        serves(&format!("{pause} ms"));
        daemon.end();
    }
    // One answer is enough, also before anybody was asked how it does.
    for _ in 0..3 {
        // The daemon before may look once more.
        std::thread::sleep(Duration::from_secs(2));
        *village.says.lock().unwrap() = Some((Duration::ZERO, 1));
        let daemon = place.serve(false);
        serves("told once");
        daemon.end();
    }
}

#[test]
fn who_answers_while_nobody_says_where_an_instance_is_is_not_believed() {
    let place = Field::new();
    place.town.want(NAME, goal(generation(1, 1, false), false), "shop.test");
    let daemon = place.serve(false);
    place.until_live("1.1", Ending::Succeeded);
    let is_healthy = |view: &View| view.live.as_ref().is_some_and(|live| live.healthy == 1);
    let is_blind = |view: &View| view.message.as_deref() == Some("the target `main` does not answer");
    // The target is away: what runs, runs on.
    let village = &place.town.village;
    village.away.store(true, Ordering::SeqCst);
    place.until(NAME, "what everybody sees", is_blind);
    assert_eq!(place.page(), "200 1.1");
    // The instance ends, and another program gets its address.
    let address = {
        let houses = village.houses.lock().unwrap();
        let house = houses.values().next().unwrap();
        house.stop.store(true, Ordering::SeqCst);
        let Some(Address::Tcp(address)) = house.found.address else { unreachable!() };
        address
    };
    let _ = TcpStream::connect(address);
    place.until(NAME, "illness", |view| !is_healthy(view));
    let other = TcpListener::bind(address).unwrap();
    let asked = std::thread::spawn(move || {
        for stream in other.incoming() {
            std::thread::spawn(move || answer(stream.unwrap(), "another", true));
        }
    });
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let page = place.page();
        assert!(page.starts_with("503 "), "{page}");
        assert!(!is_healthy(&place.view(NAME).unwrap()));
    }
    // The target says that it is there.
    village.away.store(false, Ordering::SeqCst);
    place.until(NAME, "health", |view| is_healthy(view) && view.message.is_none());
    assert_eq!(place.page(), "200 another");
    drop(asked);
    daemon.end();
}

#[test]
fn what_belongs_together_switches_together_or_not_at_all() {
    let place = Field::new();
    let together = |number: u8| Goal { together: Some("all".into()), ..goal(generation(number, 2, false), false) };
    place.town.want(NAME, together(1), "shop.test");
    place.town.want("cart/prod", together(1), "cart.test");
    let daemon = place.serve(false);
    place.until_live("1.1", Ending::Succeeded);
    let is = |view: &View, version: &str| view.live.as_ref().is_some_and(|live| live.version == version);
    place.until("cart/prod", "1.1", |view| is(view, "1.1"));
    // One of them is never well: neither switches.
    place.town.village.sick.lock().unwrap().insert(generation(3, 2, false).release);
    place.town.want(NAME, together(2), "shop.test");
    place.town.want("cart/prod", together(3), "cart.test");
    place.ask("POST", "/v1/poke", "");
    let failed =
        |view: &View| view.rollout.as_ref().is_some_and(|rollout| rollout.version != "1.1" && rollout.phase == Phase::Failed);
    let view = place.until(NAME, "the failure", failed);
    assert!(is(&view, "1.1"), "{view:#?}");
    // The ledger is told in a thread of its own.
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let told = place.town.told.lock().unwrap().clone();
        if told.iter().any(|(_, reason, _)| reason.starts_with("it switches together with `cart/prod`")) {
            break;
        }
        assert!(Instant::now() < patience, "{told:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.end();
}

#[test]
fn a_broken_state_holds_what_runs_and_is_not_written_over() {
    let place = Field::new();
    place.town.want(NAME, goal(generation(1, 2, false), false), "shop.test");
    let daemon = place.serve(false);
    place.until_live("1.1", Ending::Succeeded);
    daemon.end();
    let file = place.dir.path().join("state/state.json");
    let mut broken = fs_err::read(&file).unwrap();
    let middle = broken.len() / 2;
    broken[middle] ^= 1;
    fs_err::write(&file, &broken).unwrap();
    let daemon = place.serve(false);
    place.until(NAME, "what runs", |view| view.live.as_ref().is_some_and(|live| live.healthy == 2));
    place.promote(2, false);
    std::thread::sleep(Duration::from_millis(1500));
    let view = place.view(NAME).unwrap();
    assert!(view.message.as_ref().is_some_and(|message| message.contains("is broken")), "{view:#?}");
    assert_eq!(view.live.unwrap().version, "1.1");
    assert_eq!(fs_err::read(&file).unwrap(), broken);
    let mut stream = TcpStream::connect(place.address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.ends_with("1.1"), "{text}");
    assert_eq!(place.ask("POST", "/v1/environments/shop/prod/rollout", r#"{"do":"pause"}"#).0, 503);
    daemon.end();
    // Moved away: things go on.
    fs_err::rename(&file, place.dir.path().join("broken")).unwrap();
    let daemon = place.serve(false);
    place.until_live("1.2", Ending::Succeeded);
    daemon.end();
}

#[test]
fn the_holder_keeps_sockets_of_a_daemon_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hold");
    let holder = std::thread::spawn({
        let path = path.clone();
        move || sockets::hold(&path)
    });
    let until = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&path).is_err() {
        assert!(Instant::now() < until);
    }
    assert_eq!(sockets::take(&path).len(), 0);
    let wanted = [Wanted { name: "http".into(), address: ([127, 0, 0, 1], 0).into(), tls: false }];
    let listeners = sockets::take_or_bind(Vec::new(), &wanted, false).unwrap();
    let address = listeners[0].address().unwrap();
    sockets::keep(&path, Path::new("/nowhere"), &listeners).unwrap();
    drop(listeners);
    // Nobody accepts, and nobody is refused.
    let mut early = TcpStream::connect(address).unwrap();
    let again = sockets::take_or_bind(sockets::take(&path), &wanted, false).unwrap();
    assert_eq!(again[0].address().unwrap(), address);
    let mut accepted = loop {
        match again[0].socket.accept() {
            Ok((stream, _)) => break stream,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    };
    accepted.write_all(b"x").unwrap();
    early.read_exact(&mut [0]).unwrap();
    sockets::quit(&path);
    holder.join().unwrap().unwrap();
    assert!(!path.exists());
}
