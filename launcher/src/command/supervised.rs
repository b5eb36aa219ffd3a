//! A program that is no rank of Headroom's, from its start to its end.

use super::around::requeue;
use super::{Error, io, start_code};
use crate::cli::{ProgramArgs, RunArgs};
use crate::console::Console;
use crate::supervise::{self, Outcome, Signals, Spec, Stream};
use spec::contract::exit;

/// The console with the lines that `--redirects`, `--tee` and `--local-ranks-filter` leave.
pub(super) fn console_of(with: &ProgramArgs, spec: &Spec) -> Result<Console, Error> {
    let console = Console::start().map_err(io("cannot start the console", exit::INTERNAL))?;
    let (with, first) = (with.clone(), spec.ranks.first().map_or(0, |rank| rank.rank));
    Ok(console.only(move |rank, stream| with.shows(rank.saturating_sub(first) as usize, stream == Stream::Err)))
}

/// Runs the program to its end, and again after failures as often as was asked for.
pub(super) fn supervise_program(
    run: &RunArgs,
    spec: &Spec,
    console: Console,
    signals: &Signals,
) -> Result<Outcome, Error> {
    let outcome = supervise::run_with_restarts(run.max_restarts, |_, _| Ok(spec.clone()), &console, signals);
    console.finish();
    outcome.iter().for_each(requeue::look_at);
    outcome.map_err(|source| Error::Io { what: "cannot run the ranks".into(), code: start_code(&source), source })
}
