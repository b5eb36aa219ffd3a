//! Decode workers as loader threads see them: a socket, and scratch memory in which samples lie.

use super::host::{Host, UserError, WorkerEnds};
use crate::data::DataError;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Most bytes of an error's text that are read.
const LONGEST_TEXT: u64 = 1 << 20;

/// Work of a decode worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// How samples of the split are laid out, as JSON.
    Describe = 0,
    /// `dataset[i]`.
    Decode = 1,
    /// The transform of the sample in the scratch memory.
    Use = 2,
    /// `dataset[i]`, then the transform.
    Read = 3,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub work: Work,
    pub split: u64,
    pub index: u64,
    pub epoch: u64,
}

/// Why a request failed.
enum Stumble {
    User(String),
    /// The worker is gone.
    Worker(io::Error),
}

/// One worker.
pub struct Lane {
    socket: UnixStream,
    scratch: File,
    process: i32,
}

impl Lane {
    fn new(ends: WorkerEnds) -> Self {
        Self { socket: ends.socket, scratch: ends.scratch, process: ends.process }
    }

    /// Bytes of the answer, which lie in the scratch memory.
    fn ask(&mut self, request: &Request, sample: &[u8]) -> Result<usize, Stumble> {
        let failed = Stumble::Worker;
        if !sample.is_empty() {
            self.scratch.write_all_at(sample, 0).map_err(failed)?;
        }
        let Request { work, split, index, epoch } = *request;
        let numbers = [work as u64, split, index, epoch, sample.len() as u64];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.socket.write_all(&bytes).map_err(failed)?;
        let mut answer = [[0; 8]; 2];
        self.socket.read_exact(answer.as_flattened_mut()).map_err(failed)?;
        let [outcome, length] = answer.map(u64::from_le_bytes);
        if outcome == 0 {
            return usize::try_from(length).map_err(|_| failed(io::ErrorKind::InvalidData.into()));
        }
        let mut text = Vec::new();
        (&mut self.socket).take(length.min(LONGEST_TEXT)).read_to_end(&mut text).map_err(failed)?;
        Err(Stumble::User(String::from_utf8_lossy(&text).into_owned()))
    }
}

/// The workers of a rank. A thread has one for itself while it decodes.
pub struct Lanes {
    host: &'static dyn Host,
    state: Mutex<State>,
    free: Condvar,
    /// Most workers; `None`: as many as there are threads that decode at once.
    most: Option<usize>,
}

#[derive(Default)]
struct State {
    idle: Vec<Lane>,
    made: usize,
}

impl Lanes {
    pub fn new(host: &'static dyn Host, most: Option<usize>) -> Arc<Self> {
        Arc::new(Self { host, state: Mutex::default(), free: Condvar::new(), most })
    }

    /// Has a worker do `request`; `take` gets the bytes of its answer: their number, and a reader of the first of them.
    ///
    /// A worker that died is replaced, and asked again once.
    ///
    /// # Errors
    /// The user's code failed, or the request ended two workers.
    pub fn ask<T>(
        &self,
        request: &Request,
        sample: &[u8],
        take: impl FnOnce(usize, &dyn Fn(&mut [u8]) -> io::Result<()>) -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        let mut lane = self.take()?;
        let mut again = false;
        let bytes = loop {
            match lane.ask(request, sample) {
                Ok(bytes) => break bytes,
                Err(Stumble::User(text)) => {
                    self.give(lane);
                    return Err(DataError::User(text));
                }
                Err(Stumble::Worker(error)) => {
                    let old = lane.process;
                    let ends = self.host.worker(Some(old)).map_err(|failed| self.lost(failed))?;
                    let end = format!("decode worker (pid {old}) {} at sample {}", ends.end, request.index);
                    lane = Lane::new(ends);
                    if again {
                        self.give(lane);
                        return Err(DataError::User(format!(
                            "sample {} ended two decode workers: the last {end} ({error}). Look at what dataset[{0}] does",
                            request.index
                        )));
                    }
                    tracing::warn!("{end}; another one takes its place");
                    again = true;
                }
            }
        };
        let result = take(bytes, &|into: &mut [u8]| lane.scratch.read_exact_at(into, 0));
        self.give(lane);
        result
    }

    /// A worker's place is free again, and stays without a worker.
    fn lost(&self, failed: UserError) -> DataError {
        self.lock().made -= 1;
        self.free.notify_one();
        failed.into()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<Lane, DataError> {
        let mut state = self.lock();
        loop {
            if let Some(lane) = state.idle.pop() {
                return Ok(lane);
            }
            if self.most.is_none_or(|most| state.made < most) {
                state.made += 1;
                drop(state);
                return self.host.worker(None).map(Lane::new).map_err(|failed| self.lost(failed));
            }
            state = self.free.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give(&self, lane: Lane) {
        self.lock().idle.push(lane);
        self.free.notify_one();
    }
}
