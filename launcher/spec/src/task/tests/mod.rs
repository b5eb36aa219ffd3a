//! Configs as people write them, from text to [`Config`].

use super::deblur::{DeblurConfig, DeblurLoss};
use super::emg::{EmgConfig, EmgLoss};
use super::*;
use crate::config::*;
use proptest::prelude::*;
use std::path::{Path, PathBuf};

mod guides;
mod reference;
mod training;

fn sets(sets: &[&str]) -> Vec<String> {
    sets.iter().map(ToString::to_string).collect()
}

fn load(text: &str) -> Config {
    resolved(text, "cpu", &[]).unwrap()
}

fn resolved(text: &str, profile: &str, overrides: &[&str]) -> Result<Config, ConfigError> {
    parse_config(text, "my.yaml")?.resolve(profile, &sets(overrides))
}

fn error(text: &str, overrides: &[&str]) -> String {
    resolved(text, "cpu", overrides).unwrap_err().to_string()
}

#[test]
fn empty_config_is_the_default_named_after_its_file() {
    let expected = Config { name: "my".into(), ..config("emg") };
    assert_eq!(load(""), expected);
    assert_eq!(load("# nothing\ndata:\ntrain: {}\n"), expected);
}

#[test]
fn all_unknown_keys_are_reported_at_once_with_line_and_nearest_key() {
    let text = error("data:\n  strid: 2\ntrain:\n  batch_sze: 4\n  num_epochs: 3\nlogg: {}\n", &[]);
    assert_eq!(
        text,
        "3 problems in the config:\
         \n  my.yaml:2:3: unknown key data.strid; did you mean data.stride?\
         \n  my.yaml:4:3: unknown key train.batch_sze; did you mean train.batch_size?\
         \n  my.yaml:6:1: unknown key logg; did you mean log?"
    );
}

#[test]
fn wrong_types_name_key_line_value_and_expectation() {
    for (text, says) in [
        (
            "train:\n  batch_size: many\n",
            "my.yaml:2:15: train.batch_size: expected a whole number of 0 or more, found the text \"many\"",
        ),
        ("train:\n  batch_size: -4\n", "found -4"),
        ("train:\n  batch_size: 2.5\n", "found 2.5"),
        ("train:\n  batch_size: \"16\"\n", "found the text \"16\""),
        ("train:\n  batch_size:\n", "found nothing"),
        ("data:\n  shuffle: yes\n", "data.shuffle: expected true or false, found the text \"yes\""),
        ("data:\n  split_ratio: [0.7, 0.3]\n", "expected a list of 3 numbers, found a list of 2"),
        ("train: 4\n", "my.yaml:1:8: train: expected a section, found 4"),
        ("train:\n  optimizer: lion\n", "expected one of adam, adamw, sgd, musgd, auto, found the text \"lion\""),
        ("train:\n  learning_rate: .nan\n", "train.learning_rate: expected a number"),
        ("memory:\n  budget: 200%\n", "expected a share such as 80% or a size such as 20GiB"),
        ("data:\n  table_name: \"a\\nb\"\n", "expected text on one line, found the text \"a\\nb\""),
        ("- a\n", "found no mapping"),
        ("train:\n  a: [\n", "not valid YAML"),
    ] {
        let found = error(text, &[]);
        assert!(found.contains(says), "{text:?}: {found}");
    }
}

#[test]
fn stages_name_their_faults() {
    let text =
        "model:\n  tds_stages:\n    - {in_conv_kernel: 5, in_conv_stride: 2, num_blocks: x,\n       chanels: 8}\n";
    let found = error(text, &[]);
    for says in [
        "my.yaml:3:58: model.tds_stages[0].num_blocks: expected",
        "my.yaml:4:8: unknown key model.tds_stages[0].chanels; did you mean model.tds_stages[0].channels?",
        "kernel_width is missing",
    ] {
        assert!(found.contains(says), "{found}");
    }
}

#[test]
fn overrides_are_checked_like_files_and_name_themselves() {
    let found = error("", &["train.batch_sze=4", "train.batch_size=x", "seed"]);
    for says in [
        "--set train.batch_sze=4: unknown key train.batch_sze; did you mean train.batch_size?",
        "--set train.batch_size=x: train.batch_size: expected a whole number",
        "--set seed: expected key=value",
    ] {
        assert!(found.contains(says), "{found}");
    }
    let config =
        resolved("", "cpu", &["data.split_ratio=[0.8,0.1,0.1]", "TRAIN.BATCH_SIZE=3", "train.batch_size=5"]).unwrap();
    assert_eq!((config.data.split_ratio, config.train.batch_size), ([0.8, 0.1, 0.1], 5));
}

#[test]
fn duplicates_are_errors_also_under_another_name() {
    assert!(error("train:\n  patience: 1\n  patience: 1\n", &[]).contains("my.yaml:3:3: duplicate key patience"));
    let text = error("train:\n  num_epochs: 1\nTRAIN:\n  EPOCHS: 2\n", &[]);
    assert!(text.contains("my.yaml:4:3: TRAIN.EPOCHS says again what train.num_epochs says at my.yaml:2:3"), "{text}");
}

#[test]
fn profile_lies_over_the_base_and_under_the_overrides() {
    let text = "train: {batch_size: 8, prefetch_factor: 3}\nprofiles:\n  cpu: {train: {batch_size: 4}}\n  cuda: {TRAINING: {amp: bf16}}\n";
    let config = load(text);
    assert_eq!((config.train.batch_size, config.train.prefetch_factor), (4, 3));
    let cuda = resolved(text, "cuda", &[]).unwrap();
    assert_eq!((cuda.train.batch_size, cuda.train.amp), (8, Amp::Bf16));
    assert_eq!(resolved(text, "cpu", &["train.batch_size=2"]).unwrap().train.batch_size, 2);
    let wrong = error("profiles:\n  gpu: {}\n  cuda: {train: {amq: 1}}\n", &[]);
    assert!(wrong.contains("my.yaml:2:3: unknown profile gpu; the profiles there are: cpu, cuda"), "{wrong}");
    assert!(
        wrong.contains("my.yaml:3:18: unknown key profiles.cuda.train.amq; did you mean profiles.cuda.train.amp?"),
        "{wrong}"
    );
    assert!(resolved("", "mps", &[]).unwrap_err().to_string().contains("unknown profile mps"));
}

#[test]
fn device_is_known_before_the_profile() {
    let raw = parse_config("train: {device: cpu}\n", "my.yaml").unwrap();
    assert_eq!(raw.device(&[]).unwrap(), DeviceChoice::Cpu);
    assert_eq!(raw.device(&sets(&["train.device=cuda"])).unwrap(), DeviceChoice::Cuda);
    assert_eq!(parse_config("", "my.yaml").unwrap().device(&[]).unwrap(), DeviceChoice::Auto);
}

#[test]
fn values_without_sense_are_refused_with_every_factor() {
    for (set, says) in [
        ("data.split_ratio=[0.7,0.2,0.2]", "train 0.7 + val 0.2 + test 0.2 = 1.0999999999999999"),
        ("data.stride=0", "data.stride is 0; it must be at least 1"),
        ("emg.window_size=0", "emg.window_size is 0"),
        ("data.window_size=10", "10 / emg.model.original_sampling_rate 2000 × emg.model.rollout_freq 50 = 0.25"),
        ("emg.emg_channels=8", "emg.model.input_size 16 ≠ emg.emg_channels 8"),
        ("train.batch_size=0", "train.batch_size is 0"),
        ("train.microbatch=0", "train.microbatch is 0"),
        ("train.learning_rate=0", "train.learning_rate is 0; it must be above 0"),
        ("train.learning_rate=-1e-3", "train.learning_rate is -0.001"),
        ("train.min_learning_rate=1", "train.min_learning_rate 1 > train.learning_rate 0.0005"),
        ("train.monitor_metric=loss", "such as val.loss"),
        ("train.ema_decay=1", "train.ema_decay is 1"),
        ("train.ema_decay=[0.9,1]", "train.ema_decay[1] is 1; it must be at least 0 and below 1"),
        ("train.ema_decay=[0.9,0.99,0.9]", "train.ema_decay lists 0.9 twice"),
        ("train.ema_decay=often", "expected a number, a list of numbers, or null"),
        ("train.ema_ramp=-1", "train.ema_ramp is -1"),
        ("train.lrf=1.5", "train.lrf is 1.5; it must be 0 to 1"),
        ("train.warmup_momentum=1", "train.warmup_momentum is 1"),
        ("ddp.buffers=sum", "expected one of broadcast, mean, local"),
        ("model.dropout=1", "emg.model.dropout is 1"),
        ("task=yolo9", "task is yolo9; the tasks there are: emg"),
        ("name=a/b", "name is \"a/b\""),
        ("log.log_every=0", "log.log_every is 0"),
        ("model.decoder_num_layers=65", "emg.model.decoder_num_layers is 65; it must be 1 to 64"),
    ] {
        let found = error("", &[set]);
        assert!(found.starts_with(&format!("--set {set}: ")) && found.contains(says), "{set}: {found}");
    }
    let raw = parse_config("train: {microbatch: 128}\n", "my.yaml").unwrap();
    let (_, notes) = raw.resolve_with_notes("cpu", &[]).unwrap();
    assert_eq!(notes, ["my.yaml:1:9: train.microbatch 128 > train.batch_size 64: the batch is not split"]);
}

#[test]
fn pinned_memory_on_a_cpu_earns_a_line_where_someone_wrote_it() {
    let notes = |text: &str, profile: &str, sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        parse_config(text, "my.yaml").unwrap().resolve_with_notes(profile, &sets).unwrap().1
    };
    let text = "train: {pin_memory: true}\n";
    let line = "my.yaml: train.pin_memory has no effect on CPU ranks: pinned memory is for copies to a GPU";
    assert_eq!(notes(text, "cpu", &[]), [line]);
    assert_eq!(notes("seed: 1\n", "cpu", &["train.pin_memory=true"]), [line]);
    for quiet in
        [notes("seed: 1\n", "cpu", &[]), notes(text, "cpu", &["train.pin_memory=false"]), notes(text, "cuda", &[])]
    {
        assert!(quiet.is_empty(), "{quiet:?}");
    }
}

#[test]
fn a_training_metric_can_be_monitored_only_where_it_is_computed() {
    let (off, monitor) = ("train.compute_metrics_online=false", "train.monitor_metric=train.loss");
    let raw = parse_config("seed: 1\n", "my.yaml").unwrap();
    for alone in [off, monitor] {
        assert!(raw.resolve("cpu", &[alone.to_string()]).is_ok(), "{alone}");
    }
    assert!(error("", &[off, monitor]).contains("compute_metrics_online: false leaves out"));
}

#[test]
fn budgets_are_read_in_every_form() {
    for (text, budget) in [
        ("80%", Budget::Percent(80.0)),
        ("20GiB", Budget::Bytes(20 << 30)),
        ("4096", Budget::Bytes(4096)),
        ("\"1 MB\"", Budget::Bytes(1_000_000)),
    ] {
        assert_eq!(load(&format!("memory:\n  budget: {text}\n")).memory.budget, budget);
    }
}

fn at(cwd: &Path) -> Folders<'_> {
    Folders { cwd, headroom: None, home: None }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn shipped() -> Vec<std::path::PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let files = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "yaml")).collect()
}

/// Shipped configs that an earlier version had too, in other spellings.
fn shipped_earlier() -> Vec<PathBuf> {
    let had =
        |path: &PathBuf| path.file_name().is_some_and(|file| root().join("tests/fixtures/configs").join(file).exists());
    let found: Vec<PathBuf> = shipped().into_iter().filter(had).collect();
    assert_eq!(found.len(), 5, "{found:?}");
    found
}

/// Configs of earlier versions, as they were shipped, mean what the shipped ones mean now.
#[test]
fn earlier_configs_load_with_the_same_result() {
    for path in shipped_earlier() {
        let now = std::fs::read_to_string(&path).unwrap();
        let file = path.file_name().unwrap().to_str().unwrap();
        let earlier = std::fs::read_to_string(root().join("tests/fixtures/configs").join(file)).unwrap();
        assert_ne!(now, earlier, "{file}: the fixture is in the earlier spelling");
        for profile in PROFILES {
            let resolved = |text: &str| parse_config(text, file).unwrap().resolve_with_notes(profile, &[]).unwrap();
            assert_eq!(resolved(&earlier), resolved(&now), "{file} {profile}");
        }
    }
}

/// `config.yaml` of runs of an earlier version, resolved by that version for CPU ranks: it loads as the config that it was
/// made from.
#[test]
fn configs_of_earlier_runs_load_as_what_they_ran_with() {
    for path in shipped_earlier() {
        let file = path.file_name().unwrap().to_str().unwrap();
        let run = std::fs::read_to_string(root().join("tests/fixtures/configs/runs").join(file)).unwrap();
        let saved = parse_config(&run, "config.yaml").unwrap().resolve("cpu", &[]).unwrap();
        let sets =
            sets(&["train.device=cpu", "data.sample_if_missing=false", "memory.budget=8GiB", "train.stop_grace=30"]);
        let text = std::fs::read_to_string(&path).unwrap();
        let made = parse_config(&text, file).unwrap().resolve("cpu", &sets).unwrap();
        assert_eq!(saved, made, "{file}");
    }
}

#[test]
fn every_shipped_config_loads_for_both_profiles() {
    let files = shipped();
    assert!(files.len() >= 4, "{files:?}");
    for path in files {
        let raw = parse_config(&std::fs::read_to_string(&path).unwrap(), &path.display().to_string()).unwrap();
        for profile in PROFILES {
            let (config, notes) = raw.resolve_with_notes(profile, &[]).unwrap();
            assert_eq!(config.name, path.file_stem().unwrap().to_str().unwrap());
            assert!(notes.is_empty(), "{path:?}: {notes:?}");
        }
    }
}

/// The values that the guides print for each named config.
#[test]
fn shipped_configs_hold_the_guides_values() {
    let root = root();
    let get = |name: &str| find_config(name, &at(&root)).unwrap().resolve("cuda", &[]).unwrap();
    for (name, batch, accumulation, workers, prefetch, pin, samples, chunk, stride) in [
        ("low_memory", 16, 4, 2, 1, false, 5_000, 32 << 20, 2),
        ("default", 64, 1, 4, 2, true, 10_000, 64 << 20, 1),
        ("high_performance", 128, 1, 8, 4, true, 20_000, 128 << 20, 1),
    ] {
        let config = get(name);
        let (train, data, emg) = (&config.train, &config.data, config.section::<EmgConfig>());
        assert_eq!((train.batch_size, train.gradient_accumulation_steps), (batch, accumulation), "{name}");
        assert_eq!(
            (train.num_workers, train.prefetch_factor, train.pin_memory),
            (Some(workers), prefetch, pin),
            "{name}"
        );
        assert_eq!(
            (emg.max_samples_for_normalize, data.chunk_cache_size, data.stride),
            (samples, chunk, stride),
            "{name}"
        );
    }
    let quick = get("quick_demo");
    let emg: EmgConfig = quick.section();
    assert_eq!((quick.train.batch_size, emg.model.decoder_hidden_size), (32, 64));
    assert!(emg.rectify && emg.normalize && quick.data.sample_if_missing);
    let default = get("default");
    assert_eq!(default.section::<EmgConfig>().model, EmgConfig::default().model);
    assert_eq!(default.train.num_epochs, 100);
}

#[test]
fn unknown_names_list_the_configs_there_are() {
    let cwd = tempfile::tempdir().unwrap();
    std::fs::create_dir(cwd.path().join("configs")).unwrap();
    for name in ["b.yaml", "a.yaml", "notes.txt"] {
        std::fs::write(cwd.path().join("configs").join(name), "seed: 7\n").unwrap();
    }
    let found = find_config("low_memry", &at(cwd.path())).err().unwrap().to_string();
    assert!(found.ends_with("the configs there are: a, b"), "{found}");
    for name in ["a", "a.yaml", "configs/a.yaml", "configs/a"] {
        assert_eq!(find_config(name, &at(cwd.path())).unwrap().resolve("cpu", &[]).unwrap().seed, 7);
    }
    let elsewhere = tempfile::tempdir().unwrap();
    assert!(find_config("a", &at(elsewhere.path())).is_err());
    assert!(find_config("a", &Folders { headroom: Some(cwd.path()), ..at(elsewhere.path()) }).is_ok());
}

#[test]
fn what_was_set_on_the_command_line_is_blamed_on_it() {
    let raw = parse_config("train: {num_epochs: 0}\n", "a.yaml").unwrap();
    let set = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        raw.resolve("cpu", &sets).unwrap_err().to_string()
    };
    let both = set(&["train.gradient_clip_norm=-1", "seed=3"]);
    assert!(both.contains("\n  --set train.gradient_clip_norm=-1: train.gradient_clip_norm is -1"), "{both}");
    assert!(both.contains("\n  a.yaml:1:9: train.num_epochs is 0"), "{both}");
    let two = set(&["train.num_epochs=3", "train.learning_rate=1e-3", "train.min_learning_rate=1e-2"]);
    assert!(two.starts_with("--set train.learning_rate=1e-3 --set train.min_learning_rate=1e-2: train.min_"), "{two}");
}

#[test]
fn the_watchs_levels_are_percent() {
    let raw = parse_config("", "a.yaml").unwrap();
    let set = |set: &str| raw.resolve("cpu", &[set.to_string()]).unwrap_err().to_string();
    assert!(set("watch.ram_percent=[0.7,0.8,0.9]").contains("write 70, not 0.7"));
    assert!(set("watch.gpu_percent=[0.8,0.9,1.0]").contains("watch.gpu_percent is [0.8, 0.9, 1]; these are percent"));
    assert!(set("watch.stop_percent=200").ends_with("watch.stop_percent is 200; it must be at most 100"));
}

#[test]
fn numbers_flags_and_sizes_are_read_as_people_write_them() {
    let config = load(
        "data: {cache_size_gb: .5, chunk_cache_size: 64MiB, shuffle: True, skip_bad: FALSE}\n\
         train: {learning_rate: 1e-4, weight_decay: 1E-4, max_steps: 1_000, batch_size: 0x10}\n",
    );
    assert_eq!((config.data.cache_size_gb, config.data.chunk_cache_size), (Some(0.5), 64 << 20));
    assert_eq!((config.data.shuffle, config.data.skip_bad), (true, false));
    let train = &config.train;
    assert_eq!(
        (train.learning_rate, train.weight_decay, train.max_steps, train.batch_size),
        (1e-4, 1e-4, Some(1000), 16)
    );
    assert!(error("data: {chunk_cache_size: 64Mb ytes}\n", &[]).contains("or a size such as 64MiB"));
    assert!(error("data: {shuffle: on}\n", &[]).contains("expected true or false, found the text \"on\""));
}

#[test]
fn merge_keys_merge_and_what_is_written_beside_them_wins() {
    let text = "profiles:\n  cpu:\n    train: &small {batch_size: 4, num_epochs: 3}\n  cuda:\n    train: {<<: *small, amp: bf16}\n";
    let config = resolved(text, "cuda", &[]).unwrap();
    assert_eq!((config.train.batch_size, config.train.num_epochs, config.train.amp), (4, 3, Amp::Bf16));
    // Under another name, in capitals, and in another spelling of the section.
    for own in ["epochs: 9", "NUM_EPOCHS: 9", "num_epochs: 9"] {
        let text = format!("profiles: {{cpu: {{train: &a {{num_epochs: 3}}}}}}\ntrain:\n  <<: *a\n  {own}\n");
        assert_eq!(resolved(&text, "cuda", &[]).unwrap().train.num_epochs, 9, "{own}");
    }
    let text = "profiles: {cpu: {train: &a {num_epochs: 3}}}\nTRAIN: {<<: *a}\ntrain: {num_epochs: 9}\n";
    assert_eq!(resolved(text, "cuda", &[]).unwrap().train.num_epochs, 9);
    // A mistake is named where it stands.
    let wrong = "profiles:\n  cpu:\n    train: &a {num_epochs: x}\ntrain:\n  <<: *a\n";
    assert!(
        error(wrong, &[]).contains("my.yaml:3:28: train.num_epochs: expected a whole number"),
        "{}",
        error(wrong, &[])
    );
    assert!(error("train:\n  <<: 4\n", &[]).contains("my.yaml:2:7: <<: expected a section"));
    assert!(error("", &["train={<<: 4}"]).contains("<<: expected a section"));
    let stages = "emg:\n  model:\n    tds_stages:\n      - &s {in_conv_kernel: 5, in_conv_stride: 2, num_blocks: 2, channels: 8, \
                  feature_width: 4, kernel_width: 21}\n      - {<<: *s, KERNEL_WIDTH: 11}\n";
    let stages = load(stages).section::<EmgConfig>().model.tds_stages;
    assert_eq!((stages[0].kernel_width, stages[1].kernel_width, stages[1].channels), (21, 11, 8));
}

#[test]
fn a_tilde_is_the_home_folder_in_every_path_and_variables_are_refused_by_name() {
    let paths = [
        "data.dataset_path",
        "log.runs_dir",
        "train.init_from",
        "deblur.loss.perceptual_file",
        "deblur.loss.lpips_file",
        "cell.reference",
        "cell.sample.init_cells",
        "python.interpreter",
    ];
    let schema = schema();
    let declared: Vec<&str> = schema.keys().filter(|key| key.kind.is_path()).map(|key| key.path).collect();
    assert_eq!(declared.len(), paths.len(), "{declared:?}");
    for key in paths {
        let task = ["cell", "python"].into_iter().find(|task| key.starts_with(task)).unwrap_or("deblur");
        let text = format!("task: {task}\n");
        let raw = parse_config(&text, "my.yaml").unwrap().with_home(Some(Path::new("/home/ann")));
        let config = raw.resolve("cpu", &sets(&[&format!("{key}=~/a/b")])).unwrap();
        let value = serde_json::to_value(&config).unwrap();
        assert_eq!(value.pointer(&format!("/{}", key.replace('.', "/"))).unwrap(), "/home/ann/a/b", "{key}");
        for variable in ["${HOME}/a", "$HOME/a"] {
            let set = format!("{key}={variable}");
            let found = raw.resolve("cpu", &sets(&[&set])).unwrap_err().to_string();
            let name = variable.trim_end_matches("/a");
            assert!(found.starts_with(&format!("--set {set}: {key}: {name} in ")), "{found}");
        }
    }
    let text = "log:\n  runs_dir: \"${HOME}/r\"\n";
    assert!(error(text, &[]).starts_with("my.yaml:2:13: log.runs_dir: ${HOME} in \"${HOME}/r\" is not expanded: "));
    assert!(error("log:\n  runs_dir: ~ann/r\n", &[]).contains("~ann in \"~ann/r\" is not expanded"));
    let homeless = error("log:\n  runs_dir: ~/r\n", &[]);
    assert!(homeless.starts_with("my.yaml:2:3: log.runs_dir is ~/r; there is no home folder"), "{homeless}");
    assert_eq!(load("log: {runs_dir: /a~b/c$5}\n").log.runs_dir, Path::new("/a~b/c$5"));
}

/// The loss's keys stood in `train`: they do not make a config one of clips.
#[test]
fn a_config_without_a_task_is_of_the_task_whose_keys_it_holds() {
    for (text, task) in [
        ("", "emg"),
        ("seed: 1\nmodel: {dropout: 0.2}\n", "emg"),
        ("data: {clip_len: 3}\n", "deblur"),
        ("deblur: {vrt: {heads: 2}}\n", "deblur"),
        ("train: {charbonnier_delta: 1e-3}\n", "emg"),
        ("task: emg\ndeblur: {clip_len: 3}\n", "emg"),
        ("TASK: Deblur\n", "deblur"),
        ("cell: {label: null}\n", "cell"),
        ("noise_schedule: cosine\n", "cell"),
    ] {
        assert_eq!(load(text).task, task, "{text}");
    }
}

proptest! {
    /// The config.yaml of a run folder is the config that ran.
    #[test]
    fn resolved_config_survives_yaml(
        name in "[a-zA-Z0-9_][a-zA-Z0-9_.+=@-]{0,20}",
        path in "[\\PC&&[^\\p{Zl}\\p{Zp}]]{1,20}",
        table in "[ -~]{1,12}",
        seed in any::<u64>(),
        batch in 1usize..100_000,
        micro in proptest::option::of(1usize..64),
        lr in 1e-12f64..1e6,
        gamma in 1e-9f64..=1.0,
        percent in 1e-3f64..=100.0,
        bytes in proptest::option::of(1u64..1 << 60),
        stages in 1usize..4,
        flags in any::<[bool; 4]>(),
    ) {
        prop_assume!(!path.contains('$') && !path.starts_with('~'));
        let mut config = Config { name, seed, ..config("emg") };
        config.data.dataset_path = path.into();
        config.with_section(|emg: &mut EmgConfig| {
            emg.table_name = table;
            emg.model.tds_stages = vec![emg.model.tds_stages[0].clone(); stages];
        });
        config.data.shuffle = flags[0];
        config.data.cache = if flags[1] { CachePolicy::Off } else { CachePolicy::NextUse };
        config.train.batch_size = batch;
        config.train.microbatch = micro;
        config.train.learning_rate = lr;
        config.train.gamma = gamma;
        config.train.amp = if flags[2] { Amp::Off } else { Amp::Fp16 };
        config.train.scheduler = if flags[3] { SchedulerKind::None } else { SchedulerKind::Step };
        config.memory.budget = bytes.map_or(Budget::Percent(percent), Budget::Bytes);
        let yaml = config.to_yaml().unwrap();
        let again = parse_config(&yaml, "config.yaml").and_then(|raw| raw.resolve("cpu", &[]));
        prop_assert_eq!(again.map_err(|e| format!("{e}\n{yaml}")).unwrap(), config);
    }
}
