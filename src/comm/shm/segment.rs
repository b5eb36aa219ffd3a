//! The node's shared memory: a header of atomics, then regions with one slice per rank.
//!
//! No lock lives in it and all-zero is a valid state, so a rank may die at any instruction.

#![allow(unsafe_code)]

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

/// Most ranks on one node.
pub(super) const MAX_RANKS: usize = 256;
const PAGE: usize = 4096;
/// Added to a slice's length, so that equal offsets in the slices of different ranks do not fall on equal page
/// offsets: loads would wait for stores of another slice.
const STAGGER: usize = 1088;

/// A word on a separate cache line.
#[repr(C, align(128))]
pub(super) struct Line(pub AtomicU32);

/// Messages of one rank to the others.
#[repr(C, align(128))]
pub(super) struct RankLine {
    /// The generation that the last barrier this rank came to will end with.
    pub arrived_at: AtomicU32,
    /// 1 while this rank sums chunks.
    pub working: AtomicU32,
    /// 0 until the rank has joined.
    pub pid: AtomicU32,
    /// 0, or the error number of its last growth.
    pub status: AtomicI32,
    /// Inode of its process-id namespace: process ids mean nothing across two.
    pub pid_namespace: AtomicU64,
    /// Arguments of the rank's call, for barriers of even and odd generations: a rank may be one barrier ahead, never
    /// two.
    pub call: [[AtomicU64; 4]; 2],
}

#[repr(C)]
pub(super) struct Header {
    pub world: Line,
    /// Counts barriers in steps of 2; bit 0 is [`super::sync::POISON`].
    pub generation: Line,
    pub arrived: Line,
    pub next_chunk: Line,
    /// Counts summed chunks in steps of 2; bit 0 as in `generation`.
    pub done: Line,
    /// The rank that is to blame for the poison, plus 1.
    pub culprit: Line,
    pub ranks: [RankLine; MAX_RANKS],
}

/// The file behind the shared memory, and its mapped header.
pub(super) struct Segment {
    fd: OwnedFd,
    header: MmapRaw,
}

/// A part of the file with one slice per rank, mapped by this process.
pub(super) struct Region {
    map: MmapRaw,
    stride: usize,
    /// Usable bytes of each slice.
    pub slice_bytes: usize,
}

impl Segment {
    /// Maps the header, making room for it when the file is new.
    pub fn open(fd: OwnedFd) -> Result<Segment, Errno> {
        let bytes = Self::header_bytes();
        reserve(&fd, 0, bytes)?;
        // The mappings rely on a file that never shrinks. A memfd made without seals cannot promise it by law.
        let _ = fcntl_add_seals(&fd, SealFlags::SHRINK);
        let header = map(&fd, 0, bytes)?;
        Ok(Segment { fd, header })
    }

    /// Bytes before the first region.
    pub fn header_bytes() -> usize {
        size_of::<Header>().next_multiple_of(PAGE)
    }

    pub fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned, holds `header_bytes` reserved bytes and lives as long as self; Header is
        // made of atomics only, for which every bit pattern is valid and shared access is allowed.
        unsafe { &*self.header.as_ptr().cast::<Header>() }
    }

    /// Bytes that a region takes in the file.
    pub fn region_bytes(slice_bytes: usize, world: usize) -> Option<usize> {
        stride(slice_bytes)?.checked_mul(world)?.checked_next_multiple_of(PAGE)
    }

    /// Reserves memory for a region, so that touching it later cannot fail.
    pub fn reserve(&self, offset: usize, bytes: usize) -> Result<(), Errno> {
        // A memfd has no size limit: fallocate would continue until the kernel kills a process.
        if available_bytes().is_some_and(|available| bytes as u64 > available) {
            return Err(Errno::NOMEM);
        }
        reserve(&self.fd, offset, bytes)
    }

    /// Maps a reserved region.
    pub fn map(&self, offset: usize, slice_bytes: usize, world: usize) -> Result<Region, Errno> {
        let (stride, bytes) = stride(slice_bytes).zip(Self::region_bytes(slice_bytes, world)).ok_or(Errno::OVERFLOW)?;
        Ok(Region { map: map(&self.fd, offset, bytes)?, stride, slice_bytes })
    }
}

impl Region {
    /// Start of a rank's slice, 64-byte aligned.
    pub fn slice(&self, rank: usize) -> *mut u8 {
        // Stays inside: the region was mapped with `stride` bytes for each rank.
        self.map.as_mut_ptr().wrapping_add(rank * self.stride)
    }
}

fn stride(slice_bytes: usize) -> Option<usize> {
    slice_bytes.checked_next_multiple_of(PAGE)?.checked_add(STAGGER)
}

fn available_bytes() -> Option<u64> {
    use procfs::Current;
    procfs::Meminfo::current().ok()?.mem_available
}

fn reserve(fd: &OwnedFd, offset: usize, bytes: usize) -> Result<(), Errno> {
    loop {
        match fallocate(fd.as_fd(), FallocateFlags::empty(), offset as u64, bytes as u64) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

fn map(fd: &OwnedFd, offset: usize, bytes: usize) -> Result<MmapRaw, Errno> {
    let failed = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::INVAL);
    let map = MmapOptions::new().offset(offset as u64).len(bytes).map_raw(fd).map_err(failed)?;
    // Both are about speed alone: larger pages where the kernel allows them, and no page faults in the first steps.
    let _ = map.advise(Advice::HugePage);
    let _ = map.advise(Advice::PopulateWrite);
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn slices_are_apart_aligned_and_shared_between_mappings() {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let segment = Segment::open(fd).unwrap();
        let at = Segment::header_bytes();
        segment.reserve(at, Segment::region_bytes(100, 3).unwrap()).unwrap();
        let (a, b) = (segment.map(at, 100, 3).unwrap(), segment.map(at, 100, 3).unwrap());
        for rank in 0..3 {
            assert_eq!(a.slice(rank) as usize % 64, 0);
            // SAFETY: byte 99 of a slice of 100.
            unsafe { *a.slice(rank).add(99) = rank as u8 + 1 };
        }
        // SAFETY: as above, nobody writes any more.
        let seen: Vec<u8> = (0..3).map(|rank| unsafe { *b.slice(rank).add(99) }).collect();
        assert_eq!(seen, [1, 2, 3]);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        assert_eq!(Segment::region_bytes(usize::MAX - 10, 3), None);
        assert_eq!(Segment::region_bytes(usize::MAX / 2, 3), None);
    }
}
