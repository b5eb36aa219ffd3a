//! Sizes of a task's model and data, as `rank describe` measures them and a plan reads them. Bytes throughout.

use super::CacheMode;
use serde::{Deserialize, Serialize};

/// Everything that a plan knows of a task.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    pub model: ModelSizes,
    pub data: DataSizes,
    /// The file of libtorch that was loaded. A kept measurement is void once this file has changed.
    pub library: Option<FileStamp>,
}

/// Which version of a file was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileStamp {
    pub path: String,
    pub bytes: u64,
    /// Time of the last change, nanoseconds since the Unix epoch.
    pub modified_ns: u64,
}

/// Sizes of a model and of its forward and backward passes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelSizes {
    /// `cpu`, or the name of the device that was measured on.
    pub device: String,
    /// Compute threads during the measurement.
    pub threads: u64,
    /// Scalars that are trained.
    pub parameters: u64,
    /// Bytes of buffers, and of what else a step depends on: all that is neither trained nor a sample.
    pub buffer_bytes: u64,
    pub train: Passes,
    pub val: Passes,
    /// Pages of libtorch's and the rank's files that a rank maps.
    pub library_bytes: u64,
    /// Own memory of the process before its first pass, without the model.
    pub runtime_bytes: u64,
    /// The part of `runtime_bytes` that the user's interpreter has with his modules, before it is a rank. 0: ranks are a
    /// program.
    pub interpreter_bytes: u64,
    /// The optimizer that the task brings; `None`: the trainer's, whose sizes follow from the config.
    pub optimizer: Option<OptimizerSizes>,
    /// Memory that the device's driver and libraries take beside tensors.
    pub gpu: Option<GpuSizes>,
    /// Bytes of a real sample over those of the samples that were measured. 1 where real samples were measured.
    pub enlarged: f64,
    /// Why passes were measured with smaller or fewer samples than wanted, or not at all; `None` where all were.
    pub short: Option<String>,
}

/// Sizes of a task's own optimizer, on the rank's device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerSizes {
    /// State after a step.
    pub state_bytes: u64,
    /// Tensors that a step holds besides.
    pub step_bytes: u64,
}

/// Passes of one kind: training steps, or evaluation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Passes {
    /// Bytes of each field of one sample, as a batch slot holds it. Real samples, whatever was measured.
    pub fields: Vec<u64>,
    /// Measured passes, by rising number of samples. Empty if none was measured.
    pub seen: Vec<Pass>,
}

/// Peak of one forward pass, with the backward pass in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    pub samples: u64,
    /// Tensors at once, on the rank's device, without parameters, gradients and optimizer state.
    pub tensor_bytes: u64,
    /// Memory that the heap, or the device's allocator, took beside these tensors.
    pub beside_bytes: u64,
}

/// Memory that CUDA takes of a rank beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuSizes {
    /// Context and workspaces on the device.
    pub context_bytes: u64,
    /// Own memory of the process on the host with a context, without the model.
    pub host_bytes: u64,
}

/// Sizes of a data set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSizes {
    /// Bytes of the smallest usual entry of a page cache that holds all, and of one that is short of room.
    pub entry_bytes: [u64; 2],
    /// Bytes that a loader thread has in hand while it decodes.
    pub scratch_bytes: u64,
    /// Bytes of a decoded chunk that serves many samples, about. Such chunks are kept by ranks and by the page cache.
    /// `None`: each read serves one sample.
    pub chunk_bytes: Option<u64>,
    /// Bytes of all entries that the page cache can use; 0: there is no data set.
    pub useful_bytes: u64,
    /// Where `useful_bytes` comes from, in words and factors.
    pub useful: String,
    /// `useful_bytes` is exact: there are no entries beyond it.
    pub useful_is_exact: bool,
    /// The policy that `data.cache: auto` stands for.
    pub auto_policy: CacheMode,
    /// Facts on the data set, one sentence each, for the head of the plan.
    pub facts: Vec<String>,
}
