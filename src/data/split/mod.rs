//! Which files each split has, and what a resumed run makes of files that changed since.
//!
//! ```text
//! files on disk ─► Unit (name, fingerprints, the fresh split) ─┐
//! checkpoint ─► SplitList (names, fingerprints, the old split) ─┴─► resolve ─► the split to use, lines, the next SplitList
//! ```
//!
//! Architecture invariant: a file that a checkpoint holds out is never trained on unless the user asks for a new split. Files
//! are recognised by content first, then by name.

use super::DataError;
use serde::{Deserialize, Serialize};
use spec::contract::files::SplitChoice;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Splits in the order of every array of three here.
const SPLITS: [&str; 3] = ["train", "val", "test"];
/// Names that a line shows.
const NAMED: usize = 3;

/// Fingerprint of a file, see [`super::source::Identity::print`]; sixteen hexadecimal digits in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Print(pub u64);

impl From<Print> for String {
    fn from(print: Print) -> Self {
        format!("{:016x}", print.0)
    }
}

impl TryFrom<String> for Print {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u64::from_str_radix(&text, 16).map(Print)
    }
}

/// A file, or a sequence of frames: what a split has as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Relative to the data set's folder.
    pub name: String,
    /// Fingerprint of the file; for a sequence, of each sharp frame.
    pub prints: Vec<Print>,
    /// Training, validation and test use it.
    pub splits: [bool; 3],
    /// How its samples are divided, where all splits use some of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowSplit>,
}

/// A split of the samples of a file: each is drawn from `key`, `seed` and its row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowSplit {
    /// Fingerprint of the file when it was first split.
    pub key: u64,
    pub seed: u64,
    /// Of all 64-bit draws those below are for training, and those from there to `val_below` for validation.
    pub train_below: u64,
    pub val_below: u64,
}

/// Units of all splits in the order of their samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitList {
    pub units: Vec<Unit>,
}

/// The split of a checkpoint that a run resumes from.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptSplit {
    pub list: SplitList,
    /// `--resume-split`.
    pub choice: Option<SplitChoice>,
    /// The checkpoint, for messages.
    pub checkpoint: PathBuf,
}

/// The split to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Units in use, as indices of those that were given, in the order of their samples.
    pub order: Vec<usize>,
    /// Places in `order` that each split uses, ascending.
    pub splits: [Vec<usize>; 3],
    /// List that the next checkpoint keeps.
    pub list: SplitList,
    /// Lines for the user.
    pub lines: Vec<String>,
}

impl Unit {
    fn is_trained(&self) -> bool {
        self.splits[0]
    }

    fn is_held_out(&self) -> bool {
        self.splits[1] || self.splits[2]
    }

    /// Half of the smaller one's prints or more are the other's as well, or neither has any.
    fn is_like(&self, other: &Unit) -> bool {
        let (small, large) = if self.prints.len() <= other.prints.len() { (self, other) } else { (other, self) };
        let known: HashSet<Print> = large.prints.iter().copied().collect();
        let shared = small.prints.iter().filter(|print| known.contains(print)).count();
        (shared > 0 || large.prints.is_empty()) && 2 * shared >= small.prints.len()
    }

    /// Its splits, for messages: `val and test`.
    fn of(&self) -> String {
        let names: Vec<&str> =
            SPLITS.iter().zip(self.splits).filter(|(_, uses)| *uses).map(|(name, _)| *name).collect();
        names.join(" and ")
    }
}

/// The split of `now`, the units that are there: as given in a new run, the checkpoint's in a resumed one.
///
/// # Errors
/// A changed file makes the checkpoint's split doubtful, or leaves a part of it without files: names the files and
/// `--resume-split`.
pub fn resolve(now: &[Unit], kept: Option<&KeptSplit>) -> Result<Resolved, DataError> {
    match kept {
        None => Ok(fresh(now)),
        Some(KeptSplit { list, choice: Some(SplitChoice::New), .. }) => {
            let mut resolved = fresh(now);
            resolved.lines.extend(newly_trained(list, now));
            Ok(resolved)
        }
        Some(kept) => keep(now, kept),
    }
}

fn fresh(now: &[Unit]) -> Resolved {
    let order: Vec<usize> = (0..now.len()).collect();
    Resolved { splits: places(now.iter()), order, list: SplitList { units: now.to_vec() }, lines: Vec::new() }
}

fn places<'a>(units: impl Iterator<Item = &'a Unit>) -> [Vec<usize>; 3] {
    let mut splits: [Vec<usize>; 3] = Default::default();
    for (place, unit) in units.enumerate() {
        for (split, uses) in splits.iter_mut().zip(unit.splits) {
            split.extend(uses.then_some(place));
        }
    }
    splits
}

/// Fate of the units of a checkpoint.
struct Match {
    /// For each of them the unit that it is now, if any.
    now: Vec<Option<usize>>,
    /// Those that are recognised by name alone, as their content is another.
    replaced: Vec<usize>,
    /// Units of now that the checkpoint does not know.
    added: Vec<usize>,
}

/// Recognises units: same name and content, then the same content under another name, then the same name.
fn recognise(saved: &[Unit], now: &[Unit]) -> Match {
    let names: HashMap<&str, usize> = saved.iter().enumerate().map(|(n, unit)| (unit.name.as_str(), n)).collect();
    let mut with_print: HashMap<Print, Vec<usize>> = HashMap::new();
    for (n, unit) in saved.iter().enumerate() {
        unit.prints.iter().for_each(|print| with_print.entry(*print).or_default().push(n));
    }
    let mut found = Match { now: vec![None; saved.len()], replaced: Vec::new(), added: Vec::new() };
    let mut left: Vec<usize> = (0..now.len()).collect();
    let by_name = |unit: &Unit| names.get(unit.name.as_str()).copied();
    left.retain(|n| match by_name(&now[*n]).filter(|old| saved[*old].is_like(&now[*n])) {
        Some(old) => found.now[old].replace(*n).is_some(),
        None => true,
    });
    left.retain(|n| {
        let mut shared: BTreeMap<usize, usize> = BTreeMap::new();
        for old in now[*n].prints.iter().filter_map(|print| with_print.get(print)).flatten() {
            if found.now[*old].is_none() {
                *shared.entry(*old).or_default() += 1;
            }
        }
        let most = shared.into_iter().max_by_key(|(old, count)| (*count, std::cmp::Reverse(*old)));
        match most.map(|(old, _)| old).filter(|old| saved[*old].is_like(&now[*n])) {
            Some(old) => found.now[old].replace(*n).is_some(),
            None => true,
        }
    });
    left.retain(|n| match by_name(&now[*n]).filter(|old| found.now[*old].is_none()) {
        Some(old) => {
            found.replaced.push(old);
            found.now[old].replace(*n).is_some()
        }
        None => true,
    });
    found.added = left;
    found
}

/// The checkpoint's split over the units that are there now. Units that it does not know are in no split.
fn keep(now: &[Unit], kept: &KeptSplit) -> Result<Resolved, DataError> {
    let saved = &kept.list.units;
    let found = recognise(saved, now);
    let lost: Vec<usize> = (0..saved.len()).filter(|old| found.now[*old].is_none()).collect();
    let refused = |problem: String| {
        let path = kept.checkpoint.display();
        let problem = format!("{path}: the data set's files changed since this checkpoint was saved: {problem}");
        DataError::setting("--resume-split", problem)
    };
    if kept.choice.is_none()
        && let Some(doubt) = doubtful(saved, &found.replaced, &lost)
    {
        return Err(refused(format!(
            "{doubt}, so a file that was held out may now be trained on under another name: --resume-split keep keeps the \
             split by names, --resume-split new splits the files anew"
        )));
    }
    if kept.choice.is_none()
        && let Some(unit) = found.replaced.iter().map(|old| &saved[*old]).find(|unit| unit.rows.is_some())
    {
        return Err(refused(format!(
            "{} has other content, so a sample that was held out may now be trained on in another row: --resume-split keep keeps \
             the split by rows, --resume-split new splits the samples anew",
            unit.name
        )));
    }
    for (split, name) in SPLITS.iter().enumerate() {
        let mut uses = (0..saved.len()).filter(|old| saved[*old].splits[split]).peekable();
        if uses.peek().is_some() && uses.all(|old| found.now[old].is_none()) {
            return Err(refused(format!(
                "none of the files of {name} is there: bring them back, or split the files anew with --resume-split new"
            )));
        }
    }
    let mut list = kept.list.clone();
    let mut order = Vec::with_capacity(saved.len());
    for (unit, n) in list.units.iter_mut().zip(&found.now) {
        if let Some(n) = *n {
            (unit.name, unit.prints) = (now[n].name.clone(), now[n].prints.clone());
            order.push(n);
        }
    }
    let present = list.units.iter().zip(&found.now).filter(|(_, n)| n.is_some()).map(|(unit, _)| unit);
    let splits = places(present);
    Ok(Resolved { lines: lines_of(now, saved, &found, &lost), order, splits, list })
}

/// Files that make the side of a content uncertain: files of both sides whose content is gone or new.
fn doubtful(saved: &[Unit], replaced: &[usize], lost: &[usize]) -> Option<String> {
    let gone = || replaced.iter().chain(lost);
    let opposite = |a: &Unit, b: &Unit| {
        (a.is_trained() && !a.is_held_out() && b.is_held_out())
            || (a.is_held_out() && !a.is_trained() && b.is_trained())
    };
    let pair = replaced.iter().find_map(|new| {
        gone().find(|old| *old != new && opposite(&saved[*new], &saved[**old])).map(|old| (*new, *old))
    });
    let (new, old) = pair?;
    let what = if lost.contains(&old) { "is gone" } else { "has other content too" };
    let (new, old) = (&saved[new], &saved[old]);
    Some(format!("{} ({}) has other content and {} ({}) {what}", new.name, new.of(), old.name, old.of()))
}

fn lines_of(now: &[Unit], saved: &[Unit], found: &Match, lost: &[usize]) -> Vec<String> {
    let pairs = || saved.iter().zip(&found.now).filter_map(|(unit, n)| n.map(|n| (unit, &now[n])));
    let renamed = pairs().filter(|(old, new)| old.name != new.name);
    let renamed: Vec<String> = renamed.map(|(old, new)| format!("{} is {} now", old.name, new.name)).collect();
    let named = |old: &usize| format!("{} ({})", saved[*old].name, saved[*old].of());
    let lost: Vec<String> = lost.iter().map(named).collect();
    let replaced: Vec<String> = found.replaced.iter().map(named).collect();
    let added: Vec<String> = found.added.iter().map(|n| now[*n].name.clone()).collect();
    let moved = pairs().filter(|(old, new)| old.splits != new.splits).count();
    let mut lines = Vec::new();
    let mut tell = |names: &[String], what: &str, fate: &str| {
        if !names.is_empty() {
            let s = if names.len() == 1 { " is" } else { "s are" };
            lines.push(format!("resumed split: {} file{s} {what}: {}{fate}", names.len(), some_of(names)));
        }
    };
    tell(&renamed, "renamed", "");
    tell(&replaced, "known by name alone, with other content than before", "");
    tell(&lost, "missing", "; the others keep their split");
    tell(&added, "new and in no split", "; --resume-split new splits all files anew");
    if moved > 0 {
        lines.push(format!(
            "resumed split: {moved} of {} files would be in another split by now; the checkpoint's split is kept \
             (--resume-split new makes a new one)",
            now.len()
        ));
    }
    lines
}

fn some_of(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names[..names.len().min(NAMED)].join(", "))
}

/// A warning on units that the checkpoint held out and a new split trains on.
fn newly_trained(list: &SplitList, now: &[Unit]) -> Option<String> {
    let found = recognise(&list.units, now);
    let pairs = list.units.iter().zip(&found.now).filter_map(|(old, n)| n.map(|n| (old, &now[n])));
    let leaked = pairs.filter(|(old, new)| old.is_held_out() && !old.is_trained() && new.is_trained());
    let names: Vec<String> = leaked.map(|(old, new)| format!("{} (was {})", new.name, old.of())).collect();
    (!names.is_empty()).then(|| {
        let (count, s) = (names.len(), if names.len() == 1 { "" } else { "s" });
        format!(
            "warning: --resume-split new: {count} file{s} that the checkpoint held out will be trained on: {}",
            some_of(&names)
        )
    })
}

/// A warning on units with equal content that are not in the same splits; `None`: there are none.
pub fn equal_content(units: &[Unit]) -> Option<String> {
    let mut first: HashMap<Print, usize> = HashMap::new();
    let mut pairs: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for (n, unit) in units.iter().enumerate() {
        for print in &unit.prints {
            let other = *first.entry(*print).or_insert(n);
            if units[other].splits != unit.splits {
                *pairs.entry((other, n)).or_default() += 1;
            }
        }
    }
    let ((a, b), count) = pairs.iter().next()?;
    let frames = if units[*b].prints.len() > 1 { format!(" ({count} frames)") } else { String::new() };
    let (a, b) = (&units[*a], &units[*b]);
    let more = if pairs.len() > 1 { format!("; {} more such pairs", pairs.len() - 1) } else { String::new() };
    Some(format!(
        "warning: {} ({}) and {} ({}) look the same{frames}, by size and bytes at the beginning, middle and end: metrics of \
         one split then measure what another has; remove one of them{more}",
        a.name,
        a.of(),
        b.name,
        b.of()
    ))
}

/// Name of `path` relative to the data set's folder; its file name where it is the data set itself.
pub fn relative_name(root: &Path, path: &Path) -> String {
    let inside = path.strip_prefix(root).ok().filter(|inside| !inside.as_os_str().is_empty());
    inside.unwrap_or_else(|| path.file_name().map_or(path, Path::new)).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
