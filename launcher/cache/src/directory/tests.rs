//! Single moves, and random ranks against a mapping that remembers what was written where.

use super::*;
use proptest::prelude::*;

fn item(key: u64, bytes: u64, next_use: u64) -> Item {
    Item { key, bytes, next_use, offer: false }
}

struct Bench(Directory);

impl Bench {
    fn send(&mut self, rank: u32, message: ToDirectory) -> Replies {
        let mut replies = Vec::new();
        self.0.handle(rank, &message, &mut replies).unwrap();
        replies
    }

    fn acquire(&mut self, rank: u32, item: Item) -> Grant {
        match self.send(rank, ToDirectory::Acquire { ticket: 5, items: vec![item] }).as_slice() {
            [(to, FromDirectory::Granted { ticket: 5, grants })] if *to == rank => grants[0],
            other => panic!("{other:?}"),
        }
    }

    /// Fills, publishes and releases an entry.
    fn store(&mut self, item: Item) {
        assert!(matches!(self.acquire(0, item), Grant::Fill { .. }));
        self.send(0, ToDirectory::Publish { keys: vec![item.key] });
        self.send(0, ToDirectory::Release { keys: vec![(item.key, item.next_use)] });
    }
}

fn bench(capacity: u64, policy: PolicyKind) -> Bench {
    Bench(Directory::new(capacity, policy))
}

#[test]
fn one_decode_serves_every_rank() {
    let mut b = bench(1 << 20, PolicyKind::Pin);
    let Grant::Fill { offset, .. } = b.acquire(0, item(7, 1000, 9)) else { panic!() };
    assert_eq!([b.acquire(1, item(7, 1000, 9)), b.acquire(2, item(7, 1000, 9))], [Grant::Wait; 2]);
    let settled = |rank| (rank, FromDirectory::Settled { key: 7, grant: Grant::Ready { offset, bytes: 1000 } });
    assert_eq!(b.send(0, ToDirectory::Publish { keys: vec![7] }), [settled(1), settled(2)]);
    assert_eq!(b.acquire(3, item(7, 1000, 9)), Grant::Ready { offset, bytes: 1000 });
    let stats = b.0.stats();
    assert_eq!((stats.hits, stats.misses, stats.bypasses, stats.used_bytes, stats.entries), (3, 1, 0, 1000, 1));
    let own = b.0.rank_stats(1);
    assert_eq!((own.hits, own.misses), (1, 0));
}

#[test]
fn a_fill_that_fails_goes_to_the_next_waiter_and_then_leaves_no_entry() {
    let mut b = bench(1 << 20, PolicyKind::NextUse);
    let Grant::Fill { offset, .. } = b.acquire(0, item(7, 1000, 9)) else { panic!() };
    assert_eq!(b.acquire(1, item(7, 1000, 9)), Grant::Wait);
    let fill = FromDirectory::Settled { key: 7, grant: Grant::Fill { offset, bytes: 1000 } };
    assert_eq!(b.send(0, ToDirectory::Abandon { keys: vec![7] }), [(1, fill)]);
    assert_eq!(b.send(1, ToDirectory::Abandon { keys: vec![7] }), []);
    let stats = b.0.stats();
    assert_eq!((stats.used_bytes, stats.entries, stats.misses), (0, 0, 2));
}

#[test]
fn a_dead_filler_is_followed_by_a_waiter_and_its_references_are_dropped() {
    let mut b = bench(128, PolicyKind::Lru);
    b.store(item(1, 64, 9));
    assert!(matches!(b.acquire(0, item(1, 64, 9)), Grant::Ready { .. }));
    let Grant::Fill { offset, .. } = b.acquire(0, item(2, 64, 9)) else { panic!() };
    assert_eq!(b.acquire(1, item(2, 64, 9)), Grant::Wait);
    assert_eq!(b.acquire(1, item(3, 64, 9)), Grant::Bypass, "both entries are in use");
    let mut replies = Vec::new();
    b.0.rank_gone(0, &mut replies);
    assert_eq!(replies, [(1, FromDirectory::Settled { key: 2, grant: Grant::Fill { offset, bytes: 64 } })]);
    assert!(matches!(b.acquire(1, item(3, 64, 9)), Grant::Fill { .. }), "entry 1 may go now");
    assert_eq!(b.0.stats().evictions, 1);
}

#[test]
fn what_is_larger_than_the_cache_passes_through() {
    for policy in [PolicyKind::Pin, PolicyKind::Lru, PolicyKind::NextUse] {
        let mut b = bench(256, policy);
        b.store(item(1, 64, 9));
        assert_eq!(b.acquire(0, item(2, 257, 3)), Grant::Bypass);
        assert_eq!(b.acquire(0, item(3, u64::MAX, 3)), Grant::Bypass);
        assert_eq!((b.0.stats().evictions, b.0.stats().bypasses), (0, 2));
    }
}

#[test]
fn each_policy_evicts_its_own_choice() {
    let survivors = |policy| {
        let mut b = bench(3 * 64, policy);
        [(1, 50), (2, 90), (3, 70)].into_iter().for_each(|(key, next)| b.store(item(key, 64, next)));
        b.acquire(0, item(1, 64, 60));
        b.send(0, ToDirectory::Release { keys: vec![(1, 60)] });
        b.acquire(0, item(4, 64, 80));
        (1..=4).filter(|key| b.0.table.map.contains_key(key)).collect::<Vec<u64>>()
    };
    assert_eq!(survivors(PolicyKind::Pin), [1, 2, 3]);
    assert_eq!(survivors(PolicyKind::Lru), [1, 3, 4]);
    assert_eq!(survivors(PolicyKind::NextUse), [1, 3, 4]);
}

#[test]
fn next_use_keeps_out_what_is_needed_last_and_offers_displace_only_later_needs() {
    let mut b = bench(2 * 64, PolicyKind::NextUse);
    b.store(item(1, 64, 50));
    b.store(item(2, 64, 90));
    assert_eq!(b.acquire(0, item(3, 64, 95)), Grant::Bypass);
    let offer = |key, next_use| Item { offer: true, ..item(key, 64, next_use) };
    assert_eq!(b.acquire(0, offer(4, 90)), Grant::Bypass);
    assert_eq!(b.acquire(0, offer(1, 10)), Grant::Bypass, "is there already");
    assert!(matches!(b.acquire(0, offer(5, 89)), Grant::Fill { .. }));
    let stats = b.0.stats();
    assert_eq!((stats.misses, stats.bypasses, stats.evictions), (2, 1, 1), "offers are no lookups");
}

#[test]
fn an_entry_asked_for_again_is_counted_once_by_the_last_answer() {
    let mut b = bench(64, PolicyKind::NextUse);
    b.store(item(1, 64, 50));
    assert_eq!(b.acquire(0, item(2, 64, 90)), Grant::Bypass);
    let again = |b: &mut Bench, next_use| match b
        .send(0, ToDirectory::Again { ticket: 5, items: vec![item(2, 64, next_use)] })
        .as_slice()
    {
        [(0, FromDirectory::Granted { ticket: 5, grants })] => grants[0],
        other => panic!("{other:?}"),
    };
    let counts = |b: &Bench| (b.0.stats().hits, b.0.stats().misses, b.0.stats().bypasses);
    assert_eq!((again(&mut b, 90), counts(&b)), (Grant::Bypass, (0, 1, 1)));
    // In the meantime another rank offered it.
    let offer = Item { offer: true, ..item(2, 64, 20) };
    assert!(matches!(b.acquire(1, offer), Grant::Fill { .. }));
    b.send(1, ToDirectory::Publish { keys: vec![2] });
    b.send(1, ToDirectory::Release { keys: vec![(2, 20)] });
    assert!(matches!(again(&mut b, 90), Grant::Ready { .. }));
    assert_eq!(counts(&b), (1, 1, 0));
}

#[test]
fn an_open_entry_is_cut_to_its_length_or_finds_a_longer_place() {
    let mut b = bench(1024, PolicyKind::NextUse);
    let open = |b: &mut Bench, rank, item| match b.send(rank, ToDirectory::Open { ticket: 1, items: vec![item] }).pop()
    {
        Some((to, FromDirectory::Granted { ticket: 1, grants })) if to == rank => grants[0],
        other => panic!("{other:?}"),
    };
    let find = |b: &mut Bench, key| match b.send(0, ToDirectory::Find { ticket: 2, items: vec![item(key, 0, 9)] }).pop()
    {
        Some((0, FromDirectory::Granted { ticket: 2, grants })) => grants[0],
        other => panic!("{other:?}"),
    };
    assert_eq!(find(&mut b, 1), Grant::Bypass);
    assert_eq!(b.0.stats().bypasses, 0, "what is only looked for is no look-up");
    assert_eq!(open(&mut b, 0, item(1, 512, 9)), Grant::Fill { offset: 0, bytes: 512 });
    assert_eq!((find(&mut b, 1), open(&mut b, 1, item(1, 7, 9))), (Grant::Wait, Grant::Wait));
    b.send(0, ToDirectory::Length { keys: vec![(1, 100)] });
    let ready = Grant::Ready { offset: 0, bytes: 100 };
    let settled = |rank| (rank, FromDirectory::Settled { key: 1, grant: ready });
    assert_eq!(b.send(0, ToDirectory::Publish { keys: vec![1] }), [settled(0), settled(1)]);
    assert_eq!(find(&mut b, 1), ready);
    // The second one is longer than was thought.
    assert_eq!(open(&mut b, 0, item(2, 64, 9)), Grant::Fill { offset: 128, bytes: 64 });
    let larger = b.send(0, ToDirectory::Enlarge { ticket: 3, key: 2, bytes: 700 });
    let grants = vec![Grant::Fill { offset: 192, bytes: 700 }];
    assert_eq!(larger, [(0, FromDirectory::Granted { ticket: 3, grants })]);
    assert_eq!((b.0.stats().used_bytes, b.0.is_full()), (800, false));
    // The third fits nowhere: its waiter reads for itself.
    assert_eq!(open(&mut b, 0, item(3, 64, 9)), Grant::Fill { offset: 128, bytes: 64 });
    assert_eq!(open(&mut b, 1, item(3, 64, 9)), Grant::Wait);
    let none = b.send(0, ToDirectory::Enlarge { ticket: 4, key: 3, bytes: 400 });
    let turned_away = (1, FromDirectory::Settled { key: 3, grant: Grant::Bypass });
    assert_eq!(none, [turned_away, (0, FromDirectory::Granted { ticket: 4, grants: vec![Grant::Bypass] })]);
    assert_eq!((b.0.stats().used_bytes, b.0.stats().entries, b.0.is_full()), (800, 2, true));
    let mut replies = Vec::new();
    let too_long = b.0.handle(0, &ToDirectory::Length { keys: vec![(2, 701)] }, &mut replies);
    assert!(matches!(too_long, Err(Fault::Bytes { key: 2, .. })));
}

#[test]
fn what_is_used_longest_ago_goes_first_where_no_order_is_known() {
    let mut b = bench(4 * 64, PolicyKind::NextUse);
    let item = |key| item(key, 64, u64::MAX);
    let touch = |b: &mut Bench, key| {
        assert!(matches!(b.acquire(0, item(key)), Grant::Ready { .. }), "{key} is there");
        b.send(0, ToDirectory::Release { keys: vec![(key, u64::MAX)] });
    };
    (0..4).for_each(|key| b.store(item(key)));
    [0, 2].into_iter().for_each(|key| touch(&mut b, key));
    (4..6).for_each(|key| b.store(item(key)));
    [0, 2, 4, 5].into_iter().for_each(|key| touch(&mut b, key));
}

#[test]
fn memory_is_made_before_anything_is_displaced() {
    let mut directory = Directory::growing(1024, 64, PolicyKind::Lru);
    let mut present = 64;
    directory.set_more(Box::new(move |bytes| {
        present = 512.min(present + bytes.next_multiple_of(128));
        (present < 512).then_some(present)
    }));
    let mut b = Bench(directory);
    (0..7).for_each(|key| b.store(item(key, 64, 9)));
    assert_eq!((b.0.stats().evictions, b.0.is_full()), (0, false));
    b.store(item(9, 64, 9));
    assert_eq!((b.0.stats().evictions, b.0.is_full()), (1, true), "what can be had is 448 bytes");
}

#[test]
fn a_late_report_does_not_bring_a_past_use_back() {
    let mut b = bench(2 * 64, PolicyKind::NextUse);
    b.store(item(1, 64, 20));
    // Two ranks use it, at 20 and 30; the first releases last and knows only of 30.
    b.acquire(0, item(1, 64, 30));
    b.acquire(1, item(1, 64, 1000));
    b.send(1, ToDirectory::Release { keys: vec![(1, 1000)] });
    b.send(0, ToDirectory::Release { keys: vec![(1, 30)] });
    b.store(item(2, 64, 500));
    assert!(matches!(b.acquire(0, item(3, 64, 700)), Grant::Fill { .. }));
    assert!(!b.0.table.map.contains_key(&1) && b.0.table.map.contains_key(&2));
}

#[test]
fn a_mapping_that_is_still_being_made_is_used_as_far_as_it_goes() {
    let mut b = Bench(Directory::growing(256, 64, PolicyKind::Pin));
    b.store(item(1, 64, 9));
    assert_eq!(b.acquire(0, item(2, 64, 9)), Grant::Bypass);
    b.0.grow(1 << 40);
    (2..5).for_each(|key| b.store(item(key, 64, 9)));
    assert_eq!(b.acquire(0, item(5, 64, 9)), Grant::Bypass);
    assert_eq!(b.0.stats().used_bytes, 256);
}

#[test]
fn broken_protocol_is_named() {
    let mut b = bench(1024, PolicyKind::Pin);
    b.acquire(0, item(7, 100, 9));
    let mut fault = |rank, message| b.0.handle(rank, &message, &mut Vec::new()).unwrap_err();
    assert_eq!(fault(1, ToDirectory::Publish { keys: vec![7] }), Fault::NotFilling { rank: 1, key: 7 });
    assert_eq!(fault(0, ToDirectory::Release { keys: vec![(7, 1)] }), Fault::NotHeld { rank: 0, key: 7 });
    assert_eq!(fault(1, ToDirectory::Release { keys: vec![(8, 1)] }), Fault::NotHeld { rank: 1, key: 8 });
    let acquire = ToDirectory::Acquire { ticket: 0, items: vec![item(7, 101, 9)] };
    assert_eq!(fault(1, acquire), Fault::Bytes { rank: 1, key: 7, asked: 101, bytes: 100 });
    assert_eq!(fault(2, ToDirectory::Hello { version: VERSION, rank: 1 }), Fault::Rank { rank: 2, said: 1 });
    let version = VERSION + 1;
    assert_eq!(fault(2, ToDirectory::Hello { version, rank: 2 }), Fault::Version { rank: 2, version });
}

const RANKS: usize = 3;
const LINES: usize = 24;

/// Entries of one to three lines.
fn bytes_of(key: u64) -> u64 {
    64 * (key % 3 + 1) - key % 5
}

/// References of the ranks, and one word per line of the mapping: the key last written there, 0 for half-written.
struct World {
    directory: Directory,
    lines: [u64; LINES],
    fills: [Vec<(u64, u64)>; RANKS],
    held: [Vec<(u64, u64)>; RANKS],
    waits: [Vec<u64>; RANKS],
    lookups: u64,
    dropped_waits: u64,
}

impl World {
    fn span(offset: u64, key: u64) -> std::ops::Range<usize> {
        (offset / 64) as usize..(offset + bytes_of(key)).div_ceil(64) as usize
    }

    fn granted(&mut self, rank: usize, key: u64, grant: Grant) {
        match grant {
            Grant::Ready { offset, .. } => self.held[rank].push((key, offset)),
            Grant::Fill { offset, .. } => {
                for (other, at) in self.fills.iter().chain(&self.held).flatten() {
                    let (a, b) = (Self::span(*at, *other), Self::span(offset, key));
                    assert!(a.end <= b.start || b.end <= a.start, "entry {key} is put over {other}, which is in use");
                }
                self.lines[Self::span(offset, key)].fill(0);
                self.fills[rank].push((key, offset));
            }
            Grant::Wait => self.waits[rank].push(key),
            Grant::Bypass => {}
        }
    }

    fn send(&mut self, rank: usize, message: &ToDirectory) {
        let mut replies = Vec::new();
        self.directory.handle(rank as u32, message, &mut replies).unwrap();
        self.take(replies, message);
    }

    fn take(&mut self, replies: Replies, message: &ToDirectory) {
        for (to, reply) in replies {
            match (reply, message) {
                (FromDirectory::Granted { grants, .. }, ToDirectory::Acquire { items, .. }) => {
                    items.iter().zip(grants).for_each(|(item, grant)| self.granted(to as usize, item.key, grant));
                }
                (FromDirectory::Settled { key, grant }, _) => {
                    let at = self.waits[to as usize].iter().position(|waiting| *waiting == key).unwrap();
                    self.waits[to as usize].swap_remove(at);
                    self.granted(to as usize, key, grant);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn step(&mut self, rank: usize, op: u8, key: u64, next_use: u64, at: prop::sample::Index) {
        match op {
            0..=4 => {
                let item = Item { offer: op == 4, ..item(key, bytes_of(key), next_use) };
                self.lookups += u64::from(op != 4);
                self.send(rank, &ToDirectory::Acquire { ticket: 1, items: vec![item] });
            }
            5 | 6 if !self.fills[rank].is_empty() => {
                let at = at.index(self.fills[rank].len());
                let (key, offset) = self.fills[rank].swap_remove(at);
                if op == 6 && key % 4 == 0 {
                    return self.send(rank, &ToDirectory::Abandon { keys: vec![key] });
                }
                self.lines[Self::span(offset, key)].fill(key);
                self.held[rank].push((key, offset));
                self.send(rank, &ToDirectory::Publish { keys: vec![key] });
            }
            7 | 8 if !self.held[rank].is_empty() => {
                let at = at.index(self.held[rank].len());
                let (key, _) = self.held[rank].swap_remove(at);
                self.send(rank, &ToDirectory::Release { keys: vec![(key, next_use)] });
            }
            9 if key == 1 => {
                self.fills[rank].clear();
                self.held[rank].clear();
                self.dropped_waits += self.waits[rank].len() as u64;
                self.waits[rank].clear();
                let mut replies = Vec::new();
                self.directory.rank_gone(rank as u32, &mut replies);
                self.take(replies, &ToDirectory::Stats { ticket: 0 });
            }
            _ => {}
        }
    }

    fn check(&self) {
        for (key, offset) in self.held.iter().flatten() {
            assert!(self.lines[Self::span(*offset, *key)].iter().all(|word| word == key), "entry {key} is torn");
        }
        let stats = self.directory.stats();
        let table = &self.directory.table;
        assert!(stats.used_bytes <= stats.capacity_bytes);
        assert_eq!(stats.used_bytes, table.map.values().map(|entry| entry.bytes).sum::<u64>());
        assert_eq!(table.resting, table.map.values().filter(|entry| entry.resting()).count());
        let waiting = self.waits.iter().map(Vec::len).sum::<usize>() as u64;
        assert_eq!(stats.hits + stats.misses + stats.bypasses + waiting + self.dropped_waits, self.lookups);
        assert!(table.map.values().all(|entry| entry.filler.is_some() || entry.waiters.is_empty()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn random_ranks_never_read_what_is_half_written_nor_pass_the_capacity(
        policy in prop::sample::select(vec![PolicyKind::Pin, PolicyKind::Lru, PolicyKind::NextUse]),
        ops in prop::collection::vec((0..RANKS, 0u8..10, 1u64..20, 0u64..50, any::<prop::sample::Index>()), 1..300),
    ) {
        let mut world = World {
            directory: Directory::new(64 * LINES as u64, policy),
            lines: [0; LINES],
            fills: Default::default(),
            held: Default::default(),
            waits: Default::default(),
            lookups: 0,
            dropped_waits: 0,
        };
        for (rank, op, key, next_use, at) in ops {
            world.step(rank, op, key, next_use, at);
            world.check();
        }
        for rank in 0..RANKS {
            world.directory.rank_gone(rank as u32, &mut Vec::new());
        }
        // Nothing is stuck: every entry left is whole and may be evicted.
        let table = &world.directory.table;
        prop_assert_eq!(table.resting, table.map.len());
    }
}
