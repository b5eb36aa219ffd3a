//! Memory of a thread that reads.

use crate::ledger::{self, Holding, Part};

/// Buffers that a loader thread keeps between samples, so that reading allocates nothing in the steady state.
#[derive(Default)]
pub struct Scratch {
    pub raw: Vec<u8>,
    pub decoded: Vec<u8>,
    /// Whatever else a data set wants to keep per thread.
    pub extra: Option<Box<dyn std::any::Any + Send>>,
    held: Option<Holding>,
}

impl Scratch {
    /// Reports the present size of the buffers to the ledger.
    pub fn count(&mut self) {
        self.count_with(0);
    }

    /// [`Scratch::count`] with so many bytes in [`Scratch::extra`].
    pub fn count_with(&mut self, extra_bytes: usize) {
        let bytes = (self.raw.capacity() + self.decoded.capacity() + extra_bytes) as u64;
        self.held.get_or_insert_with(|| ledger::hold(Part::Scratch, 0)).set(bytes);
    }
}
