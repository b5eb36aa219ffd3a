//! The loader's threads: each serves one decode worker, reads samples through the cache and makes batches, without Python.
//!
//! ```text
//! push ─► flights ─► threads: samples of the earliest batch first ─► batch, in order ─► next
//!                      │  cache: stored, or read from disk or decoded by this thread's worker into the room that was granted
//!                      └─ with nothing to read: entries granted ahead of need
//! ```
//! What a batch holds depends on its samples alone, never on threads or on what was stored.

use crate::batch::{Form, Made, collate};
use crate::buffer::Pool;
use crate::disk::Disk;
use crate::entry::{Entry, EntryError, INDEX_BITS};
use crate::failure::Failure;
use crate::lane::{Answer, Lane, Source};
use crate::native::{Memory, Native};
use crate::sizes::Sizes;
use crate::work::{Build, Flights, Read, Sample, Work};
use cache::client::{CacheClient, CacheError, Filling, Item, Wake};
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// Longest time that the consumer waits before it looks for signals.
const SLICE: Duration = Duration::from_millis(100);
/// Workers that may end by themselves in [`RESTART_TIME`].
const MOST_RESTARTS: usize = 20;
const RESTART_TIME: Duration = Duration::from_secs(60);

/// Starts workers anew.
pub trait Respawn: Send + Sync {
    /// A worker in the place of number `lane`, and how the old one ended.
    ///
    /// # Errors
    /// It cannot be started.
    fn respawn(&self, lane: usize, late: bool) -> Result<(Lane, String), String>;
    fn note(&self, text: &str);
}

/// Settings of a loader: the data that it reads, and how.
pub struct Plan {
    /// `None`: nothing is cached.
    pub client: Option<Arc<CacheClient>>,
    /// Key of sample 0.
    pub base: u64,
    /// The data set's number in every entry.
    pub tag: u64,
    /// Makes samples without a worker, past the cache of samples.
    pub files: Option<Arc<dyn Native>>,
    /// Decoded samples in a file.
    pub disk: Option<Arc<Disk>>,
    /// Workers make batches of samples: there is a transform, or a user's way to collate.
    pub build: bool,
    /// Samples are not stacked.
    pub apart: bool,
    pub timeout: Option<Duration>,
    /// Batches at once, for the memory that is kept.
    pub batches: usize,
}

impl Plan {
    fn keys(&self) -> RangeInclusive<u64> {
        self.base..=self.base | INDEX_MASK
    }
}

/// State shared by consumer and threads.
pub struct Shared {
    plan: Plan,
    pool: Arc<Pool>,
    flights: Mutex<Flights>,
    work: Condvar,
    ready: Condvar,
    sizes: Sizes,
    /// The directory is gone: nothing is cached any more.
    lost: AtomicBool,
    pub decodes: AtomicU64,
    respawn: Box<dyn Respawn>,
    restarts: Mutex<Vec<Instant>>,
    /// Ends of the workers' sockets, to end requests at closing.
    breakers: Mutex<Vec<Option<std::os::unix::net::UnixStream>>>,
}

/// A running loader.
pub struct Engine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// State that the consumer finds.
pub enum Next {
    Batch(Made),
    Failed(Failure),
    /// No batch was asked for.
    End,
    /// Nothing yet: look for signals, and ask again.
    Wait,
}

impl Engine {
    /// Starts `threads` threads, each with a worker while there are any.
    ///
    /// # Errors
    /// A thread does not start.
    pub fn start(plan: Plan, threads: usize, lanes: Vec<Lane>, respawn: Box<dyn Respawn>) -> io::Result<Self> {
        let threads = threads.max(lanes.len());
        let pool = Pool::new(plan.batches + 2);
        let shared = Arc::new(Shared {
            pool,
            flights: Mutex::new(Flights::new(threads)),
            work: Condvar::new(),
            ready: Condvar::new(),
            sizes: Sizes::default(),
            lost: AtomicBool::new(false),
            decodes: AtomicU64::new(0),
            respawn,
            restarts: Mutex::default(),
            breakers: Mutex::new(lanes.iter().map(|lane| lane.breaker().ok()).collect()),
            plan,
        });
        if let Some(client) = &shared.plan.client {
            let waker: Arc<dyn Wake> = shared.clone();
            client.wake_by(Arc::downgrade(&waker));
        }
        let mut engine = Self { shared, threads: Vec::new() };
        let mut lanes = lanes.into_iter();
        for number in 0..threads {
            let mut lane = lanes.next();
            lane.iter_mut().for_each(|lane| lane.limit(engine.shared.plan.timeout));
            let shared = Arc::clone(&engine.shared);
            let serve = move || Thread { shared: &shared, number, lane, memory: Memory::default() }.serve();
            let thread = std::thread::Builder::new().name(format!("hr-data-{number}")).stack_size(512 << 10);
            engine.threads.push(thread.spawn(serve)?);
        }
        Ok(engine)
    }

    /// One more batch, after those asked for before.
    pub fn push(&self, epoch: u64, ids: Vec<u64>, next_uses: Vec<u64>) {
        let shared = &self.shared;
        let client = shared.client();
        if let Some(client) = client {
            client.announce_open(&shared.items(&ids, &next_uses));
        }
        shared.lock().push(epoch, ids, next_uses, client.is_some());
        shared.work.notify_all();
    }

    /// The next batch in order.
    pub fn next(&self) -> Next {
        let shared = &self.shared;
        let mut flights = shared.lock();
        if !flights.front_is_done() && !flights.is_empty() {
            flights = shared.ready.wait_timeout(flights, SLICE).unwrap_or_else(PoisonError::into_inner).0;
        }
        let Some(done) = flights.pop_done() else {
            return if flights.is_empty() { Next::End } else { Next::Wait };
        };
        drop(flights);
        shared.retire(&done.announced);
        match done.result {
            Ok(made) => Next::Batch(made),
            Err(failure) => Next::Failed(failure),
        }
    }

    /// Forgets every batch that was asked for.
    pub fn cancel(&self) {
        let ended = self.shared.lock().cancel();
        ended.iter().for_each(|ids| self.shared.retire(ids));
    }

    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Ends the threads and waits for them.
    pub fn close(&mut self) {
        self.cancel();
        self.shared.lock().close();
        self.shared.work.notify_all();
        for breaker in self.shared.breakers.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            let _ = breaker.shutdown(std::net::Shutdown::Both);
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.lock().wake();
        self.work.notify_all();
    }
}

impl Shared {
    /// Nothing under this lock panics half-way through an update.
    fn lock(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cache, while there is one.
    fn client(&self) -> Option<&Arc<CacheClient>> {
        self.plan.client.as_ref().filter(|_| !self.lost.load(Ordering::Relaxed))
    }

    fn items(&self, ids: &[u64], next_uses: &[u64]) -> Vec<Item> {
        let bytes = self.sizes.guess();
        let item = |(id, next_use): (&u64, &u64)| Item {
            key: self.plan.base | (id & INDEX_MASK),
            bytes,
            next_use: *next_use,
            offer: false,
        };
        ids.iter().zip(next_uses).map(item).collect()
    }

    fn retire(&self, ids: &[u64]) {
        if let Some(client) = &self.plan.client {
            client.retire(ids.iter().map(|id| self.plan.base | (id & INDEX_MASK)));
        }
    }

    /// Once: samples are decoded for every use from now on.
    fn lose(&self, why: &str) {
        if !self.lost.swap(true, Ordering::Relaxed) && !self.lock().is_closing() {
            self.respawn.note(&format!("{why}; samples are decoded for every use from now on"));
        }
    }

    fn may_restart(&self) -> bool {
        let mut restarts = self.restarts.lock().unwrap_or_else(PoisonError::into_inner);
        restarts.retain(|at| at.elapsed() < RESTART_TIME);
        restarts.push(Instant::now());
        restarts.len() <= MOST_RESTARTS
    }
}

/// A failure, or the end of the worker.
enum Stumble {
    Failure(Failure),
    Worker(io::Error),
}

impl<F: Into<Failure>> From<F> for Stumble {
    fn from(failure: F) -> Self {
        Stumble::Failure(failure.into())
    }
}

/// One thread, with its worker where it has one.
struct Thread<'a> {
    shared: &'a Arc<Shared>,
    number: usize,
    lane: Option<Lane>,
    memory: Memory,
}

impl Thread<'_> {
    fn serve(mut self) {
        let mut seen = 0;
        loop {
            let mut flights = self.shared.lock();
            let work = loop {
                if flights.is_closing() {
                    return;
                }
                if let Some(work) = flights.take() {
                    break work;
                }
                let wakes = flights.wakes();
                if seen != wakes {
                    drop(flights);
                    if !self.work_ahead() {
                        seen = wakes;
                    }
                    flights = self.shared.lock();
                    continue;
                }
                flights = self.shared.work.wait(flights).unwrap_or_else(PoisonError::into_inner);
            };
            drop(flights);
            match work {
                Work::Read(read) => self.read(read),
                Work::Build(build) => self.build(build),
            }
        }
    }

    fn work_ahead(&mut self) -> bool {
        let Some(client) = self.shared.client().cloned() else { return false };
        let keys = self.shared.plan.keys();
        client.work_ahead_open::<Failure>(keys, &mut |filling| self.fill(filling, None))
    }

    fn read(&mut self, read: Read) {
        let mut samples = Vec::with_capacity(read.ids.len());
        for (id, next_use) in read.ids.iter().zip(&read.next_uses) {
            let sample = self.sample(read.epoch, *id, *next_use);
            let failed = sample.is_err();
            samples.push(sample);
            if failed || self.shared.lock().is_closing() {
                break;
            }
        }
        self.shared.lock().was_read(read, samples);
        // The batch may be made now, or has failed.
        self.shared.work.notify_all();
        self.shared.ready.notify_all();
    }

    /// The worker, for the user's own code.
    fn lane(&mut self) -> Result<&mut Lane, Stumble> {
        let missing = || Failure::Worker("there is no worker for the user's code: report this".into()).into();
        self.lane.as_mut().ok_or_else(missing)
    }

    fn sample(&mut self, epoch: u64, id: u64, next_use: u64) -> Result<Sample, Failure> {
        if let Some(files) = &self.shared.plan.files {
            self.shared.decodes.fetch_add(1, Ordering::Relaxed);
            return files.sample(id, &mut self.memory).map(Sample::Own);
        }
        let (mut spare, own) = (None, self.shared.plan.base | (id & INDEX_MASK));
        if let Some(client) = self.shared.client().cloned() {
            let want = Item { key: own, bytes: self.shared.sizes.guess(), next_use, offer: false };
            let keys = self.shared.plan.keys();
            let mut fill = |filling: &mut Filling| {
                let mine = filling.key() == own;
                self.fill(filling, mine.then_some(&mut spare))
            };
            match client.open::<Failure>(want, false, keys, &mut fill) {
                Ok(Some(taken)) => {
                    Entry::parse(&taken, self.shared.plan.tag)?;
                    return Ok(Sample::Stored(taken));
                }
                Ok(None) => {}
                Err(Failure::Cache(error @ (CacheError::Lost(_) | CacheError::Silent { .. }))) => {
                    self.shared.lose(&error.to_string());
                }
                Err(failure) => return Err(failure),
            }
        }
        match spare {
            Some(bytes) => Ok(Sample::Own(bytes)),
            None if self.shared.plan.build && self.shared.plan.disk.is_none() => Ok(Sample::Absent),
            None => self.alone(epoch, id).map(Sample::Own),
        }
    }

    /// Decodes an entry into its room. One that finds no room is left in `spare`.
    fn fill(&mut self, filling: &mut Filling, mut spare: Option<&mut Option<Vec<u8>>>) -> Result<(), Failure> {
        let index = filling.key() & INDEX_MASK;
        if self.fill_from_disk(index, filling, spare.as_deref_mut())? {
            return Ok(());
        }
        self.twice(index, |thread| thread.fill_once(index, filling, spare.as_deref_mut()))
    }

    /// Reads an entry from disk into its room. False: it has to be decoded.
    fn fill_from_disk(
        &self,
        index: u64,
        filling: &mut Filling,
        spare: Option<&mut Option<Vec<u8>>>,
    ) -> Result<bool, Failure> {
        let Some(disk) = &self.shared.plan.disk else { return Ok(false) };
        let Some((offset, bytes)) = disk.find(index) else { return Ok(false) };
        self.shared.sizes.saw(bytes);
        if bytes > filling.room() && !filling.enlarge(bytes)? {
            if let Some(spare) = spare {
                *spare = disk.get(index);
            }
            return Ok(true);
        }
        let read = disk.read(index, offset, &mut filling.bytes_mut()[..bytes]);
        if read {
            filling.set_length(bytes);
        }
        Ok(read)
    }

    /// Writes a decoded entry to disk, where that is worth it. `has_room`: it was stored.
    fn keep(&self, index: u64, entry: &[u8], has_room: bool) {
        let Some(disk) = &self.shared.plan.disk else { return };
        let client = self.shared.client().filter(|_| has_room);
        if disk.wants(entry.len(), client.map(Arc::as_ref))
            && let Some(note) = disk.put(index, entry)
        {
            self.shared.respawn.note(&note);
        }
    }

    fn fill_once(
        &mut self,
        index: u64,
        filling: &mut Filling,
        spare: Option<&mut Option<Vec<u8>>>,
    ) -> Result<(), Stumble> {
        let place = (filling.offset(), filling.room());
        self.shared.decodes.fetch_add(1, Ordering::Relaxed);
        match self.lane()?.decode(None, index, Some(place)).map_err(Stumble::Worker)? {
            Answer::Done(bytes) => {
                self.shared.sizes.saw(bytes);
                filling.set_length(bytes);
                self.keep(index, filling.bytes_mut().get(..bytes).unwrap_or_default(), true);
            }
            Answer::Long(bytes) => {
                self.shared.sizes.saw(bytes);
                if filling.enlarge(bytes)? {
                    let answer = self.lane()?.place(Some(filling.offset())).map_err(Stumble::Worker)?;
                    let bytes = done(answer)?;
                    filling.set_length(bytes);
                    self.keep(index, filling.bytes_mut().get(..bytes).unwrap_or_default(), true);
                } else if let Some(spare) = spare {
                    let answer = self.lane()?.place(None).map_err(Stumble::Worker)?;
                    let entry = self.scratch(done(answer)?)?;
                    self.keep(index, &entry, false);
                    *spare = Some(entry);
                }
            }
            Answer::Failed(error) => return Err(Failure::User(error).into()),
        }
        Ok(())
    }

    /// Decodes a sample past the cache.
    fn alone(&mut self, epoch: u64, index: u64) -> Result<Vec<u8>, Failure> {
        if let Some(entry) = self.shared.plan.disk.as_ref().and_then(|disk| disk.get(index)) {
            return Ok(entry);
        }
        // What is cached is the same in every epoch.
        let epoch = self.shared.plan.client.is_none().then_some(epoch);
        self.twice(index, |thread| {
            thread.shared.decodes.fetch_add(1, Ordering::Relaxed);
            let answer = thread.lane()?.decode(epoch, index, None).map_err(Stumble::Worker)?;
            let bytes = thread.scratch(done(answer)?)?;
            Entry::parse(&bytes, thread.shared.plan.tag).map_err(Failure::from)?;
            thread.keep(index, &bytes, false);
            Ok(bytes)
        })
    }

    fn scratch(&self, bytes: usize) -> Result<Vec<u8>, Failure> {
        let mut out = vec![0; bytes];
        if let Some(lane) = &self.lane {
            lane.read_scratch(&mut out).map_err(Failure::Scratch)?;
        }
        Ok(out)
    }

    /// Asks the worker, and a new one where it died. A sample that ends two of them is an error.
    fn twice<T>(&mut self, index: u64, mut ask: impl FnMut(&mut Self) -> Result<T, Stumble>) -> Result<T, Failure> {
        let mut again = false;
        loop {
            let error = match ask(self) {
                Ok(value) => return Ok(value),
                Err(Stumble::Failure(failure)) => return Err(failure),
                Err(Stumble::Worker(error)) => error,
            };
            let end = self.renew(index, &error)?;
            if again {
                return Err(Failure::Worker(format!(
                    "sample {index} ended two decode workers: {end}. Look at what dataset[{index}] does"
                )));
            }
            again = true;
            self.shared.respawn.note(&format!("{end} at sample {index}; another one takes its place"));
        }
    }

    /// A new worker; says how the old one ended.
    fn renew(&mut self, index: u64, error: &io::Error) -> Result<String, Failure> {
        if self.shared.lock().is_closing() {
            return Err(Failure::Closed);
        }
        let late = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        if !self.shared.may_restart() {
            return Err(Failure::Worker(format!(
                "{MOST_RESTARTS} decode workers ended within {} s, the last one at sample {index}: see the lines before",
                RESTART_TIME.as_secs()
            )));
        }
        let (mut lane, end) = self.shared.respawn.respawn(self.number, late).map_err(Failure::Worker)?;
        if late {
            let limit = self.shared.plan.timeout.unwrap_or_default().as_secs_f64();
            return Err(Failure::Worker(format!("{end}: it took longer than timeout={limit} s for sample {index}")));
        }
        lane.limit(self.shared.plan.timeout);
        let breaker = lane.breaker().map_err(Failure::Scratch)?;
        if let Some(place) = self.shared.breakers.lock().unwrap_or_else(PoisonError::into_inner).get_mut(self.number) {
            *place = Some(breaker);
        }
        self.lane = Some(lane);
        Ok(end)
    }

    fn build(&mut self, build: Build) {
        let made = match self.shared.plan.build {
            true => self.build_there(&build),
            false => self.build_here(&build),
        };
        // The entries are let go before the batch is handed out.
        drop(build.samples);
        self.shared.lock().was_built(build.sequence, made);
        self.shared.ready.notify_all();
        self.shared.work.notify_all();
    }

    fn build_here(&self, build: &Build) -> Result<Made, Failure> {
        let entries = build.samples.iter().map(entry_of(self.shared.plan.tag)).collect::<Result<Vec<_>, _>>();
        collate(&self.shared.pool, &entries?, self.shared.plan.apart)
    }

    fn build_there(&mut self, build: &Build) -> Result<Made, Failure> {
        let samples: Vec<(u64, Source)> = build.ids.iter().copied().zip(build.samples.iter().map(source)).collect();
        let first = build.ids.first().copied().unwrap_or(0);
        let absent = build.samples.iter().filter(|sample| matches!(sample, Sample::Absent)).count() as u64;
        self.twice(first, |thread| {
            thread.shared.decodes.fetch_add(absent, Ordering::Relaxed);
            let answer = thread.lane()?.build(build.epoch, &samples).map_err(Stumble::Worker)?;
            let bytes = done(answer)?;
            let pool = Arc::clone(&thread.shared.pool);
            let lane = thread.lane()?;
            let buffer = pool.filled(bytes, |out| lane.read_scratch(out).map_err(Failure::Scratch))?;
            Entry::parse(buffer.bytes(), thread.shared.plan.tag).map_err(Failure::from)?;
            Ok(Made { buffer: Arc::new(buffer), form: Form::Built, samples: samples.len() })
        })
    }
}

fn entry_of(tag: u64) -> impl Fn(&Sample) -> Result<Entry<'_>, EntryError> {
    move |sample| match sample {
        Sample::Stored(taken) => Entry::parse(taken, tag),
        Sample::Own(bytes) => Entry::parse(bytes, tag),
        Sample::Absent => Err(EntryError::Foreign),
    }
}

fn source(sample: &Sample) -> Source<'_> {
    match sample {
        Sample::Stored(taken) => Source::Cache { offset: taken.offset(), bytes: taken.len() },
        Sample::Own(bytes) => Source::Inline(bytes),
        Sample::Absent => Source::Decode,
    }
}

fn done(answer: Answer) -> Result<usize, Failure> {
    match answer {
        Answer::Done(bytes) => Ok(bytes),
        Answer::Failed(error) => Err(Failure::User(error)),
        Answer::Long(bytes) => {
            Err(Failure::Worker(format!("a decode worker wants {bytes} bytes where there is no bound: report this")))
        }
    }
}
