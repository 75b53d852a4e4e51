//! GRUB's environment block: 1024 bytes of `NAME=VALUE` lines, filled up with `#`.

/// Length of the file, which never changes.
pub const LENGTH: usize = 1024;
const HEADER: &str = "# GRUB Environment Block\n";

/// The variables in their order.
///
/// # Errors
/// When it is not an environment block.
pub fn parse(block: &[u8]) -> Result<Vec<(String, String)>, String> {
    let text = std::str::from_utf8(block).map_err(|_| "grubenv is not text".to_string())?;
    let lines = text.strip_prefix(HEADER).ok_or("grubenv has no header")?;
    let lines = lines.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    Ok(lines.filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect())
}

/// The block with `changes` made: a variable that is there keeps its place, a new one goes to the end.
///
/// # Errors
/// When `block` is not an environment block or the result is longer than 1024 bytes.
pub fn edited(block: &[u8], changes: &[(String, &str)]) -> Result<Vec<u8>, String> {
    let mut variables = parse(block)?;
    for (name, value) in changes {
        match variables.iter_mut().find(|(old, _)| old == name) {
            Some(variable) => variable.1 = value.to_string(),
            None => variables.push((name.clone(), value.to_string())),
        }
    }
    let lines = variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect::<String>();
    let mut out = format!("{HEADER}{lines}").into_bytes();
    if out.len() > LENGTH {
        return Err("grubenv is full".into());
    }
    out.resize(LENGTH, b'#');
    Ok(out)
}
