//! Probes of this machine: facts, no decisions.
//!
//! [`probe()`] never fails: what cannot be read is absent (zero or `None`). All reading of files goes through
//! [`Probe`], which takes a root folder, so that tests run on fixture trees.

pub mod awake;
mod cgroup;
pub mod colour;
mod dataset;
mod gpu;
mod limits;
mod memory;
mod probe;
mod process;
#[cfg(test)]
mod tests;

pub use dataset::dataset_facts;
pub use gpu::{GpuMeter, driver as gpu_driver};
pub use limits::{ProcessLimits, low_priorities, tasks_of_user};
pub use memory::{GroupNow, MemoryMeter, MemoryNow, Pressure};
pub use probe::Probe;
pub use process::{
    Resident, Shares, catches, descendants, first_that_catch, inner_ranks, is_first_here, largest_other, lent_bytes,
    place_of,
};

use spec::contract::Machine;

/// Bytes of shared memory that this node has left now ([`Machine::memfd_room_bytes`]); `None` where `/proc` does not say.
pub fn memfd_room() -> Option<u64> {
    let machine = Probe::default().machine();
    let known = machine.memory_total_bytes > 0 || machine.cgroup_room_bytes.is_some();
    known.then(|| machine.memfd_room_bytes())
}

/// Looks at this machine. Takes milliseconds; loads NVML where a driver is present, never CUDA.
pub fn probe() -> Machine {
    let mut machine = Probe::default().machine();
    let found = gpu::probe(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref());
    machine.gpus = found.gpus;
    machine.gpu_note = found.note;
    machine
}
