//! The lock of a run's folder: one job trains a run at a time.
//!
//! `run.lock` names its holder (process, host, boot). A sibling with the whole content is written and linked to the lock's
//! name, which is atomic on NFS too; where links are refused the file is created with `O_EXCL`. A lock is taken over when
//! its holder is over: see [`holder::judge`]. The holder touches the file every 30 s, so that hosts which cannot look at
//! the process can judge by age. Ages are taken by the file system's clock: against a file written at the same time.

mod holder;

pub use holder::Holder;

use holder::{Looks, Verdict, by_age, judge, process, stat_of};
use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, futimens};
use rustix::io::Errno;
use spec::contract::env;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Time between two heartbeats.
const BEAT: Duration = Duration::from_secs(30);
/// Longest wait for ranks that a killed launcher left, which end within moments.
const LINGER: Duration = Duration::from_secs(30);
/// Locks of others that are looked at before giving up: each was taken in between.
const TRIES: usize = 50;

/// Why a run's folder cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(
        "the run {run} is training already: {holder} holds {path}{age}; this is {own}: give this run another --name, or \
         stop that one first",
        path = path.display()
    )]
    Held { run: String, holder: String, own: String, path: PathBuf, age: String },
    #[error(
        "the run {run} was left by {holder}, and its ranks still run (process {pids}): wait for their end, or end them with \
         kill -9"
    )]
    Lingering { run: String, holder: String, pids: String },
    #[error("cannot lock the run's folder: {path}", path = path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Action when the lock turns out to be another's, who trains the run now.
pub type OnLoss = Box<dyn Fn(String) + Send>;

/// A held lock. Dropping it removes the file.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    own: Holder,
    /// Ends the heartbeat when dropped.
    stop: Option<Sender<()>>,
    beat: Option<JoinHandle<()>>,
}

/// Name of the lock's file: nodes that share a folder have one each.
fn name_of(node: usize) -> String {
    if node == 0 { "run.lock".into() } else { format!("run.node{node}.lock") }
}

impl RunLock {
    /// Locks `folder` for `program` on node `node`. `say` gets a line when another's lock is taken over.
    ///
    /// # Errors
    /// Another process trains this run; the folder cannot be written.
    pub fn take(
        folder: &Path,
        node: usize,
        program: &str,
        mut say: impl FnMut(String),
        on_loss: OnLoss,
    ) -> Result<Self, LockError> {
        let path = folder.join(name_of(node));
        let failed = |source| LockError::Io { path: path.clone(), source };
        let place = Place { folder, path: &path };
        let mut own = Holder::this(program);
        for _ in 0..TRIES {
            if let Some(file) = place.create(&mut own).map_err(failed)? {
                return Self::beating(path, own, file, on_loss);
            }
            let Some(found) = place.found(&own).map_err(failed)? else { continue };
            let why = place.over(&found, &own)?;
            let left = found.shown();
            wait_for_ranks(folder, &left, &mut say)?;
            if let Some(file) = place.take_over(&found, &mut own).map_err(failed)? {
                say(format!("{}: the lock of {left} is taken over: {why}", path.display()));
                return Self::beating(path, own, file, on_loss);
            }
        }
        Err(failed(io::Error::other("it changes hands all the time")))
    }

    fn beating(path: PathBuf, own: Holder, mut file: File, on_loss: OnLoss) -> Result<Self, LockError> {
        let (stop, stopped) = channel();
        let (at, mine) = (path.clone(), own.clone());
        let beat = move || {
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                if let Some(other) = heartbeat(&at, &mine, &mut file) {
                    return on_loss(other.shown());
                }
            }
        };
        let thread = std::thread::Builder::new().name("run-lock".into()).stack_size(128 << 10).spawn(beat);
        let thread = thread.map_err(|source| LockError::Io { path: path.clone(), source })?;
        Ok(Self { path, own, stop: Some(stop), beat: Some(thread) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, where it is still this lock's.
    fn release(&self) {
        if read(&self.path).is_ok_and(|(holder, _)| holder.as_ref() == Some(&self.own)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(beat) = self.beat.take() {
            let _ = beat.join();
        }
        self.release();
    }
}

/// Refuses a folder that another process has locked.
///
/// # Errors
/// As [`RunLock::take`].
pub fn check(folder: &Path, node: usize) -> Result<(), LockError> {
    let path = folder.join(name_of(node));
    let (place, own) = (Place { folder, path: &path }, Holder::this("launch"));
    match place.found(&own) {
        Ok(Some(found)) => place.over(&found, &own).map(drop),
        // Nothing is locked here, or the folder cannot be looked at, which is found when it is used.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Touches the file. Returns the holder that has taken the lock over.
fn heartbeat(path: &Path, own: &Holder, file: &mut File) -> Option<Holder> {
    match read(path) {
        Ok((Some(holder), _)) if holder != *own => Some(holder),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // Removed by hand: made again, since the run continues.
            let place = Place { folder: path.parent()?, path };
            if let Ok(Some(made)) = place.create(&mut own.clone()) {
                *file = made;
            }
            None
        }
        _ => {
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let _ = futimens(&*file, &Timestamps { last_access: now, last_modification: now });
            None
        }
    }
}

/// Holder and file; `None`: the content names nobody.
fn read(path: &Path) -> io::Result<(Option<Holder>, File)> {
    let mut file = OpenOptions::new().read(true).open(path)?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok((serde_json::from_slice(&text).ok(), file))
}

impl Found {
    fn shown(&self) -> String {
        self.holder.as_ref().map_or_else(|| "an unknown process".into(), Holder::shown)
    }
}

struct Place<'a> {
    folder: &'a Path,
    path: &'a Path,
}

/// A lock that is there.
struct Found {
    holder: Option<Holder>,
    file: File,
    age: Duration,
}

impl Place<'_> {
    fn sibling(&self, own: &Holder, what: &str) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().display();
        self.folder.join(format!(".{name}.{what}-{}-{}-{:x}", own.host, own.pid, own.nonce))
    }

    /// A file with the content of the lock, locked with `flock` where that can be.
    fn written(path: &Path, own: &mut Holder) -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        own.flocked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        file.write_all(&serde_json::to_vec(own)?)?;
        file.sync_all()?;
        Ok(file)
    }

    /// Makes the lock; `None`: it is there.
    fn create(&self, own: &mut Holder) -> io::Result<Option<File>> {
        let sibling = self.sibling(own, "new");
        let _ = std::fs::remove_file(&sibling);
        let file = Self::written(&sibling, own)?;
        let linked = std::fs::hard_link(&sibling, self.path);
        // A repeated request over NFS says "exists" of the link that the first one made.
        let is_made = linked.is_ok() || file.metadata().is_ok_and(|facts| facts.nlink() > 1);
        let _ = std::fs::remove_file(&sibling);
        match linked {
            _ if is_made => Ok(Some(file)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(None),
            Err(e) if no_links(&e) => match Self::written(self.path, own) {
                Ok(file) => Ok(Some(file)),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(None),
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
            Ok(()) => Ok(Some(file)),
        }
    }

    /// The lock that is there, with its age by the file system's clock.
    fn found(&self, own: &Holder) -> io::Result<Option<Found>> {
        let (holder, file) = match read(self.path) {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let touched = file.metadata()?.modified()?;
        let sibling = self.sibling(own, "now");
        let now = File::create(&sibling).and_then(|file| file.metadata()?.modified());
        let _ = std::fs::remove_file(&sibling);
        // Where nothing can be written the own clock has to do.
        let age = now.unwrap_or_else(|_| SystemTime::now()).duration_since(touched).unwrap_or_default();
        Ok(Some(Found { holder, file, age }))
    }

    /// Why the lock is over.
    ///
    /// # Errors
    /// It is not: [`LockError::Held`].
    fn over(&self, found: &Found, own: &Holder) -> Result<String, LockError> {
        let flock_is_free = || match flock(&found.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Some(flock(&found.file, FlockOperation::Unlock).is_ok()),
            Err(Errno::WOULDBLOCK) => Some(false),
            Err(_) => None,
        };
        let looks = Looks { process: &process, flock_is_free: &flock_is_free, age: found.age };
        let verdict = match &found.holder {
            Some(holder) => judge(holder, own, &looks),
            None => by_age(found.age),
        };
        let age = match verdict {
            Verdict::Over(why) => return Ok(why),
            Verdict::Alive => String::new(),
            Verdict::Beating(age) => {
                let (age, stale) = (age.as_secs(), holder::STALE.as_secs());
                format!(" (touched {age} s ago; it is taken over when it was not touched for {stale} s)")
            }
        };
        let run = self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let holder = found.shown();
        let own = format!("process {} on {}", own.pid, own.host);
        Err(LockError::Held { run, holder, own, path: self.path.to_owned(), age })
    }

    /// Replaces the lock that was judged to be over; `None`: another process was faster.
    ///
    /// Only the owner of a claim, named after the lock that it replaces, may do so, and it looks again first. So two that
    /// judged alike never remove each other's new lock.
    fn take_over(&self, found: &Found, own: &mut Holder) -> io::Result<Option<File>> {
        let of = found.holder.as_ref().map_or(0, |holder| holder.nonce);
        let name = self.path.file_name().unwrap_or_default().display();
        let claim = self.folder.join(format!(".{name}.claim-{of:x}"));
        if let Err(e) = OpenOptions::new().write(true).create_new(true).open(&claim) {
            if e.kind() != ErrorKind::AlreadyExists {
                return Err(e);
            }
            // A claim lives for milliseconds: one that does not end is of a process that died with it.
            let old = std::fs::metadata(&claim).and_then(|facts| facts.modified());
            if old.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > Duration::from_secs(60))) {
                let _ = std::fs::remove_file(&claim);
            }
            std::thread::sleep(Duration::from_millis(100));
            return Ok(None);
        }
        let replaced = self.replace(found, own);
        let _ = std::fs::remove_file(&claim);
        replaced
    }

    fn replace(&self, found: &Found, own: &mut Holder) -> io::Result<Option<File>> {
        match read(self.path) {
            Ok((holder, _)) if holder == found.holder => {}
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        }
        let sibling = self.sibling(own, "new");
        let _ = std::fs::remove_file(&sibling);
        let file = Self::written(&sibling, own)?;
        std::fs::rename(&sibling, self.path)?;
        Ok(Some(file))
    }
}

/// File systems without hard links.
fn no_links(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK | Errno::XDEV | Errno::INVAL))
}

/// Waits until no rank of an earlier launch of this run is left: one that its launcher's death has not reached yet may
/// still write a checkpoint.
fn wait_for_ranks(folder: &Path, holder: &str, say: &mut impl FnMut(String)) -> Result<(), LockError> {
    let end = Instant::now() + LINGER;
    let mut said = false;
    loop {
        let left = ranks_of(folder);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            let run = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(LockError::Lingering { run, holder: holder.to_owned(), pids: left.join(", ") });
        }
        if !std::mem::replace(&mut said, true) {
            say(format!("waiting for the end of ranks that {holder} left: process {}", left.join(", ")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Processes that a launcher started as ranks of the run in `folder`.
fn ranks_of(folder: &Path) -> Vec<String> {
    let wanted = format!("{}={}", env::JOB, folder.join("job").display());
    let socket = format!("{}=", env::CONTROL_FD);
    let is_rank = |environment: &[u8]| {
        let has = |start: &str| environment.split(|byte| *byte == 0).any(|word| word.starts_with(start.as_bytes()));
        has(&wanted) && has(&socket)
    };
    let names = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let pids = names.filter_map(|name| name.into_string().ok()).filter(|name| name.parse::<u32>().is_ok());
    pids.filter(|pid| std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| is_rank(&environment)))
        .filter(|pid| stat_of(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X')))
        .collect()
}

#[cfg(test)]
mod tests;
