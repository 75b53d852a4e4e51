//! Host images: the repository's appliance on real packages, and what the tree it makes is like.

mod common;

use std::collections::BTreeMap;
use std::io::Read as _;

use common::{Project, me, repository};
use serde_json::Value;

/// Entries of the layers of an image, the uppermost last: path → (mode, owner, link, text of small files).
fn entries(project: &Project, tag: &str) -> BTreeMap<String, (u32, u64, String, String)> {
    let blobs = project.root.join("store/blobs/sha256");
    let read = |digest: &str| fs_err::read(blobs.join(digest.trim_start_matches("sha256:"))).unwrap();
    let index: Value = serde_json::from_slice(&fs_err::read(project.root.join("store/index.json")).unwrap()).unwrap();
    let found = index["manifests"].as_array().unwrap().iter();
    let manifest = found.into_iter().find(|row| row["annotations"]["org.opencontainers.image.ref.name"] == tag).unwrap();
    let manifest: Value = serde_json::from_slice(&read(manifest["digest"].as_str().unwrap())).unwrap();
    assert_eq!(manifest["annotations"]["io.pipeline.kind"], "host");
    let mut entries = BTreeMap::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let bytes = read(layer["digest"].as_str().unwrap());
        let mut archive = tar::Archive::new(zstd::stream::read::Decoder::new(bytes.as_slice()).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = String::from_utf8_lossy(&entry.path_bytes()).trim_end_matches('/').to_string();
            let link = entry.link_name_bytes().map(|name| String::from_utf8_lossy(&name).into_owned()).unwrap_or_default();
            let pax = entry.pax_extensions().unwrap().into_iter().flatten().map(Result::unwrap);
            let owner = pax.filter(|record| record.key_bytes() == b"uid").map(|record| record.value().unwrap().parse().unwrap());
            let owner = owner.last().unwrap_or_else(|| entry.header().uid().unwrap());
            let mode = entry.header().mode().unwrap();
            let mut text = Vec::new();
            if entry.size() < 1 << 20 {
                entry.read_to_end(&mut text).unwrap();
            }
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder).to_string();
            let name = path.rsplit('/').next().unwrap().to_string();
            if let Some(removed) = name.strip_prefix(".wh.") {
                let gone = if removed == ".wh..opq" {
                    format!("{folder}/")
                } else {
                    format!("{folder}/{removed}").trim_start_matches('/').into()
                };
                entries
                    .retain(|path: &String, _| !(path == &gone || path.starts_with(&format!("{}/", gone.trim_end_matches('/')))));
                continue;
            }
            entries.insert(path, (mode, owner, link, String::from_utf8_lossy(&text).into_owned()));
        }
    }
    entries
}

/// Apps are built first; an edit of one runs its steps and its layer alone; nothing changed runs nothing.
#[test]
fn the_appliance_is_built() {
    let project = Project::repository(me());
    let built = project.build_shared("appliance");
    assert_eq!(built.steps, ["base", "host-packages", "host-tools", "host", "app-notes"]);
    assert_eq!(project.build(&["--locked", "appliance"]).ran, [""; 0]);
    let plan = project.json(&["plan", "appliance"]);
    let parts: Vec<&str> = plan["steps"].as_array().unwrap().iter().map(|step| step["part"].as_str().unwrap()).collect();
    assert_eq!(parts, ["base", "host", "host", "host", "host"]);
    let rows = project.json(&["artifact", "list"]);
    assert!(rows.to_string().contains("appliance:latest.host"), "{rows:#}");

    project.edit("apps/notes/notes/pages.py", "\n", "\n# edited for the host\n");
    assert!(project.json(&["plan", "appliance"])["steps"][4]["because"].as_str().unwrap().contains("app `notes`"));
    let edited = project.build(&["appliance"]);
    assert_eq!(edited.ran, ["app-notes"]);
    project.edit("apps/notes/notes/pages.py", "\n# edited for the host\n", "\n");
    let back = project.build(&["appliance"]);
    assert_eq!((back.ran.len(), &back.digest), (0, &built.digest));
    project.edit("pipelines/appliance.yaml", "hostname: appliance-????", "hostname: pinned");
    assert_eq!(project.build(&["appliance"]).ran, ["host"]);
}

#[test]
fn the_tree_of_the_appliance() {
    let project = Project::repository(me());
    project.build_shared("appliance");
    let tree = entries(&project, "appliance:latest.host");
    let text = |path: &str| tree.get(path).unwrap_or_else(|| panic!("no `{path}`")).3.clone();
    let there = |path: &str| tree.contains_key(path);

    let kernels: Vec<&String> =
        tree.keys().filter(|path| path.starts_with("usr/lib/modules/") && path.ends_with("/vmlinuz")).collect();
    assert_eq!(kernels.len(), 1, "{kernels:?}");
    let release = kernels[0].split('/').nth(3).unwrap();
    assert!(text(&format!("usr/lib/modules/{release}/modules.dep")).contains("erofs.ko"));
    assert!(!tree.keys().any(|path| path.starts_with("boot/") || path.contains("initrd.img") || path.ends_with("amdgpu.ko.xz")));
    // What the init loads is there, or built into the kernel.
    let builtin = text(&format!("usr/lib/modules/{release}/modules.builtin")).replace('-', "_");
    let modules = text(&format!("usr/lib/modules/{release}/modules.dep")).replace('-', "_");
    let optional = ["pata_acpi"];
    for name in pipeline::disk::init::modules().filter(|name| !optional.contains(name)) {
        let file = format!("/{name}.ko");
        assert!(modules.contains(&file) || builtin.contains(&file), "the kernel has no `{name}`");
    }

    for path in [
        "usr/lib/pipeline/init",
        "usr/lib/pipeline/boot/grub/boot.img",
        "usr/lib/pipeline/boot/grub/core.img",
        "usr/lib/systemd/boot/efi/systemd-bootx64.efi",
        "usr/lib/systemd/boot/efi/linuxx64.efi.stub",
        "usr/lib/pipeline/dpkg/status",
        "efi",
        "var/home",
        "etc/systemd/system/sysinit.target.wants/pipeline-watch.service",
        "etc/systemd/system/multi-user.target.wants/ssh.service",
        "usr/lib/systemd/system/boot-complete.target.requires/app-notes-health.service",
    ] {
        assert!(there(path), "no `{path}`");
    }
    for path in ["etc/hostname", "etc/ssh/ssh_host_ed25519_key", "var/lib/systemd/random-seed", "usr/share/man", "usr/lib/grub"] {
        assert!(!there(path), "`{path}` is there");
    }
    assert_eq!(text("etc/machine-id"), "");
    let link = |path: &str| tree[path].2.clone();
    assert_eq!(
        (link("home"), link("srv"), link("var/lib/dpkg")),
        ("var/home".into(), "var/srv".into(), "../../usr/lib/pipeline/dpkg".into())
    );
    assert_eq!(link("etc/systemd/system/apt-daily.timer"), "/dev/null");
    assert_eq!(tree["root"].0, 0o700);
    let rules = text("etc/nftables.conf");
    assert!(rules.contains("tcp dport 22 accept") && rules.contains("tcp dport 8080 accept"), "{rules}");

    let host: Value = serde_json::from_str(&text("usr/lib/pipeline/host.json")).unwrap();
    assert_eq!(
        (&host["name"], &host["apps"][0], &host["hostname"]),
        (&"appliance".into(), &"notes".into(), &"appliance-????".into())
    );
    let app: Value = serde_json::from_str(&text("usr/lib/pipeline/apps/notes/app.json")).unwrap();
    let base = app["uid_base"].as_u64().unwrap();
    assert_eq!((&app["port"], app["user"].as_u64().unwrap()), (&8080.into(), base + 1001));
    assert!(text("etc/passwd").contains(&format!("app-notes:x:{}:{base}:App notes:", base + 1001)));
    let owners: std::collections::BTreeSet<bool> = tree
        .iter()
        .filter(|(path, _)| path.starts_with("usr/lib/pipeline/apps/notes/root/"))
        .map(|(_, entry)| (base..base + 65_536).contains(&entry.1))
        .collect();
    assert_eq!(owners, [true].into());
    assert!(
        tree.iter().filter(|(path, _)| !path.starts_with("usr/lib/pipeline/apps/notes/root")).all(|(_, entry)| entry.1 < 65_536)
    );
}

/// A pipeline of an application and a machine that runs it: one file, one build.
#[test]
fn an_application_with_a_machine_of_its_own() {
    let project = Project::repository(me());
    project.build_shared("appliance");
    let more = "host:\n  apps: [notes]\n  users: { ada: { uid: 1000, shell: /bin/bash } }\n  \
                files: [{ path: /etc/motd, content: hello, mode: '0600', owner: 'ada:ada' }]\n  units: { enable: [nowhere.service] }\n";
    let file = project.read("pipelines/notes.yaml");
    project.write("pipelines/notes.yaml", format!("{file}{more}"));
    let answer = project.pipeline(&["build", "notes", "--json"]).ok();
    answer.says("warning: there is no unit `nowhere.service` to enable");
    let built = answer.json();
    assert_eq!((&built["name"], &built["host"]["name"]), (&"notes:latest".into(), &"notes:latest.host".into()));
    let tree = entries(&project, "notes:latest.host");
    let app: Value = serde_json::from_str(&tree["usr/lib/pipeline/apps/notes/app.json"].3).unwrap();
    assert_eq!(app["image"], built["digest"]);
    let motd = &tree["etc/motd"];
    assert_eq!((motd.0, motd.1, motd.3.as_str()), (0o600, 1000, "hello"));
    assert!(tree["etc/passwd"].3.contains("ada:x:1000:1000::/home/ada:/bin/bash"));
    assert_eq!(project.build(&["notes"]).ran, [""; 0]);
}

/// What cannot become a host says why, and what to do.
#[test]
fn bad_hosts() {
    let project = Project::repository(me());
    let head = "name: bad\nbase:\n  debian: trixie\n  packages: [ca-certificates]\nhost:\n";
    let cases: [(&str, i32, &[&str]); 4] = [
        ("  apps: [notse]\n", 2, &["pipelines/bad.yaml:6:10: there is no pipeline `notse`", "hint: did you mean `notes`?"]),
        (
            "  apps: ['nowhere:1']\n",
            1,
            &[
                "error: the app `nowhere` is not built: the store has no image `nowhere:1`",
                "hint: build it (`pipeline build nowhere`)",
            ],
        ),
        ("  packages: [linux-image-rt-amd64]\n", 2, &["would be a second kernel"]),
        ("  apps: [appliance]\n", 2, &["pipeline `appliance` makes a host only, so it is no app"]),
    ];
    for (lines, code, texts) in cases {
        project.write("pipelines/bad.yaml", format!("{head}{lines}"));
        let answer = project.pipeline(&["build", "bad"]).run();
        answer.code(code);
        for text in texts {
            answer.says(text);
        }
    }
}

/// docs/hosts.md tells everything that is removed or masked.
#[test]
fn the_page_has_every_line_of_the_lists() {
    let page = fs_err::read_to_string(repository().join("docs/hosts.md")).unwrap();
    for name in ["removed.txt", "masked.txt"] {
        let text = fs_err::read_to_string(repository().join("templates/host").join(name)).unwrap();
        let mut count = 0;
        for (what, lost) in text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(" | ")) {
            assert!(page.contains(&format!("| `{what}` | {lost} |")), "docs/hosts.md has not: {what} | {lost}");
            count += 1;
        }
        assert!(count > 30, "{name}: {count}");
    }
}
