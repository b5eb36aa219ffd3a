//! The loader over a data set in memory whose samples can fail, panic, and be waited for.

use super::*;
use crate::data::{BatchAhead, Dtype, ReadRequest};
use std::collections::BTreeSet;
use std::sync::{Barrier, Mutex, Weak};

mod throttle;

/// Sample `i`: f32 `[3, 5]` of `i + k / 16`, and i64 `[]` of `-i`.
struct Numbers {
    len: usize,
    fields: Vec<FieldSpec>,
    fail: Option<usize>,
    panic: Option<usize>,
    /// These two samples are read at the same time, or never.
    meet: Option<([usize; 2], Barrier)>,
    read: Mutex<Vec<usize>>,
    threads: Mutex<BTreeSet<String>>,
    announced: Mutex<Vec<(u64, Vec<u64>)>>,
    retired: Mutex<Vec<(u64, Vec<u64>)>>,
    /// Pieces of work ahead of need that are left.
    ahead: Mutex<usize>,
    waker: Mutex<Option<Weak<dyn Wake>>>,
}

impl Numbers {
    fn new(len: usize) -> Self {
        let field = |name, shape: &[usize], dtype| FieldSpec::new(name, shape, dtype);
        Self {
            len,
            fields: vec![field("x", &[3, 5], Dtype::F32), field("y", &[], Dtype::I64)],
            fail: None,
            panic: None,
            meet: None,
            read: Mutex::default(),
            threads: Mutex::default(),
            announced: Mutex::default(),
            retired: Mutex::default(),
            ahead: Mutex::default(),
            waker: Mutex::default(),
        }
    }
}

impl Dataset for Numbers {
    fn announce(&self, batch: BatchAhead) {
        self.announced.lock().unwrap().push((batch.epoch, batch.ids.to_vec()));
    }

    fn retire(&self, batch: BatchAhead) {
        self.retired.lock().unwrap().push((batch.epoch, batch.ids.to_vec()));
    }

    fn work_ahead(&self, _: &mut Scratch) -> bool {
        let mut ahead = self.ahead.lock().unwrap();
        let some = *ahead > 0;
        *ahead = ahead.saturating_sub(1);
        some
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        *self.waker.lock().unwrap() = Some(waker);
    }

    fn len(&self) -> usize {
        self.len
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(
        &self,
        ReadRequest { index, .. }: ReadRequest,
        out: &mut [&mut [u8]],
        _: &mut Scratch,
    ) -> Result<(), DataError> {
        self.threads.lock().unwrap().insert(std::thread::current().name().unwrap_or("").to_owned());
        if let Some((samples, barrier)) = &self.meet
            && samples.contains(&index)
        {
            barrier.wait();
        }
        assert!(self.panic != Some(index), "bad sector");
        if self.fail == Some(index) {
            return Err(DataError::Other("disk on fire".into()));
        }
        for (k, bytes) in out[0].chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&(index as f32 + k as f32 / 16.0).to_ne_bytes());
        }
        out[1].copy_from_slice(&(-(index as i64)).to_ne_bytes());
        self.read.lock().unwrap().push(index);
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("numbers row {index}")
    }
}

fn spec(threads: usize) -> LoaderSpec {
    LoaderSpec { threads, slots: 2 * threads + 2, micro_batch: 13, ..LoaderSpec::default() }
}

fn loader(dataset: &Arc<Numbers>, spec: LoaderSpec) -> Loader {
    Loader::new(Arc::clone(dataset) as Arc<dyn Dataset>, spec).unwrap()
}

fn planner(len: usize) -> BatchPlanner {
    let order = Order { len: len as u64, seed: 4, shuffle: Shuffle::Global };
    BatchPlanner {
        order,
        global_batch: 40,
        micro_batch: 13,
        rank: 1,
        world_size: 2,
        drop_last: false,
        cut: Default::default(),
    }
}

fn requests(ids: &[&[u64]]) -> Vec<BatchRequest> {
    ids.iter().map(|ids| BatchRequest { sample_ids: ids.to_vec(), ..BatchRequest::default() }).collect()
}

/// Everything a batch is.
type Contents = (BatchRequest, Vec<u8>, Vec<u8>);

fn contents(stream: BatchStream) -> Vec<Contents> {
    stream
        .map(|batch| {
            let batch = batch.unwrap();
            (batch.request().clone(), batch.field(0).to_vec(), batch.field(1).to_vec())
        })
        .collect()
}

fn expected(requests: impl Iterator<Item = BatchRequest>) -> Vec<Contents> {
    let floats = |id: u64| (0..15).flat_map(move |k| (id as f32 + k as f32 / 16.0).to_ne_bytes());
    requests
        .map(|request| {
            let x = request.sample_ids.iter().flat_map(|&id| floats(id)).collect();
            let y = request.sample_ids.iter().flat_map(|&id| (-(id as i64)).to_ne_bytes()).collect();
            (request, x, y)
        })
        .collect()
}

#[test]
fn batches_do_not_depend_on_threads() {
    let dataset = Arc::new(Numbers::new(503));
    for threads in [0, 1, 2, 8] {
        let mut loader = loader(&dataset, spec(threads));
        for epoch in 0..3 {
            let stream = loader.run(planner(503).requests(epoch, 0)).unwrap();
            assert_eq!(contents(stream), expected(planner(503).requests(epoch, 0)), "{threads} threads, epoch {epoch}");
        }
        assert!(loader.stats().most_ahead <= loader.shared.prefetch);
        assert_eq!(loader.stats().free_slots, spec(threads).slots);
    }
}

#[test]
fn a_batch_is_aligned_counted_and_outlives_its_loader() {
    let dataset = Arc::new(Numbers::new(100));
    let mut loader = loader(&dataset, spec(2));
    assert_eq!(loader.pool_bytes(), 6 * (13_usize * 60).next_multiple_of(64) + 6 * (13_usize * 8).next_multiple_of(64));
    let batch = loader.run(requests(&[&[5, 7]]).into_iter()).unwrap().next().unwrap().unwrap();
    drop(loader);
    assert_eq!((batch.len(), batch.field(0).len(), batch.field(1).len(), batch.field(2).len()), (2, 120, 16, 0));
    assert_eq!([batch.field(0), batch.field(1)].map(|field| field.as_ptr() as usize % 64), [0, 0]);
    assert_eq!(batch.field(1)[8..], (-7_i64).to_ne_bytes());
    std::thread::spawn(move || drop(batch)).join().unwrap();
}

#[test]
fn threads_share_the_first_batch() {
    let mut dataset = Numbers::new(13);
    dataset.meet = Some(([0, 12], Barrier::new(2)));
    let dataset = Arc::new(dataset);
    let ids: Vec<u64> = (0..13).collect();
    let mut loader = loader(&dataset, spec(2));
    assert_eq!(contents(loader.run(requests(&[&ids]).into_iter()).unwrap()).len(), 1);
}

#[test]
fn a_failing_sample_ends_the_stream_with_its_name_after_the_batches_before_it() {
    for (threads, panics) in [(0, false), (1, false), (2, false), (8, false), (0, true), (2, true)] {
        let mut dataset = Numbers::new(300);
        *(if panics { &mut dataset.panic } else { &mut dataset.fail }) = Some(137);
        let dataset = Arc::new(dataset);
        let plan = BatchPlanner { order: Order { len: 300, seed: 4, shuffle: Shuffle::Off }, ..planner(300) };
        let bad = plan.requests(0, 0).position(|request| request.sample_ids.contains(&137)).unwrap();
        let mut loader = loader(&dataset, spec(threads));
        let mut stream = loader.run(plan.requests(0, 0)).unwrap();
        for _ in 0..bad {
            assert!(stream.next().unwrap().is_ok());
        }
        let error = stream.next().unwrap().err().unwrap().to_string();
        let cause = if panics { "reading panicked: bad sector" } else { "disk on fire" };
        assert_eq!(error, format!("sample 137 (numbers row 137): {cause}"));
        assert!(stream.next().is_none());
        drop(stream);
        // The loader is as good as new, and no slot is lost.
        let rest = || plan.requests(0, 4);
        assert_eq!(contents(loader.run(rest()).unwrap()), expected(rest()));
        // A chunk of the failed run may be out for a moment more.
        (0..1_000_000)
            .take_while(|_| loader.stats().free_slots < spec(threads).slots)
            .for_each(|_| std::thread::yield_now());
        assert_eq!(loader.stats().free_slots, spec(threads).slots);
    }
}

#[test]
fn impossible_requests_are_errors() {
    let dataset = Arc::new(Numbers::new(10));
    for threads in [0, 2] {
        let mut loader = loader(&dataset, spec(threads));
        let mut first = |ids: &[u64]| {
            let mut stream = loader.run(requests(&[&[], ids]).into_iter()).unwrap();
            assert!(stream.next().unwrap().unwrap().is_empty());
            stream.next().unwrap().err().map(|error| error.to_string())
        };
        assert_eq!(first(&[3]), None);
        assert_eq!(first(&[3, 10]).unwrap(), "sample 10 was asked for, the data set has 10");
        assert!(first(&[1; 14]).unwrap().contains("14 samples was asked for, slots hold 13"));
    }
    let none = LoaderSpec { slots: 0, ..spec(1) };
    assert!(Loader::new(dataset, none).err().unwrap().to_string().contains("0 slots"));
}

#[test]
fn a_cancelled_run_leaves_the_loader_usable() {
    let dataset = Arc::new(Numbers::new(503));
    for (threads, persistent) in [(0, true), (1, true), (2, true), (8, true), (2, false)] {
        let mut loader = loader(&dataset, LoaderSpec { persistent, ..spec(threads) });
        for taken in [0, 1, 3, 5].map(|taken: usize| taken.min(spec(threads).slots)) {
            let mut stream = loader.run(planner(503).requests(0, 0)).unwrap();
            let batches: Vec<_> = stream.by_ref().take(taken).map(Result::unwrap).collect();
            drop(stream);
            let rerun = loader.run(planner(503).requests(1, 9)).unwrap();
            drop(batches);
            assert_eq!(contents(rerun), expected(planner(503).requests(1, 9)));
        }
    }
}

#[test]
fn resuming_at_a_step_reads_nothing_before_it() {
    let dataset = Arc::new(Numbers::new(503));
    let stream_loader = &mut loader(&dataset, spec(2));
    assert!(stream_loader.run(planner(503).requests(0, 9)).unwrap().all(|batch| batch.is_ok()));
    let mut read: Vec<u64> = dataset.read.lock().unwrap().iter().map(|&id| id as u64).collect();
    let mut wanted: Vec<u64> = planner(503).requests(0, 9).flat_map(|request| request.sample_ids).collect();
    read.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(read, wanted);
    assert_eq!(stream_loader.stats().samples_read, wanted.len() as u64);
}

#[test]
fn prefetch_never_exceeds_its_slots() {
    let dataset = Arc::new(Numbers::new(2000));
    let mut loader = loader(&dataset, spec(2));
    let mut stream = loader.run(planner(2000).requests(0, 0)).unwrap();
    let held = stream.next().unwrap().unwrap();
    // Prefetch factor 2 × 2 threads; once they are ready, nothing is left to do until a batch is taken.
    while stream.stats().queued < 4 {
        std::thread::yield_now();
    }
    let ahead: usize = planner(2000).requests(0, 0).take(5).map(|request| request.sample_ids.len()).sum();
    assert_eq!((stream.stats().samples_read, stream.stats().most_ahead), (ahead as u64, 4));
    assert_eq!(held.request(), &planner(2000).request(0, 0, 0));
}

#[test]
fn holding_every_slot_is_an_error_until_one_is_let_go() {
    let dataset = Arc::new(Numbers::new(503));
    for threads in [0, 1] {
        let tight = LoaderSpec { slots: 2, held_timeout_s: 0.0, ..spec(threads) };
        let mut one = loader(&dataset, tight.clone());
        let mut stream = one.run(planner(503).requests(0, 0)).unwrap();
        let held = [stream.next().unwrap().unwrap(), stream.next().unwrap().unwrap()];
        let error = stream.next().unwrap().err().unwrap().to_string();
        assert!(error.contains("all 2 batch slots were still in use"), "{error}");
        drop(held);

        let mut patient = loader(&dataset, LoaderSpec { held_timeout_s: 600.0, ..tight });
        let mut stream = patient.run(planner(503).requests(0, 0)).unwrap();
        let held = [stream.next().unwrap().unwrap(), stream.next().unwrap().unwrap()];
        let other = std::thread::spawn(move || drop(held));
        assert_eq!(stream.next().unwrap().unwrap().request(), &planner(503).requests(0, 0).nth(2).unwrap());
        other.join().unwrap();
    }
}

#[test]
fn threads_persist_over_epochs_only_when_asked_to() {
    for (persistent, ids) in [(true, [[0, 1], [0, 1]]), (false, [[0, 1], [2, 3]])] {
        let dataset = Arc::new(Numbers::new(503));
        let mut loader = loader(&dataset, LoaderSpec { persistent, ..spec(2) });
        for (epoch, ids) in ids.into_iter().enumerate() {
            dataset.threads.lock().unwrap().clear();
            let mut stream = loader.run(planner(503).requests(epoch as u64, 0)).unwrap();
            assert_eq!(stream.worker_ids(), ids);
            assert!(stream.all(|batch| batch.is_ok()));
            let names: BTreeSet<_> = ids.iter().map(|id| format!("hr-load-{id}")).collect();
            assert!(dataset.threads.lock().unwrap().is_subset(&names), "epoch {epoch}: {names:?}");
        }
    }
    let dataset = Arc::new(Numbers::new(20));
    let mut unthreaded = loader(&dataset, spec(0));
    assert!(unthreaded.run(planner(20).requests(0, 0)).unwrap().all(|batch| batch.is_ok()));
    assert_eq!(unthreaded.worker_ids(), Vec::<u64>::new());
    assert!(!dataset.threads.lock().unwrap().iter().any(|name| name.starts_with("hr-load")));
}

#[test]
fn many_fields_are_read_like_few() {
    struct Wide(Vec<FieldSpec>);
    impl Dataset for Wide {
        fn len(&self) -> usize {
            50
        }
        fn fields(&self) -> &[FieldSpec] {
            &self.0
        }
        fn read(
            &self,
            ReadRequest { index, .. }: ReadRequest,
            out: &mut [&mut [u8]],
            _: &mut Scratch,
        ) -> Result<(), DataError> {
            assert_eq!(out.len(), 11);
            out.iter_mut().enumerate().for_each(|(field, bytes)| bytes.fill((index + field) as u8));
            Ok(())
        }
        fn describe(&self, index: usize) -> String {
            index.to_string()
        }
    }
    // Field 0 holds no bytes at all.
    let field = |size| FieldSpec::new("w", &[size], Dtype::U8);
    let dataset = Arc::new(Wide((0..11).map(field).collect()));
    let mut loader = Loader::new(dataset, spec(2)).unwrap();
    let batch = loader.run(requests(&[&[3, 40]]).into_iter()).unwrap().next().unwrap().unwrap();
    for field in 0..11 {
        let expected: Vec<u8> = [3, 40].iter().flat_map(|id| vec![(id + field) as u8; field]).collect();
        assert_eq!(batch.field(field), expected);
    }
}

/// Sample `i`: `i % 7` numbers `i`, their squares as bytes, and `i`.
struct Ragged(Vec<FieldSpec>);

impl Ragged {
    fn new() -> Self {
        let numbers = FieldSpec::ragged("n", &[2], Dtype::I32, 6);
        let along = FieldSpec::along("b", &[], Dtype::U8, (0, &numbers));
        Self(vec![numbers, along, FieldSpec::new("i", &[], Dtype::I64)])
    }
}

impl Dataset for Ragged {
    fn len(&self) -> usize {
        500
    }
    fn fields(&self) -> &[FieldSpec] {
        &self.0
    }
    fn read(
        &self,
        ReadRequest { index, .. }: ReadRequest,
        out: &mut [&mut [u8]],
        _: &mut Scratch,
    ) -> Result<(), DataError> {
        let rows = index % 7;
        for cell in out[0].chunks_exact_mut(4).take(2 * rows) {
            cell.copy_from_slice(&(index as i32).to_ne_bytes());
        }
        out[0] = &mut std::mem::take(&mut out[0])[..8 * rows];
        out[1][..rows].fill((index * index) as u8);
        // Sample 400 gives one byte too few.
        out[1] = &mut std::mem::take(&mut out[1])[..if index == 400 { 0 } else { rows }];
        out[2].copy_from_slice(&(index as i64).to_ne_bytes());
        Ok(())
    }
    fn describe(&self, index: usize) -> String {
        index.to_string()
    }
}

#[test]
fn samples_of_different_lengths_follow_each_other_with_their_offsets() {
    let ids: Vec<u64> = [13, 7, 8, 0, 14, 20, 27, 6, 5, 4, 3, 2, 1].into_iter().chain(100..113).collect();
    let batches = [&ids[..13], &ids[13..], &ids[3..4], &[], &ids[5..12]];
    for threads in [0, 1, 2, 8] {
        let mut loader = Loader::new(Arc::new(Ragged::new()), spec(threads)).unwrap();
        assert_eq!(loader.pool_bytes() / spec(threads).slots, 13_usize * 48 + 16 + 128 + 256 + 128);
        for (batch, ids) in loader.run(requests(&batches).into_iter()).unwrap().zip(batches) {
            let batch = batch.unwrap();
            let numbers: Vec<u8> =
                ids.iter().flat_map(|id| (*id as i32).to_ne_bytes().repeat(2 * (id % 7) as usize)).collect();
            let squares: Vec<u8> = ids.iter().flat_map(|id| vec![(id * id) as u8; (id % 7) as usize]).collect();
            let ends = ids.iter().scan(0, |at, id| {
                *at += (id % 7) as i64;
                Some(*at)
            });
            let offsets: Vec<u8> = std::iter::once(0i64).chain(ends).flat_map(i64::to_ne_bytes).collect();
            let whole = |field| batch.runs(field).collect::<Vec<_>>().concat();
            assert_eq!((whole(0), whole(1), whole(2)), (numbers, squares.clone(), Vec::new()), "{threads} threads");
            assert_eq!((batch.offsets(0), batch.offsets(1), batch.offsets(2)), (&offsets[..], &offsets[..], &[][..]));
            assert_eq!((batch.rows(0), batch.rows(1), batch.rows(2)), (squares.len(), squares.len(), ids.len()));
            assert!(batch.field(0).is_empty() && batch.field(2).len() == 8 * ids.len());
        }
        let odd = loader.run(requests(&[&[1, 400]]).into_iter()).unwrap().next().unwrap().err().unwrap().to_string();
        assert!(odd.starts_with("sample 400 (400): field b: 0 bytes"), "{odd}");
    }
}

#[test]
fn a_dying_thread_ends_a_waiting_stream() {
    let mut dataset = Numbers::new(13);
    // Sample 0 waits for the thread below, so the stream has to wait.
    dataset.meet = Some(([0, 0], Barrier::new(2)));
    let dataset = Arc::new(dataset);
    let mut loader = loader(&dataset, spec(1));
    let shared = Arc::clone(&loader.shared);
    let mut stream = loader.run(requests(&[&[0]]).into_iter()).unwrap();
    // Sample 0 is being read once its thread has signed in.
    while dataset.threads.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    let other = std::thread::spawn(move || shared.die("loader thread 0 died".into()));
    assert_eq!(stream.next().unwrap().err().unwrap().to_string(), "loader thread 0 died");
    other.join().unwrap();
    dataset.meet.as_ref().unwrap().1.wait();
}

#[test]
fn every_batch_is_announced_in_order_and_retired_once() {
    for threads in [0, 1, 2, 8] {
        let mut dataset = Numbers::new(503);
        dataset.fail = Some(137);
        let dataset = Arc::new(dataset);
        let mut loader = loader(&dataset, spec(threads));
        // Read to the end or the bad sample, cut short, refused, and empty.
        let planned = |epoch| planner(503).requests(epoch, 0).collect::<Vec<_>>();
        let runs = [(planned(0), 1000), (planned(1), 3), (requests(&[&[], &[1, 503], &[2]]), 1000), (planned(2), 0)];
        for (run, take) in runs {
            dataset.announced.lock().unwrap().clear();
            dataset.retired.lock().unwrap().clear();
            loader.run(run.clone().into_iter()).unwrap().take(take).for_each(drop);
            let announced = dataset.announced.lock().unwrap().clone();
            let expected: Vec<_> = run.into_iter().map(|request| (request.epoch, request.sample_ids)).collect();
            assert!(expected.starts_with(&announced), "in order");
            // Chunks of a cancelled run may be out for a moment more.
            while dataset.retired.lock().unwrap().len() < announced.len() {
                std::thread::yield_now();
            }
            let mut retired = dataset.retired.lock().unwrap().clone();
            let mut announced = announced;
            announced.sort();
            retired.sort();
            assert_eq!(announced, retired, "{threads} threads");
        }
    }
}

#[test]
fn idle_threads_work_ahead_until_nothing_is_left() {
    let dataset = Arc::new(Numbers::new(10));
    let loader = loader(&dataset, spec(2));
    for pieces in [1, 50] {
        *dataset.ahead.lock().unwrap() = pieces;
        dataset.waker.lock().unwrap().as_ref().unwrap().upgrade().unwrap().wake();
        while *dataset.ahead.lock().unwrap() > 0 {
            std::thread::yield_now();
        }
    }
    drop(loader);
    assert!(dataset.waker.lock().unwrap().as_ref().unwrap().upgrade().is_none(), "the loader is not kept alive");
}
