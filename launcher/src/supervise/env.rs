//! The environment that torchrun gives its ranks.

use super::RankSpec;
use host::nodes::any_address;
use spec::contract::env;
use std::io;
use std::net::{IpAddr, TcpListener};

/// Where the ranks of a job stand and meet.
#[derive(Clone, Debug, Default)]
pub struct Meeting {
    /// Ranks on this node.
    pub local_world_size: usize,
    /// Nodes; 0 counts as 1.
    pub nnodes: usize,
    pub node_rank: usize,
    /// Ranks of each node; empty: as many as here.
    pub node_ranks: Vec<usize>,
    /// `None` means this machine.
    pub master_addr: Option<String>,
    /// `None` means a free port, chosen now.
    pub master_port: Option<u16>,
    /// Name of the job, as programs learn of it.
    pub run_id: Option<String>,
    /// `OMP_NUM_THREADS` where the caller's environment does not set it.
    pub threads_per_rank: usize,
}

/// Turns that an idle OpenMP thread of a rank waits awake before it sleeps: about 0.1 ms. libgomp's own 300,000 are
/// milliseconds, which a thread takes from the very one it waits for when ranks, loader threads and others share the
/// cores: steps then last tens of times as long. Waking a thread that sleeps costs more than most operators take: with 200
/// turns and two threads, steps of small models take twice the time.
const SPIN_TURNS: &str = "3000";

/// One [`RankSpec`] per local rank with the names torchrun sets, and how long its threads wait awake.
///
/// # Errors
/// `AddrInUse` when `master_port` is taken on the node that must open it; `InvalidInput` when several nodes are to
/// meet at an address or port that was not given, or the node's rank is out of range.
pub fn ranks(meeting: &Meeting) -> io::Result<Vec<RankSpec>> {
    let nnodes = meeting.nnodes.max(1);
    let invalid = |text: String| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if meeting.node_rank >= nnodes {
        return invalid(format!("node rank {} of {nnodes} nodes: expected 0 to {}", meeting.node_rank, nnodes - 1));
    }
    if nnodes > 1 && (meeting.master_addr.is_none() || meeting.master_port.is_none()) {
        return invalid(format!("{nnodes} nodes need --master-addr and --master-port of node 0 to meet"));
    }
    if !meeting.node_ranks.is_empty() && meeting.node_ranks.len() != nnodes {
        return invalid(format!("{nnodes} nodes, but ranks of {} of them", meeting.node_ranks.len()));
    }
    let on_node = |node: usize| meeting.node_ranks.get(node).copied().unwrap_or(meeting.local_world_size);
    let first: usize = (0..meeting.node_rank).map(on_node).sum();
    let world_size: usize = (0..nnodes).map(on_node).sum();
    let port = match meeting.master_port {
        Some(port) if meeting.node_rank == 0 => {
            check_free(any_address(meeting.master_addr.as_deref().unwrap_or_default(), port), port)?
        }
        Some(port) => port,
        None => free_port()?,
    };
    let addr = meeting.master_addr.as_deref().unwrap_or("127.0.0.1");
    let one = |local: usize| {
        let rank = first + local;
        let mut pairs = vec![
            (env::RANK.to_owned(), rank.to_string()),
            (env::LOCAL_RANK.to_owned(), local.to_string()),
            (env::WORLD_SIZE.to_owned(), world_size.to_string()),
            (env::LOCAL_WORLD_SIZE.to_owned(), meeting.local_world_size.to_string()),
            (env::GROUP_RANK.to_owned(), meeting.node_rank.to_string()),
            (env::GROUP_WORLD_SIZE.to_owned(), nnodes.to_string()),
            (env::ROLE_RANK.to_owned(), rank.to_string()),
            (env::ROLE_WORLD_SIZE.to_owned(), world_size.to_string()),
            (env::ROLE_NAME.to_owned(), "default".to_owned()),
            (env::ELASTIC_RUN_ID.to_owned(), meeting.run_id.clone().unwrap_or_else(|| "none".to_owned())),
            (env::ELASTIC_AGENT_STORE.to_owned(), "False".to_owned()),
            (env::MASTER_ADDR.to_owned(), addr.to_owned()),
            (env::MASTER_PORT.to_owned(), port.to_string()),
        ];
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            pairs.push(("OMP_NUM_THREADS".into(), meeting.threads_per_rank.max(1).to_string()));
        }
        // NVML counts devices by their place on the bus, and CUDA the fastest first: the plan's numbers are NVML's.
        if std::env::var_os("CUDA_DEVICE_ORDER").is_none() {
            pairs.push(("CUDA_DEVICE_ORDER".into(), "PCI_BUS_ID".into()));
        }
        if ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].iter().all(|name| std::env::var_os(name).is_none()) {
            pairs.push(("GOMP_SPINCOUNT".into(), SPIN_TURNS.into()));
        }
        RankSpec { rank: u32::try_from(rank).unwrap_or(u32::MAX), env: pairs }
    };
    Ok((0..meeting.local_world_size).map(one).collect())
}

fn check_free(at: IpAddr, port: u16) -> io::Result<u16> {
    match TcpListener::bind((at, port)) {
        Ok(_) => Ok(port),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(io::Error::new(
            e.kind(),
            format!("port {port} is in use: give another --master-port, or none to have a free one chosen"),
        )),
        Err(e) => Err(io::Error::new(e.kind(), format!("port {port} cannot be opened: {e}"))),
    }
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(spec: &RankSpec, name: &str) -> String {
        spec.env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).unwrap()
    }

    #[test]
    fn second_node_counts_its_ranks_after_the_first() {
        let meeting = Meeting {
            local_world_size: 3,
            nnodes: 2,
            node_rank: 1,
            node_ranks: Vec::new(),
            master_addr: Some("node0".into()),
            master_port: Some(29500),
            threads_per_rank: 2,
            run_id: Some("night".into()),
        };
        let specs = ranks(&meeting).unwrap();
        assert_eq!(specs.iter().map(|s| s.rank).collect::<Vec<_>>(), [3, 4, 5]);
        let names =
            ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"];
        let values: Vec<String> = names.iter().map(|name| value(&specs[2], name)).collect();
        assert_eq!(values, ["5", "2", "6", "3", "1", "node0", "29500"]);
        let names = ["ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID"];
        assert_eq!(names.map(|name| value(&specs[2], name)), ["5", "6", "2", "night"]);
        if std::env::var_os("CUDA_DEVICE_ORDER").is_none() {
            assert_eq!(value(&specs[2], "CUDA_DEVICE_ORDER"), "PCI_BUS_ID", "CUDA's numbers are NVML's");
        }
        // The caller's own choice of how threads wait is left alone.
        let chosen = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"].iter().any(|name| std::env::var_os(name).is_some());
        assert_eq!(specs[2].env.iter().any(|(name, _)| name == "GOMP_SPINCOUNT"), !chosen);
    }

    #[test]
    fn nodes_of_unequal_ranks_are_numbered_one_after_the_other() {
        let node = |node_rank: usize, local_world_size: usize| {
            let meeting = Meeting {
                local_world_size,
                nnodes: 3,
                node_rank,
                node_ranks: vec![2, 1, 3],
                master_addr: Some("node0".into()),
                master_port: Some(29500),
                threads_per_rank: 1,
                run_id: None,
            };
            let specs = if node_rank == 0 {
                // Its port may be in use on this machine.
                ranks(&Meeting { master_port: Some(free_port().unwrap()), ..meeting })
            } else {
                ranks(&meeting)
            };
            let names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"];
            specs.unwrap().iter().map(|s| names.map(|n| value(s, n)).join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(node(0, 2), ["0 0 6 2 0", "1 1 6 2 0"]);
        assert_eq!(node(1, 1), ["2 0 6 1 1"]);
        assert_eq!(node(2, 3), ["3 0 6 3 2", "4 1 6 3 2", "5 2 6 3 2"]);
    }

    #[test]
    fn a_port_in_use_is_named_and_a_free_one_is_chosen() {
        let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let with = |master_port| ranks(&Meeting { local_world_size: 1, master_port, ..Meeting::default() });
        let error = with(Some(port)).unwrap_err();
        assert!(error.to_string().contains(&format!("port {port} is in use")), "{error}");
        let chosen: u16 = value(&with(None).unwrap()[0], "MASTER_PORT").parse().unwrap();
        assert!(chosen > 0 && chosen != port);
    }

    #[test]
    fn nodes_that_cannot_meet_are_refused() {
        let meeting = Meeting { local_world_size: 1, nnodes: 2, ..Meeting::default() };
        assert!(ranks(&meeting).unwrap_err().to_string().contains("--master-addr"));
        let meeting = Meeting { local_world_size: 1, node_rank: 1, ..Meeting::default() };
        assert!(ranks(&meeting).unwrap_err().to_string().contains("node rank 1 of 1"));
    }
}
