//! Append-only JSON lines: `metrics.jsonl`, `memory.rank<R>.jsonl`, and `summary.json`.
//!
//! JSON has no NaN or infinity: a value that is not finite is written as `null` and read back as NaN.

use crossbeam_channel::{Receiver, Sender, unbounded};
use host::journal::{self, Begin, Journal, News, ROOM_LIMIT, when_there_is_room};
use serde::Serialize;
use spec::contract::Summary;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
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
/// when the process is killed. A full disk ends nothing: see [`Journal`].
pub struct RecordWriter {
    path: PathBuf,
    sender: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl RecordWriter {
    /// Opens `path`. `resumed_step`: keep the records up to and including this step and cut off the rest, so that a
    /// rerun does not repeat steps; `None`: start an empty file. `tell` gets what users must know, on the writer's thread.
    ///
    /// # Errors
    /// The file cannot be read, cut or opened.
    pub fn open(
        path: &Path,
        resumed_step: Option<u64>,
        tell: impl FnMut(News) + Send + 'static,
    ) -> Result<Self, RecordError> {
        if let Some(step) = resumed_step {
            cut_after(path, step)?;
        }
        let begin = if resumed_step.is_some() { Begin::AfterRecords } else { Begin::Empty };
        let journal = Journal::open(path, begin).map_err(io_error(path, "open"))?;
        let (sender, receiver) = unbounded();
        let thread = std::thread::Builder::new()
            .name("records".into())
            .spawn(move || append(journal, &receiver, tell))
            .map_err(io_error(path, "start the record thread"))?;
        Ok(Self { path: path.to_owned(), sender: Some(sender), thread: Some(thread) })
    }

    /// Queues one record.
    ///
    /// # Errors
    /// The record does not serialise.
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

    /// Waits until every record queued so far has reached the file or waits for room, e.g. before it is plotted.
    pub fn flush(&self) {
        let (done, wait) = unbounded();
        if let Some(sender) = &self.sender
            && sender.send(Message::Flush(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    /// Writes what is queued and ends the thread; so does dropping it.
    pub fn close(self) {}

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

fn append(mut journal: Journal, receiver: &Receiver<Message>, mut tell: impl FnMut(News)) {
    while let Ok(message) = receiver.recv() {
        let news = match message {
            Message::Line(line) => journal.write(line),
            Message::Flush(done) => {
                let news = journal.flush();
                drop(done);
                news
            }
        };
        news.into_iter().for_each(&mut tell);
    }
    journal.close().into_iter().for_each(tell);
}

/// Keeps the whole lines with `step <= last`; a half-written line is dropped. Rewrites a sibling and renames it, so
/// that a crash in between leaves the old file.
fn cut_after(path: &Path, last: u64) -> Result<(), RecordError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error(path, "open")(e)),
    };
    let mut reader = BufReader::new(file);
    // Where only the end goes, it is cut off in place: that needs no room.
    let (mut kept, mut end, mut at) = (true, 0, 0);
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line).map_err(io_error(path, "read"))? {
        at += line.len() as u64;
        let keeps = keeps(&line, last);
        if keeps && !kept {
            return rewrite(path, last);
        }
        (kept, end) = (keeps, if keeps { at } else { end });
    }
    if end < at {
        let file = OpenOptions::new().write(true).open(path);
        file.and_then(|file| file.set_len(end)).map_err(io_error(path, "cut"))?;
    }
    Ok(())
}

/// Reads the next line with its end. Returns false at the end of the file.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    Ok(reader.read_until(b'\n', line)? > 0)
}

fn keeps(line: &[u8], last: u64) -> bool {
    #[derive(serde::Deserialize)]
    struct Step {
        step: u64,
    }
    line.last() == Some(&b'\n') && serde_json::from_slice::<Step>(whole(line)).is_ok_and(|record| record.step <= last)
}

/// Strips the zero bytes that a writer leaves which continues at its old place in a truncated file.
fn whole(line: &[u8]) -> &[u8] {
    &line[line.iter().position(|byte| *byte != 0).unwrap_or(line.len())..]
}

fn rewrite(path: &Path, last: u64) -> Result<(), RecordError> {
    let sibling = sibling(path);
    let write = || {
        let mut reader = BufReader::new(File::open(path)?);
        let mut out = BufWriter::new(File::create(&sibling)?);
        let mut line = Vec::new();
        while read_line(&mut reader, &mut line)? {
            if keeps(&line, last) {
                out.write_all(whole(&line))?;
            }
        }
        out.flush()?;
        fs::rename(&sibling, path)
    };
    when_there_is_room(ROOM_LIMIT, write).map_err(|source| {
        let _ = fs::remove_file(&sibling);
        io_error(path, "rewrite")(source)
    })
}

/// Name shared by all processes, of which one at a time writes: the next one replaces the remains of a killed rank.
fn sibling(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".partial");
    path.with_file_name(name)
}

/// Writes `summary.json` whole or not at all; a full disk is waited for, a few seconds.
///
/// # Errors
/// The folder cannot be written.
pub fn write_summary(path: &Path, summary: &Summary) -> Result<(), RecordError> {
    let mut text =
        serde_json::to_vec_pretty(summary).map_err(|source| RecordError::Json { path: path.to_owned(), source })?;
    text.push(b'\n');
    journal::replace(path, &sibling(path), &text, ROOM_LIMIT).map_err(io_error(path, "write"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::{MetricsRecord, RunStatus};

    fn record(step: u64, loss: f64) -> MetricsRecord {
        MetricsRecord { step, loss, ..Default::default() }
    }

    fn read(path: &Path) -> Vec<MetricsRecord> {
        fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_slice(whole(line.as_bytes())).unwrap())
            .collect()
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).iter().map(|record| record.step).collect()
    }

    #[test]
    fn a_resumed_run_does_not_repeat_steps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let writer = RecordWriter::open(&path, None, drop).unwrap();
        (1..=6).for_each(|s| writer.write(&record(s, 0.5)).unwrap());
        writer.close();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":3,\"lo").unwrap();

        let writer = RecordWriter::open(&path, Some(4), drop).unwrap();
        writer.write(&record(5, 0.25)).unwrap();
        writer.close();
        assert_eq!(steps(&path), [1, 2, 3, 4, 5]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no sibling stays");
    }

    #[test]
    fn a_half_written_last_line_is_dropped_even_when_it_is_valid_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}").unwrap();
        RecordWriter::open(&path, Some(9), drop).unwrap().close();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
    }

    #[test]
    fn a_fresh_run_starts_an_empty_file_and_a_resumed_one_may_find_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        RecordWriter::open(&path, Some(3), drop).unwrap().close();
        fs::write(&path, "{\"step\":1}\n").unwrap();
        RecordWriter::open(&path, None, drop).unwrap().close();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn values_that_are_not_finite_become_null_and_come_back_as_nan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let writer = RecordWriter::open(&path, None, drop).unwrap();
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
    fn a_full_disk_is_reported_at_once_and_its_gap_at_the_end() {
        let (tell, told) = unbounded();
        let writer = RecordWriter::open(Path::new("/dev/full"), None, move |news| tell.send(news).unwrap()).unwrap();
        writer.write(&record(1, 0.0)).unwrap();
        writer.write(&record(2, 0.0)).unwrap();
        let first = told.recv().unwrap();
        assert!(first.text.starts_with("warning: /dev/full: cannot be written") && first.gap.is_none(), "{first:?}");
        writer.close();
        let gap = told.recv().unwrap().gap.unwrap();
        assert_eq!((gap.file.as_str(), gap.late, gap.lost), ("full", 0, 2));
    }

    #[test]
    fn records_are_cut_in_place_or_rewritten_and_zero_bytes_of_a_truncated_file_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n").unwrap();
        let before = inode();
        RecordWriter::open(&path, Some(2), drop).unwrap().close();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        assert_eq!(inode(), before, "a full disk has no room for a second file");
        fs::write(&path, "\0\0\0{\"step\":1}\n{\"step\":9}\n{\"step\":0}\n").unwrap();
        RecordWriter::open(&path, Some(2), drop).unwrap().close();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":0}\n");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no sibling stays");
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
