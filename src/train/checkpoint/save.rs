//! Saving: staged on the caller's thread, written by another, published by a rename.

use super::files::{Image, encode_manifest, read_manifest, stage};
use super::{CheckpointError, Facts, LOOP, MANIFEST, MODEL, Manifest, OPTIMIZER, SPLIT, VERSION};
use super::{ema_file, io_error, load};
use crate::data::split::SplitList;
use crate::ledger::{self, Part};
use crate::train::ema::Named;
use host::disk::DiskRoom;
use host::journal::ROOM_LIMIT;
use host::machine::awake::Deadline;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tch::Tensor;

/// Content of a checkpoint. Tensors may lie on any device.
pub struct Content<'a> {
    pub step: u64,
    /// Named as PyTorch's `state_dict` names them.
    pub model: &'a [(String, Tensor)],
    pub optimizer: &'a [(String, Tensor)],
    /// Averages by rate, as `train.ema_decay` lists them.
    pub ema: &'a [(f64, Named)],
    /// Tensors besides, such as a model's state and buffers that ranks do not share.
    pub rest: &'a [(String, Tensor)],
    pub facts: Facts,
    /// Best value of the monitored metric so far: kept until a better one comes.
    pub best: bool,
    /// It is never removed: `log.keep_every`.
    pub keep: bool,
    /// Everything else that the loop needs to resume.
    pub state: serde_json::Value,
    /// The run ends with it: a full disk is waited for, a few seconds.
    pub last: bool,
}

/// Gets lines for users, on the thread that writes.
type Tell = Arc<dyn Fn(String) + Send + Sync>;

/// Writes checkpoints below one folder, one at a time, in the background. One process at a time may have it.
pub struct Checkpointer {
    dir: PathBuf,
    keep_last: usize,
    /// Content of `split.json`.
    split: Option<Vec<u8>>,
    writing: Option<(u64, JoinHandle<Result<(), CheckpointError>>)>,
    tell: Tell,
    /// Steps that could not be saved for a reason that may pass.
    lost: BTreeSet<u64>,
}

impl Checkpointer {
    /// Makes the folder `dir` (`checkpoints/`) and removes what an interrupted save left there.
    /// `keep_last`: checkpoints that stay besides the best; the newest always stays.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path, keep_last: usize) -> Result<Self, CheckpointError> {
        fs::create_dir_all(dir).map_err(io_error(dir, "create"))?;
        for entry in fs::read_dir(dir).map_err(io_error(dir, "read"))? {
            let entry = entry.map_err(io_error(dir, "read"))?;
            let is_partial = |name: &str| name.starts_with(".step-") && name.contains(".tmp-");
            if entry.file_name().to_str().is_some_and(is_partial) {
                fs::remove_dir_all(entry.path()).map_err(io_error(&entry.path(), "remove"))?;
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            keep_last,
            split: None,
            writing: None,
            tell: Arc::new(drop),
            lost: BTreeSet::new(),
        })
    }

    /// Gives a line to `tell` as soon as a save fails.
    pub fn telling(mut self, tell: impl Fn(String) + Send + Sync + 'static) -> Self {
        self.tell = Arc::new(tell);
        self
    }

    /// Keeps `split` in every checkpoint from now on.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn with_split(mut self, split: Option<&SplitList>) -> Result<Self, CheckpointError> {
        let failed = |e: serde_json::Error| io_error(&self.dir, "encode the split")(e.into());
        self.split = split.map(serde_json::to_vec).transpose().map_err(failed)?;
        Ok(self)
    }

    /// Copies the content to host memory and returns; `step-<N>` appears when all of it is on disk. Waits for an
    /// earlier save first.
    ///
    /// # Errors
    /// The earlier save failed for a reason that stays (this one is then not begun), or a tensor cannot be copied.
    pub fn save(&mut self, content: Content) -> Result<(), CheckpointError> {
        or_passing(self.wait())?;
        let path = self.dir.join(format!("step-{}", content.step));
        let mut images = vec![];
        let mut parts = vec![(MODEL.to_owned(), content.model), (OPTIMIZER.to_owned(), content.optimizer)];
        let averages = content.ema.iter();
        parts.extend(averages.map(|(rate, tensors)| (ema_file(*rate, content.ema.len()), tensors.as_slice())));
        parts.extend((!content.rest.is_empty()).then(|| (LOOP.to_owned(), content.rest)));
        for (name, tensors) in parts {
            let image = Image::new(&path.join(&name), stage(content.step, tensors)?)?;
            images.push((name, image));
        }
        images.extend(self.split.clone().map(|split| (SPLIT.to_owned(), Image::plain(split))));
        let manifest = Manifest {
            version: VERSION,
            step: content.step,
            best: content.best,
            keep: content.keep,
            facts: content.facts,
            files: BTreeMap::new(),
            ema: content.ema.iter().map(|(rate, _)| *rate).collect(),
            state: content.state,
        };
        let (dir, keep_last) = (self.dir.clone(), self.keep_last);
        let held = ledger::hold(Part::Staging, images.iter().map(|(_, image)| image.bytes()).sum());
        let (step, tell) = (content.step, Arc::clone(&self.tell));
        let limit = if content.last { ROOM_LIMIT } else { Duration::ZERO };
        let write = move || {
            insist(limit, &*tell, step, || publish(&dir, &path, &images, &manifest))?;
            drop((images, held));
            prune(&dir, keep_last, step)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.writing = Some((step, thread.map_err(io_error(&self.dir, "start the writing thread"))?));
        self.lost.remove(&step);
        Ok(())
    }

    /// Looks after the last save without waiting for it.
    ///
    /// # Errors
    /// It failed for a reason that stays.
    pub fn check(&mut self) -> Result<(), CheckpointError> {
        match &self.writing {
            Some((_, thread)) if thread.is_finished() => or_passing(self.wait()),
            _ => Ok(()),
        }
    }

    /// True if the checkpoint of `step` could not be written, as far as is known by now.
    pub fn has_lost(&self, step: u64) -> bool {
        self.lost.contains(&step)
    }

    /// Waits until the last save is on disk.
    ///
    /// # Errors
    /// It failed; earlier checkpoints are whole.
    pub fn wait(&mut self) -> Result<(), CheckpointError> {
        let Some((step, thread)) = self.writing.take() else { return Ok(()) };
        let result = thread.join().unwrap_or_else(|_| {
            let source = io::Error::other("the writing thread panicked");
            Err(io_error(&self.dir, "write a checkpoint")(source))
        });
        if result.as_ref().is_err_and(CheckpointError::is_passing) {
            self.lost.insert(step);
        }
        result
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        // The writing thread has reported a failure.
        let _ = self.wait();
    }
}

/// The next save may succeed: the failure was reported, and training continues.
fn or_passing(result: Result<(), CheckpointError>) -> Result<(), CheckpointError> {
    result.or_else(|error| if error.is_passing() { Ok(()) } else { Err(error) })
}

/// Writes, and tries again for at most `limit` after a failure that may pass. The first failure is reported at once.
fn insist(
    limit: Duration,
    tell: &dyn Fn(String),
    step: u64,
    write: impl Fn() -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let deadline = Deadline::new(limit);
    let mut told = false;
    loop {
        let Err(error) = write() else {
            if told {
                tell(format!("the checkpoint of step {step} is written now"));
            }
            return Ok(());
        };
        let again = error.is_passing() && !deadline.is_over();
        if !told {
            let next = match (error.is_passing(), again) {
                (_, true) => format!("; trying again for {} s", limit.as_secs()),
                (true, false) => "; training continues, and the next save tries again".into(),
                (false, false) => String::new(),
            };
            tell(format!("warning: the checkpoint of step {step} is not written: {error}{next}"));
        }
        told = true;
        if !again {
            return Err(error);
        }
        std::thread::sleep(deadline.next());
    }
}

/// Writes a sibling folder, syncs it and renames it to `path`; on failure nothing of it stays.
fn publish(dir: &Path, path: &Path, images: &[(String, Image)], manifest: &Manifest) -> Result<(), CheckpointError> {
    let needed: u64 = images.iter().map(|(_, image)| image.bytes()).sum();
    let available = DiskRoom::of(dir).map_err(io_error(dir, "ask for free space"))?.free_bytes;
    check_room(path, needed, available)?;
    let sibling = hidden(dir, path);
    let done = write_folder(&sibling, images, manifest.clone())
        .and_then(|()| replace(&sibling, path))
        .and_then(|()| sync(dir));
    done.map_err(|source| {
        // That folder is incomplete, or the checkpoint that was replaced.
        let _ = fs::remove_dir_all(&sibling);
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let available_bytes = DiskRoom::of(dir).map_or(0, |room| room.free_bytes);
                CheckpointError::NoSpace { path: path.to_owned(), needed_bytes: needed, available_bytes }
            }
            _ => io_error(path, "write")(source),
        }
    })
}

pub(super) fn check_room(path: &Path, needed_bytes: u64, available_bytes: u64) -> Result<(), CheckpointError> {
    if needed_bytes <= available_bytes {
        return Ok(());
    }
    Err(CheckpointError::NoSpace { path: path.to_owned(), needed_bytes, available_bytes })
}

fn write_folder(sibling: &Path, images: &[(String, Image)], mut manifest: Manifest) -> io::Result<()> {
    fs::create_dir_all(sibling)?;
    for (name, image) in images {
        manifest.files.insert(name.clone(), image.write(&sibling.join(name))?);
    }
    let mut file = File::create(sibling.join(MANIFEST))?;
    file.write_all(&encode_manifest(&manifest)?)?;
    file.sync_all()?;
    sync(sibling)
}

/// A checkpoint of the same step is swapped in one call, so that there is one at every moment.
fn replace(sibling: &Path, path: &Path) -> io::Result<()> {
    if !path.exists() {
        return fs::rename(sibling, path);
    }
    if renameat_with(CWD, sibling, CWD, path, RenameFlags::EXCHANGE).is_err() {
        // The file system cannot swap.
        fs::remove_dir_all(path)?;
        return fs::rename(sibling, path);
    }
    fs::remove_dir_all(sibling)
}

/// Syncs a folder. Some network file systems have no such call: their renames are as durable as they get.
fn sync(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        result => result,
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::NOSYS];
    error.raw_os_error().is_some_and(|code| unsupported.iter().any(|errno| errno.raw_os_error() == code))
}

/// The name under which a checkpoint is written, or removed, beside its place.
fn hidden(dir: &Path, path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".tmp-{}", std::process::id()));
    dir.join(name)
}

/// Removes the oldest checkpoints; `saved`, the step just written, and the best stay. A run that resumed from an earlier
/// checkpoint may find later steps than its own.
fn prune(dir: &Path, keep_last: usize, saved: u64) -> Result<(), CheckpointError> {
    let all = load::list(dir)?;
    let manifest = |path: &Path| read_manifest(&path.join(MANIFEST));
    let is_best = |path: &Path| manifest(path).is_ok_and(|manifest| manifest.best);
    let stays = |path: &Path| manifest(path).is_ok_and(|manifest| manifest.keep);
    let best = all.iter().rev().find(|(_, path)| is_best(path)).map(|(step, _)| *step);
    let others = all.iter().filter(|(step, path)| Some(*step) != best && *step != saved && !stays(path));
    let mut others: Vec<_> = others.collect();
    let keep = if best == Some(saved) { keep_last } else { keep_last.saturating_sub(1) };
    others.truncate(others.len().saturating_sub(keep));
    for (_, path) in others {
        // Renamed first: a crash in between leaves what the next start removes, not half a checkpoint.
        let doomed = hidden(dir, path);
        fs::rename(path, &doomed).map_err(io_error(path, "remove"))?;
        fs::remove_dir_all(&doomed).map_err(io_error(&doomed, "remove"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_synced_is_no_failure() {
        // No file of /proc can be synced.
        let error = File::open("/proc/self").unwrap().sync_all().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
        sync(Path::new("/proc/self")).unwrap();
        for errno in [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS] {
            assert!(is_unsupported(&errno.into()), "{errno:?}");
        }
        for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT] {
            assert!(!is_unsupported(&errno.into()), "{errno:?}: the checkpoint may not be on disk");
        }
    }
}
