//! The verbs that look at memory: `recommend`, `doctor`, `analyze`, `monitor`.

use super::figures::draw;
use super::{Error, io, print, shown};
use crate::advise;
use crate::cli::{self, CliError};
use crate::monitor::{self, Subject};
use crate::run_dir::StagesOf;
use host::machine;
use spec::config::Language;
use spec::contract::exit;
use std::path::{Path, PathBuf};

pub(super) fn recommend(args: &cli::RecommendArgs) -> Result<u8, Error> {
    let found = advise::recommend(&machine::probe());
    let json = || serde_json::to_string_pretty(&found).unwrap_or_default();
    print::out(if args.json { json() } else { found.to_string() })?;
    Ok(exit::OK)
}

/// Prints what is wrong with a run; that something is wrong is no error of this program.
pub(super) fn doctor(args: &cli::DoctorArgs) -> Result<u8, Error> {
    let folders = folders(&args.read)?;
    if args.json {
        return doctor_json(&folders);
    }
    for folder in &folders {
        if folders.len() > 1 {
            print::out(format_args!("{}:", shown(folder)))?;
        }
        doctor_one(folder)?;
    }
    Ok(exit::OK)
}

/// Folders to read: that of a run, or those of its stages that have begun.
fn folders(args: &cli::ReadArgs) -> Result<Vec<PathBuf>, Error> {
    let found = advise::locate(&args.run, &args.runs_dir)?;
    let begun = StagesOf::read(&found).map(|stages| stages.begun(&found)).unwrap_or_default();
    Ok(if begun.is_empty() { vec![found] } else { begun })
}

/// A run with what is wrong with it.
fn examined(folder: &Path) -> Result<(advise::Run, Vec<advise::Finding>), Error> {
    let mut run = advise::Run::read(folder, Path::new(""))?;
    let whole = run.path.canonicalize().unwrap_or_else(|_| run.path.clone());
    run.living = run.monitor.is_empty() && !Subject::Run(whole).members().is_empty();
    let findings = advise::doctor(&run, run.language.unwrap_or(Language::En));
    Ok((run, findings))
}

fn doctor_json(folders: &[PathBuf]) -> Result<u8, Error> {
    let mut all = Vec::new();
    for folder in folders {
        let (run, findings) = examined(folder)?;
        all.push(serde_json::json!({"run": run.path, "looked_at": looked_at(&run), "findings": findings}));
    }
    print::out(serde_json::to_string_pretty(&all).unwrap_or_default())?;
    Ok(exit::OK)
}

fn doctor_one(folder: &Path) -> Result<(), Error> {
    let (run, findings) = examined(folder)?;
    for (number, finding) in findings.iter().enumerate() {
        let (number, advise::Finding { symptom, cause, change, .. }) = (number + 1, finding);
        let cause = cause.replace('\n', "\n          ");
        print::out(format_args!("{number}. {symptom}\n   cause: {cause}\n   change: {change}"))?;
    }
    if findings.is_empty() {
        print::out(format_args!("{}: nothing stands out in {}", shown(&run.path), looked_at(&run)))?;
    }
    Ok(())
}

/// How much a word of health rests on.
fn looked_at(run: &advise::Run) -> String {
    if run.monitor.is_empty() {
        let (steps, yet) = (run.metrics.last().map_or(0, |record| record.step), run.living && run.open_ended);
        return format!("{steps} steps{}", if yet { " so far; the run is still training" } else { "" });
    }
    match advise::Growth::of(run) {
        growth @ advise::Growth::NotJudged { .. } => format!("{} samples; growth: {growth}", run.monitor.len()),
        _ => format!("{} samples", run.monitor.len()),
    }
}

pub(super) fn analyze(args: &cli::AnalyzeArgs) -> Result<u8, Error> {
    if let Some(png) = &args.plot {
        check_plot(png)?;
    }
    let folders = folders(&args.read)?;
    if folders.len() > 1 {
        return analyze_stages(&folders, args);
    }
    let run = advise::Run::read(&folders[0], Path::new(""))?;
    let found = advise::analyze(&run);
    if args.json {
        print::out(serde_json::to_string_pretty(&found).unwrap_or_default())?;
    } else {
        print::out(format_args!("{}\n{found}", shown(&run.path)))?;
    }
    if let Some(png) = &args.plot {
        draw(&run.path, png).map_err(io(format!("cannot draw {}", png.display()), exit::INTERNAL))?;
        // Beside JSON nothing else is printed.
        if !args.json {
            print::out(shown(png))?;
        }
    }
    Ok(exit::OK)
}

/// One text, or one JSON object, with each stage by its name.
fn analyze_stages(folders: &[PathBuf], args: &cli::AnalyzeArgs) -> Result<u8, Error> {
    if args.plot.is_some() {
        let names: Vec<String> = folders.iter().map(|folder| shown(folder)).collect();
        let text = format!("--plot draws one folder: give that of a stage: {}", names.join(", "));
        return Err(CliError::Usage(text).into());
    }
    let mut all = serde_json::Map::new();
    for folder in folders {
        let run = advise::Run::read(folder, Path::new(""))?;
        let found = advise::analyze(&run);
        if args.json {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            all.insert(name, serde_json::to_value(&found).unwrap_or_default());
        } else {
            print::out(format_args!("{}\n{found}", shown(&run.path)))?;
        }
    }
    if args.json {
        print::out(serde_json::to_string_pretty(&all).unwrap_or_default())?;
    }
    Ok(exit::OK)
}

/// A picture goes into a folder that is there, under a name that says what it is.
fn check_plot(png: &Path) -> Result<(), Error> {
    let refuse = |problem: &str| Err(Error::Target(format!("--plot {}: {problem}", png.display())));
    let folder = png.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if png.is_dir() {
        return refuse("is a folder: name a file in it, such as memory.png");
    }
    if !png.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
        return refuse("pictures are PNG: give a name that ends in .png");
    }
    if !folder.is_dir() {
        return refuse("its folder is not there: make it first");
    }
    Ok(())
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
        json: args.json,
        textfile: args.textfile.clone(),
        listen: args.listen.clone(),
        draw: &draw,
    };
    let title = options.subject.title();
    let done = monitor::monitor(&options).map_err(io("cannot watch", exit::USAGE))?;
    if args.json {
        return Ok(exit::OK);
    }
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
        let found = found.canonicalize().map_err(io("cannot find the run", exit::DATA))?;
        // Of a run with stages: the one that runs, else the last one.
        let begun = StagesOf::read(&found).map(|stages| stages.begun(&found)).unwrap_or_default();
        let living = begun.iter().find(|stage| !Subject::Run(stage.to_path_buf()).members().is_empty());
        return Ok(Subject::Run(living.or(begun.last()).cloned().unwrap_or(found)));
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
