//! Modules of Go programs, from what the linker wrote into them (Go's `debug/buildinfo`).
//!
//! The section `.go.buildinfo` begins with a magic; since Go 1.18 two strings follow at offset 32,
//! each with its length before it: Go's version, and lines of tab-separated module, version, sum.

use anyhow::Result;

use super::{Found, Kind, Package, purl, shown};
use crate::disk::tree::{Kind as NodeKind, NodeId, Tree};

const MAGIC: &[u8] = b"\xff Go buildinf:";
/// Where the strings start.
const HEADER: usize = 32;
/// Bit of the header's flags: the strings follow it.
const INLINE: u8 = 2;
/// Bytes of mark before and behind the module lines.
const MARK: usize = 16;
/// Larger programs are not looked into; they are named as unread.
const LARGEST: u64 = 512 << 20;
const ELF: &[u8] = b"\x7fELF\x02\x01";

pub(super) fn find(tree: &Tree, paths: &[(Vec<u8>, NodeId)], found: &mut Found) -> Result<()> {
    for (path, id) in paths {
        let node = tree.node(*id);
        let NodeKind::File(file) = &node.kind else { continue };
        // Programs are executable; the first bytes tell the rest before all are read.
        if node.meta.mode & 0o111 == 0 || file.size < 64 {
            continue;
        }
        let Some(first) = file.extents.first().filter(|extent| extent.offset == 0 && extent.length >= ELF.len() as u64) else {
            continue;
        };
        let mut head = [0; ELF.len()];
        tree.sources[first.source as usize].read_exact_at(&mut head, first.source_offset)?;
        if head != *ELF {
            continue;
        }
        if file.size > LARGEST {
            found.unread.push(shown(path));
            continue;
        }
        found.packages.extend(modules(&tree.read_file(file)?, &shown(path)));
    }
    Ok(())
}

/// The modules of a program; none when it is not Go's, or built before Go 1.18.
fn modules(program: &[u8], path: &str) -> Vec<Package> {
    let Some(lines) = section(program, b".go.buildinfo").and_then(strings) else { return Vec::new() };
    let mut modules: Vec<(String, String)> = Vec::new();
    for line in lines.lines() {
        let words: Vec<&str> = line.split('\t').collect();
        match words[..] {
            ["mod" | "dep", name, version, ..] => modules.push((name.into(), version.into())),
            // Replaces the module of the line before.
            ["=>", name, version, ..] => {
                modules.pop();
                modules.push((name.into(), version.into()));
            }
            _ => {}
        }
    }
    modules.retain(|(name, _)| !name.starts_with(['.', '/']));
    modules.into_iter().map(|(name, version)| package(&name, &version, path)).collect()
}

fn package(name: &str, version: &str, path: &str) -> Package {
    // What is built from a work tree has no version.
    let version = if version == "(devel)" { "" } else { version };
    let (namespace, last) = name.rsplit_once('/').map_or((None, name), |(namespace, last)| (Some(namespace), last));
    Package {
        kind: Kind::Golang,
        name: name.to_owned(),
        version: version.to_owned(),
        purl: purl(Kind::Golang, namespace, last, version, &[]),
        licence: None,
        supplier: None,
        found: path.to_owned(),
    }
}

fn number(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    usize::try_from(bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))).ok()
}

/// The bytes of a section of a 64-bit little-endian program (ELF-64 Object File Format, section 5).
fn section<'a>(program: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let (table, size, count, names) =
        (number(program, 0x28, 8)?, number(program, 0x3a, 2)?, number(program, 0x3c, 2)?, number(program, 0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |header: usize| {
        let (offset, length) = (number(program, header + 0x18, 8)?, number(program, header + 0x20, 8)?);
        program.get(offset..offset.checked_add(length)?)
    };
    let names = content(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let name = names.get(number(program, header, 4)?..)?;
        (name.split(|byte| *byte == 0).next() == Some(wanted)).then(|| content(header))?
    })
}

/// The module lines of a `.go.buildinfo` section.
fn strings(section: &[u8]) -> Option<&str> {
    if !section.starts_with(MAGIC) || section.get(15)? & INLINE == 0 {
        return None;
    }
    let (_, rest) = string(section.get(HEADER..)?)?;
    let (lines, _) = string(rest)?;
    std::str::from_utf8(lines.get(MARK..lines.len().checked_sub(MARK)?)?).ok()
}

/// A string with its length before it, seven bits a byte; and what follows.
fn string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut length = 0_usize;
    for (index, byte) in bytes.iter().take(5).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return bytes.get(index + 1..)?.split_at_checked(length);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with nothing but the section; the real one is in `tests/signing.rs`.
    fn program(lines: &str) -> Vec<u8> {
        let mut info = [MAGIC, &[8, INLINE]].concat();
        info.resize(HEADER, 0);
        let marked = format!("{}{lines}{}", "x".repeat(MARK), "y".repeat(MARK));
        for text in ["go1.24.4", marked.as_str()] {
            let length = text.len();
            info.extend(if length < 128 { vec![length as u8] } else { vec![(length & 0x7f | 0x80) as u8, (length >> 7) as u8] });
            info.extend(text.as_bytes());
        }
        let names = b"\0.go.buildinfo\0";
        let mut bytes = ELF.to_vec();
        bytes.resize(64, 0);
        let (names_at, info_at) = (64, 64 + names.len());
        bytes.extend(names);
        bytes.extend(&info);
        let table = bytes.len() as u64;
        for (name, offset, length) in [(0_u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            bytes.extend(header);
        }
        bytes[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        bytes[0x3a] = 64;
        bytes[0x3c] = 2;
        bytes
    }

    #[test]
    fn modules_of_a_program() {
        let lines = "path\tgithub.com/a/b/cmd/b\nmod\tgithub.com/a/b\t(devel)\t\ndep\tgolang.org/x/net\tv0.27.0\th1:x=\ndep\tgithub.com/old/x\tv1.0.0\n=>\tgithub.com/new/x\tv1.1.0\th1:y=\ndep\tlocal\tv1\n=>\t./local\t(devel)\t\nbuild\t-compiler=gc\n";
        let bytes = program(lines);
        let found: Vec<String> = modules(&bytes, "p").into_iter().map(|it| it.purl).collect();
        assert_eq!(
            found,
            ["pkg:golang/github.com/a/b", "pkg:golang/golang.org/x/net@v0.27.0", "pkg:golang/github.com/new/x@v1.1.0"]
        );
        // Whatever is cut off: nothing, and no panic.
        for end in 0..bytes.len() {
            let _ = modules(&bytes[..end], "p");
        }
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] = 0xff;
            let _ = modules(&broken, "p");
        }
    }
}
