//! Task `cell`: latent diffusion on single cells.

pub mod data;
pub mod densify;
pub mod diffusion;
pub mod latents;
pub mod model;
mod picture;
pub mod quality;
pub mod report;
pub mod stage;
#[cfg(test)]
mod tests;

/// Streams of random numbers: see [`super::draw`].
mod stream {
    /// The noise step of a training sample.
    pub const STEP: u64 = 1;
    /// The noise of a training sample.
    pub const NOISE: u64 = 2;
    /// Noise that a generated cell begins as, and fresh noise of each step.
    pub const START: u64 = 3;
    pub const FRESH: u64 = 4;
    /// Dropout of the first layer; those of the others follow.
    pub const DROPOUT: u64 = 16;
}
