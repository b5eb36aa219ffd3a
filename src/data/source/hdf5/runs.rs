//! Which rows of a virtual dataset lie where: its selections as runs of rows, each of them once.

use super::Run;
use super::ffi::mapping::{Mapping, Places, Slice};
use super::library::missing;
use std::ops::Range;
use std::path::Path;

/// Most runs of rows of one virtual dataset that are accepted.
pub const MAX_RUNS: usize = 1 << 16;

/// Consecutive rows, or consecutive columns.
pub type Span = Range<u64>;

/// The way out of a mapping that is not read.
pub const COPY: &str = "copy its rows into one file (h5repack -l DATASET:CONTI)";

/// Pairs the rows of both selections in their order, which is how libhdf5 maps them.
pub fn runs_of(mapping: &Mapping, part: usize, shape: &[u64], plain: bool) -> Result<Vec<Run>, String> {
    let rows = |rectangle: &Rectangle| rectangle.rows.iter().map(|span| span.end - span.start).sum::<u64>();
    let width = |rectangle: &Rectangle| rectangle.columns.end - rectangle.columns.start;
    let there = match &mapping.there {
        // The file does not say how large a part is that is mapped as a whole.
        Places::All(_) => rectangle(&Places::All(shape.to_vec()), shape, plain)?,
        places => rectangle(places, shape, plain)?,
    };
    let here = rectangle(&mapping.here, &[rows(&there), width(&there)], plain)?;
    if rows(&here) != rows(&there) || width(&here) != width(&there) {
        return Err(format!("virtual dataset that maps rows to others of another shape: {COPY}"));
    }
    let (mut runs, mut from) = (Vec::new(), there.rows.into_iter());
    let mut source = 0..0;
    for span in here.rows {
        let mut row = span.start;
        while row < span.end {
            if source.is_empty() {
                source = from.next().unwrap_or(0..0);
            }
            let take = (span.end - row).min(source.end - source.start);
            if take == 0 {
                return Err(format!("virtual dataset with an empty piece: {COPY}"));
            }
            runs.push(Run {
                part,
                rows: [row, row + take],
                source_row: source.start,
                columns: [here.columns.start, here.columns.end],
                source_column: there.columns.start,
            });
            row += take;
            source.start += take;
        }
    }
    Ok(runs)
}

/// Rows, each with the same columns.
struct Rectangle {
    rows: Vec<Span>,
    columns: Span,
}

/// Lengths are those of a dimension without an end.
fn rectangle(places: &Places, lengths: &[u64], plain: bool) -> Result<Rectangle, String> {
    let spans = match places {
        Places::All(dims) => dims.iter().map(|dim| one(0, *dim)).collect(),
        Places::Slab(slices) => {
            let lengths = lengths.iter().copied().chain(std::iter::repeat(0));
            slices
                .iter()
                .zip(lengths)
                .map(|(slice, length)| spans(slice, length))
                .collect::<Result<Vec<_>, String>>()?
        }
        Places::Other => return Err(format!("virtual dataset that maps points or irregular pieces: {COPY}")),
    };
    let irregular = || format!("virtual dataset whose pieces are no whole rows or blocks of columns: {COPY}");
    let mut spans = spans.into_iter();
    match (spans.next(), spans.next(), spans.next(), plain) {
        (Some(rows), None, None, false) => Ok(Rectangle { rows, columns: 0..0 }),
        (Some(rows), Some(columns), None, true) => match &columns[..] {
            [columns] => Ok(Rectangle { rows, columns: columns.clone() }),
            _ => Err(irregular()),
        },
        _ => Err(irregular()),
    }
}

fn one(start: u64, end: u64) -> Vec<Span> {
    std::iter::once(start..end).collect()
}

/// Indices of one dimension as few spans; those without an end are `length` from the start on.
fn spans(slice: &Slice, length: u64) -> Result<Vec<Span>, String> {
    let Slice { start, step, count, block } = *slice;
    let Some(count) = count else {
        let end = start.checked_add(length).filter(|_| step == block || block == u64::MAX);
        return end
            .map(|end| one(start, end))
            .ok_or_else(|| format!("virtual dataset without an end, in steps: {COPY}"));
    };
    let too_far = || "virtual dataset whose pieces lie beyond any file".to_string();
    let length = count.checked_mul(step.max(block)).ok_or_else(too_far)?;
    start.checked_add(length).ok_or_else(too_far)?;
    if step == block || count == 1 {
        return Ok(one(start, start + count * block));
    }
    if count > MAX_RUNS as u64 {
        return Err(format!("virtual dataset of more than {MAX_RUNS} pieces: {COPY}"));
    }
    Ok((0..count).map(|n| start + n * step..start + n * step + block).collect())
}

/// Sorts runs by columns and rows, and returns the rows that are in none. No row may be in two, and every column below `columns`
/// must be in one.
pub fn covered(runs: &mut [Run], rows: u64, columns: u64) -> Result<Vec<[u64; 2]>, String> {
    runs.sort_by_key(|run| (run.columns, run.rows));
    let (mut column, mut at, mut gaps) = (0, 0, Vec::new());
    while at < runs.len() {
        let of = runs[at].columns;
        if of[0] != column && columns > 0 {
            return Err(odd(&format!("columns {column}..{}", of[0])));
        }
        let group = runs[at..].iter().take_while(|run| run.columns == of).count();
        let mut row = 0;
        for run in &runs[at..at + group] {
            if run.rows[0] < row {
                return Err(odd(&format!("rows {}..{row}", run.rows[0])));
            }
            gaps.extend((run.rows[0] > row).then_some([row, run.rows[0]]));
            row = run.rows[1];
        }
        gaps.extend((row < rows).then_some([row, rows]));
        if row > rows {
            return Err(format!("virtual dataset of {rows} rows whose parts hold {row}: start again, or {COPY}"));
        }
        (column, at) = (of[1], at + group);
        if column >= columns {
            break;
        }
    }
    if runs.is_empty() || column < columns {
        return Err(odd(if columns > 0 { "columns" } else { "rows" }));
    }
    Ok(gaps)
}

/// The runs of `outer` through a part that is a virtual dataset as well, whose runs are `inner`.
pub fn through(outer: &[Run], inner: &[Run], first_part: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    for run in outer {
        let source = run.source_row..run.source_row + (run.rows[1] - run.rows[0]);
        let across = run.source_column..run.source_column + (run.columns[1] - run.columns[0]);
        for piece in touching(inner, source.clone()) {
            let (from, to) = (piece.rows[0].max(source.start), piece.rows[1].min(source.end));
            let (left, right) = (piece.columns[0].max(across.start), piece.columns[1].min(across.end));
            if left >= right && !across.is_empty() {
                continue;
            }
            runs.push(Run {
                part: first_part + piece.part,
                rows: [run.rows[0] + (from - source.start), run.rows[0] + (to - source.start)],
                source_row: piece.source_row + (from - piece.rows[0]),
                columns: [run.columns[0] + (left - across.start), run.columns[0] + (right.max(left) - across.start)],
                source_column: piece.source_column + (left - piece.columns[0]),
            });
        }
    }
    runs
}

fn odd(what: &str) -> String {
    format!("virtual dataset whose {what} lie in no part, or in more than one: map each once")
}

/// Checks that a part of `shape` holds the rows and columns of `runs`.
pub fn within(runs: &[Run], shape: &[u64], part: &Path) -> Result<(), String> {
    for run in runs {
        let rows = run.source_row + (run.rows[1] - run.rows[0]);
        let columns = run.source_column + (run.columns[1] - run.columns[0]);
        if rows > shape[0] || shape.get(1).is_some_and(|width| columns > *width) {
            let problem = format!("rows {}..{rows} of it are mapped, it has shape {shape:?}", run.source_row);
            return Err(missing(part, &problem));
        }
    }
    Ok(())
}

/// Rows of the virtual dataset that `run` takes from rows that were never written.
pub fn holes(run: &Run, unwritten: &[[u64; 2]]) -> impl Iterator<Item = [u64; 2]> {
    let last = run.source_row + run.rows[1] - run.rows[0];
    let here = move |row: u64| row.clamp(run.source_row, last) - run.source_row + run.rows[0];
    unwritten.iter().map(move |[start, end]| [here(*start), here(*end)]).filter(|[start, end]| start < end)
}

/// Runs that touch `rows`.
pub fn touching(runs: &[Run], rows: Span) -> impl Iterator<Item = &Run> {
    runs.iter().filter(move |run| run.rows[0] < rows.end && run.rows[1] > rows.start)
}

/// Sorts runs, and joins those that touch or overlap.
pub fn merged(mut runs: Vec<[u64; 2]>) -> Vec<[u64; 2]> {
    runs.sort_unstable();
    let mut merged: Vec<[u64; 2]> = Vec::with_capacity(runs.len());
    for [start, end] in runs {
        match merged.last_mut() {
            Some(last) if start <= last[1] => last[1] = last[1].max(end),
            _ => merged.push([start, end]),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rows: [u64; 2], columns: [u64; 2]) -> Run {
        Run { part: 0, rows, source_row: 0, columns, source_column: 0 }
    }

    #[test]
    fn rows_in_no_run_are_told_and_rows_in_two_refused() {
        let gaps = |runs: &[Run], rows, columns| covered(&mut runs.to_vec(), rows, columns);
        let rows = [run([5, 10], [0, 0]), run([0, 5], [0, 0])];
        assert!(gaps(&rows, 10, 0).unwrap().is_empty());
        assert_eq!(gaps(&rows, 12, 0).unwrap(), [[10, 12]]);
        assert_eq!(gaps(&rows[..1], 10, 0).unwrap(), [[0, 5]]);
        assert!(gaps(&[run([0, 6], [0, 0]), run([5, 10], [0, 0])], 10, 0).unwrap_err().contains("rows 5..6"));
        assert!(gaps(&rows, 7, 0).unwrap_err().contains("of 7 rows whose parts hold 10"));
        let columns = [run([0, 10], [16, 40]), run([0, 10], [0, 16])];
        assert!(gaps(&columns, 10, 36).unwrap().is_empty());
        assert!(gaps(&columns[..1], 10, 36).unwrap_err().contains("columns 0..16"));
        assert!(gaps(&columns[1..], 10, 36).unwrap_err().contains("columns"));
        assert!(gaps(&[], 10, 0).unwrap_err().contains("rows"));
    }

    #[test]
    fn runs_lead_through_a_virtual_part_to_its_parts() {
        let outer = [Run { part: 0, rows: [100, 150], source_row: 10, columns: [0, 0], source_column: 0 }];
        let inner = [run([0, 30], [0, 0]), Run { part: 1, source_row: 7, ..run([30, 80], [0, 0]) }];
        let found = through(&outer, &inner, 5);
        let expected = [(5, [100, 120], 10), (6, [120, 150], 7)];
        assert_eq!(found.iter().map(|run| (run.part, run.rows, run.source_row)).collect::<Vec<_>>(), expected);
        let outer = [Run { part: 0, rows: [0, 10], source_row: 0, columns: [4, 8], source_column: 2 }];
        let inner = [run([0, 10], [0, 3]), Run { part: 1, source_column: 9, ..run([0, 10], [3, 20]) }];
        let found = through(&outer, &inner, 0);
        let expected = [([4, 5], 2), ([5, 8], 9)];
        assert_eq!(found.iter().map(|run| (run.columns, run.source_column)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn slices_become_few_spans() {
        let count = |start, step, count, block| spans(&Slice { start, step, count: Some(count), block }, 0);
        assert_eq!(count(3, 1, 7, 1).unwrap(), one(3, 10));
        assert_eq!(count(3, 9, 1, 7).unwrap(), one(3, 10));
        assert_eq!(count(0, 4, 3, 2).unwrap(), [0..2, 4..6, 8..10]);
        assert!(count(0, 2, MAX_RUNS as u64 + 1, 1).unwrap_err().contains("pieces"));
        assert!(count(u64::MAX, 2, 3, 1).is_err());
        assert_eq!(spans(&Slice { start: 5, step: 1, count: None, block: 1 }, 7).unwrap(), one(5, 12));
        assert!(spans(&Slice { start: 0, step: 2, count: None, block: 1 }, 7).is_err());
    }
}
