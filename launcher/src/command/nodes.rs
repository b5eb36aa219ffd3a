//! A job of several nodes: what their launchers tell each other before any rank starts.

use super::{Error, Ready, open_folder};
use crate::cli::RunArgs;
use crate::config::Config;
use crate::plan::{self, NodeShare, Plan};
use crate::run_dir::RunDir;
use crate::supervise::{NodePlace, Nodes};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// Keys, or beginnings of keys, that each node may have its own way: where things lie, and what suits its machine.
const OWN: [&str; 13] = [
    "data.dataset_path",
    "data.cache",
    "data.chunk_cache_size",
    "data.sample_if_missing",
    "log.runs_dir",
    "log.language",
    "memory.budget",
    "watch.",
    "train.num_workers",
    "train.prefetch_factor",
    "train.pin_memory",
    "train.persistent_workers",
    "train.stop_grace",
];
/// Keys named when nodes have different ones.
const SHOWN: usize = 3;

/// What a node says first.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    share: NodeShare,
    /// Every key that all nodes must have alike; empty under `--exec`.
    config: BTreeMap<String, String>,
}

fn place(run: &RunArgs) -> NodePlace {
    NodePlace {
        job: run.name.clone().unwrap_or_default(),
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        master_addr: run.master_addr.clone().unwrap_or_default(),
        master_port: run.master_port.unwrap_or_default(),
        limit: Duration::try_from_secs_f64(run.join_timeout).unwrap_or(Duration::from_secs(600)),
    }
}

/// Ranks of every node of a job under `--exec`; empty for a job of one.
pub(super) fn ranks_of_each(run: &RunArgs, ranks: usize) -> Result<Vec<usize>, Error> {
    if run.nnodes == 1 {
        return Ok(Vec::new());
    }
    let mut nodes = Nodes::meet(place(run))?;
    let facts = Facts { share: NodeShare { ranks, asked: ranks }, config: BTreeMap::new() };
    Ok(agree(&mut nodes, &facts)?.iter().map(|share| share.ranks).collect())
}

/// Meets the other nodes and plans with them; node 0 makes the run's folder, into which the others go.
///
/// # Errors
/// A node does not come, has another config, or cannot take part.
pub(super) fn together(run: &RunArgs, ready: &mut Ready) -> Result<(Plan, RunDir), Error> {
    let share = plan::node_share(&ready.config, &ready.machine, &ready.request)?;
    if run.node_rank == 0 {
        // Before the others look for it, in a folder that they may share.
        ready.sample_if_missing()?;
    }
    let mut nodes = Nodes::meet(place(run))?;
    ready.request.nodes = agree(&mut nodes, &Facts { share, config: shared_keys(&ready.config) })?;
    let plan = all_or_none(&mut nodes, ready.sample_if_missing().and_then(|()| ready.plan()))?;
    let first = (run.node_rank == 0).then(|| open_folder(run, ready)).transpose();
    let folder = match all_or_none(&mut nodes, first)? {
        Some(folder) => folder,
        None => open_folder(run, ready)?,
    };
    Ok((plan, folder))
}

fn agree(nodes: &mut Nodes, own: &Facts) -> Result<Vec<NodeShare>, Error> {
    let text = serde_json::to_string(own).map_err(|e| Error::Disagree(e.to_string()))?;
    let all = nodes.all_gather(&text)?;
    let read = |text: &String| serde_json::from_str(text).map_err(|e| Error::Disagree(format!("a node says {e}")));
    let all: Vec<Facts> = all.iter().map(read).collect::<Result<_, _>>()?;
    match disagreement(&all) {
        Some(problem) => Err(Error::Disagree(problem)),
        None => Ok(all.into_iter().map(|facts| facts.share).collect()),
    }
}

/// Where a node differs from node 0.
fn disagreement(all: &[Facts]) -> Option<String> {
    let first = &all.first()?.config;
    all.iter().enumerate().skip(1).find_map(|(node, facts)| {
        let keys = first.keys().chain(facts.config.keys().filter(|key| !first.contains_key(*key)));
        let value =
            |config: &BTreeMap<String, String>, key| config.get(key).cloned().unwrap_or_else(|| "nothing".into());
        let differing = keys.filter(|key| first.get(*key) != facts.config.get(*key));
        let mut told: Vec<String> = differing
            .map(|key| format!("{key}: {} on node 0, {} on node {node}", value(first, key), value(&facts.config, key)))
            .collect();
        let more = told.len().saturating_sub(SHOWN);
        told.truncate(SHOWN);
        let more = if more > 0 { format!(" and {more} more keys") } else { String::new() };
        (!told.is_empty())
            .then(|| format!("the nodes have different configs: {}{more}; give all nodes the same", told.join(", ")))
    })
}

/// Goes on only where every node's part went well.
fn all_or_none<T>(nodes: &mut Nodes, own: Result<T, Error>) -> Result<T, Error> {
    let text = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = nodes.all_gather(&text);
    // What this node has to say is of more use than that others heard of it.
    let own = own?;
    match all?.into_iter().enumerate().find(|(_, problem)| !problem.is_empty()) {
        Some((node, problem)) => Err(Error::Node { node, problem }),
        None => Ok(own),
    }
}

/// Keys that all nodes must have alike, with their values as JSON.
fn shared_keys(config: &Config) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    flatten("", &serde_json::to_value(config).unwrap_or_default(), &mut keys);
    keys.retain(|key, _| !OWN.iter().any(|own| key.starts_with(own)));
    keys
}

fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let Value::Object(map) = value else {
        into.insert(prefix.to_owned(), value.to_string());
        return;
    };
    for (key, value) in map {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        flatten(&name, value, into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn configs_differ_in_what_concerns_the_model_never_in_where_things_lie() {
        let facts = |change: &dyn Fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            Facts { share: NodeShare::default(), config: shared_keys(&config) }
        };
        let plain = facts(&|_| {});
        let local = facts(&|config| {
            config.data.dataset_path = PathBuf::from("/elsewhere");
            config.data.cache_size_gb = Some(1.0);
            config.train.num_workers = Some(7);
            config.log.runs_dir = PathBuf::from("/there");
        });
        assert_eq!(disagreement(&[plain, local]), None);
        let other = facts(&|config| {
            config.train.batch_size = 48;
            config.seed += 1;
        });
        let told = disagreement(&[facts(&|_| {}), facts(&|_| {}), other]).unwrap();
        let batch = Config::default().train.batch_size;
        assert!(told.contains(&format!("train.batch_size: {batch} on node 0, 48 on node 2")), "{told}");
        assert!(told.contains("seed: ") && told.contains("give all nodes the same"), "{told}");
        // Each key named is one of a config: none is left by a renaming.
        let mut keys = BTreeMap::new();
        flatten("", &serde_json::to_value(Config::default()).unwrap(), &mut keys);
        for own in OWN {
            assert!(keys.keys().any(|key| key.starts_with(own)), "{own}");
        }
    }
}
