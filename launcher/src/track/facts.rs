//! Facts of a run that all trackers want: parameters, scalars by name, its host.

use serde_json::Value;
use sha2::{Digest, Sha256};
use spec::contract::{Held, MemoryRecord, MetricsRecord, NodeRecord};
use std::path::Path;

const GIB: f64 = (1u64 << 30) as f64;

/// Value of a hyper-parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Param {
    Number(f64),
    Bool(bool),
    Text(String),
}

/// Hyper-parameters by the key of the config.
pub type Params = Vec<(String, Param)>;

/// A number by its name.
pub type Scalar = (String, f64);

/// Keys of a config, flat: `train.batch_size`. Lists are text; nulls are left out.
pub fn params(config: &Value) -> Params {
    let mut found = Vec::new();
    flatten(String::new(), config, &mut found);
    found
}

fn flatten(prefix: String, value: &Value, into: &mut Params) {
    let param = match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(name, value, into);
            }
            return;
        }
        Value::Null => return,
        Value::Number(number) => Param::Number(number.as_f64().unwrap_or(f64::NAN)),
        Value::Bool(flag) => Param::Bool(*flag),
        Value::String(text) => Param::Text(text.clone()),
        Value::Array(_) => Param::Text(value.to_string()),
    };
    into.push((prefix, param));
}

/// All numbers of a line of `metrics.jsonl` by the names they have there.
pub fn of_metrics(record: &MetricsRecord) -> Vec<Scalar> {
    let named = [
        ("loss", record.loss),
        ("lr", record.lr),
        ("samples_per_s", record.samples_per_s),
        ("data_wait_s", record.data_wait_s),
        ("step_s", record.step_s),
        ("grad_norm", record.grad_norm),
        ("scale", record.scale),
        ("epoch", record.epoch as f64),
    ];
    let mut all: Vec<Scalar> = named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    all.extend(record.cache_hit_rate.map(|rate| ("cache_hit_rate".to_owned(), rate)));
    all.extend(record.metrics.iter().map(|(name, value)| (name.clone(), *value)));
    all
}

/// Memory of one rank, GiB: what the process has, and the lines of the plan as they are held.
pub fn of_memory(rank: usize, record: &MemoryRecord) -> Vec<Scalar> {
    let Held { model_bytes, slots_bytes, val_slots_bytes, scratch_bytes, chunks_bytes, staging_bytes, .. } =
        record.held;
    let mut named = vec![
        ("rss", record.rss_bytes),
        ("pss", record.pss_bytes),
        ("own", record.uss_bytes),
        ("line/model", model_bytes),
        ("line/batch slots", slots_bytes.saturating_add(val_slots_bytes)),
        ("line/decode scratch", scratch_bytes.saturating_add(chunks_bytes)),
        ("line/checkpoint", staging_bytes),
        ("line/tensors", record.held.tensors_bytes),
        ("line/meeting", record.held.meeting_bytes),
    ];
    if record.gpu_total_bytes > 0 {
        named.extend([
            ("gpu/allocated", record.gpu_allocated_bytes),
            ("gpu/reserved", record.gpu_reserved_bytes),
            ("gpu/used by all", record.gpu_used_bytes),
        ]);
    }
    named.into_iter().map(|(name, bytes)| (format!("memory_gib/rank{rank}/{name}"), bytes as f64 / GIB)).collect()
}

/// Memory of the node, GiB, and the level of pressure (0: normal).
pub fn of_node(record: &NodeRecord) -> Vec<Scalar> {
    let used = record.system_total_bytes.saturating_sub(record.system_available_bytes);
    let mut all: Vec<Scalar> = [
        ("job", record.job_bytes),
        ("page cache", record.cache_bytes),
        ("launcher", record.launcher_bytes),
        ("system used", used),
        ("system available", record.system_available_bytes),
    ]
    .into_iter()
    .map(|(name, bytes)| (format!("memory_gib/node/{name}"), bytes as f64 / GIB))
    .collect();
    all.push(("memory_level".to_owned(), f64::from(record.level as u8)));
    let gpu = |gpu: &spec::contract::GpuUse| (format!("memory_gib/gpu{}", gpu.index), gpu.used_bytes as f64 / GIB);
    all.extend(record.gpus.iter().map(gpu));
    all
}

/// Name of a run, or `run/stage`.
pub fn name(folder: &Path) -> String {
    let part = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match folder.parent() {
        Some(root) if root.join(crate::run_dir::STAGES).is_file() => format!("{}-{}", part(root), part(folder)),
        _ => part(folder),
    }
}

/// Name of this machine, of characters that may stand in a file's name.
pub fn hostname() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let good: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    if good.is_empty() { "localhost".into() } else { good }
}

/// 32 hexadecimal digits of a hash.
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_is_flattened_by_its_keys() {
        let config =
            serde_json::json!({"seed": 7, "train": {"batch_size": 4, "amp": "off"}, "x": null, "l": [1, 2], "b": true});
        let found = params(&config);
        let value = |name: &str| found.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        assert_eq!(value("train.batch_size"), Some(Param::Number(4.0)));
        assert_eq!(value("train.amp"), Some(Param::Text("off".into())));
        assert_eq!((value("x"), value("b")), (None, Some(Param::Bool(true))));
        assert_eq!(value("l"), Some(Param::Text("[1,2]".into())));
    }

    #[test]
    fn digests_differ_where_parts_are_cut_elsewhere() {
        assert_eq!(digest(&[b"ab", b"c"]).len(), 32);
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
    }
}
