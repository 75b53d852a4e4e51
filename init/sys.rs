//! The system calls std has no word for: mounts, modules, device mapper, reboot, uevents.
//!
//! All unsafe code of the static program is in this file. Every function here is safe to call
//! with any arguments; a failure is the kernel's own error number as an [`io::Error`].

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

#[repr(C)]
struct SockaddrNl {
    family: u16,
    pad: u16,
    pid: u32,
    groups: u32,
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(command: c_int) -> c_int;
    fn mlockall(flags: c_int) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const SockaddrNl, length: u32) -> c_int;
    fn recv(fd: c_int, buffer: *mut c_void, length: usize, flags: c_int) -> isize;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn sync();
    fn syncfs(fd: c_int) -> c_int;
    fn umask(mask: u32) -> u32;
    fn llistxattr(path: *const c_char, list: *mut c_char, size: usize) -> isize;
    fn lgetxattr(path: *const c_char, name: *const c_char, value: *mut c_void, size: usize) -> isize;
    fn lsetxattr(path: *const c_char, name: *const c_char, value: *const c_void, size: usize, flags: c_int) -> c_int;
    fn utimensat(dir: c_int, path: *const c_char, times: *const Timespec, flags: c_int) -> c_int;
}

/// Mount flags, `linux/mount.h`.
pub const MS_RDONLY: u64 = 1;
pub const MS_NOSUID: u64 = 2;
pub const MS_NODEV: u64 = 4;
pub const MS_NOEXEC: u64 = 8;
pub const MS_NOATIME: u64 = 1024;
pub const MS_BIND: u64 = 4096;
pub const MS_MOVE: u64 = 8192;

/// `umount2` flag: detach now, clean up when nobody uses it any more.
pub const MNT_DETACH: i32 = 2;

/// Error numbers the program tells apart.
pub const EIO: i32 = 5;
pub const EEXIST: i32 = 17;
pub const EPIPE: i32 = 32;
pub const EOPNOTSUPP: i32 = 95;
/// What EROFS answers when a block is not what it must be (EFSCORRUPTED).
pub const EINVAL: i32 = 22;
pub const EUCLEAN: i32 = 117;

pub const SIGKILL: i32 = 9;

/// There is something to read.
pub const POLLIN: i16 = 1;

fn text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn word(value: &str) -> io::Result<CString> {
    CString::new(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn check(status: c_int) -> io::Result<()> {
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn length(status: isize) -> io::Result<usize> {
    usize::try_from(status).map_err(|_| io::Error::last_os_error())
}

/// mount(2); `data` are the file system's own options.
pub fn mount_at(source: &Path, target: &Path, kind: &str, flags: u64, data: &str) -> io::Result<()> {
    let (source, target, kind, data) = (text(source)?, text(target)?, word(kind)?, word(data)?);
    // SAFETY: four strings that live until the call returns.
    check(unsafe { mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) })
}

pub fn unmount(target: &Path, flags: i32) -> io::Result<()> {
    let target = text(target)?;
    // SAFETY: one string that lives until the call returns.
    check(unsafe { umount2(target.as_ptr(), flags) })
}

/// finit_module(2); a compressed file is inflated by the kernel.
pub fn load_module(file: &File, compressed: bool) -> io::Result<()> {
    const SYS_FINIT_MODULE: c_long = 313;
    const MODULE_INIT_COMPRESSED_FILE: c_long = 4;
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    // SAFETY: an open file, an empty option string, a number.
    let status = unsafe { syscall(SYS_FINIT_MODULE, c_long::from(file.as_raw_fd()), c"".as_ptr(), flags) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl that reads and writes `buffer`, which must be as long as the request says.
pub fn ioctl_buffer(file: &File, request: u64, buffer: &mut [u8]) -> io::Result<()> {
    let size = usize::try_from((request >> 16) & 0x3fff).unwrap_or(usize::MAX);
    assert!(buffer.len() >= size, "the buffer of an ioctl is shorter than the request");
    // SAFETY: the kernel touches at most what the request's size, or the size field in the
    // structure (device mapper: checked by the caller's constructor), allows; the buffer holds it.
    check(unsafe { ioctl(file.as_raw_fd(), request, buffer.as_mut_ptr()) })
}

/// An ioctl without an argument.
pub fn ioctl_plain(file: &File, request: u64) -> io::Result<()> {
    // SAFETY: the requests used with it (BLKRRPART) take no argument.
    check(unsafe { ioctl(file.as_raw_fd(), request, 0 as c_ulong) })
}

/// How to end the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    Restart,
    PowerOff,
}

/// Ends the machine at once, without asking anybody; returns only when the kernel refuses.
pub fn reset(how: Reset) -> io::Error {
    let command = match how {
        Reset::Restart => 0x0123_4567,
        Reset::PowerOff => 0x4321_fedc,
    };
    // SAFETY: a number.
    unsafe { reboot(command) };
    io::Error::last_os_error()
}

/// Keeps every page of this process in memory, now and later.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: a number; MCL_CURRENT | MCL_FUTURE.
    check(unsafe { mlockall(3) })
}

/// Waits until `fd` has one of `events` or the time is over; what came, 0 for nothing.
pub fn wait_for(fd: RawFd, events: i16, timeout: Option<Duration>) -> io::Result<i16> {
    let mut entry = PollFd { fd, events, revents: 0 };
    let milliseconds = timeout.map_or(-1, |time| c_int::try_from(time.as_millis()).unwrap_or(c_int::MAX));
    // SAFETY: one entry, which lives until the call returns.
    match check(unsafe { poll(&raw mut entry, 1, milliseconds) }) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(error),
        Ok(()) => Ok(entry.revents),
    }
}

/// The kernel's announcements of devices (netlink, group 1).
#[derive(Debug)]
pub struct Uevents(OwnedFd);

impl Uevents {
    pub fn open() -> io::Result<Self> {
        const AF_NETLINK: c_int = 16;
        const SOCK_RAW_CLOEXEC_NONBLOCK: c_int = 3 | 0o2_000_000 | 0o4000;
        const NETLINK_KOBJECT_UEVENT: c_int = 15;
        // SAFETY: numbers; the descriptor is ours and owned from here on.
        let fd = unsafe { socket(AF_NETLINK, SOCK_RAW_CLOEXEC_NONBLOCK, NETLINK_KOBJECT_UEVENT) };
        check(fd)?;
        // SAFETY: just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = SockaddrNl { family: 16, pad: 0, pid: 0, groups: 1 };
        // SAFETY: an address of the length given, alive until the call returns.
        check(unsafe { bind(fd.as_raw_fd(), &raw const address, 12) })?;
        Ok(Self(fd))
    }

    /// Waits for the next announcement, but not longer than `timeout`, and forgets all that are queued.
    pub fn wait(&self, timeout: Duration) {
        let _ = wait_for(self.0.as_raw_fd(), POLLIN, Some(timeout));
        let mut buffer = [0_u8; 4096];
        // SAFETY: a buffer and its length; the socket does not block.
        while unsafe { recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) } > 0 {}
    }
}

/// Sends a signal to a whole process group.
pub fn kill_group(leader: u32, signal: i32) {
    if let Ok(leader) = c_int::try_from(leader)
        && leader > 1
    {
        // SAFETY: numbers.
        unsafe { kill(-leader, signal) };
    }
}

/// Writes everything that waits in memory.
pub fn sync_all() {
    // SAFETY: takes nothing, cannot fail.
    unsafe { sync() };
}

/// Writes what waits for the file system that holds `file`.
pub fn sync_file_system(file: &File) -> io::Result<()> {
    // SAFETY: an open file.
    check(unsafe { syncfs(file.as_raw_fd()) })
}

/// New files get exactly the modes they are made with.
pub fn clear_umask() {
    // SAFETY: a number.
    unsafe { umask(0) };
}

/// Copies all extended attributes of one file (not followed) to another; those the target's
/// file system does not know are left out.
pub fn copy_xattrs(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (text(from)?, text(to)?);
    // SAFETY: a string and no buffer: only the size is asked for.
    let size = match length(unsafe { llistxattr(from.as_ptr(), std::ptr::null_mut(), 0) }) {
        Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => return Ok(()),
        other => other?,
    };
    let mut names = vec![0_u8; size];
    // SAFETY: a string and a buffer with its length.
    let size = length(unsafe { llistxattr(from.as_ptr(), names.as_mut_ptr().cast(), names.len()) })?;
    names.truncate(size);
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut value = vec![0_u8; 65536];
        // SAFETY: two strings and a buffer with its length.
        let size = length(unsafe { lgetxattr(from.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
        // SAFETY: two strings and a buffer of which `size` bytes were just filled.
        match check(unsafe { lsetxattr(to.as_ptr(), name.as_ptr(), value.as_ptr().cast(), size, 0) }) {
            Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Sets the time of last change (and access) of a file that is not followed.
pub fn set_time(path: &Path, seconds: i64, nanoseconds: i64) -> io::Result<()> {
    const AT_FDCWD: c_int = -100;
    const AT_SYMLINK_NOFOLLOW: c_int = 0x100;
    let path = text(path)?;
    let times = [Timespec { seconds, nanoseconds }, Timespec { seconds, nanoseconds }];
    // SAFETY: a string and two times, alive until the call returns.
    check(unsafe { utimensat(AT_FDCWD, path.as_ptr(), times.as_ptr(), AT_SYMLINK_NOFOLLOW) })
}
