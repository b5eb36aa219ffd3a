//! The deblurring task from its command line: plan of the guide's data set, a short run of configs/baseline.yaml.

use crate::simulate::{Grain, Trace, Walk};
use crate::support::{Ended, folder, launch_program, read_lines, run};
use cache::PolicyKind;
use headroom::data::loader::{Order, Shuffle};
use headroom::data::source::video::npy;
use headroom::task::deblur::outline;
use headroom::task::deblur::sample::{SampleSpec, write_sample_data};
use spec::config::Folders;
use spec::contract::{Gpu, Machine, Measured};
use spec::plan::{Plan, Request, plan};
use std::path::{Path, PathBuf};
use std::process::Command;

const GIB: u64 = 1 << 30;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The guide's machine and data set: 256 GB, 2,222 frames of 720×1280 with a spike stream each.
fn guide_plan(sets: &[&str]) -> Plan {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let here = Folders { cwd: root(), headroom: None, home: None };
    let config = spec::task::find_config("baseline", &here).unwrap().resolve("cuda", &sets).unwrap();
    let gpu = |index| Gpu { index, name: "card".into(), memory_total_bytes: 48 * GIB, memory_free_bytes: 47 * GIB };
    let machine = Machine {
        cores: 40,
        memory_total_bytes: 256 * GIB,
        memory_available_bytes: 250 * GIB,
        page_bytes: 4096,
        gpus: (0..3).map(gpu).collect(),
        ..Machine::default()
    };
    let seen = outline::Seen {
        images: 2 * 2222,
        height: 720,
        width: 1280,
        spike_file_bytes: 66 * 360 * 640 / 8,
        ..outline::Seen::default()
    };
    let data = outline::of_files(&config, &seen).unwrap().sizes;
    let request = Request { gpus: Some(3), ..Request::default() };
    plan(&config, &machine, &Measured { data, ..Measured::default() }, &request).unwrap()
}

#[test]
fn the_guides_data_set_fits_its_50_gb_whole_and_every_steady_lookup_hits() {
    let guide = guide_plan(&[]);
    let entry = 2 * 720 * 1280 * 3 + 66 * 360 * 80;
    let useful = 2222u64 * entry;
    assert!(guide.budget.page_cache_bytes >= useful && guide.budget.page_cache_bytes <= 50 * GIB);
    assert_eq!(guide.budget.cache_policy, spec::contract::CacheMode::NextUse);
    assert!(140_083_200 >= 15 * entry, "at most 1/15 of the tensors' bytes: {entry}");
    let table = guide.table_at(200);
    for part in [
        "2,222 frames of 720×1280, 66 spike planes of 360×640",
        "as f32 tensors 133.6 MiB per frame, 289.89 GiB in all",
        "as cached 7.1 MiB per frame (1/18.9), 15.38 GiB in all",
        "108 worker processes that keep all tensors would hold 30.57 TiB, with 50 GiB each 5.27 TiB",
        "policy next_use, steady hit rate 100.0 %",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    // Entries through the real directory: as many of equal size as the plan has room for.
    let room = (guide.budget.page_cache_bytes / entry) as usize;
    for policy in [PolicyKind::NextUse, PolicyKind::Pin] {
        assert_eq!(clips_through_the_directory(policy, room), 1.0, "{policy}");
    }
    // A cache of 17 % of it holds its share and no more: `pin` hits that often. Looking ahead also keeps what a clip to
    // come shares with this one.
    let part = guide_plan(&["data.cache_size_gb=2.614"]);
    let share = part.budget.page_cache_bytes as f64 / useful as f64;
    assert!((share - 0.17).abs() < 0.001, "{share}");
    assert!(part.table_at(200).contains("policy next_use, steady hit rate 17.0 % or more"));
    let rate = |policy| clips_through_the_directory(policy, (share * 2222.0) as usize);
    let (ahead, pinned, last) = (rate(PolicyKind::NextUse), rate(PolicyKind::Pin), rate(PolicyKind::Lru));
    println!("17 % of the frames: next_use {ahead:.4}, pin {pinned:.4}, lru {last:.4}");
    assert!((pinned - share).abs() < 0.01, "{pinned} {share}");
    assert!(ahead > 2.4 * share && last < pinned + 0.01, "{ahead} {last}");
    let pinned = guide_plan(&["data.cache_size_gb=2.614", "data.cache=pin"]);
    assert!(
        !pinned.table_at(200).contains("or more")
            && pinned.table_at(200).contains("policy pin, steady hit rate 17.0 %")
    );
    // Clips that share no frame: each entry is read once, and `pin` is as good as any.
    let apart = guide_plan(&["data.stride=5"]);
    assert_eq!(apart.budget.cache_policy, spec::contract::CacheMode::Pin);
}

/// Share of lookups that hit from the second epoch on: clips of five frames in the loader's own order, on three ranks.
/// The frames form a ring, so that each is in five clips.
fn clips_through_the_directory(policy: PolicyKind, room: usize) -> f64 {
    const FRAMES: u64 = 2220;
    const CLIP: u64 = 5;
    const RANKS: u64 = 3;
    let order = Order { len: FRAMES, seed: 7, shuffle: Shuffle::Global };
    let mut samples = Vec::new();
    for step in 0..3 * FRAMES / RANKS {
        let clip = |rank| {
            let at = step * RANKS + rank;
            order.at(at / FRAMES, at % FRAMES).unwrap()
        };
        let clips: Vec<u64> = (0..RANKS).map(clip).collect();
        for place in 0..CLIP {
            samples.extend(clips.iter().map(|clip| ((clip + place) % FRAMES * CLIP) as u32));
        }
    }
    let walk = Walk { world_size: RANKS as usize, batch: CLIP as usize, ahead: 8 };
    Trace::of(samples, FRAMES as usize, CLIP as usize).walk(policy, room, Grain::Chunk, walk).hit_rate
}

/// A model of some thousand parameters on three sequences.
const TINY: &[&str] = &[
    "model.vrt.dims=[8,8,8,8,8,8,8,8]",
    "model.vrt.depths=[1,1,1,1,1,1,1,1]",
    "model.vrt.independent_groups=[7]",
    "model.vrt.deform_groups=2",
    "model.vrt.tsa_heads=2",
    "model.vrt.fuse_heads=2",
    "data.deblur.clip_len=2",
    "data.deblur.crop_size=32",
    "data.deblur.val_crop_size=32",
    "data.deblur.voxel_bins=4",
    "data.max_train_windows=6",
    "data.max_val_windows=3",
    "train.num_epochs=2",
    "train.warmup_steps=0",
    "log.log_every=1",
];

pub fn baseline(folder: &Path, data: &Path, name: &str, words: &[&str]) -> (Ended, PathBuf) {
    baseline_in(folder, data, name, words, &[])
}

fn baseline_in(folder: &Path, data: &Path, name: &str, words: &[&str], env: &[(&str, &str)]) -> (Ended, PathBuf) {
    let mut command = Command::new(launch_program());
    command.envs(env.iter().copied());
    command.args(["--config", "configs/baseline.yaml", "--device", "cpu", "--name", name]).current_dir(root());
    let own =
        [format!("log.runs_dir={}", folder.join("runs").display()), format!("data.dataset_path={}", data.display())];
    for set in TINY.iter().map(ToString::to_string).chain(own) {
        command.args(["--set", &set]);
    }
    command.args(words).env("OMP_WAIT_POLICY", "passive");
    (run(&mut command, folder), folder.join("runs").join(name))
}

/// The command of the README with everything small: sample data are made, every file that a user looks at exists, and
/// the run resumes from its checkpoint with other tiles.
#[test]
fn the_baseline_runs_from_nothing_to_pictures_and_resumes() {
    let folder = folder();
    let data = folder.path().join("clips");
    let (ended, run) = baseline(folder.path(), &data, "a", &["--gpus", "2", "--set", "train.max_steps=3"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("making sample data"), "{ended}");
    for part in ["as cached", "[GoProSpike] Cache Stats:", "psnr_gain_db", "policy next_use"] {
        assert!(ended.out.contains(part), "{part} is missing: {ended}");
    }
    let last = read_lines(&run.join("metrics.jsonl")).pop().unwrap();
    for name in ["val.loss", "val.psnr_rgb", "val.psnr_y", "val.ssim_y", "val.psnr_blur_rgb", "train.psnr_gain_db"] {
        assert!(last[name].is_f64(), "{name}: {last}");
    }
    let validation: serde_json::Value =
        serde_json::from_slice(&std::fs::read(run.join("metrics/val_step_3.json")).unwrap()).unwrap();
    assert_eq!(validation["psnr_rgb"], last["val.psnr_rgb"]);
    let picture = std::fs::read(run.join("images/step-3.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG"));
    let words = ["--gpus", "2", "--resume", "auto", "--set", "model.vrt.chunk_size=8", "--set", "train.max_steps=4"];
    let (ended, run) = baseline(folder.path(), &data, "a", &words);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(read_lines(&run.join("metrics.jsonl")).pop().unwrap()["step"], 4);
    // Frames alone is another model: its checkpoint is refused, with what differs.
    let words = ["--gpus", "2", "--resume", "auto", "--set", "model.vrt.use_spike=false"];
    let (ended, _) = baseline(folder.path(), &data, "a", &words);
    assert_eq!(ended.code, Some(5), "{ended}");
}

/// Whole frames go to the device straight from the page cache, cut where one registration ends: the same bits as by way of
/// batch slots. The device is a CPU here, the path is a GPU's.
#[test]
fn frames_read_straight_from_the_page_cache_give_the_same_bits() {
    let folder = folder();
    let data = folder.path().join("clips");
    let way = |name: &str, words: &[&str]| {
        let mut all = vec!["--ranks", "2", "--set", "train.max_steps=3", "--set", "data.deblur.crop_size=0"];
        all.extend(["--set", "data.max_train_windows=8", "--set", "log.plots=false", "--set", "log.images=0"]);
        all.extend(words);
        let env = [("HEADROOM_TEST_ON_DEVICE", "1"), ("HEADROOM_TEST_LEND", "50000:20000")];
        let (ended, run) = baseline_in(folder.path(), &data, name, &all, &env);
        assert_eq!(ended.code, Some(0), "{ended}");
        let records = read_lines(&run.join("metrics.jsonl"));
        let sum = |key: &str| records.iter().map(|record| record["input"][key].as_u64().unwrap()).sum::<u64>();
        let losses: Vec<f64> = records.iter().map(|record| record["loss"].as_f64().unwrap()).collect();
        let weights = std::fs::read(run.join("checkpoints/step-3/model.safetensors")).unwrap();
        (losses, weights, sum("bytes"), sum("direct_bytes"))
    };
    let slots = way("slots", &["--set", "train.pin_memory=false"]);
    let direct = way("direct", &["--set", "train.pin_memory=true"]);
    // Frames of 96×128 are 36,864 bytes, blurred and sharp; their spikes 25,344.
    assert_eq!((slots.2, slots.3), (direct.2, 0));
    assert!(2 * direct.3 > direct.2, "{} of {} bytes were read straight", direct.3, direct.2);
    assert!(slots.0 == direct.0 && slots.1 == direct.1, "{:?} {:?}", slots.0, direct.0);
}

/// Turns a byte of the compressed pixels: size, header and end stay as they were, so opening sees nothing.
fn spoil_pixels(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(4).position(|name| name == b"IDAT").unwrap() + 100;
    bytes[at] ^= 0x5A;
    std::fs::write(path, bytes).unwrap();
}

fn cut_short(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
}

fn losses(run: &Path) -> Vec<(u64, f64)> {
    let of = |line: &serde_json::Value| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap());
    read_lines(&run.join("metrics.jsonl")).iter().map(of).collect()
}

fn summary(run: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap()
}

/// Two training sequences of five frames, one each of validation and test.
pub fn small_data(root: &Path) {
    let spec = SampleSpec { sequences: [2, 1, 1], frames: 5, ..SampleSpec::default() };
    write_sample_data(root, &spec).unwrap();
}

/// A frame that only reading finds to be bad stops the run, by file and clip, or is left out: then losses are the same
/// on one rank and three, with any cache, and after a resume.
#[test]
fn bad_frames_stop_the_run_or_change_nothing_but_the_clips_they_are_in() {
    let folder = folder();
    let data = folder.path().join("clips");
    small_data(&data);
    spoil_pixels(&data.join("train/seq000/blur/000001.png"));
    let go = |name: &str, ranks: &str, sets: &[&str]| {
        let mut words = vec!["--gpus", ranks];
        for set in ["data.max_train_windows=0", "data.skip_bad=true"].iter().chain(sets) {
            words.extend(["--set", set]);
        }
        baseline(folder.path(), &data, name, &words)
    };
    let (ended, _) = go("strict", "2", &["data.skip_bad=false"]);
    assert_eq!(ended.code, Some(4), "{ended}");
    for part in ["clip train/seq000 frames 00000", "blur/000001.png: PNG: ", "data.skip_bad: true"] {
        assert!(ended.err.contains(part), "{part} is missing: {ended}");
    }
    // One file that opening sees, two that it does not.
    cut_short(&data.join("train/seq001/spike/000004.dat"));
    spoil_pixels(&data.join("val/seq000/sharp/000000.png"));
    let (ended, one) = go("one", "1", &["train.batch_size=3"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let said: Vec<&str> = ended.out.lines().filter(|line| line.contains("warning: left out: ")).collect();
    assert_eq!(said.len(), 3, "each file once: {ended}");
    for part in
        ["clip train/seq000 frame 000001: ", "clip train/seq001 frame 000004: ", "clip val/seq000 frame 000000: "]
    {
        assert!(said.iter().any(|line| line.contains(part)), "{part} is missing in {said:?}");
    }
    let plain = losses(&one);
    assert_eq!((plain.len(), &summary(&one)["files_skipped"]), (4, &3.into()));
    let last = read_lines(&one.join("metrics.jsonl")).pop().unwrap();
    assert_eq!((&last["val.left_out"], &last["files_skipped"]), (&1.0.into(), &3.into()), "{last}");

    let (ended, three) = go("three", "3", &["train.batch_size=1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.out.matches("warning: left out: ").count(), 3, "each file once over all ranks: {ended}");
    for ((step, loss), (other, expected)) in losses(&three).iter().zip(&plain) {
        assert_eq!(step, other);
        assert!((loss - expected).abs() < 1e-5 * expected, "step {step}: {loss}, {expected}");
    }
    let (spread, alone) = (read_lines(&three.join("metrics.jsonl")).pop().unwrap(), last);
    for name in ["val.left_out", "val.psnr_blur_rgb", "val.psnr_rgb"] {
        let (a, b) = (spread[name].as_f64().unwrap(), alone[name].as_f64().unwrap());
        assert!((a - b).abs() < 1e-4 * b, "{name}: {a} {b}");
    }
    assert_eq!(summary(&three)["files_skipped"], 3);

    let (ended, off) = go("off", "1", &["train.batch_size=3", "data.cache=off"]);
    assert_eq!((ended.code, losses(&off)), (Some(0), plain.clone()), "{ended}");
    let (ended, _) = go("halves", "1", &["train.batch_size=3", "train.max_steps=1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let mut words = vec!["--gpus", "1", "--resume", "auto"];
    for set in ["data.max_train_windows=0", "data.skip_bad=true", "train.batch_size=3"] {
        words.extend(["--set", set]);
    }
    let (ended, halves) = baseline(folder.path(), &data, "halves", &words);
    assert_eq!((ended.code, losses(&halves)), (Some(0), plain), "{ended}");
    assert_eq!(summary(&halves)["files_skipped"], 3);
}

/// Precomputed voxels: a file that is cut short is left out at opening.
#[test]
fn voxel_files_that_are_cut_short_are_left_out() {
    let folder = folder();
    let data = folder.path().join("clips");
    small_data(&data);
    for sequence in ["train/seq000", "train/seq001", "val/seq000", "test/seq000"] {
        let voxels = data.join(sequence).join("spike_vox");
        std::fs::create_dir_all(&voxels).unwrap();
        for frame in 0..5 {
            let values = (0..4 * 96 * 128).flat_map(|n: u32| (n as f32 % 7.0).to_le_bytes());
            let bytes = npy::header(&[4, 96, 128]).into_iter().chain(values).collect::<Vec<u8>>();
            std::fs::write(voxels.join(format!("{frame:06}.npy")), bytes).unwrap();
        }
    }
    cut_short(&data.join("train/seq001/spike_vox/000002.npy"));
    let words = |bad: &'static str| {
        let sets = ["data.deblur.use_precomputed_voxels=true", "train.max_steps=1", "data.max_train_windows=0", bad];
        ["--gpus", "1"].into_iter().chain(sets.into_iter().flat_map(|set| ["--set", set])).collect::<Vec<&str>>()
    };
    let (ended, run) = baseline(folder.path(), &data, "a", &words("data.skip_bad=true"));
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("clip train/seq001 frame 000002: ") && ended.out.contains("000002.npy: "), "{ended}");
    assert_eq!(summary(&run)["files_skipped"], 1);
    let (ended, _) = baseline(folder.path(), &data, "b", &words("data.skip_bad=false"));
    assert_eq!(ended.code, Some(4), "{ended}");
    assert!(ended.err.contains("000002.npy: ") && ended.err.contains("train/seq001"), "{ended}");
}
