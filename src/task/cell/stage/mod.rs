//! The stages: [`autoencoder`], [`latents`], [`diffusion`], [`classifier`], [`sample`], each with its model and metrics or outputs.

pub mod autoencoder;
pub mod classifier;
pub mod diffusion;
pub mod latents;
pub mod sample;
mod sums;
