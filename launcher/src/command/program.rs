//! A user's own program with everything: a plan, a page cache, a cgroup, the watch, logs, records and a summary.
//!
//! The plan knows the program by its last run here: memory that no formula tells is measured. What is to be done when memory runs
//! out is the watch's: the page cache shrinks, and at the end SIGUSR1 asks the program for a checkpoint.

use super::early::Early;
use super::supervised::{console_of, supervise_program};
use super::{Error, columns, explain, figures, print, scope, shown};
use crate::cli::{ProgramArgs, RunArgs};
use crate::run_dir::{self, Ask, RunDir};
use crate::supervise::{CacheSpec, Limits, Outcome, Spec};
use crate::watch::{self, WatchSpec};
use cache::PolicyKind;
use host::machine;
use spec::config::Config;
use spec::contract::{CacheMode, CacheSummary, LineId, Machine, RunStatus, Summary, env, exit};
use spec::plan::{BudgetLine, BudgetPlan, Plan, ProgramSizes, Topology, bytes_text, program_plan};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Name that runs of a program have: its script's, where an interpreter runs one.
fn name_of(program: &OsStr, args: &[OsString]) -> String {
    let script = args.iter().find(|word| Path::new(word).extension().is_some_and(|ext| ext == "py" || ext == "sh"));
    let path = Path::new(script.map_or(program, |script| script.as_os_str()));
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let good: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect();
    let good = good.trim_matches('-');
    if good.is_empty() { "program".into() } else { good.into() }
}

/// Defaults, and what the command line says of memory.
fn config_of(with: &ProgramArgs, name: String) -> Config {
    let mut config = Config { name, ..Config::default() };
    if let Some(budget) = with.memory_budget {
        config.memory.budget = budget;
    }
    config
}

fn runs_dir(with: &ProgramArgs, config: &Config) -> PathBuf {
    with.log_dir.clone().unwrap_or_else(|| config.log.runs_dir.clone())
}

/// Most own memory of a rank in the last run of this program.
fn last_peak(runs: &Path, name: &str) -> Option<u64> {
    let run = run_dir::newest_run(&std::path::absolute(runs).ok()?, name)?;
    let summary: Summary = serde_json::from_slice(&std::fs::read(run.join("summary.json")).ok()?).ok()?;
    summary.peak_own_bytes_per_rank.into_iter().max().filter(|bytes| *bytes > 0)
}

fn plan_of(run: &RunArgs, with: &ProgramArgs, config: &Config, machine: &Machine) -> Result<Plan, Error> {
    let ranks = run.local_ranks().unwrap_or(1);
    let topology = Topology {
        local_world_size: ranks,
        world_size: ranks * run.nnodes,
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        threads_per_rank: (machine.cores / ranks).max(1),
        ..Topology::default()
    };
    let last = last_peak(&runs_dir(with, config), &config.name);
    // Without a wish for memory a program is started on a full machine too.
    let strict = with.cache.is_some() || with.memory_budget.is_some();
    Ok(program_plan(
        config,
        machine,
        topology,
        &ProgramSizes { cache_bytes: with.cache.unwrap_or(0), last_rank_bytes: last, strict },
    )?)
}

/// The budget as people read it.
fn table(plan: &Plan) -> String {
    let BudgetPlan { lines, total_bytes, formula, .. } = &plan.budget;
    let mut text = format!("budget   {} ({formula})\n", bytes_text(*total_bytes));
    for BudgetLine { name, bytes, formula, .. } in lines {
        text += &format!("  {:<14}{:>11}  {formula}\n", name.to_string(), bytes_text(*bytes));
    }
    let left = total_bytes.saturating_sub(plan.budget.need_bytes());
    text += &format!("  {:<14}{:>11}\n", "left", bytes_text(left));
    text + &plan.notes_at(columns())
}

/// `launch plan --exec`: says what will be.
pub(super) fn show(run: &RunArgs, with: &ProgramArgs, program: &OsStr, args: &[OsString]) -> Result<u8, Error> {
    let config = config_of(with, name_of(program, args));
    print::out(table(&plan_of(run, with, &config, &machine::probe())?))?;
    Ok(exit::OK)
}

/// Runs the program of `bare` with everything.
pub(super) fn run(run: &RunArgs, with: &ProgramArgs, bare: Spec, mut early: Early) -> Result<u8, Error> {
    let config = config_of(with, name_of(bare.program.as_os_str(), &bare.args));
    let plan = plan_of(run, with, &config, &machine::probe())?;
    if let Some(limits) = limits_of(&config, plan.budget.total_bytes) {
        scope::enter(limits);
    }
    let runs = runs_dir(with, &config);
    let resume = run.resume();
    let ask = Ask {
        runs_dir: &runs,
        config_name: &config.name,
        name: run.name.as_deref(),
        resume: &resume,
        node_rank: run.node_rank,
        now: SystemTime::now(),
    };
    let mut folder = RunDir::open(&ask)?;
    let lock = folder.lock(&resume, print::note)?;
    early.undo().add(lock.path());
    let (_, job) = folder.write(&config, &plan)?;
    // A program reads its own config; the defaults written for Headroom's tasks would say nothing of it.
    let _ = std::fs::remove_file(folder.path.join("config.yaml"));
    print::say(table(&plan).trim_end());
    print::say(format_args!("run {}: in {}", folder.name(), shown(&folder.path)));
    let spec = spec_of(&config, &plan, bare, &folder, &job);
    let console = console_of(with, &spec)?;
    let outcome = supervise_program(run, &spec, console, early.hand_over())?;
    close(&folder, &config, &plan, &outcome);
    Ok(outcome.exit_code)
}

/// Limits where the config wants them. Estimates are no reason to be killed: a quarter more than `high_bytes`, as for a task of
/// Headroom's.
fn limits_of(config: &Config, high_bytes: u64) -> Option<Limits> {
    config.watch.cgroup.then_some(Limits { high_bytes, max_bytes: high_bytes.saturating_add(high_bytes / 4) })
}

/// The program's processes learn of all this by their environment.
fn spec_of(config: &Config, plan: &Plan, bare: Spec, folder: &RunDir, job: &Path) -> Spec {
    let budget = &plan.budget;
    let name = |what: &str| format!("headroom-{}-{what}-{}", rustix::process::getuid().as_raw(), std::process::id());
    let mut env = bare.env;
    env.push((env::JOB.into(), job.display().to_string()));
    env.push((env::RUN_DIR.into(), folder.path.display().to_string()));
    env.push((env::RUN_ID.into(), folder.name()));
    env.push((env::REPORTS.into(), name("reports")));
    let cache = (budget.page_cache_bytes > 0)
        .then_some(CacheSpec { capacity_bytes: budget.page_cache_bytes, policy: PolicyKind::NextUse });
    if cache.is_some() {
        env.push((env::CACHE_DOOR.into(), name("cache")));
    }
    let of_launcher = budget.page_cache_bytes + budget.line_bytes(LineId::Launcher);
    let limits = limits_of(config, budget.total_bytes.saturating_sub(of_launcher)).filter(|_| !scope::is_inside());
    let watch = WatchSpec { foreign: true, ..WatchSpec::of(config, plan, Some(&folder.path)) };
    Spec { env, cache, limits, watch, log_dir: Some(folder.path.clone()), ..bare }
}

/// Writes the summary, says how it ended; errors last, where eyes are.
fn close(folder: &RunDir, config: &Config, plan: &Plan, outcome: &Outcome) {
    let last = outcome.progress.as_ref();
    let status = match (&outcome.first_failure, outcome.stopped_by.is_some() || outcome.stopped_for.is_some()) {
        (Some(_), _) => RunStatus::Failed,
        (None, true) => RunStatus::Stopped,
        (None, false) => RunStatus::Finished,
    };
    let failed = outcome.first_failure.as_ref().map(crate::supervise::Failure::words);
    let summary = Summary {
        status,
        start: folder.start().unwrap_or_default(),
        steps: last.map_or(0, |last| last.step),
        epochs: last.map_or(0, |last| last.epoch),
        samples_per_s: last.map_or(0.0, |last| last.samples_per_s),
        wall_s: outcome.wall.as_secs_f64(),
        train_s: outcome.wall.as_secs_f64(),
        peak_pss_bytes_per_rank: outcome.peaks.pss_bytes_per_rank.clone(),
        peak_own_bytes_per_rank: outcome.last_peaks.own_bytes_per_rank.clone(),
        peak_node_bytes: outcome.peaks.node_bytes,
        cache: outcome.cache.as_ref().map(|stats| CacheSummary::of(CacheMode::NextUse, stats)).unwrap_or_default(),
        restarts: outcome.restarts,
        reason: outcome.stopped_for.clone().or(failed),
        ended: outcome.ended.clone(),
        record_gaps: outcome.gaps.clone(),
        ..Summary::default()
    };
    if let Ok(text) = serde_json::to_vec_pretty(&summary)
        && let Err(error) = run_dir::replace(&folder.path.join("summary.json"), &text)
    {
        print::note(format_args!("{:#}; the run itself ended as shown here", anyhow::Error::from(error)));
    }
    if let Some(stats) = &outcome.cache {
        print::say(stats.text(&config.name));
    }
    // There are figures of what the program reported.
    if config.log.plots && folder.path.join("metrics.jsonl").is_file() {
        figures::of_run(&folder.path);
    }
    let peaks: Vec<String> = summary.peak_own_bytes_per_rank.iter().map(|bytes| bytes_text(*bytes)).collect();
    print::say(format_args!(
        "peak memory: {} on this node, of a budget of {}; of each rank alone: {}",
        bytes_text(summary.peak_node_bytes),
        bytes_text(plan.budget.total_bytes),
        peaks.join(", ")
    ));
    print::say(format_args!("run folder: {}", shown(&folder.path)));
    explain(outcome);
    summary.record_gaps.iter().for_each(|gap| print::note(format_args!("warning: {gap}")));
    if let Some(reason) = &outcome.stopped_for {
        print::say(watch::stopped(config.log.language, reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_the_name_of_what_is_run() {
        let name = |line: &str| {
            let mut words = line.split(' ').map(OsString::from);
            let program = words.next().unwrap();
            name_of(&program, &words.collect::<Vec<_>>())
        };
        assert_eq!(
            ["python train.py --lr 3", "/usr/bin/torchrun -n 2 a/fine_tune.py", "yolo", "./x y.txt", "..."].map(name),
            ["train", "fine_tune", "yolo", "x", "program"]
        );
    }
}
