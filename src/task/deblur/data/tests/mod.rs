//! From files to clips: what is read is what lies there, whatever the way.

use super::voxel::{VoxelSpec, Voxeliser};
use super::*;
use crate::data::cache_testing::hosted;
use crate::data::loader::{BatchPlanner, Loader, LoaderSpec, Shuffle};
use crate::data::source::video::image::write_png;
use crate::data::source::video::spikes::to_packed_file;
use crate::data::source::video::{Layout, SpikeEncoding, SpikeInput, bits, npy};
use crate::data::{Dtype, ReadRequest};
use crate::task::deblur::sample::{SampleSpec, write_sample_data};
use cache::PolicyKind;
use std::path::Path;
use tch::Tensor;

mod frames;

const SIZE: ImageSize = ImageSize { height: 24, width: 36 };

fn solo(bytes: &[u8]) -> Result<Vec<Vec<u8>>, DataError> {
    Ok(vec![bytes.to_vec()])
}

fn alone() -> Team<'static> {
    Team { rank: 0, world_size: 1, gather: &solo, cache: None, kept: None, stages: Default::default() }
}

fn dat(encoding: Option<SpikeEncoding>) -> SpikeInput {
    SpikeInput::Dat { encoding, height: SIZE.height / 2, width: SIZE.width / 2 }
}

/// Two training sequences of 7 frames, one validation sequence, by `change`.
fn sample(root: &Path, change: impl Fn(&mut SampleSpec)) {
    let mut spec = SampleSpec { sequences: [2, 1, 0], frames: 7, size: SIZE, ..SampleSpec::default() };
    change(&mut spec);
    write_sample_data(root, &spec).unwrap();
}

fn clips(root: &Path, spikes: SpikeInput, crop: Option<usize>) -> ClipSpec {
    ClipSpec { clip_len: 3, ..ClipSpec::new(VideoSpec::new(root, spikes), crop) }
}

fn open(spec: &ClipSpec, team: &Team) -> Result<ClipData, String> {
    open_clips(spec, 5, team, None).map_err(|e| e.to_string())
}

fn read(dataset: &dyn Dataset, epoch: u64, index: usize) -> Vec<Vec<u8>> {
    let mut out: Vec<Vec<u8>> = dataset.fields().iter().map(|field| vec![0xEE; field.sample_bytes()]).collect();
    let mut slices: Vec<&mut [u8]> = out.iter_mut().map(Vec::as_mut_slice).collect();
    dataset.read(ReadRequest { epoch, index }, &mut slices, &mut Scratch::default()).unwrap();
    out
}

#[test]
fn both_encodings_and_both_layouts_give_the_same_clips() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<Vec<Vec<u8>>> = [
        ("packed", SpikeEncoding::Packed, Layout::Unified),
        ("bytes", SpikeEncoding::Bytes, Layout::Unified),
        ("kair", SpikeEncoding::Packed, Layout::Kair),
    ]
    .into_iter()
    .map(|(name, encoding, layout)| {
        let root = dir.path().join(name);
        sample(&root, |spec| (spec.encoding, spec.layout) = (encoding, layout));
        // Detected from the files, and as the key says.
        let data = open(&clips(&root, dat(None), Some(16)), &alone()).unwrap();
        let told = open(&clips(&root, dat(Some(encoding)), Some(16)), &alone()).unwrap();
        assert_eq!((data.datasets.train.len(), data.datasets.val.len(), data.datasets.test.len()), (10, 5, 5));
        let clip = read(&*data.datasets.train, 3, 7);
        assert_eq!(clip, read(&*told.datasets.train, 3, 7));
        assert_eq!(data.datasets.train.describe(7), "clip train/seq001 frames 000002..000004");
        assert!(data.datasets.notes[0].contains("66 spike planes of 12×18"), "{:?}", data.datasets.notes);
        clip
    })
    .collect();
    assert!(all.iter().all(|clip| *clip == all[0]));
    assert!(all[0][2].iter().any(|byte| *byte != 0));
}

/// Frames whose pixels are their row, column and frame; spikes are set where row and column of the plane, taken as
/// numbers, have the bit that the plane stands for.
fn paint(root: &Path, frames: usize) {
    let folder = root.join("train/s0");
    for kind in ["blur", "sharp", "spike"] {
        std::fs::create_dir_all(folder.join(kind)).unwrap();
    }
    std::fs::create_dir_all(root.join("val")).unwrap();
    let (rows, columns) = (SIZE.height / 2, SIZE.width / 2);
    for frame in 0..frames {
        for (kind, mark) in [("blur", 0), ("sharp", 100)] {
            let pixels: Vec<u8> = (0..SIZE.height * SIZE.width)
                .flat_map(|n| [(n / SIZE.width) as u8, (n % SIZE.width) as u8, (mark + frame) as u8])
                .collect();
            write_png(&folder.join(kind).join(format!("{frame:06}.png")), &pixels, SIZE).unwrap();
        }
        // Planes 0 to 7: bits of the row, 8 to 15: of the column, 16 to 23: of the frame.
        let spike = |n: usize| {
            let (plane, y, x) = (n / (rows * columns), n / columns % rows, n % columns);
            ([y, x, frame][plane / 8] >> (plane % 8) & 1) as u8
        };
        let spikes: Vec<u8> = (0..24 * rows * columns).map(spike).collect();
        std::fs::write(folder.join(format!("spike/{frame:06}.dat")), to_packed_file(&spikes, rows, columns)).unwrap();
    }
}

#[test]
fn one_crop_cuts_all_frames_and_modalities() {
    let dir = tempfile::tempdir().unwrap();
    paint(dir.path(), 5);
    let data = open(&clips(dir.path(), dat(None), Some(14)), &alone()).unwrap();
    let train = &data.datasets.train;
    let shapes: Vec<_> = train.fields().iter().map(|field| field.shape.clone()).collect();
    assert_eq!(shapes, [vec![3, 14, 14, 3], vec![3, 14, 14, 3], vec![3, 24, 7, 1]]);
    let mut places = std::collections::BTreeSet::new();
    for epoch in 0..60 {
        for index in 0..3 {
            let clip = read(&**train, epoch, index);
            let (y, x) = (clip[0][0] as usize, clip[0][1] as usize);
            places.insert((y, x));
            assert_eq!((y % 2, x % 2), (0, 0));
            for (field, mark) in [(0, 0), (1, 100)] {
                for (n, pixel) in clip[field].chunks(3).enumerate() {
                    let (frame, row, column) = (n / 196, n / 14 % 14, n % 14);
                    let expected = [y + row, x + column, mark + index + frame].map(|value| value as u8);
                    assert_eq!(pixel, expected, "field {field} pixel {n}");
                }
            }
            for (frame, planes) in clip[2].chunks(24 * 7).enumerate() {
                for (row, column) in (0..7).flat_map(|row| (0..7).map(move |column| (row, column))) {
                    let number = |first: usize| -> usize {
                        (0..8).map(|b| usize::from(bits::bit(&planes[(first + b) * 7 + row..], column)) << b).sum()
                    };
                    let painted = (number(0), number(8), number(16));
                    assert_eq!(painted, (y / 2 + row, x / 2 + column, index + frame));
                }
            }
        }
    }
    assert!(places.len() > 40, "{} places of 180 clips", places.len());
    assert_eq!(read(&**train, 9, 2), read(&**train, 9, 2));
}

#[test]
fn validation_reads_whole_frames_or_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path().join("a").as_path(), |spec| spec.sequences = [1, 0, 1]);
    let mut spec = clips(&dir.path().join("a"), dat(None), Some(16));
    let whole = open(&spec, &alone()).unwrap();
    // No folder val: the test's sequences serve.
    assert_eq!(whole.datasets.val.len(), 5);
    let full = read(&*whole.datasets.val, 0, 1);
    assert_eq!(full, read(&*whole.datasets.val, 8, 1));
    assert_eq!(full, read(&*whole.datasets.test, 0, 1));
    let entry = SIZE.bytes();
    assert_eq!(full[0].len(), 3 * entry);
    spec.crops = [Some(16), Some(8)];
    let middle = read(&*open(&spec, &alone()).unwrap().datasets.val, 0, 1);
    let (y, x) = (8, 14);
    let row = &full[1][entry + (y * SIZE.width + x) * 3..][..24];
    assert_eq!(&middle[1][8 * 8 * 3..][..24], row);
    spec.limits = [2, 1];
    let few = open(&spec, &alone()).unwrap();
    assert_eq!((few.datasets.train.len(), few.datasets.val.len()), (2, 1));
    spec.clip_len = 8;
    assert!(open(&spec, &alone()).err().unwrap().contains("no clip of 8 frames in 1 training sequences"));
    let nowhere = clips(&dir.path().join("none"), dat(None), None);
    assert!(open(&nowhere, &alone()).err().unwrap().contains("data.dataset_path"));
}

#[test]
fn precomputed_voxels_equal_those_of_the_spikes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let (bins, rows, columns) = (32, SIZE.height / 2, SIZE.width / 2);
    let whole = clips(&root, dat(None), Some(16));
    let data = open(&whole, &alone()).unwrap();
    let mut entry = vec![0; data.frames.bytes(crate::data::source::video::Modality::Spikes)];
    let mut number = 0;
    for (split, sequences) in [("train", 2), ("val", 1)] {
        for sequence in 0..sequences {
            let folder = root.join(format!("{split}/seq{sequence:03}/spike_vox"));
            std::fs::create_dir_all(&folder).unwrap();
            for frame in 0..7 {
                let key = Frames::key(number, crate::data::source::video::Modality::Spikes);
                data.frames.fill_entry(key, &mut entry, &mut Scratch::default()).unwrap();
                let mut counts = vec![0f32; bins * rows * columns];
                for n in 0..66 * rows * columns {
                    let (t, place) = (n / (rows * columns), n % (rows * columns));
                    let at = (t * rows + place / columns) * bits::row_bytes(columns);
                    let spike = bits::bit(&entry[at..], place % columns);
                    counts[t * bins / 66 * rows * columns + place] += f32::from(u8::from(spike));
                }
                let mut file = npy::header(&[bins, rows, columns]);
                counts.iter().for_each(|count| file.extend(count.to_le_bytes()));
                std::fs::write(folder.join(format!("{frame:06}.npy")), file).unwrap();
                number += 1;
            }
        }
    }
    let stored = open(&clips(&root, SpikeInput::Voxels { counts: true }, Some(16)), &alone()).unwrap();
    let fields = stored.datasets.train.fields();
    assert_eq!((fields[2].name, &*fields[2].shape, fields[2].dtype), ("voxels", &[3, 32, 8, 8][..], Dtype::F32));
    let voxeliser = Voxeliser::new(VoxelSpec { bins: 32, log1p: true, norm: Some((0.4, 0.5)) }, columns, SIZE.width);
    for (epoch, index) in [(0, 0), (1, 9), (2, 4)] {
        let (from_spikes, from_voxels) =
            (read(&*data.datasets.train, epoch, index), read(&*stored.datasets.train, epoch, index));
        assert_eq!(from_spikes[..2], from_voxels[..2]);
        let spikes = Tensor::from_slice(&from_spikes[2]).view([1, 3, 66, 8, 1]);
        let values: Vec<f32> = from_voxels[2].chunks(4).map(|v| f32::from_ne_bytes(v.try_into().unwrap())).collect();
        let counts = Tensor::from_slice(&values).view([1, 3, 32, 8, 8]);
        assert_eq!(voxeliser.voxels(&spikes, 16, 16), voxeliser.finish(&counts, 16, 16));
    }
    let path = root.join("train/seq001/spike_vox/000003.npy");
    std::fs::write(&path, npy::header(&[bins, rows, columns])).unwrap();
    let error = open(&clips(&root, SpikeInput::Voxels { counts: true }, Some(16)), &alone()).err().unwrap();
    assert!(error.contains("000003.npy") && error.contains("has another size"), "{error}");
    std::fs::write(&path, [npy::header(&[4]), vec![0; 16]].concat()).unwrap();
    let error = open(&clips(&root, SpikeInput::Voxels { counts: true }, Some(16)), &alone()).err().unwrap();
    assert!(error.contains("[4]: expected [32, 12, 18]"), "{error}");
}

/// All bytes of two epochs, as a loader of so many threads delivers them.
fn delivered(data: &ClipData, threads: usize) -> Vec<u8> {
    let order = Order { len: data.datasets.train.len() as u64, seed: 5, shuffle: Shuffle::Global };
    let planner = BatchPlanner {
        order,
        global_batch: 2,
        micro_batch: 2,
        rank: 0,
        world_size: 1,
        drop_last: true,
        cut: Default::default(),
    }
    .checked()
    .unwrap();
    let spec = LoaderSpec { threads, slots: threads + 2, micro_batch: 2, ..LoaderSpec::default() };
    let mut loader = Loader::new(Arc::clone(&data.datasets.train), spec).unwrap();
    let mut bytes = Vec::new();
    for epoch in 0..2 {
        for batch in loader.run(planner.requests(epoch, 0)).unwrap() {
            let batch = batch.unwrap();
            (0..3).for_each(|field| bytes.extend_from_slice(batch.field(field)));
        }
    }
    bytes
}

#[test]
fn cached_clips_equal_uncached_ones_to_the_bit_with_any_threads_and_policy() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let spec = clips(&root, dat(None), Some(16));
    let plain = delivered(&open(&spec, &alone()).unwrap(), 0);
    let config = DataConfig::default();
    for (policy, share, threads) in
        [(PolicyKind::Pin, 2.0, 3), (PolicyKind::NextUse, 0.4, 2), (PolicyKind::Lru, 0.3, 1), (PolicyKind::Pin, 0.2, 0)]
    {
        let frames = open(&spec, &alone()).unwrap().frames;
        let capacity = (share * (14 * frames.frame_bytes()) as f64) as u64 / 4096 * 4096;
        let (host, clients) = hosted(capacity, policy, 1);
        let team = Team { cache: Some(Arc::clone(&clients[0])), ..alone() };
        let data = open_clips(&spec, 5, &team, Some(&config)).unwrap();
        assert_eq!(delivered(&data, threads), plain, "{policy:?} {share}");
        if share > 1.0 {
            assert_eq!(data.frames.stats().decoded, 14 * 3, "each file of the training set once");
        }
        drop((data, team, clients));
        assert!(host.stats().used_bytes <= capacity);
    }
    assert_eq!(delivered(&open(&spec, &alone()).unwrap(), 4), plain);
}

#[test]
fn ranks_of_a_node_decode_each_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let spec = clips(&root, dat(None), Some(16));
    let frame_bytes = open(&spec, &alone()).unwrap().frames.frame_bytes();
    let (_host, clients) = hosted((20 * frame_bytes).next_multiple_of(4096), PolicyKind::Pin, 2);
    let opened: Vec<ClipData> = clients
        .iter()
        .map(|client| open(&spec, &Team { cache: Some(Arc::clone(client)), ..alone() }).unwrap())
        .collect();
    let bytes: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = opened.iter().map(|data| scope.spawn(|| delivered(data, 2))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(bytes[0], bytes[1]);
    assert_eq!(opened.iter().map(|data| data.frames.stats().decoded).sum::<u64>(), 14 * 3);
}

#[test]
fn next_uses_are_those_of_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let (_host, clients) = hosted(1 << 20, PolicyKind::NextUse, 1);
    let spec = clips(&root, dat(None), Some(16));
    let scan = {
        let found = find_splits(&spec).unwrap().found;
        scan(&found, &spec.video.spikes, false).unwrap()
    };
    let clips = |scan: &crate::data::source::video::Scan| Clips::new(&scan.splits[0], 3, 1, 0);
    let order = Order { len: 10, seed: 9, shuffle: Shuffle::Global };
    let (list, lookup, evaluated) = (clips(&scan), clips(&scan), clips(&scan));
    let frames = Arc::new(Frames::new(scan));
    let entries = Arc::new(Entries { frames, unreadable: Unreadable::default() });
    let cached = Some(Arc::new(CachedEntries::new(Arc::clone(&entries), Arc::clone(&clients[0]))));
    let crop = Crop::new(SIZE, None, None).unwrap();
    let source = Source { entries, cached, skip_bad: false };
    let dataset = ClipDataset::new(source.clone(), list, crop, Some(1), Some(order.clone()));
    for (epoch, position) in [(0, 0), (0, 9), (1, 4), (7, 8)] {
        let ids = [order.at(epoch, position).unwrap()];
        let after = dataset.last_position(crate::data::BatchAhead { epoch, ids: &ids });
        assert_eq!(after, epoch * 10 + position);
        for frame in 0..14usize {
            let uses = |at: u64| lookup.frames(order.at(at / 10, at % 10).unwrap()).unwrap().contains(&frame);
            let next = (after + 1..(epoch + 2) * 10).find(|at| uses(*at)).unwrap_or(u64::MAX);
            assert_eq!(
                dataset.next_use(Frames::key(frame, crate::data::source::video::Modality::Sharp), epoch, after),
                next
            );
        }
    }
    // An evaluation reads clips in turn, and says nothing of the next one.
    let in_turn = Order { len: 10, seed: 0, shuffle: Shuffle::Off };
    let evaluation = ClipDataset::new(source, evaluated, crop, None, Some(in_turn));
    let key = Frames::key(4, crate::data::source::video::Modality::Blur);
    assert_eq!([1, 2, 3, 4, 9].map(|after| evaluation.next_use(key, 0, after)), [2, 3, 4, u64::MAX, u64::MAX]);
}

#[test]
fn a_bad_frame_stops_or_is_counted_and_a_file_that_changes_names_its_clip() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let mut spec = clips(&root, dat(None), Some(16));
    let data = open(&spec, &alone()).unwrap();
    let path = root.join("train/seq001/sharp/000004.png");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let spec_of = LoaderSpec { threads: 2, slots: 4, micro_batch: 1, ..LoaderSpec::default() };
    let mut loader = Loader::new(Arc::clone(&data.datasets.train), spec_of).unwrap();
    let order = Order { len: 10, seed: 5, shuffle: Shuffle::Off };
    let planner = BatchPlanner {
        order,
        global_batch: 1,
        micro_batch: 1,
        rank: 0,
        world_size: 1,
        drop_last: true,
        cut: Default::default(),
    };
    let error = loader.run(planner.requests(0, 0)).unwrap().find_map(Result::err).unwrap().to_string();
    for part in ["clip train/seq001 frames 000002..000004", "sharp/000004.png", "changed since the run began"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = open(&spec, &alone()).err().unwrap();
    assert!(error.contains("train/seq001") && error.contains("cut off"), "{error}");
    spec.skip_bad = true;
    let left = open(&spec, &alone()).unwrap();
    // Of 5 clips of that sequence those with frame 4 are gone.
    assert_eq!((left.datasets.train.len(), left.datasets.skipped.len()), (5 + 2, 1));
    assert!(left.datasets.notes[0].contains("1 left out"));
}

#[test]
fn ranks_that_see_other_files_do_not_start() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path().join("a").as_path(), |_| ());
    let gather = |bytes: &[u8]| Ok(vec![bytes.to_vec(), vec![1, 2, 3, 4]]);
    let team = Team { rank: 0, world_size: 2, gather: &gather, cache: None, kept: None, stages: Default::default() };
    let error = open(&clips(&dir.path().join("a"), dat(None), None), &team).err().unwrap();
    assert!(error.contains("rank 1 finds other frames"), "{error}");
}

/// Turns a byte of the compressed pixels: size, header and end stay as they were.
fn spoil_pixels(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(4).position(|name| name == b"IDAT").unwrap() + 40;
    bytes[at] ^= 0x5A;
    std::fs::write(path, bytes).unwrap();
}

/// Sample data of two encodings with three frames that opening finds nothing wrong with: a blurred one and a spike file of
/// training, a sharp one of validation.
fn spoiled(root: &Path) -> ClipSpec {
    sample(root, |spec| spec.encoding = SpikeEncoding::Bytes);
    spoil_pixels(&root.join("train/seq001/blur/000006.png"));
    spoil_pixels(&root.join("val/seq000/sharp/000000.png"));
    let spikes = root.join("train/seq000/spike/000001.dat");
    let mut bytes = std::fs::read(&spikes).unwrap();
    bytes[1000] = 7;
    std::fs::write(&spikes, bytes).unwrap();
    ClipSpec { skip_bad: true, ..clips(root, dat(Some(SpikeEncoding::Bytes)), Some(16)) }
}

#[test]
fn frames_that_cannot_be_decoded_are_replaced_in_training_and_left_out_of_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let spec = ClipSpec { crops: [None, None], ..spoiled(dir.path()) };
    let data = open(&spec, &alone()).unwrap();
    let train = &*data.datasets.train;
    assert_eq!((train.len(), data.datasets.skipped.len()), (10, 0), "opening sees nothing");
    // Of the clips 0..5 of a sequence of seven frames, 0 and 1 have frame 1; of those of the other, 9 has frame 6.
    let (bad, seed) = ([0, 1, 9], 5);
    let list = Clips::new(
        &[("a", 0..7), ("b", 7..14)].map(|(name, run)| Sequence { name: name.into(), runs: vec![run] }),
        3,
        1,
        0,
    );
    let mut replaced = std::collections::BTreeSet::new();
    for epoch in 0..6 {
        for index in 0..10 {
            let of = if bad.contains(&index) {
                let mut others = unreadable::stand_ins(&list, seed, epoch, index as u64);
                others.find(|other| !bad.contains(&(*other as usize))).unwrap() as usize
            } else {
                index
            };
            // Whole frames: a clip looks the same wherever it stands.
            assert!(read(train, epoch, index) == read(train, 0, of), "epoch {epoch} clip {index} is not {of}");
            replaced.extend(bad.contains(&index).then_some(of));
        }
    }
    assert!(replaced.len() >= 5, "drawn from all of them: {replaced:?}");
    let mut lines = train.take_left_out().unwrap();
    lines.sort();
    for (line, parts) in lines.iter().zip([
        ["clip train/seq000 frame 000001: ", "000001.dat: byte 1000 is 7", ": 2 clips with it replaced by others"],
        ["clip train/seq001 frame 000006: ", "blur/000006.png: PNG: ", ": 1 clip with it replaced by others"],
    ]) {
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert_eq!((lines.len(), train.take_left_out().unwrap().len()), (2, 0), "once for each file: {lines:?}");
    let val = &*data.datasets.val;
    (0..5).for_each(|index| drop(read(val, 0, index)));
    assert_eq!([0, 1, 2, 3, 4].map(|index| val.is_left_out(index)), [true, false, false, false, false]);
    assert!(!train.is_left_out(0));
    assert!(val.take_left_out().unwrap()[0].ends_with("1 clip with it left out of the metrics"));
    // Without the key it is an error that says what to do, and where.
    let strict = open(&ClipSpec { skip_bad: false, ..spec }, &alone()).unwrap();
    let mut out: Vec<Vec<u8>> =
        strict.datasets.train.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut slices: Vec<&mut [u8]> = out.iter_mut().map(Vec::as_mut_slice).collect();
    let request = ReadRequest { epoch: 0, index: 9 };
    let error = strict.datasets.train.read(request, &mut slices, &mut Scratch::default()).unwrap_err().to_string();
    assert!(error.contains("blur/000006.png: PNG: ") && error.contains("data.skip_bad: true"), "{error}");
    assert_eq!(strict.datasets.train.take_left_out(), None);
}

#[test]
fn batches_with_replaced_clips_are_the_same_with_any_threads_policy_and_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spoiled(dir.path());
    let plain = delivered(&open(&spec, &alone()).unwrap(), 0);
    let config = DataConfig::default();
    let frame_bytes = open(&spec, &alone()).unwrap().frames.frame_bytes();
    for (policy, frames, ranks, threads) in [
        (PolicyKind::Pin, 30, 2, 2),
        (PolicyKind::NextUse, 6, 3, 2),
        (PolicyKind::Lru, 5, 2, 1),
        (PolicyKind::Pin, 3, 1, 0),
    ] {
        let capacity = (frames * frame_bytes).next_multiple_of(4096);
        let (_host, clients) = hosted(capacity, policy, ranks);
        let opened: Vec<ClipData> = clients
            .iter()
            .map(|client| {
                let team = Team { cache: Some(Arc::clone(client)), ..alone() };
                open_clips(&spec, 5, &team, Some(&config)).unwrap()
            })
            .collect();
        let began = std::time::Instant::now();
        std::thread::scope(|scope| {
            let ranks: Vec<_> = opened.iter().map(|data| scope.spawn(|| delivered(data, threads))).collect();
            ranks.into_iter().for_each(|rank| assert!(rank.join().unwrap() == plain, "{policy:?} {frames}"));
        });
        // Ten seconds would say that a rank waited for what cannot be filled.
        println!("{policy:?}, {ranks} ranks: {:.3} s", began.elapsed().as_secs_f64());
        for data in &opened {
            assert_eq!(data.datasets.train.take_left_out().unwrap().len(), 2, "every rank found them for itself");
        }
    }
    assert!(delivered(&open(&spec, &alone()).unwrap(), 3) == plain);
}

#[test]
fn no_clip_that_can_be_decoded_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let spec = ClipSpec { clip_len: 7, ..spoiled(dir.path()) };
    let data = open(&spec, &alone()).unwrap();
    let mut loader =
        Loader::new(Arc::clone(&data.datasets.train), LoaderSpec { micro_batch: 1, ..LoaderSpec::default() });
    let order = Order { len: 2, seed: 5, shuffle: Shuffle::Off };
    let planner = BatchPlanner {
        order,
        global_batch: 1,
        micro_batch: 1,
        rank: 0,
        world_size: 1,
        drop_last: true,
        cut: Default::default(),
    };
    let error =
        loader.as_mut().unwrap().run(planner.requests(0, 0)).unwrap().find_map(Result::err).unwrap().to_string();
    assert!(error.contains("every one of 2 training clips has a frame that cannot be decoded; the first: "), "{error}");
    assert!(error.contains("000001.dat: byte 1000 is 7") || error.contains("000006.png: PNG: "), "{error}");
}
