//! Settings of an attempt to train, and smaller ones after a kill for memory.

use super::{Ready, measure};
use crate::console::Console;
use crate::supervise::{Outcome, Watcher};
use host::machine;
use spec::config::Config;
use spec::contract::{Machine, Measured};
use spec::plan::{self, Plan, Request};

/// Settings of an attempt: as asked for, or smaller after a kill for memory.
pub(super) struct Setup {
    pub(super) config: Config,
    pub(super) plan: Plan,
    /// Each change that made it smaller.
    pub(super) reduced: Vec<String>,
}

impl Setup {
    /// After an attempt that the kernel killed for memory: what needs less, and says so.
    pub(super) fn reduce(&mut self, ready: &Ready, last: Option<&Outcome>, console: &Console) {
        if !last.is_some_and(|last| last.killed_for_memory) {
            return;
        }
        let measured = match measure::measured(ready) {
            Ok(measured) => measured,
            Err(error) => return console.note(&format!("{error}: starting again as it was")),
        };
        match self.smaller(&machine::probe(), &measured, &ready.request) {
            Ok(smaller) => {
                console.note(&format!("with less memory: {}", smaller.changes.join(", ")));
                self.reduced.extend(smaller.changes);
                (self.config, self.plan) = (smaller.config, smaller.plan);
            }
            Err(why) => console.note(&format!("{why}: starting again as it was")),
        }
    }

    /// Plan that needs less memory.
    ///
    /// # Errors
    /// The reason why none can be made.
    fn smaller(&self, machine: &Machine, measured: &Measured, request: &Request) -> Result<plan::Smaller, String> {
        if request.nnodes > 1 {
            return Err("one of several nodes is not made smaller alone, since all have the same plan".into());
        }
        match plan::smaller(&self.config, machine, measured, request, &self.plan) {
            Ok(Some(smaller)) => Ok(smaller),
            Ok(None) => Err("nothing is left to make smaller".into()),
            Err(error) => Err(format!("no smaller plan fits now ({error})")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_nodes_is_not_made_smaller_alone() {
        let machine =
            Machine { cores: 8, memory_total_bytes: 16 << 30, memory_available_bytes: 15 << 30, ..Machine::default() };
        let config = spec::task::config("emg");
        let mut measured = Measured::default();
        (measured.data.useful_bytes, measured.data.auto_policy) = (1 << 20, spec::contract::CacheMode::Pin);
        let mut request = Request { ranks: Some(2), ..Request::default() };
        let plan = plan::plan(&config, &machine, &measured, &request).unwrap();
        let setup = Setup { config, plan, reduced: Vec::new() };
        assert!(!setup.smaller(&machine, &measured, &request).unwrap().changes.is_empty());
        request.nnodes = 2;
        let why = setup.smaller(&machine, &measured, &request).unwrap_err();
        assert!(why.starts_with("one of several nodes is not made smaller alone"), "{why}");
    }
}
