//! HDF5's registered bitshuffle filter, undone: bits of like weight lie together, in blocks that may be compressed each.
//!
//! Source: kiyo-masui/bitshuffle, README and the layout of its filter 32008: values are version twice, bytes of an element,
//! elements of a block (0: by default 8 KiB), and the compressor (0 none, 2 LZ4, 3 Zstandard).

use super::compress::{damaged, too_much, unzstd};

/// HDF5's registered number of the filter.
pub const BITSHUFFLE_ID: i32 = 32008;
/// Blocks are of whole eights.
const EIGHT: usize = 8;
/// Bytes of a block by default.
const BLOCK_BYTES: usize = 8192;

/// Compressor of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Codec {
    None,
    Lz4,
    Zstd,
}

impl Codec {
    /// By the filter's number.
    pub fn of(number: u32) -> Option<Self> {
        match number {
            0 => Some(Codec::None),
            2 => Some(Codec::Lz4),
            3 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// Elements of a block.
fn block_elements(block: usize, element: usize) -> usize {
    if block > 0 { block } else { (BLOCK_BYTES / element / EIGHT * EIGHT).max(128) }
}

/// Undoes the filter. Returns the bytes written to the start of `out`.
///
/// # Errors
/// The blocks end early, are corrupt, or hold more than `out`.
pub fn unbitshuffle(
    stored: &[u8],
    out: &mut [u8],
    element: usize,
    block: usize,
    codec: Codec,
) -> Result<usize, String> {
    let cut = || damaged("its bitshuffle blocks end too early");
    if element == 0 {
        return Err(damaged("its bitshuffle elements have no bytes"));
    }
    let (total, mut rest, elements) = match codec {
        Codec::None => (stored.len(), stored, block_elements(block, element)),
        _ => {
            let (head, rest) = stored.split_first_chunk::<12>().ok_or_else(cut)?;
            let [a, b, c, d, e, f, g, h, i, j, k, l] = *head;
            let total =
                usize::try_from(u64::from_be_bytes([a, b, c, d, e, f, g, h])).map_err(|_| too_much(out.len()))?;
            let bytes = u32::from_be_bytes([i, j, k, l]) as usize;
            (total, rest, if bytes == 0 { block_elements(block, element) } else { bytes / element })
        }
    };
    let room = out.len();
    let out = out.get_mut(..total).ok_or_else(|| too_much(room))?;
    if elements == 0 || !elements.is_multiple_of(EIGHT) {
        return Err(damaged("its bitshuffle blocks are of no whole eights"));
    }
    let (mut at, mut planes) = (0, Vec::new());
    while total - at >= EIGHT * element {
        let here = elements.min((total - at) / element / EIGHT * EIGHT);
        let bytes = here * element;
        let block = match codec {
            Codec::None => {
                let (block, behind) = rest.split_at_checked(bytes).ok_or_else(cut)?;
                rest = behind;
                block
            }
            _ => {
                let (length, behind) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
                let (packed, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or_else(cut)?;
                rest = behind;
                planes.resize(bytes, 0);
                let unpacked = match codec {
                    Codec::Zstd => unzstd(packed, &mut planes)?,
                    _ => lz4_flex::block::decompress_into(packed, &mut planes)
                        .map_err(|error| damaged(&format!("a bitshuffle block is corrupt ({error})")))?,
                };
                if unpacked != bytes {
                    return Err(damaged(&format!("a bitshuffle block decodes to {unpacked} bytes, {bytes} expected")));
                }
                &planes[..]
            }
        };
        elements_of(block, element, &mut out[at..at + bytes]);
        at += bytes;
    }
    // Fewer than eight elements stay as they are.
    let tail = rest.get(..total - at).ok_or_else(cut)?;
    out[at..].copy_from_slice(tail);
    Ok(total)
}

/// Planes of bits back into elements of `width` bytes: plane `8 b + k` has bit `k` of byte `b` of each element, lowest first.
fn elements_of(planes: &[u8], width: usize, out: &mut [u8]) {
    let count = out.len() / width;
    let plane = count / EIGHT;
    for byte in 0..width {
        for group in 0..plane {
            let rows = std::array::from_fn(|bit| planes[(EIGHT * byte + bit) * plane + group]);
            for (n, value) in transposed(u64::from_le_bytes(rows)).to_le_bytes().into_iter().enumerate() {
                out[(EIGHT * group + n) * width + byte] = value;
            }
        }
    }
}

/// Transposes an 8 × 8 matrix of bits. Source: Warren, Hacker's Delight, 7-3.
fn transposed(mut x: u64) -> u64 {
    let mut swap = |mask: u64, shift: u32| {
        let t = (x ^ (x >> shift)) & mask;
        x ^= t ^ (t << shift);
    };
    swap(0x00AA_00AA_00AA_00AA, 7);
    swap(0x0000_CCCC_0000_CCCC, 14);
    swap(0x0000_0000_F0F0_F0F0, 28);
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The filter itself, for whole blocks without compression.
    fn shuffled(bytes: &[u8], element: usize, block: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let count = bytes.len() / element / EIGHT * EIGHT;
        for part in bytes[..count * element].chunks(block * element) {
            let n = part.len() / element;
            let mut planes = vec![0u8; part.len()];
            for (at, value) in part.iter().enumerate() {
                let (index, byte) = (at / element, at % element);
                for bit in 0..8 {
                    planes[(8 * byte + bit) * n / 8 + index / 8] |= (value >> bit & 1) << (index % 8);
                }
            }
            out.extend(planes);
        }
        out.extend_from_slice(&bytes[count * element..]);
        out
    }

    fn packed(bytes: &[u8], element: usize, block: usize, codec: Codec) -> Vec<u8> {
        let planes = shuffled(bytes, element, block);
        if codec == Codec::None {
            return planes;
        }
        let mut out = (bytes.len() as u64).to_be_bytes().to_vec();
        out.extend(((block * element) as u32).to_be_bytes());
        let whole = bytes.len() / element / EIGHT * EIGHT * element;
        for part in planes[..whole].chunks(block * element) {
            let part = match codec {
                Codec::Zstd => zstd::bulk::compress(part, 3).unwrap(),
                _ => lz4_flex::block::compress(part),
            };
            out.extend((part.len() as u32).to_be_bytes());
            out.extend(part);
        }
        out.extend_from_slice(&planes[whole..]);
        out
    }

    #[test]
    fn every_length_and_width_comes_back() {
        for element in [1, 2, 3, 4, 8] {
            for count in [0, 1, 7, 8, 9, 40, 128, 129, 300, 1000] {
                let bytes: Vec<u8> = (0..count * element).map(|n| (n * 31 % 251) as u8).collect();
                for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
                    let stored = packed(&bytes, element, 128, codec);
                    let mut out = vec![0xEE; bytes.len()];
                    assert_eq!(unbitshuffle(&stored, &mut out, element, 128, codec), Ok(bytes.len()));
                    assert_eq!(out, bytes, "{count} of {element} by {codec:?}");
                    for at in 0..stored.len().min(60) {
                        let mut damaged = stored.clone();
                        damaged[at] ^= 0x55;
                        let _ = unbitshuffle(&damaged, &mut out, element, 128, codec);
                        let cut = unbitshuffle(&stored[..at], &mut out, element, 128, codec);
                        assert!(codec == Codec::None || cut.is_err());
                    }
                }
            }
        }
    }
}
