//! Memory without a name that processes share: a memfd, or, where a sandbox refuses it, an unlinked file.

use crate::refused::{MEMFD_CREATE, Once, is_refusal};
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use std::io;
use std::path::{Path, PathBuf};

/// The line about the stand-in, once per process.
static SAID: Once = Once::new();

/// New shared memory of 0 bytes.
#[derive(Debug)]
pub struct SharedMemory {
    /// Closed on exec.
    pub fd: OwnedFd,
    /// It is a memfd, which can be sealed against shrinking. A file cannot; no other program can reach it.
    pub seals: bool,
    /// Line for the user where a file stands in; once per process.
    pub note: Option<String>,
}

/// A memfd that allows seals; where memfd_create is refused, a file without a name in `/dev/shm`, or in TMPDIR where that has
/// more room. `room_bytes`: what it will hold.
///
/// # Errors
/// The kernel gives no memfd for another reason, or no folder takes the file.
pub fn shared_memory(name: &str, room_bytes: u64) -> io::Result<SharedMemory> {
    let refused = match memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) {
        Ok(fd) => return Ok(SharedMemory { fd, seals: true, note: None }),
        Err(error) if is_refusal(error) => MEMFD_CREATE.refused(error),
        Err(error) => return Err(error.into()),
    };
    let (fd, folder) = file_in(&folders(), room_bytes)
        .map_err(|error| io::Error::new(error.kind(), format!("{refused}; and instead of it {error}")))?;
    let note = SAID.say(|| format!("{refused}; a file without a name in {} is used instead", folder.display()));
    Ok(SharedMemory { fd, seals: false, note })
}

fn folders() -> Vec<PathBuf> {
    vec!["/dev/shm".into(), std::env::temp_dir()]
}

/// A file without a name in the first of `folders` that has the room.
fn file_in(folders: &[PathBuf], room_bytes: u64) -> io::Result<(OwnedFd, PathBuf)> {
    let mut problems = Vec::new();
    for folder in folders {
        match free_bytes(folder) {
            Some(free) if free < room_bytes => {
                problems.push(format!("{} has {free} bytes free, {room_bytes} are needed", folder.display()));
            }
            Some(_) => match nameless(folder) {
                Ok(fd) => return Ok((fd, folder.clone())),
                Err(error) => problems.push(format!("{}: {error}", folder.display())),
            },
            None => problems.push(format!("{} is no folder", folder.display())),
        }
    }
    let problems = problems.join("; ");
    Err(io::Error::other(format!("a file could not be used: {problems}; set TMPDIR to a folder with room")))
}

/// Bytes that may still be written in `folder`; `None` means that it cannot be used.
fn free_bytes(folder: &Path) -> Option<u64> {
    let facts = rustix::fs::statvfs(folder).ok().filter(|_| folder.is_dir())?;
    facts.f_bavail.checked_mul(facts.f_frsize)
}

fn nameless(folder: &Path) -> io::Result<OwnedFd> {
    let (own, flags) = (Mode::RUSR | Mode::WUSR, OFlags::RDWR | OFlags::CLOEXEC);
    match open(folder, flags | OFlags::TMPFILE, own) {
        Ok(fd) => return Ok(fd),
        // File systems, and kernels before 3.11, without O_TMPFILE.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let path = folder.join(format!(".headroom-{}", std::process::id()));
    let fd = open(&path, flags | OFlags::CREATE | OFlags::EXCL, own)?;
    std::fs::remove_file(&path)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_folder_with_room_gets_a_file_without_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none");
        let (fd, at) = file_in(&[missing.clone(), folder.path().into()], 1 << 16).unwrap();
        assert_eq!(at, folder.path());
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, 1 << 16).unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_nlink, 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let error = file_in(&[missing, folder.path().into()], u64::MAX).unwrap_err().to_string();
        assert!(error.contains("is no folder") && error.contains("bytes free"), "{error}");
        assert!(error.contains("set TMPDIR"), "{error}");
    }
}
