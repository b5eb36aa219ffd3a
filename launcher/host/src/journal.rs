//! Append-only files of whole lines: records (`.jsonl`) and logs.
//!
//! A disk that is full, or fails, for a moment must not end a file: what cannot be written waits in memory, up to
//! [`MOST_WAITING_BYTES`], and follows in order when there is room. A line that was written in part is cut off again.
//! Files are opened with `O_APPEND`, so that a rotation which copies and truncates (`logrotate`'s `copytruncate`) works.
//!
//! Architecture invariant: a failed write is reported, never returned as an error that ends a run.

use rustix::io::Errno;
use spec::contract::RecordGap;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Bytes that wait for room, per file. Beyond them the oldest are dropped and counted.
pub const MOST_WAITING_BYTES: usize = 1 << 20;
/// How long a file that is written once, such as `summary.json`, waits for room.
pub const ROOM_LIMIT: Duration = Duration::from_secs(10);
/// The same for a file beside a run that supervises meanwhile.
pub const SHORT_LIMIT: Duration = Duration::from_millis(200);
const ROOM_PAUSE: Duration = Duration::from_millis(100);
/// Longest line that is looked for at the end of a file, bytes.
const LAST_LINE_BYTES: u64 = 1 << 20;

/// True if an error of a file system may pass: no room, a quota, a failing or missing server, too many open files.
pub fn is_passing(error: &io::Error) -> bool {
    const PASSING: [Errno; 12] = [
        Errno::NOSPC,
        Errno::DQUOT,
        Errno::IO,
        Errno::STALE,
        Errno::TIMEDOUT,
        Errno::AGAIN,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::MFILE,
        Errno::NFILE,
        Errno::HOSTDOWN,
        Errno::NOLINK,
    ];
    error.raw_os_error().is_some_and(|code| PASSING.iter().any(|errno| errno.raw_os_error() == code))
        || matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Repeats `write` while it fails for a passing reason, at most `limit` long.
///
/// # Errors
/// The last error.
pub fn when_there_is_room<T>(limit: Duration, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let began = Instant::now();
    loop {
        match write() {
            Err(error) if is_passing(&error) && began.elapsed() < limit => std::thread::sleep(ROOM_PAUSE),
            result => return result,
        }
    }
}

/// Replaces the file `path` whole or not at all, and waits for room at most `limit` long. `sibling` is written first;
/// after a failure it is gone.
///
/// # Errors
/// No room in time, no permission.
pub fn replace(path: &Path, sibling: &Path, bytes: &[u8], limit: Duration) -> io::Result<()> {
    let done = when_there_is_room(limit, || {
        std::fs::write(sibling, bytes)?;
        std::fs::rename(sibling, path)
    });
    done.inspect_err(|_| drop(std::fs::remove_file(sibling)))
}

/// Ways in which a file may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Empty, whatever was there.
    Empty,
    /// Behind the whole lines that are there; half a line at the end is cut off.
    AfterRecords,
    /// Behind all that is there, on a line of its own.
    AfterText,
}

/// News about a file that users must know.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    pub text: String,
    /// Set when the file could be written again, or was closed without.
    pub gap: Option<RecordGap>,
}

/// A part of a line at the end of the file, left by a failed write.
struct Torn {
    bytes: u64,
    /// Length of the file with it. Another length: it was rotated meanwhile.
    length: u64,
}

/// An open file. Each piece, a line or several, is written whole or waits.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// A line in a log says where pieces are missing; records are read by programs and hold no such line.
    marks_gaps: bool,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    torn: Option<Torn>,
    gap: Option<RecordGap>,
}

impl Journal {
    /// Opens `path` for appending.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path, begin: Begin) -> io::Result<Self> {
        let truncate = if begin == Begin::Empty { rustix::fs::OFlags::TRUNC } else { rustix::fs::OFlags::empty() };
        let flags = i32::try_from(truncate.bits()).unwrap_or(0);
        let file = OpenOptions::new().create(true).append(true).custom_flags(flags).open(path)?;
        let mut journal = Self {
            path: path.to_owned(),
            file,
            marks_gaps: begin == Begin::AfterText,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            torn: None,
            gap: None,
        };
        if let Some(bytes) = half_line(path).filter(|bytes| *bytes > 0) {
            let length = journal.file.metadata()?.len();
            match begin {
                Begin::AfterText => journal.queue(b"\n".to_vec()),
                _ => journal.torn = Some(Torn { bytes, length }),
            }
            // A failure is met again at the first write, which reports it.
            let _ = journal.pump();
        }
        Ok(journal)
    }

    /// Writes `piece` behind all that waits, or lets it wait. `Some`: something that users must know.
    pub fn write(&mut self, piece: Vec<u8>) -> Option<News> {
        self.queue(piece);
        self.flush()
    }

    /// Tries again to write what waits.
    pub fn flush(&mut self) -> Option<News> {
        match self.pump() {
            Ok(()) => self.gap.take().map(|gap| self.over(gap)),
            Err(error) => self.failing(&error),
        }
    }

    /// Writes what waits or counts it as lost.
    pub fn close(mut self) -> Option<News> {
        if let Err(error) = self.pump() {
            let mut gap = self.gap.take().unwrap_or_else(|| self.begin_gap(&error));
            gap.lost += self.waiting.len() as u64;
            return Some(self.over(gap));
        }
        self.gap.take().map(|gap| self.over(gap))
    }

    fn queue(&mut self, piece: Vec<u8>) {
        self.waiting_bytes += piece.len();
        self.waiting.push_back(piece);
        while self.waiting_bytes > MOST_WAITING_BYTES && self.waiting.len() > 1 {
            let Some(oldest) = self.waiting.pop_front() else { return };
            self.waiting_bytes -= oldest.len();
            if let Some(gap) = &mut self.gap {
                gap.lost += 1;
            }
        }
    }

    /// Writes all that waits.
    fn pump(&mut self) -> io::Result<()> {
        self.cut_torn()?;
        if self.marks_gaps
            && let Some(gap) = self.gap.as_mut().filter(|gap| gap.lost > gap.marked)
        {
            let lost = gap.lost - gap.marked;
            gap.marked = gap.lost;
            let mark = format!("\n[{lost} pieces of output are missing here: {}]\n", gap.error);
            self.waiting_bytes += mark.len();
            self.waiting.push_front(mark.into_bytes());
        }
        while let Some(piece) = self.waiting.front() {
            if let Err((written, error)) = put(&mut self.file, piece) {
                if written > 0 {
                    let length = self.file.metadata().map_or(written, |meta| meta.len());
                    self.torn = Some(Torn { bytes: written, length });
                    let _ = self.cut_torn();
                }
                return Err(error);
            }
            self.waiting_bytes -= piece.len();
            self.waiting.pop_front();
            if let Some(gap) = &mut self.gap {
                gap.late += 1;
            }
        }
        Ok(())
    }

    fn cut_torn(&mut self) -> io::Result<()> {
        let Some(torn) = &self.torn else { return Ok(()) };
        if self.file.metadata()?.len() == torn.length {
            self.file.set_len(torn.length.saturating_sub(torn.bytes))?;
        }
        self.torn = None;
        Ok(())
    }

    fn begin_gap(&self, error: &io::Error) -> RecordGap {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        let now = unix_time();
        RecordGap {
            file: name.display().to_string(),
            from_t: now,
            to_t: now,
            error: error.to_string(),
            ..RecordGap::default()
        }
    }

    /// News at the first failure only.
    fn failing(&mut self, error: &io::Error) -> Option<News> {
        if self.gap.is_some() {
            return None;
        }
        self.gap = Some(self.begin_gap(error));
        let text = format!(
            "warning: {}: cannot be written: {error}; the run continues, and up to {} MiB wait for room: free some space, \
             and check the quota and the folder",
            self.path.display(),
            MOST_WAITING_BYTES >> 20
        );
        Some(News { text, gap: None })
    }

    fn over(&self, gap: RecordGap) -> News {
        let gap = RecordGap { to_t: unix_time(), ..gap };
        News { text: gap.to_string(), gap: Some(gap) }
    }
}

/// Writes the whole piece; else how much of it was written, and the error.
fn put(file: &mut File, piece: &[u8]) -> Result<(), (u64, io::Error)> {
    let mut written = 0;
    while written < piece.len() {
        match file.write(&piece[written..]) {
            Ok(0) => return Err((written as u64, io::ErrorKind::WriteZero.into())),
            Ok(bytes) => written += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((written as u64, error)),
        }
    }
    Ok(())
}

/// Bytes behind the last line end of a file. `None`: it is no regular file, or cannot be read.
fn half_line(path: &Path) -> Option<u64> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_LINE_BYTES))).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    let whole = end.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Some((end.len() - whole) as u64)
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A journal whose next writes fail as on a full disk: its file is `/dev/full`.
    fn full(begin: Begin) -> Journal {
        Journal::open(Path::new("/dev/full"), begin).unwrap()
    }

    fn back(journal: &mut Journal, path: &Path) {
        journal.file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_written_for_a_moment_gets_every_line_later_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let mut journal = full(Begin::Empty);
        let first = journal.write(b"1\n".to_vec()).unwrap();
        assert!(first.text.starts_with("warning: /dev/full: cannot be written: No space left"), "{}", first.text);
        assert_eq!(first.gap, None);
        assert_eq!(journal.write(b"2\n".to_vec()), None, "reported once");
        back(&mut journal, &path);
        let gap = journal.write(b"3\n".to_vec()).unwrap().gap.unwrap();
        assert_eq!((gap.late, gap.lost), (3, 0));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
        assert_eq!(journal.write(b"4\n".to_vec()), None);
        assert_eq!(journal.close(), None);
    }

    #[test]
    fn what_does_not_fit_into_memory_is_lost_oldest_first_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let line = |n: usize| format!("{n:07}{}\n", "x".repeat(1016)).into_bytes();
        let mut journal = full(Begin::Empty);
        let kept = MOST_WAITING_BYTES / 1024;
        (0..kept + 3).for_each(|n| drop(journal.write(line(n))));
        back(&mut journal, &path);
        let gap = journal.flush().unwrap().gap.unwrap();
        assert_eq!((gap.late as usize, gap.lost), (kept, 3));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("0000003x") && text.lines().count() == kept);
    }

    #[test]
    fn what_waits_at_the_end_is_lost_and_named() {
        let mut journal = full(Begin::Empty);
        journal.write(b"1\n".to_vec());
        journal.write(b"2\n".to_vec());
        let news = journal.close().unwrap();
        assert_eq!(news.gap.unwrap().lost, 2);
        assert!(news.text.contains("2 lost"), "{}", news.text);
    }

    #[test]
    fn a_torn_line_is_cut_and_one_of_a_rotated_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        std::fs::write(&path, "{\"a\":1}\n{\"a\":").unwrap();
        let mut journal = Journal::open(&path, Begin::AfterRecords).unwrap();
        assert_eq!(journal.write(b"{\"a\":3}\n".to_vec()), None);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n{\"a\":3}\n");
        journal.torn = Some(Torn { bytes: 5, length: 1000 });
        assert_eq!(journal.write(b"{\"a\":4}\n".to_vec()), None);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n{\"a\":3}\n{\"a\":4}\n");
    }

    #[test]
    fn a_log_says_where_output_is_missing_and_begins_on_a_new_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank0.log");
        std::fs::write(&path, "half").unwrap();
        let mut journal = Journal::open(&path, Begin::AfterText).unwrap();
        journal.file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        (0..3).for_each(|_| drop(journal.write(vec![b'x'; MOST_WAITING_BYTES / 2 + 1])));
        back(&mut journal, &path);
        journal.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("half\n\n[2 pieces of output are missing here: No space left"), "{:.80}", text);
    }

    #[test]
    fn a_file_that_is_copied_and_truncated_goes_on_at_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let mut journal = Journal::open(&path, Begin::Empty).unwrap();
        journal.write(b"1\n".to_vec());
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        journal.write(b"2\n".to_vec());
        assert_eq!(std::fs::read(&path).unwrap(), b"2\n");
    }

    #[test]
    fn a_moments_lack_is_told_from_what_stays() {
        for code in [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::STALE, Errno::MFILE] {
            assert!(is_passing(&io::Error::from(code)), "{code:?}");
        }
        for code in [Errno::ACCESS, Errno::NOENT, Errno::ROFS, Errno::FBIG] {
            assert!(!is_passing(&io::Error::from(code)), "{code:?}");
        }
        let mut tries = 0;
        let got = when_there_is_room(Duration::from_secs(600), || {
            tries += 1;
            if tries < 3 { Err(Errno::DQUOT.into()) } else { Ok(tries) }
        });
        assert_eq!(got.unwrap(), 3);
        assert!(when_there_is_room(ROOM_LIMIT, || Err::<(), _>(Errno::ROFS.into())).is_err());
    }
}
