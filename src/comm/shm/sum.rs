//! Sums of equal ranges of several buffers, written back to all of them.

#![allow(unsafe_code)]

use std::ops::AddAssign;

/// Elements summed at a time: 4 KiB of f32 stay in the first-level cache.
const BLOCK: usize = 1024;

/// `buffers[0][i] + buffers[1][i] + ...`, added in this order, into every `buffers[r][i]`, for `i < len`.
///
/// # Safety
/// Each pointer must be aligned, valid for reads and writes of `len` elements, and nobody else may access these
/// elements meanwhile; the ranges must not overlap.
pub(super) unsafe fn sum_into_all<T: Copy + Default + AddAssign>(buffers: &[*mut T], len: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller vouches for the rest.
        return unsafe { with_avx2(buffers, len) };
    }
    // SAFETY: as the caller promises.
    unsafe { blocks(buffers, len) }
}

// Wider registers change no result: each element is added in the same order, and nothing is contracted.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn with_avx2<T: Copy + Default + AddAssign>(buffers: &[*mut T], len: usize) {
    // SAFETY: as the caller of `sum_into_all` promises.
    unsafe { blocks(buffers, len) }
}

#[inline(always)]
unsafe fn blocks<T: Copy + Default + AddAssign>(buffers: &[*mut T], len: usize) {
    let mut sum = [T::default(); BLOCK];
    let mut start = 0;
    while start < len {
        let n = BLOCK.min(len - start);
        let sum = &mut sum[..n];
        for (rank, buffer) in buffers.iter().enumerate() {
            // SAFETY: start + n <= len; shared reads only, until the writes below.
            let part = unsafe { std::slice::from_raw_parts(buffer.add(start), n) };
            if rank == 0 {
                sum.copy_from_slice(part);
            } else {
                sum.iter_mut().zip(part).for_each(|(s, &x)| *s += x);
            }
        }
        for buffer in buffers {
            // SAFETY: start + n <= len, and `sum` is memory of our own.
            unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), buffer.add(start), n) };
        }
        start += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_in_rank_order_whatever_the_length() {
        for len in [0, 1, 1023, 1024, 2500] {
            let mut buffers: Vec<Vec<f32>> = vec![vec![1e8; len], vec![-1e8; len], vec![1.0; len]];
            let pointers: Vec<*mut f32> = buffers.iter_mut().map(|b| b.as_mut_ptr()).collect();
            // SAFETY: three distinct vectors of `len` elements.
            unsafe { sum_into_all(&pointers, len) };
            // Any other order would lose the 1.
            assert!(buffers.iter().flatten().all(|&x| x == 1.0));
        }
    }
}
