//! Frames whose files look right by their headers and cannot be decoded.
//!
//! A file can be decoded or it cannot, whoever tries and when; so each rank finds out for itself, and all act alike. With
//! `data.skip_bad` a training clip that has such a frame is replaced by another clip, drawn from (seed, epoch, clip) and, if
//! that one is of no use either, by the next in order that is: a batch stays full, and a pure function of its place and of
//! the files, whatever the threads, ranks, cache or resumes. Drawn, and not the neighbour, for the neighbours share the
//! frame: the first good one would stand for all of them. In validation and test nothing is replaced: such clips are
//! left out, so that no clip counts twice.

use super::clips::Clips;
use crate::data::loader::mix;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One that was found.
struct Found {
    path: PathBuf,
    problem: String,
    /// A line about it is among the news, or was.
    told: bool,
}

#[derive(Default)]
struct State {
    by_key: HashMap<u64, Found>,
    news: Vec<String>,
}

/// Findings of one rank so far, by entries' keys.
#[derive(Default)]
pub(super) struct Unreadable {
    /// Some were found: reading takes no lock before.
    some: AtomicBool,
    state: Mutex<State>,
}

impl Unreadable {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of an entry and what is wrong with it; `None`: nothing known.
    pub fn problem(&self, key: u64) -> Option<(PathBuf, String)> {
        if !self.some.load(Ordering::Acquire) {
            return None;
        }
        self.lock().by_key.get(&key).map(|found| (found.path.clone(), found.problem.clone()))
    }

    /// The first file in the order of entries and what is wrong with it.
    pub fn first(&self) -> Option<(PathBuf, String)> {
        let state = self.lock();
        let first = state.by_key.iter().min_by_key(|(key, _)| **key);
        first.map(|(_, found)| (found.path.clone(), found.problem.clone()))
    }

    /// One of these entries is known.
    pub fn any(&self, mut keys: impl Iterator<Item = u64>) -> bool {
        self.some.load(Ordering::Acquire) && {
            let state = self.lock();
            keys.any(|key| state.by_key.contains_key(&key))
        }
    }

    pub fn add(&self, key: u64, path: &Path, problem: &str) {
        let found = || Found { path: path.to_owned(), problem: problem.to_owned(), told: false };
        self.lock().by_key.entry(key).or_insert_with(found);
        self.some.store(true, Ordering::Release);
    }

    /// Records that a sample met it: `line` is kept once for each entry.
    pub fn tell(&self, key: u64, line: impl FnOnce() -> String) {
        let mut state = self.lock();
        let told = state.by_key.get_mut(&key).map(|found| std::mem::replace(&mut found.told, true));
        if told == Some(false) {
            state.news.push(line());
        }
    }

    /// Lines since the last call.
    pub fn take_news(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().news)
    }
}

/// Clips to try in place of `clip`, each of the others once.
pub(super) fn stand_ins(clips: &Clips, seed: u64, epoch: u64, clip: u64) -> impl Iterator<Item = u64> + use<> {
    let len = clips.len() as u64;
    let key = mix(mix(mix(seed ^ 0x5350_4152).wrapping_add(epoch)).wrapping_add(clip));
    let first = ((u128::from(mix(key)) * u128::from(len)) >> 64) as u64;
    (0..len).map(move |n| (first + n) % len).filter(move |other| *other != clip)
}
