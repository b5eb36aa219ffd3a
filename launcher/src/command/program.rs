//! A user's own program with everything: a plan, a page cache, a cgroup, the watch, logs, records and a summary.
//!
//! The plan knows the program by its last run here: memory that no formula tells is measured. What is to be done when memory runs
//! out is the watch's: the page cache shrinks, and at the end SIGUSR1 asks the program for a checkpoint.

use super::early::Early;
use super::supervised::{console_of, supervise_program};
use super::{Error, columns, explain, figures, measure, print, scope, shown};
use crate::cli::{PlanForm, ProgramArgs, RunArgs};
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
        world_size: ranks.saturating_mul(run.nnodes),
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
pub(super) fn show(
    run: &RunArgs,
    with: &ProgramArgs,
    form: &PlanForm,
    (program, args): (&OsStr, &[OsString]),
) -> Result<u8, Error> {
    let config = config_of(with, name_of(program, args));
    let machine = form.machine.as_deref().map_or_else(|| Ok(machine::probe()), measure::read_machine)?;
    let plan = plan_of(run, with, &config, &machine)?;
    print::out(if form.json { serde_json::to_string_pretty(&plan).unwrap_or_default() } else { table(&plan) })?;
    Ok(exit::OK)
}

/// Starts this program anew within the memory limit of its plan, where that is the only way to one. Before anything is shared
/// with other nodes: those would meet a launcher that comes twice.
pub(super) fn limited(run: &RunArgs, with: &ProgramArgs, program: &OsStr, args: &[OsString]) -> Result<(), Error> {
    let config = config_of(with, name_of(program, args));
    let plan = plan_of(run, with, &config, &machine::probe())?;
    if let Some(limits) = limits_of(&config, plan.budget.total_bytes) {
        scope::enter(limits);
    }
    Ok(())
}

/// Runs the program of `bare` with everything.
pub(super) fn run(run: &RunArgs, with: &ProgramArgs, bare: Spec, mut early: Early) -> Result<u8, Error> {
    let config = config_of(with, name_of(bare.program.as_os_str(), &bare.args));
    let plan = plan_of(run, with, &config, &machine::probe())?;
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
    if is_of_a_config(&folder.path, &config.name) {
        let text = "a config was trained in it, and its files would be lost: give the program another --name";
        return Err(Error::Target(format!("{}: {text}", shown(&folder.path))));
    }
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

/// True if a run of Headroom's own tasks lies in `folder`: those keep their config there.
fn is_of_a_config(folder: &Path, name: &str) -> bool {
    let job: serde_json::Value = crate::advise::json(&folder.join("job.json")).unwrap_or_default();
    let own = job.pointer("/config/name").and_then(serde_json::Value::as_str) == Some(name);
    folder.join("config.yaml").is_file() && !own
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
    print::say(peak(&summary, plan.budget.total_bytes));
    print::say(format_args!("run folder: {}", shown(&folder.path)));
    explain(outcome);
    summary.record_gaps.iter().for_each(|gap| print::note(format_args!("warning: {gap}")));
    if let Some(reason) = &outcome.stopped_for {
        print::say(watch::stopped(config.log.language, reason));
    }
}

/// The most memory that was seen.
fn peak(summary: &Summary, budget_bytes: u64) -> String {
    if summary.peak_node_bytes == 0 {
        return "peak memory: not measured, the program ended too soon".into();
    }
    let ranks: Vec<String> = summary.peak_own_bytes_per_rank.iter().map(|bytes| bytes_text(*bytes)).collect();
    let (node, budget) = (bytes_text(summary.peak_node_bytes), bytes_text(budget_bytes));
    format!("peak memory: {node} on this node, of a budget of {budget}; of each rank alone: {}", ranks.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_which_a_config_was_trained_is_no_programs() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("job.json", r#"{"config": {"name": "quick_demo"}}"#);
        assert!(!is_of_a_config(dir.path(), "train"));
        write("config.yaml", "");
        assert!(is_of_a_config(dir.path(), "train"));
        write("job.json", r#"{"config": {"name": "train"}}"#);
        assert!(!is_of_a_config(dir.path(), "train"), "one that was stopped while it began");
    }

    #[test]
    fn a_peak_that_nobody_saw_is_no_peak_of_nothing() {
        let seen =
            Summary { peak_node_bytes: 3 << 20, peak_own_bytes_per_rank: vec![1 << 20, 2 << 20], ..Summary::default() };
        let text = "peak memory: 3.0 MiB on this node, of a budget of 1.00 GiB; of each rank alone: 1.0 MiB, 2.0 MiB";
        assert_eq!(peak(&seen, 1 << 30), text);
        assert!(peak(&Summary::default(), 1 << 30).contains("not measured"));
    }

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
