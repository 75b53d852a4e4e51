//! Upgraded connections: bytes both ways, and for a WebSocket a close frame of our own when its pool drains.
//!
//! A drain asks gently first: at a border between frames towards the client a close frame with
//! 1012 (service restart) goes out, the client's own close frame is handed to the instance, and
//! both end by themselves. What does not, ends at the deadline of the drain.

use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::body::Guard;
use super::frames::{Frames, close};
use super::pool::{Cut, Kind, Ticket};
use super::upstream::Upstream;
use super::worker::Counted;

/// Close codes (RFC 6455, section 7.4.1, and its registry).
const GOING_AWAY: u16 = 1001;
const ABNORMAL: u16 = 1006;
const SERVICE_RESTART: u16 = 1012;

/// How long a client has to answer a close frame.
const CLOSE_WAIT: Duration = Duration::from_secs(5);
/// How long the other side has to end, when one side did.
const HALF_CLOSED_WAIT: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 16 << 10;

/// Relays until both sides ended, or the drain's deadline.
pub(super) async fn relay(upgraded: OnUpgrade, upstream: Upstream, mut guard: Guard, is_websocket: bool) {
    let Some(ticket) = guard.ticket.take() else { return };
    let _counted = Counted::one_more(&guard.connection.switch, &guard.connection.worker);
    let Ok(client) = upgraded.await else { return };
    ticket.becomes(Kind::WebSocket);
    let (stream, early) = upstream.into_parts();
    let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
    let (from_instance, to_instance) = stream.into_split();
    let progress =
        || ticket.expect_progress(&guard.connection.switch.clock, Some(guard.connection.switch.settings.timeouts.tunnel));
    progress();
    let mut down =
        Direction { reader: early.chain(from_instance), writer: to_client, frames: Frames::default(), close: None, bytes: 0 };
    let mut up = Direction { reader: from_client, writer: to_instance, frames: Frames::default(), close: None, bytes: 0 };
    // Kept here, so that it outlives the two directions that look at it.
    let asked = std::sync::atomic::AtomicBool::new(false);
    let both = async {
        let down = async {
            let ended = down.run(&progress, is_websocket.then_some(&ticket)).await;
            asked.store(ended, std::sync::atomic::Ordering::Relaxed);
            ended
        };
        let up = up.run(&progress, None);
        tokio::pin!(down, up);
        tokio::select! {
            asked = &mut down => {
                let wait = if asked { CLOSE_WAIT } else { HALF_CLOSED_WAIT };
                let _ = tokio::time::timeout(wait, &mut up).await;
            }
            _ = &mut up => drop(tokio::time::timeout(HALF_CLOSED_WAIT, &mut down).await),
        }
    };
    let over = std::future::poll_fn(|context| match ticket.poll_cut(context) > Cut::Gently {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    });
    tokio::select! {
        () = both => guard.done(),
        () = over => guard.error = "the deadline of the drain is over",
    }
    let asked = asked.into_inner();
    if asked && up.close.is_none() && up.frames.at_border() {
        let _ = tokio::time::timeout(Duration::from_millis(100), up.writer.write_all(&close(GOING_AWAY, true))).await;
    }
    if is_websocket {
        ticket.closed_with(down.close.or(up.close).unwrap_or(ABNORMAL));
    }
    (guard.sent, guard.received) = (down.bytes, up.bytes);
    guard.ticket = Some(ticket);
}

/// One of the two.
struct Direction<R, W> {
    reader: R,
    writer: W,
    frames: Frames,
    /// The code of the close frame that passed.
    close: Option<u16>,
    bytes: u64,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Direction<R, W> {
    /// Relays until the reader's end. With `asked` a drain may put a close frame in its place; true when it did.
    async fn run(&mut self, progress: &impl Fn(), asked: Option<&Ticket>) -> bool {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let gently = asked.is_some_and(|ticket| ticket.cut() >= Cut::Gently) && self.close.is_none();
            if gently && self.frames.at_border() {
                return self.say_close().await;
            }
            let read = tokio::select! {
                read = self.reader.read(&mut buffer) => read,
                () = asked_now(asked), if !gently => continue,
            };
            let Ok(count @ 1..) = read else { break };
            progress();
            let mut bytes = &buffer[..count];
            if asked.is_some_and(|ticket| ticket.cut() >= Cut::Gently) && self.close.is_none() {
                // Up to the last border, if there is one; a close frame of the instance's own among it is told as such.
                let seen = self.frames.see(bytes);
                self.close = seen.close;
                bytes = &bytes[..seen.border.filter(|_| seen.close.is_none()).unwrap_or(count)];
                if self.write(bytes).await.is_err() {
                    break;
                }
                if seen.border.is_some() && seen.close.is_none() {
                    return self.say_close().await;
                }
                continue;
            }
            self.close = self.close.or(self.frames.see(bytes).close);
            if self.write(bytes).await.is_err() {
                break;
            }
        }
        let _ = self.writer.shutdown().await;
        false
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.bytes += bytes.len() as u64;
        self.writer.write_all(bytes).await?;
        self.writer.flush().await
    }

    async fn say_close(&mut self) -> bool {
        self.close = Some(SERVICE_RESTART);
        self.write(&close(SERVICE_RESTART, false)).await.is_ok()
    }
}

/// Ready when the ticket is to end gently; never without one.
async fn asked_now(ticket: Option<&Ticket>) {
    std::future::poll_fn(|context| match ticket.is_some_and(|ticket| ticket.poll_cut(context) >= Cut::Gently) {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    })
    .await;
}
