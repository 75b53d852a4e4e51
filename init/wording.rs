//! How hostnames, users, credentials of apps and their environment are written.

use super::yaml;

/// `pattern` with a hexadecimal digit made of the machine-id in place of each `?`; the machine-id does not show in them.
pub fn filled(pattern: &str, machine_id: &str) -> String {
    // FNV-1a, 64 bits.
    let byte = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let mut count = 0;
    let digit = |c: char| {
        if c != '?' {
            return c;
        }
        count += 1;
        let hash = format!("hostname {count} {machine_id}").bytes().fold(0xcbf2_9ce4_8422_2325, byte);
        char::from_digit((hash >> 60) as u32, 16).unwrap_or('0')
    };
    pattern.chars().map(digit).collect()
}

/// Letters, digits and hyphens in parts of at most 63 (RFC 1123), 64 in all (Linux).
pub fn is_hostname(name: &str) -> bool {
    let part = |part: &str| {
        let plain = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        plain && (1..=63).contains(&part.len()) && !part.starts_with('-') && !part.ends_with('-')
    };
    name.len() <= 64 && name.split('.').all(part)
}

/// The text of hosts(5) with the machine's own name in it; `None`: it has it already.
pub fn hosts_with(hosts: Option<&str>, name: &str) -> Option<String> {
    let hosts = hosts.unwrap_or("127.0.0.1\tlocalhost\n::1\tlocalhost\n");
    let names = |line: &str| line.split('#').next().unwrap_or_default().split_whitespace().skip(1).any(|word| word == name);
    if hosts.lines().any(names) {
        return None;
    }
    let kept = hosts.lines().filter(|line| !line.starts_with("127.0.1.1")).map(|line| format!("{line}\n")).collect::<String>();
    Some(format!("{kept}127.0.1.1\t{name}\n"))
}

/// User and group of a name in passwd(5).
pub fn owner(passwd: &str, user: &str) -> Option<(u32, u32)> {
    let mut lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.len() >= 4 && fields[0] == user)?;
    Some((line[2].parse().ok()?, line[3].parse().ok()?))
}

/// What a credential says to an app.
#[derive(Debug, PartialEq, Eq)]
pub enum ForApp<'a> {
    Environment { app: &'a str },
    Secret { app: &'a str, key: &'a str },
}

/// Reads the name `app.NAME.env` or `app.NAME.secret.KEY`.
pub fn for_app(name: &str) -> Option<ForApp<'_>> {
    let rest = name.strip_prefix("app.")?;
    if let Some((app, key)) = rest.split_once(".secret.") {
        return (!app.is_empty() && !key.is_empty()).then_some(ForApp::Secret { app, key });
    }
    rest.strip_suffix(".env").filter(|app| !app.is_empty()).map(|app| ForApp::Environment { app })
}

/// The user an app runs as, from its `app.json`: `uid_base + user`.
pub fn app_owner(text: &str) -> Option<u32> {
    let app = yaml::parse(text).ok()?;
    let number = |key: &str| app.get(key)?.text()?.parse::<u32>().ok();
    let (base, user) = (number("uid_base")?, number("user")?);
    if user < base { base.checked_add(user) } else { Some(user) }
}

/// A name a shell takes for a variable.
pub fn is_variable(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Lines `KEY=VALUE` in the words of systemd's `EnvironmentFile=`, so that every value arrives as it was
/// written (a pair of quotes around all of it is taken off), and the numbers of the lines that are not.
pub fn environment(text: &str) -> (String, Vec<usize>) {
    let (mut out, mut wrong) = (String::new(), Vec::new());
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim_end_matches('\r');
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=').filter(|(key, _)| is_variable(key.trim())) else {
            wrong.push(number);
            continue;
        };
        let unquoted = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
        let value = unquoted('"').or_else(|| unquoted('\'')).unwrap_or(value);
        let escaped = value.chars().flat_map(|each| ['\\'].into_iter().filter(move |_| "\"\\`$".contains(each)).chain([each]));
        out += &format!("{}=\"{}\"\n", key.trim(), escaped.collect::<String>());
    }
    (out, wrong)
}
