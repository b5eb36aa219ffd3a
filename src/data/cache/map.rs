//! Memory that is handed around in owned pieces: one aligned region that is handed around in disjoint owned pieces.
//!
//! The one unsafe corner of the data rooms. A [`Piece`] is to its bytes what a `Box<[u8]>` is: the only way to them. A
//! piece can be cut in two and put together again, so that loader threads fill parts of a batch at the same time and
//! the batch is contiguous afterwards. All of it is behind a safe interface.
#![allow(unsafe_code)]

use crate::data::DataError;
use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Arc;

/// Pages are what the kernel hands out and what CUDA registers.
const PAGE_BYTES: usize = 4096;

/// An allocation, freed with its last piece. Bytes are reached through pieces only.
struct Region {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a Region is an address and a layout. It never reads or writes its bytes (only pieces do, see there) and is
// freed once, by whichever thread drops the last Arc; the global allocator may be called from any thread.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives away nothing but two immutable values.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this very layout (`Piece::allocate` is the only constructor), and
        // the last Arc is being dropped, so no piece is left to point here.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
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
    /// The allocator has no such room.
    pub fn allocate(len: usize) -> Result<Self, DataError> {
        let failed = || {
            DataError::Other(format!(
                "no memory for {len} bytes of batch slots: lower train.batch_size or train.prefetch_factor"
            ))
        };
        let layout = Layout::from_size_align(len.max(1), PAGE_BYTES).map_err(|_| failed())?;
        // SAFETY: the layout's size is at least 1.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(failed)?;
        let mut piece = Self { region: Arc::new(Region { base, layout }), start: 0, len };
        // Written for the page fault alone; the black box keeps the compiler from knowing the bytes to be zero already.
        let bytes = std::hint::black_box(piece.bytes_mut());
        bytes.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
        Ok(piece)
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start + len` lies inside the region (invariant), which this piece's Arc keeps allocated; the bytes were
        // initialised by `alloc_zeroed`. By the invariant no other piece reaches them, so whoever could write
        // them needs `&mut self`, which `&self` excludes for the lifetime of the slice.
        unsafe { std::slice::from_raw_parts(self.region.base.as_ptr().add(self.start), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; and `&mut self` makes this the only reference to bytes that only this piece reaches.
        unsafe { std::slice::from_raw_parts_mut(self.region.base.as_ptr().add(self.start), self.len) }
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

#[cfg(test)]
mod tests {
    use super::*;

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
