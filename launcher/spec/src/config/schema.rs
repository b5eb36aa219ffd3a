//! Every key there is, with its type, and every other name that it answers to.

use super::kind::Kind::{self, *};

/// Tasks that Headroom can train.
pub const TASKS: &[&str] = &["emg", "deblur"];
/// What a task's data are called in lines for people.
pub fn data_name(task: &str) -> &str {
    if task == "deblur" { "GoProSpike" } else { task }
}
/// Device profiles that a config may hold.
pub const PROFILES: &[&str] = &["cpu", "cuda"];

pub(super) const SECTIONS: &[&str] =
    &["data", "data.deblur", "model", "model.vrt", "train", "memory", "watch", "smart", "ddp", "log"];

/// Sections of the deblurring guide that hold nothing but other names of keys.
const GUIDE_SECTIONS: &[&str] = &[
    "data.norm",
    "dataloader",
    "loss",
    "loss.charbonnier",
    "loss.vgg_perceptual",
    "model.fuse",
    "model.spike_tsa",
    "test",
    "train.optim",
    "train.sched",
];

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
    ("data.cache_entries", Choice(&["auto", "chunk", "sample"])),
    ("data.skip_bad", Flag),
    ("data.skip_ik_failures", Flag),
    ("data.max_train_windows", Whole),
    ("data.max_val_windows", Whole),
    ("data.deblur.layout", Choice(&["auto", "gopro", "kair"])),
    ("data.deblur.train_split", Text),
    ("data.deblur.val_split", Text),
    ("data.deblur.test_split", Text),
    ("data.deblur.image_exts", Texts),
    ("data.deblur.clip_len", Whole),
    ("data.deblur.crop_size", Whole),
    ("data.deblur.val_crop_size", Whole),
    ("data.deblur.spike_dir", Text),
    ("data.deblur.spike_h", Whole),
    ("data.deblur.spike_w", Whole),
    ("data.deblur.spike_encoding", Choice(&["auto", "packed", "bytes"])),
    ("data.deblur.voxel_bins", Whole),
    ("data.deblur.log1p", Flag),
    ("data.deblur.norm_mean", Number),
    ("data.deblur.norm_std", Number),
    ("data.deblur.use_precomputed_voxels", Flag),
    ("data.deblur.voxel_dir", Text),
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
    ("model.vrt.dims", Wholes),
    ("model.vrt.depths", Wholes),
    ("model.vrt.heads", Whole),
    ("model.vrt.window", Wholes),
    ("model.vrt.deform_groups", Whole),
    ("model.vrt.independent_groups", Wholes),
    ("model.vrt.flow", Choice(&["zero", "spynet"])),
    ("model.vrt.deformable", Flag),
    ("model.vrt.drop_path", Number),
    ("model.vrt.use_spike", Flag),
    ("model.vrt.tsa_heads", Whole),
    ("model.vrt.fuse_heads", Whole),
    ("model.vrt.max_batch_tokens", Whole),
    ("model.vrt.chunk_size", Whole),
    ("model.vrt.checkpoint_attn", Flag),
    ("model.vrt.checkpoint_ffn", Flag),
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
    ("train.loss_type", Choice(&["mse", "mae", "mse+mae", "charbonnier"])),
    ("train.mae_weight", Number),
    ("train.charbonnier_delta", Number),
    ("train.perceptual_weight", Number),
    ("train.perceptual_file", OptionalText),
    ("train.lpips_file", OptionalText),
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
    ("train.amp", Choice(&["off", "bf16", "fp16", "auto"])),
    ("train.cuda_graph", Choice(&["auto", "on", "off"])),
    ("memory.budget", Size),
    ("watch.enabled", Flag),
    ("watch.response", Flag),
    ("watch.ease", Flag),
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
    ("ddp.wire", Choice(&["f32", "bf16"])),
    ("log.runs_dir", Text),
    ("log.log_every", Whole),
    ("log.memory_every", Whole),
    ("log.save_every", Whole),
    ("log.save_every_steps", Whole),
    ("log.save_best_only", Flag),
    ("log.keep_last", Whole),
    ("log.plots", Flag),
    ("log.images", Whole),
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
const TIMING: &str = "has no effect: every logged step's data_wait_s and step_s are in metrics.jsonl";
const TILES: &str = "has no effect: tiles are square, of model.vrt.chunk_size and model.vrt.max_batch_tokens";
const TESTING: &str = "has no effect: the test split is read as the validation split is";
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
    ("data.train_split", Alias::To("data.deblur.train_split")),
    ("data.val_split", Alias::To("data.deblur.val_split")),
    ("data.crop_size", Alias::To("data.deblur.crop_size")),
    ("data.clip_len", Alias::To("data.deblur.clip_len")),
    ("data.k", Alias::To("data.deblur.voxel_bins")),
    ("data.num_voxel_bins", Alias::To("data.deblur.voxel_bins")),
    ("data.voxel_cache_dirname", Alias::To("data.deblur.voxel_dir")),
    ("data.spike_dir", Alias::To("data.deblur.spike_dir")),
    ("data.spike_h", Alias::To("data.deblur.spike_h")),
    ("data.spike_w", Alias::To("data.deblur.spike_w")),
    ("data.use_precomputed_voxels", Alias::To("data.deblur.use_precomputed_voxels")),
    ("data.image_exts", Alias::To("data.deblur.image_exts")),
    ("data.norm.mean", Alias::To("data.deblur.norm_mean")),
    ("data.norm.std", Alias::To("data.deblur.norm_std")),
    ("data.align_log_paths", Alias::Inert("has no effect: spikes and frames are paired by file name")),
    ("model.use_spike", Alias::To("model.vrt.use_spike")),
    ("model.vrt_cfg", Alias::Inert("has no effect: the sizes are keys of model.vrt")),
    ("model.channels_per_scale", Alias::Inert("has no effect: the spike branch has the channels of model.vrt.dims")),
    ("model.layers", Alias::Inert("has no effect: the spike branch has the U-net's four scales")),
    ("model.window_size", Alias::To("model.vrt.window")),
    ("model.img_size_h", Alias::Inert("has no effect: any frame size is taken")),
    ("model.img_size_w", Alias::Inert("has no effect: any frame size is taken")),
    ("model.vrt.use_checkpoint_attn", Alias::To("model.vrt.checkpoint_attn")),
    ("model.vrt.use_checkpoint_ffn", Alias::To("model.vrt.checkpoint_ffn")),
    ("model.spike_tsa.heads", Alias::To("model.vrt.tsa_heads")),
    ("model.spike_tsa.max_batch_tokens", Alias::To("model.vrt.max_batch_tokens")),
    ("model.spike_tsa.chunk_size", Alias::To("model.vrt.chunk_size")),
    ("model.spike_tsa.adaptive_chunk", Alias::Inert(TILES)),
    ("model.spike_tsa.chunk_shape", Alias::Inert(TILES)),
    ("model.fuse.type", Alias::Inert("has no effect: cross-attention over time is the one fusion there is")),
    ("model.fuse.heads", Alias::To("model.vrt.fuse_heads")),
    ("model.fuse.max_batch_tokens", Alias::To("model.vrt.max_batch_tokens")),
    ("model.fuse.chunk_size", Alias::To("model.vrt.chunk_size")),
    ("model.fuse.adaptive_chunk", Alias::Inert(TILES)),
    ("model.fuse.chunk_shape", Alias::Inert(TILES)),
    ("dataloader.total_workers", Alias::Inert("has no effect: loader threads are planned per rank, train.num_workers")),
    ("dataloader.train_workers", Alias::To("train.num_workers")),
    ("dataloader.val_workers", Alias::Inert("has no effect: validation reads with train.num_workers threads")),
    ("dataloader.train_prefetch_factor", Alias::To("train.prefetch_factor")),
    ("dataloader.val_prefetch_factor", Alias::Inert("has no effect: validation has a slot per thread and two more")),
    ("dataloader.pin_memory", Alias::To("train.pin_memory")),
    ("dataloader.persistent_workers", Alias::To("train.persistent_workers")),
    ("train.optim.type", Alias::To("train.optimizer")),
    ("train.optim.lr", Alias::To("train.learning_rate")),
    ("train.optim.betas", Alias::To("train.betas")),
    ("train.optim.weight_decay", Alias::To("train.weight_decay")),
    ("train.sched.type", Alias::To("train.scheduler")),
    ("train.sched.warmup_steps", Alias::To("train.warmup_steps")),
    ("train.ddp_compression", Alias::Inert("has no effect: gradients are reduced as f32")),
    ("loss.charbonnier.delta", Alias::To("train.charbonnier_delta")),
    ("loss.charbonnier.weight", Alias::Inert("has no effect: this term has weight 1, see train.perceptual_weight")),
    ("loss.vgg_perceptual.layers", Alias::Inert("has no effect: the features are those of relu3_3")),
    ("loss.vgg_perceptual.weight", Alias::To("train.perceptual_weight")),
    ("log.tensorboard", Alias::Inert("has no effect: plots/*.png and metrics.jsonl take its place")),
    ("log.save_dir", Alias::Inert(ONE_RUN_FOLDER)),
    ("log.val_every_steps", Alias::Inert("has no effect: validation is at the end of every epoch")),
    ("log.enable_timing_log", Alias::Inert(TIMING)),
    ("log.timing_console", Alias::Inert(TIMING)),
    ("log.timing_file", Alias::Inert(TIMING)),
    ("log.timing_console_interval", Alias::Inert(TIMING)),
    ("log.timing_file_interval", Alias::Inert(TIMING)),
    ("test.batch_size", Alias::Inert(TESTING)),
    ("test.num_workers", Alias::Inert(TESTING)),
    ("log.monitor", Alias::To("train.monitor_metric")),
    ("log.mode", Alias::To("train.monitor_mode")),
    ("log.checkpoint_dir", Alias::Inert(ONE_RUN_FOLDER)),
    ("log.log_dir", Alias::Inert(ONE_RUN_FOLDER)),
];

/// Whether `key` holds keys rather than a value.
pub(super) fn is_section(key: &str) -> bool {
    SECTIONS.contains(&key) || GUIDE_SECTIONS.contains(&key)
}

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
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
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
