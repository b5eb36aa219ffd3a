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
/// Number of the inherited socket to the page cache's directory; absent: no shared cache.
pub const CACHE_FD: &str = "HEADROOM_CACHE_FD";
/// Number of the inherited memfd that holds the page cache.
pub const CACHE_MEMFD: &str = "HEADROOM_CACHE_MEMFD";
