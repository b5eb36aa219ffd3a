//! How ranks learn who they are and find each other when no launcher of ours handed them a memfd.

use super::CommError;
use super::shm::create_memfd;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, recvmsg, sendmsg,
    socket_with, sockopt,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// A rank's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankEnv {
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    pub local_world_size: usize,
    /// Number of this node.
    pub group_rank: usize,
    pub master_addr: String,
    pub master_port: u16,
}

/// Names of one launcher's variables: rank, local rank, world size, ranks on this node, number of this node.
struct Names {
    rank: &'static str,
    local_rank: &'static str,
    world: &'static str,
    local_world: &'static str,
    node: Option<&'static str>,
}

const TORCHRUN: Names = Names {
    rank: "RANK",
    local_rank: "LOCAL_RANK",
    world: "WORLD_SIZE",
    local_world: "LOCAL_WORLD_SIZE",
    node: Some("GROUP_RANK"),
};
const OPEN_MPI: Names = Names {
    rank: "OMPI_COMM_WORLD_RANK",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    world: "OMPI_COMM_WORLD_SIZE",
    local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    node: None,
};
/// Of a job step (srun); a batch script alone has SLURM_PROCID too, but no step to share.
const SLURM: Names = Names {
    rank: "SLURM_PROCID",
    local_rank: "SLURM_LOCALID",
    world: "SLURM_STEP_NUM_TASKS",
    local_world: "SLURM_STEP_TASKS_PER_NODE",
    node: Some("SLURM_NODEID"),
};

/// Reads a rank's identity as torchrun, Open MPI or SLURM sets it; without any, a world of one.
///
/// # Errors
/// A variable is missing beside its siblings, is no number, or contradicts another one.
pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<RankEnv, CommError> {
    let Some(names) = [TORCHRUN, OPEN_MPI, SLURM]
        .into_iter()
        .find(|n| lookup(n.rank).is_some() && (n.rank != SLURM.rank || lookup(n.world).is_some()))
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
        // Of one node when the numbers agree with it; else the caller must say.
        None if local_rank.is_none_or(|local| local == rank) => world_size,
        None => return Err(missing(names.local_world, names.local_rank)),
    };
    let local_rank = local_rank.unwrap_or(rank);
    if rank >= world_size || local_rank >= local_world_size || local_world_size > world_size {
        return Err(CommError::Other(format!(
            "{} {rank} of {} {world_size}, {} {local_rank} of {local_world_size} on this node: ranks count from 0",
            names.rank, names.world, names.local_rank
        )));
    }
    let group_rank = group_rank.unwrap_or(rank / local_world_size);
    with_master(&lookup, RankEnv { rank, local_rank, world_size, local_world_size, group_rank, ..RankEnv::alone() })
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
            master_addr: "127.0.0.1".to_owned(),
            master_port: 29500,
        }
    }
}

fn with_master(lookup: impl Fn(&str) -> Option<String>, env: RankEnv) -> Result<RankEnv, CommError> {
    let master_port = match lookup("MASTER_PORT") {
        Some(value) => u16::try_from(parse("MASTER_PORT", &value)?)
            .map_err(|_| CommError::Other(format!("MASTER_PORT is {value}, expected at most 65535")))?,
        None => env.master_port,
    };
    Ok(RankEnv { master_addr: lookup("MASTER_ADDR").unwrap_or(env.master_addr), master_port, ..env })
}

fn parse(name: &str, value: &str) -> Result<usize, CommError> {
    value.trim().parse().map_err(|_| CommError::Other(format!("{name} is {value:?}, expected a whole number")))
}

fn missing(name: &str, beside: &str) -> CommError {
    CommError::Other(format!("{beside} is set but {name} is not: set both, or neither for a single rank"))
}

/// Tasks on node `node` out of SLURM's list, such as `4(x2),3`: two nodes of four, then one of three.
fn slurm_tasks(list: &str, node: usize) -> Result<usize, CommError> {
    let bad = || CommError::Other(format!("SLURM_STEP_TASKS_PER_NODE is {list:?}, expected such as 4(x2),3"));
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

/// Gives the node's ranks one memfd: local rank 0 makes it and hands it to the others over an abstract socket named
/// after port, run and node. `run_id` tells jobs apart that share a port; it may be empty.
///
/// # Errors
/// The name is in use, or ranks do not come within `timeout`.
pub fn share_memfd(env: &RankEnv, run_id: &str, timeout: Duration) -> Result<OwnedFd, CommError> {
    if env.local_world_size == 1 {
        return create_memfd(true);
    }
    let user = rustix::process::getuid().as_raw();
    // The kernel takes 107 bytes; a long run id is cut from its constant front.
    let run: String = run_id.chars().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect();
    let name = format!("headroom-{user}-{}-{}-{run}", env.master_port, env.group_rank);
    let address =
        SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(|e| CommError::Other(format!("{name}: {e}")))?;
    let deadline = Instant::now() + timeout;
    let failed = |e: Errno| match e {
        Errno::ADDRINUSE => CommError::Other(format!(
            "MASTER_PORT {} is in use by another job on this node: set another one",
            env.master_port
        )),
        e => CommError::Other(format!("meeting the node's ranks at {name}: {e}")),
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    if env.local_rank == 0 {
        hand_out(&socket, &address, env, deadline, timeout, failed)
    } else {
        fetch(&socket, &address, deadline, timeout, failed)
    }
}

fn hand_out(
    socket: &OwnedFd,
    address: &SocketAddrUnix,
    env: &RankEnv,
    deadline: Instant,
    timeout: Duration,
    failed: impl Fn(Errno) -> CommError,
) -> Result<OwnedFd, CommError> {
    let memfd = create_memfd(true)?;
    bind(socket, address).map_err(&failed)?;
    listen(socket, env.local_world_size as i32).map_err(&failed)?;
    let mut served = 1;
    while served < env.local_world_size {
        wait_readable(socket, deadline).map_err(&failed)?.ok_or_else(|| {
            let missing = env.local_world_size - served;
            late("rendezvous", format!("({missing} of the node's {} ranks)", env.local_world_size), timeout)
        })?;
        let peer = accept_with(socket, SocketFlags::CLOEXEC).map_err(&failed)?;
        // Abstract names have no file permissions: whoever asks must be the same user.
        let same_user = sockopt::socket_peercred(&peer).is_ok_and(|cred| cred.uid == rustix::process::getuid());
        if !same_user {
            continue;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [memfd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        // A rank that died after connecting will be missed at the first barrier.
        if sendmsg(&peer, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL).is_ok() {
            served += 1;
        }
    }
    Ok(memfd)
}

fn fetch(
    socket: &OwnedFd,
    address: &SocketAddrUnix,
    deadline: Instant,
    timeout: Duration,
    failed: impl Fn(Errno) -> CommError,
) -> Result<OwnedFd, CommError> {
    loop {
        match connect(socket, address) {
            Ok(()) => break,
            // Rank 0 is not there yet, and nothing tells when it will be.
            Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::CONNREFUSED | Errno::AGAIN) => return Err(late("rendezvous", "0".to_owned(), timeout)),
            Err(e) => return Err(failed(e)),
        }
    }
    wait_readable(socket, deadline).map_err(&failed)?.ok_or_else(|| late("rendezvous", "0".to_owned(), timeout))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).map_err(&failed)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.ok_or_else(|| CommError::Other("local rank 0 ended before it handed out the node's shared memory".to_owned()))
}

/// First bytes of a rank that asks for the job's id.
const ID_MAGIC: [u8; 8] = *b"hr-id-01";

/// Gives every rank of the job what rank 0 brings, over TCP at the job's meeting point: for ranks of several nodes.
/// `run_id` tells jobs apart that share a port; it may be empty. Rank 0's `own` counts, others' is ignored.
///
/// # Errors
/// The port is in use, another job is there, or ranks do not come within `timeout`.
pub fn share_id(env: &RankEnv, run_id: &str, own: &[u8], timeout: Duration) -> Result<Vec<u8>, CommError> {
    let deadline = Instant::now() + timeout;
    let mut hello = ID_MAGIC.to_vec();
    hello.extend(fnv(run_id.as_bytes()).to_le_bytes());
    let place = format!("{}:{}", env.master_addr, env.master_port);
    let failed = |e: std::io::Error| CommError::Other(format!("meeting the job's ranks at {place}: {e}"));
    if env.rank != 0 {
        return fetch_id(env, &hello, deadline, timeout).map_err(failed)?;
    }
    let listener = std::net::TcpListener::bind(("0.0.0.0", env.master_port)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let mut served = vec![false; env.world_size];
    served[0] = true;
    while let Some(missing) = served.iter().position(|done| !done) {
        match listener.accept() {
            Ok((peer, _)) => {
                // Whoever is no rank of this job gets nothing; a rank that died is missed at the first collective.
                if let Ok(Some(rank)) = serve_id(peer, &hello, own)
                    && let Some(done) = served.get_mut(rank)
                {
                    *done = true;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(late("rendezvous", missing.to_string(), timeout));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(own.to_vec())
}

/// Answers one rank; its number. `None`: not of this job.
fn serve_id(mut peer: std::net::TcpStream, hello: &[u8], own: &[u8]) -> std::io::Result<Option<usize>> {
    use std::io::{Read, Write};
    peer.set_nonblocking(false)?;
    peer.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut asked = [0; 20];
    peer.read_exact(&mut asked)?;
    if asked[..16] != *hello {
        return Ok(None);
    }
    let mut answer = (own.len() as u32).to_le_bytes().to_vec();
    answer.extend(own);
    peer.write_all(&answer)?;
    let rank = asked[16..].iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte));
    Ok(Some(rank))
}

fn fetch_id(
    env: &RankEnv,
    hello: &[u8],
    deadline: Instant,
    timeout: Duration,
) -> std::io::Result<Result<Vec<u8>, CommError>> {
    use std::io::{Read, Write};
    loop {
        let Ok(mut peer) = std::net::TcpStream::connect((env.master_addr.as_str(), env.master_port)) else {
            if Instant::now() >= deadline {
                return Ok(Err(late("rendezvous", "0".to_owned(), timeout)));
            }
            // Rank 0 is not there yet, and nothing tells when it will be.
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        peer.set_read_timeout(Some(timeout))?;
        peer.write_all(hello)?;
        peer.write_all(&(env.rank as u32).to_le_bytes())?;
        let mut len = [0; 4];
        if peer.read_exact(&mut len).is_err() {
            let place = format!("{}:{}", env.master_addr, env.master_port);
            return Ok(Err(CommError::Other(format!(
                "{place} belongs to another job: give all nodes of this one the same --name, --master-addr and --master-port"
            ))));
        }
        let mut id = vec![0; (u32::from_le_bytes(len) as usize).min(1 << 16)];
        peer.read_exact(&mut id)?;
        return Ok(Ok(id));
    }
}

/// FNV-1a: the same on every machine and in every version.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn wait_readable(socket: &OwnedFd, deadline: Instant) -> Result<Option<()>, Errno> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            Ok(0) => return Ok(None),
            other => return other.map(|_| Some(())),
        }
    }
}

fn late(collective: &str, missing: String, timeout: Duration) -> CommError {
    let waited = timeout.as_secs_f64();
    CommError::Timeout { collective: collective.to_owned(), waited_s: waited, missing, timeout_s: waited }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Collective, ShmCollective};

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
            let ask = |env: RankEnv| share_id(&env, "run", &[env.rank as u8; 128], Duration::from_secs(60)).unwrap();
            let ranks: Vec<_> = places(3).into_iter().rev().map(|env| scope.spawn(move || ask(env))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert_eq!(ids, [[0; 128], [0; 128], [0; 128]]);
    }

    #[test]
    fn another_job_at_the_port_gets_nothing_and_a_missing_rank_is_named() {
        let errors: Vec<String> = std::thread::scope(|scope| {
            let [first, second] = <[RankEnv; 2]>::try_from(places(2)).unwrap();
            let limit = Duration::from_secs(2);
            let zero = scope.spawn(move || share_id(&first, "run", b"id", limit).unwrap_err().to_string());
            let one = scope.spawn(move || share_id(&second, "other", b"", limit).unwrap_err().to_string());
            [zero, one].map(|rank| rank.join().unwrap()).into()
        });
        assert!(errors[0].contains("rank 1"), "{}", errors[0]);
        assert!(errors[1].contains("another job"), "{}", errors[1]);
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
        let slurm = [
            ("SLURM_PROCID", "9"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_NUM_TASKS", "11"),
            ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
        ];
        let env = parse_env(&slurm).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size, env.group_rank), (9, 1, 11, 3, 2));
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
        assert!(error(&[("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")]).contains("LOCAL_WORLD_SIZE"));
        assert!(slurm_tasks("4(x2),3", 3).is_err() && slurm_tasks("4(x2", 0).is_err());
    }

    #[test]
    fn ranks_of_a_foreign_launcher_meet_and_reduce() {
        // The process id keeps concurrent test runs apart.
        let run = format!("meet-{}", std::process::id());
        let sums = std::thread::scope(|scope| {
            let start = |rank: usize| {
                let run = run.as_str();
                scope.spawn(move || {
                    let env =
                        RankEnv { rank, local_rank: rank, world_size: 3, local_world_size: 3, ..RankEnv::alone() };
                    let fd = share_memfd(&env, run, Duration::from_secs(20)).unwrap();
                    let comm = ShmCollective::new(fd, rank, 3, Duration::from_secs(20)).unwrap();
                    let tensor = tch::Tensor::from_slice(&[rank as f32 + 1.0]);
                    comm.all_reduce_sum(&tensor).unwrap();
                    tensor.double_value(&[0])
                })
            };
            // Rank 0 last: the others must wait for it.
            let ranks: Vec<_> = [2, 1, 0].map(start).into_iter().collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(sums, [6.0; 3]);
    }

    #[test]
    fn a_used_port_and_a_missing_rank_are_errors() {
        let run = format!("missing-{}", std::process::id());
        let zero = RankEnv { world_size: 2, local_world_size: 2, ..RankEnv::alone() };
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| share_memfd(&zero, &run, Duration::from_millis(400)).unwrap_err().to_string());
            std::thread::sleep(Duration::from_millis(100));
            let second = share_memfd(&zero, &run, Duration::from_millis(400)).unwrap_err().to_string();
            (first.join().unwrap(), second)
        });
        let mut both = [first, second];
        both.sort();
        assert!(both[0].contains("is in use by another job"), "{both:?}");
        assert!(both[1].contains("1 of the node's 2 ranks"), "{both:?}");
    }
}
