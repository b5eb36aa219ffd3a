//! Room of file systems.

use rustix::fs::{StatVfs, fstatvfs, statvfs};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// Part of a file system that a file of decoded samples leaves free: one in so many.
const KEPT_FREE: u64 = 20;

/// What a file system has, and what an unprivileged process may still write to it, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRoom {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl DiskRoom {
    /// # Errors
    /// `path` does not exist, or its file system does not say.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(statvfs(path)?.into())
    }

    /// As [`of`](Self::of), for a file that may have no name.
    ///
    /// # Errors
    /// The file system does not say.
    pub fn of_file(file: impl AsFd) -> io::Result<Self> {
        Ok(fstatvfs(file)?.into())
    }

    /// True while a file that only saves work may grow beyond the `taken` bytes that it has: a twentieth of the file system stays
    /// free, and where less than that is free, as much as the file takes itself.
    pub fn may_grow(self, taken: u64) -> bool {
        self.free_bytes > (self.total_bytes / KEPT_FREE).min(taken)
    }
}

impl From<StatVfs> for DiskRoom {
    fn from(found: StatVfs) -> Self {
        let [free_bytes, total_bytes] =
            [found.f_bavail, found.f_blocks].map(|blocks| blocks.saturating_mul(found.f_frsize));
        Self { free_bytes, total_bytes }
    }
}

/// Bytes that an unprivileged process may still write below `path`, or below its nearest existing ancestor. `None`
/// means that the file system does not say.
pub fn free_disk_bytes(path: &Path) -> Option<u64> {
    // The last ancestor of a relative path is empty: the working folder.
    let folders = path.ancestors().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    let existing = folders.into_iter().find(|p| p.exists())?;
    DiskRoom::of(existing).ok().map(|room| room.free_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_saves_work_leaves_a_twentieth_or_takes_half_of_what_was_left() {
        let room = |free_bytes| DiskRoom { free_bytes, total_bytes: 1000 };
        // An almost full file system still serves a small file.
        assert!(room(30).may_grow(0) && room(20).may_grow(10) && room(16).may_grow(14));
        assert!(!room(15).may_grow(15) && !room(0).may_grow(0));
        // A large file leaves the twentieth.
        assert!(room(51).may_grow(900) && !room(50).may_grow(900));
    }

    #[test]
    fn a_file_without_a_name_is_on_the_file_system_of_its_folder() {
        let file = tempfile::tempfile_in(".").unwrap();
        let (one, other) = (DiskRoom::of_file(&file).unwrap(), DiskRoom::of(Path::new(".")).unwrap());
        assert_eq!(one.total_bytes, other.total_bytes);
        assert!(one.total_bytes >= one.free_bytes && DiskRoom::of(Path::new("absent")).is_err());
    }

    #[test]
    fn disk_room_is_asked_of_the_nearest_existing_folder() {
        let root = tempfile::tempdir().unwrap();
        let here = free_disk_bytes(root.path()).unwrap();
        let deeper = free_disk_bytes(&root.path().join("runs/next")).unwrap();
        assert_eq!(here > 0, deeper > 0);
        assert!(free_disk_bytes(Path::new("runs/relative")).is_some());
    }
}
