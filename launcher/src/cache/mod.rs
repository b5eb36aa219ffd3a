#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! ```text
//! ranks ══ sockets ══► server ──► directory ──► arena   (extents of the mapping)
//!                        │            └──────► policy  (who goes when room is needed)
//!                      memfd                  simulate (traces through the directory, and the optimum)
//! ```
//! One thread owns the directory, so nothing here is locked and nothing is shared but the bytes. The launcher hosts it, or
//! local rank 0 where another launcher started the ranks.
//!
//! Architecture invariant: touches no sample bytes; only ranks map the memfd. `directory`, `arena` and `policy` make no
//! system calls.

mod arena;
mod directory;
mod memory;
mod policy;
pub(crate) mod server;
pub mod simulate;

pub use directory::{Directory, Fault};
pub use memory::MemoryError;
pub use policy::PolicyKind;
pub use server::{CacheError, CacheHost, HostPlan};
