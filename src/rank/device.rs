//! A rank's device: the one that the plan gives it, its streams, and a line about it.

use super::RankError;
use crate::comm::RankEnv;
use crate::report::memory::MemorySnapshot;
use crate::torch::device::{self, Stream, StreamGuard};
use crate::train::{DeviceOptions, TrainError};
use spec::job::Job;
use tch::Device;

/// `rank:step`: this rank makes the gradient of this step (from 0) infinite. Tests of the loss scale set it.
const OVERFLOW: &str = "HEADROOM_TEST_OVERFLOW";
/// `rank:step`: this rank's memory runs out in this step (from 0), once. Tests of repeating set it.
const SHORT: &str = "HEADROOM_TEST_OUT_OF_MEMORY";
/// `1`: steps keep their numbers on the device on a CPU too. Tests set it.
const ON_DEVICE: &str = "HEADROOM_TEST_ON_DEVICE";

/// The device that the plan gives this rank, made ready: libtorch's CUDA half loaded, the device chosen. To be called
/// before any tensor is made.
///
/// # Errors
/// The CUDA libraries are not there, or fewer devices than the plan counts on.
pub fn prepare(job: &Job, place: &RankEnv) -> Result<Device, RankError> {
    let topology = &job.plan.topology;
    if topology.device != spec::contract::Device::Cuda {
        return Ok(Device::Cpu);
    }
    device::load_cuda().map_err(RankError::Device)?;
    let index = topology.devices.get(place.local_rank).map_or(place.local_rank, |&index| index as usize);
    let count = device::device_count().map_err(TrainError::from)?;
    let index = index_of(index, count, place.local_world_size);
    if index >= count {
        return Err(RankError::NoDevice { rank: place.rank, index, count });
    }
    device::set_device(index).map_err(TrainError::from)?;
    Ok(Device::Cuda(index))
}

/// The index of this rank's device among those that it sees. Some launchers show each rank its own device alone (SLURM's
/// `--gpus-per-task=1`): that is number 0 for all of them.
fn index_of(planned: usize, visible: usize, local_ranks: usize) -> usize {
    if visible == 1 && local_ranks > 1 { 0 } else { planned }
}

/// A stream of this rank's own for as long as the guard lives: a CUDA graph cannot be recorded on the default one.
pub fn own_stream(on: Device) -> Result<Option<StreamGuard>, RankError> {
    let Device::Cuda(index) = on else { return Ok(None) };
    let enter = || Stream::new(index, false)?.enter();
    Ok(Some(enter().map_err(TrainError::from)?))
}

/// User's setting of libtorch's device allocator, such as `max_split_size_mb:128`.
pub fn allocator() -> Option<String> {
    std::env::var("PYTORCH_CUDA_ALLOC_CONF").or_else(|_| std::env::var("PYTORCH_ALLOC_CONF")).ok()
}

/// Describes the device and the user's setting of its allocator in one line.
pub fn told(on: Device, allocator: Option<&str>) -> String {
    let allocator = allocator.map(|conf| format!(", PYTORCH_CUDA_ALLOC_CONF={conf}")).unwrap_or_default();
    let Device::Cuda(index) = on else {
        return if allocator.is_empty() { "device: cpu".into() } else { format!("device: cpu{allocator} (no effect)") };
    };
    let memory = device::device_memory(index).map_or_else(
        |error| format!(" ({error})"),
        |(free, total)| format!(", {:.1} of {:.1} GiB free", free as f64 / GIB, total as f64 / GIB),
    );
    format!("device: cuda {index}{memory}{allocator}")
}

const GIB: f64 = (1_u64 << 30) as f64;

/// Fills in the device's memory, as its allocator and the driver report it; nothing on a CPU.
pub fn see_memory(on: Device, now: &mut MemorySnapshot) {
    let Device::Cuda(index) = on else { return };
    let (Ok(stats), Ok((free, total))) = (device::device_stats(index), device::device_memory(index)) else { return };
    now.on_device = true;
    (now.gpu_allocated_bytes, now.gpu_reserved_bytes) = (stats.allocated_bytes, stats.reserved_bytes);
    (now.gpu_peak_bytes, now.gpu_device_allocs) = (stats.peak_allocated_bytes, stats.device_allocs);
    (now.gpu_used_bytes, now.gpu_total_bytes) = (total.saturating_sub(free), total);
}

/// Options that tests set for this rank's steps.
pub fn options(rank: usize) -> DeviceOptions {
    let named = |name| std::env::var(name).ok();
    let at = |name| {
        named(name).and_then(|text| {
            let (who, step) = text.split_once(':')?;
            (who.parse() == Ok(rank)).then(|| step.parse().ok()).flatten()
        })
    };
    DeviceOptions {
        always: named(ON_DEVICE).is_some_and(|value| value == "1"),
        overflow_at: at(OVERFLOW),
        short_at: at(SHORT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_sees_its_own_device_alone_takes_it() {
        assert_eq!(
            [(0, 1, 4), (3, 1, 4), (3, 4, 4), (0, 1, 1), (5, 4, 8)].map(|(p, v, l)| index_of(p, v, l)),
            [0, 0, 3, 0, 5]
        );
    }
}
