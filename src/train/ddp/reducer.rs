//! Counts ready gradients and reduces full buckets, in bucket order on every rank.

use super::DdpError;
use super::bucket::Bucket;
use crate::comm::{Collective, CommError};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tch::Tensor;

/// Where a step stands. Behind a mutex: hooks run on autograd's threads.
struct Progress {
    sync: bool,
    buckets: Vec<Bucket>,
    /// Bucket of each parameter.
    bucket_of: Vec<usize>,
    /// Gradients that each bucket still waits for.
    waiting: Vec<usize>,
    is_ready: Vec<bool>,
    ready_order: Vec<usize>,
    /// Buckets given out for reduction, from the first.
    launched: usize,
    /// A parameter whose gradient came too late.
    late: Option<usize>,
    lane: Lane,
    error: Option<CommError>,
}

/// Who reduces: the hook itself, or a thread.
enum Lane {
    Inline { collective: Arc<dyn Collective>, grads: Tensor },
    Thread(Sender<(usize, usize)>),
}

/// A hook's handle.
pub(super) struct Signal(Arc<Mutex<Progress>>);

pub(super) struct Reducer {
    progress: Arc<Mutex<Progress>>,
    collective: Arc<dyn Collective>,
    grads: Tensor,
    /// Elements behind the last bucket that are reduced with it.
    tail: usize,
    /// One result per range sent to the thread.
    results: Option<Receiver<Result<(), CommError>>>,
    collected: usize,
    thread: Option<JoinHandle<()>>,
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    // A hook that panicked left at most one gradient uncounted; `finish` reduces its bucket all the same.
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reducer {
    pub fn new(
        collective: Arc<dyn Collective>,
        (grads, tail): (&Tensor, usize),
        buckets: Vec<Bucket>,
        overlap: bool,
    ) -> Result<Reducer, DdpError> {
        let (lane, results, thread) = if overlap && collective.world_size() > 1 {
            let (send, ranges) = channel();
            let (done, results) = channel();
            let (comm, grads) = (collective.clone(), grads.shallow_clone());
            let thread = std::thread::Builder::new()
                .name("ddp".to_owned())
                .spawn(move || serve(&*comm, &grads, &ranges, &done))
                .map_err(|e| DdpError::Usage(format!("starting the communication thread: {e}")))?;
            (Lane::Thread(send), Some(results), Some(thread))
        } else {
            (Lane::Inline { collective: collective.clone(), grads: grads.shallow_clone() }, None, None)
        };
        let mut progress = Progress {
            sync: false,
            buckets: Vec::new(),
            bucket_of: Vec::new(),
            waiting: Vec::new(),
            is_ready: Vec::new(),
            ready_order: Vec::new(),
            launched: 0,
            late: None,
            lane,
            error: None,
        };
        progress.set_buckets(buckets);
        let progress = Arc::new(Mutex::new(progress));
        Ok(Reducer { progress, collective, grads: grads.shallow_clone(), tail, results, collected: 0, thread })
    }

    pub fn signal(&self) -> Signal {
        Signal(self.progress.clone())
    }

    pub fn set_sync(&mut self, sync: bool) {
        lock(&self.progress).sync = sync;
    }

    pub fn ready_order(&self) -> Vec<usize> {
        lock(&self.progress).ready_order.clone()
    }

    pub fn replace_buckets(&mut self, buckets: Vec<Bucket>) -> Result<(), DdpError> {
        self.drain()?;
        self.collected = 0;
        lock(&self.progress).set_buckets(buckets);
        Ok(())
    }

    /// Reduces what is left, the last bucket with its votes included, and waits for all. Names a late parameter.
    pub fn finish(&mut self) -> Result<Option<usize>, DdpError> {
        let last = {
            let mut progress = lock(&self.progress);
            progress.sync = false;
            let last = progress.buckets.len() - 1;
            progress.launch_up_to(last);
            progress.launched = last + 1;
            let bucket = &progress.buckets[last];
            (bucket.start, bucket.len + self.tail)
        };
        self.drain()?;
        // On this thread: there is nothing left to overlap with. The votes are sums that must not lose digits.
        let (start, len) = last;
        if self.collective.narrows() {
            reduce(&*self.collective, &self.grads, (start, len - self.tail))?;
            let votes = self.grads.f_narrow(0, (start + len - self.tail) as i64, self.tail as i64)?;
            self.collective.start_all_reduce(&votes, true)?;
        } else {
            reduce(&*self.collective, &self.grads, last)?;
        }
        self.collective.join()?;
        Ok(lock(&self.progress).late)
    }

    /// Forgets the step.
    pub fn reset(&mut self) -> Result<(), DdpError> {
        self.drain()?;
        self.collected = 0;
        lock(&self.progress).start_step();
        Ok(())
    }

    /// Waits for the thread to have done all that it was given.
    fn drain(&mut self) -> Result<(), DdpError> {
        let mut progress = lock(&self.progress);
        if let Some(error) = progress.error.take() {
            return Err(error.into());
        }
        let Some(results) = &self.results else { return Ok(()) };
        let given = progress.launched.min(progress.buckets.len() - 1);
        drop(progress);
        while self.collected < given {
            self.collected += 1;
            results.recv().map_err(|_| DdpError::Usage("the communication thread ended".to_owned()))??;
        }
        Ok(())
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        let mut progress = lock(&self.progress);
        // The thread's loop ends with the sender.
        progress.lane = Lane::Inline { collective: self.collective.clone(), grads: self.grads.shallow_clone() };
        drop(progress);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Signal {
    /// Parameter `index` has its gradient.
    pub fn ready(&self, index: usize) {
        lock(&self.0).ready(index);
    }
}

impl Progress {
    fn set_buckets(&mut self, buckets: Vec<Bucket>) {
        self.bucket_of = vec![0; buckets.iter().map(|bucket| bucket.members.len()).sum()];
        for (number, bucket) in buckets.iter().enumerate() {
            bucket.members.iter().for_each(|&index| self.bucket_of[index] = number);
        }
        self.buckets = buckets;
        self.start_step();
    }

    fn start_step(&mut self) {
        self.waiting = self.buckets.iter().map(|bucket| bucket.members.len()).collect();
        self.is_ready = vec![false; self.bucket_of.len()];
        self.ready_order.clear();
        self.launched = 0;
        self.late = None;
        self.sync = false;
    }

    fn ready(&mut self, index: usize) {
        let number = self.bucket_of[index];
        if number < self.launched {
            self.late.get_or_insert(index);
            return;
        }
        if !self.sync || std::mem::replace(&mut self.is_ready[index], true) {
            return;
        }
        self.ready_order.push(index);
        self.waiting[number] -= 1;
        // The last bucket waits for `finish`: the votes behind it may still change.
        let last = self.buckets.len() - 1;
        let full = self.waiting[..last].iter().take_while(|&&n| n == 0).count();
        self.launch_up_to(full);
    }

    /// Gives out the buckets before `end` that are not yet given out.
    fn launch_up_to(&mut self, end: usize) {
        while self.launched < end {
            let range = (self.buckets[self.launched].start, self.buckets[self.launched].len);
            match &self.lane {
                // The receiver outlives all senders but for a panic, which `drain` then sees.
                Lane::Thread(send) => drop(send.send(range)),
                Lane::Inline { collective, grads } if self.error.is_none() => {
                    self.error = reduce(&**collective, grads, range).err();
                }
                Lane::Inline { .. } => {}
            }
            self.launched += 1;
        }
    }
}

fn serve(
    collective: &dyn Collective,
    grads: &Tensor,
    ranges: &Receiver<(usize, usize)>,
    done: &Sender<Result<(), CommError>>,
) {
    for range in ranges {
        if done.send(reduce(collective, grads, range)).is_err() {
            return;
        }
    }
}

fn reduce(collective: &dyn Collective, grads: &Tensor, (start, len): (usize, usize)) -> Result<(), CommError> {
    let view = grads.f_narrow(0, start as i64, len as i64);
    collective.start_all_reduce(&view.map_err(|e| CommError::torch(format!("bucket at {start}"), e))?, false)
}
