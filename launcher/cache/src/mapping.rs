//! Memory that is handed around in owned pieces: a region of this process ([`Piece`]), and the node's page cache
//! ([`SharedMap`]).
//!
//! The one unsafe corner of the page cache and of what reads through it. A [`Piece`] is to its bytes what a `Box<[u8]>` is: the only way to them. A
//! piece can be cut in two and put together again, so that loader threads fill parts of a batch at the same time and
//! the batch is contiguous afterwards. A [`ReadSpan`] or [`WriteSpan`] is the same for a range of the mapping that all
//! ranks share. All of it is behind a safe interface.
#![allow(unsafe_code)]

use crate::error::CacheError;
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::SealFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

/// Pages are what the kernel hands out and what CUDA registers.
const PAGE_BYTES: usize = 4096;

/// A private mapping, given back with its last piece. Bytes are reached through pieces only.
struct Region {
    map: MmapRaw,
}

/// Exclusive owner of `len` bytes from `start` of a region.
///
/// Invariant: the ranges of all pieces of a region are disjoint and inside it. It holds because pieces come from
/// [`Piece::allocate`] (the whole of a new region, once), [`Piece::split_to`] (a range becomes two that cover it), and
/// [`Piece::unsplit`] (two adjacent ranges become one, the other piece is consumed); there is no `Clone`.
pub struct Piece {
    region: Arc<Region>,
    start: usize,
    len: usize,
}

impl Piece {
    /// A new zeroed region of `len` bytes that starts on a page, each page touched.
    ///
    /// # Errors
    /// The kernel has no such room.
    pub fn allocate(len: usize) -> Result<Self, CacheError> {
        let failed = |source| CacheError::NoSlots { bytes: len, source };
        // Not of the heap: there it would take turns with tensors, and how large the heap grows would depend on who came first.
        let map = MmapRaw::from(MmapOptions::new().len(len.max(1)).map_anon().map_err(failed)?);
        let mut piece = Self { region: Arc::new(Region { map }), start: 0, len };
        // Written for the page fault alone; the black box keeps the compiler from knowing the bytes to be zero already.
        let bytes = std::hint::black_box(piece.bytes_mut());
        bytes.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
        Ok(piece)
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start + len` lies inside the region (invariant), which this piece's Arc keeps allocated; the bytes were
        // zeroed by the kernel. By the invariant no other piece reaches them, so whoever could write
        // them needs `&mut self`, which `&self` excludes for the lifetime of the slice.
        unsafe { std::slice::from_raw_parts(self.region.map.as_mut_ptr().add(self.start), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; and `&mut self` makes this the only reference to bytes that only this piece reaches.
        unsafe { std::slice::from_raw_parts_mut(self.region.map.as_mut_ptr().add(self.start), self.len) }
    }

    /// Gives the whole pages within back to the system: they read as zero from now on, and take memory again when
    /// written. Not for memory that a device has registered.
    pub fn give_pages_back(&mut self) {
        let bytes = self.bytes_mut();
        let skip = bytes.as_ptr().align_offset(PAGE_BYTES);
        let Some(whole) = bytes.len().checked_sub(skip).map(|len| len / PAGE_BYTES * PAGE_BYTES) else { return };
        let start = bytes.as_mut_ptr().wrapping_add(skip);
        // SAFETY: whole pages inside a range that only this piece reaches, borrowed mutably above. They are private
        // anonymous memory: the kernel gives zeroed pages in their place, which are valid bytes.
        // A refusal leaves them as they are.
        let _ = unsafe { rustix::mm::madvise(start.cast(), whole, rustix::mm::Advice::LinuxDontNeed) };
    }

    /// Takes the first `at` bytes (at most all) off into a piece of their own.
    pub fn split_to(&mut self, at: usize) -> Self {
        let at = at.min(self.len);
        let head = Self { region: Arc::clone(&self.region), start: self.start, len: at };
        self.start += at;
        self.len -= at;
        head
    }

    /// Appends `next`; gives it back when it does not begin where this piece ends.
    pub fn unsplit(&mut self, next: Self) -> Result<(), Self> {
        if !Arc::ptr_eq(&self.region, &next.region) || self.start + self.len != next.start {
            return Err(next);
        }
        self.len += next.len;
        Ok(())
    }
}

/// The node's page cache as this process maps it, readable and writable.
///
/// Invariant: the ranges of all spans that exist are disjoint and inside the mapping. Each span registers its range in
/// `taken` before it exists and takes it out when dropped, so a directory that grants wrong ranges is refused here.
/// Between processes the same rests on the directory's word: a range has one writer until it is published, and
/// readers alone from then until all have released it. Every process of the job is this program and keeps to it.
pub struct SharedMap {
    map: MmapRaw,
    /// Start → end of every span of this process.
    taken: Mutex<BTreeMap<usize, usize>>,
}

impl SharedMap {
    /// Maps all of `memfd`, with huge pages where the kernel gives them.
    ///
    /// # Errors
    /// It is empty, cannot be mapped, or could shrink: pages that vanish under a reader are fatal to the process, so a
    /// seal has to forbid it.
    pub fn new(memfd: &File) -> Result<Arc<Self>, CacheError> {
        let len = memfd.metadata().map_err(CacheError::Mapping)?.len();
        let len = usize::try_from(len).map_err(|e| CacheError::Mapping(std::io::Error::other(e)))?;
        if len == 0 {
            return Err(CacheError::EmptyMapping);
        }
        let sealed = rustix::fs::fcntl_get_seals(memfd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        // A file without a name, which stands in where memfds are refused, has no seals. No program but those that were given
        // it can reach it, and none of them makes it shorter.
        if !sealed && !is_nameless_file(memfd) {
            rustix::fs::fcntl_add_seals(memfd, SealFlags::SHRINK).map_err(|e| CacheError::NotSealed(e.into()))?;
        }
        let map = MmapOptions::new().len(len).map_raw(memfd).map_err(CacheError::Mapping)?;
        // A hint: without huge pages the cache is only a little slower.
        let _ = map.advise(Advice::HugePage);
        Ok(Arc::new(Self { map, taken: Mutex::default() }))
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the mapping lies in this process.
    pub fn address(&self) -> usize {
        self.map.as_ptr() as usize
    }

    /// A range that the directory granted for reading.
    ///
    /// # Errors
    /// The range is empty, leaves the mapping or touches another span of this process.
    pub fn read_span(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<ReadSpan, String> {
        self.take(offset, bytes).map(ReadSpan)
    }

    /// A range that the directory granted for filling.
    ///
    /// # Errors
    /// As [`SharedMap::read_span`].
    pub fn write_span(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<WriteSpan, String> {
        self.take(offset, bytes).map(WriteSpan)
    }

    fn take(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<Span, String> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.len() as u64);
        if bytes == 0 || !inside {
            return Err(format!("bytes {offset}..+{bytes} granted, the page cache has {}", self.len()));
        }
        // Both are at most the mapping's length, a usize.
        let (start, len) = (offset as usize, bytes as usize);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, to)) = taken.range(..start + len).next_back()
            && *to > start
        {
            return Err(format!("bytes {offset}..+{bytes} granted while {from}..{to} is in use"));
        }
        taken.insert(start, start + len);
        Ok(Span { map: Arc::clone(self), start, len })
    }
}

/// A registered range of the mapping.
struct Span {
    map: Arc<SharedMap>,
    start: usize,
    len: usize,
}

impl Drop for Span {
    fn drop(&mut self) {
        self.map.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.start);
    }
}

/// Bytes of a published entry, while this rank holds a reference to it.
pub struct ReadSpan(Span);

impl ReadSpan {
    /// Where it begins, bytes from the mapping's start.
    pub fn start(&self) -> u64 {
        self.0.start as u64
    }

    /// Where it ends, bytes from the mapping's start.
    pub fn end(&self) -> u64 {
        (self.0.start + self.0.len) as u64
    }

    pub fn bytes(&self) -> &[u8] {
        let Span { map, start, len } = &self.0;
        // SAFETY: `start + len` lies inside the mapping (checked in `take`), which the span's Arc keeps, and the seal
        // keeps its pages. In this process no other span reaches these bytes (`taken`), and a ReadSpan never writes;
        // in other processes nobody writes a published entry before this rank has released it (directory's contract).
        unsafe { std::slice::from_raw_parts(map.map.as_ptr().add(*start), *len) }
    }
}

/// Bytes of an entry that this rank fills.
pub struct WriteSpan(Span);

impl WriteSpan {
    /// Where it begins, bytes from the mapping's start.
    pub fn start(&self) -> u64 {
        self.0.start as u64
    }

    pub fn len(&self) -> usize {
        self.0.len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives up what lies behind the first `len` bytes, at least one of which stays.
    pub fn shorten(&mut self, len: usize) {
        if len > 0 && len < self.0.len {
            let mut taken = self.0.map.taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.insert(self.0.start, self.0.start + len);
            self.0.len = len;
        }
    }

    /// Where it ends, bytes from the mapping's start.
    pub fn end(&self) -> u64 {
        (self.0.start + self.0.len) as u64
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let Span { map, start, len } = &mut self.0;
        // SAFETY: inside the mapping as in `ReadSpan::bytes`; `&mut self` and `taken` make this the only reference in
        // this process, and an entry has one writer and no reader until it is published (directory's contract).
        unsafe { std::slice::from_raw_parts_mut(map.map.as_mut_ptr().add(*start), *len) }
    }

    /// Gives up writing, before the entry is published.
    pub fn freeze(self) -> ReadSpan {
        ReadSpan(self.0)
    }
}

/// True for a deleted file that is no memfd, which could be sealed.
fn is_nameless_file(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let is_memfd = name.map_or(true, |name| name.to_string_lossy().starts_with("/memfd:"));
    !is_memfd && file.metadata().is_ok_and(|facts| facts.nlink() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(bytes: u64, flags: rustix::fs::MemfdFlags) -> File {
        let file = File::from(rustix::fs::memfd_create("cache", flags).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn spans_are_inside_disjoint_and_seen_by_other_mappings() {
        let file = memfd(1 << 16, rustix::fs::MemfdFlags::ALLOW_SEALING);
        let (ours, theirs) = (SharedMap::new(&file).unwrap(), SharedMap::new(&file).unwrap());
        assert_eq!(ours.len(), 1 << 16);
        let mut write = ours.write_span(4096, 100).unwrap();
        write.bytes_mut().fill(7);
        for (offset, bytes) in [(4096, 100), (4195, 1), (4000, 97), (0, 1 << 16), (4100, 10)] {
            assert!(ours.read_span(offset, bytes).err().unwrap().contains("in use"), "{offset} {bytes}");
        }
        for (offset, bytes) in [(1 << 16, 1), (0, (1 << 16) + 1), (u64::MAX, 2), (u64::MAX - 1, u64::MAX), (5, 0)] {
            assert!(ours.write_span(offset, bytes).err().unwrap().contains("the page cache has 65536"));
        }
        let (before, after) = (ours.read_span(4000, 96).unwrap(), ours.read_span(4196, 4).unwrap());
        let read = write.freeze();
        assert!(read.bytes().iter().all(|&byte| byte == 7) && before.bytes().iter().all(|&byte| byte == 0));
        assert_eq!(theirs.read_span(4096, 100).unwrap().bytes(), read.bytes());
        drop((read, after));
        assert!(ours.write_span(4096, 200).is_ok());
        assert!(file.set_len(10).is_err(), "sealed against shrinking");
    }

    #[test]
    fn memory_that_may_shrink_is_refused() {
        let error = |file| SharedMap::new(&file).err().unwrap().to_string();
        assert!(error(memfd(4096, rustix::fs::MemfdFlags::empty())).contains("not sealed"));
        assert!(error(memfd(0, rustix::fs::MemfdFlags::ALLOW_SEALING)).contains("0 bytes"));
        assert!(error(tempfile::tempfile().unwrap()).contains("0 bytes"));
        let named = tempfile::NamedTempFile::new_in("/tmp").unwrap();
        named.as_file().set_len(4096).unwrap();
        assert!(error(named.reopen().unwrap()).contains("not sealed"));
        let nameless = tempfile::tempfile().unwrap();
        nameless.set_len(4096).unwrap();
        assert!(SharedMap::new(&nameless).is_ok());
    }

    #[test]
    fn pieces_are_disjoint_and_join_in_order_only() {
        let mut rest = Piece::allocate(10_000).unwrap();
        assert_eq!(rest.bytes().as_ptr() as usize % PAGE_BYTES, 0);
        assert!(rest.bytes().iter().all(|&byte| byte == 0));
        let mut first = rest.split_to(3_000);
        let mut second = rest.split_to(3_000);
        first.bytes_mut().fill(1);
        second.bytes_mut().fill(2);
        rest.bytes_mut().fill(3);
        assert_eq!((first.len, second.len, rest.len), (3_000, 3_000, 4_000));
        let Err(rest) = first.unsplit(rest) else { panic!("joined what is not adjacent") };
        assert!(first.unsplit(second).is_ok() && first.unsplit(rest).is_ok());
        let counts = [1, 2, 3].map(|value| first.bytes().iter().filter(|&&byte| byte == value).count());
        assert_eq!(counts, [3_000, 3_000, 4_000]);
        assert_eq!([first.bytes()[2_999], first.bytes()[3_000], first.bytes()[6_000]], [1, 2, 3]);
    }

    #[test]
    fn pages_given_back_read_as_zero_and_can_be_written() {
        let mut piece = Piece::allocate(5 * PAGE_BYTES).unwrap();
        piece.bytes_mut().fill(7);
        let mut head = piece.split_to(PAGE_BYTES + 100);
        piece.give_pages_back();
        let zero = piece.bytes().iter().filter(|&&byte| byte == 0).count();
        assert_eq!((zero, piece.len), (3 * PAGE_BYTES, 4 * PAGE_BYTES - 100), "the page shared with `head` stays");
        assert!(head.bytes().iter().all(|&byte| byte == 7));
        piece.bytes_mut().fill(9);
        assert!(piece.bytes().iter().all(|&byte| byte == 9));
        let mut small = head.split_to(10);
        small.give_pages_back();
        assert!(small.bytes().iter().all(|&byte| byte == 7));
    }

    #[test]
    fn pieces_of_other_regions_do_not_join() {
        let mut one = Piece::allocate(64).unwrap();
        let tail = { one.split_to(64) };
        let other = Piece::allocate(64).unwrap();
        assert!(one.unsplit(other).is_err());
        assert_eq!((one.len, tail.len), (0, 64));
        assert_eq!(one.split_to(5).len, 0);
    }

    #[test]
    fn threads_fill_pieces_at_once_and_any_order_of_drops_is_fine() {
        let mut rest = Piece::allocate(1 << 16).unwrap();
        let parts: Vec<Piece> = (0..16).map(|_| rest.split_to(1 << 12)).collect();
        drop(rest);
        let threads: Vec<_> = parts
            .into_iter()
            .enumerate()
            .map(|(value, mut part)| {
                std::thread::spawn(move || {
                    part.bytes_mut().fill(value as u8);
                    part
                })
            })
            .collect();
        let mut parts = threads.into_iter().map(|thread| thread.join().unwrap());
        let mut whole = parts.next().unwrap();
        parts.for_each(|part| assert!(whole.unsplit(part).is_ok()));
        assert!(whole.bytes().chunks(1 << 12).enumerate().all(|(value, part)| part.iter().all(|&b| b == value as u8)));
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(Piece::allocate(usize::MAX - 100).is_err());
        assert_eq!(Piece::allocate(0).unwrap().bytes().len(), 0);
    }
}
