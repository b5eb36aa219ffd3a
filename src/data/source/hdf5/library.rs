//! Opening a file by libhdf5, and a reading of its errors: a fault of the file, or a lack that may pass.
//!
//! A lack says nothing about the file: no free descriptor, no memory, a lock that another program holds, a file system that
//! has no locks or does not answer. Its message never advises to replace the file.

use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::File;
use rustix::io::Errno;
use spec::contract::shown;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

/// Pauses between tries to open a file that another program has locked, or whose file system fails for a moment.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(300), Duration::from_millis(500)];

/// Lacks that every file would meet.
const OF_PROCESS: [Errno; 3] = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];

/// Error of libhdf5 or of the system about one file.
#[derive(Debug)]
pub struct Fault {
    /// Error number of the system call that failed, if one did.
    pub errno: Option<Errno>,
    pub words: String,
}

impl Fault {
    pub fn of(error: &::hdf5::Error) -> Self {
        Self::in_words(error.to_string())
    }

    /// A fault of the file itself.
    pub fn content(words: impl Into<String>) -> Self {
        Self { errno: None, words: words.into() }
    }

    /// As [`Fault::of`] for words that hold libhdf5's.
    pub fn in_words(words: String) -> Self {
        Self { errno: errno_in(&words), words }
    }

    pub fn of_io(error: &std::io::Error) -> Self {
        Self { errno: error.raw_os_error().map(Errno::from_raw_os_error), words: error.to_string() }
    }

    /// The error of a call that failed for want of something else than the file's content. libhdf5 gives no number for a file
    /// that ends too early or holds nonsense.
    pub fn is_lack(&self) -> bool {
        self.errno.is_some()
    }

    /// A lack that every file would meet.
    pub fn is_of_process(&self) -> bool {
        self.errno.is_some_and(|errno| OF_PROCESS.contains(&errno))
    }

    fn is_locked(&self) -> bool {
        self.errno == Some(Errno::AGAIN) && self.words.contains("lock")
    }

    /// Locks that the file system or the kernel does not have. The last text is libhdf5's when another thread of this process
    /// has the file open without locks already.
    fn has_no_locks(&self) -> bool {
        let without = [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL, Errno::PERM];
        self.words.contains("lock") && self.errno.is_some_and(|errno| without.contains(&errno))
            || self.words.contains("file locking flag values don't match")
    }

    /// May be over in a moment.
    fn may_pass(&self) -> bool {
        let passing = [
            Errno::INTR,
            Errno::AGAIN,
            Errno::IO,
            Errno::STALE,
            Errno::TIMEDOUT,
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOMEM,
        ];
        self.errno.is_some_and(|errno| passing.contains(&errno))
    }

    /// The error about `path` without the path.
    pub fn into_words(self, path: &Path) -> String {
        match self.into_error(path, |words| format!("cannot be read by libhdf5: {words}")) {
            DataError::File { problem, .. } | DataError::Lack { problem, .. } => problem,
            error => error.to_string(),
        }
    }

    /// The error about `path`. `content` words a fault of the file itself.
    pub fn into_error(self, path: &Path, content: impl FnOnce(&str) -> String) -> DataError {
        let Some(errno) = self.errno else {
            return file_error(path, content(&self.words));
        };
        if self.is_locked() {
            return file_error(path, held_by(path));
        }
        let system = std::io::Error::from(errno);
        match errno {
            Errno::MFILE | Errno::NFILE => DataError::Lack {
                path: path.to_owned(),
                problem: format!(
                    "cannot be opened, this machine's limit is reached: {system}: raise it (ulimit -n) and start again"
                ),
            },
            Errno::NOMEM => DataError::Lack {
                path: path.to_owned(),
                problem: format!("cannot be read for want of memory: {system}: free some and start again"),
            },
            Errno::NOENT | Errno::ACCESS | Errno::PERM | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG => {
                file_error(path, system.to_string())
            }
            _ if self.has_no_locks() => file_error(
                path,
                format!(
                    "cannot be locked ({system}), and HDF5_USE_FILE_LOCKING asks for locks: set HDF5_USE_FILE_LOCKING=FALSE"
                ),
            ),
            _ => file_error(
                path,
                format!(
                    "cannot be read now: {system}: the file may be whole; check its file system and start again, or leave it out"
                ),
            ),
        }
    }
}

/// The error about `path` in `words`. Words that hold the system's for a lack of this process or machine are a lack, whatever
/// part of the file was read.
pub fn failed(path: &Path, words: String) -> DataError {
    let number = words.rsplit("(os error ").next().and_then(|rest| rest.split(')').next()?.parse().ok());
    match number.map(Errno::from_raw_os_error).or_else(|| errno_in(&words)) {
        Some(errno) if OF_PROCESS.contains(&errno) => DataError::Lack { path: path.to_owned(), problem: words },
        _ => file_error(path, words),
    }
}

/// The number in libhdf5's words for a failed system call: `…, errno = 24, error message = 'Too many open files', …`.
fn errno_in(words: &str) -> Option<Errno> {
    let rest = words.split("errno = ").nth(1)?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok().filter(|number| *number != 0).map(Errno::from_raw_os_error)
}

/// Opens `path` for reading. Waits a little for a lock or a file system, and reads without locks where there are none.
///
/// # Errors
/// The last try's.
pub fn open(path: &Path) -> Result<File, Fault> {
    patiently(|| open_once(path))
}

/// Tries again for a moment while `attempt` fails for a lack that may pass.
///
/// # Errors
/// The last try's.
pub fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
    let mut pauses = PAUSES.iter();
    loop {
        let fault = match attempt() {
            Ok(done) => return Ok(done),
            Err(fault) => fault,
        };
        match pauses.next().filter(|_| fault.may_pass()) {
            Some(pause) => std::thread::sleep(*pause),
            None => return Err(fault),
        }
    }
}

/// Opens a regular file. Opening a pipe would wait for its writer, so its kind is looked at first.
pub fn regular(path: &Path) -> Result<std::fs::File, Fault> {
    let facts = std::fs::metadata(path).map_err(|error| Fault::of_io(&error))?;
    if !facts.is_file() {
        return Err(Fault::content("is not a regular file: replace it or leave it out"));
    }
    std::fs::File::open(path).map_err(|error| Fault::of_io(&error))
}

fn open_once(path: &Path) -> Result<File, Fault> {
    let fault = match File::open(path) {
        Ok(file) => return Ok(file),
        Err(error) => Fault::of(&error),
    };
    if !fault.has_no_locks() {
        return Err(fault);
    }
    let file = File::with_options().with_fapl(|access| access.file_locking(false)).open(path).map_err(|error| {
        let without = Fault::of(&error);
        if without.has_no_locks() { Fault { errno: fault.errno, words: fault.words.clone() } } else { without }
    })?;
    say_no_locks(path, &fault);
    Ok(file)
}

/// Line about the first file that was read without locks.
static WITHOUT_LOCKS: OnceLock<String> = OnceLock::new();

fn say_no_locks(path: &Path, fault: &Fault) {
    let system = fault.errno.map(|errno| format!(" ({})", std::io::Error::from(errno))).unwrap_or_default();
    WITHOUT_LOCKS.get_or_init(|| {
        let file = shown(path);
        format!(
            "the file system of {file} has no locks{system}: HDF5 files are read without them; do not write to them meanwhile"
        )
    });
}

/// Line for people when a file of this process was read without locks, the file system having none.
pub fn without_locks() -> Option<&'static str> {
    WITHOUT_LOCKS.get().map(String::as_str)
}

/// Words for a file that another program has locked: it is open for writing there.
fn held_by(path: &Path) -> String {
    let holder = holder(path).map(|holder| format!("held by {holder}")).unwrap_or("held by another program".into());
    format!("is {holder}, which has it open for writing: close it there and start again, or leave it out")
}

/// Program and process that hold a lock of the file, as far as /proc of this machine shows.
fn holder(path: &Path) -> Option<String> {
    let facts = std::fs::metadata(path).ok()?;
    let (major, minor) = (rustix::fs::major(facts.dev()), rustix::fs::minor(facts.dev()));
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    // `1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF`
    let place = format!("{major:02x}:{minor:02x}:{}", facts.ino());
    let pid = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|words| {
        let at = words.iter().position(|word| *word == place)?;
        words.get(at.checked_sub(1)?)?.parse::<i32>().ok().filter(|pid| *pid > 0)
    })?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match name.trim() {
        "" => Some(format!("process {pid}")),
        name => Some(format!("{name} (process {pid})")),
    }
}

/// Words for a part that is not there, or not as it must be.
pub fn missing(part: &Path, problem: &str) -> String {
    format!("{}: bring it back, or leave this file out", unreadable(part, problem))
}

/// Words for a part that cannot be read.
pub fn unreadable(part: &Path, problem: &str) -> String {
    format!("its part {} cannot be read: {problem}", shown(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(words: &str) -> Fault {
        Fault { errno: errno_in(words), words: words.into() }
    }

    fn said(words: &str) -> String {
        fault(words).into_error(Path::new("s.hdf5"), |words| format!("{words}: replace it or leave it out")).to_string()
    }

    #[test]
    fn a_lack_is_never_a_verdict_on_the_file() {
        let lock =
            |errno| format!("H5Fopen(): unable to synchronously open file: unable to lock file, errno = {errno}");
        for (words, says) in [
            ("unable to open file: name = 's', errno = 24, error message = 'Too many open files'", "ulimit -n"),
            ("unable to open file: name = 's', errno = 23, error message = 'x'", "ulimit -n"),
            ("file read failed: errno = 5, error message = 'Input/output error'", "Input/output error"),
            ("file read failed: errno = 116, error message = 'Stale file handle'", "the file may be whole"),
            ("can't allocate: errno = 12, error message = 'Cannot allocate memory'", "want of memory"),
            ("unable to open file: errno = 13, error message = 'Permission denied'", "Permission denied"),
            (&lock(11), "held by"),
            (&lock(37), "HDF5_USE_FILE_LOCKING"),
        ] {
            let error = said(words);
            assert!(error.contains(says) && error.contains("s.hdf5"), "{error}");
            assert!(!error.contains("replace it"), "{error}");
            assert!(fault(words).is_lack());
        }
        for words in ["file signature not found", "truncated file: eof = 96, errno = 0"] {
            assert!(said(words).contains("replace it"), "{words}");
        }
    }

    #[test]
    fn a_lack_while_rows_are_read_is_one_too() {
        let error = |words: &str| failed(Path::new("s.hdf5"), words.into());
        assert!(matches!(error("chunk 3: Too many open files (os error 24)"), DataError::Lack { .. }));
        assert!(matches!(error("chunk 3: part: no memory (os error 12): start again"), DataError::Lack { .. }));
        assert!(matches!(error("chunk 3: Input/output error (os error 5)"), DataError::File { .. }));
        assert!(matches!(error("chunk 3: the file is damaged"), DataError::File { .. }));
    }

    #[test]
    fn file_systems_without_locks_are_told_from_locks_held_elsewhere() {
        let lock = |errno| fault(&format!("unable to lock file, errno = {errno}, error message = 'x'"));
        assert!([37, 95, 38].into_iter().all(|errno| lock(errno).has_no_locks() && !lock(errno).is_locked()));
        assert!(lock(11).is_locked() && lock(11).may_pass() && !lock(11).has_no_locks());
        assert!(!fault("unable to open file: errno = 95, error message = 'x'").has_no_locks());
    }
}
