//! `memory.node.jsonl`.

use super::Sample;
use host::journal::{Begin, Journal, News};
use spec::contract::{Event, Level, NodeRecord, RecordGap};
use std::path::Path;

/// Seconds between records when nothing happens: what changes slowly need not fill disks.
const EVERY_S: f64 = 2.0;

/// The open file, and the times in which it could not be written.
pub struct Records {
    journal: Option<Journal>,
    due: f64,
    gaps: Vec<RecordGap>,
}

impl Records {
    /// Appends: a run that is started again continues the same file. The text says why there is no file.
    pub fn open(run_dir: Option<&Path>) -> (Self, Option<String>) {
        let opened = run_dir.map(|dir| {
            let path = dir.join("memory.node.jsonl");
            Journal::open(&path, Begin::AfterRecords).map_err(|e| format!("{}: {e}", path.display()))
        });
        let (journal, error) = match opened.transpose() {
            Ok(journal) => (journal, None),
            Err(error) => (None, Some(error)),
        };
        (Self { journal, due: 0.0, gaps: Vec::new() }, error)
    }

    /// Writes a record when one is due or something happened. `Some`: a line that users must read.
    pub fn write(&mut self, now: f64, record: impl FnOnce() -> NodeRecord, event: Option<Event>) -> Option<String> {
        let journal = self.journal.as_mut().filter(|_| event.is_some() || now >= self.due)?;
        self.due = now + EVERY_S;
        let mut line = serde_json::to_vec(&NodeRecord { event, ..record() }).ok()?;
        line.push(b'\n');
        let news = journal.write(line)?;
        Some(self.keep(news))
    }

    /// Writes what waits for room, or gives it up. The text is a line that users must read.
    pub fn close(mut self) -> (Vec<RecordGap>, Option<String>) {
        let news = self.journal.take().and_then(Journal::close);
        let text = news.map(|news| self.keep(news));
        (self.gaps, text)
    }

    fn keep(&mut self, news: News) -> String {
        self.gaps.extend(news.gap);
        news.text
    }
}

pub fn record(sample: &Sample, ranks: &[u32], step: u64, level: Level) -> NodeRecord {
    let pressure = sample.memory.pressure;
    NodeRecord {
        t: sample.t,
        step,
        level,
        system_total_bytes: sample.memory.total_bytes,
        system_available_bytes: sample.memory.available_bytes,
        file_cache_bytes: sample.memory.file_cache_bytes,
        cache_bytes: sample.cache_bytes,
        job_bytes: sample.job_bytes(),
        launcher_bytes: sample.launcher.pss_bytes,
        ranks: sample.ranks(ranks),
        cgroup: sample.cgroup(),
        psi_some_avg10: pressure.map(|p| p.some_avg10),
        psi_full_avg10: pressure.map(|p| p.full_avg10),
        gpus: sample.gpus.clone(),
        event: None,
    }
}
