//! Entries whose length shows when they are made, against the real directory.

use super::*;
use crate::{CacheHost, Door, HostPlan, knock};

const ALL: std::ops::RangeInclusive<u64> = 0..=u64::MAX;

fn clients(host: &CacheHost, count: usize) -> Vec<Arc<CacheClient>> {
    let connect = |_| {
        let joiner = host.joiner().unwrap();
        let (rank, socket) = joiner.join().unwrap();
        let memory = File::from(host.memfd.try_clone().unwrap());
        let spec = ClientSpec { rank, ahead_bytes: host.capacity_bytes() / 8, verify: false };
        CacheClient::connect(UnixStream::from(socket), &memory, spec).unwrap()
    };
    (0..count).map(connect).collect()
}

fn lazy(capacity_bytes: u64) -> CacheHost {
    let plan = HostPlan { capacity_bytes, policy: PolicyKind::NextUse, ranks: Vec::new() };
    CacheHost::start_lazily(&plan, || None).unwrap()
}

/// Entry `key` has key * 10 + 1 bytes of its number.
fn length(key: u64) -> usize {
    key as usize * 10 + 1
}

fn make(filling: &mut Filling) -> Result<(), FillError> {
    let (key, bytes) = (filling.key(), length(filling.key()));
    if filling.room() < bytes && !filling.enlarge(bytes)? {
        return Ok(());
    }
    filling.set_length(bytes);
    filling.bytes_mut()[..bytes].fill(key as u8);
    Ok(())
}

fn guess(key: u64, bytes: u64) -> Item {
    Item { key, bytes, next_use: u64::MAX, offer: false }
}

fn check(taken: &Taken, key: u64) {
    assert!(taken.len() == length(key) && taken.iter().all(|byte| *byte == key as u8), "entry {key}");
}

#[test]
fn every_length_is_stored_whatever_was_guessed() {
    let host = lazy(1 << 20);
    let clients = clients(&host, 3);
    for (number, client) in clients.iter().enumerate() {
        for key in 1..200 {
            let taken = client.open(guess(key, 1 + (key * 7919) % 3000), false, ALL, &mut make).unwrap().unwrap();
            check(&taken, key);
        }
        if number == 0 {
            client.node_stats();
        }
    }
    let total: u64 = (1..200).map(|key| length(key) as u64).sum();
    let stats = host.stats();
    assert_eq!((stats.misses, stats.hits, stats.bypasses, stats.used_bytes), (199, 398, 0, total));
    let found = clients[1].stored(7, u64::MAX).unwrap().unwrap();
    check(&found, 7);
    assert!(clients[1].stored(999, u64::MAX).unwrap().is_none());
    // Looked for in vain, it can be stored.
    assert!(clients[1].open(guess(999, 1), false, ALL, &mut make).unwrap().is_some());
    assert!(clients[2].stored(999, u64::MAX).unwrap().is_some());
}

#[test]
fn what_is_kept_is_read_without_the_directory_until_the_cache_is_full() {
    let host = lazy(64 << 10);
    let clients = clients(&host, 2);
    clients.iter().for_each(|client| client.keep_idle());
    let read =
        |client: &Arc<CacheClient>, key| client.open(guess(key, length(key) as u64), false, ALL, &mut make).unwrap();
    for _ in 0..5 {
        for key in 1..50 {
            clients.iter().for_each(|client| check(&read(client, key).unwrap(), key));
        }
    }
    let stats = host.stats();
    assert_eq!((stats.misses, stats.hits), (49, 49), "each client asked once");
    assert_eq!(clients[0].stats().hits, 4 * 49);
    // Twice as much as fits: the first refusal makes everybody let go.
    for key in 50..150 {
        if let Some(taken) = read(&clients[0], key) {
            check(&taken, key);
        }
    }
    wait_for(|| {
        (150..160).for_each(|key| drop(read(&clients[0], key)));
        host.stats().evictions > 0
    });
    for key in 1..150 {
        read(&clients[1], key).iter().for_each(|taken| check(taken, key));
    }
}

#[test]
fn announced_guesses_are_granted_and_made_ahead() {
    let host = lazy(1 << 20);
    let client = clients(&host, 1).remove(0);
    let wants: Vec<Item> = (1..20).map(|key| guess(key, 64)).collect();
    client.announce_open(&wants);
    wait_for(|| client.work_ahead_open(ALL, &mut make));
    while client.work_ahead_open(ALL, &mut make) {}
    for key in 1..20 {
        check(&client.open(guess(key, 64), false, ALL, &mut make).unwrap().unwrap(), key);
    }
    client.retire(1..20);
    drop(client);
    assert_eq!((host.stats().entries, host.stats().used_bytes), (19, (1..20).map(|key| length(key) as u64).sum()));
}

#[test]
fn a_failed_make_and_one_that_stores_nothing_leave_no_entry() {
    let host = lazy(1 << 20);
    let client = clients(&host, 1).remove(0);
    assert!(client.open(guess(1, 64), false, ALL, &mut |_| Err(FillError::Disk)).is_err());
    let mut nothing = |filling: &mut Filling| {
        filling.set_length(0);
        Ok::<(), FillError>(())
    };
    assert!(client.open(guess(2, 64), false, ALL, &mut nothing).unwrap().is_none());
    let mut too_long = |filling: &mut Filling| {
        assert!(!filling.enlarge(2 << 20)?);
        Ok::<(), FillError>(())
    };
    assert!(client.open(guess(3, 64), false, ALL, &mut too_long).unwrap().is_none());
    check(&client.open(guess(1, 64), false, ALL, &mut make).unwrap().unwrap(), 1);
    wait_for(|| host.stats().entries == 1);
}

/// Threads of processes that come in by the door, with a cache that is too small, mixed lengths and no known order.
#[test]
fn guests_never_wait_in_a_circle_nor_read_wrong_bytes() {
    let name = format!("headroom-test-open-{}", std::process::id());
    let host = lazy(40_000);
    let _door = Door::open(&name, host.joiner().unwrap()).unwrap();
    std::thread::scope(|scope| {
        for guest in 0..3u64 {
            let joined = knock(&name).unwrap();
            let spec = ClientSpec { rank: joined.rank, ahead_bytes: 10_000, verify: false };
            let client = CacheClient::connect(joined.socket, &joined.memory, spec).unwrap();
            client.keep_idle();
            for thread in 0..2 {
                let client = Arc::clone(&client);
                scope.spawn(move || {
                    for n in 0..60u64 {
                        let keys: Vec<u64> =
                            (0..6).map(|k| 1 + (n * 5 + guest * 17 + thread * 3 + k * 11) % 120).collect();
                        let wants: Vec<Item> = keys.iter().map(|key| guess(*key, 400)).collect();
                        client.announce_open(&wants);
                        for key in &keys {
                            let taken = client.open(guess(*key, 400), false, ALL, &mut make).unwrap();
                            taken.iter().for_each(|taken| check(taken, *key));
                        }
                        client.retire(keys.into_iter());
                    }
                });
            }
        }
    });
    assert!(host.stats().evictions > 0 && host.stats().hits > 0, "{:?}", host.stats());
}

/// An entry that is kept is asked for once; every read counts in the node's counters all the same.
#[test]
fn reads_of_kept_entries_count_for_the_node() {
    let host = lazy(1 << 20);
    for client in clients(&host, 2) {
        client.keep_idle();
        for _ in 0..50 {
            for key in 1..100 {
                check(&client.open(guess(key, 1 + 10 * key), false, ALL, &mut make).unwrap().unwrap(), key);
            }
        }
        let own = client.stats();
        assert_eq!(own.hits + own.misses, 50 * 99);
        drop(client);
    }
    // The directory hears the rest when the second client has gone.
    while host.stats().hits < 2 * 50 * 99 - 99 {
        std::thread::yield_now();
    }
    assert_eq!((host.stats().hits, host.stats().misses), (2 * 50 * 99 - 99, 99));
}
