//! Samples that are made without Python, in the loader's threads.

use crate::entry::{Entry, Leaf};
use crate::failure::Failure;
use source::data::source::h5ad::Cells;
use source::data::source::hdf5::array::Buffers;
use source::data::{DataError, Scratch};

/// Memory of a thread that makes samples.
#[derive(Default)]
pub struct Memory {
    pub scratch: Scratch,
    pub buffers: Buffers,
    pub cells: Cells,
}

/// A data set whose samples need no Python. Any thread may ask.
pub trait Native: Send + Sync {
    fn len(&self) -> usize;
    /// Origin of a sample, as messages name it.
    fn describe(&self, index: usize) -> String;
    /// Bytes read, and chunks decoded.
    fn counts(&self) -> (u64, u64);
    /// The entry of sample `index`.
    ///
    /// # Errors
    /// There is no such sample, or its file cannot be read.
    fn sample(&self, index: u64, memory: &mut Memory) -> Result<Vec<u8>, Failure>;
}

/// An entry that all samples of a data set resemble: their bytes differ in the leaves alone.
pub struct Template {
    bytes: Vec<u8>,
    leaves: Vec<Leaf>,
}

impl Template {
    /// `None`: the bytes are no entry with leaves of `sizes` bytes.
    pub fn new(bytes: Vec<u8>, sizes: &[usize]) -> Option<Self> {
        let leaves: Vec<Leaf> = Entry::of_any(&bytes)?.leaves().collect();
        let fits = leaves.iter().map(|leaf| leaf.bytes).eq(sizes.iter().copied());
        // In rising order, so that they can be lent one by one.
        let rises = leaves.windows(2).all(|two| two[0].offset + two[0].bytes <= two[1].offset);
        (fits && rises).then_some(Self { bytes, leaves })
    }

    /// A sample; `fill` receives its leaves.
    ///
    /// # Errors
    /// Whatever `fill` returns.
    pub fn filled<E>(&self, fill: impl FnOnce(&mut [&mut [u8]]) -> Result<(), E>) -> Result<Vec<u8>, E> {
        let mut made = self.bytes.clone();
        let (mut rest, mut at, mut leaves) = (&mut made[..], 0, Vec::with_capacity(self.leaves.len()));
        for leaf in &self.leaves {
            let (_, from) = rest.split_at_mut(leaf.offset - at);
            let (bytes, after) = from.split_at_mut(leaf.bytes);
            leaves.push(bytes);
            (rest, at) = (after, leaf.offset + leaf.bytes);
        }
        fill(&mut leaves)?;
        Ok(made)
    }
}

/// Words for a user of Python: a config's keys are this package's arguments there.
pub fn words(error: &DataError) -> String {
    const ARGUMENTS: &[(&str, &str)] = &[
        ("emg.hdf5_group names the group", "dataset= names the table"),
        ("emg.table_name names the dataset", "dataset= names the table"),
        ("emg.hdf5_group, emg.table_name", "dataset="),
        ("emg.emg_channels, emg.joint_angles_channels", "columns="),
        ("cell.label to null", "label=None"),
        ("to null to train without labels", "label=None"),
        ("cell.label", "label="),
    ];
    ARGUMENTS.iter().fold(error.to_string(), |text, (key, argument)| text.replace(key, argument))
}
