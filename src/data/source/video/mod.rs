//! Sequences of frames with a spike camera's streams → entries of bytes. With [`super::hdf5`], the formats Headroom reads.
//!
//! ```text
//! layout: folders ─► sequences of frame files ─► scan: headers and sizes ─► Frames: entries by key
//!                                                             image (PNG, JPEG) ─► u8 [H, W, 3]
//!                                                             spikes (.dat)     ─► bits [S, H, ceil(W/8)]
//!                                                             npy (voxels)      ─► f32 [K, H, W]
//! ```
//!
//! Entries are compact: what a file holds, widened nowhere. A 720×1280 frame with its 66 spike planes of 360×640 takes
//! 7.4 MB, against 140 MB as the tensors that a model sees.

pub mod bits;
mod files;
mod frames;
pub mod image;
mod layout;
mod names;
pub mod npy;
mod scan;
pub mod spikes;
#[cfg(test)]
mod tests;
mod words;

pub use files::Remark;
pub use frames::{Frames, FramesStats, Modality};
pub use layout::{FramePaths, Layout, SequencePaths, SplitPaths, VideoSpec, find_blurred, find_sequences};
pub use scan::{Frame, Scan, Sequence, SpikeForm, Stamp, scan};
pub use spikes::{SpikeEncoding, SpikeInput};
