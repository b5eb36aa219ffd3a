//! The meeting of a job's ranks: in the node's shared memory, between nodes over Gloo, or over NCCL.

use super::RankError;
use crate::comm::gloo::First;
use crate::comm::nccl::{Member, Nccl, NcclCollective, UniqueId, Wire};
use crate::comm::rendezvous::{self, Links, Node};
use crate::comm::{Collective, CommError, GlooCollective, RankEnv, ShmCollective};
use crate::report::Reporter;
use host::nodes::{JoinSecret, Party};
use spec::config;
use spec::contract::env;
use spec::job::Job;
use std::time::Duration;

/// Path or name of the NCCL to use where libtorch has mapped none.
const NCCL: &str = "HEADROOM_NCCL";

/// Joins the node's ranks in the launcher's memfd, or in one that local rank 0 makes when another launcher started us.
pub fn on_node(place: &RankEnv, timeout: Duration) -> Result<(ShmCollective, Option<Links>), RankError> {
    let (memfd, links) = match std::env::var(env::COMM_FD) {
        Ok(number) => {
            // A memfd can be opened anew by its number: no ownership of a raw descriptor is taken.
            let path = format!("/proc/self/fd/{number}");
            let file = std::fs::File::options().read(true).write(true).open(&path);
            let refused = |e: std::io::Error| RankError::Inherited {
                name: env::COMM_FD,
                value: number,
                problem: e.to_string(),
                way_out: "",
            };
            (file.map_err(refused)?.into(), None)
        }
        Err(_) => {
            let run = std::env::var(env::RUN_ID).unwrap_or_default();
            let Node { memfd, links } = rendezvous::meet_node(place, &run, timeout)?;
            (memfd, Some(links))
        }
    };
    Ok((ShmCollective::new(memfd, place.local_rank, place.local_world_size, timeout)?, links))
}

/// Network interface between nodes, as PyTorch's own Gloo reads it.
const INTERFACE: &str = "GLOO_SOCKET_IFNAME";

/// Joins the job's CPU ranks on several nodes.
pub fn on_nodes(
    place: &RankEnv,
    timeout: Duration,
    reporter: &Reporter,
) -> Result<(GlooCollective, Option<Links>), RankError> {
    let (inner, links) = on_node(place, timeout)?;
    let run = std::env::var(env::RUN_ID).unwrap_or_default();
    let interface = std::env::var(INTERFACE).ok().filter(|name| !name.is_empty());
    let first = || -> Result<First, RankError> {
        let place = rendezvous::place(place, Party::FirstRanks, &run, secret()?, timeout);
        Ok(First { place, interface: interface.clone() })
    };
    let first = (place.local_rank == 0).then(first).transpose()?;
    let told = interface.as_ref().map(|name| format!(", over {name}")).unwrap_or_default();
    let collective = GlooCollective::new(inner, place.rank, place.world_size, first, timeout)?;
    if place.rank == 0 {
        reporter.line(format!("{} ranks on {} nodes: Gloo between them{told}", place.world_size, collective.nodes()));
    }
    Ok((collective, links))
}

/// What all ranks know and nobody else: from our launcher, or, where another one started them, what the user set.
fn secret() -> Result<Option<JoinSecret>, RankError> {
    let found = [env::JOIN_KEY, env::JOIN_SECRET].into_iter().find_map(|name| std::env::var(name).ok());
    JoinSecret::find(None, found).map_err(|e| RankError::Usage(e.to_string()))
}

/// Meets the job's ranks over NCCL; with links between the node's ranks where another launcher started them. Its unique id goes through the node's shared memory, or over TCP between nodes.
pub fn on_devices(
    job: &Job,
    place: &RankEnv,
    index: usize,
    timeout: Duration,
    reporter: &Reporter,
) -> Result<(NcclCollective, Option<Links>), RankError> {
    let nccl = Nccl::load(std::env::var_os(NCCL).map(Into::into)).map_err(CommError::from)?;
    if place.rank == 0 {
        reporter.line(format!("NCCL {} ({})", nccl.version(), nccl.origin()));
    }
    let own = if place.rank == 0 { nccl.unique_id().map_err(CommError::from)?.to_vec() } else { Vec::new() };
    let (id, links) = if place.world_size == place.local_world_size {
        let (node, links) = on_node(place, timeout)?;
        (node.all_gather(&own)?.swap_remove(0), links)
    } else {
        let run = std::env::var(env::RUN_ID).unwrap_or_default();
        let ours = std::env::var_os(env::CONTROL_FD).is_some();
        let links = if ours { None } else { Some(rendezvous::meet_node(place, &run, timeout)?.links) };
        (rendezvous::share_id(place, &run, secret()?, &own, timeout)?, links)
    };
    let bytes = id.len();
    let id = UniqueId::try_from(id).map_err(|_| CommError::NcclId { bytes })?;
    let place = Member { rank: place.rank, world_size: place.world_size, device: index };
    Ok((NcclCollective::new(nccl, id, place, wire(job), timeout)?, links))
}

fn wire(job: &Job) -> Wire {
    match job.config.ddp.wire {
        config::Wire::F32 => Wire::F32,
        config::Wire::Bf16 => Wire::Bf16,
    }
}

/// `1`: a world of one uses NCCL too. A test of the way through NCCL on a machine with one GPU sets it.
const ALONE: &str = "HEADROOM_TEST_NCCL";

pub fn wants_nccl() -> bool {
    std::env::var(ALONE).is_ok_and(|value| value == "1")
}

/// A communicator of this rank alone.
pub fn alone(job: &Job, index: usize, timeout: Duration, reporter: &Reporter) -> Result<NcclCollective, RankError> {
    let nccl = Nccl::load(std::env::var_os(NCCL).map(Into::into)).map_err(CommError::from)?;
    reporter.line(format!("NCCL {} ({}), in a world of one", nccl.version(), nccl.origin()));
    let id = nccl.unique_id().map_err(CommError::from)?;
    let place = Member { rank: 0, world_size: 1, device: index };
    Ok(NcclCollective::new(nccl, id, place, wire(job), timeout)?)
}
