//! How the ranks find each other.
//!
//! Rank 0 waits at the meeting place. Every other rank connects to it, says who it is and what it
//! runs, and where its own neighbour can reach it. When all are there and agree, rank 0 tells each
//! where its next neighbour is, and they close the ring. The connections to rank 0 stay: they are
//! the star over which small messages go.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::environment::Ranks;
use crate::error::{Error, Result};
use crate::group::Options;
use crate::ring::Ring;
use crate::wire::{Call, Kind, Link, MAX_TEXT};

/// Raised with every change of the messages.
const PROTOCOL_VERSION: u32 = 2;
/// Begins every handshake, so that other programs' connections are told from ranks.
const HANDSHAKE: Call = Call {
    kind: Kind::Handshake,
    number: u64::from_le_bytes(*b"datapara"),
};
/// Who connects says so at once; who does not is heard no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);
/// When all are there, neighbours find each other in less than this, unless one has died meanwhile.
const TO_CLOSE_THE_RING: Duration = Duration::from_secs(30);
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// What a rank says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    protocol_version: u32,
    rank: usize,
    world_size: usize,
    /// Where the neighbour before it reaches it. An address of this machine alone means the machine of rank 0.
    ring_address: SocketAddr,
    facts: BTreeMap<String, String>,
}

/// What rank 0 answers when all are there.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    /// The group's token, so that nobody enters the ring of another group.
    token: u64,
    /// Where the ranks are reached in the ring, by rank.
    ring_addresses: Vec<SocketAddr>,
}

/// All connections of a rank.
#[derive(Debug)]
pub(crate) struct Connections {
    /// Rank 0: to all others, by rank. Others: to rank 0 alone.
    pub(crate) star: Vec<Link>,
    pub(crate) ring: Ring,
}

/// Connects this rank, of at least two, with the others.
pub(crate) fn meet(ranks: &Ranks, options: &Options) -> Result<Connections> {
    let deadline = after(options.timeout);
    let (mut star, listener, welcome) = match ranks.rank {
        0 => receive_all(ranks, options, deadline)?,
        _ => join(ranks, options, deadline)?,
    };
    let next = welcome.ring_addresses[(ranks.rank + 1) % ranks.world_size];
    let next = match are_elsewhere(ranks) {
        false => next,
        true => {
            let first = match ranks.rank {
                0 => listener.local_addr(),
                _ => star[0].peer_addr(),
            };
            reachable(next, first.map_err(lost(0))?.ip())
        }
    };
    let deadline = deadline.min(after(TO_CLOSE_THE_RING));
    let ring = close_ring(ranks, &listener, next, welcome.token, deadline);
    // Rank 0 is not ready before its neighbours are; the others learn of a failure by its end.
    let mut ring = ring.inspect_err(|error| give_up(&star, ranks.rank, error))?;
    let links = star.iter_mut().chain([&mut ring.next, &mut ring.previous]);
    for link in links {
        let peer = link.peer;
        link.set_timeout(options.timeout).map_err(lost(peer))?;
    }
    Ok(Connections { star, ring })
}

/// The end of a wait that begins now.
fn after(wait: Duration) -> Instant {
    let now = Instant::now();
    // As good as for ever.
    let far = now + Duration::from_secs(1 << 30);
    now.checked_add(wait).map_or(far, |end| end.min(far))
}

/// Whether there are ranks on other machines.
fn are_elsewhere(ranks: &Ranks) -> bool {
    ranks.local_world_size < ranks.world_size
}

/// Where to listen, so as to be reached through `ip`: there alone, unless it is this machine's loopback and there are other machines. A
/// name often means loopback to the machine itself, as in Debian's /etc/hosts.
fn listening_ip(ranks: &Ranks, ip: IpAddr) -> IpAddr {
    match (are_elsewhere(ranks) && ip.is_loopback(), ip) {
        (false, ip) => ip,
        (true, IpAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
        (true, IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A rank's address as others reach it, who have reached rank 0's machine at `first`.
fn reachable(address: SocketAddr, first: IpAddr) -> SocketAddr {
    let is_on_first = address.ip().is_loopback() || address.ip().is_unspecified();
    match (is_on_first, first.is_unspecified()) {
        (false, _) => address,
        (true, false) => SocketAddr::new(first, address.port()),
        // This is rank 0.
        (true, true) if first.is_ipv4() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        (true, true) => (Ipv6Addr::LOCALHOST, address.port()).into(),
    }
}

/// What rank 0 does until all are there.
fn receive_all(
    ranks: &Ranks,
    options: &Options,
    deadline: Instant,
) -> Result<(Vec<Link>, TcpListener, Welcome)> {
    let address = format!("{}:{}", ranks.master_addr, ranks.master_port);
    let cannot_listen = |source| Error::Listen {
        address: address.clone(),
        source,
    };
    // A name may have an address of a kind that this machine does not use.
    let listen = || {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, NO_ADDRESS);
        for named in (&*ranks.master_addr, ranks.master_port).to_socket_addrs()? {
            let ip = listening_ip(ranks, named.ip());
            match TcpListener::bind((ip, ranks.master_port)) {
                Ok(listener) => return Ok((listener, TcpListener::bind((ip, 0))?)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    };
    let (listener, ring_listener) = listen().map_err(cannot_listen)?;
    let ring_address = ring_listener.local_addr().map_err(cannot_listen)?;

    let mut visitors = Visitors::at(&listener, hear).map_err(cannot_listen)?;
    let mut there: BTreeMap<usize, (Link, SocketAddr)> = BTreeMap::new();
    let outcome = loop {
        if there.len() + 1 == ranks.world_size {
            break Ok(());
        }
        let Some((from, heard)) = visitors.next(deadline).map_err(cannot_listen)? else {
            let missing = |rank: &usize| !there.contains_key(rank);
            break Err(Error::Missing {
                missing: (1..ranks.world_size).filter(missing).collect(),
                world_size: ranks.world_size,
                timeout: options.timeout,
            });
        };
        let (mut link, hello) = match heard {
            Ok(heard) => heard,
            Err(problem) => {
                tracing::warn!("{from} connected to {address} and is no rank: {problem}");
                continue;
            }
        };
        let checked = check(&hello, from, ranks, options, &there);
        link.peer = hello.rank;
        if let Err(error) = checked {
            link.give_up(0, &error.to_string());
            break Err(error);
        }
        there.insert(hello.rank, (link, hello.ring_address));
    };
    let (star, addresses): (Vec<Link>, Vec<SocketAddr>) = there.into_values().unzip();
    outcome.inspect_err(|error| give_up(&star, 0, error))?;
    let welcome = Welcome {
        token: RandomState::new().build_hasher().finish(),
        ring_addresses: [vec![ring_address], addresses].concat(),
    };
    for link in &star {
        send_json(link, &welcome).inspect_err(|error| give_up(&star, 0, error))?;
    }
    Ok((star, ring_listener, welcome))
}

/// What every other rank does until rank 0 welcomes it.
fn join(
    ranks: &Ranks,
    options: &Options,
    deadline: Instant,
) -> Result<(Vec<Link>, TcpListener, Welcome)> {
    let stream = reach(&ranks.master_addr, ranks.master_port, deadline).map_err(|source| {
        Error::Unreachable {
            rank: ranks.rank,
            address: format!("{}:{}", ranks.master_addr, ranks.master_port),
            timeout: options.timeout,
            source,
        }
    })?;
    // The interface that reaches rank 0 is the one on which this rank can be reached.
    let listen = || {
        let ip = stream.local_addr()?.ip();
        let listener = TcpListener::bind((listening_ip(ranks, ip), 0))?;
        let port = listener.local_addr()?.port();
        Ok((listener, SocketAddr::new(ip, port)))
    };
    let (listener, ring_address) = listen().map_err(lost(0))?;
    let remaining = remaining(deadline);
    let link = Link::new(0, stream, remaining).map_err(lost(0))?;
    send_json(
        &link,
        &Hello {
            protocol_version: PROTOCOL_VERSION,
            rank: ranks.rank,
            world_size: ranks.world_size,
            ring_address,
            facts: options.facts.clone(),
        },
    )?;
    let welcome: Result<Welcome> = receive_json(&link);
    let welcome = welcome.map_err(|error| match error {
        Error::OutOfStep { .. } => Error::Stranger {
            peer: format!(
                "what listens at {}:{}",
                ranks.master_addr, ranks.master_port
            ),
            reason: "it speaks another protocol".into(),
        },
        error => error,
    })?;
    if welcome.ring_addresses.len() != ranks.world_size {
        return Err(Error::Stranger {
            peer: "rank 0".into(),
            reason: format!("it names {} ranks", welcome.ring_addresses.len()),
        });
    }
    Ok((vec![link], listener, welcome))
}

/// Refuses a rank that does not fit.
fn check(
    hello: &Hello,
    from: SocketAddr,
    ranks: &Ranks,
    options: &Options,
    there: &BTreeMap<usize, (Link, SocketAddr)>,
) -> Result<()> {
    let stranger = |reason: String| Error::Stranger {
        peer: format!("rank {} at {from}", hello.rank),
        reason,
    };
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(stranger(format!(
            "it speaks version {} of the protocol, this program version {PROTOCOL_VERSION}",
            hello.protocol_version
        )));
    }
    if hello.world_size != ranks.world_size {
        return Err(Error::Different {
            what: "WORLD_SIZE".into(),
            rank: hello.rank,
            found: Some(hello.world_size.to_string()),
            expected: Some(ranks.world_size.to_string()),
        });
    }
    if hello.rank == 0 || hello.rank >= ranks.world_size || there.contains_key(&hello.rank) {
        return Err(stranger("another process has this RANK".into()));
    }
    compare(hello.rank, &hello.facts, &options.facts)
}

/// Refuses the facts of `rank` that differ from those of rank 0, by the first in alphabetical order.
pub(crate) fn compare(
    rank: usize,
    found: &BTreeMap<String, String>,
    expected: &BTreeMap<String, String>,
) -> Result<()> {
    let different = found
        .keys()
        .chain(expected.keys())
        .filter(|what| found.get(*what) != expected.get(*what))
        .min();
    match different {
        None => Ok(()),
        Some(what) => Err(Error::Different {
            what: what.clone(),
            rank,
            found: found.get(what).cloned(),
            expected: expected.get(what).cloned(),
        }),
    }
}

/// Connects to the next rank and is connected to by the one before.
fn close_ring(
    ranks: &Ranks,
    listener: &TcpListener,
    next: SocketAddr,
    token: u64,
    deadline: Instant,
) -> Result<Ring> {
    let next_rank = (ranks.rank + 1) % ranks.world_size;
    let previous_rank = (ranks.rank + ranks.world_size - 1) % ranks.world_size;
    let call = Call {
        kind: Kind::RingHandshake,
        number: token,
    };
    let stream = reach(&next.ip().to_string(), next.port(), deadline).map_err(lost(next_rank))?;
    let next = Link::new(next_rank, stream, remaining(deadline)).map_err(lost(next_rank))?;
    next.send(call, &(ranks.rank as u64).to_le_bytes())?;
    let hear = move |stream, patience| {
        let link = Link::hasty(previous_rank, stream, patience).map_err(lost(previous_rank))?;
        let mut rank = [0; 8];
        link.receive(call, &mut rank)?;
        Ok((link, u64::from_le_bytes(rank)))
    };
    let mut visitors = Visitors::at(listener, hear).map_err(lost(previous_rank))?;
    loop {
        let visitor = visitors.next(deadline).map_err(lost(previous_rank))?;
        let Some((from, heard)) = visitor else {
            return Err(lost(previous_rank)(io::ErrorKind::TimedOut.into()));
        };
        match heard {
            Ok((previous, rank)) if rank == previous_rank as u64 => {
                return Ok(Ring { next, previous });
            }
            result => {
                let result: Result<u64> = result.map(|(_, rank)| rank);
                tracing::warn!("{from} is not rank {previous_rank}: {result:?}");
            }
        }
    }
}

/// Who connects to a listener, in the order in which they say who they are: they are heard side by side, so that those who
/// are silent hold nobody up.
struct Visitors<'a, H, T> {
    listener: &'a TcpListener,
    /// Hears the first words, within a patience.
    hear: H,
    heard: mpsc::Receiver<(SocketAddr, T)>,
    sender: mpsc::Sender<(SocketAddr, T)>,
    being_heard: usize,
}

impl<'a, H, T> Visitors<'a, H, T>
where
    H: Fn(TcpStream, Duration) -> T + Copy + Send + 'static,
    T: Send + 'static,
{
    /// Of more at a time, the others wait until one has been heard.
    const SIDE_BY_SIDE: usize = 64;

    fn at(listener: &'a TcpListener, hear: H) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, heard) = mpsc::channel();
        Ok(Self {
            listener,
            hear,
            heard,
            sender,
            being_heard: 0,
        })
    }

    /// The next one; None when the deadline is over.
    fn next(&mut self, deadline: Instant) -> io::Result<Option<(SocketAddr, T)>> {
        while Instant::now() < deadline {
            if self.being_heard < Self::SIDE_BY_SIDE
                && let Some((stream, from)) = accept(self.listener)?
            {
                let (hear, sender) = (self.hear, self.sender.clone());
                let patience = PATIENCE.min(remaining(deadline));
                // It ends by itself, soon after nobody waits for it any more.
                let heard = thread::Builder::new().spawn(move || {
                    let _ = sender.send((from, hear(stream, patience)));
                });
                match heard {
                    Ok(_) => self.being_heard += 1,
                    // A rank tries again.
                    Err(error) => {
                        tracing::warn!("{from} cannot be heard, for want of a thread: {error}")
                    }
                }
                continue;
            }
            if let Ok(heard) = self.heard.recv_timeout(RETRY_EVERY) {
                self.being_heard -= 1;
                return Ok(Some(heard));
            }
        }
        Ok(None)
    }
}

/// The first words of whoever connects, or why it is no rank: it has no number yet that an error could name.
fn hear(stream: TcpStream, patience: Duration) -> std::result::Result<(Link, Hello), String> {
    let link = Link::hasty(usize::MAX, stream, patience).map_err(|error| error.to_string())?;
    match receive_json(&link) {
        Ok(hello) => Ok((link, hello)),
        Err(Error::Lost { source, .. }) => Err(source.to_string()),
        Err(Error::Silent { timeout, .. }) => Err(format!(
            "it did not say who it is within {} s",
            timeout.as_secs_f64()
        )),
        Err(Error::Stranger { reason, .. }) => Err(reason),
        Err(_) => Err("it speaks another protocol".into()),
    }
}

fn send_json(link: &Link, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| Error::Unsupported {
        what: format!("a handshake cannot be written: {error}"),
    })?;
    if text.len() > MAX_TEXT {
        return Err(Error::Unsupported {
            what: format!(
                "a handshake of {} bytes; at most {MAX_TEXT} are possible",
                text.len()
            ),
        });
    }
    link.send(HANDSHAKE, &text)
}

fn receive_json<T: for<'a> Deserialize<'a>>(link: &Link) -> Result<T> {
    let text = link.receive_up_to(HANDSHAKE, MAX_TEXT)?;
    serde_json::from_slice(&text).map_err(|error| Error::Stranger {
        peer: format!("rank {}", link.peer),
        reason: format!("its handshake cannot be read ({error})"),
    })
}

/// A connection that waits at a listener that does not.
fn accept(listener: &TcpListener) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    match listener.accept() {
        Ok(accepted) => Ok(Some(accepted)),
        // None, or the one who connected has left again.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

const NO_ADDRESS: &str = "the name has no address";

/// Connects, again and again until the deadline: the other side may not be there yet, nor its name.
fn reach(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let error = match connect_once(host, port, deadline) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if Instant::now() + RETRY_EVERY >= deadline {
            return Err(error);
        }
        sleep(RETRY_EVERY);
    }
}

fn connect_once(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, NO_ADDRESS);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, remaining(deadline).min(PATIENCE)) {
            // A port that nobody listens on can be given to this very connection as its own end; it
            // is then connected with itself.
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => (),
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Never zero, which the system takes for no limit or refuses.
fn remaining(deadline: Instant) -> Duration {
    let remaining = deadline.saturating_duration_since(Instant::now());
    remaining.max(Duration::from_millis(1))
}

fn give_up(links: &[Link], rank: usize, error: &Error) {
    for link in links {
        link.give_up(rank, &error.to_string());
    }
}

fn lost(rank: usize) -> impl Fn(io::Error) -> Error {
    move |source| Error::Lost {
        rank,
        during: Kind::Handshake.name(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_machine_alone_are_those_of_rank_0s() {
        let seen = |address: &str, first: &str| {
            reachable(address.parse().unwrap(), first.parse().unwrap()).to_string()
        };
        // Another machine's, whoever asks.
        assert_eq!(seen("10.0.0.2:70", "10.0.0.1"), "10.0.0.2:70");
        assert_eq!(seen("10.0.0.2:70", "0.0.0.0"), "10.0.0.2:70");
        // Rank 0's machine, of which it knows no better address itself.
        for own in ["127.0.1.1:70", "0.0.0.0:70"] {
            assert_eq!(seen(own, "10.0.0.1"), "10.0.0.1:70");
            assert_eq!(seen(own, "0.0.0.0"), "127.0.0.1:70");
        }
        assert_eq!(seen("[::1]:70", "::"), "[::1]:70");
        assert_eq!(seen("[::]:70", "fe80::2"), "[fe80::2]:70");
    }

    #[test]
    fn only_who_would_be_out_of_reach_listens_on_all_addresses() {
        let on = |local_world_size: usize, ip: &str| {
            let ranks = Ranks {
                local_world_size,
                ..Ranks::new(0, 4, "name", 1).unwrap()
            };
            listening_ip(&ranks, ip.parse().unwrap()).to_string()
        };
        assert_eq!(on(2, "127.0.1.1"), "0.0.0.0");
        assert_eq!(on(2, "::1"), "::");
        assert_eq!(on(2, "10.0.0.1"), "10.0.0.1");
        assert_eq!(on(4, "127.0.1.1"), "127.0.1.1");
    }

    #[test]
    fn a_wait_may_be_as_long_as_a_duration() {
        assert!(after(Duration::MAX) > Instant::now() + Duration::from_secs(1 << 20));
        assert!(after(Duration::from_secs(1)) <= Instant::now() + Duration::from_secs(1));
    }
}
