//! Runs of samples that share stored bytes.

/// Where runs of samples begin, each list ascending from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// First sample of every page: samples that one read serves, such as the windows of one chunk.
    pub pages: Vec<u64>,
    /// First sample of every sequence: samples that belong together, such as the windows of one recording.
    pub sequences: Vec<u64>,
}
