//! Why a rank cannot use the page cache.

use std::io;

/// Failures of a rank's client and of its mapping. The text names the cause as well, because ranks send it to each other;
/// `source` gives the cause as a value.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("the page cache's socket: {0}")]
    Socket(#[source] io::Error),
    #[error("the page cache's memory, descriptor {descriptor}: {source}")]
    Descriptor {
        descriptor: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the page cache's memory: {0}")]
    Mapping(#[source] io::Error),
    #[error("the page cache's memory: it holds 0 bytes: raise data.cache_size_gb or set data.cache: off")]
    EmptyMapping,
    #[error("the page cache's memory: it is not sealed against shrinking and cannot be: {0}")]
    NotSealed(#[source] io::Error),
    #[error("no memory for {bytes} bytes of batch slots: lower train.batch_size or train.prefetch_factor")]
    NoSlots {
        bytes: usize,
        #[source]
        source: io::Error,
    },
    /// The directory ended or broke the protocol: nothing can be read any more.
    #[error("{0}")]
    Lost(String),
    #[error(
        "page cache entry {key}: its checksum does not match: it was read half-written, or written after it was published"
    )]
    Checksum { key: u64 },
    #[error("the page cache's directory did not answer for entry {key} in {limit_s} s: start again")]
    Silent { key: u64, limit_s: u64 },
    #[error("the page cache is registered with a device already")]
    Registered,
    #[error("the page cache's registering thread: {0}")]
    Thread(#[source] io::Error),
}
