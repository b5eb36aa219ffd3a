//! The mapping: shared memory whose pages exist before anyone uses them.

use crate::shared::{SharedMemory, shared_memory};
use rustix::fd::AsFd;
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};
use rustix::io::Errno;

/// Pages are made in pieces of this many bytes: a fraction of a second each, so that ranks start beside it and an end
/// is never held up.
pub const SLAB_BYTES: u64 = 256 << 20;

/// Why there is no mapping of the wanted size.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(
        "the page cache needs {asked_bytes} bytes, {room_bytes} can be had on this node: \
         set data.cache_size_gb to {:.1} or less, or data.cache: off",
        *room_bytes as f64 / (1u64 << 30) as f64
    )]
    NoRoom { asked_bytes: u64, room_bytes: u64 },
    #[error("cannot {what} the page cache's memory ({bytes} bytes)")]
    System {
        what: &'static str,
        bytes: u64,
        #[source]
        source: Errno,
    },
    #[error("cannot create the page cache's memory ({bytes} bytes)")]
    Create {
        bytes: u64,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "the page cache needs {bytes} bytes, more than a file may have here ({}): raise that limit (ulimit -f unlimited, or \
         LimitFSIZE= of the unit), or set data.cache: off", limit_text(*.limit_bytes)
    )]
    FileLimit { bytes: u64, limit_bytes: Option<u64> },
}

/// Bytes of memory that the node has left now; `None` means that it does not say.
pub type Room = fn() -> Option<u64>;

fn limit_text(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "EFBIG".into(), |bytes| format!("ulimit -f is {bytes} bytes"))
}

/// Empty shared memory of `capacity_bytes` that nobody can shrink, without pages yet. The room is looked at first: a memfd
/// has no limit itself, and pages beyond what the node has end in the kernel's choice of a process to kill.
pub fn create(capacity_bytes: u64, room: Room) -> Result<SharedMemory, MemoryError> {
    check_room(capacity_bytes, room)?;
    let bytes = capacity_bytes;
    let memory = shared_memory("headroom-cache", bytes).map_err(|source| MemoryError::Create { bytes, source })?;
    ftruncate(&memory.fd, bytes).map_err(|source| failed("size", bytes, source))?;
    if memory.seals {
        // A rank that cut it would kill all others by SIGBUS.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&memory.fd, seals).map_err(|source| failed("seal", bytes, source))?;
    }
    Ok(memory)
}

fn failed(what: &'static str, bytes: u64, source: Errno) -> MemoryError {
    match source {
        Errno::FBIG => MemoryError::FileLimit {
            bytes,
            limit_bytes: rustix::process::getrlimit(rustix::process::Resource::Fsize).current,
        },
        source => MemoryError::System { what, bytes, source },
    }
}

/// Makes the pages of the next slab after `present_bytes`; returns where the present part ends now.
pub fn extend(memfd: impl AsFd, present_bytes: u64, capacity_bytes: u64, room: Room) -> Result<u64, MemoryError> {
    let bytes = SLAB_BYTES.min(capacity_bytes.saturating_sub(present_bytes));
    if bytes == 0 {
        return Ok(present_bytes);
    }
    check_room(bytes, room)?;
    loop {
        match fallocate(&memfd, FallocateFlags::empty(), present_bytes, bytes) {
            Ok(()) => return Ok(present_bytes + bytes),
            Err(Errno::INTR) => {}
            Err(source) => return Err(failed("allocate", bytes, source)),
        }
    }
}

/// Gives the pages of `from..to` back to the node. No rank may hold a reference to or a registration of any of them: a
/// GPU would keep reading the old pages, a reader would find zeros.
pub fn punch(memfd: impl AsFd, from: u64, to: u64) -> Result<(), MemoryError> {
    let bytes = to.saturating_sub(from);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if bytes == 0 {
        return Ok(());
    }
    loop {
        match fallocate(&memfd, flags, from, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(source) => return Err(MemoryError::System { what: "give back part of", bytes, source }),
        }
    }
}

/// Bytes of memory behind the mapping now, as the kernel counts them.
pub fn resident_bytes(memfd: impl AsFd) -> u64 {
    rustix::fs::fstat(memfd).map_or(0, |facts| u64::try_from(facts.st_blocks).unwrap_or(0) * 512)
}

fn check_room(asked_bytes: u64, room: Room) -> Result<(), MemoryError> {
    match room() {
        Some(room_bytes) if asked_bytes > room_bytes => Err(MemoryError::NoRoom { asked_bytes, room_bytes }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_node_has_is_refused_with_numbers_before_anything_is_made() {
        let error = create(1 << 60, || Some(1 << 50)).unwrap_err();
        assert!(error.to_string().contains("1152921504606846976 bytes"), "{error}");
        assert!(error.to_string().contains("data.cache_size_gb"), "{error}");
    }

    #[test]
    fn the_mapping_cannot_be_cut_and_its_pages_are_there() {
        let memfd = create(1 << 20, || None).unwrap().fd;
        assert_eq!(extend(&memfd, 0, 1 << 20, || None).unwrap(), 1 << 20);
        assert_eq!(extend(&memfd, 1 << 20, 1 << 20, || None).unwrap(), 1 << 20);
        assert_eq!(ftruncate(&memfd, 0), Err(Errno::PERM));
        assert_eq!(resident_bytes(&memfd), 1 << 20);
        punch(&memfd, 1 << 18, 1 << 20).unwrap();
        assert_eq!(resident_bytes(&memfd), 1 << 18);
        assert_eq!(extend(&memfd, 1 << 18, 1 << 20, || None).unwrap(), 1 << 20);
        assert_eq!(resident_bytes(&memfd), 1 << 20);
    }
}
