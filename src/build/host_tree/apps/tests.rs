//! What an image becomes on a host.

use std::collections::BTreeMap;

use super::*;
use crate::oci::compress::Compression;
use crate::oci::flatten::{Blob, flatten};

fn app(name: &str) -> App {
    App {
        name: name.into(),
        image: crate::config::types::AppImage::Own,
        port: None,
        memory: Some(256 << 20),
        cpu_percent: Some(50),
        processes: 64,
        env: BTreeMap::from([("GREETING".into(), "50% \"off\"".into())]),
        restart: Restart::Always,
        uid_base: None,
    }
}

fn input(name: &str, port: Option<u16>) -> AppInput {
    let base = uid_bases(&[app(name)])[name];
    AppInput {
        app: app(name),
        image: Some(Digest::of("image")),
        stand_in: None,
        port,
        image_port: port,
        uid_base: base,
        ids: None,
    }
}

/// A tree with a program, a passwd and a volume.
fn tree() -> Tree {
    let mut tree = Tree::default();
    let folder = Meta { mode: 0o755, ..Meta::default() };
    put_file(&mut tree, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nweb:x:1001:100::/srv/web:/bin/sh\n".to_vec());
    put_file(&mut tree, "etc/group", b"root:x:0:\nusers:x:100:web\n".to_vec());
    put_file(&mut tree, "usr/bin/serve", b"#!/bin/sh\n".to_vec());
    let id = tree.find(b"usr/bin/serve").unwrap();
    tree.node_mut(id).meta.mode = 0o755;
    let volume = Node { meta: Meta { mode: 0o750, uid: 1001, ..Meta::default() }, kind: Kind::Directory(BTreeMap::new()) };
    tree.put(b"data", volume, &folder);
    tree.put(b"bin", Node { meta: folder.clone(), kind: Kind::Symlink(b"usr/bin".to_vec()) }, &folder);
    tree.put(b"dev/null", Node { meta: folder.clone(), kind: Kind::CharDevice { major: 1, minor: 3 } }, &folder);
    tree
}

fn config() -> RunConfig {
    let health = Health { check: HealthCheck::Http("/healthz".into()), deadline: std::time::Duration::from_secs(20) };
    RunConfig {
        user: "web".into(),
        cmd: Some(vec!["serve".into(), "--title".into(), "a b%".into()]),
        volumes: Some(BTreeMap::from([("/data".into(), Value::Null), ("/cache/x".into(), Value::Null)])),
        labels: Some(BTreeMap::from([(HEALTH_LABEL.into(), serde_json::to_string(&health).unwrap())])),
        ..RunConfig::default()
    }
}

/// The layer, read back as a tree.
fn made(input: &AppInput, config: &RunConfig) -> (Tree, Made) {
    let (bytes, made) = layer(input, tree(), config, 0, Vec::new()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.tar");
    fs_err::write(&path, &bytes).unwrap();
    let blob = Blob { path, digest: Digest::of(&bytes), compression: Compression::None };
    (flatten(&[blob], dir.path(), 1).unwrap(), made)
}

fn text(tree: &Tree, path: &str) -> String {
    let node = tree.node(tree.find(path.as_bytes()).unwrap_or_else(|| panic!("no {path}")));
    let Kind::File(file) = &node.kind else { panic!("{path} is no file") };
    String::from_utf8(tree.read_file(file).unwrap()).unwrap()
}

#[test]
fn an_image_becomes_a_service() {
    let input = input("web", Some(8080));
    let base = input.uid_base;
    let (tree, made) = made(&input, &config());
    assert_eq!(made.dropped, ["dev/null"]);
    let about: Value = serde_json::from_str(&text(&tree, "usr/lib/pipeline/apps/web/app.json")).unwrap();
    let expected = json!({
        "format": 1,
        "name": "web",
        "image": Digest::of("image"),
        "uid_base": base,
        "uid_count": 65_536,
        "user": base + 1001,
        "group": base + 100,
        "port": 8080,
        "health": { "check": { "http": "/healthz" }, "deadline": { "secs": 20, "nanos": 0 } },
        "volumes": ["/cache/x", "/data"],
        "command": ["/usr/local/bin/serve", "--title", "a b%"],
        "env": { "GREETING": "50% \"off\"", "HOME": "/srv/web", "PATH": PATH },
        "workdir": "/",
        "added": ["/proc", "/sys", "/run", "/tmp", "/var/tmp", "/cache/x", "/etc/resolv.conf", "/etc/hosts", "/etc/passwd", "/etc/group"],
    });
    let mut expected = expected;
    expected["command"][0] = "/usr/bin/serve".into();
    assert_eq!(about, expected);

    let unit = text(&tree, "usr/lib/systemd/system/app-web.service");
    for line in [
        "ExecStart=:/usr/bin/serve --title \"a b%%\"",
        "Environment=\"GREETING=50%% \\\"off\\\"\"",
        &format!("User={}", base + 1001),
        &format!("Group={}", base + 100),
        "BindPaths=/var/lib/web/data:/data",
        "ReadWritePaths=/cache/x",
        "SocketBindAllow=tcp:8080",
        "CapabilityBoundingSet=",
        "MemoryMax=268435456",
        "CPUQuota=50%",
        "TasksMax=64",
        "Restart=always",
    ] {
        assert!(unit.lines().any(|found| found == line), "no `{line}` in\n{unit}");
    }
    let health = text(&tree, "usr/lib/systemd/system/app-web-health.service");
    assert!(health.contains("ExecStart=:/usr/lib/pipeline/init health http 8080 /healthz 200\n"), "{health}");
    for (link, target) in [
        ("multi-user.target.wants/app-web.service", "../app-web.service"),
        ("boot-complete.target.requires/app-web-health.service", "../app-web-health.service"),
    ] {
        let id = tree.find(format!("usr/lib/systemd/system/{link}").as_bytes()).unwrap();
        assert_eq!(tree.node(id).kind, Kind::Symlink(target.into()));
    }

    let root = "usr/lib/pipeline/apps/web/root";
    assert_eq!(
        text(&tree, &format!("{root}/etc/passwd")),
        format!("root:x:{base}:{base}:root:/root:/bin/sh\nweb:x:{}:{}::/srv/web:/bin/sh\n", base + 1001, base + 100)
    );
    let owner = |path: &str| tree.node(tree.find(format!("{root}/{path}").as_bytes()).unwrap()).meta.uid - base;
    assert_eq!((owner("usr/bin/serve"), owner("data"), owner("cache/x"), owner("proc")), (0, 1001, 1001, 0));
    let top = tree.node(tree.find(b"usr/lib/pipeline/apps/web").unwrap());
    assert_eq!((top.meta.mode, top.meta.uid), (0o700, 0));
}

#[test]
fn low_ports_other_ports_and_no_port() {
    let mut low = input("web", Some(80));
    low.image_port = Some(8080);
    let (tree, _) = made(&low, &config());
    let unit = text(&tree, "usr/lib/systemd/system/app-web.service");
    assert!(unit.contains("AmbientCapabilities=CAP_NET_BIND_SERVICE\n") && unit.contains("Environment=PORT=80\n"), "{unit}");
    let (tree, _) = made(&input("web", None), &config());
    let unit = text(&tree, "usr/lib/systemd/system/app-web.service");
    assert!(unit.contains("SocketBindDeny=any\n") && !unit.contains("SocketBindAllow"), "{unit}");
    assert_eq!(tree.find(b"usr/lib/systemd/system/app-web-health.service"), None);
}

#[test]
fn what_cannot_run_is_refused() {
    type Change = fn(&mut RunConfig);
    let cases: [(Change, &str); 6] = [
        (|config| config.cmd = None, "the image of app `web` says no command"),
        (|config| config.cmd = Some(vec!["nowhere".into()]), "the command of app `web`, `nowhere`, is no program in its image"),
        (
            |config| config.cmd = Some(vec!["/etc/passwd".into()]),
            "the command of app `web`, `/etc/passwd`, is no program in its image",
        ),
        (|config| config.user = "nobody".into(), "the user of app `web`: the image has no user `nobody`"),
        (|config| config.user = "70000".into(), "the user of app `web`: it runs as 70000:0, and an app has the ids up to 65535"),
        (
            |config| config.volumes = Some(BTreeMap::from([("/a b".into(), Value::Null)])),
            "the volume `/a b` of app `web` cannot be mounted",
        ),
    ];
    for (change, expected) in cases {
        let mut config = config();
        change(&mut config);
        let error = layer(&input("web", Some(8080)), tree(), &config, 0, Vec::new()).map(|_| ()).unwrap_err();
        assert_eq!(format!("{error:#}"), expected);
    }
}

#[test]
fn ranges_are_stable_and_apart() {
    let names = ["notes", "hostile", "web", "a", "b"];
    let apps: Vec<App> = names.iter().map(|name| app(name)).collect();
    let bases = uid_bases(&apps);
    for base in bases.values() {
        assert!(*base >= UID_FIRST && *base < UID_END && (base - UID_FIRST).is_multiple_of(UID_COUNT), "{base}");
    }
    // Pinned: an installed machine's files belong to these.
    assert_eq!(uid_bases(&[app("notes")])["notes"], bases["notes"]);
    // A taken range moves the one that is made of a name, never the one that is written.
    let mut other = app("zoo");
    other.uid_base = Some(bases["notes"]);
    let moved = uid_bases(&[app("notes"), other]);
    assert_eq!((moved["zoo"], moved["notes"]), (bases["notes"], bases["notes"] + UID_COUNT));
}

#[test]
fn users_of_images_and_hosts() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1001:100::/srv/web:/bin/sh\n";
    let cases = [
        ("", (0, 0, "/root")),
        ("web", (1001, 100, "/srv/web")),
        ("1001", (1001, 100, "/srv/web")),
        ("1001:0", (1001, 0, "/srv/web")),
        ("web:users", (1001, 100, "/srv/web")),
        ("7", (7, 0, "/")),
        ("7:8", (7, 8, "/")),
    ];
    for (user, (uid, gid, home)) in cases {
        let runs = identity(user, passwd, "users:x:100:\n").unwrap();
        assert_eq!(runs, Runs { uid, gid, home: home.into() }, "{user}");
    }
    let mut long = input("web", None);
    assert_eq!(long.user_name(), "app-web");
    long.app.name = "a-name-that-is-too-long-for-a-user".into();
    assert_eq!(long.user_name(), format!("app-{}", long.uid_base));
}

#[test]
fn ports_clash() {
    let apps = [input("a", Some(80)), input("b", None), input("c", Some(80))];
    assert_eq!(check_ports(&apps).unwrap_err().to_string(), "the apps `a` and `c` both listen on port 80");
    check_ports(&apps[..2]).unwrap();
}

#[test]
fn volumes_are_where_links_of_the_image_lead() {
    let mut tree = tree();
    let folder = Meta { mode: 0o755, ..Meta::default() };
    let link = |target: &str| Node { meta: folder.clone(), kind: Kind::Symlink(target.as_bytes().to_vec()) };
    tree.put(b"var/run", link("/run"), &folder);
    tree.put(b"host", link("../../etc"), &folder);
    tree.put(b"loop", link("loop"), &folder);
    for path in ["run/x", "srv/a/b"] {
        ensure_folder(&mut tree, path, &folder).unwrap();
    }
    let cases: [(&[&str], Result<&[&str], &str>); 6] = [
        (&["/data"], Ok(&["/data"])),
        (&["/var/run/x"], Ok(&["/run/x"])),
        (&["/host", "/data"], Ok(&["/data", "/etc"])),
        (&["/srv/a/b", "/srv", "/data"], Ok(&["/data", "/srv"])),
        (&["/loop"], Err("leads nowhere")),
        (&["/nothing"], Err("leads nowhere")),
    ];
    for (declared, expected) in cases {
        let declared: Vec<String> = declared.iter().map(|path| (*path).to_string()).collect();
        match (mounted(&tree, &declared), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, expected) => panic!("{declared:?}: {found:?}, not {expected:?}"),
        }
    }
}

#[test]
fn nothing_of_an_image_becomes_a_line_of_its_own() {
    let good = BTreeMap::from([("A".to_string(), "two\nlines".to_string())]);
    assert!(check_words("web", "/srv/a b", &["/bin/sh".into(), "a\tb".into()], &good).is_ok());
    for workdir in ["/\nExecStartPre=+/bin/sh", "srv", "/srv\\", "/\u{b}"] {
        let error = check_words("web", workdir, &[], &good).unwrap_err();
        assert!(error.to_string().starts_with("the working folder of app `web`"), "{error}");
    }
    assert!(check_words("web", "/", &["a\0b".into()], &good).is_err());
    assert!(check_words("web", "/", &[], &BTreeMap::from([("A".into(), "\u{1b}[".into())])).is_err());
}

#[test]
fn a_health_command_runs_in_the_sandbox_of_its_app() {
    let health = Health { check: HealthCheck::Command(vec!["/bin/check".into()]), deadline: std::time::Duration::from_secs(20) };
    let labels = BTreeMap::from([(HEALTH_LABEL.into(), serde_json::to_string(&health).unwrap())]);
    let config = RunConfig { labels: Some(labels), ..config() };
    let (bytes, _) = layer(&input("web", Some(8080)), tree(), &config, 7, Vec::new()).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let units: BTreeMap<String, String> = archive
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            if path.ends_with(".service") && entry.header().entry_type().is_file() {
                std::io::Read::read_to_string(&mut entry, &mut text).unwrap();
            }
            (path, text)
        })
        .collect();
    let unit = |name: &str| &units[&format!("usr/lib/systemd/system/app-web{name}.service")];
    let sandbox = |text: &str| -> Vec<String> {
        let kept =
            ["Protect", "Private", "Restrict", "SystemCall", "RootDirectory", "NoNew", "Inaccessible", "BindPaths", "User="];
        text.lines().filter(|line| kept.iter().any(|start| line.starts_with(start))).map(String::from).collect()
    };
    assert_eq!(sandbox(unit("-health")), sandbox(unit("")));
    assert!(unit("-health").contains("\nExecStart=:/run/pipeline/init health command 200 /bin/check\n"), "{}", unit("-health"));
    assert!(sandbox(unit("")).len() > 20);
}
