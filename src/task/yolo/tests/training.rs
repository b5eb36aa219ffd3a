//! Eight steps of the trainer itself, and equal updates on one, two and three ranks.

use super::golden::{BATCH, CLASSES, Golden, SIDE, far_from, images, numbers, ragged, set_weights};
use crate::comm::shm::create_memfd;
use crate::comm::{Collective, ShmCollective, Solo};
use crate::data::{DataError, Dataset, FieldSpec, ReadRequest, Scratch};
use crate::task::yolo::Yolo;
use crate::task::yolo::data::YoloFacts;
use crate::task::yolo::data::batch::train_fields;
use crate::task::yolo::metrics::YoloMetrics;
use crate::task::{Datasets, ParamInfo, Task};
use crate::train::checkpoint::{self, Checkpointer, Facts};
use crate::train::{Controls, DeviceOptions, Fit, Observer};
use spec::config::Config;
use spec::contract::{MetricsRecord, Phase, Progress, Relieved};
use spec::plan::Plan;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Tensor, nn};

const STEPS: u64 = 8;
/// Bound of weights and averages.
const TRAINED: f64 = 3e-5;
/// Bound of losses and norms on the way: rounding moves an anchor here and there to another box.
const SEEN: f64 = 5e-4;

/// The images and boxes of the script, in order.
struct Script {
    /// Images of an epoch; the next one has others.
    per_epoch: usize,
    fields: Vec<FieldSpec>,
    pixels: Vec<Vec<u8>>,
    boxes: Vec<Vec<f32>>,
}

impl Script {
    fn read(golden: &Golden, per_epoch: usize) -> Arc<Self> {
        let (mut pixels, mut boxes) = (Vec::new(), Vec::new());
        for step in 0..STEPS {
            let all = images(step, SIDE, SIDE);
            let (values, offsets) = ragged(&golden.get(&format!("steps/boxes/{step}")));
            let offsets: Vec<i64> = Vec::try_from(offsets).unwrap();
            for image in 0..BATCH {
                pixels.push(Vec::<u8>::try_from(all.get(image).flatten(0, -1)).unwrap());
                let (from, to) = (offsets[image as usize], offsets[image as usize + 1]);
                boxes.push(Vec::<f32>::try_from(values.narrow(0, from, to - from).flatten(0, -1)).unwrap());
            }
        }
        Arc::new(Self { per_epoch, fields: train_fields(SIDE as usize, 8), pixels, boxes })
    }
}

impl Dataset for Script {
    fn len(&self) -> usize {
        self.per_epoch
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        let image = (request.epoch as usize * self.per_epoch + request.index) % self.pixels.len();
        out[0].copy_from_slice(&self.pixels[image]);
        let bytes: Vec<u8> = self.boxes[image].iter().flat_map(|value| value.to_le_bytes()).collect();
        out[1] = &mut std::mem::take(&mut out[1])[..bytes.len()];
        out[1].copy_from_slice(&bytes);
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("image {index}")
    }
}

#[derive(Default)]
struct Heard(Vec<MetricsRecord>);

impl Observer for Heard {
    fn phase(&mut self, _: Phase, _: u64) {}
    fn step(&mut self, _: &Progress) {}
    fn record(&mut self, record: &MetricsRecord) {
        self.0.push(record.clone());
    }
    fn line(&mut self, _: String) {}
    fn uss_bytes(&mut self) -> u64 {
        0
    }
    fn relieved(&mut self, _: Relieved) {}
}

/// A run's settings besides those of the script.
#[derive(Clone, Copy)]
struct Run {
    batch: usize,
    ranks: usize,
    micro_batch: usize,
    on_device: bool,
    sync: bool,
}

fn config(run: Run) -> Config {
    let mut config = spec::task::config("yolo");
    let train = &mut config.train;
    (train.batch_size, train.num_epochs) = (run.batch / run.ranks, 2);
    train.sync_batchnorm = run.sync;
    (train.early_stopping, train.restore_best_weights) = (false, false);
    train.monitor_metric = "val.loss".into();
    config.data.shuffle = false;
    config.log.log_every = 1;
    config.log.save_every = 0;
    config.with_section(|yolo: &mut spec::task::yolo::YoloConfig| yolo.nbs = run.batch);
    config
}

/// Trains; gives the records and the model's tensors with the averages' on this rank.
fn trained(
    run: Run,
    script: &Arc<Script>,
    dir: &Path,
    collective: Arc<dyn Collective>,
) -> (Vec<MetricsRecord>, Vec<(String, Tensor)>) {
    let config = config(run);
    let mut plan = Plan::default();
    (plan.batch.global_batch, plan.batch.micro_batch, plan.batch.val_batch) = (run.batch, run.micro_batch, 2);
    (plan.loader.threads, plan.loader.slots) = (1, 4);
    let names: Vec<String> = (0..CLASSES).map(|class| class.to_string()).collect();
    let facts = YoloFacts { names: names.clone(), ..YoloFacts::default() };
    let data = || -> Arc<dyn Dataset> { Arc::clone(script) as Arc<dyn Dataset> };
    let datasets = Datasets { facts: Some(Arc::new(facts)), ..Datasets::new(data(), data(), data()) };
    let vs = nn::VarStore::new(Device::Cpu);
    let model = Yolo.model(&config, &datasets, &vs.root()).unwrap();
    set_weights(&vs);
    let mut whole: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    whole.sort_by(|a, b| a.0.cmp(&b.0));
    let copy = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
    let (params, buffers): (Vec<_>, Vec<_>) = whole.iter().map(copy).partition(|(_, tensor)| tensor.requires_grad());
    let infos: Vec<ParamInfo> =
        params.iter().map(|(name, tensor)| ParamInfo { name: name.clone(), shape: tensor.size() }).collect();
    let rank = collective.rank();
    let fit = Fit {
        device_options: DeviceOptions { always: run.on_device, ..Default::default() },
        config: &config,
        plan: &plan,
        device: Device::Cpu,
        collective,
        datasets: &datasets,
        model: model.as_ref(),
        params,
        buffers,
        groups: Yolo.groups(&config, &infos, run.batch as u64),
        metrics: Box::new(YoloMetrics::new(&names)),
        gallery: None,
        facts: Facts::default(),
        checkpoints: (rank == 0).then(|| Checkpointer::open(dir, 3).unwrap()),
        checkpoint_dir: dir,
        controls: Arc::new(Controls::default()),
    };
    let mut heard = Heard::default();
    fit.run(None, &mut heard).unwrap();
    (heard.0, whole)
}

/// The package's weights, averages and losses after its eight steps. Images follow each other over both epochs.
#[test]
fn eight_steps_of_the_trainer_are_the_packages() {
    let golden = Golden::read();
    let script = Script::read(&golden, STEPS as usize);
    for on_device in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let run = Run { batch: BATCH as usize, ranks: 1, micro_batch: BATCH as usize, on_device, sync: false };
        let (records, whole) = trained(run, &script, dir.path(), Arc::new(Solo::new(Device::Cpu)));
        let (items, norms) = (golden.numbers("steps/items"), golden.numbers("steps/norms"));
        for (step, record) in records.iter().enumerate() {
            let expected: f64 = items[step * 3..step * 3 + 3].iter().sum();
            assert!((record.loss / expected - 1.0).abs() < SEEN, "step {step}: {} {expected}", record.loss);
            assert!((record.grad_norm / norms[step] - 1.0).abs() < SEEN, "step {step}: {}", record.grad_norm);
        }
        assert_eq!(records.len() as u64, STEPS);
        let loaded = checkpoint::load(&dir.path().join(format!("step-{STEPS}"))).unwrap();
        for (kind, tensors) in [("after", &whole), ("ema", &loaded.ema[0].1)] {
            for (name, expected) in golden.below(&format!("steps/{kind}/")) {
                let (_, own) = tensors.iter().find(|(own, _)| *own == name).unwrap();
                let far = far_from(own, &expected);
                assert!(far < TRAINED, "{kind}: {name} differs by {far:e}");
            }
        }
    }
}

/// Statistics of normalisation over all ranks: one, two and three of them, and smaller passes of one, update alike.
#[test]
fn one_two_and_three_ranks_update_alike() {
    let golden = Golden::read();
    let script = Script::read(&golden, 12);
    let all = |ranks: usize| {
        let fd = create_memfd(true).unwrap();
        std::thread::scope(|scope| {
            let fd = &fd;
            let script = &script;
            let start = |rank| {
                let fd = fd.try_clone().unwrap();
                scope.spawn(move || {
                    let shm = ShmCollective::new(fd, rank, ranks, Duration::from_secs(60)).unwrap();
                    let dir = tempfile::tempdir().unwrap();
                    let run = Run { batch: 6, ranks, micro_batch: 6 / ranks, on_device: false, sync: true };
                    let (records, whole) = trained(run, script, dir.path(), Arc::new(shm));
                    let losses: Vec<f64> = records.iter().map(|record| record.loss).collect();
                    (losses, whole.iter().map(|(_, tensor)| numbers(tensor)).collect::<Vec<_>>())
                })
            };
            let ranks: Vec<_> = (0..ranks).map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let one = all(1).remove(0);
    assert!(one.0.len() > 3);
    for ranks in [2, 3] {
        let own = all(ranks);
        for (a, b) in own[0].0.iter().zip(&one.0) {
            assert!((a / b - 1.0).abs() < 2e-3, "{ranks} ranks: a loss of {a} against {b}");
        }
        let (mut apart, mut whole) = (0.0, 0.0);
        for (own, one) in own[0].1.iter().flatten().zip(one.1.iter().flatten()) {
            apart += (own - one).powi(2);
            whole += one.powi(2);
        }
        let far = f64::sqrt(apart / whole);
        assert!(far < 1e-4, "{ranks} ranks: weights differ by {far:e}");
    }
}
