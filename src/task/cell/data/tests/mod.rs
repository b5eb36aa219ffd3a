//! The data set over sample data, as the loader reads it.

mod files;

use super::members::Part;
use super::sample::{Layout, SampleSpec, write_sample_data};
use super::*;
use crate::data::cache_testing::TestDirectory;
use crate::data::split::KeptSplit;
use crate::data::{Dataset, Dtype, ReadRequest, Scratch};
use crate::task::Team;
use spec::config::{CachePolicy, Config, ShuffleMode};
use spec::task::cell::{CellConfig, CopyPolicy};
use std::collections::BTreeMap;
use std::path::PathBuf;

struct Folder {
    dir: tempfile::TempDir,
    config: Config,
}

fn small() -> SampleSpec {
    SampleSpec { cells: 400, genes: 120, ..SampleSpec::default() }
}

fn folder(spec: &SampleSpec) -> Folder {
    let dir = tempfile::tempdir().unwrap();
    let mut config = spec::task::config("cell");
    config.data.dataset_path = dir.path().join("cells");
    config.data.split_ratio = [0.7, 0.2, 0.1];
    write_sample_data(&config.data.dataset_path, spec).unwrap();
    Folder { dir, config }
}

impl Folder {
    fn index(&self) -> PathBuf {
        self.dir.path().join("index")
    }

    fn open(&self) -> CellData {
        self.open_by(&Team::alone())
    }

    fn open_by(&self, team: &Team) -> CellData {
        open_cells(&self.config, team, &self.index()).unwrap_or_else(|error| panic!("{error}"))
    }

    fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }
}

/// A cell as the loader gives it: columns with values, and its label.
type Cell = (BTreeMap<usize, f64>, i64);

fn read(data: &CellDataset, index: usize, scratch: &mut Scratch) -> Cell {
    let specs = data.fields();
    let mut buffers: Vec<Vec<u8>> = specs.iter().map(|field| vec![0xEE; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    data.read(ReadRequest { epoch: 0, index }, &mut out, scratch).unwrap_or_else(|error| panic!("{error}"));
    let ids: Vec<usize> = match specs[0].dtype {
        Dtype::I16 => out[0].as_chunks::<2>().0.iter().map(|c| usize::from(u16::from_ne_bytes(*c))).collect(),
        _ => out[0].as_chunks::<4>().0.iter().map(|c| u32::from_ne_bytes(*c) as usize).collect(),
    };
    let values: Vec<f64> = match specs[1].dtype {
        Dtype::I16 => out[1].as_chunks::<2>().0.iter().map(|c| f64::from(u16::from_ne_bytes(*c))).collect(),
        _ => out[1].as_chunks::<4>().0.iter().map(|c| f64::from(f32::from_ne_bytes(*c))).collect(),
    };
    assert!(ids.len() == values.len() && ids.is_sorted_by(|a, b| a < b));
    let label = i64::from_ne_bytes(out[2][..].try_into().unwrap());
    (ids.into_iter().zip(values).collect(), label)
}

fn all_of(data: &CellDataset) -> Vec<Cell> {
    let mut scratch = Scratch::default();
    (0..data.len()).map(|index| read(data, index, &mut scratch)).collect()
}

/// Genes by name, so that other columns make no other cell.
fn named(cells: &[Cell], facts: &CellFacts) -> Vec<(BTreeMap<String, u64>, Option<String>)> {
    let one = |(values, label): &Cell| {
        let values = values.iter().map(|(gene, value)| (facts.genes[*gene].clone(), value.to_bits())).collect();
        (values, usize::try_from(*label).ok().map(|label| facts.classes[label].clone()))
    };
    cells.iter().map(one).collect()
}

#[test]
fn sample_cells_are_filtered_labelled_and_the_same_in_every_layout() {
    let csr = folder(&small());
    let data = csr.open();
    let lines = data.datasets.notes.join("\n");
    assert!(lines.contains("cells: 395 of 400 in 1 file; genes: 100 of 120"), "{lines}");
    assert!(
        lines.contains("5 cells that express few genes are left out") && lines.contains("labels: 5 classes"),
        "{lines}"
    );
    assert_eq!(data.facts.classes, ["B cell", "T cell", "hepatocyte", "macrophage", "neuron"]);
    assert_eq!((data.facts.cells, data.facts.genes.len(), data.all.len()), (395, 100, 395));
    let cells = all_of(&data.all);
    let whole = named(&cells, &data.facts);
    assert!(cells.iter().all(|(values, label)| values.len() >= 10 && (0..5).contains(label)));
    for layout in [Layout::Gzip, Layout::Dense] {
        let here = folder(&SampleSpec { layout, ..small() });
        let other = here.open();
        assert_eq!(named(&all_of(&other.all), &other.facts), whole, "{layout:?}");
    }
    // Types differ, and a cell is like others of its type.
    let sizes: Vec<usize> = data.splits.iter().map(|split| split.len()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 395);
    assert!(sizes.iter().all(|size| *size > 10), "{sizes:?}");
    // Splits have each cell once, by its number.
    let mut numbers: Vec<u64> =
        data.splits.iter().flat_map(|s| (0..s.len() as u64).map(|n| s.number(n).unwrap())).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..395).collect::<Vec<_>>());
    let mut scratch = Scratch::default();
    for n in 0..data.splits[1].len() {
        let number = data.splits[1].number(n as u64).unwrap();
        assert_eq!(read(&data.splits[1], n, &mut scratch), cells[number as usize]);
    }
    assert!(data.all.describe(3).starts_with("cells.h5ad cell "));
}

#[test]
fn cells_come_through_the_cache_as_from_the_file() {
    for layout in [Layout::Csr, Layout::Gzip, Layout::Dense] {
        let folder = folder(&SampleSpec { layout, ..small() });
        let plain = all_of(&folder.open().all);
        for capacity in [1 << 20, 40 << 10, 1 << 12] {
            let node = TestDirectory::new(capacity);
            let team = Team { cache: Some(node.client(0, 1 << 20, false)), ..Team::alone() };
            let cached = folder.open_by(&team);
            for _ in 0..2 {
                assert_eq!(all_of(&cached.all), plain, "{layout:?} {capacity}");
            }
        }
    }
}

#[test]
fn the_second_start_reads_no_values() {
    let folder = folder(&SampleSpec { layout: Layout::Gzip, ..small() })
        .with(|config| config.with_section(|cell: &mut CellConfig| cell.copy = CopyPolicy::Off));
    let first = folder.open();
    assert!(first.store.reader.reader().stats().1 > 0);
    let second = folder.open();
    let (_, decoded) = second.store.reader.reader().stats();
    assert_eq!(decoded, 0, "pointers have their own reader");
    assert_eq!((&first.facts, first.totals), (&second.facts, second.totals));
    assert_eq!(all_of(&first.all), all_of(&second.all));
    // Other filters are other findings only where they are looked for.
    let folder = folder.with(|config| config.with_section(|cell: &mut CellConfig| cell.min_genes = 98));
    let third = folder.open();
    assert!(third.store.reader.reader().stats().1 == 0 && third.facts.cells < 395);
}

#[test]
fn compressed_cells_read_at_random_come_from_a_plain_copy() {
    let folder = folder(&SampleSpec { layout: Layout::Gzip, ..small() })
        .with(|config| config.data.shuffle_mode = ShuffleMode::Global);
    let copies = |folder: &Folder| {
        let files = std::fs::read_dir(folder.index()).unwrap().map(|file| file.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|ext| ext == "plain")).collect::<Vec<_>>()
    };
    let with = |policy| {
        let mut config = folder.config.clone();
        config.with_section(|cell: &mut CellConfig| cell.copy = policy);
        open_cells(&config, &Team::alone(), &folder.index()).unwrap()
    };
    let decoded = with(CopyPolicy::Off);
    let cells = all_of(&decoded.all);
    assert!(decoded.store.reader.reader().stats().1 > 0 && copies(&folder).is_empty());
    // In the order of rows, no chunk is decoded twice.
    open_whole(&folder.config, &Team::alone(), &folder.index()).unwrap();
    assert!(copies(&folder).is_empty());
    for start in ["made", "found"] {
        let data = folder.open();
        let lines = data.datasets.notes.join("\n");
        assert!(lines.contains("cells are read from a copy of 0 MiB"), "{start}: {lines}");
        assert_eq!(all_of(&data.all), cells, "{start}");
        assert_eq!(data.store.reader.reader().stats().1, 0, "{start}");
        assert_eq!(copies(&folder).len(), 1, "{start}");
    }
    // The page cache holds all.
    let node = TestDirectory::new(1 << 20);
    let cached = folder.open_by(&Team { cache: Some(node.client(0, 1 << 20, false)), ..Team::alone() });
    assert!(!cached.datasets.notes.join("\n").contains("copy"));
    assert_eq!(all_of(&cached.all), cells);
    // One that was cut short is made again.
    let copy = copies(&folder).pop().unwrap();
    let whole = std::fs::read(&copy).unwrap();
    std::fs::write(&copy, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(all_of(&folder.open().all), cells);
    assert_eq!(std::fs::read(&copy).unwrap(), whole);
    // No copy can be made here: the file is read, and a line says so.
    std::fs::remove_file(&copy).unwrap();
    std::fs::create_dir(&copy).unwrap();
    let data = folder.open();
    let lines = data.datasets.notes.join("\n");
    assert!(lines.contains("warning: cells.h5ad is compressed") && lines.contains("no copy was made"), "{lines}");
    assert_eq!(all_of(&data.all), cells);
}

#[test]
fn cells_of_every_sparse_layout_come_from_a_copy_where_that_is_asked_for() {
    for (layout, mode) in
        [(Layout::Csr, ShuffleMode::Block), (Layout::Csr, ShuffleMode::Global), (Layout::Gzip, ShuffleMode::Block)]
    {
        let folder = folder(&SampleSpec { layout, ..small() }).with(|config| config.data.shuffle_mode = mode);
        let plain = folder.open();
        assert!(
            !plain.datasets.notes.join("\n").contains("copy") || mode == ShuffleMode::Global,
            "{:?}",
            plain.datasets.notes
        );
        let cells = all_of(&plain.all);
        let read = plain.store.reader.reader().stats().0;
        let folder = folder.with(|config| config.with_section(|cell: &mut CellConfig| cell.copy = CopyPolicy::Always));
        let copied = folder.open();
        let lines = copied.datasets.notes.join("\n");
        assert!(lines.contains("more than the page cache holds: cells are read from a copy of"), "{lines}");
        let before = copied.store.reader.reader().stats();
        assert_eq!(all_of(&copied.all), cells, "{layout:?} {mode:?}");
        let after = copied.store.reader.reader().stats();
        assert_eq!(after.1, 0, "nothing is decoded");
        assert!(layout != Layout::Csr || 2 * (after.0 - before.0) <= read, "{} of {read} bytes", after.0 - before.0);
        // The copy itself needs no copy.
        let again = folder.open();
        assert_eq!(all_of(&again.all), cells);
    }
    // Rows of dense matrices are read where they lie.
    let folder = folder(&SampleSpec { layout: Layout::Dense, ..small() })
        .with(|config| config.with_section(|cell: &mut CellConfig| cell.copy = CopyPolicy::Always));
    assert!(!folder.open().datasets.notes.join("\n").contains("copy"));
}

#[test]
fn equal_sample_cells_are_equal_bytes_whenever_they_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        write_sample_data(&dir.path().join(name), &SampleSpec { cells: 60, genes: 90, ..small() }).unwrap();
        std::fs::read(dir.path().join(name).join("cells.h5ad")).unwrap()
    };
    let first = write("first");
    // HDF5 keeps times of objects in whole seconds.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(write("second") == first, "the same cells are other bytes a second later");
}

#[test]
fn ranks_share_the_scan_and_agree() {
    let alone = folder(&small());
    let expected = alone.open();
    let world = 3;
    let (gathered, barrier) =
        (std::sync::Mutex::new(BTreeMap::<(usize, usize), Vec<u8>>::new()), std::sync::Barrier::new(world));
    let results: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (gathered, barrier, folder) = (&gathered, &barrier, &alone);
                scope.spawn(move || {
                    let round = std::cell::Cell::new(0);
                    let gather = |bytes: &[u8]| {
                        let now = round.replace(round.get() + 1);
                        gathered.lock().unwrap().insert((now, rank), bytes.to_vec());
                        barrier.wait();
                        Ok((0..world).map(|rank| gathered.lock().unwrap()[&(now, rank)].clone()).collect())
                    };
                    let team = Team { rank, world_size: world, gather: &gather, ..Team::alone() };
                    let index = folder.dir.path().join("other-index");
                    let data = open_cells(&folder.config, &team, &index).unwrap();
                    (data.facts.clone(), data.totals, all_of(&data.all))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (facts, totals, cells) in results {
        assert_eq!((&facts, totals), (&expected.facts, expected.totals));
        assert_eq!(cells, all_of(&expected.all));
    }
}

#[test]
fn several_files_are_one_data_set_joined_by_genes() {
    let folder = folder(&small());
    let root = &folder.config.data.dataset_path;
    let more = tempfile::tempdir().unwrap();
    write_sample_data(&more.path().join("b"), &SampleSpec { genes: 110, seed: 7, ..small() }).unwrap();
    std::fs::copy(more.path().join("b/cells.h5ad"), root.join("more.h5ad")).unwrap();
    let data = folder.open();
    let lines = data.datasets.notes.join("\n");
    assert!(lines.contains("genes: the 110 that all 2 files have, of 120 in the first"), "{lines}");
    assert!(data.facts.cells > 780 && data.facts.genes.iter().all(|gene| gene.as_str() < "Gene00110"));
    let cells = named(&all_of(&data.all), &data.facts);
    // The second file's cells are its own.
    let mut alone = folder.config.clone();
    alone.data.dataset_path = root.join("more.h5ad");
    let second = open_cells(&alone, &Team::alone(), &folder.index()).unwrap();
    let second = named(&all_of(&second.all), &second.facts);
    assert_eq!(
        &cells[cells.len() - second.len()..].iter().map(|cell| &cell.1).collect::<Vec<_>>(),
        &second.iter().map(|cell| &cell.1).collect::<Vec<_>>()
    );
    let (joined, own) = (&cells[cells.len() - 1].0, &second[second.len() - 1].0);
    assert!(joined.iter().all(|(gene, value)| own.get(gene).is_none_or(|other| other == value)));
    // A reference decides about genes, and none of them is left out.
    let reference = folder.dir.path().join("genes.txt");
    std::fs::write(&reference, "Gene00003\nnone\nGene00001\n\nGene00119\n").unwrap();
    let folder = folder.with(|config| {
        config.with_section(|cell: &mut CellConfig| (cell.reference, cell.min_genes) = (Some(reference), 1));
    });
    assert_eq!(folder.open().facts.genes, ["Gene00003", "none", "Gene00001", "Gene00119"]);
}

#[test]
fn a_resumed_run_keeps_the_split_of_its_cells() {
    let folder = folder(&small());
    let first = folder.open();
    let train: Vec<u64> = (0..first.splits[0].len() as u64).map(|n| first.splits[0].number(n).unwrap()).collect();
    let kept = KeptSplit { list: first.datasets.split.unwrap(), choice: None, checkpoint: "step-4".into() };
    // Another ratio, another name, and another file beside it: the cells stay where they were.
    let root = folder.config.data.dataset_path.clone();
    std::fs::rename(root.join("cells.h5ad"), root.join("z.h5ad")).unwrap();
    let more = tempfile::tempdir().unwrap();
    write_sample_data(&more.path().join("b"), &SampleSpec { seed: 7, ..small() }).unwrap();
    std::fs::copy(more.path().join("b/cells.h5ad"), root.join("a.h5ad")).unwrap();
    let folder = folder.with(|config| config.data.split_ratio = [0.2, 0.4, 0.4]);
    let again = folder.open_by(&Team { kept: Some(&kept), ..Team::alone() });
    let lines = again.datasets.notes.join("\n");
    assert!(
        lines.contains("cells.h5ad is z.h5ad now") && lines.contains("1 file is new and in no split: a.h5ad"),
        "{lines}"
    );
    let now: Vec<u64> = (0..again.splits[0].len() as u64).map(|n| again.splits[0].number(n).unwrap()).collect();
    assert_eq!(now, train);
    // Other content under the same name: rows say nothing then.
    std::fs::remove_file(root.join("a.h5ad")).unwrap();
    std::fs::rename(root.join("z.h5ad"), root.join("cells.h5ad")).unwrap();
    std::fs::copy(more.path().join("b/cells.h5ad"), root.join("cells.h5ad")).unwrap();
    let error =
        open_cells(&folder.config, &Team { kept: Some(&kept), ..Team::alone() }, &folder.index()).err().unwrap();
    assert!(error.to_string().contains("cells.h5ad has other content"), "{error}");
}

#[test]
fn counts_beyond_a_byte_and_fractions_have_their_types() {
    let data = folder(&SampleSpec { genes: 80, cells: 50, ..small() }).open();
    assert_eq!([data.splits[0].fields()[0].dtype, data.splits[0].fields()[1].dtype], [Dtype::I16, Dtype::I16]);
    assert!(data.totals.fraction.is_none() && data.totals.max > 1.0);
    assert_eq!(data.splits[0].pages().unwrap().sequences, [0]);
}

#[test]
fn pages_are_entries_and_limits_are_spread() {
    let folder = folder(&SampleSpec { cells: 2000, ..small() }).with(|config| config.data.max_train_windows = 100);
    let data = folder.open();
    assert_eq!(data.splits[0].len(), 100);
    let pages = data.splits[0].pages().unwrap().pages;
    assert!(pages.len() > 1 && pages.is_sorted() && pages[0] == 0, "{pages:?}");
    let first: Vec<u64> = (0..100).map(|n| data.splits[0].number(n).unwrap()).collect();
    assert!(first[0] < 100 && first[99] > 1800, "{first:?}");
    assert_eq!(Part::Out as u8, 3);
}

#[test]
fn the_next_use_of_an_entry_is_its_next_cell() {
    let node = TestDirectory::new(1 << 20);
    let folder = folder(&SampleSpec { cells: 2000, ..small() }).with(|config| config.data.cache = CachePolicy::NextUse);
    let data = folder.open_by(&Team { cache: Some(node.client(0, 1 << 20, false)), ..Team::alone() });
    assert_eq!(all_of(&data.splits[0]).len(), data.splits[0].len());
}
