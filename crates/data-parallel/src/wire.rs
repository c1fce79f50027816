//! Messages between two ranks.
//!
//! A message is a header of 20 bytes (kind, number of the call, length of the body) and a body.
//! Both ends know what must come next, and memory is taken as bytes come: a length that a peer
//! merely states allocates nothing.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The longest text in a message: settings, reasons.
pub(crate) const MAX_TEXT: usize = 256 << 10;
/// The longest reason for giving up.
const MAX_REASON: usize = 4 << 10;
/// A body as long as this fits the system's buffers, so that writing it does not wait for the
/// reader.
const INLINE: usize = 4 << 10;
/// How long a rank that gives up within a message lets its peer take the rest.
const REST: Duration = Duration::from_secs(2);

/// The kind of call that a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Handshake = 1,
    RingHandshake,
    AllReduce,
    Counters,
    Broadcast,
    Facts,
    GaveUp,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Handshake,
        Self::RingHandshake,
        Self::AllReduce,
        Self::Counters,
        Self::Broadcast,
        Self::Facts,
        Self::GaveUp,
    ];

    /// The kind of call, as errors name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Handshake => "the handshake",
            Self::RingHandshake => "the handshake of neighbours",
            Self::AllReduce => "the all-reduce of tensors",
            Self::Counters => "the sum of counters",
            Self::Broadcast => "the broadcast",
            Self::Facts => "the comparison of settings",
            Self::GaveUp => "its end",
        }
    }
}

/// What a message is of: the kind and the number of a call, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) kind: Kind,
    pub(crate) number: u64,
}

struct Header {
    kind: u32,
    number: u64,
    bytes: u64,
}

/// A connection to another rank.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) peer: usize,
    stream: TcpStream,
    timeout: Duration,
    /// The end of all reads together.
    deadline: Option<Instant>,
}

/// Reads until a link's deadline, where it has one.
struct Reader<'a> {
    stream: &'a TcpStream,
    deadline: Option<Instant>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buffer)
    }
}

impl Link {
    /// Over a connection that exists. No read or write waits longer than `timeout`.
    pub(crate) fn new(peer: usize, stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self {
            peer,
            stream,
            timeout,
            deadline: None,
        })
    }

    /// Over a connection of somebody unknown: all reads together take no longer than `patience`, however few bytes come at a time,
    /// until [`Self::set_timeout`].
    pub(crate) fn hasty(peer: usize, stream: TcpStream, patience: Duration) -> io::Result<Self> {
        Ok(Self {
            deadline: Some(Instant::now() + patience),
            ..Self::new(peer, stream, patience)?
        })
    }

    /// The address of the other end.
    pub(crate) fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            stream: &self.stream,
            deadline: self.deadline,
        }
    }

    pub(crate) fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))?;
        (self.timeout, self.deadline) = (timeout, None);
        Ok(())
    }

    /// Sends a message.
    pub(crate) fn send(&self, call: Call, body: &[u8]) -> Result<()> {
        let header = Header {
            kind: call.kind as u32,
            number: call.number,
            bytes: body.len() as u64,
        }
        .encode();
        let write = || {
            let mut stream = &self.stream;
            if body.len() <= INLINE {
                // One packet instead of two.
                return stream.write_all(&[&header, body].concat());
            }
            stream.write_all(&header)?;
            stream.write_all(body)
        };
        write().map_err(|error| self.failed(call, error))
    }

    /// Receives a message whose body has the length of `body`.
    pub(crate) fn receive(&self, call: Call, body: &mut [u8]) -> Result<()> {
        let bytes = self.receive_header(call)?;
        if bytes != body.len() as u64 {
            return Err(Error::OutOfStep {
                rank: self.peer,
                found: format!("{} of {bytes} bytes", call.kind.name()),
                expected: format!("one of {} bytes", body.len()),
            });
        }
        self.reader()
            .read_exact(body)
            .map_err(|error| self.failed(call, error))
    }

    /// Receives a message of any length up to `limit`.
    pub(crate) fn receive_up_to(&self, call: Call, limit: usize) -> Result<Vec<u8>> {
        let bytes = self.receive_header(call)?;
        if bytes > limit as u64 {
            return Err(Error::OutOfStep {
                rank: self.peer,
                found: format!("{} of {bytes} bytes", call.kind.name()),
                expected: format!("one of at most {limit} bytes"),
            });
        }
        let mut body = Vec::new();
        self.reader()
            .take(bytes)
            .read_to_end(&mut body)
            .map_err(|error| self.failed(call, error))?;
        if (body.len() as u64) < bytes {
            return Err(self.failed(call, io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(body)
    }

    /// Sends to `self` and receives from `from` at the same time: in a ring everybody sends before
    /// anybody receives, which must not depend on the size of the system's buffers.
    pub(crate) fn exchange(
        &self,
        from: &Link,
        call: Call,
        sent: &[u8],
        received: &mut [u8],
    ) -> Result<()> {
        if sent.len() <= INLINE {
            self.send(call, sent)?;
            return from.receive(call, received);
        }
        std::thread::scope(|scope| {
            let sender = std::thread::Builder::new().spawn_scoped(scope, || self.send(call, sent));
            let sender = sender.map_err(|source| Error::Thread { source })?;
            let result = from.receive(call, received);
            if result.is_err() {
                // The peer takes the rest and then hears why this rank gives up: a connection that ends within a message looks as if
                // this rank were gone. A peer that takes nothing is waited for no longer than this.
                let end = Instant::now() + REST;
                while !sender.is_finished() && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if !sender.is_finished() {
                    let _ = self.stream.shutdown(Shutdown::Both);
                }
            }
            let sent = sender.join().unwrap_or_else(|_| {
                let panicked = io::Error::other("the sending thread has panicked");
                Err(self.failed(call, panicked))
            });
            result.and(sent)
        })
    }

    /// Tells the peer that this group is over, as far as the connection still allows, and closes it.
    pub(crate) fn give_up(&self, first: usize, reason: &str) {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let header = Header {
            kind: Kind::GaveUp as u32,
            number: first as u64,
            bytes: end as u64,
        };
        let message = [&header.encode(), &reason.as_bytes()[..end]].concat();
        let _ = self.stream.set_write_timeout(Some(Duration::from_secs(1)));
        let _ = (&self.stream).write_all(&message);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Takes what still arrives, until the peer has closed its end too. A connection that is closed
    /// with data unread is reset, and the peer may then never read the reason.
    pub(crate) fn linger(&self, deadline: Instant) {
        let mut discarded = [0; 4096];
        let mut reader = Reader {
            deadline: Some(deadline),
            ..self.reader()
        };
        while reader.read(&mut discarded).is_ok_and(|bytes| bytes > 0) {}
    }

    /// Looks at what has arrived, and takes nothing: an error where the peer has given up or is gone. What else there is belongs to a
    /// later `call`.
    pub(crate) fn look(&self, call: Call) -> Result<()> {
        let mut bytes = [0; Header::BYTES];
        let mut peek = || {
            self.stream.set_nonblocking(true)?;
            let peeked = self.stream.peek(&mut bytes);
            self.stream.set_nonblocking(false)?;
            peeked
        };
        match peek() {
            Ok(0) => Err(self.failed(call, io::ErrorKind::UnexpectedEof.into())),
            Ok(Header::BYTES) if Header::decode(bytes).kind == Kind::GaveUp as u32 => {
                self.receive_header(call).map(drop)
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(self.failed(call, error)),
        }
    }

    fn receive_header(&self, call: Call) -> Result<u64> {
        let mut bytes = [0; Header::BYTES];
        let mut stream = self.reader();
        stream
            .read_exact(&mut bytes)
            .map_err(|error| self.failed(call, error))?;
        let header = Header::decode(bytes);
        if header.kind == Kind::GaveUp as u32 {
            let mut reason = vec![0; (header.bytes as usize).min(MAX_REASON)];
            stream
                .read_exact(&mut reason)
                .map_err(|error| self.failed(call, error))?;
            return Err(Error::GaveUp {
                rank: header.number as usize,
                reason: String::from_utf8_lossy(&reason).into_owned(),
            });
        }
        if header.kind != call.kind as u32 || header.number != call.number {
            let kind = Kind::ALL
                .into_iter()
                .find(|&kind| kind as u32 == header.kind);
            let name = kind.map_or("an unknown message", Kind::name);
            return Err(Error::OutOfStep {
                rank: self.peer,
                found: format!("{name} (call {})", header.number),
                expected: format!("{} (call {})", call.kind.name(), call.number),
            });
        }
        Ok(header.bytes)
    }

    fn failed(&self, call: Call, error: io::Error) -> Error {
        match error.kind() {
            // Linux says WouldBlock when a timeout of a socket is over, others TimedOut.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Silent {
                rank: self.peer,
                during: call.kind.name(),
                timeout: self.timeout,
            },
            _ => Error::Lost {
                rank: self.peer,
                during: call.kind.name(),
                source: error,
            },
        }
    }
}

impl Header {
    const BYTES: usize = 20;

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.number.to_le_bytes());
        bytes[12..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; Self::BYTES]) -> Self {
        let number = |range: std::ops::Range<usize>| {
            let little_endian = bytes[range].iter().rev();
            little_endian.fold(0, |number: u64, &byte| number << 8 | u64::from(byte))
        };
        Self {
            kind: number(0..4) as u32,
            number: number(4..12),
            bytes: number(12..20),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_stated_length_that_never_comes_takes_no_memory() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let link = Link::new(1, stream, Duration::from_secs(60)).unwrap();
        let call = Call {
            kind: Kind::Broadcast,
            number: 1,
        };
        let header = Header {
            kind: call.kind as u32,
            number: call.number,
            bytes: u64::MAX,
        };
        peer.write_all(&header.encode()).unwrap();
        peer.write_all(&[0; 3]).unwrap();
        drop(peer);
        let error = link.receive_up_to(call, usize::MAX).unwrap_err();
        assert!(matches!(error, Error::Lost { rank: 1, .. }), "{error}");
    }
}
