//! Task `deblur`: video deblurring with a spike camera.

pub mod data;
pub mod model;
pub mod sample;
