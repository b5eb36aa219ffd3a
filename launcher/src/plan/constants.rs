//! Every number of the plan that is neither read from the machine nor from the config, with its source.

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const TIB: u64 = 1 << 40;

/// Whether ranks can train on CUDA devices; if false, `auto` and `cuda` become CPU ranks, with a note.
pub const CUDA_TRAINS: bool = true;

/// The launcher's resident memory. Source: the design's bound of 15 MB, rounded up.
pub(super) const LAUNCHER_BYTES: u64 = 16 * MIB;

/// libtorch's pages, allocator and thread stacks of one CPU rank beside its model and data. Its file-backed part is
/// shared by the ranks of a node, so this counts too much rather than too little. Source: `launch analyze` of the shipped
/// configs with one and two ranks: 137 to 158 MiB before the first step, model state left out, of which 75 to 79 MiB are
/// pages of files.
pub(super) const RUNTIME_CPU_BYTES: u64 = 160 * MIB;

/// The same for a CUDA rank on the host: the driver's context and kernels come on top. Source: an assumption.
pub(super) const RUNTIME_CUDA_HOST_BYTES: u64 = 1536 * MIB;

/// CUDA context, cuBLAS and cuDNN workspaces on the device. Source: an assumption.
pub(super) const RUNTIME_CUDA_DEVICE_BYTES: u64 = 768 * MIB;

/// Raw and decoded bytes of the chunk that a loader thread has in hand: sessions come in chunks of some 2,000 rows of
/// 232 B (453 KiB); four times that, twice. Source: the format's sample files; larger chunks are read all the same.
pub(super) const DECODE_SCRATCH_BYTES: u64 = 4 * MIB;

/// Peak of a step over [`super::emg::activation_scalars`], as a fraction: the allocator keeps pieces. Source: growth of
/// the heap over 4 to 20 steps, per sample, from two batch sizes each: 2.37 MiB for `default` (formula 2.36), 3.7 to 3.9 for
/// `high_performance` (3.74), 0.45 to 0.75 for `quick_demo` (0.59).
pub(super) const ACTIVATION_FACTOR: (u64, u64) = (11, 10);

/// Decoded recordings over files on disk. Source: full data set, 575 GiB of rows in 431 GiB of files (1.34), rounded up.
pub(super) const DECODED_OVER_DISK: u64 = 2;

/// Safety margin: this share of the budget (1 in 50), within the two bounds below. Source: a choice.
pub(super) const MARGIN_DIVISOR: u64 = 50;
pub(super) const MARGIN_MIN_BYTES: u64 = 32 * MIB;
pub(super) const MARGIN_MAX_BYTES: u64 = 512 * MIB;

/// Automatic loader threads per rank. Source: the guides' "4 per GPU".
pub(super) const LOADER_THREADS_PER_RANK: usize = 4;

/// Slots beyond `prefetch_factor × threads`: one in use by the step, one being filled.
pub(super) const EXTRA_SLOTS: u64 = 2;

/// Each field of a slot starts on a multiple of this, a cache line. Source: the loader.
pub(super) const FIELD_ALIGN_BYTES: u64 = 64;

/// The page cache is a whole number of these.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Bytes of an f32.
pub(super) const F32_BYTES: u64 = 4;

/// Peak of a step over the activations of [`super::deblur`]'s formula, as a fraction: backward holds gradients beside
/// them. Source: measured 1.29 to 1.55 GiB of PSS per CPU rank where the plan had 2.34 GiB (the CPU profile of
/// configs/baseline.yaml with 4 blocks per stage).
pub(super) const VIDEO_ACTIVATION_FACTOR: (u64, u64) = (3, 2);

/// Bytes of an entry of the page cache, about: a page of rows without chunks. Chunks are of like size; no file is opened here.
pub const ENTRY_BYTES: u64 = 512 << 10;
/// `block`: windows of pages that the cache should hold, for those of all loader threads and ranks and of batches ahead.
pub const WINDOWS_HELD: u64 = 4;
