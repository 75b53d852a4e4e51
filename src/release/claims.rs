//! What environments of different pipelines have to agree about: a route belongs to one of them, a group switches as one.
//!
//! Pure; asked when a policy is applied, with the policies that the ledger has of all other pipelines.

use std::collections::BTreeMap;

use super::policy::Policy;
use crate::config::check::rollout::{alone, clashes};
use crate::config::types::Environment;
use crate::error::Problem;

/// What `wanted` cannot have because `others` have it; what is worth knowing else, one text each.
///
/// # Errors
/// A route that an environment of another pipeline has; both are named.
pub fn check(wanted: &Policy, others: &[Policy]) -> Result<Vec<String>, Problem> {
    let named = |policy: &'_ Policy| -> Vec<(String, Environment)> {
        let all = policy.environments.iter();
        all.map(|(name, environment)| (format!("{}/{name}", policy.pipeline), environment.clone())).collect()
    };
    let ours = named(wanted);
    let theirs: Vec<(String, Environment)> = others.iter().flat_map(named).collect();
    let all: Vec<(&str, &Environment)> = theirs.iter().chain(&ours).map(|(name, one)| (name.as_str(), one)).collect();
    let is_ours: BTreeMap<&str, &Environment> = ours.iter().map(|(name, one)| (name.as_str(), one)).collect();
    let clash = |clash: &crate::config::check::rollout::Clash| is_ours.contains_key(clash.second.as_str());
    let found: Vec<_> = clashes(&all).into_iter().filter(clash).collect();
    if let Some(first) = found.first() {
        let (claim, one, other) = (&first.claim, &first.second, &first.first);
        let mut problem = Problem::failed(format!("the route `{claim}` of `{one}` is one of `{other}` already"))
            .hint("another `host` or `path` tells requests apart; or take it away there first, and apply that");
        for more in &found[1..] {
            problem = problem.hint(format!("so is `{}` of `{}`: `{}` has it", more.claim, more.second, more.first));
        }
        return Err(problem);
    }
    let theirs: Vec<&Environment> = theirs.iter().map(|(_, one)| one).collect();
    let alone = alone(&wanted.environments, &theirs).into_iter();
    Ok(alone
        .map(|(name, group)| {
            format!(
                "`{}/{name}` is the only environment of the group `{group}` (`together`), so nothing switches with it",
                wanted.pipeline
            )
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn policy(pipeline: &str, environments: serde_json::Value) -> Policy {
        let value = json!({"format": 1, "pipeline": pipeline, "environments": environments, "decision": null});
        Policy::parse(&serde_json::to_vec(&value).unwrap()).unwrap()
    }

    #[test]
    fn routes_are_refused_and_lonely_groups_told() {
        let routed = |host: &str| json!({"targets": {"main": {"local": {}}}, "routes": [{"host": host}]});
        let shop = policy("shop", json!({"dev": routed("dev.test"), "prod": routed("shop.test")}));
        let blog = policy("blog", json!({"prod": routed("blog.test")}));
        assert_eq!(check(&shop, std::slice::from_ref(&blog)).unwrap(), Vec::<String>::new());
        let thief = policy("thief", json!({"live": routed("shop.test"), "qa": routed("blog.test")}));
        let problem = check(&thief, &[shop.clone(), blog]).unwrap_err();
        assert_eq!(problem.message, "the route `shop.test/` of `thief/live` is one of `shop/prod` already");
        assert_eq!(problem.hints[1], "so is `blog.test/` of `thief/qa`: `blog/prod` has it");
        // What two others quarrel about is not this pipeline's business.
        let apart = policy("apart", json!({"dev": routed("apart.test")}));
        assert_eq!(check(&apart, &[shop, thief]).unwrap(), Vec::<String>::new());
        let group = |name: &str| json!({"together": name, "targets": {"main": {"local": {}}}});
        let api = policy("api", json!({"prod": group("both")}));
        assert_eq!(
            check(&api, &[]).unwrap(),
            ["`api/prod` is the only environment of the group `both` (`together`), so nothing switches with it"]
        );
        assert_eq!(check(&api, &[policy("web", json!({"prod": group("both")}))]).unwrap(), Vec::<String>::new());
    }
}
