//! The YAML of machine configuration, and what cloud-init's three files ask for.

use crate::cloud::{Wishes, wishes};
use crate::yaml::{Value, parse};

fn text(value: &str) -> Value {
    Value::Text(value.into())
}

fn list(values: &[&str]) -> Value {
    Value::List(values.iter().map(|value| text(value)).collect())
}

fn map(pairs: &[(&str, Value)]) -> Value {
    Value::Map(pairs.iter().map(|(key, value)| (key.to_string(), value.clone())).collect())
}

#[test]
fn documents_that_are_understood() {
    let cases = [
        ("", Value::Null),
        ("# only a comment\n", Value::Null),
        ("---\na: 1\n...\n", map(&[("a", text("1"))])),
        (
            "a: b # c\nd: 'it''s # no'\ne: \"x\\n\\u00e9\\ud83d\\ude00\"",
            map(&[("a", text("b")), ("d", text("it's # no")), ("e", text("x\né😀"))]),
        ),
        ("a:\n  - x\n  - y\nb:\n- z\n", map(&[("a", list(&["x", "y"])), ("b", list(&["z"]))])),
        (
            "- a: 1\n  b: 2\n-\n  c: 3\n- - x\n  - y\n",
            Value::List(vec![map(&[("a", text("1")), ("b", text("2"))]), map(&[("c", text("3"))]), list(&["x", "y"])]),
        ),
        (
            "a: [1, 'two', \"three\"]\nb: {c: d, \"e\": [f]}\n",
            map(&[("a", list(&["1", "two", "three"])), ("b", map(&[("c", text("d")), ("e", list(&["f"]))]))]),
        ),
        ("a: [\n  1, # one\n  2,\n]\nb: x", map(&[("a", list(&["1", "2"])), ("b", text("x"))])),
        (
            "a: |\n  one\n   two\n\n  three\nb: >-\n  one\n  two\n\n  three\nc: |+\n  x\n\n",
            map(&[("a", text("one\n two\n\nthree\n")), ("b", text("one two\nthree")), ("c", text("x\n\n"))]),
        ),
        (
            "a: ~\nb: null\nc:\nd: \"null\"\n",
            map(&[("a", Value::Null), ("b", Value::Null), ("c", Value::Null), ("d", text("null"))]),
        ),
        (
            "mac: 52:54:00:12:34:56\nurl: http://x:80/#a\n",
            map(&[("mac", text("52:54:00:12:34:56")), ("url", text("http://x:80/#a"))]),
        ),
        (
            "m: {macaddress: 52:54:00:12:34:56, a: b}",
            map(&[("m", map(&[("macaddress", text("52:54:00:12:34:56")), ("a", text("b"))]))]),
        ),
        ("\"quoted key\": 1\r\nb: 2\r\n", map(&[("quoted key", text("1")), ("b", text("2"))])),
        (
            "{\"a\": {\"b\": [1, true, null]},\n \"c\": \"d\"}\n",
            map(&[("a", map(&[("b", Value::List(vec![text("1"), text("true"), Value::Null]))])), ("c", text("d"))]),
        ),
        ("key: ssh-ed25519 AAAA user@host\n", map(&[("key", text("ssh-ed25519 AAAA user@host"))])),
        ("plain", text("plain")),
    ];
    for (document, wanted) in cases {
        assert_eq!(parse(document), Ok(wanted), "{document}");
    }
}

#[test]
fn what_is_not_understood_is_refused_with_its_line() {
    let cases = [
        ("a: 1\nb: &x 2\n", "line 2"),
        ("a: *x\n", "line 1"),
        ("a: !!str 1\n", "line 1"),
        ("a: 1\na: 2\n", "line 2"),
        ("a: 1\n  b: 2\n", "line 2"),
        ("a: one\n  two\n", "line 2"),
        ("a: \"one\n  two\"\n", "line 1"),
        ("a: [1, 2\n", "line 1"),
        ("a: [1,, 2]\n", "line 1"),
        ("a: {b c}\n", "line 1"),
        ("a: 'x' y\n", "line 1"),
        ("a:\n\t- b\n", "line 2"),
        ("a: |2\n  x\n", "line 1"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("? a\n: b\n", "line 1"),
        ("a: \"\\q\"\n", "line 1"),
        ("- a\nb: c\n", "line 2"),
        ("a: %x\n", "line 1"),
    ];
    for (document, wanted) in cases {
        let error = parse(document).expect_err(document);
        assert!(error.starts_with(wanted), "{document:?}: {error}");
    }
    assert!(parse(&"[".repeat(100_000)).is_err());
    let nested = (0..200).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>();
    assert!(parse(&nested).unwrap_err().contains("too deeply"));
}

#[test]
fn an_error_does_not_show_the_value() {
    let error = parse("password: \"hunter2\n").unwrap_err();
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn a_cloud_config_with_what_is_done_and_what_is_not() {
    let meta = "instance-id: iid-1\nlocal-hostname: one\npublic-keys:\n  mine:\n    openssh-key: ssh-rsa A\n";
    let user = "#cloud-config\nhostname: two\nfqdn: two.example.org\nssh_authorized_keys:\n  - ssh-ed25519 B\nusers:\n  - default\n  \
                - name: ana\n    sudo: ALL\n    ssh_authorized_keys: [ssh-ed25519 C, ssh-ed25519 D]\n  - gecos: nameless\n\
                write_files:\n  - path: /x\n    content: |\n      secret\nruncmd: [ls]\n";
    let pair = |user: &str, key: &str| (user.to_string(), key.to_string());
    let wanted = Wishes {
        hostname: Some("two".into()),
        keys: vec![
            pair("root", "ssh-rsa A"),
            pair("root", "ssh-ed25519 B"),
            pair("ana", "ssh-ed25519 C"),
            pair("ana", "ssh-ed25519 D"),
        ],
        networks: vec![],
        problems: vec![
            "`sudo` of user `ana` in user-data is not supported".into(),
            "an entry of `users` in user-data has no name".into(),
            "`write_files` in user-data is not supported".into(),
            "`runcmd` in user-data is not supported".into(),
        ],
    };
    assert_eq!(wishes(meta, user.as_bytes(), ""), wanted);
    assert_eq!(wishes("", b"", ""), Wishes::default());
}

#[test]
fn other_kinds_of_user_data_are_named() {
    let cases: [(&[u8], &str); 4] = [
        (b"#!/bin/sh\nrm -rf /\n", "user-data starts with `#!/bin/sh`; only `#cloud-config` is supported"),
        (b"Content-Type: multipart/mixed\n", "user-data starts with `Content-Type:`; only `#cloud-config` is supported"),
        (b"\x1f\x8b\x08\xff", "user-data is compressed or not text; only `#cloud-config` is supported"),
        (b"#cloud-config\na: [\n", "user-data of the NoCloud disk: line 2: `a…` does not end; the file is left out"),
    ];
    for (bytes, wanted) in cases {
        assert_eq!(wishes("", bytes, "").problems, [wanted]);
    }
}

fn networks(config: &str) -> Wishes {
    wishes("", b"", config)
}

#[test]
fn version_1_as_proxmox_writes_it() {
    let config = "version: 1\nconfig:\n    - type: physical\n      name: eth0\n      mac_address: 'bc:24:11:00:00:01'\n      subnets:\n      \
                  - type: static\n        address: '192.0.2.10'\n        netmask: '255.255.255.0'\n        gateway: '192.0.2.1'\n      \
                  - type: dhcp6\n    - type: physical\n      name: eth1\n      subnets: [{type: dhcp4}]\n    - type: nameserver\n      \
                  address:\n      - '192.0.2.53'\n      search:\n      - 'example.org'\n    - type: bond\n      name: b0\n";
    let found = networks(config);
    assert_eq!(found.problems, ["`bond` in network-config is not supported"]);
    let first = "[Match]\nMACAddress=bc:24:11:00:00:01\n\n[Network]\nDHCP=ipv6\nAddress=192.0.2.10/24\nDNS=192.0.2.53\nDomains=example.org\n\
                 \n[Route]\nGateway=192.0.2.1\n";
    let second = "[Match]\nName=eth1\n\n[Network]\nDHCP=ipv4\nDNS=192.0.2.53\nDomains=example.org\n";
    let wanted = [("10-pipeline-eth0.network", first), ("10-pipeline-eth1.network", second)];
    assert_eq!(found.networks, wanted.map(|(name, text)| (name.to_string(), text.to_string())));
}

#[test]
fn version_2_with_and_without_its_outer_key() {
    let config = "network:\n  version: 2\n  ethernets:\n    lan:\n      match:\n        macaddress: 52:54:00:12:34:56\n      set-name: lan0\n      \
                  addresses: [10.0.0.5/24, \"2001:db8::5/64\"]\n      routes:\n        - to: default\n          via: 10.0.0.1\n        \
                  - {to: 10.9.0.0/16, via: 10.0.0.2, metric: 50}\n      nameservers: {addresses: [10.0.0.53]}\n      mtu: 1400\n      \
                  optional: true\n    ens4:\n      dhcp4: true\n      dhcp-identifier: mac\n      dhcp4-overrides: {use-dns: false}\n";
    let found = networks(config);
    let wanted = [
        "`set-name` of `lan` in network-config is not supported: the card keeps its name",
        "`dhcp4-overrides` of `ens4` in network-config is not supported",
    ];
    assert_eq!(found.problems, wanted);
    let lan = "[Match]\nMACAddress=52:54:00:12:34:56\n\n[Link]\nRequiredForOnline=no\nMTUBytes=1400\n\n[Network]\nDHCP=no\nAddress=10.0.0.5/24\n\
               Address=2001:db8::5/64\nDNS=10.0.0.53\n\n[Route]\nGateway=10.0.0.1\n\n[Route]\nGateway=10.0.0.2\nDestination=10.9.0.0/16\nMetric=50\n";
    let ens4 = "[Match]\nName=ens4\n\n[Network]\nDHCP=ipv4\n\n[DHCPv4]\nClientIdentifier=mac\n";
    assert_eq!(
        found.networks,
        [("10-pipeline-lan.network", lan), ("10-pipeline-ens4.network", ens4)].map(|(a, b)| (a.into(), b.into()))
    );
    let inner = config.lines().skip(1).map(|line| format!("{}\n", &line[2..])).collect::<String>();
    assert_eq!(networks(&inner), found);
}

#[test]
fn network_values_cannot_bring_lines_of_their_own() {
    let config = "version: 2\nethernets:\n  e: {addresses: [\"10.0.0.1/24\\n[Match]\\nName=*\"]}\n  ../x: {dhcp4: yes}\n";
    let found = networks(config);
    assert_eq!(found.problems, ["`e` in network-config: a value has characters that do not belong there"]);
    assert_eq!(found.networks.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["10-pipeline-___x.network"]);
    assert_eq!(networks("config: []\n").problems, ["network-config has no version 1 or 2 and is left out"]);
}

#[test]
fn netmasks() {
    for (mask, wanted) in [("255.255.255.0", "/24"), ("16", "/16"), ("ffff:ffff::", "/32"), ("255.255.255.255", "/32")] {
        let config = format!(
            "version: 1\nconfig: [{{type: physical, name: e, subnets: [{{type: static, address: 10.0.0.1, netmask: \"{mask}\"}}]}}]"
        );
        let found = networks(&config);
        assert!(found.networks[0].1.contains(&format!("Address=10.0.0.1{wanted}\n")), "{mask}: {found:?}");
    }
    for mask in ["255.0.255.0", "129", "x"] {
        let config = format!(
            "version: 1\nconfig: [{{type: physical, name: e, subnets: [{{type: static, address: 10.0.0.1, netmask: \"{mask}\"}}]}}]"
        );
        assert_eq!(networks(&config).problems, ["a netmask in network-config is not one"], "{mask}");
    }
}
