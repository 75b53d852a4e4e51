//! NoCloud: what cloud-init's `meta-data`, `user-data` and `network-config` ask for, as far as a machine with a read-only
//! root can do it. Everything else is named in `problems`.
//!
//! Formats: cloud-init's documentation, "NoCloud", "Networking config Version 1" and "Version 2".

use std::fmt::Write as _;

use super::yaml::{self, Value};

/// What is to be done.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Wishes {
    pub hostname: Option<String>,
    /// User and one key each, in their order.
    pub keys: Vec<(String, String)>,
    /// Names and texts of files for systemd-networkd.
    pub networks: Vec<(String, String)>,
    /// What was asked for and is not done, one line each, without values.
    pub problems: Vec<String>,
}

/// The user whose keys are given without a name.
const DEFAULT_USER: &str = "root";

/// Reads the three files; an empty one says nothing.
pub fn wishes(meta_data: &str, user_data: &[u8], network_config: &str) -> Wishes {
    let mut wishes = Wishes::default();
    wishes.meta_data(meta_data);
    wishes.user_data(user_data);
    if let Some(config) = wishes.document("network-config", network_config) {
        wishes.network(config.get("network").unwrap_or(&config));
    }
    wishes
}

impl Wishes {
    fn problem(&mut self, text: String) {
        self.problems.push(text);
    }

    fn document(&mut self, name: &str, text: &str) -> Option<Value> {
        match yaml::parse(text) {
            Err(error) => {
                self.problem(format!("{name} of the NoCloud disk: {error}; the file is left out"));
                None
            }
            Ok(Value::Null) => None,
            Ok(value @ Value::Map(_)) => Some(value),
            Ok(_) => {
                self.problem(format!("{name} of the NoCloud disk is not a mapping and is left out"));
                None
            }
        }
    }

    fn meta_data(&mut self, text: &str) {
        let Some(meta) = self.document("meta-data", text) else { return };
        for (key, value) in meta.pairs() {
            match key.as_str() {
                "local-hostname" | "local_hostname" => {
                    self.hostname = value.text().map(ToString::to_string).or(self.hostname.take())
                }
                "hostname" => self.hostname = self.hostname.take().or(value.text().map(ToString::to_string)),
                "public-keys" | "public_keys" => self.public_keys(value),
                "network-interfaces" => {
                    self.problem("`network-interfaces` in meta-data is not supported: use network-config".into())
                }
                // Identity of the instance in a cloud: nothing here runs once per instance.
                _ => {}
            }
        }
    }

    /// A list of keys, or the form of a mapping from names to keys (`openssh-key`) that clouds give.
    fn public_keys(&mut self, value: &Value) {
        let mut keys = value.texts().unwrap_or_default();
        for (_, value) in value.pairs() {
            keys.extend(value.get("openssh-key").unwrap_or(value).texts().unwrap_or_default());
        }
        self.add_keys(DEFAULT_USER, &keys);
    }

    fn add_keys(&mut self, user: &str, keys: &[String]) {
        for key in keys.iter().flat_map(|key| key.lines()).map(str::trim).filter(|key| !key.is_empty()) {
            self.keys.push((user.to_string(), key.to_string()));
        }
    }

    fn user_data(&mut self, bytes: &[u8]) {
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        let Ok(text) = std::str::from_utf8(bytes) else {
            return self.problem("user-data is compressed or not text; only `#cloud-config` is supported".into());
        };
        let first = text.lines().next().unwrap_or_default().trim_end();
        if first != "#cloud-config" {
            // The first words name the kind; a line of another kind may hold anything.
            let kind = first.split_ascii_whitespace().next().unwrap_or_default();
            return self.problem(format!("user-data starts with `{kind}`; only `#cloud-config` is supported"));
        }
        let Some(config) = self.document("user-data", text) else { return };
        for (key, value) in config.pairs() {
            match key.as_str() {
                "hostname" => self.hostname = value.text().map(ToString::to_string).or(self.hostname.take()),
                // The hostname goes before it, as with cloud-init.
                "fqdn" if config.get("hostname").is_none() => {
                    let name = value.text().and_then(|name| name.split('.').next());
                    self.hostname = name.map(ToString::to_string).or(self.hostname.take());
                }
                "fqdn" => {}
                "ssh_authorized_keys" => match value.texts() {
                    Some(keys) => self.add_keys(DEFAULT_USER, &keys),
                    None => self.problem("`ssh_authorized_keys` in user-data is not a list of keys".into()),
                },
                "users" => self.users(value),
                _ => self.problem(format!("`{key}` in user-data is not supported")),
            }
        }
    }

    fn users(&mut self, value: &Value) {
        for user in value.items() {
            if user.text() == Some("default") {
                continue;
            }
            let Some(name) = user.get("name").and_then(Value::text) else {
                self.problem("an entry of `users` in user-data has no name".into());
                continue;
            };
            for (key, value) in user.pairs() {
                match key.as_str() {
                    "name" => {}
                    "ssh_authorized_keys" | "ssh-authorized-keys" => self.add_keys(name, &value.texts().unwrap_or_default()),
                    _ => self.problem(format!("`{key}` of user `{name}` in user-data is not supported")),
                }
            }
        }
    }

    fn network(&mut self, config: &Value) {
        match config.get("version").and_then(Value::text) {
            Some("1") => self.version_1(config),
            Some("2") => self.version_2(config),
            _ => self.problem("network-config has no version 1 or 2 and is left out".into()),
        }
    }

    fn version_1(&mut self, config: &Value) {
        let items = config.get("config").map(Value::items).unwrap_or_default();
        let mut network = Network::default();
        // Name servers stand beside the cards and go to all of them.
        for item in items.iter().filter(|item| item.get("type").and_then(Value::text) == Some("nameserver")) {
            network.servers.extend(item.get("address").and_then(Value::texts).unwrap_or_default());
            network.domains.extend(item.get("search").and_then(Value::texts).unwrap_or_default());
        }
        for item in items {
            match item.get("type").and_then(Value::text).unwrap_or_default() {
                "nameserver" => {}
                "physical" => {
                    let mut card = network.clone();
                    card.read_1(item, &mut self.problems);
                    let name = item.get("name").and_then(Value::text).unwrap_or("card");
                    self.add_network(name, &card);
                }
                kind => self.problem(format!("`{kind}` in network-config is not supported")),
            }
        }
    }

    fn version_2(&mut self, config: &Value) {
        for (key, value) in config.pairs() {
            match key.as_str() {
                "version" => {}
                "renderer" => {}
                "ethernets" => {
                    for (name, card) in value.pairs() {
                        let mut network = Network::default();
                        network.read_2(name, card, &mut self.problems);
                        self.add_network(name, &network);
                    }
                }
                _ => self.problem(format!("`{key}` in network-config is not supported")),
            }
        }
    }

    fn add_network(&mut self, name: &str, network: &Network) {
        let plain = |each: char| if each.is_ascii_alphanumeric() || each == '-' || each == '_' { each } else { '_' };
        let file = format!("10-pipeline-{}.network", name.chars().map(plain).collect::<String>());
        match network.text() {
            Ok(text) => self.networks.push((file, text)),
            Err(problem) => self.problem(format!("`{name}` in network-config: {problem}")),
        }
    }
}

/// One card, in the words of systemd.network(5).
#[derive(Debug, Default, Clone)]
struct Network {
    mac: Option<String>,
    name: Option<String>,
    driver: Option<String>,
    dhcp4: bool,
    dhcp6: bool,
    accept_ra: Option<bool>,
    link_local: bool,
    optional: bool,
    mtu: Option<String>,
    dhcp_by_mac: bool,
    addresses: Vec<String>,
    /// Destination (`None`: default), gateway, metric.
    routes: Vec<(Option<String>, String, Option<String>)>,
    servers: Vec<String>,
    domains: Vec<String>,
}

fn flag(value: &Value) -> bool {
    value.flag().unwrap_or(false)
}

fn text(value: &Value) -> Option<String> {
    value.text().map(ToString::to_string)
}

impl Network {
    fn read_1(&mut self, item: &Value, problems: &mut Vec<String>) {
        for (key, value) in item.pairs() {
            match key.as_str() {
                "type" | "subnets" => {}
                "name" => self.name = text(value),
                "mac_address" => self.mac = text(value),
                "mtu" => self.mtu = text(value),
                "accept-ra" | "accept_ra" => self.accept_ra = value.flag(),
                _ => problems.push(format!("`{key}` of a card in network-config is not supported")),
            }
        }
        // The address names the card for sure; the name is the one of another system.
        if self.mac.is_some() {
            self.name = None;
        }
        for subnet in item.get("subnets").map(Value::items).unwrap_or_default() {
            self.subnet(subnet, problems);
        }
    }

    fn subnet(&mut self, subnet: &Value, problems: &mut Vec<String>) {
        let get = |key: &str| subnet.get(key).and_then(text);
        match get("type").as_deref().unwrap_or_default() {
            "dhcp" | "dhcp4" => self.dhcp4 = true,
            "dhcp6" | "ipv6_dhcpv6-stateful" => self.dhcp6 = true,
            "ipv6_slaac" | "ipv6_dhcpv6-stateless" => self.accept_ra = Some(true),
            "manual" => {}
            "static" | "static6" => match (get("address"), get("netmask")) {
                (Some(address), None) => self.addresses.push(address),
                (Some(address), Some(mask)) if !address.contains('/') => match prefix(&mask) {
                    Some(length) => self.addresses.push(format!("{address}/{length}")),
                    None => problems.push("a netmask in network-config is not one".into()),
                },
                (Some(address), Some(_)) => self.addresses.push(address),
                (None, _) => problems.push("a static subnet in network-config has no address".into()),
            },
            kind => problems.push(format!("a subnet of type `{kind}` in network-config is not supported")),
        }
        if let Some(gateway) = get("gateway") {
            self.routes.push((None, gateway, None));
        }
        self.servers.extend(subnet.get("dns_nameservers").and_then(Value::texts).unwrap_or_default());
        self.domains.extend(subnet.get("dns_search").and_then(Value::texts).unwrap_or_default());
        for route in subnet.get("routes").map(Value::items).unwrap_or_default() {
            let get = |key: &str| route.get(key).and_then(text);
            let network = get("network").or(get("destination"));
            let length = get("netmask").map(|mask| prefix(&mask));
            match (network, length, get("gateway")) {
                (Some(network), None, Some(gateway)) => self.routes.push((destination(network), gateway, get("metric"))),
                (Some(network), Some(Some(length)), Some(gateway)) => {
                    self.routes.push((destination(format!("{network}/{length}")), gateway, get("metric")));
                }
                _ => problems.push("a route in network-config is not understood".into()),
            }
        }
    }

    fn read_2(&mut self, name: &str, card: &Value, problems: &mut Vec<String>) {
        for (key, value) in card.pairs() {
            match key.as_str() {
                "match" => {
                    for (key, value) in value.pairs() {
                        match key.as_str() {
                            "macaddress" => self.mac = text(value),
                            "name" => self.name = text(value),
                            "driver" => self.driver = text(value),
                            _ => problems.push(format!("`match.{key}` of `{name}` in network-config is not supported")),
                        }
                    }
                }
                "dhcp4" => self.dhcp4 = flag(value),
                "dhcp6" => self.dhcp6 = flag(value),
                "accept-ra" => self.accept_ra = value.flag(),
                "optional" => self.optional = flag(value),
                "link-local" => self.link_local = value.items().iter().any(|item| item.text() == Some("ipv4")),
                "mtu" => self.mtu = text(value),
                "dhcp-identifier" => self.dhcp_by_mac = value.text() == Some("mac"),
                "addresses" => match value.texts() {
                    Some(addresses) => self.addresses.extend(addresses),
                    None => problems.push(format!("`addresses` of `{name}` in network-config is not a list of addresses")),
                },
                "gateway4" | "gateway6" => self.routes.extend(text(value).map(|gateway| (None, gateway, None))),
                "routes" => {
                    for route in value.items() {
                        let get = |key: &str| route.get(key).and_then(text);
                        match (get("to"), get("via")) {
                            (Some(to), Some(via)) => self.routes.push((destination(to), via, get("metric"))),
                            _ => problems.push(format!("a route of `{name}` in network-config has no `to` or no `via`")),
                        }
                    }
                }
                "nameservers" => {
                    self.servers.extend(value.get("addresses").and_then(Value::texts).unwrap_or_default());
                    self.domains.extend(value.get("search").and_then(Value::texts).unwrap_or_default());
                }
                "set-name" => {
                    problems.push(format!("`set-name` of `{name}` in network-config is not supported: the card keeps its name"))
                }
                _ => problems.push(format!("`{key}` of `{name}` in network-config is not supported")),
            }
        }
        if self.mac.is_none() && self.name.is_none() && self.driver.is_none() {
            self.name = Some(name.to_string());
        }
    }

    /// The file for networkd.
    fn text(&self) -> Result<String, String> {
        let plain = |value: &String| value.chars().all(|each| each.is_ascii_graphic());
        let routes = self.routes.iter().flat_map(|(to, via, metric)| [to.as_ref(), Some(via), metric.as_ref()]).flatten();
        let all = [&self.mac, &self.name, &self.driver, &self.mtu].into_iter().flatten();
        if !all.chain(routes).chain(&self.addresses).chain(&self.servers).chain(&self.domains).all(plain) {
            return Err("a value has characters that do not belong there".into());
        }
        let mut out = String::from("[Match]\n");
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(out, "{name}={value}");
        };
        for (name, value) in [("MACAddress", &self.mac), ("Name", &self.name), ("Driver", &self.driver)] {
            if let Some(value) = value {
                line(name, value);
            }
        }
        if self.mtu.is_some() || self.optional {
            line("\n[Link]\nRequiredForOnline", if self.optional { "no" } else { "yes" });
            if let Some(mtu) = &self.mtu {
                line("MTUBytes", mtu);
            }
        }
        let dhcp = match (self.dhcp4, self.dhcp6) {
            (true, true) => "yes",
            (true, false) => "ipv4",
            (false, true) => "ipv6",
            (false, false) => "no",
        };
        line("\n[Network]\nDHCP", dhcp);
        if let Some(accept) = self.accept_ra {
            line("IPv6AcceptRA", if accept { "yes" } else { "no" });
        }
        if self.link_local {
            line("LinkLocalAddressing", "yes");
        }
        self.addresses.iter().for_each(|address| line("Address", address));
        self.servers.iter().for_each(|server| line("DNS", server));
        if !self.domains.is_empty() {
            line("Domains", &self.domains.join(" "));
        }
        if self.dhcp_by_mac {
            line("\n[DHCPv4]\nClientIdentifier", "mac");
        }
        for (to, via, metric) in &self.routes {
            line("\n[Route]\nGateway", via);
            if let Some(to) = to {
                line("Destination", to);
            }
            if let Some(metric) = metric {
                line("Metric", metric);
            }
        }
        Ok(out)
    }
}

fn destination(to: String) -> Option<String> {
    (!matches!(to.as_str(), "default" | "0.0.0.0/0" | "::/0")).then_some(to)
}

/// The length of a prefix written as a number or as a netmask of IPv4 or IPv6.
fn prefix(mask: &str) -> Option<u32> {
    if let Ok(length) = mask.parse::<u32>() {
        return (length <= 128).then_some(length);
    }
    let bits = match mask.parse::<std::net::IpAddr>().ok()? {
        std::net::IpAddr::V4(mask) => u128::from(mask.to_bits()) << 96,
        std::net::IpAddr::V6(mask) => mask.to_bits(),
    };
    let ones = bits.leading_ones();
    (bits.count_ones() == ones).then_some(ones)
}
