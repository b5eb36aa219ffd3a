//! `--requeue`: a job that a scheduler's signal stopped is started again by SLURM itself, as other trainers do it.

use super::super::{Error, print};
use crate::cli::{Around, CliError, Command};
use crate::run_dir::Resume;
use crate::supervise::Outcome;
use rustix::process::Signal;
use spec::contract::exit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A job that is to be started again by its name; the inner `None`: it has none.
type Job = Option<String>;

/// The job of this process. A signal that ends the program before any rank runs is answered by another thread.
static WANTED: Mutex<Option<Job>> = Mutex::new(None);
/// A signal ended a program under `--exec`, whose exit codes say nothing of that.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Keeps what is to be done at the end.
///
/// # Errors
/// The command line would not continue what it began.
pub(in crate::command) fn prepare(command: &mut Command) -> Result<(), Error> {
    *WANTED.lock().unwrap_or_else(PoisonError::into_inner) = wanted(command, |name| std::env::var(name).ok())?;
    Ok(())
}

fn wanted(command: &mut Command, lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Job>, Error> {
    // A sweep continues by itself, and a program knows how it does.
    let continues = matches!(command, Command::Exec { .. } | Command::Around(Around::Sweep(_)));
    let Some(run) = command.run_args().filter(|run| run.requeue) else { return Ok(None) };
    if !continues && (run.name.is_none() || run.resume() != Resume::Auto) {
        let text = "--requeue needs --name and --resume auto: the job that starts again runs the same command";
        return Err(CliError::Usage(text.into()).into());
    }
    // All nodes are one job, which node 0 speaks for.
    Ok((run.node_rank == 0).then(|| job(lookup)))
}

/// Looks at how a program under `--exec` ended.
pub(in crate::command) fn look_at(outcome: &Outcome) {
    STOPPED.store(is_stopped(outcome), Ordering::Relaxed);
}

/// A scheduler ended it: neither the user at the keyboard, nor the watch, nor a failure.
fn is_stopped(outcome: &Outcome) -> bool {
    let by_scheduler = outcome.stopped_by.is_some_and(|number| number != Signal::INT.as_raw());
    by_scheduler && outcome.stopped_for.is_none() && outcome.first_failure.is_none()
}

/// Asks SLURM to start the job again, if it was stopped on request. The exit code stays.
pub(in crate::command) fn after(code: u8) -> u8 {
    if matches!(code, exit::STOPPED | exit::UNSTARTED) || STOPPED.load(Ordering::Relaxed) {
        now();
    }
    code
}

/// Asks SLURM to start the job again, where that is wanted. It may end this process.
pub(in crate::command) fn now() {
    let Some(job) = WANTED.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    let Some(job) = job else {
        return print::note("not requeued: SLURM_JOB_ID is not set; start the same command again to continue");
    };
    match std::process::Command::new("scontrol").args(["requeue", &job]).output() {
        Ok(output) if output.status.success() => print::note(format_args!("job {job} is requeued")),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            print::note(format_args!("warning: `scontrol requeue {job}` failed: {}", said.trim()));
        }
        Err(error) => print::note(format_args!("warning: cannot start `scontrol requeue {job}`: {error}")),
    }
}

/// SLURM's name of this job, or of its element of an array.
fn job(lookup: impl Fn(&str) -> Option<String>) -> Option<String> {
    match (lookup("SLURM_ARRAY_JOB_ID"), lookup("SLURM_ARRAY_TASK_ID")) {
        (Some(array), Some(task)) => Some(format!("{array}_{task}")),
        _ => lookup("SLURM_JOB_ID"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn asked(line: &str, pairs: &'static [(&str, &str)]) -> Result<Option<Option<String>>, String> {
        let line = std::iter::once("launch").chain(line.split_whitespace()).map(OsString::from);
        let mut command = Command::parse(line).unwrap();
        let lookup = |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        wanted(&mut command, lookup).map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_command_that_continues_is_requeued_and_an_array_by_its_element() {
        let line = "--config a --name n --resume auto --requeue";
        assert_eq!(asked("--config a", &[("SLURM_JOB_ID", "7")]), Ok(None));
        assert_eq!(asked(line, &[("SLURM_JOB_ID", "7")]), Ok(Some(Some("7".into()))));
        let array = &[("SLURM_JOB_ID", "9"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "2")];
        assert_eq!(asked(line, array), Ok(Some(Some("7_2".into()))));
        assert_eq!(asked(line, &[]), Ok(Some(None)));
        assert!(asked("--config a --requeue", &[]).unwrap_err().contains("needs --name"));
        for itself in ["--requeue --exec p", "sweep --requeue --config a --name n --set seed=1,2"] {
            assert_eq!(asked(itself, &[("SLURM_JOB_ID", "7")]), Ok(Some(Some("7".into()))), "{itself}");
        }
    }

    #[test]
    fn a_program_is_requeued_after_a_schedulers_signal_whatever_its_exit_code() {
        let ended = |signal| Outcome { exit_code: 0, ..Outcome::stopped_by(signal, false, None) };
        assert!(is_stopped(&ended(Signal::TERM)) && is_stopped(&ended(Signal::USR1)));
        assert!(!is_stopped(&ended(Signal::INT)), "the user at the keyboard wants its end");
        assert!(!is_stopped(&Outcome { stopped_by: None, ..ended(Signal::TERM) }));
        assert!(!is_stopped(&Outcome { stopped_for: Some("memory".into()), ..ended(Signal::USR1) }));
    }
}
