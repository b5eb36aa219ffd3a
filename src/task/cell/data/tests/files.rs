//! Files as anndata of every age and others leave them, and files that nobody should leave (tests/fixtures/make_cells.py).

use super::*;
use serde::Deserialize;
use std::path::Path;
use std::time::{Duration, Instant};

#[derive(Deserialize)]
struct Expected {
    good: Vec<Good>,
    bad: Vec<Bad>,
}

#[derive(Deserialize)]
struct Good {
    file: String,
    matrix: String,
    label: Option<String>,
    /// Per cell the genes and values that are not 0.
    cells: Vec<Vec<(usize, f64)>>,
    labels: Vec<Option<String>>,
}

#[derive(Deserialize)]
struct Bad {
    file: String,
    says: Vec<String>,
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cells")
}

fn expected() -> Expected {
    serde_json::from_slice(&std::fs::read(fixtures().join("expected.json")).unwrap()).unwrap()
}

/// A config without filters for one file.
fn config_of(path: &Path, matrix: &str, label: Option<&str>) -> Config {
    let mut config = spec::task::config("cell");
    config.data.dataset_path = path.to_owned();
    config.with_section(|cell: &mut CellConfig| {
        (cell.matrix, cell.label) = (matrix.into(), label.map(String::from));
        (cell.min_cells, cell.min_genes) = (0, 0);
    });
    config
}

/// Cells as expected, those without a label left out where there are labels.
fn wanted(good: &Good) -> Vec<(BTreeMap<usize, u64>, Option<String>)> {
    let cells = good.cells.iter().zip(&good.labels);
    let kept = cells.filter(|(_, label)| good.label.is_none() || label.is_some());
    kept.map(|(cell, label)| {
        // As a batch has them.
        let values = cell.iter().map(|(gene, value)| (*gene, f64::from(*value as f32).to_bits()));
        (values.collect(), label.clone())
    })
    .collect()
}

fn found(data: &CellData) -> Vec<(BTreeMap<usize, u64>, Option<String>)> {
    let label = |label: i64| usize::try_from(label).ok().map(|label| data.facts.classes[label].clone());
    let one =
        |(values, of): Cell| (values.into_iter().map(|(gene, value)| (gene, value.to_bits())).collect(), label(of));
    all_of(&data.all).into_iter().map(one).collect()
}

#[test]
fn every_file_that_can_be_read_is_read_to_the_bit() {
    let index = tempfile::tempdir().unwrap();
    let all = expected().good;
    assert!(all.len() >= 80, "{}", all.len());
    let mut wrong = Vec::new();
    for good in &all {
        let config = config_of(&fixtures().join(&good.file), &good.matrix, good.label.as_deref());
        let begun = Instant::now();
        match open_cells(&config, &Team::alone(), index.path()) {
            Ok(data) if found(&data) == wanted(good) => {
                let node = TestDirectory::new(1 << 20);
                let team = Team { cache: Some(node.client(0, 1 << 20, false)), ..Team::alone() };
                let cached = open_cells(&config, &team, index.path()).unwrap();
                if found(&cached) != wanted(good) {
                    wrong.push(format!("{}: other cells through the cache", good.file));
                }
            }
            Ok(data) => {
                let at = found(&data).iter().zip(wanted(good)).position(|(found, wanted)| *found != wanted);
                wrong.push(format!("{} {}: {} cells, other ones from {at:?}", good.file, good.matrix, data.all.len()));
            }
            Err(error) => wrong.push(format!("{}: {error}", good.file)),
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", good.file);
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all.len(), wrong.join("\n"));
}

#[test]
fn every_bad_file_is_refused_by_name_and_reason() {
    let index = tempfile::tempdir().unwrap();
    let all = expected().bad;
    assert!(all.len() >= 60, "{}", all.len());
    let mut wrong = Vec::new();
    for bad in &all {
        let begun = Instant::now();
        let config = config_of(&fixtures().join(&bad.file), "X", Some("celltype"));
        match open_cells(&config, &Team::alone(), index.path()) {
            Ok(_) => wrong.push(format!("{}: used", bad.file)),
            Err(error) => {
                let words = error.to_string();
                let missing: Vec<_> = bad.says.iter().filter(|says| !words.contains(*says)).collect();
                if !missing.is_empty() || !(words.contains(&bad.file) || words.contains("none of 23 cells")) {
                    wrong.push(format!("{}: {missing:?} not in: {words}", bad.file));
                }
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", bad.file);
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all.len(), wrong.join("\n"));
}

#[test]
fn what_is_no_file_of_cells_is_named_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let refused =
        |path: &Path| open_cells(&config_of(path, "X", None), &Team::alone(), dir.path()).err().unwrap().to_string();
    let absent = refused(&dir.path().join("gone"));
    assert!(absent.contains("gone") && absent.contains("data.sample_if_missing"), "{absent}");
    let folder = dir.path().join("folder.h5ad");
    std::fs::create_dir(&folder).unwrap();
    assert!(refused(&folder).contains("no .h5ad or 10x .h5 file"));
    std::fs::write(folder.join(".zgroup"), "{}").unwrap();
    assert!(refused(&folder).contains("is a zarr store"));
    let labels = config_of(&fixtures().join("tenx_3.h5"), "X", Some("celltype"));
    let error = open_cells(&labels, &Team::alone(), dir.path()).err().unwrap().to_string();
    assert!(error.contains("tenx_3.h5") && error.contains("cell.label"), "{error}");
}

#[test]
fn values_that_are_no_counts_are_warned_of_or_refused() {
    let index = tempfile::tempdir().unwrap();
    let notes = |file: &str, change: &dyn Fn(&mut CellConfig)| {
        let mut config = config_of(&fixtures().join(file), "X", Some("celltype"));
        config.with_section(|cell: &mut CellConfig| change(cell));
        open_cells(&config, &Team::alone(), index.path()).map(|data| data.datasets.notes.join("\n"))
    };
    let lines = notes("layers.h5ad", &|_| {}).unwrap();
    assert!(
        lines.contains("warning: layers.h5ad: X looks log-transformed") && lines.contains("layers/counts"),
        "{lines}"
    );
    let lines = notes("label_missing.h5ad", &|_| {}).unwrap();
    assert!(lines.contains("warning: 1 cells have no label in obs/celltype: left out"), "{lines}");
    let scaled = notes("scaled.h5ad", &|_| {}).unwrap_err().to_string();
    assert!(scaled.contains("as scaled values are") && scaled.contains("cell.log1p: false"), "{scaled}");
    let used = notes("scaled.h5ad", &|cell| (cell.log1p, cell.target_sum) = (false, 0.0)).unwrap();
    assert!(used.contains("warning: scaled.h5ad: X looks scaled"), "{used}");
    let none = notes("csr_f4.h5ad", &|cell| cell.min_genes = 12).unwrap_err().to_string();
    assert!(none.contains("none of 23 cells is left: 23 express fewer than 12"), "{none}");
    let none = notes("csr_f4.h5ad", &|cell| cell.min_cells = 24).unwrap_err().to_string();
    assert!(none.contains("none of 11 genes is expressed in 24 cells"), "{none}");
}

#[test]
fn bad_files_beside_good_ones_are_left_out() {
    let (dir, index) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for file in ["csr_f4.h5ad", "nan.h5ad", "index_beyond.h5ad", "text.h5ad", "gzip.h5ad"] {
        std::fs::copy(fixtures().join(file), dir.path().join(file)).unwrap();
    }
    let mut config = config_of(dir.path(), "X", Some("celltype"));
    let data = open_cells(&config, &Team::alone(), index.path()).unwrap();
    assert_eq!(data.all.len(), 46);
    let skipped = data.datasets.skipped.join("\n");
    assert!(["nan.h5ad", "index_beyond.h5ad", "text.h5ad"].iter().all(|file| skipped.contains(file)), "{skipped}");
    config.data.skip_bad = false;
    let error = open_cells(&config, &Team::alone(), index.path()).err().unwrap().to_string();
    assert!(error.contains("text.h5ad") && error.contains("data.skip_bad"), "{error}");
}
