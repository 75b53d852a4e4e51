//! The requests of the OCI distribution protocol 1.1, one function each: one try, no more.
//!
//! Paths and answers are those of the specification's table of endpoints (`end-1` … `end-13`).
//! What an answer means for a pull or a push is decided above.

use futures_util::StreamExt as _;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LINK, LOCATION, RANGE};
use reqwest::{Method, RequestBuilder, Response, Url};

use super::connection::{Way, in_time};
use super::manifest::{self, Document, Entry};
use super::token::Auth;
use super::tree::DOCUMENTS;
use super::trouble::Trouble;
use crate::oci::digest::Digest;

/// Manifests and indexes are held in memory. Registries take up to 4 MiB (distribution specification, "Pushing Manifests").
const DOCUMENT_LIMIT: usize = 16 << 20;
/// Tags of one page; registries that want fewer send fewer.
const TAGS_A_PAGE: usize = 1000;
/// Answers that come in pages: so that a registry which names itself as the next page ends.
const PAGES: usize = 1000;

/// A repository, ready to be asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wire<'c> {
    pub http: &'c reqwest::Client,
    pub way: Way,
    pub address: &'c str,
    pub repository: &'c str,
    pub auth: &'c Auth,
}

/// What the registry says of a manifest that was put there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Put {
    pub digest: Option<Digest>,
    /// Whether it took note of the `subject` (`OCI-Subject`): then the fallback tag is not needed.
    pub subject: bool,
}

/// How an upload begins.
#[derive(Debug)]
pub(super) enum Started {
    /// The blob was mounted from another repository: nothing to send.
    Mounted,
    Upload(Upload),
}

/// An upload under way.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    /// Where the next request goes.
    pub url: Url,
    /// Bytes the registry has.
    pub offset: u64,
}

/// A part of a blob on its way up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub offset: u64,
    pub length: u64,
    /// Of the whole blob, when this is the last part.
    pub last: Option<Digest>,
}

impl Wire<'_> {
    fn url(&self, rest: &str) -> Result<Url, Trouble> {
        let text = format!("{}://{}/v2/{}/{rest}", self.way.scheme(), self.address, self.repository);
        text.parse().map_err(|_| Trouble::Other(format!("`{}` makes no address", self.address)))
    }

    /// A request that shows the right to do it, at the registry itself and nowhere else.
    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        let base = format!("{}://{}/", self.way.scheme(), self.address).parse::<Url>();
        let home = base.is_ok_and(|base| base.origin() == url.origin());
        let request = self.http.request(method, url);
        match self.auth {
            Auth::Basic { user, password } if home => request.basic_auth(user, Some(password)),
            Auth::Bearer(token) if home => request.header(AUTHORIZATION, format!("Bearer {token}")),
            _ => request,
        }
    }

    async fn get(&self, rest: &str) -> Result<Response, Trouble> {
        good(in_time(self.request(Method::GET, self.url(rest)?).send()).await?).await
    }

    /// A manifest or index by tag or digest (`end-3`), byte for byte; its digest is checked against
    /// the one that was asked for, or the one the registry says.
    pub(super) async fn document(&self, name: &str) -> Result<(Vec<u8>, Digest), Trouble> {
        let request = self.request(Method::GET, self.url(&format!("manifests/{name}"))?);
        let request = request.header(ACCEPT, manifest::ACCEPTED.join(", "));
        let response = good(in_time(request.send()).await?).await?;
        let said = content_digest(response.headers());
        let bytes = body(response, DOCUMENT_LIMIT).await?;
        let actual = Digest::of(&bytes);
        match name.parse().ok().filter(|_| name.contains(':')).or(said) {
            Some(expected) if expected != actual => {
                Err(Trouble::Digest { expected: expected.to_string(), actual: actual.to_string() })
            }
            _ => Ok((bytes, actual)),
        }
    }

    /// The digest a tag or digest has there (`end-3`); nothing when it is not there.
    pub(super) async fn head(&self, name: &str) -> Result<Option<Digest>, Trouble> {
        let request = self.request(Method::HEAD, self.url(&format!("manifests/{name}"))?);
        let response = in_time(request.header(ACCEPT, manifest::ACCEPTED.join(", ")).send()).await?;
        if response.status().as_u16() == 404 {
            return Ok(None);
        }
        match content_digest(good(response).await?.headers()) {
            Some(digest) => Ok(Some(digest)),
            // The header is optional.
            None => self.document(name).await.map(|(_, digest)| Some(digest)),
        }
    }

    /// Puts a manifest or index (`end-7`).
    pub(super) async fn put_document(&self, name: &str, media_type: &str, bytes: &[u8]) -> Result<Put, Trouble> {
        let request = self.request(Method::PUT, self.url(&format!("manifests/{name}"))?);
        let response = in_time(request.header(CONTENT_TYPE, media_type).body(bytes.to_vec()).send()).await?;
        let response = good(response).await?;
        Ok(Put { digest: content_digest(response.headers()), subject: response.headers().contains_key("oci-subject") })
    }

    /// Whether a blob is there (`end-2`).
    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool, Trouble> {
        let response = in_time(self.request(Method::HEAD, self.url(&format!("blobs/{digest}"))?).send()).await?;
        if response.status().as_u16() == 404 {
            return Ok(false);
        }
        good(response).await.map(|_| true)
    }

    /// A blob from `offset` on (`end-2`), and how many bytes of the answer lie before it: a server
    /// without ranges sends all of the blob.
    pub(super) async fn blob(&self, digest: &Digest, offset: u64) -> Result<(Response, u64), Trouble> {
        let mut request = self.request(Method::GET, self.url(&format!("blobs/{digest}"))?);
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        let response = good(in_time(request.send()).await?).await?;
        if response.status().as_u16() != 206 {
            return Ok((response, offset));
        }
        let range = text(response.headers(), &CONTENT_RANGE).and_then(|range| range.strip_prefix("bytes "));
        let start = range.and_then(|range| range.split('-').next()).and_then(|start| start.trim().parse::<u64>().ok());
        match start {
            Some(start) if start <= offset => Ok((response, offset - start)),
            _ => Err(Trouble::Other("it sent another part of the blob than it was asked for".into())),
        }
    }

    /// Begins an upload (`end-4a`), or has the blob mounted from another repository (`end-11`).
    pub(super) async fn start(&self, mount: Option<(&Digest, &str)>) -> Result<Started, Trouble> {
        let mut url = self.url("blobs/uploads/")?;
        if let Some((digest, from)) = mount {
            url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        }
        let request = self.request(Method::POST, url.clone()).header(CONTENT_LENGTH, 0);
        let response = good(in_time(request.send()).await?).await?;
        match response.status().as_u16() {
            201 if mount.is_some() => Ok(Started::Mounted),
            202 => Ok(Started::Upload(Upload { url: self.location(&response, &url)?, offset: 0 })),
            code => Err(Trouble::Other(format!("it answered the beginning of an upload with status {code}"))),
        }
    }

    /// The request that carries a part (`end-5`, or `end-6` for the last one); sent by the caller.
    pub(super) fn part(&self, upload: &Upload, part: Part) -> RequestBuilder {
        let mut url = upload.url.clone();
        let method = if let Some(digest) = part.last {
            url.query_pairs_mut().append_pair("digest", &digest.to_string());
            Method::PUT
        } else {
            Method::PATCH
        };
        let request = self.request(method, url).header(CONTENT_LENGTH, part.length);
        let request = request.header(CONTENT_TYPE, "application/octet-stream");
        // One request with all of the blob needs none, and old registries know none.
        if part.length > 0 && (part.offset > 0 || part.last.is_none()) {
            request.header(CONTENT_RANGE, format!("{}-{}", part.offset, part.offset + part.length - 1))
        } else {
            request
        }
    }

    /// Reads the answer to a part that was not the last.
    pub(super) async fn accepted(&self, response: Response, before: &Upload, length: u64) -> Result<Upload, Trouble> {
        let response = good(response).await?;
        let url = self.location(&response, &before.url)?;
        // `0-N`, N included; without it all was taken.
        let offset = range_end(response.headers()).unwrap_or(before.offset.saturating_add(length));
        Ok(Upload { url, offset })
    }

    /// How far an upload has come (`end-13`).
    pub(super) async fn progress(&self, upload: &Upload) -> Result<Upload, Trouble> {
        let response = good(in_time(self.request(Method::GET, upload.url.clone()).send()).await?).await?;
        let url = self.location(&response, &upload.url).unwrap_or_else(|_| upload.url.clone());
        let unsaid = || Trouble::Other("it does not say how far the upload has come".into());
        Ok(Upload { url, offset: range_end(response.headers()).ok_or_else(unsaid)? })
    }

    /// All tags (`end-8`), in the registry's order.
    pub(super) async fn tags(&self) -> Result<Vec<String>, Trouble> {
        let mut tags = Vec::new();
        let mut next = Some(self.url(&format!("tags/list?n={TAGS_A_PAGE}"))?);
        for _ in 0..PAGES {
            let Some(url) = next else { break };
            let response = good(in_time(self.request(Method::GET, url.clone()).send()).await?).await?;
            next = next_page(response.headers(), &url);
            let value: serde_json::Value = serde_json::from_slice(&body(response, DOCUMENT_LIMIT).await?).unwrap_or_default();
            tags.extend(value["tags"].as_array().into_iter().flatten().filter_map(|tag| tag.as_str()).map(str::to_owned));
        }
        Ok(tags)
    }

    /// The manifests whose subject is `digest` (`end-12a`); nothing when the registry has no such list.
    pub(super) async fn referrers(&self, digest: &Digest) -> Result<Option<Vec<Entry>>, Trouble> {
        let mut found = Vec::new();
        let mut next = Some(self.url(&format!("referrers/{digest}"))?);
        for page in 0..PAGES {
            let Some(url) = next else { break };
            let request = self.request(Method::GET, url.clone()).header(ACCEPT, manifest::OCI_INDEX);
            let response = in_time(request.send()).await?;
            // Registries before 1.1 know no such path; some take it for a repository's name they refuse.
            if page == 0 && matches!(response.status().as_u16(), 400 | 404 | 405) {
                return Ok(None);
            }
            let response = good(response).await?;
            next = next_page(response.headers(), &url);
            if found.len() > DOCUMENTS {
                return Err(Trouble::Other(format!("it lists more than {DOCUMENTS} referrers of {digest}")));
            }
            // A server that answers every path with its start page has no list either.
            match Document::parse(&body(response, DOCUMENT_LIMIT).await?) {
                Ok(document) if document.is_index() => found.extend(document.names.manifests),
                _ if page == 0 => return Ok(None),
                _ => return Err(Trouble::Other("its list of referrers is not an index".into())),
            }
        }
        Ok(Some(found))
    }

    /// Asks for the tag list's first page only, for hints.
    pub(super) async fn some_tags(&self) -> Result<Vec<String>, Trouble> {
        let value: serde_json::Value =
            serde_json::from_slice(&body(self.get("tags/list").await?, DOCUMENT_LIMIT).await?).unwrap_or_default();
        Ok(value["tags"].as_array().into_iter().flatten().filter_map(|tag| tag.as_str()).map(str::to_owned).collect())
    }

    fn location(&self, response: &Response, base: &Url) -> Result<Url, Trouble> {
        let location = text(response.headers(), &LOCATION).and_then(|location| base.join(location).ok());
        let mut url = location.ok_or_else(|| Trouble::Other("its answer to an upload says not where to go on".into()))?;
        // A registry behind a proxy that ends TLS may not know that it is spoken to with TLS.
        if !self.way.plain && url.scheme() == "http" && url.host() == base.host() && url.port().is_none() {
            let _ = url.set_scheme("https");
        }
        Ok(url)
    }
}

/// A success, or the trouble it is.
pub(super) async fn good(response: Response) -> Result<Response, Trouble> {
    if response.status().is_success() { Ok(response) } else { Err(Trouble::from_response(response).await) }
}

pub(super) async fn body(response: Response, limit: usize) -> Result<Vec<u8>, Trouble> {
    let mut bytes = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = in_time(async { stream.next().await.transpose() }).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > limit {
            return Err(Trouble::Other(format!("its answer has more than {limit} bytes, which nobody needs")));
        }
    }
    Ok(bytes)
}

fn text<'h>(headers: &'h HeaderMap, name: &reqwest::header::HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    let said = headers.get("docker-content-digest")?.to_str().ok()?;
    said.parse().ok().filter(|_| said.starts_with("sha256:"))
}

/// Bytes that are there by `Range: 0-N`; Docker's registry says `0-0` for none and for one.
fn range_end(headers: &HeaderMap) -> Option<u64> {
    let last: u64 = text(headers, &RANGE)?.trim_start_matches("bytes=").rsplit_once('-')?.1.trim().parse().ok()?;
    Some(if last == 0 { 0 } else { last.saturating_add(1) })
}

/// `Link: </v2/…>; rel="next"` (RFC 8288).
fn next_page(headers: &HeaderMap, base: &Url) -> Option<Url> {
    let links = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let next = links.filter(|link| link.contains("rel=\"next\"") || link.contains("rel=next"));
    let url = next.filter_map(|link| link.split_once('<')?.1.split_once('>')).map(|(address, _)| address).next()?;
    // Another server's page is nobody's next page.
    base.join(url).ok().filter(|url| url.origin() == base.origin())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn headers_are_read_as_registries_write_them() {
        for (value, expected) in [("0-0", Some(0)), ("0-99", Some(100)), ("bytes=0-99", Some(100)), ("", None), ("x-y", None)] {
            assert_eq!(range_end(&headers("range", value)), expected, "{value}");
        }
        let base: Url = "http://a.example/v2/x/tags/list".parse().unwrap();
        for (value, expected) in [
            ("</v2/x/tags/list?last=b&n=2>; rel=\"next\"", Some("http://a.example/v2/x/tags/list?last=b&n=2")),
            ("<http://a.example/v2/x/tags/list?last=c>; rel=next", Some("http://a.example/v2/x/tags/list?last=c")),
            ("<http://b.example/v2/x/tags/list?last=c>; rel=\"next\"", None),
            ("</first>; rel=\"first\"", None),
            ("nonsense", None),
        ] {
            let next = next_page(&headers("link", value), &base);
            assert_eq!(next.as_ref().map(Url::as_str), expected, "{value}");
        }
        let digest = Digest::of("x");
        assert_eq!(content_digest(&headers("docker-content-digest", &digest.to_string())), Some(digest));
        assert_eq!(content_digest(&headers("docker-content-digest", &digest.hex())), None);
    }
}
