//! NCCL's unique id between nodes: rank 0 gives it to every rank at the job's meeting point.

use super::{CommError, RankEnv};
use host::nodes::{JoinSecret, MeetError, NodePlace, Nodes, Party, hex, unhex};
use std::sync::Arc;
use std::time::Duration;

/// Gives every rank of the job what rank 0 brings, over TCP at the job's meeting point: for ranks of several nodes.
/// `run_id` separates jobs that share a port; it may be empty. Rank 0's `own` counts, others' is ignored. With a secret,
/// nobody gets it who does not know that.
///
/// # Errors
/// The port is in use, another job is there, or ranks do not come within `timeout`.
pub fn share_id(
    env: &RankEnv,
    run_id: &str,
    secret: Option<JoinSecret>,
    own: &[u8],
    timeout: Duration,
) -> Result<Vec<u8>, CommError> {
    let met = |error: MeetError| CommError::Meet(Arc::new(error));
    let own = if env.rank == 0 { hex(own) } else { String::new() };
    let place = place(env, Party::Ranks, run_id, secret, timeout);
    let all = Nodes::meet(place).and_then(|mut ranks| ranks.all_gather(&own)).map_err(met)?;
    let id = all.first().and_then(|text| unhex(text));
    id.ok_or_else(|| CommError::Membership("rank 0 sent no bytes as NCCL's id: all nodes need the same program".into()))
}

/// The meeting point of a job's ranks, as [`Nodes`] has it.
pub fn place(env: &RankEnv, party: Party, run_id: &str, secret: Option<JoinSecret>, limit: Duration) -> NodePlace {
    let (nnodes, node_rank) = match party {
        Party::Ranks => (env.world_size, env.rank),
        Party::Launchers | Party::FirstRanks => (env.nodes, env.group_rank),
    };
    NodePlace {
        party,
        job: run_id.to_owned(),
        nnodes,
        node_rank,
        master_addr: env.master_addr.clone(),
        master_port: env.master_port,
        limit,
        secret,
    }
}
