//! Batches as the loader's threads make them, without Python.

use crate::buffer::{Buffer, Pool};
use crate::entry::{Entry, Leaf};
use crate::failure::Failure;
use std::sync::Arc;

const ALIGN_BYTES: usize = 64;

/// A leaf of a batch.
pub enum Column {
    /// `[B, bytes]` at this place of the buffer.
    Fixed { offset: usize, bytes: usize },
    /// Bytes per sample.
    Varying(Vec<Vec<u8>>),
}

/// How the bytes of a batch are to be read.
pub enum Form {
    /// Samples of one spec, leaf by leaf.
    Stacked { spec: Vec<u8>, columns: Vec<Column> },
    /// Samples one behind the other: where each lies.
    Samples(Vec<(usize, usize)>),
    /// The samples as a worker encoded them, in one entry.
    Built,
}

/// A batch.
pub struct Made {
    pub buffer: Arc<Buffer>,
    pub form: Form,
    pub samples: usize,
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN_BYTES)
}

/// Stacks samples that are alike; puts others, or all if `apart`, one behind the other.
pub fn collate(pool: &Arc<Pool>, entries: &[Entry], apart: bool) -> Result<Made, Failure> {
    match entries.first() {
        Some(first) if !apart && entries.iter().all(|entry| first.is_alike(entry)) => stack(pool, first, entries),
        _ => join(pool, entries),
    }
}

fn stack(pool: &Arc<Pool>, first: &Entry, entries: &[Entry]) -> Result<Made, Failure> {
    let mut total = 0;
    let mut columns = Vec::with_capacity(first.len());
    for leaf in first.leaves() {
        columns.push(match leaf.varies {
            true => Column::Varying(Vec::with_capacity(entries.len())),
            false => {
                let offset = total;
                total += aligned(leaf.bytes * entries.len());
                Column::Fixed { offset, bytes: leaf.bytes }
            }
        });
    }
    let buffer = pool.filled(total, |out| {
        for (number, entry) in entries.iter().enumerate() {
            for (leaf, column) in entry.leaves().zip(&mut columns) {
                put(entry, leaf, column, number, out);
            }
        }
        Ok::<(), Failure>(())
    })?;
    let form = Form::Stacked { spec: first.spec().to_vec(), columns };
    Ok(Made { buffer: Arc::new(buffer), form, samples: entries.len() })
}

fn put(entry: &Entry, leaf: Leaf, column: &mut Column, number: usize, out: &mut [u8]) {
    match column {
        Column::Fixed { offset, bytes } => {
            let at = *offset + number * *bytes;
            out[at..at + *bytes].copy_from_slice(entry.leaf(leaf));
        }
        Column::Varying(list) => list.push(entry.leaf(leaf).to_vec()),
    }
}

fn join(pool: &Arc<Pool>, entries: &[Entry]) -> Result<Made, Failure> {
    let total = entries.iter().map(|entry| aligned(entry.bytes().len())).sum();
    let mut places = Vec::with_capacity(entries.len());
    let buffer = pool.filled(total, |out| {
        let mut at = 0;
        for entry in entries {
            let bytes = entry.bytes();
            out[at..at + bytes.len()].copy_from_slice(bytes);
            places.push((at, bytes.len()));
            at += aligned(bytes.len());
        }
        Ok::<(), Failure>(())
    })?;
    Ok(Made { buffer: Arc::new(buffer), form: Form::Samples(places), samples: entries.len() })
}
