//! Ranks as threads on real sockets.

use super::*;
use spec::contract::cache::{FromDirectory, Grant, Item};
use spec::contract::wire::Decoder;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

struct Rank {
    socket: UnixStream,
    decoder: Decoder,
}

impl Rank {
    fn of(host: &mut CacheHost, rank: u32) -> Self {
        Self { socket: host.take_socket(rank).unwrap().into(), decoder: Decoder::default() }
    }

    fn send(&mut self, message: &ToDirectory) {
        let mut bytes = Vec::new();
        encode(message, &mut bytes).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    /// `None`: the directory closed the socket.
    fn reply(&mut self) -> Option<FromDirectory> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            match self.socket.read(&mut bytes) {
                Ok(n @ 1..) => self.decoder.push(&bytes[..n]),
                _ => return None,
            }
        }
    }

    fn acquire(&mut self, key: u64) -> Grant {
        let items = vec![Item { key, bytes: 1000, next_use: key, offer: false }];
        self.send(&ToDirectory::Acquire { ticket: key, items });
        match self.reply() {
            Some(FromDirectory::Granted { ticket, grants }) if ticket == key => grants[0],
            other => panic!("{other:?}"),
        }
    }
}

fn host(ranks: u32) -> CacheHost {
    let plan = HostPlan { capacity_bytes: 1 << 20, policy: PolicyKind::NextUse, ranks: (0..ranks).collect() };
    CacheHost::start(&plan, || None).unwrap()
}

#[test]
fn a_rank_that_dies_while_filling_hands_over_to_one_that_waits() {
    let mut host = host(2);
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let Grant::Fill { offset, .. } = first.acquire(7) else { panic!() };
    assert_eq!(second.acquire(7), Grant::Wait);
    drop(first);
    assert_eq!(second.reply(), Some(FromDirectory::Settled { key: 7, grant: Grant::Fill { offset, bytes: 1000 } }));
    second.send(&ToDirectory::Publish { keys: vec![7] });
    assert_eq!(second.acquire(7), Grant::Ready { offset, bytes: 1000 });
    host.stop();
    assert_eq!((host.stats().hits, host.stats().misses, host.stats().entries), (1, 2, 1));
    assert_eq!(host.rank_stats(1).map(|own| own.misses), Some(1));
}

#[test]
fn a_rank_whose_socket_lives_on_in_another_process_can_be_declared_gone() {
    let mut host = host(2);
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let Grant::Fill { offset, .. } = first.acquire(7) else { panic!() };
    assert_eq!(second.acquire(7), Grant::Wait);
    host.rank_gone(0);
    assert_eq!(second.reply(), Some(FromDirectory::Settled { key: 7, grant: Grant::Fill { offset, bytes: 1000 } }));
    assert_eq!(first.reply(), None);
}

#[test]
fn broken_protocol_closes_one_socket_and_is_noted() {
    let mut host = host(2);
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    first.send(&ToDirectory::Publish { keys: vec![3] });
    assert_eq!(first.reply(), None);
    assert!(matches!(second.acquire(3), Grant::Fill { .. }), "the other rank goes on");
    assert_eq!(host.notes(), ["rank 0 published or abandoned entry 3, which it does not fill"]);
    second.socket.write_all(&[255; 64]).unwrap();
    assert_eq!(second.reply(), None);
    assert!(host.notes()[0].starts_with("rank 1: cache frame of 4294967295 bytes"));
    assert!(!host.ended());
}

#[test]
fn a_directory_that_ends_closes_every_socket_and_raises_the_alarm() {
    let mut host = host(2);
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    host.stop();
    assert_eq!((first.reply(), second.reply()), (None, None));
    assert!(host.ended());
    assert_eq!(rustix::io::read(&host.alarm, &mut [0; 8]), Ok(0));
}

/// The thread is held by locks at two places where only load would hold it: one wake-up then stands for a rank's end and
/// for the directory's own.
#[test]
fn an_end_asked_for_while_a_rank_is_declared_gone_is_not_missed() {
    let mut host = host(4);
    let [mut zero, mut one, mut two, _three] = [0, 1, 2, 3].map(|rank| Rank::of(&mut host, rank));
    let stats = lock(&host.shared.stats);
    zero.socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(zero.reply(), None);
    // Held where it publishes counters. All of this is one batch for it, in this order:
    one.socket.shutdown(Shutdown::Write).unwrap();
    two.socket.write_all(&[255; 64]).unwrap();
    host.rank_gone(3);
    let notes = lock(&host.shared.notes);
    drop(stats);
    assert_eq!(one.reply(), None);
    // Held at the note about rank 2, with the wake-up still before it.
    host.ask_to_end();
    drop(notes);
    let limit = Instant::now() + Duration::from_secs(20);
    while !host.ended() && Instant::now() < limit {
        std::thread::yield_now();
    }
    let ended = host.ended();
    // Else a failure were a hang, at the end of `host`.
    host.shared.wake();
    assert!(ended, "it waits for an event that nobody will cause");
}

#[test]
fn a_directory_that_panics_says_so_and_closes_every_socket() {
    let mut host = host(2);
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    host.panic();
    assert_eq!((first.reply(), second.reply()), (None, None));
    assert!(host.ended());
    assert_eq!(host.notes(), ["the directory's thread ended in a panic: please report this"]);
}

#[test]
fn replies_that_nobody_reads_do_not_hold_up_other_ranks() {
    let mut host = host(2);
    let (mut deaf, mut other) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    // The deaf rank's requests fill its reply buffer far beyond what the socket holds.
    let mut writer = deaf.socket.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let items = vec![Item { key: 1, bytes: 1 << 30, next_use: 1, offer: false }; 40_000];
        let mut bytes = Vec::new();
        encode(&ToDirectory::Acquire { ticket: 1, items }, &mut bytes).unwrap();
        (0..200).take_while(|_| writer.write_all(&bytes).is_ok()).count()
    });
    (10..500).for_each(|key| assert!(matches!(other.acquire(key), Grant::Fill { .. })));
    let mut answered = 0;
    while answered < 200 {
        answered += usize::from(matches!(deaf.reply(), Some(FromDirectory::Granted { .. })));
    }
    assert_eq!(flood.join().unwrap(), 200);
}

/// Memory beyond one slab comes while ranks are served already.
#[test]
fn memory_grows_behind_the_first_slab() {
    let capacity_bytes = memory::SLAB_BYTES + (1 << 20);
    let plan = HostPlan { capacity_bytes, policy: PolicyKind::Pin, ranks: vec![0] };
    let started = Instant::now();
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let took = started.elapsed();
    let mut rank = Rank::of(&mut host, 0);
    assert!(matches!(rank.acquire(1), Grant::Fill { .. }));
    while host.present_bytes() < capacity_bytes {
        std::thread::yield_now();
    }
    println!("first slab of 256 MiB after {took:?}");
    assert_eq!(rustix::fs::fstat(&host.memfd).unwrap().st_blocks as u64 * 512, capacity_bytes);
    assert_eq!(host.notes(), Vec::<String>::new());
}

/// A rank gives back what it holds beyond the limit when asked, and only then is that punched.
#[test]
fn shrinking_gives_pages_back_once_ranks_have_let_go_and_growth_brings_them_again() {
    let capacity_bytes = 8 << 20;
    let plan = HostPlan { capacity_bytes, policy: PolicyKind::Pin, ranks: vec![0, 1] };
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let acquire = |rank: &mut Rank, key: u64| {
        let items = vec![Item { key, bytes: 1 << 20, next_use: key, offer: false }];
        rank.send(&ToDirectory::Acquire { ticket: key, items });
        match rank.reply() {
            Some(FromDirectory::Granted { grants, .. }) => grants[0],
            other => panic!("{other:?}"),
        }
    };
    let mut high = None;
    for key in 0..8 {
        let Grant::Fill { offset, .. } = acquire(&mut first, key) else { panic!("{key}") };
        first.send(&ToDirectory::Publish { keys: vec![key] });
        if offset < 7 << 20 {
            first.send(&ToDirectory::Release { keys: vec![(key, u64::MAX)] });
        } else {
            high = Some(key);
        }
    }
    let high = high.unwrap();
    assert_eq!(host.resize((4 << 20) + 5), 4 << 20);
    let told = FromDirectory::Resize { ticket: 1, bytes: 4 << 20 };
    assert_eq!((first.reply(), second.reply()), (Some(told.clone()), Some(told)));
    // Still held by the first rank, so nothing may go; nobody gets a new reference to it or a place beyond.
    second.send(&ToDirectory::Resized { ticket: 1 });
    assert_eq!(acquire(&mut second, high), Grant::Bypass);
    assert_eq!(acquire(&mut second, 99), Grant::Bypass);
    assert_eq!(host.resident_bytes(), capacity_bytes);
    first.send(&ToDirectory::Release { keys: vec![(high, u64::MAX)] });
    first.send(&ToDirectory::Resized { ticket: 1 });
    while host.resident_bytes() > 4 << 20 {
        std::thread::yield_now();
    }
    assert_eq!((host.stats().used_bytes, host.stats().entries, host.stats().evictions), (4 << 20, 4, 4));
    host.resize(u64::MAX);
    assert_eq!(first.reply(), Some(FromDirectory::Resize { ticket: 2, bytes: 8 << 20 }));
    while host.present_bytes() < capacity_bytes {
        std::thread::yield_now();
    }
    // The directory hears of the pages a moment after they came.
    let offset = (50..).find_map(|key| match acquire(&mut first, key) {
        Grant::Fill { offset, .. } => Some(offset),
        _ => None,
    });
    assert!(offset.is_some_and(|offset| offset >= 4 << 20), "{offset:?}");
    assert_eq!(host.notes(), Vec::<String>::new());
}

/// A rank whose device will not forget its pages never lets go: nothing is taken from it, and the cache grows again.
#[test]
fn shrinking_that_a_rank_holds_up_is_called_off_by_growth() {
    let capacity_bytes = 8 << 20;
    let plan = HostPlan { capacity_bytes, policy: PolicyKind::Pin, ranks: vec![0, 1] };
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let told = |ticket, bytes| Some(FromDirectory::Resize { ticket, bytes });
    // More than the smaller cache holds.
    let large = |rank: &mut Rank| {
        let items = vec![Item { key: 1, bytes: 5 << 20, next_use: 1, offer: false }];
        rank.send(&ToDirectory::Acquire { ticket: 9, items });
        match rank.reply() {
            Some(FromDirectory::Granted { grants, .. }) => grants[0],
            other => panic!("{other:?}"),
        }
    };
    for ticket in [1, 3] {
        host.resize(4 << 20);
        assert_eq!((first.reply(), second.reply()), (told(ticket, 4 << 20), told(ticket, 4 << 20)));
        first.send(&ToDirectory::Resized { ticket });
        // Less than what has pages: the second rank is still waited for.
        host.resize(6 << 20);
        assert_eq!(large(&mut first), Grant::Bypass);
        host.resize(u64::MAX);
        assert_eq!((first.reply(), second.reply()), (told(ticket + 1, 8 << 20), told(ticket + 1, 8 << 20)));
        assert_eq!((host.present_bytes(), host.resident_bytes()), (capacity_bytes, capacity_bytes));
        assert!(matches!(large(&mut first), Grant::Fill { offset: 0, .. }), "all of it can be used again");
        first.send(&ToDirectory::Abandon { keys: vec![1] });
    }
    host.resize(4 << 20);
    for rank in [&mut first, &mut second] {
        assert_eq!(rank.reply(), told(5, 4 << 20));
        rank.send(&ToDirectory::Resized { ticket: 5 });
    }
    while host.resident_bytes() > 4 << 20 {
        std::thread::yield_now();
    }
    assert_eq!(host.notes(), Vec::<String>::new());
}

/// References of a dead rank do not keep memory from being given back.
#[test]
fn a_rank_that_dies_holds_up_no_shrinking() {
    let plan = HostPlan { capacity_bytes: 8 << 20, policy: PolicyKind::Pin, ranks: vec![0, 1] };
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let items = vec![Item { key: 1, bytes: 8 << 20, next_use: 1, offer: false }];
    first.send(&ToDirectory::Acquire { ticket: 1, items: items.clone() });
    assert!(matches!(first.reply(), Some(FromDirectory::Granted { .. })));
    second.send(&ToDirectory::Acquire { ticket: 1, items });
    assert!(matches!(second.reply(), Some(FromDirectory::Granted { .. })));
    host.resize(0);
    assert!(matches!(second.reply(), Some(FromDirectory::Resize { .. })));
    second.send(&ToDirectory::Resized { ticket: 1 });
    drop(first);
    // It waited for the dead rank's fill, whose place is gone.
    assert_eq!(second.reply(), Some(FromDirectory::Settled { key: 1, grant: Grant::Bypass }));
    while host.resident_bytes() > 0 {
        std::thread::yield_now();
    }
}

/// Only memory that has its pages is announced to a device: pages that it faults in are in nobody's plan.
#[test]
fn ranks_that_register_hear_how_much_has_pages_and_others_do_not() {
    let plan = HostPlan { capacity_bytes: 8 << 20, policy: PolicyKind::Pin, ranks: vec![0, 1] };
    let mut host = CacheHost::start(&plan, || None).unwrap();
    let (mut first, mut second) = (Rank::of(&mut host, 0), Rank::of(&mut host, 1));
    let present = |bytes| Some(FromDirectory::Present { bytes });
    first.send(&ToDirectory::Registers);
    assert_eq!(first.reply(), present(8 << 20));
    host.resize(4 << 20);
    assert_eq!(first.reply(), Some(FromDirectory::Resize { ticket: 1, bytes: 4 << 20 }));
    assert_eq!(first.reply(), present(4 << 20));
    for rank in [&mut first, &mut second] {
        rank.send(&ToDirectory::Resized { ticket: 1 });
    }
    while host.resident_bytes() > 4 << 20 {
        std::thread::yield_now();
    }
    host.resize(8 << 20);
    assert_eq!(first.reply(), Some(FromDirectory::Resize { ticket: 2, bytes: 8 << 20 }));
    assert_eq!(first.reply(), present(8 << 20), "once the pages are there again");
    assert_eq!(host.resident_bytes(), 8 << 20);
    second.send(&ToDirectory::Stats { ticket: 3 });
    let heard: Vec<_> = (0..3).map(|_| second.reply()).collect();
    assert!(heard.iter().all(|told| !matches!(told, Some(FromDirectory::Present { .. }))), "{heard:?}");
    assert_eq!(host.notes(), Vec::<String>::new());
}
