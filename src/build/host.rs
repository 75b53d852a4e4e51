//! What a build knows of the machine it runs on, brought in by the command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::sandbox::Mount;

/// Where the CA bundle of this machine is while a step runs.
const CA: &str = "/run/pipeline/ca.crt";
/// Variables that name a CA bundle, one for each kind of client that wants its own.
const CA_VARIABLES: [&str; 8] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "npm_config_cafile",
    "CARGO_HTTP_CAINFO",
    "GIT_SSL_CAINFO",
];
/// Variables of this machine that tell clients where to go: given to steps, never a part of a
/// key or an image.
pub const TRUSTED_VARIABLES: [&str; 17] = [
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "PIP_DEFAULT_TIMEOUT",
    "npm_config_registry",
    "NPM_CONFIG_REGISTRY",
    "UV_INDEX_URL",
];
/// Where distributions keep the bundle of all trusted CAs.
pub const CA_BUNDLES: [&str; 3] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The machine and the caller's wishes.
#[derive(Debug, Clone)]
pub struct Host {
    /// This program, for the unshare process.
    pub program: PathBuf,
    /// `PATH` of the caller.
    pub path: OsString,
    /// The caller's variables out of [`TRUSTED_VARIABLES`].
    pub trusted: BTreeMap<String, String>,
    pub ca_bundle: Option<PathBuf>,
    /// Threads for compression and hashing.
    pub threads: usize,
    /// Seconds since 1970, for records and messages only.
    pub now: i64,
    /// `SOURCE_DATE_EPOCH` of the caller: wins over the commit's date.
    pub source_date_epoch: Option<i64>,
    /// The caller's whole environment, from which secrets and ssh agents are taken.
    pub variables: BTreeMap<String, String>,
    /// The caller's home, for credentials.
    pub home: Option<PathBuf>,
    /// Test only: a [`crate::fault::point`] of the unshare process.
    pub fault_inside: Option<i64>,
}

impl Host {
    /// The private keys that ssh offers by itself, whether they are there or not.
    pub fn ssh_keys(&self) -> Vec<PathBuf> {
        let names = ["id_ed25519", "id_ecdsa", "id_rsa"];
        self.home.iter().flat_map(|home| names.map(|name| home.join(".ssh").join(name))).collect()
    }

    /// Variables and mounts that let a step reach the network the way this machine does.
    pub fn trust(&self) -> (Vec<(String, String)>, Vec<Mount>) {
        let mut variables: Vec<(String, String)> = self.trusted.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let mut mounts = Vec::new();
        if let Some(bundle) = &self.ca_bundle {
            let source = fs_err::canonicalize(bundle).unwrap_or_else(|_| bundle.clone());
            mounts.push(Mount::Bind { source, target: CA.into(), writable: false });
            variables.extend(CA_VARIABLES.iter().map(|name| ((*name).to_string(), CA.to_string())));
        }
        (variables, mounts)
    }
}

/// Name service of this machine, for steps with its network. The targets may be made empty in
/// the upper directory; the packer leaves empty ones out.
pub fn name_service() -> Vec<Mount> {
    ["/etc/resolv.conf", "/etc/hosts"]
        .iter()
        .filter_map(|path| {
            Some(Mount::Bind { source: fs_err::canonicalize(path).ok()?, target: Path::new(path).into(), writable: false })
        })
        .collect()
}
