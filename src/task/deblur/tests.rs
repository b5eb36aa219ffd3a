//! The task as a whole: config to model, files to loss.

use super::*;
use crate::task::Batch;
use spec::task::deblur::{DeblurLoss, FlowKind};
use tch::{Device, Kind, Tensor};

/// A model of a few thousand parameters.
fn tiny() -> Config {
    let mut config = spec::task::config("deblur");
    config.with_section(shrink);
    config
}

fn shrink(deblur: &mut DeblurConfig) {
    let vrt = &mut deblur.vrt;
    vrt.dims = vec![8; 8];
    vrt.depths = vec![2, 1, 1, 1, 1, 1, 2, 1];
    (vrt.heads, vrt.deform_groups, vrt.tsa_heads, vrt.fuse_heads) = (2, 2, 2, 2);
    vrt.window = vec![2, 4, 4];
    (vrt.independent_groups, vrt.flow, vrt.drop_path) = (vec![7], FlowKind::Zero, 0.0);
    (vrt.checkpoint_attn, vrt.checkpoint_ffn) = (false, false);
    (deblur.voxel_bins, deblur.spike_w) = (4, 16);
}

fn parameters(config: &Config) -> u64 {
    let vs = nn::VarStore::new(Device::Cpu);
    DeblurNet::new(config, 32, &vs.root()).unwrap();
    vs.variables().values().map(|tensor| tensor.numel() as u64).sum()
}

#[test]
fn the_baseline_has_the_parameters_that_its_config_says() {
    let mut config = spec::task::config("deblur");
    assert_eq!(parameters(&config), 23_675_463);
    config.with_section(|deblur: &mut DeblurConfig| deblur.vrt.use_spike = false);
    assert_eq!(parameters(&config), 18_263_751);
}

fn batch(clips: i64, h: i64, w: i64) -> Batch {
    let bytes = |count: i64, step: f64| {
        let wave = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 100.0 + 120.0;
        wave.to_kind(Kind::Uint8)
    };
    let frames = |step| bytes(clips * 3 * h * w * 3, step).view([clips, 3, h, w, 3]);
    let spikes = bytes(clips * 3 * 8 * (h / 2) * (w / 16), 0.7).view([clips, 3, 8, h / 2, w / 16]);
    Batch::new(vec![frames(0.01), frames(0.0102), spikes], vec![0; clips as usize])
}

/// Some steps of plain gradient descent on one batch: the loss falls, with each loss and from spikes too.
#[test]
fn bytes_go_in_and_a_gradient_reaches_every_parameter() {
    for kind in [DeblurLoss::Charbonnier, DeblurLoss::Mse] {
        let mut config = tiny();
        config.train.loss_type = kind.word().into();
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
    config.with_section(|deblur: &mut DeblurConfig| deblur.vrt.heads = 3);
    let vs = nn::VarStore::new(Device::Cpu);
    let error = DeblurNet::new(&config, 32, &vs.root()).err().unwrap().to_string();
    assert!(error.contains("deblur.vrt") && error.contains("heads"), "{error}");
}

#[test]
fn tiles_and_recomputation_may_change_from_run_to_run_and_sizes_may_not() {
    let (task, config) = (Deblur, tiny());
    let changed = |change: fn(&mut DeblurConfig)| {
        let mut config = config.clone();
        config.with_section(change);
        task.architecture(&config) != task.architecture(&tiny())
    };
    assert!(!changed(|deblur| deblur.vrt.chunk_size = 7));
    assert!(!changed(|deblur| deblur.vrt.checkpoint_attn = true));
    assert!(changed(|deblur| deblur.vrt.dims[0] = 16));
    assert!(changed(|deblur| deblur.voxel_bins = 5));
    assert!(!changed(|deblur| deblur.loss.perceptual_weight = 0.5));
}

/// Bytes of live tensors at the peak of a pass over `clips` clips of `side` pixels, their bytes and metrics included.
fn live_peak(config: &Config, clips: i64, side: i64, train: bool) -> i64 {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = DeblurNet::new(config, 128, &vs.root()).unwrap();
    let clip = config.section::<DeblurConfig>().clip_len as i64;
    let bytes = |shape: &[i64]| Tensor::randint(255, shape, (Kind::Uint8, Device::Cpu));
    let mut metrics = DeblurMetrics::new(None).unwrap();
    let mut pass = || {
        let frames = || bytes(&[clips, clip, side, side, 3]);
        let spikes = bytes(&[clips, clip, 66, side / 2, (side / 2 + 7) / 8]);
        let batch = Batch::new(vec![frames(), frames(), spikes], vec![0; clips as usize]);
        let output = net.forward(&batch, train);
        metrics.update(&batch, &output);
        if train {
            output.loss.backward();
        }
    };
    let mut peak = || {
        // The first pass allocates gradients, which stay.
        pass();
        let watch = crate::torch::LiveBytes::start().unwrap();
        pass();
        watch.peak()
    };
    if train { peak() } else { tch::no_grad(peak) }
}

/// A plan rests on passes of one and two clips, and where those are too much on smaller clips: both say what larger ones hold.
#[test]
fn live_bytes_grow_with_clips_and_with_pixels() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/baseline.yaml")).unwrap();
    let raw = spec::task::parse_config(&text, "baseline.yaml").unwrap();
    for sets in [vec![], vec!["deblur.vrt.checkpoint_attn=true".into(), "deblur.vrt.checkpoint_ffn=true".into()]] {
        let config = raw.resolve("cpu", &sets).unwrap();
        for train in [true, false] {
            let live = |clips, side| live_peak(&config, clips, side, train) as f64;
            let (one, two, three, larger) = (live(1, 32), live(2, 32), live(3, 32), live(1, 64));
            let (by_clips, by_pixels) = ((2.0 * two - one) / three, 4.0 * one / larger);
            println!("{sets:?}, train {train}: {one} {two} {three} {larger}, {by_clips:.3} {by_pixels:.3}");
            assert!((0.98..1.04).contains(&by_clips), "{sets:?}, train {train}: {by_clips}");
            assert!((0.98..1.06).contains(&by_pixels), "{sets:?}, train {train}: {by_pixels}");
        }
    }
}

/// Squares smaller than the frame: frames of the same size, near to those restored whole, and exactly those where one square holds
/// the frame.
#[test]
fn predictions_in_tiles_are_frames_of_the_same_size() {
    let whole = batch(1, 32, 48);
    let fields = vec![whole.fields[0].shallow_clone(), whole.fields[2].shallow_clone()];
    let pass = Batch::new(fields, vec![0]);
    let restored = |tile: usize| {
        let mut config = tiny();
        config.with_section(|deblur: &mut DeblurConfig| deblur.predict_tile = tile);
        tch::manual_seed(5);
        let vs = nn::VarStore::new(Device::Cpu);
        let net = DeblurNet::new(&config, 32, &vs.root()).unwrap();
        tch::no_grad(|| net.predict(&pass))
    };
    let plain = restored(0);
    for (tile, same) in [(64, true), (24, false)] {
        let made = restored(tile);
        assert_eq!(made.size(), plain.size());
        let far = (&made - &plain).abs().max().double_value(&[]);
        assert!(if same { far == 0.0 } else { far > 0.0 && far < 0.5 }, "{tile}: {far}");
    }
}
