//! A decode worker as the loader sees it: a process of the user's Python at the other end of a socket pair.
//!
//! ```text
//! DECODE index, room ─► worker: dataset[index] ─► written into the cache, or: longer than that ─► PLACE elsewhere
//! BUILD  samples     ─► worker: transform, collate ─► written into its scratch memory, which the loader reads
//! ```
//! A request begins with one byte of kind and four little-endian u64 (epoch, sample or count of samples, offset, room), of which it
//! uses some: the worker reads it at once. A BUILD's samples follow. The worker answers each request once: a byte of outcome, and a
//! number or an error. It holds no mapping: it writes to the cache's memory by offset, so it has no page tables for it.

use rustix::process::Pid;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const DECODE: u8 = 1;
const PLACE: u8 = 2;
const BUILD: u8 = 3;
/// An offset that means the worker's scratch memory.
const SCRATCH: u64 = u64::MAX;

/// Time between two looks at whether the worker lives and is in time.
const LOOK: Duration = Duration::from_millis(200);

/// Outcome of a request.
#[derive(Debug)]
pub enum Answer {
    /// So many bytes are written.
    Done(usize),
    /// So many bytes are needed; the sample waits for a PLACE.
    Long(usize),
    /// The user's code failed: a pickled exception with its traceback.
    Failed(Vec<u8>),
}

/// Where a worker finds a sample that it builds a batch of.
pub enum Source<'a> {
    /// In the cache's memory.
    Cache { offset: u64, bytes: usize },
    /// Sent along.
    Inline(&'a [u8]),
    /// Nowhere: it decodes the sample.
    Decode,
}

/// The loader's end of a worker.
pub struct Lane {
    socket: UnixStream,
    scratch: File,
    theirs: Option<UnixStream>,
    /// The worker, where it is a child of this process.
    process: Option<Pid>,
    /// Longest time that a request may take; `None`: any.
    limit: Option<Duration>,
}

impl Lane {
    /// # Errors
    /// No socket, or no memory to share.
    pub fn new() -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let scratch = File::from(cache::shared_memory("headroom-scratch", 0)?.fd);
        socket.set_read_timeout(Some(LOOK))?;
        Ok(Self { socket, scratch, theirs: Some(theirs), process: None, limit: None })
    }

    /// The worker's end, given away; once.
    pub fn give_socket(&mut self) -> Option<i32> {
        self.theirs.take().map(IntoRawFd::into_raw_fd)
    }

    /// Number of the scratch memory's descriptor, which stays this one's.
    pub fn scratch_number(&self) -> i32 {
        self.scratch.as_raw_fd()
    }

    /// The worker runs as child `process`.
    pub fn set_process(&mut self, process: i32) {
        self.process = Pid::from_raw(process);
    }

    /// Another handle of the same socket, to end a request from outside.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn breaker(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Longest time that a request may take; `None`: any.
    pub fn limit(&mut self, time: Option<Duration>) {
        self.limit = time;
    }

    /// Decodes sample `index` into `room` bytes at `offset` of the cache; `None`: into the scratch memory. `epoch`: for a data set
    /// that is not cached.
    ///
    /// # Errors
    /// The worker is gone, or late.
    pub fn decode(&mut self, epoch: Option<u64>, index: u64, place: Option<(u64, usize)>) -> io::Result<Answer> {
        let (offset, room) = place.map_or((SCRATCH, u64::MAX), |(offset, room)| (offset, room as u64));
        self.socket.write_all(&head(DECODE, [epoch.unwrap_or(u64::MAX), index, offset, room]))?;
        self.answer()
    }

    /// Writes the sample that waits to `offset` of the cache; `None`: into the scratch memory.
    ///
    /// # Errors
    /// As [`Lane::decode`].
    pub fn place(&mut self, offset: Option<u64>) -> io::Result<Answer> {
        self.socket.write_all(&head(PLACE, [0, 0, offset.unwrap_or(SCRATCH), 0]))?;
        self.answer()
    }

    /// Makes a batch of samples in the scratch memory.
    ///
    /// # Errors
    /// As [`Lane::decode`].
    pub fn build(&mut self, epoch: u64, samples: &[(u64, Source)]) -> io::Result<Answer> {
        let mut request = head(BUILD, [epoch, samples.len() as u64, 0, 0]).to_vec();
        let mut put = |value: u64| request.extend_from_slice(&value.to_le_bytes());
        for (index, source) in samples {
            let (kind, offset, bytes) = match source {
                Source::Cache { offset, bytes } => (0, *offset, *bytes),
                Source::Inline(bytes) => (1, 0, bytes.len()),
                Source::Decode => (2, 0, 0),
            };
            [*index, kind, offset, bytes as u64].into_iter().for_each(&mut put);
        }
        self.socket.write_all(&request)?;
        for (_, source) in samples {
            if let Source::Inline(bytes) = source {
                self.socket.write_all(bytes)?;
            }
        }
        self.answer()
    }

    /// Reads what the worker wrote into its scratch memory.
    ///
    /// # Errors
    /// It is shorter than `out`.
    pub fn read_scratch(&self, out: &mut [u8]) -> io::Result<()> {
        self.scratch.read_exact_at(out, 0)
    }

    /// Reads all of `out`. A worker that ended is noticed even where another process has its end of the socket, by a fork at
    /// the wrong moment.
    fn receive(&mut self, mut out: &mut [u8], since: Instant) -> io::Result<()> {
        while !out.is_empty() {
            match self.socket.read(out) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => out = &mut out[bytes..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if self.limit.is_some_and(|limit| since.elapsed() >= limit) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    if self.process.is_some_and(launcher::supervise::has_ended) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> io::Result<Answer> {
        let (mut head, since) = ([0; 9], Instant::now());
        self.receive(&mut head, since)?;
        let [outcome, number @ ..] = head;
        let odd = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let number = usize::try_from(u64::from_le_bytes(number)).map_err(|e| odd(e.to_string()))?;
        match outcome {
            0 => Ok(Answer::Done(number)),
            1 => Ok(Answer::Long(number)),
            2 => {
                let mut text = vec![0; number.min(64 << 20)];
                self.receive(&mut text, since)?;
                Ok(Answer::Failed(text))
            }
            other => Err(odd(format!(
                "a decode worker answered {other}: something in it writes to the descriptors of others"
            ))),
        }
    }
}

/// The beginning of a request.
fn head(kind: u8, values: [u64; 4]) -> [u8; 33] {
    let mut head = [kind; 33];
    for (place, value) in head[1..].as_chunks_mut::<8>().0.iter_mut().zip(values) {
        *place = value.to_le_bytes();
    }
    head
}
