//! A model with everything that a trainer must keep: batch normalisation, draws for its samples, and a history of what all
//! ranks shared, on which the next step depends.

use super::*;
use crate::task::norm::{BatchNorm, BatchNormConfig};
use spec::config::{BufferMode, EmaBuffers, OptimizerKind, Rates, SchedulerKind, WarmupMode};

/// Stream of the noise.
const NOISE: u64 = 3;

pub(super) struct Rich {
    norm: BatchNorm,
    /// f32 `[1]`.
    pub history: Tensor,
}

impl Rich {
    pub fn new(vs: &nn::Path) -> Self {
        let norm = BatchNorm::new(&(vs / "norm"), 8, BatchNormConfig::default());
        Self { norm, history: Tensor::zeros([1], (Kind::Float, Device::Cpu)) }
    }

    pub fn hidden(&self, x: &Tensor, batch: &Batch, train: bool) -> Tensor {
        let noise = batch.normal(NOISE, 8) * 0.1;
        self.norm.forward(&(x + noise), train) * (self.history.tanh() * 0.5 + 1.0)
    }

    /// Shares the loss of each sample and its square.
    pub fn output(&self, losses: &Tensor, prediction: &Tensor) -> Output {
        let share = Tensor::cat(&[losses.detach(), losses.detach().square()], 1);
        Output::new(losses.mean(Kind::Float), prediction.detach()).sharing(share)
    }

    /// Later samples weigh more: the order counts.
    pub fn shared(&self, values: &Tensor) {
        let weights = (Tensor::arange(values.size()[0], (Kind::Float, Device::Cpu)) + 1.0).unsqueeze(1);
        let sum = (values * weights).mean(Kind::Float).view([1]);
        let _ = self.history.shallow_clone().g_mul_scalar_(0.5).g_add_(&sum);
    }
}

fn job(dir: &tempfile::TempDir, change: fn(&mut Config)) -> Job {
    Job { rich: true, change, ..Job::new(dir) }
}

/// Tensors of all files of a checkpoint, by file and name.
fn files(dir: &tempfile::TempDir, step: u64) -> Vec<(String, Vec<u8>)> {
    let folder = dir.path().join(format!("step-{step}"));
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "safetensors") {
            all.push((path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

fn names(files: &[(String, Vec<u8>)]) -> Vec<&str> {
    files.iter().map(|(name, _)| name.as_str()).collect()
}

/// Runs ten steps at once, and five and five; gives the folders, after the comparison.
fn resumed(job: impl Fn(&tempfile::TempDir) -> Job) -> (tempfile::TempDir, tempfile::TempDir) {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let straight = run(&job(&a));
    run(&Job { steps: 5, ..job(&b) });
    let rest = run(&Job { resume: Some(5), ..job(&b) });
    for (whole, parts) in straight.iter().zip(&rest) {
        assert_eq!(parts.result.as_ref().unwrap().steps, 10);
        assert_eq!((&parts.params, &parts.buffers, &parts.state), (&whole.params, &whole.buffers, &whole.state));
        assert_eq!(parts.result.as_ref().unwrap().metrics, whole.result.as_ref().unwrap().metrics);
    }
    assert_eq!(losses(&rest[0]), losses(&straight[0])[5..]);
    assert!(files(&a, 10) == files(&b, 10), "every file of the checkpoint is the same");
    (a, b)
}

fn full(config: &mut Config) {
    config.log.save_every_steps = 5;
    config.train.ema_decay = Rates(vec![0.9, 0.5]);
    config.train.ema_ramp = 4.0;
    config.train.ema_buffers = EmaBuffers::Average;
    config.train.optimizer = OptimizerKind::Sgd;
    config.train.nesterov = true;
}

fn groups() -> Vec<GroupSpec> {
    let group = |name: &str, members: &[&str]| GroupSpec::new(name, members.iter().map(ToString::to_string));
    vec![
        GroupSpec { rate: 2.0, weight_decay: Some(0.0), momentum: Some(0.5), ..group("bias", &["a.bias", "b.bias"]) },
        GroupSpec { weight_decay: Some(0.0), ..group("norm", &["norm.weight", "norm.bias"]) },
    ]
}

#[test]
fn a_resumed_run_has_the_same_buffers_averages_groups_and_shared_numbers_bit_by_bit() {
    for (on_device, change) in [
        (false, full as fn(&mut Config)),
        (true, full),
        (false, |config| {
            full(config);
            config.ddp.buffers = BufferMode::Mean;
        }),
        (false, |config| {
            full(config);
            config.ddp.buffers = BufferMode::Local;
        }),
        (false, |config| {
            full(config);
            config.train.sync_batchnorm = true;
            config.train.ema_buffers = EmaBuffers::Copy;
        }),
    ] {
        let (a, _b) = resumed(|dir| Job { groups: groups(), on_device, ..job(dir, change) });
        let all = ["ema-0.5.safetensors", "ema-0.9.safetensors", "loop.safetensors"];
        assert_eq!(names(&files(&a, 10))[..3], all);
        let loaded = checkpoint::load(&a.path().join("step-10")).unwrap();
        let model: Vec<&str> = loaded.model.iter().map(|(name, _)| name.as_str()).collect();
        let buffers = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"];
        assert!(buffers.iter().all(|name| model.contains(name)), "{model:?}");
        assert!(loaded.ema.iter().all(|(_, tensors)| tensors.len() == model.len()), "averages hold buffers too");
    }
}

#[test]
fn one_two_and_three_ranks_train_alike_with_statistics_over_all_of_them() {
    let trained = |ranks: usize, sync: bool| {
        let dir = tempfile::tempdir().unwrap();
        // Micro-batches of all ranks together: 6 samples, twice a step.
        let change: fn(&mut Config) = match sync {
            true => |config| {
                full(config);
                config.train.sync_batchnorm = true;
            },
            false => full,
        };
        let ended = run(&Job { ranks, micro_batch: 6 / ranks, groups: groups(), ..job(&dir, change) });
        let loaded = checkpoint::load(&dir.path().join("step-10")).unwrap();
        let flat = |tensors: &Named| -> Vec<f32> {
            let all: Vec<Tensor> = tensors.iter().map(|(_, t)| t.to_kind(Kind::Float).reshape([-1])).collect();
            Vec::<f32>::try_from(Tensor::cat(&all, 0)).unwrap()
        };
        let averages: Vec<Vec<f32>> = loaded.ema.iter().map(|(_, tensors)| flat(tensors)).collect();
        let losses = losses(&ended[0]);
        let state: Vec<f32> = ended[0].state.iter().map(|v| *v as f32).collect();
        let mut all = vec![flat(&loaded.model), losses.iter().map(|v| *v as f32).collect(), state];
        all.extend(averages);
        (all, ended)
    };
    let (one, _) = trained(1, false);
    for ranks in [1, 2, 3] {
        let (all, ended) = trained(ranks, true);
        all.iter().zip(&one).for_each(|(found, one)| close(found, one, 1e-5));
        assert!(ended.iter().all(|rank| rank.params == ended[0].params && rank.buffers == ended[0].buffers));
    }
    let (apart, _) = trained(3, false);
    let far = apart[0].iter().zip(&one[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far > 1e-3, "without it ranks differ by {far}: the comparison can fail");
}

/// Rank 1 runs out of memory in its third step: what the failed attempt did to statistics is undone.
#[test]
fn a_repeated_step_counts_once_in_buffers_and_history() {
    let faults = || vec![vec![], vec![(2, Place::Backward)], vec![]];
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    // Adam would make steps of rounding errors: a bias before a normalisation has no gradient.
    let sgd: fn(&mut Config) = |config| config.train.optimizer = OptimizerKind::Sgd;
    let ended = run(&Job { faults: faults(), ..job(&a, sgd) });
    run(&Job { steps: 2, ..job(&b, sgd) });
    let smaller = run(&Job { resume: Some(2), micro_batch: 2, ..job(&b, sgd) });
    for (ended, smaller) in ended.iter().zip(&smaller) {
        assert_eq!((&ended.params, &ended.buffers), (&smaller.params, &smaller.buffers));
        assert_eq!(ended.state, smaller.state);
    }
    let on_device = run(&Job { faults: faults(), on_device: true, ..job(&a, sgd) });
    let count = |ended: &[Ended]| ended[0].buffers[0];
    assert_eq!([count(&ended), count(&on_device)], [2.0 + 8.0 * 2.0; 2], "two whole steps, eight in halves");
    on_device[0].buffers.iter().zip(&ended[0].buffers).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{a} {b}"));
    assert!((on_device[0].state[0] - ended[0].state[0]).abs() < 1e-5);
}

#[test]
fn memory_that_runs_out_while_ranks_take_statistics_together_is_an_error_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let faults = vec![vec![], vec![(2, Place::Forward)], vec![]];
    let ranks = run(&Job { faults, ..job(&dir, |config| config.train.sync_batchnorm = true) });
    let errors: Vec<String> = ranks.iter().map(|ended| ended.result.as_ref().unwrap_err().to_string()).collect();
    assert!(errors[1].contains("out of memory at step 3 on rank 1") && errors[1].contains("lower train.microbatch"));
    assert!([0, 2].iter().all(|rank| errors[*rank].starts_with("rank 1 failed")), "{errors:?}");
}

#[test]
fn modes_of_buffers_decide_what_a_checkpoint_holds_and_what_is_validated() {
    let trained = |change: fn(&mut Config)| {
        let dir = tempfile::tempdir().unwrap();
        let ended = run(&job(&dir, change));
        let loaded = checkpoint::load(&dir.path().join("step-10")).unwrap();
        let mean = loaded.model.iter().find(|(name, _)| name == "norm.running_mean").unwrap().1.double_value(&[3]);
        let own: Vec<f64> = ended.iter().map(|rank| rank.buffers[1 + 3]).collect();
        let names: Vec<String> = loaded.rest.into_iter().map(|(name, _)| name).collect();
        (mean, own, names)
    };
    let (broadcast, own, names) = trained(|_| ());
    assert_eq!((own.clone(), names), (vec![own[0]; 3], vec!["model.history".to_owned()]));
    assert_eq!(broadcast, own[0]);
    let (local, own, names) = trained(|config| config.ddp.buffers = BufferMode::Local);
    assert_eq!(local, own[0]);
    assert!(own[0] != own[1] && own[1] != own[2], "{own:?}");
    assert_eq!(names.len(), 1 + 2 * 3, "{names:?}: floats and counts of each rank");
    let (mean, same, _) = trained(|config| config.ddp.buffers = BufferMode::Mean);
    assert_eq!((mean, same.clone()), (same[0], vec![same[0]; 3]));
    assert!((mean - own.iter().sum::<f64>() / 3.0).abs() < 1e-5, "{mean} of {own:?}");
    assert_eq!(broadcast, local, "rank 0's weights and statistics do not depend on what the others keep");
}

#[test]
fn one_decay_is_the_same_written_as_a_number_or_in_a_list_and_others_change_nothing() {
    let trained = |change: fn(&mut Config)| {
        let dir = tempfile::tempdir().unwrap();
        let ended = run(&job(&dir, change));
        let metrics = ended[0].result.as_ref().unwrap().metrics.clone();
        (files(&dir, 10), metrics)
    };
    let (one, metrics) = trained(|config| config.train.ema_decay = Rates::one(0.9));
    assert_eq!(names(&one), ["ema.safetensors", "loop.safetensors", "model.safetensors", "optimizer.safetensors"]);
    let (two, of_two) = trained(|config| config.train.ema_decay = Rates(vec![0.9, 0.5]));
    assert_eq!(metrics, of_two, "the first is validated");
    assert!(one[1..] == two[2..] && one[0].1 == two[1].1, "weights and the first average are the same");
    assert_eq!(two[1].0, "ema-0.9.safetensors");
    let (none, _) = trained(|_| ());
    assert!(none == one[1..], "weights do not depend on their averages");
}

#[test]
fn rates_of_groups_are_recorded_and_groups_without_sense_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let linear: fn(&mut Config) = |config| {
        config.train.scheduler = SchedulerKind::Linear;
        config.train.lrf = 0.5;
    };
    for on_device in [false, true] {
        let ended = run(&Job { groups: groups(), on_device, ..job(&dir, linear) });
        let records = &ended[0].told.records;
        assert_eq!(records.len(), 10);
        for (step, record) in records.iter().enumerate() {
            let lr = 0.02 * (1.0 - 0.5 * step as f64 / 10.0);
            assert!((record.lr - lr).abs() < 1e-12);
            let of = |name: &str| record.metrics[&format!("lr.{name}")];
            assert_eq!([of("bias"), of("norm"), of("rest")], [2.0 * record.lr, record.lr, record.lr]);
        }
    }
    let one = run(&job(&dir, linear));
    assert!(one[0].told.records[0].metrics.keys().all(|name| !name.starts_with("lr.")));
    let wrong = vec![GroupSpec::new("x", ["c.weight".to_owned()])];
    let ended = run(&Job { ranks: 1, faults: vec![vec![]], groups: wrong, ..Job::new(&dir) });
    let error = ended[0].result.as_ref().unwrap_err().to_string();
    assert!(error.contains("group x has c.weight, which is no trainable parameter"), "{error}");
}

/// Three batches of four samples a step; over eight batches of warm-up the steps grow from one batch to three.
fn growing(config: &mut Config) {
    full(config);
    config.train.gradient_accumulation_steps = 3;
    config.train.warmup_accumulation = true;
    config.train.warmup_mode = WarmupMode::Within;
    config.train.warmup_momentum = Some(0.5);
    config.train.warmup_epochs = 8.0 / 12.0;
}

#[test]
fn steps_of_the_warm_up_accumulate_fewer_batches_and_resume_like_others() {
    let dir = tempfile::tempdir().unwrap();
    let solo = |dir: &tempfile::TempDir| Job { ranks: 1, faults: vec![vec![]], ..job(dir, growing) };
    let ended = run(&Job { ranks: 1, micro_batch: 12, ..solo(&dir) });
    // 50 samples: 12 batches in the first epoch, as 1 + 1 + 2 + 2 + 3 + 3; later ones have four steps of three.
    assert_eq!(sizes(&ended[0]), [4, 4, 8, 8, 12, 12, 12, 12, 12, 12]);
    let first: Vec<u64> = ended[0].seen[..6].concat();
    assert_eq!(first.iter().collect::<std::collections::BTreeSet<_>>().len(), 48, "no sample comes twice");
    let records = &ended[0].told.records;
    let epochs: Vec<u64> = records.iter().map(|record| record.epoch).collect();
    assert_eq!(epochs, [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    // Numbers of the last batch of each step: 0, 1, 3, 5, 8.
    let expected = [0.0, 1.0 / 8.0, 3.0 / 8.0, 5.0 / 8.0, 1.0].map(|share| 0.02 * share);
    records.iter().zip(expected).for_each(|(record, lr)| assert!((record.lr - lr).abs() < 1e-12, "{}", record.lr));
    resumed(|dir| Job { groups: groups(), ..job(dir, growing) });
    let other = run(&Job { resume: Some(5), ..job(&dir, full) });
    let error = other[0].result.as_ref().unwrap_err().to_string();
    assert!(error.contains("keep train.warmup_accumulation"), "{error}");
}

#[test]
fn ranks_that_belong_together_need_a_sample_each_in_every_pass() {
    let dir = tempfile::tempdir().unwrap();
    let change: fn(&mut Config) = |config| config.train.sync_batchnorm = true;
    // 12 samples over 5 ranks: 3, 3, 2, 2 and 2, in passes of one.
    let ended = run(&Job { ranks: 5, micro_batch: 1, faults: vec![vec![]; 5], ..job(&dir, change) });
    let error = ended[4].result.as_ref().unwrap_err().to_string();
    assert!(error.contains("batches of 12 samples in micro-batches of 1 leave some of 5 ranks"), "{error}");
    let ended = run(&Job { ranks: 5, micro_batch: 2, faults: vec![vec![]; 5], ..job(&dir, change) });
    assert_eq!(ended.iter().map(|rank| sizes(rank)[..2].to_vec()).collect::<Vec<_>>()[3..], [vec![1, 1], vec![1, 1]]);
    let said = |ranks: usize, change: fn(&mut Config)| {
        let ended = run(&Job { ranks, micro_batch: 2, faults: vec![vec![]; ranks], ..job(&dir, change) });
        let lines = ended.iter().flat_map(|rank| &rank.told.lines);
        lines.filter(|line| line.contains("each epoch leaves 2 of 50 samples out")).count()
    };
    let whole: fn(&mut Config) = |config| {
        config.train.sync_batchnorm = true;
        config.train.drop_last = false;
    };
    assert_eq!([said(5, whole), said(2, whole), said(5, change)], [1, 0, 0]);
}
