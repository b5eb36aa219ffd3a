//! `launch --exec`: any program as every rank. Without further options it is started as it is; with a cache, a budget, a name or
//! a folder for logs it has a run of its own ([`super::program`]).

use super::early::Early;
use super::supervised::{console_of, supervise_program};
use super::{Error, explain, log_env, nodes, program};
use crate::cli::{ProgramArgs, RunArgs};
use crate::supervise::Spec;
use crate::watch::WatchSpec;
use std::ffi::OsString;
use std::time::Duration;

/// Time from asking a program under `--exec` to end to SIGKILL: less than the 30 s after which a pod is killed.
pub(super) const GRACE: Duration = Duration::from_secs(25);

pub(super) fn exec(
    run: &RunArgs,
    with: &ProgramArgs,
    program: OsString,
    args: Vec<OsString>,
    mut early: Early,
) -> Result<u8, Error> {
    let full = run.name.is_some() || with.given().is_some();
    if full {
        program::limited(run, with, &program, &args)?;
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let count = run.local_ranks().unwrap_or(1);
    let mut ranks = nodes::ranks(run, count, nodes::ranks_of_each(run, count)?, (cores / count).max(1))?;
    if is_alone(run) {
        ranks.iter_mut().for_each(|rank| rank.env.clear());
    }
    let spec = Spec {
        program: program.into(),
        args,
        forks: false,
        env: log_env(run).into_iter().collect(),
        ranks,
        log_dir: None,
        grace: GRACE,
        control: false,
        cache: None,
        watch: WatchSpec::silent(),
        limits: None,
    };
    if full {
        return program::run(run, with, spec, early);
    }
    let console = console_of(with, &spec)?;
    let outcome = supervise_program(run, &spec, console, early.hand_over())?;
    explain(&outcome);
    Ok(outcome.exit_code)
}

/// Nobody speaks of ranks: the program may start its own (torchrun, Lightning), and would take a place in the environment for that of
/// a launcher that did so already.
fn is_alone(run: &RunArgs) -> bool {
    let placed = run.master_addr.is_some() || run.master_port.is_some() || run.torchrun.standalone;
    run.local_ranks().is_none() && run.nnodes == 1 && !placed
}
