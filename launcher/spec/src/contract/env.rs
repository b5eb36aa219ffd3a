//! Environment of a rank, as torchrun sets it, and Headroom's own names.

pub const RANK: &str = "RANK";
pub const LOCAL_RANK: &str = "LOCAL_RANK";
pub const WORLD_SIZE: &str = "WORLD_SIZE";
pub const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
pub const GROUP_RANK: &str = "GROUP_RANK";
pub const MASTER_ADDR: &str = "MASTER_ADDR";
pub const MASTER_PORT: &str = "MASTER_PORT";

/// Number of the inherited control socket (one end of a `SOCK_STREAM` pair, the launcher holds the other).
pub const CONTROL_FD: &str = "HEADROOM_CONTROL_FD";
/// Number of the inherited memfd in which the ranks of a node reduce gradients.
pub const COMM_FD: &str = "HEADROOM_COMM_FD";
/// Path of the resolved [`crate::job::Job`] (JSON) that all ranks of a run read.
pub const JOB: &str = "HEADROOM_JOB";
/// Names the job; ranks of different jobs on one node never meet.
pub const RUN_ID: &str = "HEADROOM_RUN_ID";
/// How often this run was restarted.
pub const RESTARTS: &str = "HEADROOM_RESTARTS";
/// Number of the inherited socket to the page cache's directory. Unset means no shared cache.
pub const CACHE_FD: &str = "HEADROOM_CACHE_FD";
/// Level or filter of log lines; a level such as `debug`, or targets and levels.
pub const LOG: &str = "HEADROOM_LOG";
/// Number of the inherited memfd that holds the page cache.
pub const CACHE_MEMFD: &str = "HEADROOM_CACHE_MEMFD";

/// Name of the abstract socket by which any process of the job comes to the page cache.
pub const CACHE_DOOR: &str = "HEADROOM_CACHE_DOOR";
/// Name of the abstract datagram socket to which a user's own program reports: one [`super::FromRank`] as JSON each.
pub const REPORTS: &str = "HEADROOM_REPORTS";
/// Secret that the launchers of all nodes share. Ranks do not get it.
pub const JOIN_SECRET: &str = "HEADROOM_JOIN_SECRET";
/// Secret that the ranks of all nodes share, made of the launchers'.
pub const JOIN_KEY: &str = "HEADROOM_JOIN_KEY";
/// The run's folder, where a user's own program writes its records.
pub const RUN_DIR: &str = "HEADROOM_RUN_DIR";
/// Set where `launch` runs in a scope of systemd that limits its memory.
pub const SCOPE: &str = "HEADROOM_SCOPE";

/// Path of the trainer as an extension of Python, which ranks in the user's interpreter load.
pub const TRAINER: &str = "HEADROOM_TRAINER";
/// The task's section of the config as JSON, for ranks in the user's interpreter.
pub const PYTHON: &str = "HEADROOM_PYTHON";

pub const ROLE_RANK: &str = "ROLE_RANK";
pub const ROLE_WORLD_SIZE: &str = "ROLE_WORLD_SIZE";
pub const ROLE_NAME: &str = "ROLE_NAME";
pub const GROUP_WORLD_SIZE: &str = "GROUP_WORLD_SIZE";
pub const ELASTIC_RUN_ID: &str = "TORCHELASTIC_RUN_ID";
pub const ELASTIC_RESTART_COUNT: &str = "TORCHELASTIC_RESTART_COUNT";
pub const ELASTIC_MAX_RESTARTS: &str = "TORCHELASTIC_MAX_RESTARTS";
/// File for the error of a rank, which `torch.distributed.elastic`'s `@record` writes.
pub const ELASTIC_ERROR_FILE: &str = "TORCHELASTIC_ERROR_FILE";
/// `False`: rank 0 opens the store at [`MASTER_PORT`], as without torchrun.
pub const ELASTIC_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// The first host of SLURM's list, such as `gpu[03-05,9],login`. `None`: it names none.
pub fn first_host(list: &str) -> Option<String> {
    let list = list.trim();
    let (name, rest) = match list.find(['[', ',']) {
        Some(at) => list.split_at(at),
        None => (list, ""),
    };
    let Some(ranges) = rest.strip_prefix('[') else {
        return Some(name.to_owned()).filter(|name| !name.is_empty());
    };
    let (ranges, behind) = ranges.split_once(']')?;
    let first = ranges.split([',', '-']).next().filter(|first| !first.is_empty())?;
    // A name may go on behind its number: rack[1-2]-ib.
    let behind = behind.split(',').next().unwrap_or_default();
    Some(format!("{name}{first}{behind}")).filter(|host| !host.contains(['[', ']']))
}

/// The host in `address`, the value of `--master-addr` or [`MASTER_ADDR`]: an address of IPv6 may stand in brackets.
///
/// # Errors
/// It is empty, or names a port, which has a place of its own.
pub fn host(address: &str) -> Result<String, String> {
    let text = address.trim();
    let refused =
        |problem: &str| Err(format!("{address:?} {problem}: give a host name or an address alone, such as ::1"));
    let inner = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((inner, ""))) if inner.contains(':') => inner,
        Some(Some((_, port))) if port.starts_with(':') => return refused("names a port, which --master-port gives"),
        Some(_) => return refused("is no address of IPv6 in brackets"),
        None if text.matches(':').count() == 1 => return refused("names a port, which --master-port gives"),
        None => text,
    };
    match inner {
        "" => refused("is empty"),
        inner if inner.contains(['[', ']', '/']) || inner.contains(char::is_whitespace) => refused("is no address"),
        inner => Ok(inner.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list_is_found_in_every_form() {
        let first = |list| first_host(list);
        for (list, host) in [
            ("node7", "node7"),
            ("node7,node8", "node7"),
            ("gpu[03-05,9],login", "gpu03"),
            ("gpu[9]", "gpu9"),
            ("rack[1-2]-ib,x", "rack1-ib"),
        ] {
            assert_eq!(first(list).as_deref(), Some(host), "{list}");
        }
        for list in ["", "a[", "a[]", ","] {
            assert_eq!(first(list), None, "{list}");
        }
    }

    #[test]
    fn addresses_of_both_kinds_are_taken_and_ports_are_refused() {
        for (address, inner) in [
            ("node7", "node7"),
            ("10.0.0.1", "10.0.0.1"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            (" [fe80::1%eth0] ", "fe80::1%eth0"),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.1"),
            ("2001:DB8::7", "2001:DB8::7"),
        ] {
            assert_eq!(host(address).as_deref(), Ok(inner), "{address}");
        }
        for (address, problem) in [
            ("node7:29500", "names a port"),
            ("[::1]:29500", "names a port"),
            ("[::1", "in brackets"),
            ("[node7]", "in brackets"),
            ("[]", "in brackets"),
            ("", "is empty"),
            ("tcp://node7", "names a port"),
            ("a b", "is no address"),
        ] {
            assert!(host(address).unwrap_err().contains(problem), "{address}: {:?}", host(address));
        }
    }
}
