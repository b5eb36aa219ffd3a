//! Ranks that torchrun, mpirun or srun started: local rank 0 hosts the page cache for them.

use crate::cache::{SMALL, Traces, finish, path_of};
use crate::support::{Ended, Running, Runs, assert_same_checkpoint, rank_program};
use crate::tools::assert_figures;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const WORLD: usize = 3;

#[derive(Clone, Copy, Debug)]
pub enum Starter {
    Torchrun,
    OpenMpi,
    Slurm,
}

impl Starter {
    fn set(self, command: &mut Command, rank: usize) {
        let (rank, world) = (rank.to_string(), WORLD.to_string());
        let names: [&str; 4] = match self {
            Starter::Torchrun => ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"],
            Starter::OpenMpi => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
            Starter::Slurm => ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"],
        };
        names.into_iter().zip([&rank, &rank, &world, &world]).for_each(|(name, value)| {
            command.env(name, value);
        });
    }
}

/// The job that `launch` wrote for `reference`, for another run folder.
pub fn job_of(runs: &Runs, reference: &Path, name: &str) -> Value {
    let mut job: Value = serde_json::from_slice(&fs::read(reference.join("job.json")).unwrap()).unwrap();
    let folder = runs.run(name).path;
    fs::create_dir_all(&folder).unwrap();
    job["run_dir"] = json!(folder);
    job
}

pub fn start(runs: &Runs, name: &str, job: &Value, starter: Starter) -> Vec<Running> {
    let path = runs.run(name).path.join("job.json");
    fs::write(&path, job.to_string()).unwrap();
    let temporary = runs.path().join("tmp");
    fs::create_dir_all(&temporary).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: usize| {
        let mut command = Command::new(rank_program());
        starter.set(&mut command, rank);
        command.env("MASTER_PORT", port.to_string()).env("HEADROOM_JOB", &path).env("TMPDIR", &temporary);
        command.env("HEADROOM_CACHE_VERIFY", "1").env("OMP_WAIT_POLICY", "passive").env_remove("RUST_BACKTRACE");
        Running::start(&mut command, runs.path())
    };
    (0..WORLD).map(rank).collect()
}

#[test]
fn ranks_of_another_launcher_share_a_cache_and_train_the_same_bits() {
    let runs = Runs::new(&["model.dropout=0.1", &path_of("gzip"), SMALL]);
    let reference = finish(&runs, "reference", &["--ranks", "3"]);
    let told = reference.summary()["cache"].clone();
    for starter in [Starter::Torchrun, Starter::OpenMpi, Starter::Slurm] {
        let name = format!("{starter:?}");
        let mut job = job_of(&runs, &reference.path, &name);
        job["config"]["log"]["plots"] = json!(true);
        let mut ranks = start(&runs, &name, &job, starter);
        let mut traces = Traces::default();
        let pids: Vec<u32> = ranks.iter().map(|rank| rank.child.id()).collect();
        ranks[0].until("the end", || {
            pids.iter().for_each(|pid| traces.look(*pid));
            false
        });
        let ended: Vec<Ended> = ranks.into_iter().map(Running::wait).collect();
        ended.iter().for_each(|ended| assert_eq!(ended.code, Some(0), "{starter:?}: {ended}"));
        let lines = ended.iter().map(|ended| ended.out.matches("Cache Stats").count()).collect::<Vec<_>>();
        assert_eq!(lines, [1, 0, 0], "{starter:?}: {}", ended[0]);
        assert_same_checkpoint(&runs.run(&name), &reference, 20, &name);
        assert_figures(&runs.run(&name).path);
        assert_eq!(runs.run(&name).losses(), reference.losses(), "{name}");
        let cache = &runs.run(&name).summary()["cache"];
        assert_eq!((&cache["policy"], &cache["capacity_bytes"]), (&told["policy"], &told["capacity_bytes"]));
        assert!(cache["hits"].as_u64() > Some(0) && cache["misses"].as_u64() > Some(0), "{cache}");
        traces.assert_gone(&runs, &name);
    }
}

/// Kills `victim` of a job that trains; the others must end by themselves.
fn killed(victim: usize) -> Vec<Ended> {
    let runs = Runs::new(&["train.max_steps=1000000", &path_of("gzip"), SMALL]);
    let short = finish(&runs, "short", &["--ranks", "3", "--set", "train.max_steps=1"]);
    let mut job = job_of(&runs, &short.path, "killed");
    job["config"]["train"]["max_steps"] = json!(1_000_000);
    let mut ranks = start(&runs, "killed", &job, Starter::Torchrun);
    assert!(ranks[victim].until("steps", || runs.run("killed").steps_so_far() >= 3), "{}", ranks[victim].read("err"));
    let mut traces = Traces::default();
    ranks.iter().for_each(|rank| traces.look(rank.child.id()));
    ranks[victim].signal(Signal::KILL);
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    let ended = ranks.into_iter().map(|rank| {
        let ended = rank.wait();
        longest = longest.max(began.elapsed());
        ended
    });
    let ended: Vec<Ended> = ended.collect();
    println!("the others ended {longest:?} after rank {victim} was killed");
    traces.assert_gone(&runs, "killed");
    ended
}

#[test]
fn the_death_of_the_rank_that_hosts_ends_the_others() {
    let ended = killed(0);
    assert_eq!(ended[0].code, None, "{}", ended[0]);
    for ended in &ended[1..] {
        assert!(matches!(ended.code, Some(4 | 9)), "{ended}");
        assert_eq!(ended.err.matches("error:").count() + ended.err.matches("error at").count(), 1, "{ended}");
        assert!(ended.err.contains("directory is gone") || ended.err.contains("rank "), "{ended}");
    }
}

#[test]
fn the_death_of_a_guest_ends_the_job_and_names_it() {
    let ended = killed(1);
    assert_eq!(ended[1].code, None, "{}", ended[1]);
    for ended in [&ended[0], &ended[2]] {
        // A loader that misses the directory, whose rank ended because of rank 1, says so as an error of data.
        assert!(matches!(ended.code, Some(4 | 9)), "{ended}");
    }
    assert!(ended[0].err.contains("rank 1") || ended[2].err.contains("rank 1"), "{}{}", ended[0], ended[2]);
}

#[test]
fn a_rank_started_by_hand_alone_has_a_cache_too() {
    let runs = Runs::new(&[&path_of("gzip"), SMALL]);
    let reference = finish(&runs, "reference", &["--ranks", "1"]);
    let job = job_of(&runs, &reference.path, "alone");
    let path = runs.run("alone").path.join("job.json");
    fs::write(&path, job.to_string()).unwrap();
    let mut command = Command::new(rank_program());
    let ended = crate::support::run(command.env("HEADROOM_JOB", &path), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("Cache Stats"), "{ended}");
    assert_same_checkpoint(&runs.run("alone"), &reference, 20, "alone");
    assert!(runs.run("alone").summary()["cache"]["hits"].as_u64() > Some(0));
}
