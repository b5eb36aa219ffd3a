//! Wiring of one rank and its exit code: environment and job in, rooms connected, errors to codes out.

mod batch;
mod error;
mod observer;
mod train;

pub use error::RankError;

use crate::task::SampleRequest;
use clap::{Parser, Subcommand};
use launcher::contract::{Job, VERSION, env};
use std::path::{Path, PathBuf};

/// One rank of a Headroom job. Without a verb it trains what the launcher's environment names.
#[derive(Parser)]
#[command(name = "rank", version)]
struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Write sample data in a task's true format.
    SampleData(SampleRequest),
    /// Write the tensors of one rank at one step to a safetensors file.
    Batch(batch::Request),
}

/// Runs the command line of the `rank` program; returns its exit code.
pub fn main() -> u8 {
    let args = Args::parse();
    let result = match args.verb {
        None => return train::main(),
        Some(Verb::SampleData(request)) => sample_data(&request),
        Some(Verb::Batch(request)) => batch::write(&request),
    };
    match result {
        Ok(()) => launcher::contract::exit::OK,
        Err(error) => {
            eprintln!("rank: error: {error}");
            error.exit_code()
        }
    }
}

fn sample_data(request: &SampleRequest) -> Result<(), RankError> {
    Ok(crate::task::find(&request.task).map_err(RankError::Usage)?.sample_data(request)?)
}

/// Reads the job that the launcher wrote.
fn read_job(path: Option<PathBuf>) -> Result<Job, RankError> {
    let path = path
        .or_else(|| std::env::var_os(env::JOB).map(PathBuf::from))
        .ok_or_else(|| RankError::Usage(format!("{} is not set: start ranks with `launch --config …`", env::JOB)))?;
    let refused =
        |problem: String| RankError::Usage(format!("{}: {problem}; start the run again with launch", show(&path)));
    let text = std::fs::read_to_string(&path).map_err(|e| refused(e.to_string()))?;
    let job: Job = serde_json::from_str(&text).map_err(|e| refused(e.to_string()))?;
    if job.version != VERSION {
        return Err(refused(format!("written by a launcher of contract {}, this rank speaks {VERSION}", job.version)));
    }
    Ok(job)
}

fn show(path: &Path) -> String {
    path.display().to_string()
}
