//! A problem at a place in a file, and how it is shown: position, line, caret, hint.
//!
//! ```text
//! error: pipelines/shop.yaml:14:11: environment `prod` promotes from `staging`, which is not defined
//!    14 |     from: staging
//!       |           ^^^^^^^
//! hint: defined environments are `dev` and `stage`
//! ```
//!
//! [`Findings`] collects them, first from the walk against the schema ([`super::shape`]), then
//! from the checks ([`super::check`]); what the first stage found silences its own echoes in the second.

use std::path::{Path, PathBuf};

use super::yaml::{Place, Source, Span};

/// Longest part of a source line that is shown, in characters; the rest becomes `…`.
const LINE_SHOWN: usize = 120;

/// A problem at a place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file as it was given to the parser.
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// Lower case, no full stop, names in backticks.
    pub message: String,
    /// The line of the file, without its end.
    pub source: String,
    /// Characters to underline, at least 1.
    pub length: usize,
    /// The next step.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// A diagnostic for `span` of `source`.
    pub fn new(source: &Source, span: Span, message: impl Into<String>, hint: Option<String>) -> Self {
        let line = source.line(span.line);
        let length = if span.length == 0 { usize::MAX } else { span.length };
        let marked: String = line.chars().skip(span.column - 1).take(length).collect();
        Self {
            file: source.file.clone(),
            line: span.line,
            column: span.column,
            message: message.into(),
            source: line.to_owned(),
            length: marked.trim_end().chars().count().max(1),
            hint,
        }
    }

    /// The lines of the form above, without `error: ` and without a line end; the file is relative to `cwd` when below it.
    pub fn render(&self, cwd: &Path) -> String {
        let file = self.file.strip_prefix(cwd).unwrap_or(&self.file).display();
        let (line, column, message) = (self.line, self.column, &self.message);
        let (shown, before) = self.window();
        let length = self.length.clamp(1, shown.chars().count().saturating_sub(before).max(1));
        let mut text = format!("{file}:{line}:{column}: {message}");
        text += &format!("\n{line:>5} | {shown}");
        text += &format!("\n      | {}{}", " ".repeat(before), "^".repeat(length));
        if let Some(hint) = &self.hint {
            text += &format!("\nhint: {hint}");
        }
        text
    }

    /// The part of the source line that is shown, and the number of characters before the caret.
    fn window(&self) -> (String, usize) {
        let characters: Vec<char> = self.source.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let caret = (self.column - 1).min(characters.len());
        if characters.len() <= LINE_SHOWN {
            return (characters.iter().collect::<String>().trim_end().to_owned(), caret);
        }
        let start = caret.saturating_sub(LINE_SHOWN / 2);
        let end = (start + LINE_SHOWN).min(characters.len());
        let body: String = characters[start..end].iter().collect();
        let (head, tail) = (if start > 0 { "…" } else { "" }, if end < characters.len() { "…" } else { "" });
        (format!("{head}{body}{tail}"), caret - start + head.chars().count())
    }
}

/// All diagnostics, in order of position: the first without `error: `, which the caller prints, the others with it.
pub fn render(diagnostics: &[Diagnostic], cwd: &Path) -> String {
    let texts: Vec<String> = diagnostics.iter().map(|diagnostic| diagnostic.render(cwd)).collect();
    texts.join("\n\nerror: ")
}

/// Names in backticks as a sentence has them: `a`, `b` and `c`.
pub fn quoted<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("`{}`", name.as_ref())).collect();
    match names.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// `did you mean …?` where one of `names` is near, else all of them after `others`.
pub fn suggestion(wanted: &str, names: &[&str], others: &str) -> Option<String> {
    match crate::error::nearest(wanted, names.iter().copied()) {
        Some(name) => Some(format!("did you mean `{name}`?")),
        None if names.is_empty() => None,
        None => Some(format!("{others} {}", quoted(names))),
    }
}

/// The diagnostics of one file as they are found.
#[derive(Debug, Clone)]
pub struct Findings {
    source: Source,
    list: Vec<Diagnostic>,
    /// Where the walk against the schema found something.
    paths: Vec<Vec<String>>,
    sealed: bool,
}

impl Findings {
    pub fn new(source: Source) -> Self {
        Self { source, list: Vec::new(), paths: Vec::new(), sealed: false }
    }

    /// Ends the first stage: from here on a problem at or below a place that already has one is an echo.
    pub fn seal(&mut self) {
        self.sealed = true;
    }

    /// Notes a problem at `place`.
    pub fn add(&mut self, place: &Place<'_>, message: impl Into<String>, hint: Option<String>) {
        if self.sealed && self.paths.iter().any(|path| place.path().starts_with(path)) {
            return;
        }
        if !self.sealed {
            self.paths.push(place.path().to_vec());
        }
        self.list.push(Diagnostic::new(&self.source, place.span(), message, hint));
    }

    /// Notes that something is not there; an echo also where a problem was found *below* `place`, as with a misspelled key.
    pub fn add_missing(&mut self, place: &Place<'_>, message: impl Into<String>, hint: Option<String>) {
        if !(self.sealed && self.paths.iter().any(|path| path.starts_with(place.path()))) {
            self.add(place, message, hint);
        }
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Sorted by position, without doubles.
    pub fn into_diagnostics(mut self) -> Vec<Diagnostic> {
        self.list.sort_by_key(|diagnostic| (diagnostic.line, diagnostic.column));
        self.list.dedup();
        self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnostic(line: usize, column: usize, source: &str, length: usize, hint: Option<&str>) -> Diagnostic {
        let hint = hint.map(Into::into);
        Diagnostic {
            file: "/w/pipelines/shop.yaml".into(),
            line,
            column,
            message: "wrong".into(),
            source: source.into(),
            length,
            hint,
        }
    }

    #[test]
    fn rendered_like_the_conventions() {
        let cases = [
            (
                diagnostic(14, 11, "    from: staging", 7, Some("defined are `dev` and `stage`")),
                "/w",
                "pipelines/shop.yaml:14:11: wrong\n   14 |     from: staging\n      |           ^^^^^^^\nhint: defined are `dev` and `stage`",
            ),
            (diagnostic(1, 1, "", 1, None), "/other", "/w/pipelines/shop.yaml:1:1: wrong\n    1 | \n      | ^"),
            (diagnostic(2, 2, "\ta: ö\r", 900, None), "/w/pipelines", "shop.yaml:2:2: wrong\n    2 |  a: ö\n      |  ^^^^"),
        ];
        for (diagnostic, cwd, expected) in cases {
            assert_eq!(diagnostic.render(Path::new(cwd)), expected);
        }
    }

    #[test]
    fn long_lines_are_cut_around_the_caret() {
        let text = format!("{}X{}", "a".repeat(5000), "b".repeat(5000));
        let shown = diagnostic(1, 5001, &text, 1, None).render(Path::new("/"));
        let expected = format!(
            "w/pipelines/shop.yaml:1:5001: wrong\n    1 | …{}X{}…\n      | {}^",
            "a".repeat(60),
            "b".repeat(59),
            " ".repeat(61)
        );
        assert_eq!(shown, expected);
    }

    #[test]
    fn several_are_separated_and_prefixed() {
        let two = [diagnostic(1, 1, "a", 1, None), diagnostic(2, 1, "b", 1, Some("c"))];
        assert_eq!(
            render(&two, Path::new("/w/pipelines")),
            "shop.yaml:1:1: wrong\n    1 | a\n      | ^\n\nerror: shop.yaml:2:1: wrong\n    2 | b\n      | ^\nhint: c"
        );
    }

    #[test]
    fn lists_and_suggestions() {
        assert_eq!(quoted(["a", "b", "c"]), "`a`, `b` and `c`");
        assert_eq!(quoted(["a"]), "`a`");
        assert_eq!(quoted::<&str>([]), "");
        assert_eq!(suggestion("triixe", &["sid", "trixie"], "suites are"), Some("did you mean `trixie`?".into()));
        assert_eq!(suggestion("jammy", &["sid", "trixie"], "suites are"), Some("suites are `sid` and `trixie`".into()));
    }
}
