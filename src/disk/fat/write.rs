//! A whole new volume.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::{
    ATTRIBUTE_FILE, ATTRIBUTE_FOLDER, ATTRIBUTE_LABEL, BACKUP, END, ENTRY, FIRST, FOLDER_ENTRIES, Geometry, SECTOR, Stamp,
    info_sector, name, short_entry,
};
use crate::error::Problem;

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;

/// What holds for the whole volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    /// Bytes of the partition.
    pub bytes: u64,
    /// At most eleven ASCII characters, capital letters.
    pub label: String,
    /// The volume's serial number: `1234-ABCD` in other tools is 0x1234ABCD.
    pub serial: u32,
    /// Seconds since 1970: the time of every file.
    pub time: i64,
    /// Sectors of the disk before the partition.
    pub hidden: u32,
}

/// What is in a file.
#[derive(Debug, Clone)]
pub enum Content {
    Bytes(Arc<[u8]>),
    /// A range of bytes of another file.
    Range {
        file: Arc<File>,
        offset: u64,
        length: u64,
    },
}

impl Content {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Range { length, .. } => *length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes it to `out` from byte `at` on.
    fn copy(&self, out: &File, at: u64) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => out.write_all_at(bytes, at),
            Self::Range { file, offset, length } => {
                let mut buffer = vec![0; CHUNK];
                let mut done = 0;
                while done < *length {
                    let take = usize::try_from(length - done).map_or(CHUNK, |left| left.min(CHUNK));
                    file.read_exact_at(&mut buffer[..take], offset + done)?;
                    out.write_all_at(&buffer[..take], at + done)?;
                    done += take as u64;
                }
                Ok(())
            }
        }
    }
}

/// A file or folder to write.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path from the root, with or without a leading slash; folders it names are made.
    pub path: String,
    /// `None` for a folder.
    pub content: Option<Content>,
}

impl Entry {
    pub fn folder(path: impl Into<String>) -> Self {
        Self { path: path.into(), content: None }
    }

    pub fn bytes(path: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { path: path.into(), content: Some(Content::Bytes(bytes.into())) }
    }
}

/// A folder or file with its place.
#[derive(Debug, Clone)]
struct Node {
    name: String,
    /// Index of the folder it is in.
    parent: usize,
    /// `None` for a folder.
    content: Option<Content>,
    /// Index of what is in a folder, in the order given.
    children: Vec<usize>,
    /// First cluster; 0 for an empty file.
    cluster: u32,
    /// Number of clusters, one after the other.
    clusters: u32,
}

/// Everything of a volume but the bytes of its files.
#[derive(Debug, Clone)]
pub struct Plan {
    format: Format,
    geometry: Geometry,
    stamp: Stamp,
    /// The root is the first.
    nodes: Vec<Node>,
    /// Bytes of each folder by index in `nodes`, a whole number of clusters.
    folders: BTreeMap<usize, Vec<u8>>,
    /// Clusters in use.
    used: u32,
}

/// Decides where everything goes.
///
/// # Errors
/// Names FAT cannot hold or that differ in the case of letters only, a file of 4 GiB and more,
/// a size that is too small or too large for FAT32, and contents that do not fit.
pub fn plan(format: &Format, entries: &[Entry]) -> Result<Plan, Problem> {
    let geometry = Geometry::of_size(format.bytes).ok_or_else(|| {
        Problem::failed(format!("a FAT32 volume cannot be {} bytes large", format.bytes)).hint("34 MiB to 2 TiB are possible")
    })?;
    if format.label.len() > 11
        || !format.label.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"_- ".contains(&byte))
    {
        return Err(Problem::failed(format!("`{}` cannot be the label of a FAT32 volume", format.label)));
    }
    let mut plan = Plan {
        format: format.clone(),
        geometry,
        stamp: Stamp::new(format.time),
        nodes: nodes(entries)?,
        folders: BTreeMap::new(),
        used: 0,
    };
    plan.place()?;
    for (index, node) in plan.nodes.iter().enumerate().filter(|(_, node)| node.content.is_none()) {
        let mut bytes = plan.folder(index);
        bytes.resize(node.clusters as usize * geometry.cluster_bytes() as usize, 0);
        plan.folders.insert(index, bytes);
    }
    Ok(plan)
}

/// The tree of the entries.
fn nodes(entries: &[Entry]) -> Result<Vec<Node>, Problem> {
    let node =
        |name: &str, parent, content| Node { name: name.into(), parent, content, children: Vec::new(), cluster: 0, clusters: 0 };
    let mut nodes = vec![node("", 0, None)];
    for entry in entries {
        let path = &entry.path;
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let mut at = 0;
        for (depth, name) in names.iter().enumerate() {
            if let Some(problem) = name::problem(name) {
                return Err(Problem::failed(format!("`{path}` cannot be on a FAT32 volume: `{name}` {problem}")));
            }
            let content = entry.content.as_ref().filter(|_| depth + 1 == names.len());
            let folded = name::folded(name);
            let there = nodes[at].children.iter().copied().find(|child| name::folded(&nodes[*child].name) == folded);
            at = match there {
                Some(there) if nodes[there].content.is_none() && content.is_none() && nodes[there].name == *name => there,
                Some(there) => {
                    let other = &nodes[there].name;
                    return Err(Problem::failed(format!("`{path}` cannot be on a FAT32 volume: `{other}` is there already")));
                }
                None => {
                    nodes.push(node(name, at, content.cloned()));
                    let made = nodes.len() - 1;
                    nodes[at].children.push(made);
                    made
                }
            };
        }
    }
    Ok(nodes)
}

impl Plan {
    /// Gives every node its clusters: the root, the other folders, then the files.
    fn place(&mut self) -> Result<(), Problem> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut needed: u64 = 0;
        for index in 0..self.nodes.len() {
            let clusters = match &self.nodes[index].content {
                Some(content) if content.len() > u64::from(u32::MAX) => {
                    return Err(Problem::failed(format!(
                        "`{}` is larger than the 4 GiB that a file on FAT32 can have",
                        self.nodes[index].name
                    )));
                }
                Some(content) => content.len().div_ceil(cluster_bytes),
                None => {
                    let bytes = self.folder(index).len();
                    if bytes / ENTRY > FOLDER_ENTRIES {
                        return Err(Problem::failed(format!(
                            "the folder `{}` has more entries than FAT32 can hold",
                            self.nodes[index].name
                        )));
                    }
                    (bytes as u64).div_ceil(cluster_bytes).max(1)
                }
            };
            needed += clusters;
            self.nodes[index].clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        }
        if needed > self.geometry.clusters() {
            return Err(Problem::failed(format!(
                "the files need {} MiB and the FAT32 volume has room for {} MiB",
                (needed * cluster_bytes).div_ceil(1 << 20),
                (self.geometry.clusters() * cluster_bytes) >> 20
            )));
        }
        let mut next = FIRST;
        for folders in [true, false] {
            for node in self.nodes.iter_mut().filter(|node| node.content.is_none() == folders && node.clusters > 0) {
                node.cluster = next;
                next += node.clusters;
            }
        }
        self.used = next - FIRST;
        Ok(())
    }

    /// The entries of a folder, not padded.
    fn folder(&self, index: usize) -> Vec<u8> {
        let own = &self.nodes[index];
        let mut bytes = Vec::new();
        if index == 0 {
            // The root has the label in place of the dots.
            if !self.format.label.is_empty() {
                bytes.extend(short_entry(self.label(), ATTRIBUTE_LABEL, self.stamp, 0, 0));
            }
        } else {
            // A parent that is the root is written as 0.
            let parent = if own.parent == 0 { 0 } else { self.nodes[own.parent].cluster };
            bytes.extend(short_entry(*b".          ", ATTRIBUTE_FOLDER, self.stamp, own.cluster, 0));
            bytes.extend(short_entry(*b"..         ", ATTRIBUTE_FOLDER, self.stamp, parent, 0));
        }
        let mut taken: HashSet<[u8; 11]> = HashSet::new();
        for child in &own.children {
            let node = &self.nodes[*child];
            let (short, whole) = name::short(&node.name, |short| taken.contains(short));
            taken.insert(short);
            if !whole {
                name::long_entries(&node.name, &short).iter().for_each(|entry| bytes.extend_from_slice(entry));
            }
            let (attributes, size) = match &node.content {
                None => (ATTRIBUTE_FOLDER, 0),
                // Below 4 GiB: `place` refuses others.
                Some(content) => (ATTRIBUTE_FILE, content.len() as u32),
            };
            bytes.extend(short_entry(short, attributes, self.stamp, node.cluster, size));
        }
        bytes
    }

    fn label(&self) -> [u8; 11] {
        let mut label = [b' '; 11];
        label[..self.format.label.len()].copy_from_slice(self.format.label.as_bytes());
        label
    }

    /// Bytes of the clusters in use.
    pub const fn used_bytes(&self) -> u64 {
        self.used as u64 * self.geometry.cluster_bytes()
    }

    /// Bytes of all clusters.
    pub const fn room_bytes(&self) -> u64 {
        self.geometry.clusters() * self.geometry.cluster_bytes()
    }

    /// Writes the volume into `out` from byte `offset` on. Zeros are not written: that part of
    /// the file must be a hole, or zeros.
    ///
    /// # Errors
    /// When a content cannot be read or is shorter than planned, or `out` cannot be written.
    pub fn write(&self, out: &File, offset: u64) -> io::Result<()> {
        let end = offset + self.format.bytes;
        if out.metadata()?.len() < end {
            out.set_len(end)?;
        }
        let free = self.geometry.clusters() as u32 - self.used;
        for copy in [0, BACKUP] {
            out.write_all_at(&self.boot_sector(), offset + copy * SECTOR)?;
            out.write_all_at(&info_sector(free, FIRST + self.used), offset + (copy + 1) * SECTOR)?;
            let mut third = [0; 512];
            third[510..].copy_from_slice(&[0x55, 0xaa]);
            out.write_all_at(&third, offset + (copy + 2) * SECTOR)?;
        }
        let table = self.table();
        for copy in 0..self.geometry.tables {
            out.write_all_at(&table, offset + self.geometry.table_at(copy))?;
        }
        for (index, bytes) in &self.folders {
            out.write_all_at(bytes, offset + self.geometry.cluster_at(self.nodes[*index].cluster))?;
        }
        for node in self.nodes.iter().filter(|node| node.cluster != 0) {
            if let Some(content) = &node.content {
                content.copy(out, offset + self.geometry.cluster_at(node.cluster))?;
            }
        }
        Ok(())
    }

    /// The used part of the table.
    fn table(&self) -> Vec<u8> {
        // Entry 0 repeats the media byte, entry 1 has the two bits of a volume that is clean.
        let mut numbers = vec![0; (FIRST + self.used) as usize];
        (numbers[0], numbers[1]) = (0x0FFF_FFF8, END);
        for node in self.nodes.iter().filter(|node| node.cluster != 0) {
            let last = node.cluster + node.clusters - 1;
            for cluster in node.cluster..=last {
                numbers[cluster as usize] = if cluster == last { END } else { cluster + 1 };
            }
        }
        numbers.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    fn boot_sector(&self) -> [u8; 512] {
        let geometry = &self.geometry;
        let mut bytes = [0; 512];
        bytes[..3].copy_from_slice(&[0xeb, 0x58, 0x90]);
        bytes[3..11].copy_from_slice(b"MSWIN4.1");
        bytes[11..13].copy_from_slice(&(SECTOR as u16).to_le_bytes());
        bytes[13] = geometry.per_cluster as u8;
        bytes[14..16].copy_from_slice(&(geometry.reserved as u16).to_le_bytes());
        bytes[16] = geometry.tables as u8;
        bytes[21] = 0xf8;
        // Sectors of a track and heads, which nothing uses.
        bytes[24..26].copy_from_slice(&63_u16.to_le_bytes());
        bytes[26..28].copy_from_slice(&255_u16.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.format.hidden.to_le_bytes());
        bytes[32..36].copy_from_slice(&(geometry.sectors as u32).to_le_bytes());
        bytes[36..40].copy_from_slice(&(geometry.table as u32).to_le_bytes());
        bytes[44..48].copy_from_slice(&geometry.root.to_le_bytes());
        bytes[48..50].copy_from_slice(&1_u16.to_le_bytes());
        bytes[50..52].copy_from_slice(&(BACKUP as u16).to_le_bytes());
        bytes[64] = 0x80;
        bytes[66] = 0x29;
        bytes[67..71].copy_from_slice(&self.format.serial.to_le_bytes());
        bytes[71..82].copy_from_slice(if self.format.label.is_empty() { *b"NO NAME    " } else { self.label() }.as_slice());
        bytes[82..90].copy_from_slice(b"FAT32   ");
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format { bytes: 40 << 20, label: String::new(), serial: 1, time: 0, hidden: 0 };

    #[test]
    fn what_cannot_be_is_refused() {
        let huge = Entry {
            path: "a/huge".into(),
            content: Some(Content::Range { file: Arc::new(tempfile::tempfile().unwrap()), offset: 0, length: 1 << 32 }),
        };
        let large = Entry {
            path: "large".into(),
            content: Some(Content::Range { file: Arc::new(tempfile::tempfile().unwrap()), offset: 0, length: 40 << 20 }),
        };
        let file = |path: &str| Entry::bytes(path, &b"x"[..]);
        let cases = [
            (vec![huge], "`huge` is larger than the 4 GiB that a file on FAT32 can have"),
            (vec![large], "the files need 41 MiB and the FAT32 volume has room for 39 MiB"),
            (vec![file("a/b?")], "`a/b?` cannot be on a FAT32 volume: `b?` has a character that FAT cannot hold"),
            (vec![file("a/b"), file("a/B")], "`a/B` cannot be on a FAT32 volume: `b` is there already"),
            (vec![file("a"), file("a/b")], "`a/b` cannot be on a FAT32 volume: `a` is there already"),
        ];
        for (entries, expected) in cases {
            assert_eq!(plan(&FORMAT, &entries).unwrap_err().message, expected);
        }
        assert_eq!(
            plan(&Format { bytes: 1 << 20, ..FORMAT }, &[]).unwrap_err().message,
            "a FAT32 volume cannot be 1048576 bytes large"
        );
        let label = plan(&Format { label: "lower".into(), ..FORMAT }, &[]).unwrap_err();
        assert_eq!(label.message, "`lower` cannot be the label of a FAT32 volume");
    }
}
