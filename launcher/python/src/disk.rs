//! Decoded samples in a file: what the cache has no room for is read from there again, and not decoded.
//!
//! ```text
//! file     head: offset u64, bytes u64 of each sample (0: not there) │ one byte │ record │ record │ …
//! record   number of the data set u64 │ sample u64 │ bytes u64 │ CRC-32 of the entry u32 │ 0 u32 │ entry
//! ```
//! One file serves all processes of a node. Records are appended, each by one call, so that the kernel keeps processes apart; then the
//! head learns of them. The file's name goes as soon as all ranks of the node have opened it, so nothing is left behind whatever
//! dies; a name that was left earlier, because ranks did not come, goes when a file is next opened in that folder.

use crate::entry::Entry;
use crate::node::Node;
use cache::client::CacheClient;
use host::disk::DiskRoom;
use host::scratch::{Holders, hold, is_at, is_last, sweep};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use rustix::process::getuid;
use spec::plan::bytes_text;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::id;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const RECORD_HEAD_BYTES: usize = 32;
const PLACE_BYTES: u64 = 16;
/// Behind the name of a file.
const ENDING: &str = ".samples";
/// Bytes between two looks at what the file system has left.
const LOOK_BYTES: u64 = 64 << 20;

/// This process's use of the file.
pub struct Disk {
    file: File,
    /// Its name, which it has until all ranks have opened it.
    path: PathBuf,
    tag: u64,
    samples: u64,
    process: u32,
    /// Opened by the process of this number: a forked child opens its own.
    appender: Mutex<(u32, File)>,
    full: AtomicBool,
    written: AtomicU64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
}

/// A file that a process has open: the process, the number there, device and inode, and what is in it.
#[derive(FromPyObject, IntoPyObject)]
#[pyo3(from_item_all)]
struct Handle {
    process: u32,
    file: i32,
    identity: (u64, u64),
    tag: u64,
    samples: u64,
}

/// Who opens a file, and for what.
pub struct Opening<'a> {
    pub folder: &'a Path,
    /// The same in all processes of a job, and in no other job.
    pub job: &'a str,
    /// This rank and the number of ranks, on this node.
    pub place: (usize, usize),
    pub tag: u64,
    pub samples: u64,
}

impl Disk {
    /// Opens the file of a data set, or makes it.
    ///
    /// # Errors
    /// The folder is absent, or nothing can be written there.
    pub fn open(opening: &Opening) -> io::Result<Self> {
        let Opening { folder, job, place: (rank, ranks), tag, samples } = *opening;
        sweep_killed(folder)?;
        let path = folder.join(format!("{}{job}-{tag:016x}{ENDING}", prefix()));
        let file = hold(&path, Holders::Many, |path| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
        })?;
        // By writing the last byte: it makes the file longer and never shorter, whoever appends meanwhile.
        file.write_all_at(&[0], PLACE_BYTES * samples)?;
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(mark(&path, rank))?;
        if (0..ranks).all(|rank| mark(&path, rank).exists()) {
            unname(&path);
        }
        Self::new(file, path, tag, samples)
    }

    /// Where another process of this user finds the file, which may have no name.
    fn handle(&self) -> io::Result<Handle> {
        let metadata = self.file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        Ok(Handle { process: id(), file: self.file.as_raw_fd(), identity, tag: self.tag, samples: self.samples })
    }

    /// Opens the file of a process that still has it open.
    fn of(handle: &Handle) -> io::Result<Self> {
        let Handle { process, file, identity, tag, samples } = *handle;
        let path = PathBuf::from(format!("/proc/{process}/fd/{file}"));
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) != identity {
            return Err(io::Error::other("that process has another file under this number"));
        }
        Self::new(file, path, tag, samples)
    }

    fn new(file: File, path: PathBuf, tag: u64, samples: u64) -> io::Result<Self> {
        let appender = Mutex::new((id(), appending(&file)?));
        let [written, reads, writes] = [0; 3].map(AtomicU64::new);
        let full = AtomicBool::new(false);
        Ok(Self { file, path, tag, samples, process: id(), appender, full, written, reads, writes })
    }

    /// True where a decoded sample of `bytes` is worth writing: as many samples of its size take more than half of the cache. `client`:
    /// the cache, unless it had no room for this one.
    pub fn wants(&self, bytes: usize, client: Option<&CacheClient>) -> bool {
        let cache_bytes = client.filter(|client| !client.is_shrunk()).map_or(0, CacheClient::capacity_bytes);
        self.samples.saturating_mul(bytes as u64) > cache_bytes / 2
    }

    /// Offset of a sample's record, and bytes of its entry.
    pub fn find(&self, sample: u64) -> Option<(u64, usize)> {
        if sample >= self.samples {
            return None;
        }
        // The offset is written last.
        let number = |at: u64| {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, at).ok().map(|()| u64::from_le_bytes(bytes))
        };
        let offset = number(PLACE_BYTES * sample).filter(|offset| *offset > 0)?;
        let bytes = number(PLACE_BYTES * sample + 8).filter(|bytes| *bytes > 0)?;
        Some((offset, usize::try_from(bytes).ok()?))
    }

    /// Reads the entry of a sample that [`find`](Self::find) found, into as many bytes as it has. False: it is damaged, and not used
    /// again.
    pub fn read(&self, sample: u64, offset: u64, out: &mut [u8]) -> bool {
        let mut head = [0; RECORD_HEAD_BYTES];
        let read = self.file.read_exact_at(&mut head, offset).is_ok()
            && self.file.read_exact_at(out, offset + RECORD_HEAD_BYTES as u64).is_ok();
        let whole = read && head == self.head(sample, out) && Entry::parse(out, self.tag).is_ok();
        if whole {
            self.reads.fetch_add(1, Ordering::Relaxed);
        } else {
            // An index that cannot be written leaves a record that is refused again.
            let _ = self.file.write_all_at(&[0; 8], PLACE_BYTES * sample);
        }
        whole
    }

    /// The entry of a sample; `None`: it is not there.
    pub fn get(&self, sample: u64) -> Option<Vec<u8>> {
        let (offset, bytes) = self.find(sample)?;
        let mut out = vec![0; bytes];
        self.read(sample, offset, &mut out).then_some(out)
    }

    fn head(&self, sample: u64, entry: &[u8]) -> [u8; RECORD_HEAD_BYTES] {
        let mut head = [0; RECORD_HEAD_BYTES];
        let numbers = [self.tag, sample, entry.len() as u64, u64::from(libdeflater::crc32(entry))];
        for (place, number) in head.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *place = number.to_le_bytes();
        }
        head
    }

    /// Writes an entry, unless it is there. A text: why no more are written, once.
    pub fn put(&self, sample: u64, entry: &[u8]) -> Option<String> {
        if sample >= self.samples || self.full.load(Ordering::Relaxed) || self.find(sample).is_some() {
            return None;
        }
        match self.append(sample, entry) {
            Ok(()) => None,
            Err(problem) if !self.full.swap(true, Ordering::Relaxed) => {
                let kept = self.writes.load(Ordering::Relaxed);
                Some(format!(
                    "no more decoded samples are written to disk after {kept}: {problem}; the others are decoded again where the \
                     cache has no room"
                ))
            }
            Err(_) => None,
        }
    }

    fn append(&self, sample: u64, entry: &[u8]) -> Result<(), String> {
        let bytes = (RECORD_HEAD_BYTES + entry.len()) as u64;
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before == 0 || before / LOOK_BYTES != (before + bytes) / LOOK_BYTES {
            self.check_room()?;
        }
        let mut appender = match self.appender.try_lock() {
            Ok(appender) => appender,
            // In a forked child it may have been held by a thread that is not there.
            Err(_) if self.process != id() => return Ok(()),
            Err(_) => self.appender.lock().map_err(|error| error.to_string())?,
        };
        if appender.0 != id() {
            *appender = (id(), appending(&self.file).map_err(|error| error.to_string())?);
        }
        let head = self.head(sample, entry);
        let file = &mut appender.1;
        let done =
            file.write_vectored(&[IoSlice::new(&head), IoSlice::new(entry)]).map_err(|error| error.to_string())?;
        if done as u64 != bytes {
            return Err(format!(
                "{done} of {bytes} bytes were written: the file system is full, or a limit was reached"
            ));
        }
        let offset = file.stream_position().map_err(|error| error.to_string())? - bytes;
        let place = |at: u64, number: u64| self.file.write_all_at(&number.to_le_bytes(), at);
        place(PLACE_BYTES * sample + 8, entry.len() as u64)
            .and_then(|()| place(PLACE_BYTES * sample, offset))
            .map_err(|error| error.to_string())?;
        self.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn check_room(&self) -> Result<(), String> {
        let taken = self.file.metadata().map_err(|error| error.to_string())?.len();
        let room = DiskRoom::of_file(&self.file).map_err(|error| error.to_string())?;
        if room.may_grow(taken) {
            return Ok(());
        }
        Err(format!(
            "the file has {}, and its file system {} of {} left",
            bytes_text(taken),
            bytes_text(room.free_bytes),
            bytes_text(room.total_bytes)
        ))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The last one removes the name, where some ranks never came.
        if self.process == id() && is_at(&self.file, &self.path) && is_last(&self.file) {
            unname(&self.path);
        }
    }
}

fn prefix() -> String {
    format!("headroom-{}-", getuid().as_raw())
}

fn mark(path: &Path, rank: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{rank}"));
    name.into()
}

/// The same file with a position of its own, whose writes go behind everything that is there.
fn appending(file: &File) -> io::Result<File> {
    OpenOptions::new().append(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Removes the names of a file, and what says who opened it.
fn unname(path: &Path) {
    // Names that another rank removed at the same time are gone.
    let _ = std::fs::remove_file(path);
    let marks = format!("{}.", path.file_name().unwrap_or_default().display());
    let beside = path.parent().map(std::fs::read_dir).into_iter().flatten().flatten().flatten();
    for entry in beside.filter(|entry| entry.file_name().to_string_lossy().starts_with(&marks)) {
        let _ = std::fs::remove_file(entry.path());
    }
}

/// Removes the files of this user that no process has open.
fn sweep_killed(folder: &Path) -> io::Result<()> {
    let prefix = prefix();
    sweep(folder, |name| name.starts_with(&prefix) && name.ends_with(ENDING), unname)?;
    for entry in std::fs::read_dir(folder)?.flatten() {
        let name = entry.file_name();
        let of = name.to_str().filter(|name| name.starts_with(&prefix)).and_then(|name| name.rsplit_once('.'));
        if of.is_some_and(|(of, _)| of.ends_with(ENDING) && !folder.join(of).exists()) {
            // A mark whose file is gone.
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// [`Disk`] as Python opens it.
#[pyclass(frozen, module = "headroom_train._native", name = "Disk")]
pub struct PyDisk(pub Arc<Disk>);

#[pymethods]
impl PyDisk {
    #[new]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        job: &str,
        place: (usize, usize),
        tag: u64,
        samples: u64,
    ) -> PyResult<Self> {
        let opening = Opening { folder: &folder, job, place, tag, samples };
        let disk = py.detach(|| Disk::open(&opening)).map_err(|error| {
            let folder = folder.display();
            PyOSError::new_err(format!("disk={folder}: {error}: give a folder on a local disk that you can write to"))
        })?;
        Ok(Self(Arc::new(disk)))
    }

    /// What a process needs that is started afresh, for [`of`](Self::of).
    #[getter]
    fn handle(&self) -> PyResult<Handle> {
        self.0.handle().map_err(|error| PyOSError::new_err(error.to_string()))
    }

    /// The file of a process that still has it open; `None`: it has gone.
    #[staticmethod]
    fn of(handle: Handle) -> Option<Self> {
        Disk::of(&handle).ok().map(|disk| Self(Arc::new(disk)))
    }

    /// True where a decoded sample of `bytes` is worth writing. `node`: the cache, unless it had no room for this one.
    fn wants(&self, bytes: usize, node: Option<PyRef<'_, Node>>) -> PyResult<bool> {
        let part = node.as_ref().map(|node| node.part()).transpose()?;
        Ok(self.0.wants(bytes, part.map(|part| &*part.client)))
    }

    /// The entry of a sample, if it is there.
    fn get(&self, py: Python<'_>, sample: u64) -> Option<Vec<u8>> {
        py.detach(|| self.0.get(sample))
    }

    /// Writes an entry; a text: why no more are written.
    fn put(&self, py: Python<'_>, sample: u64, entry: PyBackedBytes) -> Option<String> {
        py.detach(|| self.0.put(sample, &entry))
    }

    /// Entries read and written by this process.
    #[getter]
    fn counts(&self) -> (u64, u64) {
        (self.0.reads.load(Ordering::Relaxed), self.0.writes.load(Ordering::Relaxed))
    }
}
