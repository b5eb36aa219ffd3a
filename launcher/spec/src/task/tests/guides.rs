//! The guides' configs load as they stand.

use super::*;

/// The seed's YAML, with every key that its repository shows.
#[test]
fn guide_config_loads_as_it_stands() {
    let text = r#"
data:
  dataset_path: "/data/emg"
  hdf5_group: emg2pose
  table_name: timeseries
  emg_channels: 16
  joint_angles_channels: 20
  window_size: 500
  stride: 2
  split_ratio: [0.7, 0.15, 0.15]
  normalize: true
  shuffle: true
  max_samples_for_normalize: 5000
  chunk_cache_size: 33554432  # 32MB
model:
  input_size: 16
  output_size: 20
  dropout: 0.1
  tds_stages:
    - in_conv_kernel: 5
      in_conv_stride: 2
      num_blocks: 2
      channels: 8
      feature_width: 4
      kernel_width: 21
  decoder_type: lstm
  decoder_hidden_size: 128
  decoder_num_layers: 2
  decoder_state_condition: true
  predict_velocity: false
  rollout_freq: 50
  original_sampling_rate: 2000
training:
  batch_size: 16
  gradient_accumulation_steps: 4
  num_epochs: 100
  learning_rate: 5e-4
  weight_decay: 0.01
  optimizer: AdamW
  scheduler: null
  step_size: 30
  gamma: 0.5
  loss_type: mse+mae
  mae_weight: 0.5
  warmup_epochs: 5
  gradient_clip_norm: 1.0
  early_stopping: true
  patience: 20
  min_delta: 0.0001
  monitor_metric: val_loss
  restore_best_weights: true
  device: "cpu"
  num_workers: 2
  pin_memory: false
  persistent_workers: true
  prefetch_factor: 1
  compute_metrics_online: true
logging:
  checkpoint_dir: checkpoints
  log_dir: logs
  save_every: 10
  log_every: 50
  save_best_only: true
  monitor: val_loss
  mode: min
"#;
    let raw = parse_config(text, "configs/seed.yaml").unwrap();
    let (config, notes) = raw.resolve_with_notes("cpu", &[]).unwrap();
    assert_eq!(config.name, "seed");
    assert_eq!((config.train.batch_size, config.train.gradient_accumulation_steps), (16, 4));
    assert_eq!((config.train.learning_rate, config.train.optimizer), (5e-4, OptimizerKind::Adamw));
    assert_eq!(
        (config.train.scheduler, config.train.loss_type.as_str()),
        (SchedulerKind::None, EmgLoss::MseMae.word())
    );
    assert_eq!(config.train.monitor_metric, "val.loss");
    assert_eq!((config.log.save_every, config.log.log_every, config.log.save_best_only), (10, 50, true));
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].starts_with("configs/seed.yaml:59:3: logging.checkpoint_dir has no effect"), "{notes:?}");
}

#[test]
fn guide_keys_in_capitals_load() {
    let config = load(
        "SEED: 123\nDATA:\n  USE_RAM_CACHE: true\n  CACHE_SIZE_GB: 50.0\n  ROOT: /d\nTRAIN:\n  NUM_WORKERS: 12\n  \
         PREFETCH_FACTOR: 4\n  BATCH_SIZE: 1\n  EPOCHS: 20\n  MAX_GRAD_NORM: 1.0\n  RESUME_FROM_CHECKPOINT: null\n",
    );
    assert_eq!((config.seed, config.data.cache, config.data.cache_size_gb), (123, CachePolicy::Auto, Some(50.0)));
    assert_eq!((config.train.num_workers, config.train.num_epochs), (Some(12), 20));
    assert_eq!(config.data.dataset_path, Path::new("/d"));
    assert_eq!(load("DATA.USE_RAM_CACHE: false\nDATA.CACHE_SIZE_GB: 30\n").data.cache, CachePolicy::Off);
}

/// A file as the deblurring guide's repository has it: upper-case sections, no `task`.
#[test]
fn guide_config_of_clips_loads_as_it_stands() {
    let text = r#"
SEED: 123
DATA:
  ROOT: data/processed/gopro_spike_unified
  TRAIN_SPLIT: train
  VAL_SPLIT: val
  CROP_SIZE: 256
  CLIP_LEN: 5
  K: 32
  NUM_VOXEL_BINS: 32
  VOXEL_CACHE_DIRNAME: spike_vox
  SPIKE_DIR: spike
  USE_PRECOMPUTED_VOXELS: true
  USE_RAM_CACHE: true
  CACHE_SIZE_GB: 50.0
  IMAGE_EXTS: [".png", ".jpg"]
  ALIGN_LOG_PATHS: ["outputs/logs/align.txt"]
  NORM: {MEAN: 0.0, STD: 1.0}
MODEL:
  USE_SPIKE: true
  VRT_CFG: options/vrt.yaml
  CHANNELS_PER_SCALE: [96, 96, 96, 96]
  LAYERS: 4
  VRT: {USE_CHECKPOINT_ATTN: true, USE_CHECKPOINT_FFN: false}
  SPIKE_TSA: {HEADS: 4, ADAPTIVE_CHUNK: true, MAX_BATCH_TOKENS: 49152, CHUNK_SIZE: 64, CHUNK_SHAPE: square}
  FUSE: {TYPE: TemporalCrossAttn, HEADS: 4, ADAPTIVE_CHUNK: true, MAX_BATCH_TOKENS: 49152, CHUNK_SIZE: 64}
DATALOADER:
  TOTAL_WORKERS: "cpu*0.9"
  TRAIN_WORKERS: auto
  TRAIN_PREFETCH_FACTOR: 2
  VAL_PREFETCH_FACTOR: 2
  PIN_MEMORY: false
  PERSISTENT_WORKERS: false
TRAIN:
  RESUME_FROM_CHECKPOINT: false
  CHECKPOINT_PATH: null
  EPOCHS: 20
  BATCH_SIZE: 1
  VAL_BATCH_SIZE: 1
  COMPILE_MODEL: false
  GRADIENT_ACCUMULATION_STEPS: 6
  MAX_GRAD_NORM: 1.0
  OPTIM: {TYPE: adamw, LR: 1e-4, BETAS: [0.9, 0.99], WEIGHT_DECAY: 1e-4}
  SCHED: {TYPE: cosine, WARMUP_STEPS: 256}
LOSS:
  CHARBONNIER: {DELTA: 1e-3, WEIGHT: 1.0}
  VGG_PERCEPTUAL: {LAYERS: [relu3_3], WEIGHT: 0.1}
LOG: {TENSORBOARD: true, SAVE_DIR: outputs, VAL_EVERY_STEPS: 1000, ENABLE_TIMING_LOG: true}
TEST: {BATCH_SIZE: 1, NUM_WORKERS: 2}
"#;
    let raw = parse_config(text, "vrt.yaml").unwrap();
    let (config, notes) = raw.resolve_with_notes("cuda", &[]).unwrap();
    assert_eq!((config.task.as_str(), config.seed, config.data.cache_size_gb), ("deblur", 123, Some(50.0)));
    let clips: DeblurConfig = config.section();
    assert_eq!((clips.crop_size, clips.clip_len, clips.voxel_bins, clips.use_precomputed_voxels), (256, 5, 32, true));
    assert_eq!(clips.image_exts, [".png", ".jpg"]);
    let vrt = &clips.vrt;
    assert_eq!((vrt.checkpoint_attn, vrt.checkpoint_ffn, vrt.max_batch_tokens), (true, false, 49_152));
    let train = &config.train;
    assert_eq!((train.learning_rate, train.betas, train.weight_decay), (1e-4, [0.9, 0.99], 1e-4));
    assert_eq!((train.warmup_steps, train.gradient_accumulation_steps, train.num_epochs), (Some(256), 6, 20));
    assert_eq!((train.loss_type.as_str(), clips.loss.perceptual_weight), (DeblurLoss::Charbonnier.word(), 0.1));
    assert_eq!(train.num_workers, None);
    let about = |key: &str| notes.iter().any(|note| note.contains(key) && note.contains("has no effect"));
    for key in [
        "ALIGN_LOG_PATHS",
        "TOTAL_WORKERS",
        "FUSE.TYPE",
        "VAL_EVERY_STEPS",
        "TEST.NUM_WORKERS",
        "perceptual_weight 0.1",
    ] {
        assert!(about(key), "{key}: {notes:?}");
    }
    // A task that is written wins over what the keys tell.
    assert!(
        error("task: emg\nLOSS.CHARBONNIER.DELTA: 1e-3\ndata.clip_len: 3\ntrain.loss_type: charbonnier\n", &[])
            .contains("train.loss_type is charbonnier; task emg knows mse, mae and mse+mae")
    );
}

#[test]
fn clips_and_models_without_sense_are_refused() {
    for (set, says) in [
        ("deblur.clip_len=0", "deblur.clip_len is 0"),
        ("deblur.crop_size=5", "it must be 0, for whole frames, or at least 8"),
        ("deblur.image_exts=[png]", "endings with their dot"),
        ("deblur.spike_dir=a/b", "it must name a folder"),
        ("deblur.norm_std=0", "deblur.norm_std is 0"),
        ("deblur.vrt.dims=[96]", "deblur.vrt.dims has 1 numbers; it needs 8"),
        ("deblur.vrt.depths=[]", "deblur.vrt.depths has 0 numbers"),
        ("deblur.vrt.heads=7", "deblur.vrt.dims[0] is 96; it must be a multiple of deblur.vrt.heads 7"),
        ("deblur.vrt.window=[5,8]", "deblur.vrt.window is [5, 8]"),
        ("deblur.vrt.independent_groups=[13]", "names 13; stage 8's groups in deblur.vrt.depths are 7 to 12"),
        ("deblur.clip_len=1025", "deblur.clip_len is 1025; it must be 1 to 1024"),
        ("deblur.vrt.depths=[1,1,1,1,1,1,1,0]", "deblur.vrt.depths[7] is 0"),
        ("train.loss_type=mse+mae", "task deblur knows charbonnier, mse and mae"),
    ] {
        let found = error("task: deblur\n", &[set]);
        assert!(found.contains(&format!("--set {set}: ")) && found.contains(says), "{set}: {found}");
    }
}
