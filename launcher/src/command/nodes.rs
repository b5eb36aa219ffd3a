//! A job of several nodes: the launchers' exchange before any rank starts.

use super::{Error, Ready, io, open_folder, print};
use crate::cli::RunArgs;
use crate::run_dir::RunDir;
use crate::supervise::{self, Meeting, RankSpec};
use host::lock::RunLock;
use host::nodes::{JoinSecret, NodePlace, Nodes, Party};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use spec::config::Config;
use spec::contract::{env, exit};
use spec::plan::{self, NodeShare, Plan};
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

/// Keys that all nodes must have alike, with their values as JSON; empty under `--exec`.
type Keys = BTreeMap<String, String>;

/// First message of a node. It is short, since all messages together have a limit.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    share: NodeShare,
    /// [`digest`] of its [`Keys`].
    config: u64,
}

fn place(run: &RunArgs) -> Result<NodePlace, Error> {
    let variable = std::env::var(env::JOIN_SECRET).ok();
    let secret = JoinSecret::find(run.join_secret.as_deref(), variable)?;
    if secret.is_none() && !is_this_machine(run.master_addr.as_deref().unwrap_or_default()) {
        print::note(
            "the nodes meet without a secret: whoever reaches the port and knows the run's name can join; --join-secret FILE \
             or HEADROOM_JOIN_SECRET, the same on every node, keeps others out",
        );
    }
    Ok(NodePlace {
        party: Party::Launchers,
        secret,
        job: run.name.clone().unwrap_or_default(),
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        master_addr: run.master_addr.clone().unwrap_or_default(),
        master_port: run.master_port.unwrap_or_default(),
        limit: Duration::try_from_secs_f64(run.join_timeout).unwrap_or(Duration::from_secs(600)),
    })
}

/// Nodes of a trial on one machine.
fn is_this_machine(address: &str) -> bool {
    address == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|at| at.is_loopback())
}

/// Ranks of every node of a job under `--exec`; empty for a job of one.
pub(super) fn ranks_of_each(run: &RunArgs, ranks: usize) -> Result<Vec<usize>, Error> {
    if run.nnodes == 1 {
        return Ok(Vec::new());
    }
    let mut nodes = Nodes::meet(place(run)?)?;
    let shares = agree(&mut nodes, run.node_rank, NodeShare { ranks, asked: ranks }, &Keys::new())?;
    Ok(shares.iter().map(|share| share.ranks).collect())
}

/// Meets the other nodes and plans with them; node 0 makes the run's folder, into which the others go.
///
/// # Errors
/// A node does not come, has another config, or cannot take part.
pub(super) fn together(run: &RunArgs, ready: &mut Ready) -> Result<(Plan, RunDir, RunLock), Error> {
    // First: whatever goes wrong on one node, the others hear of.
    let place = place(run)?;
    ready.ranks_key = place.secret.as_ref().map(|secret| secret.of_ranks(&place.job));
    let mut nodes = Nodes::meet(place)?;
    let share = all_or_none(&mut nodes, own_part(run, ready))?;
    ready.request.nodes = agree(&mut nodes, run.node_rank, share, &shared_keys(&ready.config))?;
    let plan = ready.sample_if_missing().and_then(|()| ready.plan());
    let checked = plan.and_then(|plan| ready.check_limits(&plan).map(|()| plan));
    let plan = all_or_none(&mut nodes, checked)?;
    let first = (run.node_rank == 0).then(|| open_folder(run, ready)).transpose();
    let first = all_or_none(&mut nodes, first)?;
    let made = first.as_ref().map(|(folder, _)| folder.path.clone());
    let (folder, lock) =
        all_or_none(&mut nodes, first.map_or_else(|| open_folder(run, ready), Ok)).inspect_err(|_| {
            // A new one has nothing in it, and only such a one can be removed this way.
            let _ = made.map(std::fs::remove_dir);
        })?;
    Ok((plan, folder, lock))
}

/// Contribution of this node. Node 0 makes sample data before the others look for them, in a folder that they may
/// share.
fn own_part(run: &RunArgs, ready: &Ready) -> Result<NodeShare, Error> {
    let share = plan::node_share(&ready.config, &ready.machine, &ready.request)?;
    if run.node_rank == 0 {
        ready.sample_if_missing()?;
    }
    Ok(share)
}

/// Environment of this node's ranks.
pub(super) fn ranks(
    run: &RunArgs,
    local_world_size: usize,
    node_ranks: Vec<usize>,
    threads_per_rank: usize,
) -> Result<Vec<RankSpec>, Error> {
    let meeting = Meeting {
        local_world_size,
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        node_ranks,
        master_addr: run.master_addr.clone(),
        master_port: run.master_port,
        threads_per_rank,
        run_id: run.torchrun.rdzv_id.clone().or(run.name.clone()),
    };
    supervise::ranks(&meeting).map_err(io("the ranks cannot meet", exit::USAGE))
}

fn agree(nodes: &mut Nodes, own_rank: usize, share: NodeShare, keys: &Keys) -> Result<Vec<NodeShare>, Error> {
    let all: Vec<Facts> = gather(nodes, &Facts { share, config: digest(keys) })?;
    let first = all.first().map_or(0, |facts| facts.config);
    let Some(other) = all.iter().position(|facts| facts.config != first) else {
        return Ok(all.into_iter().map(|facts| facts.share).collect());
    };
    // All know it, and two say what they have.
    let own = if [0, other].contains(&own_rank) { keys.clone() } else { Keys::new() };
    let all: Vec<Keys> = gather(nodes, &own)?;
    Err(Error::Disagree(disagreement(&all[0], &all[other], other)))
}

fn gather<T: Serialize + DeserializeOwned>(nodes: &mut Nodes, own: &T) -> Result<Vec<T>, Error> {
    let text = serde_json::to_string(own).map_err(|e| Error::Disagree(e.to_string()))?;
    let read = |text: &String| serde_json::from_str(text).map_err(|e| Error::Disagree(format!("a node says {e}")));
    nodes.all_gather(&text)?.iter().map(read).collect()
}

/// FNV-1a of keys and values: the same on every machine.
fn digest(keys: &Keys) -> u64 {
    // No key or value holds a zero byte: JSON escapes it.
    let bytes = keys.iter().flat_map(|(key, value)| [key.as_bytes(), &[0], value.as_bytes(), &[0]].concat());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Where node `node` differs from node 0.
fn disagreement(first: &Keys, other: &Keys, node: usize) -> String {
    let keys = first.keys().chain(other.keys().filter(|key| !first.contains_key(*key)));
    let value = |config: &Keys, key| config.get(key).cloned().unwrap_or_else(|| "nothing".into());
    let differing = keys.filter(|key| first.get(*key) != other.get(*key));
    let mut told: Vec<String> = differing
        .map(|key| format!("{key}: {} on node 0, {} on node {node}", value(first, key), value(other, key)))
        .collect();
    let more = told.len().saturating_sub(SHOWN);
    told.truncate(SHOWN);
    let more = if more > 0 { format!(" and {more} more keys") } else { String::new() };
    format!("the nodes have different configs: {}{more}; give all nodes the same", told.join(", "))
}

/// Continues only if every node's part succeeded.
fn all_or_none<T>(nodes: &mut Nodes, own: Result<T, Error>) -> Result<T, Error> {
    let text = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = nodes.all_gather(&text);
    // The error of this node matters more than delivery to the others.
    let own = own?;
    match all?.into_iter().enumerate().find(|(_, problem)| !problem.is_empty()) {
        Some((node, problem)) => Err(Error::Node { node, problem }),
        None => Ok(own),
    }
}

fn shared_keys(config: &Config) -> Keys {
    let mut keys = Keys::new();
    flatten("", &serde_json::to_value(config).unwrap_or_default(), &mut keys);
    keys.retain(|key, _| !OWN.iter().any(|own| key.starts_with(own)));
    keys
}

fn flatten(prefix: &str, value: &Value, into: &mut Keys) {
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
        let keys_of = |change: &dyn Fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            shared_keys(&config)
        };
        let plain = keys_of(&|_| {});
        let local = keys_of(&|config| {
            config.data.dataset_path = PathBuf::from("/elsewhere");
            config.data.cache_size_gb = Some(1.0);
            config.train.num_workers = Some(7);
            config.log.runs_dir = PathBuf::from("/there");
        });
        assert_eq!(digest(&plain), digest(&local));
        let other = keys_of(&|config| {
            config.train.batch_size = 48;
            config.seed += 1;
        });
        assert_ne!(digest(&plain), digest(&other));
        let told = disagreement(&plain, &other, 2);
        let batch = Config::default().train.batch_size;
        assert!(told.contains(&format!("train.batch_size: {batch} on node 0, 48 on node 2")), "{told}");
        assert!(told.contains("seed: ") && told.contains("give all nodes the same"), "{told}");
        // Each key named is one of a config: none is left by a renaming.
        let mut keys = Keys::new();
        flatten("", &serde_json::to_value(Config::default()).unwrap(), &mut keys);
        for own in OWN {
            assert!(keys.keys().any(|key| key.starts_with(own)), "{own}");
        }
    }
}
