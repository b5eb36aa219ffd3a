//! Images through the real programs: sample data, batches, conversion, and labels that nobody should train on.

use crate::support::{Runs, folder, launch_program, read_tensors, run};
use std::fs;
use std::path::Path;
use std::process::Command;

const TINY: &str = r#"
task: yolo
seed: 7
yolo: {imgsz: 64, width: 0.125, nbs: 6, mosaic_window: 8, augment: {mixup: 0.3}}
train: {batch_size: 2, num_epochs: 2, num_workers: 1}
log: {plots: false}
"#;

fn sample(layout: &str, out: &Path) {
    let mut made = Command::new(launch_program());
    made.args(["sample-data", "--task", "yolo", "--layout", layout, "--out"]);
    let ended = run(made.arg(out), out.parent().unwrap());
    assert_eq!(ended.code, Some(0), "{ended}");
}

fn numbers(bytes: &[u8]) -> Vec<i64> {
    bytes.chunks_exact(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect()
}

/// The samples of a step on one rank are those of three together.
#[test]
fn augmented_images_do_not_depend_on_the_number_of_ranks() {
    let here = folder();
    let out = here.path().join("shapes");
    sample("yolo", &out);
    let file = here.path().join("batch.safetensors");
    let batch = |rank: usize, world: usize| {
        let runs = Runs::of(TINY, &out, &[&format!("train.batch_size={}", 6 / world)]);
        let mut command = runs.command(&["batch"]);
        command.args(["--step", "3", "--rank", &rank.to_string(), "--world", &world.to_string(), "--out"]).arg(&file);
        let ended = run(&mut command, here.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        let tensors = read_tensors(&file);
        let of = |name: &str| tensors[name].1.clone();
        let (ids, offsets) = (numbers(&of("sample_ids")), numbers(&of("boxes.offsets")));
        let boxes = of("boxes");
        let parts = offsets.windows(2).map(|ends| boxes[20 * ends[0] as usize..20 * ends[1] as usize].to_vec());
        let images = of("image");
        let images = images.chunks_exact(3 * 64 * 64).map(<[u8]>::to_vec);
        let mut all: Vec<_> = ids.into_iter().zip(images).zip(parts).collect();
        all.sort();
        all
    };
    let whole = batch(0, 1);
    let mut parts: Vec<_> = (0..3).flat_map(|rank| batch(rank, 3)).collect();
    parts.sort();
    assert_eq!(whole.len(), 6);
    assert!(whole == parts && whole.iter().any(|(_, boxes)| !boxes.is_empty()));
}

/// `launch convert` writes label files that are a data set again, and changes nothing of what it reads.
#[test]
fn coco_and_labelme_are_converted() {
    let here = folder();
    for layout in ["coco", "labelme"] {
        let (from, to) = (here.path().join(layout), here.path().join(format!("{layout}-yolo")));
        sample(layout, &from);
        let mut convert = Command::new(launch_program());
        let ended = run(convert.arg("convert").arg(&from).arg("--out").arg(&to), here.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(ended.out.contains("train: 80 images with"), "{ended}");
        let count = |folder: &str| fs::read_dir(to.join(folder)).unwrap().count();
        assert_eq!((count("labels/train"), count("labels/val"), count("images/train")), (80, 20, 80));
        assert!(fs::read_to_string(to.join("data.yaml")).unwrap().contains("2: \"triangle\""));
        let (runs, file) = (Runs::of(TINY, &to, &[]), here.path().join("batch.safetensors"));
        let ended = run(
            runs.command(&["batch"]).args(["--step", "0", "--rank", "0", "--world", "1", "--out"]).arg(&file),
            here.path(),
        );
        assert_eq!(ended.code, Some(0), "{ended}");
    }
    let mut again = Command::new(launch_program());
    let (from, to) = (here.path().join("coco"), here.path().join("coco-yolo"));
    let ended = run(again.arg("convert").arg(&from).arg("--out").arg(&to), here.path());
    assert!(ended.code != Some(0) && ended.err.contains("already holds files"), "{ended}");
}

/// With `data.skip_bad: false` a label file is refused with its line and value.
#[test]
fn bad_labels_end_a_run_by_name() {
    let here = folder();
    let out = here.path().join("shapes");
    sample("yolo", &out);
    fs::write(out.join("labels/train/00003.txt"), "0 .5 .5 .1 .1\n7 .5 .5 .1 .1\n").unwrap();
    let runs = Runs::of(TINY, &out, &["data.skip_bad=false"]);
    let ended = run(&mut runs.command(&["--ranks", "1", "--name", "r"]), runs.path());
    let told = format!("{}{}", ended.out, ended.err);
    assert!(
        ended.code != Some(0) && told.contains("00003.txt: line 2: class 7: there are 3 classes, 0 to 2"),
        "{told}"
    );
}
