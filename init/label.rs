//! The label of a FAT or ISO 9660 file system, from its first bytes.

/// The file system's name for mount(2) and its label without the blanks at its end.
/// `bytes` is the start of the device, 36 KiB or what there is.
///
/// FAT: Microsoft's specification, section 3 (boot sector, offsets 43 and 71). ISO 9660: ECMA-119,
/// section 8.4 (volume identifier at 40 of the descriptor in sector 16).
pub fn read(bytes: &[u8]) -> Option<(&'static str, String)> {
    let text = |at: usize, length: usize| {
        let field = bytes.get(at..at + length)?;
        Some(String::from_utf8_lossy(field).trim_end_matches([' ', '\0']).to_string())
    };
    if bytes.get(32769..32774) == Some(b"CD001") && bytes.get(32768) == Some(&1) {
        return text(32808, 32).map(|label| ("iso9660", label));
    }
    if bytes.get(510..512) != Some(&[0x55, 0xaa]) {
        return None;
    }
    let fat = |at: usize| bytes.get(at..at + 3) == Some(b"FAT");
    let label = if fat(82) { text(71, 11) } else { fat(54).then(|| text(43, 11))? };
    label.map(|label| ("vfat", label))
}
