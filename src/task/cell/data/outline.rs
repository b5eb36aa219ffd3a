//! Sizes of the cells for a plan.

use super::dataset::policy_of;
use super::open::{CellData, open_cells};
use super::sample::{EMPTY_GENES, POOR_CELLS, SampleSpec, TYPES};
use crate::data::{DataError, Dtype, FieldSpec};
use crate::task::Team;
use crate::task::outline::{Outline, SCRATCH_BYTES};
use spec::config::Config;
use spec::contract::DataSizes;
use std::path::Path;
use std::sync::Arc;

/// Memory of a value while a thread reads it: its gene and itself as read, as widened, and as sorted.
const VALUE_BYTES: u64 = 48;

/// Shapes and sizes of the data set. It is scanned for them, as the genes in use are known by their cells alone; the index keeps
/// that for the run. Where nothing is there yet, those of sample data.
///
/// # Errors
/// As [`super::open()`].
pub fn outline(config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
    let path = &config.data.dataset_path;
    if config.data.sample_if_missing && !path.exists() {
        return Ok(of_sample(config));
    }
    let CellData { datasets, store, facts, .. } = open_cells(config, &Team::alone(), index_dir)?;
    let entries: Vec<u64> = store.files.iter().flat_map(|file| &file.bytes).map(|bytes| u64::from(*bytes)).collect();
    let useful_bytes: u64 = entries.iter().sum();
    let entry = useful_bytes / (entries.len() as u64).max(1);
    let arrays = store.reader.reader().arrays();
    let chunk_bytes =
        arrays.iter().filter(|array| !array.is_plain()).map(|array| array.chunk_bytes()).max().unwrap_or(0);
    let most_values = store.files.iter().map(|file| file.cells * facts.most as u64).max().unwrap_or(0);
    let sizes = DataSizes {
        entry_bytes: [entry; 2],
        scratch_bytes: (most_values.min(4 * entry) * VALUE_BYTES / 3 + 3 * chunk_bytes).max(SCRATCH_BYTES),
        chunk_bytes: (chunk_bytes > 0).then_some(chunk_bytes),
        useful_bytes,
        useful: format!("{} cells in {} entries", facts.cells, entries.len()),
        useful_is_exact: true,
        auto_policy: policy_of(&config.data),
        facts: Vec::new(),
    };
    let fields = datasets.train.fields().to_vec();
    let mut outline = Outline::new(fields.clone(), fields, sizes);
    outline.datasets.facts = Some(Arc::clone(&facts) as _);
    Ok(outline)
}

/// Shapes of the usual sample data, for a plan before it is made: all genes but the empty ones are in use.
fn of_sample(config: &Config) -> Outline {
    let usual = SampleSpec::default();
    let genes = usual.genes - EMPTY_GENES;
    let ids = FieldSpec::ragged("ids", &[], Dtype::I16, genes);
    let values = FieldSpec::along("values", &[], Dtype::I16, (0, &ids));
    let fields = vec![ids, values, FieldSpec::new("label", &[], Dtype::I64)];
    let useful_bytes = (usual.cells * genes * 3) as u64;
    let sizes = DataSizes {
        entry_bytes: [useful_bytes / 20; 2],
        scratch_bytes: SCRATCH_BYTES,
        useful_bytes,
        useful: format!("{} sample cells", usual.cells),
        auto_policy: policy_of(&config.data),
        ..DataSizes::default()
    };
    let mut outline = Outline::new(fields.clone(), fields, sizes);
    outline.datasets.facts = Some(Arc::new(super::CellFacts {
        genes: (0..genes).map(|gene| format!("Gene{gene:05}")).collect(),
        classes: TYPES.iter().map(|(name, _)| name.to_string()).collect(),
        label: Some("celltype".into()),
        cells: (usual.cells - POOR_CELLS) as u64,
        most: genes,
    }));
    outline
}
