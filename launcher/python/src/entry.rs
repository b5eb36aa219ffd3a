//! Bytes of one sample in the cache, as `codec.py` writes them.
//!
//! ```text
//! magic u32 │ spec bytes u32 │ leaves u32 │ 0 u32 │ tag u64 │ leaves × (offset u64, bytes u64) │ spec │ leaf │ leaf │ …
//! ```
//! Little-endian; each leaf begins at a multiple of 64. The spec describes the sample's structure with types and shapes, and is
//! read by Python alone. The top bit of a leaf's bytes says that they vary from sample to sample (texts, pickled objects);
//! the bytes of the others follow from the spec, so samples with one spec can be stacked by copying.

/// Bits of a key that hold the sample's index; the rest tells data sets apart.
pub const INDEX_BITS: u32 = 40;
/// Version of the layout.
const MAGIC: u32 = 0x3145_5248;
const HEAD_BYTES: usize = 24;
const LEAF_BYTES: usize = 16;
const VARIES: u64 = 1 << 63;
const ALIGN_BYTES: usize = 64;

/// The cache holds bytes that no sample has.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    #[error(
        "an entry of the cache is no sample of this version of headroom_train: use one version in all processes of a job"
    )]
    Foreign,
    #[error(
        "an entry of the cache belongs to another data set: give each data set its own name, cached(..., name=\"train\")"
    )]
    Tag,
}

/// One leaf of a sample: its bytes within the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub offset: usize,
    pub bytes: usize,
    /// Other samples of the same spec may have another number of bytes.
    pub varies: bool,
}

/// A sample's bytes, checked.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    bytes: &'a [u8],
    leaves: usize,
    spec: &'a [u8],
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl<'a> Entry<'a> {
    /// # Errors
    /// The bytes are no sample, or one with another `tag`.
    pub fn parse(bytes: &'a [u8], tag: u64) -> Result<Self, EntryError> {
        let entry = Self::of_any(bytes).ok_or(EntryError::Foreign)?;
        if u64_at(bytes, 16) != Some(tag) {
            return Err(EntryError::Tag);
        }
        Ok(entry)
    }

    /// A sample of any data set.
    pub fn of_any(bytes: &'a [u8]) -> Option<Self> {
        let (magic, spec, leaves) = (u32_at(bytes, 0)?, u32_at(bytes, 4)? as usize, u32_at(bytes, 8)? as usize);
        let at = HEAD_BYTES.checked_add(leaves.checked_mul(LEAF_BYTES)?)?;
        let entry = Self { bytes, leaves, spec: bytes.get(at..at.checked_add(spec)?)? };
        let inside = |leaf: Leaf| leaf.offset.checked_add(leaf.bytes).is_some_and(|end| end <= bytes.len());
        (magic == MAGIC && entry.leaves().all(inside)).then_some(entry)
    }

    pub fn spec(&self) -> &'a [u8] {
        self.spec
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.leaves
    }

    pub fn leaves(&self) -> impl Iterator<Item = Leaf> {
        let bytes = self.bytes;
        (0..self.leaves).map(move |leaf| {
            let at = HEAD_BYTES + leaf * LEAF_BYTES;
            let (offset, length) = (u64_at(bytes, at).unwrap_or(u64::MAX), u64_at(bytes, at + 8).unwrap_or(u64::MAX));
            let bytes = usize::try_from(length & !VARIES).unwrap_or(usize::MAX);
            Leaf { offset: usize::try_from(offset).unwrap_or(usize::MAX), bytes, varies: length & VARIES != 0 }
        })
    }

    /// Both samples have the same structure, types and shapes.
    pub fn is_alike(&self, other: &Entry) -> bool {
        self.spec == other.spec
            && self.leaves == other.leaves
            && self.leaves().zip(other.leaves()).all(|(a, b)| a.varies == b.varies && (a.varies || a.bytes == b.bytes))
    }

    /// Bytes of a leaf that [`Entry::leaves`] gave.
    pub fn leaf(&self, leaf: Leaf) -> &'a [u8] {
        self.bytes.get(leaf.offset..leaf.offset + leaf.bytes).unwrap_or_default()
    }
}

/// An entry with room for leaves of `sizes` bytes, and where they begin.
pub fn with_room(spec: &[u8], tag: u64, sizes: &[usize]) -> (Vec<u8>, Vec<usize>) {
    let mut end = HEAD_BYTES + LEAF_BYTES * sizes.len() + spec.len();
    let mut starts = Vec::with_capacity(sizes.len());
    for size in sizes {
        let start = end.next_multiple_of(ALIGN_BYTES);
        starts.push(start);
        end = start + size;
    }
    let mut bytes = Vec::with_capacity(end);
    for number in [MAGIC, spec.len() as u32, sizes.len() as u32, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&tag.to_le_bytes());
    for (start, size) in starts.iter().zip(sizes) {
        bytes.extend_from_slice(&(*start as u64).to_le_bytes());
        bytes.extend_from_slice(&(*size as u64).to_le_bytes());
    }
    bytes.extend_from_slice(spec);
    bytes.resize(end, 0);
    (bytes, starts)
}
