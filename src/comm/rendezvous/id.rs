//! NCCL's unique id between nodes: rank 0 serves it over TCP at the job's meeting point.

use super::node::{is_over, late};
use super::{CommError, RankEnv};
use host::machine::awake::Deadline;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs};
use std::time::Duration;

/// First bytes of a rank that asks for the job's id.
const ID_MAGIC: [u8; 8] = *b"hr-id-01";

/// Gives every rank of the job what rank 0 brings, over TCP at the job's meeting point: for ranks of several nodes.
/// `run_id` separates jobs that share a port; it may be empty. Rank 0's `own` counts, others' is ignored.
///
/// # Errors
/// The port is in use, another job is there, or ranks do not come within `timeout`.
pub fn share_id(env: &RankEnv, run_id: &str, own: &[u8], timeout: Duration) -> Result<Vec<u8>, CommError> {
    let deadline = Deadline::new(timeout);
    let mut hello = ID_MAGIC.to_vec();
    hello.extend(fnv(run_id.as_bytes()).to_le_bytes());
    let place = place(env);
    let failed = |e: std::io::Error| CommError::system(format!("meeting the job's ranks at {place}"), e);
    if env.rank != 0 {
        return fetch_id(env, &hello, &deadline, timeout).map_err(failed)?;
    }
    let listener = std::net::TcpListener::bind((any_address(env), env.master_port)).map_err(failed)?;
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
                if is_over(&deadline) {
                    return Err(late("rendezvous", missing.to_string(), timeout));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(own.to_vec())
}

fn place(env: &RankEnv) -> String {
    match env.master_addr.contains(':') {
        true => format!("[{}]:{}", env.master_addr, env.master_port),
        false => format!("{}:{}", env.master_addr, env.master_port),
    }
}

/// Where rank 0 listens: at all addresses of its host, of IPv6 where the name given has no other. As the launcher does.
fn any_address(env: &RankEnv) -> IpAddr {
    let mut found = (env.master_addr.as_str(), env.master_port).to_socket_addrs().into_iter().flatten().peekable();
    match found.peek().is_some() && found.all(|at| matches!(at.ip(), IpAddr::V6(at) if at.to_ipv4_mapped().is_none())) {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    }
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
    deadline: &Deadline,
    timeout: Duration,
) -> std::io::Result<Result<Vec<u8>, CommError>> {
    use std::io::{Read, Write};
    loop {
        let met = std::net::TcpStream::connect((env.master_addr.as_str(), env.master_port)).ok();
        // Where nobody listens yet, the kernel may connect a socket of the same host with itself.
        let other = |peer: &std::net::TcpStream| peer.local_addr().ok() != peer.peer_addr().ok();
        let Some(mut peer) = met.filter(other) else {
            if is_over(deadline) {
                return Ok(Err(late("rendezvous", "0".to_owned(), timeout)));
            }
            // Rank 0 is not listening yet, and nothing announces when it will.
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        peer.set_read_timeout(Some(timeout))?;
        peer.write_all(hello)?;
        peer.write_all(&(env.rank as u32).to_le_bytes())?;
        let mut len = [0; 4];
        if peer.read_exact(&mut len).is_err() {
            return Ok(Err(CommError::Membership(format!(
                "{} belongs to another job: give all nodes of this one the same --name, --master-addr and --master-port",
                place(env)
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
