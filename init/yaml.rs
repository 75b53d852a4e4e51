//! The part of YAML that configuration of machines is written in, and with it JSON.
//!
//! Block mappings and sequences, flow ones (also over several lines), plain and quoted scalars on one line,
//! `|` and `>` blocks, comments, one document. Anchors, aliases, tags, explicit keys and scalars over several lines are
//! refused with the number of the line, so that nothing is read otherwise than it was meant.

/// A node. All scalars are text; whether they were quoted matters only for `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Null,
    Text(String),
    List(Vec<Value>),
    Map(Vec<(String, Value)>),
}

impl Value {
    /// The value of a key of a mapping.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.pairs().iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The pairs of a mapping; none for another node.
    pub fn pairs(&self) -> &[(String, Self)] {
        match self {
            Self::Map(pairs) => pairs,
            _ => &[],
        }
    }

    /// The items of a list; none for another node.
    pub fn items(&self) -> &[Self] {
        match self {
            Self::List(items) => items,
            _ => &[],
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list of texts, or one text as a list of one.
    pub fn texts(&self) -> Option<Vec<String>> {
        match self {
            Self::Text(text) => Some(vec![text.clone()]),
            Self::List(items) => items.iter().map(|item| item.text().map(ToString::to_string)).collect(),
            _ => None,
        }
    }

    /// `true`, `yes`, `on` and their opposites, in any case.
    pub fn flag(&self) -> Option<bool> {
        match self.text()?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }
}

/// Folders in folders deeper than this are a joke.
const MAX_DEPTH: usize = 50;

/// Reads one document.
///
/// # Errors
/// The line and what about it is not understood.
pub fn parse(text: &str) -> Result<Value, String> {
    let lines = text.trim_start_matches('\u{feff}').lines().map(|line| line.trim_end_matches('\r').to_string()).collect();
    let mut parser = Parser { lines, at: 0, depth: 0 };
    parser.skip();
    if parser.peek().is_some_and(|(_, line)| line == "---") {
        parser.at += 1;
    }
    let value = parser.node(0)?;
    parser.skip();
    match parser.peek() {
        Some((_, line)) if line != "..." => Err(parser.fault("is not understood here")),
        _ => Ok(value),
    }
}

struct Parser {
    lines: Vec<String>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn fault(&self, words: &str) -> String {
        let line = self.lines.get(self.at).map_or("", |line| line.trim());
        // No more of it than needed: it may hold a secret.
        let shown = line.split([':', ' ']).next().unwrap_or_default();
        format!("line {}: `{shown}…` {words}", self.at + 1)
    }

    /// Goes to the next line with content.
    fn skip(&mut self) {
        while self.lines.get(self.at).is_some_and(|line| matches!(line.trim_start().chars().next(), None | Some('#'))) {
            self.at += 1;
        }
    }

    /// Indentation and content of the line.
    fn peek(&self) -> Option<(usize, String)> {
        let line = self.lines.get(self.at)?;
        let content = line.trim_start_matches(' ');
        Some((line.len() - content.len(), content.trim_end().to_string()))
    }

    /// The node that starts at the next line, when that is indented at least by `least`.
    fn node(&mut self, least: usize) -> Result<Value, String> {
        self.skip();
        let Some((indent, content)) = self.peek() else { return Ok(Value::Null) };
        if indent < least || content == "..." {
            return Ok(Value::Null);
        }
        if content.starts_with('\t') {
            return Err(self.fault("is indented with a tab"));
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault("is nested too deeply"));
        }
        let value = if content == "-" || content.starts_with("- ") {
            self.sequence(indent)
        } else if key(&content).is_some() {
            self.mapping(indent)
        } else {
            self.scalar(&content, indent)
        };
        self.depth -= 1;
        value
    }

    fn sequence(&mut self, indent: usize) -> Result<Value, String> {
        let mut items = Vec::new();
        loop {
            self.skip();
            let Some((here, content)) = self.peek() else { break };
            if here != indent || !(content == "-" || content.starts_with("- ")) {
                if here > indent {
                    return Err(self.fault("is indented otherwise than the lines before it"));
                }
                break;
            }
            if content == "-" {
                self.at += 1;
            } else {
                // What stands behind the dash is a node of its own, in its own column.
                self.lines[self.at].replace_range(indent..=indent, " ");
            }
            items.push(self.node(indent + 1)?);
        }
        Ok(Value::List(items))
    }

    fn mapping(&mut self, indent: usize) -> Result<Value, String> {
        let mut pairs: Vec<(String, Value)> = Vec::new();
        loop {
            self.skip();
            let Some((here, content)) = self.peek() else { break };
            if here < indent || content == "..." {
                break;
            }
            if content == "---" && here == 0 {
                return Err(self.fault("starts a second document"));
            }
            let Some((name, rest)) = key(&content).filter(|_| here == indent) else {
                return Err(self.fault("is not `key: value` in the column of the lines before it"));
            };
            if pairs.iter().any(|(old, _)| *old == name) {
                return Err(self.fault("is there twice"));
            }
            let rest = uncommented(rest).to_string();
            let value = if rest.is_empty() {
                self.at += 1;
                self.skip();
                // A list may stand in the column of its key.
                let list = self.peek().is_some_and(|(here, line)| here == indent && (line == "-" || line.starts_with("- ")));
                if list { self.sequence(indent)? } else { self.node(indent + 1)? }
            } else {
                self.scalar(&rest, indent + 1)?
            };
            pairs.push((name, value));
        }
        Ok(Value::Map(pairs))
    }

    /// A scalar or flow node that starts with `text` in the present line; a block needs `indent` columns at least.
    fn scalar(&mut self, text: &str, indent: usize) -> Result<Value, String> {
        match text.as_bytes()[0] {
            b'|' | b'>' => return self.block(text, indent),
            b'&' | b'*' | b'!' => return Err(self.fault("has an anchor, alias or tag, which is not supported")),
            b'?' if text == "?" || text.starts_with("? ") => return Err(self.fault("is an explicit key, which is not supported")),
            b'%' | b'@' | b'`' => return Err(self.fault("starts with a reserved character")),
            b'[' | b'{' | b'"' | b'\'' => {}
            _ => {
                let value = plain(uncommented(text));
                self.at += 1;
                self.skip_blank();
                let more = self.peek().is_some_and(|(here, line)| here >= indent.max(1) && !line.starts_with('#'));
                return if more { Err(self.fault("continues a value, which is not supported")) } else { Ok(value) };
            }
        }
        let mut whole = text.to_string();
        loop {
            match (Flow { text: whole.as_bytes(), at: 0, depth: 0 }).whole() {
                Ok(Some(value)) => {
                    self.at += 1;
                    return Ok(value);
                }
                Ok(None) if self.at + 1 < self.lines.len() && matches!(text.as_bytes()[0], b'[' | b'{') => {
                    self.at += 1;
                    whole.push(' ');
                    whole.push_str(uncommented(self.lines[self.at].trim()));
                }
                Ok(None) => return Err(self.fault("does not end")),
                Err(words) => return Err(self.fault(words)),
            }
        }
    }

    fn skip_blank(&mut self) {
        while self.lines.get(self.at).is_some_and(|line| line.trim().is_empty()) {
            self.at += 1;
        }
    }

    /// `|` and `>` with `+` or `-`; an explicit indentation is refused.
    fn block(&mut self, head: &str, least: usize) -> Result<Value, String> {
        let (fold, chomp) = (head.starts_with('>'), uncommented(&head[1..]).trim().to_string());
        if !matches!(chomp.as_str(), "" | "+" | "-") {
            return Err(self.fault("has a block indicator that is not supported"));
        }
        self.at += 1;
        let mut lines: Vec<String> = Vec::new();
        let mut indent = None;
        while let Some(line) = self.lines.get(self.at) {
            let width = line.len() - line.trim_start_matches(' ').len();
            if line.trim().is_empty() {
                lines.push(String::new());
            } else if width < indent.unwrap_or(least.max(1)) {
                break;
            } else {
                lines.push(line[*indent.get_or_insert(width)..].to_string());
            }
            self.at += 1;
        }
        let blank = lines.iter().rev().take_while(|line| line.is_empty()).count();
        let body = &lines[..lines.len() - blank];
        let mut text = if fold { folded(body) } else { body.join("\n") };
        match chomp.as_str() {
            "-" => {}
            "+" => text.push_str(&"\n".repeat(blank + 1)),
            _ if body.is_empty() => {}
            _ => text.push('\n'),
        }
        Ok(Value::Text(text))
    }
}

/// Lines become one with blanks between; an empty line is a line break; indented lines stay.
fn folded(lines: &[String]) -> String {
    let mut text = String::new();
    let mut glue = false;
    for line in lines {
        let stays = line.is_empty() || line.starts_with([' ', '\t']);
        if stays {
            text.push('\n');
        } else if glue {
            text.push(' ');
        }
        text.push_str(line);
        glue = !stays;
    }
    text
}

/// Without a comment, which starts with `#` behind a blank and outside of quotes.
fn uncommented(text: &str) -> &str {
    let (mut quote, mut before) = (None, ' ');
    let mut characters = text.char_indices().peekable();
    while let Some((at, each)) = characters.next() {
        match (quote, each) {
            // Two in a row are one inside of single quotes.
            (Some('\''), '\'') if characters.next_if(|(_, next)| *next == '\'').is_some() => {}
            (Some(open), _) if open == each && !(open == '"' && before == '\\') => quote = None,
            (None, '#') if before.is_whitespace() => return text[..at].trim(),
            (None, '"' | '\'') if before.is_whitespace() || "[{,:".contains(before) => quote = Some(each),
            _ => {}
        }
        before = each;
    }
    text.trim()
}

/// The key and what stands behind its colon.
fn key(content: &str) -> Option<(String, &str)> {
    if content.starts_with(['[', '{', '|', '>', '#', '&', '*', '!', '%', '@', '`', '?']) {
        return None;
    }
    if content.starts_with(['"', '\'']) {
        let mut flow = Flow { text: content.as_bytes(), at: 0, depth: 0 };
        let Ok(Some(Value::Text(name))) = flow.quoted() else { return None };
        let rest = content[flow.at..].strip_prefix(':')?;
        return (rest.is_empty() || rest.starts_with(' ')).then_some((name, rest));
    }
    let at = content.find(": ").or_else(|| content.strip_suffix(':').map(str::len))?;
    (!content[..at].contains(" #")).then(|| (content[..at].trim_end().to_string(), &content[at + 1..]))
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        _ => Value::Text(text.to_string()),
    }
}

/// A flow node in one text; `Ok(None)` when the text ends before it does.
struct Flow<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

type Part = Result<Option<Value>, &'static str>;

impl Flow<'_> {
    fn whole(mut self) -> Part {
        let value = self.node()?;
        let rest = String::from_utf8_lossy(&self.text[self.at..]).trim().to_string();
        match value {
            Some(_) if !rest.is_empty() && !rest.starts_with('#') => Err("has something behind its value"),
            value => Ok(value),
        }
    }

    fn blank(&mut self) {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn node(&mut self) -> Part {
        self.blank();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("is nested too deeply");
        }
        let value = match self.text.get(self.at) {
            None => Ok(None),
            Some(b'[') => self.list(),
            Some(b'{') => self.map(),
            Some(b'"' | b'\'') => self.quoted(),
            Some(b'&' | b'*' | b'!') => Err("has an anchor, alias or tag, which is not supported"),
            Some(_) => Ok(Some(plain(&self.bare()))),
        };
        self.depth -= 1;
        value
    }

    /// A plain scalar inside brackets: up to `,`, a bracket, or a colon before a blank.
    fn bare(&mut self) -> String {
        let start = self.at;
        while let Some(byte) = self.text.get(self.at) {
            let after = self.text.get(self.at + 1).copied().unwrap_or(b' ');
            let colon = *byte == b':' && (after.is_ascii_whitespace() || b",]}".contains(&after));
            if colon || b",]}[{".contains(byte) {
                break;
            }
            self.at += 1;
        }
        String::from_utf8_lossy(&self.text[start..self.at]).trim().to_string()
    }

    fn list(&mut self) -> Part {
        self.at += 1;
        let mut items = Vec::new();
        loop {
            self.blank();
            match self.text.get(self.at) {
                None => return Ok(None),
                Some(b']') => {
                    self.at += 1;
                    return Ok(Some(Value::List(items)));
                }
                Some(b',') => return Err("has a comma too many"),
                Some(_) => {}
            }
            let Some(item) = self.node()? else { return Ok(None) };
            items.push(item);
            self.blank();
            match self.text.get(self.at) {
                Some(b',') => self.at += 1,
                Some(b']') | None => {}
                Some(_) => return Err("lacks a comma or a bracket"),
            }
        }
    }

    fn map(&mut self) -> Part {
        self.at += 1;
        let mut pairs: Vec<(String, Value)> = Vec::new();
        loop {
            self.blank();
            match self.text.get(self.at) {
                None => return Ok(None),
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Some(Value::Map(pairs)));
                }
                Some(b',') => return Err("has a comma too many"),
                Some(_) => {}
            }
            let name = match self.text[self.at] {
                b'"' | b'\'' => match self.quoted()? {
                    Some(Value::Text(name)) => name,
                    _ => return Ok(None),
                },
                _ => self.bare(),
            };
            self.blank();
            let value = match self.text.get(self.at) {
                None => return Ok(None),
                Some(b':') => {
                    self.at += 1;
                    let Some(value) = self.node()? else { return Ok(None) };
                    value
                }
                Some(_) => return Err("has a key without a value"),
            };
            if pairs.iter().any(|(old, _)| *old == name) {
                return Err("has a key twice");
            }
            pairs.push((name, value));
            self.blank();
            match self.text.get(self.at) {
                Some(b',') => self.at += 1,
                Some(b'}') | None => {}
                Some(_) => return Err("lacks a comma or a brace"),
            }
        }
    }

    fn quoted(&mut self) -> Part {
        let quote = self.text[self.at];
        self.at += 1;
        let mut out = Vec::new();
        loop {
            let Some(byte) = self.text.get(self.at).copied() else { return Ok(None) };
            self.at += 1;
            match byte {
                b'\'' if quote == b'\'' && self.text.get(self.at) == Some(&b'\'') => {
                    self.at += 1;
                    out.push(b'\'');
                }
                b'\\' if quote == b'"' => match self.escape()? {
                    Some(character) => out.extend(character.to_string().bytes()),
                    None => return Ok(None),
                },
                _ if byte == quote => {
                    return String::from_utf8(out).map(|text| Some(Value::Text(text))).map_err(|_| "is not UTF-8");
                }
                _ => out.push(byte),
            }
        }
    }

    fn escape(&mut self) -> Result<Option<char>, &'static str> {
        let Some(byte) = self.text.get(self.at).copied() else { return Ok(None) };
        self.at += 1;
        let digits = match byte {
            b'n' => return Ok(Some('\n')),
            b't' => return Ok(Some('\t')),
            b'r' => return Ok(Some('\r')),
            b'0' => return Ok(Some('\0')),
            b'b' => return Ok(Some('\u{8}')),
            b'f' => return Ok(Some('\u{c}')),
            b'e' => return Ok(Some('\u{1b}')),
            b'"' | b'\\' | b'/' | b' ' => return Ok(Some(char::from(byte))),
            b'x' => 2,
            b'u' => 4,
            b'U' => 8,
            _ => return Err("has an escape that is not supported"),
        };
        let first = self.hexadecimal(digits)?;
        // JSON writes what does not fit 16 bits as two halves.
        let code = if (0xd800..0xdc00).contains(&first) && self.text.get(self.at..self.at + 2) == Some(b"\\u") {
            self.at += 2;
            let second = self.hexadecimal(4)?;
            0x10000 + ((first - 0xd800) << 10) + (second.wrapping_sub(0xdc00) & 0x3ff)
        } else {
            first
        };
        char::from_u32(code).map(Some).ok_or("has an escape that is no character")
    }

    fn hexadecimal(&mut self, digits: usize) -> Result<u32, &'static str> {
        const WRONG: &str = "has an escape that is not hexadecimal";
        let text = self.text.get(self.at..self.at + digits).ok_or(WRONG)?;
        self.at += digits;
        std::str::from_utf8(text).ok().and_then(|text| u32::from_str_radix(text, 16).ok()).ok_or(WRONG)
    }
}
