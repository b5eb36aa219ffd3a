//! One recording, for tools: length, field names, attributes, windows.

use super::gather::Transform;
use super::open::{self, Attribute, Wanted};
use super::reader::{Reader, Target};
use crate::data::source::chunks::LruChunks;
use crate::data::{DataError, Scratch};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A recording. Opening reads metadata only; samples are read by [`SessionData::window`].
pub struct SessionData {
    reader: Reader,
    field_names: Vec<String>,
    attributes: BTreeMap<String, Attribute>,
}

impl SessionData {
    /// # Errors
    /// No such file, group, dataset or field, or not as expected; see [`open::open`].
    pub fn open(path: &Path, wanted: &Wanted) -> Result<Self, DataError> {
        let opened = open::open(path, wanted)?;
        let reader = Reader::new(vec![opened.table], Arc::new(LruChunks::new(64 << 20)));
        Ok(Self { reader, field_names: opened.field_names, attributes: opened.attributes })
    }

    /// Number of samples.
    pub fn len(&self) -> u64 {
        self.reader.tables()[0].rows
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fields of a row, in the file's order.
    pub fn field_names(&self) -> &[String] {
        &self.field_names
    }

    /// Attributes of the group: session, user, side, sample rate, ...
    pub fn attributes(&self) -> &BTreeMap<String, Attribute> {
        &self.attributes
    }

    /// The wanted fields at rows `start..end`, each `[end - start, len]`, row by row.
    ///
    /// # Errors
    /// Rows out of range, or the file cannot be read.
    pub fn window(&self, start: u64, end: u64) -> Result<Vec<Vec<f32>>, DataError> {
        let table = &self.reader.tables()[0];
        let rows = end.checked_sub(start).filter(|_| end <= table.rows);
        let rows = rows.ok_or_else(|| {
            super::super::file_error(&table.path, format!("window {start}..{end} of {} rows", table.rows))
        })? as usize;
        let mut buffers: Vec<Vec<u8>> = table.members.iter().map(|member| vec![0; rows * member.len * 4]).collect();
        let mut targets: Vec<Target> = buffers
            .iter_mut()
            .enumerate()
            .map(|(member, out)| Target { member, transform: &Transform::IDENTITY, out })
            .collect();
        self.reader.read(0, start, rows, &mut targets, &mut Scratch::default())?;
        let floats = |bytes: &Vec<u8>| bytes.as_chunks::<4>().0.iter().map(|cell| f32::from_ne_bytes(*cell)).collect();
        Ok(buffers.iter().map(floats).collect())
    }

    /// Closes the file. Dropping does the same.
    pub fn close(self) {}
}
