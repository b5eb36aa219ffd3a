//! Bytes of an entry of the page cache: a run of cells of one file, sparse and compact.
//!
//! ```text
//! entry   end of each cell u32 × cells │ cell │ cell │ …
//! cell    values u32 │ kind u8 │ genes │ counts
//! genes   gaps to the gene before, a byte each (255: 255 more, and on), or u16, or u32
//! counts  u8, u16 or u32, the smallest that is exact; f32 where there are fractions
//! ```
//! Gaps take half the bytes of u16 where every hundredth gene is expressed or more, and a little longer to read: they are
//! for data sets that the cache holds no other way.

/// How genes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// u16, or u32 where there are more genes than that.
    Plain {
        wide: bool,
    },
    Gaps,
}

const HEAD_BYTES: usize = 5;
/// A gap that continues in the next byte.
const MORE: u32 = 255;

/// How counts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Width {
    U8 = 0,
    U16 = 1,
    U32 = 2,
    F32 = 3,
}

impl Width {
    fn of(values: &[f64]) -> Self {
        let (mut others, mut most) = (0u64, 0.0);
        for value in values {
            others |= u64::from(!is_count(*value));
            most = if *value > most { *value } else { most };
        }
        match most {
            _ if others > 0 => Width::F32,
            _ if most <= f64::from(u8::MAX) => Width::U8,
            _ if most <= f64::from(u16::MAX) => Width::U16,
            _ => Width::U32,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Width::U8 => 1,
            Width::U16 => 2,
            Width::U32 | Width::F32 => 4,
        }
    }
}

/// A whole number of u32. By additions, which processors do to several numbers at once; `fract` is a call on the first x86-64.
#[inline(always)]
pub fn is_count(value: f64) -> bool {
    // Numbers of this size have no fractions: adding rounds.
    const WHOLE: f64 = (1u64 << 52) as f64;
    (value >= 0.0) & (value <= f64::from(u32::MAX)) & ((value + WHOLE) - WHOLE == value)
}

/// Bytes of a cell.
pub fn cell_bytes(ids: &[u32], values: &[f64], coding: Coding) -> usize {
    HEAD_BYTES + values.len() * Width::of(values).bytes() + gene_bytes(ids, coding)
}

/// Bytes of a cell's genes.
fn gene_bytes(ids: &[u32], coding: Coding) -> usize {
    match coding {
        Coding::Plain { wide } => ids.len() * if wide { 4 } else { 2 },
        Coding::Gaps => {
            let (mut next, mut more) = (0, 0);
            for id in ids {
                more += ((id - next) / MORE) as usize;
                next = id + 1;
            }
            ids.len() + more
        }
    }
}

/// Bytes of a cell by both codings: plain, and gaps.
pub fn both_bytes(ids: &[u32], values: &[f64], wide: bool) -> [usize; 2] {
    let counts = HEAD_BYTES + values.len() * Width::of(values).bytes();
    [Coding::Plain { wide }, Coding::Gaps].map(|coding| counts + gene_bytes(ids, coding))
}

/// Bytes of an entry of `cells` cells whose bytes are `bytes` together.
pub fn entry_bytes(cells: usize, bytes: usize) -> usize {
    4 * cells + bytes
}

/// Writes entries, cell by cell.
pub struct Pen<'a> {
    out: &'a mut [u8],
    cells: usize,
    cell: usize,
    at: usize,
    coding: Coding,
}

impl<'a> Pen<'a> {
    /// For an entry of `cells` cells; `None`: there is no room for its head.
    pub fn new(out: &'a mut [u8], cells: usize, coding: Coding) -> Option<Self> {
        (out.len() >= 4 * cells).then_some(Self { out, cells, cell: 0, at: 4 * cells, coding })
    }

    /// Appends a cell; its bytes. `None`: the entry has no room for it, as it is not the one that was scanned.
    pub fn cell(&mut self, ids: &[u32], values: &[f64]) -> Option<usize> {
        let width = Width::of(values);
        let bytes = HEAD_BYTES + values.len() * width.bytes() + gene_bytes(ids, self.coding);
        let kind = width as u8
            | match self.coding {
                Coding::Gaps => 0,
                Coding::Plain { wide: false } => 4,
                Coding::Plain { wide: true } => 8,
            };
        let out = self.out.get_mut(self.at..self.at + bytes).filter(|_| self.cell < self.cells)?;
        out[..4].copy_from_slice(&(ids.len() as u32).to_le_bytes());
        out[4] = kind;
        let (genes, counts) = out[HEAD_BYTES..].split_at_mut(bytes - HEAD_BYTES - values.len() * width.bytes());
        match self.coding {
            Coding::Plain { wide: false } => put(genes, ids, |id| (*id as u16).to_le_bytes()),
            Coding::Plain { wide: true } => put(genes, ids, |id| id.to_le_bytes()),
            Coding::Gaps => gaps(genes, ids),
        }
        match width {
            Width::U8 => put(counts, values, |value| [*value as i32 as u8]),
            Width::U16 => put(counts, values, |value| (*value as i32 as u16).to_le_bytes()),
            Width::U32 => put(counts, values, |value| (*value as u32).to_le_bytes()),
            Width::F32 => put(counts, values, |value| (*value as f32).to_le_bytes()),
        }
        self.at += bytes;
        self.out[4 * self.cell..4 * self.cell + 4].copy_from_slice(&(self.at as u32).to_le_bytes());
        self.cell += 1;
        Some(bytes)
    }

    /// Fills the room that genes out of use left. False: cells are missing.
    pub fn end(self) -> bool {
        self.out[self.at..].fill(0);
        self.cell == self.cells
    }
}

fn put<T, const N: usize>(out: &mut [u8], items: &[T], bytes: impl Fn(&T) -> [u8; N]) {
    for (cell, item) in out.as_chunks_mut::<N>().0.iter_mut().zip(items) {
        *cell = bytes(item);
    }
}

fn gaps(out: &mut [u8], ids: &[u32]) {
    let (mut next, mut at) = (0, 0);
    for id in ids {
        let gap = id - next;
        let more = (gap / MORE) as usize;
        out[at..at + more].fill(MORE as u8);
        out[at + more] = (gap % MORE) as u8;
        (next, at) = (id + 1, at + more + 1);
    }
}

/// Where the values of a cell go.
pub trait Sink {
    fn take(&mut self, gene: u32, value: Value);
}

/// A value as it is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    Count(u32),
    Number(f32),
}

/// A cell's bytes in its entry.
struct Written<'a> {
    kind: u8,
    genes: &'a [u8],
    counts: &'a [u8],
}

/// Cell `n` of an entry of `cells` cells. `None`: the entry is damaged.
fn find(entry: &[u8], cells: usize, n: usize) -> Option<Written<'_>> {
    let end = |n: usize| {
        entry.get(4 * n..4 * n + 4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let start = if n == 0 { Some(4 * cells) } else { end(n - 1).map(|at| at as usize) };
    let (start, end) = (start?, end(n).filter(|_| n < cells)?);
    let cell = entry.get(start..end as usize).filter(|cell| cell.len() >= HEAD_BYTES)?;
    let values = u32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]) as usize;
    let (kind, rest) = (cell[4], &cell[HEAD_BYTES..]);
    let width = [1, 2, 4, 4][usize::from(kind & 3)];
    let (genes, counts) = rest.split_at(rest.len().checked_sub(values * width)?);
    Some(Written { kind, genes, counts })
}

/// Copies genes and counts of cell `n` of an entry of `cells` cells, as u16 each; their number. `None`: they are not written as
/// u16 and u8, or u16 and u16, or do not fit: [`read`] takes every form, and says what is damaged.
pub fn copy(entry: &[u8], cells: usize, n: usize, ids: &mut [[u8; 2]], values: &mut [[u8; 2]]) -> Option<usize> {
    let Written { kind, genes, counts } = find(entry, cells, n)?;
    let genes = (kind >> 2 == 1).then_some(genes.as_chunks::<2>().0)?;
    let (ids, values) = (ids.get_mut(..genes.len())?, values.get_mut(..genes.len())?);
    match kind & 3 {
        0 if counts.len() == genes.len() => {
            values.iter_mut().zip(counts).for_each(|(value, count)| *value = u16::from(*count).to_ne_bytes());
        }
        1 if counts.len() == 2 * genes.len() => {
            let counts = counts.as_chunks::<2>().0;
            values.iter_mut().zip(counts).for_each(|(value, count)| *value = u16::from_le_bytes(*count).to_ne_bytes());
        }
        _ => return None,
    }
    ids.iter_mut().zip(genes).for_each(|(id, gene)| *id = u16::from_le_bytes(*gene).to_ne_bytes());
    Some(genes.len())
}

/// Gives the genes and values of cell `n` of an entry of `cells` cells to `sink`. False: the entry is damaged.
pub fn read(entry: &[u8], cells: usize, n: usize, sink: &mut impl Sink) -> bool {
    let Some(Written { kind, genes, counts }) = find(entry, cells, n) else { return false };
    match kind & 3 {
        0 => genes_of(kind, genes, counts.iter().map(|byte| Value::Count(u32::from(*byte))), sink),
        1 => genes_of(
            kind,
            genes,
            counts.as_chunks::<2>().0.iter().map(|c| Value::Count(u32::from(u16::from_le_bytes(*c)))),
            sink,
        ),
        2 => {
            genes_of(kind, genes, counts.as_chunks::<4>().0.iter().map(|c| Value::Count(u32::from_le_bytes(*c))), sink)
        }
        _ => {
            genes_of(kind, genes, counts.as_chunks::<4>().0.iter().map(|c| Value::Number(f32::from_le_bytes(*c))), sink)
        }
    }
}

#[inline(always)]
fn genes_of(kind: u8, genes: &[u8], counts: impl ExactSizeIterator<Item = Value>, sink: &mut impl Sink) -> bool {
    match kind >> 2 {
        0 => {
            let (mut bytes, mut next) = (genes.iter(), 0u32);
            for count in counts {
                loop {
                    let Some(byte) = bytes.next() else { return false };
                    next = next.wrapping_add(u32::from(*byte));
                    if *byte != MORE as u8 {
                        break;
                    }
                }
                sink.take(next, count);
                next = next.wrapping_add(1);
            }
            bytes.len() == 0
        }
        1 => {
            let genes = genes.as_chunks::<2>().0;
            let fits = genes.len() == counts.len();
            genes.iter().zip(counts).for_each(|(gene, count)| sink.take(u32::from(u16::from_le_bytes(*gene)), count));
            fits
        }
        _ => {
            let genes = genes.as_chunks::<4>().0;
            let fits = genes.len() == counts.len();
            genes.iter().zip(counts).for_each(|(gene, count)| sink.take(u32::from_le_bytes(*gene), count));
            fits
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Sink for Vec<(u32, f64)> {
        fn take(&mut self, gene: u32, value: Value) {
            self.push((
                gene,
                match value {
                    Value::Count(count) => f64::from(count),
                    Value::Number(number) => f64::from(number),
                },
            ));
        }
    }

    type Cell = Vec<(u32, f64)>;

    fn written(cells: &[Cell], coding: Coding) -> Vec<u8> {
        let split = |cell: &Cell| -> (Vec<u32>, Vec<f64>) { cell.iter().copied().unzip() };
        let bytes = cells.iter().map(|cell| {
            let (ids, values) = split(cell);
            cell_bytes(&ids, &values, coding)
        });
        let mut out = vec![0xEE; entry_bytes(cells.len(), bytes.sum())];
        let mut pen = Pen::new(&mut out, cells.len(), coding).unwrap();
        for cell in cells {
            let (ids, values) = split(cell);
            assert!(pen.cell(&ids, &values).is_some());
        }
        assert!(pen.cell(&[1], &[2.0]).is_none() && pen.end());
        out
    }

    fn back(entry: &[u8], cells: usize) -> Vec<Cell> {
        (0..cells)
            .map(|n| {
                let mut cell = Cell::new();
                assert!(read(entry, cells, n, &mut cell));
                assert!(copied(entry, cells, n).is_none_or(|copied| copied == cell));
                cell
            })
            .collect()
    }

    /// The same by [`copy`], where it can.
    fn copied(entry: &[u8], cells: usize, n: usize) -> Option<Cell> {
        let (mut ids, mut values) = ([[0; 2]; 64], [[0; 2]; 64]);
        let count = copy(entry, cells, n, &mut ids, &mut values)?;
        let number = |bytes: &[u8; 2]| u16::from_ne_bytes(*bytes);
        Some((0..count).map(|k| (u32::from(number(&ids[k])), f64::from(number(&values[k])))).collect())
    }

    #[test]
    fn narrow_cells_are_copied_and_others_are_left_to_the_long_way() {
        let cells = [vec![(3, 1.0), (9, 255.0)], vec![(1, 65_535.0)], vec![], vec![(2, 65_536.0)], vec![(4, 0.5)]];
        let entry = written(&cells, Coding::Plain { wide: false });
        let found: Vec<Option<Cell>> = (0..5).map(|n| copied(&entry, 5, n)).collect();
        assert_eq!(found[..3], cells[..3].iter().cloned().map(Some).collect::<Vec<_>>());
        assert_eq!(found[3..], [None, None]);
        assert!(copied(&written(&cells[..1], Coding::Gaps), 1, 0).is_none());
        // No room for two values.
        assert!(copy(&entry, 5, 0, &mut [[0; 2]], &mut [[0; 2]]).is_none());
        // A gene out of use leaves room at the end.
        let mut out = vec![0xEE; entry.len() + 7];
        let mut pen = Pen::new(&mut out, 5, Coding::Plain { wide: false }).unwrap();
        for cell in &cells {
            let (ids, values): (Vec<u32>, Vec<f64>) = cell.iter().copied().unzip();
            pen.cell(&ids, &values).unwrap();
        }
        assert!(pen.end() && out[..entry.len()] == entry && out[entry.len()..] == [0; 7]);
        assert!(!Pen::new(&mut out, 5, Coding::Gaps).unwrap().end(), "cells are missing");
    }

    #[test]
    fn counts_take_the_smallest_type_that_is_exact() {
        let cell = |most: f64| vec![(3, 1.0), (9, most)];
        let bytes = |most: f64| both_bytes(&[3, 9], &[1.0, most], false);
        assert_eq!(bytes(255.0), [5 + 2 + 4, 5 + 2 + 2]);
        assert_eq!(bytes(256.0), [5 + 4 + 4, 5 + 4 + 2]);
        assert_eq!(bytes(65_536.0), [5 + 8 + 4, 5 + 8 + 2]);
        for most in [255.0, 256.0, 65_535.0, 65_536.0, 4_294_967_295.0, 4_294_967_296.0, 0.5, -1.0, 1e-30f32.into()] {
            for coding in [Coding::Gaps, Coding::Plain { wide: false }, Coding::Plain { wide: true }] {
                let cells = [cell(most), vec![], cell(7.0)];
                assert_eq!(back(&written(&cells, coding), 3), cells, "{most} {coding:?}");
            }
        }
    }

    #[test]
    fn far_genes_take_further_bytes() {
        let cells = [vec![(0, 1.0), (254, 2.0), (509, 3.0), (510, 4.0), (66_000, 5.0)]];
        assert_eq!(back(&written(&cells, Coding::Gaps), 1), cells);
        assert_eq!(both_bytes(&[254], &[1.0], false)[1], 5 + 1 + 1);
        assert_eq!(both_bytes(&[255], &[1.0], false)[1], 5 + 1 + 2);
    }

    #[test]
    fn damaged_entries_are_refused() {
        let whole = written(&[vec![(1, 1.0), (300, 2.0)], vec![(2, 1.0)]], Coding::Gaps);
        let mut cell = Cell::new();
        assert!(!read(&whole, 2, 2, &mut cell) && !read(&[], 1, 0, &mut cell));
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xFF;
            for n in 0..2 {
                let _ = read(&damaged, 2, n, &mut cell);
            }
            assert!(!read(&whole[..at], 2, 1, &mut cell));
        }
    }

    proptest! {
        #[test]
        fn every_cell_comes_back(cells in proptest::collection::vec(
            proptest::collection::btree_map(0u32..70_000, prop_oneof![1u32..300, any::<u32>()], 0..60), 0..9)) {
            let cells: Vec<Cell> = cells.iter().map(|cell| cell.iter().map(|(id, n)| (*id, f64::from(*n))).collect()).collect();
            for coding in [Coding::Gaps, Coding::Plain { wide: true }] {
                prop_assert_eq!(&back(&written(&cells, coding), cells.len()), &cells);
            }
        }
    }
}
