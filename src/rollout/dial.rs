//! Connects to instances, wherever they are.
//!
//! For an instance with a shim, sockets of its network are kept here, some for each: they are connected without asking
//! anybody, so that a new connection costs what one on loopback costs. The shim's connection on which they came ends when
//! they are worth nothing any more; they are closed then.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use super::shim::{self, Request, Response};
use super::target::Address;
use crate::sandbox::protocol::Channel;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a shim may take to hand over sockets.
const HAND_OVER: Duration = Duration::from_secs(3);
/// Sockets asked for at once.
const COUNT: usize = 16;
/// Fewer than this, and more are fetched beside.
const FEW: usize = 4;

/// Sockets by the shim's socket.
static POOLS: LazyLock<Mutex<HashMap<PathBuf, Arc<Pool>>>> = LazyLock::new(Mutex::default);

#[derive(Debug, Default)]
struct Pool {
    sockets: Mutex<Vec<OwnedFd>>,
    /// Held by who fetches.
    fetching: tokio::sync::Mutex<()>,
}

impl Pool {
    fn take(&self) -> Option<(OwnedFd, usize)> {
        let mut sockets = self.sockets.lock().ok()?;
        let socket = sockets.pop()?;
        Some((socket, sockets.len()))
    }
}

/// A connection to `port` of the instance at `address`; a TCP address has its own port.
///
/// # Errors
/// As of connect(2): refused when the program does not listen, not found when there is no instance.
pub async fn dial(address: &Address, port: u16) -> io::Result<TcpStream> {
    let connected = async {
        match address {
            Address::Tcp(address) => TcpStream::connect(address).await,
            Address::Shim(path) => through_shim(path, port).await,
        }
    };
    let stream =
        tokio::time::timeout(CONNECT + HAND_OVER, connected).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn through_shim(path: &Path, port: u16) -> io::Result<TcpStream> {
    let socket = socket(path).await?;
    let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
    let connect = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    tokio::time::timeout(CONNECT, connect).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// A socket of the instance's network.
async fn socket(path: &Path) -> io::Result<OwnedFd> {
    let pool = match POOLS.lock() {
        Ok(mut pools) => pools.entry(path.to_path_buf()).or_default().clone(),
        Err(_) => Arc::default(),
    };
    loop {
        if let Some((socket, left)) = pool.take() {
            if left < FEW {
                let (path, pool) = (path.to_path_buf(), pool.clone());
                tokio::spawn(async move {
                    // One is enough; whoever needs one at once waits for it in turn.
                    if let Ok(_one) = pool.fetching.try_lock() {
                        let _ = fetch(&path, &pool).await;
                    }
                });
            }
            return Ok(socket);
        }
        let _one = pool.fetching.lock().await;
        if pool.sockets.lock().is_ok_and(|sockets| sockets.is_empty())
            && let Err(error) = fetch(path, &pool).await
        {
            forget(path, &pool);
            return Err(error);
        }
    }
}

/// Fetches sockets, and forgets all of them when the connection they came on ends.
async fn fetch(path: &Path, pool: &Arc<Pool>) -> io::Result<()> {
    let place = path.to_path_buf();
    let asked = tokio::task::spawn_blocking(move || ask(&place)).await.map_err(io::Error::other)?;
    let (sockets, stream) = asked?;
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    if let Ok(mut there) = pool.sockets.lock() {
        there.extend(sockets);
    }
    let (path, pool) = (path.to_path_buf(), pool.clone());
    tokio::spawn(async move {
        let mut byte = [0; 1];
        let _ = stream.read(&mut byte).await;
        forget(&path, &pool);
    });
    Ok(())
}

fn forget(path: &Path, pool: &Arc<Pool>) {
    if let Ok(mut pools) = POOLS.lock()
        && pools.get(path).is_some_and(|known| Arc::ptr_eq(known, pool))
    {
        pools.remove(path);
    }
    if let Ok(mut sockets) = pool.sockets.lock() {
        sockets.clear();
    }
}

/// Asks a shim for sockets, blocking.
fn ask(path: &Path) -> io::Result<(Vec<OwnedFd>, std::os::unix::net::UnixStream)> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let channel: Channel = shim::channel(dir)?;
    channel.0.set_read_timeout(Some(HAND_OVER))?;
    match shim::ask_on(&channel, &Request::Sockets { count: COUNT }).map_err(io::Error::other)? {
        (Response::Sockets, sockets) => Ok((sockets, channel.0)),
        (Response::Refused(why), _) => Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)),
        (other, _) => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
    }
}
