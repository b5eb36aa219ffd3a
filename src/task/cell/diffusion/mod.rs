//! Gaussian diffusion over latent vectors: [`schedule`], [`process`] (losses), [`steps`] (which step a sample gets), [`sampling`].

pub mod process;
pub mod sampling;
pub mod schedule;
pub mod steps;

pub use process::{Diffusion, Losses, Network};
pub use sampling::{Guide, Walk};
pub use steps::StepChoice;
