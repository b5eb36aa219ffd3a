//! Values of keys that a config leaves out: the guides' `default` for the EMG task; [`Config::of_task`] for others.

use super::*;

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "default".into(),
            task: "emg".into(),
            seed: 42,
            data: DataConfig::default(),
            model: ModelConfig::default(),
            train: TrainConfig::default(),
            memory: MemoryConfig::default(),
            watch: WatchConfig::default(),
            smart: SmartConfig::default(),
            ddp: DdpConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Config {
    /// What keys left out mean for `task`.
    pub fn of_task(task: &str) -> Self {
        let mut config = Self { task: task.into(), ..Self::default() };
        if task == "deblur" {
            config.data.dataset_path = "data/gopro_spike".into();
            config.train.batch_size = 1;
            config.train.loss_type = LossType::Charbonnier;
            config.train.monitor_metric = "val.psnr_rgb".into();
            config.train.monitor_mode = MonitorMode::Max;
        }
        config
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            dataset_path: "data/emg".into(),
            sample_if_missing: false,
            hdf5_group: "emg2pose".into(),
            table_name: "timeseries".into(),
            emg_channels: 16,
            joint_angles_channels: 20,
            window_size: 500,
            stride: 1,
            split_ratio: [0.7, 0.15, 0.15],
            normalize: false,
            max_samples_for_normalize: 10_000,
            rectify: false,
            shuffle: true,
            shuffle_mode: ShuffleMode::Global,
            shuffle_window: 64,
            shuffle_emg: false,
            chunk_cache_size: 64 << 20,
            cache_size_gb: None,
            cache: CachePolicy::Auto,
            cache_entries: CacheEntries::Auto,
            skip_bad: true,
            skip_ik_failures: true,
            max_train_windows: 0,
            max_val_windows: 0,
            deblur: DeblurData::default(),
        }
    }
}

impl Default for DeblurData {
    fn default() -> Self {
        Self {
            layout: ClipLayout::Auto,
            train_split: "train".into(),
            val_split: "val".into(),
            test_split: "test".into(),
            image_exts: vec![".png".into()],
            clip_len: 5,
            crop_size: 256,
            val_crop_size: 0,
            spike_dir: "spike".into(),
            spike_h: 360,
            spike_w: 640,
            spike_encoding: SpikeEncoding::Auto,
            voxel_bins: 32,
            log1p: true,
            norm_mean: 0.0,
            norm_std: 1.0,
            use_precomputed_voxels: false,
            voxel_dir: "spike_vox".into(),
        }
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        let stage = |feature_width, kernel_width| TdsStage {
            in_conv_kernel: 5,
            in_conv_stride: 2,
            num_blocks: 2,
            channels: 8,
            feature_width,
            kernel_width,
        };
        Self {
            input_size: 16,
            output_size: 20,
            dropout: 0.1,
            tds_stages: vec![stage(4, 21), stage(8, 11)],
            decoder_type: DecoderType::Lstm,
            decoder_hidden_size: 128,
            decoder_num_layers: 2,
            decoder_mlp_hidden: vec![256, 128],
            decoder_state_condition: true,
            predict_velocity: false,
            output_scale: 1.0,
            rollout_freq: 50.0,
            original_sampling_rate: 2000.0,
            vrt: VrtModel::default(),
        }
    }
}

/// The guide's baseline: 23.7 million parameters.
impl Default for VrtModel {
    fn default() -> Self {
        Self {
            dims: vec![96; 8],
            depths: vec![8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4],
            heads: 6,
            window: vec![5, 8, 8],
            deform_groups: 16,
            independent_groups: vec![11, 12],
            flow: FlowKind::SpyNet,
            deformable: true,
            drop_path: 0.2,
            use_spike: true,
            tsa_heads: 4,
            fuse_heads: 4,
            max_batch_tokens: 49_152,
            chunk_size: 64,
            checkpoint_attn: true,
            checkpoint_ffn: true,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            batch_size: 64,
            gradient_accumulation_steps: 1,
            microbatch: None,
            num_epochs: 100,
            max_steps: None,
            learning_rate: 5e-4,
            weight_decay: 0.01,
            optimizer: OptimizerKind::Adamw,
            momentum: 0.9,
            betas: [0.9, 0.999],
            eps: 1e-8,
            scheduler: SchedulerKind::Cosine,
            step_size: 30,
            gamma: 0.5,
            plateau_patience: 5,
            min_learning_rate: 0.0,
            warmup_epochs: 5.0,
            warmup_steps: None,
            loss_type: LossType::MseMae,
            mae_weight: 0.5,
            charbonnier_delta: 1e-3,
            perceptual_weight: 0.0,
            perceptual_file: None,
            lpips_file: None,
            gradient_clip_norm: 1.0,
            early_stopping: true,
            patience: 20,
            min_delta: 1e-4,
            monitor_metric: "val.loss".into(),
            monitor_mode: MonitorMode::Min,
            restore_best_weights: true,
            ema_decay: None,
            init_from: None,
            num_workers: None,
            prefetch_factor: 2,
            pin_memory: true,
            persistent_workers: true,
            compute_metrics_online: true,
            val_batch_size: None,
            step_timeout: 600.0,
            stop_grace: 25.0,
            amp: Amp::Off,
            cuda_graph: CudaGraph::Auto,
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { budget: Budget::Percent(80.0), cleanup_every: 0 }
    }
}

/// Thresholds are the guides'.
impl Default for WatchConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            response: true,
            ease: true,
            ram_percent: [70.0, 80.0, 90.0],
            gpu_percent: [80.0, 90.0, 95.0],
            stop_percent: 97.0,
            period: 0.5,
            recover: 30.0,
            cgroup: true,
        }
    }
}

impl Default for SmartConfig {
    fn default() -> Self {
        Self { leg_epochs: 100, increment: 50, max_total_epochs: 500, targets: None, window: 20, threshold: 0.001 }
    }
}

impl Default for DdpConfig {
    fn default() -> Self {
        Self { bucket_mb: 25.0, wire: Wire::F32 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            runs_dir: "runs".into(),
            log_every: 10,
            memory_every: 100,
            save_every: 1,
            save_every_steps: 0,
            save_best_only: false,
            keep_last: 3,
            plots: true,
            images: 2,
            language: Language::En,
        }
    }
}
