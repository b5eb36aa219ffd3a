//! Every number of the plan that is neither read from the machine nor from the config, with its source.

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const TIB: u64 = 1 << 40;

/// Pages of an interpreter that a forked rank writes to, and thereby copies: one in so many. Source: 2 of 210 MiB after 50 steps;
/// counts of references reach more of them with time.
pub(super) const FORK_COPIES: u64 = 16;
/// CUDA devices can train. If false, `auto` and `cuda` become CPU ranks, with a note.
pub const CUDA_TRAINS: bool = true;

/// The launcher's resident memory, whatever it supervises: program, heap, threads. Source: PSS of 7.8 to 8.3 MiB in the
/// first second, 3.8 to 4.0 MiB from then on, with one to three ranks.
pub(super) const LAUNCHER_BYTES: u64 = 8448 * KIB;
/// Cost of supervising one rank: socket buffers, its last lines, its samples. Source: as above.
pub(super) const LAUNCHER_PER_RANK_BYTES: u64 = 16 * KIB;

/// Pages of libtorch's and the rank's own files that CPU ranks map, where they were not measured. All ranks map the same
/// pages, so they count once per node. Source: 174 to 205 MiB over the shipped configs with all of the files cached.
pub(super) const LIBRARY_BYTES: u64 = 212 * MIB;

/// One CPU rank's part of the memory that ranks meet in: a stage of 1 MiB and headers. Source: `comm::shm`.
pub(super) const MEETING_BYTES: u64 = MIB + 40 * KIB;

/// Most that the page cache's directory keeps per entry. Source: its table of 97 B per place is filled to between 7/16
/// and 7/8 and doubles beside the old one; 48 B for holders, 32 B of the policy. A test weighs it.
pub const DIRECTORY_ENTRY_BYTES: u64 = 448;

/// Own memory of a CPU rank before its first step, without model and slots: relocated tables of libtorch, registrations of
/// its operators, heap of the rank itself. Source: 59 to 63 MiB over the shipped configs.
pub(super) const RUNTIME_CPU_BYTES: u64 = 63 * MIB;
/// Cost of one thread: the touched part of its stack, and its heap. Source: runs with 1 to 8 loader threads.
pub(super) const THREAD_BYTES: u64 = 256 * KIB;

/// The same for a CUDA rank on the host: the driver's context and kernels come on top. Source: an assumption.
pub(super) const RUNTIME_CUDA_HOST_BYTES: u64 = 1536 * MIB;

/// CUDA context, cuBLAS and cuDNN workspaces on the device. Source: an assumption.
pub(super) const RUNTIME_CUDA_DEVICE_BYTES: u64 = 768 * MIB;

/// Tensors of a run over those of the measured pass with as many samples, as a fraction: what a step makes beside forward
/// and backward. Source: `scripts/bench plan_truth`.
pub(super) const TENSOR_MARGIN: (u64, u64) = (33, 32);

/// Own memory at the peak of training over tensors and heap of the one pass that was measured, as a fraction: further steps cut
/// the heap into more pieces. And the same of evaluation, whose heap holds what training left in it. Source: `scripts/bench
/// plan_truth`, all shipped configs with 1 to 3 ranks.
pub(super) const TRAIN_HEAP: (u64, u64) = (3, 2);
pub(super) const VAL_HEAP: (u64, u64) = (17, 16);

/// Device memory of a step over the tensors that were measured on a CPU, as a fraction: other kernels run there, and the
/// allocator keeps pieces. Source: an assumption.
pub(super) const DEVICE_FACTOR: (u64, u64) = (3, 2);

/// Bytes of tensors of one sample for each byte of its fields, where no pass was measured. Source: an assumption, ten times
/// what the shipped configs need with the samples of their CPU profiles.
pub(super) const ASSUMED_PER_FIELD_BYTE: u64 = 256;

/// Memory that the first steps leave in a CPU rank beside tensors: kernels compiled for their shapes, the graph's
/// nodes, heaps of the loader's and the cache's threads; and the addition of each further compute thread. Source: as
/// above; it varies by up to 6 MiB between runs; the maximum is used.
pub(super) const STEP_CPU_BYTES: u64 = 8 * MIB;
pub(super) const STEP_CPU_PER_THREAD_BYTES: u64 = 5 * MIB;

/// Safety margin: this share of the budget (1 in 50), within the two bounds below. Source: a choice.
pub(super) const MARGIN_DIVISOR: u64 = 50;
pub(super) const MARGIN_MIN_BYTES: u64 = 32 * MIB;
pub(super) const MARGIN_MAX_BYTES: u64 = 512 * MIB;

/// Names and shapes of a small model's tensors in a checkpoint. Source: about 120 B for each tensor, of which
/// small models have more for their size.
pub(super) const STAGING_NAMES_BYTES: u64 = 32 * KIB;

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

/// `block`: windows of pages that the cache should hold, for those of all loader threads and ranks and of batches ahead.
pub const WINDOWS_HELD: u64 = 4;
