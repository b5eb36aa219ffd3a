//! Append-only JSON lines: `metrics.jsonl`, `memory.rank<R>.jsonl`, and `summary.json`.
//!
//! JSON has no NaN or infinity: a value that is not finite is written as `null` and read back as NaN.

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::Serialize;
use spec::contract::Summary;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Why a record could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{path}: {action}: {source}; check the disk's free space and the folder's permissions", path = path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("{path}: record does not become JSON: {source}", path = path.display())]
    Json { path: PathBuf, source: serde_json::Error },
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { path, action, source }
}

enum Message {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

/// Writes one JSON object per line on its own thread; [`RecordWriter::write`] never waits for the disk.
///
/// Every record is handed to the kernel as soon as the thread gets it, so nothing but the line being written is lost
/// when the process is killed.
pub struct RecordWriter {
    path: PathBuf,
    sender: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    error: Arc<Mutex<Option<RecordError>>>,
}

impl RecordWriter {
    /// Opens `path`. `resumed_step`: keep the records up to and including this step and cut off the rest, so that a
    /// rerun does not repeat steps; `None`: start an empty file.
    ///
    /// # Errors
    /// The file cannot be read, cut or opened.
    pub fn open(path: &Path, resumed_step: Option<u64>) -> Result<Self, RecordError> {
        if let Some(step) = resumed_step {
            cut_after(path, step)?;
        }
        let mut options = OpenOptions::new();
        options.create(true);
        if resumed_step.is_some() {
            options.append(true)
        } else {
            options.write(true).truncate(true)
        };
        let file = options.open(path).map_err(io_error(path, "open"))?;
        let (sender, receiver) = unbounded();
        let error = Arc::new(Mutex::new(None));
        let thread = {
            let (target, error) = (path.to_owned(), error.clone());
            std::thread::Builder::new()
                .name("records".into())
                .spawn(move || append(file, &target, &receiver, &error))
                .map_err(io_error(path, "start the record thread"))?
        };
        Ok(Self { path: path.to_owned(), sender: Some(sender), thread: Some(thread), error })
    }

    /// Queues one record.
    ///
    /// # Errors
    /// The record does not serialise. Trouble with the disk is reported by [`RecordWriter::close`].
    pub fn write(&self, record: &impl Serialize) -> Result<(), RecordError> {
        let mut line =
            serde_json::to_vec(record).map_err(|source| RecordError::Json { path: self.path.clone(), source })?;
        line.push(b'\n');
        if let Some(sender) = &self.sender {
            // The thread only ends when the sender is dropped.
            let _ = sender.send(Message::Line(line));
        }
        Ok(())
    }

    /// Waits until every record queued so far has reached the file, e.g. before it is plotted.
    pub fn flush(&self) {
        let (done, wait) = unbounded();
        if let Some(sender) = &self.sender
            && sender.send(Message::Flush(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    /// Writes what is queued and ends the thread.
    ///
    /// # Errors
    /// The first error since the file was opened; records after it were dropped.
    pub fn close(mut self) -> Result<(), RecordError> {
        self.stop();
        match self.error.lock().unwrap_or_else(|e| e.into_inner()).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn stop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for RecordWriter {
    fn drop(&mut self) {
        self.stop();
    }
}

fn append(mut file: File, path: &Path, receiver: &Receiver<Message>, error: &Mutex<Option<RecordError>>) {
    let mut broken = false;
    while let Ok(message) = receiver.recv() {
        match message {
            Message::Line(line) if !broken => {
                if let Err(source) = file.write_all(&line) {
                    broken = true;
                    let found = io_error(path, "write a record")(source);
                    tracing::warn!("{found}; training goes on without these records");
                    *error.lock().unwrap_or_else(|e| e.into_inner()) = Some(found);
                }
            }
            Message::Line(_) => {}
            Message::Flush(done) => drop(done),
        }
    }
}

/// Keeps the whole lines with `step <= last`; a half-written line is dropped. Rewrites a sibling and renames it, so
/// that a crash in between leaves the old file.
fn cut_after(path: &Path, last: u64) -> Result<(), RecordError> {
    #[derive(serde::Deserialize)]
    struct Step {
        step: u64,
    }
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error(path, "open")(e)),
    };
    let sibling = sibling(path);
    let mut out = BufWriter::new(File::create(&sibling).map_err(io_error(&sibling, "create"))?);
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(io_error(path, "read"))? == 0 {
            break;
        }
        let whole = line.last() == Some(&b'\n');
        if whole && serde_json::from_slice::<Step>(&line).is_ok_and(|record| record.step <= last) {
            out.write_all(&line).map_err(io_error(&sibling, "write"))?;
        }
    }
    out.flush().map_err(io_error(&sibling, "write"))?;
    fs::rename(&sibling, path).map_err(io_error(path, "replace"))
}

/// Of one name for all processes, of which one at a time writes: what a killed rank left is replaced by the next.
fn sibling(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.partial"))
}

/// Writes `summary.json` whole or not at all.
///
/// # Errors
/// The folder cannot be written.
pub fn write_summary(path: &Path, summary: &Summary) -> Result<(), RecordError> {
    let mut text =
        serde_json::to_vec_pretty(summary).map_err(|source| RecordError::Json { path: path.to_owned(), source })?;
    text.push(b'\n');
    let sibling = sibling(path);
    fs::write(&sibling, text).map_err(io_error(&sibling, "write"))?;
    fs::rename(&sibling, path).map_err(io_error(path, "replace"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::{MetricsRecord, RunStatus};

    fn record(step: u64, loss: f64) -> MetricsRecord {
        MetricsRecord { step, loss, ..Default::default() }
    }

    fn read(path: &Path) -> Vec<MetricsRecord> {
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).iter().map(|record| record.step).collect()
    }

    #[test]
    fn a_resumed_run_does_not_repeat_steps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let writer = RecordWriter::open(&path, None).unwrap();
        (1..=6).for_each(|s| writer.write(&record(s, 0.5)).unwrap());
        writer.close().unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":3,\"lo").unwrap();

        let writer = RecordWriter::open(&path, Some(4)).unwrap();
        writer.write(&record(5, 0.25)).unwrap();
        writer.close().unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no sibling stays");
    }

    #[test]
    fn a_half_written_last_line_is_dropped_even_when_it_is_valid_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}").unwrap();
        RecordWriter::open(&path, Some(9)).unwrap().close().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
    }

    #[test]
    fn a_fresh_run_starts_an_empty_file_and_a_resumed_one_may_find_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        RecordWriter::open(&path, Some(3)).unwrap().close().unwrap();
        fs::write(&path, "{\"step\":1}\n").unwrap();
        RecordWriter::open(&path, None).unwrap().close().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn values_that_are_not_finite_become_null_and_come_back_as_nan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let writer = RecordWriter::open(&path, None).unwrap();
        let mut r = record(1, f64::NAN);
        r.metrics.insert("val.loss".into(), f64::INFINITY);
        writer.write(&r).unwrap();
        writer.flush();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"loss\":null") && text.contains("\"val.loss\":null"), "{text}");
        let back = read(&path);
        assert!(back.len() == 1 && back[0].loss.is_nan() && back[0].metrics["val.loss"].is_nan(), "{back:?}");
    }

    #[test]
    fn a_full_disk_is_reported_at_the_end_and_stops_nothing() {
        let writer = RecordWriter::open(Path::new("/dev/full"), None).unwrap();
        writer.write(&record(1, 0.0)).unwrap();
        writer.write(&record(2, 0.0)).unwrap();
        let error = writer.close().unwrap_err().to_string();
        assert!(error.starts_with("/dev/full: write a record"), "{error}");
    }

    #[test]
    fn the_summary_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        write_summary(&path, &Summary::default()).unwrap();
        write_summary(&path, &Summary { status: RunStatus::Finished, steps: 7, ..Default::default() }).unwrap();
        let read: Summary = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!((read.status, read.steps), (RunStatus::Finished, 7));
    }
}
