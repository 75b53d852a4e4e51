//! Licences as SPDX expressions: from Debian's machine-readable copyright files, and from what
//! Python and npm packages say.
//!
//! Debian's short names (copyright format 1.0, "License names") are mapped to SPDX identifiers; what
//! SPDX does not list becomes `LicenseRef-NAME`. A copyright file in free text tells nothing here:
//! nothing is guessed from words in it.

use std::collections::BTreeSet;
use std::fmt;

/// Debian's and other common names that are not SPDX's identifiers; compared without regard to case.
const NAMES: [(&str, &str); 42] = [
    ("Expat", "MIT"),
    ("MIT License", "MIT"),
    ("The MIT License", "MIT"),
    ("MIT/Expat", "MIT"),
    ("Apache", "Apache-2.0"),
    ("Apache-2", "Apache-2.0"),
    ("Apache 2", "Apache-2.0"),
    ("Apache 2.0", "Apache-2.0"),
    ("Apache License 2.0", "Apache-2.0"),
    ("Apache License, Version 2.0", "Apache-2.0"),
    ("Apache License Version 2.0", "Apache-2.0"),
    ("Apache Software License", "Apache-2.0"),
    ("BSD-2-clauses", "BSD-2-Clause"),
    ("BSD-3-clauses", "BSD-3-Clause"),
    ("BSD 2-Clause", "BSD-2-Clause"),
    ("BSD 3-Clause", "BSD-3-Clause"),
    ("BSD 2-Clause License", "BSD-2-Clause"),
    ("BSD 3-Clause License", "BSD-3-Clause"),
    ("New BSD", "BSD-3-Clause"),
    ("Modified BSD License", "BSD-3-Clause"),
    ("Artistic", "Artistic-1.0-Perl"),
    ("Artistic-2", "Artistic-2.0"),
    ("CC0", "CC0-1.0"),
    ("public-domain", "LicenseRef-public-domain"),
    ("Public Domain", "LicenseRef-public-domain"),
    ("PSF", "PSF-2.0"),
    ("PSF-2", "PSF-2.0"),
    ("PSFL", "PSF-2.0"),
    ("Python Software Foundation License", "PSF-2.0"),
    ("ISC License", "ISC"),
    ("ISC License (ISCL)", "ISC"),
    ("The Unlicense (Unlicense)", "Unlicense"),
    ("ZLIB/LIBPNG", "zlib-acknowledgement"),
    ("Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0"),
    ("MPL 2.0", "MPL-2.0"),
    ("GNU General Public License v2 (GPLv2)", "GPL-2.0-only"),
    ("GNU General Public License v2 or later (GPLv2+)", "GPL-2.0-or-later"),
    ("GNU General Public License v3 (GPLv3)", "GPL-3.0-only"),
    ("GNU General Public License v3 or later (GPLv3+)", "GPL-3.0-or-later"),
    ("GNU Lesser General Public License v2 or later (LGPLv2+)", "LGPL-2.0-or-later"),
    ("GNU Lesser General Public License v3 (LGPLv3)", "LGPL-3.0-only"),
    ("GNU Lesser General Public License v3 or later (LGPLv3+)", "LGPL-3.0-or-later"),
];
/// What Perl itself and most of its modules are under.
const PERL: [&str; 2] = ["Artistic-1.0-Perl", "GPL-1.0-or-later"];
/// Families whose names carry a version, with or without `+`.
const GNU: [&str; 4] = ["AGPL", "GFDL", "GPL", "LGPL"];
/// Longer free text in a licence field is the licence itself, and no name.
const LONGEST_NAME: usize = 64;
const REFERENCE: &str = "LicenseRef-";

/// Licences joined by one conjunction, or one licence.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Joined {
    One(String),
    All(Vec<Joined>),
    Any(Vec<Joined>),
}

impl Joined {
    /// Parts of the same kind are taken apart, and each is kept once; nothing of nothing.
    fn all(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        let parts = parts.into_iter().flat_map(|part| match part {
            Self::All(parts) => parts,
            other => vec![other],
        });
        Self::once(parts, Self::All)
    }

    fn any(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        let parts = parts.into_iter().flat_map(|part| match part {
            Self::Any(parts) => parts,
            other => vec![other],
        });
        Self::once(parts, Self::Any)
    }

    fn once(parts: impl Iterator<Item = Self>, join: fn(Vec<Self>) -> Self) -> Option<Self> {
        let mut kept: Vec<Self> = Vec::new();
        for part in parts {
            if !kept.contains(&part) {
                kept.push(part);
            }
        }
        if kept.len() > 1 { Some(join(kept)) } else { kept.pop() }
    }

    fn sort(&mut self) {
        if let Self::All(parts) = self {
            parts.sort_by_cached_key(ToString::to_string);
        }
    }
}

impl fmt::Display for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (parts, conjunction) = match self {
            Self::One(name) => return f.write_str(name),
            Self::All(parts) => (parts, " AND "),
            Self::Any(parts) => (parts, " OR "),
        };
        for (index, part) in parts.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { conjunction })?;
            match part {
                Self::One(name) => f.write_str(name)?,
                other => write!(f, "({other})")?,
            }
        }
        Ok(())
    }
}

/// The licences of a Debian copyright file: all that its paragraphs name, joined by `AND`. `None`
/// when the file is not machine-readable or names none.
pub fn of_copyright(text: &str) -> Option<String> {
    let text = text.trim_start_matches('\u{feff}');
    let paragraphs: Vec<&str> = text.split("\n\n").collect();
    let header = super::field(paragraphs.first()?.trim_start(), "Format")?;
    if !header.contains("copyright-format/1.0") && !header.contains("dep5") && !header.contains("/DEP-5") {
        return None;
    }
    let mut licences = Vec::new();
    for paragraph in &paragraphs {
        // A paragraph with `License` alone holds the text of one that is named elsewhere.
        let named = ["Files", "Format"].into_iter().any(|field| super::field(paragraph, field).is_some());
        if named && let Some(licence) = super::field(paragraph, "License") {
            licences.extend(of_synopsis(licence.lines().next().unwrap_or_default().trim()));
        }
    }
    let mut all = Joined::all(licences)?;
    all.sort();
    Some(all.to_string())
}

/// A `License` field's first line: names with `and`, `or`, commas, `with … exception`.
fn of_synopsis(text: &str) -> Option<Joined> {
    // A comma before the conjunction binds least, then `or`, then `and` (copyright format 1.0, "Syntax").
    for separator in [", or ", ", and ", " or ", " and "] {
        let parts: Vec<&str> = text.split(separator).collect();
        if parts.len() > 1 {
            let parts: Option<Vec<Joined>> = parts.into_iter().map(|part| of_synopsis(part.trim_end_matches(','))).collect();
            return if separator.ends_with("or ") { Joined::any(parts?) } else { Joined::all(parts?) };
        }
    }
    of_name(text)
}

/// One licence by any of its names; `None` for no name at all.
fn of_name(name: &str) -> Option<Joined> {
    let name = name.trim();
    if name.is_empty() {
        return None;
    }
    if name.eq_ignore_ascii_case("Perl") {
        return Joined::any(PERL.map(|name| Joined::One(name.to_owned())));
    }
    let known = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, id)| (*id).to_owned());
    // Debian leaves `.0` out.
    let found = known.or_else(|| gnu(name)).or_else(|| listed(name).or_else(|| listed(&format!("{name}.0"))).map(str::to_owned));
    Some(Joined::One(found.unwrap_or_else(|| reference(name))))
}

/// `GPL-2+` and the like; SPDX tells `only` from `or-later`, and Debian's name without `+` means only.
fn gnu(name: &str) -> Option<String> {
    let (family, rest) = name.split_once('-')?;
    let family = GNU.into_iter().find(|known| known.eq_ignore_ascii_case(family))?;
    let (rest, invariants) = match rest.strip_prefix("NIV-") {
        Some(rest) => (rest, "-no-invariants"),
        None => (rest, ""),
    };
    let (version, later) = rest.strip_suffix('+').map_or((rest, false), |version| (version, true));
    let version = if version.contains('.') { version.to_owned() } else { format!("{version}.0") };
    let expression = format!("{family}-{version}{invariants}-{}", if later { "or-later" } else { "only" });
    listed(&expression).map(str::to_owned)
}

/// SPDX's identifier, written as SPDX does.
fn listed(name: &str) -> Option<&'static str> {
    let found = spdx::identifiers::LICENSES.iter().find(|licence| licence.name.eq_ignore_ascii_case(name))?;
    // GNU's names without `only` or `or-later` are deprecated, since they do not say which.
    match gnu_only(found.name) {
        Some(precise) => precise,
        None => Some(found.name),
    }
}

/// For a deprecated name of the GNU family, the one that replaces it.
fn gnu_only(name: &str) -> Option<Option<&'static str>> {
    let family = name.split('-').next().filter(|family| GNU.contains(family))?;
    if name.ends_with("-only") || name.ends_with("-or-later") || family.is_empty() {
        return None;
    }
    let wanted = name.strip_suffix('+').map_or_else(|| format!("{name}-only"), |name| format!("{name}-or-later"));
    Some(spdx::identifiers::LICENSES.iter().find(|licence| licence.name == wanted).map(|licence| licence.name))
}

/// A name SPDX does not list (SPDX 2.3, Annex D: letters, digits, `-` and `.`).
fn reference(name: &str) -> String {
    let mut id = String::from(REFERENCE);
    for character in name.chars() {
        let kept = if character.is_ascii_alphanumeric() || character == '.' { character } else { '-' };
        if !(kept == '-' && id.ends_with('-')) {
            id.push(kept);
        }
    }
    id.trim_end_matches(['-', '.']).to_owned()
}

/// What a package's metadata says, which is an SPDX expression or any text. `None` for the text of a licence.
pub(super) fn of_metadata(text: &str) -> Option<String> {
    let text = text.trim();
    if text.is_empty() || text.contains('\n') || text.len() > LONGEST_NAME || ["UNKNOWN", "UNLICENSED"].contains(&text) {
        return None;
    }
    if text.to_ascii_uppercase().starts_with("SEE LICENSE IN") {
        return None;
    }
    if let Some((_, expression)) = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(text)) {
        return Some((*expression).to_owned());
    }
    // As it is written when it is one, with deprecated names replaced.
    if let Ok(parsed) = spdx::Expression::parse_mode(text, spdx::ParseMode::LAX) {
        let parts: Vec<String> = text
            .replace('(', " ( ")
            .replace(')', " ) ")
            .split_whitespace()
            .map(|word| match word.to_ascii_uppercase().as_str() {
                "AND" | "OR" | "WITH" => word.to_ascii_uppercase(),
                _ => gnu(word).or_else(|| listed(word).map(str::to_owned)).unwrap_or_else(|| word.to_owned()),
            })
            .collect();
        let text = parts.join(" ").replace("( ", "(").replace(" )", ")");
        if parsed.requirements().count() > 0 && is_valid(&text) {
            return Some(text);
        }
    }
    // Older npm and Cargo packages write `MIT/Apache-2.0`.
    if text.contains('/') && !text.contains("://") {
        return Joined::any(text.split('/').filter_map(of_name)).map(|joined| joined.to_string());
    }
    of_name(text).map(|joined| joined.to_string())
}

/// Every licence an expression names, sorted, each once: what a policy compares. Exceptions stay
/// with their licence, as in `GPL-2.0-only WITH Classpath-exception-2.0`.
pub fn names(expression: &str) -> Vec<String> {
    let expression = expression.replace(['(', ')'], " ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let names: BTreeSet<String> = words.split(|word| ["AND", "OR"].contains(word)).map(|name| name.join(" ")).collect();
    names.into_iter().filter(|name| !name.is_empty()).collect()
}

/// Whether an expression is one of SPDX's, names of our own included.
pub(super) fn is_valid(expression: &str) -> bool {
    // Some names of SPDX's list are deprecated there and yet what a package is under.
    let mode = spdx::ParseMode { allow_deprecated: true, ..spdx::ParseMode::STRICT };
    spdx::Expression::parse_mode(expression, mode).is_ok()
}

/// The `LicenseRef-…` names in an expression.
pub(super) fn references(expression: &str) -> Vec<String> {
    names(expression).into_iter().filter(|name| name.starts_with(REFERENCE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_synopses() {
        let cases = [
            ("GPL-2+", "GPL-2.0-or-later"),
            ("GPL-3", "GPL-3.0-only"),
            ("LGPL-2.1+", "LGPL-2.1-or-later"),
            ("GFDL-NIV-1.3+", "GFDL-1.3-no-invariants-or-later"),
            ("GFDL-1.3", "GFDL-1.3-only"),
            ("Expat", "MIT"),
            ("expat", "MIT"),
            ("Apache-2.0", "Apache-2.0"),
            ("BSD-3-clause", "BSD-3-Clause"),
            ("zlib", "Zlib"),
            ("CC-BY-SA-4.0", "CC-BY-SA-4.0"),
            ("public-domain", "LicenseRef-public-domain"),
            ("GPL-2+ with OpenSSL exception", "LicenseRef-GPL-2-with-OpenSSL-exception"),
            ("GPL-2+ or Artistic", "GPL-2.0-or-later OR Artistic-1.0-Perl"),
            ("GPL-2+ and Expat", "GPL-2.0-or-later AND MIT"),
            ("GPL-2+ or Artistic, and BSD-3-clause", "(GPL-2.0-or-later OR Artistic-1.0-Perl) AND BSD-3-Clause"),
            ("GPL-2 or LGPL-3 and Expat", "GPL-2.0-only OR (LGPL-3.0-only AND MIT)"),
            ("Expat and Expat", "MIT"),
            ("public-domain", "LicenseRef-public-domain"),
            ("Public Domain", "LicenseRef-public-domain"),
            ("GPL-17", "LicenseRef-GPL-17"),
            ("MPL-2", "MPL-2.0"),
            ("BSD-2-clause-NetBSD", "BSD-2-Clause-NetBSD"),
            ("PUBLIC-DOMAIN", "LicenseRef-public-domain"),
            ("GPL-2+ and Expat, and Expat", "GPL-2.0-or-later AND MIT"),
            ("other (see text)", "LicenseRef-other-see-text"),
        ];
        for (text, expected) in cases {
            assert_eq!(of_synopsis(text).map(|it| it.to_string()).as_deref(), Some(expected), "{text}");
            assert!(is_valid(expected), "{expected}");
        }
        assert_eq!(of_synopsis(" "), None);
    }

    #[test]
    fn every_replacement_is_an_expression() {
        for (_, expression) in NAMES {
            assert!(is_valid(expression), "{expression}");
        }
    }

    #[test]
    fn copyright_files() {
        let format = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n";
        let cases = [
            (
                format!(
                    "{format}Upstream-Name: x\n\nFiles: *\nCopyright: me\nLicense: GPL-2+\n\nFiles: debian/*\nLicense: Expat\n text\n\nLicense: GPL-2+\n The text\n .\n more\n"
                ),
                Some("GPL-2.0-or-later AND MIT"),
            ),
            (format!("{format}License: BSD-2-clause\n\nLicense: GPL-1\n only the text\n"), Some("BSD-2-Clause")),
            (
                format!("{format}\nFiles: a\nLicense: Expat or GPL-2\n\nFiles: b\nLicense: Zlib\n"),
                Some("(MIT OR GPL-2.0-only) AND Zlib"),
            ),
            (format!("{format}\nFiles: *\nCopyright: nobody\n"), None),
            ("This package was debianized by…\nLicense: GPL-2\n".into(), None),
            (String::new(), None),
        ];
        for (text, expected) in cases {
            assert_eq!(of_copyright(&text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn metadata_of_packages() {
        let cases = [
            ("MIT", Some("MIT")),
            ("mit", Some("MIT")),
            ("Apache 2.0", Some("Apache-2.0")),
            ("(MIT OR Apache-2.0)", Some("(MIT OR Apache-2.0)")),
            ("MIT or GPL-2.0", Some("MIT OR GPL-2.0-only")),
            ("MIT/Apache-2.0", Some("MIT OR Apache-2.0")),
            ("GPL-2.0+", Some("GPL-2.0-or-later")),
            ("GPL-2.0-only WITH Classpath-exception-2.0", Some("GPL-2.0-only WITH Classpath-exception-2.0")),
            ("BSD", Some("LicenseRef-BSD")),
            ("Dual License", Some("LicenseRef-Dual-License")),
            ("SEE LICENSE IN LICENSE.txt", None),
            ("UNKNOWN", None),
            ("", None),
            ("Permission is hereby granted, free of charge, to any person obtaining a copy of this", None),
            ("two\nlines", None),
        ];
        for (text, expected) in cases {
            assert_eq!(of_metadata(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn names_for_policies() {
        let expression = "(MIT OR GPL-2.0-only WITH Classpath-exception-2.0) AND LicenseRef-x AND MIT";
        assert_eq!(names(expression), ["GPL-2.0-only WITH Classpath-exception-2.0", "LicenseRef-x", "MIT"]);
        assert_eq!(references(expression), ["LicenseRef-x"]);
    }
}
