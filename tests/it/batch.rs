//! `launch batch` against windows of the files, read by hand.

use crate::support::{Runs, Tensors, floats, read_tensors, run, sample_data};
use std::collections::BTreeMap;

const STEP: u64 = 13;

#[derive(Clone, Copy, hdf5::H5Type)]
#[repr(C)]
struct Row {
    emg: [f32; 16],
    joint_angles: [f32; 20],
}

/// Samples that `rank` of `world` trains on: by sample id, in order, the bytes of `emg` and `joint_angles`.
type Samples = Vec<(i64, Vec<u8>, Vec<u8>)>;

fn batch(runs: &Runs, world: usize, rank: usize, sets: &[&str]) -> Samples {
    let out = runs.path().join(format!("w{world}r{rank}.safetensors"));
    let (step, rank, world) = (STEP.to_string(), rank.to_string(), world.to_string());
    let words = ["batch", "--step", &step, "--rank", &rank, "--world", &world, "--out", out.to_str().unwrap()];
    let mut command = runs.command(&words);
    command.args(sets.iter().flat_map(|set| ["--set", set]));
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    samples(&read_tensors(&out))
}

fn samples(tensors: &Tensors) -> Samples {
    let ids = tensors["sample_ids"].1.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()));
    let count = tensors["sample_ids"].0[0];
    let part = |name: &str, width: usize| {
        let (shape, bytes) = &tensors[name];
        assert_eq!(shape, &[count, 200, width], "{name}");
        bytes.chunks_exact(200 * width * 4).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let (emg, angles) = (part("emg", 16), part("joint_angles", 20));
    ids.zip(emg.into_iter().zip(angles)).map(|(id, (emg, angles))| (id, emg, angles)).collect()
}

#[test]
fn ranks_of_any_world_share_one_global_batch() {
    let runs = Runs::new(&[]);
    let whole = batch(&runs, 1, 0, &["train.batch_size=12", "train.microbatch=5"]);
    assert_eq!(whole.len(), 12);
    for world in [2, 3] {
        let size = format!("train.batch_size={}", 12 / world);
        let mut parts: Vec<_> = (0..world).map(|rank| batch(&runs, world, rank, &[&size]).into_iter()).collect();
        // Rank r takes items r, r + W, …
        let together: Samples = (0..12).map(|item| parts[item % world].next().unwrap()).collect();
        assert!(together == whole, "{world} ranks");
        assert!(parts.iter_mut().all(|part| part.next().is_none()));
    }
}

#[test]
fn its_tensors_are_the_windows_of_the_files() {
    let runs = Runs::new(&["data.normalize=false"]);
    let found = batch(&runs, 1, 0, &["train.batch_size=64"]);
    let mut files: Vec<_> = sample_data().read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path| hdf5::File::open(path).unwrap().dataset("emg2pose/timeseries").unwrap().read_1d::<Row>().unwrap();
    let sessions: Vec<Vec<Row>> = files.iter().map(|path| read(path).to_vec()).collect();
    let mut places = BTreeMap::new();
    for (id, emg, angles) in found {
        let (emg, angles) = (floats(&emg), floats(&angles));
        // Angles are different in every row, so the first one tells the place.
        let at = sessions
            .iter()
            .enumerate()
            .find_map(|(file, rows)| Some((file, rows.iter().position(|row| row.joint_angles[..] == angles[..20])?)));
        let (file, first) = at.unwrap_or_else(|| panic!("sample {id} is in no file"));
        for (number, row) in sessions[file][first..first + 200].iter().enumerate() {
            assert_eq!(row.joint_angles[..], angles[number * 20..][..20], "sample {id}, row {number}");
            // data.rectify
            assert_eq!(row.emg.map(f32::abs)[..], emg[number * 16..][..16], "sample {id}, row {number}");
            assert!(row.joint_angles.iter().any(|&angle| angle != 0.0), "sample {id} touches a failure");
        }
        assert!(places.insert(id, (file, first)).is_none(), "sample {id} twice in a step");
    }
    assert_eq!(places.len(), 64);
    let order: Vec<_> = places.values().collect();
    assert!(order.is_sorted() && order.windows(2).all(|pair| pair[0] != pair[1]), "{places:?}");
    let used: std::collections::BTreeSet<usize> = places.values().map(|place| place.0).collect();
    assert_eq!(used.len(), 2, "142 windows of two training files");
}
