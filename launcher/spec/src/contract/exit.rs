//! Exit codes of `launch` and `rank`: one table, which `launch help exit-codes` prints.

pub const OK: u8 = 0;
/// A bug: an error that no other code describes.
pub const INTERNAL: u8 = 1;
/// Command line or config: unknown key, wrong type, unknown name.
pub const USAGE: u8 = 2;
/// The run does not fit this machine: the memory plan, a limit (`ulimit`) or a system call that is refused; or memory ran out
/// with micro-batches of one sample.
pub const PLAN: u8 = 3;
/// Data set: missing, unreadable, malformed.
pub const DATA: u8 = 4;
/// Checkpoint: cannot be written, corrupt, of another model.
pub const CHECKPOINT: u8 = 5;
/// Ranks could not meet, or a collective failed or timed out.
pub const COMM: u8 = 6;
/// The loss became NaN or infinite.
pub const NONFINITE: u8 = 7;
/// A device is missing (`--strict`) or failed.
pub const DEVICE: u8 = 8;
/// Stopped because another rank failed; never the launcher's own code while the cause is known.
pub const PEER: u8 = 9;
/// Stopped on request (signal) after a checkpoint: run again with `--resume auto`.
pub const STOPPED: u8 = 75;
/// Stopped on request (signal) before the first step of this start: nothing was trained, earlier checkpoints stay.
pub const UNSTARTED: u8 = 76;
/// `128 + n`: ended by signal n.
pub const SIGNAL_BASE: u8 = 128;
