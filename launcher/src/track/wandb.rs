//! An offline run of W&B, which `wandb sync` uploads: records in a log of checksummed blocks.
//!
//! Sources: wandb/sdk/internal/datastore.py, wandb/proto/wandb_internal.proto.

use super::Source;
use super::facts::of_metrics;
use super::proto::Message;
use host::stamp::time_stamp;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const PROJECT: &str = "headroom";
const BLOCK: usize = 32768;
const HEADER: usize = 7;
/// `:W&B`, the magic number and version 0.
const FILE_HEADER: [u8; 7] = *b":W&B\xe1\xbe\0";
/// Kinds of a piece: a whole record, or its parts.
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// Oldest program that may read the file.
const MIN_CONSUMER: &str = "0.13.0";

pub(super) fn write(source: &Source, out: &Path) -> io::Result<PathBuf> {
    let id = &source.id()[..8];
    let [first, last] = source.times();
    let began = SystemTime::UNIX_EPOCH + Duration::try_from_secs_f64(first).unwrap_or_default();
    let folder = out.join(format!("offline-run-{}-{id}", time_stamp(began).replace('-', "_")));
    let files = folder.join("files");
    std::fs::create_dir_all(&files)?;
    for (name, path) in source.artifacts().into_iter().filter(|(name, _)| name == "config.yaml") {
        // W&B's own file of this name has another form.
        std::fs::copy(path, files.join(format!("headroom-{name}")))?;
    }
    let mut log = Log { bytes: FILE_HEADER.to_vec(), number: 0 };
    let info = Message::new().text(1, env!("CARGO_PKG_VERSION")).text(2, MIN_CONSUMER);
    log.record(21, &Message::new().message(1, &info));
    log.record(17, &run(source, id, first));
    for record in &source.run.metrics {
        log.record(2, &history(record.step, record.t, first, &of_metrics(record)));
    }
    log.record(3, &summary(source));
    let failed = source.run.summary.as_ref().is_none_or(|s| s.status == spec::contract::RunStatus::Failed);
    log.record(18, &Message::new().int(1, i64::from(failed)).int(2, (last - first) as i64));
    log.record(22, &Message::new());
    let path = folder.join(format!("run-{id}.wandb"));
    host::journal::replace(&path, &path.with_extension("new"), &log.bytes, host::journal::ROOM_LIMIT)?;
    Ok(folder)
}

fn run(source: &Source, id: &str, began: f64) -> Message {
    let config = source.job.get("config").and_then(Value::as_object);
    let mut items = Message::new();
    for (key, value) in config.into_iter().flatten() {
        items.push(1, &Message::new().text(1, key).text(16, &value.to_string()));
    }
    let nanos = (began.fract() * 1e9) as i64;
    let start = Message::new().int(1, began as i64).int(2, nanos);
    let mut run = Message::new().text(1, id).text(3, PROJECT).message(4, &items).text(8, &source.name);
    if let Some(host) = source.job.pointer("/origin/host").and_then(Value::as_str) {
        run = run.text(13, host);
    }
    run = run.message(17, &start);
    if let Some(commit) = source.job.pointer("/origin/commit").and_then(Value::as_str) {
        run = run.message(21, &Message::new().text(2, commit));
    }
    run
}

fn history(step: u64, t: f64, began: f64, values: &[(String, f64)]) -> Message {
    let mut history = Message::new();
    let extra = [("_timestamp", t), ("_runtime", t - began), ("_step", step as f64)];
    let all = values.iter().map(|(name, value)| (name.as_str(), *value)).chain(extra);
    for (name, value) in all {
        history.push(1, &Message::new().text(2, name).text(16, &json(value)));
    }
    history.message(2, &Message::new().int(1, i64::try_from(step).unwrap_or(i64::MAX)))
}

fn summary(source: &Source) -> Message {
    let mut update = Message::new();
    let last = source.run.summary.iter().flat_map(|summary| &summary.metrics);
    for (name, value) in last {
        update.push(1, &Message::new().text(1, name).text(16, &json(*value)));
    }
    update
}

/// W&B writes values that are not finite as strings.
fn json(value: f64) -> String {
    match value {
        value if value.is_nan() => "\"NaN\"".into(),
        value if value.is_infinite() => if value > 0.0 { "\"Infinity\"" } else { "\"-Infinity\"" }.into(),
        value if value.fract() == 0.0 && value.abs() < 1e15 => format!("{value:.0}"),
        value => value.to_string(),
    }
}

struct Log {
    bytes: Vec<u8>,
    number: i64,
}

impl Log {
    /// Appends a `Record` whose `field` is `content`.
    fn record(&mut self, field: u64, content: &Message) {
        self.number += 1;
        let record = Message::new().int(1, self.number).message(field, content);
        self.data(&record.into_bytes());
    }

    fn data(&mut self, mut data: &[u8]) {
        let mut begun = false;
        loop {
            let left = BLOCK - self.bytes.len() % BLOCK;
            if left < HEADER {
                self.bytes.resize(self.bytes.len() + left, 0);
                continue;
            }
            let (piece, rest) = data.split_at(data.len().min(left - HEADER));
            let kind = match (begun, rest.is_empty()) {
                (false, true) => FULL,
                (false, false) => FIRST,
                (true, false) => MIDDLE,
                (true, true) => LAST,
            };
            self.piece(kind, piece);
            if rest.is_empty() {
                return;
            }
            (data, begun) = (rest, true);
        }
    }

    fn piece(&mut self, kind: u8, piece: &[u8]) {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[kind]);
        crc.update(piece);
        self.bytes.extend_from_slice(&crc.finalize().to_le_bytes());
        self.bytes.extend_from_slice(&(piece.len() as u16).to_le_bytes());
        self.bytes.push(kind);
        self.bytes.extend_from_slice(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reverse of [`Log::data`], as the format's reader does it.
    fn read(bytes: &[u8]) -> Vec<Vec<u8>> {
        let (mut at, mut all, mut part) = (HEADER, Vec::new(), Vec::new());
        while at < bytes.len() {
            let left = BLOCK - at % BLOCK;
            if left < HEADER {
                at += left;
                continue;
            }
            let length = usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
            let kind = bytes[at + 6];
            let piece = &bytes[at + HEADER..at + HEADER + length];
            let mut crc = crc32fast::Hasher::new();
            crc.update(&[kind]);
            crc.update(piece);
            assert_eq!(bytes[at..at + 4], crc.finalize().to_le_bytes());
            part.extend_from_slice(piece);
            if matches!(kind, FULL | LAST) {
                all.push(std::mem::take(&mut part));
            }
            at += HEADER + length;
        }
        all
    }

    #[test]
    fn pieces_of_all_lengths_come_back() {
        let mut log = Log { bytes: FILE_HEADER.to_vec(), number: 0 };
        let sizes = [0, 1, BLOCK - 2 * HEADER - 17, 3, BLOCK - HEADER, 3 * BLOCK, 5];
        for (number, size) in sizes.into_iter().enumerate() {
            log.data(&vec![number as u8; size]);
        }
        let found: Vec<usize> = read(&log.bytes).iter().map(Vec::len).collect();
        assert_eq!(found, sizes);
    }

    #[test]
    fn values_are_written_as_the_tool_writes_them() {
        assert_eq!([json(f64::NAN), json(3.0), json(0.5)], ["\"NaN\"", "3", "0.5"]);
        let dir = tempfile::tempdir().unwrap();
        let folder = crate::track::tests::run(dir.path());
        let made = crate::track::export(&folder, crate::track::Form::WandbOffline, Some(dir.path())).unwrap();
        assert!(made.file_name().unwrap().to_string_lossy().starts_with("offline-run-19700101_000001-"));
        let log = made.read_dir().unwrap().flatten().find(|e| e.file_name().to_string_lossy().ends_with(".wandb"));
        let records = read(&std::fs::read(log.unwrap().path()).unwrap());
        // Header, run, three steps, summary, exit, footer.
        assert_eq!(records.len(), 8);
    }
}
