//! The stages: [`autoencoder`], [`latents`], [`diffusion`], [`classifier`], [`sample`] with its [`output`], each
//! with its model and metrics or outputs.

pub mod autoencoder;
pub mod classifier;
pub mod diffusion;
pub mod latents;
pub mod output;
pub mod sample;
pub(super) mod sums;
