//! The end of a run: its summary, the closing table and the last words.

use super::setup::Setup;
use super::{figures, print, shown};
use crate::console::closing_table;
use crate::run_dir::{self, RunDir};
use crate::supervise::{self, Outcome};
use crate::watch;
use spec::contract::{CacheSummary, RunStatus, Summary, exit};
use spec::job::Work;
use std::path::Path;

/// Says what ended the run, where it failed.
pub(super) fn explain(outcome: &Outcome) {
    if let Some(failure) = &outcome.first_failure {
        print::note(format_args!("error: {failure}"));
    }
}

/// Adds what only the launcher knows to summary.json, prints the closing table.
pub(super) fn close(folder: &RunDir, setup: &Setup, outcome: &Outcome) {
    let summary = conclude(folder, setup, outcome);
    tell_end(folder, setup, outcome, &summary, Some(closing_table(&summary, &setup.plan)));
    let name = folder.name();
    tell_stop(folder, outcome, &format!("add: --name {name} --resume auto"));
}

/// Adds what only the launcher knows to summary.json.
pub(super) fn conclude(folder: &RunDir, setup: &Setup, outcome: &Outcome) -> Summary {
    let Setup { plan, reduced, .. } = setup;
    let path = folder.path.join("summary.json");
    let start = folder.start().unwrap_or_default();
    // One of an earlier start says nothing of this one.
    let read = || serde_json::from_slice::<Summary>(&std::fs::read(&path).ok()?).ok().filter(|of| of.start == start);
    let known = outcome.first_failure.is_none().then(|| read().or_else(|| outcome.summary.clone())).flatten();
    let mut summary = known.unwrap_or_else(|| Summary { start, ..without_summary(outcome, folder.resumed_step()) });
    summary.wall_s = outcome.wall.as_secs_f64();
    summary.peak_pss_bytes_per_rank = outcome.peaks.pss_bytes_per_rank.clone();
    summary.peak_own_bytes_per_rank = outcome.last_peaks.own_bytes_per_rank.clone();
    summary.peak_node_bytes = outcome.peaks.node_bytes;
    summary.restarts = outcome.restarts;
    summary.reduced = reduced.clone();
    summary.ended = outcome.ended.clone();
    let failed = outcome.first_failure.as_ref().map(supervise::Failure::words);
    summary.reason = outcome.stopped_for.clone().or(failed).or(summary.reason.take());
    if outcome.exit_code == exit::UNSTARTED {
        let by = outcome.stopped_by.map(supervise::signal_name).unwrap_or_default();
        (summary.status, summary.reason) = (RunStatus::Stopped, Some(format!("stopped before the first step ({by})")));
    }
    if let Some(stats) = &outcome.cache {
        summary.cache = CacheSummary::of(plan.budget.cache_policy, stats);
    }
    for gap in &outcome.gaps {
        if !summary.record_gaps.iter().any(|known| (&known.file, known.from_t) == (&gap.file, gap.from_t)) {
            summary.record_gaps.push(gap.clone());
        }
    }
    if let Ok(text) = serde_json::to_vec_pretty(&summary)
        && let Err(error) = run_dir::replace(&path, &text)
    {
        print::note(format_args!("{:#}; the run itself ended as shown here", anyhow::Error::from(error)));
    }
    summary
}

/// Prints how a run ended, errors last, where eyes are; `table`: left out where another one follows.
pub(super) fn tell_end(folder: &RunDir, setup: &Setup, outcome: &Outcome, summary: &Summary, table: Option<String>) {
    let Setup { config, plan, .. } = setup;
    if let Some(stats) = &outcome.cache {
        print::say(stats.text(spec::task::data_name(&config.task)));
    }
    if config.log.plots && outcome.first_failure.is_none() && plan.topology.node_rank == 0 {
        figures::of_run(&folder.path);
    }
    if let Some(table) = table {
        print::say(table);
        print::say(format_args!("run folder: {}", shown(&folder.path)));
    }
    explain(outcome);
    summary.record_gaps.iter().for_each(|gap| print::note(format_args!("warning: {gap}")));
    if let Some(reason) = &outcome.stopped_for {
        print::say(watch::stopped(config.log.language, reason));
    }
}

/// Says of a run that was stopped what stays, and how it continues.
pub(super) fn tell_stop(folder: &RunDir, outcome: &Outcome, how: &str) {
    if outcome.exit_code == exit::UNSTARTED {
        let kept = folder.resume.as_deref().and_then(Path::file_name).map(|at| format!(", {} stays", at.display()));
        let kept = kept.unwrap_or_default();
        let what = if folder.work == Work::Train { "trained" } else { "done" };
        print::note(format_args!("stopped before the first step: nothing was {what}{kept}; to start again, {how}"));
    }
    if outcome.exit_code == exit::STOPPED {
        let what =
            if folder.work == Work::Train { "stopped after a checkpoint" } else { "stopped; what is whole stays" };
        print::say(format_args!("{what}; to continue, {how}"));
    }
}

/// Summary of a run whose rank 0 left none; `resumed_step`: the step where it began.
fn without_summary(outcome: &Outcome, resumed_step: Option<u64>) -> Summary {
    let (failed, last) = (outcome.first_failure.is_some(), outcome.progress.as_ref());
    let (status, reason) = match outcome.stopped_by {
        _ if failed => (RunStatus::Failed, None),
        _ if outcome.exit_code == exit::OK => (RunStatus::Finished, None),
        Some(signal) => {
            let moment =
                if last.is_some() { "before its last checkpoint was written" } else { "before the first step" };
            (RunStatus::Stopped, Some(format!("stopped by {} {moment}", supervise::signal_name(signal))))
        }
        None if outcome.exit_code == exit::STOPPED => (RunStatus::Stopped, None),
        None => (RunStatus::Failed, None),
    };
    Summary {
        status,
        reason,
        steps: last.map_or(resumed_step.unwrap_or(0), |last| last.step),
        // The running one is not whole.
        epochs: last.map_or(0, |last| last.epoch.saturating_sub(1)),
        ..Summary::default()
    }
}
