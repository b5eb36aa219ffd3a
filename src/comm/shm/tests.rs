use super::*;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const LONG: Duration = Duration::from_secs(60);

/// Runs `body` as every rank of a world of threads, and returns their results in rank order.
fn world<T: Send>(n: usize, timeout: Duration, body: impl Fn(ShmCollective) -> T + std::marker::Sync) -> Vec<T> {
    let fd = create_memfd(true).unwrap();
    std::thread::scope(|scope| {
        let (fd, body) = (&fd, &body);
        let start = |rank| {
            let fd = fd.try_clone().unwrap();
            scope.spawn(move || body(ShmCollective::new(fd, rank, n, timeout).unwrap()))
        };
        let ranks: Vec<_> = (0..n).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Values whose sum depends on the order of addition.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + rank * 17) % 1000) as f32 * [1e-3, 1e4, 0.37][rank % 3]).collect()
}

fn expected(ranks: usize, len: usize) -> Vec<f32> {
    let parts: Vec<_> = (0..ranks).map(|rank| values(rank, len)).collect();
    (0..len).map(|i| parts[1..].iter().fold(parts[0][i], |sum, part| sum + part[i])).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor).unwrap()
}

#[test]
fn flat_and_staged_sums_are_in_rank_order_on_every_rank() {
    // Longer than several stages and chunks, and no multiple of either.
    let len = 700_001;
    let results = world(3, LONG, |comm| {
        let flat = comm.flat_buffer(len).unwrap();
        assert_eq!(flat.abs().max().double_value(&[]), 0.0);
        flat.shallow_clone().copy_(&Tensor::from_slice(&values(comm.rank(), len)));
        comm.all_reduce_sum(&flat).unwrap();
        let staged = Tensor::from_slice(&values(comm.rank(), len));
        comm.all_reduce_sum(&staged).unwrap();
        let double = Tensor::from_slice(&[0.5_f64, comm.rank() as f64]);
        comm.all_reduce_sum(&double).unwrap();
        comm.all_reduce_sum(&Tensor::zeros([0], (Kind::Float, Device::Cpu))).unwrap();
        assert_eq!(Vec::<f64>::try_from(&double).unwrap(), [1.5, 3.0]);
        (floats(&flat), floats(&staged))
    });
    let right = expected(3, len);
    for (flat, staged) in results {
        assert!(flat == right && staged == right);
    }
}

#[test]
fn a_slice_of_a_flat_buffer_leaves_the_rest_alone() {
    let results = world(2, LONG, |comm| {
        let other = comm.flat_buffer(50).unwrap();
        let flat = comm.flat_buffer(100).unwrap();
        let _ = flat.shallow_clone().fill_(comm.rank() as f64 + 1.0);
        comm.all_reduce_sum(&flat.narrow(0, 40, 20)).unwrap();
        comm.all_reduce_sum(&other).unwrap();
        floats(&flat)
    });
    for (rank, flat) in results.iter().enumerate() {
        let own = rank as f32 + 1.0;
        let right: Vec<f32> = (0..100).map(|i| if (40..60).contains(&i) { 3.0 } else { own }).collect();
        assert_eq!(flat, &right);
    }
}

#[test]
fn broadcast_and_gather_move_more_than_a_stage() {
    let bytes = 2 * STAGE_BYTES + 77;
    let pattern = |rank: usize, n: usize| -> Vec<u8> { (0..n).map(|i| (i * 7 + rank) as u8).collect() };
    world(3, LONG, |comm| {
        let tensor = Tensor::from_slice(&pattern(comm.rank(), bytes));
        comm.broadcast(&tensor, 1).unwrap();
        assert!(Vec::<u8>::try_from(&tensor).unwrap() == pattern(1, bytes));
        let sizes = [0, bytes, 5];
        let all = comm.all_gather(&pattern(comm.rank(), sizes[comm.rank()])).unwrap();
        for (rank, got) in all.iter().enumerate() {
            assert!(*got == pattern(rank, sizes[rank]));
        }
    });
}

#[test]
fn many_small_calls_in_a_row_stay_in_step() {
    let results = world(3, LONG, |comm| {
        let flat = comm.flat_buffer(8).unwrap();
        let _ = flat.shallow_clone().fill_(1.0);
        for round in 0..500 {
            comm.all_reduce_sum(&flat).unwrap();
            let _ = flat.shallow_clone().divide_scalar_(3.0);
            if round % 7 == 0 {
                comm.barrier().unwrap();
            }
        }
        floats(&flat)
    });
    assert!(results.iter().all(|r| *r == [1.0; 8]));
}

#[test]
fn different_calls_are_an_error_on_every_rank() {
    let errors = world(2, LONG, |comm| {
        let tensor = Tensor::zeros([4 + comm.rank() as i64], (Kind::Float, Device::Cpu));
        comm.all_reduce_sum(&tensor).unwrap_err().to_string()
    });
    assert!(errors[0].contains("rank 1 called all_reduce_sum(f32) of 20 bytes while rank 0"), "{}", errors[0]);
    assert!(errors[1].contains("of 16 bytes"), "{}", errors[1]);
}

#[test]
fn a_missing_rank_is_named_after_the_timeout() {
    let error = world(3, Duration::from_millis(200), |comm| match comm.rank() {
        1 => None,
        _ => Some(comm.barrier().unwrap_err()),
    });
    for error in [&error[0], &error[2]] {
        match error {
            Some(CommError::Timeout { collective, missing, timeout_s, .. }) => {
                assert_eq!((collective.as_str(), missing.as_str(), *timeout_s), ("barrier", "1", 0.2));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn abort_ends_waits_of_all_ranks_and_later_calls() {
    let errors = world(3, LONG, |comm| {
        if comm.rank() == 2 {
            std::thread::sleep(Duration::from_millis(30));
            comm.abort(CommError::PeerFailed { rank: 1, error: "exit code 3".into() });
        } else if comm.rank() == 1 {
            return (String::new(), String::new());
        }
        let tensor = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        (comm.all_reduce_sum(&tensor).unwrap_err().to_string(), comm.barrier().unwrap_err().to_string())
    });
    assert_eq!(errors[2].0, "rank 1 failed: exit code 3");
    assert!(errors[0].0.starts_with("rank 1 failed"), "{}", errors[0].0);
    assert!(errors[0].1.starts_with("rank 1 failed"), "{}", errors[0].1);
}

#[test]
fn a_segment_serves_one_run_only() {
    let fd = create_memfd(true).unwrap();
    drop(ShmCollective::new(fd.try_clone().unwrap(), 0, 1, LONG).unwrap());
    let error = ShmCollective::new(fd, 0, 1, LONG).err().unwrap().to_string();
    assert!(error.contains("earlier run"), "{error}");
}

#[test]
fn no_room_is_an_error_on_every_rank_and_leaves_the_rest_usable() {
    let errors = world(2, LONG, |comm| {
        let error = comm.flat_buffer(1 << 58).unwrap_err().to_string();
        comm.barrier().unwrap();
        assert_eq!(comm.flat_buffer(10).unwrap().size(), [10]);
        error
    });
    assert!(errors.iter().all(|e| e.contains("no room for")), "{errors:?}");
}

/// Starts this test binary again as one rank that reduces until it is killed.
fn spawn_rank(fd: &OwnedFd, rank: usize, world: usize) -> Child {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "comm::shm::tests::as_a_process", "--nocapture"])
        .env("HEADROOM_TEST_RANK", format!("{rank} {world} {}", fd.as_raw_fd()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The body of [`spawn_rank`]; without its variable it has nothing to do.
#[test]
fn as_a_process() {
    use std::os::fd::FromRawFd;
    let Ok(identity) = std::env::var("HEADROOM_TEST_RANK") else {
        return;
    };
    let numbers: Vec<usize> = identity.split(' ').map(|n| n.parse().unwrap()).collect();
    // SAFETY: the parent left this descriptor open for us, and nobody else here uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(numbers[2] as i32) };
    let comm = ShmCollective::new(fd, numbers[0], numbers[1], LONG).unwrap();
    let flat = comm.flat_buffer(1 << 20).unwrap();
    while comm.all_reduce_sum(&flat).is_ok() {}
}

#[test]
fn a_killed_process_ends_the_others_without_a_launcher() {
    for delay_ms in [0, 3, 11] {
        let fd = create_memfd(true).unwrap();
        let mut children: Vec<Child> = (1..3).map(|rank| spawn_rank(&fd, rank, 3)).collect();
        let comm = ShmCollective::new(fd, 0, 3, LONG).unwrap();
        let flat = comm.flat_buffer(1 << 20).unwrap();
        for _ in 0..3 {
            comm.all_reduce_sum(&flat).unwrap();
        }
        let mut victim = children.pop().unwrap();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(delay_ms));
            victim.kill().unwrap();
            victim.wait().unwrap();
        });
        let start = Instant::now();
        let error = loop {
            if let Err(error) = comm.all_reduce_sum(&flat) {
                break error.to_string();
            }
        };
        assert!(error.starts_with("rank 2 failed: its process ended"), "{error}");
        println!("killed after {delay_ms} ms, noticed after {:?}", start.elapsed());
        comm.abort(CommError::GivenUp { error: "done".into() });
        killer.join().unwrap();
        children.pop().unwrap().wait().unwrap();
    }
}
