//! Outcomes as JUnit XML, the form CI servers read (schema of the Jenkins xUnit plugin, `junit-10.xsd`).
//!
//! One suite for each test and firmware, one case for each step.

use std::fmt::Write as _;

use super::run::{Outcome, StepResult};

/// The document.
pub fn junit(outcomes: &[Outcome]) -> String {
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let total = |count: fn(&StepResult) -> bool| {
        outcomes.iter().flat_map(|outcome| &outcome.steps).filter(|step| count(&step.result)).count()
    };
    let (tests, failures) = (total(|_| true), total(is_failed));
    let seconds: f64 = outcomes.iter().map(|outcome| outcome.seconds).sum();
    put(
        &mut text,
        format_args!("<testsuites name=\"vm-tests\" tests=\"{tests}\" failures=\"{failures}\" time=\"{seconds:.3}\">\n"),
    );
    outcomes.iter().for_each(|outcome| suite(outcome, &mut text));
    text + "</testsuites>\n"
}

fn suite(outcome: &Outcome, text: &mut String) {
    let name = escape(&format!("{} ({})", outcome.test, outcome.firmware.as_str()));
    let class = escape(&format!("{}.{}", outcome.test, outcome.firmware.as_str()));
    let count = |wanted: fn(&StepResult) -> bool| outcome.steps.iter().filter(|step| wanted(&step.result)).count();
    let (failures, skipped) = (count(is_failed), count(|result| *result == StepResult::Skipped));
    let (tests, seconds) = (outcome.steps.len(), outcome.seconds);
    put(
        text,
        format_args!(
            "  <testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\" time=\"{seconds:.3}\">\n"
        ),
    );
    for (index, step) in outcome.steps.iter().enumerate() {
        let title = escape(&format!("{:02} {}", index + 1, step.title));
        put(text, format_args!("    <testcase classname=\"{class}\" name=\"{title}\" time=\"{:.3}\"", step.seconds));
        match &step.result {
            StepResult::Passed => text.push_str("/>\n"),
            StepResult::Skipped => text.push_str("><skipped/></testcase>\n"),
            StepResult::Failed { expected, came } => {
                let message = escape(&format!("expected {expected}"));
                let place = format!("{}:{}", outcome.file.display(), step.line);
                let body = format!("{place}\nexpected: {expected}\ncame: {came}\n\n{}\n", outcome.console.join("\n"));
                put(text, format_args!("><failure message=\"{message}\">{}</failure></testcase>\n", escape(&body)));
            }
        }
    }
    text.push_str("  </testsuite>\n");
}

fn is_failed(result: &StepResult) -> bool {
    matches!(result, StepResult::Failed { .. })
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(arguments);
}

/// Text for XML 1.0: marks escaped, characters it cannot hold (2.2, "Characters") replaced.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push('\t'),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c if c < ' ' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::run::StepOutcome;
    use super::*;
    use crate::vm::settings::Firmware;

    #[test]
    fn a_document_that_python_reads_back() {
        let step = |title: &str, result| StepOutcome { title: title.into(), line: 2, seconds: 0.25, result };
        let failed = StepResult::Failed { expected: "\"a\" & <b>".into(), came: "x\u{1b}[0m\ny".into() };
        let outcome = Outcome {
            test: "a&b".into(),
            file: "/w/a.yaml".into(),
            firmware: Firmware::Bios,
            steps: vec![step("boot", StepResult::Passed), step("run `x`", failed), step("power-off", StepResult::Skipped)],
            seconds: 1.5,
            folder: "/s".into(),
            console: vec!["last <line>".into()],
        };
        let script = "import sys, xml.etree.ElementTree as E\nfor e in E.fromstring(sys.stdin.read()).iter():\n print(e.tag, sorted(e.attrib.items()), repr(e.text))";
        let read = crate::cmd::Cmd::new("python3").args(["-c", script]).input(junit(&[outcome])).text().expect("package python3");
        let expected = r#"testsuites [('failures', '1'), ('name', 'vm-tests'), ('tests', '3'), ('time', '1.500')] '\n  '
testsuite [('errors', '0'), ('failures', '1'), ('name', 'a&b (bios)'), ('skipped', '1'), ('tests', '3'), ('time', '1.500')] '\n    '
testcase [('classname', 'a&b.bios'), ('name', '01 boot'), ('time', '0.250')] None
testcase [('classname', 'a&b.bios'), ('name', '02 run `x`'), ('time', '0.250')] None
failure [('message', 'expected "a" & <b>')] '/w/a.yaml:2\nexpected: "a" & <b>\ncame: x�[0m\ny\n\nlast <line>\n'
testcase [('classname', 'a&b.bios'), ('name', '03 power-off'), ('time', '0.250')] None
skipped [] None
"#;
        assert_eq!(read, expected);
    }
}
