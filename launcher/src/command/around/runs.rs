//! `launch runs`, `compare` and `report`: runs in a list, beside each other, on a page.

use super::super::{Error, io, print, shown};
use super::folders;
use crate::advise::{self, Overview, Run};
use crate::cli::{CliError, CompareArgs, ReportArgs, RunsArgs};
use crate::console::aligned;
use crate::monitor::{self, Subject};
use crate::page::{self, Gathered};
use crate::run_dir::StagesOf;
use spec::config::Language;
use spec::contract::exit;
use spec::plan::bytes_text;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Folders of runs below `runs_dir`, stages one by one.
fn all_folders(runs_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = runs_dir.read_dir().map_err(|error| Error::Io {
        what: format!("cannot read {} (--runs-dir names another folder)", shown(runs_dir)),
        code: exit::DATA,
        source: error,
    })?;
    let mut found = Vec::new();
    for folder in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        match StagesOf::read(&folder) {
            Some(stages) => found.extend(stages.begun(&folder)),
            None => found.push(folder),
        }
    }
    Ok(found)
}

fn is_living(folder: &Path, living: &BTreeSet<PathBuf>) -> bool {
    folder.canonicalize().is_ok_and(|path| living.contains(&path))
}

pub(super) fn runs(args: &RunsArgs) -> Result<u8, Error> {
    let living = monitor::living_runs();
    let folders = all_folders(&args.runs_dir)?;
    let read = |folder: &PathBuf| Overview::read(folder, is_living(folder, &living));
    let mut found: Vec<Overview> = folders.iter().filter_map(read).collect();
    found.sort_by(|a, b| b.began.total_cmp(&a.began).then_with(|| a.name.cmp(&b.name)));
    if args.json {
        print::out(serde_json::to_string_pretty(&found).unwrap_or_default())?;
        return Ok(exit::OK);
    }
    if found.is_empty() {
        print::note(format_args!("no runs in {}", shown(&args.runs_dir)));
        return Ok(exit::OK);
    }
    let head = ["run", "status", "began", "steps", "best", "samples/s", "time", "memory", "of plan"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(found.iter().map(row));
    print::out(aligned(&rows, &[3, 5, 6, 7, 8]))?;
    Ok(exit::OK)
}

fn row(run: &Overview) -> Vec<String> {
    let or_dash = |known: bool, text: String| if known { text } else { "-".into() };
    let best = run.best.as_ref().map(|best| format!("{} {}", best.metric, advise::number(best.value)));
    let planned = run.planned_bytes > 0 && run.peak_bytes > 0;
    vec![
        run.name.clone(),
        run.standing.text().into(),
        advise::date(run.began),
        run.steps.to_string(),
        best.unwrap_or_else(|| "-".into()),
        or_dash(run.samples_per_s > 0.0, advise::number(run.samples_per_s)),
        or_dash(run.wall_s > 0.0, advise::duration(run.wall_s)),
        or_dash(run.peak_bytes > 0, bytes_text(run.peak_bytes)),
        or_dash(planned, format!("{:.0} %", 100.0 * run.peak_bytes as f64 / run.planned_bytes.max(1) as f64)),
    ]
}

fn gather(folder: &Path, living: &BTreeSet<PathBuf>) -> Result<Gathered, Error> {
    let mut run = Run::read(folder, Path::new(""))?;
    run.living = is_living(folder, living);
    let overview = Overview::read(folder, run.living).unwrap_or_default().with_records(&run);
    let findings = advise::doctor(&run, run.language.unwrap_or(Language::En));
    Ok(page::gather(&run, overview, &advise::analyze(&run), &findings))
}

fn all_gathered(runs: &[PathBuf], runs_dir: &Path) -> Result<(Vec<PathBuf>, Vec<Gathered>), Error> {
    let living = monitor::living_runs();
    let mut found = Vec::new();
    for run in runs {
        found.extend(folders(run, runs_dir)?);
    }
    let gathered = found.iter().map(|folder| gather(folder, &living)).collect::<Result<_, _>>()?;
    Ok((found, gathered))
}

pub(super) fn compare(args: &CompareArgs) -> Result<u8, Error> {
    let (_, runs) = all_gathered(&args.runs, &args.runs_dir)?;
    let configs: Vec<_> = runs.iter().map(|run| &run.config).collect();
    let differs = advise::differing(&configs);
    if args.json {
        let overviews: Vec<&Overview> = runs.iter().map(|run| &run.overview).collect();
        let config: serde_json::Map<String, serde_json::Value> =
            differs.iter().map(|row| (row[0].clone(), row[1..].to_vec().into())).collect();
        let value = serde_json::json!({"runs": overviews, "config": config});
        print::out(serde_json::to_string_pretty(&value).unwrap_or_default())?;
        return Ok(exit::OK);
    }
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    let head = |first: &str| [vec![first.to_owned()], names.clone()].concat();
    let rows: Vec<_> = runs.iter().map(|run| run.overview.rows()).collect();
    let mut results = vec![head("")];
    results.extend(advise::side_by_side(&rows));
    print::out(aligned(&results, &[]))?;
    if differs.is_empty() {
        print::out("\ntheir configs are the same")?;
        return Ok(exit::OK);
    }
    let mut table = vec![head("config")];
    table.extend(differs);
    print::out(format_args!("\n{}", aligned(&table, &[])))?;
    Ok(exit::OK)
}

pub(super) fn report(args: &ReportArgs) -> Result<u8, Error> {
    let (folders, runs) = all_gathered(&args.runs, &args.runs_dir)?;
    let default = || folders.first().map(|folder| folder.join("report.html")).unwrap_or_default();
    let out = args.out.clone().unwrap_or_else(default);
    if out.is_dir() {
        let text = format!("--out {} is a folder: name a file in it, such as report.html", shown(&out));
        return Err(CliError::Usage(text).into());
    }
    let stamp = host::stamp::time_stamp(SystemTime::now());
    let made = format!("made {stamp} UTC by Headroom {}", env!("CARGO_PKG_VERSION"));
    let text = page::page(&runs, &made);
    let sibling = out.with_added_extension("new");
    host::journal::replace(&out, &sibling, text.as_bytes(), host::journal::ROOM_LIMIT)
        .map_err(io(format!("cannot write {}", shown(&out)), exit::USAGE))?;
    print::out(shown(&out))?;
    Ok(exit::OK)
}

/// The living members of a run, for who must know whether it may be trained.
pub(super) fn is_training(folder: &Path) -> bool {
    folder.canonicalize().is_ok_and(|path| !Subject::Run(path).members().is_empty())
}
