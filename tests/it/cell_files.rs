//! Files of cells through the real programs: sample data, batches, and files that nobody should leave.

use crate::support::{Runs, folder, launch_program, read_tensors, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const TINY: &str = r#"
task: cell
seed: 7
cell: {autoencoder: {hidden: [8], latent: 4}, unet: {hidden: [8, 8]}, classifier: {hidden: [8, 8, 8]}, min_cells: 0, min_genes: 0}
data: {split_ratio: [0.6, 0.2, 0.2]}
train: {batch_size: 8, max_steps: 2, num_workers: 1}
log: {plots: false}
"#;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cells").join(name)
}

fn numbers(bytes: &[u8]) -> Vec<i64> {
    bytes.chunks_exact(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect()
}

/// Sample cells of every layout, made by the verb; the cells of a step on one rank are those of three together.
#[test]
fn sample_cells_of_every_layout_are_batches_of_different_lengths() {
    let here = folder();
    for layout in ["csr", "gzip", "dense"] {
        let out = here.path().join(layout);
        let mut made = Command::new(launch_program());
        made.args(["sample-data", "--task", "cell", "--cells", "200", "--genes", "90", "--layout", layout, "--out"]);
        let ended = run(made.arg(&out), here.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        let file = here.path().join("batch.safetensors");
        let batch = |rank: usize, world: usize| {
            let runs = Runs::of(TINY, &out, &[&format!("train.batch_size={}", 24 / world)]);
            let mut command = runs.command(&["batch"]);
            command
                .args(["--step", "3", "--rank", &rank.to_string(), "--world", &world.to_string(), "--out"])
                .arg(&file);
            let ended = run(&mut command, here.path());
            assert_eq!(ended.code, Some(0), "{ended}");
            let tensors = read_tensors(&file);
            let of = |name: &str| tensors[name].1.clone();
            let offsets = numbers(&of("ids.offsets"));
            assert!(offsets.is_sorted() && 2 * offsets[offsets.len() - 1] as usize == of("ids").len(), "{layout}");
            assert_eq!((of("ids").len(), offsets.len()), (of("values").len(), 24 / world + 1));
            // Per cell its number, label, genes and counts.
            let (ids, labels) = (numbers(&of("sample_ids")), numbers(&of("label")));
            let parts = offsets.windows(2).map(|ends| 2 * ends[0] as usize..2 * ends[1] as usize);
            let cells = parts.map(|range| (of("ids")[range.clone()].to_vec(), of("values")[range].to_vec()));
            let mut cells: Vec<_> = ids.into_iter().zip(labels).zip(cells).collect();
            cells.sort();
            cells
        };
        let whole = batch(0, 1);
        let mut parts: Vec<_> = (0..3).flat_map(|rank| batch(rank, 3)).collect();
        parts.sort();
        assert!(whole == parts && whole.iter().all(|((_, label), (ids, _))| (0..5).contains(label) && !ids.is_empty()));
    }
}

/// A file that is alone is an error that names it; the run ends as one whose data are bad.
#[test]
fn files_that_nobody_should_leave_end_a_run_by_name() {
    for (file, says) in [
        ("nan.h5ad", "holds NaN for gene"),
        ("bomb.h5ad", "chunk 0 of /X/data"),
        ("pointer_absurd.h5ad", "X/indptr"),
        ("x_virtual.h5ad", "not credible"),
        ("mudata.h5ad", "is a .h5mu"),
        ("column_missing.h5ad", "its columns: other"),
    ] {
        let (runs, begun) = (Runs::of(TINY, &fixture(file), &[]), Instant::now());
        let mut command = runs.command(&["--ranks", "1", "--name", "r"]);
        let ended = run(&mut command, runs.path());
        assert_eq!(ended.code, Some(4), "{file}: {ended}");
        let told = format!("{}{}", ended.out, ended.err);
        assert!(told.contains(file) && told.contains(says), "{file}: {ended}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{file}");
    }
}

/// A group whose tree is its own child: libhdf5 would never return, the helper process takes the harm.
#[test]
fn metadata_that_lead_in_circles_end_a_run_too() {
    let here = folder();
    let path = here.path().join("circle.h5ad");
    let mut bytes = fs::read(fixture("earliest.h5ad")).unwrap();
    let trees: Vec<usize> = bytes
        .windows(5)
        .enumerate()
        .filter(|(_, five)| *five == [b'T', b'R', b'E', b'E', 0])
        .map(|(at, _)| at)
        .collect();
    assert!(!trees.is_empty());
    for at in trees {
        // Level 1, and the first child (behind signature, kind, level, entries, two siblings and a key) is the node itself.
        bytes[at + 5] = 1;
        bytes[at + 32..at + 40].copy_from_slice(&(at as u64).to_le_bytes());
    }
    fs::write(&path, bytes).unwrap();
    let runs = Runs::of(TINY, &path, &[]);
    let ended = run(&mut runs.command(&["--ranks", "1", "--name", "r"]), runs.path());
    assert!(ended.code == Some(4), "{ended}");
    assert!(format!("{}{}", ended.out, ended.err).contains("circle.h5ad"), "{ended}");
}
