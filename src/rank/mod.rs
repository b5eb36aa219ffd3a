//! Wiring of one rank and its exit code: environment and job in, rooms connected, errors to codes out.

mod batch;
mod describe;
mod device;
mod drawn;
mod error;
mod infer;
mod log;
mod meet;
mod node_cache;
mod numa;
mod observer;
mod registrar;
mod start;
mod stop;
mod train;

pub use error::RankError;

use crate::data::source::hdf5::probe;
use crate::report::memory::MemorySnapshot;
use crate::task::{ConvertRequest, SampleRequest};
use crate::torch::is_out_of_memory;
use clap::{Parser, Subcommand};
use spec::contract::{VERSION, env};
use spec::job::Job;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

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
    /// Write a data set anew in a task's usual format.
    Convert(ConvertRequest),
    /// Open files on behalf of a rank that scans them.
    #[command(name = probe::VERB, hide = true)]
    OpenAhead,
    /// Write the tensors of one rank at one step to a safetensors file.
    Batch(batch::Request),
    /// Measure the model and the data of a config for a plan; reads its job from standard input, answers in JSON.
    #[command(hide = true)]
    Describe,
}

/// Runs the command line of the `rank` program; returns its exit code.
pub fn main() -> u8 {
    let inherited = host::inherited::set_defaults();
    let args = Args::parse();
    if let Ok(program) = std::env::current_exe() {
        probe::open_ahead_by(program);
    }
    run(args, inherited)
}

/// The same within another program, which gives the words of the command line: `task python` runs in the user's interpreter.
pub fn embedded(words: Vec<OsString>) -> u8 {
    let own = MemorySnapshot::take().map_or(0, |now| now.anon_bytes);
    INTERPRETER_BYTES.store(own, Ordering::Relaxed);
    let inherited = host::inherited::set_defaults();
    match Args::try_parse_from(std::iter::once(OsString::from("rank")).chain(words)) {
        Ok(args) => run(args, inherited),
        Err(error) => {
            eprintln!("{error}");
            spec::contract::exit::USAGE
        }
    }
}

/// Own memory of the user's interpreter before it was a rank; 0: there is none.
static INTERPRETER_BYTES: AtomicU64 = AtomicU64::new(0);

fn run(args: Args, inherited: Vec<String>) -> u8 {
    std::panic::set_hook(Box::new(keep_panic));
    if let Err(error) = log::install() {
        eprintln!("rank: error: {error}");
        return error.exit_code();
    }
    let Some(verb) = args.verb else {
        return train::main(inherited);
    };
    if let Err(error) = stop::end_as_first_process() {
        eprintln!("rank: {error}");
    }
    let result = std::panic::catch_unwind(|| match &verb {
        Verb::SampleData(request) => sample_data(request),
        Verb::Convert(request) => convert(request),
        Verb::Batch(request) => batch::write(request),
        Verb::OpenAhead => probe::serve().map_err(|e| RankError::system("opening files ahead", e)),
        Verb::Describe => describe::run(),
    });
    let result = result.unwrap_or_else(|_| Err(RankError::Panic(panic_text())));
    match result {
        Ok(()) => spec::contract::exit::OK,
        Err(error) => {
            eprintln!("rank: error: {error}");
            error.exit_code()
        }
    }
}

/// Text and place of this process's first panic that nobody expects; a bug, or a library that has no error values.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps a panic's words for the one error that the rank ends with. The stack is printed where RUST_BACKTRACE asks.
fn keep_panic(info: &std::panic::PanicHookInfo) {
    let payload = info.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    let place = info.location().map(|at| format!(" ({at})")).unwrap_or_default();
    let text = format!("{}{place}", text.unwrap_or("panic").lines().next().unwrap_or_default());
    let stack = std::backtrace::Backtrace::capture();
    if stack.status() == std::backtrace::BacktraceStatus::Captured {
        eprintln!("{text}\n{stack}");
    }
    let mut first = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
    // Training continues after memory ran out: if another panic follows, that one ends the rank.
    if first.as_deref().is_none_or(is_out_of_memory) {
        *first = Some(text);
    }
}

fn panic_text() -> String {
    PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_else(|| "a panic".into())
}

fn sample_data(request: &SampleRequest) -> Result<(), RankError> {
    Ok(crate::task::find(&request.task).map_err(RankError::Usage)?.sample_data(request)?)
}

fn convert(request: &ConvertRequest) -> Result<(), RankError> {
    let lines = crate::task::find(&request.task).map_err(RankError::Usage)?.convert(request)?;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Reads the job that the launcher wrote.
fn read_job(path: Option<PathBuf>) -> Result<Job, RankError> {
    let path = path
        .or_else(|| std::env::var_os(env::JOB).map(PathBuf::from))
        .ok_or_else(|| RankError::Usage(format!("{} is not set: start ranks with `launch --config …`", env::JOB)))?;
    let refused = |problem: String| RankError::Job { path: path.clone(), problem };
    let text = std::fs::read_to_string(&path).map_err(|e| refused(e.to_string()))?;
    let job: Job = serde_json::from_str(&text).map_err(|e| refused(e.to_string()))?;
    if job.version != VERSION {
        return Err(refused(format!("written by a launcher of contract {}, this rank speaks {VERSION}", job.version)));
    }
    job.config.check_sections(spec::task::all()).map_err(refused)?;
    Ok(job)
}
