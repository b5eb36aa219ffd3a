//! Task `cell`: latent diffusion on single cells.

pub mod diffusion;
pub mod draw;
pub mod model;
#[cfg(test)]
mod tests;
