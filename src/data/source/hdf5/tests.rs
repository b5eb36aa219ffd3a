//! Whole files: every layout and type equals what libhdf5 itself reads; hostile files give one clear error.

use super::write::{Row, Storage, write_session};
use super::*;
use crate::data::DataError;
use crate::data::source::chunks::LruChunks;
use crate::data::{Scratch, source::hdf5::gather::Transform};
use std::path::Path;
use std::sync::Arc;

fn wanted() -> Wanted {
    Wanted {
        group: "emg2pose".into(),
        dataset: "timeseries".into(),
        fields: vec![("emg".into(), 16), ("joint_angles".into(), 20)],
    }
}

fn rows(n: usize) -> Vec<Row> {
    let number = |i: usize| ((i * 2_654_435_761) % 10_007) as f32 / 1024.0 - 4.0;
    (0..n)
        .map(|i| Row {
            time: i as f64 / 2000.0,
            joint_angles: std::array::from_fn(|j| f64::from(number(i * 36 + j))),
            emg: std::array::from_fn(|c| number(i * 36 + 20 + c)),
        })
        .collect()
}

/// The rows as libhdf5 reads them, by its own way through the file.
fn by_libhdf5(path: &Path, range: std::ops::Range<usize>) -> Vec<Row> {
    let dataset = ::hdf5::File::open(path).unwrap().dataset("emg2pose/timeseries").unwrap();
    dataset.read_slice_1d::<Row, _>(range).unwrap().to_vec()
}

fn assert_equals_libhdf5(path: &Path, what: &str) {
    let session = SessionData::open(path, &wanted()).unwrap();
    let len = session.len();
    for (start, end) in [(0, len), (0, 1), (len - 1, len), (len / 3, len / 3 + 50), (95, 205)] {
        let fields = session.window(start, end).unwrap();
        let rows = by_libhdf5(path, start as usize..end as usize);
        let emg: Vec<f32> = rows.iter().flat_map(|row| row.emg).collect();
        let angles: Vec<f32> = rows.iter().flat_map(|row| row.joint_angles.map(|x| x as f32)).collect();
        assert!(fields[0] == emg && fields[1] == angles, "{what}: rows {start}..{end}");
    }
    session.close();
}

#[test]
fn windows_equal_direct_reads_for_every_layout_type_order_and_member_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session.hdf5");
    let data = rows(530);
    let chunked =
        |gzip, shuffle, fletcher32| Storage { chunk_rows: Some(100), gzip, shuffle, fletcher32, ..Default::default() };
    let layouts = [
        Storage::contiguous(),
        chunked(None, false, false),
        chunked(Some(4), false, false),
        chunked(Some(4), true, false),
        chunked(None, true, true),
        chunked(Some(1), true, true),
    ];
    let orders = [["time", "joint_angles", "emg"], ["emg", "joint_angles", "time"], ["joint_angles", "time", "emg"]];
    let mut cases = 0;
    for layout in layouts {
        for (emg, joint_angles) in [(Scalar::F32, Scalar::F64), (Scalar::F64, Scalar::F32), (Scalar::F32, Scalar::F32)]
        {
            for order in [Order::Little, Order::Big] {
                for members in orders {
                    let storage = Storage { emg, joint_angles, order, members, ..layout.clone() };
                    write_session(&path, &storage, &[], &data).unwrap();
                    let opened = open::open(&path, &wanted()).unwrap();
                    assert!(!matches!(opened.table.layout, Layout::Library { .. }), "{storage:?}");
                    assert_eq!(opened.table.members[0].order, order);
                    assert_eq!(opened.table.members[1].scalar, joint_angles);
                    assert_eq!(opened.field_names, members);
                    assert_equals_libhdf5(&path, &format!("{storage:?}"));
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 108);
}

#[test]
fn a_session_tells_its_length_fields_and_attributes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session.hdf5");
    let attributes = [
        ("user", Attribute::Text("u-1".into())),
        ("sample_rate", Attribute::Float(2000.0)),
        ("num_channels", Attribute::Integer(16)),
    ];
    write_session(&path, &Storage::default(), &attributes, &rows(10)).unwrap();
    let session = SessionData::open(&path, &wanted()).unwrap();
    assert_eq!((session.len(), session.is_empty()), (10, false));
    assert_eq!(session.field_names(), ["time", "joint_angles", "emg"]);
    for (name, value) in &attributes {
        assert_eq!(session.attributes().get(*name), Some(value));
    }
    let error = session.window(5, 11).unwrap_err().to_string();
    assert!(error.contains("window 5..11 of 10 rows"), "{error}");
    assert!(session.window(6, 5).is_err());
}

#[test]
fn plain_2d_datasets_are_read_by_columns() {
    let dir = tempfile::tempdir().unwrap();
    for (name, chunk) in [("contiguous", None), ("rows", Some([50, 40])), ("cut rows", Some([50, 7]))] {
        let path = dir.path().join(format!("{name}.h5"));
        let values: Vec<f32> = (0..130 * 40).map(|i| i as f32 / 8.0).collect();
        let file = ::hdf5::File::create(&path).unwrap();
        let group = file.create_group("emg2pose").unwrap();
        let mut builder = group.new_dataset::<f64>().shape([130, 40]);
        if let Some(chunk) = chunk {
            builder = builder.chunk(chunk).shuffle().deflate(3);
        }
        let wide: Vec<[f64; 40]> = values.as_chunks::<40>().0.iter().map(|row| row.map(f64::from)).collect();
        let dataset = builder.create("timeseries").unwrap();
        for (i, row) in wide.iter().enumerate() {
            dataset.write_slice(&row[..], (i, ..)).unwrap();
        }
        drop((dataset, builder, group, file));
        let session = SessionData::open(&path, &wanted()).unwrap();
        assert_eq!(session.len(), 130);
        assert_eq!(session.field_names().len(), 40);
        let fields = session.window(45, 105).unwrap();
        for (row, at) in (45..105).enumerate() {
            assert_eq!(fields[0][row * 16..][..16], values[at * 40..][..16], "{name}");
            assert_eq!(fields[1][row * 20..][..20], values[at * 40 + 16..][..20], "{name}");
        }
    }
}

#[test]
fn compact_user_block_and_missing_chunks_equal_libhdf5() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("compact.hdf5");
    let data = rows(230);
    let descriptor = <Row as ::hdf5::types::H5Type>::type_descriptor();
    let file = ::hdf5::File::create(&path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let compact =
        group.new_dataset_builder().empty_as(&descriptor).shape([230]).layout(::hdf5::dataset::Layout::Compact);
    compact.create("timeseries").unwrap().write_raw(&data[..]).unwrap();
    drop((compact, group, file));
    assert!(matches!(open::open(&path, &wanted()).unwrap().table.layout, Layout::Library { .. }));
    assert_equals_libhdf5(&path, "compact");

    let path = dir.path().join("missing.hdf5");
    let file = ::hdf5::File::with_options().with_fcpl(|create| create.userblock(512)).create(&path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let dataset = group.new_dataset::<Row>().shape([300]).chunk([100]).deflate(2).create("timeseries").unwrap();
    dataset.write_slice(&data[..100], 100..200).unwrap();
    drop((dataset, group, file));
    assert_equals_libhdf5(&path, "missing chunks behind a user block");

    let path = dir.path().join("block.hdf5");
    let file = ::hdf5::File::with_options().with_fcpl(|create| create.userblock(1024)).create(&path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let dataset = group.new_dataset::<Row>().shape([230]).create("timeseries").unwrap();
    dataset.write_raw(&data[..]).unwrap();
    drop((dataset, group, file));
    assert_equals_libhdf5(&path, "contiguous behind a user block");

    let path = dir.path().join("late.hdf5");
    let file = ::hdf5::File::create(&path).unwrap();
    file.create_group("emg2pose").unwrap().new_dataset::<Row>().shape([230]).create("timeseries").unwrap();
    drop(file);
    assert_equals_libhdf5(&path, "contiguous, never written");
}

fn error_of(path: &Path) -> String {
    match open::open(path, &wanted()) {
        Ok(_) => panic!("{} opens", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn hostile_files_give_one_error_that_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.hdf5");
    write_session(&good, &Storage::default(), &[], &rows(5000)).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    let check = |name: &str, expected: &str| {
        let path = dir.path().join(name);
        let error = error_of(&path);
        assert!(error.contains(expected) && error.contains(name), "{name}: {error}");
        assert!(!error.contains('\n'), "{error}");
    };
    std::fs::write(dir.path().join("cut"), &bytes[..bytes.len() / 2]).unwrap();
    check("cut", "is truncated");
    std::fs::write(dir.path().join("text"), "no HDF5 at all").unwrap();
    check("text", "cannot be read as HDF5");
    std::fs::write(dir.path().join("empty"), "").unwrap();
    check("empty", "cannot be read as HDF5");
    check("absent", "No such file");
    let made = |name: &str, storage: Storage, n: usize| {
        write_session(&dir.path().join(name), &storage, &[], &rows(n)).unwrap()
    };
    made("group", Storage { group: "other".into(), ..Default::default() }, 10);
    check("group", "no group /emg2pose: it holds other");
    made("dataset", Storage { dataset: "other".into(), ..Default::default() }, 10);
    check("dataset", "no dataset timeseries in group /emg2pose: it holds other");
    made("rows", Storage::contiguous(), 0);
    check("rows", "has no rows");
    #[derive(Clone, Copy, ::hdf5::H5Type)]
    #[repr(C)]
    struct Short {
        emg: [f32; 8],
        joint_angles: [f64; 20],
    }
    #[derive(Clone, Copy, ::hdf5::H5Type)]
    #[repr(C)]
    struct Counts {
        emg: [i32; 16],
        joint_angles: [f64; 20],
    }
    #[derive(Clone, Copy, ::hdf5::H5Type)]
    #[repr(C)]
    struct NoAngles {
        emg: [f32; 16],
    }
    fn typed<T: ::hdf5::H5Type>(path: &Path) {
        let group = ::hdf5::File::create(path).unwrap().create_group("emg2pose").unwrap();
        group.new_dataset::<T>().shape([10]).create("timeseries").unwrap();
    }
    typed::<Short>(&dir.path().join("channels"));
    check("channels", "field emg has 8 channels, 16 expected");
    typed::<Counts>(&dir.path().join("integers"));
    check("integers", "field emg is [int32; 16]: expected f4 or f8");
    typed::<NoAngles>(&dir.path().join("field"));
    check("field", "no field joint_angles: rows hold emg");
    typed::<f64>(&dir.path().join("scalar"));
    check("scalar", "expected rows of a compound type");
}

#[test]
fn a_file_without_permission_says_so() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("locked.hdf5");
    write_session(&path, &Storage::default(), &[], &rows(10)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    // Root reads it all the same.
    if std::fs::File::open(&path).is_err() {
        assert!(error_of(&path).contains("Permission denied"));
    }
}

fn read_all(table: Table) -> Result<(), DataError> {
    let n = table.rows as usize;
    let reader = Reader::new(vec![table], Arc::new(LruChunks::new(1 << 20)));
    let mut out = vec![0; n * 64];
    let mut targets = [Target { member: 0, transform: &Transform::IDENTITY, out: &mut out }];
    reader.read(0, 0, n, &mut targets, &mut Scratch::default())
}

#[test]
fn damaged_chunks_name_file_and_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.hdf5");
    for fletcher32 in [false, true] {
        let storage = Storage { chunk_rows: Some(1000), fletcher32, ..Default::default() };
        write_session(&path, &storage, &[], &rows(5000)).unwrap();
        let Layout::Chunked { chunks, .. } = open::open(&path, &wanted()).unwrap().table.layout else { panic!() };
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = chunks[3].addr as usize + chunks[3].stored_bytes as usize / 2;
        bytes[middle..middle + 8].fill(0x55);
        std::fs::write(&path, &bytes).unwrap();
        let error = read_all(open::open(&path, &wanted()).unwrap().table).unwrap_err().to_string();
        assert!(error.contains("damaged.hdf5") && error.contains("chunk 3 (rows 3000..+1000)"), "{error}");
        assert!(error.contains(if fletcher32 { "Fletcher32" } else { "the file is damaged" }), "{error}");
    }
}

#[test]
fn tables_that_lie_are_refused_before_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("good.hdf5");
    write_session(&path, &Storage { chunk_rows: Some(100), ..Default::default() }, &[], &rows(1000)).unwrap();
    let table = open::open(&path, &wanted()).unwrap().table;
    let Layout::Chunked { chunks, filters, .. } = table.layout.clone() else { panic!() };
    let refused = |chunk_rows: usize, change: &dyn Fn(&mut ChunkAt), expected: &str| {
        let mut chunks = chunks.clone();
        change(&mut chunks[7]);
        let table = Table { layout: Layout::Chunked { chunk_rows, chunks, filters: filters.clone() }, ..table.clone() };
        let error = table.validate().unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    refused(100, &|chunk| chunk.addr = 1 << 40, "chunk 7: bytes");
    refused(100, &|chunk| chunk.addr = u64::MAX - 1, "lie outside the file");
    refused(100, &|chunk| chunk.stored_bytes = 8, "8 stored bytes cannot hold 23200");
    refused(100, &|chunk| chunk.filter_mask = 0b10, "cannot hold");
    refused(1 << 40, &|_| (), "at most 268435456 are accepted");
    refused(usize::MAX, &|_| (), "are accepted");
    refused(99, &|_| (), "10 chunks listed, 11 expected");
    let refused = |table: Table, expected: &str| assert!(table.validate().unwrap_err().contains(expected));
    let contiguous = |addr| Layout::Contiguous { addr };
    refused(Table { layout: contiguous(u64::MAX), ..table.clone() }, "lie outside the file");
    refused(Table { rows: u64::MAX, layout: contiguous(0), ..table.clone() }, "not credible");
    refused(Table { row_bytes: 100, element_bytes: 100, ..table.clone() }, "a field leaves its row");
    refused(Table { element_bytes: 7, ..table.clone() }, "do not fill");
}

#[test]
fn a_file_that_changes_or_shrinks_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changing.hdf5");
    write_session(&path, &Storage::contiguous(), &[], &rows(1000)).unwrap();
    let table = open::open(&path, &wanted()).unwrap().table;
    let reader = Reader::new(vec![table.clone()], Arc::new(LruChunks::new(1 << 20)));
    let mut out = vec![0; 64 * 1000];
    let mut read = |reader: &Reader| {
        let mut targets = [Target { member: 0, transform: &Transform::IDENTITY, out: &mut out }];
        reader.read(0, 0, 1000, &mut targets, &mut Scratch::default())
    };
    read(&reader).unwrap();
    assert_eq!(reader.stats().bytes, 232_000);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9000).unwrap();
    let error = read(&reader).unwrap_err().to_string();
    assert!(error.contains("rows 0..1000") && error.contains("cut while in use"), "{error}");
    let error = read(&Reader::new(vec![table], Arc::new(LruChunks::new(1 << 20)))).unwrap_err().to_string();
    assert!(error.contains("changed since it was opened"), "{error}");
}

#[test]
fn overlapping_windows_decode_each_chunk_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("session.hdf5");
    write_session(&path, &Storage { chunk_rows: Some(100), ..Default::default() }, &[], &rows(1000)).unwrap();
    let table = open::open(&path, &wanted()).unwrap().table;
    let reads = |cache_bytes: u64| {
        let reader = Reader::new(vec![table.clone()], Arc::new(LruChunks::new(cache_bytes)));
        let mut out = vec![0; 64 * 150];
        for start in (0..850).step_by(10) {
            let mut targets = [Target { member: 0, transform: &Transform::IDENTITY, out: &mut out }];
            reader.read(0, start, 150, &mut targets, &mut Scratch::default()).unwrap();
        }
        reader.stats().decoded_chunks
    };
    assert_eq!(reads(1 << 20), 10);
    assert!(reads(0) > 150, "without a cache every window decodes its own");
}
