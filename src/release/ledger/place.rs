//! Where things are in the ledger's tree, and which of them one commit may change together.
//!
//! ```text
//! ledger.json                   the format; written by the first commit
//! PIPELINE.json                 policy of a pipeline
//! PIPELINE/ENVIRONMENT.json     state of an environment
//! frozen.json                   the emergency stop over all pipelines
//! ```

use std::fmt;
use std::str::FromStr;

use crate::error::Problem;

/// The file that makes a repository a ledger.
pub const FORMAT_FILE: &str = "ledger.json";
/// The emergency stop over all pipelines.
pub const FROZEN_FILE: &str = "frozen.json";
/// Names a pipeline cannot have: its policy would be one of the files above.
pub const RESERVED: [&str; 2] = ["frozen", "ledger"];

/// A file of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Format,
    Frozen,
    Policy { pipeline: String },
    State { pipeline: String, environment: String },
}

impl Place {
    /// The pipeline it belongs to.
    pub fn pipeline(&self) -> Option<&str> {
        match self {
            Self::Policy { pipeline } | Self::State { pipeline, .. } => Some(pipeline),
            Self::Format | Self::Frozen => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format => f.write_str(FORMAT_FILE),
            Self::Frozen => f.write_str(FROZEN_FILE),
            Self::Policy { pipeline } => write!(f, "{pipeline}.json"),
            Self::State { pipeline, environment } => write!(f, "{pipeline}/{environment}.json"),
        }
    }
}

impl FromStr for Place {
    type Err = Problem;

    fn from_str(path: &str) -> Result<Self, Problem> {
        let wrong = || Problem::failed(format!("`{path}` is no file of a ledger"));
        let stem = path.strip_suffix(".json").ok_or_else(wrong)?;
        let place = match stem.split_once('/') {
            _ if path == FORMAT_FILE => Self::Format,
            _ if path == FROZEN_FILE => Self::Frozen,
            Some((pipeline, environment)) if is_name(pipeline) && is_name(environment) => {
                Self::State { pipeline: pipeline.into(), environment: environment.into() }
            }
            None if is_name(stem) => Self::Policy { pipeline: stem.into() },
            _ => return Err(wrong()),
        };
        match place.pipeline() {
            Some(name) if RESERVED.contains(&name) => {
                Err(Problem::usage(format!("a pipeline cannot be called `{name}`: the ledger has a file of that name"))
                    .hint("give the pipeline another name"))
            }
            _ => Ok(place),
        }
    }
}

/// Whether a pipeline or environment of this name can have a file: letters, digits, `.`, `_` and `-`, not at the start; and
/// none that another pipeline's file or Git would be taken for.
fn is_name(name: &str) -> bool {
    let starts_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
    starts_well
        && name.len() <= 128
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        && !name.ends_with(".json")
}

/// What is wrong with changing `places` in one commit, if anything: one decision is about one state, about one policy and
/// the environments of that pipeline, or about the emergency stop. Only the `first` commit of a ledger writes its format.
pub fn together(places: &[Place], first: bool) -> Option<String> {
    let rest: Vec<&Place> = places.iter().filter(|place| !(first && **place == Place::Format)).collect();
    let listed = || places.iter().map(|place| format!("`{place}`")).collect::<Vec<_>>().join(", ");
    match rest.as_slice() {
        [] => Some("it changes nothing".into()),
        [Place::Format] => Some(format!("it changes `{FORMAT_FILE}`")),
        [_] => None,
        several => {
            let policy = several.iter().find(|place| matches!(place, Place::Policy { .. }));
            let of_one = policy.is_some_and(|policy| {
                several.iter().all(|place| {
                    place.pipeline() == policy.pipeline() && (place == policy || matches!(place, Place::State { .. }))
                })
            });
            (!of_one).then(|| format!("it changes {} together", listed()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_places() {
        let state =
            |pipeline: &str, environment: &str| Place::State { pipeline: pipeline.into(), environment: environment.into() };
        let policy = |pipeline: &str| Place::Policy { pipeline: pipeline.into() };
        for (path, place) in [
            ("ledger.json", Place::Format),
            ("frozen.json", Place::Frozen),
            ("shop.json", policy("shop")),
            ("shop/prod.json", state("shop", "prod")),
            ("a.b_c-1/eu.west.json", state("a.b_c-1", "eu.west")),
            ("shop/frozen.json", state("shop", "frozen")),
        ] {
            let parsed: Place = path.parse().unwrap();
            assert_eq!((&parsed, parsed.to_string()), (&place, path.to_string()));
        }
        for path in [
            "",
            ".json",
            "shop",
            "shop/prod",
            "shop/.json",
            "/prod.json",
            "shop/a/b.json",
            "../x.json",
            ".git/x.json",
            "-x.json",
            "shop/..json",
            "sh op.json",
            "shop/prod.json.json",
            "shop.json/prod.json",
            "frozen/prod.json",
            "ledger/prod.json",
            "shop/pröd.json",
        ] {
            assert!(path.parse::<Place>().is_err(), "{path}");
        }
    }

    #[test]
    fn what_one_commit_may_change() {
        let table: [(&[&str], bool, bool); 12] = [
            (&["shop/prod.json"], false, true),
            (&["shop.json"], false, true),
            (&["frozen.json"], false, true),
            (&["shop.json", "shop/dev.json", "shop/prod.json"], false, true),
            (&["ledger.json", "shop.json", "shop/dev.json"], true, true),
            (&["ledger.json", "shop.json", "shop/dev.json"], false, false),
            (&["ledger.json"], false, false),
            (&["ledger.json"], true, false),
            (&[], false, false),
            (&["shop/dev.json", "shop/prod.json"], false, false),
            (&["shop.json", "other/prod.json"], false, false),
            (&["shop.json", "frozen.json"], false, false),
        ];
        for (paths, first, allowed) in table {
            let places: Vec<Place> = paths.iter().map(|path| path.parse().unwrap()).collect();
            assert_eq!(together(&places, first).is_none(), allowed, "{paths:?}");
        }
    }
}
