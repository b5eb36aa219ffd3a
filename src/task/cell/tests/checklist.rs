//! The guide's checklist: items that name its fourth system and concern these modules. Numbers are the checklist's.

use super::*;
use crate::own_loop::{MemoryMonitor, SUGGESTIONS, with_memory_guard};
use crate::task::cell::diffusion::{StepChoice, Walk};
use crate::task::draw::Draws;
use crate::task::{Metrics, Output};
use crate::torch::LiveBytes;
use std::sync::{Arc, Mutex};

/// Most bytes of tensors alive while `act` runs.
fn peak(act: impl FnOnce()) -> i64 {
    let watch = LiveBytes::start().unwrap();
    act();
    watch.peak()
}

/// 30: skip activations are freed; the output is bit-identical to a plain forward.
#[test]
fn checklist_30_skip_activations_are_freed_and_the_output_is_bit_identical() {
    let keys = UnetKeys { hidden: vec![256; 8], ..UnetKeys::default() };
    let (vs, net) = unet(&keys, 16, 16);
    let (x, t) = (Tensor::randn([512, 16], CPU), Tensor::zeros([512], (Kind::Int64, Device::Cpu)));
    let variables = vs.variables();
    let linear = |x: &Tensor, name: &str| {
        x.linear(&variables[&format!("{name}.weight")], Some(&variables[&format!("{name}.bias")]))
    };
    let norm = |x: &Tensor, name: &str| {
        let [weight, bias] = ["weight", "bias"].map(|part| &variables[&format!("{name}.{part}")]);
        x.layer_norm(weight.size(), Some(weight), Some(bias), 1e-5, true)
    };
    let block = |x: &Tensor, time: &Tensor, name: &str| {
        let sum = linear(x, &format!("{name}.fc")) + linear(&time.silu(), &format!("{name}.emb_layer.1"));
        norm(&sum, &format!("{name}.norm")).silu()
    };
    // As written without a thought for memory: every activation stays to the end.
    let plain = || {
        let features = crate::task::cell::model::layers::time_features(&t, 256);
        let time = linear(&linear(&features, "time_embedding.time_embed.0").silu(), "time_embedding.time_embed.2");
        let mut all = vec![x.shallow_clone()];
        for n in 0..8 {
            let next = block(&all[all.len() - 1], &time, &format!("layers.{n}"));
            all.push(next);
        }
        for n in 0..7 {
            let next = block(&all[all.len() - 1], &time, &format!("reverse_layers.{n}"));
            let next = next + &all[7 - n];
            all.push(next);
        }
        linear(&norm(&linear(&all[all.len() - 1], "out1"), "norm_out").silu(), "out2")
    };
    no_grad(|| assert_eq!(net.forward(&x, &t, None), plain()));
    let [freed, kept] = [peak(|| no_grad(|| drop(net.forward(&x, &t, None)))), peak(|| no_grad(|| drop(plain())))];
    assert!(freed + 5 * 512 * 256 * 4 < kept, "{freed} bytes against {kept}");
}

/// 31: sampling keeps no trajectory: memory is independent of the number of steps.
#[test]
fn checklist_31_memory_of_sampling_does_not_depend_on_the_number_of_steps() {
    let (_vs, net) = unet(&small_unet(), 6, 6);
    let network = |x: &Tensor, time: &Tensor| net.forward(x, time, None);
    let noise = |_: usize| Tensor::randn([256, 6], CPU);
    let walk = Walk { network: &network, guide: None, guide_below: 0, clip: false, ddim: None, noise: &noise };
    let sampled = |steps: usize| {
        let keys = CellDiffusion { timestep_respacing: steps.to_string(), ..CellDiffusion::default() };
        let process = diffusion(&keys);
        peak(|| drop(process.sample(&walk, noise(0), steps, &mut || false)))
    };
    assert_eq!(sampled(5), sampled(60));
}

/// 31: the evaluation of bits per number keeps no graph and nothing per step, and training never calls it.
#[test]
fn checklist_31_memory_of_the_bits_evaluation_does_not_depend_on_the_number_of_steps() {
    let (vs, net) = unet(&small_unet(), 6, 6);
    let x0 = Tensor::randn([256, 6], CPU);
    let measured = |steps: usize| {
        let keys = CellDiffusion { timestep_respacing: steps.to_string(), ..CellDiffusion::default() };
        let process = diffusion(&keys);
        let network = |x: &Tensor, time: &Tensor| net.forward(x, time, None);
        peak(|| {
            let bits = process.bits(&network, &x0, &|_| Tensor::randn([256, 6], CPU), false);
            assert!(!bits.requires_grad());
        })
    };
    assert_eq!(measured(5), measured(60));
    drop(vs);
}

/// 32: losses are f32, though schedules are computed in f64.
#[test]
fn checklist_32_losses_and_their_parts_are_f32() {
    let (_vs, net) = unet(&small_unet(), 6, 12);
    let keys = CellDiffusion { learn_sigma: true, ..CellDiffusion::default() };
    let process = diffusion(&keys);
    let (x0, noise) = (Tensor::randn([4, 6], CPU), Tensor::randn([4, 6], CPU));
    let t = Tensor::from_slice(&[0i64, 10, 500, 999]);
    let losses = process.losses(&|x, time| net.forward(x, time, None), &x0, &t, &noise);
    for value in [losses.loss, losses.mse.unwrap(), losses.vb.unwrap()] {
        assert_eq!(value.kind(), Kind::Float);
    }
    // Narrow outputs of autocast are widened before the loss.
    let narrow = |x: &Tensor, time: &Tensor| net.forward(x, time, None).to_kind(Kind::BFloat16);
    assert_eq!(process.losses(&narrow, &x0, &t, &noise).loss.kind(), Kind::Float);
    assert_eq!(Autoencoder::loss(&x0.to_kind(Kind::BFloat16), &x0).kind(), Kind::Float);
}

/// 22: memory falls with the micro-batch (that results are equal is tested with the real programs).
#[test]
fn checklist_22_memory_of_a_step_falls_with_the_micro_batch() {
    let keys = UnetKeys { hidden: vec![256; 4], ..UnetKeys::default() };
    let (_vs, net) = unet(&keys, 16, 16);
    let step = |samples: i64| {
        let (x, t) = (Tensor::randn([samples, 16], CPU), Tensor::zeros([samples], (Kind::Int64, Device::Cpu)));
        peak(|| net.forward(&x, &t, None).square().mean(Kind::Float).backward())
    };
    // The first pass allocates gradients.
    step(1);
    let [whole, quarter] = [step(256), step(64)];
    assert!(quarter * 2 < whole, "{quarter} bytes against {whole}");
}

/// 24: half precision beside f32 master weights: outputs are narrow, parameters, losses and gradients are f32.
#[test]
fn checklist_24_narrow_arithmetic_leaves_weights_losses_and_gradients_in_f32() {
    let (vs, net) = unet(&small_unet(), 6, 6);
    let process = diffusion(&CellDiffusion::default());
    let (x0, noise) = (Tensor::randn([8, 6], CPU), Tensor::randn([8, 6], CPU));
    let t = Tensor::arange(8, (Kind::Int64, Device::Cpu)) * 120;
    let losses = || process.losses(&|x, time| net.forward(x, time, None), &x0, &t, &noise).loss;
    let full = no_grad(losses);
    let narrow = {
        let _on = crate::torch::Autocast::enter(Device::Cpu, true, Kind::BFloat16).unwrap();
        losses()
    };
    assert_eq!(narrow.kind(), Kind::Float);
    let far = difference(&full, &narrow.detach());
    assert!(far > 0.0 && far < 0.1, "{far}");
    narrow.mean(Kind::Float).backward();
    assert!(vs.trainable_variables().iter().all(|v| v.kind() == Kind::Float && v.grad().kind() == Kind::Float));
}

/// 28: histories have a fixed length: ten losses per step of the sampler, a fixed number of sums in the metrics.
#[test]
fn checklist_28_histories_do_not_grow_with_the_steps() {
    let choice = StepChoice::new(spec::task::cell::ScheduleSampler::LossSecondMoment, 20, Device::Cpu);
    let mut metrics = crate::task::cell::stage::diffusion::DiffusionMetrics::new(true, true);
    let shapes = || choice.state().iter().map(|(_, tensor)| tensor.size()).collect::<Vec<_>>();
    let (before, sums) = (shapes(), metrics.sums().len());
    for step in 0..200 {
        let draws = Draws::new(1, step, Tensor::arange(32, (Kind::Int64, Device::Cpu)));
        let (t, _) = choice.draw(&draws, true);
        choice.hear(&Tensor::stack(&[t.to_kind(Kind::Float), Tensor::rand([32], CPU)], 1));
        let batch = crate::task::Batch::new(vec![], (0..32).collect());
        metrics.update(&batch, &Output::new(Tensor::from(0.0), Tensor::rand([32, 4], CPU)));
    }
    assert_eq!((shapes(), metrics.sums().len()), (before, sums));
    assert_eq!(shapes()[0], [20, 10]);
}

/// 52: the monitor's line comes at multiples of the interval only, in the guide's form.
#[test]
fn checklist_52_the_memory_monitor_prints_at_multiples_of_its_interval() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&lines);
    let monitor = MemoryMonitor::new(100).printing_to(move |line| into.lock().unwrap().push(line.to_owned()));
    (0..=250).for_each(|step| drop(monitor.log_memory_usage(step)));
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[1].starts_with("Step 100: CPU: ") && lines[1].contains("MB"), "{lines:?}");
}

/// 53: the guard hands on what the training function returns; 54: the four suggestions, in the guide's order.
#[test]
fn checklist_53_and_54_the_guard_returns_the_result_and_suggestions_are_the_guides_four() {
    let (_vs, net) = unet(&small_unet(), 6, 6);
    let (x, t) = (Tensor::randn([4, 6], CPU), Tensor::zeros([4], (Kind::Int64, Device::Cpu)));
    let output = with_memory_guard(|| net.forward(&x, &t, None)).unwrap();
    assert_eq!(output.size(), [4, 6]);
    assert_eq!(SUGGESTIONS.len(), 4);
    for (line, word) in SUGGESTIONS.iter().zip(["batch_size", "microbatch", "fp16", "model"]) {
        assert!(line.contains(word), "{line} lacks {word}");
    }
}
