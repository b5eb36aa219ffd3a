//! Which genes and cells are in use, their labels, and lines about them.

use super::genes::NONE;
use super::members::{Part, Parts, part_of};
use super::scan::{Scan, Totals};
use super::store::UNLABELLED;
use crate::data::DataError;
use crate::data::source::h5ad::{Labels, MISSING};
use crate::data::split::RowSplit;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Facts on the data set that a model needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CellFacts {
    /// Genes in use, in the order of the columns of a dense batch.
    pub genes: Vec<String>,
    /// Labels that cells in use have, sorted: label `n` of a batch is `classes[n]`.
    pub classes: Vec<String>,
    /// The column of labels, where there is one.
    pub label: Option<String>,
    /// Cells in use.
    pub cells: u64,
    /// Most values of a cell.
    pub most: usize,
}

/// Thresholds by which genes and cells are filtered.
pub struct Rule<'a> {
    pub min_cells: usize,
    pub min_genes: usize,
    /// Every gene is in use.
    pub keeps_genes: bool,
    pub label: Option<&'a str>,
    pub matrix: &'a str,
}

/// The genes in use.
pub struct Genes {
    pub kept: Vec<u32>,
    /// Columns of all genes; `None`: all are in use.
    pub columns: Option<Arc<[u32]>>,
}

/// Genes that enough cells of all files express.
///
/// # Errors
/// No gene is expressed by enough cells.
pub fn genes(scans: &[Scan], genes: usize, rule: &Rule) -> Result<Genes, DataError> {
    let mut counts = vec![0u64; genes];
    for scan in scans {
        counts.iter_mut().zip(&scan.counts).for_each(|(sum, own)| *sum += u64::from(*own));
    }
    let is_kept = |gene: u32| rule.keeps_genes || counts[gene as usize] >= rule.min_cells as u64;
    let kept: Vec<u32> = (0..genes as u32).filter(|gene| is_kept(*gene)).collect();
    if kept.is_empty() {
        return Err(DataError::NothingUsable(format!(
            "none of {genes} genes is expressed in {} cells or more: lower cell.min_cells, or check cell.matrix ({})",
            rule.min_cells, rule.matrix
        )));
    }
    if kept.len() == genes {
        return Ok(Genes { kept, columns: None });
    }
    let mut columns = vec![NONE; genes];
    (0u32..).zip(&kept).for_each(|(column, gene)| columns[*gene as usize] = column);
    Ok(Genes { kept, columns: Some(columns.into()) })
}

/// Cells of one file that are left out for expressing too few of the genes in use, and those without a label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    pub poor: u64,
    pub unlabelled: u64,
}

/// Part of each cell of a file.
pub fn cells(
    scan: &Scan,
    genes: &Genes,
    rule: &Rule,
    labels: Option<&Labels>,
    split: &RowSplit,
    parts: &mut Vec<u8>,
) -> LeftOut {
    let mut lost: BTreeMap<u32, u16> = BTreeMap::new();
    if let Some(columns) = &genes.columns {
        let dropped = scan.rare.iter().filter(|(gene, _)| columns[*gene as usize] == NONE);
        dropped.for_each(|(_, cell)| *lost.entry(*cell).or_default() += 1);
    }
    let mut out = LeftOut::default();
    for (row, expressed) in (0u32..).zip(&scan.expressed) {
        // That many or more stay as they are.
        let left = if *expressed == u16::MAX { 0 } else { lost.get(&row).copied().unwrap_or(0) };
        let part = if usize::from(expressed - left.min(*expressed)) < rule.min_genes {
            out.poor += 1;
            Part::Out
        } else if labels.is_some_and(|labels| labels.codes[row as usize] == MISSING) {
            out.unlabelled += 1;
            Part::Out
        } else {
            part_of(split, u64::from(row))
        };
        parts.push(part as u8);
    }
    out
}

/// Classes of the cells in use, and each row's place among them.
///
/// # Errors
/// More classes than labels can have.
pub fn classes(labels: &[Option<Labels>], parts: &Parts) -> Result<(Vec<String>, Vec<u16>), DataError> {
    let mut first = 0;
    let mut used: BTreeMap<&str, u32> = BTreeMap::new();
    for labels in labels.iter().flatten() {
        for (code, part) in labels.codes.iter().zip(&parts[first..]) {
            if *part != Part::Out as u8 && *code != MISSING {
                used.insert(&labels.names[*code as usize], 0);
            }
        }
        first += labels.codes.len();
    }
    if used.len() >= usize::from(UNLABELLED) {
        return Err(DataError::NothingUsable(format!(
            "cells have {} different labels, at most {} are classes: set cell.label to a column of types",
            used.len(),
            UNLABELLED - 1
        )));
    }
    let mut names: Vec<&str> = used.keys().copied().collect();
    // As they are counted, where all are whole numbers.
    let numbers: Option<Vec<i64>> = names.iter().map(|name| name.parse().ok()).collect();
    if numbers.is_some() {
        names.sort_by_key(|name| name.parse::<i64>().unwrap_or(0));
    }
    let names: Vec<String> = names.into_iter().map(String::from).collect();
    let places: BTreeMap<&str, u16> = names.iter().map(String::as_str).zip(0u16..).collect();
    let mut rows = Vec::with_capacity(first);
    for labels in labels.iter().flatten() {
        let of: Vec<u16> =
            labels.names.iter().map(|name| places.get(name.as_str()).copied().unwrap_or(UNLABELLED)).collect();
        rows.extend(labels.codes.iter().map(|code| of.get(*code as usize).copied().unwrap_or(UNLABELLED)));
    }
    Ok((names, rows))
}

/// Refuses values of a file that are no counts and cannot stand for them, and warns of those that look transformed.
///
/// # Errors
/// Negative counts, or negative values of which a logarithm is to be taken.
pub fn check_values(
    path: &Path,
    totals: &Totals,
    matrix: &str,
    log1p: bool,
    is_log1p: bool,
) -> Result<Option<String>, DataError> {
    let refused = |problem: String| Err(DataError::Content { path: path.to_owned(), problem });
    let other = "set cell.matrix to the counts (layers/counts or raw/X, where the file has them)";
    match (totals.negative, totals.fraction) {
        (Some((cell, gene, value)), None) => {
            refused(format!("{matrix}: cell {cell} holds {value} for gene {gene}: counts are not negative"))
        }
        (Some((cell, gene, value)), Some(_)) if log1p => refused(format!(
            "{matrix}: cell {cell} holds {value} for gene {gene}, as scaled values are: they have no logarithm; {other}, or take the \
             values as they are (cell.target_sum: 0, cell.log1p: false)"
        )),
        (_, Some((cell, gene, value))) => {
            let what = match totals.negative {
                Some(_) => "scaled",
                None if is_log1p || totals.max < 30.0 => "log-transformed",
                None => "normalised",
            };
            let mark = if is_log1p { ", and uns/log1p says so" } else { "" };
            Ok(Some(format!(
                "warning: {}: {matrix} looks {what}: it holds fractions (cell {cell}, gene {gene}: {value}){mark}; {other}",
                super::name(path)
            )))
        }
        _ => Ok(None),
    }
}
