//! The example task of `src/task`'s rustdoc, trained through the real trainer.

use crate::minimal_task::Line;
use crate::support::folder;
use headroom::comm::Solo;
use headroom::data::DataError;
use headroom::task::{Task, Team};
use headroom::train::checkpoint::{Checkpointer, Facts};
use headroom::train::{Controls, DeviceOptions, Fit, Observer, Status};
use spec::config::{Config, OptimizerKind, SchedulerKind};
use spec::contract::{MetricsRecord, Progress, Relieved};
use spec::plan::{BatchPlan, LoaderPlan, Plan};
use std::sync::Arc;
use tch::{Device, nn};

/// Observer that keeps all reports.
#[derive(Default)]
struct Told {
    lines: Vec<String>,
    records: usize,
    validations: usize,
}

impl Observer for Told {
    fn phase(&mut self, _: spec::contract::Phase, _: u64) {}
    fn step(&mut self, _: &Progress) {}
    fn record(&mut self, _: &MetricsRecord) {
        self.records += 1;
    }
    fn validated(
        &mut self,
        _: u64,
        values: &std::collections::BTreeMap<String, f64>,
        _: Option<Result<Vec<u8>, String>>,
    ) {
        assert!(values.contains_key("val.loss"), "{values:?}");
        self.validations += 1;
    }
    fn line(&mut self, text: String) {
        self.lines.push(text);
    }
    fn uss_bytes(&mut self) -> u64 {
        0
    }
    fn relieved(&mut self, _: Relieved) {}
}

fn config() -> Config {
    let mut config = Config { task: "line".into(), ..Config::default() };
    config.train.num_epochs = 5;
    config.train.learning_rate = 0.2;
    config.train.optimizer = OptimizerKind::Sgd;
    config.train.scheduler = SchedulerKind::None;
    (config.train.warmup_epochs, config.train.weight_decay) = (0.0, 0.0);
    config
}

#[test]
fn the_minimal_task_of_the_readme_learns_its_line() {
    let (folder, config) = (folder(), config());
    let gather = |bytes: &[u8]| Ok::<_, DataError>(vec![bytes.to_vec()]);
    let team = Team { rank: 0, world_size: 1, gather: &gather, cache: None, kept: None, stages: Default::default() };
    let datasets = Line.open(&config, &team, folder.path()).unwrap();
    tch::manual_seed(1);
    let vs = nn::VarStore::new(Device::Cpu);
    let model = Line.model(&config, &datasets, &vs.root()).unwrap();
    let plan = Plan {
        batch: BatchPlan { global_batch: 16, micro_batch: 8, micro_steps: 2, val_batch: 10 },
        loader: LoaderPlan { threads: 1, slots: 3, chunk_cache_bytes: 0 },
        ..Plan::default()
    };
    let checkpoints = folder.path().join("checkpoints");
    let facts = Facts { model: "line".into(), global_batch: 16, seed: config.seed, world_size: 1 };
    let mut params: Vec<_> = vs.variables().into_iter().collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    let fit = Fit {
        config: &config,
        plan: &plan,
        device: Device::Cpu,
        collective: Arc::new(Solo::new(Device::Cpu)),
        datasets: &datasets,
        model: model.as_ref(),
        params,
        buffers: Vec::new(),
        groups: Vec::new(),
        metrics: Line.metrics(&config, &datasets).unwrap(),
        gallery: Line.gallery(&config, &datasets),
        facts,
        checkpoints: Some(Checkpointer::open(&checkpoints, 2).unwrap()),
        checkpoint_dir: &checkpoints,
        controls: Arc::new(Controls::default()),
        device_options: DeviceOptions::default(),
    };
    let mut told = Told::default();
    let finished = fit.run(None, &mut told).unwrap();
    assert_eq!((finished.status, finished.steps), (Status::Finished, 5 * 50));
    assert!(finished.metrics["test.loss"] < 1e-3, "{:?}", finished.metrics);
    assert_eq!((told.validations, told.records), (5, 25));
    let weights = vs.variables();
    assert!((weights["weight"].double_value(&[0, 0]) - 3.0).abs() < 0.05);
    assert!((weights["bias"].double_value(&[0]) + 1.0).abs() < 0.05);
    assert!(checkpoints.read_dir().unwrap().count() >= 1);
}

/// The names that a config may have are those that a rank trains, in the same order.
#[test]
fn launcher_and_rank_know_the_same_tasks() {
    let names: Vec<&str> = headroom::task::all().iter().map(|task| task.name()).collect();
    assert_eq!(names, spec::task::names());
}
