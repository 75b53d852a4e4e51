//! Texts of answers that more than one verb shows.

use std::borrow::Cow;

use crate::build::Built;
use crate::build::plan::Step;
use crate::build::record::StepRecord;

/// The steps of a plan, one line each.
pub fn plan(steps: &[Step], found: &[Option<StepRecord>], because: &[String]) -> String {
    let rows: Vec<Vec<String>> = steps
        .iter()
        .zip(found)
        .zip(because)
        .map(|((step, found), because)| {
            let state = match found {
                Some(record) => format!("cached ({})", bytes(record.bytes())),
                None => format!("will run: {because}"),
            };
            let ships = if step.ships { "" } else { "not in the image; " };
            vec![step.name.clone(), step.key.short(), format!("{ships}{state}")]
        })
        .collect();
    table(&rows)
}

/// `notes:latest sha256:…`, and the host's on a line of its own.
pub fn built(built: &Built) -> String {
    let host = built.host.as_ref().map(|host| format!("{} {}\n", host.name, host.digest));
    format!("{} {}\n", built.name, built.digest) + &host.unwrap_or_default()
}

/// Bytes for people: `12.3 MB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A text whose control characters are shown and do nothing to the terminal; lines and tabs stay. Versions, names and
/// reasons may come from a registry or a ledger that others write.
pub fn plain(text: &str) -> Cow<'_, str> {
    let harms = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(harms) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if harms(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Rows with columns of equal width, two spaces apart. A cell is one line, whatever is in it.
pub fn table(rows: &[Vec<String>]) -> String {
    let line = |cell: &String| plain(cell).replace('\n', "\\n").replace('\t', "\\t");
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(line).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().enumerate().map(|(column, cell)| format!("{cell}{}", " ".repeat(widths[column] - cell.chars().count())));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_tables() {
        assert_eq!([bytes(5), bytes(1500), bytes(2_000_000_000)], ["5 B", "1.5 kB", "2.0 GB"]);
        assert_eq!(plain("a\tb\n\u{1b}[2J\u{9b}\r\u{7f}ä"), "a\tb\n\\u{1b}[2J\\u{9b}\\r\\u{7f}ä");
        assert_eq!(table(&[vec!["\u{1b}\n".into(), "b".into()]]), "\\u{1b}\\n  b\n");
        assert_eq!(table(&[vec!["a".into(), "b".into()], vec!["ccc".into(), "d".into()]]), "a    b\nccc  d\n");
    }
}
