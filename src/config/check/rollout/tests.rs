//! What is wrong with targets, routes, volumes and rollout settings, what is read, and policies from before they had types.

use std::path::Path;

use serde_json::json;

use super::{Clash, alone, clashes, warnings};
use crate::config::diagnostic::Diagnostic;
use crate::config::parse;
use crate::config::types::{
    Ask, Docker, Environment, Local, OnFailure, Pipeline, Redirect, RolloutCheck, RolloutSettings, Route, Seconds, Target, Vm,
    VmCommand, Volume, VolumeSpec, Watch,
};

fn read(lines: &str) -> Result<Pipeline, Vec<String>> {
    let shown = |found: Diagnostic| {
        let hint = found.hint.map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{}:{} {}{hint}", found.line, found.column, found.message)
    };
    let text = format!("{lines}\nname: shop\nbase: {{ debian: trixie }}");
    parse(Path::new("/w/pipeline.yaml"), &text, &[]).map_err(|found| found.into_iter().map(shown).collect())
}

/// An environment `dev` that runs locally, with `keys` beside its target.
fn dev(keys: &str) -> String {
    format!("environments: {{ dev: {{ target: {{ local: {{}} }}, {keys} }} }}")
}

/// Shows every case whose problems are not those expected.
fn table(cases: &[(&str, &[&str])]) {
    let found = cases.iter().map(|(text, expected)| (*text, read(text).err().unwrap_or_default(), *expected));
    let wrong: Vec<_> = found.filter(|(_, found, expected)| found != expected).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn route(host: Option<&str>, path: &str) -> Route {
    Route { host: host.map(str::to_owned), path: path.into(), ..Route::default() }
}

#[test]
fn targets() {
    let cases: [(&str, &[&str]); 15] = [
        ("environments: { dev: { target: { local: } } }", &[]),
        ("environments: { dev: { targets: { web: { local: }, jobs: { docker: { network: shop } } } } }", &[]),
        ("environments: { dev: { target: { dokcer: {} } } }", &["1:34 unknown key `dokcer` | did you mean `docker`?"]),
        (
            "environments: { dev: { target: { swarm: {} } } }",
            &["1:34 unknown key `swarm` | known keys are `local`, `docker` and `vm`"],
        ),
        ("environments: { dev: { target: {} } }", &["1:24 a target is one of `local`, `docker` and `vm`"]),
        ("environments: { dev: { targets: { web: } } }", &["1:35 a target is one of `local`, `docker` and `vm`"]),
        (
            "environments: { dev: { target: { local: { instances: 0, memroy: 1G } } } }",
            &["1:54 `instances` must be from 1 to 64, found 0", "1:57 unknown key `memroy` | did you mean `memory`?"],
        ),
        (
            "environments: { dev: { target: { local: { memory: 1.5G, cpus: 0, pids: 0 } } } }",
            &[
                "1:51 `1.5G` is not a size | a number with `K`, `M`, `G` or `T`, like `512M` or `2G`",
                "1:63 0 is not a number of processors | like `0.5` or `2`",
                "1:72 `pids` must be at least 1, found 0",
            ],
        ),
        (
            "environments: { dev: { target: { docker: { host: 'tcp://10.0.0.1:2375' } } } }",
            &[
                "1:50 `tcp://10.0.0.1:2375` is an engine across a network, and whoever reaches it is root there | use its socket: `unix:///run/docker.sock`; for another machine run `pipeline serve` there",
            ],
        ),
        (
            "environments: { dev: { target: { docker: { host: /run/docker.sock } } } }",
            &["1:50 `/run/docker.sock` is not the address of an engine | like `unix:///run/docker.sock`"],
        ),
        (
            "environments: { dev: { target: { docker: { host: 'unxi:///a' } } } }",
            &["1:50 `unxi:///a` is not the address of an engine | did you mean `unix`?"],
        ),
        (
            "environments: { dev: { target: { vm: {} } } }",
            &["1:34 `vm` runs disks, and this pipeline makes none | add `host:`, or use `local` or `docker`"],
        ),
        (
            "environments: { dev: { target: { docker: {} } } }\nhost: {}",
            &["1:34 `docker` runs images, and this pipeline makes none | use `vm`, which runs its disk"],
        ),
        (
            "environments: { dev: { target: { vm: { cpus: 1.5, memory: x, app: a/b } } } }\nhost: {}",
            &[
                "1:46 `cpus` must be a whole number, found `1.5`",
                "1:59 `x` is not a size | a number with `K`, `M`, `G` or `T`, like `512M` or `2G`",
                "1:67 `a/b` is not a file name | letters, digits, `.`, `_` and `-`",
            ],
        ),
        (
            "environments: { dev: { target: { vm: { command: { start: [], stop: [x] } } } } }\nhost: {}",
            &["1:40 `command` has no `address` | prints the machine's address", "1:51 `start` names no program"],
        ),
    ];
    table(&cases);
}

#[test]
fn routes() {
    let two = "environments:\n  dev: { target: { local: {} }, routes: [ { host: a.test }, { host: A.test., path: / } ] }\n  prod: { target: { local: {} }, routes: [ { host: a.test } ], rollout: { preview: { host: a.test } } }";
    let cases: [(&str, &[&str]); 13] = [
        (&dev("routes: [ { host: a.test }, { host: a.test, path: /api }, { host: '*.a.test' }, { path: /api }, {} ]"), &[]),
        (&dev("routes: [ { hots: a.test } ]"), &["1:59 unknown key `hots` | did you mean `host`?"]),
        (
            &dev("routes: [ { host: 'https://a.test' } ]"),
            &["1:65 `https://a.test` is not the name of a host | the name alone, like `shop.test`; `path` has the rest"],
        ),
        (
            &dev("routes: [ { host: 'a.test:8080' } ]"),
            &["1:65 `a.test:8080` is not the name of a host | without a port: routes are the same on every listener"],
        ),
        (&dev("routes: [ { host: '*' } ]"), &["1:65 `*` is not the name of a host | leave `host` away for any"]),
        (
            &dev("routes: [ { host: bücher.test } ]"),
            &["1:65 `bücher.test` is not the name of a host | in its ASCII form, which begins with `xn--`"],
        ),
        (
            &dev("routes: [ { host: 'a.*.test' } ]"),
            &["1:65 `a.*.test` is not the name of a host | like `shop.test`, or `*.shop.test` for all names below it"],
        ),
        (
            &dev("routes: [ { path: api }, { path: /a?x }, { path: /a//b }, { path: /a/../b } ]"),
            &[
                "1:65 `api` is not a path of a URL | it begins with `/`, like `/api`",
                "1:80 `/a?x` is not a path of a URL | plain segments, like `/api/v1`, without patterns, escapes and queries",
                "1:96 `/a//b` is not a path of a URL | without empty segments, `.` and `..`",
                "1:113 `/a/../b` is not a path of a URL | without empty segments, `.` and `..`",
            ],
        ),
        (&dev("routes: [ { strip: true } ]"), &["1:59 there is nothing to take away from `/`"]),
        (
            &dev("routes: [ { path: /a, strip: true, redirect: 'https://b.test/' } ]"),
            &["1:69 no program sees the path of a redirect | a URL that ends with `/` gets the rest of the path"],
        ),
        (
            &dev("routes: [ { redirect: { to: b.test, status: 200 } } ]"),
            &[
                "1:75 `b.test` is not a URL to go to | like `https://shop.test/`",
                "1:91 200 sends nobody elsewhere | possible are `301`, `302`, `303`, `307` and `308`",
            ],
        ),
        (
            two,
            &[
                "2:61 `a.test/` is here twice | another `host` or `path` tells requests apart",
                "3:44 `a.test/` is a route of `dev` already | another `host` or `path` tells requests apart",
                "3:75 `a.test/` is a route of `dev` already | another `host` or `path` tells requests apart",
            ],
        ),
        (
            "environments: { dev: { routes: [ { host: a.test } ], together: x, rollout: { warm: 0s } } }",
            &[
                "1:24 nothing of `dev` runs, so no request can reach it | say where it runs: `target: { local: {} }`",
                "1:54 nothing runs here, so nothing switches | say where it runs: `target: { local: {} }`",
                "1:67 nothing runs here, so nothing is rolled out | say where it runs: `target: { local: {} }`",
            ],
        ),
    ];
    table(&cases);
}

#[test]
fn volumes() {
    let image = "\nimage: { volumes: [/var/lib/data, /srv/cache/] }";
    let several = "environments: { dev: { target: { local: { instances: 2 } }, volumes: { data: exclusive } } }";
    let cases: [(&str, &[&str]); 8] = [
        (&(dev("volumes: { data: exclusive, files: { mode: shared, path: /srv/cache } }") + image), &[]),
        (&dev("volumes: { data: share }"), &["1:64 `data` cannot be `share` | did you mean `shared`?"]),
        (&dev("volumes: { data: { path: /data } }"), &["1:58 `data` has no `mode`"]),
        (
            &dev("volumes: { data: { mode: shared, path: data } }"),
            &["1:86 `data` is not an absolute path in the image | it begins with `/`"],
        ),
        (
            &(dev("volumes: { files: exclusive }") + image),
            &[
                "1:58 which volume of the image is `files`: `/var/lib/data` and `/srv/cache/`? | write it: `files: { mode: …, path: /var/lib/data }`",
            ],
        ),
        (
            &(dev("volumes: { cache: shared, files: { mode: exclusive, path: /srv/cache } }") + image),
            &["1:73 `cache` and `files` are at one place in the image"],
        ),
        (
            several,
            &[
                "1:78 `data` is for one program at a time, and 2 instances run here | run one, or write `shared` when several may write at once",
            ],
        ),
        (
            "environments: { dev: { targets: { a: { local: {} }, b: { local: {} } }, volumes: { data: { mode: exclusive } } } }",
            &[
                "1:98 `data` is for one program at a time, and 2 instances run here | run one, or write `shared` when several may write at once",
            ],
        ),
    ];
    table(&cases);
}

#[test]
fn settings() {
    let cases: [(&str, &[&str]); 8] = [
        (&dev("rollout: { warm: 0s, drain: 0s, streams: 0s, hold: 0s, watch: { period: 0s } }"), &[]),
        (&dev("rollout: "), &[]),
        (
            &dev("rollout: { deadline: 0s, warm: 15, pre-switch: [] }"),
            &[
                "1:68 `0s` is not a duration | a number with `s`, `m` or `h`, like `90s`, `30m` or `2h`",
                "1:78 `15` is not a duration | for seconds write `15s`",
                "1:82 unknown key `pre-switch` | did you mean `pre_switch`?",
            ],
        ),
        (
            &dev("rollout: { on_failure: stop, warm_memory: 0 }"),
            &[
                "1:70 `on_failure` cannot be `stop` | possible are `rollback` and `freeze`",
                "1:89 `0` is not a size | a number with `K`, `M`, `G` or `T`, like `512M` or `2G`",
            ],
        ),
        (
            &dev("rollout: { watch: { errors: 5, latency: 0.5, minimum: -1 } }"),
            &[
                "1:75 5 is not a share | from 0 to 1: 0.01 is one of a hundred",
                "1:87 0.5 is not a factor | from 1: 3 allows three times the old release's",
                "1:101 `minimum` must be at least 0, found -1",
            ],
        ),
        (
            &dev("rollout: { pre_switch: [ { http: ready }, { command: [] }, { http: /, command: x }, {} ] }"),
            &[
                "1:80 `ready` is not a path of a URL | it begins with `/`, like `/healthz`",
                "1:91 the command is empty",
                "1:117 a check has `http` and `command` | keep one of `http` and `command`",
                "1:131 a check needs one of `http` and `command`",
            ],
        ),
        (&dev("rollout: { preview: {} }"), &["1:58 a preview needs `host` or `path` | like `preview: { host: next.shop.test }`"]),
        (
            &dev("rollout: { preview: { host: n.test, redirect: 'http://a.test' } }, together: a/b"),
            &[
                "1:83 a preview shows the new release, and a redirect shows none",
                "1:124 `a/b` is not a file name | letters, digits, `.`, `_` and `-`",
            ],
        ),
    ];
    table(&cases);
}

const FULL: &str = r"
environments:
  prod:
    targets:
      web: { local: { instances: 3, memory: 256M, cpus: 0.5, pids: 200 } }
      jobs: { docker: { host: 'unix:///run/podman/podman.sock', memory: 1G, network: shop } }
      box: { vm: { memory: 1G, cpus: 2, app: shop, command: { start: [virsh, start], stop: [virsh, stop], address: [where] } } }
    routes:
    - { host: Shop.Test., path: /api/, strip: true }
    - { host: www.shop.test, redirect: 'https://shop.test/' }
    - { path: /old, redirect: { to: /new, status: 302 } }
    volumes: { data: shared, cache: { mode: shared, path: /srv/cache } }
    together: shop-2
    rollout:
      deadline: 2m
      drain: 5s
      streams: 0s
      grace: 45s
      warm: 1h
      warm_memory: 2G
      hold: 3s
      preview: { host: next.shop.test }
      pre_switch: [ { http: /ready }, { command: ./smoke.sh fast, timeout: 5m } ]
      post_switch: [ { command: [./smoke.sh], timeout: 5s } ]
      watch: { period: 1m, errors: 0.05, latency: 2, minimum: 100 }
      on_failure: freeze
host: { apps: [ { image: shop } ] }
runtime: { packages: [python3] }
";

#[test]
fn what_is_read_and_what_the_ledger_gives_back() {
    let prod = read(FULL).unwrap().releases.environments.remove("prod").unwrap();
    let argv = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = Environment {
        targets: [
            ("web".to_owned(), Target::Local(Local { instances: 3, memory: Some(256 << 20), cpus: Some(0.5), pids: Some(200) })),
            (
                "jobs".to_owned(),
                Target::Docker(Docker {
                    host: Some("unix:///run/podman/podman.sock".into()),
                    memory: Some(1 << 30),
                    network: Some("shop".into()),
                    ..Docker::default()
                }),
            ),
            (
                "box".to_owned(),
                Target::Vm(Vm {
                    instances: 1,
                    memory: 1 << 30,
                    cpus: 2,
                    app: Some("shop".into()),
                    command: Some(VmCommand {
                        start: argv(&["virsh", "start"]),
                        stop: argv(&["virsh", "stop"]),
                        address: argv(&["where"]),
                    }),
                }),
            ),
        ]
        .into(),
        routes: vec![
            Route { strip: true, ..route(Some("shop.test"), "/api") },
            Route {
                redirect: Some(Redirect { to: "https://shop.test/".into(), status: 308 }),
                ..route(Some("www.shop.test"), "/")
            },
            Route { redirect: Some(Redirect { to: "/new".into(), status: 302 }), ..route(None, "/old") },
        ],
        volumes: [
            ("data".to_owned(), VolumeSpec { mode: Volume::Shared, path: None }),
            ("cache".to_owned(), VolumeSpec { mode: Volume::Shared, path: Some("/srv/cache".into()) }),
        ]
        .into(),
        rollout: RolloutSettings {
            deadline: Seconds(120),
            drain: Seconds(5),
            streams: Seconds(0),
            grace: Some(Seconds(45)),
            warm: Seconds(3600),
            warm_memory: Some(2 << 30),
            hold: Seconds(3),
            preview: Some(route(Some("next.shop.test"), "/")),
            pre_switch: vec![
                RolloutCheck { ask: Ask::Http("/ready".into()), timeout: Seconds(10) },
                RolloutCheck { ask: Ask::Command(argv(&["sh", "-c", "./smoke.sh fast"])), timeout: Seconds(300) },
            ],
            post_switch: vec![RolloutCheck { ask: Ask::Command(argv(&["./smoke.sh"])), timeout: Seconds(5) }],
            watch: Watch { period: Seconds(60), errors: 0.05, latency: 2.0, minimum: 100 },
            on_failure: OnFailure::Freeze,
        },
        together: Some("shop-2".into()),
        keep: 10,
        ..Environment::default()
    };
    assert_eq!(prod, expected);
    let text = serde_json::to_string(&prod).unwrap();
    assert_eq!(serde_json::from_str::<Environment>(&text).unwrap(), prod, "{text}");
    let redirect = json!({"path": "/old", "redirect": {"to": "/new", "status": 302}});
    assert_eq!(serde_json::to_value(&prod.routes[2]).unwrap(), redirect);
}

/// Environments as the first policies have them: nothing of how they run had a type.
#[test]
fn old_policies_are_read() {
    let old = json!({
        "from": "none", "automatic": false, "gates": [], "config": {}, "secrets": {}, "keep": 10,
        "targets": {
            "main": {"local": {}},
            "web": {"docker": {"instances": 2, "port": 80, "memory": "512M"}},
            "box": {"vm": {"memory": "2G"}},
            "null": {"local": null},
            "later": {"swarm": {"replicas": 3}},
        },
        "routes": [{"host": "stage.example"}, {"path": "/x", "weight": 3}, {"redirect": "https://a.test/"}],
        "volumes": {"data": "exclusive"},
    });
    let read: Environment = serde_json::from_value(old).unwrap();
    let targets = [
        ("main".to_owned(), Target::Local(Local::default())),
        ("web".to_owned(), Target::Docker(Docker { instances: 2, memory: Some(512 << 20), ..Docker::default() })),
        ("box".to_owned(), Target::Vm(Vm { memory: 2 << 30, ..Vm::default() })),
        ("null".to_owned(), Target::Local(Local::default())),
        ("later".to_owned(), Target::Other("swarm".into(), json!({"replicas": 3}))),
    ];
    assert_eq!(read.targets, targets.into());
    let redirect = Some(Redirect { to: "https://a.test/".into(), status: 308 });
    let routes = [route(Some("stage.example"), "/"), route(None, "/x"), Route { redirect, ..route(None, "/") }];
    assert_eq!(read.routes, routes);
    assert_eq!(read.volumes["data"], VolumeSpec { mode: Volume::Exclusive, path: None });
    assert_eq!((read.rollout.clone(), read.together.clone()), (RolloutSettings::default(), None));
    // What nobody wrote is not written either, so that a program from before reads it.
    let written = serde_json::to_value(&read).unwrap();
    assert_eq!((written.get("rollout"), written.get("together")), (None, None));
    assert_eq!(written["volumes"], json!({"data": "exclusive"}));
    assert_eq!(written["targets"]["later"], json!({"swarm": {"replicas": 3}}));
    for wrong in [json!({}), json!({"local": {}, "vm": {}}), json!({"local": {"memory": "much"}})] {
        assert!(serde_json::from_value::<Target>(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn clashes_between_pipelines() {
    let environment = |routes: &[Route], preview: Option<Route>| Environment {
        routes: routes.to_vec(),
        rollout: RolloutSettings { preview, ..RolloutSettings::default() },
        ..Environment::default()
    };
    let shop = environment(&[route(Some("a.test"), "/"), route(None, "/api")], None);
    let blog = environment(&[route(Some("b.test"), "/"), route(None, "/api")], Some(route(Some("a.test"), "/")));
    let clash = |claim: &str, at| Clash { claim: claim.into(), first: "shop/prod".into(), second: "blog/prod".into(), at };
    let found = clashes(&[("shop/prod", &shop), ("blog/prod", &blog)]);
    assert_eq!(found, [clash("*/api", Some(1)), clash("a.test/", None)]);
}

#[test]
fn what_is_told_and_not_refused() {
    let told = |text: &str| warnings(&read(text).unwrap());
    let image = "\nimage: { volumes: [/var/lib/data, /srv/cache] }";
    assert_eq!(told(&(dev("volumes: { data: shared, cache: shared }") + image)), Vec::<String>::new());
    assert_eq!(told(&("environments: { dev: {} }".to_owned() + image)), Vec::<String>::new());
    assert_eq!(
        told(&(dev("volumes: { data: shared }") + image)),
        ["what the image writes to `/srv/cache` in `dev` is gone with each instance; `volumes: { cache: exclusive }` keeps it"]
    );
    assert_eq!(told(&dev("volumes: { data: shared }")).len(), 1);
    let group = |name: &str| Environment { together: Some(name.into()), ..Environment::default() };
    let wanted = [("dev".to_owned(), group("one")), ("prod".to_owned(), group("two")), ("qa".to_owned(), Environment::default())];
    assert_eq!(alone(&wanted.clone().into(), &[&group("two"), &group("three")]), [("dev", "one")]);
    assert_eq!(alone(&wanted.into(), &[&group("two"), &group("one")]), []);
}

/// Every YAML example of the page is a pipeline file, with a name and a base.
#[test]
fn the_examples_of_the_page_are_right() {
    let page = include_str!("../../../../docs/rollout.md");
    let examples: Vec<&str> = page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(!examples.is_empty());
    for example in examples {
        assert_eq!(read(example).err(), None, "{example}");
    }
}

#[test]
fn the_schema_tells_everything() {
    let schema = crate::config::schema();
    let keys = &schema["$defs"]["Rollout"]["properties"];
    for key in ["deadline", "drain", "streams", "grace", "warm", "warm_memory", "hold", "preview", "watch", "on_failure"] {
        assert!(keys[key].get("description").is_some(), "{key}");
    }
    assert_eq!(schema["$defs"]["Target"]["additionalProperties"], false);
}
