//! Memory of real ranks: flat over many steps, given back on order, and the reason of a stop.

use crate::support::{Runs, folder, read_lines};
use serde_json::Value;
use spec::contract::{FromRank, Relief, Relieved, ToRank, env, read_frame, write_frame};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Slope of the least-squares line through `(step, bytes)`, bytes per step.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n));
    let over: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    over / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

#[test]
fn a_thousand_steps_leave_no_tensors_behind() {
    let runs = Runs::new(&["train.max_steps=1200", "log.log_every=50", "train.microbatch=2", "train.ema_decay=0.99"]);
    let run = runs.finish("flat", &["--ranks", "2"]);
    for rank in 0..2 {
        let records = read_lines(&run.path.join(format!("memory.rank{rank}.jsonl")));
        let number = |record: &Value, key: &str| record[key].as_f64().unwrap();
        let points: Vec<(f64, f64)> = records
            .iter()
            .map(|record| (number(record, "step"), number(record, "uss_bytes")))
            .filter(|(step, _)| (200.0..1200.0).contains(step))
            .collect();
        assert!(points.len() > 100, "{} records", points.len());
        let slope = slope(&points);
        println!("rank {rank}: {slope:.0} bytes per step over {} records", points.len());
        // The smallest tensor of a step that stayed alive, its pose, would be 4 × 200 × 20 × 4 B = 64 kB.
        assert!(slope < 10.0 * 1024.0, "rank {rank}: USS grows by {slope:.0} bytes per step");
        let peaks = records.iter().all(|record| number(record, "rss_peak_bytes") >= number(record, "rss_bytes") * 0.9);
        assert!(peaks, "the kernel's peak is in every record");
    }
}

/// A single rank that this test speaks with as its launcher.
fn rank_of_ours(job: &std::path::Path, dir: &std::path::Path) -> (UnixStream, crate::support::Running) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let mut command = Command::new(crate::support::rank_program());
    for (name, value) in [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")] {
        command.env(name, value);
    }
    command.env(env::CONTROL_FD, theirs.as_raw_fd().to_string()).env(env::JOB, job).stdin(Stdio::null());
    let running = crate::support::Running::start(&mut command, dir);
    ours.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    (ours, running)
}

/// Sends an order and waits for its answer.
fn relieve(socket: &mut UnixStream, order: u64, action: Relief) -> Relieved {
    write_frame(socket, &ToRank::Relieve { order, action }).unwrap();
    loop {
        match read_frame::<FromRank>(socket).unwrap() {
            Some(FromRank::Relieved(answer)) if answer.order == order => return answer,
            Some(FromRank::Failed { error, .. }) => panic!("{error}"),
            Some(_) => {}
            None => panic!("order {order} was never answered"),
        }
    }
}

#[test]
fn orders_over_the_control_socket_are_done_and_the_reason_is_in_the_summary() {
    let runs = Runs::new(&["train.num_workers=2", "train.step_timeout=60"]);
    let reference = runs.finish("reference", &["--ranks", "1"]);
    let mut job: Value = serde_json::from_slice(&std::fs::read(reference.path.join("job.json")).unwrap()).unwrap();
    let run = runs.run("ours");
    std::fs::create_dir_all(&run.path).unwrap();
    job["run_dir"] = serde_json::json!(run.path);
    job["config"]["train"]["max_steps"] = serde_json::json!(1_000_000);
    let folder = folder();
    let path = folder.path().join("job.json");
    std::fs::write(&path, job.to_string()).unwrap();

    let (mut socket, running) = rank_of_ours(&path, folder.path());
    for (order, action) in [
        (1, Relief::PausePrefetch),
        (2, Relief::Decoders { threads: 1 }),
        (3, Relief::TrimAllocators),
        (4, Relief::HalveMicroBatch),
        (5, Relief::Resume),
    ] {
        let answer = relieve(&mut socket, order, action.clone());
        println!("{answer:?}");
        assert!(answer.uss_before_bytes > 1 << 20 && answer.uss_after_bytes > 1 << 20, "{answer:?}");
        if action == Relief::HalveMicroBatch {
            assert_eq!(answer.text, "micro-batch 4 → 2, accumulation 1 → 2");
        }
    }
    let stopped = relieve(&mut socket, 6, Relief::Stop { reason: "memory is at 97 % of the budget".into() });
    assert_eq!(stopped.text, "stopped, with a checkpoint");
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    let summary = run.summary();
    assert_eq!(
        (&summary["status"], &summary["reason"]),
        (&"stopped".into(), &"memory is at 97 % of the budget".into())
    );
    let step = summary["steps"].as_u64().unwrap();
    assert_eq!(step, stopped.step);
    let state: Value =
        serde_json::from_slice(&std::fs::read(run.checkpoint(step).join("state.json")).unwrap()).unwrap();
    assert_eq!(state["state"]["reduced"], serde_json::json!({"planned": 4, "now": 2}));
    // The same samples in the same order: losses differ by rounding alone.
    for (a, b) in run.losses().iter().zip(reference.losses()) {
        assert!((a - b).abs() < 1e-4 * b, "{a} against {b}");
    }
}
