//! Runs that are killed or stopped, and resumed.

use crate::support::{Run, Runs, assert_same_checkpoint, distance};
use rustix::process::{Signal, kill_process};
use std::time::SystemTime;

const STEPS: u64 = 30;

/// Three ranks, dropout, a checkpoint every third step, epochs of 11 steps.
const THREE_RANKS: [&str; 4] =
    ["train.max_steps=30", "model.dropout=0.1", "log.save_every_steps=3", "log.save_every=1"];
/// All that a checkpoint can hold: averaged weights, a schedule that listens, best weights, accumulation.
const ALL_STATE: [&str; 12] = [
    "train.max_steps=30",
    "model.dropout=0.1",
    "log.save_every_steps=4",
    "train.gradient_accumulation_steps=3",
    "train.microbatch=3",
    "train.ema_decay=0.8",
    "train.scheduler=plateau",
    "train.plateau_patience=0",
    "train.monitor_metric=val.jerk_mae",
    "train.restore_best_weights=true",
    "train.early_stopping=true",
    "log.keep_last=2",
];

/// When a run is killed.
enum Moment {
    /// This many steps are in metrics.jsonl.
    Step(usize),
    /// A checkpoint is being written, after so many steps.
    Writing(usize),
}

/// Random number below `end`; it is named in every failure's text.
fn random(end: usize) -> usize {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    (u64::from(now.subsec_nanos()).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % end
}

fn is_writing(run: &Run) -> bool {
    let entries = run.path.join("checkpoints").read_dir();
    entries.is_ok_and(|mut list| list.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with(".step-"))))
}

/// Kills `name` at `moment`: a rank, or (`None`) the launcher itself.
fn kill(runs: &Runs, name: &str, ranks: &str, rank: Option<usize>, moment: &Moment) {
    let mut running = runs.start(name, &["--ranks", ranks]);
    let run = runs.run(name);
    let lived = match moment {
        Moment::Step(steps) => running.until("steps", || run.steps_so_far() >= *steps),
        Moment::Writing(steps) => running.until("saving", || run.steps_so_far() >= *steps && is_writing(&run)),
    };
    assert!(lived && run.steps_so_far() < STEPS as usize, "{name} ended before it was killed");
    match rank {
        Some(rank) => kill_process(running.rank(rank), Signal::KILL).unwrap(),
        None => running.signal(Signal::KILL),
    }
    let ended = running.wait();
    assert_eq!(ended.code, rank.map(|_| 137), "{name}: {ended}");
    if let Some(rank) = rank {
        assert!(ended.err.contains(&format!("rank {rank} failed: SIGKILL")), "{name}: {ended}");
    }
}

/// Kills a run and resumes it: it ends with the bits of `reference`, each step reported once.
fn kill_and_resume(runs: &Runs, reference: &Run, name: &str, ranks: &str, rank: Option<usize>, moment: &Moment) {
    kill(runs, name, ranks, rank, moment);
    let before = runs.run(name).steps_so_far();
    let what = format!("{name}, killed after {before} steps");
    println!("{what}");
    let run = runs.finish(name, &["--ranks", ranks, "--resume", "auto"]);
    assert_same_checkpoint(&run, reference, STEPS, &what);
    assert_eq!(run.steps(), (1..=STEPS).collect::<Vec<_>>(), "{what}");
    assert_eq!(run.losses(), reference.losses(), "{what}");
    let (a, b) = (run.summary(), reference.summary());
    assert_eq!((&a["status"], &a["best"], &a["steps"]), (&b["status"], &b["best"], &b["steps"]), "{what}");
    let left = |run: &Run| {
        let names = run.path.join("checkpoints").read_dir().unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(left(&run), left(reference), "{what}");
}

#[test]
fn killed_at_any_step_and_resumed_ends_with_the_same_bits() {
    let runs = Runs::new(&THREE_RANKS);
    let reference = runs.finish("reference", &["--ranks", "3"]);
    for (number, rank) in [Some(0), Some(1), Some(2), None].into_iter().enumerate() {
        let moment = Moment::Step(1 + random(20));
        kill_and_resume(&runs, &reference, &format!("step{number}"), "3", rank, &moment);
    }
}

#[test]
fn killed_while_a_checkpoint_is_written_and_resumed_ends_with_the_same_bits() {
    let runs = Runs::new(&THREE_RANKS);
    let reference = runs.finish("reference", &["--ranks", "3"]);
    for (number, rank) in [Some(0), Some(2), None].into_iter().enumerate() {
        let moment = Moment::Writing(random(15));
        kill_and_resume(&runs, &reference, &format!("saving{number}"), "3", rank, &moment);
    }
}

#[test]
fn average_schedule_and_best_weights_survive_a_kill() {
    let runs = Runs::new(&ALL_STATE);
    let reference = runs.finish("reference", &["--ranks", "2"]);
    let rates: Vec<f64> = reference.metrics().iter().map(|record| record["lr"].as_f64().unwrap()).collect();
    assert!(rates[29] < rates[0], "the schedule never acted: this test could not fail");
    for (number, moment) in [Moment::Step(5), Moment::Step(12 + random(10)), Moment::Writing(10)].iter().enumerate() {
        kill_and_resume(&runs, &reference, &format!("all{number}"), "2", Some(number % 2), moment);
    }
}

#[test]
fn a_restart_by_the_launcher_ends_with_the_same_bits() {
    let runs = Runs::new(&THREE_RANKS);
    let reference = runs.finish("reference", &["--ranks", "3"]);
    let mut running = runs.start("restarted", &["--ranks", "3", "--max-restarts", "1"]);
    let run = runs.run("restarted");
    assert!(running.until("steps", || run.steps_so_far() >= 7));
    kill_process(running.rank(1), Signal::KILL).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("starting again (1 of 1 restarts)"), "{ended}");
    assert_same_checkpoint(&run, &reference, STEPS, "restarted");
    assert_eq!(run.steps(), (1..=STEPS).collect::<Vec<_>>());
    assert_eq!(run.summary()["restarts"], 1);
}

#[test]
fn another_number_of_ranks_goes_on_with_the_same_global_batch() {
    let runs = Runs::new(&[]);
    let reference = runs.finish("reference", &["--ranks", "3"]);
    let ten = ["--set", "train.max_steps=10"];
    runs.finish("moved", &[&["--ranks", "3"], &ten[..]].concat());
    let refused = runs.train("moved", &["--ranks", "2", "--resume", "auto"]);
    assert_eq!(refused.code, Some(5), "{refused}");
    assert!(refused.err.contains("global batch is 12 (on 3 ranks), this run's is 8"), "{refused}");
    let moved = runs.finish("moved", &["--ranks", "2", "--resume", "auto", "--set", "train.batch_size=6"]);
    assert_eq!(moved.steps(), (1..=20).collect::<Vec<_>>());
    let found = distance(&moved.tensors(20, "model.safetensors"), &reference.tensors(20, "model.safetensors"));
    println!("3 ranks, then 2: {:.1e} of the norm, {:.1e} of the largest element", found.norm, found.element);
    // Rounding alone: see `equal`.
    assert!(found.norm <= 1e-5 && found.element <= 1e-4, "{:e} in {}", found.norm, found.worst);
}

#[test]
fn a_signal_saves_one_common_step_and_the_run_goes_on() {
    let endless = ["train.max_steps=1000000", "model.dropout=0.1"];
    let reference =
        Runs::new(&["model.dropout=0.1", "train.max_steps=400", "log.save_every_steps=1", "log.keep_last=1000"]);
    let mut stopped_at = Vec::new();
    let runs = Runs::new(&endless);
    for (name, signal) in [("term", Signal::TERM), ("int", Signal::INT), ("usr1", Signal::USR1)] {
        let mut running = runs.start(name, &["--ranks", "3"]);
        let run = runs.run(name);
        assert!(running.until("steps", || run.steps_so_far() >= 3));
        running.signal(signal);
        let ended = running.wait();
        assert_eq!(ended.code, Some(75), "{name}: {ended}");
        assert!(ended.out.contains(&format!("to continue, add: --name {name} --resume auto")), "{ended}");
        let summary = run.summary();
        let step = summary["steps"].as_u64().unwrap();
        assert_eq!(summary["status"], "stopped");
        assert_eq!(run.steps(), (1..=step).collect::<Vec<_>>(), "{name}");
        for rank in 0..3 {
            let records = crate::support::read_lines(&run.path.join(format!("memory.rank{rank}.jsonl")));
            assert_eq!(records.last().unwrap()["step"], step, "{name}: rank {rank}");
        }
        let more = format!("train.max_steps={}", step + 5);
        runs.finish(name, &["--ranks", "3", "--resume", "auto", "--set", &more]);
        assert_eq!(run.steps(), (1..=step + 5).collect::<Vec<_>>(), "{name}");
        stopped_at.push((name, step + 5));
    }
    let longest = stopped_at.iter().map(|(_, step)| *step).max().unwrap();
    let longest = format!("train.max_steps={longest}");
    let reference = reference.finish("reference", &["--ranks", "3", "--set", &longest]);
    for (name, step) in stopped_at {
        let run = runs.run(name);
        assert_eq!(run.losses()[..], reference.losses()[..step as usize], "{name}");
        assert_eq!(run.tensors(step, "model.safetensors"), reference.tensors(step, "model.safetensors"), "{name}");
    }
}

#[test]
fn a_second_interrupt_ends_a_run_that_cannot_stop() {
    let runs = Runs::new(&["train.max_steps=1000000", "log.save_every_steps=2", "train.stop_grace=3600"]);
    let mut running = runs.start("stuck", &["--ranks", "3"]);
    let run = runs.run("stuck");
    assert!(running.until("a checkpoint", || run.checkpoint(2).exists() || run.steps_so_far() > 10));
    // The others wait for this rank: no step can end.
    kill_process(running.rank(1), Signal::STOP).unwrap();
    running.signal(Signal::INT);
    let mut asked = false;
    for _ in 0..100_000 {
        asked = asked || running.read("err").contains("SIGINT: asking every rank to stop");
        if asked {
            break;
        }
        assert!(running.child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(asked, "{}", running.read("err"));
    running.signal(Signal::INT);
    let ended = running.wait();
    assert_eq!(ended.code, Some(130), "{ended}");
}
