//! `launch --smart`: legs of training, each by new processes that continue from the last checkpoint.

use super::early::Early;
use super::{
    Error, Ready, Setup, close, open_folder, prepare, print, rank_program, request, shown, supervise_run, text_of,
};
use crate::advise;
use crate::cli::RunArgs;
use crate::run_dir::{self, RunDir};
use crate::smart::{self, Decision, Leg, Report};
use crate::supervise::signal_name;
use spec::config::Language;
use spec::contract::{MetricsRecord, RunStatus, exit};
use std::path::Path;

const BETWEEN_LEGS: &str = "stopped between two legs: what is done stays; to continue, add --resume auto";

/// Trains leg by leg until the targets are met, nothing gets better, or `smart.max_total_epochs`.
pub(super) fn smart(run: &RunArgs, mut early: Early) -> Result<u8, Error> {
    let mut ready = prepare(&run.config, request(run), early.undo())?;
    if !super::stages::chosen(run, &ready)?.is_empty() {
        let task = &ready.config.task;
        return Err(Error::Target(format!(
            "--smart trains one model in legs, task {task} has stages: leave --smart out"
        )));
    }
    let targets = smart::targets(&ready.config).map_err(|error| Error::Target(error.to_string()))?;
    let program = rank_program()?;
    ready.plan()?;
    ready.sample_if_missing()?;
    // Once: what was made smaller stays so.
    let mut first_plan = Some(ready.eased_plan()?);
    first_plan.iter().try_for_each(|plan| ready.check_limits(plan))?;
    let (mut folder, _lock) = open_folder(run, &ready)?;
    if let Some(plan) = &first_plan {
        print::say(text_of(plan));
        super::announce(&folder, &run.resume());
        super::pre_flight(&ready, plan);
    }
    let language = ready.config.log.language;
    let mut done = folder.resume.as_deref().and_then(run_dir::epochs_done).unwrap_or(0) as usize;
    let mut report = Report { targets, ..behind(&folder, done) };
    if done > 0 && judged_again(&ready, &folder, &mut report, done)? {
        return Ok(exit::OK);
    }
    loop {
        let up_to = report.next_end(&ready.config.smart, done);
        ready.config.train.num_epochs = up_to;
        print::say(begins(language, report.legs.len() + 1, up_to));
        let plan = first_plan.take().map_or_else(|| ready.plan(), Ok)?;
        let mut setup = Setup { config: ready.config.clone(), plan, reduced: Vec::new() };
        let outcome = supervise_run(run, &ready, &mut setup, &mut folder, &program, early.hand_over())?;
        close(&folder, &setup, &outcome);
        if outcome.exit_code != exit::OK {
            return Ok(outcome.exit_code);
        }
        let records = advise::Run::read(&folder.path, Path::new(""))?;
        let (trained, early) = match &records.summary {
            Some(summary) => (summary.epochs as usize, summary.status == RunStatus::EarlyStopped),
            None => (up_to, false),
        };
        done = trained;
        // A leg that trained nothing says nothing.
        if trained > report.legs.last().map_or(0, |leg| leg.epochs) {
            let leg = judge(&ready, &report, &records.metrics, trained)?;
            print::say(smart::said(language, &leg));
            report.legs.push(leg);
            report.peak_pss_bytes.push(outcome.peaks.pss_bytes_per_rank.iter().copied().max().unwrap_or(0));
            write(&folder, &report)?;
        }
        if is_over(&report) {
            return Ok(exit::OK);
        }
        if early || trained < up_to {
            print::say(ended_by(language, if early { "train.early_stopping" } else { "train.max_steps" }));
            return Ok(exit::OK);
        }
        if let Some(signal) = outcome.stopped_by {
            // It came when all ranks had finished this leg: nobody else heeds it.
            print::note(format_args!("{}: {BETWEEN_LEGS}", signal_name(signal)));
            return Ok(exit::STOPPED);
        }
        folder.resume_newest();
    }
}

/// Report of an earlier call on the first `done` epochs.
fn behind(folder: &RunDir, done: usize) -> Report {
    let path = folder.path.join("smart_report.json");
    let text = std::fs::read(&path).ok().filter(|_| done > 0);
    let report = text.map(|text| serde_json::from_slice::<Report>(&text)).transpose();
    let report = report.unwrap_or_else(|error| {
        print::note(format_args!("{}: {error}: the legs before are not known", shown(&path)));
        None
    });
    report.unwrap_or_default().until(done)
}

/// Where the checkpoint is the end of a leg: its decision, since targets and limits may be others now. True: all is done.
fn judged_again(ready: &Ready, folder: &RunDir, report: &mut Report, done: usize) -> Result<bool, Error> {
    let records = advise::Run::read(&folder.path, Path::new(""))?.metrics;
    let leg = judge(ready, report, &records, done)?;
    let Some(last) = report.legs.last_mut().filter(|last| last.epochs == done) else { return Ok(false) };
    *last = leg;
    print::say(smart::said(ready.config.log.language, last));
    write(folder, report)?;
    Ok(is_over(report))
}

fn judge(ready: &Ready, report: &Report, records: &[MetricsRecord], epochs: usize) -> Result<Leg, Error> {
    smart::check_recorded(&report.targets, records).map_err(|error| Error::Target(error.to_string()))?;
    Ok(smart::judge(&ready.config.smart, &report.targets, records, epochs))
}

fn is_over(report: &Report) -> bool {
    report.legs.last().is_some_and(|leg| !matches!(leg.decision, Decision::GoOn { .. }))
}

fn begins(language: Language, leg: usize, epochs: usize) -> String {
    match language {
        Language::En => format!("smart: leg {leg}, up to epoch {epochs}"),
        Language::Zh => format!("智能训练：第 {leg} 段，至第 {epochs} 轮"),
    }
}

fn ended_by(language: Language, key: &str) -> String {
    match language {
        Language::En => format!("smart: ended by {key}"),
        Language::Zh => format!("智能训练：由 {key} 结束"),
    }
}

fn write(folder: &RunDir, report: &Report) -> Result<(), Error> {
    let path = folder.path.join("smart_report.json");
    let text =
        serde_json::to_vec_pretty(report).map_err(|error| super::io("cannot write", exit::INTERNAL)(error.into()))?;
    Ok(run_dir::replace(&path, &text)?)
}
