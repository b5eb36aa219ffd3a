//! Every key there is, with its type, and every other name that it answers to.

use super::kind::Kind::{self, *};

/// Tasks that Headroom can train.
pub const TASKS: &[&str] = &["emg"];
/// Device profiles that a config may hold.
pub const PROFILES: &[&str] = &["cpu", "cuda"];

pub(super) const SECTIONS: &[&str] = &["data", "model", "train", "memory", "watch", "smart", "ddp", "log"];

/// Sections under the names that other trainers give them.
pub(super) const SECTION_ALIASES: &[(&str, &str)] = &[("training", "train"), ("logging", "log")];

/// Canonical key and type. A test compares this table with the fields of `Config`.
pub(super) const KEYS: &[(&str, Kind)] = &[
    ("name", Text),
    ("task", Text),
    ("seed", Whole),
    ("data.dataset_path", Text),
    ("data.sample_if_missing", Flag),
    ("data.hdf5_group", Text),
    ("data.table_name", Text),
    ("data.emg_channels", Whole),
    ("data.joint_angles_channels", Whole),
    ("data.window_size", Whole),
    ("data.stride", Whole),
    ("data.split_ratio", Numbers(3)),
    ("data.normalize", Flag),
    ("data.max_samples_for_normalize", Whole),
    ("data.rectify", Flag),
    ("data.shuffle", Flag),
    ("data.shuffle_mode", Choice(&["global", "block", "grouped", "grouped_shuffled"])),
    ("data.shuffle_window", Whole),
    ("data.shuffle_emg", Flag),
    ("data.chunk_cache_size", Whole),
    ("data.cache_size_gb", OptionalNumber),
    ("data.cache", Choice(&["auto", "pin", "lru", "next_use", "off"])),
    ("data.skip_bad", Flag),
    ("data.skip_ik_failures", Flag),
    ("data.max_train_windows", Whole),
    ("data.max_val_windows", Whole),
    ("model.input_size", Whole),
    ("model.output_size", Whole),
    ("model.dropout", Number),
    ("model.tds_stages", Stages),
    ("model.decoder_type", Choice(&["lstm", "mlp"])),
    ("model.decoder_hidden_size", Whole),
    ("model.decoder_num_layers", Whole),
    ("model.decoder_mlp_hidden", Wholes),
    ("model.decoder_state_condition", Flag),
    ("model.predict_velocity", Flag),
    ("model.output_scale", Number),
    ("model.rollout_freq", Number),
    ("model.original_sampling_rate", Number),
    ("train.device", Choice(&["auto", "cpu", "cuda"])),
    ("train.batch_size", Whole),
    ("train.gradient_accumulation_steps", Whole),
    ("train.microbatch", OptionalWhole),
    ("train.num_epochs", Whole),
    ("train.max_steps", OptionalWhole),
    ("train.learning_rate", Number),
    ("train.weight_decay", Number),
    ("train.optimizer", Choice(&["adam", "adamw", "sgd"])),
    ("train.momentum", Number),
    ("train.betas", Numbers(2)),
    ("train.eps", Number),
    ("train.scheduler", Choice(&["none", "step", "cosine", "plateau"])),
    ("train.step_size", Whole),
    ("train.gamma", Number),
    ("train.plateau_patience", Whole),
    ("train.min_learning_rate", Number),
    ("train.warmup_epochs", Number),
    ("train.warmup_steps", OptionalWhole),
    ("train.loss_type", Choice(&["mse", "mae", "mse+mae"])),
    ("train.mae_weight", Number),
    ("train.gradient_clip_norm", Number),
    ("train.early_stopping", Flag),
    ("train.patience", Whole),
    ("train.min_delta", Number),
    ("train.monitor_metric", Metric),
    ("train.monitor_mode", Choice(&["min", "max"])),
    ("train.restore_best_weights", Flag),
    ("train.ema_decay", OptionalNumber),
    ("train.init_from", OptionalText),
    ("train.num_workers", OptionalWhole),
    ("train.prefetch_factor", Whole),
    ("train.pin_memory", Flag),
    ("train.persistent_workers", Flag),
    ("train.compute_metrics_online", Flag),
    ("train.val_batch_size", OptionalWhole),
    ("train.step_timeout", Number),
    ("train.stop_grace", Number),
    ("train.amp", Choice(&["off", "bf16", "fp16"])),
    ("memory.budget", Size),
    ("watch.enabled", Flag),
    ("watch.response", Flag),
    ("watch.ram_percent", Numbers(3)),
    ("watch.gpu_percent", Numbers(3)),
    ("watch.stop_percent", Number),
    ("watch.period", Number),
    ("watch.recover", Number),
    ("watch.cgroup", Flag),
    ("memory.cleanup_every", Whole),
    ("smart.leg_epochs", Whole),
    ("smart.increment", Whole),
    ("smart.max_total_epochs", Whole),
    ("smart.targets", OptionalText),
    ("smart.window", Whole),
    ("smart.threshold", Number),
    ("ddp.bucket_mb", Number),
    ("log.runs_dir", Text),
    ("log.log_every", Whole),
    ("log.memory_every", Whole),
    ("log.save_every", Whole),
    ("log.save_every_steps", Whole),
    ("log.save_best_only", Flag),
    ("log.keep_last", Whole),
    ("log.plots", Flag),
    ("log.language", Choice(&["en", "zh"])),
];

/// What becomes of a key that is not canonical.
#[derive(Clone, Copy, Debug)]
pub(super) enum Alias {
    /// Stands for this canonical key.
    To(&'static str),
    /// Accepted, has no effect; the text says why.
    Inert(&'static str),
}

const ONE_RUN_FOLDER: &str =
    "has no effect: a run keeps everything in <log.runs_dir>/<run>; set log.runs_dir to move it";
const RESUME: &str = "has no effect: resuming is asked for on the command line, --resume auto|PATH";

/// Names used by the guides and by habit. The left side is lower-case, with canonical section names.
pub(super) const ALIASES: &[(&str, Alias)] = &[
    ("data.use_ram_cache", Alias::To("data.cache")),
    ("data.root", Alias::To("data.dataset_path")),
    ("train.epochs", Alias::To("train.num_epochs")),
    ("train.lr", Alias::To("train.learning_rate")),
    ("train.workers", Alias::To("train.num_workers")),
    ("train.max_grad_norm", Alias::To("train.gradient_clip_norm")),
    ("train.cleanup_every", Alias::To("memory.cleanup_every")),
    ("train.empty_cache_every", Alias::To("memory.cleanup_every")),
    ("train.seed", Alias::To("seed")),
    ("train.log_every", Alias::To("log.log_every")),
    ("train.resume_from_checkpoint", Alias::Inert(RESUME)),
    ("train.checkpoint_path", Alias::Inert(RESUME)),
    ("train.compile_model", Alias::Inert("has no effect: there is no graph compiler to switch on")),
    ("log.monitor", Alias::To("train.monitor_metric")),
    ("log.mode", Alias::To("train.monitor_mode")),
    ("log.checkpoint_dir", Alias::Inert(ONE_RUN_FOLDER)),
    ("log.log_dir", Alias::Inert(ONE_RUN_FOLDER)),
];

/// The type of a canonical key.
pub(super) fn kind(key: &str) -> Option<(&'static str, Kind)> {
    KEYS.iter().find(|(name, _)| *name == key).copied()
}

pub(super) fn alias(key: &str) -> Option<Alias> {
    ALIASES.iter().find(|(name, _)| *name == key).map(|(_, alias)| *alias)
}

/// A key as written, in canonical case and section: `TRAINING.BATCH_SIZE` becomes `train.batch_size`. A word counts as
/// upper-case as a whole or not at all.
pub(super) fn canonical(written: &str) -> String {
    let mut words: Vec<String> = written.split('.').map(lower).collect();
    if let Some((_, section)) = SECTION_ALIASES.iter().find(|(alias, _)| words[0] == *alias) {
        words[0] = section.to_string();
    }
    words.join(".")
}

fn lower(word: &str) -> String {
    let upper = !word.contains(|c: char| c.is_ascii_lowercase());
    if upper { word.to_ascii_lowercase() } else { word.to_string() }
}

/// The known key that is nearest to an unknown one. A key of the same section comes before a key of another.
pub(super) fn nearest(unknown: &str, in_profile: bool) -> &'static str {
    let unknown = unknown.to_ascii_lowercase();
    let (section, leaf) = unknown.rsplit_once('.').unwrap_or(("", &unknown));
    let known = KEYS.iter().map(|(name, _)| *name).chain(ALIASES.iter().map(|(name, _)| *name));
    let sections = SECTIONS.iter().chain(SECTION_ALIASES.iter().map(|(alias, _)| alias)).copied();
    let top = sections.chain((!in_profile).then_some("profiles"));
    let far = |name: &str| {
        let (its_section, its_leaf) = name.rsplit_once('.').unwrap_or(("", name));
        2 * strsim::damerau_levenshtein(leaf, its_leaf) + 3 * usize::from(section != its_section)
    };
    known.chain(top).min_by_key(|name| far(name)).unwrap_or("name")
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use std::collections::BTreeSet;

    fn paths(value: &serde_json::Value, prefix: &str, out: &mut BTreeSet<String>) {
        for (key, value) in value.as_object().unwrap() {
            match value.is_object() {
                true => paths(value, &format!("{prefix}{key}."), out),
                false => assert!(out.insert(format!("{prefix}{key}"))),
            }
        }
    }

    #[test]
    fn table_holds_exactly_the_fields_of_config() {
        let mut fields = BTreeSet::new();
        paths(&serde_json::to_value(Config::default()).unwrap(), "", &mut fields);
        let table: BTreeSet<String> = KEYS.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(table, fields);
        assert_eq!(table.len(), KEYS.len());
    }

    #[test]
    fn the_readme_lists_every_key_with_its_default() {
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
        let defaults = serde_json::to_value(Config::default()).unwrap();
        for (key, kind) in KEYS {
            let shown = match defaults.pointer(&format!("/{}", key.replace('.', "/"))).unwrap() {
                _ if *key == "name" => " ".to_owned(),
                _ if matches!(kind, Stages) => " 2 stages ".to_owned(),
                serde_json::Value::Null => " ".to_owned(),
                serde_json::Value::String(text) => format!(" {text} "),
                other => format!(" {other} "),
            };
            let row = format!("| `{key}` |{shown}|");
            assert!(readme.contains(&row), "README.md lacks {row}");
        }
    }

    #[test]
    fn aliases_lead_to_keys_and_hide_none() {
        for (name, alias) in ALIASES {
            assert!(kind(name).is_none(), "{name} is a key itself");
            if let Alias::To(target) = alias {
                assert!(kind(target).is_some(), "{name} leads to {target}");
            }
        }
    }

    #[test]
    fn choices_are_what_config_accepts() {
        for (name, kind) in KEYS {
            let Choice(words) = kind else { continue };
            for word in *words {
                let mut config = serde_json::to_value(Config::default()).unwrap();
                *config.pointer_mut(&format!("/{}", name.replace('.', "/"))).unwrap() = (*word).into();
                serde_json::from_value::<Config>(config).unwrap_or_else(|e| panic!("{name}: {word}: {e}"));
            }
        }
    }

    #[test]
    fn case_and_section_names() {
        assert_eq!(canonical("TRAINING.BATCH_SIZE"), "train.batch_size");
        assert_eq!(canonical("DATA.CACHE_SIZE_GB"), "data.cache_size_gb");
        assert_eq!(canonical("Data.Stride"), "Data.Stride");
    }

    #[test]
    fn nearest_key() {
        assert_eq!(nearest("train.batch_sze", false), "train.batch_size");
        assert_eq!(nearest("data.batch_size", false), "train.batch_size");
        assert_eq!(nearest("trian", false), "train");
        assert_eq!(nearest("profile", false), "profiles");
        assert_eq!(nearest("Data.Stride", false), "data.stride");
    }
}
