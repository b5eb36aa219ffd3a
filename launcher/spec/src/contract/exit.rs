//! Exit codes of `launch` and `rank`: one table, which `launch help exit-codes` prints.

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal;)*) => {
        $($(#[doc = $doc])+ pub const $name: u8 = $code;)*

        /// Every code with its meaning.
        pub const TABLE: &[(u8, &str)] = &[$(($code, concat!($($doc),+))),*];
    };
}

codes! {
    /// Success.
    OK = 0;
    /// A bug: an error that no other code describes.
    INTERNAL = 1;
    /// Command line or config: unknown key, wrong type, unknown name.
    USAGE = 2;
    /// The run does not fit this machine: the memory plan, a limit (`ulimit`) or a system call that is refused; or memory ran out
    /// with micro-batches of one sample.
    PLAN = 3;
    /// Data set: missing, unreadable, malformed.
    DATA = 4;
    /// Checkpoint: cannot be written, corrupt, of another model.
    CHECKPOINT = 5;
    /// Ranks could not meet, or a collective failed or timed out.
    COMM = 6;
    /// The loss became NaN or infinite.
    NONFINITE = 7;
    /// A device is missing (`--strict`) or failed.
    DEVICE = 8;
    /// Stopped because another rank failed; never the launcher's own code while the cause is known.
    PEER = 9;
    /// The user's own code raised an exception: in the model, the data set, a transform or a metric of task `python`.
    USER = 10;
    /// Stopped on request (signal) after a checkpoint: run again with `--resume auto`. A pass over data (`launch predict`) keeps
    /// what is whole: run the same command again.
    STOPPED = 75;
    /// Stopped on request (signal) before the first step of this start: nothing was trained, earlier checkpoints stay.
    UNSTARTED = 76;
    /// `128 + n`: ended by signal n.
    SIGNAL_BASE = 128;
}
