#![doc = include_str!("README.md")]

pub mod cache;
pub mod env;
mod event;
pub mod exit;
pub mod files;
mod frame;
mod machine;
mod measured;
mod message;
mod record;
mod text;
mod weights;
pub mod wire;
mod words;

pub use event::{Cause, Event, Fill, LevelChange, Program, Source};
pub use frame::*;
pub use machine::*;
pub use measured::*;
pub use message::*;
pub use record::*;
pub use text::{USERS, shown};
pub use weights::Weights;
pub use words::*;

/// Version of everything in this module; launcher and ranks of different versions refuse each other.
pub const VERSION: u32 = 5;
