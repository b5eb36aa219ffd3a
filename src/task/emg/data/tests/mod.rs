//! From files to windows: what is read, what is left out, what is remembered.

use super::scan::sampled_row;
use super::*;
use crate::data::source::hdf5::write::{Row, Storage, write_session};
use crate::data::source::hdf5::{Order, Scalar};
use crate::task::emg::sample::{SampleSpec, write_sample_data};
use std::path::PathBuf;
use std::sync::Mutex;

mod cached;

fn solo(bytes: &[u8]) -> Result<Vec<Vec<u8>>, DataError> {
    Ok(vec![bytes.to_vec()])
}

fn alone() -> Team<'static> {
    Team { rank: 0, world_size: 1, gather: &solo, cache: None, kept: None, stages: Default::default() }
}

fn config(path: &Path) -> WindowKeys {
    let data = DataConfig { dataset_path: path.to_owned(), stride: 100, ..DataConfig::default() };
    WindowKeys { data, emg: EmgConfig { window_size: 500, ..EmgConfig::default() } }
}

/// `keys` after a change.
fn with(keys: &WindowKeys, change: impl FnOnce(&mut WindowKeys)) -> WindowKeys {
    let mut keys = keys.clone();
    change(&mut keys);
    keys
}

/// Three seconds per session: small, but with several chunks.
fn make(dir: &Path, sessions: usize) -> PathBuf {
    let out = dir.join("emg");
    let spec = SampleSpec { sessions, seconds: 3.0, ik_failure_rows: 700, ..Default::default() };
    write_sample_data(&out, &spec).unwrap();
    out
}

fn window(dataset: &dyn Dataset, index: usize) -> (Vec<f32>, Vec<f32>) {
    let mut buffers: Vec<Vec<u8>> = dataset.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut buffer[..]).collect();
    dataset.read(ReadRequest { epoch: 0, index }, &mut out, &mut Scratch::default()).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|x| f32::from_ne_bytes(*x)).collect::<Vec<_>>();
    (floats(&buffers[0]), floats(&buffers[1]))
}

#[test]
fn windows_equal_direct_reads_and_avoid_failure_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 6);
    let data = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    let Datasets { train, val, test, skipped, .. } = &data.datasets;
    assert!(skipped.is_empty());
    assert_eq!(train.fields()[0].shape, [500, 16]);
    assert_eq!(train.fields()[1].shape, [500, 20]);
    let mut seen = 0;
    for dataset in [train, val, test] {
        assert!(!dataset.is_empty());
        for index in 0..dataset.len() {
            let (emg, angles) = window(&**dataset, index);
            let line = dataset.describe(index);
            let (name, rows) = line.split_once(" rows ").unwrap();
            let start: u64 = rows.split_once("..").unwrap().0.parse().unwrap();
            assert_eq!(start % 100, 0);
            let wanted = scan_facts(&config(&path)).unwrap().wanted();
            let session = crate::data::source::hdf5::SessionData::open(&path.join(name), &wanted).unwrap();
            let direct = session.window(start, start + 500).unwrap();
            assert!(emg == direct[0] && angles == direct[1], "{line}");
            assert!(angles.chunks(20).all(|pose| pose.iter().any(|x| *x != 0.0)), "{line}");
            seen += 1;
        }
    }
    let all = with(&config(&path), |keys| keys.emg.skip_ik_failures = false);
    let all = open_datasets(&all, 42, &alone(), dir.path()).unwrap().datasets;
    let total = all.train.len() + all.val.len() + all.test.len();
    assert_eq!(total, 6 * 56);
    // 700 failed rows touch 12 windows of 500 at stride 100, fewer at an end.
    assert!(seen < total && seen >= total - 6 * 12, "{seen} of {total}");
}

#[test]
fn statistics_come_from_sampled_training_rows_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 5);
    let config = with(&config(&path), |keys| {
        keys.emg.rectify = true;
        keys.emg.normalize = true;
        keys.emg.max_samples_for_normalize = 1000;
    });
    let data = open_datasets(&config, 7, &alone(), dir.path()).unwrap();
    let splits = split_files(5, config.data.split_ratio, 7);
    assert_eq!(data.statistics.count, 1000 * splits[0].len() as u64, "at most max_samples rows per training file");
    // The same by two passes over direct reads.
    let (mut values, mut poses) = (vec![Vec::new(); 16], vec![Vec::new(); 20]);
    for n in &splits[0] {
        let wanted = scan_facts(&config).unwrap().wanted();
        let session =
            crate::data::source::hdf5::SessionData::open(&path.join(format!("s{n:02}.hdf5")), &wanted).unwrap();
        let fields = session.window(0, session.len()).unwrap();
        for k in 0..1000 {
            let row = sampled_row(k, 1000, session.len()) as usize;
            (0..16).for_each(|c| values[c].push(f64::from(fields[0][row * 16 + c].abs())));
        }
        for pose in fields[1].chunks(20).filter(|pose| pose.iter().any(|x| *x != 0.0)) {
            (0..20).for_each(|j| poses[j].push(f64::from(pose[j])));
        }
    }
    let mean = |values: &Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    for (c, values) in values.iter().enumerate() {
        let m = mean(values);
        let std = (values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / values.len() as f64).sqrt() + 1e-8;
        assert!((data.statistics.mean[c] - m).abs() < 1e-10 && (data.statistics.std()[c] - std).abs() < 1e-10);
    }
    for (found, poses) in data.mean_pose.iter().zip(&poses) {
        assert!((found - mean(poses)).abs() < 1e-9);
    }
    let plain = with(&config, |keys| {
        keys.emg.rectify = false;
        keys.emg.normalize = false;
    });
    let plain = open_datasets(&plain, 7, &alone(), dir.path()).unwrap();
    let (raw, _) = window(&*plain.datasets.train, 3);
    let (normalised, _) = window(&*data.datasets.train, 3);
    for (i, (raw, normalised)) in raw.iter().zip(&normalised).enumerate() {
        let want = (f64::from(raw.abs()) - data.statistics.mean[i % 16]) / data.statistics.std()[i % 16];
        assert!((want - f64::from(*normalised)).abs() < 1e-5 * want.abs().max(1.0));
    }
}

#[test]
fn the_index_saves_the_second_scan_until_a_file_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 4);
    let facts = scan_facts(&config(&path)).unwrap();
    let index_path = index::path(dir.path(), &facts, &path);
    let scanned = |what: &str| {
        let known = index::load(&index_path, &facts, |_| true);
        let current = known.values().filter(|file| index::current(file)).count();
        let data = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
        assert_eq!(data.datasets.skipped.len(), 0, "{what}");
        (4 - current, data.datasets.train.len(), data.mean_pose)
    };
    let first = scanned("first");
    assert_eq!(first.0, 4);
    let second = scanned("second");
    assert_eq!((second.0, &second.1, &second.2), (0, &first.1, &first.2));
    // Touched: scanned again, nothing else.
    let touched = std::fs::File::options().write(true).open(path.join("s01.hdf5")).unwrap();
    touched.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(scanned("touched").0, 1);
    assert_eq!(scanned("touched, second").0, 0);
    // Damaged in every way: scanned again, same result.
    let good = std::fs::read(&index_path).unwrap();
    for at in [0, good.len() / 3, good.len() - 4] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&index_path, &bad).unwrap();
        assert_eq!(scanned("damaged").0, 4);
    }
    for keep in [0, 1, good.len() / 2, good.len() - 1] {
        std::fs::write(&index_path, &good[..keep]).unwrap();
        let again = scanned("cut");
        assert_eq!((again.0, &again.1, &again.2), (4, &first.1, &first.2));
    }
}

#[test]
fn ranks_divide_the_scan_and_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 5);
    let single = open_datasets(&config(&path), 42, &alone(), &dir.path().join("one")).unwrap();
    let boards: [Mutex<Vec<u8>>; 3] = Default::default();
    let barrier = std::sync::Barrier::new(3);
    let (path, boards, barrier) = (&path, &boards, &barrier);
    let results: Vec<EmgData> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let folder = dir.path().join(format!("rank{rank}"));
                scope.spawn(move || {
                    let gather = |bytes: &[u8]| {
                        *boards[rank].lock().unwrap() = bytes.to_vec();
                        barrier.wait();
                        if let Ok(share) = serde_json::from_slice::<Vec<share::Found>>(bytes) {
                            assert!(share.len() <= 2, "files are divided");
                        }
                        let all = boards.iter().map(|board| board.lock().unwrap().clone()).collect();
                        // Nobody writes the next round before all have read this one.
                        barrier.wait();
                        Ok(all)
                    };
                    let team = Team {
                        rank,
                        world_size: 3,
                        gather: &gather,
                        cache: None,
                        kept: None,
                        stages: Default::default(),
                    };
                    open_datasets(&config(path), 42, &team, &folder).unwrap()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for data in &results {
        assert_eq!(data.mean_pose, single.mean_pose);
        assert_eq!(data.statistics, single.statistics);
        assert_eq!(data.datasets.train.len(), single.datasets.train.len());
        assert_eq!(data.datasets.val.describe(3), single.datasets.val.describe(3));
    }
    assert!(dir.path().join("rank0").exists() && !dir.path().join("rank1").exists(), "rank 0 writes the index");
}

#[test]
fn shuffled_emg_is_a_permutation_of_windows_and_leaves_angles_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 3);
    let plain = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap().datasets.train;
    let shuffled = with(&config(&path), |keys| keys.emg.shuffle_emg = true);
    let shuffled = open_datasets(&shuffled, 42, &alone(), dir.path()).unwrap().datasets.train;
    let sorted = |dataset: &dyn Dataset| {
        let mut emg: Vec<_> =
            (0..dataset.len()).map(|i| window(dataset, i).0.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect();
        emg.sort_unstable();
        emg
    };
    assert!(sorted(&*plain) == sorted(&*shuffled));
    let same = (0..plain.len()).filter(|i| window(&*plain, *i).0 == window(&*shuffled, *i).0).count();
    assert!(same <= plain.len() / 5, "{same} of {}", plain.len());
    (0..plain.len()).for_each(|i| assert_eq!(window(&*plain, i).1, window(&*shuffled, i).1));
}

#[test]
fn an_evenly_spread_part_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 3);
    let part = with(&config(&path), |keys| {
        keys.data.max_train_windows = 10;
        keys.data.max_val_windows = 5;
    });
    let data = open_datasets(&part, 42, &alone(), dir.path()).unwrap().datasets;
    assert_eq!((data.train.len(), data.val.len()), (10, 5));
    assert!(data.notes[0].starts_with("train: 10 windows (evenly out of "), "{:?}", data.notes);
    let mut out = [0u8; 0];
    assert!(
        data.train
            .read(ReadRequest { epoch: 0, index: 10 }, &mut [&mut out, &mut []], &mut Scratch::default())
            .is_err()
    );
}

fn rows(n: usize) -> Vec<Row> {
    let number = |i: usize| ((i * 2_654_435_761) % 10_007) as f32 / 1024.0 - 4.0;
    let row = |i: usize| Row {
        time: 0.0,
        joint_angles: std::array::from_fn(|j| f64::from(number(i * 36 + j))),
        emg: std::array::from_fn(|c| number(i * 36 + 20 + c)),
    };
    (0..n).map(row).collect()
}

#[test]
fn bad_files_are_left_out_with_one_line_each_or_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 3);
    let write = |name: &str, rows: &[Row]| write_session(&path.join(name), &Storage::default(), &[], rows).unwrap();
    let mut nan = rows(2500);
    nan[2100].emg[5] = f32::NAN;
    write("nan.hdf5", &nan);
    let mut infinite = rows(600);
    infinite[7].joint_angles[19] = f64::INFINITY;
    write("infinite.hdf5", &infinite);
    write("short.hdf5", &rows(499));
    let mut failed = rows(600);
    failed.iter_mut().for_each(|row| row.joint_angles = [1e-9; 20]);
    write("failed.hdf5", &failed);
    std::fs::write(path.join("text.h5"), "nothing").unwrap();
    let bytes = std::fs::read(path.join("s00.hdf5")).unwrap();
    std::fs::write(path.join("cut.hdf5"), &bytes[..bytes.len() - 4000]).unwrap();
    let good = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    let skipped = good.datasets.skipped.join("\n");
    for line in [
        "nan.hdf5: emg is NaN at row 2100, channel 5",
        "infinite.hdf5: joint_angles is inf at row 7, channel 19",
        "short.hdf5: too short for one window: 499 rows, emg.window_size is 500",
        "failed.hdf5: too short for one window: 600 rows, 600 of them IK failures",
        "text.h5: cannot be read as HDF5",
        "cut.hdf5: ",
    ] {
        assert!(skipped.contains(line), "{line}: {skipped}");
    }
    assert_eq!(good.datasets.skipped.len(), 6);
    assert!(good.datasets.notes.contains(&"6 files left out".to_string()));
    let strict = with(&config(&path), |keys| keys.data.skip_bad = false);
    let error = open_datasets(&strict, 42, &alone(), dir.path()).err().unwrap().to_string();
    assert!(error.contains("cut.hdf5") && error.contains("data.skip_bad"), "{error}");
}

#[test]
fn nothing_usable_names_the_path_and_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, expected: &str| {
        let error = open_datasets(&config(path), 42, &alone(), dir.path()).err().unwrap().to_string();
        for words in [expected, &path.display().to_string(), "data.sample_if_missing: true"] {
            assert!(error.contains(words), "{words}: {error}");
        }
    };
    refused(&dir.path().join("absent"), "No such file");
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    refused(&dir.path().join("empty"), "no .hdf5 or .h5 file");
    std::fs::create_dir(dir.path().join("bad")).unwrap();
    std::fs::write(dir.path().join("bad/a.h5"), "text").unwrap();
    refused(&dir.path().join("bad"), "none of 1 files is usable; the first:");
    let zero = with(&config(dir.path()), |keys| keys.data.stride = 0);
    let error = open_datasets(&zero, 42, &alone(), dir.path()).err().unwrap().to_string();
    assert!(error.contains("data.stride is 0"), "{error}");
}

#[test]
fn one_or_two_files_are_enough_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 2);
    let two = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap().datasets;
    assert!(two.notes.iter().any(|note| note.contains("val and test are the same file")));
    let one = open_datasets(&config(&path.join("s01.hdf5")), 42, &alone(), dir.path()).unwrap().datasets;
    assert!(one.notes.iter().any(|note| note.contains("one file")));
    assert_eq!(one.train.len(), one.test.len());
}

#[test]
fn windows_do_not_depend_on_how_files_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let big =
        Storage { order: Order::Big, emg: Scalar::F64, members: ["emg", "time", "joint_angles"], ..Default::default() };
    let mut all = Vec::new();
    for (name, storage) in [("a", Storage::default()), ("b", Storage::contiguous()), ("c", big)] {
        let spec = SampleSpec { sessions: 3, seconds: 1.5, storage, ik_failure_rows: 300, ..Default::default() };
        write_sample_data(&dir.path().join(name), &spec).unwrap();
        let data = open_datasets(&config(&dir.path().join(name)), 42, &alone(), dir.path()).unwrap();
        let train = &data.datasets.train;
        all.push((0..train.len()).map(|i| window(&**train, i)).collect::<Vec<_>>());
    }
    assert!(!all[0].is_empty() && all[0] == all[1] && all[1] == all[2]);
}

/// A session of random numbers that differ by `seed`, with the old time of a reproducible archive.
fn session_of(path: &Path, seed: usize, scale: f32, failed: std::ops::Range<usize>) {
    let mut rows = rows(1200);
    for (n, row) in rows.iter_mut().enumerate() {
        row.emg.iter_mut().for_each(|x| *x = (*x + (seed * 31 + n % 7) as f32 / 64.0) * scale);
        if failed.contains(&n) {
            row.joint_angles = [0.0; 20];
        }
    }
    write_session(path, &Storage::contiguous(), &[], &rows).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
}

#[test]
fn new_content_of_the_same_path_size_and_time_is_scanned_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    let version = |scale: f32, failed: std::ops::Range<usize>| {
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        (0..4).for_each(|n| session_of(&path.join(format!("s{n}.hdf5")), n, scale, failed.clone()));
        std::fs::metadata(path.join("s0.hdf5")).unwrap()
    };
    let config = with(&config(&path), |keys| keys.emg.normalize = true);
    let opened = |index: &str| open_datasets(&config, 42, &alone(), &dir.path().join(index)).unwrap();
    let first = version(1.0, 0..0);
    let before = opened("kept");
    let second = version(10.0, 300..600);
    assert_eq!((first.len(), first.modified().unwrap()), (second.len(), second.modified().unwrap()));
    let (kept, fresh) = (opened("kept"), opened("fresh"));
    assert_ne!(before.statistics, kept.statistics);
    assert_eq!(kept.statistics, fresh.statistics);
    assert_eq!(kept.datasets.notes, fresh.datasets.notes, "the failed rows are seen");
    assert!(kept.datasets.notes.iter().any(|note| note.starts_with("1200 samples where inverse kinematics failed")));
    assert_eq!(window(&*kept.datasets.train, 0), window(&*fresh.datasets.train, 0));
}

#[test]
fn an_index_of_an_older_version_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 3);
    let first = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    let facts = scan_facts(&config(&path)).unwrap();
    let index_path = index::path(dir.path(), &facts, &path);
    let text = std::fs::read_to_string(&index_path).unwrap();
    let old = text.replacen("\"version\":3", "\"version\":1", 1);
    assert_ne!(old, text);
    std::fs::write(&index_path, old).unwrap();
    assert!(index::load(&index_path, &facts, |_| true).is_empty());
    let second = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    assert_eq!(second.statistics, first.statistics);
    assert_eq!(index::load(&index_path, &facts, |_| true).len(), 3);
}

#[test]
fn hidden_copies_are_no_data_and_visible_ones_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 6);
    let plain = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap().datasets;
    for (name, copy) in [
        ("s00.hdf5", ".ipynb_checkpoints/s00-checkpoint.hdf5"),
        ("s01.hdf5", ".Trash-1000/files/s01.hdf5"),
        ("s02.hdf5", ".snapshot/hourly.0/s02.hdf5"),
    ] {
        std::fs::create_dir_all(path.join(copy).parent().unwrap()).unwrap();
        std::fs::copy(path.join(name), path.join(copy)).unwrap();
    }
    let hidden = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap().datasets;
    assert_eq!(
        (hidden.train.len(), hidden.val.len(), &hidden.split),
        (plain.train.len(), plain.val.len(), &plain.split)
    );
    let line = "3 hidden or leftover entries left out, no data: .Trash-1000, .ipynb_checkpoints, .snapshot; rename what is data";
    assert!(hidden.notes.contains(&line.to_string()), "{:?}", hidden.notes);
    assert!(hidden.skipped.is_empty() && !hidden.notes.iter().any(|note| note.contains("look the same")));
    // A copy of a session of each split under a visible name: at least one is in another split.
    for unit in plain.split.unwrap().units {
        std::fs::copy(path.join(&unit.name), path.join(format!("backup-{}", unit.name))).unwrap();
    }
    let copied = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap().datasets;
    let warning = copied.notes.iter().find(|note| note.contains("look the same")).unwrap();
    assert!(warning.starts_with("warning: backup-s0") && warning.contains(" and s0"), "{warning}");
}

/// Files of each split by what its first window's line says.
fn held(data: &EmgData) -> [Vec<String>; 3] {
    let split = data.datasets.split.as_ref().unwrap();
    let names = |n: usize| split.units.iter().filter(|unit| unit.splits[n]).map(|unit| unit.name.clone()).collect();
    [0, 1, 2].map(names)
}

#[test]
fn a_resumed_run_never_trains_on_what_its_checkpoint_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), 8);
    let first = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    let kept = crate::data::split::KeptSplit {
        list: first.datasets.split.clone().unwrap(),
        choice: None,
        checkpoint: "checkpoints/step-5".into(),
    };
    let resumed = || open_datasets(&config(&path), 42, &Team { kept: Some(&kept), ..alone() }, dir.path());
    let windows = |data: &EmgData| {
        let all = |set: &Arc<dyn Dataset>| (0..set.len()).map(|n| window(&**set, n)).collect::<Vec<_>>();
        (all(&data.datasets.train), all(&data.datasets.val))
    };
    let before = windows(&first);
    let [train, val, _] = held(&first);
    // Renamed: every window stays where it was, in the same order.
    std::fs::rename(path.join(&val[0]), path.join("zz.hdf5")).unwrap();
    std::fs::rename(path.join(&train[0]), path.join("yy.hdf5")).unwrap();
    let renamed = resumed().unwrap();
    assert!(windows(&renamed) == before && held(&renamed)[1] == ["zz.hdf5"]);
    assert!(renamed.datasets.notes.iter().any(|note| note.starts_with("resumed split: 2 files are renamed")));
    let anew = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    assert_ne!(held(&anew), held(&renamed), "a new run splits the new names anew: this test could fail");
    // Lost: the others stay.
    std::fs::remove_file(path.join("yy.hdf5")).unwrap();
    let lost = resumed().unwrap();
    assert!(windows(&lost).1 == before.1, "validation is what it was");
    let [_, now, _] = held(&lost);
    assert_eq!(now, ["zz.hdf5"]);
    // Replaced, while a held-out one is gone.
    session_of(&path.join(&train[1]), 9, 1.0, 0..0);
    assert!(resumed().is_ok(), "a repaired training file alone is no doubt");
    std::fs::remove_file(path.join("zz.hdf5")).unwrap();
    let error = resumed().err().unwrap().to_string();
    assert!(error.contains("step-5") && error.contains("--resume-split"), "{error}");
}

#[test]
fn a_file_replaced_during_the_run_is_never_read_as_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    std::fs::create_dir(&path).unwrap();
    (0..3).for_each(|n| session_of(&path.join(format!("s{n}.hdf5")), n, 1.0, 0..0));
    let data = open_datasets(&config(&path), 42, &alone(), dir.path()).unwrap();
    let (before, _) = window(&*data.datasets.train, 0);
    let name = data.datasets.train.describe(0).split_once(" rows").unwrap().0.to_owned();
    let file = path.join(&name);
    // Hard links and permissions change no byte.
    std::fs::hard_link(&file, dir.path().join("link")).unwrap();
    data.reader.give_back();
    assert!(window(&*data.datasets.train, 0).0 == before);
    std::fs::remove_file(&file).unwrap();
    session_of(&file, 5, 2.0, 0..0);
    data.reader.give_back();
    let mut out: Vec<Vec<u8>> =
        data.datasets.train.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut slices: Vec<&mut [u8]> = out.iter_mut().map(Vec::as_mut_slice).collect();
    let request = ReadRequest { epoch: 0, index: 0 };
    let error = data.datasets.train.read(request, &mut slices, &mut Scratch::default()).unwrap_err().to_string();
    assert!(error.contains(&name) && error.contains("replaced since the run began"), "{error}");
}
