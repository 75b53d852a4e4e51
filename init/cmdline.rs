//! The kernel's command line.

use super::guid::Hash;

/// The value of the last `key=value`; `Some("")` for a bare `key`.
pub fn value<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    let words = cmdline.split_ascii_whitespace().map(|word| word.trim_matches('"'));
    words.filter_map(|word| if word == key { Some("") } else { word.strip_prefix(key)?.strip_prefix('=') }).next_back()
}

/// The root hash of `pipeline.roothash=`.
///
/// # Errors
/// When it is missing or is not 64 hexadecimal digits.
pub fn root_hash(cmdline: &str) -> Result<Hash, String> {
    let text = value(cmdline, "pipeline.roothash").ok_or("the kernel command line has no pipeline.roothash=")?;
    Hash::parse(text).ok_or(format!("pipeline.roothash=`{text}` is not 64 hexadecimal digits"))
}
