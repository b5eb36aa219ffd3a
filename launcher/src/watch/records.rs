//! `memory.node.jsonl`.

use super::Sample;
use spec::contract::{Event, Level, NodeRecord};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// Seconds between records when nothing happens: what changes slowly need not fill disks.
const EVERY_S: f64 = 2.0;

/// The open file; after an error nothing more is written, and the error is said once.
pub struct Records {
    file: Option<File>,
    due: f64,
}

impl Records {
    /// Appends: a run that is started again goes on in the same file.
    pub fn open(run_dir: Option<&Path>) -> (Self, Option<String>) {
        let Some(path) = run_dir.map(|dir| dir.join("memory.node.jsonl")) else {
            return (Self { file: None, due: 0.0 }, None);
        };
        match OpenOptions::new().create(true).append(true).open(&path) {
            Ok(file) => (Self { file: Some(file), due: 0.0 }, None),
            Err(e) => (Self { file: None, due: 0.0 }, Some(format!("{}: {e}", path.display()))),
        }
    }

    /// Writes a record when one is due or something happened.
    pub fn write(&mut self, now: f64, record: impl FnOnce() -> NodeRecord, event: Option<Event>) -> Option<String> {
        let file = self.file.as_mut().filter(|_| event.is_some() || now >= self.due)?;
        self.due = now + EVERY_S;
        let mut line = serde_json::to_vec(&NodeRecord { event, ..record() }).ok()?;
        line.push(b'\n');
        let error = file.write_all(&line).err()?;
        self.file = None;
        Some(format!("memory.node.jsonl: {error}"))
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
