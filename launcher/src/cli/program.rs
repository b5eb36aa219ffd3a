//! Options of `--exec`: what a user's own program gets besides its ranks.

use super::torchrun::{Streams, streams};
use clap::Args;
use spec::config::Budget;
use std::path::PathBuf;

/// With any of them the program has a run folder, records and a watch; without them it is started as it is.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct ProgramArgs {
    /// With --exec: a page cache of this size for the program's samples, such as 20GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub cache: Option<u64>,
    /// With --exec: memory that the program may use, such as 80% or 20GiB
    #[arg(long, value_name = "SIZE", value_parser = budget)]
    pub memory_budget: Option<Budget>,
    /// With --exec: folder for the run's folder, with logs and records [default: runs]
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// With --exec, as torchrun: streams of ranks that go to their logs alone: 1 output, 2 errors, 3 both, or RANK:N,…
    #[arg(long, value_name = "N", value_parser = streams)]
    pub redirects: Option<Streams>,
    /// With --exec, as torchrun: streams that are shown and kept in logs
    #[arg(long, value_name = "N", value_parser = streams)]
    pub tee: Option<Streams>,
    /// With --exec, as torchrun: show lines of these local ranks alone, such as 0,1
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    pub local_ranks_filter: Option<Vec<usize>>,
}

impl ProgramArgs {
    /// True if a line of a rank is to be shown. `errors`: standard error, else standard output.
    pub fn shows(&self, local_rank: usize, errors: bool) -> bool {
        let stream = if errors { 2 } else { 1 };
        let hidden = self.redirects.as_ref().is_some_and(|streams| streams.has(local_rank, stream));
        let teed = self.tee.as_ref().is_some_and(|streams| streams.has(local_rank, stream));
        let filtered = self.local_ranks_filter.as_ref().is_some_and(|ranks| !ranks.contains(&local_rank));
        (teed || !hidden) && !filtered
    }

    /// Says which of them was given.
    pub fn given(&self) -> Option<&'static str> {
        let Self { cache, memory_budget, log_dir, redirects, tee, local_ranks_filter: _ } = self;
        let given = [
            (cache.is_some(), "--cache"),
            (memory_budget.is_some(), "--memory-budget"),
            (log_dir.is_some(), "--log-dir"),
            (redirects.is_some(), "--redirects"),
            (tee.is_some(), "--tee"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, name)| name)
    }
}

fn budget(text: &str) -> Result<Budget, String> {
    text.parse()
}

fn size(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(Budget::Bytes(bytes)) => Ok(bytes),
        _ => Err("expected a size, such as 20GiB or 512MB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_shares_are_read_as_people_write_them() {
        assert_eq!((size("20GiB"), size("1000")), (Ok(20 << 30), Ok(1000)));
        assert!(size("40%").is_err() && size("x").is_err());
        assert_eq!(budget("40%"), Ok(Budget::Percent(40.0)));
        assert_eq!(ProgramArgs::default().given(), None);
        assert_eq!(ProgramArgs { cache: Some(1), ..ProgramArgs::default() }.given(), Some("--cache"));
    }
}
