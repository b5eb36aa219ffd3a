//! The part of the root package's room `data` that reads files.

#[path = "../../../../src/data/error.rs"]
mod error;
#[path = "../../../../src/data/pages.rs"]
mod pages;
#[path = "../../../../src/data/scratch.rs"]
mod scratch;
#[path = "../../../../src/data/source/mod.rs"]
pub mod source;
#[path = "../../../../src/data/windows/index.rs"]
pub mod windows;

pub use error::{Cause, DataError};
pub use pages::Pages;
pub use scratch::Scratch;
