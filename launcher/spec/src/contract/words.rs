//! Facts that are one word each: in JSON, on the command line and on screens the same word.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Declares an enum and the word of each variant.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$of])* #[serde(rename = $text)] $variant,)+ }

        impl $name {
            /// The word in records and on screens.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.text())
            }
        }
    };
}

words! {
    /// Level of memory use, in the guides' colours: 🟡 note, 🟠 warning, 🔴 critical.
    Level {
        #[default]
        Normal = "normal",
        Note = "note",
        Warning = "warning",
        Critical = "critical",
    }
}

words! {
    /// Phase of a rank.
    Phase {
        /// From the start of the process to the first step: files are opened, the model is built.
        Start = "start",
        /// The first step of the process, in which libraries take their memory.
        FirstStep = "first step",
        Train = "train",
        Val = "val",
        Checkpoint = "checkpoint",
        Test = "test",
        /// A pass without training.
        Predict = "predict",
        /// A phase that this version does not know, or none.
        #[default]
        #[serde(other)]
        Other = "other",
    }
}

words! {
    /// How a run ended.
    RunStatus {
        Finished = "finished",
        EarlyStopped = "early_stopped",
        /// Stopped by a signal or by the watch, after a checkpoint.
        Stopped = "stopped",
        Failed = "failed",
        #[default]
        #[serde(other)]
        Unknown = "unknown",
    }
}

words! {
    /// Kind of device that ranks train on.
    Device {
        #[default]
        Cpu = "cpu",
        Cuda = "cuda",
    }
}

words! {
    /// How the node's page cache keeps entries in a run.
    CacheMode {
        /// There is no page cache.
        #[default]
        Off = "off",
        /// Fill once, never evict.
        Pin = "pin",
        /// Evict what was used longest ago.
        Lru = "lru",
        /// Evict what is needed farthest in the future.
        NextUse = "next_use",
    }
}

words! {
    /// A line of the memory budget, of a node or of a device.
    LineId {
        Reserve = "reserve",
        Launcher = "launcher",
        Libraries = "libraries",
        Runtime = "runtime",
        Interpreter = "interpreter",
        CudaRuntime = "CUDA runtime",
        ModelState = "model state",
        Activations = "activations",
        /// Pool of a step that is recorded as a CUDA graph.
        RecordedStep = "recorded step",
        Heap = "heap",
        StagingSlots = "staging slots",
        ValidationSlots = "validation slots",
        DecodeScratch = "decode scratch",
        ChunkCache = "chunk cache",
        Collectives = "collectives",
        CheckpointStaging = "checkpoint staging",
        PageCache = "page cache",
        /// A user's own program, as its last run was measured.
        Program = "program",
        /// A line of a plan of another version.
        #[default]
        #[serde(other)]
        Other = "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: serde::de::DeserializeOwned>(word: &str) -> T {
        serde_json::from_value(word.into()).unwrap()
    }

    #[test]
    fn json_and_screens_have_the_same_word() {
        let line = LineId::CheckpointStaging;
        assert_eq!(serde_json::to_value(line).unwrap(), "checkpoint staging");
        assert_eq!(format!("{line:<20}|"), "checkpoint staging  |");
        assert_eq!(read::<LineId>("checkpoint staging"), line);
        assert_eq!(serde_json::to_value(RunStatus::EarlyStopped).unwrap(), "early_stopped");
        assert_eq!(
            (read::<Phase>("first step"), read::<CacheMode>("next_use")),
            (Phase::FirstStep, CacheMode::NextUse)
        );
    }

    #[test]
    fn words_of_other_versions_are_kept_apart_where_a_record_can_do_without_them() {
        assert_eq!((read::<Phase>("warm-up"), read::<LineId>("workspace")), (Phase::Other, LineId::Other));
        assert_eq!(read::<RunStatus>("paused"), RunStatus::Unknown);
        assert!(serde_json::from_value::<Device>("tpu".into()).is_err());
    }
}
