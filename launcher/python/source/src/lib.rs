//! Readers of files without libtorch, for the Python package.
//!
//! [`data`] and [`ledger`] are the root package's own files, compiled here as well: that package links libtorch, which no
//! extension of a user's Python may bring. [`columns`] is added: it finds the columns of a file by their names.

// Tasks use the rest.
#![allow(dead_code, unused_imports)]

pub mod columns;
pub mod data;
#[path = "../../../../src/ledger.rs"]
pub mod ledger;
