//! HDF5's byte shuffle, undone: planes of bytes transposed back into elements, 16 × 16 at a time.

/// Undoes HDF5's byte shuffle: `src` holds `width` planes (byte k of every element), `dst` gets the elements. Bytes that
/// fill no element are copied, as the filter does. `width` is at least 1; `dst` is as long as `src`.
pub fn unshuffle(src: &[u8], width: usize, dst: &mut [u8]) {
    let elements = src.len() / width;
    let whole = elements * width;
    transpose_into(&src[..whole], width, elements, &mut dst[..whole]);
    dst[whole..src.len()].copy_from_slice(&src[whole..]);
}

/// Planes of `elements` bytes, `width` of them, into elements of `width` bytes.
fn transpose_into(src: &[u8], width: usize, elements: usize, dst: &mut [u8]) {
    let (rows, bytes) = (elements / 16 * 16, width / 16 * 16);
    for row in (0..rows).step_by(16) {
        for byte in (0..bytes).step_by(16) {
            let tile = std::array::from_fn(|k| load(&src[(byte + k) * elements + row..]));
            for (k, lane) in transpose(tile).iter().enumerate() {
                dst[(row + k) * width + byte..][..16].copy_from_slice(lane);
            }
        }
    }
    // The remainder at the right and at the bottom.
    single(src, width, elements, dst, 0..rows, bytes);
    single(src, width, elements, dst, rows..elements, 0);
}

fn load(src: &[u8]) -> [u8; 16] {
    let mut lane = [0; 16];
    lane.copy_from_slice(&src[..16]);
    lane
}

/// Bytes from `first` on of each element in `rows`, eight elements at a time.
fn single(src: &[u8], width: usize, elements: usize, dst: &mut [u8], rows: std::ops::Range<usize>, first: usize) {
    if width - first >= 8 && rows.len() >= 8 && first > 0 {
        return eights(src, width, elements, dst, rows, first);
    }
    for byte in first..width {
        let plane = &src[byte * elements..][..elements];
        for row in rows.clone() {
            dst[row * width + byte] = plane[row];
        }
    }
}

/// The same for 8 bytes of 8 elements at a time; the number of rows is a multiple of 8.
fn eights(src: &[u8], width: usize, elements: usize, dst: &mut [u8], rows: std::ops::Range<usize>, first: usize) {
    for row in rows.clone().step_by(8) {
        let mut tile = [0u64; 8];
        for (k, lane) in tile.iter_mut().enumerate() {
            let mut eight = [0; 8];
            eight.copy_from_slice(&src[(first + k) * elements + row..][..8]);
            *lane = u64::from_le_bytes(eight);
        }
        for (k, lane) in transpose8(tile).iter().enumerate() {
            dst[(row + k) * width + first..][..8].copy_from_slice(&lane.to_le_bytes());
        }
    }
    single(src, width, elements, dst, rows, first + 8);
}

/// Transposes a 16 × 16 matrix of bytes: four perfect shuffles of its rows, which compile to byte interleaves.
#[inline(always)]
fn transpose(mut m: [[u8; 16]; 16]) -> [[u8; 16]; 16] {
    for _ in 0..4 {
        let mut next = [[0; 16]; 16];
        for k in 0..8 {
            (next[2 * k], next[2 * k + 1]) = interleave(m[k], m[k + 8]);
        }
        m = next;
    }
    m
}

#[inline(always)]
fn interleave(a: [u8; 16], b: [u8; 16]) -> ([u8; 16], [u8; 16]) {
    let zip = |from: usize| std::array::from_fn(|i| if i % 2 == 0 { a[from + i / 2] } else { b[from + i / 2] });
    (zip(0), zip(8))
}

/// Transposes an 8×8 matrix of bytes, one row per little-endian word, by halves, quarters and pairs.
fn transpose8(mut m: [u64; 8]) -> [u64; 8] {
    const HALF: u64 = 0x0000_0000_FFFF_FFFF;
    const QUARTER: u64 = 0x0000_FFFF_0000_FFFF;
    const PAIR: u64 = 0x00FF_00FF_00FF_00FF;
    let mut exchange = |i: usize, j: usize, mask: u64, shift: u32| {
        let (a, b) = (m[i], m[j]);
        m[i] = (a & mask) | ((b & mask) << shift);
        m[j] = ((a >> shift) & mask) | (b & !mask);
    };
    for i in 0..4 {
        exchange(i, i + 4, HALF, 32);
    }
    for i in [0, 1, 4, 5] {
        exchange(i, i + 2, QUARTER, 16);
    }
    for i in [0, 2, 4, 6] {
        exchange(i, i + 1, PAIR, 8);
    }
    m
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn shuffle(src: &[u8], width: usize) -> Vec<u8> {
        let elements = src.len() / width;
        let mut out = src.to_vec();
        for element in 0..elements {
            for byte in 0..width {
                out[byte * elements + element] = src[element * width + byte];
            }
        }
        out
    }

    proptest! {
        #[test]
        fn unshuffle_undoes_shuffle(src in proptest::collection::vec(any::<u8>(), 0..2500), width in 1usize..70) {
            let mut back = vec![0; src.len()];
            unshuffle(&shuffle(&src, width), width, &mut back);
            prop_assert_eq!(back, src);
        }
    }
}
