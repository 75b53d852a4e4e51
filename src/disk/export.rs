//! Placeholder until the writer of exports is merged.
use std::ffi::OsStr;
use std::path::Path;

use anyhow::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}
impl std::str::FromStr for Format {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(()),
        }
    }
}
impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.extension())
    }
}
impl Format {
    pub fn extension(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}
#[derive(Debug)]
pub struct Request<'a> {
    pub raw: &'a Path,
    pub format: Format,
    pub to: &'a Path,
    pub identity: &'a [u8; 32],
    pub path: &'a OsStr,
}
pub fn export(r: &Request<'_>) -> Result<()> {
    match r.format {
        Format::Raw => {
            fs_err::copy(r.raw, r.to)?;
        }
        Format::Qcow2 => {
            crate::cmd::Cmd::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(r.raw).arg(r.to).run()?
        }
    }
    Ok(())
}
