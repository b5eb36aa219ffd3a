//! The one integration binary: modules under `tests/it` start real `launch` and `rank` processes.

#[path = "it/architecture.rs"]
mod architecture;
#[path = "it/around.rs"]
mod around;
#[path = "it/batch.rs"]
mod batch;
#[path = "it/cache.rs"]
mod cache;
#[path = "it/cell.rs"]
mod cell;
#[path = "it/cell_files.rs"]
mod cell_files;
#[path = "it/cell_stages.rs"]
mod cell_stages;
#[path = "it/circles.rs"]
mod circles;
#[path = "it/deblur.rs"]
mod deblur;
#[path = "it/device.rs"]
mod device;
#[path = "it/equal.rs"]
mod equal;
#[path = "it/exits.rs"]
mod exits;
#[path = "it/fake_cuda/mod.rs"]
mod fake_cuda;
#[path = "it/golden.rs"]
mod golden;
#[path = "it/host.rs"]
mod host;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/hostile_hdf5.rs"]
mod hostile_hdf5;
#[path = "it/inherited.rs"]
mod inherited;
#[path = "it/key_names.rs"]
mod key_names;
#[path = "it/keys.rs"]
mod keys;
#[path = "it/lock.rs"]
mod lock;
#[path = "it/many_files.rs"]
mod many_files;
#[path = "it/minimal_task.rs"]
mod minimal_task;
#[path = "it/moments.rs"]
mod moments;
#[path = "it/node_ranks.rs"]
mod node_ranks;
#[path = "it/nodes.rs"]
mod nodes;
#[path = "it/plan_truth.rs"]
mod plan_truth;
#[path = "it/policies.rs"]
mod policies;
#[path = "it/predict.rs"]
mod predict;
#[path = "it/pressure.rs"]
mod pressure;
#[path = "it/program.rs"]
mod program;
#[path = "it/python.rs"]
mod python;
#[path = "it/python_optimizer.rs"]
mod python_optimizer;
#[path = "it/python_task.rs"]
mod python_task;
#[path = "it/readme.rs"]
mod readme;
#[path = "it/relief.rs"]
mod relief;
#[path = "it/resume.rs"]
mod resume;
#[path = "it/resume_split.rs"]
mod resume_split;
#[path = "it/sandbox.rs"]
mod sandbox;
#[path = "it/shard.rs"]
mod shard;
#[path = "benches/simulate.rs"]
mod simulate;
#[path = "it/stops.rs"]
mod stops;
#[path = "it/supervise.rs"]
mod supervise;
#[path = "it/support.rs"]
mod support;
#[path = "it/surroundings.rs"]
mod surroundings;
#[path = "it/tasks.rs"]
mod tasks;
#[path = "it/tools.rs"]
mod tools;
#[path = "it/watch.rs"]
mod watch;
#[path = "it/yolo.rs"]
mod yolo;
#[path = "it/yolo_checklist.rs"]
mod yolo_checklist;
#[path = "it/yolo_files.rs"]
mod yolo_files;
