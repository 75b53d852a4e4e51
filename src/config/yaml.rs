//! YAML text as a tree of nodes that know where they stand: the only file that names the YAML crate.
//!
//! A scalar keeps its text as written and whether it was quoted, so that `1.10` can still become
//! the text `1.10`; which type a scalar has is for [`super::shape`] to decide. Built from the parser's events with a
//! stack of our own: depth, size and alias expansion are bounded, so hostile input is an error and nothing worse.
//! Not supported, and said so: more than one document, application tags, merge keys.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::diagnostic::{Diagnostic, Findings};
use super::shape;

/// Largest text that is parsed, in bytes: a hundred times the largest sensible pipeline.
pub const TEXT_MAX: usize = 1 << 20;
/// Deepest nesting; the deepest key of a pipeline is at 6.
const DEPTH_MAX: usize = 64;
/// Most nodes after aliases are expanded: stops exponential expansion ("billion laughs").
const NODES_MAX: usize = 100_000;

/// A file's name and text.
#[derive(Debug, Clone)]
pub struct Source {
    pub file: PathBuf,
    pub text: String,
}

impl Source {
    /// The text of line `number` (from 1), without its end; empty after the last line.
    pub fn line(&self, number: usize) -> &str {
        self.text.split('\n').nth(number.saturating_sub(1)).unwrap_or_default().trim_end_matches('\r')
    }
}

/// Where something stands: line and column from 1, column and length in characters, on that line.
/// The length 0 stands for the rest of the line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    pub line: usize,
    pub column: usize,
    pub length: usize,
}

/// A node with its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub span: Span,
    pub content: Content,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text as written; `plain` when neither quoted, nor a block, nor tagged `!!str`.
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Node>),
    /// Keys and values in the order of the file; a key may be there twice.
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    /// Whether this is YAML's null: nothing, `~` or `null`.
    pub fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    fn depth(&self) -> usize {
        1 + match &self.content {
            Content::Scalar { .. } => 0,
            Content::Sequence(items) => items.iter().map(Node::depth).max().unwrap_or(0),
            Content::Mapping(entries) => entries.iter().map(|(key, value)| key.depth().max(value.depth())).max().unwrap_or(0),
        }
    }

    fn size(&self) -> usize {
        1 + match &self.content {
            Content::Scalar { .. } => 0,
            Content::Sequence(items) => items.iter().map(Node::size).sum(),
            Content::Mapping(entries) => entries.iter().map(|(key, value)| key.size() + value.size()).sum(),
        }
    }
}

/// A parsed file.
#[derive(Debug, Clone)]
pub struct Tree {
    pub source: Source,
    pub root: Node,
}

impl Tree {
    /// The place of the whole document.
    pub fn place(&self) -> Place<'_> {
        Place { node: Some(&self.root), span: self.root.span, path: Vec::new() }
    }
}

/// A place in a tree, which need not be there: a missing one points at what it is missing in.
#[derive(Debug, Clone)]
pub struct Place<'t> {
    node: Option<&'t Node>,
    span: Span,
    path: Vec<String>,
}

impl<'t> Place<'t> {
    /// The value of `key`: points at the value when it is one piece of text, else at the key.
    pub fn key(&self, key: &str) -> Place<'t> {
        let entry = self.entries().iter().find(|(name, _)| name.text() == Some(key));
        let span = entry.map_or(self.span, |(name, value)| match value.content {
            Content::Scalar { .. } if !value.is_null() => value.span,
            _ => name.span,
        });
        Place { node: entry.map(|(_, value)| value), span, path: self.below(key) }
    }

    /// The key `key` itself.
    pub fn label(&self, key: &str) -> Place<'t> {
        let entry = self.entries().iter().find(|(name, _)| name.text() == Some(key));
        Place { node: None, span: entry.map_or(self.span, |(name, _)| name.span), path: self.below(key) }
    }

    /// The item `index` (from 0) of a list.
    pub fn item(&self, index: usize) -> Place<'t> {
        let node = match self.node.map(|node| &node.content) {
            Some(Content::Sequence(items)) => items.get(index),
            _ => None,
        };
        Place { node, span: node.map_or(self.span, |node| node.span), path: self.below(&index.to_string()) }
    }

    /// The same path at another node, for keys that are not text and second ones of the same name.
    pub(super) fn at(&self, span: Span) -> Place<'t> {
        Place { node: None, span, path: self.path.clone() }
    }

    /// Whether something is written here; `~` and an empty value are not.
    pub fn is_there(&self) -> bool {
        self.node.is_some_and(|node| !node.is_null())
    }

    pub fn node(&self) -> Option<&'t Node> {
        self.node
    }

    pub fn span(&self) -> Span {
        self.span
    }

    /// Keys and indices from the root.
    pub fn path(&self) -> &[String] {
        &self.path
    }

    fn entries(&self) -> &'t [(Node, Node)] {
        match self.node.map(|node| &node.content) {
            Some(Content::Mapping(entries)) => entries,
            _ => &[],
        }
    }

    fn below(&self, name: &str) -> Vec<String> {
        self.path.iter().cloned().chain([name.to_owned()]).collect()
    }
}

/// Parses `text` and reads it as a `T`.
///
/// # Errors
/// Every place where the text is not what `T`'s schema wants, in order of position.
pub fn load<T: DeserializeOwned + JsonSchema>(path: &Path, text: &str) -> Result<(T, Tree), Vec<Diagnostic>> {
    let tree = parse(path, text)?;
    let mut findings = Findings::new(tree.source.clone());
    match shape::read::<T>(&tree, &mut findings) {
        Some(value) if findings.is_empty() => Ok((value, tree)),
        _ => Err(findings.into_diagnostics()),
    }
}

/// Parses `text`; `path` is for messages only. An empty text is a null at its beginning.
///
/// # Errors
/// One diagnostic: the parser cannot go on after the first.
pub fn parse(path: &Path, text: &str) -> Result<Tree, Vec<Diagnostic>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let source = Source { file: path.into(), text: text.into() };
    let fail = |span, fault: Fault| vec![Diagnostic::new(&source, span, fault.message, fault.hint)];
    let start = Span { line: 1, column: 1, length: 1 };
    if text.len() > TEXT_MAX {
        return Err(fail(start, Fault::new(format!("the file is larger than {} KiB", TEXT_MAX / 1024))));
    }
    let mut composer = Composer::default();
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let (event, at) = event.map_err(|error| fail(span(*error.marker(), *error.marker()), Fault::syntax(error.info())))?;
        let span = span(at.start, at.end);
        composer.take(event, span).map_err(|fault| fail(span, fault))?;
    }
    let root = composer.root.unwrap_or(Node { span: start, content: Content::Scalar { text: String::new(), plain: true } });
    Ok(Tree { source, root })
}

/// Why parsing stopped.
struct Fault {
    message: String,
    hint: Option<String>,
}

impl Fault {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    fn hint(self, hint: &str) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The parser's words, and what is usually behind them.
    fn syntax(info: &str) -> Self {
        let fault = Self::new(format!("not valid YAML: {info}"));
        if info.contains("tab") {
            fault.hint("indent with spaces")
        } else if info.contains("mapping values are not allowed") || info.contains("simple key") {
            fault.hint("look at the indentation here and on the line before; text with `: ` in it needs quotes")
        } else {
            fault
        }
    }
}

/// A collection that is not closed yet.
struct Open {
    anchor: usize,
    node: Node,
    /// The key whose value comes next.
    key: Option<Node>,
}

/// The markers as a span on the line of the first.
fn span(start: Marker, end: Marker) -> Span {
    let length = if start.line() == end.line() { end.col().saturating_sub(start.col()) } else { 0 };
    Span { line: start.line().max(1), column: start.col() + 1, length }
}

/// Builds the tree from events.
#[derive(Default)]
struct Composer {
    stack: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
}

impl Composer {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(Fault::new("a second document starts here").hint("one document per file; remove `---`"))
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && !known_tag(tag.as_deref())?;
                self.close(Node { span, content: Content::Scalar { text: text.into_owned(), plain } }, anchor)
            }
            Event::SequenceStart(anchor, tag) => self.open(Content::Sequence(Vec::new()), span, anchor, tag.as_deref()),
            Event::MappingStart(anchor, tag) => self.open(Content::Mapping(Vec::new()), span, anchor, tag.as_deref()),
            Event::SequenceEnd | Event::MappingEnd => match self.stack.pop() {
                Some(mut open) => {
                    // In brackets and on one line: all of it, the end's own span being that of its bracket.
                    if open.node.span.length > 0 && span.line == open.node.span.line {
                        open.node.span.length = span.column + span.length - open.node.span.column;
                    }
                    self.close(open.node, open.anchor)
                }
                None => Err(Fault::new("not valid YAML: an end without a start")),
            },
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(Fault::new("this alias stands inside what it repeats"));
                };
                // The clone itself is bounded: what is anchored was counted when it was built.
                if self.nodes + node.size() > NODES_MAX {
                    return Err(too_large());
                }
                if self.stack.len() + node.depth() > DEPTH_MAX {
                    return Err(too_deep());
                }
                let node = node.clone();
                self.nodes += node.size() - 1;
                self.close(node, 0)
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, content: Content, span: Span, anchor: usize, tag: Option<&Tag>) -> Result<(), Fault> {
        known_tag(tag)?;
        if self.stack.len() >= DEPTH_MAX {
            return Err(too_deep());
        }
        self.stack.push(Open { anchor, node: Node { span, content }, key: None });
        Ok(())
    }

    /// Puts a finished node where it belongs.
    fn close(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(too_large());
        }
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.node.content {
            Content::Sequence(items) => items.push(node),
            Content::Mapping(entries) => match open.key.take() {
                None => open.key = Some(node),
                Some(key) => entries.push((key, node)),
            },
            Content::Scalar { .. } => return Err(Fault::new("not valid YAML: a scalar with content")),
        }
        Ok(())
    }
}

fn too_deep() -> Fault {
    Fault::new(format!("nested deeper than {DEPTH_MAX} levels"))
}

fn too_large() -> Fault {
    Fault::new(format!("more than {NODES_MAX} values, aliases counted"))
}

/// Whether the tag makes the scalar a text.
fn known_tag(tag: Option<&Tag>) -> Result<bool, Fault> {
    match tag {
        None => Ok(false),
        Some(tag) if tag.is_yaml_core_schema() => Ok(tag.suffix == "str"),
        Some(tag) if tag.handle.is_empty() && tag.suffix == "!" => Ok(true),
        Some(_) => Err(Fault::new("tags have no meaning here").hint("remove the word that begins with `!`, or quote the text")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// The tree as text: `"quoted"`, plain, `[…]`, `{k: v}`, each with `@line:column+length`.
    fn shown(node: &Node) -> String {
        let Span { line, column, length } = node.span;
        let text = match &node.content {
            Content::Scalar { text, plain: true } => text.clone(),
            Content::Scalar { text, plain: false } => format!("{text:?}"),
            Content::Sequence(items) => return format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(" ")),
            Content::Mapping(entries) => {
                let entries: Vec<String> =
                    entries.iter().map(|(key, value)| format!("{}: {}", shown(key), shown(value))).collect();
                return format!("{{{}}}", entries.join(" "));
            }
        };
        format!("{text}@{line}:{column}+{length}")
    }

    #[test]
    fn trees_with_places() {
        let cases = [
            ("", "@1:1+1"),
            ("\u{feff}a: 1.10 # c\r\nb: 'on'\r\n", "{a@1:1+1: 1.10@1:4+4 b@2:1+1: \"on\"@2:4+4}"),
            ("ö: [x, \"ü y\"]", "{ö@1:1+1: [x@1:5+1 \"ü y\"@1:8+5]}"),
            ("a:\n  - b: c\n  - d\n", "{a@1:1+1: [{b@2:5+1: c@2:8+1} d@3:5+1]}"),
            ("a: &x {b: 1}\nc: *x\n", "{a@1:1+1: {b@1:8+1: 1@1:11+1} c@2:1+1: {b@1:8+1: 1@1:11+1}}"),
            ("a: 1\na: 2\n", "{a@1:1+1: 1@1:4+1 a@2:1+1: 2@2:4+1}"),
            ("!!str 8080", "\"8080\"@1:1+10"),
            ("a: |\n  x\n  y\n", "{a@1:1+1: \"x\\ny\\n\"@2:3+0}"),
            ("a: one\n  two\nb: 1", "{a@1:1+1: one two@1:4+0 b@3:1+1: 1@3:4+1}"),
            ("---\na: 1\n", "{a@2:1+1: 1@2:4+1}"),
        ];
        for (text, expected) in cases {
            assert_eq!(shown(&parse(Path::new("x"), text).unwrap().root), expected, "{text:?}");
        }
    }

    #[test]
    fn an_empty_value_is_shown_at_its_key() {
        let tree = parse(Path::new("x"), "a:\nb: ~\nc: {d: 1}\n").unwrap();
        let spans = ["a", "b", "c", "none"].map(|key| tree.place().key(key).span());
        let at = |line| Span { line, column: 1, length: 1 };
        assert_eq!(spans[..3], [at(1), at(2), at(3)]);
        assert_eq!(spans[3], tree.root.span);
        assert_eq!(["a", "b", "c", "none"].map(|key| tree.place().key(key).is_there()), [false, false, true, false]);
        assert_eq!(tree.place().key("c").key("d").path(), ["c", "d"]);
    }

    #[test]
    fn what_is_refused() {
        let deep = "[".repeat(DEPTH_MAX + 1);
        let deep_block = "- ".repeat(100_000);
        let laughs: String = (1..9).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(","))).collect();
        let laughs = format!("a0: &a0 x\n{laughs}");
        let chain: String = (1..80).map(|n| format!("a{n}: &a{n} [*a{}]\n", n - 1)).collect();
        let chain = format!("a0: &a0 x\n{chain}");
        let large = "#".repeat(TEXT_MAX + 1);
        let many = format!("[{}]", "1,".repeat(NODES_MAX));
        let cases = [
            ("a: [1\nb: 2\n", "not valid YAML: "),
            ("a: b: c\n", "not valid YAML: mapping values are not allowed in this context"),
            ("a:\n\t- b\n", "not valid YAML: "),
            ("a: *nope\n", "not valid YAML: while parsing node, found unknown anchor"),
            ("a: &x [*x]\n", "this alias stands inside what it repeats"),
            ("a: 1\n---\nb: 2\n", "a second document starts here"),
            ("a: !secret x\n", "tags have no meaning here"),
            ("a: !x {}\n", "tags have no meaning here"),
            (deep.as_str(), "nested deeper than 64 levels"),
            (deep_block.as_str(), "nested deeper than 64 levels"),
            (laughs.as_str(), "more than 100000 values, aliases counted"),
            (chain.as_str(), "nested deeper than 64 levels"),
            (large.as_str(), "the file is larger than 1024 KiB"),
            (many.as_str(), "more than 100000 values, aliases counted"),
        ];
        for (text, expected) in cases {
            let found = parse(Path::new("x"), text).unwrap_err();
            assert!(found.len() == 1 && found[0].message.starts_with(expected), "{:?}: {:?}", text.get(..20), found[0].message);
        }
    }

    #[test]
    fn an_error_says_where() {
        let found = parse(Path::new("x"), "a: 1\nb: c: d\n").unwrap_err();
        assert_eq!((found[0].line, found[0].column, found[0].source.as_str()), (2, 5, "b: c: d"));
    }

    /// A small generator, so that a failure can be repeated (xorshift, Marsaglia 2003).
    fn random(state: &mut u64) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        usize::try_from(*state >> 33).unwrap()
    }

    #[test]
    fn hostile_text_is_an_error_and_nothing_worse() {
        let seed =
            "name: notes\nbase: {debian: trixie, packages: [a, \"b\"]}\nx: &a |-\n  t\ny: *a\nz: !!str >+\n 1\n? k\n: v\n- 'q'\n";
        let pieces = [
            "", "\t", "\n", " ", "- ", "? ", ": ", "&a ", "*a", "!!x ", "!<", "%", "|2", ">", "'", "\"", "{", "}", "[", "]", ",",
            "#", "\u{85}", "\0", "ö", "---\n", "...", "\\x", "<<: ",
        ];
        let mut state = 88_172_645_463_325_252;
        for _ in 0..20_000 {
            let mut text: Vec<char> = seed.chars().collect();
            for _ in 0..=random(&mut state) % 6 {
                let at = random(&mut state) % text.len();
                let end = (at + random(&mut state) % 4).min(text.len());
                text.splice(at..end, pieces[random(&mut state) % pieces.len()].chars());
                if text.is_empty() {
                    text.push('a');
                }
            }
            let text: String = text.into_iter().collect();
            match parse(Path::new("x"), &text) {
                Ok(tree) => drop(shown(&tree.root)),
                Err(found) => found.iter().for_each(|found| drop(found.render(Path::new("")))),
            }
        }
    }

    #[test]
    fn large_text_takes_no_more_than_its_share_of_time() {
        let cases = [
            "a".repeat(TEXT_MAX),
            format!("[{}]", "a, ".repeat(40_000)),
            "- a\n".repeat(40_000),
            (0..40_000).map(|n| format!("k{n}: v\n")).collect(),
            format!("\"{}\"", "\\n".repeat(TEXT_MAX / 3)),
            "#\n".repeat(TEXT_MAX / 2),
            " ".repeat(TEXT_MAX),
            "{".repeat(TEXT_MAX),
            "? ".repeat(TEXT_MAX / 2),
            "&a ".repeat(TEXT_MAX / 3),
            "a: ".repeat(TEXT_MAX / 3),
        ];
        for text in cases {
            let start = Instant::now();
            let result = parse(Path::new("x"), &text);
            let (took, what) = (start.elapsed(), if result.is_ok() { "parsed" } else { "refused" });
            assert!(took < Duration::from_secs(5), "{:?} {what} after {took:?}", text.get(..20));
        }
    }
}
