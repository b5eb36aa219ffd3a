//! Ranks against a small directory, and against hostile ones.

mod lend;
mod open;

use super::testing::{TestDirectory, hosted};
use super::*;
use crate::PolicyKind;
use spec::contract::cache::Grant;
use std::sync::atomic::AtomicUsize;

/// The error of whoever fills.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("disk on fire")]
    Disk,
}

/// Entry `key` is 1000 + key bytes of its number.
fn want(key: u64) -> Item {
    Item { key, bytes: 1000 + key, next_use: key, offer: false }
}

fn fill(key: u64, out: &mut [u8]) -> Result<(), FillError> {
    assert_eq!(out.len() as u64, want(key).bytes);
    out.fill(key as u8);
    Ok(())
}

/// True: from the cache.
fn read(client: &CacheClient, key: u64) -> Result<bool, FillError> {
    let held = client.read(want(key), &mut fill)?;
    if let Some(bytes) = &held {
        assert!(bytes.len() as u64 == want(key).bytes && bytes.iter().all(|&byte| byte == key as u8), "entry {key}");
    }
    Ok(held.is_some())
}

fn wait_for(mut what: impl FnMut() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain");
        std::thread::yield_now();
    }
}

#[test]
fn one_fill_serves_all_ranks_and_batches_and_everything_is_given_back() {
    let directory = TestDirectory::new(1 << 20);
    let clients = [0, 1, 2].map(|rank| directory.client(rank, 1 << 19, rank_verify()));
    let batches: Vec<Vec<Item>> = (0..20).map(|b| (b..b + 10).map(want).collect()).collect();
    for (rank, client) in clients.iter().enumerate() {
        // Several batches under way at once.
        batches.iter().for_each(|batch| client.announce(batch));
        for (n, batch) in batches.iter().enumerate() {
            for item in batch {
                assert!(read(client, item.key).unwrap(), "rank {rank}");
            }
            client.retire(batch.iter().map(|item| item.key));
            if n == 5 {
                assert!(directory.references() > 0);
            }
        }
    }
    wait_for(|| directory.references() == 0);
    assert_eq!((directory.stats().misses, directory.stats().hits), (29, 58));
    let stats = clients.each_ref().map(|client| client.stats());
    assert_eq!((stats[0].misses, stats[0].hits, stats[0].bypasses), (29, 171, 0));
    assert_eq!((stats[2].misses, stats[2].hits), (0, 200));
    assert_eq!(stats[2].hit_rate(), Some(1.0));
    clients[0].node_stats();
    wait_for(|| clients[0].node_stats().misses == 29);
}

/// With checksums, as the tests that kill ranks run.
fn rank_verify() -> bool {
    true
}

#[test]
fn threads_of_three_ranks_with_a_small_cache_never_wait_in_a_circle() {
    for (capacity, ahead) in [(20_000, 10_000), (4_000, 1_000), (2_500, 1 << 30), (100_000, 1)] {
        let directory = TestDirectory::new(capacity);
        let clients: Vec<_> = (0..3).map(|rank| directory.client(rank, ahead, true)).collect();
        std::thread::scope(|scope| {
            for (rank, client) in clients.iter().enumerate() {
                for thread in 0..2 {
                    scope.spawn(move || {
                        let keys = |n: u64| {
                            let start = (n * 7 + rank as u64 * 13 + thread) % 40;
                            (start..start + 5).map(|key| want(key * 3 % 40))
                        };
                        let batches: Vec<Vec<Item>> = (0..60).map(|n| keys(n).collect()).collect();
                        batches[..3].iter().for_each(|batch| client.announce(batch));
                        for (n, batch) in batches.iter().enumerate() {
                            batches.get(n + 3).iter().for_each(|batch| client.announce(batch));
                            batch.iter().for_each(|item| assert!(read(client, item.key).is_ok()));
                            client.retire(batch.iter().map(|item| item.key));
                        }
                    });
                }
            }
        });
        wait_for(|| directory.references() == 0);
        let reads: u64 = clients.iter().map(|client| client.stats()).map(|s| s.hits + s.misses + s.bypasses).sum();
        assert_eq!(reads, 3 * 2 * 60 * 5, "capacity {capacity}");
        assert!(clients.iter().any(|client| client.stats().hits > 0) || capacity < 10_000);
    }
}

#[test]
fn a_failed_or_panicking_fill_is_abandoned_and_its_reader_bypasses() {
    let directory = TestDirectory::new(1 << 16);
    let client = directory.client(0, 1 << 16, true);
    let mut broken = |_: u64, _: &mut [u8]| Err(FillError::Disk);
    let error = client.read(want(1), &mut broken).err().unwrap();
    assert_eq!(error.to_string(), "disk on fire");
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        client.read::<FillError>(want(2), &mut |_, _| panic!("bad sector")).is_ok()
    }));
    assert!(panics.is_err());
    wait_for(|| directory.references() == 0);
    assert!(read(&client, 1).unwrap() && read(&client, 2).unwrap(), "both can be filled later");
    // An error ahead of need is met by its reader.
    client.announce(&[want(3)]);
    wait_for(|| client.work_ahead(&mut broken));
    assert!(!read(&client, 3).unwrap());
    client.retire([3].into_iter());
    assert!(read(&client, 3).unwrap());
}

#[test]
fn work_ahead_fills_what_was_announced_and_wakes_whoever_asked_for_it() {
    struct Counter(AtomicUsize);
    impl Wake for Counter {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let directory = TestDirectory::new(1 << 16);
    let client = directory.client(0, 1 << 16, false);
    let counter = Arc::new(Counter(AtomicUsize::new(0)));
    let waker: Arc<dyn Wake> = counter.clone();
    client.wake_by(Arc::downgrade(&waker));
    client.announce(&[want(1), want(2)]);
    wait_for(|| counter.0.load(Ordering::SeqCst) > 0);
    assert!(client.work_ahead(&mut fill) && client.work_ahead(&mut fill) && !client.work_ahead(&mut fill));
    let unfilled = client.read::<FillError>(want(1), &mut |_, _| panic!("filled twice")).unwrap().is_some();
    assert!(unfilled && client.stats().misses == 1, "what this rank filled ahead is its miss");
    // Never read: given back all the same.
    client.retire([1, 2].into_iter());
    wait_for(|| directory.references() == 0);
}

/// An offer of entry `key`, needed at `next_use`.
fn offer(key: u64, next_use: u64) -> Offer {
    Offer { item: Item { next_use, offer: true, ..want(key) }, due: false }
}

#[test]
fn offers_are_kept_while_they_are_needed_soonest_and_are_no_lookups() {
    // Room for three entries, with their checksums.
    let (host, clients) = hosted(3 * 1088, PolicyKind::NextUse, 2);
    let (first, second) = (&clients[0], &clients[1]);
    let mut filled = Vec::new();
    let mut write = |key: u64, out: &mut [u8]| {
        filled.push(key);
        fill(key, out)
    };
    first.offer(&[10, 20, 30, 40].map(|key| offer(key, key)), &mut write).unwrap();
    // The directory learns of releases a moment later, and of this offer after them.
    first.offer(&[offer(60, 60)], &mut write).unwrap();
    second.offer(&[5, 6, 50].map(|key| offer(key, key)), &mut write).unwrap();
    assert_eq!(filled, [10, 20, 30, 5, 6], "what is needed soonest stays");
    assert_eq!((host.stats().hits, host.stats().misses, host.stats().bypasses), (0, 0, 0));
    for key in [5, 6, 10] {
        let kept = first.read::<FillError>(want(key), &mut |key, _| panic!("{key} was not kept")).unwrap();
        assert!(kept.unwrap().iter().all(|&byte| byte == key as u8));
    }
    first.offer::<FillError>(&[], &mut |_, _| panic!("nothing was offered")).unwrap();
    first
        .offer::<FillError>(&[Offer { due: true, ..offer(7, 0) }], &mut |_, _| panic!("another rank's, perhaps read"))
        .unwrap();
    assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
}

#[test]
fn what_was_refused_when_announced_is_found_when_an_offer_has_brought_it() {
    let (host, clients) = hosted(1088, PolicyKind::NextUse, 2);
    let (first, second) = (&clients[0], &clients[1]);
    first.offer(&[offer(1, 500)], &mut fill).unwrap();
    let far = |key| Item { next_use: 900, ..want(key) };
    second.announce_stored(&[far(2), far(3)]);
    wait_for(|| host.stats().bypasses == 2);
    first.offer(&[offer(2, 40)], &mut fill).unwrap();
    let found = second.read_again::<FillError>(far(2), &mut |key, _| panic!("{key} is there")).unwrap();
    assert_eq!(found.map(|bytes| bytes.len()), Some(1002));
    assert!(second.read_again(far(3), &mut fill).unwrap().is_none());
    assert!(second.read_again(far(3), &mut fill).unwrap().is_none(), "asked for again once");
    second.retire([2, 3].into_iter());
    wait_for(|| second.inner.lock().idle());
    wait_for(|| (host.stats().hits, host.stats().misses, host.stats().bypasses) == (1, 0, 1));
    assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
}

#[test]
fn a_failed_or_panicking_offer_leaves_nothing_behind() {
    let directory = TestDirectory::new(1 << 16);
    let client = directory.client(0, 1 << 16, true);
    let offers = [offer(1, 1), offer(2, 2), offer(3, 3)];
    let mut second = |key: u64, out: &mut [u8]| match key {
        2 => Err(FillError::Disk),
        _ => fill(key, out),
    };
    assert_eq!(client.offer(&offers, &mut second).unwrap_err().to_string(), "disk on fire");
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        client.offer::<FillError>(&[offer(5, 5)], &mut |_, _| panic!("bad sector"))
    }));
    assert!(panics.is_err());
    wait_for(|| directory.references() == 0 && client.inner.lock().idle());
    let unfilled = client.read::<FillError>(want(1), &mut |_, _| panic!("it was whole")).unwrap().is_some();
    assert!(unfilled && read(&client, 2).unwrap() && read(&client, 5).unwrap());
    // The same call fills what this rank was granted for a batch.
    client.announce(&[want(8)]);
    let mut filled = 0;
    wait_for(|| {
        let mut write = |key: u64, out: &mut [u8]| {
            filled += 1;
            fill(key, out)
        };
        client.offer(&[offer(8, 9)], &mut write).unwrap();
        filled > 0
    });
    assert!(client.read::<FillError>(want(8), &mut |_, _| panic!("filled twice")).unwrap().is_some());
    client.retire([8].into_iter());
    directory.die();
    wait_for(|| client.offer(&[offer(9, 9)], &mut fill).is_err());
}

#[test]
fn a_dying_directory_fails_every_read_at_once() {
    let directory = TestDirectory::new(1 << 16);
    let (first, second) = (directory.client(0, 1 << 16, false), directory.client(1, 1 << 16, false));
    // Rank 0 is granted the fill and does not begin; rank 1 waits for it.
    first.announce(&[want(5)]);
    wait_for(|| directory.references() == 1);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| read(&second, 5));
        wait_for(|| directory.references() == 2);
        directory.die();
        let error = waiting.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("directory is gone"), "{error}");
    });
    wait_for(|| read(&first, 5).is_err());
    first.announce(&[want(6)]);
    first.retire([6].into_iter());
}

/// A directory that answers the first `Acquire` with `replies`.
fn hostile(memory: u64, replies: Vec<FromDirectory>) -> String {
    let memfd = TestDirectory::new(memory).memfd;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let client = CacheClient::connect(theirs, &memfd, ClientSpec { rank: 0, ahead_bytes: 1 << 20, verify: false });
    let client = client.unwrap();
    let other = std::thread::spawn(move || {
        let (mut decoder, mut buffer) = (Decoder::default(), [0; 4096]);
        loop {
            let bytes = ours.read(&mut buffer).unwrap();
            decoder.push(&buffer[..bytes]);
            while let Some(message) = decoder.next_message().unwrap() {
                if matches!(message, ToDirectory::Acquire { .. }) {
                    let mut out = Vec::new();
                    replies.iter().for_each(|reply| encode(reply, &mut out).unwrap());
                    ours.write_all(&out).unwrap();
                    return ours;
                }
            }
        }
    });
    client.announce(&[want(0), want(1)]);
    let kept = other.join().unwrap();
    wait_for(|| client.inner.lock().failed.is_some());
    let error = read(&client, 0).unwrap_err().to_string();
    drop(kept);
    error
}

#[test]
fn a_hostile_directory_is_an_error() {
    let granted = |ticket, grants: &[Grant]| FromDirectory::Granted { ticket, grants: grants.to_vec() };
    let (ready, fill) = (|offset| Grant::Ready { offset, bytes: 1000 }, |offset| Grant::Fill { offset, bytes: 1000 });
    let settled = |key, grant| FromDirectory::Settled { key, grant };
    for (replies, problem) in [
        (vec![granted(0, &[fill(0), fill(5000)])], "the page cache has 4096"),
        (vec![granted(0, &[ready(u64::MAX), Grant::Bypass])], "the page cache has 4096"),
        (vec![granted(0, &[fill(0), fill(999)])], "is in use"),
        (vec![granted(0, &[ready(0), ready(0)])], "is in use"),
        (vec![granted(0, &[ready(1500), fill(1000)])], "is in use"),
        (vec![granted(0, &[ready(0)])], "1 grants for request 0, 2 are due"),
        (vec![granted(7, &[ready(0), ready(2000)])], "2 are due for request 0"),
        (vec![granted(0, &[ready(0), ready(2000)]), granted(1, &[])], "none is under way"),
        (vec![granted(0, &[ready(0), ready(2000)]), settled(0, ready(0))], "does not wait"),
        (vec![settled(0, ready(0))], "does not wait"),
        (vec![settled(9, ready(0))], "does not wait"),
        (vec![granted(0, &[Grant::Wait, ready(0)]), settled(0, Grant::Wait)], "does not wait"),
        (vec![granted(0, &[Grant::Wait, ready(0)]), settled(0, ready(500))], "is in use"),
        (vec![granted(0, &[Grant::Wait, Grant::Wait]), settled(0, fill(0)), settled(0, fill(0))], "does not wait"),
    ] {
        let error = hostile(4096, replies);
        assert!(error.contains("says what cannot be") && error.contains(problem), "{error}, not {problem}");
    }
}

#[test]
fn a_half_written_entry_is_found_by_its_checksum() {
    let directory = TestDirectory::new(1 << 16);
    let (first, second) = (directory.client(0, 1 << 16, true), directory.client(1, 1 << 16, true));
    assert!(read(&first, 9).unwrap());
    std::os::unix::fs::FileExt::write_at(&directory.memfd, &[77], 500).unwrap();
    let error = read(&second, 9).unwrap_err().to_string();
    assert!(error.contains("entry 9") && error.contains("half-written"), "{error}");
}

/// Not asserted: what a hit costs, round trips included, the directory real.
#[test]
fn cost_of_a_hit() {
    let (host, clients) = hosted(64 << 20, PolicyKind::Lru, 1);
    let client = &clients[0];
    let batch = |n: u64| (0..64).map(move |k| want((n * 29 + k * 5) % 400)).collect::<Vec<_>>();
    (0..400).for_each(|key| assert!(read(client, key).unwrap()));
    let (batches, mut taken) = (2_000, 0);
    let start = Instant::now();
    (0..8).for_each(|n| client.announce(&batch(n)));
    for n in 0..batches {
        client.announce(&batch(n + 8));
        for item in batch(n) {
            taken += usize::from(client.read(item, &mut fill).unwrap().map_or(0, |bytes| bytes[0]));
        }
        client.retire(batch(n).iter().map(|item| item.key));
    }
    let each = start.elapsed().as_secs_f64() / (batches * 64) as f64;
    eprintln!("a hit costs {:.0} ns ({taken})", each * 1e9);
    assert_eq!((client.stats().bypasses, client.stats().misses), (0, 400));
    assert_eq!(host.notes(), Vec::<String>::new());
}

#[test]
fn ranks_share_the_real_directory_under_every_policy() {
    for policy in [PolicyKind::Pin, PolicyKind::Lru, PolicyKind::NextUse] {
        for capacity in [8_000, 20_000, 1 << 20] {
            let (mut host, clients) = hosted(capacity, policy, 3);
            std::thread::scope(|scope| {
                for (rank, client) in clients.iter().enumerate() {
                    scope.spawn(move || {
                        let keys = |n: u64| (0..5).map(move |k| want((n * 7 + rank as u64 * 13 + k * 3) % 40));
                        let batches: Vec<Vec<Item>> = (0..100).map(|n| keys(n).collect()).collect();
                        batches[..3].iter().for_each(|batch| client.announce(batch));
                        for (n, batch) in batches.iter().enumerate() {
                            batches.get(n + 3).iter().for_each(|batch| client.announce(batch));
                            batch.iter().for_each(|item| assert!(read(client, item.key).is_ok()));
                            client.retire(batch.iter().map(|item| item.key));
                        }
                    });
                }
            });
            assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
            wait_for(|| clients.iter().all(|client| client.inner.lock().idle()));
            if capacity == 1 << 20 {
                assert_eq!(host.stats().misses, 40, "one fill per entry");
            }
            host.stop();
            wait_for(|| clients.iter().all(|client| read(client, 1).is_err()));
        }
    }
}

/// Three ranks read ahead while the cache is cut to a half and grows again, over and over: memory goes, bytes stay true
/// (checksums on), and nobody waits for an answer that does not come.
#[test]
fn shrinking_and_growing_under_readers_gives_memory_back_and_never_a_wrong_byte() {
    const CAPACITY: u64 = 16 << 20;
    let (host, clients) = hosted(CAPACITY, PolicyKind::NextUse, 3);
    let large = |key: u64| Item { key, bytes: 200_000 + key, next_use: key, offer: false };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = clients
            .iter()
            .map(|client| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut reads = 0;
                    let mut batch = 0;
                    let keys = |batch: u64| (0..8).map(move |n| (batch * 8 + n) % 100);
                    client.announce(&keys(0).map(large).collect::<Vec<_>>());
                    while !stop.load(Ordering::Relaxed) {
                        client.announce(&keys(batch + 1).map(large).collect::<Vec<_>>());
                        for key in keys(batch) {
                            let mut fill = |key: u64, out: &mut [u8]| {
                                out.fill(key as u8);
                                Ok::<(), CacheError>(())
                            };
                            let held = client.read(large(key), &mut fill).unwrap();
                            assert!(held.is_none_or(|bytes| bytes.iter().all(|&byte| byte == key as u8)));
                            reads += 1;
                        }
                        client.retire(keys(batch));
                        batch += 1;
                    }
                    client.retire(keys(batch));
                    reads
                })
            })
            .collect();
        for round in 0..6 {
            wait_for(|| host.stats().used_bytes > CAPACITY * 3 / 4);
            let before = host.resident_bytes();
            let started = Instant::now();
            let wanted = host.resize(if round == 5 { 0 } else { CAPACITY / 2 });
            wait_for(|| host.resident_bytes() == wanted);
            println!("{before} to {wanted} bytes in {:?}", started.elapsed());
            assert!(host.stats().used_bytes <= CAPACITY);
            if round < 5 {
                host.resize(CAPACITY);
                wait_for(|| host.present_bytes() == CAPACITY);
            }
        }
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| assert!(reader.join().unwrap() > 100));
    });
    assert_eq!(host.notes(), Vec::<String>::new());
    wait_for(|| clients.iter().all(|client| client.inner.lock().idle()));
}
