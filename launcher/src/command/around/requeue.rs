//! `--requeue`: a job that a scheduler's signal stopped is started again by SLURM itself, as other trainers do it.

use super::super::{Error, print};
use crate::cli::{CliError, Command};
use crate::run_dir::Resume;
use spec::contract::exit;

/// The job to be started again; `None`: nothing is.
pub(in crate::command) struct Requeue(Option<Option<String>>);

impl Requeue {
    /// # Errors
    /// The command line would not continue what it began.
    pub(in crate::command) fn of(command: &mut Command) -> Result<Self, Error> {
        Self::with(command, |name| std::env::var(name).ok())
    }

    fn with(command: &mut Command, lookup: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let exec = matches!(command, Command::Exec { .. });
        let Some(run) = command.run_args().filter(|run| run.requeue) else { return Ok(Self(None)) };
        if !exec && (run.name.is_none() || run.resume() != Resume::Auto) {
            let text = "--requeue needs --name and --resume auto: the job that starts again runs the same command";
            return Err(CliError::Usage(text.into()).into());
        }
        // All nodes are one job, which node 0 speaks for.
        Ok(Self((run.node_rank == 0).then(|| job(lookup))))
    }

    /// Asks SLURM to start the job again, if it was stopped on request. The exit code stays.
    pub(in crate::command) fn after(self, code: u8) -> u8 {
        let Self(Some(job)) = self else { return code };
        if !matches!(code, exit::STOPPED | exit::UNSTARTED) {
            return code;
        }
        let Some(job) = job else {
            print::note("not requeued: SLURM_JOB_ID is not set; start the same command again to continue");
            return code;
        };
        match std::process::Command::new("scontrol").args(["requeue", &job]).output() {
            Ok(output) if output.status.success() => print::note(format_args!("job {job} is requeued")),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                print::note(format_args!("warning: `scontrol requeue {job}` failed: {}", said.trim()));
            }
            Err(error) => print::note(format_args!("warning: cannot start `scontrol requeue {job}`: {error}")),
        }
        code
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
        Requeue::with(&mut command, lookup).map(|requeue| requeue.0).map_err(|error| error.to_string())
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
        assert_eq!(asked("--requeue --exec p", &[("SLURM_JOB_ID", "7")]), Ok(Some(Some("7".into()))));
    }
}
