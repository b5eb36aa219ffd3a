//! Memory that samples live in: batch slots, and the rank's view of the node's shared page cache.
//!
//! ```text
//! announce ─► Table ─► Acquire ─► directory ─► Ready | Fill | Wait | Bypass ─► Table ─► read: bytes of the mapping
//! retire   ─► Table ─► Release ─►
//! ```
//!
//! A rank with a device registers the mapping with it, slab by slab ([`Registrar`]), and lends large entries to copies
//! ([`Lent`]) instead of copying them. When the cache shrinks: references end, slabs beyond the new end are given back, then
//! the directory hears of it, and only then pages go.
//!
//! Architecture invariant: no lock is held in shared memory, and no lock of this process while bytes are read or filled.

mod client;
mod entries;
pub mod map;
mod slabs;
mod table;
#[cfg(test)]
pub(crate) mod testing;

pub use client::{CacheClient, ClientSpec, Lent, Reading};
pub use entries::{CachedEntries, EntrySource};
pub use slabs::{Registrar, Registration};
pub use table::{ClientStats, Offer, Want};

use super::DataError;
use std::fs::File;

/// The page cache's memory by the number of the inherited descriptor. It is opened anew: the descriptor stays whose it is.
///
/// # Errors
/// No such descriptor, or it cannot be opened for writing.
pub fn inherited_memory(number: &str) -> Result<File, DataError> {
    let open = |number: u32| File::options().read(true).write(true).open(format!("/proc/self/fd/{number}"));
    let parsed = number.parse::<u32>().map_err(|e| e.to_string());
    parsed
        .and_then(|number| open(number).map_err(|e| e.to_string()))
        .map_err(|e| DataError::Other(format!("the page cache's memory, descriptor {number}: {e}")))
}
