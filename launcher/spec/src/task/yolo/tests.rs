use super::*;
use crate::config::{Amp, DeviceChoice, OptimizerKind};
use crate::task::parse_config;
use std::path::Path;

fn resolved(text: &str) -> (Config, Vec<String>) {
    parse_config(text, "my.yaml").unwrap().resolve_with_notes("cpu", &[]).unwrap()
}

fn error(text: &str) -> String {
    parse_config(text, "my.yaml").and_then(|raw| raw.resolve("cpu", &[])).unwrap_err().to_string()
}

/// Arguments as the package's `train` takes them.
#[test]
fn arguments_of_the_package_are_keys_here() {
    let text = "model: yolov8s.yaml\ndata: coco8.yaml\nepochs: 7\nbatch: 4\nimgsz: 320\nlr0: 0.02\nlrf: 0.1\nmomentum: 0.9\n\
                weight_decay: 0.0001\nwarmup_epochs: 1.5\nwarmup_momentum: 0.7\nwarmup_bias_lr: 0.05\nbox: 7\ncls: 0.4\n\
                dfl: 1.4\nnbs: 32\nclose_mosaic: 3\nmosaic: 0.5\nmixup: 0.1\nhsv_h: 0.01\nhsv_s: 0.6\nhsv_v: 0.3\n\
                degrees: 5\ntranslate: 0.2\nscale: 0.4\nshear: 2\nperspective: 0.0001\nflipud: 0.1\nfliplr: 0.4\nbgr: 0.2\n\
                workers: 3\ncache: ram\npatience: 9\nsave_period: -1\ndevice: cpu\noptimizer: SGD\namp: true\nplots: false\n\
                project: out\nseed: 5\nsingle_cls: true\nfraction: 0.5\nconf: 0.3\niou: 0.6\nmax_det: 100\n";
    let (config, notes) = resolved(text);
    assert_eq!((config.task.as_str(), notes.len()), ("yolo", 0), "{notes:?}");
    let yolo: YoloConfig = config.section();
    let train = &config.train;
    assert_eq!(config.data.dataset_path, Path::new("coco8.yaml"));
    assert_eq!((yolo.model.as_str(), yolo.imgsz, yolo.nbs, yolo.close_mosaic), ("yolov8s.yaml", 320, 32, 3));
    assert_eq!((train.num_epochs, train.batch_size, train.num_workers, train.patience), (7, 4, Some(3), 9));
    assert_eq!((train.learning_rate, train.lrf, train.momentum, train.weight_decay), (0.02, 0.1, 0.9, 1e-4));
    assert_eq!((train.warmup_epochs, train.warmup_momentum, yolo.warmup_bias_lr), (1.5, Some(0.7), 0.05));
    assert_eq!((train.device, train.optimizer, train.amp), (DeviceChoice::Cpu, OptimizerKind::Sgd, Amp::Auto));
    assert_eq!(yolo.loss, YoloLoss { boxes: 7.0, cls: 0.4, dfl: 1.4, topk: 10 });
    let augment = YoloAugment {
        mosaic: 0.5,
        mixup: 0.1,
        hsv_h: 0.01,
        hsv_s: 0.6,
        hsv_v: 0.3,
        degrees: 5.0,
        translate: 0.2,
        scale: 0.4,
        shear: 2.0,
        perspective: 1e-4,
        flipud: 0.1,
        fliplr: 0.4,
        bgr: 0.2,
    };
    assert_eq!((yolo.augment, yolo.cache, yolo.save_period), (augment, ImageCache::Ram, -1.0));
    assert_eq!((yolo.nms.predict_conf, yolo.nms.iou, yolo.nms.max_det, yolo.nms.conf), (0.3, 0.6, 100, 0.001));
    assert!(yolo.single_cls && yolo.fraction == 0.5 && !config.log.plots);
    assert_eq!(config.log.runs_dir, Path::new("out"));
}

#[test]
fn caches_of_the_package_are_understood() {
    for (word, cache) in [
        ("true", ImageCache::Auto),
        ("false", ImageCache::Off),
        ("ram", ImageCache::Ram),
        ("disk", ImageCache::Disk),
        ("encoded", ImageCache::Encoded),
    ] {
        assert_eq!(resolved(&format!("cache: {word}\nimgsz: 64\n")).0.section::<YoloConfig>().cache, cache);
    }
}

#[test]
fn arguments_without_effect_say_why() {
    let (_, notes) = resolved("imgsz: 64\ncos_lr: true\nexist_ok: true\ncopy_paste: 0.1\n");
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert_eq!(notes[0], "my.yaml:2:1: cos_lr has no effect: train.scheduler: cosine does this");
}

/// The guide's profiles: batch size, workers, cache, mixed precision, pinning.
#[test]
fn the_guides_training_config_is_read() {
    let text = "task: yolo\nTRAINING_CONFIG:\n  batch_size: 4\n  workers: 2\n  cache: False\n  amp: False\n  pin_memory: False\n";
    let (config, _) = resolved(text);
    let cache = config.section::<YoloConfig>().cache;
    let train = &config.train;
    assert_eq!((train.batch_size, train.num_workers, cache), (4, Some(2), ImageCache::Off));
    assert_eq!((train.amp, train.pin_memory), (Amp::Off, false));
}

#[test]
fn values_without_sense_are_refused() {
    for (text, says) in [
        ("model: yolov5n\n", "yolo.model is \"yolov5n\"; the models there are: yolov8n"),
        ("imgsz: 100\n", "yolo.imgsz is 100; it must be a multiple of 32, such as 96"),
        ("imgsz: 16\n", "yolo.imgsz is 16; it must be 32 to 8192"),
        ("mosaic: 1.5\n", "yolo.augment.mosaic is 1.5; it must be 0 to 1"),
        ("imgsz: 64\nfraction: 0\n", "yolo.fraction is 0"),
        ("imgsz: 64\nscale: 1\n", "yolo.augment.scale is 1; it must be at least 0 and below 1"),
        ("imgsz: 64\ncache: maybe\n", "expected one of auto, encoded, resized, ram, disk, off"),
    ] {
        let found = error(text);
        assert!(found.contains(says), "{text}: {found}");
    }
    let (_, notes) = resolved("model: yolov8n.pt\nepochs: 5\n");
    assert!(notes.iter().any(|note| note.contains("its size is taken, not its weights")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("yolo.close_mosaic 10 ≥ train.num_epochs 5")), "{notes:?}");
    assert!(resolved("data: {dataset_path: a.yaml}\nmodel: yolov8n\n").0.section::<YoloConfig>().model == "yolov8n");
}

/// Batches of the package are those of all ranks.
#[test]
fn batches_are_accumulated_up_to_the_nominal_size() {
    for (batch, ranks, nbs, batches) in [(16, 1, 64, 4), (16, 3, 64, 1), (8, 3, 64, 3), (8, 1, 0, 1), (128, 1, 64, 1)] {
        let (mut config, _) = resolved(&format!("imgsz: 64\nbatch: {batch}\nnbs: {nbs}\n"));
        Yolo.for_ranks(&mut config, ranks);
        let train = &config.train;
        assert_eq!((train.gradient_accumulation_steps, train.warmup_accumulation), (batches, batches > 1));
    }
    let (mut config, _) = resolved("imgsz: 64\nbatch: 8\nsave_period: 5\ntrain: {gradient_accumulation_steps: 2}\n");
    Yolo.for_ranks(&mut config, 1);
    assert_eq!((config.train.gradient_accumulation_steps, config.log.keep_every), (2, 5));
}

/// The shipped config: the guide's five settings on a GPU, sample shapes without one.
#[test]
fn the_shipped_config_has_the_guides_profiles() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/yolov8n.yaml");
    let raw = parse_config(&std::fs::read_to_string(file).unwrap(), "yolov8n.yaml").unwrap();
    let of = |profile: &str| raw.resolve_with_notes(profile, &[]).unwrap();
    let (cuda, notes) = of("cuda");
    assert!(notes.is_empty(), "{notes:?}");
    let train = &cuda.train;
    assert_eq!((train.batch_size, train.num_workers, train.amp, train.pin_memory), (16, Some(8), Amp::Auto, true));
    let yolo: YoloConfig = cuda.section();
    assert_eq!((yolo.cache, yolo.imgsz, cuda.task.as_str()), (ImageCache::Auto, 640, "yolo"));
    assert_eq!(train.gradient_accumulation_steps * train.batch_size, yolo.nbs);
    let (cpu, notes) = of("cpu");
    assert!(notes.is_empty(), "{notes:?}");
    let yolo: YoloConfig = cpu.section();
    assert_eq!((yolo.imgsz, yolo.nbs, yolo.width, cpu.train.batch_size), (160, 8, Some(0.125), 8));
    assert!(cpu.data.sample_if_missing && !cpu.train.pin_memory);
}
