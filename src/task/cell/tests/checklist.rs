//! The guide's checklist: items that name its fourth system and concern these modules. Numbers are the checklist's.

use super::*;
use crate::task::cell::diffusion::Walk;
use crate::torch::LiveBytes;

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
