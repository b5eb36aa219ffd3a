//! Launchers of several nodes meet before their ranks do, at the place where rank 0 will listen later; ranks meet in the same way.
//!
//! Each says something, and all get what all said: [`Nodes::all_gather`]. What follows from it every node finds out for
//! itself, so that all come to the same end.

mod address;
mod party;
mod secret;

pub use address::any_address;
pub use party::Party;
pub use secret::{JoinSecret, SecretError, hex, nonce, same, unhex};

use crate::machine::awake::Deadline;
use address::listening_address;
use serde::{Deserialize, Serialize};
use spec::contract::{FrameError, MAX_FRAME_BYTES, VERSION, encode, read_frame, write_frame};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Between two tries to reach a node 0 that is not there yet, or two looks for a node that has not come.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest wait for the first words of someone who connects: whoever else it is says nothing.
const GREETING_LIMIT: Duration = Duration::from_secs(2);
/// Longest greeting, bytes with its length: a job's name is its longest part.
const GREETING_BYTES: u64 = 4 << 10;
const OTHER_SECRET: &str = "the join secrets of the two nodes are not the same: give all nodes the same, by --join-secret or HEADROOM_JOIN_SECRET";
/// Longest word, bytes with its length.
const WORD_BYTES: u64 = MAX_FRAME_BYTES as u64 + 4;
/// Longest wait for one address to answer: another one of the same name may, and so may the same one a little later.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Longest wait for others to close first, so that the port is free for the ranks of this node.
const PART_LIMIT: Duration = Duration::from_secs(1);

/// Where a node stands in its job, and where the launchers meet.
#[derive(Clone, Debug)]
pub struct NodePlace {
    pub party: Party,
    /// Name of the job, the same on all nodes; it may be empty.
    pub job: String,
    pub nnodes: usize,
    pub node_rank: usize,
    pub master_addr: String,
    pub master_port: u16,
    /// How long to wait for the others.
    pub limit: Duration,
    /// What all nodes know and nobody else. `None`: whoever reaches the port and knows the job's name is a node.
    pub secret: Option<JoinSecret>,
}

/// Nodes that did not come together.
#[derive(Debug, thiserror::Error)]
#[error("the nodes did not meet at {place}: {problem}")]
pub struct MeetError {
    place: String,
    problem: String,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Word {
    /// `nonce`: numbers of the guest for this meeting alone.
    Hello {
        version: u32,
        job: String,
        nnodes: usize,
        node_rank: usize,
        #[serde(default)]
        nonce: String,
    },
    /// Node 0 proves the secret for the guest's nonce, and asks for the same with its own.
    Challenge {
        nonce: String,
        proof: String,
    },
    Proof {
        proof: String,
    },
    Welcome,
    Say {
        text: String,
    },
    All {
        texts: Vec<String>,
    },
    Refused {
        problem: String,
    },
}

enum Links {
    /// Links of node 0 to every other node, by number from 1 on.
    Host(Vec<TcpStream>),
    Guest(TcpStream),
}

/// The launchers of a job, connected. Dropping it parts them.
pub struct Nodes {
    place: NodePlace,
    links: Links,
}

impl NodePlace {
    fn address(&self) -> String {
        match self.master_addr.contains(':') {
            true => format!("[{}]:{}", self.master_addr, self.master_port),
            false => format!("{}:{}", self.master_addr, self.master_port),
        }
    }

    fn failed(&self, problem: impl Into<String>) -> MeetError {
        MeetError { place: self.address(), problem: problem.into() }
    }

    fn deadline(&self) -> Deadline {
        Deadline::in_slices(self.limit, CONNECT_LIMIT)
    }

    fn late(&self, who: &str) -> MeetError {
        let limit = self.limit.as_secs_f64();
        self.failed(format!("{who} did not come within {limit} s: {}", self.party.way_out()))
    }

    fn hello(&self, nonce: String) -> Word {
        let Self { job, nnodes, node_rank, .. } = self;
        Word::Hello { version: VERSION, job: job.clone(), nnodes: *nnodes, node_rank: *node_rank, nonce }
    }
}

impl Nodes {
    /// Waits until the launchers of all nodes are connected to node 0's.
    ///
    /// # Errors
    /// The port is in use; a node did not come, has another job, another `--nnodes` or a number that is taken.
    pub fn meet(place: NodePlace) -> Result<Nodes, MeetError> {
        let deadline = place.deadline();
        let links = if place.node_rank == 0 { host(&place, &deadline)? } else { visit(&place, &deadline)? };
        Ok(Nodes { place, links })
    }

    /// Exchanges one text per node and returns all, by node number. All nodes call it together. All texts together are
    /// at most 1 MiB.
    ///
    /// # Errors
    /// A node ended, or said nothing in time, or all said too much.
    pub fn all_gather(&mut self, text: &str) -> Result<Vec<String>, MeetError> {
        let place = &self.place;
        let deadline = place.deadline();
        match &mut self.links {
            Links::Host(guests) => {
                let mut texts = vec![text.to_owned()];
                for number in 0..guests.len() {
                    match hear(&guests[number], &deadline, WORD_BYTES) {
                        Ok(Word::Say { text }) => texts.push(text),
                        other => {
                            let who = place.party.named(std::iter::once(number + 1));
                            let error = if is_late(&other) { place.late(&who) } else { ended(place, &who) };
                            refuse(guests, &error.problem);
                            return Err(error);
                        }
                    }
                }
                tell_all(place, guests, &texts)?;
                Ok(texts)
            }
            Links::Guest(host) => {
                match write_frame(host, &Word::Say { text: text.to_owned() }) {
                    // A host that ended, or refused: what it said is heard below.
                    Ok(()) | Err(FrameError::Io(_)) => {}
                    Err(e) => return Err(place.failed(e.to_string())),
                }
                match hear(host, &deadline, WORD_BYTES) {
                    Ok(Word::All { texts }) if texts.len() == place.nnodes => Ok(texts),
                    Ok(Word::Refused { problem }) => Err(place.failed(problem)),
                    other if is_late(&other) => Err(place.late(&format!("the word of {} 0", place.party.one()))),
                    _ => Err(ended(place, &format!("{} 0", place.party.one()))),
                }
            }
        }
    }
}

impl Nodes {
    /// Address of this machine that the others reach.
    ///
    /// # Errors
    /// The system does not know it.
    pub fn local_address(&self) -> io::Result<String> {
        let streams: &[TcpStream] = match &self.links {
            Links::Host(guests) => guests,
            Links::Guest(host) => std::slice::from_ref(host),
        };
        let found: io::Result<Vec<_>> =
            streams.iter().map(|stream| Ok(stream.local_addr()?.ip().to_canonical())).collect();
        let found = found?;
        let best = found.iter().find(|at| !at.is_loopback()).or(found.first());
        best.map(ToString::to_string).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// What each proves the secret with, by number, about a text that all know. Empty without a secret.
    pub fn proofs(&self, about: &str) -> Vec<String> {
        let NodePlace { secret, job, nnodes, .. } = &self.place;
        let one = |secret: &JoinSecret, node_rank| {
            secret.proof(&secret::About { side: secret::Side::Guest, job, node_rank, guest: about, host: "again" })
        };
        secret.iter().flat_map(|secret| (0..*nnodes).map(move |node| one(secret, node))).collect()
    }

    /// The connections, with who is at the other end: number 0 has one with each, the others with number 0.
    pub fn into_streams(mut self) -> Vec<(usize, TcpStream)> {
        match std::mem::replace(&mut self.links, Links::Host(Vec::new())) {
            Links::Host(guests) => guests.into_iter().enumerate().map(|(at, guest)| (at + 1, guest)).collect(),
            Links::Guest(host) => vec![(0, host)],
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let Links::Host(guests) = &mut self.links else { return };
        // Whoever closes first keeps the port for a while.
        let deadline = Deadline::new(PART_LIMIT);
        for guest in guests {
            let _ = hear(guest, &deadline, WORD_BYTES);
        }
    }
}

/// Sends every node's text to all nodes. Nodes that can be reached are served before the first failure is reported.
fn tell_all(place: &NodePlace, guests: &mut [TcpStream], texts: &[String]) -> Result<(), MeetError> {
    let frame = match encode(&Word::All { texts: texts.to_vec() }) {
        Ok(frame) => frame,
        Err(e) => {
            let error = place.failed(format!("what {} nodes have to say is too much: {e}", place.nnodes));
            refuse(guests, &error.problem);
            return Err(error);
        }
    };
    let told: Vec<bool> = guests.iter_mut().map(|guest| guest.write_all(&frame).is_ok()).collect();
    let mut gone = told.iter().enumerate().filter(|(_, told)| !**told).map(|(at, _)| at + 1).peekable();
    match gone.peek() {
        None => Ok(()),
        Some(_) => Err(ended(place, &place.party.named(gone))),
    }
}

fn ended(place: &NodePlace, who: &str) -> MeetError {
    place.failed(format!("{} ended: its own output says why", place.party.process_of(who)))
}

fn is_late(heard: &io::Result<Word>) -> bool {
    let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
    heard.as_ref().is_err_and(|e| kinds.contains(&e.kind()))
}

/// A stream that ends in an error at a point in time, however slowly its bytes come.
struct Until<'a>(&'a TcpStream, &'a Deadline);

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let next = self.1.next();
            if next.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.0.set_read_timeout(Some(next))?;
            match self.0.read(into) {
                Err(e) if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&e.kind()) => {}
                other => return other,
            }
        }
    }
}

/// The next word, of at most `most` bytes, at the latest at `deadline`.
fn hear(from: &TcpStream, deadline: &Deadline, most: u64) -> io::Result<Word> {
    match read_frame(&mut Until(from, deadline).take(most)) {
        Ok(Some(word)) => Ok(word),
        Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(FrameError::Io(e)) => Err(e),
        Err(e) => Err(io::Error::other(e)),
    }
}

fn refuse(guests: &mut [TcpStream], problem: &str) {
    for guest in guests {
        let _ = write_frame(guest, &Word::Refused { problem: problem.to_owned() });
    }
}

fn host(place: &NodePlace, deadline: &Deadline) -> Result<Links, MeetError> {
    let at = (listening_address(&place.master_addr, place.master_port), place.master_port);
    let listener = TcpListener::bind(at).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => place.failed("the port is in use on node 0: give another --master-port"),
        _ => place.failed(format!("the port cannot be opened on node 0: {e}")),
    })?;
    listener.set_nonblocking(true).map_err(|e| place.failed(e.to_string()))?;
    let mut seats: Vec<Option<TcpStream>> = (1..place.nnodes).map(|_| None).collect();
    let refuse_all = |seats: Vec<Option<TcpStream>>, error: MeetError| {
        refuse(&mut seats.into_iter().flatten().collect::<Vec<_>>(), &error.problem);
        Err(error)
    };
    while !all_present(&mut seats) {
        if deadline.is_over() {
            let missing = seats.iter().enumerate().filter(|(_, seat)| seat.is_none()).map(|(at, _)| at + 1);
            let error = place.late(&place.party.named(missing));
            return refuse_all(seats, error);
        }
        let guest = match listener.accept() {
            Ok((guest, _)) => guest,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(e) => return Err(place.failed(e.to_string())),
        };
        match seat(place, guest, &seats, deadline) {
            Ok(Some((number, guest))) => seats[number - 1] = Some(guest),
            // Not of a launcher.
            Ok(None) => {}
            Err(problem) => return refuse_all(seats, place.failed(problem)),
        }
    }
    // Nobody else is let in: the ranks of other nodes, which start once they are welcome, are to find rank 0 here.
    drop(listener);
    let mut guests: Vec<TcpStream> = seats.into_iter().flatten().collect();
    guests.iter_mut().for_each(|guest| drop(write_frame(guest, &Word::Welcome)));
    Ok(Links::Host(guests))
}

/// True if every seat has a guest. Once all seats are taken, those whose guests ended meanwhile are freed.
fn all_present(seats: &mut [Option<TcpStream>]) -> bool {
    if seats.iter().all(Option::is_some) {
        seats.iter_mut().for_each(|seat| *seat = seat.take().filter(is_there));
    }
    seats.iter().all(Option::is_some)
}

/// True if the other side still exists, as far as this kernel knows; it waits silently.
fn is_there(guest: &TcpStream) -> bool {
    let seen = guest.set_nonblocking(true).and_then(|()| guest.peek(&mut [0]));
    let there = seen.map_or_else(|e| e.kind() == io::ErrorKind::WouldBlock, |bytes| bytes > 0);
    guest.set_nonblocking(false).is_ok() && there
}

/// Identifies a connection. `None` means no launcher. `Err` means a launcher that contradicts this job; it receives the
/// reason.
fn seat(
    place: &NodePlace,
    guest: TcpStream,
    seats: &[Option<TcpStream>],
    deadline: &Deadline,
) -> Result<Option<(usize, TcpStream)>, String> {
    let deadline = deadline.sooner(GREETING_LIMIT);
    let heard = guest.set_nonblocking(false).and_then(|()| hear(&guest, &deadline, GREETING_BYTES));
    let Ok(Word::Hello { version, job, nnodes, node_rank, nonce }) = heard else { return Ok(None) };
    let one = place.party.one();
    // One that is started again takes the seat of the one that ended.
    let taken = || seats[node_rank - 1].as_ref().is_some_and(is_there);
    let problem = if job != place.job {
        // Another job, which is no reason to end this one.
        let problem = format!("the port belongs to the run {:?}, {one} {node_rank} is to join {job:?}", place.job);
        refuse(&mut [guest], &problem);
        return Ok(None);
    } else if version != VERSION {
        format!("{one} {node_rank} speaks contract {version}, {one} 0 {VERSION}: all nodes need the same program")
    } else if nnodes != place.nnodes {
        match place.party {
            Party::Ranks => format!("rank {node_rank} counts {nnodes} ranks, rank 0 {}", place.nnodes),
            _ => format!("node {node_rank} was started with --nnodes {nnodes}, node 0 with --nnodes {}", place.nnodes),
        }
    } else if node_rank == 0 || node_rank >= nnodes || taken() {
        match place.party {
            Party::Ranks => format!("two processes are rank {node_rank}: give each its own, from 0 to {}", nnodes - 1),
            _ => format!("two launchers say --node-rank {node_rank}: give each node its own, from 0 to {}", nnodes - 1),
        }
    } else {
        return Ok(proven(place, guest, node_rank, &nonce, &deadline).map(|guest| (node_rank, guest)));
    };
    // Who does not know the secret ends nothing: the word of a stranger is no word of a node.
    match place.secret {
        Some(_) => match proven(place, guest, node_rank, &nonce, &deadline) {
            None => Ok(None),
            Some(guest) => {
                refuse(&mut [guest], &problem);
                Err(problem)
            }
        },
        None => {
            refuse(&mut [guest], &problem);
            Err(problem)
        }
    }
}

/// The guest, if it knows the secret; another gets the reason, and is no launcher of this job.
fn proven(
    place: &NodePlace,
    mut guest: TcpStream,
    node_rank: usize,
    nonce: &str,
    deadline: &Deadline,
) -> Option<TcpStream> {
    let Some(secret) = &place.secret else { return Some(guest) };
    let own = secret::nonce();
    let about = |side| secret::About { side, job: &place.job, node_rank, guest: nonce, host: &own };
    // What only a node can check proves node 0 to it.
    let proof = secret.proof(&about(secret::Side::Host));
    write_frame(&mut guest, &Word::Challenge { nonce: own.clone(), proof }).ok()?;
    match hear(&guest, deadline, GREETING_BYTES) {
        Ok(Word::Proof { proof }) if secret.holds(&about(secret::Side::Guest), &proof) => Some(guest),
        _ => {
            refuse(&mut [guest], OTHER_SECRET);
            None
        }
    }
}

/// A connection to someone else: where nobody listens, the kernel may connect a socket of this host with itself.
fn connect(addr: &str, port: u16, deadline: &Deadline) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for at in (addr, port).to_socket_addrs()? {
        let left = deadline.left().clamp(Duration::from_millis(1), CONNECT_LIMIT);
        let met = TcpStream::connect_timeout(&at, left).and_then(|stream| {
            let other = stream.local_addr()? != stream.peer_addr()?;
            if other { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
        });
        match met {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn visit(place: &NodePlace, deadline: &Deadline) -> Result<Links, MeetError> {
    let mut host = loop {
        match connect(&place.master_addr, place.master_port, deadline) {
            Ok(host) => break host,
            // Node 0 is not listening yet, and nothing announces when it will.
            Err(_) if !deadline.is_over() => std::thread::sleep(PAUSE),
            Err(e) => {
                let error = place.late(&format!("{} 0", place.party.one()));
                return Err(MeetError { problem: format!("{} ({e})", error.problem), ..error });
            }
        }
    };
    let nonce = secret::nonce();
    let _ = write_frame(&mut host, &place.hello(nonce.clone()));
    let first = hear(&host, deadline, GREETING_BYTES);
    let second = match (&place.secret, first) {
        (Some(secret), Ok(Word::Challenge { nonce: own, proof })) => {
            let about =
                |side| secret::About { side, job: &place.job, node_rank: place.node_rank, guest: &nonce, host: &own };
            if !secret.holds(&about(secret::Side::Host), &proof) {
                return Err(place.failed(OTHER_SECRET));
            }
            let _ = write_frame(&mut host, &Word::Proof { proof: secret.proof(&about(secret::Side::Guest)) });
            hear(&host, deadline, GREETING_BYTES)
        }
        // Whoever listens there cannot prove that it is node 0.
        (Some(_), Ok(Word::Welcome)) => {
            return Err(
                place.failed("node 0 was started without a join secret, this node with one: give both the same")
            );
        }
        (None, Ok(Word::Challenge { .. })) => {
            return Err(place.failed(
                "node 0 asks for a join secret: give this node the same, by --join-secret or HEADROOM_JOIN_SECRET",
            ));
        }
        (_, first) => first,
    };
    match second {
        Ok(Word::Welcome) => Ok(Links::Guest(host)),
        Ok(Word::Refused { problem }) => Err(place.failed(problem)),
        other if is_late(&other) => Err(place.late(&format!("another {}", place.party.one()))),
        Err(e) if [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&e.kind()) => {
            Err(place.failed(format!(
                "whoever listens there took the connection and closed it: {} ended (its own output says why), the job has begun \
                 already, or another program has the port",
                place.party.process_of(&format!("{} 0", place.party.one()))
            )))
        }
        _ => Err(place.failed("nobody of this job listens there: another program has the port")),
    }
}

#[cfg(test)]
mod tests;
