//! Video deblurring with a spike camera.

pub mod data;
pub mod sample;
