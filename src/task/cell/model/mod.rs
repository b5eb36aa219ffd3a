//! The three networks: [`Autoencoder`], [`CellUnet`], [`Classifier`].

mod autoencoder;
mod classifier;
pub(super) mod layers;
mod unet;

pub use autoencoder::Autoencoder;
pub use classifier::Classifier;
pub use unet::CellUnet;
