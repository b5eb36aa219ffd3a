//! Launchers of several nodes meet before their ranks do, at the place where rank 0 will listen later.
//!
//! Each says something, and all get what all said: [`Nodes::all_gather`]. What follows from it every node finds out for
//! itself, so that all come to the same end.

use super::env::any_address;
use crate::machine::awake::Deadline;
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
/// Longest word, bytes with its length.
const WORD_BYTES: u64 = MAX_FRAME_BYTES as u64 + 4;
/// Longest wait for one address to answer: another one of the same name may, and so may the same one a little later.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Longest wait for others to close first, so that the port is free for the ranks of this node.
const PART_LIMIT: Duration = Duration::from_secs(1);

/// Where a node stands in its job, and where the launchers meet.
#[derive(Clone, Debug)]
pub struct NodePlace {
    /// Name of the job, the same on all nodes; it may be empty.
    pub job: String,
    pub nnodes: usize,
    pub node_rank: usize,
    pub master_addr: String,
    pub master_port: u16,
    /// How long to wait for the others.
    pub limit: Duration,
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
    Hello { version: u32, job: String, nnodes: usize, node_rank: usize },
    Welcome,
    Say { text: String },
    All { texts: Vec<String> },
    Refused { problem: String },
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
        self.failed(format!(
            "{who} did not come within {limit} s: start `launch` with the same --nnodes, --master-addr and --master-port on \
             every node, see that the port can be reached, or raise --join-timeout"
        ))
    }

    fn hello(&self) -> Word {
        let Self { job, nnodes, node_rank, .. } = self;
        Word::Hello { version: VERSION, job: job.clone(), nnodes: *nnodes, node_rank: *node_rank }
    }
}

/// `node 1`, or `nodes 1, 3`.
fn named(nodes: impl Iterator<Item = usize>) -> String {
    let nodes: Vec<String> = nodes.map(|node| node.to_string()).collect();
    format!("node{} {}", if nodes.len() == 1 { "" } else { "s" }, nodes.join(", "))
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
                            let who = named(std::iter::once(number + 1));
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
                    other if is_late(&other) => Err(place.late("the word of node 0")),
                    _ => Err(ended(place, "node 0")),
                }
            }
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
        Some(_) => Err(ended(place, &named(gone))),
    }
}

fn ended(place: &NodePlace, who: &str) -> MeetError {
    place.failed(format!("the launcher of {who} ended: its own output says why"))
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
    let at = (any_address(&place.master_addr, place.master_port), place.master_port);
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
            let error = place.late(&named(missing));
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
    let Ok(Word::Hello { version, job, nnodes, node_rank }) = heard else { return Ok(None) };
    // One that is started again takes the seat of the one that ended.
    let taken = || seats[node_rank - 1].as_ref().is_some_and(is_there);
    let problem = if job != place.job {
        // Another job, which is no reason to end this one.
        let problem = format!("the port belongs to the run {:?}, node {node_rank} is to join {job:?}", place.job);
        refuse(&mut [guest], &problem);
        return Ok(None);
    } else if version != VERSION {
        format!("node {node_rank} speaks contract {version}, node 0 {VERSION}: all nodes need the same program")
    } else if nnodes != place.nnodes {
        format!("node {node_rank} was started with --nnodes {nnodes}, node 0 with --nnodes {}", place.nnodes)
    } else if node_rank == 0 || node_rank >= nnodes || taken() {
        format!("two launchers say --node-rank {node_rank}: give each node its own, from 0 to {}", nnodes - 1)
    } else {
        return Ok(Some((node_rank, guest)));
    };
    refuse(&mut [guest], &problem);
    Err(problem)
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
                let error = place.late("node 0");
                return Err(MeetError { problem: format!("{} ({e})", error.problem), ..error });
            }
        }
    };
    let _ = write_frame(&mut host, &place.hello());
    match hear(&host, deadline, WORD_BYTES) {
        Ok(Word::Welcome) => Ok(Links::Guest(host)),
        Ok(Word::Refused { problem }) => Err(place.failed(problem)),
        other if is_late(&other) => Err(place.late("another node")),
        Err(e) if [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&e.kind()) => {
            Err(place.failed(
                "whoever listens there took the connection and closed it: the launcher of node 0 ended (its own output says \
                 why), the job has begun already, or another program has the port",
            ))
        }
        _ => Err(place.failed("no launcher of this job listens there: another program has the port")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn place(node_rank: usize, nnodes: usize, port: u16, limit_s: f64) -> NodePlace {
        let (job, master_addr) = ("night".to_owned(), "127.0.0.1".to_owned());
        let limit = Duration::from_secs_f64(limit_s);
        NodePlace { job, nnodes, node_rank, master_addr, master_port: port, limit }
    }

    fn port() -> u16 {
        TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
    }

    fn soon() -> Deadline {
        Deadline::new(Duration::from_secs(30))
    }

    /// A connection to node 0, once it listens.
    fn knock(port: u16) -> TcpStream {
        loop {
            if let Ok(stream) = connect("127.0.0.1", port, &soon()) {
                return stream;
            }
        }
    }

    fn hello(version: u32, job: &str, node_rank: usize) -> Word {
        Word::Hello { version, job: job.into(), nnodes: 2, node_rank }
    }

    fn error(place: NodePlace) -> String {
        Nodes::meet(place).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn every_node_gets_what_all_say_and_the_port_is_free_then() {
        let port = port();
        let texts = std::thread::scope(|scope| {
            let node = |node: usize| {
                scope.spawn(move || {
                    let mut nodes = Nodes::meet(place(node, 3, port, 60.0)).unwrap();
                    let first = nodes.all_gather(&format!("{node} ranks")).unwrap();
                    let second = nodes.all_gather(if node == 1 { "ü" } else { "" }).unwrap();
                    drop(nodes);
                    if node == 0 {
                        drop(TcpListener::bind(("0.0.0.0", port)).unwrap());
                    }
                    (first, second)
                })
            };
            // Node 2 waits for node 0, and node 0, whom a stranger talks to, for node 1.
            let (two, zero) = (node(2), node(0));
            let mut stranger = knock(port);
            io::Write::write_all(&mut stranger, b"hr-id-01 GET / HTTP/1.1\r\n\r\n").unwrap();
            [two, node(1), zero].map(|node| node.join().unwrap())
        });
        let words = |words: [&str; 3]| words.map(String::from).to_vec();
        assert!(texts.iter().all(|t| *t == (words(["0 ranks", "1 ranks", "2 ranks"]), words(["", "ü", ""]))));
    }

    #[test]
    fn nodes_that_do_not_come_are_named_to_those_that_did() {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || error(place(0, 4, port, 0.6)));
            let two = scope.spawn(move || error(place(2, 4, port, 30.0)));
            for text in [zero.join().unwrap(), two.join().unwrap()] {
                assert!(text.contains("nodes 1, 3 did not come within 0.6 s"), "{text}");
            }
        });
        let alone = error(place(1, 2, port, 0.2));
        assert!(alone.contains("node 0 did not come within 0.2 s"), "{alone}");
    }

    #[test]
    fn contradictions_are_told_to_both_sides() {
        for (other, nnodes, says) in
            [(1, 3, "--nnodes 3, node 0 with --nnodes 2"), (0, 2, "two launchers say --node-rank 0")]
        {
            let port = port();
            std::thread::scope(|scope| {
                let zero = scope.spawn(move || error(place(0, 2, port, 30.0)));
                let hello = Word::Hello { version: VERSION, job: "night".into(), nnodes, node_rank: other };
                let mut stream = knock(port);
                write_frame(&mut stream, &hello).unwrap();
                let told = hear(&stream, &soon(), WORD_BYTES).unwrap();
                let text = zero.join().unwrap();
                assert!(text.contains(says), "{text}");
                assert!(matches!(told, Word::Refused { problem } if text.contains(&problem)));
            });
        }
    }

    #[test]
    fn another_job_and_a_taken_port_are_errors_and_a_node_that_ends_is_named() {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || Nodes::meet(place(0, 2, port, 60.0)).map(|mut nodes| nodes.all_gather("0")));
            let stranger = NodePlace { job: "day".into(), ..place(1, 2, port, 60.0) };
            let text = error(stranger);
            assert!(text.contains("belongs to the run \"night\"") && text.contains("\"day\""), "{text}");
            // Continues to wait for its own node, which connects and dies.
            drop(Nodes::meet(place(1, 2, port, 60.0)).unwrap());
            let text = zero.join().unwrap().unwrap().unwrap_err().to_string();
            assert!(text.contains("the launcher of node 1 ended"), "{text}");
        });
        let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(error(place(0, 2, port, 1.0)).contains("in use on node 0: give another --master-port"));
        std::thread::scope(|scope| {
            let guest = scope.spawn(move || error(place(1, 2, port, 30.0)));
            drop(taken.accept().unwrap());
            let text = guest.join().unwrap();
            assert!(text.contains("took the connection and closed it"), "{text}");
            let guest = scope.spawn(move || error(place(1, 2, port, 30.0)));
            let (mut other, _) = taken.accept().unwrap();
            other.write_all(b"\x16\0\0\x00220 mail.example.org\r\n").unwrap();
            let text = guest.join().unwrap();
            assert!(text.contains("no launcher of this job listens there"), "{text}");
        });
    }

    #[test]
    fn a_node_that_is_started_again_while_others_are_missing_takes_its_seat() {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || Nodes::meet(place(0, 3, port, 60.0)).map(|mut nodes| nodes.all_gather("0")));
            for kill in [true, false] {
                let mut stream = knock(port);
                write_frame(
                    &mut stream,
                    &Word::Hello { version: VERSION, job: "night".into(), nnodes: 3, node_rank: 1 },
                )
                .unwrap();
                if kill {
                    // Gone by a reset: it leaves words unread.
                    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
                }
            }
            let again = |node: usize| {
                scope.spawn(move || Nodes::meet(place(node, 3, port, 60.0)).map(|mut nodes| nodes.all_gather("x")))
            };
            let (one, two) = (again(1), again(2));
            for node in [zero, one, two] {
                assert_eq!(node.join().unwrap().unwrap().unwrap(), ["0", "x", "x"]);
            }
        });
    }

    #[test]
    fn strangers_that_say_nothing_little_or_much_do_not_hold_node_0_beyond_its_limit() {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || {
                let began = Instant::now();
                (error(place(0, 2, port, 3.0)), began.elapsed())
            });
            let mut dripping = knock(port);
            scope.spawn(move || {
                // A frame of 1024 bytes, in minutes.
                let bytes = [0, 4, 0, 0].into_iter().chain(std::iter::repeat(b' '));
                for byte in bytes.take(1028) {
                    if dripping.write_all(&[byte]).is_err() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
            let mut long = knock(port);
            write_frame(&mut long, &hello(VERSION, &"night".repeat(1000), 1)).unwrap();
            let _silent = [0; 10].map(|_| knock(port));
            let (text, took) = zero.join().unwrap();
            assert!(text.contains("node 1 did not come within 3 s"), "{text}");
            assert!(took < Duration::from_secs(10), "{took:?}");
            assert!(hear(&long, &soon(), WORD_BYTES).is_err(), "too long for a greeting: it is not answered");
        });
    }

    #[test]
    fn another_job_of_another_version_does_not_end_this_one() {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || error(place(0, 2, port, 60.0)));
            for (job, says) in [("day", "belongs to the run"), ("night", "all nodes need the same program")] {
                let mut stream = knock(port);
                write_frame(&mut stream, &hello(VERSION + 1, job, 1)).unwrap();
                let told = hear(&stream, &soon(), WORD_BYTES).unwrap();
                assert!(matches!(&told, Word::Refused { problem } if problem.contains(says)), "{told:?}");
            }
            let text = zero.join().unwrap();
            assert!(text.contains("all nodes need the same program"), "{text}");
        });
    }

    #[test]
    fn more_than_a_frame_holds_is_an_error_on_all_nodes() {
        let port = port();
        std::thread::scope(|scope| {
            let say = move |node: usize, bytes: usize| {
                let mut nodes = Nodes::meet(place(node, 2, port, 60.0)).unwrap();
                nodes.all_gather(&"x".repeat(bytes)).unwrap_err().to_string()
            };
            let one = scope.spawn(move || say(1, MAX_FRAME_BYTES / 2));
            let zero = say(0, MAX_FRAME_BYTES / 2);
            for text in [zero, one.join().unwrap()] {
                assert!(text.contains("what 2 nodes have to say is too much"), "{text}");
            }
        });
    }

    #[test]
    fn an_address_that_never_answers_is_given_up_in_time() {
        let began = Instant::now();
        // An address reserved for documentation.
        let text = error(NodePlace { master_addr: "192.0.2.1".into(), ..place(1, 2, 9, 0.5) });
        assert!(text.contains("node 0 did not come within 0.5 s"), "{text}");
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn nodes_meet_at_an_address_of_ipv6_too() {
        let at = |node, port| NodePlace { master_addr: "::1".into(), ..place(node, 2, port, 60.0) };
        assert_eq!(at(0, 29500).address(), "[::1]:29500");
        let Ok(free) = TcpListener::bind(("::1", 0)) else {
            eprintln!("skipped: this machine has no IPv6");
            return;
        };
        let port = free.local_addr().unwrap().port();
        drop(free);
        std::thread::scope(|scope| {
            let one = scope.spawn(move || Nodes::meet(at(1, port)).unwrap().all_gather("1").unwrap());
            assert_eq!(Nodes::meet(at(0, port)).unwrap().all_gather("0").unwrap(), ["0", "1"]);
            assert_eq!(one.join().unwrap(), ["0", "1"]);
        });
    }
}
