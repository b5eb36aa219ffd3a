//! All that crosses processes: environment names, exit codes, control messages, record schemas.
//!
//! Architecture invariant: data only, no behaviour beyond encoding. A change of meaning raises [`VERSION`].

pub mod cache;
pub mod env;
pub mod exit;
mod frame;
mod machine;
mod measured;
mod message;
mod record;
mod wire;

pub use frame::*;
pub use machine::*;
pub use measured::*;
pub use message::*;
pub use record::*;

/// Version of everything in this module; launcher and ranks of different versions refuse each other.
pub const VERSION: u32 = 2;
