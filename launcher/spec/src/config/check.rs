//! Values that are well typed and still make no sense. Every message names the numbers it rests on and the way out.

mod deblur;

use super::*;

/// More layers, stages or blocks than any model of this kind has: a slip of the pen, and minutes of building.
const MOST_LAYERS: usize = 64;

/// Findings of [`check()`].
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
}

impl Verdict {
    fn need(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.errors.push(text());
        }
    }

    fn warn(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.warnings.push(text());
        }
    }

    fn at_least_one(&mut self, keys: &[(&str, u64)]) {
        for (key, value) in keys {
            self.need(*value >= 1, || format!("{key} is {value}; it must be at least 1"));
        }
    }

    fn at_most_layers(&mut self, key: &str, value: usize) {
        self.need(value <= MOST_LAYERS, || format!("{key} is {value}; it must be at most {MOST_LAYERS}"));
    }

    fn above_zero(&mut self, keys: &[(&str, f64)]) {
        for (key, value) in keys {
            self.need(*value > 0.0 && value.is_finite(), || format!("{key} is {value}; it must be above 0"));
        }
    }

    fn not_negative(&mut self, keys: &[(&str, f64)]) {
        for (key, value) in keys {
            self.need(*value >= 0.0 && value.is_finite(), || format!("{key} is {value}; it must be 0 or more"));
        }
    }

    /// At least 0 and below 1.
    fn share(&mut self, keys: &[(&str, f64)]) {
        for (key, value) in keys {
            let text = || format!("{key} is {value}; it must be at least 0 and below 1");
            self.need((0.0..1.0).contains(value), text);
        }
    }
}

pub(super) fn check(config: &Config) -> Verdict {
    let mut verdict = Verdict::default();
    top(config, &mut verdict);
    data(&config.data, &mut verdict);
    model(config, &mut verdict);
    loss(config, &mut verdict);
    deblur::clips(&config.data.deblur, &mut verdict);
    deblur::vrt(&config.model.vrt, &mut verdict);
    train(&config.train, &mut verdict);
    schedule(&config.train, &mut verdict);
    rest(config, &mut verdict);
    verdict
}

fn top(config: &Config, v: &mut Verdict) {
    v.need(TASKS.contains(&config.task.as_str()), || {
        format!("task is {}; the tasks there are: {}", config.task, TASKS.join(", "))
    });
    v.need(is_folder_name(&config.name), || {
        format!(
            "name is {:?}; it names the run folder, so it holds letters, digits, - _ . and starts with none of - .",
            config.name
        )
    });
}

/// Whether `name` can name a run's folder: one path component that no shell or glob takes for something else.
pub fn is_folder_name(name: &str) -> bool {
    let fits = |c: char| c.is_alphanumeric() || "-_.+=@".contains(c);
    !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && name.chars().all(fits)
}

fn data(data: &DataConfig, v: &mut Verdict) {
    v.at_least_one(&[
        ("data.window_size", data.window_size as u64),
        ("data.stride", data.stride as u64),
        ("data.emg_channels", data.emg_channels as u64),
        ("data.joint_angles_channels", data.joint_angles_channels as u64),
        ("data.shuffle_window", data.shuffle_window as u64),
        ("data.max_samples_for_normalize", data.max_samples_for_normalize as u64),
    ]);
    for (key, empty) in [
        ("data.dataset_path", data.dataset_path.as_os_str().is_empty()),
        ("data.hdf5_group", data.hdf5_group.is_empty()),
        ("data.table_name", data.table_name.is_empty()),
    ] {
        v.need(!empty, || format!("{key} is empty; it must name something"));
    }
    let [train, val, test] = data.split_ratio;
    let sum = train + val + test;
    let shares = data.split_ratio.iter().all(|share| (0.0..=1.0).contains(share));
    v.need(shares && (sum - 1.0).abs() < 1e-6, || {
        format!("data.split_ratio is train {train} + val {val} + test {test} = {sum}; three shares of 0 or more must add up to 1")
    });
    v.need(train > 0.0, || format!("data.split_ratio leaves {train} for training; it must be above 0"));
    v.not_negative(&[("data.cache_size_gb", data.cache_size_gb.unwrap_or(0.0))]);
}

fn model(config: &Config, v: &mut Verdict) {
    let model = &config.model;
    v.need(model.input_size == config.data.emg_channels, || {
        format!(
            "model.input_size {} ≠ data.emg_channels {}; they must be equal",
            model.input_size, config.data.emg_channels
        )
    });
    v.need(model.output_size == config.data.joint_angles_channels, || {
        let joints = config.data.joint_angles_channels;
        format!("model.output_size {} ≠ data.joint_angles_channels {joints}; they must be equal", model.output_size)
    });
    v.share(&[("model.dropout", model.dropout)]);
    v.need(!model.tds_stages.is_empty(), || "model.tds_stages is empty; the encoder needs at least one stage".into());
    for (i, stage) in model.tds_stages.iter().enumerate() {
        for (key, value) in [
            ("in_conv_kernel", stage.in_conv_kernel),
            ("in_conv_stride", stage.in_conv_stride),
            ("channels", stage.channels),
            ("feature_width", stage.feature_width),
            ("kernel_width", stage.kernel_width),
        ] {
            v.need(value >= 1, || format!("model.tds_stages[{i}].{key} is {value}; it must be at least 1"));
        }
        v.at_most_layers(&format!("model.tds_stages[{i}].num_blocks"), stage.num_blocks);
    }
    v.at_most_layers("the number of model.tds_stages", model.tds_stages.len());
    v.at_least_one(&[
        ("model.decoder_hidden_size", model.decoder_hidden_size as u64),
        ("model.decoder_num_layers", model.decoder_num_layers as u64),
    ]);
    v.at_most_layers("model.decoder_num_layers", model.decoder_num_layers);
    let hidden = &model.decoder_mlp_hidden;
    v.at_most_layers("the number of model.decoder_mlp_hidden", hidden.len());
    v.need(hidden.iter().all(|size| *size >= 1), || {
        format!("model.decoder_mlp_hidden is {hidden:?}; each must be at least 1")
    });
    v.above_zero(&[
        ("model.rollout_freq", model.rollout_freq),
        ("model.original_sampling_rate", model.original_sampling_rate),
    ]);
    v.need(model.output_scale.is_finite() && model.output_scale != 0.0, || {
        format!("model.output_scale is {}; it must not be 0", model.output_scale)
    });
    let (window, rate, freq) = (config.data.window_size, model.original_sampling_rate, model.rollout_freq);
    v.need(freq <= rate, || {
        format!(
            "model.rollout_freq {freq:e} > model.original_sampling_rate {rate}; the decoder takes at most one step per sample"
        )
    });
    let steps = window as f64 / rate * freq;
    v.need(window == 0 || rate <= 0.0 || steps.round_ties_even() >= 1.0, || {
        format!(
            "data.window_size {window} / model.original_sampling_rate {rate} × model.rollout_freq {freq} = {steps:.2} \
             decoder steps; at least 1 is needed: make the window longer or the rollout denser"
        )
    });
}

/// Losses by task.
fn loss(config: &Config, v: &mut Verdict) {
    let train = &config.train;
    let (known, names): (&[LossType], _) = match config.task.as_str() {
        "deblur" => (&[LossType::Charbonnier, LossType::Mse, LossType::Mae], "charbonnier, mse and mae"),
        _ => (&[LossType::Mse, LossType::Mae, LossType::MseMae], "mse, mae and mse+mae"),
    };
    v.need(known.contains(&train.loss_type), || {
        let found = serde_json::to_string(&train.loss_type).unwrap_or_default();
        format!("train.loss_type is {}; task {} knows {names}", found.trim_matches('"'), config.task)
    });
    v.above_zero(&[("train.charbonnier_delta", train.charbonnier_delta)]);
    v.not_negative(&[("train.perceptual_weight", train.perceptual_weight)]);
    v.warn(train.perceptual_weight == 0.0 || train.perceptual_file.is_some(), || {
        let weight = train.perceptual_weight;
        format!("train.perceptual_weight {weight} has no effect without train.perceptual_file, VGG16's weights")
    });
}

fn train(train: &TrainConfig, v: &mut Verdict) {
    v.at_least_one(&[
        ("train.batch_size", train.batch_size as u64),
        ("train.gradient_accumulation_steps", train.gradient_accumulation_steps as u64),
        ("train.microbatch", train.microbatch.unwrap_or(1) as u64),
        ("train.val_batch_size", train.val_batch_size.unwrap_or(1) as u64),
        ("train.num_epochs", train.num_epochs as u64),
        ("train.max_steps", train.max_steps.unwrap_or(1)),
        ("train.prefetch_factor", train.prefetch_factor as u64),
    ]);
    if let Some(micro) = train.microbatch {
        v.warn(micro <= train.batch_size, || {
            format!("train.microbatch {micro} > train.batch_size {}: the batch is not split", train.batch_size)
        });
    }
    v.above_zero(&[
        ("train.learning_rate", train.learning_rate),
        ("train.eps", train.eps),
        ("train.step_timeout", train.step_timeout),
    ]);
    v.not_negative(&[
        ("train.weight_decay", train.weight_decay),
        ("train.min_learning_rate", train.min_learning_rate),
        ("train.warmup_epochs", train.warmup_epochs),
        ("train.mae_weight", train.mae_weight),
        ("train.gradient_clip_norm", train.gradient_clip_norm),
        ("train.min_delta", train.min_delta),
        ("train.stop_grace", train.stop_grace),
    ]);
    v.share(&[
        ("train.momentum", train.momentum),
        ("train.betas[0]", train.betas[0]),
        ("train.betas[1]", train.betas[1]),
        ("train.ema_decay", train.ema_decay.unwrap_or(0.0)),
    ]);
    let metric = &train.monitor_metric;
    v.need(metric.starts_with("val.") || metric.starts_with("train."), || {
        format!("train.monitor_metric is {metric}; metrics are named val.… or train.…, such as val.loss")
    });
    v.need(train.compute_metrics_online || !metric.starts_with("train."), || {
        format!("train.monitor_metric is {metric}, which train.compute_metrics_online: false leaves out; monitor val.…")
    });
}

fn schedule(train: &TrainConfig, v: &mut Verdict) {
    v.at_least_one(&[("train.step_size", train.step_size as u64)]);
    v.need(train.gamma > 0.0 && train.gamma <= 1.0, || {
        format!("train.gamma is {}; a reduction's factor must be above 0 and at most 1", train.gamma)
    });
    v.need(train.learning_rate <= 0.0 || train.min_learning_rate <= train.learning_rate, || {
        let (min, lr) = (train.min_learning_rate, train.learning_rate);
        format!("train.min_learning_rate {min} > train.learning_rate {lr}; lower it or raise the learning rate")
    });
    let whole_run = train.warmup_steps.is_none() && train.warmup_epochs >= train.num_epochs as f64;
    v.warn(!(whole_run && train.warmup_epochs > 0.0), || {
        let (warm, all) = (train.warmup_epochs, train.num_epochs);
        format!("train.warmup_epochs {warm} ≥ train.num_epochs {all}: the learning rate never reaches its full value")
    });
}

fn watch(watch: &WatchConfig, v: &mut Verdict) {
    for (key, [note, warning, critical]) in
        [("watch.ram_percent", watch.ram_percent), ("watch.gpu_percent", watch.gpu_percent)]
    {
        let rising = 0.0 < note && note <= warning && warning <= critical && critical <= 100.0;
        v.need(rising, || {
            format!("{key} is [{note}, {warning}, {critical}]; three shares above 0 and up to 100 must rise")
        });
        v.need(!rising || critical > 1.0, || {
            format!("{key} is [{note}, {warning}, {critical}]; these are percent: write 70, not 0.7")
        });
    }
    v.need(watch.stop_percent <= 100.0, || {
        format!("watch.stop_percent is {}; it must be at most 100", watch.stop_percent)
    });
    v.need(watch.stop_percent >= watch.ram_percent[2], || {
        let (stop, critical) = (watch.stop_percent, watch.ram_percent[2]);
        format!("watch.stop_percent is {stop}; it must not be below watch.ram_percent's critical {critical}")
    });
    v.need((0.05..=3600.0).contains(&watch.period), || {
        format!("watch.period is {}; it must be 0.05 to 3600 seconds", watch.period)
    });
    v.not_negative(&[("watch.recover", watch.recover)]);
}

fn rest(config: &Config, v: &mut Verdict) {
    watch(&config.watch, v);
    let smart = &config.smart;
    v.at_least_one(&[
        ("smart.leg_epochs", smart.leg_epochs as u64),
        ("smart.increment", smart.increment as u64),
        ("smart.max_total_epochs", smart.max_total_epochs as u64),
    ]);
    v.need(smart.window >= 2, || format!("smart.window is {}; two halves need 2 epochs or more", smart.window));
    v.not_negative(&[("smart.threshold", smart.threshold)]);
    v.above_zero(&[("ddp.bucket_mb", config.ddp.bucket_mb)]);
    v.at_least_one(&[
        ("log.log_every", config.log.log_every),
        ("log.memory_every", config.log.memory_every),
        ("log.keep_last", config.log.keep_last as u64),
    ]);
    v.need(!config.log.runs_dir.as_os_str().is_empty(), || "log.runs_dir is empty; it must name a folder".into());
}
