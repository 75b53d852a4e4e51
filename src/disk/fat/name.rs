//! Names: which ones FAT can hold, their long entries and their short stand-ins
//! (specification, "Long Directory Entries" and "The Basis-Name Generation Algorithm").

use super::{ATTRIBUTE_LONG, ENTRY};

/// UTF-16 units in one long entry, and where they are in it.
const UNITS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

/// Why FAT cannot hold a name.
pub(super) fn problem(name: &str) -> Option<&'static str> {
    if name.is_empty() || name == "." || name == ".." {
        return Some("is no name");
    }
    if name.chars().any(|character| character < ' ' || character == '\u{7f}' || r#""*/:<>?\|"#.contains(character)) {
        return Some("has a character that FAT cannot hold");
    }
    if name.ends_with(['.', ' ']) {
        return Some("ends with a dot or a space");
    }
    (name.encode_utf16().count() > 255).then_some("is longer than 255 characters")
}

/// How names are compared: as the kernel does, without the case of letters.
pub(super) fn folded(name: &str) -> String {
    name.to_uppercase()
}

/// Whether a character may be in a short name as it is.
fn is_short(character: char) -> bool {
    character.is_ascii_uppercase() || character.is_ascii_digit() || "!#$%&'()-@^_`{}~".contains(character)
}

/// A name of one to eight characters and an extension of at most three, padded.
fn padded(stem: &str, extension: &str) -> [u8; 11] {
    let mut bytes = [b' '; 11];
    bytes[..stem.len()].copy_from_slice(stem.as_bytes());
    bytes[8..8 + extension.len()].copy_from_slice(extension.as_bytes());
    bytes
}

/// The short name for `name` that `taken` does not have, and whether it says all: no long
/// entries are needed then.
pub(super) fn short(name: &str, taken: impl Fn(&[u8; 11]) -> bool) -> ([u8; 11], bool) {
    let (stem, extension) = name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).unwrap_or((name, ""));
    let clean = |text: &str, most: usize| -> String {
        let upper = text.chars().filter(|character| !matches!(character, ' ' | '.')).flat_map(char::to_uppercase);
        upper.map(|character| if is_short(character) { character } else { '_' }).take(most).collect()
    };
    let (stem_clean, extension_clean) = (clean(stem, 8), clean(extension, 3));
    let plain = if extension.is_empty() { stem_clean.clone() } else { format!("{stem_clean}.{extension_clean}") };
    let whole = padded(&stem_clean, &extension_clean);
    // Only the case is lost: no tail. Windows does the same.
    if plain == name.to_uppercase() && !stem_clean.is_empty() && !taken(&whole) {
        return (whole, plain == name);
    }
    for number in 1_u32.. {
        let tail = format!("~{number}");
        let kept: String = stem_clean.chars().take(8 - tail.len()).collect();
        let candidate = padded(&format!("{kept}{tail}"), &extension_clean);
        if !taken(&candidate) {
            return (candidate, false);
        }
    }
    unreachable!("a folder has fewer entries than there are numbers")
}

/// Binds long entries to their short one.
fn checksum(short: &[u8; 11]) -> u8 {
    short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// The long entries of `name`, last part first, as they stand before the short one.
pub(super) fn long_entries(name: &str, short: &[u8; 11]) -> Vec<[u8; ENTRY]> {
    let units: Vec<u16> = name.encode_utf16().collect();
    let count = units.len().div_ceil(UNITS.len());
    let part = |index: usize| {
        let mut bytes = [0; ENTRY];
        let last = if index + 1 == count { 0x40 } else { 0 };
        bytes[0] = (index + 1) as u8 | last;
        bytes[11] = ATTRIBUTE_LONG;
        bytes[13] = checksum(short);
        for (at, place) in UNITS.into_iter().enumerate() {
            // Behind the name a zero, behind that all ones.
            let unit = match index * UNITS.len() + at {
                at if at < units.len() => units[at],
                at if at == units.len() => 0,
                _ => u16::MAX,
            };
            bytes[place..place + 2].copy_from_slice(&unit.to_le_bytes());
        }
        bytes
    };
    (0..count).rev().map(part).collect()
}

/// Collects long entries while a folder is read.
#[derive(Debug, Default)]
pub(super) struct LongName {
    units: Vec<u16>,
    /// The number of the part that has to come next, 0 when the name is whole.
    next: u8,
    sum: u8,
}

impl LongName {
    /// Takes in a long entry.
    pub(super) fn push(&mut self, entry: &[u8]) {
        let number = entry[0] & 0x3f;
        if entry[0] & 0x40 != 0 {
            *self = Self { units: Vec::new(), next: number, sum: entry[13] };
        }
        if number == 0 || number != self.next || entry[13] != self.sum {
            *self = Self::default();
            return;
        }
        let units = UNITS.map(|at| u16::from_le_bytes([entry[at], entry[at + 1]]));
        let kept = units.into_iter().take_while(|unit| *unit != 0);
        self.units.splice(0..0, kept);
        self.next -= 1;
    }

    /// The name for the short entry that follows: the long one when it belongs to it.
    pub(super) fn take(&mut self, short: &[u8; 11], cases: u8) -> String {
        let long = std::mem::take(self);
        if long.next == 0 && !long.units.is_empty() && long.sum == checksum(short) {
            return String::from_utf16_lossy(&long.units);
        }
        let text = |bytes: &[u8], lower: bool| {
            let text = String::from_utf8_lossy(bytes).trim_end().to_string();
            if lower { text.to_lowercase() } else { text }
        };
        // Bits 3 and 4 of byte 12: Windows NT's way to say that stem or extension are in lower case.
        let (stem, extension) = (text(&short[..8], cases & 8 != 0), text(&short[8..], cases & 16 != 0));
        if extension.is_empty() { stem } else { format!("{stem}.{extension}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names() {
        let cases = [
            ("BOOTX64.EFI", "BOOTX64 EFI", true),
            ("EFI", "EFI        ", true),
            ("grub.cfg", "GRUB    CFG", false),
            ("loader.conf", "LOADER~1CON", false),
            ("pipeline_000001_a.efi", "PIPELI~1EFI", false),
            ("pipeline_000002_b+3.efi", "PIPELI~1EFI", false),
            ("a+b", "A_B~1      ", false),
            (".hidden", "HIDDEN~1   ", false),
            ("ä b.c.d", "_BC~1   D  ", false),
            ("taken.txt", "TAKEN~2 TXT", false),
        ];
        for (name, expected, whole) in cases {
            let taken = |short: &[u8; 11]| [b"TAKEN   TXT", b"TAKEN~1 TXT"].contains(&short);
            let (short, found) = short(name, taken);
            assert_eq!((std::str::from_utf8(&short).unwrap(), found), (expected, whole), "{name}");
        }
    }

    #[test]
    fn long_names_read_back() {
        for name in ["a", "thirteen char", "fourteen chars", "pipeline_000002_b+3.efi", "ä€𝄞.x", &"n".repeat(255)] {
            let (short, _) = short(name, |_| false);
            let mut long = LongName::default();
            long_entries(name, &short).iter().for_each(|entry| long.push(entry));
            assert_eq!(long.take(&short, 0), name);
        }
        // One that belongs to another short name is left out.
        let mut long = LongName::default();
        long_entries("other", b"OTHER      ").iter().for_each(|entry| long.push(entry));
        assert_eq!(long.take(b"GRUB    CFG", 0x18), "grub.cfg");
    }

    #[test]
    fn names_that_cannot_be() {
        let cases = [
            ("", Some("is no name")),
            ("..", Some("is no name")),
            ("a:b", Some("has a character that FAT cannot hold")),
            ("a\nb", Some("has a character that FAT cannot hold")),
            ("a.", Some("ends with a dot or a space")),
            ("a+b ä.efi", None),
        ];
        for (name, expected) in cases {
            assert_eq!(problem(name), expected, "{name}");
        }
        assert_eq!(problem(&"n".repeat(256)), Some("is longer than 255 characters"));
    }
}
