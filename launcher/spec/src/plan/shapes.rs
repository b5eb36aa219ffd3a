//! Which keys of a config shape what `rank describe` measures: a kept measurement serves every config that has these alike.
//!
//! Keys are listed that do *not* matter, so that a new key voids kept measurements until somebody lists it here.

use crate::config::Config;
use serde_json::Value;

/// Keys, or beginnings of keys, that change neither the model, nor its passes, nor the data set.
const FREE: &[&str] = &[
    "name",
    "seed",
    "data.sample_if_missing",
    "data.split_ratio",
    "data.shuffle",
    "data.chunk_cache_size",
    "data.cache",
    "train.device",
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.microbatch",
    "train.num_epochs",
    "train.max_steps",
    "train.learning_rate",
    "train.weight_decay",
    "train.optimizer",
    "train.momentum",
    "train.nesterov",
    "train.betas",
    "train.eps",
    "train.scheduler",
    "train.step_size",
    "train.gamma",
    "train.plateau_patience",
    "train.min_learning_rate",
    "train.lrf",
    "train.schedule_by",
    "train.warmup_",
    "train.gradient_clip_norm",
    "train.early_stopping",
    "train.patience",
    "train.min_delta",
    "train.monitor_",
    "train.restore_best_weights",
    "train.ema_",
    "train.sync_batchnorm",
    "train.init_from",
    "train.num_workers",
    "train.prefetch_factor",
    "train.pin_memory",
    "train.persistent_workers",
    "train.val_batch_size",
    "train.step_timeout",
    "train.stop_grace",
    "ddp.buffers",
    "memory.",
    "watch.",
    "smart.",
    "log.",
];

/// Keys that change what is known of the data set, and the passes only where they change the shape of a sample.
const OF_DATA: &[&str] =
    &["data.dataset_path", "data.stride", "data.skip_bad", "data.max_train_windows", "data.max_val_windows"];

/// Keys with which kept measurements differ, as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Keys that shape the model and its passes.
    pub model: String,
    /// Further keys that shape what is known of the data set.
    pub data: String,
}

impl Shape {
    pub fn of(config: &Config) -> Self {
        let mut model = serde_json::to_value(config).unwrap_or_default();
        let mut data = model.clone();
        let listed = |keys: &[&str], name: &str| keys.iter().any(|key| name.starts_with(key));
        keep("", &mut model, &|name| !listed(FREE, name) && !listed(OF_DATA, name));
        keep("", &mut data, &|name| listed(OF_DATA, name));
        Self { model: model.to_string(), data: data.to_string() }
    }
}

/// Takes out every value whose dotted name is not `wanted`.
fn keep(prefix: &str, value: &mut Value, wanted: &dyn Fn(&str) -> bool) {
    let Value::Object(map) = value else { return };
    map.retain(|key, inner| {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if inner.is_object() {
            keep(&name, inner, wanted);
            return inner.as_object().is_some_and(|map| !map.is_empty());
        }
        wanted(&name)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::emg::EmgConfig;

    #[test]
    fn batch_and_schedule_are_free_and_the_model_is_not() {
        let base = crate::task::config("emg");
        let changed = |change: fn(&mut Config)| {
            let mut config = base.clone();
            change(&mut config);
            let (before, after) = (Shape::of(&base), Shape::of(&config));
            (before.model != after.model, before.data != after.data)
        };
        assert_eq!(changed(|config| config.train.batch_size += 1), (false, false));
        assert_eq!(changed(|config| config.train.learning_rate *= 2.0), (false, false));
        assert_eq!(changed(|config| config.log.plots = !config.log.plots), (false, false));
        assert_eq!(changed(|config| config.data.dataset_path = "elsewhere".into()), (false, true));
        assert_eq!(changed(|config| config.with_section(|emg: &mut EmgConfig| emg.window_size += 1)), (true, false));
        assert_eq!(changed(|config| config.task = "deblur".into()), (true, false));
        assert_eq!(changed(|config| config.train.compute_metrics_online ^= true), (true, false));
        assert_eq!(changed(|config| config.train.amp = crate::config::Amp::Bf16), (true, false));
    }

    /// A key that was renamed would silently shape measurements again.
    #[test]
    fn every_listed_key_is_one_of_a_config() {
        let whole = serde_json::to_value(crate::task::config("emg")).unwrap();
        for key in FREE.iter().chain(OF_DATA) {
            let mut value = whole.clone();
            keep("", &mut value, &|name| name.starts_with(key));
            assert!(value.as_object().is_some_and(|map| !map.is_empty()), "{key}");
        }
    }
}
