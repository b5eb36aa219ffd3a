//! Headroom's launcher: it reads a config, probes the machine, plans every byte of the node's memory,
//! starts one rank per device and watches over them. It links no libtorch, CUDA or HDF5, so that it starts in
//! milliseconds and can never create a CUDA context.
//!
//! ```text
//! config ──► plan ──► supervise ──► ranks (package `headroom`)
//!    machine ──┘       │ │   │
//!                console │ cache  contract  (all that crosses processes)
//!                      watch  (memory: seen, warned of, given back, explained)
//!                    journal  (append-only files that outlast a full disk), logging
//! ```
//!
//! Architecture invariant: `plan` does no I/O; `config` reads neither environment, clock, /proc nor GPU; `machine`
//! takes no decisions; `supervise` knows neither tensors nor YAML; `contract` has no behaviour;
//! `cache` touches no sample bytes; `watch` reaches ranks and page cache through `supervise` alone.

pub mod advise;
pub mod cache;
pub mod cli;
pub mod command;
pub mod config;
pub mod console;
pub mod contract;
pub mod journal;
pub mod logging;
pub mod machine;
pub mod monitor;
pub mod plan;
pub mod run_dir;
pub mod smart;
pub mod supervise;
pub mod watch;
