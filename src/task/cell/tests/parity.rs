//! Parity with PyTorch from equal weights. `tests/benches/reference/cell.py` made the values.

use super::*;
use crate::task::cell::diffusion::Walk;
use crate::task::draw::Draws;
use crate::torch::{AdamState, AdamStep, fused_adam};
use crate::train::ema::Ema;
use spec::task::cell::NoiseSchedule;
use std::path::Path;

const FORWARD: f64 = 1e-5;
const TRAINED: f64 = 1e-4;

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cell_golden.safetensors");
        Self(Tensor::read_safetensors(path).unwrap().into_iter().collect())
    }

    fn get(&self, name: &str) -> Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no {name}")).shallow_clone()
    }

    /// Tensors below `prefix`, without it.
    fn below(&self, prefix: &str) -> HashMap<String, Tensor> {
        let inside =
            |(name, value): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), value.shallow_clone()));
        self.0.iter().filter_map(inside).collect()
    }

    /// Gives `vs` the weights of a case: names are the `state_dict`'s, all of them.
    fn load(&self, vs: &nn::VarStore, case: &str, kind: &str) {
        let values = self.below(&format!("{case}/{kind}/"));
        let mut names: [Vec<_>; 2] = [vs.variables().into_keys().collect(), values.keys().cloned().collect()];
        names.iter_mut().for_each(|names| names.sort());
        assert_eq!(names[0], names[1], "{case}");
        set(vs, &values);
    }

    /// Parameters and buffers are what training left in PyTorch.
    fn assert_after(&self, vs: &nn::VarStore, case: &str) {
        let expected = self.below(&format!("{case}/after/"));
        for (name, value) in vs.variables() {
            let far = relative(&value, &expected[&name]);
            assert!(far < TRAINED, "{case}: {name} differs by {far:e}");
        }
    }
}

fn no_dropout() -> Draws {
    Draws::new(0, 0, Tensor::from_slice(&[0i64]))
}

/// Steps of the fixtures' training: fused AdamW and the average that checkpoints hold. Returns the losses.
fn train(golden: &Golden, vs: &nn::VarStore, case: &str, [lr, weight_decay]: [f64; 2], loss: &dyn Fn(i64) -> Tensor) {
    let mut named: Vec<(String, Tensor)> = vs.variables().into_iter().filter(|(_, v)| v.requires_grad()).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let params: Vec<Tensor> = named.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let zeros = || -> Vec<Tensor> { params.iter().map(|param| param.detach().zeros_like()).collect() };
    let (first, second) = (zeros(), zeros());
    let steps: Vec<Tensor> = params.iter().map(|_| Tensor::zeros([], CPU)).collect();
    let mut ema = Ema::new(0.9, 0.0, &named);
    let step = AdamStep { decoupled: true, lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay };
    let mut losses = Vec::new();
    for index in 0..50 {
        let loss = loss(index);
        losses.push(loss.detach());
        let grads = Tensor::run_backward(&[loss], &params, false, false);
        no_grad(|| {
            steps.iter().for_each(|step| drop(step.shallow_clone().g_add_scalar_(1.0)));
            let state =
                AdamState { params: &params, grads: &grads, exp_avgs: &first, exp_avg_sqs: &second, steps: &steps };
            fused_adam(&state, &step).unwrap();
        });
        ema.update(index as u64 + 1, &named).unwrap();
    }
    let far = relative(&Tensor::stack(&losses, 0), &golden.get(&format!("{case}/losses")));
    assert!(far < TRAINED, "{case}: losses differ by {far:e}");
    golden.assert_after(vs, case);
    let expected = golden.below(&format!("{case}/ema/"));
    for (name, average) in ema.tensors() {
        let far = relative(&average, &expected[&name]);
        assert!(far < TRAINED, "{case}: average of {name} differs by {far:e}");
    }
}

#[test]
fn autoencoder_equals_pytorch_forward_and_after_50_steps_with_buffers_and_ema() {
    let golden = Golden::read();
    let (vs, net) = autoencoder(&small_autoencoder(), 20);
    golden.load(&vs, "autoencoder", "param");
    let x = golden.get("autoencoder/x");
    let first = x.get(0);
    let latent = no_grad(|| net.encode(&first, None));
    assert!(difference(&latent, &golden.get("autoencoder/latent")) < FORWARD);
    assert!(difference(&no_grad(|| net.forward(&first, None)), &golden.get("autoencoder/decoded")) < FORWARD);
    let draws = no_dropout();
    let trained = no_grad(|| net.forward(&first, Some(&draws)));
    assert!(difference(&trained, &golden.get("autoencoder/decoded_train")) < FORWARD);
    // That pass has moved the running statistics.
    golden.load(&vs, "autoencoder", "param");
    train(&golden, &vs, "autoencoder", [5e-3, 0.01], &|step| {
        let x = x.get(step);
        Autoencoder::loss(&net.forward(&x, Some(&draws)), &x)
    });
    assert_eq!(vs.variables()["encoder.network.0.2.num_batches_tracked"].int64_value(&[]), 50);
    let after = no_grad(|| net.forward(&first, None));
    assert!(difference(&after, &golden.get("autoencoder/decoded_after")) < TRAINED);
}

/// The step `⌊u T⌋` of uniform draws.
fn steps_of(u: &Tensor, steps: usize) -> Tensor {
    (u * steps as f64).floor().to_kind(Kind::Int64)
}

fn variants() -> Vec<(&'static str, CellDiffusion)> {
    let keys = CellDiffusion::default;
    vec![
        ("eps", keys()),
        ("xstart", CellDiffusion { predict_xstart: true, ..keys() }),
        ("cosine", CellDiffusion { noise_schedule: NoiseSchedule::Cosine, ..keys() }),
        ("kl", CellDiffusion { use_kl: true, ..keys() }),
        ("kl_small_xstart", CellDiffusion { use_kl: true, sigma_small: true, predict_xstart: true, ..keys() }),
        ("learned", CellDiffusion { learn_sigma: true, ..keys() }),
        ("learned_rescaled", learned_rescaled()),
        (
            "learned_kl",
            CellDiffusion {
                learn_sigma: true,
                use_kl: true,
                timestep_respacing: "10,15,20".into(),
                noise_schedule: NoiseSchedule::Cosine,
                ..keys()
            },
        ),
        (
            "learned_xstart",
            CellDiffusion { learn_sigma: true, predict_xstart: true, timestep_respacing: "ddim50".into(), ..keys() },
        ),
    ]
}

fn learned_rescaled() -> CellDiffusion {
    CellDiffusion {
        learn_sigma: true,
        rescale_learned_sigmas: true,
        rescale_timesteps: true,
        timestep_respacing: "250".into(),
        ..CellDiffusion::default()
    }
}

#[test]
fn unet_output_equals_pytorch() {
    let golden = Golden::read();
    let (vs, net) = unet(&small_unet(), 6, 6);
    golden.load(&vs, "unet", "param");
    let t = Tensor::from_slice(&[0i64, 1, 57, 500, 999]);
    let output = no_grad(|| net.forward(&golden.get("diffusion/x0").get(0), &t, None));
    assert!(difference(&output, &golden.get("unet/output")) < FORWARD);
}

#[test]
fn losses_of_every_variant_equal_pytorch_and_so_do_their_gradients() {
    let golden = Golden::read();
    let (vs, net) = unet(&small_unet(), 6, 6);
    let (wide_vs, wide) = unet(&small_unet(), 6, 12);
    golden.load(&vs, "unet", "param");
    golden.load(&wide_vs, "wide", "param");
    let [x0, noise, u] = ["x0", "noise", "u"].map(|name| golden.get(&format!("diffusion/{name}")).get(0));
    for (name, keys) in variants() {
        let process = diffusion(&keys);
        let (vs, net) = if keys.learn_sigma { (&wide_vs, &wide) } else { (&vs, &net) };
        let t = Tensor::cat(
            &[Tensor::zeros([2], (Kind::Int64, Device::Cpu)), steps_of(&u, process.steps()).narrow(0, 2, 3)],
            0,
        );
        let losses = process.losses(&|x, time| net.forward(x, time, None), &x0, &t, &noise);
        let get = |part: &str| golden.get(&format!("losses/{name}/{part}"));
        for (part, value) in [("loss", Some(&losses.loss)), ("mse", losses.mse.as_ref()), ("vb", losses.vb.as_ref())] {
            let known = golden.0.contains_key(&format!("losses/{name}/{part}"));
            assert_eq!(value.is_some(), known, "{name}: {part}");
            let Some(value) = value else { continue };
            let far = relative(value, &get(part));
            assert!(far < FORWARD, "{name}: {part} differs by {far:e}");
        }
        let params = vs.trainable_variables();
        let gradients = Tensor::run_backward(&[losses.loss.mean(Kind::Float)], &params, false, false);
        let flat: Vec<Tensor> = gradients.iter().map(|gradient| gradient.flatten(0, -1)).collect();
        let norm = Tensor::cat(&flat, 0).norm();
        let far = relative(&norm, &get("gradient_norm"));
        assert!(far < FORWARD, "{name}: the gradient's norm differs by {far:e}");
        let bias = params.iter().position(|param| param.data_ptr() == vs.variables()["out2.bias"].data_ptr()).unwrap();
        let far = relative(&gradients[bias], &get("gradient_out2"));
        assert!(far < FORWARD, "{name}: the gradient of out2.bias differs by {far:e}");
    }
}

#[test]
fn bits_per_number_equal_pytorch() {
    let golden = Golden::read();
    let (vs, net) = unet(&small_unet(), 6, 6);
    golden.load(&vs, "unet", "param");
    let process = diffusion(&CellDiffusion { timestep_respacing: "ddim20".into(), ..CellDiffusion::default() });
    let noise = golden.get("diffusion/noise");
    let x0 = golden.get("diffusion/x0").get(0);
    let bits = process.bits(&|x, time| net.forward(x, time, None), &x0, &|step| noise.get(step as i64), false);
    assert!(relative(&bits, &golden.get("losses/bits")) < FORWARD);
}

#[test]
fn diffusion_equals_pytorch_after_50_steps_with_ema() {
    let golden = Golden::read();
    for (case, keys) in [("unet", CellDiffusion::default()), ("wide", learned_rescaled())] {
        let (vs, net) = unet(&small_unet(), 6, 6 * Diffusion::outputs_per_input(&keys));
        golden.load(&vs, case, "param");
        let process = diffusion(&keys);
        let [x0, noise, u] = ["x0", "noise", "u"].map(|name| golden.get(&format!("diffusion/{name}")));
        train(&golden, &vs, case, [1e-3, 1e-4], &|step| {
            let t = steps_of(&u.get(step), process.steps());
            let network = |x: &Tensor, time: &Tensor| net.forward(x, time, None);
            process.losses(&network, &x0.get(step), &t, &noise.get(step)).loss.mean(Kind::Float)
        });
    }
}

#[test]
fn classifier_equals_pytorch_forward_gradient_and_after_50_steps_with_buffers_and_ema() {
    let golden = Golden::read();
    let (vs, net) = classifier(&small_classifier(), 6, 3);
    golden.load(&vs, "classifier", "param");
    let process = diffusion(&CellDiffusion::default());
    let [x0, noise, u] = ["x0", "noise", "u"].map(|name| golden.get(&format!("diffusion/{name}")));
    let y = golden.get("classifier/y");
    let t = |step: i64| steps_of(&u.get(step), 500);
    let noised = |step: i64| process.noised(&x0.get(step), &t(step), &noise.get(step));
    let logits = no_grad(|| net.forward(&noised(0), &t(0), None));
    assert!(difference(&logits, &golden.get("classifier/logits")) < FORWARD);
    let draws = no_dropout();
    train(&golden, &vs, "classifier", [3e-3, 0.0], &|step| {
        net.forward(&noised(step), &t(step), Some(&draws)).cross_entropy_for_logits(&y.get(step))
    });
    golden.load(&vs, "classifier", "after");
    let gradient = net.gradient(&x0.get(0), &t(0), &[(&y.get(0), 2.0)]);
    assert!(relative(&gradient, &golden.get("classifier/gradient")) < FORWARD);
}

#[test]
fn samples_equal_pytorch_ancestral_and_ddim_guided_and_not() {
    let golden = Golden::read();
    let (vs, net) = unet(&small_unet(), 6, 6);
    golden.load(&vs, "unet", "after");
    let (classifier_vs, judge) = classifier(&small_classifier(), 6, 3);
    golden.load(&classifier_vs, "classifier", "after");
    let y = golden.get("classifier/y").get(0);
    let noise = golden.get("diffusion/noise");
    let network = |x: &Tensor, time: &Tensor| net.forward(x, time, None);
    let guide = |x: &Tensor, time: &Tensor| judge.gradient(x, time, &[(&y, 2.0)]);
    let fresh = |step: usize| noise.get(step as i64);
    let plain = || Walk { network: &network, guide: None, guide_below: 0, clip: false, ddim: None, noise: &fresh };
    let keys = |text: &str| CellDiffusion { timestep_respacing: text.into(), ..CellDiffusion::default() };
    let walks = [
        ("ancestral", keys("20"), plain()),
        ("ancestral_clipped", keys("20"), Walk { clip: true, ..plain() }),
        ("ancestral_guided", keys("20"), Walk { clip: true, guide: Some(&guide), guide_below: 500, ..plain() }),
        ("ancestral_small", CellDiffusion { sigma_small: true, ..keys("20") }, plain()),
        ("ddim", keys("ddim20"), Walk { ddim: Some(0.0), ..plain() }),
        ("ddim_noisy", keys("ddim20"), Walk { ddim: Some(0.7), ..plain() }),
        ("ddim_guided", keys("ddim20"), Walk { ddim: Some(0.0), clip: true, guide: Some(&guide), ..plain() }),
    ];
    for (name, keys, walk) in walks {
        let process = diffusion(&keys);
        let sample = process.sample(&walk, noise.get(0), process.steps(), &mut || false).unwrap();
        let far = relative(&sample, &golden.get(&format!("samples/{name}")));
        assert!(far < TRAINED, "{name} differs by {far:e}");
    }
    // Interpolation starts at the step to which latents were noised.
    let process = diffusion(&keys("ddim20"));
    let t = Tensor::full([5], 11, (Kind::Int64, Device::Cpu));
    let start = process.noised(&golden.get("diffusion/x0").get(1), &t, &noise.get(0));
    let sample = process.sample(&plain(), start, 12, &mut || false).unwrap();
    assert!(relative(&sample, &golden.get("samples/interpolated")) < TRAINED);
}
