//! TensorBoard's event file of a run that trains, written by the launcher from the run's records.

use super::super::print;
use crate::console::Console;
use crate::run_dir::RunDir;
use crate::supervise::{Outcome, Stream, Watcher};
use crate::track::{Before, Follower, Params, SessionEnd, params};
use spec::config::Config;
use spec::contract::Progress;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time between two looks into the records.
const EVERY: Duration = Duration::from_secs(2);

/// Facts on a run whose event file is wanted; `None`: `log.tensorboard` is off.
pub(in crate::command) struct Tracked(Option<(PathBuf, Params, Option<Before>)>);

impl Tracked {
    /// Call it before the ranks start: what is recorded by then is in earlier event files.
    pub(in crate::command) fn of(config: &Config, folder: &RunDir) -> Self {
        let wanted = config.log.tensorboard && folder.writes_for_all();
        let flat = || params(&serde_json::to_value(config).unwrap_or_default());
        let before = || folder.resumed_step().map(|step| Before::of(&folder.path, step));
        Self(wanted.then(|| (folder.path.clone(), flat(), before())))
    }
}

/// The console of a job, and beside it the event file.
pub(in crate::command) struct Live<'a> {
    console: &'a Console,
    follower: Mutex<Option<Following<'a>>>,
}

struct Following<'a> {
    tracked: &'a (PathBuf, Params, Option<Before>),
    /// Made at the first look, when the ranks run already.
    follower: Option<Follower>,
    due: Instant,
}

impl Following<'_> {
    fn look(&mut self) -> std::io::Result<()> {
        let (folder, params, before) = self.tracked;
        let follower = match &mut self.follower {
            Some(follower) => follower,
            empty => empty.insert(Follower::start(folder, folder, params.clone(), before.as_ref())?),
        };
        let more = follower.advance()?;
        self.due = Instant::now() + if more { Duration::from_millis(100) } else { EVERY };
        Ok(())
    }
}

impl<'a> Live<'a> {
    pub(in crate::command) fn start(tracked: &'a Tracked, console: &'a Console) -> Self {
        let due = Instant::now() + Duration::from_millis(200);
        let following = tracked.0.as_ref().map(|tracked| Following { tracked, follower: None, due });
        Self { console, follower: Mutex::new(following) }
    }

    fn following(&self) -> MutexGuard<'_, Option<Following<'a>>> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is new, if it is time. After a failure there is one line and no more event file: the records stay.
    fn look(&self) {
        let mut following = self.following();
        let Some(due) = following.as_ref().map(|following| following.due) else { return };
        if Instant::now() < due {
            return;
        }
        if let Some(Err(error)) = following.as_mut().map(Following::look) {
            *following = None;
            self.console.note(&format!("warning: {}", failed(&error)));
        }
    }

    /// Writes the rest, once the ranks have ended.
    pub(in crate::command) fn finish(self, outcome: Option<&Outcome>) {
        let Some(mut following) = self.following().take() else { return };
        let end = match outcome {
            Some(outcome) if outcome.first_failure.is_none() => SessionEnd::Success,
            _ => SessionEnd::Failure,
        };
        let done = following.look().map(|()| following.follower.take());
        if let Err(error) = done.and_then(|follower| follower.map(|follower| follower.finish(end)).transpose()) {
            print::note(format_args!("warning: {}", failed(&error)));
        }
    }
}

fn failed(error: &std::io::Error) -> String {
    format!(
        "no more event file for TensorBoard: {error}; `launch export-metrics RUN --to tensorboard` writes it from the records"
    )
}

impl Watcher for Live<'_> {
    fn line(&self, rank: u32, stream: Stream, text: &str) {
        self.console.line(rank, stream, text);
    }

    fn note(&self, text: &str) {
        self.console.note(text);
    }

    fn progress(&self, progress: &Progress) {
        self.console.progress(progress);
        self.look();
    }

    fn memory(&self, node_bytes: u64) {
        self.console.memory(node_bytes);
        self.look();
    }

    fn ready(&self) -> bool {
        self.console.ready()
    }

    fn pause(&self) {
        self.console.pause();
    }
}
