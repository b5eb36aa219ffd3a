//! Keys of the section `python`.

use crate::config::Range::{AtLeast, Filled};
use crate::config::{Kind, Values};
use crate::{choices, keys};
use std::path::PathBuf;

keys! {
    /// Task `python`: a PyTorch model and data sets as they are, trained in the user's interpreter.
    #[serde(default, deny_unknown_fields)]
    pub struct PythonConfig in "python." {
        /// Function that gives model and data sets: `module:function`.
        build: String = String::new();
        /// Arguments of that function, by name.
        args: Values = Values::default();
        /// Python that has PyTorch. Null: `python3` of PATH, which is that of an active environment.
        interpreter: Option<PathBuf> = None;
        /// Folders in which modules are looked for first.
        path: Vec<PathBuf> = vec![".".into()];
        /// Processes per rank that call `dataset[i]`. Null: one per loader thread.
        workers: Option<usize> = None, range = AtLeast(1.0);
        /// Most bytes of a sample where a `collate` takes samples of different sizes. Null: twice the longest of 32 samples.
        sample_bytes: Option<u64> = None, kind = Kind::Optional(&Kind::Bytes), unit = "bytes";
        /// Function that makes an optimizer of `torch.optim` for the model, or a class of optimizers: `module:factory`. Takes the
        /// place of `train.optimizer`; the schedule of `train.learning_rate` moves its rates. Null: Headroom's.
        optimizer: Option<String> = None, range = Filled;
        /// Arguments of that function or class, by name.
        optimizer_args: Values = Values::default();
        /// Hand the model to `torch.compile`.
        compile: bool = false;
        /// How ranks come to be.
        start: PythonStart = PythonStart::Fork;
    }
}

choices! {
    /// Start of ranks in an interpreter.
    pub enum PythonStart {
        /// One process imports PyTorch and the user's module, and forks all ranks of the node.
        Fork = "fork",
        /// Each rank imports for itself.
        Spawn = "spawn",
    }
}
