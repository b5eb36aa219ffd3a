//! Frames and spikes as they lie on disk: sizes, names, values that no model can use.

use super::*;

/// Real files of the guide's size: less than a fifteenth of its 133.6 MiB per frame, and what was read once is hit by all
/// ranks from then on.
#[test]
fn frames_of_the_guides_size_are_compact_and_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let (size, frames) = (ImageSize { height: 720, width: 1280 }, 5u64);
    std::fs::create_dir_all(dir.path().join("val")).unwrap();
    let folder = dir.path().join("train/s0");
    for kind in ["blur", "sharp", "spike"] {
        std::fs::create_dir_all(folder.join(kind)).unwrap();
    }
    for frame in 0..frames {
        for (kind, mark) in [("blur", 1), ("sharp", 2)] {
            let pixel = |n: usize| ((n as u64 * (17 + frame) / 1280 + n as u64 % 1280 * mark) >> 3) as u8;
            let pixels: Vec<u8> = (0..size.bytes()).map(pixel).collect();
            write_png(&folder.join(kind).join(format!("{frame:06}.png")), &pixels, size).unwrap();
        }
        let spikes: Vec<u8> = (0..66 * 360 * 640 / 8).map(|n| (n as u64 * (frame + 3) % 251) as u8).collect();
        std::fs::write(folder.join(format!("spike/{frame:06}.dat")), spikes).unwrap();
    }
    let spikes = SpikeInput::Dat { encoding: None, height: 360, width: 640 };
    let spec = clips(dir.path(), spikes, Some(256));
    let plain = open(&spec, &alone()).unwrap();
    let frame_bytes = plain.frames.frame_bytes();
    assert_eq!(frame_bytes, 2 * 720 * 1280 * 3 + 66 * 360 * 80);
    let guide = (2 * 3 + 32) * 720 * 1280 * 4;
    assert!(guide == 140_083_200 && 15 * frame_bytes <= guide, "{frame_bytes}");
    let plain = delivered(&plain, 0);
    for policy in [PolicyKind::NextUse, PolicyKind::Pin] {
        // Here a checksum of 12 bytes lies beside each entry.
        let sealed = frames * (frame_bytes + 3 * 12);
        let (host, clients) = hosted(sealed.next_multiple_of(4096), policy, 3);
        let opened: Vec<ClipData> = clients
            .iter()
            .map(|client| {
                let team = Team { cache: Some(Arc::clone(client)), ..alone() };
                open_clips(&spec, 5, &team, Some(&DataConfig::default())).unwrap()
            })
            .collect();
        let all = || {
            std::thread::scope(|scope| {
                let ranks: Vec<_> = opened.iter().map(|data| scope.spawn(|| delivered(data, 2))).collect();
                ranks.into_iter().for_each(|rank| assert!(rank.join().unwrap() == plain, "{policy}"));
            });
            host.stats()
        };
        let (first, later) = (all(), all());
        assert_eq!((first.misses, first.bypasses, first.evictions), (3 * frames, 0, 0), "{policy}");
        assert_eq!(first.used_bytes, sealed);
        assert!(later.hits > first.hits && (later.misses, later.bypasses) == (first.misses, 0), "all hits: {later:?}");
        assert_eq!(opened.iter().map(|data| data.frames.stats().decoded).sum::<u64>(), 3 * frames);
    }
}

/// The work for an announcement does not grow with the data set.
#[test]
fn next_uses_of_a_hundred_thousand_frames_are_cheap() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path(), |_| ());
    let spec = clips(dir.path(), dat(None), Some(16));
    let found = find_splits(&spec).unwrap().found;
    let mut scan = scan(&found, &spec.video.spikes, false).unwrap();
    scan.frames = vec![scan.frames[0].clone(); 100_000];
    let run = |n: usize| 100 * n..100 * (n + 1);
    let sequence = |n: usize| Sequence { name: format!("s{n}"), runs: vec![run(n)] };
    let list = Clips::new(&(0..1000).map(sequence).collect::<Vec<_>>(), 5, 1, 0);
    let order = Order { len: list.len() as u64, seed: 9, shuffle: Shuffle::Global };
    let crop = Crop::new(SIZE, None, None).unwrap();
    let entries = Arc::new(Entries { frames: Arc::new(Frames::new(scan)), unreadable: Unreadable::default() });
    let source = Source { entries, cached: None, skip_bad: false };
    let dataset = ClipDataset::new(source, list, crop, Some(1), Some(order.clone()));
    let began = std::time::Instant::now();
    let mut soonest = u64::MAX;
    for position in 0..1000 {
        let clip = order.at(3, position).unwrap();
        let after = dataset.last_position(crate::data::BatchAhead { epoch: 3, ids: &[clip] });
        for frame in dataset.clip_frames(clip).unwrap() {
            let key = Frames::key(frame, crate::data::source::video::Modality::Blur);
            soonest = soonest.min(dataset.next_use(key, 3, after));
        }
    }
    let each = began.elapsed().as_secs_f64() / 5000.0;
    println!("{:.1} µs for each frame", 1e6 * each);
    assert!(soonest > 3 * order.len && each < 1e-3, "{each} s for each frame");
}

/// Renames every file of a sequence's folders by its number.
fn rename_frames(sequence: &Path, name: impl Fn(usize) -> String) {
    for kind in ["blur", "sharp", "spike"] {
        let folder = sequence.join(kind);
        let ending = if kind == "spike" { "dat" } else { "png" };
        for frame in 0..7 {
            let (old, new) = (format!("{frame:06}.{ending}"), format!("{}.{ending}", name(frame)));
            std::fs::rename(folder.join(old), folder.join(new)).unwrap();
        }
    }
}

#[test]
fn clips_of_frames_without_leading_zeros_are_in_the_order_of_time() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, renamed) = (dir.path().join("a"), dir.path().join("b"));
    sample(&plain, |_| ());
    sample(&renamed, |_| ());
    for sequence in ["train/seq000", "train/seq001", "val/seq000"] {
        // From 7 to 13: by text, 10 would come first.
        rename_frames(&renamed.join(sequence), |frame| format!("frame_{}", frame + 7));
    }
    let all = |root: &Path| {
        let data = open(&clips(root, dat(None), None), &alone()).unwrap();
        (0..data.datasets.train.len()).map(|clip| read(&*data.datasets.train, 0, clip)).collect::<Vec<_>>()
    };
    assert!(all(&plain) == all(&renamed));
    std::fs::remove_file(renamed.join("train/seq000/blur/frame_9.png")).unwrap();
    std::fs::remove_file(renamed.join("train/seq000/sharp/frame_9.png")).unwrap();
    let data = open(&clips(&renamed, dat(None), None), &alone()).unwrap();
    assert_eq!(data.datasets.train.len(), 2 + 5, "10 to 13 of the first sequence, all of the other");
    let line = "1 gap in the numbers of frames: clips do not cross them; the first: clip train/seq000 between frame_8 and frame_10";
    assert!(data.datasets.notes.contains(&line.to_string()), "{:?}", data.datasets.notes);
}

#[test]
fn spikes_of_0_and_255_are_those_of_0_and_1() {
    let dir = tempfile::tempdir().unwrap();
    let (ones, masks) = (dir.path().join("a"), dir.path().join("b"));
    for root in [&ones, &masks] {
        sample(root, |spec| spec.encoding = SpikeEncoding::Bytes);
    }
    for sequence in ["train/seq000", "train/seq001", "val/seq000"] {
        for frame in 0..7 {
            let path = masks.join(sequence).join(format!("spike/{frame:06}.dat"));
            let bytes: Vec<u8> = std::fs::read(&path).unwrap().iter().map(|spike| spike * 255).collect();
            std::fs::write(path, bytes).unwrap();
        }
    }
    for encoding in [None, Some(SpikeEncoding::Bytes)] {
        let [a, b] = [&ones, &masks].map(|root| open(&clips(root, dat(encoding), Some(16)), &alone()).unwrap());
        for clip in 0..10 {
            assert!(read(&*a.datasets.train, 0, clip) == read(&*b.datasets.train, 0, clip), "clip {clip}");
        }
    }
    for frame in 0..7 {
        for sequence in ["train/seq000", "train/seq001", "val/seq000"] {
            let path = masks.join(sequence).join(format!("spike/{frame:06}.dat"));
            let counts: Vec<u8> = (0..std::fs::read(&path).unwrap().len()).map(|n| (n % 4) as u8).collect();
            std::fs::write(path, counts).unwrap();
        }
    }
    let error = open(&clips(&masks, dat(None), Some(16)), &alone()).err().unwrap();
    assert!(error.contains("their values are 1, 2, 3") && error.contains("set deblur.spike_encoding"), "{error}");
}

#[test]
fn with_no_usable_sequence_the_first_reason_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let mut spec = ClipSpec { skip_bad: true, ..clips(&root, dat(None), None) };
    spec.video.image_exts = vec!["jpg".into()];
    let error = open(&spec, &alone()).err().unwrap();
    assert!(error.starts_with("no frame in any sequence; the first left out: "), "{error}");
    assert!(error.contains("(deblur.image_exts): the folder holds 7 .png"), "{error}");
}

#[test]
fn voxels_that_no_model_can_use_name_file_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let shape = [2, SIZE.height / 2, SIZE.width / 2];
    let write = |sequence: &str, frame: usize, value: f32| {
        let mut file = npy::header(&shape);
        let values = shape.iter().product::<usize>();
        (0..values).for_each(|n| file.extend(if n == 40 { value } else { 1.0 }.to_le_bytes()));
        std::fs::create_dir_all(root.join(sequence).join("spike_vox")).unwrap();
        std::fs::write(root.join(sequence).join(format!("spike_vox/{frame:06}.npy")), file).unwrap();
    };
    for sequence in ["train/seq000", "train/seq001", "val/seq000"] {
        (0..7).for_each(|frame| write(sequence, frame, 0.0));
    }
    let first = |counts: bool| {
        let data = open(&clips(&root, SpikeInput::Voxels { counts }, None), &alone()).unwrap();
        let mut out: Vec<Vec<u8>> =
            data.datasets.train.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
        let mut slices: Vec<&mut [u8]> = out.iter_mut().map(Vec::as_mut_slice).collect();
        let request = ReadRequest { epoch: 0, index: 0 };
        data.datasets.train.read(request, &mut slices, &mut Scratch::default()).map_err(|e| e.to_string())
    };
    assert_eq!(first(true), Ok(()));
    write("train/seq000", 1, -0.75);
    assert_eq!(first(false), Ok(()), "no logarithm is taken");
    let error = first(true).unwrap_err();
    for part in ["train/seq000/spike_vox/000001.npy", "bin 0, row 2, column 4 is -0.75", "deblur.log1p"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    for value in [f32::NAN, f32::NEG_INFINITY] {
        write("train/seq000", 1, value);
        let error = first(false).unwrap_err();
        assert!(error.contains("data.skip_bad"), "{error}");
        assert!(error.contains("000001.npy") && error.contains(&format!("column 4 is {value}: repair")), "{error}");
    }
}

#[test]
fn a_sequence_moved_to_training_stays_held_out_in_a_resumed_run() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |spec| spec.sequences = [2, 2, 0]);
    let spec = clips(&root, dat(None), None);
    let before = open(&spec, &alone()).unwrap();
    let kept = |choice| crate::data::split::KeptSplit {
        list: before.datasets.split.clone().unwrap(),
        choice,
        checkpoint: "checkpoints/step-5".into(),
    };
    assert_eq!(kept(None).list.units.len(), 4);
    let clips_of = |of: &Datasets| -> Vec<_> {
        (0..10).map(|clip| (read(&*of.train, 1, clip), read(&*of.val, 0, clip))).collect()
    };
    let clips_before = clips_of(&before.datasets);
    std::fs::rename(root.join("val/seq001"), root.join("train/seq777")).unwrap();
    let of = |choice| open(&spec, &Team { kept: Some(&kept(choice)), ..alone() }).unwrap().datasets;
    let resumed = of(None);
    assert_eq!((resumed.train.len(), resumed.val.len()), (10, 10));
    assert!(clips_of(&resumed) == clips_before, "trained on and held out as before, in the same order");
    let line = resumed.notes.iter().find(|note| note.contains("is train/seq777 now")).unwrap();
    assert!(line.starts_with("resumed split: 1 file is renamed: val/seq001"), "{line}");
    let anew = of(Some(spec::contract::files::SplitChoice::New));
    assert_eq!((anew.train.len(), anew.val.len()), (15, 5));
    assert!(anew.notes.iter().any(|note| note.contains("train/seq777 (was val") && note.starts_with("warning")));
}

#[test]
fn equal_frames_in_two_splits_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a");
    sample(&root, |_| ());
    let spec = clips(&root, dat(None), None);
    let none = |data: &ClipData| !data.datasets.notes.iter().any(|note| note.contains("look the same"));
    assert!(none(&open(&spec, &alone()).unwrap()));
    for frame in [2, 3] {
        for kind in ["blur", "sharp"] {
            let file = |sequence: &str| root.join(sequence).join(format!("{kind}/{frame:06}.png"));
            std::fs::copy(file("train/seq001"), file("val/seq000")).unwrap();
        }
    }
    let notes = open(&spec, &alone()).unwrap().datasets.notes;
    let line = notes.iter().find(|note| note.contains("look the same")).unwrap();
    assert!(
        line.starts_with("warning: train/seq001 (train) and val/seq000 (val and test) look the same (2 frames)"),
        "{line}"
    );
}
