//! Records of the kernel's log.

/// A message of the kernel itself (facility 0) that says that a block is corrupted.
/// Records: kernel documentation, ABI `dev-kmsg`.
pub fn is_corruption(record: &str) -> bool {
    let Some((prefix, message)) = record.split_once(';') else { return false };
    let priority = prefix.split(',').next().and_then(|text| text.parse::<u32>().ok());
    let message = message.lines().next().unwrap_or_default();
    priority.is_some_and(|priority| priority >> 3 == 0)
        && message.contains("device-mapper: verity:")
        && message.contains("is corrupted")
}
