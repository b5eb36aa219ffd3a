//! Metadata of a file of cells. No value of its matrix is read.

use super::frame::{Frame, Labels};
use super::matrix::{self, Matrix};
use super::tenx;
use super::text::attribute;
use crate::data::DataError;
use crate::data::source::hdf5::open::checked;
use crate::data::source::{Identity, file_error, wide_print};
use ::hdf5::File;
use serde::{Deserialize, Serialize};
use std::io::BufRead;
use std::path::{Path, PathBuf};

/// Required content of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// `X`, `layers/NAME` or `raw/X`.
    pub matrix: String,
    /// Column of labels.
    pub label: Option<String>,
}

/// A file of cells, as far as it is known without its values.
#[derive(Debug)]
pub struct H5ad {
    pub path: PathBuf,
    /// Files that hold its numbers, each as it is now: itself first.
    pub identities: Vec<(PathBuf, Identity)>,
    /// Fingerprint of many places of the file.
    pub print: u64,
    pub matrix: Matrix,
    pub genes: Vec<String>,
    pub labels: Option<Labels>,
    /// The mark that scanpy leaves where it took logarithms.
    pub is_log1p: bool,
}

/// Opens `path`.
///
/// # Errors
/// Names the file and what is missing, unknown, contradictory or not credible.
pub fn open(path: &Path, wanted: &Wanted) -> Result<H5ad, DataError> {
    let file = checked(path)?;
    let fail = |problem: String| file_error(path, problem);
    refuse_others(&file).map_err(fail)?;
    let (matrix, genes, labels) = match tenx::group(&file).filter(|_| !file.link_exists("obs")) {
        Some(found) => {
            let (matrix, genes) = tenx::open(path, found).map_err(fail)?;
            if let Some(label) = &wanted.label {
                return Err(fail(format!(
                    "is a 10x file, which holds no labels (cell.label is {label}): set cell.label to null"
                )));
            }
            (matrix, genes, None)
        }
        None => anndata(&file, path, wanted).map_err(fail)?,
    };
    check_sizes(&matrix, genes.len()).map_err(fail)?;
    let is_log1p = file.group("uns").is_ok_and(|uns| uns.link_exists("log1p"));
    let mut identities = vec![(path.to_owned(), Identity::now(path)?)];
    for array in std::iter::once(&matrix.data).chain(&matrix.indices) {
        if !identities.iter().any(|(known, _)| *known == array.path) {
            identities.push((array.path.clone(), Identity::now(&array.path)?));
        }
    }
    Ok(H5ad { path: path.to_owned(), print: wide_print(path)?, identities, matrix, genes, labels, is_log1p })
}

/// Files of HDF5 that hold cells in another way.
fn refuse_others(file: &File) -> Result<(), String> {
    if attribute(file, "encoding-type").as_deref() == Some("MuData")
        || file.link_exists("mod") && !file.link_exists("X")
    {
        return Err(
            "is a .h5mu of several modalities: write one of them (mudata.read(PATH)[\"rna\"].write(\"rna.h5ad\"))"
                .into(),
        );
    }
    if let Some(encoding) = attribute(file, "encoding-type").filter(|encoding| encoding != "anndata") {
        return Err(format!("is of encoding {encoding}: expected anndata"));
    }
    Ok(())
}

type Parts = (Matrix, Vec<String>, Option<Labels>);

fn anndata(file: &File, path: &Path, wanted: &Wanted) -> Result<Parts, String> {
    let matrix = matrix::open(file, path, &wanted.matrix)?;
    let obs = Frame::open(file, "obs")?;
    let cells = matrix.cells as usize;
    match obs.len() {
        Some(len) if len != cells => {
            return Err(format!("obs has {len} cells, {} has {cells}: the file contradicts itself", matrix.place));
        }
        _ => {}
    }
    let labels = wanted.label.as_deref().map(|label| obs.labels(file, label, cells)).transpose()?;
    let genes = gene_names(file, &matrix.place, Some(matrix.genes as usize))?;
    Ok((matrix, genes, labels))
}

/// Names of the genes of the matrix at `place`.
fn gene_names(file: &File, place: &str, len: Option<usize>) -> Result<Vec<String>, String> {
    let tables: &[&str] = if place.starts_with("raw") { &["raw/var", "raw.var"] } else { &["var"] };
    let table = tables.iter().find_map(|path| Frame::open(file, path).ok());
    let table = table.ok_or_else(|| format!("no table {}: it is no .h5ad, or not whole", tables[0]))?;
    let found = table.len().ok_or_else(|| format!("{} has no index", tables[0]))?;
    if let Some(len) = len.filter(|len| *len != found) {
        return Err(format!("{} has {found} genes, {place} has {len}: the file contradicts itself", tables[0]));
    }
    table.index(found)
}

fn check_sizes(matrix: &Matrix, genes: usize) -> Result<(), String> {
    let Matrix { cells, genes: columns, place, .. } = matrix;
    if *cells == 0 || *columns == 0 {
        return Err(format!("{place} has {cells} cells and {columns} genes: there is nothing to train on"));
    }
    if genes as u64 != *columns {
        return Err(format!("{place} has {columns} genes, {genes} are named: the file contradicts itself"));
    }
    if *cells > u64::from(u32::MAX) || *columns > u64::from(u32::MAX) / 2 {
        return Err(format!("{place} has {cells} cells and {columns} genes: more than can be numbered"));
    }
    Ok(())
}

/// Names of the cells of the file at `path`: its index of `obs`, or the barcodes of a 10x file.
///
/// # Errors
/// It cannot be read.
pub fn cell_names(path: &Path) -> Result<Vec<String>, DataError> {
    let file = checked(path)?;
    let names = match tenx::group(&file).filter(|_| !file.link_exists("obs")) {
        Some(group) => tenx::barcodes(&group),
        None => Frame::open(&file, "obs").and_then(|obs| obs.index(obs.len().ok_or("obs has no index")?)),
    };
    names.map_err(|problem| file_error(path, problem))
}

/// Numbers `[cells, width]` that the file at `path` keeps of its cells under `obsm/NAME`.
///
/// # Errors
/// It cannot be read, or has none of this name.
pub fn obsm(path: &Path, name: &str) -> Result<ndarray::Array2<f32>, DataError> {
    let read = |file: File| file.dataset(&format!("obsm/{name}"))?.read_2d::<f32>();
    read(checked(path)?).map_err(|error| file_error(path, format!("obsm/{name}: {error}")))
}

/// The genes of a reference: of an `.h5ad`, or of text with one name a line.
///
/// # Errors
/// It cannot be read, or names nothing.
pub fn genes_of(path: &Path) -> Result<Vec<String>, DataError> {
    let is_hdf5 = path.extension().is_some_and(|ext| ext == "h5ad" || ext == "h5");
    let names = if is_hdf5 {
        let file = checked(path)?;
        gene_names(&file, "X", None).map_err(|problem| file_error(path, problem))?
    } else {
        let failed = |error: std::io::Error| file_error(path, error.to_string());
        let lines = std::io::BufReader::new(std::fs::File::open(path).map_err(failed)?).lines();
        let lines: Vec<String> = lines.collect::<Result<_, _>>().map_err(failed)?;
        lines.iter().map(|line| line.trim().to_owned()).filter(|name| !name.is_empty()).collect()
    };
    if names.is_empty() {
        return Err(file_error(path, "names no gene (cell.reference)"));
    }
    Ok(names)
}
