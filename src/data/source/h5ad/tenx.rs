//! 10x Genomics' `.h5`: genes × cells by columns, which is cells × genes by rows. Both ages: group `matrix` with features,
//! and a group per genome.

use super::matrix::{Form, Matrix, of_arrays};
use super::text::{texts, wholes};
use ::hdf5::{File, Group};
use std::path::Path;

/// The group of a 10x file's matrix.
pub fn group(file: &File) -> Option<(String, Group)> {
    let names = file.member_names().unwrap_or_default();
    names.into_iter().find_map(|name| {
        let group = file.group(&name).ok()?;
        let all = ["barcodes", "data", "indices", "indptr", "shape"];
        let genes = group.link_exists("features") || group.link_exists("genes");
        (genes && all.into_iter().all(|part| group.link_exists(part))).then_some((name, group))
    })
}

/// Its matrix, and the names of its genes.
///
/// # Errors
/// As [`super::matrix::open`].
pub fn open(path: &Path, (name, group): (String, Group)) -> Result<(Matrix, Vec<String>), String> {
    let shape = group.dataset("shape").map_err(|_| format!("{name} has no shape"))?;
    let [genes, cells] = wholes(&shape, None)?[..] else { return Err(format!("{name}/shape is no pair")) };
    let (Ok(genes), Ok(cells)) = (u64::try_from(genes), u64::try_from(cells)) else {
        return Err(format!("{name} has shape {genes} × {cells}: it is damaged"));
    };
    let barcodes = group.dataset("barcodes").map_err(|_| format!("{name} has no barcodes"))?.shape();
    if barcodes != [cells as usize] {
        return Err(format!("{name} has {barcodes:?} barcodes for {cells} cells: it is damaged"));
    }
    let names = ["features/name", "gene_names", "features/id", "genes"];
    let names = names.into_iter().find_map(|part| group.dataset(part).ok());
    let names = names.ok_or_else(|| format!("{name} has no names of genes"))?;
    let names = texts(&names, Some(genes as usize))?.into_iter().map(Option::unwrap_or_default).collect();
    let matrix = of_arrays(&group, path, (&name, Form::Csr), (cells, genes))?;
    Ok((matrix, names))
}

/// Barcodes of the cells.
///
/// # Errors
/// They are not texts.
pub fn barcodes((name, group): &(String, Group)) -> Result<Vec<String>, String> {
    let barcodes = group.dataset("barcodes").map_err(|_| format!("{name} has no barcodes"))?;
    Ok(texts(&barcodes, None)?.into_iter().map(Option::unwrap_or_default).collect())
}
