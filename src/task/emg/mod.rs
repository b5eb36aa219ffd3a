pub mod data;
pub mod sample;
