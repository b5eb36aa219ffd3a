//! Memory that samples live in: batch slots, and the rank's view of the node's shared page cache.

pub mod map;
