//! The task as a whole: config to model, files to loss.

use super::*;
use crate::task::Batch;
use launcher::config::{FlowKind, LossType};
use tch::{Device, Kind, Tensor};

/// A model of a few thousand parameters.
fn tiny() -> Config {
    let mut config = Config::of_task("deblur");
    let vrt = &mut config.model.vrt;
    vrt.dims = vec![8; 8];
    vrt.depths = vec![2, 1, 1, 1, 1, 1, 2, 1];
    (vrt.heads, vrt.deform_groups, vrt.tsa_heads, vrt.fuse_heads) = (2, 2, 2, 2);
    vrt.window = vec![2, 4, 4];
    (vrt.independent_groups, vrt.flow, vrt.drop_path) = (vec![7], FlowKind::Zero, 0.0);
    (vrt.checkpoint_attn, vrt.checkpoint_ffn) = (false, false);
    config.data.deblur.voxel_bins = 4;
    config.data.deblur.spike_w = 16;
    config
}

fn parameters(config: &Config) -> u64 {
    let vs = nn::VarStore::new(Device::Cpu);
    DeblurNet::new(config, 32, &vs.root()).unwrap();
    vs.variables().values().map(|tensor| tensor.numel() as u64).sum()
}

/// The planner weighs exactly what is built.
#[test]
fn the_planners_formula_counts_the_parameters_that_are_built() {
    let formula = |config: &Config| {
        launcher::plan::deblur::parameters(&config.model.vrt, config.data.deblur.voxel_bins as u64).unwrap()
    };
    let baseline = Config::of_task("deblur");
    assert_eq!((parameters(&baseline), formula(&baseline)), (23_675_463, 23_675_463));
    let mut config = tiny();
    for change in [
        |_: &mut Config| {},
        |config: &mut Config| config.model.vrt.use_spike = false,
        |config: &mut Config| config.model.vrt.flow = FlowKind::SpyNet,
        |config: &mut Config| config.model.vrt.deformable = false,
        |config: &mut Config| config.model.vrt.dims = vec![8, 8, 8, 8, 16, 8, 8, 12],
        |config: &mut Config| config.model.vrt.window = vec![3, 4, 8],
        |config: &mut Config| config.model.vrt.depths = vec![4, 3, 2, 1, 5, 6, 2, 1, 2],
    ] {
        change(&mut config);
        assert_eq!(parameters(&config), formula(&config), "{:?}", config.model.vrt);
    }
}

fn batch(clips: i64, h: i64, w: i64) -> Batch {
    let bytes = |count: i64, step: f64| {
        let wave = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 100.0 + 120.0;
        wave.to_kind(Kind::Uint8)
    };
    let frames = |step| bytes(clips * 3 * h * w * 3, step).view([clips, 3, h, w, 3]);
    let spikes = bytes(clips * 3 * 8 * (h / 2) * (w / 16), 0.7).view([clips, 3, 8, h / 2, w / 16]);
    Batch { fields: vec![frames(0.01), frames(0.0102), spikes], sample_ids: vec![0; clips as usize] }
}

/// Some steps of plain gradient descent on one batch: the loss falls, with each loss and from spikes too.
#[test]
fn bytes_go_in_and_a_gradient_reaches_every_parameter() {
    for kind in [LossType::Charbonnier, LossType::Mse] {
        let mut config = tiny();
        config.train.loss_type = kind;
        tch::manual_seed(5);
        let vs = nn::VarStore::new(Device::Cpu);
        let net = DeblurNet::new(&config, 32, &vs.root()).unwrap();
        let batch = batch(2, 16, 32);
        let output = net.forward(&batch, true);
        assert_eq!(output.prediction.size(), [2, 3, 3, 16, 32]);
        output.loss.backward();
        for (name, tensor) in vs.variables() {
            assert!(tensor.grad().defined(), "{name} has no gradient");
        }
        let fed = |name: &str| {
            vs.variables().iter().any(|(n, t)| n.starts_with(name) && t.grad().norm().double_value(&[]) > 0.0)
        };
        assert!(fed("spike_encoder") && fed("stage1") && fed("conv_last"));
        let mut optimizer = nn::OptimizerConfig::build(nn::Adam::default(), &vs, 1e-3).unwrap();
        for _ in 0..8 {
            optimizer.backward_step(&net.forward(&batch, true).loss);
        }
        let after = net.forward(&batch, false).loss.double_value(&[]);
        assert!(after < output.loss.double_value(&[]), "{kind:?}: {after}");
    }
}

#[test]
fn sizes_that_no_model_has_are_an_error_that_names_the_key() {
    let mut config = tiny();
    config.model.vrt.heads = 3;
    let vs = nn::VarStore::new(Device::Cpu);
    let error = DeblurNet::new(&config, 32, &vs.root()).err().unwrap().to_string();
    assert!(error.contains("model.vrt") && error.contains("heads"), "{error}");
}

#[test]
fn tiles_and_recomputation_may_change_from_run_to_run_and_sizes_may_not() {
    let (task, config) = (Deblur, tiny());
    let changed = |change: fn(&mut Config)| {
        let mut config = config.clone();
        change(&mut config);
        task.architecture(&config) != task.architecture(&tiny())
    };
    assert!(!changed(|config| config.model.vrt.chunk_size = 7));
    assert!(!changed(|config| config.model.vrt.checkpoint_attn = true));
    assert!(changed(|config| config.model.vrt.dims[0] = 16));
    assert!(changed(|config| config.data.deblur.voxel_bins = 5));
    assert!(!changed(|config| config.model.dropout = 0.5));
}

#[test]
fn the_planners_activations_are_those_of_a_clip() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/baseline.yaml")).unwrap();
    let raw = launcher::config::RawConfig::parse(&text, "baseline.yaml").unwrap();
    for (name, sets) in [
        ("cpu", vec![]),
        ("no warp", vec!["model.vrt.deformable=false"]),
        ("no spike", vec!["model.vrt.use_spike=false"]),
        ("dim 32", vec!["model.vrt.dims=[32, 32, 32, 32, 32, 32, 32, 32]"]),
        ("depth 4", vec!["model.vrt.depths=[4, 4, 4, 4, 4, 4, 4, 2, 2]"]),
        ("recomputed", vec!["model.vrt.checkpoint_attn=true", "model.vrt.checkpoint_ffn=true"]),
        ("recomputed attn", vec!["model.vrt.checkpoint_attn=true"]),
        ("clip 5", vec!["data.deblur.clip_len=5"]),
    ] {
        let sets: Vec<String> = sets.into_iter().map(str::to_owned).collect();
        let config = raw.resolve("cpu", &sets).unwrap();
        let vs = nn::VarStore::new(Device::Cpu);
        let net = DeblurNet::new(&config, 128, &vs.root()).unwrap();
        let clip = config.data.deblur.clip_len as i64;
        let make = |h: i64, w: i64| {
            let bytes = |shape: &[i64]| Tensor::randint(255, shape, (Kind::Uint8, Device::Cpu));
            let frames = || bytes(&[1, clip, h, w, 3]);
            let spikes = bytes(&[1, clip, 66, h / 2, (w / 2 + 7) / 8]);
            Batch { fields: vec![frames(), frames(), spikes], sample_ids: vec![0] }
        };
        let train = |h: i64, w: i64| {
            let mut metrics = DeblurMetrics::new();
            let mut step = || {
                let batch = make(h, w);
                let output = net.forward(&batch, true);
                metrics.update(&batch, &output);
                output.loss.backward();
            };
            step();
            let watch = crate::torch::LiveBytes::start().unwrap();
            step();
            watch.peak()
        };
        let val = |h: i64, w: i64| {
            let mut metrics = DeblurMetrics::new();
            let mut step = || {
                tch::no_grad(|| {
                    let batch = make(h, w);
                    let output = net.forward(&batch, false);
                    metrics.update(&batch, &output);
                })
            };
            step();
            let watch = crate::torch::LiveBytes::start().unwrap();
            step();
            watch.peak()
        };
        let mib = |bytes: i64| bytes as f64 / 1048576.0;
        println!(
            "{name}: train 48 {:.2} train 64 {:.2} val 48 {:.2} val 96x128 {:.2}",
            mib(train(48, 48)),
            mib(train(64, 64)),
            mib(val(48, 48)),
            mib(val(96, 128))
        );
    }
}
