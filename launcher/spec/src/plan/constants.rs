//! Every number of the plan that is neither read from the machine nor from the config, with its source.

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const TIB: u64 = 1 << 40;

/// Whether ranks can train on CUDA devices; if false, `auto` and `cuda` become CPU ranks, with a note.
pub const CUDA_TRAINS: bool = true;

/// The launcher's resident memory, whatever it supervises: program, heap, threads. Source: PSS of 3.9 to 4.4 MiB with one
/// to three ranks.
pub(super) const LAUNCHER_BYTES: u64 = 4352 * KIB;
/// What supervising a rank adds: sockets' buffers, its last lines, its samples. Source: as above.
pub(super) const LAUNCHER_PER_RANK_BYTES: u64 = 16 * KIB;

/// Pages of libtorch's and the rank's own files that CPU ranks map: the same in all, so once per node. The kernel maps
/// as many neighbours of a page as its file cache holds, and takes pages back when memory is short: a bound. Source: 174 to
/// 177 MiB for the EMG model with all of the file cached, 75 to 79 MiB with a part of it; 200 to 205 MiB for the VRT.
pub(super) const LIBRARY_BYTES: u64 = 184 * MIB;
pub(super) const VIDEO_LIBRARY_BYTES: u64 = 212 * MIB;

/// One CPU rank's part of the memory that ranks meet in: a stage of 1 MiB and headers. Source: `comm::shm`.
pub(super) const MEETING_BYTES: u64 = MIB + 40 * KIB;

/// What the directory of the page cache keeps of an entry at the most. Source: its table of 97 B per place is filled to
/// between 7/16 and 7/8 and doubles beside the old one; 48 B for holders, 32 B of the policy. A test weighs it.
pub const DIRECTORY_ENTRY_BYTES: u64 = 448;

/// Own memory of a CPU rank before its first step, without model and slots: relocated tables of libtorch, registrations of
/// its operators, heap of the rank itself. Source: 59 to 63 MiB over the shipped configs.
pub(super) const RUNTIME_CPU_BYTES: u64 = 63 * MIB;
/// What each thread adds: the touched part of its stack, and its heap. Source: runs with 1 to 8 loader threads.
pub(super) const THREAD_BYTES: u64 = 256 * KIB;

/// The same for a CUDA rank on the host: the driver's context and kernels come on top. Source: an assumption.
pub(super) const RUNTIME_CUDA_HOST_BYTES: u64 = 1536 * MIB;

/// CUDA context, cuBLAS and cuDNN workspaces on the device. Source: an assumption.
pub(super) const RUNTIME_CUDA_DEVICE_BYTES: u64 = 768 * MIB;

/// Raw and decoded bytes of the chunk that a loader thread has in hand: sessions come in chunks of some 2,000 rows of
/// 232 B (453 KiB); four times that, twice. Source: the format's sample files; larger chunks are read all the same.
pub(super) const DECODE_SCRATCH_BYTES: u64 = 4 * MIB;

/// A rank's heap over the tensors that its formula counts at the peak of a step, as a fraction: freed pieces that fit nothing,
/// and buffers of libraries that grow with the tensors. Source: `scripts/bench plan_truth`, all shipped configs of the task
/// with 1 to 3 ranks.
pub(super) const HEAP_FACTOR: (u64, u64) = (37, 32);
pub(super) const VIDEO_HEAP_FACTOR: (u64, u64) = (27, 20);
/// Whole frames between crops: pieces of a heap that steps have cut up. Source: frames of 96×128 beside crops of 48, 405 to
/// 411 MiB of heap for 139 MiB of live tensors.
pub(super) const VIDEO_VAL_HEAP_FACTOR: (u64, u64) = (14, 5);

/// Device memory of a step over what is live, as a fraction: the allocator keeps pieces. Sources: assumptions.
pub(super) const DEVICE_FACTOR: (u64, u64) = (11, 10);
pub(super) const VIDEO_DEVICE_FACTOR: (u64, u64) = (3, 2);

/// What a step makes of the EMG model's weights, in weights: rows of convolutions, joined matrices of the LSTM, and their
/// gradients, as a fraction. Source: the part of a step's live tensors that does not grow with the batch, 2.5 times the
/// weights for `default` and `high_performance`.
pub(super) const WEIGHT_COPIES: (u64, u64) = (13, 5);

/// What the first steps leave in a CPU rank beside tensors: kernels compiled for their shapes, the graph's nodes, heaps of the
/// loader's and the cache's threads; and what each further compute thread adds. Source: as above; from run to run this part varies by
/// up to 6 MiB, of which the most counts.
pub(super) const STEP_CPU_BYTES: u64 = 8 * MIB;
pub(super) const STEP_CPU_PER_THREAD_BYTES: u64 = 5 * MIB;

/// Decoded recordings over files on disk. Source: full data set, 575 GiB of rows in 431 GiB of files (1.34), rounded up.
pub(super) const DECODED_OVER_DISK: u64 = 2;

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

/// Bytes of an entry of the page cache, about: a page of rows without chunks. Chunks are of like size; no file is opened here.
pub const ENTRY_BYTES: u64 = 512 << 10;
/// `block`: windows of pages that the cache should hold, for those of all loader threads and ranks and of batches ahead.
pub const WINDOWS_HELD: u64 = 4;
