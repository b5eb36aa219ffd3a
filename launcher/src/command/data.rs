//! Verbs that the rank program does: sample data, labels in another format, and the tensors of one step.

use super::early::Undo;
use super::interpreter::Started;
use super::{Error, io, prepare, rank_command, rank_program};
use crate::cli::BatchArgs;
use crate::run_dir::RunDir;
use spec::config::DeviceChoice;
use spec::contract::exit;
use spec::plan::Request;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;

/// Becomes the rank program, which does the work.
pub(super) fn by_rank(words: &[OsString]) -> Result<u8, Error> {
    let error = rank_command(words)?.exec();
    Err(io("cannot start rank", exit::INTERNAL)(error))
}

pub(super) fn batch(args: &BatchArgs) -> Result<u8, Error> {
    let request = Request { ranks: Some(args.world), device: DeviceChoice::Cpu, ..Request::default() };
    let ready = prepare(&args.config, request, &Undo::default())?;
    ready.sample_if_missing()?;
    let plan = ready.plan()?;
    // Beside the runs, where the facts about unchanged files are kept; gone when the batch is written.
    let runs_dir = std::path::absolute(&ready.config.log.runs_dir).map_err(io("log.runs_dir", exit::USAGE))?;
    let folder = RunDir::scratch(&runs_dir)?;
    let written = folder.write(&ready.config, &plan).map_err(Error::from).and_then(|(_, job)| {
        let mut command = Started::of(&ready.config, &rank_program()?)?.command("batch");
        command.arg("--job").arg(job).args(["--step", &args.step.to_string(), "--rank", &args.rank.to_string()]);
        command.args(["--world", &args.world.to_string(), "--out"]).arg(&args.out);
        command.status().map_err(io("cannot start rank", exit::INTERNAL))
    });
    folder.remove();
    let status = written?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::INTERNAL))
}
