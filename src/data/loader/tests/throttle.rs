//! A loader that is held back, and one that gives memory back.

use super::*;

/// Resident bytes of this process that `bytes` lie in.
fn resident(bytes: &[u8]) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let at = bytes.as_ptr() as usize + bytes.len() / 2;
    let mut inside = false;
    for line in maps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-'))
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&at);
        } else if inside && line.starts_with("Rss:") {
            return line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10;
        }
    }
    panic!("no mapping of {at:x}");
}

#[test]
fn a_paused_loader_begins_no_batch_ahead_and_gives_the_same_ones() {
    for threads in [0, 1, 3] {
        let dataset = Arc::new(Numbers::new(400));
        let throttle = Arc::new(Throttle::default());
        let mut loader = loader(&dataset, LoaderSpec { throttle: Arc::clone(&throttle), ..spec(threads) });
        throttle.pause(true);
        let requests: Vec<_> = planner(400).requests(0, 0).collect();
        let mut stream = loader.run(requests.clone().into_iter()).unwrap();
        for (count, request) in requests.iter().enumerate() {
            let before = dataset.read.lock().unwrap().len();
            let batch = stream.next().unwrap().unwrap();
            assert_eq!((batch.request(), batch.sample_ids()), (request, &request.sample_ids[..]));
            let read = dataset.read.lock().unwrap().len();
            assert_eq!(read - before, batch.len(), "{threads} threads, batch {count}: only the awaited batch is read");
            assert_eq!(stream.stats().most_ahead, 1);
            if count == requests.len() / 2 {
                throttle.pause(false);
                break;
            }
        }
        let mut left = requests.len() - requests.len() / 2 - 1;
        if threads > 0 {
            stream.next().unwrap().unwrap();
            left -= 1;
            // Prefetching resumes after the pause, sooner or later.
            while stream.stats().most_ahead < 2 {
                std::thread::yield_now();
            }
        }
        assert_eq!(stream.by_ref().count(), left);
    }
}

#[test]
fn a_pause_takes_announcements_back_and_makes_them_again_in_order() {
    for threads in [1, 3] {
        let dataset = Arc::new(Numbers::new(400));
        let throttle = Arc::new(Throttle::default());
        let mut loader = loader(&dataset, LoaderSpec { throttle: Arc::clone(&throttle), ..spec(threads) });
        let requests: Vec<_> = planner(400).requests(0, 0).collect();
        let mut stream = loader.run(requests.clone().into_iter()).unwrap();
        stream.next().unwrap().unwrap();
        let counts = || (dataset.announced.lock().unwrap().len(), dataset.retired.lock().unwrap().len());
        // A batch is there a moment before the data set hears that it was read.
        let held_at_most = |most: usize| {
            for _ in 0..20_000 {
                let (announced, retired) = counts();
                if announced.saturating_sub(retired) <= most {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            panic!("{:?} announced and retired, {most} may be held", counts());
        };
        throttle.pause(true);
        let (announced, _) = counts();
        stream.give_back();
        // Batches that were begun before the pause are read to their end.
        let begun = stream.stats().most_ahead;
        let mut held = usize::MAX;
        while held > begun {
            let (now, retired) = counts();
            assert_eq!(now, announced, "nothing is announced while nobody waits");
            held = now.saturating_sub(retired);
            std::thread::yield_now();
        }
        assert!(announced > begun + 1, "some were announced ahead: {announced}, {begun} begun");
        let paused = requests.len() / 2;
        for request in &requests[1..paused] {
            assert_eq!(stream.next().unwrap().unwrap().sample_ids(), request.sample_ids);
            held_at_most(begun + 1);
        }
        throttle.pause(false);
        assert_eq!(stream.by_ref().count(), requests.len() - paused);
        drop(stream);
        // Its threads have ended then.
        drop(loader);
        let (mut announced, retired) = counts();
        assert_eq!(announced, retired, "each announcement once");
        // Without those that were taken back: the order of batches.
        let mut last = requests.iter().map(|request| (request.epoch, request.sample_ids.clone())).rev();
        for batch in dataset.announced.lock().unwrap().iter().rev().take(requests.len() - paused) {
            assert_eq!(Some(batch), last.next().as_ref());
            announced -= 1;
        }
        assert!(announced > paused, "those ahead of the pause came twice");
    }
}

#[test]
fn fewer_decoders_read_the_same_batches() {
    let dataset = Arc::new(Numbers::new(400));
    let throttle = Arc::new(Throttle::default());
    let mut loader = loader(&dataset, LoaderSpec { throttle: Arc::clone(&throttle), ..spec(3) });
    for (most, wanted) in [(Some(0), 1), (Some(1), 1), (Some(2), 2), (None, 3)] {
        throttle.decoders(most);
        dataset.threads.lock().unwrap().clear();
        let read: u64 = loader.run(planner(400).requests(0, 0)).unwrap().map(|b| b.unwrap().len() as u64).sum();
        assert_eq!(read, 200);
        assert!(dataset.threads.lock().unwrap().len() <= wanted, "{most:?}");
    }
}

#[test]
fn memory_given_back_is_gone_from_the_process_and_comes_back_when_needed() {
    let dataset = Arc::new(Numbers::new(400));
    // 64 B per sample in field 0: slots of 16 MiB.
    let spec = LoaderSpec { micro_batch: 1 << 18, slots: 4, ..spec(1) };
    let mut loader = loader(&dataset, spec);
    let order = |epoch| std::iter::once(BatchRequest { epoch, sample_ids: (0..100).collect(), ..Default::default() });
    let mut stream = loader.run(order(0)).unwrap();
    let batch = stream.next().unwrap().unwrap();
    let (before, bytes) = (resident(batch.field(0)), batch.field(0).to_vec());
    stream.give_back();
    let after = resident(batch.field(0));
    assert!(before - after >= 3 * (16 << 20), "{before} → {after}");
    assert_eq!(batch.field(0), bytes, "a batch in use keeps its bytes");
    drop((batch, stream));
    let again = loader.run(order(1)).unwrap().next().unwrap().unwrap();
    assert_eq!(again.field(0), bytes);
}

#[test]
fn threads_that_may_not_read_wait_without_their_buffers() {
    let dataset = Arc::new(Numbers::new(400));
    let throttle = Arc::new(Throttle::default());
    let mut loader = loader(&dataset, LoaderSpec { throttle: Arc::clone(&throttle), ..spec(2) });
    throttle.decoders(Some(1));
    let mut stream = loader.run(planner(400).requests(0, 0)).unwrap();
    assert!(stream.by_ref().all(|batch| batch.is_ok()));
    drop(stream);
    throttle.decoders(None);
    assert_eq!(loader.run(planner(400).requests(1, 0)).unwrap().count(), planner(400).requests(1, 0).count());
}
