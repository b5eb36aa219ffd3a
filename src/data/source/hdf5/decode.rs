//! Filters of an HDF5 chunk, undone: Fletcher32 checked, deflate by libdeflate, byte shuffle transposed back.
//!
//! Sizes are exact: a chunk that inflates to anything but its rows is an error, never a short or a padded result.

use super::{Filter, Table};
use libdeflater::{DecompressionError, Decompressor};

/// What a thread keeps for decoding.
pub struct Inflater(Decompressor);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompressor::new())
    }
}

/// Decodes the stored bytes of a chunk of `chunk_rows` rows into the columns in use, which fill `out` exactly. `stored`
/// and `spare` are scratch.
///
/// # Errors
/// What is wrong with the bytes, without file and chunk.
#[expect(clippy::too_many_arguments, reason = "a chunk, how it is stored, and the buffers")]
pub fn decode_into(
    table: &Table,
    chunk_rows: usize,
    filters: &[Filter],
    filter_mask: u32,
    stored: &mut Vec<u8>,
    spare: &mut Vec<u8>,
    inflater: &mut Inflater,
    out: &mut [u8],
) -> Result<(), String> {
    let decoded_bytes = chunk_rows * table.row_bytes;
    let active = |n: usize| filter_mask & (1 << n) == 0;
    for (n, filter) in filters.iter().enumerate().rev().filter(|(n, _)| active(*n)) {
        match filter {
            Filter::Fletcher32 => check_fletcher32(stored)?,
            Filter::Deflate => {
                let checksums = (0..n).filter(|n| active(*n) && filters[*n] == Filter::Fletcher32).count();
                inflate(stored, spare, decoded_bytes + 4 * checksums, inflater)?;
                std::mem::swap(stored, spare);
            }
            // The first filter of the file is the last here: its planes go straight into columns.
            Filter::Shuffle if n == 0 && table.element_bytes == table.row_bytes => {
                exact(stored.len(), decoded_bytes)?;
                return columns_of_planes(table, chunk_rows, stored, out);
            }
            Filter::Shuffle => {
                spare.clear();
                spare.resize(stored.len(), 0);
                unshuffle(stored, table.element_bytes, spare);
                std::mem::swap(stored, spare);
            }
        }
    }
    exact(stored.len(), decoded_bytes)?;
    columns_of_rows(table, chunk_rows, stored, out)
}

fn exact(bytes: usize, expected: usize) -> Result<(), String> {
    if bytes == expected {
        return Ok(());
    }
    Err(format!("decodes to {bytes} bytes, {expected} expected: the file is damaged, replace it or leave it out"))
}

fn inflate(stored: &[u8], out: &mut Vec<u8>, expected: usize, inflater: &mut Inflater) -> Result<(), String> {
    out.resize(expected, 0);
    match inflater.0.zlib_decompress(stored, out) {
        Ok(bytes) => exact(bytes, expected),
        Err(DecompressionError::BadData) => {
            Err("its deflate stream is corrupt: the file is damaged, replace it or leave it out".into())
        }
        Err(DecompressionError::InsufficientSpace) => {
            Err(format!("inflates to more than the {expected} bytes of its rows: the file is damaged or hostile"))
        }
    }
}

/// Splits rows into columns, one after the other.
pub(super) fn columns_of_rows(table: &Table, rows: usize, src: &[u8], out: &mut [u8]) -> Result<(), String> {
    exact(out.len(), rows * table.used_row_bytes())?;
    let mut rest = out;
    for member in &table.members {
        let (column, tail) = std::mem::take(&mut rest).split_at_mut(rows * member.width());
        for (row, out) in src.chunks_exact(table.row_bytes).zip(column.chunks_exact_mut(member.width())) {
            out.copy_from_slice(&row[member.offset..member.offset + member.width()]);
        }
        rest = tail;
    }
    Ok(())
}

/// The planes of one field are themselves a shuffled column, so unused fields are never touched.
fn columns_of_planes(table: &Table, rows: usize, src: &[u8], out: &mut [u8]) -> Result<(), String> {
    exact(out.len(), rows * table.used_row_bytes())?;
    let mut rest = out;
    for member in &table.members {
        let (column, tail) = std::mem::take(&mut rest).split_at_mut(rows * member.width());
        let planes = &src[rows * member.offset..rows * (member.offset + member.width())];
        unshuffle(planes, member.width(), column);
        rest = tail;
    }
    Ok(())
}

/// Undoes HDF5's byte shuffle: `src` holds `width` planes (byte k of every element), `dst` gets the elements. Bytes that
/// fill no element are copied, as the filter does.
pub fn unshuffle(src: &[u8], width: usize, dst: &mut [u8]) {
    let elements = src.len() / width;
    let (rows8, bytes8) = (elements / 8 * 8, width / 8 * 8);
    for row in (0..rows8).step_by(8) {
        for byte in (0..bytes8).step_by(8) {
            let mut tile = [0u64; 8];
            for (k, lane) in tile.iter_mut().enumerate() {
                let at = (byte + k) * elements + row;
                let mut eight = [0; 8];
                eight.copy_from_slice(&src[at..at + 8]);
                *lane = u64::from_le_bytes(eight);
            }
            for (k, lane) in transpose(tile).iter().enumerate() {
                let at = (row + k) * width + byte;
                dst[at..at + 8].copy_from_slice(&lane.to_le_bytes());
            }
        }
        for byte in bytes8..width {
            for k in row..row + 8 {
                dst[k * width + byte] = src[byte * elements + k];
            }
        }
    }
    for row in rows8..elements {
        for byte in 0..width {
            dst[row * width + byte] = src[byte * elements + row];
        }
    }
    let whole = elements * width;
    dst[whole..src.len()].copy_from_slice(&src[whole..]);
}

/// Transposes an 8×8 matrix of bytes, one row per little-endian word, by halves, quarters and pairs.
fn transpose(mut m: [u64; 8]) -> [u64; 8] {
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

/// Checks and removes the trailing checksum.
fn check_fletcher32(stored: &mut Vec<u8>) -> Result<(), String> {
    let Some(data_len) = stored.len().checked_sub(4) else {
        return Err("is too short for its checksum".into());
    };
    let mut found = [0; 4];
    found.copy_from_slice(&stored[data_len..]);
    let want = fletcher32(&stored[..data_len]).to_le_bytes();
    // libhdf5 before 1.6.3 wrote the halves' bytes the other way round on little-endian machines.
    let old = [want[1], want[0], want[3], want[2]];
    if found != want && found != old {
        return Err("its Fletcher32 checksum does not match: the file is damaged, replace it or leave it out".into());
    }
    stored.truncate(data_len);
    Ok(())
}

/// Fletcher's checksum over big-endian 16-bit words, as libhdf5's filter 3 computes it.
pub fn fletcher32(data: &[u8]) -> u32 {
    let (mut sum1, mut sum2) = (0u32, 0u32);
    let fold = |sum: u32| (sum & 0xFFFF) + (sum >> 16);
    let (words, odd) = data.as_chunks::<2>();
    // 360 words are the most that cannot overflow 32 bits.
    for block in words.chunks(360) {
        for word in block {
            sum1 += u32::from(u16::from_be_bytes(*word));
            sum2 += sum1;
        }
        (sum1, sum2) = (fold(sum1), fold(sum2));
    }
    if let [last] = odd {
        sum1 += u32::from(*last) << 8;
        sum2 += sum1;
        (sum1, sum2) = (fold(sum1), fold(sum2));
    }
    (fold(sum2) << 16) | fold(sum1)
}

#[cfg(test)]
mod tests {
    use super::super::{Layout, Member, Order, Scalar};
    use super::*;
    use proptest::prelude::*;

    fn shuffle(src: &[u8], width: usize) -> Vec<u8> {
        let elements = src.len() / width;
        let mut out = src.to_vec();
        for element in 0..elements {
            for byte in 0..width {
                out[byte * elements + element] = src[element * width + byte];
            }
        }
        out
    }

    fn table(rows: u64) -> Table {
        let member = |offset, scalar, len| Member { name: String::new(), offset, scalar, order: Order::Little, len };
        Table {
            path: "t.hdf5".into(),
            dataset: "g/t".into(),
            rows,
            row_bytes: 29,
            element_bytes: 29,
            plain: false,
            members: vec![member(17, Scalar::F32, 3), member(1, Scalar::F64, 2)],
            layout: Layout::Contiguous { addr: 0 },
            file_bytes: 1 << 30,
            modified_ns: 0,
        }
    }

    fn run(bytes: &[u8], filters: &[Filter], mask: u32) -> Result<Vec<u8>, String> {
        let (mut stored, mut spare, mut inflater) = (bytes.to_vec(), Vec::new(), Inflater::default());
        let mut out = vec![0; 13 * 28];
        decode_into(&table(13), 13, filters, mask, &mut stored, &mut spare, &mut inflater, &mut out).map(|()| out)
    }

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut compressor = libdeflater::Compressor::default();
        let mut out = vec![0; compressor.zlib_compress_bound(bytes.len())];
        let n = compressor.zlib_compress(bytes, &mut out).unwrap();
        out.truncate(n);
        out
    }

    fn with_checksum(bytes: &[u8]) -> Vec<u8> {
        [bytes, &fletcher32(bytes).to_le_bytes()].concat()
    }

    #[test]
    fn filters_are_undone_in_every_order() {
        let rows: Vec<u8> = (0..13 * 29).map(|i| (i * 7 % 251) as u8).collect();
        let plain = run(&rows, &[], 0).unwrap();
        assert_eq!(plain.len(), 13 * 28);
        assert_eq!(plain[..12], rows[17..29]);
        assert_eq!(plain[13 * 12..13 * 12 + 16], rows[1..17]);
        let full = with_checksum(&deflate(&shuffle(&rows, 29)));
        assert_eq!(run(&full, &[Filter::Shuffle, Filter::Deflate, Filter::Fletcher32], 0).unwrap(), plain);
        let inner = deflate(&with_checksum(&shuffle(&rows, 29)));
        assert_eq!(run(&inner, &[Filter::Shuffle, Filter::Fletcher32, Filter::Deflate], 0).unwrap(), plain);
        let outer = shuffle(&with_checksum(&rows), 29);
        assert_eq!(run(&outer, &[Filter::Fletcher32, Filter::Shuffle], 0).unwrap(), plain);
        // A filter whose bit is set was not applied.
        assert_eq!(run(&rows, &[Filter::Shuffle, Filter::Deflate], 0b11).unwrap(), plain);
        assert_eq!(run(&shuffle(&rows, 29), &[Filter::Shuffle, Filter::Deflate], 0b10).unwrap(), plain);
    }

    #[test]
    fn a_chunk_that_inflates_to_too_little_or_too_much_is_refused() {
        let filters = [Filter::Deflate];
        let short = run(&deflate(&[0; 13 * 29 - 1]), &filters, 0).unwrap_err();
        assert!(short.contains("decodes to 376 bytes, 377 expected"), "{short}");
        let bomb = run(&deflate(&vec![0; 10 << 20]), &filters, 0).unwrap_err();
        assert!(bomb.contains("inflates to more than the 377 bytes"), "{bomb}");
        let cut = run(&deflate(&[7; 13 * 29])[..10], &filters, 0).unwrap_err();
        assert!(cut.contains("corrupt"), "{cut}");
        let wrong = run(&[0; 13 * 29 + 4].map(|_: u8| 3), &[Filter::Fletcher32], 0).unwrap_err();
        assert!(wrong.contains("Fletcher32"), "{wrong}");
        assert!(run(&[1, 2], &[Filter::Fletcher32], 0).unwrap_err().contains("too short"));
    }

    proptest! {
        #[test]
        fn unshuffle_undoes_shuffle(src in proptest::collection::vec(any::<u8>(), 0..900), width in 1usize..70) {
            let mut back = vec![0; src.len()];
            unshuffle(&shuffle(&src, width), width, &mut back);
            prop_assert_eq!(back, src);
        }

        #[test]
        fn damaged_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), mask in 0u32..8, order in 0usize..6) {
            use Filter::{Deflate, Fletcher32, Shuffle};
            let orders = [
                [Shuffle, Deflate, Fletcher32], [Shuffle, Fletcher32, Deflate], [Deflate, Shuffle, Fletcher32],
                [Deflate, Fletcher32, Shuffle], [Fletcher32, Shuffle, Deflate], [Fletcher32, Deflate, Shuffle],
            ];
            if let Ok(chunk) = run(&bytes, &orders[order], mask) {
                prop_assert_eq!(chunk.len(), 13 * 28);
            }
        }

        #[test]
        fn a_changed_bit_never_passes_the_checksum(mut bytes in proptest::collection::vec(any::<u8>(), 1..400), at in any::<usize>()) {
            let sum = fletcher32(&bytes);
            let at = at % bytes.len();
            bytes[at] ^= 1;
            prop_assert_ne!(fletcher32(&bytes), sum);
        }
    }
}
