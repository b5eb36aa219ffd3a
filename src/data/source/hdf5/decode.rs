//! Filters of an HDF5 chunk, undone: Fletcher32 checked, deflate by libdeflate, lzf and lz4, byte shuffle transposed back.
//!
//! Sizes are exact: a chunk that inflates to anything but its rows is an error, never a short or a padded result. Memory
//! is bounded by the chunk's rows, whatever its bytes promise.

use super::bitshuffle::unbitshuffle;
use super::compress::{damaged, too_much, unlz4, unlzf, unzstd};
use super::shuffle::unshuffle;
use super::{Filter, Table};
use libdeflater::{DecompressionError, Decompressor};

/// Decoder that a thread keeps.
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
            Filter::Deflate | Filter::Lzf | Filter::Lz4 | Filter::Zstd | Filter::Bitshuffle { .. } => {
                let room = room_after(filters, n, &active, decoded_bytes);
                inflate(*filter, stored, spare, room, inflater)?;
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

/// How the bytes of a chunk were stored.
pub struct Stored<'a> {
    pub filters: &'a [Filter],
    /// Bit i: filter i was not applied.
    pub filter_mask: u32,
    /// Bytes of the elements that shuffles took apart.
    pub element_bytes: usize,
    /// Bytes without filters.
    pub decoded_bytes: usize,
}

/// Undoes the filters of `bytes`, which are the chunk's own then. `spare` is scratch.
///
/// # Errors
/// What is wrong with the bytes, without file and chunk.
pub fn undo(chunk: &Stored, bytes: &mut Vec<u8>, spare: &mut Vec<u8>, inflater: &mut Inflater) -> Result<(), String> {
    let Stored { filters, filter_mask, element_bytes, decoded_bytes } = *chunk;
    let active = |n: usize| filter_mask & (1 << n) == 0;
    for (n, filter) in filters.iter().enumerate().rev().filter(|(n, _)| active(*n)) {
        match filter {
            Filter::Fletcher32 => check_fletcher32(bytes)?,
            Filter::Shuffle => {
                spare.clear();
                spare.resize(bytes.len(), 0);
                unshuffle(bytes, element_bytes.max(1), spare);
                std::mem::swap(bytes, spare);
            }
            _ => {
                let room = room_after(filters, n, &active, decoded_bytes);
                inflate(*filter, bytes, spare, room, inflater)?;
                std::mem::swap(bytes, spare);
            }
        }
    }
    exact(bytes.len(), decoded_bytes)
}

fn exact(bytes: usize, expected: usize) -> Result<(), String> {
    if bytes == expected {
        return Ok(());
    }
    Err(damaged(&format!("decodes to {bytes} bytes, {expected} expected")))
}

/// Most bytes that may come out of compressor `n`: the rows and the checksums added before it; a compressor below it may
/// have made them a little longer.
fn room_after(filters: &[Filter], n: usize, active: &impl Fn(usize) -> bool, decoded_bytes: usize) -> usize {
    let below = || filters[..n].iter().enumerate().filter(|(n, _)| active(*n)).map(|(_, filter)| filter);
    let checksums = below().filter(|filter| **filter == Filter::Fletcher32).count();
    let longer = if below().any(|filter| filter.compresses()) { decoded_bytes / 8 + 1024 } else { 0 };
    decoded_bytes + 4 * checksums + longer
}

/// Replaces `out` by what `stored` holds, at most `room` bytes.
fn inflate(
    filter: Filter,
    stored: &[u8],
    out: &mut Vec<u8>,
    room: usize,
    inflater: &mut Inflater,
) -> Result<(), String> {
    out.resize(room, 0);
    let bytes = match filter {
        Filter::Lzf => unlzf(stored, out)?,
        Filter::Lz4 => unlz4(stored, out)?,
        Filter::Zstd => unzstd(stored, out)?,
        Filter::Bitshuffle { element_bytes, block_elements, codec } => {
            unbitshuffle(stored, out, element_bytes as usize, block_elements as usize, codec)?
        }
        _ => inflater.0.zlib_decompress(stored, out).map_err(|error| match error {
            DecompressionError::BadData => damaged("its deflate stream is corrupt"),
            DecompressionError::InsufficientSpace => too_much(room),
        })?,
    };
    out.truncate(bytes);
    Ok(())
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
        return Err(damaged("its Fletcher32 checksum does not match"));
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
    use super::super::compress::tests::{lz4, lzf};
    use super::super::shuffle::tests::shuffle;
    use super::super::{Layout, Member, Order, Scalar};
    use super::*;
    use proptest::prelude::*;

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
            unwritten: Vec::new(),
            others: Vec::new(),
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

    /// Applies filters as a writer does.
    fn encode(rows: &[u8], filters: &[Filter]) -> Vec<u8> {
        filters.iter().fold(rows.to_vec(), |bytes, filter| match filter {
            Filter::Shuffle => shuffle(&bytes, 29),
            Filter::Deflate => deflate(&bytes),
            Filter::Fletcher32 => with_checksum(&bytes),
            Filter::Lzf => lzf(&bytes),
            Filter::Lz4 => lz4(&bytes, 100),
            Filter::Zstd => zstd::bulk::compress(&bytes, 3).unwrap(),
            Filter::Bitshuffle { .. } => unreachable!("tested beside the filter"),
        })
    }

    /// Every order of up to three filters, none twice.
    fn pipelines() -> Vec<Vec<Filter>> {
        use Filter::{Deflate, Fletcher32, Lz4, Lzf, Shuffle, Zstd};
        let mut all: Vec<Vec<Filter>> = vec![vec![]];
        for _ in 0..3 {
            let longer = all.iter().flat_map(|pipeline| {
                [Shuffle, Deflate, Fletcher32, Lzf, Lz4, Zstd].map(|filter| [&pipeline[..], &[filter]].concat())
            });
            let longer: Vec<_> =
                longer.filter(|p| p.iter().all(|f| p.iter().filter(|g| *g == f).count() == 1)).collect();
            all.extend(longer);
        }
        all.sort_by_key(|pipeline| pipeline.len());
        all.dedup();
        all
    }

    #[test]
    fn every_order_of_filters_is_undone() {
        let rows: Vec<u8> = (0..13 * 29).map(|i| (i / 5 * 7 % 19) as u8).collect();
        let plain = run(&rows, &[], 0).unwrap();
        for filters in pipelines() {
            assert_eq!(run(&encode(&rows, &filters), &filters, 0).unwrap(), plain, "{filters:?}");
        }
    }

    /// Cases in all; `HEADROOM_FUZZ_CASES` gives another number.
    fn fuzz_cases() -> u64 {
        std::env::var("HEADROOM_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000_000)
    }

    struct Dice(u64);

    impl Dice {
        /// Below `bound`, by splitmix64 (Steele, Lea, Flood 2014).
        fn roll(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((x ^ (x >> 31)) % bound.max(1) as u64) as usize
        }
    }

    fn mutate(bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
        for _ in 0..1 + dice.roll(3) {
            let at = dice.roll(bytes.len());
            match dice.roll(7) {
                0 => bytes.truncate(at),
                1 => bytes.splice(at..at, other.iter().copied().take(dice.roll(40))).for_each(drop),
                2 => bytes.splice(at.., other[dice.roll(other.len())..].iter().copied()).for_each(drop),
                3 => bytes.extend((0..dice.roll(30)).map(|i| i as u8)),
                4 if at < bytes.len() => bytes[at] = [0, 1, 0x1F, 0x20, 0x7F, 0x80, 0xE0, 0xFF][dice.roll(8)],
                5 => bytes.iter_mut().for_each(|byte| *byte ^= dice.roll(256) as u8),
                _ if at < bytes.len() => bytes[at] ^= 1 << dice.roll(8),
                _ => {}
            }
        }
    }

    /// A million damaged chunks through every order of filters: an error or the exact number of bytes, scratch bounded.
    #[test]
    fn a_million_damaged_chunks_never_panic() {
        let rows: Vec<u8> = (0..13 * 29).map(|i| (i / 5 * 7 % 19) as u8).collect();
        let corpus: Vec<_> = pipelines().into_iter().map(|p| (encode(&rows, &p), p)).collect();
        let (table, mut inflater, mut dice) = (table(13), Inflater::default(), Dice(7));
        let (mut stored, mut spare) = (Vec::new(), Vec::new());
        let (mut accepted, mut refused, mut out) = (0u64, 0u64, vec![0; 13 * 28]);
        for case in 0..fuzz_cases() {
            let (bytes, filters) = &corpus[case as usize % corpus.len()];
            stored.clone_from(bytes);
            mutate(&mut stored, &corpus[dice.roll(corpus.len())].0, &mut dice);
            let mask = if dice.roll(8) == 0 { dice.roll(8) as u32 } else { 0 };
            match decode_into(&table, 13, filters, mask, &mut stored, &mut spare, &mut inflater, &mut out) {
                Ok(()) => accepted += 1,
                Err(problem) => refused += u64::from(!problem.is_empty()),
            }
            assert!(spare.capacity() < 16_384 && stored.capacity() < 16_384, "case {case}: scratch grows");
        }
        assert_eq!(accepted + refused, fuzz_cases());
        assert!(accepted > 0 && refused > accepted, "{accepted} accepted, {refused} refused");
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
        fn a_changed_bit_never_passes_the_checksum(mut bytes in proptest::collection::vec(any::<u8>(), 1..400), at in any::<usize>()) {
            let sum = fletcher32(&bytes);
            let at = at % bytes.len();
            bytes[at] ^= 1;
            prop_assert_ne!(fletcher32(&bytes), sum);
        }
    }
}
