//! Whole epochs of accesses through the directory, without bytes: what a policy would read, beside the least that any
//! policy could.

use cache::{Directory, PolicyKind, Replies};
use spec::contract::cache::{FromDirectory, Grant, Item, ToDirectory};
use std::collections::{BTreeSet, HashMap, HashSet};

/// Bytes of the entries here: all alike.
const ENTRY_BYTES: u64 = 64;

/// Samples in the global order of several epochs, several of them in each chunk.
#[derive(Clone, Debug)]
pub struct Trace {
    samples: Vec<u32>,
    samples_per_chunk: usize,
    chunks: usize,
}

/// How ranks walk a trace together.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    pub world_size: usize,
    /// Samples of one rank and step.
    pub batch: usize,
    /// Steps that a rank asks for before it is done with one.
    pub ahead: usize,
}

/// Content of an entry of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    Chunk,
    /// Single samples: a miss decodes the chunk and offers its other samples.
    Sample,
}

/// Reads of a walk, from its second epoch on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reads {
    /// Chunks decoded per chunk and epoch.
    pub per_chunk_and_epoch: f64,
    /// Hits over lookups of the directory; a batch looks up each of its entries once.
    pub hit_rate: f64,
}

impl Trace {
    /// `epochs` random permutations of all samples.
    pub fn shuffled(chunks: usize, samples_per_chunk: usize, epochs: usize, seed: u64) -> Self {
        let len = chunks * samples_per_chunk;
        let mut state = seed;
        let mut samples = Vec::with_capacity(len * epochs);
        let mut order: Vec<u32> = (0..len as u32).collect();
        for _ in 0..epochs {
            for last in (1..len).rev() {
                order.swap(last, (random(&mut state) % (last as u64 + 1)) as usize);
            }
            samples.extend_from_slice(&order);
        }
        Self { samples, samples_per_chunk, chunks }
    }

    /// The order of whole epochs, sample ids counted chunk by chunk; each id is below `chunks × samples_per_chunk`.
    pub fn of(samples: Vec<u32>, chunks: usize, samples_per_chunk: usize) -> Self {
        Self { samples, samples_per_chunk, chunks }
    }

    fn epoch_len(&self) -> usize {
        self.chunks * self.samples_per_chunk
    }

    fn chunk(&self, sample: u32) -> u64 {
        u64::from(sample) / self.samples_per_chunk as u64
    }

    fn key(&self, position: usize, grain: Grain) -> u64 {
        let sample = self.samples[position];
        if grain == Grain::Chunk { self.chunk(sample) } else { u64::from(sample) }
    }

    /// For each position the next one of the same entry; `u64::MAX`: none.
    fn next_uses(&self, grain: Grain) -> Vec<u64> {
        let mut last: HashMap<u64, u64> = HashMap::new();
        let mut next = vec![u64::MAX; self.samples.len()];
        for position in (0..self.samples.len()).rev() {
            next[position] = last.insert(self.key(position, grain), position as u64).unwrap_or(u64::MAX);
        }
        next
    }

    /// For each sample its positions, ascending.
    fn positions(&self) -> Vec<Vec<u64>> {
        let mut positions = vec![Vec::new(); self.epoch_len()];
        for (position, sample) in self.samples.iter().enumerate() {
            positions[*sample as usize].push(position as u64);
        }
        positions
    }

    /// Reads per chunk and epoch of the clairvoyant optimum (Belady's MIN with bypass) for `capacity` chunks, one access
    /// at a time, from the second epoch on.
    pub fn optimum(&self, capacity: usize) -> f64 {
        let next = self.next_uses(Grain::Chunk);
        let mut cached: HashMap<u64, u64> = HashMap::new();
        let mut by_next: BTreeSet<(u64, u64)> = BTreeSet::new();
        let mut reads = 0u64;
        for (position, next) in next.iter().enumerate() {
            let key = self.key(position, Grain::Chunk);
            if let Some(known) = cached.insert(key, *next) {
                by_next.remove(&(known, key));
            } else {
                reads += u64::from(position >= self.epoch_len());
            }
            by_next.insert((*next, key));
            if by_next.len() > capacity
                && let Some((_, farthest)) = by_next.pop_last()
            {
                cached.remove(&farthest);
            }
        }
        self.per_chunk_and_epoch(reads)
    }

    fn per_chunk_and_epoch(&self, reads: u64) -> f64 {
        let epochs = self.samples.len() / self.epoch_len() - 1;
        reads as f64 / (self.chunks * epochs.max(1)) as f64
    }

    /// Walks the trace through a directory with room for `capacity_chunks` whole chunks.
    pub fn walk(&self, policy: PolicyKind, capacity_chunks: usize, grain: Grain, walk: Walk) -> Reads {
        let entries = if grain == Grain::Chunk { capacity_chunks } else { capacity_chunks * self.samples_per_chunk };
        let mut walker = Walker {
            trace: self,
            grain,
            walk,
            directory: Directory::new(entries as u64 * ENTRY_BYTES, policy),
            next: self.next_uses(grain),
            positions: if grain == Grain::Sample { self.positions() } else { Vec::new() },
            held: vec![Vec::new(); walk.world_size],
            reads: 0,
        };
        walker.run()
    }
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Entries that a rank holds for one step: key and next use.
type Held = Vec<(u64, u64)>;

struct Walker<'a> {
    trace: &'a Trace,
    grain: Grain,
    walk: Walk,
    directory: Directory,
    next: Vec<u64>,
    positions: Vec<Vec<u64>>,
    /// Per rank the steps under way, the oldest first.
    held: Vec<Vec<Held>>,
    reads: u64,
}

impl Walker<'_> {
    fn run(&mut self) -> Reads {
        let global = self.walk.world_size * self.walk.batch;
        let steps = self.trace.samples.len() / global;
        let warm = self.trace.epoch_len() / global;
        let mut before = Default::default();
        for step in 0..steps {
            if step == warm {
                (before, self.reads) = (self.directory.stats(), 0);
            }
            self.step(step * global);
        }
        let after = self.directory.stats();
        let lookups = |s: &spec::contract::cache::CacheStats| s.hits + s.misses + s.bypasses;
        let looked_up = lookups(&after) - lookups(&before);
        Reads {
            per_chunk_and_epoch: self.trace.per_chunk_and_epoch(self.reads),
            hit_rate: (after.hits - before.hits) as f64 / looked_up.max(1) as f64,
        }
    }

    /// All ranks ask for their share of the step, then fill and publish, then end their oldest step.
    fn step(&mut self, start: usize) {
        let mut fills = vec![Vec::new(); self.walk.world_size];
        let mut decoded = Vec::new();
        for (rank, fills) in fills.iter_mut().enumerate() {
            let items = self.batch(start, rank);
            let granted = self.acquire(rank, items.iter().map(|(item, _)| *item).collect());
            let mut held = Held::new();
            let mut chunks = HashSet::new();
            for ((item, position), grant) in items.iter().zip(granted) {
                if grant != Grant::Bypass {
                    held.push((item.key, item.next_use));
                }
                if let Grant::Fill { .. } = grant {
                    fills.push(item.key);
                }
                let read = matches!(grant, Grant::Fill { .. } | Grant::Bypass);
                if read && chunks.insert(self.trace.chunk(self.trace.samples[*position])) {
                    decoded.push((rank, *position));
                }
            }
            self.held[rank].push(held);
        }
        self.reads += decoded.len() as u64;
        for (rank, keys) in fills.into_iter().enumerate() {
            self.send(rank, &ToDirectory::Publish { keys });
        }
        if self.grain == Grain::Sample {
            decoded.into_iter().for_each(|(rank, position)| self.offer(rank, position));
        }
        for rank in 0..self.walk.world_size {
            if self.held[rank].len() > self.walk.ahead {
                let keys = self.held[rank].remove(0);
                self.send(rank, &ToDirectory::Release { keys });
            }
        }
    }

    /// A rank's entries of a step, each once, with the position of its last use there.
    fn batch(&self, start: usize, rank: usize) -> Vec<(Item, usize)> {
        let mut at: HashMap<u64, usize> = HashMap::new();
        let mut items: Vec<(Item, usize)> = Vec::new();
        for place in 0..self.walk.batch {
            let position = start + place * self.walk.world_size + rank;
            let (key, next_use) = (self.trace.key(position, self.grain), self.next[position]);
            let item = Item { key, bytes: ENTRY_BYTES, next_use, offer: false };
            match at.get(&key) {
                Some(known) => items[*known] = (item, position),
                None => {
                    at.insert(key, items.len());
                    items.push((item, position));
                }
            }
        }
        items
    }

    /// The other samples of a chunk that was just decoded, the one needed soonest first.
    fn offer(&mut self, rank: usize, position: usize) {
        let chunk = self.trace.chunk(self.trace.samples[position]) as usize;
        let samples = self.trace.samples_per_chunk;
        let mut items: Vec<Item> = (chunk * samples..(chunk + 1) * samples)
            .filter_map(|sample| {
                let positions = &self.positions[sample];
                let next_use = *positions.get(positions.partition_point(|p| *p <= position as u64))?;
                Some(Item { key: sample as u64, bytes: ENTRY_BYTES, next_use, offer: true })
            })
            .collect();
        items.sort_unstable_by_key(|item| item.next_use);
        let granted = self.acquire(rank, items.clone());
        let stored = items.iter().zip(granted).filter(|(_, grant)| matches!(grant, Grant::Fill { .. }));
        let stored: Held = stored.map(|(item, _)| (item.key, item.next_use)).collect();
        self.send(rank, &ToDirectory::Publish { keys: stored.iter().map(|(key, _)| *key).collect() });
        self.send(rank, &ToDirectory::Release { keys: stored });
    }

    fn acquire(&mut self, rank: usize, items: Vec<Item>) -> Vec<Grant> {
        match self.send(rank, &ToDirectory::Acquire { ticket: 0, items }).pop() {
            Some((_, FromDirectory::Granted { grants, .. })) => grants,
            _ => Vec::new(),
        }
    }

    fn send(&mut self, rank: usize, message: &ToDirectory) -> Replies {
        let mut replies = Replies::new();
        let kept = self.directory.handle(rank as u32, message, &mut replies);
        debug_assert_eq!(kept, Ok(()));
        replies
    }
}
