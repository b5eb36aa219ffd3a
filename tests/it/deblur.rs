//! The deblurring task from its command line: plan of the guide's data set, a short run of configs/baseline.yaml.

use crate::support::{Ended, folder, launch_program, read_lines, run};
use launcher::cache::PolicyKind;
use launcher::cache::simulate::{Grain, Trace, Walk};
use launcher::config::RawConfig;
use launcher::machine::{DatasetFacts, FrameFacts, Gpu, Machine};
use launcher::plan::{Plan, Request, plan};
use std::path::{Path, PathBuf};
use std::process::Command;

const GIB: u64 = 1 << 30;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The guide's machine and data set: 256 GB, 2,222 frames of 720×1280 with a spike stream each.
fn guide_plan(sets: &[&str]) -> Plan {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let config = RawConfig::find("baseline", root()).unwrap().resolve("cuda", &sets).unwrap();
    let gpu = |index| Gpu { index, name: "card".into(), memory_total_bytes: 48 * GIB, memory_free_bytes: 47 * GIB };
    let machine = Machine {
        cores: 40,
        memory_total_bytes: 256 * GIB,
        memory_available_bytes: 250 * GIB,
        page_bytes: 4096,
        gpus: (0..3).map(gpu).collect(),
        ..Machine::default()
    };
    let frames = FrameFacts {
        images: 2 * 2222,
        height: 720,
        width: 1280,
        spike_files: 2222,
        spike_file_bytes: 66 * 360 * 640 / 8,
        ..FrameFacts::default()
    };
    let facts = DatasetFacts { exists: true, frames, ..DatasetFacts::default() };
    let request = Request { gpus: Some(3), ..Request::default() };
    plan(&config, &machine, &facts, &request).unwrap()
}

#[test]
fn the_guides_data_set_fits_its_50_gb_whole_and_every_steady_lookup_hits() {
    let guide = guide_plan(&[]);
    let entry = 2 * 720 * 1280 * 3 + 66 * 360 * 80;
    let useful = 2222u64 * entry;
    assert!(guide.budget.page_cache_bytes >= useful && guide.budget.page_cache_bytes <= 50 * GIB);
    assert_eq!(guide.budget.cache_policy, "pin");
    assert!(140_083_200 >= 15 * entry, "at most 1/15 of the tensors' bytes: {entry}");
    let table = guide.table_at(200);
    for part in [
        "2,222 frames of 720×1280, 66 spike planes of 360×640",
        "as f32 tensors 133.6 MiB per frame, 289.89 GiB in all",
        "as cached 7.1 MiB per frame (1/18.9), 15.38 GiB in all",
        "108 worker processes that keep all tensors would hold 30.57 TiB, with 50 GiB each 5.27 TiB",
        "policy pin, steady hit rate 100.0 %",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    // Entries through the real directory: as many of equal size as the plan has room for.
    let room = (guide.budget.page_cache_bytes / entry) as usize;
    let walk = Walk { world_size: 3, batch: 1, ahead: 8 };
    let trace = Trace::shuffled(2222, 1, 3, 7);
    let rate = trace.walk(PolicyKind::Pin, room, Grain::Chunk, walk).hit_rate;
    let even = Walk { world_size: 2, ..walk };
    assert_eq!(trace.walk(PolicyKind::Pin, room, Grain::Chunk, even).hit_rate, 1.0, "{rate}");
    // 2,222 is no multiple of three: the steps that straddle the first epoch's end still fill what it left.
    assert!((1.0 - rate) * 2.0 * 2222.0 < 3.0, "{rate}");
    // A cache of 17 % of it holds its share and no more: `pin` hits that often.
    let part = guide_plan(&["data.cache_size_gb=2.614"]);
    let share = part.budget.page_cache_bytes as f64 / useful as f64;
    let rate = trace.walk(PolicyKind::Pin, (share * 2222.0) as usize, Grain::Chunk, walk).hit_rate;
    assert!((rate - share).abs() < 0.002 && (share - 0.17).abs() < 0.001, "{rate} {share}");
    assert!(part.table_at(200).contains("steady hit rate 17.0 %"));
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

fn baseline(folder: &Path, data: &Path, name: &str, words: &[&str]) -> (Ended, PathBuf) {
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

/// The command of the README with everything small: sample data are made, all is there that a person looks at, and the
/// run goes on from its checkpoint with other tiles.
#[test]
fn the_baseline_runs_from_nothing_to_pictures_and_resumes() {
    let folder = folder();
    let data = folder.path().join("clips");
    let (ended, run) = baseline(folder.path(), &data, "a", &["--gpus", "2", "--set", "train.max_steps=3"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("making sample data"), "{ended}");
    for part in ["as cached", "[GoProSpike] Cache Stats:", "psnr_gain_db", "policy pin"] {
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
