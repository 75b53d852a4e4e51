//! What README and the other pages say is true: blocks that begin with ```` ```console run ```` are
//! run and their output is compared; commands in all other blocks have to exist; the table of
//! dependencies is Cargo.toml's; the reference has every key of the schema.
//!
//! In a block to run, lines with `$` are commands, those below what they print on both streams.
//! `…` stands for anything in a line, a line that is only `…` for any lines. All blocks run in
//! order in one folder with copies of `apps/` and `pipelines/`; 8080 is a port that is free.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Project, User, repository};
use pipeline::cmd::Cmd;

/// Anything in a line, or any lines.
const ANYTHING: &str = "…";

/// A fenced block of a page.
#[derive(Debug, PartialEq)]
struct Block {
    /// `PAGE:LINE` of its first line.
    place: String,
    /// Words behind the fence.
    info: Vec<String>,
    lines: Vec<String>,
}

/// A line with `$` and what it should print.
#[derive(Debug, PartialEq)]
struct Command {
    line: String,
    expected: Vec<String>,
}

/// README, CONTRIBUTING, ARCHITECTURE and everything in docs/: path and text.
fn pages() -> Vec<(String, String)> {
    let docs = fs_err::read_dir(repository().join("docs"))
        .unwrap()
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().into_string().unwrap()));
    let mut names: Vec<String> = docs.filter(|name| name.ends_with(".md")).collect();
    names.sort_unstable();
    names.splice(0..0, ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"].map(String::from));
    names.into_iter().map(|name| (name.clone(), fs_err::read_to_string(repository().join(name)).unwrap())).collect()
}

fn blocks(page: &str, text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), open.take()) {
            (Some(info), None) => {
                let info = info.split_whitespace().map(String::from).collect();
                open = Some(Block { place: format!("{page}:{}", number + 2), info, lines: Vec::new() });
            }
            (Some(_), Some(block)) => blocks.push(block),
            (None, Some(mut block)) => {
                block.lines.push(line.into());
                open = Some(block);
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{page}: a block has no end");
    blocks
}

fn commands(block: &Block) -> Vec<Command> {
    let mut commands: Vec<Command> = Vec::new();
    for line in &block.lines {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(line), _) => commands.push(Command { line: line.into(), expected: Vec::new() }),
            (None, Some(command)) => command.expected.push(line.clone()),
            (None, None) => panic!("{}: the block begins without a command", block.place),
        }
    }
    commands
}

/// Whether `line` is `expected`, in which [`ANYTHING`] stands for any characters.
fn fits_line(expected: &str, line: &str) -> bool {
    let parts: Vec<&str> = expected.split(ANYTHING).collect();
    let [first, middle @ .., last] = parts.as_slice() else { return expected == line };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn fits(expected: &[&str], lines: &[&str]) -> bool {
    match (expected, lines) {
        ([], []) => true,
        ([first, rest @ ..], _) if first.trim() == ANYTHING => (0..=lines.len()).any(|skipped| fits(rest, &lines[skipped..])),
        ([first, rest @ ..], [line, more @ ..]) => fits_line(first, line) && fits(rest, more),
        _ => false,
    }
}

/// The text without the ends of lines, and without empty lines at its end.
fn lines(text: &str) -> Vec<&str> {
    text.trim_end().lines().map(str::trim_end).collect()
}

/// Where the blocks run.
struct Place {
    project: Project,
    port: u16,
}

impl Place {
    fn make(user: User) -> Self {
        let project = Project::empty(user);
        for folder in ["apps", "pipelines"] {
            project.copy(&repository().join(folder), folder);
        }
        // The program by its bare name, as on a PATH.
        project.link(".bin/pipeline", common::binary().to_str().unwrap());
        Self { project, port: common::free_port() }
    }

    /// Runs the commands of a block in one shell; the status and output of each.
    fn run(&self, block: &Block, commands: &[Command]) -> Vec<(String, String)> {
        const MARK: &str = "\u{1}readme\u{1}";
        let mut script = String::from("exec 2>&1\n");
        for command in commands {
            script.push_str(&command.line.replace("8080", &self.port.to_string()));
            script.push_str(&format!("\nprintf '{MARK}%s{MARK}' $?\n"));
        }
        let path = format!("{}:{}", self.project.path(".bin").display(), std::env::var("PATH").unwrap_or_default());
        let shell = self.project.program("bash").args(&["-c", &script]).env("PATH", path).env("LC_ALL", "C.UTF-8");
        let answer = shell.env("PIPELINE_ROOT", &self.project.root).run();
        let parts: Vec<&str> = answer.stdout.split(MARK).collect();
        let told: Vec<(String, String)> = parts
            .chunks(2)
            .filter_map(|pair| Some(((*pair.get(1)?).to_string(), pair[0].replace(&self.port.to_string(), "8080"))))
            .collect();
        assert_eq!(told.len(), commands.len(), "{}: the block ended early:\n{}", block.place, answer.stdout);
        told
    }
}

/// README's blocks, for one user, in order.
fn run_blocks(user: User) {
    let (name, text) = &pages()[0];
    let place = Place::make(user);
    let mut ran = 0;
    let mut wrong = Vec::new();
    for block in blocks(name, text).iter().filter(|block| block.info.get(1).is_some_and(|word| word == "run")) {
        assert_eq!(block.info[0], "console", "{}", block.place);
        let commands = commands(block);
        for (command, (status, output)) in commands.iter().zip(place.run(block, &commands)) {
            let expected: Vec<&str> = command.expected.iter().map(String::as_str).collect();
            // `$ COMMAND  # exit 2` says which status is meant.
            let wanted = command.line.rsplit_once("# exit ").map_or("0", |(_, status)| status.trim());
            if status != wanted || !fits(&expected, &lines(&output)) {
                wrong.push(format!(
                    "{}: `{}` exits with {status} or prints something else, as {user:?}:\n{output}",
                    block.place, command.line
                ));
            }
            ran += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ran >= 15, "only {ran} commands were run");
    place.project.assert_clean();
}

#[test]
fn blocks_print_what_they_say() {
    run_blocks(common::me());
}

#[test]
fn blocks_print_what_they_say_to_an_ordinary_user() {
    // Without root the test above is this one.
    if common::users().len() > 1 {
        run_blocks(User::Ordinary);
    }
}

/// Each word of a shell line up to a comment or an operator.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().take_while(|word| !word.starts_with('#') && !["|", "&", "&&", ";", ">"].contains(word)).collect()
}

#[test]
fn commands_on_all_pages_exist() {
    let makefile = fs_err::read_to_string(repository().join("Makefile")).unwrap();
    let targets: BTreeSet<&str> = makefile.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name).collect();
    let program = env!("CARGO_BIN_EXE_pipeline");
    let mut helps: BTreeMap<Vec<String>, String> = BTreeMap::new();
    let mut seen = 0;
    for (page, text) in pages() {
        for block in
            blocks(&page, &text).iter().filter(|block| block.info.first().is_some_and(|word| word == "console" || word == "sh"))
        {
            for line in &block.lines {
                let line = if block.info[0] == "sh" { line } else { line.strip_prefix("$ ").unwrap_or("") };
                let words = words(line);
                match words.split_first() {
                    Some((&"make", rest)) => {
                        rest.iter().for_each(|target| assert!(targets.contains(target), "{}: `{line}`", block.place))
                    }
                    Some((&"pipeline", rest)) => {
                        let has_verbs =
                            |word: &&str| ["artifact", "config", "environment", "keys", "ledger", "secret"].contains(word);
                        let depth = if rest.first().is_some_and(has_verbs) { 2 } else { 1 };
                        let verb: Vec<String> =
                            rest.iter().take_while(|word| !word.starts_with('-')).take(depth).map(ToString::to_string).collect();
                        let help = helps
                            .entry(verb.clone())
                            .or_insert_with(|| Cmd::new(program).args(&verb).arg("--help").text().unwrap_or_default());
                        assert!(!help.is_empty(), "{}: `{line}`: there is no such verb", block.place);
                        let options = rest
                            .iter()
                            .take_while(|word| **word != "--")
                            .filter_map(|word| word.split('=').next())
                            .filter(|word| word.starts_with("--"));
                        options.for_each(|option| {
                            assert!(help.contains(option), "{}: `{line}`: there is no option {option}", block.place)
                        });
                    }
                    _ => continue,
                }
                seen += 1;
            }
        }
    }
    assert!(seen >= 20, "only {seen} commands were found");
}

#[test]
fn every_link_leads_somewhere() {
    for (page, text) in pages() {
        let folder = repository().join(&page).parent().unwrap_or(Path::new("")).to_owned();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if !target.contains("://") && !path.is_empty() {
                assert!(folder.join(path).exists(), "{page}: {target}");
            }
        }
    }
}

/// The names in the first column of the table below a heading.
fn first_column(text: &str, heading: &str) -> BTreeSet<String> {
    let text = format!("\n{text}");
    let section = text.split(&format!("\n{heading}\n")).nth(1).unwrap_or_default();
    let section = section.split("\n#").next().unwrap_or_default();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(String::from).collect()
}

#[test]
fn the_table_of_crates_is_whole() {
    let cargo = fs_err::read_to_string(repository().join("Cargo.toml")).unwrap();
    let section = |name: &str| {
        cargo.split(&format!("[{name}]\n")).nth(1).and_then(|rest| rest.split("\n[").next()).unwrap_or_default().to_string()
    };
    let text = ["dependencies", "dev-dependencies", "build-dependencies"].map(section).join("\n");
    let used: BTreeSet<String> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| Some(line.split_once('=')?.0.trim().to_string()))
        .collect();
    assert_eq!(first_column(&pages()[0].1, "### Crates"), used);
}

/// The names of all properties of a schema.
fn properties(schema: &serde_json::Value, names: &mut BTreeSet<String>) {
    match schema {
        serde_json::Value::Object(map) => {
            if let Some(serde_json::Value::Object(here)) = map.get("properties") {
                names.extend(here.keys().cloned());
            }
            map.values().for_each(|value| properties(value, names));
        }
        serde_json::Value::Array(items) => items.iter().for_each(|value| properties(value, names)),
        _ => {}
    }
}

/// Whether a page tells of a key.
fn says(text: &str, name: &str) -> bool {
    text.contains(&format!("`{name}`")) || text.contains(&format!("{name}: "))
}

#[test]
fn the_reference_has_every_key_and_its_example_is_right() {
    let text = fs_err::read_to_string(repository().join("docs/pipeline-file.md")).unwrap();
    let environments = fs_err::read_to_string(repository().join("docs/environments.md")).unwrap();
    let rollout = fs_err::read_to_string(repository().join("docs/rollout.md")).unwrap();
    let mut names = BTreeSet::new();
    properties(&serde_json::to_value(pipeline::config::schema()).unwrap(), &mut names);
    assert!(names.len() > 40, "{names:?}");
    let missing: Vec<&String> =
        names.iter().filter(|name| ![&text, &environments, &rollout].iter().any(|text| says(text, name))).collect();
    assert!(missing.is_empty(), "{missing:?}");

    let dir = tempfile::tempdir().unwrap();
    for folder in ["apps/notes", "pipelines/configure"] {
        fs_err::create_dir_all(dir.path().join(folder)).unwrap();
    }
    fs_err::write(dir.path().join("pipelines/configure/tune.sh"), "true\n").unwrap();
    let blocks = blocks("docs/pipeline-file.md", &text);
    let example = blocks.iter().find(|block| block.lines.first().is_some_and(|line| line.starts_with("name:"))).unwrap();
    let file = dir.path().join("pipelines/notes.yaml");
    fs_err::write(&file, example.lines.join("\n")).unwrap();
    pipeline::config::load(&file, dir.path()).unwrap();
}

#[test]
fn events_are_described() {
    let (page, text) = pages().into_iter().find(|(page, _)| page == "docs/progress.md").unwrap();
    let described = first_column(&text, "# Events of `--progress json`");
    for line in blocks(&page, &text).iter().filter(|block| block.info == ["json"]).flat_map(|block| &block.lines) {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(described.contains(event["event"].as_str().unwrap()), "{line}");
    }
}

#[test]
fn wildcards() {
    let cases = [
        ("a…c", "abc", true),
        ("a…c", "ac", true),
        ("a…c", "abcd", false),
        ("…", "", true),
        ("…b…", "abc", true),
        ("a", "ab", false),
        ("a…b…c", "a1b2c", true),
    ];
    for (expected, line, fit) in cases {
        assert_eq!(fits_line(expected, line), fit, "{expected} {line}");
    }
    assert!(fits(&["a", "…", "c"], &["a", "x", "y", "c"]) && fits(&["a", "…"], &["a"]) && !fits(&["a"], &["a", "b"]));
    let block = Block { place: "x:1".into(), info: vec![], lines: vec!["$ a b".into(), "c".into(), "$ d".into()] };
    let expected =
        vec![Command { line: "a b".into(), expected: vec!["c".into()] }, Command { line: "d".into(), expected: vec![] }];
    assert_eq!(commands(&block), expected);
    assert_eq!(words("pipeline run x --port 1 & # y"), ["pipeline", "run", "x", "--port", "1"]);
}
