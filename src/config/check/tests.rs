//! What is wrong with a pipeline, line by line, and what becomes of its paths.

use super::*;
use crate::config::parse;

const BUILDERS: [&str; 3] = ["node", "python", "static"];

/// A folder with what the files of these tests name, and its pipeline file.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = fs_err::canonicalize(folder.path()).unwrap();
    for dir in ["app/web", "mine", "empty", "layout", "lay:out"] {
        fs_err::create_dir_all(root.join(dir)).unwrap();
    }
    for file in ["mine/builder.yaml", "layout/oci-layout", "lay:out/oci-layout", "keys.gpg", "tune.sh", "root.tar"] {
        fs_err::write(root.join(file), "").unwrap();
    }
    let file = root.join("pipeline.yaml");
    (folder, file)
}

/// What is wrong with a pipeline of `lines` (and a name and a base when they have none): `LINE:COLUMN MESSAGE | HINT`.
fn wrong(file: &Path, lines: &str) -> Vec<String> {
    let name = if lines.starts_with("name:") || lines.contains("\nname:") { "" } else { "\nname: a" };
    let base = if lines.starts_with("base:") || lines.contains("\nbase:") { "" } else { "\nbase: { debian: trixie }" };
    let shown = |found: crate::config::diagnostic::Diagnostic| {
        let hint = found.hint.map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{}:{} {}{hint}", found.line, found.column, found.message)
    };
    parse(file, &format!("{lines}{name}{base}"), &BUILDERS)
        .map_or_else(|found| found.into_iter().map(shown).collect(), |_| Vec::new())
}

#[test]
fn name_base_and_runtime() {
    let (_keep, file) = folder();
    let cases: [(&str, &[&str]); 33] = [
        (
            "name: Notes App",
            &["1:7 `Notes App` is not a name: lower case letters, digits and inner `.`, `_`, `-` | for example `notes-app`"],
        ),
        ("base: {}", &["1:1 `base` needs one of `debian`, `image`, `oci`, `tar` and `scratch`"]),
        ("base: { debian: sid, image: x }", &["1:22 `base` has `debian` and `image` | keep one of `debian` and `image`"]),
        ("base: { debain: sid }", &["1:9 unknown key `debain` | did you mean `debian`?"]),
        ("base: { debian: '13' }", &["1:17 `13` is not a Debian suite that is known here | did you mean `trixie`?"]),
        (
            "base: { debian: jammy }",
            &["1:17 `jammy` is not a Debian suite that is known here | known suites are `bookworm`, `trixie` and `sid`"],
        ),
        (
            "base: { debian: sid, packages: [curl, 'curl=8', A] }",
            &[
                "1:39 `curl=8` is not the name of a Debian package | write the name alone; `pipeline.lock` holds the version",
                "1:49 `A` is not the name of a Debian package | lower case letters, digits, `+`, `-` and `.`, at least two characters",
            ],
        ),
        (
            "base: { debian: sid, mirror: deb.example }",
            &["1:30 `deb.example` is not the address of a Debian archive | it begins with `https://`, `http://` or `file:///`"],
        ),
        (
            "base: { debian: sid, repositories: [{ uri: 'https://x.example/d', suite: 'a b', signed_by: tune.sh }] }",
            &["1:74 `a b` is not the name of a suite or component"],
        ),
        (
            "base: { image: 'A b' }",
            &[
                "1:16 `A b` is not an image in a registry: the repository must be in lower case | like `docker.io/library/debian:13`",
            ],
        ),
        ("base: { image: 'debian:13', mirror: 'https://x.example' }", &["1:29 `mirror` goes with `debian` only"]),
        ("base: { image: 'debian:13' }", &[]),
        ("base: { oci: layout }", &[]),
        ("base: { oci: 'layout:v1' }", &[]),
        ("base: { oci: 'lay:out' }", &[]),
        ("base: { oci: empty }", &["1:14 `empty` is not an OCI image layout: it has no file `oci-layout`"]),
        ("base: { tar: root.tar }", &[]),
        ("base: { tar: app }", &["1:14 `app` is not a file"]),
        ("base: { scratch: false }", &["1:18 `scratch` is `true` or not there"]),
        (
            "base: { scratch: true, packages: [curl] }",
            &[
                "1:24 packages cannot be installed on the base `scratch` | take `debian: trixie` as the base, or remove the packages",
            ],
        ),
        (
            "base: { scratch: true }\nbuild: { packages: [gcc] }",
            &[
                "2:10 packages cannot be installed on the base `scratch` | take `debian: trixie` as the base, or remove the packages",
            ],
        ),
        (
            "base: { scratch: true }\nruntime: { packages: [gcc] }",
            &[
                "2:12 packages cannot be installed on the base `scratch` | take `debian: trixie` as the base, or remove the packages",
            ],
        ),
        ("runtime: { builder: pyhton }", &["1:21 there is no builder `pyhton` | did you mean `python`?"]),
        (
            "runtime: { builder: elixir }",
            &[
                "1:21 there is no builder `elixir` | one in a folder of your own is written `./FOLDER`; known are `node`, `python` and `static`",
            ],
        ),
        ("runtime: { builder: ./mine }", &[]),
        (
            "runtime: { builder: ./empty }",
            &["1:21 the folder `./empty` has no `builder.yaml` | a builder is a folder with `builder.yaml` and `s2i/bin/`"],
        ),
        ("runtime: { builder: ./tune.sh }", &["1:21 `./tune.sh` is not a folder"]),
        (
            "runtime: { builder: python, image: x }",
            &["1:29 `runtime` has `builder` and `image` | keep one of `builder` and `image`"],
        ),
        (
            "runtime: { image: '' }",
            &["1:19 `` is not an image in a registry: it names no repository | like `docker.io/library/debian:13`"],
        ),
        ("runtime: { packages: [libpq5] }", &[]),
        ("runtime: {}", &[]),
        ("runtime: python", &["1:10 `runtime` must be a mapping, found `python`"]),
        (
            "base: { debian: [sid], tar: x }\nsource: { path: app, git: y }",
            &[
                "1:9 `debian` must be text, found a list",
                "1:24 `base` has `debian` and `tar` | keep one of `debian` and `tar`",
                "2:1 nothing uses `source` when there is no `runtime` | name a builder: `runtime: { builder: … }`",
                "2:22 `source` has `path` and `git` | keep one of `path` and `git`",
                "2:27 the folder `y` does not exist",
            ],
        ),
    ];
    for (lines, expected) in cases {
        let found: Vec<String> =
            wrong(&file, lines).into_iter().map(|text| text.split(" | paths start").next().unwrap().to_owned()).collect();
        assert_eq!(found, expected, "{lines}");
    }
}

#[test]
fn source_build_configure_and_image() {
    let (_keep, file) = folder();
    let runtime = "runtime: { builder: python }\n";
    let cases: [(&str, &[&str]); 47] = [
        ("source: { path: app, dir: web }", &[]),
        ("source: { path: nope }", &["2:17 the folder `nope` does not exist"]),
        ("source: { path: tune.sh }", &["2:17 `tune.sh` is not a folder"]),
        ("source: { path: '' }", &["2:17 a folder must be named here"]),
        ("source: { path: app, dir: ../x }", &["2:27 `../x` is not a path below the source | relative, without `..`"]),
        ("source: { dir: app }", &[]),
        (
            "source: { path: app, git: 'https://x.example/y' }",
            &["2:22 `source` has `path` and `git` | keep one of `path` and `git`"],
        ),
        (
            "source: { path: app, ref: main, submodules: true }",
            &["2:22 `ref` goes with `git` only", "2:33 `submodules` goes with `git` only"],
        ),
        ("source: { git: 'https://x.example/y', ref: v1, dir: a/b }", &[]),
        ("source: { git: app }", &[]),
        ("source: { git: nope }", &["2:16 the folder `nope` does not exist"]),
        (
            "source: { git: 'https://a:b@x.example/y' }",
            &[
                "2:16 an address with a password in it would end up in records | remove it; Git's credential helpers are asked for the password",
            ],
        ),
        (
            "source: { git: app, ref: a..b }",
            &["2:26 `a..b` is not a branch, tag or commit | like `main`, `v1.2` or a commit's digits"],
        ),
        ("build: { env: { A-B: x } }", &["2:17 `A-B` is not the name of a variable | letters, digits and `_`, no digit first"]),
        ("build: { env: { A: \"\\0\" } }", &["2:20 the value of `A` has a NUL byte in it"]),
        ("build: { secrets: [{ id: a/b, env: A }] }", &["2:26 `a/b` is not a file name | letters, digits, `.`, `_` and `-`"]),
        ("build: { secrets: [{ id: a }] }", &["2:20 a secret needs one of `env` and `file`"]),
        (
            "build: { secrets: [{ id: a, env: A, file: b }] }",
            &["2:37 a secret has `env` and `file` | keep one of `env` and `file`"],
        ),
        ("build: { secrets: [{ id: a, env: A }, { id: a, file: later }] }", &["2:45 there is another secret `a`"]),
        (
            "build: { secrets: [{ id: a, env: 1A }] }",
            &["2:34 `1A` is not the name of a variable | letters, digits and `_`, no digit first"],
        ),
        ("build: { secrets: [{ env: A }] }", &["2:20 item 1 of `secrets` has no `id` | file name below `/run/secrets`"]),
        ("build: { timeout: 90 }", &["2:19 `90` is not a duration | for seconds write `90s`"]),
        ("build: { network: hots }", &["2:19 `network` cannot be `hots` | did you mean `host`?"]),
        (
            "build: { limits: { memory: 1.5G } }",
            &["2:28 `1.5G` is not a size | a number with `K`, `M`, `G` or `T`, like `512M` or `2G`"],
        ),
        ("build: { limits: { processes: 0 } }", &["2:31 `processes` must be at least 1, found 0"]),
        ("configure: [{ shell: tune.sh }]", &[]),
        (
            "configure: [{ shell: tune.sh, ansible: tune.sh }]",
            &["2:31 a configure step has `shell` and `ansible` | keep one of `shell` and `ansible`"],
        ),
        ("configure: [{}]", &["2:13 a configure step needs one of `shell` and `ansible`"]),
        (
            "configure: [{ shell: nope.sh }, { ansible: app }]",
            &["2:22 the file `nope.sh` does not exist", "2:44 `app` is not a file"],
        ),
        ("configure: [tune.sh]", &["2:13 item 1 of `configure` must be a mapping, found `tune.sh`"]),
        ("image: { command: [''] }", &["2:20 the program to run has no name"]),
        ("image: { command: run it }", &["2:19 `command` must be a list, found `run it` | a list of one is written `[run it]`"]),
        ("image: { port: 0 }", &["2:16 `port` must be from 1 to 65535, found 0"]),
        ("image: { user: a:b }", &["2:16 `a:b` is not a user | `USER`, `UID` or `UID:GID`, numbers up to 65535"]),
        ("image: { workdir: opt/app }", &["2:19 `opt/app` is not an absolute path in the image | it begins with `/`"]),
        (
            "image: { volumes: [data, /, /a, /a/] }",
            &[
                "2:20 `data` is not an absolute path in the image | it begins with `/`",
                "2:26 `/` cannot be a volume",
                "2:33 the volume `/a/` is here twice",
            ],
        ),
        ("image: { port: 80, health: {} }", &["2:20 `health` needs one of `http`, `tcp` and `command`"]),
        (
            "image: { port: 80, health: { http: /, tcp: true } }",
            &["2:39 `health` has `http` and `tcp` | keep one of `http` and `tcp`"],
        ),
        ("image: { port: 80, health: { tcp: false } }", &["2:35 `tcp` is `true` or not there"]),
        (
            "image: { port: 80, health: { http: healthz } }",
            &["2:36 `healthz` is not a path of a URL | it begins with `/`, like `/healthz`"],
        ),
        (
            "image: { health: { http: / } }",
            &[
                "2:20 health by `http` needs `image.port` | write the port the program listens on, like `port: 8080`, below `image`",
            ],
        ),
        (
            "image: { health: { tcp: true } }",
            &[
                "2:20 health by `tcp` needs `image.port` | write the port the program listens on, like `port: 8080`, below `image`",
            ],
        ),
        ("image: { port: x, health: { tcp: true } }", &["2:16 `port` must be a whole number, found `x`"]),
        ("image: { health: { command: [] } }", &["2:20 the command is empty"]),
        (
            "image: { health: { command: [check], deadline: 0s } }",
            &["2:48 `0s` is not a duration | a number with `s`, `m` or `h`, like `90s`, `30m` or `2h`"],
        ),
        ("image: { labels: { '': x } }", &["2:20 a label needs a name"]),
        ("image: { compression: xz }", &["2:23 `compression` cannot be `xz` | possible are `zstd` and `gzip`"]),
    ];
    for (lines, expected) in cases {
        let found = wrong(&file, &format!("{runtime}{lines}"));
        let found: Vec<&str> = found.iter().map(|text| text.split(" | paths start").next().unwrap()).collect();
        assert_eq!(found, expected, "{lines}");
    }
    assert_eq!(
        wrong(&file, "source: { path: app }"),
        ["1:1 nothing uses `source` when there is no `runtime` | name a builder: `runtime: { builder: … }`"]
    );
}

#[test]
fn what_becomes_of_paths_and_references() {
    let (_keep, file) = folder();
    let dir = file.parent().unwrap();
    let read = |text: &str| parse(&file, &format!("name: a\n{text}"), &BUILDERS).unwrap();
    let debian = "base: { debian: sid }\n";
    let oci = |text: &str| match read(&format!("base: {{ oci: '{text}' }}")).base {
        Base::Oci { layout, tag, .. } => (layout, tag),
        other => panic!("{other:?}"),
    };
    assert_eq!(oci("layout"), (dir.join("layout"), None));
    assert_eq!(oci("layout:v1"), (dir.join("layout"), Some("v1".into())));
    assert_eq!(oci("lay:out"), (dir.join("lay:out"), None));
    let runtime = |text: &str| read(&format!("{debian}runtime: {text}")).runtime.builder;
    assert_eq!(runtime("{ builder: ./mine }"), BuilderRef::Folder(dir.join("mine")));
    assert_eq!(runtime("{ image: 'quay.io/a/b:1' }"), BuilderRef::Image("quay.io/a/b:1".into()));
    assert_eq!(runtime("{ packages: [curl] }"), BuilderRef::None);
    let source = |text: &str| read(&format!("{debian}runtime: {{ builder: node }}\nsource: {text}")).source;
    assert_eq!(source("{ path: app/../app/./web }"), Source::Path(dir.join("app/web")));
    let git = Source::Git { url: dir.join("app").display().to_string(), reference: None, dir: None, submodules: true };
    assert_eq!(source("{ git: ./app }"), git);
    let git = Source::Git {
        url: "git@x.example:y.git".into(),
        reference: Some("1.10".into()),
        dir: Some("a/b".into()),
        submodules: false,
    };
    assert_eq!(source("{ git: 'git@x.example:y.git', ref: 1.10, dir: ./a/b, submodules: false }"), git);
}

#[test]
fn hosts() {
    let (_keep, file) = folder();
    let dir = file.parent().unwrap();
    fs_err::write(dir.join("notes.yaml"), "name: notes\nbase: { debian: trixie }\nruntime: { builder: python }\n").unwrap();
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA ada";
    let good = format!(
        "host:\n  packages: [openssh-server]\n  kernel: linux-image-cloud-amd64\n  modules: [all, nf_tables]\n  arguments: [quiet]\n  \
         users: {{ ada: {{ uid: 1000, groups: [sudo], ssh_keys: ['{key}'] }} }}\n  groups: {{ ops: {{ gid: 900 }} }}\n  \
         files: [{{ path: /etc/motd, content: x }}, {{ path: /usr/bin/t, source: tune.sh, mode: '0755', owner: 'ada:ops' }}]\n  \
         units: {{ enable: [ssh.service, getty@tty2.service], mask: [apt-daily.timer] }}\n  sysctl: {{ net.ipv4.ip_forward: 1 }}\n  \
         timezone: Europe/Berlin\n  hostname: web-????\n  firewall: {{ allow: [22, 53/udp, 8000-8010] }}\n  \
         apps: [notes, 'x:1', {{ image: notes, name: two, port: 81, memory: 64M, cpus: 0.5, uid: 524288 }}]\n  \
         disk: {{ size: 8G, slot: auto, formats: [qcow2], firmware: [uefi] }}"
    );
    assert_eq!(wrong(&file, &good), [""; 0]);
    let cases: [(&str, &str); 34] = [
        (
            "base: { scratch: true }\nhost: {}",
            "1:9 a host needs a system to stand on, and `scratch` has none | take `debian: trixie` as the base",
        ),
        (
            "runtime: { image: x }\nhost: {}",
            "1:12 a builder image takes the place of the base, so no host can stand on it | make the app a pipeline of its own, and name it in `host.apps`",
        ),
        (
            "host: { kernel: bash }",
            "1:17 `bash` is not a kernel | a kernel's name begins with `linux-image-`, like `linux-image-amd64`",
        ),
        (
            "host: { kernel: ./bzImage }",
            "1:17 `./bzImage` is not the name of a Debian package | for files write `kernel: { path: ./bzImage, modules: … }`",
        ),
        (
            "host: { packages: [linux-image-cloud-amd64] }",
            "1:20 `linux-image-cloud-amd64` would be a second kernel, and a host has one | name the one you want: `kernel: linux-image-cloud-amd64` below `host`",
        ),
        ("host: { arguments: ['a b'] }", "1:21 `a b` is not a kernel argument | one argument per item"),
        ("host: { arguments: ['root=/dev/sda'] }", "1:21 the kernel argument `root` cannot be changed | the bake sets it"),
        (
            "host: { modules: ['nf tables'] }",
            "1:19 `nf tables` is not the name of a kernel module | like `nf_tables`; `all` keeps every module",
        ),
        ("host: { users: { root: {} } }", "1:18 `root` is there already | its keys are `ssh_keys` of the host"),
        (
            "host: { users: { Ada: {} } }",
            "1:18 `Ada` is not the name of a user | lower case letters, digits, `_` and `-`, no digit first",
        ),
        ("host: { users: { a: { uid: 5 }, b: { uid: 5 } } }", "1:43 user `a` has the same id"),
        (
            "host: { groups: { 9: {} } }",
            "1:19 `9` is not the name of a group | lower case letters, digits, `_` and `-`, no digit first",
        ),
        ("host: { ssh_keys: [abc] }", "1:20 `abc` is not a public ssh key | one line, like `ssh-ed25519 AAAA… name`"),
        (
            "host: { ssh_keys: ['BEGIN OPENSSH PRIVATE KEY'] }",
            "1:20 this is a private key | write the public one, from the file that ends with `.pub`",
        ),
        ("host: { files: [{ path: /etc/x }] }", "1:17 a file needs one of `content` and `source`"),
        (
            "host: { files: [{ path: /run/x, content: x }] }",
            "1:25 `/run` is empty when the machine starts | a rule in /etc/tmpfiles.d makes a file there when the machine starts",
        ),
        ("host: { files: [{ path: etc, content: x }] }", "1:25 `etc` is not an absolute path in the image | it begins with `/`"),
        (
            "host: { files: [{ path: /x, content: x, mode: '9' }] }",
            "1:47 `9` is not a mode | three or four octal digits, like \"0644\"",
        ),
        (
            "host: { files: [{ path: /x, content: x, owner: 'A:b' }] }",
            "1:48 `A:b` is not an owner | `USER:GROUP`, names or numbers",
        ),
        ("host: { units: { enable: [ssh] } }", "1:27 `ssh` does not say what kind of unit it is | like `ssh.service`"),
        ("host: { units: { enable: [a.service], mask: [a.service] } }", "1:46 `a.service` is in `enable` already"),
        (
            "host: { sysctl: { ip_forward: 1 } }",
            "1:19 `ip_forward` is not the name of a kernel setting | like `net.ipv4.ip_forward`",
        ),
        ("host: { timezone: '/x' }", "1:19 `/x` is not a time zone | like `Europe/Berlin` or `UTC`"),
        (
            "host: { hostname: Web_1 }",
            "1:19 `Web_1` is not the name of a machine | lower case letters, digits and `-`; each `?` becomes a digit made of the machine-id, like `web-????`",
        ),
        ("host: { firewall: { allow: [http] } }", "1:29 `http` is not a port | like `22`, `53/udp` or `8000-8010`"),
        ("host: { firewall: { allow: [9-8] } }", "1:29 `9-8` is not a port | like `22`, `53/udp` or `8000-8010`"),
        ("host: { apps: [notse] }", "1:16 there is no pipeline `notse` | did you mean `notes`?"),
        (
            "host: { apps: [a] }",
            "1:16 `a` is this pipeline, which makes no application image | it needs a `runtime` for that, or name another pipeline",
        ),
        (
            "host: { apps: [notes, notes] }",
            "1:23 there is another app `notes` | give one of them another name: `{ image: …, name: … }`",
        ),
        (
            "host: { apps: [{ image: 'x:1', port: 80 }, { image: 'y:1', port: 80 }] }",
            "1:66 the apps `x` and `y` have the same port",
        ),
        (
            "host: { apps: ['ssh:1'] }",
            "1:16 `/var/lib/ssh` is the system's, so no app can be called `ssh` | give the app another name: `{ image: …, name: … }`",
        ),
        (
            "host: { apps: [{ image: 'x:1', uid: 1000 }] }",
            "1:37 1000 does not begin a range of user ids | a multiple of 65536 from 524288 to 1878982656",
        ),
        ("host: { apps: [{ image: 'x:1', cpus: 0 }] }", "1:38 0 is not a number of processors | like `0.5` or `2`"),
        (
            "host: { disk: { size: 1G, slot: 1G } }",
            "1:33 two slots of this size do not fit on the disk | the disk holds two slots, the boot partition and /var",
        ),
    ];
    for (lines, expected) in cases {
        assert_eq!(wrong(&file, lines), [expected], "{lines}");
    }
    assert_eq!(wrong(&file, "host: { pakages: [] }"), ["1:9 unknown key `pakages` | did you mean `packages`?"]);
}
