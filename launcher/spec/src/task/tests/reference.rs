//! The declarations, and what is made from them.

use super::*;
use crate::config::reference::{WRITE_MARKDOWN, WRITE_SCHEMA};
use serde_json::Value;
use std::collections::BTreeSet;

fn paths(value: &Value, prefix: &str, into: &mut BTreeSet<String>) {
    for (key, value) in value.as_object().unwrap() {
        // A section whose keys the user chooses is one key, empty by default.
        match value.as_object().is_some_and(|inner| !inner.is_empty()) {
            true => paths(value, &format!("{prefix}{key}."), into),
            false => assert!(into.insert(format!("{prefix}{key}"))),
        }
    }
}

#[test]
fn declared_keys_are_the_fields_of_the_structs() {
    let mut fields = BTreeSet::new();
    for task in names() {
        let mut own = BTreeSet::new();
        paths(&serde_json::to_value(config(task)).unwrap(), "", &mut own);
        fields.extend(own);
    }
    let schema = schema();
    let keys: Vec<&str> = schema.keys().map(|key| key.path).collect();
    assert_eq!(keys.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), fields);
    assert_eq!(keys.len(), fields.len());
    for key in schema.keys() {
        assert!(key.summary().ends_with('.'), "{}: {}", key.path, key.doc);
    }
}

/// Every default is in its range, and every word of a choice is a value.
#[test]
fn defaults_are_valid_and_every_word_of_a_choice_loads() {
    let schema = schema();
    for task in names() {
        let config = config(task);
        let again = parse_config(&config.to_yaml().unwrap(), "a.yaml").unwrap().resolve("cuda", &[]).unwrap();
        assert_eq!(again, config, "{task}");
        for key in schema.keys() {
            let Kind::Choice(words) = key.kind else { continue };
            for (word, _) in words {
                let set = format!("{}={word}", key.path);
                let raw = parse_config(&format!("task: {task}\n"), "a.yaml").unwrap();
                raw.resolve("cuda", std::slice::from_ref(&set)).unwrap_or_else(|e| panic!("{set}: {e}"));
            }
        }
    }
}

#[test]
fn other_names_lead_to_one_key_each_and_hide_none() {
    let schema = schema();
    let mut seen = BTreeSet::new();
    for key in schema.keys() {
        for name in schema.other_names(key) {
            assert!(schema.key(name).is_none(), "{name} is a key itself");
            assert!(seen.insert(name.to_string()), "{name} leads to two keys");
            assert_eq!(name, name.to_lowercase(), "names are declared in lower case");
        }
    }
    let declared: usize =
        schema.sections().iter().map(|section| section.keys.iter().map(|key| key.aliases.len()).sum::<usize>()).sum();
    assert!(seen.len() >= declared, "a name is declared twice");
    for section in schema.sections() {
        for inert in section.inert {
            assert!(schema.key(inert.path).is_none() && !seen.contains(inert.path), "{}", inert.path);
        }
    }
}

#[test]
fn nearest_keys() {
    let schema = schema();
    for (unknown, near) in [
        ("train.batch_sze", "train.batch_size"),
        ("data.batch_size", "train.batch_size"),
        ("trian", "train"),
        ("profile", "profiles"),
        ("Data.Stride", "data.stride"),
        ("deblur.cliplen", "deblur.clip_len"),
        // The earlier name is nearest; the present one is suggested.
        ("data.emg_chanels", "emg.emg_channels"),
        ("model.tds_stage", "emg.model.tds_stages"),
        ("train.dropout", "emg.model.dropout"),
    ] {
        assert_eq!(schema.nearest(unknown, false), near, "{unknown}");
    }
}

#[test]
fn help_shows_a_key_with_all_that_is_declared() {
    let schema = schema();
    let text = schema.help("train.learning_rate").unwrap();
    for part in
        ["Learning rate after the warm-up.", "a number", "must be above 0", "0.0005", "train.lr, train.optim.lr"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let alias = schema.help("DATA.CLIP_LEN").unwrap();
    assert!(alias.starts_with("DATA.CLIP_LEN is another name of deblur.clip_len.\n"), "{alias}");
    assert!(alias.contains("must be 1 to 1024") && alias.contains("frames"), "{alias}");
    // By its last word alone; with the defaults of tasks that differ; a word's meaning; an inert key; a section.
    assert!(schema.help("tds_stages").unwrap().starts_with("emg.model.tds_stages\n"));
    assert!(schema.help("train.batch_size").unwrap().contains("64 (deblur: 1)"));
    assert!(schema.help("data.shuffle_mode").unwrap().contains("grouped:"));
    assert!(schema.help("log.log_dir").unwrap().contains("no effect: a run keeps everything"));
    let section = schema.help("deblur").unwrap();
    assert!(section.contains("deblur.clip_len") && section.contains("deblur.vrt: "), "{section}");
    let unknown = schema.help("train.batchsize").unwrap_err();
    assert_eq!(unknown, "unknown key or topic train.batchsize; did you mean train.batch_size?");
    let overview = schema.overview();
    for part in ["name, task, stage, seed", "  train ", "  deblur.vrt ", "exit-codes"] {
        assert!(overview.contains(part), "{part}: {overview}");
    }
}

fn file(name: &str) -> String {
    std::fs::read_to_string(root().join("configs").join(name)).unwrap_or_default()
}

#[test]
fn the_key_reference_is_fresh() {
    assert!(
        file("README.md") == schema().markdown(),
        "configs/README.md is stale: write it anew with\n{WRITE_MARKDOWN}"
    );
}

#[test]
fn the_schema_for_editors_is_fresh() {
    let written: Value = serde_json::from_str(&file("schema.json")).unwrap_or_default();
    assert!(written == json_schema(&schema()), "configs/schema.json is stale: write it anew with\n{WRITE_SCHEMA}");
}

fn as_json(text: &str) -> Value {
    serde_yaml::from_str(text).unwrap()
}

#[test]
fn every_shipped_config_is_valid_by_the_schema_and_names_it() {
    let validator = jsonschema::validator_for(&json_schema(&schema())).unwrap();
    let faults =
        |text: &str| -> Vec<String> { validator.iter_errors(&as_json(text)).map(|error| error.to_string()).collect() };
    for path in shipped() {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# yaml-language-server: $schema=schema.json\n"), "{path:?}");
        assert_eq!(faults(&text), Vec::<String>::new(), "{path:?}");
    }
    for path in shipped_earlier() {
        let earlier = root().join("tests/fixtures/configs").join(path.file_name().unwrap());
        assert_eq!(faults(&std::fs::read_to_string(earlier).unwrap()), Vec::<String>::new(), "earlier {path:?}");
    }
    for wrong in [
        "train: {batch_sze: 4}\n",
        "trian: {}\n",
        "train: {batch_size: 0}\n",
        "train: {batch_size: many}\n",
        "train: {optimizer: lion}\n",
        "train: {pin_memory: 4}\n",
        "data: {split_ratio: [0.5, 0.5]}\n",
        "deblur: {spike_dir: a/b}\n",
        "emg: {model: {tds_stages: [{channels: 3}]}}\n",
        "profiles: {gpu: {}}\n",
        "profiles: {cuda: {train: {amq: 1}}}\n",
    ] {
        assert!(!faults(wrong).is_empty(), "{wrong}");
    }
    for right in [
        "train: {learning_rate: 1e-4, num_workers: auto, scheduler: null, amp: false}\n",
        "TRAINING: {BATCH_SIZE: 4}\n",
        "data.clip_len: 3\n",
        "logging: {log_every: 3}\nprofiles: {cpu: {train: {batch_size: 2}}, cuda: null}\n",
        "memory: {budget: 20GiB}\n",
        "train: {optim: {lr: 1e-3}}\ndata: {use_ram_cache: true}\n",
    ] {
        assert_eq!(faults(right), Vec::<String>::new(), "{right}");
        load(right);
    }
}
