//! Versions of Debian packages (Debian Policy, section 5.6.12).

use std::cmp::Ordering;

/// Which of two versions is the newer one.
pub fn compare(one: &str, two: &str) -> Ordering {
    fn parts(version: &str) -> (u64, &str, &str) {
        let (epoch, rest) = version.split_once(':').map_or((0, version), |(epoch, rest)| (epoch.parse().unwrap_or(0), rest));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
        (epoch, upstream, revision)
    }
    let ((epoch_one, upstream_one, revision_one), (epoch_two, upstream_two, revision_two)) = (parts(one), parts(two));
    epoch_one
        .cmp(&epoch_two)
        .then_with(|| compare_part(upstream_one.as_bytes(), upstream_two.as_bytes()))
        .then_with(|| compare_part(revision_one.as_bytes(), revision_two.as_bytes()))
}

/// Runs of other characters and of digits in turns.
fn compare_part(mut one: &[u8], mut two: &[u8]) -> Ordering {
    // `~` before the end, the end before letters, letters before the rest.
    let weight = |byte: Option<&u8>| match byte {
        Some(b'~') => -1,
        None => 0,
        Some(digit) if digit.is_ascii_digit() => 0,
        Some(letter) if letter.is_ascii_alphabetic() => i32::from(*letter),
        Some(other) => i32::from(*other) + 256,
    };
    let digit = |bytes: &[u8]| bytes.first().is_some_and(u8::is_ascii_digit);
    loop {
        while (!one.is_empty() && !digit(one)) || (!two.is_empty() && !digit(two)) {
            let order = weight(one.first()).cmp(&weight(two.first()));
            if order != Ordering::Equal {
                return order;
            }
            one = one.get(1..).unwrap_or_default();
            two = two.get(1..).unwrap_or_default();
        }
        let number = |bytes: &[u8]| bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (length_one, length_two) = (number(one), number(two));
        let strip = |bytes: &[u8]| -> Vec<u8> { bytes.iter().copied().skip_while(|byte| *byte == b'0').collect() };
        let (value_one, value_two) = (strip(&one[..length_one]), strip(&two[..length_two]));
        let order = value_one.len().cmp(&value_two.len()).then_with(|| value_one.cmp(&value_two));
        if order != Ordering::Equal {
            return order;
        }
        (one, two) = (&one[length_one..], &two[length_two..]);
        if one.is_empty() && two.is_empty() {
            return Ordering::Equal;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `dpkg --compare-versions` says the same.
    #[test]
    fn versions_compare_as_dpkg_does() {
        let cases = [
            ("1.0", "1.0", "eq"),
            ("1.0~rc1", "1.0", "lt"),
            ("1.0", "1.0a", "lt"),
            ("1.0a", "1.0+b", "lt"),
            ("1:0.1", "9", "gt"),
            ("1.10", "1.9", "gt"),
            ("1.0-1", "1.0-1+deb13u1", "lt"),
            ("1.0-1~bpo", "1.0-1", "lt"),
            ("2:1.0-010", "2:1.0-10", "eq"),
            ("1.0-1", "1.0", "gt"),
            ("257.13-1~deb13u1", "257.9-1", "gt"),
        ];
        for (one, two, expected) in cases {
            let found = match compare(one, two) {
                Ordering::Less => "lt",
                Ordering::Equal => "eq",
                Ordering::Greater => "gt",
            };
            assert_eq!(found, expected, "{one} {two}");
            let status = crate::cmd::Cmd::new("dpkg").args(["--compare-versions", one, expected, two]).run();
            assert!(status.is_ok(), "dpkg: {one} {expected} {two}");
        }
    }
}
