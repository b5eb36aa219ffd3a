//! Steps of the real EMG model on windows in memory: what the savings must not change.

use super::*;
use crate::comm::Solo;
use crate::data::loader::{Loader, LoaderSpec, Order};
use crate::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use crate::task::emg::loss::Loss;
use crate::task::emg::{EmgMetrics, EmgNet};
use crate::train::ddp::DdpOptions;
use crate::train::optimizer::{Optimizer, Rule};
use spec::task::emg::{EmgConfig, EmgLoss, EmgModel, TdsStage};
use std::sync::Arc;
use tch::{Tensor, nn};

const WINDOW: usize = 100;

/// Window `i`: sinusoids whose frequency depends on `i`, as EMG and, around a mean pose of 0.4, as angles.
struct Waves {
    len: usize,
    fields: [FieldSpec; 2],
}

fn waves(len: usize) -> Arc<dyn Dataset> {
    let field = |name, channels| FieldSpec::new(name, &[WINDOW, channels], Dtype::F32);
    Arc::new(Waves { len, fields: [field("emg", 16), field("joint_angles", 20)] })
}

impl Dataset for Waves {
    fn len(&self) -> usize {
        self.len
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(
        &self,
        ReadRequest { index, .. }: ReadRequest,
        out: &mut [&mut [u8]],
        _: &mut Scratch,
    ) -> Result<(), DataError> {
        for (field, channels) in [(0, 16), (1, 20)] {
            for (k, bytes) in out[field].chunks_exact_mut(4).enumerate() {
                let (time, channel) = ((k / channels) as f32, (k % channels) as f32);
                let value = (time * (0.02 + 0.01 * (index % 7) as f32) + channel + index as f32).sin();
                let value = if field == 1 { 0.4 + 0.3 * value } else { value };
                bytes.copy_from_slice(&value.to_ne_bytes());
            }
        }
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("window {index}")
    }
}

/// How a run differs from the plainest one.
#[derive(Clone, Copy)]
struct Way {
    micro_batch: usize,
    threads: usize,
    slots: usize,
    persistent: bool,
    narrow: Option<Kind>,
    dropout: f64,
    /// `train.compute_metrics_online`.
    online: bool,
}

const PLAIN: Way =
    Way { micro_batch: 64, threads: 0, slots: 2, persistent: false, narrow: None, dropout: 0.0, online: true };

/// State after the steps.
struct Trained {
    losses: Vec<f64>,
    metrics: Vec<f64>,
    params: Tensor,
}

fn config(way: Way) -> Config {
    let mut config = spec::task::config("emg");
    config.train.compute_metrics_online = way.online;
    let stage = TdsStage {
        in_conv_kernel: 5,
        in_conv_stride: 4,
        num_blocks: 1,
        channels: 4,
        feature_width: 4,
        kernel_width: 11,
    };
    let model = EmgModel {
        tds_stages: vec![stage],
        decoder_hidden_size: 32,
        decoder_num_layers: 1,
        dropout: way.dropout,
        ..EmgModel::default()
    };
    config.set_section(&EmgConfig { model, ..EmgConfig::default() });
    config
}

/// Trains `steps` steps of `global_batch` samples from weights that do not depend on torch's shared generator.
fn train(way: Way, global_batch: u64, steps: u64) -> Trained {
    let config = config(way);
    let vs = nn::VarStore::new(Device::Cpu);
    let loss = Loss { kind: EmgLoss::MseMae, mae_weight: 0.5 };
    let net = EmgNet::new(&config.section::<EmgConfig>().model, loss, WINDOW, &vs.root());
    let mut params: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (name, tensor)) in params.iter_mut().enumerate() {
        let wave =
            (Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)) * 1.7 + index as f64).sin() * 0.15;
        let wave = if name.ends_with("norm.weight") { wave + 1.0 } else { wave };
        tch::no_grad(|| tensor.copy_(&wave.view(tensor.size().as_slice())));
    }
    let solo: Arc<dyn Collective> = Arc::new(Solo::new(Device::Cpu));
    let mut ddp = Ddp::new(params, Arc::clone(&solo), DdpOptions::default()).unwrap();
    let rule = Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    let mut optimizer = Update::Flat(Optimizer::new(rule, &ddp).unwrap());
    let mut metrics = EmgMetrics::new(20, 2000.0, None);
    let mode = spec::config::BufferMode::Broadcast;
    let mut buffers = Buffers::new("buffers", vec![], mode, Arc::clone(&solo)).unwrap();
    let dataset = waves((global_batch * steps) as usize);
    let planner = BatchPlanner {
        order: Order { len: dataset.len() as u64, seed: 3, shuffle: crate::data::loader::Shuffle::Global },
        global_batch,
        micro_batch: way.micro_batch as u64,
        rank: 0,
        world_size: 1,
        drop_last: true,
        cut: Default::default(),
    };
    let spec = LoaderSpec {
        threads: way.threads,
        slots: way.slots,
        micro_batch: way.micro_batch,
        persistent: way.persistent,
        ..LoaderSpec::default()
    };
    let mut loader = Loader::new(dataset, spec).unwrap();
    let mut batches = loader.run(planner.requests(0, 0)).unwrap();
    let mut losses = Vec::new();
    for step in 0..steps {
        let runner = StepRunner {
            config: &config,
            planner: &planner,
            model: &net,
            device: Device::Cpu,
            narrow: way.narrow,
            collective: solo.as_ref(),
            step,
            step_in_epoch: step,
            epoch: 0,
            trial: false,
            warming: false,
            lr: 0.1,
            numbers: &[0.1.into()],
            peers: None,
            wishes: Wishes::default(),
        };
        let mut parts =
            Parts { ddp: &mut ddp, optimizer: &mut optimizer, metrics: &mut metrics, buffers: &mut buffers };
        let attempt = runner.run(&mut batches, &mut parts).unwrap();
        let Attempt::Done(outcome) = attempt else { panic!("out of memory") };
        losses.push(outcome.loss);
    }
    assert!(ddp.variables().iter().all(|v| v.kind() == Kind::Float && v.grad().kind() == Kind::Float));
    Trained { losses, metrics: metrics.sums(), params: Tensor::cat(&flat(&ddp), 0) }
}

/// Each parameter on its own: buckets may lie in another order.
fn flat(ddp: &Ddp) -> Vec<Tensor> {
    ddp.variables().iter().map(|v| v.detach().reshape([-1])).collect()
}

fn close(a: &Trained, b: &Trained, bound: f64) {
    let far = (&a.params - &b.params).abs().max().double_value(&[]);
    assert!(far < bound, "parameters differ by {far}");
    for (a, b) in a.losses.iter().zip(&b.losses).chain(a.metrics.iter().zip(&b.metrics)) {
        assert!((a - b).abs() < bound * b.abs().max(1.0), "{a} against {b}");
    }
}

#[test]
fn accumulation_of_16_times_4_equals_one_batch_of_64() {
    let (whole, parts) = (train(PLAIN, 64, 3), train(Way { micro_batch: 16, ..PLAIN }, 64, 3));
    assert!(whole.losses[2] < whole.losses[0], "{:?}", whole.losses);
    close(&parts, &whole, 1e-5);
}

/// 40 = 16 + 16 + 8: the last micro-batch weighs half as much as the others.
#[test]
fn a_smaller_last_micro_batch_weighs_less() {
    close(&train(Way { micro_batch: 16, ..PLAIN }, 40, 3), &train(Way { micro_batch: 40, ..PLAIN }, 40, 3), 1e-5);
}

/// The same seed gives the same losses, bit for bit, whatever the loader does to save time or memory.
#[test]
fn loader_settings_do_not_change_losses() {
    let plain = train(PLAIN, 64, 3);
    for way in [Way { threads: 1, slots: 3, ..PLAIN }, Way { threads: 3, slots: 8, persistent: true, ..PLAIN }] {
        let other = train(way, 64, 3);
        assert_eq!(other.losses, plain.losses);
        assert_eq!(other.metrics, plain.metrics);
        assert_eq!(other.params, plain.params);
    }
}

#[test]
fn steps_are_the_same_without_training_metrics() {
    let (with, without) = (train(PLAIN, 64, 2), train(Way { online: false, ..PLAIN }, 64, 2));
    assert_eq!((without.losses, without.params), (with.losses, with.params));
    assert!(without.metrics.iter().all(|sum| *sum == 0.0) && with.metrics.iter().any(|sum| *sum > 0.0));
}

/// bf16 products: not the same bits, the same way down; parameters, gradients and the loss stay f32.
#[test]
fn bf16_learns_as_f32_does() {
    let (full, narrow) = (train(PLAIN, 64, 12), train(Way { narrow: Some(Kind::BFloat16), ..PLAIN }, 64, 12));
    assert_ne!(full.losses, narrow.losses);
    assert!(narrow.losses[11] < 0.9 * narrow.losses[0], "{:?}", narrow.losses);
    for (a, b) in narrow.losses.iter().zip(&full.losses) {
        assert!((a - b).abs() < 0.02 * b, "{:?} against {:?}", narrow.losses, full.losses);
    }
    let dropped = train(Way { narrow: Some(Kind::BFloat16), dropout: 0.1, ..PLAIN }, 64, 2);
    assert!(dropped.losses.iter().all(|loss| loss.is_finite()));
}
