//! Files and folders that are there for as long as a process: held by a lock, and removed once nobody holds them.
//!
//! The kernel gives the lock of a killed process back, so that a later one can tell what was left behind.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Times that a name is opened anew because it went in between.
const TRIES: usize = 10;
/// Time that [`sweep`] needs to remove a name.
const REMOVAL: Duration = Duration::from_millis(2);

/// How many processes may hold a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holders {
    One,
    Many,
}

/// Holds `path`, which `open` makes or opens, until the file is dropped in all processes that inherited it.
///
/// # Errors
/// `open` fails; another process holds it alone; the file system has no locks.
pub fn hold(path: &Path, holders: Holders, mut open: impl FnMut(&Path) -> io::Result<File>) -> io::Result<File> {
    for _ in 0..TRIES {
        let file = open(path)?;
        let locked = match holders {
            Holders::One => file.try_lock(),
            Holders::Many => file.try_lock_shared(),
        };
        match locked {
            // Another process may have removed it before it was locked.
            Ok(()) if is_at(&file, path) => return Ok(file),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => std::thread::sleep(REMOVAL),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::other(format!("{}: another process holds it, or it disappears again and again", path.display())))
}

/// True if nobody but the caller holds `file`, which then is the caller's alone.
pub fn is_last(file: &File) -> bool {
    file.try_lock().is_ok()
}

/// True if `path` names `file`.
pub fn is_at(file: &File, path: &Path) -> bool {
    let place = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let (own, there) = (file.metadata().map(place), std::fs::metadata(path).map(place));
    own.is_ok_and(|own| there.is_ok_and(|there| own == there))
}

/// Calls `remove` for the paths in `folder` that nobody holds, of those whose names are `ours`. Another user's cannot be opened, and
/// where the file system has no locks all stay.
///
/// # Errors
/// The folder cannot be read.
pub fn sweep(folder: &Path, ours: impl Fn(&str) -> bool, remove: impl Fn(&Path)) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        if entry.file_name().to_str().is_some_and(&ours) {
            let path = entry.path();
            if File::open(&path).is_ok_and(|file| is_last(&file)) {
                remove(&path);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_is_removed_and_the_rest_stays() {
        let root = tempfile::tempdir().unwrap();
        let names = ["a.x", "b.x", "c.y"].map(|name| root.path().join(name));
        for name in &names {
            File::create(name).unwrap();
        }
        let held = hold(&names[0], Holders::Many, |path| File::open(path)).unwrap();
        let second = hold(&names[0], Holders::Many, |path| File::open(path)).unwrap();
        let swept = || sweep(root.path(), |name| name.ends_with(".x"), |path| std::fs::remove_file(path).unwrap());
        swept().unwrap();
        assert_eq!(names.each_ref().map(|name| name.exists()), [true, false, true]);
        assert!(!is_last(&held));
        drop(second);
        assert!(is_last(&held) && is_at(&held, &names[0]) && !is_at(&held, &names[2]));
        drop(held);
        swept().unwrap();
        assert!(!names[0].exists());
        assert!(sweep(&names[0], |_| true, |_| {}).is_err());
    }

    #[test]
    fn a_name_is_held_by_one_or_many_and_only_while_it_is_there() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("held");
        let create = |path: &Path| File::create(path);
        let held = hold(&path, Holders::One, create).unwrap();
        assert!(hold(&path, Holders::Many, create).unwrap_err().to_string().contains("another process holds it"));
        drop(held);
        // Removed before it is locked, the first time.
        let mut tries = 0;
        let file = hold(&path, Holders::One, |path| {
            tries += 1;
            let file = File::create(path)?;
            if tries == 1 {
                std::fs::remove_file(path)?;
            }
            Ok(file)
        });
        assert!(file.is_ok() && tries == 2 && path.exists());
    }
}
