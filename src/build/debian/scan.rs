//! What may be in no layer at all: private keys, machine identities and random seeds.
//!
//! [`normalise`](super::normalise) removes the ones packages make; this is the check behind it,
//! asked for every file while a layer is packed.

/// Bytes of a file's start that [`forbidden`] looks at; more does no harm.
pub const HEAD: usize = 16 * 1024;

/// Marks of private keys in PEM and of OpenSSH and PuTTY; the line must start with one.
const KEYS: [(&str, &str); 8] = [
    ("-----BEGIN PRIVATE KEY-----", "a private key"),
    ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "an encrypted private key"),
    ("-----BEGIN RSA PRIVATE KEY-----", "an RSA private key"),
    ("-----BEGIN EC PRIVATE KEY-----", "an EC private key"),
    ("-----BEGIN DSA PRIVATE KEY-----", "a DSA private key"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "an OpenSSH private key"),
    ("-----BEGIN PGP PRIVATE KEY BLOCK-----", "an OpenPGP private key"),
    ("PuTTY-User-Key-File-", "a PuTTY private key"),
];

/// Folders whose keys are test data or documentation, known to everybody who has the package.
const PUBLIC: [&str; 11] =
    ["doc", "docs", "test", "tests", "testing", "testdata", "test-data", "test_data", "fixtures", "examples", "__tests__"];

/// Files that hold a machine's identity or randomness; they may be there, but empty.
const SEEDS: [(&str, &str); 9] = [
    ("etc/machine-id", "a machine-id"),
    ("var/lib/dbus/machine-id", "a machine-id"),
    ("var/lib/systemd/random-seed", "a random seed"),
    ("var/lib/urandom/random-seed", "a random seed"),
    ("var/lib/random-seed", "a random seed"),
    ("var/lib/systemd/credential.secret", "a host's credential key"),
    ("boot/loader/random-seed", "a random seed"),
    ("boot/efi/loader/random-seed", "a random seed"),
    ("efi/loader/random-seed", "a random seed"),
];

/// Why a file may not be in a layer: `path` from the tree's root without a leading `/`, `mode` as
/// in `stat` (only regular files are judged), `head` its first [`HEAD`] bytes.
pub fn forbidden(path: &str, mode: u32, head: &[u8]) -> Option<&'static str> {
    const FORMAT: u32 = 0o170_000;
    const REGULAR: u32 = 0o100_000;
    if mode & FORMAT != REGULAR {
        return None;
    }
    let path = path.trim_start_matches("./").trim_start_matches('/');
    if let Some((_, reason)) = SEEDS.iter().find(|(seed, _)| *seed == path) {
        // `uninitialized` is what systemd writes into images on purpose (machine-id(5)).
        return (!head.trim_ascii().is_empty() && head.trim_ascii() != b"uninitialized").then_some(reason);
    }
    let reason = key(head)?;
    let is_public = path.split('/').rev().skip(1).any(|folder| PUBLIC.contains(&folder));
    (!is_public).then_some(reason)
}

/// The kind of key at the start of a line, when what follows is one: programs and manuals hold
/// the marks too.
fn key(head: &[u8]) -> Option<&'static str> {
    // Cheap for nearly all files: the marks have one of two starts.
    if !contains(head, b"-----BEGIN ") && !head.starts_with(b"PuTTY-User-Key-File-") {
        return None;
    }
    let lines: Vec<&[u8]> = head.split(|&byte| byte == b'\n').map(|line| line.trim_ascii_end()).collect();
    lines.iter().enumerate().find_map(|(at, line)| {
        let (_, reason) = KEYS.iter().find(|(mark, _)| line.starts_with(mark.as_bytes()))?;
        let body = lines[at + 1..].iter().find(|line| !line.is_empty())?;
        is_key_body(body).then_some(*reason)
    })
}

/// The first line after a mark: base64, or a header like `Proc-Type: 4,ENCRYPTED`.
fn is_key_body(line: &[u8]) -> bool {
    const HEADERS: [&[u8]; 6] = [b"Proc-Type:", b"DEK-Info:", b"Version:", b"Comment:", b"Encryption:", b"Hash:"];
    HEADERS.iter().any(|header| line.starts_with(header))
        || (line.len() >= 16 && line.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')))
}

fn contains(head: &[u8], needle: &[u8]) -> bool {
    // The first byte is rare in programs and common in nothing: a scan for it, then the rest.
    let mut rest = head;
    while let Some(at) = rest.iter().position(|byte| byte == &needle[0]) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_identities_are_found_and_their_likes_are_not() {
        // Put together here, so that no scan of this file takes it for a key.
        let pem = |kind: &str, body: &str| format!("-----BEGIN {kind}PRIVATE KEY-----\n{body}\n");
        let base64 = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcw";
        let file = 0o100_644;
        let cases: [(&str, u32, String, Option<&str>); 20] = [
            ("etc/ssl/private/x.key", file, pem("", base64), Some("a private key")),
            ("etc/ssh/ssh_host_rsa_key", file, pem("OPENSSH ", base64), Some("an OpenSSH private key")),
            (
                "srv/combined.pem",
                file,
                format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n{}", pem("RSA ", base64)),
                Some("an RSA private key"),
            ),
            ("srv/dos.pem", file, pem("EC ", base64).replace('\n', "\r\n"), Some("an EC private key")),
            ("srv/old.pem", file, pem("RSA ", "Proc-Type: 4,ENCRYPTED"), Some("an RSA private key")),
            ("root/k.ppk", file, format!("PuTTY-User-Key-File-{}: ssh-rsa\nEncryption: none\n", 2), Some("a PuTTY private key")),
            ("usr/share/doc/x/examples/key.pem", file, pem("", base64), None),
            ("usr/lib/python3/dist-packages/x/test/keys/k.pem", file, pem("", base64), None),
            ("usr/lib/node_modules/x/test/k.pem", file, pem("", base64), None),
            // The file's own name does not excuse it.
            ("srv/test", file, pem("", base64), Some("a private key")),
            ("usr/lib/x.py", file, format!("X = '{}'", pem("", "...")), None),
            ("usr/share/man/x", file, pem("", "This line is text."), None),
            ("etc/link", 0o120_777, pem("", base64), None),
            ("etc/ssl/certs/ca.pem", file, format!("-----BEGIN CERTIFICATE-----\n{base64}\n"), None),
            ("etc/machine-id", file, "0123456789abcdef0123456789abcdef\n".into(), Some("a machine-id")),
            ("etc/machine-id", file, String::new(), None),
            ("/etc/machine-id", file, "uninitialized\n".into(), None),
            ("./var/lib/systemd/random-seed", file, "x".into(), Some("a random seed")),
            ("srv/etc/machine-id", file, "x".into(), None),
            ("usr/bin/sh", 0o100_755, "\u{7f}ELF-----".into(), None),
        ];
        for (path, mode, head, expected) in cases {
            assert_eq!(forbidden(path, mode, head.as_bytes()), expected, "{path}");
        }
    }
}
