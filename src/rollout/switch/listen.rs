//! Listener sockets: bound here, given by systemd, or handed over by the process before us.
//!
//! A socket that is handed over stays open all the time, so no connection is refused while one
//! process takes the place of another: what arrives meanwhile waits in the kernel's queue.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType, sockopt,
};

use super::Listener;
use crate::error::Problem;

/// Connections the kernel keeps until they are accepted (bounded by `net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Sockets in one message (`SCM_MAX_FD` is 253).
const MOST_SOCKETS: usize = 32;
/// Bytes of the names of all of them.
const MOST_NAMES: usize = 8 << 10;
/// Name of listeners that are not for requests, but for the API.
pub const API: &str = "api";
/// The first descriptor systemd passes (sd_listen_fds(3)).
const SYSTEMD_FIRST: i32 = 3;

impl Listener {
    /// Binds a new socket; port 0 takes a free one.
    pub fn bind(name: &str, address: SocketAddr, tls: bool) -> Result<Self> {
        let bound = || -> std::io::Result<TcpListener> {
            let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket =
                rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(TcpListener::from(socket))
        };
        let socket = bound().map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => Problem::failed(format!("`{address}` is in use by another program"))
                .hint(format!("`ss -ltnp` shows which; set another address for the listener `{name}`")),
            std::io::ErrorKind::PermissionDenied => Problem::failed(format!("no permission to listen on `{address}`"))
                .hint("ports below 1024 need the capability CAP_NET_BIND_SERVICE or a socket from systemd"),
            _ => Problem::failed(format!("cannot listen on `{address}`: {error}")),
        })?;
        Ok(Self { name: name.into(), socket, tls })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr().with_context(|| format!("the listener `{}` has no address", self.name))
    }

    /// Another handle of the same socket.
    pub fn try_clone(&self) -> Result<Self> {
        let socket = self.socket.try_clone().with_context(|| format!("cannot copy the listener `{}`", self.name))?;
        Ok(Self { name: self.name.clone(), socket, tls: self.tls })
    }
}

/// What systemd passed: `fds` and `names` are the values of `LISTEN_FDS` and `LISTEN_FDNAMES` of a process whose id is
/// in `LISTEN_PID`. A name that begins with `https`, and `api`, speaks TLS. Call it once, before anything else opens a file.
pub fn from_systemd(fds: &str, names: &str) -> Result<Vec<Listener>> {
    let count: usize = fds
        .parse()
        .ok()
        .filter(|count| *count <= MOST_SOCKETS)
        .ok_or_else(|| Problem::usage(format!("LISTEN_FDS is `{fds}`")))?;
    let mut names = names.split(':').filter(|name| !name.is_empty());
    (0..count)
        .map(|index| {
            let name = names.next().unwrap_or("http").to_owned();
            let socket = adopt(SYSTEMD_FIRST + index as i32)
                .with_context(|| format!("the socket `{name}` from systemd cannot be used"))?;
            listener(name.clone(), name.starts_with("https") || name == API, socket)
        })
        .collect()
}

/// Owns a descriptor that the process was started with.
#[expect(unsafe_code, reason = "systemd passes descriptors by number; each is checked to be open and taken once")]
fn adopt(number: i32) -> std::io::Result<OwnedFd> {
    use std::os::fd::{BorrowedFd, FromRawFd as _};
    // SAFETY: borrowed only to look whether it is open; fcntl fails when it is not.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nobody else in this process knows of it: it came through exec.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A listening TCP socket, or an error that says what it is.
fn listener(name: String, tls: bool, socket: OwnedFd) -> Result<Listener> {
    let stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
    if !stream || !sockopt::socket_acceptconn(&socket).unwrap_or(false) {
        return Err(Problem::failed(format!("the socket `{name}` that was handed over does not listen")).into());
    }
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(Listener { name, socket: socket.into(), tls })
}

/// Sends all listeners over a unix socket in one message (SCM_RIGHTS). Ours stay open.
///
/// The message is one line of JSON: `[{"name": "http", "tls": false}, …]` in the order of the descriptors.
pub fn send(stream: &UnixStream, listeners: &[Listener]) -> Result<()> {
    let names: Vec<_> =
        listeners.iter().map(|listener| serde_json::json!({"name": listener.name, "tls": listener.tls})).collect();
    let mut line = serde_json::to_vec(&names)?;
    line.push(b'\n');
    if listeners.is_empty() || listeners.len() > MOST_SOCKETS || line.len() > MOST_NAMES {
        return Err(Problem::bug(format!("{} listeners do not fit into a message", listeners.len())).into());
    }
    let sockets: Vec<_> = listeners.iter().map(|listener| listener.socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    anyhow::ensure!(
        ancillary.push(SendAncillaryMessage::ScmRights(&sockets)),
        "{} sockets do not fit into a message",
        sockets.len()
    );
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL)
        .context("cannot hand over the listeners")?;
    // The descriptors went with the first byte; the rest is plain bytes.
    std::io::Write::write_all(&mut &*stream, &line[sent..]).context("cannot hand over the names of the listeners")
}

/// Receives what [`send`] sent.
pub fn receive(stream: &UnixStream) -> Result<Vec<Listener>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let (mut line, mut sockets): (Vec<u8>, Vec<OwnedFd>) = Default::default();
    while !line.ends_with(b"\n") && line.len() <= MOST_NAMES {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1024];
        let received = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            .context("cannot receive listeners")?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                sockets.extend(received);
            }
        }
        if received.bytes == 0 {
            return Err(Problem::failed("the process before handed over no listeners").into());
        }
        line.extend_from_slice(&bytes[..received.bytes]);
    }
    #[derive(serde::Deserialize)]
    struct Named {
        name: String,
        tls: bool,
    }
    let names: Vec<Named> = serde_json::from_slice(&line).context("what was handed over is not a list of listeners")?;
    anyhow::ensure!(names.len() == sockets.len(), "{} names came with {} sockets", names.len(), sockets.len());
    names.into_iter().zip(sockets).map(|(named, socket)| listener(named.name, named.tls, socket)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn sockets_cross_to_another_owner() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listeners = [
            Listener::bind("http", ([127, 0, 0, 1], 0).into(), false).unwrap(),
            Listener::bind("https", ([127, 0, 0, 1], 0).into(), true).unwrap(),
        ];
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.address().unwrap()).collect();
        // This one is queued before anybody accepts, and is not lost.
        let mut early = std::net::TcpStream::connect(addresses[0]).unwrap();
        send(&ours, &listeners).unwrap();
        drop((listeners, ours));
        let received = receive(&theirs).unwrap();
        let described: Vec<_> =
            received.iter().map(|listener| (listener.name.as_str(), listener.tls, listener.address().unwrap())).collect();
        assert_eq!(described, [("http", false, addresses[0]), ("https", true, addresses[1])]);
        received[0].socket.accept().unwrap().0.write_all(b"x").unwrap();
        let mut byte = [0];
        early.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert!(receive(&theirs).unwrap_err().to_string().contains("handed over no listeners"));
    }

    #[test]
    fn what_does_not_listen_is_refused() {
        let socket = std::net::UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        assert!(listener("x".into(), false, socket.into()).unwrap_err().to_string().contains("`x`"));
        let taken = Listener::bind("a", ([127, 0, 0, 1], 0).into(), false).unwrap();
        let error = Listener::bind("b", taken.address().unwrap(), false).unwrap_err();
        assert!(error.to_string().contains("is in use"), "{error}");
        assert!(from_systemd("many", "").is_err());
    }
}
