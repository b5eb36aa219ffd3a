//! The verbs that look at memory: `recommend`, `doctor`, `analyze`, `monitor`.

use super::{Error, io, print, rank_command, shown};
use crate::advise;
use crate::cli::{self, CliError};
use crate::config::Language;
use crate::contract::exit;
use crate::machine::Machine;
use crate::monitor::{self, Subject};
use std::path::{Path, PathBuf};

pub(super) fn recommend(args: &cli::RecommendArgs) -> Result<u8, Error> {
    let found = advise::recommend(&Machine::probe());
    let json = || serde_json::to_string_pretty(&found).unwrap_or_default();
    print::out(if args.json { json() } else { found.to_string() })?;
    Ok(exit::OK)
}

/// Prints what is wrong with a run; that something is wrong is no error of this program.
pub(super) fn doctor(args: &cli::ReadArgs) -> Result<u8, Error> {
    let run = advise::Run::read(&args.run, &args.runs_dir)?;
    let findings = advise::doctor(&run, run.language.unwrap_or(Language::En));
    for (number, finding) in findings.iter().enumerate() {
        let (number, advise::Finding { symptom, cause, change, .. }) = (number + 1, finding);
        print::out(format_args!("{number}. {symptom}\n   cause: {cause}\n   change: {change}"))?;
    }
    if findings.is_empty() {
        let steps = run.metrics.last().map_or(0, |record| record.step);
        print::out(format_args!("{}: nothing stands out in {steps} steps", shown(&run.path)))?;
    }
    Ok(exit::OK)
}

pub(super) fn analyze(args: &cli::AnalyzeArgs) -> Result<u8, Error> {
    let run = advise::Run::read(&args.read.run, &args.read.runs_dir)?;
    let found = advise::analyze(&run);
    if args.json {
        print::out(serde_json::to_string_pretty(&found).unwrap_or_default())?;
    } else {
        print::out(format_args!("{}\n{found}", shown(&run.path)))?;
    }
    if let Some(png) = &args.plot {
        draw(&run.path, png).map_err(io(format!("cannot draw {}", png.display()), exit::DATA))?;
        // Beside JSON nothing else is printed.
        if !args.json {
            print::out(shown(png))?;
        }
    }
    Ok(exit::OK)
}

/// The rank program draws: `launch` itself stays small.
fn draw(what: &Path, png: &Path) -> std::io::Result<()> {
    let words = ["plot".into(), "--from".into(), what.into(), "--out".into(), png.into()];
    let mut command = rank_command(&words).map_err(std::io::Error::other)?;
    let status = command.status()?;
    let failed = || std::io::Error::other(format!("`rank plot` ended with {status}"));
    if status.success() { Ok(()) } else { Err(failed()) }
}

pub(super) fn monitor_memory(args: &cli::MonitorArgs) -> Result<u8, Error> {
    let subject = subject(args)?;
    if subject != Subject::Machine && subject.members().is_empty() {
        let title = subject.title();
        return Err(Error::Data(match subject {
            Subject::Run(_) => format!("{title}: nothing of it runs; `launch analyze RUN` reads what a run left"),
            _ => format!("{title}: no such process"),
        }));
    }
    let folder = match &subject {
        Subject::Run(path) => path.clone(),
        _ => PathBuf::from("."),
    };
    let options = monitor::Options {
        subject,
        duration_s: args.duration,
        interval_s: args.interval,
        plot_interval_s: args.plot_interval,
        out: args.out.clone().unwrap_or(folder),
        draw: &draw,
    };
    let title = options.subject.title();
    let done = monitor::monitor(&options).map_err(io("cannot watch", exit::USAGE))?;
    if let Some(end) = &done.end {
        print::out(format_args!("{title}: {end}"))?;
    }
    print::out(&done.found)?;
    for path in [&done.log, &done.report].into_iter().chain(&done.plots) {
        print::out(shown(path))?;
    }
    Ok(exit::OK)
}

fn subject(args: &cli::MonitorArgs) -> Result<Subject, Error> {
    if let Some(pid) = args.pid {
        return Ok(Subject::Pid(pid));
    }
    if let Some(run) = &args.run {
        let found = advise::locate(run, &args.runs_dir)?;
        return Ok(Subject::Run(found.canonicalize().map_err(io("cannot find the run", exit::DATA))?));
    }
    let mut runs: Vec<PathBuf> = monitor::living_runs().into_iter().collect();
    match runs.len() {
        0 => Ok(Subject::Machine),
        1 => Ok(Subject::Run(runs.remove(0))),
        count => {
            let list: Vec<String> = runs.iter().map(|run| format!("\n  --run {}", shown(run))).collect();
            let text = format!("{count} runs train here; name the one to watch:{}", list.concat());
            Err(CliError::Usage(text).into())
        }
    }
}
