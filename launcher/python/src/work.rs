//! Batches under way: which sample is to be read next, and which batch is to be made. Pure state.

use crate::batch::Made;
use crate::failure::Failure;
use cache::client::Taken;
use std::collections::VecDeque;

/// Most samples that a thread claims at once: few, so that all threads share the first batch.
const MOST_CLAIMED: usize = 8;

/// A sample of a batch.
pub enum Sample {
    Stored(Taken),
    /// There was no room for it.
    Own(Vec<u8>),
    /// Whoever makes the batch decodes it.
    Absent,
}

/// Samples to read.
pub struct Read {
    sequence: u64,
    first: usize,
    pub epoch: u64,
    pub ids: Vec<u64>,
    pub next_uses: Vec<u64>,
}

/// A batch to make of samples that are there.
pub struct Build {
    pub sequence: u64,
    pub epoch: u64,
    pub ids: Vec<u64>,
    pub samples: Vec<Sample>,
}

pub enum Work {
    Read(Read),
    Build(Build),
}

/// A batch that is done, well or with an error.
pub struct Done {
    /// Its samples that were announced to the cache.
    pub announced: Vec<u64>,
    pub result: Result<Made, Failure>,
}

struct Flight {
    sequence: u64,
    epoch: u64,
    ids: Vec<u64>,
    next_uses: Vec<u64>,
    announced: bool,
    claimed: usize,
    read: usize,
    samples: Vec<Option<Sample>>,
    building: bool,
    /// The failure of the first sample in order that has one: later ones were claimed later.
    error: Option<(usize, Failure)>,
    made: Option<Made>,
}

impl Flight {
    fn announced(self) -> Vec<u64> {
        if self.announced { self.ids } else { Vec::new() }
    }

    fn is_done(&self) -> bool {
        self.made.is_some() || (self.error.is_some() && self.read == self.claimed && !self.is_out())
    }

    /// A thread makes the batch.
    fn is_out(&self) -> bool {
        self.building && self.made.is_none() && self.error.is_none()
    }
}

/// All batches under way, in order.
pub struct Flights {
    flights: VecDeque<Flight>,
    threads: usize,
    next_sequence: u64,
    closing: bool,
    wakes: u64,
}

impl Flights {
    pub fn new(threads: usize) -> Self {
        Self { flights: VecDeque::new(), threads: threads.max(1), next_sequence: 0, closing: false, wakes: 0 }
    }

    pub fn push(&mut self, epoch: u64, ids: Vec<u64>, next_uses: Vec<u64>, announced: bool) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let samples = ids.iter().map(|_| None).collect();
        self.flights.push_back(Flight {
            sequence,
            epoch,
            ids,
            next_uses,
            announced,
            claimed: 0,
            read: 0,
            samples,
            building: false,
            error: None,
            made: None,
        });
    }

    /// The next piece of work, of the earliest batch that has one.
    pub fn take(&mut self) -> Option<Work> {
        let threads = self.threads;
        self.flights.iter_mut().filter(|flight| flight.error.is_none()).find_map(|flight| claim(flight, threads))
    }

    /// Samples came back, in order; fewer than were claimed after a failure.
    pub fn was_read(&mut self, read: Read, samples: Vec<Result<Sample, Failure>>) {
        let Some(flight) = self.flights.iter_mut().find(|flight| flight.sequence == read.sequence) else { return };
        flight.read += read.ids.len();
        for (place, sample) in (read.first..).zip(samples) {
            match sample {
                Ok(sample) => flight.samples[place] = Some(sample),
                Err(failure) if flight.error.as_ref().is_none_or(|(at, _)| place < *at) => {
                    flight.error = Some((place, failure));
                }
                Err(_) => {}
            }
        }
    }

    pub fn was_built(&mut self, sequence: u64, result: Result<Made, Failure>) {
        let Some(flight) = self.flights.iter_mut().find(|flight| flight.sequence == sequence) else { return };
        match result {
            Ok(made) => flight.made = Some(made),
            Err(failure) => flight.error = Some((0, failure)),
        }
    }

    pub fn front_is_done(&self) -> bool {
        self.flights.front().is_some_and(Flight::is_done)
    }

    pub fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// The first batch, if it is done.
    pub fn pop_done(&mut self) -> Option<Done> {
        if !self.front_is_done() {
            return None;
        }
        let mut flight = self.flights.pop_front()?;
        let result = match (flight.made.take(), flight.error.take()) {
            (Some(made), _) => Ok(made),
            (None, Some((_, failure))) => Err(failure),
            (None, None) => Err(Failure::Closed),
        };
        Some(Done { announced: flight.announced(), result })
    }

    /// Forgets all batches; returns the announced samples of each.
    pub fn cancel(&mut self) -> Vec<Vec<u64>> {
        self.flights.drain(..).map(Flight::announced).collect()
    }

    pub fn close(&mut self) {
        self.closing = true;
    }

    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// There are entries to fill ahead of need.
    pub fn wake(&mut self) {
        self.wakes += 1;
    }

    pub fn wakes(&self) -> u64 {
        self.wakes
    }
}

fn claim(flight: &mut Flight, threads: usize) -> Option<Work> {
    let len = flight.ids.len();
    if flight.claimed < len {
        let share = len.div_ceil(2 * threads).clamp(1, MOST_CLAIMED);
        let (first, end) = (flight.claimed, (flight.claimed + share).min(len));
        flight.claimed = end;
        let (ids, next_uses) = (flight.ids[first..end].to_vec(), flight.next_uses[first..end].to_vec());
        let (sequence, epoch) = (flight.sequence, flight.epoch);
        return Some(Work::Read(Read { sequence, first, epoch, ids, next_uses }));
    }
    if flight.read < len || flight.building {
        return None;
    }
    flight.building = true;
    let samples: Vec<Sample> = flight.samples.iter_mut().filter_map(Option::take).collect();
    if samples.len() < len {
        flight.error = Some((0, Failure::Closed));
        return None;
    }
    let (sequence, epoch, ids) = (flight.sequence, flight.epoch, flight.ids.clone());
    Some(Work::Build(Build { sequence, epoch, ids, samples }))
}
