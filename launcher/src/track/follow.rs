//! Event files that grow with a run's records.

use super::events::{self, EventFile, SessionEnd};
use super::facts::{hostname, of_memory, of_metrics, of_node};
use super::tail::Tail;
use super::{Param, Params, Source};
use spec::contract::{MemoryRecord, MetricsRecord, NodeRecord, Summary};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Records that a run had before it was resumed. They are in earlier event files.
#[derive(Debug, Clone)]
pub struct Before {
    /// The step that the run continues from.
    step: u64,
    /// Bytes of `memory.node.jsonl`, and of each rank's memory records.
    node: u64,
    ranks: Vec<u64>,
}

impl Before {
    /// Looks at the records; call it before the watch and the ranks append to them.
    pub fn of(folder: &Path, step: u64) -> Self {
        let length = |path: PathBuf| path.metadata().ok().map(|meta| meta.len());
        let ranks = (0..).map_while(|rank| length(memory_of(folder, rank))).collect();
        Self { step, node: length(folder.join(NODE)).unwrap_or(0), ranks }
    }
}

const NODE: &str = "memory.node.jsonl";

fn memory_of(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("memory.rank{rank}.jsonl"))
}

/// Follows the records of one run.
pub struct Follower {
    folder: PathBuf,
    file: EventFile,
    params: Params,
    metrics: Tail,
    /// The step that the run was resumed from; what is before it is in an earlier file.
    base: u64,
    last_step: Option<u64>,
    node: Tail,
    memory: Vec<Tail>,
    images: BTreeSet<u64>,
}

impl Follower {
    /// Makes an event file in `out` and writes what is known at the start. `before`: of a run that is resumed; `None`: all records are
    /// written, from the first.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn start(folder: &Path, out: &Path, params: Params, before: Option<&Before>) -> io::Result<Self> {
        let file = EventFile::create(out, &hostname())?;
        let ranks = before.map_or(&[][..], |before| &before.ranks);
        let mut follower = Self {
            metrics: Tail::new(&folder.join("metrics.jsonl")),
            node: Tail::behind(&folder.join(NODE), before.map_or(0, |before| before.node)),
            // Ranks that had no records begin with their first.
            memory: (0..).zip(ranks).map(|(rank, at)| Tail::behind(&memory_of(folder, rank), *at)).collect(),
            images: BTreeSet::new(),
            base: before.map_or(0, |before| before.step),
            last_step: None,
            folder: folder.to_owned(),
            file,
            params,
        };
        if before.is_some() {
            follower.images = follower.pictures().into_keys().filter(|step| *step <= follower.base).collect();
        }
        follower.begin()?;
        Ok(follower)
    }

    fn begin(&mut self) -> io::Result<()> {
        let t = now();
        let name = super::facts::name(&self.folder);
        let mut records = vec![events::hparams(t, &name, &self.params)];
        if let Ok(config) = std::fs::read_to_string(self.folder.join("config.yaml")) {
            let indented: String = config.lines().map(|line| format!("    {line}\n")).collect();
            records.push(events::text(t, "config", &indented));
        }
        if self.base > 0 {
            records.push(events::again(t, self.base + 1));
        }
        self.file.write(&records)
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Writes what has been recorded since. True: there is more.
    ///
    /// # Errors
    /// Records cannot be read, or the event file cannot be written.
    pub fn advance(&mut self) -> io::Result<bool> {
        let mut records = Vec::new();
        let mut more = self.take_metrics(&mut records)?;
        let piece = self.node.next::<NodeRecord>()?;
        more |= piece.more;
        records.extend(piece.records.iter().map(|record| scalars(record.t, record.step, &of_node(record))));
        self.find_ranks();
        for (rank, tail) in self.memory.iter_mut().enumerate() {
            let piece = tail.next::<MemoryRecord>()?;
            more |= piece.more;
            let lines = piece.records.iter().map(|record| scalars(record.t, record.step, &of_memory(rank, record)));
            records.extend(lines);
        }
        self.take_images(&mut records);
        if !records.is_empty() {
            self.file.write(&records)?;
        }
        Ok(more)
    }

    fn take_metrics(&mut self, into: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        let piece = self.metrics.next::<MetricsRecord>()?;
        if piece.again {
            self.last_step = None;
            into.push(events::again(now(), self.base + 1));
        }
        for record in piece.records.iter().filter(|record| record.step > self.base) {
            // A restart repeats steps: what was written of them is no longer valid.
            if self.last_step.is_some_and(|last| record.step <= last) {
                into.push(events::again(record.t, record.step));
            }
            self.last_step = Some(record.step);
            into.push(scalars(record.t, record.step, &of_metrics(record)));
        }
        Ok(piece.more)
    }

    fn find_ranks(&mut self) {
        for rank in self.memory.len().. {
            let path = memory_of(&self.folder, rank);
            if !path.is_file() {
                break;
            }
            self.memory.push(Tail::new(&path));
        }
    }

    fn pictures(&self) -> BTreeMap<u64, PathBuf> {
        let entries = self.folder.join("images").read_dir().into_iter().flatten().flatten();
        let step = |path: &Path| path.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok();
        let pngs = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "png"));
        pngs.filter_map(|path| Some((step(&path)?, path))).collect()
    }

    fn take_images(&mut self, into: &mut Vec<Vec<u8>>) {
        for (step, path) in self.pictures() {
            if self.images.contains(&step) {
                continue;
            }
            // One that is not whole yet is looked at again.
            let record = std::fs::read(&path).ok().and_then(|png| events::image(now(), step, "samples", &png));
            if let Some(record) = record {
                self.images.insert(step);
                into.push(record);
            }
        }
    }

    /// Writes all that is left, the final metrics and the end of the session.
    ///
    /// # Errors
    /// As [`Follower::advance`].
    pub fn finish(mut self, end: SessionEnd) -> io::Result<PathBuf> {
        while self.advance()? {}
        let summary: Option<Summary> = crate::advise::json(&self.folder.join("summary.json"));
        let t = now();
        let mut records = Vec::new();
        if let Some(summary) = summary {
            let last = final_scalars(&summary);
            let tags: Vec<String> = last.iter().map(|(name, _)| name.clone()).collect();
            records.push(events::experiment(t, &self.params, &tags));
            records.push(scalars(t, summary.steps, &last));
        }
        records.push(events::session_end(t, end));
        self.file.write(&records)?;
        Ok(self.file.path().to_owned())
    }
}

/// Last values of a run, as its table of hyper-parameters shows them.
fn final_scalars(summary: &Summary) -> Vec<(String, f64)> {
    let mut last: Vec<(String, f64)> =
        summary.metrics.iter().map(|(name, value)| (format!("final/{name}"), *value)).collect();
    last.extend(summary.best.as_ref().map(|best| (format!("final/best {}", best.metric), best.value)));
    last.push(("final/samples_per_s".into(), summary.samples_per_s));
    last.push(("final/peak_memory_gib".into(), summary.peak_node_bytes as f64 / (1u64 << 30) as f64));
    last
}

fn scalars(t: f64, step: u64, values: &[(String, f64)]) -> Vec<u8> {
    events::scalars(t, step, values.iter().map(|(name, value)| (name.as_str(), *value)))
}

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Writes the whole run at once.
pub(super) fn export(source: &Source, out: &Path) -> io::Result<PathBuf> {
    use spec::contract::RunStatus;
    std::fs::create_dir_all(out)?;
    let follower = Follower::start(&source.folder, out, source.params.clone(), None)?;
    let status = source.run.summary.as_ref().map(|summary| summary.status);
    follower.finish(match status {
        _ if source.run.open_ended => SessionEnd::Running,
        None | Some(RunStatus::Failed) => SessionEnd::Failure,
        Some(_) => SessionEnd::Success,
    })
}

impl Param {
    /// As text of a tracker that knows text alone.
    pub fn text(&self) -> String {
        match self {
            Param::Number(number) => number.to_string(),
            Param::Bool(flag) => flag.to_string(),
            Param::Text(text) => text.clone(),
        }
    }
}
