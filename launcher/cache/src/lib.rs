#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! ```text
//! ranks ══ sockets ══► server ──► directory ──► arena   (extents of the mapping)
//!                        │            └──────► policy  (who goes when room is needed)
//!                      memfd
//! ```
//! One thread owns the directory, so nothing here is locked and nothing is shared but the bytes. The launcher hosts it, or
//! local rank 0 where another launcher started the ranks.
//!
//! Where a kernel or sandbox refuses the memfd, a file without a name stands in (`shared`, [`refused`]).
//!
//! A rank's side of it is [`client`]: it maps the memfd ([`mapping`]) and asks the directory. [`order`] says which sample is needed
//! when, as a pure function, so that next uses are known. Processes that inherited no socket come in by the [`Door`].
//!
//! Architecture invariant: knows no tensors, files or formats. The directory's side touches no sample bytes; only clients map
//! the memfd. `directory`, `arena` and `policy` make no system calls. `unsafe` stands in `mapping` alone.

// Tests that other packages share name this one from outside.
#[cfg(test)]
extern crate self as cache;

mod arena;
pub mod client;
mod directory;
mod door;
mod error;
pub mod mapping;
mod memory;
pub mod order;
mod policy;
pub mod refused;
mod server;
mod shared;

pub use directory::{Directory, Fault, Replies};
pub use door::{Door, DoorError, Joined, knock};
pub use memory::{MemoryError, Room};
pub use policy::PolicyKind;
pub use server::{CacheHost, HostError, HostPlan, Joiner, with_causes};
pub use shared::{SharedMemory, shared_memory};
