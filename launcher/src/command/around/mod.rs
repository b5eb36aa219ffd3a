//! The verbs around a run: its records for other tools, its page, runs beside each other, facts on this machine.

mod env;
pub(super) mod live;
pub(super) mod requeue;
mod runs;
mod shell;
mod sweep;

use super::{Error, print, shown};
use crate::advise;
use crate::cli::{Around, ExportArgs};
use crate::run_dir::StagesOf;
use crate::track;
use spec::contract::exit;
use std::path::{Path, PathBuf};

pub(super) fn around(verb: &Around) -> Result<u8, Error> {
    match verb {
        Around::ExportMetrics(args) => export(args),
        Around::Runs(args) => runs::runs(args),
        Around::Compare(args) => runs::compare(args),
        Around::Report(args) => runs::report(args),
        Around::Sweep(args) => sweep::sweep(args),
        Around::Env(args) => env::env(args),
        Around::Completions(args) => shell::completions(args),
        Around::Man(args) => shell::man(args),
    }
}

/// Folders that hold records: that of a run, or those of its stages that have begun.
fn folders(run: &Path, runs_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let found = advise::locate(run, runs_dir)?;
    let begun = StagesOf::read(&found).map(|stages| stages.begun(&found)).unwrap_or_default();
    Ok(if begun.is_empty() { vec![found] } else { begun })
}

fn export(args: &ExportArgs) -> Result<u8, Error> {
    let folders = folders(&args.read.run, &args.read.runs_dir)?;
    for folder in &folders {
        let out = match (&args.out, folders.len()) {
            (Some(out), 2..) => Some(out.join(folder.file_name().unwrap_or_default())),
            (out, _) => out.clone(),
        };
        match track::export(folder, args.to, out.as_deref()) {
            Ok(path) => print::out(shown(&path))?,
            // A stage that is a pass has none.
            Err(track::ExportError::Empty(_)) if folders.len() > 1 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(exit::OK)
}
