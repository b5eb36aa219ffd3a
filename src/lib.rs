//! Headroom's rank: everything that touches tensors, data and collectives.
//!
//! ```text
//! config ─► plan ─► launch ─► rank ─► data (source ─► cache ─► windows ─► loader) ─► train (step, amp, ddp) ─► report
//! ```
//!
//! | room | owns | may not touch |
//! |---|---|---|
//! | [`torch`] | the one C++ shim: what tch lacks | everything else |
//! | [`comm`] | [`comm::Collective`]: `nccl`, `shm`, `gloo`, `solo`; rendezvous | model, data |
//! | [`data::source`] | formats on disk, sole importer of `hdf5` and image decoders | cache, tch, comm |
//! | [`data::entries`] | a data set's entries in the node's page cache (package `cache`) | formats |
//! | [`data::windows`] | samples that are windows over chunks: index, entries, pieces, look-ahead | tasks |
//! | [`data::loader`] | sampler, loader threads, batch slots | files |
//! | [`train`] | step, ddp, optimizer, ema, schedule, checkpoint, loop, online metrics | paths, environment |
//! | [`task`] | one room per task: data set, model, loss, metrics, sample data | the loop |
//! | [`ledger`] | bytes held by the plan's lines, counted where they are allocated | decisions |
//! | [`report`] | records, progress, memory lines | control of training |
//! | [`own_loop`] | memory helpers for a training loop that a user writes: lines, reports, clean-up, a guard | training |
//! | [`rank`] | wiring and the exit code | algorithms |
//!
//! Package `headroom-rank` (`src/python`) is this library as an extension of the user's Python, for `task python`.
//!
//! Architecture invariant: two places here spawn a process: `data::source::hdf5::probe`, which opens files of others
//! ahead in one, and `rank`, which lets `launch` draw the figures of a run that another launcher started; `hdf5` is imported by `data::source` alone; batches are a
//! pure function of (seed, epoch, step, rank, world size), whatever the number of threads.

// Checks that other programs share name this one from outside.
#[cfg(test)]
extern crate self as headroom;

pub mod comm;
pub mod data;
pub mod ledger;
pub mod own_loop;
pub mod rank;
pub mod report;
pub mod task;
pub mod torch;
pub mod train;
