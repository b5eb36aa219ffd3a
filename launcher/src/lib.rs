//! Headroom's launcher: it reads a config, probes the machine, plans every byte of the node's memory,
//! starts one rank per device and watches over them. It links no libtorch, CUDA or HDF5, so that it starts in
//! milliseconds and can never create a CUDA context.
//!
//! ```text
//! spec: config ──► plan ──► supervise ──► ranks (package `headroom`)
//!    host: machine ──┘       │ │   │
//!                      console │ cache
//!                            watch  (memory: seen, warned of, given back, explained)
//! ```
//!
//! | room | owns | may not touch |
//! |---|---|---|
//! | [`watch`] | memory sampling, thresholds, response to pressure | training |
//! | [`supervise`] | children, process groups, signals, first failure, restarts, log lines | tensors, YAML |
//! | [`console`] | lines, tables and the progress bar of a training run | decisions |
//! | [`run_dir`] | the run's folder: names, resume, `job.json`, summary | training |
//! | [`cli`] | the command line | work |
//! | [`command`] | the verbs: wiring and exit codes | algorithms |
//! | [`monitor`] | the live view of a run or a program | training |
//! | [`advise`] | `analyze`, `doctor`, `recommend`: answers read from records | training |
//! | [`page`] | the HTML page of a run, or of runs beside each other | training |
//! | [`plots`] | figures of a run or of a monitor's log, as PNG | training |
//! | [`track`] | a run's records in the forms of other tools: TensorBoard, MLflow, W&B, CSV | training |
//! | [`smart`] | training in legs until targets are met | tensors |
//!
//! Architecture invariant: `supervise` knows neither tensors nor YAML;
//! `watch` reaches ranks and page cache through `supervise` alone.

pub mod advise;
pub mod cli;
pub mod command;
pub mod console;
pub mod monitor;
pub mod page;
pub mod plots;
pub mod run_dir;
pub mod smart;
pub mod supervise;
pub mod track;
pub mod watch;
