//! What goes wrong on a device, injected by the model: each ends in the documented error and code, within the limit.

use super::counts::job;
use super::model::Done;
use rustix::process::{Signal, kill_process};
use spec::contract::exit;
use std::time::{Duration, Instant};

/// Longest that a job may take from its fault to its end: far more than it needs, and far less than the 25 s after which the
/// launcher kills what does not stop.
const LIMIT: Duration = Duration::from_secs(22);

/// Runs the small net under a fault; its code, and lines that must be among what it says.
fn fails(ranks: usize, sets: &[&str], fault: &str, code: u8, says: &[&str]) -> Done {
    let began = Instant::now();
    let done = job("net", ranks, sets).fault(fault).run();
    let text = done.text();
    assert_eq!(done.ended.code, Some(i32::from(code)), "{fault}, {sets:?}: {}", done.ended);
    assert!(says.iter().all(|line| text.contains(line)), "{fault}, {sets:?}: {says:?} in\n{text}");
    assert!(!text.contains("killed"), "{fault}, {sets:?}: a rank had to be killed\n{text}");
    for (rank, report) in done.reports() {
        assert_eq!(report.list("contexts"), [rank.to_string()], "{fault}, {sets:?}: contexts on other devices");
    }
    assert!(began.elapsed() < LIMIT, "{fault}, {sets:?}: {:?}\n{text}", began.elapsed());
    done
}

#[test]
fn a_step_that_never_ends_is_an_error_after_step_timeout_with_a_recorded_step_too() {
    for graph in ["train.cuda_graph=off", "train.cuda_graph=on"] {
        let sets = [graph, "train.step_timeout=3"];
        fails(3, &sets, "event:1:6", exit::COMM, &["the step waited", "train.step_timeout is 3 s"]);
    }
}

#[test]
fn a_first_step_that_never_ends_is_an_error_after_step_timeout() {
    // Where the first step's sums stand among the collectives: before the two by which ranks agree on an order.
    let good = job("net", 3, &["train.cuda_graph=off"]).run();
    assert_eq!(good.ended.code, Some(0), "{}", good.ended);
    let first = good.reports()[&1].0["steps"][0]["collectives"].as_u64().unwrap() - 2;
    fails(3, &["train.step_timeout=3"], &format!("lost:1:{first}"), exit::COMM, &["train.step_timeout is 3 s"]);
}

#[test]
fn an_error_of_nccl_ends_the_job_with_its_words() {
    fails(
        3,
        &["train.cuda_graph=on"],
        "nccl:2:20",
        exit::COMM,
        &["remote process exited or there was a network error"],
    );
}

#[test]
fn a_loss_that_is_no_number_ends_the_job_with_a_recorded_step() {
    for ranks in [1, 3] {
        fails(ranks, &["train.cuda_graph=on"], "nonfinite:*:6", exit::NONFINITE, &["became not finite"]);
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_job_with_its_name() {
    let says = ["rank 1 failed: SIGKILL"];
    fails(3, &["train.cuda_graph=on"], "kill:1:6", 128 + 9, &says);
}

/// A rank that somebody suspended is no rank that failed: the others' limit stands still with it.
#[test]
fn a_rank_that_stands_still_is_waited_for_and_the_job_finishes_with_it() {
    let mut running = job("net", 3, &["train.cuda_graph=on", "train.step_timeout=2"]).fault("stop:1:6").start();
    let stopped = running.stopped_child();
    // Longer than the limit that a rank which is at work has.
    std::thread::sleep(Duration::from_secs(4));
    kill_process(stopped, Signal::CONT).unwrap();
    let done = running.wait();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
}

#[test]
fn a_recording_that_breaks_trains_without_on_all_ranks() {
    for (ranks, at) in [(1, 100), (3, 5), (3, 120)] {
        let done = job("net", ranks, &["train.cuda_graph=auto"]).fault(&format!("capture:{}:{at}", ranks - 1)).run();
        let text = done.text();
        assert_eq!(done.ended.code, Some(0), "{ranks} ranks, node {at}: {}", done.ended);
        let line = format!("cuda graph: none, since rank {} cannot record the step", ranks - 1);
        assert_eq!(text.matches(&line).count(), 1, "{ranks} ranks, node {at}: {text}");
        assert!(!text.contains("frame #"), "one line without a stack: {text}");
        for report in done.reports().values() {
            assert_eq!(report.number("finalized"), u64::from(ranks > 1));
            assert_eq!(report.most("graph_launches"), 0, "no rank replays what another has not");
        }
    }
}

#[test]
fn memory_that_runs_out_is_said_and_training_continues() {
    // The allocator tries again after it has given its cache back.
    let done = job("net", 1, &[]).fault("alloc:0:3:8").run();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert!(done.text().contains("out of memory"), "{}", done.ended);
}

#[test]
fn slots_that_cannot_be_registered_are_said_and_training_continues() {
    let done = job("net", 1, &[]).fault("register:0:1:9").run();
    let text = done.text();
    assert_eq!(done.ended.code, Some(0), "{}", done.ended);
    assert!(text.contains("not page-locked") || text.contains("cannot be registered"), "{text}");
}
