//! Figures, drawn by this program in a process of its own: pixels and fonts never lie in the memory of a supervisor or monitor.

use super::{Error, print, shown};
use crate::advise;
use crate::cli::PlotArgs;
use crate::plots;
use spec::contract::exit;
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// This program, also where its file was replaced by a newer build meanwhile.
const SELF: &str = "/proc/self/exe";

/// The hidden verb: draws in this process.
pub(super) fn plot(args: &PlotArgs) -> Result<u8, Error> {
    let from = advise::locate(&args.read.run, &args.read.runs_dir)?;
    match &args.out {
        Some(png) => plots::plot_any(&from, png)?,
        None => plots::plot_folder(&from, args.job.as_deref())?,
    }
    Ok(exit::OK)
}

/// Draws the memory of a run's folder, or of a monitor's log, into `png`.
///
/// # Errors
/// Nothing can be drawn; the text of the process that draws.
pub(super) fn draw(what: &Path, png: &Path) -> io::Result<()> {
    start(&["--out".as_ref(), png.as_os_str(), "--".as_ref(), what.as_os_str()])
}

/// Draws all figures of a run that has ended. A failure is a line: what was trained stays.
pub(super) fn of_run(run_dir: &Path) {
    if let Err(error) = start(&["--".as_ref(), run_dir.as_os_str()]) {
        let run = shown(run_dir);
        print::note(format_args!(
            "no figures: {error}; `launch plot {run}` draws them, log.plots: false trains without"
        ));
    }
}

fn start(words: &[&OsStr]) -> io::Result<()> {
    let mut command = Command::new(SELF);
    command.arg0("launch").arg("plot").args(words);
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("launch: error: ");
    let why = if said.is_empty() { format!("`launch plot` ended with {}", output.status) } else { said.into() };
    Err(io::Error::other(why))
}
