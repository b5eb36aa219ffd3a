//! Windows with the page cache, and the order in which their entries are used.

use super::*;
use crate::data::cache_testing::{TestDirectory, hosted};
use crate::data::loader::{BatchPlanner, Loader, LoaderSpec, Order as SampleOrder};
use crate::data::windows::entries::ChunkEntries;
use crate::data::windows::future::Future;
use crate::data::windows::pieces::{Fresh, Pieces};
use cache::PolicyKind;
use spec::config::{CacheEntries, CachePolicy};

/// A session per file, in chunks of gzip or contiguous.
fn store(dir: &Path, chunk_rows: Option<usize>, sessions: usize) -> PathBuf {
    let out = dir.join(format!("emg-{chunk_rows:?}"));
    let gzip = chunk_rows.map(|_| 1);
    let storage = Storage { chunk_rows, gzip, shuffle: gzip.is_some(), ..Default::default() };
    let spec = SampleSpec { sessions, seconds: 4.0, ik_failure_rows: 700, storage, ..Default::default() };
    write_sample_data(&out, &spec).unwrap();
    out
}

/// All batches of one rank from `first_step` of the first epoch to the end of the second.
fn batches(dataset: &Arc<dyn Dataset>, rank: u64, threads: usize, first_step: u64) -> Vec<Vec<u8>> {
    let planner = BatchPlanner {
        order: SampleOrder { len: dataset.len() as u64, seed: 3, shuffle: crate::data::loader::Shuffle::Global },
        global_batch: 24,
        micro_batch: 8,
        rank,
        world_size: 2,
        drop_last: true,
        cut: Default::default(),
    };
    let spec = LoaderSpec { threads, slots: 2 * threads + 2, micro_batch: 8, ..Default::default() };
    let mut loader = Loader::new(Arc::clone(dataset), spec).unwrap();
    let mut all = Vec::new();
    for (epoch, first) in [(0, first_step), (1, 0)] {
        for batch in loader.run(planner.requests(epoch, first)).unwrap() {
            let batch = batch.unwrap();
            all.push([batch.field(0), batch.field(1)].concat());
        }
    }
    all
}

/// Entries of all files together.
fn plain_entries(config: &WindowKeys, chunk_rows: Option<usize>) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let reader = open_datasets(config, 3, &alone(), dir.path()).unwrap().reader;
    let entries = (0..reader.tables().len()).map(|file| reader.entries(file)).sum();
    assert!(chunk_rows.is_none_or(|rows| entries == 4 * 8_000_u64.div_ceil(rows as u64)));
    entries
}

#[test]
fn batches_are_the_same_with_and_without_the_page_cache() {
    let dir = tempfile::tempdir().unwrap();
    for chunk_rows in [Some(300), None] {
        let path = store(dir.path(), chunk_rows, 4);
        let config = with(&config(&path), |keys| {
            keys.data.chunk_cache_size = 200_000;
            keys.emg.normalize = true;
        });
        let open = |config: &WindowKeys, cache| {
            let team = Team { cache, ..alone() };
            open_datasets(config, 3, &team, dir.path()).unwrap().datasets.train
        };
        let plain = open(&config, None);
        let expected = [0, 1].map(|rank| batches(&plain, rank, 2, 0));
        let resumed = batches(&plain, 0, 2, 5);
        // Far too small, a quarter, and all: 16,000 rows of 144 bytes in use.
        for capacity in [100_000, 600_000, 8 << 20] {
            for policy in [CachePolicy::Auto, CachePolicy::Pin, CachePolicy::Lru] {
                let kind = match policy {
                    CachePolicy::Pin => PolicyKind::Pin,
                    CachePolicy::Lru => PolicyKind::Lru,
                    _ => PolicyKind::NextUse,
                };
                let (host, clients) = hosted(capacity, kind, 2);
                let config = with(&config, |keys| keys.data.cache = policy);
                let [a, b] = [0, 1].map(|rank: usize| open(&config, Some(Arc::clone(&clients[rank]))));
                let all = if policy == CachePolicy::Auto { vec![0, 1, 2, 8] } else { vec![2] };
                for threads in all {
                    let what = format!("{threads} threads, {capacity} bytes, {policy:?}, chunks {chunk_rows:?}");
                    std::thread::scope(|scope| {
                        let ranks = [&a, &b].into_iter().enumerate();
                        let ranks = ranks.map(|(n, set)| scope.spawn(move || batches(set, n as u64, threads, 0)));
                        for (rank, got) in ranks.collect::<Vec<_>>().into_iter().enumerate() {
                            assert!(got.join().unwrap() == expected[rank], "{what}, rank {rank}");
                        }
                    });
                }
                assert!(batches(&a, 0, 2, 5) == resumed);
                assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
                let stats = host.stats();
                assert!(stats.used_bytes <= capacity);
                if capacity == 8 << 20 {
                    let entries = plain_entries(&config, chunk_rows);
                    assert_eq!((stats.bypasses, stats.evictions), (0, 0));
                    assert!(stats.misses <= entries, "{} fills of {entries} entries", stats.misses);
                }
            }
        }
        // Windows as entries: chosen by the rule where chunks are shared, refused without shared chunks.
        for capacity in [100_000, 600_000] {
            let (host, clients) = hosted(capacity, PolicyKind::NextUse, 2);
            let config = with(&config, |keys| keys.data.cache_entries = CacheEntries::Sample);
            let open = |rank: usize| {
                let team = Team { cache: Some(Arc::clone(&clients[rank])), ..alone() };
                open_datasets(&config, 3, &team, dir.path()).unwrap()
            };
            let opened = [0, 1].map(open);
            let chosen = if chunk_rows.is_some() { "entries are single windows" } else { "entries are whole chunks" };
            let notes = &opened[0].datasets.notes;
            assert!(notes.iter().any(|note| note.contains(chosen)), "{notes:?}");
            for threads in [0, 2, 8] {
                std::thread::scope(|scope| {
                    let ranks = opened.iter().map(|data| &data.datasets.train).enumerate();
                    let ranks = ranks.map(|(n, set)| scope.spawn(move || batches(set, n as u64, threads, 0)));
                    for (rank, got) in ranks.collect::<Vec<_>>().into_iter().enumerate() {
                        assert!(got.join().unwrap() == expected[rank], "windows, {threads} threads, {capacity} bytes");
                    }
                });
            }
            assert!(batches(&opened[0].datasets.train, 0, 2, 5) == resumed);
            assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
            let stats = host.stats();
            assert!(stats.used_bytes <= capacity && (stats.hits > 0 || chunk_rows.is_none()), "{stats:?}");
        }
        // `off` does not even look at it.
        let directory = TestDirectory::new(8 << 20);
        let off = with(&config, |keys| keys.data.cache = CachePolicy::Off);
        assert!(batches(&open(&off, Some(directory.client(0, 1 << 20, true))), 0, 2, 5) == resumed);
        assert_eq!(directory.stats().misses, 0);
    }
}

#[test]
fn a_cancelled_run_and_a_broken_file_give_every_reference_back() {
    for entries in [CacheEntries::Chunk, CacheEntries::Sample] {
        cancel_and_break(entries);
    }
}

fn cancel_and_break(cache_entries: CacheEntries) {
    let dir = tempfile::tempdir().unwrap();
    let path = store(dir.path(), Some(300), 3);
    let directory = TestDirectory::new(8 << 20);
    let team = Team { cache: Some(directory.client(0, 2 << 20, true)), ..alone() };
    let config = with(&config(&path), |keys| keys.data.cache_entries = cache_entries);
    let train = open_datasets(&config, 3, &team, dir.path()).unwrap().datasets.train;
    let requests = |epoch| {
        let order = SampleOrder { len: train.len() as u64, seed: 3, shuffle: crate::data::loader::Shuffle::Global };
        let planner = BatchPlanner {
            order,
            global_batch: 8,
            micro_batch: 8,
            rank: 0,
            world_size: 1,
            drop_last: true,
            cut: Default::default(),
        };
        planner.requests(epoch, 0)
    };
    let mut loader = Loader::new(Arc::clone(&train), LoaderSpec { micro_batch: 8, ..Default::default() }).unwrap();
    let settle = || {
        let waited = std::time::Instant::now();
        while directory.references() > 0 {
            assert!(waited.elapsed().as_secs() < 60, "{} references are left", directory.references());
            std::thread::yield_now();
        }
    };
    for epoch in 0..3 {
        let mut stream = loader.run(requests(epoch)).unwrap();
        assert!(stream.next().unwrap().is_ok());
        drop(stream);
        settle();
    }
    let directory = TestDirectory::new(8 << 20);
    let team = Team { cache: Some(directory.client(0, 2 << 20, true)), ..alone() };
    let train = open_datasets(&config, 3, &team, dir.path()).unwrap().datasets.train;
    for entry in std::fs::read_dir(&path).unwrap() {
        std::fs::OpenOptions::new().write(true).open(entry.unwrap().path()).unwrap().set_len(9000).unwrap();
    }
    let mut loader = Loader::new(train, LoaderSpec { micro_batch: 8, ..Default::default() }).unwrap();
    let error = loader.run(requests(0)).unwrap().find_map(Result::err).unwrap().to_string();
    assert!(error.contains("changed since it was opened"), "{error}");
    let waited = std::time::Instant::now();
    while directory.references() > 0 {
        assert!(waited.elapsed().as_secs() < 60, "{} references are left", directory.references());
        std::thread::yield_now();
    }
}

#[test]
fn next_uses_equal_a_search_through_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = store(dir.path(), Some(300), 3);
    let directory = TestDirectory::new(1 << 20);
    let data = open_datasets(&config(&path), 3, &alone(), dir.path()).unwrap();
    let pages = ChunkEntries::new(Arc::clone(&data.reader), directory.client(0, 1 << 20, false));
    let mut windows = Windows::new(100);
    (0..3).for_each(|file| windows.add(file, [150, 7_900], 500));
    windows.limit(150);
    let (len, rows) = (windows.len() as u64, 500);
    let order = SampleOrder { len, seed: 11, shuffle: crate::data::loader::Shuffle::Global };
    let future = Future::new(order.clone(), rows);
    let keys_of = |index: u64| {
        let (file, row) = windows.get(index as usize).unwrap();
        pages.keys(file as usize, row, rows)
    };
    for at in (0..4 * len).step_by(7) {
        let (epoch, ids) = (at / len, [order.at(at / len, at % len).unwrap()]);
        assert_eq!(future.position(epoch, &ids), at);
        for key in keys_of(ids[0]) {
            let uses = |position: &u64| keys_of(order.at(position / len, position % len).unwrap()).contains(&key);
            let wanted = (at + 1..(epoch + 2) * len).find(uses).unwrap_or(u64::MAX);
            assert_eq!(future.next_use(key, epoch, at, &pages, &windows), wanted, "entry {key} after {at}");
        }
    }
}

#[test]
fn pieces_cover_their_windows_and_are_offered_by_their_next_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = store(dir.path(), Some(300), 3);
    let data = open_datasets(&config(&path), 3, &alone(), dir.path()).unwrap();
    let (reader, len, rows) = (&data.reader, 200, 500);
    let mut windows = Windows::new(100);
    (0..3).for_each(|file| windows.add(file, [150, 7_900], 500));
    windows.limit(len as usize);
    let order = SampleOrder { len, seed: 5, shuffle: crate::data::loader::Shuffle::Global };
    let pieces = Pieces::new(windows.clone(), rows, order.clone(), (2, 1000, 1e6), reader).unwrap();
    let mut keys = std::collections::BTreeSet::new();
    for index in 0..len {
        let (file, row) = windows.get(index as usize).unwrap();
        let mut next = 0;
        for piece in pieces.of(index, reader) {
            assert!(piece.key >= 1000 && keys.insert(piece.key), "{piece:?}");
            assert_eq!((piece.file, piece.into.start, piece.into.len()), (file as usize, next, piece.rows.len()));
            assert_eq!(piece.chunk * 300 + piece.rows.start as u64, row + next as u64);
            assert!(piece.rows.end <= 300 && pieces.locate(piece.key, reader).unwrap() == piece);
            next = piece.into.end;
        }
        assert_eq!(next, rows);
    }
    assert_eq!(pieces.of(len, reader).count(), 0);
    assert!(pieces.locate(u64::MAX, reader).is_err() && pieces.locate(1, reader).is_err());
    // Half of epoch 1 is read; the batch at 100..108 is being read now, the next one is announced.
    let ids = |from: u64| (from..from + 8).map(|position| order.at(1, position).unwrap()).collect::<Vec<_>>();
    let (now, ahead) = (ids(100), ids(108));
    pieces.announce(BatchAhead { epoch: 1, ids: &now }, reader);
    pieces.announce(BatchAhead { epoch: 1, ids: &ahead }, reader);
    let check = |from: u64, due: u64| {
        let (chunk, _) = reader.chunk(0, 7, &mut Scratch::default()).unwrap();
        let offers = pieces.offers(&Fresh { file: 0, chunk: 7, bytes: chunk }, reader);
        let touching = windows.touching(0, 2100..2400, 500).flatten();
        let mut wanted: Vec<(u64, u64)> = touching
            .map(|index| {
                let at = |epoch: u64| epoch * len + order.position_of(epoch, index).unwrap();
                (if at(1) >= from { at(1) } else { at(2) }, index)
            })
            .collect();
        wanted.sort_unstable();
        assert_eq!(
            offers.iter().map(|offer| offer.item.next_use).collect::<Vec<_>>(),
            wanted.iter().map(|w| w.0).collect::<Vec<_>>()
        );
        for (offer, (next_use, index)) in offers.iter().zip(wanted) {
            let piece = pieces.of(index, reader).find(|piece| piece.chunk == 7).unwrap();
            assert_eq!((offer.item.key, offer.due), (piece.key, next_use <= due));
            assert_eq!(offer.item.bytes as usize, piece.rows.len() * reader.tables()[0].used_row_bytes());
        }
    };
    check(300, 309);
    pieces.retire(BatchAhead { epoch: 1, ids: &now }, reader);
    check(308, 317);
}
