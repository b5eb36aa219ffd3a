//! Files as h5py and other writers leave them (tests/fixtures/make_hdf5.py), and what a hostile hand makes of them.

use super::write::{Row, Storage, write_session};
use super::*;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::gather::Transform;
use crate::data::{DataError, Scratch};
use ::hdf5::plist::dataset_create::ChunkOpts;
use std::path::Path;
use std::sync::Arc;

/// Rows of each fixture, unless said otherwise.
const ROWS: usize = 50;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hdf5").join(name).with_extension("hdf5")
}

fn wanted() -> Wanted {
    let fields = vec![("emg".into(), 16), ("joint_angles".into(), 20)];
    Wanted { group: "emg2pose".into(), dataset: "timeseries".into(), fields }
}

/// The formulas of make_hdf5.py.
fn emg(row: usize, channel: usize) -> f32 {
    ((37 * row + 11 * channel) % 256) as f32 - 128.0
}

fn angle(row: usize, joint: usize) -> f32 {
    ((29 * row + 7 * joint) % 512) as f32 / 64.0 - 4.0
}

fn rows(n: usize) -> Vec<Row> {
    let row = |i| Row {
        time: i as f64 / 2000.0,
        joint_angles: std::array::from_fn(|joint| f64::from(angle(i, joint))),
        emg: std::array::from_fn(|channel| emg(i, channel)),
    };
    (0..n).map(row).collect()
}

/// Every window of 7 rows, and all rows, against the formulas; rows from `written` on are zero.
fn check(path: &Path, total: usize, written: usize) {
    let session = SessionData::open(path, &wanted()).unwrap();
    assert_eq!(session.len(), total as u64, "{}", path.display());
    for (start, end) in (0..=total - 7).map(|start| (start, start + 7)).chain([(0, total)]) {
        let fields = session.window(start as u64, end as u64).unwrap();
        for row in start..end {
            let there = if row < written { 1.0 } else { 0.0 };
            let found: Vec<f32> = fields[0][(row - start) * 16..][..16].to_vec();
            let expected: Vec<f32> = (0..16).map(|channel| there * emg(row, channel)).collect();
            assert_eq!(found, expected, "{}: emg of row {row}", path.display());
            let found: Vec<f32> = fields[1][(row - start) * 20..][..20].to_vec();
            let expected: Vec<f32> = (0..20).map(|joint| there * angle(row, joint)).collect();
            assert_eq!(found, expected, "{}: angles of row {row}", path.display());
        }
    }
}

#[test]
fn files_of_other_writers_are_read_without_libhdf5() {
    for name in [
        "gzip_shuffle",
        "lzf",
        "lzf_shuffle_fletcher",
        "lz4",
        "fletcher32",
        "big_endian",
        "reordered_f4_angles",
        "userblock",
        "track_times",
        "contiguous",
        "earliest_btree_v1",
        "v18",
        "latest_single_chunk",
        "latest_implicit",
        "latest_fixed_array",
        "latest_extensible_array",
        "latest_btree_v2_2d",
        "resizable_earliest",
    ] {
        let path = fixture(name);
        let layout = open::open(&path, &wanted()).unwrap().table.layout;
        assert!(!matches!(layout, Layout::Library { .. }), "{name}: {layout:?}");
        check(&path, ROWS, ROWS);
    }
    check(&fixture("never_written"), 100, ROWS);
}

/// A variable-length string is of another size in memory than in the file, and so on.
#[test]
fn odd_types_are_placed_by_the_file_and_converted_by_libhdf5() {
    for name in ["note_behind", "note_before_gzip", "note_chunks", "sequences_lzf", "matrix", "unused"] {
        let layout = open::open(&fixture(name), &wanted()).unwrap().table.layout;
        assert!(!matches!(layout, Layout::Library { .. }), "{name}: {layout:?}");
        check(&fixture(name), ROWS, ROWS);
    }
    for (name, says) in
        [("half", "2 bytes"), ("brain", "2 bytes"), ("odd_bias", "4 bytes"), ("long_double", "16 bytes")]
    {
        let layout = open::open(&fixture(name), &wanted()).unwrap().table.layout;
        assert!(matches!(&layout, Layout::Library { reason, .. } if reason.contains(says)), "{name}: {layout:?}");
        check(&fixture(name), ROWS, ROWS);
    }
    for (name, says) in [("enum_emg", "field emg is [enum"), ("complex_emg", "field emg is [")] {
        let error = open::open(&fixture(name), &wanted()).map(drop).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("expected f4 or f8"), "{error}");
    }
}

fn copied(names: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::copy(fixture("any").with_file_name(name), dir.path().join(name)).unwrap();
    }
    dir
}

#[test]
fn parts_of_virtual_datasets_are_read_one_by_one_and_missed_by_name() {
    let parts = ["virtual_even.part", "virtual_odd.part"];
    let dir = copied(&["virtual.hdf5", "virtual_twice.hdf5", "virtual_gap.hdf5", parts[0], parts[1]]);
    let path = |name: &str| dir.path().join(name);
    check(&path("virtual.hdf5"), ROWS, ROWS);
    check(&path("virtual_twice.hdf5"), ROWS, ROWS);
    // Rows in no part are no data.
    let gap = open::open(&path("virtual_gap.hdf5"), &wanted()).unwrap().table;
    assert_eq!((gap.unwritten.as_slice(), gap.written_rows()), (&[[40, 50]][..], 40));
    let table = open::open(&path("virtual.hdf5"), &wanted()).unwrap().table;
    let away = path("away");
    std::fs::rename(path(parts[1]), &away).unwrap();
    for name in ["virtual.hdf5", "virtual_twice.hdf5"] {
        let error = open::open(&path(name), &wanted()).map(drop).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(parts[1]) && error.contains("No such file"), "{error}");
    }
    let error = read_all(table.clone()).unwrap_err().to_string();
    assert!(error.contains(parts[1]) && error.contains("No such file"), "{error}");
    std::fs::write(path(parts[1]), "no HDF5").unwrap();
    let error = open::open(&path("virtual.hdf5"), &wanted()).map(drop).unwrap_err().to_string();
    assert!(error.contains(parts[1]) && error.contains("cannot be read as HDF5"), "{error}");
    let error = read_all(table).unwrap_err().to_string();
    assert!(error.contains(parts[1]) && error.contains("changed since"), "{error}");
    std::fs::rename(&away, path(parts[1])).unwrap();
    check(&path("virtual.hdf5"), ROWS, ROWS);
}

#[test]
fn external_files_that_end_too_early_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("external.hdf5"), dir.path().join("rows.raw"));
    let file = ::hdf5::File::create(&path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let builder = group.new_dataset::<Row>().shape([ROWS]);
    let builder = builder.with_dcpl(|plist| plist.external(raw.to_str().unwrap(), 0, ROWS * size_of::<Row>()));
    builder.create("timeseries").unwrap().write_raw(&rows(ROWS)[..]).unwrap();
    drop((builder, group, file));
    check(&path, ROWS, ROWS);
    let error = || open::open(&path, &wanted()).map(drop).unwrap_err().to_string();
    std::fs::OpenOptions::new().write(true).open(&raw).unwrap().set_len(1000).unwrap();
    let short = error();
    assert!(short.contains("rows.raw") && short.contains("it ends at byte 1000"), "{short}");
    std::fs::remove_file(&raw).unwrap();
    let gone = error();
    assert!(gone.contains("rows.raw") && gone.contains("No such file"), "{gone}");
}

#[test]
fn rows_never_written_are_noted() {
    let table = open::open(&fixture("never_written"), &wanted()).unwrap().table;
    // 50 rows in chunks of 16.
    assert_eq!((table.unwritten.as_slice(), table.written_rows()), (&[[64, 100]][..], 64));
    assert_eq!(table.written(), [[0, 64]]);
}

#[test]
fn filters_that_nothing_here_decodes_are_named() {
    for (name, expected) in [("bzip2", "bzip2 (filter 307)"), ("zfp", "zfp (filter 32013)"), ("empty", "has no rows")] {
        let error = open::open(&fixture(name), &wanted()).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
}

#[test]
fn a_last_chunk_left_unfiltered_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("edge.hdf5");
    let file = ::hdf5::File::with_options().with_fapl(|access| access.libver_latest()).create(&path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let builder = group.new_dataset::<Row>().shape([ROWS]).chunk([16]).shuffle().deflate(4);
    let builder = builder.with_dcpl(|plist| plist.chunk_opts(ChunkOpts::DONT_FILTER_PARTIAL_CHUNKS));
    builder.create("timeseries").unwrap().write_raw(&rows(ROWS)[..]).unwrap();
    // A builder keeps its file open.
    drop((builder, group, file));
    check(&path, ROWS, ROWS);
    let Layout::Chunked { chunks, .. } = open::open(&path, &wanted()).unwrap().table.layout else { panic!() };
    assert_eq!((chunks[0].filter_mask, chunks[3].filter_mask), (0, u32::MAX));
}

fn read_all(table: Table) -> Result<(), DataError> {
    let n = table.rows as usize;
    let reader = Reader::new(vec![table], Arc::new(LruChunks::new(1 << 20)));
    let mut out = vec![0; n * 64];
    let mut targets = [Target { member: 0, transform: &Transform::IDENTITY, out: &mut out }];
    reader.read(0, 0, n, &mut targets, &mut Scratch::default())
}

/// Opens and reads; panics and crashes are what it is for.
fn open_and_read(path: &Path) -> Result<(), DataError> {
    let table = open::open(path, &wanted())?.table;
    if table.rows > 1 << 16 { Ok(()) } else { read_all(table) }
}

/// A megabyte of zeros per kilobyte: a chunk that would inflate to 10 MB, and ends after its rows at the latest.
#[test]
fn a_bomb_is_refused_in_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.hdf5");
    let storage = Storage { chunk_rows: Some(100), shuffle: false, ..Default::default() };
    write_session(&path, &storage, &[], &rows(1000)).unwrap();
    let mut table = open::open(&path, &wanted()).unwrap().table;
    let mut packer = libdeflater::Compressor::default();
    let mut bomb = vec![0; 1 << 20];
    let bytes = packer.zlib_compress(&vec![0; 10 << 20], &mut bomb).unwrap();
    let mut file = std::fs::read(&path).unwrap();
    let addr = file.len() as u64;
    file.extend(&bomb[..bytes]);
    std::fs::write(&path, &file).unwrap();
    (table.file_bytes, table.modified_ns) = open::stamp(&path).unwrap();
    let Layout::Chunked { chunks, .. } = &mut table.layout else { panic!() };
    chunks[4] = ChunkAt { addr, stored_bytes: bytes as u32, filter_mask: 0 };
    table.validate().unwrap();
    let error = read_all(table).unwrap_err().to_string();
    assert!(error.contains("chunk 4 (rows 400..+100) inflates to more than the 23200 bytes"), "{error}");
}

#[test]
fn chunks_on_top_of_each_other_or_of_the_header_are_refused() {
    let table = open::open(&fixture("gzip_shuffle"), &wanted()).unwrap().table;
    let table = Table { file_bytes: 1 << 20, ..table };
    let with = |change: &dyn Fn(&mut [ChunkAt])| {
        let mut table = table.clone();
        let Layout::Chunked { chunks, .. } = &mut table.layout else { panic!() };
        change(chunks);
        table.validate().unwrap_err()
    };
    assert!(with(&|chunks| chunks[2].addr = chunks[0].addr + 1).contains("chunks 0 and 2 overlap"));
    assert!(with(&|chunks| chunks[2].addr = 8).contains("overlap the file's header"));
    let huge = with(&|chunks| chunks[2] = ChunkAt { addr: 100, stored_bytes: 12_000, filter_mask: 0 });
    assert!(huge.contains("cannot hold"), "{huge}");
}

/// Every byte of the metadata of small files, changed: an error or numbers, in this process.
#[test]
fn files_with_changed_bytes_open_or_say_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.hdf5");
    let (mut opened, mut refused) = (0, 0);
    let cases: usize = std::env::var("HEADROOM_FUZZ_FILES").ok().and_then(|n| n.parse().ok()).unwrap_or(1200);
    let names = [
        "earliest_btree_v1",
        "latest_fixed_array",
        "latest_extensible_array",
        "latest_btree_v2_2d",
        "lzf",
        "userblock",
    ];
    for (n, name) in names.iter().enumerate() {
        let good = std::fs::read(fixture(name)).unwrap();
        for case in 0..cases / names.len() {
            let mut bytes = good.clone();
            let dice =
                |salt: usize| (case * 6 + n).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(salt as u32 * 7 + 11);
            // Metadata comes first in these files; a quarter of the cases go anywhere.
            let reach = if case % 4 == 0 { bytes.len() } else { bytes.len().min(3000) };
            for change in 0..1 + case % 3 {
                let at = dice(change + 1) % reach;
                bytes[at] = [bytes[at] ^ (1 << (case % 8)), 0, 0xFF, dice(9) as u8][(case + change) % 4];
            }
            if case % 10 == 9 {
                bytes.truncate(dice(5) % bytes.len());
            }
            std::fs::write(&path, &bytes).unwrap();
            match open_and_read(&path) {
                Ok(()) => opened += 1,
                Err(error) => refused += usize::from(error.to_string().contains("changed.hdf5")),
            }
        }
    }
    assert_eq!(opened + refused, cases / names.len() * names.len());
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused");
}
