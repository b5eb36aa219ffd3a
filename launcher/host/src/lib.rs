//! Probes, limits, locks and records of the machine, which the launcher and the ranks both use.
//!
//! A package of its own, so that a change to the command line compiles no rank anew.
//!
//! | room | owns | may not touch |
//! |---|---|---|
//! | [`machine`] | probes: cores, memory, cgroups, GPUs by NVML, files of a data set; clocks that stop with the machine | decisions |
//! | [`disk`] | room of file systems | what is written |
//! | [`journal`] | append-only files of whole lines that survive a full disk and rotation | meaning of records |
//! | [`logging`] | the subscriber of `tracing` events, and its filter | output |
//! | [`inherited`] | signals, file modes and priorities that a process gets from whoever started it | children |
//! | [`limits`] | limits of the process against what a plan needs | how a plan is made |
//! | [`lock`] | the lock of a run's folder | what the folder holds |
//! | [`nodes`] | the meeting of a job's nodes: proofs of a secret, what each says to all | what is said |
//! | [`scratch`] | files and folders that last as long as a process: held by locks, removed once nobody holds them | what they hold |
//! | [`stamp`] | time as part of a file's name | clocks |

pub mod disk;
pub mod inherited;
pub mod journal;
pub mod limits;
pub mod lock;
pub mod logging;
pub mod machine;
pub mod nodes;
pub mod scratch;
pub mod stamp;
