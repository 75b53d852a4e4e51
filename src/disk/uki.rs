//! Unified kernel images: systemd's stub with kernel, initrd and command line as sections of it.
//!
//! Layout from the PE format specification (Microsoft, "PE Format") and the names of sections from
//! the UAPI group's "Unified Kernel Image" specification. Sections are appended as `ukify` does:
//! each at the next multiple of the section alignment in memory and of the file alignment in the
//! file; headers of sections go into the room behind the stub's own ones. The stub's time stamp
//! stays, so the same parts give the same bytes. The checksum is 0, which firmware takes as none.

use crate::error::Problem;

/// Bytes of a section header.
const SECTION: usize = 40;
/// `IMAGE_SCN_CNT_CODE | IMAGE_SCN_MEM_READ`.
const CODE: u32 = 0x4000_0020;
/// `IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ`.
const DATA: u32 = 0x4000_0040;
/// Magic number of the optional header of a 64-bit image.
const PE32_PLUS: u16 = 0x20b;
/// `IMAGE_DLLCHARACTERISTICS_NX_COMPAT`.
const NX_COMPAT: u16 = 0x100;

/// What goes into an image.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// `linuxx64.efi.stub`.
    pub stub: &'a [u8],
    pub kernel: &'a [u8],
    pub initrd: &'a [u8],
    /// Without a line break at the end.
    pub cmdline: &'a str,
    /// An os-release file.
    pub osrel: &'a str,
    /// The kernel's release, as `uname -r` prints it.
    pub uname: &'a str,
}

/// A section of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// With its dot.
    pub name: String,
    /// Where it is in memory, relative to the image.
    pub address: u32,
    /// Bytes in memory, which are the content's.
    pub size: u32,
    /// Where it is in the file.
    pub offset: u32,
    /// Bytes in the file, padding included.
    pub file_size: u32,
    pub flags: u32,
}

impl Section {
    /// The content, without padding.
    pub fn content<'a>(&self, image: &'a [u8]) -> &'a [u8] {
        let bytes = image.get(self.offset as usize..).unwrap_or_default();
        &bytes[..bytes.len().min(self.size.min(self.file_size) as usize)]
    }
}

/// The numbers of a PE header that matter here, and where they are.
#[derive(Debug, Clone, Copy)]
struct Header {
    /// Of "PE\0\0".
    pe: usize,
    optional: usize,
    /// Of the section headers.
    table: usize,
    sections: usize,
    section_alignment: u32,
    file_alignment: u32,
}

fn invalid(what: &str) -> Problem {
    Problem::failed(format!("the file is not an EFI program for x86-64: {what}"))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.first_chunk().map(|number| u16::from_le_bytes(*number))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.first_chunk().map(|number| u32::from_le_bytes(*number))
}

fn put(bytes: &mut [u8], at: usize, number: u32) {
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

impl Header {
    fn parse(image: &[u8]) -> Result<Self, Problem> {
        let cut = || invalid("it is cut short");
        if !image.starts_with(b"MZ") {
            return Err(invalid("it does not begin with `MZ`"));
        }
        let pe = u32_at(image, 0x3c).ok_or_else(cut)? as usize;
        if image.get(pe..pe.saturating_add(4)) != Some(b"PE\0\0") || u16_at(image, pe + 4) != Some(0x8664) {
            return Err(invalid("no PE header for x86-64"));
        }
        let optional = pe + 24;
        let table = optional + usize::from(u16_at(image, pe + 20).ok_or_else(cut)?);
        let sections = usize::from(u16_at(image, pe + 6).ok_or_else(cut)?);
        let section_alignment = u32_at(image, optional + 32).ok_or_else(cut)?;
        let file_alignment = u32_at(image, optional + 36).ok_or_else(cut)?;
        // The fixed part of a 64-bit optional header is 112 bytes long.
        if u16_at(image, optional) != Some(PE32_PLUS) || table < optional + 112 || image.len() < table + sections * SECTION {
            return Err(invalid("its headers are cut short"));
        }
        if !section_alignment.is_power_of_two() || !file_alignment.is_power_of_two() {
            return Err(invalid("its alignments are not powers of two"));
        }
        Ok(Self { pe, optional, table, sections, section_alignment, file_alignment })
    }
}

/// The sections of an image, in the order of their headers.
///
/// # Errors
/// When it is not an EFI program, or its headers are cut short.
pub fn sections(image: &[u8]) -> Result<Vec<Section>, Problem> {
    let header = Header::parse(image)?;
    let headers = image[header.table..].chunks_exact(SECTION).take(header.sections);
    let section = |bytes: &[u8]| {
        let number = |at| u32_at(bytes, at).unwrap_or_default();
        let name: Vec<u8> = bytes[..8].iter().copied().take_while(|byte| *byte != 0).collect();
        Section {
            name: String::from_utf8_lossy(&name).into_owned(),
            size: number(8),
            address: number(12),
            file_size: number(16),
            offset: number(20),
            flags: number(36),
        }
    };
    Ok(headers.map(section).collect())
}

/// Content of the section `name`, such as `.cmdline`.
///
/// # Errors
/// As [`sections`].
pub fn content<'a>(image: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, Problem> {
    Ok(sections(image)?.iter().find(|section| section.name == name).map(|section| section.content(image)))
}

/// Bytes of the image [`assemble`] makes, or a little more: for planning.
pub const fn size_estimate(parts: &Parts) -> u64 {
    (parts.stub.len() + parts.kernel.len() + parts.initrd.len() + parts.cmdline.len() + parts.osrel.len() + parts.uname.len())
        as u64
        + 6 * 4096
}

/// The unified image of `parts`.
///
/// # Errors
/// When the stub is not an EFI program, has no room for more section headers, or has one of the
/// sections already; when the image would pass 4 GiB.
pub fn assemble(parts: &Parts) -> Result<Vec<u8>, Problem> {
    let header = Header::parse(parts.stub)?;
    let mut sections = sections(parts.stub)?;
    let new = [
        (".osrel", parts.osrel.as_bytes(), DATA),
        (".cmdline", parts.cmdline.as_bytes(), DATA),
        (".uname", parts.uname.as_bytes(), DATA),
        (".linux", parts.kernel, CODE),
        (".initrd", parts.initrd, DATA),
    ];
    let first = sections.iter().filter(|section| section.file_size > 0).map(|section| section.offset).min();
    let room = (first.unwrap_or_default() as usize).min(parts.stub.len());
    let headers_end = header.table + (header.sections + new.len()) * SECTION;
    if headers_end > room || parts.stub[header.table + header.sections * SECTION..headers_end].iter().any(|byte| *byte != 0) {
        return Err(Problem::failed("the EFI stub has no room for more sections").hint("take the stub of systemd 254 or later"));
    }
    let mut image = Vec::with_capacity(size_estimate(parts) as usize);
    image.extend_from_slice(parts.stub);
    let mut address =
        sections.iter().map(|section| u64::from(section.address) + u64::from(section.size)).max().unwrap_or_default();
    for (name, bytes, flags) in new {
        if sections.iter().any(|section| section.name == name) {
            return Err(Problem::failed(format!("the EFI stub has a section `{name}` already")));
        }
        image.resize(image.len().next_multiple_of(header.file_alignment as usize), 0);
        address = address.next_multiple_of(u64::from(header.section_alignment));
        let offset = image.len();
        image.extend_from_slice(bytes);
        image.resize(image.len().next_multiple_of(header.file_alignment as usize), 0);
        let too_large = |_| Problem::failed("kernel and initrd are too large for an EFI program");
        let size = u32::try_from(bytes.len()).map_err(too_large)?;
        let section = Section {
            name: name.into(),
            address: u32::try_from(address).map_err(too_large)?,
            size,
            offset: u32::try_from(offset).map_err(too_large)?,
            file_size: u32::try_from(image.len() - offset).map_err(too_large)?,
            flags,
        };
        address += u64::from(size);
        write_header(&mut image[header.table + sections.len() * SECTION..], &section);
        sections.push(section);
    }
    let end = address.next_multiple_of(u64::from(header.section_alignment));
    let end = u32::try_from(end).map_err(|_| Problem::failed("kernel and initrd are too large for an EFI program"))?;
    finish_headers(&mut image, header, &sections[header.sections..], end);
    // Firmware that enforces it wants stub and kernel to agree.
    if let Ok(kernel) = Header::parse(parts.kernel)
        && u16_at(parts.kernel, kernel.optional + 70).is_some_and(|flags| flags & NX_COMPAT == 0)
    {
        let flags = u16_at(&image, header.optional + 70).unwrap_or_default() & !NX_COMPAT;
        image[header.optional + 70..header.optional + 72].copy_from_slice(&flags.to_le_bytes());
    }
    Ok(image)
}

fn write_header(bytes: &mut [u8], section: &Section) {
    bytes[..SECTION].fill(0);
    bytes[..section.name.len()].copy_from_slice(section.name.as_bytes());
    let numbers = [(8, section.size), (12, section.address), (16, section.file_size), (20, section.offset), (36, section.flags)];
    numbers.into_iter().for_each(|(at, number)| put(bytes, at, number));
}

/// Count of sections, sizes, no checksum.
fn finish_headers(image: &mut [u8], header: Header, new: &[Section], end: u32) {
    let Header { pe, optional, file_alignment, .. } = header;
    let count = header.sections + new.len();
    image[pe + 6..pe + 8].copy_from_slice(&(count as u16).to_le_bytes());
    // COFF symbols would be in the middle now, and no loader reads them.
    put(image, pe + 8 + 4, 0);
    put(image, pe + 8 + 8, 0);
    let data = u32_at(image, optional + 8).unwrap_or_default();
    put(image, optional + 8, new.iter().fold(data, |sum, section| sum.wrapping_add(section.size)));
    put(image, optional + 56, end);
    let headers = ((header.table + count * SECTION) as u32).next_multiple_of(file_alignment);
    let stated = u32_at(image, optional + 60).unwrap_or_default();
    put(image, optional + 60, headers.max(stated));
    put(image, optional + 64, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_stub_is_refused() {
        let parts = |stub| Parts { stub, kernel: b"", initrd: b"", cmdline: "", osrel: "", uname: "" };
        let mut short = vec![0; 0x44];
        short[..2].copy_from_slice(b"MZ");
        short[0x3c] = 0x40;
        let cases: [(&[u8], &str); 4] = [
            (b"", "it does not begin with `MZ`"),
            (b"MZ", "it is cut short"),
            (&short, "no PE header for x86-64"),
            (&[&short[..0x40], b"PE\0\0\x64\x86\x05\0"].concat(), "it is cut short"),
        ];
        for (stub, expected) in cases {
            let message = assemble(&parts(stub)).unwrap_err().message;
            assert_eq!(message, format!("the file is not an EFI program for x86-64: {expected}"));
        }
    }
}
