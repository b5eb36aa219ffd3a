//! How ranks learn who they are and find each other when no launcher of ours handed them a memfd.

mod id;
mod node;

pub use id::{place, share_id};
pub use node::{Links, Node, meet_node, receive, send};

use super::CommError;

/// A rank's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankEnv {
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    pub local_world_size: usize,
    /// Number of this node.
    pub group_rank: usize,
    pub nodes: usize,
    pub master_addr: String,
    pub master_port: u16,
}

/// Names of one launcher's variables: rank, local rank, world size, ranks on this node, number of this node, nodes.
struct Names {
    rank: &'static str,
    local_rank: &'static str,
    world: &'static str,
    local_world: &'static str,
    node: Option<&'static str>,
    nodes: Option<&'static str>,
}

const TORCHRUN: Names = Names {
    rank: "RANK",
    local_rank: "LOCAL_RANK",
    world: "WORLD_SIZE",
    local_world: "LOCAL_WORLD_SIZE",
    node: Some("GROUP_RANK"),
    nodes: Some("GROUP_WORLD_SIZE"),
};
const OPEN_MPI: Names = Names {
    rank: "OMPI_COMM_WORLD_RANK",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    world: "OMPI_COMM_WORLD_SIZE",
    local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    node: None,
    nodes: None,
};
const MVAPICH: Names = Names {
    rank: "MV2_COMM_WORLD_RANK",
    local_rank: "MV2_COMM_WORLD_LOCAL_RANK",
    world: "MV2_COMM_WORLD_SIZE",
    local_world: "MV2_COMM_WORLD_LOCAL_SIZE",
    node: None,
    nodes: None,
};
/// MVAPICH 3 and 4.
const MVP: Names = Names {
    rank: "MVP_COMM_WORLD_RANK",
    local_rank: "MVP_COMM_WORLD_LOCAL_RANK",
    world: "MVP_COMM_WORLD_SIZE",
    local_world: "MVP_COMM_WORLD_LOCAL_SIZE",
    node: None,
    nodes: None,
};
/// Hydra, the launcher of MPICH and Intel MPI. PMI itself, which others speak too, names no local rank.
const HYDRA: Names = Names {
    rank: "PMI_RANK",
    local_rank: "MPI_LOCALRANKID",
    world: "PMI_SIZE",
    local_world: "MPI_LOCALNRANKS",
    node: None,
    nodes: None,
};
/// Variables of a job step (srun). A batch script alone has SLURM_PROCID too, but no step to share.
const SLURM: Names = Names {
    rank: "SLURM_PROCID",
    local_rank: "SLURM_LOCALID",
    world: "SLURM_STEP_NUM_TASKS",
    local_world: "SLURM_STEP_TASKS_PER_NODE",
    node: Some("SLURM_NODEID"),
    nodes: Some("SLURM_STEP_NUM_NODES"),
};

/// Reads a rank's identity as torchrun, Open MPI, MVAPICH, Hydra (MPICH, Intel MPI) or SLURM sets it; without any, a world of one.
///
/// # Errors
/// A variable is missing beside its siblings, is no number, or contradicts another one.
pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<RankEnv, CommError> {
    // Hydra within a SLURM job: srun has started Hydra's own processes, one per node, and their numbers are not those of ranks.
    let whole = |n: &Names| match n.rank {
        rank if rank == SLURM.rank => lookup(n.world).is_some(),
        rank if rank == HYDRA.rank => lookup(n.local_rank).is_some() && lookup(n.world).is_some(),
        _ => true,
    };
    let Some(names) =
        [TORCHRUN, OPEN_MPI, MVAPICH, MVP, HYDRA, SLURM].into_iter().find(|n| lookup(n.rank).is_some() && whole(n))
    else {
        return with_master(&lookup, RankEnv::alone());
    };
    let number = |name: &str| lookup(name).map(|value| parse(name, &value)).transpose();
    let required = |name: &str| number(name)?.ok_or_else(|| missing(name, names.rank));
    let (rank, world_size) = (required(names.rank)?, required(names.world)?);
    let local_rank = number(names.local_rank)?;
    let group_rank = names.node.map(&number).transpose()?.flatten();
    let local_world_size = match lookup(names.local_world) {
        Some(value) if names.rank == SLURM.rank => slurm_tasks(&value, group_rank.unwrap_or(0))?,
        Some(value) => parse(names.local_world, &value)?,
        // Assume one node if that is consistent; otherwise LOCAL_WORLD_SIZE is required.
        None if local_rank.is_none_or(|local| local == rank) => world_size,
        None => return Err(missing(names.local_world, names.local_rank)),
    };
    let local_rank = local_rank.unwrap_or(rank);
    if rank >= world_size || local_rank >= local_world_size || local_world_size > world_size {
        return Err(CommError::Membership(format!(
            "{} {rank} of {} {world_size}, {} {local_rank} of {local_world_size} on this node: ranks count from 0",
            names.rank, names.world, names.local_rank
        )));
    }
    let group_rank = group_rank.unwrap_or(rank / local_world_size);
    // Where nobody says how many there are, all have as many ranks as this one.
    let nodes = names.nodes.map(&number).transpose()?.flatten().unwrap_or(world_size.div_ceil(local_world_size));
    let place = RankEnv { rank, local_rank, world_size, local_world_size, group_rank, nodes, ..RankEnv::alone() };
    if group_rank >= nodes || nodes > world_size {
        return Err(CommError::Membership(format!(
            "node {group_rank} of {nodes} nodes with {world_size} ranks: nodes count from 0, and each has a rank"
        )));
    }
    with_master(&lookup, place)
}

impl RankEnv {
    /// A world of one rank.
    pub fn alone() -> RankEnv {
        RankEnv {
            rank: 0,
            local_rank: 0,
            world_size: 1,
            local_world_size: 1,
            group_rank: 0,
            nodes: 1,
            master_addr: "127.0.0.1".to_owned(),
            master_port: 29500,
        }
    }
}

fn with_master(lookup: impl Fn(&str) -> Option<String>, env: RankEnv) -> Result<RankEnv, CommError> {
    let master_port = match lookup("MASTER_PORT") {
        Some(value) => u16::try_from(parse("MASTER_PORT", &value)?)
            .map_err(|_| variable("MASTER_PORT", &value, "at most 65535"))?,
        None => env.master_port,
    };
    let master_addr = match lookup("MASTER_ADDR") {
        Some(value) => {
            spec::contract::env::host(&value).map_err(|problem| CommError::Other(format!("MASTER_ADDR {problem}")))?
        }
        None if env.world_size > env.local_world_size => slurm_master(&lookup).unwrap_or(env.master_addr),
        None => env.master_addr,
    };
    Ok(RankEnv { master_addr, master_port, ..env })
}

/// The first node of a job step of SLURM.
fn slurm_master(lookup: impl Fn(&str) -> Option<String>) -> Option<String> {
    lookup(SLURM.world)?;
    let lists = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    lists.into_iter().find_map(&lookup).as_deref().and_then(spec::contract::env::first_host)
}

fn parse(name: &str, value: &str) -> Result<usize, CommError> {
    value.trim().parse().map_err(|_| variable(name, value, "a whole number"))
}

fn variable(name: &str, value: &str, expected: &'static str) -> CommError {
    CommError::Variable { name: name.into(), value: value.into(), expected }
}

fn missing(name: &str, beside: &str) -> CommError {
    CommError::MissingVariable { name: name.into(), beside: beside.into() }
}

/// Tasks on node `node` out of SLURM's list, such as `4(x2),3`: two nodes of four, then one of three.
fn slurm_tasks(list: &str, node: usize) -> Result<usize, CommError> {
    let bad = || variable("SLURM_STEP_TASKS_PER_NODE", list, "such as 4(x2),3");
    let mut left = node;
    for part in list.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')').ok_or_else(bad)?),
            None => (part, "1"),
        };
        let (tasks, times) = (tasks.trim().parse().map_err(|_| bad())?, times.parse::<usize>().map_err(|_| bad())?);
        if left < times {
            return Ok(tasks);
        }
        left -= times;
    }
    Err(bad())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn parse_env(pairs: &[(&str, &str)]) -> Result<RankEnv, CommError> {
        from_env(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    fn places(world_size: usize) -> Vec<RankEnv> {
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let one = |rank| RankEnv { rank, world_size, master_port: free, ..RankEnv::alone() };
        (0..world_size).map(one).collect()
    }

    #[test]
    fn all_ranks_get_what_rank_zero_brings() {
        let ids: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let ask =
                |env: RankEnv| share_id(&env, "run", None, &[env.rank as u8; 128], Duration::from_secs(60)).unwrap();
            let ranks: Vec<_> = places(3).into_iter().rev().map(|env| scope.spawn(move || ask(env))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert_eq!(ids, [[0; 128], [0; 128], [0; 128]]);
    }

    #[test]
    fn ranks_meet_at_an_address_of_ipv6_too() {
        let Ok(free) = std::net::TcpListener::bind(("::1", 0)) else {
            eprintln!("skipped: this machine has no IPv6");
            return;
        };
        let master_port = free.local_addr().unwrap().port();
        drop(free);
        let at = |rank| RankEnv { rank, world_size: 2, master_addr: "::1".into(), master_port, ..RankEnv::alone() };
        std::thread::scope(|scope| {
            let one = scope.spawn(move || share_id(&at(1), "run", None, b"", Duration::from_secs(60)).unwrap());
            assert_eq!(share_id(&at(0), "run", None, b"id", Duration::from_secs(60)).unwrap(), b"id");
            assert_eq!(one.join().unwrap(), b"id");
        });
    }

    #[test]
    fn another_job_at_the_port_gets_nothing_and_a_missing_rank_is_named() {
        let errors: Vec<String> = std::thread::scope(|scope| {
            let [first, second] = <[RankEnv; 2]>::try_from(places(2)).unwrap();
            let limit = Duration::from_secs(2);
            let zero = scope.spawn(move || share_id(&first, "run", None, b"id", limit).unwrap_err().to_string());
            let one = scope.spawn(move || share_id(&second, "other", None, b"", limit).unwrap_err().to_string());
            [zero, one].map(|rank| rank.join().unwrap()).into()
        });
        assert!(errors[0].contains("rank 1"), "{}", errors[0]);
        assert!(errors[1].contains("belongs to the run"), "{}", errors[1]);
    }

    #[test]
    fn reads_torchrun_open_mpi_and_slurm() {
        assert_eq!(parse_env(&[]).unwrap(), RankEnv::alone());
        let torchrun = [
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("GROUP_RANK", "1"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "1234"),
            ("SLURM_PROCID", "0"),
        ];
        let env = parse_env(&torchrun).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size, env.group_rank), (5, 1, 8, 4, 1));
        assert_eq!((env.master_addr.as_str(), env.master_port), ("node7", 1234));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let env = parse_env(&mpi).unwrap();
        assert_eq!((env.rank, env.local_rank, env.local_world_size, env.group_rank), (3, 1, 2, 1));
        // Hydra started by srun: SLURM's numbers are those of Hydra's own processes.
        let hydra = [
            ("PMI_RANK", "3"),
            ("PMI_SIZE", "4"),
            ("MPI_LOCALRANKID", "1"),
            ("MPI_LOCALNRANKS", "2"),
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
        ];
        let env = parse_env(&hydra).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size, env.group_rank), (3, 1, 4, 2, 1));
        assert_eq!(env.master_addr, "gpu03");
        for prefix in ["MV2", "MVP"] {
            let names = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"].map(|name| format!("{prefix}_COMM_WORLD_{name}"));
            let pairs: Vec<(&str, &str)> = names.iter().map(String::as_str).zip(["3", "4", "1", "2"]).collect();
            let env = parse_env(&pairs).unwrap();
            assert_eq!((env.rank, env.local_rank, env.local_world_size), (3, 1, 2), "{prefix}");
        }
        // PMI alone says nothing of the place on a node: SLURM does.
        let slurm = [
            ("PMI_RANK", "9"),
            ("PMI_SIZE", "11"),
            ("SLURM_JOB_NODELIST", "a,b"),
            ("SLURM_PROCID", "9"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_NUM_TASKS", "11"),
            ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
        ];
        let env = parse_env(&slurm).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size, env.group_rank), (9, 1, 11, 3, 2));
        assert_eq!(env.master_addr, "a");
    }

    #[test]
    fn a_batch_script_without_a_step_is_alone() {
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")];
        assert_eq!(parse_env(&batch).unwrap(), RankEnv::alone());
    }

    #[test]
    fn contradictions_name_the_variable() {
        let error = |pairs: &[(&str, &str)]| parse_env(pairs).unwrap_err().to_string();
        assert!(error(&[("RANK", "0")]).contains("WORLD_SIZE is not"));
        assert!(error(&[("RANK", "x"), ("WORLD_SIZE", "1")]).contains("RANK is \"x\""));
        assert!(error(&[("RANK", "3"), ("WORLD_SIZE", "3")]).contains("ranks count from 0"));
        assert!(error(&[("MASTER_PORT", "70000")]).contains("at most 65535"));
        assert!(error(&[("MASTER_ADDR", "node7:29500")]).contains("MASTER_ADDR \"node7:29500\" names a port"));
        assert_eq!(parse_env(&[("MASTER_ADDR", "[::1]")]).unwrap().master_addr, "::1");
        assert!(error(&[("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")]).contains("LOCAL_WORLD_SIZE"));
        assert!(slurm_tasks("4(x2),3", 3).is_err() && slurm_tasks("4(x2", 0).is_err());
    }
}
