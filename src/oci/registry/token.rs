//! The right to pull or push: reads what a registry asks for in `WWW-Authenticate` and gets a token
//! from its token service (distribution specification, "Token Authentication").

use std::fmt;

use super::connection::{Way, in_time, retrying};
use super::trouble::Trouble;
use super::wire::body;
use crate::oci::credentials::Credential;

/// A name for the token service's log.
const CLIENT_ID: &str = "pipeline";

/// What is sent with each request.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Auth {
    Anonymous,
    Basic { user: String, password: String },
    Bearer(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Auth::Anonymous => "Anonymous",
            Auth::Basic { .. } => "Basic(…)",
            Auth::Bearer(_) => "Bearer(…)",
        })
    }
}

/// Bytes of an answer: a token has some kilobytes.
const ANSWER_LIMIT: usize = 1 << 20;

pub(super) struct Ask<'a> {
    pub http: &'a reqwest::Client,
    /// Makes a client that follows no redirect: another server is not shown what this one was.
    pub direct: &'a (dyn Fn() -> Result<reqwest::Client, Trouble> + Sync),
    pub way: Way,
    /// `repository:NAME:ACTION[,ACTION]` each.
    pub scopes: &'a [String],
    pub credential: &'a Credential,
}

/// One challenge: its scheme in lower case and its parameters.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Ask<'_> {
    /// What to send with each request. Without a challenge, or with one there is no credential
    /// for, nothing: the request itself tells whether that is enough.
    pub(super) async fn answer(&self, challenges: &[String]) -> Result<Auth, Trouble> {
        if let Credential::Bearer(token) = self.credential {
            return Ok(Auth::Bearer(token.clone()));
        }
        let challenges: Vec<Challenge> = challenges.iter().flat_map(|text| parse(text)).collect();
        if let Some(bearer) = challenges.iter().find(|challenge| challenge.scheme == "bearer" && challenge.get("realm").is_some())
        {
            return retrying(async || self.token(bearer).await).await.map(Auth::Bearer);
        }
        match self.credential {
            Credential::Password { user, password } if challenges.iter().any(|challenge| challenge.scheme == "basic") => {
                Ok(Auth::Basic { user: user.clone(), password: password.clone() })
            }
            _ => Ok(Auth::Anonymous),
        }
    }

    async fn token(&self, challenge: &Challenge) -> Result<String, Trouble> {
        let realm = challenge.get("realm").unwrap_or_default();
        if *self.credential != Credential::Anonymous && !self.way.plain && !realm.to_ascii_lowercase().starts_with("https://") {
            return Err(Trouble::Other("it wants the credentials sent to a token service without TLS".into()));
        }
        let client = if *self.credential == Credential::Anonymous { self.http.clone() } else { (self.direct)()? };
        // One parameter in a form, several in a query (distribution specification, "OAuth2 Token Authentication").
        let joined = self.scopes.join(" ");
        let mut parameters: Vec<(&str, &str)> = Vec::new();
        parameters.extend(challenge.get("service").map(|service| ("service", service)));
        let request = match self.credential {
            Credential::Identity(token) => {
                parameters.push(("scope", &joined));
                parameters.extend([("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("refresh_token", token)]);
                client.post(realm).form(&parameters)
            }
            _ => {
                parameters.extend(self.scopes.iter().map(|scope| ("scope", scope.as_str())));
                let request = client.get(realm).query(&parameters);
                match self.credential {
                    Credential::Password { user, password } => request.basic_auth(user, Some(password)),
                    _ => request,
                }
            }
        };
        let response = in_time(request.send()).await?;
        let status = response.status();
        if status.is_redirection() {
            return Err(Trouble::Other(
                "its token service sends the credentials on to another address, where they do not go".into(),
            ));
        }
        // A refresh token that is no longer good is a 400 (RFC 6749, section 5.2).
        let refused = status.as_u16() == 400 && matches!(self.credential, Credential::Identity(_));
        if !status.is_success() {
            let mut trouble = Trouble::from_response(response).await;
            if let (true, Trouble::Status { code, .. }) = (refused, &mut trouble) {
                *code = 401;
            }
            return Err(trouble);
        }
        let answer: serde_json::Value = serde_json::from_slice(&body(response, ANSWER_LIMIT).await?).unwrap_or_default();
        let token = ["token", "access_token"].iter().find_map(|key| answer[key].as_str()).filter(|token| !token.is_empty());
        token.map(str::to_owned).ok_or_else(|| Trouble::Other("its token service answered without a token".into()))
    }
}

/// The challenges of one header: `Bearer realm="…",service="…", Basic realm="…"` (RFC 9110, 11.6.1).
fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        let Some(value) = after.strip_prefix('=') else {
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
            rest = after;
            continue;
        };
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = value.find([' ', '\t', ',']).unwrap_or(value.len());
                (value[..end].to_owned(), &value[end..])
            }
        };
        rest = after;
        let Some(challenge) = challenges.last_mut() else { return challenges };
        challenge.parameters.push((word.to_ascii_lowercase(), value));
    }
}

/// The text up to the closing quote without its backslashes, and what comes after.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return (value, &text[index + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let challenge = |scheme: &str, parameters: &[(&str, &str)]| Challenge {
            scheme: scheme.into(),
            parameters: parameters.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        };
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull,push""#,
                vec![challenge(
                    "bearer",
                    &[
                        ("realm", "https://auth.docker.io/token"),
                        ("service", "registry.docker.io"),
                        ("scope", "repository:a:pull,push"),
                    ],
                )],
            ),
            (r#"BASIC Realm="Registry \"x\"""#, vec![challenge("basic", &[("realm", "Registry \"x\"")])]),
            (
                r#"Basic realm=plain, Bearer realm="r" , service=s"#,
                vec![challenge("basic", &[("realm", "plain")]), challenge("bearer", &[("realm", "r"), ("service", "s")])],
            ),
            ("Negotiate", vec![challenge("negotiate", &[])]),
            ("", vec![]),
            (r#"=x"#, vec![]),
            (r#"Bearer realm="unclosed"#, vec![challenge("bearer", &[("realm", "unclosed")])]),
        ] {
            assert_eq!(parse(header), expected, "{header}");
        }
    }
}
