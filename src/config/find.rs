//! Which pipeline file is meant: `pipeline.yaml` or `pipelines/NAME.yaml`, here or in a folder above.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::diagnostic::quoted;
use super::yaml;
use crate::error::{Problem, nearest};

/// The file of a folder with one pipeline.
const FILE: &str = "pipeline.yaml";
/// The folder of a folder with several.
const FOLDER: &str = "pipelines";

/// The pipeline file that `name` means, seen from the folder `from` (absolute) and those above it.
///
/// A name is that of a `pipeline.yaml`, of a file in `pipelines/`, or the path of a YAML file. Without a name the
/// nearest `pipeline.yaml` is meant, or the only file in `pipelines/`.
///
/// # Errors
/// A usage problem that names the nearest pipeline and where it looked.
pub fn find(name: Option<&str>, from: &Path) -> Result<PathBuf> {
    match name {
        None => only(from),
        Some(name) if name.contains('/') || name.ends_with(".yaml") || name.ends_with(".yml") => {
            let path = from.join(name);
            let missing = || Problem::usage(format!("the pipeline file `{name}` does not exist"));
            if path.exists() { Ok(path) } else { Err(hint_nearest(missing(), name, from).into()) }
        }
        Some(name) => named(name, from),
    }
}

/// The names [`find`] knows, sorted.
pub fn names(from: &Path) -> Vec<String> {
    let mut names: Vec<String> = from.ancestors().flat_map(candidates).map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn named(name: &str, from: &Path) -> Result<PathBuf> {
    let found = from.ancestors().flat_map(candidates).find(|(candidate, _)| candidate == name);
    match found {
        Some((_, path)) => Ok(path),
        None => {
            let problem = Problem::usage(format!("there is no pipeline `{name}`"));
            Err(hint_where(hint_nearest(problem, name, from), from, &format!("{FOLDER}/{name}.yaml")).into())
        }
    }
}

fn only(from: &Path) -> Result<PathBuf> {
    for dir in from.ancestors() {
        if dir.join(FILE).exists() {
            return Ok(dir.join(FILE));
        }
        let found = candidates(dir);
        match found.as_slice() {
            [] => {}
            [(_, path)] => return Ok(path.clone()),
            several => {
                let names = quoted(several.iter().map(|(name, _)| name));
                let message = format!("{} has several pipelines: {names}", dir.join(FOLDER).display());
                return Err(Problem::usage(message).hint("add the name of one to the command").into());
            }
        }
    }
    let problem = Problem::usage("there is no pipeline here");
    let problem = if from.join("pipeline.yml").exists() {
        problem.hint(format!("rename `pipeline.yml` to `{FILE}`"))
    } else {
        problem.hint("`pipeline init` writes one from what it finds in this folder")
    };
    Err(hint_where(problem, from, &format!("one file in {FOLDER}/")).into())
}

/// The pipelines of one folder with their names, `pipeline.yaml` first.
fn candidates(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    if let Some(name) = name_in(&dir.join(FILE)) {
        found.push((name, dir.join(FILE)));
    }
    // A folder that cannot be read has nothing for us; find() says where it looked.
    let entries = fs_err::read_dir(dir.join(FOLDER)).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let mut files: Vec<(String, PathBuf)> =
        files.filter(|path| path.is_file()).filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path))).collect();
    files.sort_unstable();
    found.append(&mut files);
    found
}

/// The `name:` of a pipeline file; of a broken one, what its first line with `name:` says, so that it is found and reported.
fn name_in(path: &Path) -> Option<String> {
    if !path.is_file() {
        return None;
    }
    let bytes = fs_err::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let parsed = yaml::parse(path, &text).ok();
    if let Some(name) = parsed.and_then(|tree| tree.place().key("name").node()?.text().map(str::to_owned)) {
        return Some(name);
    }
    let line = text.lines().find_map(|line| line.strip_prefix("name:"))?;
    Some(line.split(" #").next()?.trim().trim_matches(['"', '\'']).to_owned())
}

fn hint_nearest(problem: Problem, name: &str, from: &Path) -> Problem {
    let names = names(from);
    let wanted = Path::new(name).file_stem().and_then(|stem| stem.to_str()).unwrap_or(name);
    match nearest(wanted, names.iter().map(String::as_str)) {
        Some(near) => problem.hint(format!("did you mean `{near}`?")),
        None if names.is_empty() => problem,
        None => problem.hint(format!("there are {}", quoted(&names))),
    }
}

fn hint_where(problem: Problem, from: &Path, other: &str) -> Problem {
    problem.hint(format!("looked for {FILE} and {other} in {} and the folders above it", from.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{exit_code, hints};

    /// `shop/` with one pipeline, `many/` with two, `one/` with one in its folder; returns the root.
    fn folders() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = fs_err::canonicalize(folder.path()).unwrap();
        let files = [
            ("shop/pipeline.yaml", "# shop\nname: \"shop\" # the shop\n"),
            ("shop/deep/er/a.txt", ""),
            ("many/pipelines/notes.yaml", "name: notes"),
            ("many/pipelines/site.yaml", "name: site"),
            ("many/pipelines/README.md", ""),
            ("many/apps/x", ""),
            ("one/pipelines/only.yaml", "name: only"),
            ("broken/pipeline.yaml", "name: broken # it is\nbase: [\n"),
            ("yml/pipeline.yml", "name: a"),
            ("none/x", ""),
        ];
        for (path, text) in files {
            fs_err::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs_err::write(root.join(path), text).unwrap();
        }
        (folder, root)
    }

    #[test]
    fn found() {
        let (_keep, root) = folders();
        let cases = [
            (Some("shop"), "shop", "shop/pipeline.yaml"),
            (Some("shop"), "shop/deep/er", "shop/pipeline.yaml"),
            (None, "shop/deep/er", "shop/pipeline.yaml"),
            (Some("site"), "many", "many/pipelines/site.yaml"),
            (Some("site"), "many/apps", "many/pipelines/site.yaml"),
            (Some("notes"), "many/pipelines", "many/pipelines/notes.yaml"),
            (None, "one", "one/pipelines/only.yaml"),
            (Some("pipelines/site.yaml"), "many", "many/pipelines/site.yaml"),
            (Some("../many/pipelines/site.yaml"), "one", "one/../many/pipelines/site.yaml"),
            (Some("pipeline.yml"), "yml", "yml/pipeline.yml"),
            (Some("broken"), "broken", "broken/pipeline.yaml"),
        ];
        for (name, from, expected) in cases {
            assert_eq!(find(name, &root.join(from)).unwrap(), root.join(expected), "{name:?} from {from}");
        }
        assert_eq!(names(&root.join("many/apps"))[..2], ["notes".to_owned(), "site".to_owned()]);
    }

    #[test]
    fn not_found() {
        let (_keep, root) = folders();
        let several = format!("{} has several pipelines: `notes` and `site`", root.join("many/pipelines").display());
        let here = |from: &str, file: &str| {
            format!("looked for pipeline.yaml and {file} in {} and the folders above it", root.join(from).display())
        };
        let cases = [
            (
                Some("siet"),
                "many",
                "there is no pipeline `siet`",
                vec!["did you mean `site`?".into(), here("many", "pipelines/siet.yaml")],
            ),
            (
                Some("elephant"),
                "many",
                "there is no pipeline `elephant`",
                vec!["there are `notes` and `site`".into(), here("many", "pipelines/elephant.yaml")],
            ),
            (Some("x"), "none", "there is no pipeline `x`", vec![here("none", "pipelines/x.yaml")]),
            (
                Some("pipelines/siet.yaml"),
                "many",
                "the pipeline file `pipelines/siet.yaml` does not exist",
                vec!["did you mean `site`?".into()],
            ),
            (None, "many", several.as_str(), vec!["add the name of one to the command".into()]),
            (
                None,
                "none",
                "there is no pipeline here",
                vec![
                    "`pipeline init` writes one from what it finds in this folder".into(),
                    here("none", "one file in pipelines/"),
                ],
            ),
            (
                None,
                "yml",
                "there is no pipeline here",
                vec!["rename `pipeline.yml` to `pipeline.yaml`".into(), here("yml", "one file in pipelines/")],
            ),
        ];
        for (name, from, message, expected) in cases {
            let error = find(name, &root.join(from)).unwrap_err();
            assert_eq!(
                (error.to_string().as_str(), hints(&error), exit_code(&error)),
                (message, expected, 2),
                "{name:?} from {from}"
            );
        }
    }
}
