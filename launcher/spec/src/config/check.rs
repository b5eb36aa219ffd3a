//! Values that are well typed and still make no sense: ranges of single keys, then values together. Every message
//! names the numbers it rests on and the way out.

use super::schema::Schema;
use super::task::TaskSpec;
use super::*;
use serde_json::Value;

/// Checks `config`, whose JSON is `value`.
pub(super) fn check(config: &Config, value: &Value, schema: &Schema, task: Option<&dyn TaskSpec>) -> Verdict {
    let mut verdict = Verdict::default();
    let v = &mut verdict;
    for key in schema.keys() {
        // Sections of other tasks are not there.
        if let Some(value) = value.pointer(&schema::pointer(key.path)) {
            check_key(key.path, key, value, v);
        }
    }
    top(config, schema, task, v);
    data(&config.data, v);
    train(&config.train, v);
    optimizer(&config.train, v);
    v.need(!(config.ddp.shard_optimizer && config.train.optimizer == OptimizerKind::Musgd), || {
        "ddp.shard_optimizer is true and train.optimizer musgd, which needs whole gradients on every rank; set it to false".into()
    });
    watch(&config.watch, v);
    if let Some(task) = task {
        let (found, losses) = (&config.train.loss_type, task.losses());
        v.need(losses.contains(&found.as_str()), || {
            format!("train.loss_type is {found}; task {} knows {}", task.name(), listed(losses))
        });
        task.check(config, v);
    }
    verdict
}

/// Checks a value's range, and those of the sections in it. `path`: with the place in a list.
fn check_key(path: &str, key: &Key, value: &Value, v: &mut Verdict) {
    match (&key.kind, value) {
        (Kind::List(Kind::Record(section)), Value::Array(items)) => {
            for (i, item) in items.iter().enumerate() {
                for inner in section.keys {
                    check_key(&format!("{path}[{i}].{}", inner.path), inner, &item[inner.path], v);
                }
            }
        }
        _ => key.range.check(path, value, v),
    }
}

/// `a, b and c`.
fn listed(words: &[&str]) -> String {
    match words {
        [most @ .., last] if !most.is_empty() => format!("{} and {last}", most.join(", ")),
        _ => words.concat(),
    }
}

fn top(config: &Config, schema: &Schema, task: Option<&dyn TaskSpec>, v: &mut Verdict) {
    v.need(task.is_some(), || {
        let known: Vec<&str> = schema.tasks().iter().map(|task| task.name()).collect();
        format!("task is {}; the tasks there are: {}", config.task, known.join(", "))
    });
    v.need(is_folder_name(&config.name), || {
        format!(
            "name is {:?}; it names the run folder, so it holds letters, digits, - _ . and starts with none of - .",
            config.name
        )
    });
}

/// Checks that `name` can name a run's folder: one path component that no shell or glob takes for something else.
pub fn is_folder_name(name: &str) -> bool {
    let fits = |c: char| c.is_alphanumeric() || "-_.+=@".contains(c);
    !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && name.chars().all(fits)
}

fn data(data: &DataConfig, v: &mut Verdict) {
    let [train, val, test] = data.split_ratio;
    let sum = train + val + test;
    v.need((sum - 1.0).abs() < 1e-6, || {
        format!("data.split_ratio is train {train} + val {val} + test {test} = {sum}; three shares of 0 or more must add up to 1")
    });
    v.need(train > 0.0, || format!("data.split_ratio leaves {train} for training; it must be above 0"));
}

fn train(train: &TrainConfig, v: &mut Verdict) {
    if let Some(micro) = train.microbatch {
        v.warn(micro <= train.batch_size, || {
            format!("train.microbatch {micro} > train.batch_size {}: the batch is not split", train.batch_size)
        });
    }
    let metric = &train.monitor_metric;
    v.need(metric.starts_with("val.") || metric.starts_with("train."), || {
        format!("train.monitor_metric is {metric}; metrics are named val.… or train.…, such as val.loss")
    });
    v.need(train.compute_metrics_online || !metric.starts_with("train."), || {
        format!("train.monitor_metric is {metric}, which train.compute_metrics_online: false leaves out; monitor val.…")
    });
    v.need(train.gamma > 0.0, || "train.gamma is 0; it must be above 0".into());
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

/// Keys that mean something only beside others.
fn optimizer(train: &TrainConfig, v: &mut Verdict) {
    let sgd = train.optimizer.has_momentum();
    v.need(train.optimizer != OptimizerKind::Musgd || train.momentum > 0.0, || {
        "train.optimizer is musgd and train.momentum 0; it needs a momentum above 0".into()
    });
    v.need(!(sgd && train.nesterov) || train.momentum > 0.0, || {
        "train.nesterov is true and train.momentum 0; Nesterov's form needs a momentum above 0".into()
    });
    v.need(!sgd || train.warmup_momentum.is_none() || train.momentum > 0.0, || {
        "train.warmup_momentum is set and train.momentum 0; set train.momentum to where the warm-up ends".into()
    });
    let used = [("train.nesterov", train.nesterov), ("train.warmup_momentum", train.warmup_momentum.is_some())];
    let reads = sgd || train.optimizer == OptimizerKind::Auto;
    for (key, set) in used {
        v.warn(reads || !set, || {
            format!("{key} is set, and train.optimizer is neither sgd nor musgd: it has no effect")
        });
    }
    let within = train.warmup_mode == WarmupMode::Within;
    v.warn(within || train.warmup_rate == 0.0, || {
        let rate = train.warmup_rate;
        format!("train.warmup_rate is {rate}, which only train.warmup_mode: within reads: it has no effect")
    });
    v.warn(!train.warmup_accumulation || train.gradient_accumulation_steps > 1, || {
        "train.warmup_accumulation is true and train.gradient_accumulation_steps 1: it has no effect".into()
    });
    let rates = &train.ema_decay.0;
    for (at, rate) in rates.iter().enumerate() {
        v.need(!rates[..at].contains(rate), || {
            format!("train.ema_decay lists {rate} twice; each average needs a different decay")
        });
    }
    v.warn(!rates.is_empty() || train.ema_ramp == 0.0, || {
        "train.ema_ramp is set and train.ema_decay null: no average is taken".into()
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
}
