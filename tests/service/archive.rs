//! A Debian archive with one package: the program under test as `make deb` packs it, signed with a key of its own.
//!
//! ```text
//! pool/pipeline_VERSION_amd64.deb
//! dists/stable/InRelease
//! dists/stable/main/binary-amd64/Packages
//! ```

use std::path::{Path, PathBuf};

use pipeline::artifact::store::{Hold, Lock};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;

use crate::common::{Project, repository, tool};

/// The index of the archive, below `dists/stable`.
const INDEX: &str = "main/binary-amd64/Packages";

/// An archive, which nobody else makes anew as long as this lives.
pub struct Archive {
    pub address: String,
    /// The public key.
    pub keyring: Vec<u8>,
    _alone: Lock,
}

impl Archive {
    /// The archive beside the store of `project`. It is always at the same place: apt's lists are kept by address.
    pub fn of_the_program(project: &Project) -> Self {
        let place = project.root.with_extension("archive");
        let alone = Lock::wait(&project.root.with_extension("archive.lock"), Hold::Exclusive).unwrap();
        if place.exists() {
            fs_err::remove_dir_all(&place).unwrap();
        }
        let (pool, suite) = (place.join("pool"), place.join("dists/stable"));
        fs_err::create_dir_all(&pool).unwrap();
        fs_err::create_dir_all(suite.join(INDEX).parent().unwrap()).unwrap();
        let package = package(&pool);
        let index = index(&place, &package);
        fs_err::write(suite.join(INDEX), &index).unwrap();
        let key = Key::new();
        key.sign(&release(&index), &suite.join("InRelease"));
        Self { address: format!("file:{}", place.display()), keyring: key.public(), _alone: alone }
    }
}

/// Builds the package without compression, which takes longer than everything else.
fn package(pool: &Path) -> PathBuf {
    let built =
        Cmd::new(repository().join("tools/deb")).arg(env!("CARGO_BIN_EXE_pipeline")).arg(pool).arg("none").text().unwrap();
    PathBuf::from(built.lines().last().unwrap())
}

/// `Packages`: what the package says of itself, and where it is (Debian's repository format, "Packages" indices).
fn index(place: &Path, package: &Path) -> String {
    let control = Cmd::new("dpkg-deb").arg("--field").arg(package).text().unwrap();
    let bytes = fs_err::read(package).unwrap();
    let path = package.strip_prefix(place).unwrap().display();
    format!("{}\nFilename: {path}\nSize: {}\nSHA256: {}\n", control.trim_end(), bytes.len(), Digest::of(&bytes).hex())
}

/// `Release`, as of now (the same, "Release" files).
fn release(index: &str) -> String {
    let now = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S +0000");
    format!(
        "Origin: test\nSuite: stable\nCodename: stable\nDate: {now}\nArchitectures: amd64\nComponents: main\nSHA256:\n {} {} {INDEX}\n",
        Digest::of(index).hex(),
        index.len()
    )
}

/// A key of GnuPG's in a home of its own.
struct Key {
    home: tempfile::TempDir,
}

impl Key {
    fn new() -> Self {
        tool("gpg", "gpg");
        tool("gpg-agent", "gpg-agent");
        let key = Self { home: tempfile::Builder::new().prefix("pipeline-key-").tempdir().unwrap() };
        key.gpg().args(["--quick-generate-key", "test@example.org", "ed25519", "sign", "never"]).run().unwrap();
        key
    }

    fn gpg(&self) -> Cmd {
        let asks_nobody = ["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""];
        Cmd::new("gpg").arg("--homedir").arg(self.home.path()).args(asks_nobody)
    }

    fn public(&self) -> Vec<u8> {
        self.gpg().arg("--export").output().unwrap().stdout
    }

    /// Writes `text` with its signature to `file`.
    fn sign(&self, text: &str, file: &Path) {
        self.gpg().arg("--output").arg(file).arg("--clear-sign").input(text).run().unwrap();
    }
}

impl Drop for Key {
    /// Its agent would go by itself a moment after its folder.
    fn drop(&mut self) {
        let _ = Cmd::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).run();
    }
}
