//! The model against its PyTorch twin, and one test for each defect of the originals.

use super::{EmgMetrics, EmgNet, decoder::Decoder, joints, loss::Loss, resample};
use crate::task::{Batch, Metrics, Model, Output};
use spec::task::emg::{DecoderType, EmgLoss, EmgModel, TdsStage};
use std::{collections::HashMap, path::Path};
use tch::{Device, Kind, Tensor, nn, no_grad};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// `[conv kernel, stride, blocks, channels, width, time kernel]`.
fn stage(numbers: [usize; 6]) -> TdsStage {
    let [in_conv_kernel, in_conv_stride, num_blocks, channels, feature_width, kernel_width] = numbers;
    TdsStage { in_conv_kernel, in_conv_stride, num_blocks, channels, feature_width, kernel_width }
}

fn config(stages: &[[usize; 6]], hidden: usize, layers: usize) -> EmgModel {
    EmgModel {
        tds_stages: stages.iter().copied().map(stage).collect(),
        decoder_hidden_size: hidden,
        decoder_num_layers: layers,
        dropout: 0.0,
        ..EmgModel::default()
    }
}

fn quick_demo() -> EmgModel {
    config(&[[5, 4, 1, 4, 4, 11]], 64, 1)
}

fn high_performance() -> EmgModel {
    config(&[[7, 2, 2, 8, 8, 21], [5, 2, 2, 8, 8, 11], [3, 2, 2, 8, 8, 7]], 256, 3)
}

fn net(config: &EmgModel, loss: EmgLoss, window: usize) -> (nn::VarStore, EmgNet) {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = EmgNet::new(config, Loss { kind: loss, mae_weight: 0.5 }, window, &vs.root());
    (vs, net)
}

fn batch(emg: Tensor, target: Tensor) -> Batch {
    let sample_ids = (0..emg.size()[0] as u64).collect();
    Batch::new(vec![emg, target], sample_ids)
}

fn golden() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/emg_golden.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// Prediction, loss and every gradient equal PyTorch's within 1e-5; names are the `state_dict`'s.
fn equals_twin(case: &str, config: &EmgModel, loss: EmgLoss) {
    let golden = golden();
    let get = |name: &str| golden[&format!("{case}/{name}")].shallow_clone();
    let (vs, net) = net(config, loss, get("emg").size()[1] as usize);
    let names: Vec<_> = golden.keys().filter_map(|key| key.strip_prefix(&format!("{case}/param/"))).collect();
    let mut variables = vs.variables();
    assert_eq!(variables.len(), names.len());
    for (name, variable) in &mut variables {
        no_grad(|| variable.copy_(&get(&format!("param/{name}"))));
    }
    let batch = batch(get("emg"), get("target"));
    let output = net.forward(&batch, true);
    output.loss.backward();
    assert!(difference(&output.prediction, &get("prediction")) < 1e-5, "{case}: prediction");
    assert!(difference(&output.loss, &get("loss")) < 1e-5, "{case}: loss");
    for (name, variable) in &variables {
        let expected = get(&format!("grad/{name}"));
        let bound = 1e-5 * expected.abs().max().double_value(&[]).max(1.0);
        assert!(difference(&variable.grad(), &expected) < bound, "{case}: gradient of {name}");
    }
    assert!(difference(&net.predict(&batch.fields[0], false), &get("prediction")) < 1e-5, "{case}: predict");
    // Evaluation gives the same value without a graph.
    let evaluated = no_grad(|| net.forward(&batch, false));
    assert!(!evaluated.loss.requires_grad());
    assert!(difference(&evaluated.loss, &get("loss")) < 1e-5, "{case}: evaluated loss");
}

#[test]
fn quick_demo_equals_pytorch() {
    equals_twin("quick_demo", &quick_demo(), EmgLoss::MseMae);
}

#[test]
fn velocity_mode_equals_pytorch() {
    let config = config(&[[5, 2, 2, 4, 3, 21], [3, 2, 1, 2, 5, 4]], 12, 2);
    equals_twin("velocity", &EmgModel { predict_velocity: true, output_scale: 0.1, ..config }, EmgLoss::Mae);
}

#[test]
fn mlp_decoder_equals_pytorch() {
    let config = config(&[[4, 3, 1, 3, 2, 5]], 0, 0);
    let config = EmgModel { decoder_type: DecoderType::Mlp, decoder_mlp_hidden: vec![10, 6], ..config };
    equals_twin("mlp", &config, EmgLoss::Mse);
}

#[test]
fn unconditioned_decoder_equals_pytorch() {
    let config = config(&[[7, 2, 1, 2, 3, 3]], 8, 2);
    let config = EmgModel { decoder_state_condition: false, output_scale: 0.5, ..config };
    equals_twin("unconditioned", &config, EmgLoss::MseMae);
}

/// A resumed run can only equal an unbroken one when the same step gives the same bits.
#[test]
fn gradients_repeat_bit_for_bit() {
    let config = EmgModel { dropout: 0.0, ..EmgModel::default() };
    let (vs, net) = net(&config, EmgLoss::MseMae, 500);
    let batch = batch(Tensor::randn([4, 500, 16], CPU), Tensor::randn([4, 500, 20], CPU));
    let gradients = || {
        let output = net.forward(&batch, true);
        let variables = vs.trainable_variables();
        Tensor::run_backward(&[output.loss], &variables, false, false)
    };
    assert_eq!(gradients(), gradients());
}

/// Defect (a): time kernels were clamped to the width of a group. The counts hold only with the configured kernels.
#[test]
fn time_kernels_are_not_clamped() {
    let expected = [(EmgModel::default(), 282_996), (high_performance(), 1_504_836), (quick_demo(), 29_512)];
    for (config, parameters) in expected {
        let (vs, _) = net(&config, EmgLoss::Mse, 500);
        assert_eq!(vs.trainable_variables().iter().map(Tensor::numel).sum::<usize>(), parameters);
        let kernel = vs.variables()["encoder.stages.0.blocks.0.tds.conv.weight"].size()[3];
        assert_eq!(kernel as usize, config.tds_stages[0].kernel_width);
    }
}

/// Defect (b): the rollout's length ignored the encoder's stride and came to 1 to 3 steps.
#[test]
fn rollout_length_follows_the_window() {
    let steps = |window| resample::rollout_steps(window, 2000.0, 50.0);
    assert_eq!([steps(500), steps(540), steps(1000), steps(10_000), steps(10)], [12, 14, 25, 250, 1]);
    for config in [EmgModel::default(), high_performance(), quick_demo()] {
        let (_vs, net) = net(&config, EmgLoss::Mse, 500);
        assert_eq!(net.rollout_of(&Tensor::randn([2, 500, 16], CPU)).size(), [2, 12, 20]);
    }
}

/// Defect (c): online errors were divided by batch × time, not by the 20 joints too.
#[test]
fn online_metrics_divide_by_joints_too() {
    let mut metrics = EmgMetrics::new(20, 2000.0, None);
    let target = Tensor::zeros([3, 50, 20], CPU);
    let output = Output::new(Tensor::from(0.25f32), &target + 0.5);
    metrics.update(&batch(Tensor::zeros([3, 50, 16], CPU), target), &output);
    let values: HashMap<_, _> = metrics.values(&metrics.sums()).into_iter().collect();
    assert!((values["mae_rad"] - 0.5).abs() < 1e-7);
    assert!((values["mae_deg_thumb"] - 0.5f64.to_degrees()).abs() < 1e-5);
    assert_eq!(values["loss"], 0.25);
}

/// Sums over batches of unlike size equal the formulas over everything at once, and two ranks' sums add up.
#[test]
fn online_metrics_equal_offline() {
    tch::manual_seed(3);
    let mean: Vec<f64> = (0..20).map(|joint| joint as f64 * 0.05).collect();
    let target = Tensor::randn([11, 60, 20], CPU);
    let prediction = &target + Tensor::randn([11, 60, 20], CPU) * 0.2;
    let parts = [(0, 4), (4, 4), (8, 3)];
    let mut ranks = [EmgMetrics::new(20, 2000.0, Some(&mean)), EmgMetrics::new(20, 2000.0, Some(&mean))];
    for (index, (start, len)) in parts.into_iter().enumerate() {
        let prediction = prediction.narrow(0, start, len);
        let output = Output::new(Tensor::from(index as f32), prediction);
        let batch = batch(Tensor::zeros([len, 60, 16], CPU), target.narrow(0, start, len));
        ranks[index % 2].update(&batch, &output);
    }
    let sums: Vec<f64> = ranks[0].sums().iter().zip(ranks[1].sums()).map(|(a, b)| a + b).collect();
    let values: HashMap<_, _> = ranks[0].values(&sums).into_iter().collect();

    let (target, prediction) = (target.to_kind(Kind::Double), prediction.to_kind(Kind::Double));
    let error = &prediction - &target;
    let mean_of = |x: &Tensor| x.abs().mean(Kind::Double).double_value(&[]);
    let close = |name: &str, expected: f64| {
        assert!((values[name] / expected - 1.0).abs() < 1e-6, "{name}: {} against {expected}", values[name]);
    };
    close("loss", (0.0 * 4.0 + 1.0 * 4.0 + 2.0 * 3.0) / 11.0);
    close("mae_rad", mean_of(&error));
    close("mae_deg", mean_of(&error).to_degrees());
    for (name, joints) in joints::groups() {
        let joints: Vec<i64> = joints.into_iter().map(|joint| joint as i64).collect();
        let group = error.index_select(2, &Tensor::from_slice(&joints));
        close(&format!("mae_deg_{name}"), mean_of(&group).to_degrees());
    }
    for (order, name) in [(1, "velocity_mae"), (2, "acceleration_mae"), (3, "jerk_mae")] {
        close(name, mean_of(&error.diff(order, 1, None::<&Tensor>, None::<&Tensor>)) * 2000f64.powi(order as i32));
    }
    let baseline = mean_of(&(&target - Tensor::from_slice(&mean).to_kind(Kind::Float))).to_degrees();
    close("mean_pose_mae_deg", baseline);
    close("vs_mean_pose", mean_of(&error).to_degrees() / baseline);
    ranks[0].reset();
    assert!(ranks[0].values(&ranks[0].sums()).is_empty());
}

/// The closed-form gradient is what autograd finds for the plain formulas.
#[test]
fn losses_equal_autograd() {
    tch::manual_seed(5);
    let target = Tensor::randn([4, 30, 20], CPU);
    let upsample = resample::matrix(6, 30, Device::Cpu);
    for (kind, mse, mae) in [(EmgLoss::Mse, 1.0, 0.0), (EmgLoss::Mae, 0.0, 1.0), (EmgLoss::MseMae, 1.0, 0.3)] {
        let poses = Tensor::randn([4, 6, 20], CPU).set_requires_grad(true);
        let error = upsample.matmul(&poses) - &target;
        let plain = error.square().mean(Kind::Float) * mse + error.abs().mean(Kind::Float) * mae;
        let expected = Tensor::run_backward(&[&plain], &[&poses], false, false);
        let (loss, _) = Loss { kind, mae_weight: 0.3 }.of_poses(&poses, &upsample, &target);
        let gradient = Tensor::run_backward(&[&loss], &[&poses], false, false);
        assert!(difference(&loss, &plain) < 1e-6);
        assert!(difference(&gradient[0], &expected[0]) < 1e-8);
    }
}

#[test]
fn interpolation_equals_pytorch() {
    let x = Tensor::randn([2, 125, 8], CPU);
    for outputs in [1, 12, 124, 125, 400] {
        let expected = x.transpose(1, 2).upsample_linear1d([outputs], true, None).transpose(1, 2);
        let (frames, matrix) = resample::sparse(125, outputs, Device::Cpu);
        assert_eq!(frames.is_some(), outputs < 63);
        let read = frames.map_or(x.shallow_clone(), |frames| x.index_select(1, &frames));
        assert!(difference(&matrix.matmul(&read), &expected) < 1e-6);
    }
}

#[test]
fn windows_of_another_length_pass() {
    let (_vs, net) = net(&EmgModel::default(), EmgLoss::Mse, 500);
    for window in [1, 37, 1000] {
        assert_eq!(net.predict(&Tensor::randn([2, window, 16], CPU), false).size(), [2, window, 20]);
    }
}

fn initial(seed: i64) -> HashMap<String, Tensor> {
    tch::manual_seed(seed);
    net(&EmgModel::default(), EmgLoss::Mse, 500).0.variables()
}

/// The same seed gives the same weights. Tests beside this one draw from the same generator, so that a pair may be
/// disturbed; without seeding, none of the pairs could be equal.
#[test]
fn initial_weights_are_seeded() {
    let equal =
        |a: HashMap<String, Tensor>, b: HashMap<String, Tensor>| a.iter().all(|(name, value)| b[name] == *value);
    assert!((0..100).any(|_| equal(initial(1), initial(1))));
    assert!(!equal(initial(1), initial(2)));
}

/// Uniform within PyTorch's bounds, 1/√fan_in.
#[test]
fn initial_weights_are_bounded_as_in_pytorch() {
    let weights = initial(3);
    let bounds = [
        ("encoder.stages.0.conv.weight", 80f64),
        ("encoder.stages.1.blocks.1.tds.conv.bias", 88.0),
        ("encoder.stages.1.blocks.0.fc.linear2.weight", 64.0),
        ("decoder.lstm.weight_ih_l0", 128.0),
        ("decoder.head.bias", 128.0),
    ];
    for (name, fan_in) in bounds {
        let largest = weights[name].abs().max().double_value(&[]) * fan_in.sqrt();
        assert!(largest <= 1.0 && largest > 0.6, "{name}: {largest}");
    }
}

/// Dropout drops its share, keeps the mean, and is off in evaluation.
#[test]
fn dropout_keeps_the_mean() {
    tch::manual_seed(9);
    let x = Tensor::ones([64, 100, 33], CPU);
    let y = super::tds::dropout(&x, 0.1, true);
    let dropped = y.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    assert!((dropped - 0.1).abs() < 0.003, "{dropped}");
    assert!((y.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.003);
    assert_eq!(super::tds::dropout(&x, 0.1, false), x);
}

#[test]
fn decoder_without_hidden_layers_is_linear() {
    let vs = nn::VarStore::new(Device::Cpu);
    let config = EmgModel { decoder_type: DecoderType::Mlp, decoder_mlp_hidden: Vec::new(), ..EmgModel::default() };
    let decoder = Decoder::new(&vs.root(), 64, &config);
    assert_eq!(decoder.forward(&Tensor::randn([3, 2, 64], CPU)).size(), [2, 3, 20]);
}

#[test]
fn joint_groups_cover_every_joint_twice() {
    let groups = joints::groups();
    assert_eq!(groups.iter().map(|(_, joints)| joints.len()).collect::<Vec<_>>(), [4, 4, 4, 4, 4, 10, 5, 5]);
    assert_eq!(joints::name(0).as_deref(), Some("thumb_CMC_FE"));
    assert_eq!(joints::name(19).as_deref(), Some("pinky_DIP_FE"));
    assert_eq!(joints::name(20), None);
}

/// Losses are f32 whatever the targets' type led to in the originals; autocast narrows the products alone.
#[test]
fn losses_and_gradients_are_f32() {
    let (vs, net) = net(&quick_demo(), EmgLoss::MseMae, 500);
    let batch = batch(Tensor::randn([2, 500, 16], CPU), Tensor::randn([2, 500, 20], CPU));
    let full = net.forward(&batch, false);
    let narrow = {
        let _on = crate::torch::Autocast::enter(Device::Cpu, true, Kind::BFloat16).unwrap();
        net.forward(&batch, false)
    };
    narrow.loss.backward();
    for output in [&full, &narrow] {
        assert_eq!((output.loss.kind(), output.prediction.kind()), (Kind::Float, Kind::Float));
    }
    assert!(vs.trainable_variables().iter().all(|v| v.grad().kind() == Kind::Float));
    let far = difference(&full.prediction, &narrow.prediction);
    assert!(far > 0.0 && far < 0.05, "{far}");
}

#[test]
fn a_smaller_decoder_has_fewer_parameters() {
    let count = |hidden| {
        let config = EmgModel { decoder_hidden_size: hidden, ..EmgModel::default() };
        net(&config, EmgLoss::Mse, 500).0.trainable_variables().iter().map(Tensor::numel).sum::<usize>()
    };
    // Two layers of 4h rows: 84 + h and 2h inputs, two biases each; the head's 20 rows of h and their biases.
    let decoder = |h: usize| 4 * h * (84 + h + 2 * h + 4) + 20 * (h + 1);
    assert_eq!(count(128) - count(64), decoder(128) - decoder(64));
}

/// Bytes of live tensors at the peak of a training step of `samples` windows, batch included.
fn live_peak(config: &EmgModel, loss: EmgLoss, samples: i64) -> i64 {
    let (vs, net) = net(config, loss, 500);
    let mut metrics = EmgMetrics::new(20, 2000.0, None);
    let mut step = || {
        let batch = batch(Tensor::randn([samples, 500, 16], CPU), Tensor::randn([samples, 500, 20], CPU));
        let output = net.forward(&batch, true);
        metrics.update(&batch, &output);
        output.loss.backward();
    };
    // The first pass allocates gradients, which stay.
    step();
    let watch = crate::torch::LiveBytes::start().unwrap();
    step();
    drop(vs);
    watch.peak()
}

/// Planned from passes of few windows, activations of many are never below what a step holds, and at most 15 % above.
#[test]
fn activations_planned_from_small_passes_are_those_of_large_ones() {
    use spec::contract::{Machine, Measured, Pass};
    use spec::plan::{Request, plan};
    let machine =
        Machine { cores: 4, memory_total_bytes: 64 << 30, memory_available_bytes: 64 << 30, ..Machine::default() };
    for (name, config, loss) in [
        ("default", EmgModel::default(), EmgLoss::MseMae),
        ("high_performance", EmgModel { dropout: 0.1, ..high_performance() }, EmgLoss::MseMae),
        ("quick_demo", EmgModel { dropout: 0.1, ..quick_demo() }, EmgLoss::Mse),
    ] {
        let pass = |samples: u64| {
            let tensor_bytes = live_peak(&config, loss, samples as i64) as u64;
            Pass { samples, tensor_bytes, beside_bytes: 0 }
        };
        let mut measured = Measured::default();
        // The numbers of samples that `rank describe` tries where passes are cheap.
        measured.model.train.seen = [1, 2, 8, 32].map(pass).to_vec();
        for samples in [4, 64] {
            let mut config = spec::task::config("emg");
            config.train.batch_size = samples;
            let request = Request { ranks: Some(1), ..Request::default() };
            let planned = plan(&config, &machine, &measured, &request)
                .unwrap()
                .budget
                .line_bytes(spec::contract::LineId::Activations);
            let live = pass(samples as u64).tensor_bytes;
            let ratio = planned as f64 / live as f64;
            println!("{name}, {samples} windows: {live} bytes live, {planned} planned, {ratio:.3}");
            assert!((1.0..1.15).contains(&ratio), "{name}, {samples} windows: {planned} planned for {live} live bytes");
        }
    }
}
