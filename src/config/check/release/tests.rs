//! What is wrong with environments, people, ledger and registry, and the examples of docs/environments.md.

use std::path::{Path, PathBuf};

use crate::config::diagnostic::Diagnostic;
use crate::config::parse;
use crate::config::types::{Approve, Check, Pipeline, Seconds, SecretRef, Upstream, Volume};

const ADA: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB ada";
const BOB: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIC";

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = fs_err::canonicalize(folder.path()).unwrap();
    for file in ["team.pub", "smoke.yaml"] {
        fs_err::write(root.join(file), "").unwrap();
    }
    let file = root.join("pipeline.yaml");
    (folder, file)
}

fn read(file: &Path, lines: &str) -> Result<Pipeline, Vec<String>> {
    let shown = |found: Diagnostic| {
        let hint = found.hint.map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{}:{} {}{hint}", found.line, found.column, found.message)
    };
    let text = format!("{lines}\nname: shop\nbase: {{ debian: trixie }}");
    parse(file, &text, &[]).map_err(|found| found.into_iter().map(shown).collect())
}

/// `gates` of an environment that promotes from `dev`.
fn gates(gates: &str) -> String {
    format!("environments: {{ dev: {{}}, prod: {{ from: dev, gates: [{gates}] }} }}")
}

#[test]
fn environments() {
    let (_keep, file) = folder();
    let cases: [(&str, &[&str]); 37] = [
        ("environments: { dev: , prod: { from: dev } }", &[]),
        (
            "environments: { Dev: {} }",
            &["1:17 `Dev` is not the name of an environment | lower case letters, digits and inner `-`"],
        ),
        ("environments: { dev: { frm: x } }", &["1:24 unknown key `frm` | did you mean `from`?"]),
        (
            "environments:\n  dev: {}\n  stage: { from: dev }\n  prod:\n    from: staging",
            &[
                "5:11 environment `prod` promotes from `staging`, which is not defined | defined environments are `dev` and `stage`",
            ],
        ),
        (
            "environments: { dev: {}, stage: {}, prod: { from: qa } }",
            &["1:51 environment `prod` promotes from `qa`, which is not defined | defined environments are `dev` and `stage`"],
        ),
        (
            "environments: { dev: {}, prod: { from: prod } }",
            &["1:40 environment `prod` promotes from itself | defined environments are `dev`"],
        ),
        ("environments: { dev: {}, prod: { from: [dev, dev] } }", &["1:46 `dev` is here twice"]),
        (
            "environments: { dev: {}, prod: { from: [] } }",
            &["1:34 environment `prod` promotes from nothing | leave `from` away where releases enter"],
        ),
        (
            "environments: { a: {}, b: {}, prod: { from: { any: [a], all: [b] } } }",
            &["1:57 `from` has `any` and `all` | keep one of `any` and `all`"],
        ),
        (
            "environments: { a: { from: c }, b: { from: a }, c: { from: [b, dev] }, dev: {} }",
            &[
                "1:22 the environments `b`, `c` and `a` promote from one another in a ring | releases enter where an environment has no `from`",
            ],
        ),
        (
            "environments: { a: { from: b }, b: { from: a }, c: { from: d }, d: { from: c } }",
            &[
                "1:22 the environments `b` and `a` promote from one another in a ring | releases enter where an environment has no `from`",
                "1:54 the environments `d` and `c` promote from one another in a ring | releases enter where an environment has no `from`",
            ],
        ),
        (
            "environments: { dev: { config: { A-B: x, KEY: '-----BEGIN PRIVATE KEY-----' } } }",
            &[
                "1:34 `A-B` is not the name of a variable | letters, digits and `_`, no digit first",
                "1:42 `KEY` holds a private key | move it to `secrets`, which say where a value is",
            ],
        ),
        (
            "environments: { dev: { secrets: { TOKEN: hunter2 } } }",
            &[
                "1:35 the secret `TOKEN` is written as a value, and this file is committed | write where it is: `{ file: /PATH }`, `{ env: VARIABLE }`, or `{ stored: true }` and `pipeline secret set`",
            ],
        ),
        (
            "environments: { dev: { secrets: { TOKEN: {} } } }",
            &["1:35 the secret `TOKEN` needs one of `file`, `env` and `stored`"],
        ),
        (
            "environments: { dev: { secrets: { TOKEN: { file: etc/x } } } }",
            &["1:50 `etc/x` is not an absolute path in the image | it begins with `/`"],
        ),
        ("environments: { dev: { config: { A: x }, secrets: { A: { env: A } } } }", &["1:53 `A` is in `config` too"]),
        ("environments: { dev: { secrets: { A: { stored: false } } } }", &["1:48 `stored` is `true` or not there"]),
        ("environments: { dev: { target: { dokcer: {} } } }", &["1:34 unknown key `dokcer` | did you mean `docker`?"]),
        (
            "environments: { dev: { target: { local: {}, docker: {} } } }",
            &["1:45 a target is of one kind | several are written by name: `targets: { web: { local: {} }, … }`"],
        ),
        (
            "environments: { dev: { target: { local: {} }, targets: { web: { local: {} } } } }",
            &["1:47 an environment has `target` or `targets`, not both | keep `targets` when there are several"],
        ),
        (
            "environments: { dev: { routes: [ { host: a.example } ] } }",
            &["1:24 nothing of `dev` runs, so no request can reach it | say where it runs: `target: { local: {} }`"],
        ),
        (
            "environments: { dev: { volumes: { data: shared } } }",
            &["1:24 nothing runs here, so nothing has volumes | say where it runs: `target: { local: {} }`"],
        ),
        (
            "environments: { dev: { target: { local: {} }, volumes: { data: share } } }",
            &["1:64 `data` cannot be `share` | did you mean `shared`?"],
        ),
        ("environments: { dev: { keep: 0 } }", &["1:30 `keep` must be from 1 to 50, found 0"]),
        (
            "environments: { dev: { automatic: yes } }",
            &["1:35 `automatic` must be `true` or `false`, found `yes` | write `true`, without quotes"],
        ),
        ("environments: { dev: { from: { none: true } } }", &["1:32 unknown key `none` | known keys are `any` and `all`"]),
        ("registry: registry.example/team/shop", &[]),
        ("registry: localhost:5000/shop", &[]),
        (
            "registry: registry.example/team/shop:1.4",
            &[
                "1:11 `registry.example/team/shop:1.4` is one image, and `registry` names a repository | tags and digests are the releases'",
            ],
        ),
        ("registry: team/shop", &["1:11 `team/shop` does not name a registry | like `registry.example/team/shop`"]),
        (
            "registry: Shop",
            &[
                "1:11 `Shop` is not an image in a registry: the repository must be in lower case | like `docker.io/library/debian:13`",
            ],
        ),
        ("ledger: git@git.example:ledger.git", &[]),
        ("ledger: { remote: /srv/ledger.git, sign: true }", &[]),
        (
            "ledger: https://me:secret@git.example/x",
            &[
                "1:9 an address with a password in it would end up in records | remove it; Git's credential helpers are asked for the password",
            ],
        ),
        ("ledger: { url: x }", &["1:11 unknown key `url` | known keys are `remote` and `sign`"]),
        ("ledger: {}", &[]),
        ("environments: {}", &[]),
    ];
    for (lines, expected) in cases {
        assert_eq!(read(&file, lines).err().unwrap_or_default(), expected, "{lines}");
    }
    let reserved = parse(&file, "name: ledger\nbase: { scratch: true }\nenvironments: { dev: {} }", &[]).unwrap_err();
    assert_eq!(reserved[0].message, "a pipeline with environments cannot be called `ledger`");
}

#[test]
fn gates_of_environments() {
    let (_keep, file) = folder();
    let cases: [(&str, &[&str]); 50] = [
        ("{ soak: 10m }, { healthy: true }, { approve: 2 }, { signed: { keys: [team.pub] } }", &[]),
        (
            "{}",
            &[
                "1:53 a gate needs one of `healthy`, `soak`, `approve`, `window`, `signed`, `provenance`, `sbom`, `command`, `http`, `vm-test`, `budget` and `report`",
            ],
        ),
        ("{ soka: 10m }", &["1:55 unknown key `soka` | did you mean `soak`?"]),
        (
            "{ astrology: 10m }",
            &[
                "1:55 unknown key `astrology` | known keys are `name`, `description`, `healthy`, `soak`, `approve`, `window`, `signed`, `provenance`, `sbom`, `command`, `http`, `vm-test`, `budget` and `report`",
            ],
        ),
        ("{ soak: 10m, approve: 1 }", &["1:66 a gate has `soak` and `approve` | keep one of `soak` and `approve`"]),
        (
            "{ approve: 1 }, { approve: { count: 2, role: approve } }",
            &["1:71 there is another gate `approve` | give one of them another name: `- name: …`"],
        ),
        ("{ approve: 1 }, { name: two, approve: 2 }", &[]),
        ("{ name: freeze, approve: 1 }", &["1:61 a gate cannot be called `freeze` | freezes and holds are always checked"]),
        (
            "{ name: My Gate, approve: 1 }",
            &["1:61 `My Gate` is not a name for a gate | lower case letters, digits, `.`, `_` and `-`"],
        ),
        ("{ healthy: false }", &["1:64 `healthy` is `true` or not there"]),
        ("{ soak: 10 }", &["1:61 `10` is not a duration | for seconds write `10s`"]),
        ("{ approve: 0 }", &["1:64 nobody has to approve | leave the gate away, or write at least 1"]),
        (
            "{ approve: { count: 1, role: qa } }",
            &[
                "1:82 nobody has the role `qa`: there are no `people` | say who has it: `people: { alice: { key: …, roles: [ … ] } }`",
            ],
        ),
        ("{ window: { allow: FREQ=DAILY;BYHOUR=9, duration: 8h } }", &[]),
        ("{ window: { duration: 8h } }", &["1:55 `window` needs `allow` or `deny`"]),
        ("{ window: { allow: FREQ=DAILY } }", &["1:55 `window` has no `duration` | how long each window is, like `8h`"]),
        (
            "{ window: { allow: FREQ=DALY, duration: 8h } }",
            &["1:72 `FREQ=DALY` is not a frequency | `DAILY`, `WEEKLY`, `MONTHLY` or `YEARLY`"],
        ),
        (
            "{ window: { allow: FREQ=WEEKLY, duration: 8h } }",
            &[
                "1:72 the rule `FREQ=WEEKLY` needs `start`: nothing says which day of the week | write a first day and time: `start: 2026-01-05T09:00`",
            ],
        ),
        ("{ window: { allow: FREQ=WEEKLY, start: '2026-01-05T09:00', duration: 8h } }", &[]),
        (
            "{ window: { allow: FREQ=DAILY, start: tomorrow, duration: 8h } }",
            &["1:91 `tomorrow` is not a day and time | local time, like `2026-01-05T09:00`"],
        ),
        (
            "{ window: { allow: [FREQ=DAILY, x], deny: y, duration: 8, timezone: Europe/Berln, except: [24.12.] } }",
            &[
                "1:85 `x` is not a part of a recurrence rule | like `FREQ=WEEKLY;BYDAY=MO,TU;BYHOUR=9`",
                "1:95 `y` is not a part of a recurrence rule | like `FREQ=WEEKLY;BYDAY=MO,TU;BYHOUR=9`",
                "1:108 `8` is not a duration | for seconds write `8s`",
                "1:121 `Europe/Berln` is not a time zone | did you mean `Europe/Berlin`?",
                "1:144 `24.12.` is not a day or a moment | like `2026-12-24` or `2026-12-24T09:00`",
            ],
        ),
        (
            "{ window: { allow: FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30, duration: 8h } }",
            &["1:55 this window never opens | look at `COUNT`, `UNTIL` and days that do not exist"],
        ),
        (
            "{ window: { deny: FREQ=DAILY, duration: 24h } }",
            &["1:55 this window never opens | look at `COUNT`, `UNTIL` and days that do not exist"],
        ),
        (
            "{ signed: true }",
            &[
                "1:63 there is no `cosign.pub` beside the pipeline file | `pipeline keys generate cosign` makes a key pair; other keys are `signed: { keys: [FILE] }`",
            ],
        ),
        ("{ signed: false }", &["1:63 `signed` is `true` or not there"]),
        ("{ signed: { keys: [] } }", &["1:55 no key is named | like `signed: { keys: [cosign.pub] }`"]),
        ("{ signed: { keys: [nope.pub] } }", &["1:72 the file `nope.pub` does not exist"]),
        (
            "{ signed: { keys: [cosign.key] } }",
            &["1:72 `cosign.key` is the name of a private key | name the file that ends with `.pub`"],
        ),
        (
            "{ signed: { keys: ['-----BEGIN PRIVATE KEY-----'] } }",
            &["1:72 this is a private key | write the public one, from the file that ends with `.pub`"],
        ),
        (
            "{ signed: { keys: ['-----BEGIN CERTIFICATE-----'] } }",
            &[
                "1:72 this is not a public key in PEM | it lies between `-----BEGIN PUBLIC KEY-----` and `-----END PUBLIC KEY-----`",
            ],
        ),
        (
            "{ provenance: { clean: true } }",
            &[
                "1:55 `provenance` needs `keys` | like `keys: [cosign.pub]`; `unsigned: true` takes what anybody who may push to the registry wrote",
            ],
        ),
        (
            "{ provenance: { unsigned: false } }",
            &[
                "1:55 `provenance` needs `keys` | like `keys: [cosign.pub]`; `unsigned: true` takes what anybody who may push to the registry wrote",
            ],
        ),
        ("{ provenance: { clean: true, unsigned: true } }", &[]),
        (
            "{ provenance: { keys: ['-----BEGIN PUBLIC KEY----- -----END PUBLIC KEY-----'], unsigned: true } }",
            &["1:142 a provenance that keys must have signed is not `unsigned` | keep one of `keys` and `unsigned`"],
        ),
        (
            "{ provenance: { builders: ['a*b'], clean: true, unsigned: true } }",
            &["1:80 `a*b` is not a pattern | `*` stands for anything, at the end only"],
        ),
        ("{ sbom: {} }", &["1:55 `sbom` asks nothing | like `sbom: { deny: { packages: [telnetd] } }`"]),
        ("{ sbom: { minimum: { openssl: new } } }", &["1:83 `new` is not a version | it begins with a digit, like `3.0.17-1`"]),
        ("{ sbom: { deny: { licenses: [x] } } }", &["1:71 unknown key `licenses` | did you mean `licences`?"]),
        ("{ command: { run: [] } }", &["1:66 the command is empty"]),
        ("{ command: { run: '' } }", &["1:71 the command is empty"]),
        (
            "{ command: { run: check, timeout: soon } }",
            &["1:87 `soon` is not a duration | a number with `s`, `m` or `h`, like `90s`, `30m` or `2h`"],
        ),
        ("{ http: { url: status.example } }", &["1:68 `status.example` is not an address | like `https://status.example/ready`"]),
        (
            "{ http: { url: 'https://a:b@status.example/' } }",
            &[
                "1:68 an address with a user or password in it would end up in the ledger | ask it with `command`, which can read a file",
            ],
        ),
        ("{ http: { url: 'http://x/', status: 99 } }", &["1:89 `status` must be from 100 to 599, found 99"]),
        (
            "{ vm-test: smoke.yaml }",
            &["1:64 a vm-test boots the release's disk, and this pipeline makes none | a pipeline with `host` makes one"],
        ),
        ("{ budget: {} }", &["1:55 `budget` needs `size` or `packages`"]),
        (
            "{ budget: { size: 50 MB } }",
            &["1:71 `50 MB` is not a size | a number with `K`, `M`, `G` or `T`, like `512M` or `2G`"],
        ),
        ("{ report: { name: a/b } }", &["1:71 `a/b` is not a file name | letters, digits, `.`, `_` and `-`"]),
        ("{ report: { name: e2e, result: passed } }", &["1:84 `passed` is not the result of a report | did you mean `pass`?"]),
        ("{ report: { name: e2e } }, { soak: 1h }", &[]),
    ];
    for (text, expected) in cases {
        let found = read(&file, &gates(text)).err().unwrap_or_default();
        let found: Vec<&str> = found.iter().map(|text| text.split(" | paths start").next().unwrap()).collect();
        assert_eq!(found, expected, "{text}");
    }
    let entered = read(&file, "environments: { dev: { gates: [{ soak: 10m }] } }").unwrap_err();
    assert_eq!(
        entered,
        [
            "1:34 `soak` looks at where a release was before, and here it enters | name an environment the release comes from: `from: …`"
        ]
    );
}

#[test]
fn people() {
    let (_keep, file) = folder();
    let two =
        format!("people:\n  ada: {{ key: {ADA}, roles: [admin, promote, approve] }}\n  bob: {{ key: {BOB}, roles: [qa] }}\n");
    let prod = |gate: &str| format!("{two}{}", gates(gate));
    let cases: Vec<(String, Vec<&str>)> = vec![
        (prod("{ approve: 1 }, { name: qa, approve: { count: 1, role: qa } }"), vec![]),
        (
            prod("{ approve: { count: 1, role: security } }"),
            vec!["4:86 nobody has the role `security` | people have `admin`, `approve`, `promote` and `qa`"],
        ),
        (
            prod("{ name: x, approve: { count: 1, role: quality } }"),
            vec!["4:95 nobody has the role `quality` | people have `admin`, `approve`, `promote` and `qa`"],
        ),
        (
            prod("{ soak: 1m }, { approve: 2 }"),
            vec![
                "4:82 2 approvals are needed, and only `ada` can give one | give the role `approve` to more people, or ask for fewer",
            ],
        ),
        (
            format!("people:\n  ada: {{ key: {ADA}, roles: [amdin, promote] }}"),
            vec![
                "2:3 nobody could change environments, gates and people: no person has the role `admin` | give somebody the role: `roles: [admin]`",
                "2:105 no gate asks for the role `amdin` | did you mean `admin`?",
            ],
        ),
        (
            format!("people:\n  ada: {{ key: {ADA}, roles: [admin, promote, admin] }}"),
            vec!["2:121 the role `admin` is here twice"],
        ),
        (
            format!("people:\n  ada: {{ key: {ADA}, roles: [admin, promote] }}\n  bob: {{ key: {ADA} }}"),
            vec!["3:15 `ada` has the same key"],
        ),
        (
            format!("people:\n  ada: {{ key: {ADA}, roles: [admin, promote] }}\n  bob: {{ roles: [approve] }}"),
            vec!["3:3 `bob` has no `key`, so nothing they decide can count | one line from a file like `~/.ssh/id_ed25519.pub`"],
        ),
    ];
    for (lines, expected) in cases {
        let found = read(&file, &lines).err().unwrap_or_default();
        let strip = |text: &str| text.split_once(' ').map(|(_, text)| text.to_owned()).unwrap_or_default();
        let texts: Vec<String> = found.iter().map(|text| strip(text)).collect();
        assert_eq!(texts, expected.iter().map(|text| strip(text)).collect::<Vec<_>>(), "{lines}");
    }
    let keys = [
        ("abc", "`abc` is not a public ssh key"),
        ("ssh-ed25519", "`ssh-ed25519` is not a public ssh key"),
        ("ssh-ed25519 AAAA", "`ssh-ed25519 AAAA` is not a public ssh key"),
        (
            "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB",
            "`ssh-rsa AAAAC3NzaC1lZDI1` is not a public ssh key",
        ),
        (
            "no-pty ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB",
            "`no-pty ssh-ed25519 AAAAC` is not a public ssh key",
        ),
        ("sk-ssh-ed25519@openssh.com AAAA", "keys of the kind `sk-ssh-ed25519@openssh.com` cannot be checked here"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "this is a private key"),
    ];
    for (key, expected) in keys {
        let lines = format!("people:\n  ada: {{ key: '{key}', roles: [admin, promote] }}");
        let found = read(&file, &lines).unwrap_err();
        assert!(found.len() == 1 && found[0].contains(expected), "{key}: {found:?}");
    }
}

#[test]
fn what_is_read() {
    let (_keep, file) = folder();
    let text = "environments:\n  dev: { config: { A: 1.10 } }\n  stage:\n    from: [dev]\n    automatic: true\n    target: { local: { pids: 80 } }\n    routes: [ { host: stage.example } ]\n    volumes: { data: exclusive }\n    secrets: { A: { file: /etc/a }, B: { env: B }, C: { stored: true } }\n  prod:\n    from: { all: [stage, dev] }\n    gates: [ { name: late, description: slowly, soak: 90m }, { approve: 2 } ]\n    targets: { web: { local: {} }, worker: { docker: {} } }\n    keep: 3\nledger: ./ledger.git\nregistry: registry.example/shop";
    let releases = read(&file, text).unwrap().releases;
    let (dev, stage, prod) = (&releases.environments["dev"], &releases.environments["stage"], &releases.environments["prod"]);
    assert_eq!((dev.from.clone(), dev.keep, dev.automatic, dev.config["A"].as_str()), (Upstream::None, 10, false, "1.10"));
    assert_eq!((stage.from.clone(), stage.automatic), (Upstream::Any(vec!["dev".into()]), true));
    assert_eq!(serde_json::to_string(&stage.targets).unwrap(), r#"{"main":{"local":{"instances":1,"pids":80}}}"#);
    assert_eq!(serde_json::to_string(&stage.routes).unwrap(), r#"[{"host":"stage.example","path":"/"}]"#);
    assert_eq!(stage.volumes["data"].mode, Volume::Exclusive);
    let secrets: Vec<SecretRef> = stage.secrets.values().cloned().collect();
    assert_eq!(secrets, [SecretRef::File("/etc/a".into()), SecretRef::Env("B".into()), SecretRef::Stored(String::new())]);
    assert_eq!(prod.from, Upstream::All(vec!["dev".into(), "stage".into()]));
    assert_eq!((prod.gates[0].name.as_str(), prod.gates[0].description.as_deref()), ("late", Some("slowly")));
    assert_eq!(prod.gates[0].check, Check::Soak(Seconds(5400)));
    assert_eq!(prod.gates[1].check, Check::Approve(Approve { count: 2, role: "approve".into() }));
    assert_eq!((prod.targets.len(), prod.keep), (2, 3));
    assert_eq!(releases.ledger.remote, Some(file.parent().unwrap().join("ledger.git").display().to_string()));
    assert_eq!(releases.registry.as_deref(), Some("registry.example/shop"));
}

/// Every YAML example of the page is a pipeline file, with a name and a base where it has none.
#[test]
fn the_examples_of_the_page_are_right() {
    let (_keep, file) = folder();
    fs_err::create_dir_all(file.parent().unwrap().join("vm-tests")).unwrap();
    for name in ["cosign.pub", "ready.sh", "vm-tests/smoke.yaml"] {
        fs_err::write(file.parent().unwrap().join(name), "").unwrap();
    }
    let page = include_str!("../../../../docs/environments.md");
    let mut examples = 0;
    for example in page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()) {
        let text = match example.contains("host:\n") || example.contains("vm-test") {
            true => format!("{example}\nhost: {{}}"),
            false => example.to_owned(),
        };
        assert_eq!(read(&file, &text).err(), None, "{example}");
        examples += 1;
    }
    assert!(examples >= 7, "{examples} examples");
}

#[test]
fn the_schema_has_it() {
    let schema = crate::config::schema();
    for key in ["environments", "people", "ledger", "registry"] {
        assert!(schema["properties"].get(key).is_some(), "{key}");
    }
    let gate = &schema["$defs"]["Gate"]["properties"];
    for kind in Check::NAMES {
        assert!(gate.get(kind).is_some_and(|value| value.get("description").is_some()), "{kind}");
    }
}
