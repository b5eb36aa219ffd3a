//! The verbs that look at memory: `recommend`, `doctor`, `analyze`, `monitor`.

use super::{Error, io, rank_command, shown};
use crate::advise;
use crate::cli;
use crate::config::Language;
use crate::contract::exit;
use crate::machine::Machine;
use crate::monitor::{self, Subject};
use std::path::{Path, PathBuf};

pub(super) fn recommend(args: &cli::RecommendArgs) -> Result<u8, Error> {
    let found = advise::recommend(&Machine::probe());
    let json = || serde_json::to_string_pretty(&found).unwrap_or_default();
    println!("{}", if args.json { json() } else { found.to_string() });
    Ok(exit::OK)
}

/// Prints what is wrong with a run; that something is wrong is no error of this program.
pub(super) fn doctor(args: &cli::ReadArgs) -> Result<u8, Error> {
    let run = advise::Run::read(&args.run, &args.runs_dir)?;
    let findings = advise::doctor(&run, run.language.unwrap_or(Language::En));
    for (number, finding) in findings.iter().enumerate() {
        println!("{}. {}\n   cause: {}\n   change: {}", number + 1, finding.symptom, finding.cause, finding.change);
    }
    if findings.is_empty() {
        let steps = run.metrics.last().map_or(0, |record| record.step);
        println!("{}: nothing stands out in {steps} steps", shown(&run.path));
    }
    Ok(exit::OK)
}

pub(super) fn analyze(args: &cli::AnalyzeArgs) -> Result<u8, Error> {
    let run = advise::Run::read(&args.read.run, &args.read.runs_dir)?;
    let found = advise::analyze(&run);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found).unwrap_or_default());
    } else {
        print!("{}\n{found}", shown(&run.path));
    }
    if let Some(png) = &args.plot {
        draw(&run.path, png).map_err(io(format!("cannot draw {}", png.display()), exit::DATA))?;
        // Beside JSON nothing else is printed.
        if !args.json {
            println!("{}", shown(png));
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
    let subject = match (&args.run, args.pid) {
        (_, Some(pid)) => Subject::Pid(pid),
        (Some(run), None) => {
            let found = advise::locate(run, &args.runs_dir)?;
            Subject::Run(std::path::absolute(found).map_err(io("cannot find the run", exit::DATA))?)
        }
        (None, None) => monitor::living_run().map_or(Subject::Machine, Subject::Run),
    };
    if subject != Subject::Machine && subject.members().is_empty() {
        let title = subject.title();
        return Err(Error::Data(format!("{title}: nothing of it runs; `launch analyze RUN` reads what a run left")));
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
    let done = monitor::monitor(&options).map_err(io("cannot watch", exit::INTERNAL))?;
    for path in [&done.log, &done.report].into_iter().chain(&done.plots) {
        println!("{}", shown(path));
    }
    Ok(exit::OK)
}
