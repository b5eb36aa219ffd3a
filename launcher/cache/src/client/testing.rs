//! Directories for tests: the real one, and a small one from the contract alone that takes no wrong message and counts
//! references; first fit, it evicts whatever nobody refers to.

use cache::client::{CacheClient, ClientSpec};
use cache::{CacheHost, HostPlan, PolicyKind};
use spec::contract::cache::{CacheStats, FromDirectory, Grant, Item, ToDirectory};
use spec::contract::wire::{Decoder, encode};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

struct Entry {
    offset: u64,
    bytes: u64,
    ready: bool,
    /// Ranks with a reference, the filling one first.
    users: Vec<u32>,
    waiting: VecDeque<u32>,
}

#[derive(Default)]
struct State {
    capacity: u64,
    entries: HashMap<u64, Entry>,
    streams: HashMap<u32, UnixStream>,
    stats: CacheStats,
}

pub(crate) struct TestDirectory {
    pub(crate) memfd: File,
    state: Arc<Mutex<State>>,
}

impl TestDirectory {
    pub(crate) fn new(capacity: u64) -> Self {
        let memfd = File::from(rustix::fs::memfd_create("cache", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap());
        memfd.set_len(capacity).unwrap();
        Self { memfd, state: Arc::new(Mutex::new(State { capacity, ..State::default() })) }
    }

    pub(crate) fn client(&self, rank: u32, ahead_bytes: u64, verify: bool) -> Arc<CacheClient> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.state.lock().unwrap().streams.insert(rank, ours.try_clone().unwrap());
        let state = Arc::clone(&self.state);
        std::thread::spawn(move || serve(&state, ours, rank));
        CacheClient::connect(theirs, &self.memfd, ClientSpec { rank, ahead_bytes, verify }).unwrap()
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.state.lock().unwrap().stats
    }

    /// References held by all ranks.
    pub(crate) fn references(&self) -> usize {
        self.state.lock().unwrap().entries.values().map(|entry| entry.users.len() + entry.waiting.len()).sum()
    }

    /// As a process that dies. Not every package that shares this file uses it.
    #[allow(dead_code)]
    pub(crate) fn die(&self) {
        let state = self.state.lock().unwrap();
        state.streams.values().for_each(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap());
    }
}

fn serve(state: &Mutex<State>, mut from: UnixStream, rank: u32) {
    let (mut decoder, mut buffer) = (Decoder::default(), vec![0; 1 << 16]);
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        decoder.push(&buffer[..bytes]);
        while let Some(message) = decoder.next_message().unwrap() {
            let mut state = state.lock().unwrap();
            for (to, reply) in state.hear(rank, message) {
                let mut bytes = Vec::new();
                encode(&reply, &mut bytes).unwrap();
                if let Some(stream) = state.streams.get_mut(&to) {
                    let _ = stream.write_all(&bytes);
                }
            }
        }
    }
    let mut state = state.lock().unwrap();
    state.streams.remove(&rank);
    state.entries.retain(|_, entry| {
        entry.users.retain(|user| *user != rank);
        entry.ready || !entry.users.is_empty()
    });
}

impl State {
    fn hear(&mut self, rank: u32, message: ToDirectory) -> Vec<(u32, FromDirectory)> {
        match message {
            ToDirectory::Hello { .. }
            | ToDirectory::Resized { .. }
            | ToDirectory::Registers
            | ToDirectory::Hits { .. } => Vec::new(),
            // Of processes whose entries show their length when they are decoded: the real directory serves those.
            ToDirectory::Open { .. }
            | ToDirectory::Find { .. }
            | ToDirectory::Enlarge { .. }
            | ToDirectory::Length { .. } => panic!("rank {rank} asks for entries of unknown length"),
            ToDirectory::Acquire { ticket, items } | ToDirectory::Again { ticket, items } => {
                let grants = items.into_iter().map(|item| self.acquire(rank, item)).collect();
                vec![(rank, FromDirectory::Granted { ticket, grants })]
            }
            ToDirectory::Publish { keys } => keys.into_iter().flat_map(|key| self.publish(key)).collect(),
            ToDirectory::Abandon { keys } => keys.into_iter().filter_map(|key| self.abandon(key)).collect(),
            ToDirectory::Release { keys } => {
                for (key, _) in keys {
                    let users = &mut self.entries.get_mut(&key).expect("released what is not there").users;
                    let at = users.iter().position(|user| *user == rank).expect("released without a reference");
                    users.swap_remove(at);
                }
                Vec::new()
            }
            ToDirectory::Stats { ticket } => vec![(rank, FromDirectory::Stats { ticket, stats: self.stats })],
        }
    }

    fn acquire(&mut self, rank: u32, item: Item) -> Grant {
        if let Some(entry) = self.entries.get_mut(&item.key) {
            assert_eq!(entry.bytes, item.bytes);
            if item.offer {
                return Grant::Bypass;
            }
            // A rank may need the entries that it fills for an offer.
            assert!(!entry.ready || !entry.users.contains(&rank), "rank {rank} acquires {} twice", item.key);
            if entry.ready {
                self.stats.hits += 1;
                entry.users.push(rank);
                return Grant::Ready { offset: entry.offset, bytes: entry.bytes };
            }
            entry.waiting.push_back(rank);
            return Grant::Wait;
        }
        let Some(offset) = self.room(item.bytes) else {
            self.stats.bypasses += 1;
            return Grant::Bypass;
        };
        self.stats.misses += 1;
        let entry = Entry { offset, bytes: item.bytes, ready: false, users: vec![rank], waiting: VecDeque::new() };
        self.entries.insert(item.key, entry);
        Grant::Fill { offset, bytes: item.bytes }
    }

    /// First fit, after evicting as much as it takes.
    fn room(&mut self, bytes: u64) -> Option<u64> {
        loop {
            let taken: BTreeMap<u64, u64> = self.entries.values().map(|e| (e.offset, e.offset + e.bytes)).collect();
            let mut at = 0;
            for (start, end) in taken {
                if start - at >= bytes {
                    return Some(at);
                }
                at = end;
            }
            if self.capacity - at >= bytes {
                return Some(at);
            }
            let idle = self.entries.iter().filter(|(_, entry)| entry.ready && entry.users.is_empty());
            let key = idle.map(|(key, _)| *key).min()?;
            self.entries.remove(&key);
            self.stats.evictions += 1;
        }
    }

    fn publish(&mut self, key: u64) -> Vec<(u32, FromDirectory)> {
        let entry = self.entries.get_mut(&key).expect("published what is not there");
        assert!(!std::mem::replace(&mut entry.ready, true), "published twice");
        let waiting: Vec<u32> = entry.waiting.drain(..).collect();
        entry.users.extend(&waiting);
        self.stats.hits += waiting.len() as u64;
        let grant = Grant::Ready { offset: entry.offset, bytes: entry.bytes };
        waiting.into_iter().map(|rank| (rank, FromDirectory::Settled { key, grant })).collect()
    }

    fn abandon(&mut self, key: u64) -> Option<(u32, FromDirectory)> {
        let entry = self.entries.get_mut(&key).expect("abandoned what is not there");
        assert!(!entry.ready, "abandoned what is published");
        entry.users.clear();
        match entry.waiting.pop_front() {
            None => {
                self.entries.remove(&key);
                None
            }
            Some(rank) => {
                entry.users.push(rank);
                let grant = Grant::Fill { offset: entry.offset, bytes: entry.bytes };
                Some((rank, FromDirectory::Settled { key, grant }))
            }
        }
    }
}

/// The real directory, and a client for each of `ranks` ranks that announces at most a quarter of it.
pub(crate) fn hosted(capacity_bytes: u64, policy: PolicyKind, ranks: u32) -> (CacheHost, Vec<Arc<CacheClient>>) {
    let plan = HostPlan { capacity_bytes, policy, ranks: (0..ranks).collect() };
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let memfd = File::from(host.memfd.try_clone().unwrap());
    let spec = |rank| ClientSpec { rank, ahead_bytes: capacity_bytes / 4, verify: true };
    let connect = |rank| {
        let socket = UnixStream::from(host.take_socket(rank).unwrap());
        CacheClient::connect(socket, &memfd, spec(rank)).unwrap()
    };
    let clients = (0..ranks).map(connect).collect();
    (host, clients)
}
