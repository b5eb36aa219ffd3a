//! Cost of a pass, and its limits.

use crate::rank::RankError;
use crate::report::memory::{MemorySnapshot, forget_peak};
use crate::torch::{device, most_tensor_bytes, release_caches};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use spec::contract::Pass;
use std::cell::Cell;
use std::time::{Duration, Instant};
use tch::Device;

/// Seconds of computing and bytes above which more than two samples are too dear.
const DEAR_S: f64 = 1.2;
/// Seconds of computing above which one sample is measured alone, and by its first pass.
const SLOW_S: f64 = 3.0;
const DEAR_BYTES: f64 = (256_u64 << 20) as f64;
/// Share of the limits that a pass is begun with: what it takes is known from a smaller one alone.
const CAUTION: f64 = 0.8;

/// When the answer must be complete, and what passes may take.
pub struct Limits {
    end: Instant,
    bytes: u64,
}

impl Limits {
    /// From here on allocations beyond the limit fail: an error of the allocator, before the kernel kills anybody.
    pub fn new(began: Instant, seconds: f64, bytes: u64, on: Device) -> Result<Self, RankError> {
        let after = Duration::try_from_secs_f64(seconds)
            .map_err(|e| RankError::Usage(format!("rank describe: {seconds} s: {e}")))?;
        if on == Device::Cpu {
            let data = procfs::process::Process::myself().and_then(|own| own.status()).ok().and_then(|s| s.vmdata);
            let most = data.map(|kib| (kib << 10).saturating_add(bytes));
            let now = getrlimit(Resource::Data);
            let wanted = most.filter(|most| now.current.is_none_or(|current| *most < current));
            if let Some(current) = wanted {
                // A refusal leaves the process without this limit; the launcher's own remains.
                let _ = setrlimit(Resource::Data, Rlimit { current: Some(current), maximum: now.maximum });
            }
        }
        Ok(Self { end: began + after, bytes })
    }

    /// The words where an allocation failed.
    pub fn ran_out(&self) -> String {
        format!("memory ran out within the limit of {} MiB", self.bytes >> 20)
    }

    /// Why a pass that will take so much is not made; `None`: it may be made.
    pub fn forbid(&self, bytes: f64, seconds: f64) -> Option<String> {
        let left = self.end.saturating_duration_since(Instant::now()).as_secs_f64();
        if bytes > self.bytes as f64 * CAUTION {
            let (needs, limit) = (bytes / f64::from(1 << 20), self.bytes >> 20);
            return Some(format!("not measured, since about {needs:.0} MiB exceed the limit of {limit} MiB,"));
        }
        (seconds > left * CAUTION).then(|| format!("not measured, since it would take more than {left:.0} s"))
    }

    /// True if a pass that is wanted for accuracy alone costs too much; `seconds` of all threads together, so that a
    /// busy machine measures the same passes.
    pub fn is_dear(&self, bytes: f64, seconds: f64) -> bool {
        bytes > DEAR_BYTES || seconds > DEAR_S
    }
}

/// True if passes of this many seconds, of all threads together, are made once and for one sample only.
pub fn is_slow(seconds: f64) -> bool {
    seconds > SLOW_S
}

/// Seconds that all threads of this process have computed.
pub fn computed_s() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// Own memory of this process now, without tensors.
pub fn own_bytes() -> u64 {
    // The second call counts from the first one on: what is there now.
    most_tensor_bytes();
    let tensors = most_tensor_bytes();
    let now = MemorySnapshot::take().unwrap_or_default();
    now.anon_bytes.saturating_sub(tensors)
}

/// Measures one pass after the other.
pub struct Gauge {
    on: Device,
    /// Weights, gradients and buffers.
    model_bytes: u64,
    runtime_bytes: u64,
    /// Most memory that making code took.
    code_bytes: Cell<u64>,
    /// See [`crate::task::Model::compiles`].
    compiles: bool,
    /// Most memory of a pass beside its tensors.
    most_beside: Cell<u64>,
}

impl Gauge {
    /// Begins to measure. Must be called before the first pass, with a model in place.
    pub fn start(on: Device, model_bytes: u64, compiles: bool) -> Self {
        release_caches();
        Self {
            on,
            model_bytes,
            runtime_bytes: own_bytes(),
            code_bytes: Cell::new(0),
            compiles,
            most_beside: Cell::new(0),
        }
    }

    /// Own memory of the process before its first pass, without the model.
    pub fn runtime_bytes(&self) -> u64 {
        self.runtime_bytes
    }

    /// Most memory that making code took, which passes do not count as theirs.
    pub fn code_bytes(&self) -> u64 {
        self.code_bytes.get()
    }

    /// Makes passes of a new shape with `pass` where they make code, whose memory is none of the samples'.
    pub fn settle<E>(&self, pass: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if !self.compiles {
            return Ok(());
        }
        self.most_beside.set(0);
        pass()?;
        self.code_bytes.set(self.code_bytes() + self.most_beside.get());
        Ok(())
    }

    /// A pass begins. `fresh`: nothing that is free is kept from the one before.
    pub fn begin(&self, fresh: bool) {
        match self.on {
            Device::Cuda(index) => {
                if fresh {
                    let _ = device::empty_cache();
                }
                let _ = device::reset_peak(index);
            }
            _ => {
                if fresh {
                    release_caches();
                }
                forget_peak();
                most_tensor_bytes();
            }
        }
    }

    /// The pass is over.
    pub fn end(&self, samples: u64) -> Pass {
        let (tensors, all) = match self.on {
            Device::Cuda(index) => {
                let stats = device::device_stats(index).unwrap_or_default();
                (stats.peak_allocated_bytes, stats.peak_reserved_bytes)
            }
            _ => {
                let tensors = most_tensor_bytes();
                let now = MemorySnapshot::take().unwrap_or_default();
                (tensors, now.anon_peak_bytes.saturating_sub(self.runtime_bytes + self.code_bytes()))
            }
        };
        let tensor_bytes = tensors.saturating_sub(self.model_bytes);
        let beside_bytes = all.saturating_sub(tensors);
        self.most_beside.set(beside_bytes.max(self.most_beside.get()));
        Pass { samples, tensor_bytes, beside_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_passes_make_is_counted_apart_from_their_samples() {
        let none: Result<(), &str> = Gauge::start(Device::Cpu, 0, false).settle(|| Err("a pass that nobody needs"));
        let gauge = Gauge::start(Device::Cpu, 0, true);
        gauge.most_beside.set(100);
        for bytes in [5, 7] {
            let pass = || {
                assert_eq!(gauge.most_beside.get(), 0, "of this pass alone");
                gauge.most_beside.set(bytes);
                Ok::<(), ()>(())
            };
            gauge.settle(pass).unwrap();
        }
        assert_eq!((none, gauge.code_bytes()), (Ok(()), 12));
    }
}
