//! `launch --smart`: legs of training, each by new processes that go on from the last checkpoint.

use super::{Error, Setup, close, io, prepare, print, rank_program, request, shown, supervise_run, text_of};
use crate::advise;
use crate::cli::RunArgs;
use crate::config::{Config, Language};
use crate::contract::exit;
use crate::run_dir::{Ask, Resume, RunDir};
use crate::smart::{self, Decision, Leg};
use serde::Serialize;
use std::path::Path;
use std::time::SystemTime;

/// `smart_report.json`.
#[derive(Serialize)]
struct Report<'a> {
    targets: &'a [smart::Target],
    legs: &'a [Leg],
    /// Largest PSS of a rank in each leg, bytes: a trainer that starts afresh does not grow.
    peak_pss_bytes: &'a [u64],
}

/// Trains leg by leg until the targets are met, nothing gets better, or `smart.max_total_epochs`.
pub(super) fn smart(run: &RunArgs) -> Result<u8, Error> {
    let mut ready = prepare(&run.config, request(run))?;
    let targets = smart::targets(&ready.config).map_err(|error| Error::Target(error.to_string()))?;
    let program = rank_program()?;
    ready.plan()?;
    ready.sample_if_missing()?;
    let smart_config = ready.config.smart.clone();
    let mut epochs = smart_config.leg_epochs.min(smart_config.max_total_epochs);
    let (mut legs, mut peaks) = (Vec::new(), Vec::new());
    let mut resume = run.resume();
    let mut name = run.name.clone();
    loop {
        ready.config.train.num_epochs = epochs;
        // Once: what was made smaller stays so.
        let plan = if legs.is_empty() { ready.eased_plan()? } else { ready.plan()? };
        let mut folder = open(&ready.config, name.as_deref(), &resume)?;
        if legs.is_empty() {
            print::say(text_of(&plan));
            super::announce(&folder, &resume);
            super::pre_flight(&ready, &plan);
        }
        print::say(said(&ready.config, legs.len() + 1, epochs));
        let mut setup = Setup { config: ready.config.clone(), plan, reduced: Vec::new() };
        let outcome = supervise_run(run, &ready, &mut setup, &mut folder, program.clone())?;
        close(&folder, &setup, &outcome);
        peaks.push(outcome.peaks.pss_bytes_per_rank.iter().copied().max().unwrap_or(0));
        if outcome.exit_code != exit::OK {
            return Ok(outcome.exit_code);
        }
        let records = advise::Run::read(&folder.path, Path::new(""))?;
        let leg = smart::judge(&smart_config, &targets, &records.metrics, epochs);
        print::say(format_args!("smart: {leg}"));
        let decision = leg.decision.clone();
        legs.push(leg);
        write(&folder, &Report { targets: &targets, legs: &legs, peak_pss_bytes: &peaks })?;
        let early = records.summary.is_some_and(|summary| summary.status == "early_stopped");
        match decision {
            Decision::GoOn { up_to } if !early => epochs = up_to,
            Decision::GoOn { .. } => {
                print::say("smart: ended by train.early_stopping");
                return Ok(exit::OK);
            }
            _ => return Ok(exit::OK),
        }
        (resume, name) = (Resume::Auto, Some(folder.name()));
    }
}

fn open(config: &Config, name: Option<&str>, resume: &Resume) -> Result<RunDir, Error> {
    let (runs_dir, config_name) = (&config.log.runs_dir, &config.name);
    Ok(RunDir::open(&Ask { runs_dir, config_name, name, resume, node_rank: 0, now: SystemTime::now() })?)
}

fn said(config: &Config, leg: usize, epochs: usize) -> String {
    match config.log.language {
        Language::En => format!("smart: leg {leg}, up to epoch {epochs}"),
        Language::Zh => format!("智能训练：第 {leg} 段，至第 {epochs} 轮"),
    }
}

fn write(folder: &RunDir, report: &Report) -> Result<(), Error> {
    let path = folder.path.join("smart_report.json");
    let failed = || io(format!("cannot write {}", shown(&path)), exit::INTERNAL);
    let text = serde_json::to_vec_pretty(report).map_err(|error| failed()(error.into()))?;
    std::fs::write(&path, text).map_err(failed())
}
