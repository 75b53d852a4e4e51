//! Reads a [`Tree`] as a `T` by walking it against `T`'s JSON Schema, and notes everything that does not fit.
//!
//! The schema is the one `pipeline schema` publishes, so what an editor accepts is what is read here.
//! Understood are the forms schemars makes of serde types: objects (closed, or maps), lists, text with or without
//! choices, numbers with bounds, booleans, `$ref`, nullable, and `anyOf`/`oneOf`. Wrong parts are replaced by the
//! emptiest value that fits, so that the checks that follow can still find the other problems of the file.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

use super::diagnostic::{Findings, quoted, suggestion};
use super::yaml::{Content, Node, Place, Tree};

/// Reads the tree as a `T`. With problems in `findings` the value is what could be read of it, for further checks only.
pub fn read<T: DeserializeOwned + JsonSchema>(tree: &Tree, findings: &mut Findings) -> Option<T> {
    let schema = schemars::schema_for!(T).to_value();
    let mut walk = Walk { root: &schema, findings };
    let value = if tree.root.is_null() { walk.empty_file(tree) } else { walk.value(&tree.root, &tree.place(), &schema) };
    match T::deserialize(value) {
        Ok(value) => Some(value),
        Err(error) => {
            if findings.is_empty() {
                // The schema allows something serde does not; serde knows what, but not where.
                findings.add(&tree.place(), error.to_string(), None);
            }
            None
        }
    }
}

/// What a schema asks for, references resolved.
enum Want<'s> {
    Anything,
    Text(Vec<&'s str>),
    Whole(&'s Value),
    Number,
    Boolean,
    List(&'s Value),
    Object(&'s Value),
    OneOf(Vec<&'s Value>),
}

impl Want<'_> {
    fn noun(&self) -> &'static str {
        match self {
            Want::Anything => "something",
            Want::Text(_) => "text",
            Want::Whole(_) => "a whole number",
            Want::Number => "a number",
            Want::Boolean => "`true` or `false`",
            Want::List(_) => "a list",
            Want::Object(_) => "a mapping",
            Want::OneOf(_) => "one of several forms",
        }
    }
}

struct Walk<'s, 'f> {
    root: &'s Value,
    findings: &'f mut Findings,
}

impl<'s> Walk<'s, '_> {
    /// The value of `node` as `schema` wants it.
    fn value(&mut self, node: &Node, place: &Place<'_>, schema: &'s Value) -> Value {
        let (want, nullable) = self.want(schema);
        if nullable && node.is_null() {
            return Value::Null;
        }
        let fitting = match (&want, &node.content) {
            (Want::Anything, _) => Some(self.anything(node, place)),
            (Want::OneOf(forms), _) => return self.one_of(node, place, forms),
            (Want::Object(schema), Content::Mapping(entries)) => return self.object(entries, place, schema),
            (Want::List(schema), Content::Sequence(items)) => {
                return items.iter().enumerate().map(|(index, item)| self.value(item, &place.item(index), schema)).collect();
            }
            (Want::Text(choices), Content::Scalar { text, .. }) if !node.is_null() => {
                if !choices.is_empty() && !choices.contains(&text.as_str()) {
                    let hint = suggestion(text, choices, "possible are");
                    self.findings.add(place, format!("{} cannot be `{text}`", label(place)), hint);
                    return self.placeholder(schema, 0);
                }
                Some(Value::String(text.clone()))
            }
            (Want::Whole(_), Content::Scalar { text, plain: true }) => whole(text),
            (Want::Number, Content::Scalar { text, plain: true }) => number(text),
            (Want::Boolean, Content::Scalar { text, plain: true }) => boolean(text),
            _ => None,
        };
        let Some(value) = fitting else {
            let hint = wrong_type_hint(&want, node);
            self.findings.add(place, format!("{} must be {}, found {}", label(place), want.noun(), found(node)), hint);
            return self.placeholder(schema, 0);
        };
        if let (Want::Whole(schema), Some(found)) = (&want, integer(&value)) {
            let bound = |name: &str| schema.get(name).and_then(integer);
            let (minimum, maximum) = (bound("minimum"), bound("maximum"));
            if minimum.is_some_and(|minimum| found < minimum) || maximum.is_some_and(|maximum| found > maximum) {
                let range = match (minimum, maximum) {
                    (Some(low), Some(high)) => format!("from {low} to {high}"),
                    (Some(low), None) => format!("at least {low}"),
                    (_, high) => format!("at most {}", high.unwrap_or_default()),
                };
                self.findings.add(place, format!("{} must be {range}, found {found}", label(place)), None);
                return Value::from(minimum.map_or(0, |low| low.max(0) as u64));
            }
        }
        value
    }

    /// A mapping: its known keys read, unknown, doubled and missing ones noted.
    fn object(&mut self, entries: &[(Node, Node)], place: &Place<'_>, schema: &'s Value) -> Value {
        let properties = schema.get("properties").and_then(Value::as_object);
        let additional = schema.get("additionalProperties");
        let required = names(schema.get("required"));
        let mut object = Map::new();
        let mut seen: Vec<(&str, usize)> = Vec::new();
        for (key, value) in entries {
            let Some(name) = key.text() else {
                self.findings.add(&place.at(key.span), "a key must be text", None);
                continue;
            };
            if let Some((_, line)) = seen.iter().find(|(other, _)| *other == name) {
                let hint = Some(format!("the first one is on line {line}"));
                self.findings.add(&place.label(name).at(key.span), format!("the key `{name}` is here twice"), hint);
                continue;
            }
            seen.push((name, key.span.line));
            let below = place.key(name);
            match properties.and_then(|properties| properties.get(name)).or(additional.filter(|schema| schema.is_object())) {
                Some(schema) => {
                    if value.is_null() && !required.contains(&name) && self.may_be_empty(schema) {
                        continue;
                    }
                    let value = self.value(value, &below, schema);
                    object.insert(name.into(), value);
                }
                None if additional == Some(&Value::Bool(false)) => {
                    let hint = self.unknown_key_hint(name, place, properties);
                    self.findings.add(&place.label(name), format!("unknown key `{name}`"), hint);
                }
                None => {
                    let value = self.anything(value, &below);
                    object.insert(name.into(), value);
                }
            }
        }
        for name in required.into_iter().filter(|name| !seen.iter().any(|(key, _)| key == name)) {
            let hint = properties.and_then(|properties| properties.get(name)).and_then(description);
            let message = match place.path().last() {
                Some(_) => format!("{} has no `{name}`", label(place)),
                None => format!("the key `{name}` is missing"),
            };
            self.findings.add(&place.key(name), message, hint);
            if let Some(schema) = properties.and_then(|properties| properties.get(name)) {
                object.insert(name.into(), self.placeholder(schema, 0));
            }
        }
        Value::Object(object)
    }

    /// Tries all forms and keeps the one with the fewest problems, of those that are a mapping, a list or a plain value as the
    /// node is, when there are any; for variants with one key each, names the keys.
    fn one_of(&mut self, node: &Node, place: &Place<'_>, forms: &[&'s Value]) -> Value {
        let variants: Vec<&str> = forms.iter().flat_map(|form| names(form.get("required"))).collect();
        if variants.len() == forms.len()
            && let Content::Mapping(entries) = &node.content
        {
            let keys: Vec<&str> = entries.iter().filter_map(|(key, _)| key.text()).collect();
            let chosen: Vec<usize> = (0..forms.len()).filter(|index| keys.contains(&variants[*index])).collect();
            if let [index] = chosen.as_slice() {
                return self.value(node, place, forms[*index]);
            }
            let hint = keys.first().and_then(|key| crate::error::nearest(key, variants.iter().copied()));
            let message = format!("{} needs exactly one of {}", label(place), quoted(&variants));
            self.findings.add(place, message, hint.map(|name| format!("did you mean `{name}`?")));
            return Value::Null;
        }
        let mut best: Option<((bool, usize), Findings, Value)> = None;
        for form in forms {
            let mut findings = self.findings.clone();
            let before = findings.len();
            let value = Walk { root: self.root, findings: &mut findings }.value(node, place, form);
            let problems = (!self.is_like(form, node), findings.len() - before);
            if best.as_ref().is_none_or(|(fewest, ..)| problems < *fewest) {
                best = Some((problems, findings, value));
            }
        }
        let Some((_, findings, value)) = best else { return Value::Null };
        *self.findings = findings;
        value
    }

    /// Whether `form` is a mapping, a list or a plain value as `node` is.
    fn is_like(&self, form: &'s Value, node: &Node) -> bool {
        match self.want(form).0 {
            Want::Anything | Want::OneOf(_) => true,
            Want::Object(_) => matches!(node.content, Content::Mapping(_)),
            Want::List(_) => matches!(node.content, Content::Sequence(_)),
            Want::Text(_) | Want::Whole(_) | Want::Number | Want::Boolean => matches!(node.content, Content::Scalar { .. }),
        }
    }

    /// A value no schema speaks of, by YAML's core schema.
    fn anything(&mut self, node: &Node, place: &Place<'_>) -> Value {
        match &node.content {
            Content::Scalar { .. } if node.is_null() => Value::Null,
            Content::Scalar { text, plain: true } => {
                boolean(text).or_else(|| whole(text)).or_else(|| number(text)).unwrap_or_else(|| Value::String(text.clone()))
            }
            Content::Scalar { text, .. } => Value::String(text.clone()),
            Content::Sequence(items) => {
                items.iter().enumerate().map(|(index, item)| self.anything(item, &place.item(index))).collect()
            }
            Content::Mapping(entries) => self.object(entries, place, &Value::Null),
        }
    }

    /// A missing file's worth of problems is one: the keys it must have.
    fn empty_file(&mut self, tree: &Tree) -> Value {
        let keys = names(self.root.get("required"));
        self.findings.add(&tree.place(), "the file is empty", Some(format!("it needs at least {}", quoted(keys))));
        Value::Null
    }

    fn want(&self, schema: &'s Value) -> (Want<'s>, bool) {
        let schema = self.resolve(schema);
        let forms = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(*key)).and_then(Value::as_array);
        if let Some(forms) = forms {
            let is_null = |form: &&Value| form.get("type").and_then(Value::as_str) == Some("null");
            let nullable = forms.iter().any(|form| is_null(&form));
            let forms: Vec<&Value> = forms.iter().filter(|form| !is_null(form)).map(|form| self.resolve(form)).collect();
            if let [one] = forms.as_slice() {
                let (want, inner) = self.want(one);
                return (want, nullable || inner);
            }
            let choices: Vec<&str> = forms.iter().flat_map(|form| choices(form)).collect();
            let all_text = forms.iter().all(|form| !self::choices(form).is_empty());
            return (if all_text { Want::Text(choices) } else { Want::OneOf(forms) }, nullable);
        }
        let types = match schema.get("type") {
            Some(Value::String(name)) => vec![name.as_str()],
            other => names(other),
        };
        let want = match types.iter().find(|name| **name != "null") {
            Some(&"string") => Want::Text(choices(schema)),
            Some(&"integer") => Want::Whole(schema),
            Some(&"number") => Want::Number,
            Some(&"boolean") => Want::Boolean,
            Some(&"array") => Want::List(schema.get("items").unwrap_or(&Value::Null)),
            Some(&"object") => Want::Object(schema),
            _ if !choices(schema).is_empty() => Want::Text(choices(schema)),
            _ => Want::Anything,
        };
        (want, types.contains(&"null"))
    }

    fn resolve(&self, mut schema: &'s Value) -> &'s Value {
        while let Some(target) =
            schema.get("$ref").and_then(Value::as_str).and_then(|path| self.root.pointer(path.strip_prefix('#')?))
        {
            schema = target;
        }
        schema
    }

    /// Lists and mappings whose items are all commented out count as not there.
    fn may_be_empty(&self, schema: &'s Value) -> bool {
        matches!(self.want(schema).0, Want::List(_) | Want::Object(_))
    }

    /// The emptiest value that serde takes for `schema`; `depth` ends recursive types.
    fn placeholder(&self, schema: &'s Value, depth: usize) -> Value {
        let (want, nullable) = self.want(schema);
        match want {
            _ if nullable || depth > 8 => Value::Null,
            Want::Anything => Value::Null,
            Want::Text(choices) => Value::from(choices.first().copied().unwrap_or_default()),
            Want::Whole(schema) => schema.get("minimum").cloned().unwrap_or_else(|| Value::from(0)),
            Want::Number => Value::from(0.0),
            Want::Boolean => Value::Bool(false),
            Want::List(_) => Value::Array(Vec::new()),
            Want::OneOf(forms) => forms.first().map_or(Value::Null, |form| self.placeholder(form, depth + 1)),
            Want::Object(schema) => names(schema.get("required"))
                .into_iter()
                .filter_map(|name| Some((name.to_owned(), self.placeholder(schema.get("properties")?.get(name)?, depth + 1))))
                .collect(),
        }
    }

    fn unknown_key_hint(&self, name: &str, place: &Place<'_>, properties: Option<&'s Map<String, Value>>) -> Option<String> {
        if name == "<<" {
            return Some("merge keys are not supported; an alias can stand for a whole value only".into());
        }
        if let Some(path) = self.elsewhere(name, place) {
            return Some(format!("`{name}` belongs below `{path}`"));
        }
        let known: Vec<&str> = properties?.keys().map(String::as_str).collect();
        suggestion(name, &known, "known keys are")
    }

    /// The one top-level key below which `name` would be known, or the top level itself is not it.
    fn elsewhere(&self, name: &str, place: &Place<'_>) -> Option<&'s str> {
        let top = self.root.get("properties")?.as_object()?;
        let mut below = top.iter().filter(|(key, schema)| {
            let Want::Object(schema) = self.want(schema).0 else { return false };
            let known = schema.get("properties").and_then(|properties| properties.get(name)).is_some();
            known && place.path().first() != Some(key)
        });
        let (key, _) = below.next()?;
        below.next().is_none().then_some(key)
    }
}

/// How messages name a place: its key, or its number in a list.
fn label(place: &Place<'_>) -> String {
    match place.path() {
        [] => "the file".into(),
        [.., list, index] if index.parse::<usize>().is_ok() => {
            format!("item {} of `{list}`", index.parse::<usize>().unwrap_or_default() + 1)
        }
        [.., key] => format!("`{key}`"),
    }
}

fn found(node: &Node) -> String {
    match &node.content {
        Content::Scalar { .. } if node.is_null() => "nothing".into(),
        Content::Scalar { text, plain } => {
            let short: String = text.chars().take(40).collect();
            if *plain { format!("`{short}`") } else { format!("the text `{short}`") }
        }
        Content::Sequence(_) => "a list".into(),
        Content::Mapping(_) => "a mapping".into(),
    }
}

fn wrong_type_hint(want: &Want<'_>, node: &Node) -> Option<String> {
    let text = node.text().unwrap_or_default();
    match want {
        Want::Text(_) if node.is_null() => Some("write `\"\"` for an empty text".into()),
        Want::List(_) if !text.is_empty() => Some(format!("a list of one is written `[{text}]`")),
        Want::Boolean => match text.to_ascii_lowercase().as_str() {
            "yes" | "on" | "true" | "1" => Some("write `true`, without quotes".into()),
            "no" | "off" | "false" | "0" => Some("write `false`, without quotes".into()),
            _ => None,
        },
        Want::Whole(_) if whole(text).is_some() => Some(format!("write `{text}` without quotes")),
        _ => None,
    }
}

/// A whole number by YAML's core schema.
fn whole(text: &str) -> Option<Value> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok().map(Value::from);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return u64::from_str_radix(digits, 8).ok().map(Value::from);
    }
    text.parse::<u64>().ok().map(Value::from).or_else(|| text.parse::<i64>().ok().map(Value::from))
}

fn number(text: &str) -> Option<Value> {
    let digits = text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'));
    digits.then(|| text.parse::<f64>().ok()).flatten().and_then(Number::from_f64).map(Value::Number)
}

fn boolean(text: &str) -> Option<Value> {
    match text {
        "true" | "True" | "TRUE" => Some(Value::Bool(true)),
        "false" | "False" | "FALSE" => Some(Value::Bool(false)),
        _ => None,
    }
}

/// The texts of an array.
fn names(array: Option<&Value>) -> Vec<&str> {
    array.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// The texts a schema allows; none when it does not limit them.
fn choices(schema: &Value) -> Vec<&str> {
    schema.get("const").and_then(Value::as_str).map_or_else(|| names(schema.get("enum")), |choice| vec![choice])
}

/// The first line of a schema's description, as a hint.
fn description(schema: &Value) -> Option<String> {
    let mut characters = schema.get("description")?.as_str()?.lines().next()?.trim_end_matches('.').chars();
    let first = characters.next()?.to_lowercase();
    Some(format!("{first}{}", characters.as_str()))
}

fn integer(value: &Value) -> Option<i128> {
    value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use serde::Deserialize;

    use super::*;
    use crate::config::yaml::{load, parse};

    #[derive(Debug, PartialEq, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default)]
        text: Option<String>,
        #[serde(default)]
        flag: Option<bool>,
        #[serde(default)]
        share: Option<f64>,
        #[serde(default)]
        small: u8,
        #[serde(default)]
        offset: i32,
        #[serde(default)]
        list: Vec<String>,
        #[serde(default)]
        map: BTreeMap<String, String>,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        kind: Option<Kind>,
        #[serde(default)]
        target: Option<Target>,
        #[serde(default)]
        any: Option<Value>,
        #[serde(default)]
        either: Option<Either>,
    }

    #[derive(Debug, PartialEq, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        /// The depth.
        depth: u64,
        #[serde(default)]
        only_inner: Option<String>,
    }

    #[derive(Debug, PartialEq, Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        None,
        /// With words, which gives another schema.
        Host,
    }

    #[derive(Debug, PartialEq, Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase", deny_unknown_fields)]
    enum Target {
        Local(Inner),
        Docker { host: String },
    }

    #[derive(Debug, PartialEq, Deserialize, JsonSchema)]
    #[serde(untagged)]
    enum Either {
        One(String),
        Many(Vec<String>),
    }

    #[test]
    fn everything_that_fits() {
        let text = "name: 1.10\ntext: on\nflag: true\nshare: 0.5\nsmall: 0xff\noffset: -3\nlist: [0o17, ~x, 'null']\n\
                    map: {a: 010, b: \"\"}\ninner: {depth: 7}\nkind: none\ntarget: {docker: {host: h}}\n\
                    any: [1, 1.5, true, ~, 'true', {a: b}]\neither: [a]\n";
        let (sample, tree) = load::<Sample>(Path::new("x"), text).unwrap();
        let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let expected = Sample {
            name: "1.10".into(),
            text: Some("on".into()),
            flag: Some(true),
            share: Some(0.5),
            small: 255,
            offset: -3,
            list: strings(&["0o17", "~x", "null"]),
            map: [("a".into(), "010".into()), ("b".into(), String::new())].into(),
            inner: Some(Inner { depth: 7, only_inner: None }),
            kind: Some(Kind::None),
            target: Some(Target::Docker { host: "h".into() }),
            any: Some(serde_json::json!([1, 1.5, true, null, "true", {"a": "b"}])),
            either: Some(Either::Many(strings(&["a"]))),
        };
        assert_eq!(sample, expected);
        assert_eq!(tree.place().key("inner").key("depth").span().column, 16);
        let (sample, _) = load::<Sample>(Path::new("x"), "name: n\ntext: ~\nlist:\nmap:\ninner:\neither: a\nsmall: 1").unwrap();
        assert_eq!((sample.text, sample.list, sample.either), (None, Vec::new(), Some(Either::One("a".into()))));
    }

    #[test]
    fn everything_that_does_not() {
        let cases = [
            ("nme: a\nname: b", "1:1+3 unknown key `nme`", "did you mean `name`?"),
            (
                "name: a\nxxxxxxxxx: b",
                "2:1+9 unknown key `xxxxxxxxx`",
                "known keys are `name`, `text`, `flag`, `share`, `small`, `offset`, `list`, `map`, `inner`, `kind`, `target`, `any` and `either`",
            ),
            ("name: a\nonly_inner: b", "2:1+10 unknown key `only_inner`", "`only_inner` belongs below `inner`"),
            (
                "name: a\n<<: {}",
                "2:1+2 unknown key `<<`",
                "merge keys are not supported; an alias can stand for a whole value only",
            ),
            ("name: a\nname: b", "2:1+4 the key `name` is here twice", "the first one is on line 1"),
            ("name: a\nmap: {x: 1, x: 2}", "2:13+1 the key `x` is here twice", "the first one is on line 2"),
            ("name: a\nany: {x: 1, x: 2}", "2:13+1 the key `x` is here twice", "the first one is on line 2"),
            ("name: a\n[b]: c", "2:1+3 a key must be text", ""),
            ("name: a\n? {b: c}\n: d", "2:3+6 a key must be text", ""),
            ("text: a", "1:1+7 the key `name` is missing", ""),
            ("name: a\ninner: {}", "2:1+5 `inner` has no `depth`", "the depth"),
            ("name:\n", "1:1+4 `name` must be text, found nothing", "write `\"\"` for an empty text"),
            ("name: [a]", "1:1+4 `name` must be text, found a list", ""),
            ("name: {a: b}", "1:1+4 `name` must be text, found a mapping", ""),
            ("name: a\nmap: {b: }", "2:7+1 `b` must be text, found nothing", "write `\"\"` for an empty text"),
            ("name: a\nlist: b", "2:7+1 `list` must be a list, found `b`", "a list of one is written `[b]`"),
            ("name: a\nlist: [b, [c]]", "2:11+3 item 2 of `list` must be text, found a list", ""),
            ("name: a\nlist: {b: c}", "2:1+4 `list` must be a list, found a mapping", ""),
            ("name: a\nmap: [b]", "2:1+3 `map` must be a mapping, found a list", ""),
            ("name: a\nflag: yes", "2:7+3 `flag` must be `true` or `false`, found `yes`", "write `true`, without quotes"),
            (
                "name: a\nflag: 'false'",
                "2:7+7 `flag` must be `true` or `false`, found the text `false`",
                "write `false`, without quotes",
            ),
            ("name: a\nsmall: '8'", "2:8+3 `small` must be a whole number, found the text `8`", "write `8` without quotes"),
            ("name: a\nsmall: 1.5", "2:8+3 `small` must be a whole number, found `1.5`", ""),
            ("name: a\nsmall: ~", "2:1+5 `small` must be a whole number, found nothing", ""),
            ("name: a\nsmall: 256", "2:8+3 `small` must be from 0 to 255, found 256", ""),
            ("name: a\nsmall: -1", "2:8+2 `small` must be from 0 to 255, found -1", ""),
            ("name: a\nshare: x", "2:8+1 `share` must be a number, found `x`", ""),
            ("name: a\nshare: nan", "2:8+3 `share` must be a number, found `nan`", ""),
            ("name: a\nkind: hots", "2:7+4 `kind` cannot be `hots`", "did you mean `host`?"),
            ("name: a\nkind: somewhere", "2:7+9 `kind` cannot be `somewhere`", "possible are `none` and `host`"),
            (
                "name: a\ntarget: {dokcer: {}}",
                "2:1+6 `target` needs exactly one of `local` and `docker`",
                "did you mean `docker`?",
            ),
            ("name: a\ntarget: {docker: {hots: x, host: y}}", "2:19+4 unknown key `hots`", "did you mean `host`?"),
            ("name: a\ntarget: {local: {depth: x}}", "2:25+1 `depth` must be a whole number, found `x`", ""),
            ("", "1:1+1 the file is empty", "it needs at least `name`"),
            ("- a", "1:1+3 the file must be a mapping, found a list", ""),
        ];
        for (text, expected, hint) in cases {
            let found = load::<Sample>(Path::new("x"), text).unwrap_err();
            let shown: Vec<String> =
                found.iter().map(|found| format!("{}:{}+{} {}", found.line, found.column, found.length, found.message)).collect();
            assert_eq!(shown, [expected], "{text:?}");
            assert_eq!(found[0].hint.as_deref().unwrap_or_default(), hint, "{text:?}");
        }
    }

    #[test]
    fn stand_ins_let_the_checks_go_on() {
        let text = "small: 300\nkind: x\ninner: {}\ntarget: {}\nlist: {}\nflag: maybe\nmap: 3\neither: {}\n";
        let tree = parse(Path::new("x"), text).unwrap();
        let mut findings = Findings::new(tree.source.clone());
        let sample = read::<Sample>(&tree, &mut findings).unwrap();
        assert_eq!((sample.name.as_str(), sample.inner), ("", Some(Inner { depth: 0, only_inner: None })));
        assert_eq!(findings.len(), 9);
    }
}
