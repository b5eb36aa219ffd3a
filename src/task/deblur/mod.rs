//! Task `deblur`: video deblurring with a spike camera.

pub mod model;
