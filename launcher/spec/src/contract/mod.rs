#![doc = include_str!("README.md")]

pub mod cache;
pub mod env;
pub mod exit;
mod frame;
mod machine;
mod message;
mod record;
mod wire;

pub use frame::*;
pub use machine::*;
pub use message::*;
pub use record::*;

/// Version of everything in this module; launcher and ranks of different versions refuse each other.
pub const VERSION: u32 = 2;
