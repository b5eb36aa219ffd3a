//! Compressors of HDF5 chunks beside deflate: LZF as h5py writes it, and LZ4 in the framing of HDF5's registered filter.
//!
//! Every length is checked against the bytes there are and the room given: damaged input is an error, never a panic.

/// HDF5's registered number of h5py's LZF.
pub const LZF_ID: i32 = 32000;
/// HDF5's registered number of LZ4.
pub const LZ4_ID: i32 = 32004;
/// HDF5's registered number of Zstandard.
pub const ZSTD_ID: i32 = 32015;

/// Undoes Zstandard frames. Returns the bytes written to the start of `out`.
///
/// # Errors
/// A frame is corrupt, or holds more than `out`.
pub fn unzstd(stored: &[u8], out: &mut [u8]) -> Result<usize, String> {
    let room = out.len();
    zstd::bulk::decompress_to_buffer(stored, out).map_err(|error| match error.to_string() {
        words if words.contains("too small") => too_much(room),
        words => damaged(&format!("its zstd frame is corrupt ({words})")),
    })
}

/// Undoes liblzf's format. Returns the bytes written to the start of `out`.
///
/// A control byte below 32 announces that many literals and one more; any other holds three bits of length (7: one more
/// byte of length follows) and the high five bits of a distance, whose low eight follow.
///
/// # Errors
/// The stream ends early, refers to before its start, or holds more than `out`.
pub fn unlzf(stored: &[u8], out: &mut [u8]) -> Result<usize, String> {
    let cut = || damaged("its lzf stream ends too early");
    let (mut at, mut done) = (0, 0);
    while let Some(&control) = stored.get(at) {
        at += 1;
        let control = usize::from(control);
        if control < 32 {
            let literals = stored.get(at..at + control + 1).ok_or_else(cut)?;
            copy_in(literals, out, done)?;
            (at, done) = (at + literals.len(), done + literals.len());
            continue;
        }
        let mut next = || {
            let byte = stored.get(at).map(|byte| usize::from(*byte));
            at += 1;
            byte.ok_or_else(cut)
        };
        let length = 2 + match control >> 5 {
            7 => 7 + next()?,
            short => short,
        };
        let distance = ((control & 31) << 8) + next()? + 1;
        let Some(from) = done.checked_sub(distance) else {
            return Err(damaged("its lzf stream refers to before its start"));
        };
        if length > out.len() - done {
            return Err(too_much(out.len()));
        }
        repeat(out, from, done, length);
        done += length;
    }
    Ok(done)
}

fn copy_in(literals: &[u8], out: &mut [u8], at: usize) -> Result<(), String> {
    let room = out.len();
    let cells = out.get_mut(at..at + literals.len()).ok_or_else(|| too_much(room))?;
    cells.copy_from_slice(literals);
    Ok(())
}

/// Copies `length` bytes from `from` to `to`; where the two overlap, what was just written is copied again.
fn repeat(out: &mut [u8], from: usize, to: usize, length: usize) {
    let distance = to - from;
    if distance >= length {
        return out.copy_within(from..from + length, to);
    }
    for k in 0..length {
        out[to + k] = out[from + k];
    }
}

/// Undoes the framing of filter 32004 and its LZ4 blocks. Returns the bytes written to the start of `out`.
///
/// Big-endian: bytes in all (u64), bytes per block (u32), then per block its stored bytes (u32) and those bytes, which are
/// as they were where LZ4 did not shrink them.
///
/// # Errors
/// The framing contradicts itself or `out`, or a block is corrupt.
pub fn unlz4(stored: &[u8], out: &mut [u8]) -> Result<usize, String> {
    let cut = || damaged("its lz4 blocks end too early");
    let (total, rest) = stored.split_first_chunk::<8>().ok_or_else(cut)?;
    let (block, mut rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    let room = out.len();
    let total = usize::try_from(u64::from_be_bytes(*total)).ok().filter(|total| *total <= room);
    let total = total.ok_or_else(|| too_much(room))?;
    let block = u32::from_be_bytes(*block) as usize;
    if block == 0 && total > 0 {
        return Err(damaged("its lz4 blocks hold no bytes"));
    }
    for cells in out[..total].chunks_mut(block.max(1)) {
        let (bytes, tail) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (bytes, tail) = tail.split_at_checked(u32::from_be_bytes(*bytes) as usize).ok_or_else(cut)?;
        rest = tail;
        if bytes.len() == cells.len() {
            cells.copy_from_slice(bytes);
        } else if !lz4_flex::block::decompress_into(bytes, cells).is_ok_and(|written| written == cells.len()) {
            return Err(damaged("one of its lz4 blocks is corrupt"));
        }
    }
    Ok(total)
}

/// Why bytes cannot be decoded.
pub(super) fn damaged(problem: &str) -> String {
    format!("{problem}: the file is damaged, replace it or leave it out")
}

pub(super) fn too_much(room: usize) -> String {
    format!("inflates to more than the {room} bytes of its rows: the file is damaged or hostile")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small LZF compressor: literals, and the nearest match that a linear search over 8 KiB finds.
    pub fn lzf(src: &[u8]) -> Vec<u8> {
        let (mut out, mut literals, mut at) = (Vec::new(), Vec::new(), 0);
        let flush = |literals: &mut Vec<u8>, out: &mut Vec<u8>| {
            for run in literals.chunks(32) {
                out.push(run.len() as u8 - 1);
                out.extend(run);
            }
            literals.clear();
        };
        while at < src.len() {
            let length =
                |from: usize| (at..src.len().min(at + 264)).take_while(|k| src[from + k - at] == src[*k]).count();
            let best = (at.saturating_sub(64)..at).map(|from| (length(from), from)).max().unwrap_or((0, 0));
            if best.0 < 3 {
                literals.push(src[at]);
                at += 1;
                continue;
            }
            flush(&mut literals, &mut out);
            let (distance, length) = (at - best.1 - 1, best.0 - 2);
            match length {
                7.. => out.extend([(7 << 5 | distance >> 8) as u8, (length - 7) as u8]),
                _ => out.push((length << 5 | distance >> 8) as u8),
            }
            out.push(distance as u8);
            at += best.0;
        }
        flush(&mut literals, &mut out);
        out
    }

    /// As filter 32004 writes.
    pub fn lz4(src: &[u8], block: usize) -> Vec<u8> {
        let mut out = [&(src.len() as u64).to_be_bytes()[..], &(block as u32).to_be_bytes()].concat();
        for cells in src.chunks(block) {
            let packed = lz4_flex::block::compress(cells);
            let bytes = if packed.len() < cells.len() { &packed[..] } else { cells };
            out.extend((bytes.len() as u32).to_be_bytes());
            out.extend(bytes);
        }
        out
    }

    fn repetitive() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec((0u8..6, 1usize..90), 0..40)
            .prop_map(|runs| runs.into_iter().flat_map(|(byte, n)| std::iter::repeat_n(byte, n)).collect())
    }

    proptest! {
        #[test]
        fn both_come_back(src in repetitive(), block in 1usize..300) {
            for packed in [lzf(&src), lz4(&src, block)] {
                let undo = if packed == lzf(&src) { unlzf } else { unlz4 };
                let mut out = vec![0; src.len()];
                prop_assert_eq!(undo(&packed, &mut out), Ok(src.len()));
                prop_assert_eq!(&out, &src);
                if let Some(less) = src.len().checked_sub(1) {
                    prop_assert!(undo(&packed, &mut out[..less]).unwrap_err().contains("more than"));
                }
            }
        }
    }

    #[test]
    fn hostile_streams_are_refused() {
        let mut out = [0; 100];
        for (bytes, expected) in [
            (&[5u8, 1, 2][..], "too early"),
            (&[0x20], "too early"),
            (&[0xE0, 200], "too early"),
            (&[0, 7, 0x20, 9], "before its start"),
            (&[0, 7, 0xE0, 200, 0], "more than the 100 bytes"),
        ] {
            assert!(unlzf(bytes, &mut out).unwrap_err().contains(expected), "{bytes:?}");
        }
        let frame = |total: u64, block: u32, stored: u32, bytes: &[u8]| {
            [&total.to_be_bytes()[..], &block.to_be_bytes(), &stored.to_be_bytes(), bytes].concat()
        };
        for (bytes, expected) in [
            (vec![0; 5], "too early"),
            (frame(u64::MAX, 100, 4, &[]), "more than the 100 bytes"),
            (frame(100, 0, 4, &[0; 4]), "hold no bytes"),
            (frame(100, 100, u32::MAX, &[0; 4]), "too early"),
            (frame(100, 100, 4, &[0xFF; 4]), "corrupt"),
            (frame(100, 1, 1, &[0; 1]), "too early"),
        ] {
            assert!(unlz4(&bytes, &mut out).unwrap_err().contains(expected), "{bytes:?}");
        }
        // An overlapping match repeats what it wrote.
        assert_eq!(unlzf(&[0, 7, 0xE0, 10, 0], &mut out), Ok(20));
        assert_eq!(out[..20], [7; 20]);
    }
}
