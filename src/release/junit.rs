//! What a JUnit XML report says: how many tests, and whether they passed.
//!
//! There is no standard, only what tools write: `testsuites` or `testsuite` around `testcase`, with `failure`, `error` or
//! `skipped` inside, and totals as attributes. Both count: a suite that could not start has an attribute and no element.
//! XML is read as far as it goes in such reports: elements, attributes, comments, CDATA; a document type is refused.

use anyhow::Result;
use serde::Serialize;

use crate::error::Problem;

/// What was counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub tests: u64,
    /// Failures and errors: of elements and of attributes the larger number.
    pub failures: u64,
    pub skipped: u64,
}

impl Counts {
    /// `None`: there were no tests, so nothing was shown.
    pub fn passed(&self) -> Option<bool> {
        match (self.tests, self.failures) {
            (0, 0) => None,
            (_, failures) => Some(failures == 0),
        }
    }
}

/// Counts the tests of a report.
///
/// # Errors
/// It is no XML, it is cut off, or something else than a JUnit report.
pub fn parse(text: &str) -> Result<Counts> {
    let mut scanner = Scanner { rest: text.trim_start_matches('\u{feff}') };
    let mut open: Vec<&str> = Vec::new();
    let (mut counts, mut elements, mut attributes) = (Counts::default(), 0, 0);
    let mut begun = false;
    while let Some(tag) = scanner.next(open.is_empty())? {
        match tag {
            Tag::End(name) => match open.pop() {
                Some(opened) if opened == name => {}
                opened => return Err(no_report(&format!("`</{name}>` ends `<{}>`", opened.unwrap_or("")))),
            },
            Tag::Start { name, attributes: given, is_empty } => {
                if open.is_empty() && (begun || !["testsuites", "testsuite"].contains(&name)) {
                    return Err(no_report(&format!("`<{name}>` is not where a report begins")));
                }
                begun = true;
                let number = |key: &str| {
                    given.iter().find(|(name, _)| *name == key).and_then(|(_, value)| value.trim().parse::<u64>().ok())
                };
                match name {
                    "testcase" => counts.tests += 1,
                    "failure" | "error" => elements += 1,
                    "skipped" => counts.skipped += 1,
                    "testsuite" | "testsuites" => {
                        attributes = attributes.max(number("failures").unwrap_or(0) + number("errors").unwrap_or(0));
                    }
                    _ => {}
                }
                if !is_empty {
                    open.push(name);
                }
            }
        }
    }
    match open.last() {
        Some(name) => Err(no_report(&format!("it ends inside `<{name}>`"))),
        None if !begun => Err(no_report("it has no element")),
        None => Ok(Counts { failures: elements.max(attributes), ..counts }),
    }
}

fn no_report(why: &str) -> anyhow::Error {
    Problem::usage(format!("this is no JUnit report: {why}"))
        .hint("other reports are attached with `--result pass` or `--result fail`")
        .into()
}

enum Tag<'a> {
    Start { name: &'a str, attributes: Vec<(&'a str, &'a str)>, is_empty: bool },
    End(&'a str),
}

struct Scanner<'a> {
    rest: &'a str,
}

impl<'a> Scanner<'a> {
    /// The next tag; `outside`: no element is open, so there may be no text.
    fn next(&mut self, outside: bool) -> Result<Option<Tag<'a>>> {
        loop {
            let Some(start) = self.rest.find('<') else {
                return if self.rest.trim().is_empty() { Ok(None) } else { Err(no_report("it ends with text")) };
            };
            if outside && !self.rest[..start].trim().is_empty() {
                return Err(no_report("there is text outside of its elements"));
            }
            self.rest = &self.rest[start + 1..];
            if self.rest.starts_with("!--") {
                self.upto("-->")?;
            } else if self.rest.starts_with("![CDATA[") {
                self.upto("]]>")?;
            } else if self.rest.starts_with('?') {
                self.upto("?>")?;
            } else if self.rest.starts_with('!') {
                return Err(no_report("it has a document type"));
            } else if let Some(rest) = self.rest.strip_prefix('/') {
                self.rest = rest;
                return Ok(Some(Tag::End(self.upto(">")?.trim_end())));
            } else {
                return self.start().map(Some);
            }
        }
    }

    fn upto(&mut self, end: &str) -> Result<&'a str> {
        let (before, after) = self.rest.split_once(end).ok_or_else(|| no_report("it is cut off"))?;
        self.rest = after;
        Ok(before)
    }

    fn name(&mut self) -> Result<&'a str> {
        let is_end = |c: char| c.is_whitespace() || ['=', '/', '>', '<', '"', '\''].contains(&c);
        let end = self.rest.find(is_end).ok_or_else(|| no_report("it is cut off"))?;
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        if name.is_empty() { Err(no_report("a name is missing")) } else { Ok(name) }
    }

    fn start(&mut self) -> Result<Tag<'a>> {
        let name = self.name()?;
        let mut attributes = Vec::new();
        loop {
            if let Some(rest) = self.rest.strip_prefix("/>") {
                self.rest = rest;
                return Ok(Tag::Start { name, attributes, is_empty: true });
            }
            if let Some(rest) = self.rest.strip_prefix('>') {
                self.rest = rest;
                return Ok(Tag::Start { name, attributes, is_empty: false });
            }
            let key = self.name()?;
            let value = self.rest.strip_prefix('=').map(str::trim_start);
            let quote = value.and_then(|value| value.chars().next()).filter(|quote| ['"', '\''].contains(quote));
            let (Some(value), Some(quote)) = (value, quote) else { return Err(no_report(&format!("`{key}` has no value"))) };
            self.rest = &value[1..];
            let value = self.upto(if quote == '"' { "\"" } else { "'" })?;
            self.rest = self.rest.trim_start();
            attributes.push((key, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_several_tools() {
        // Text, tests, failures, skipped.
        let cases = [
            ("<testsuite tests='1'><testcase name='a'/></testsuite>", (1, 0, 0)),
            // pytest
            (
                "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<testsuites name=\"pytest tests\"><testsuite name=\"pytest\" errors=\"0\" failures=\"1\" \
                 skipped=\"1\" tests=\"3\"><testcase classname=\"t\" name=\"a\" time=\"0.1\" /><testcase classname=\"t\" name=\"b\"><failure \
                 message=\"assert 1 &gt; 2\">def b():\n&gt; x</failure></testcase><testcase name=\"c\"><skipped type=\"x\"/></testcase></testsuite></testsuites>",
                (3, 1, 1),
            ),
            // A failure in CDATA, a comment or an attribute's value is none.
            (
                "<testsuite><!-- <failure/> --><testcase name=\"a <failure/> b\"><system-out><![CDATA[<failure/><error>]]></system-out></testcase>\
                 </testsuite>",
                (1, 0, 0),
            ),
            // A suite that could not start.
            ("<testsuites><testsuite name='x' errors='1' failures='0' tests='0'></testsuite></testsuites>", (0, 1, 0)),
            (
                "<testsuites errors=\"2\" failures = '1'><testsuite><testcase><error/></testcase></testsuite></testsuites>\n",
                (1, 3, 0),
            ),
            ("<testsuites/>", (0, 0, 0)),
        ];
        for (text, (tests, failures, skipped)) in cases {
            assert_eq!(parse(text).unwrap(), Counts { tests, failures, skipped }, "{text}");
        }
        let passed = |tests, failures| Counts { tests, failures, skipped: 0 }.passed();
        assert_eq!([passed(0, 0), passed(0, 1), passed(2, 0), passed(2, 1)], [None, Some(false), Some(true), Some(false)]);
    }

    #[test]
    fn what_is_no_report() {
        let cases = [
            ("", "it has no element"),
            ("all good", "it ends with text"),
            ("<html></html>", "`<html>` is not where a report begins"),
            ("<testsuite><testcase>", "it ends inside `<testcase>`"),
            ("<testsuite><testcase/>", "it ends inside `<testsuite>`"),
            ("<testsuite><testcase/></testsuites>", "`</testsuites>` ends `<testsuite>`"),
            ("<testsuite/><testsuite/>", "is not where a report begins"),
            ("<testsuite name='a", "it is cut off"),
            ("<testsuite name", "it is cut off"),
            ("<testsuite name>", "`name` has no value"),
            ("<testsuite><![CDATA[ </testsuite>", "it is cut off"),
            ("<!DOCTYPE x [<!ENTITY a \"b\">]><testsuite/>", "it has a document type"),
            ("{\"tests\": 1}", "it ends with text"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
