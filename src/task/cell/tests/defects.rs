//! One test for each defect of the original program that these modules could repeat.

use super::*;
use crate::task::cell::model::layers::time_features;
use crate::task::draw::Draws;

fn draws() -> Draws {
    Draws::new(1, 1, Tensor::arange(8, (Kind::Int64, Device::Cpu)))
}

/// The counts of the published models.
#[test]
fn parameters_are_as_many_as_published() {
    let (vs, _) = autoencoder(&CellAutoencoder::default(), 18_996);
    assert_eq!(count(&vs), 43_397_818);
    let (vs, _) = unet(&UnetKeys::default(), 128, 128);
    assert_eq!(count(&vs), 3_488_384);
    let class_default = UnetKeys { hidden: vec![2000, 1000, 500, 500], ..UnetKeys::default() };
    assert_eq!(count(&unet(&class_default, 128, 128).0), 33_052_128);
    assert_eq!(count(&unet(&class_default, 2, 2).0), 32_548_002);
    assert_eq!(count(&unet(&UnetKeys { hidden: vec![64, 64, 32, 16], ..UnetKeys::default() }, 16, 16).0), 56_144);
    let (vs, _) = classifier(&CellClassifier::default(), 128, 12);
    let all: usize = vs.variables().iter().filter(|(name, _)| !is_buffer(name)).map(|(_, value)| value.numel()).sum();
    assert_eq!(all, 1_647_628);
}

fn is_buffer(name: &str) -> bool {
    ["running_mean", "running_var", "num_batches_tracked"].iter().any(|buffer| name.ends_with(buffer))
}

/// Published names, where a file of weights is loaded by.
#[test]
fn names_are_those_of_published_checkpoints() {
    let names = |vs: nn::VarStore| vs.variables();
    let found = names(autoencoder(&CellAutoencoder::default(), 30).0);
    for (name, shape) in [
        ("encoder.network.0.1.weight", vec![1024, 30]),
        ("encoder.network.2.2.running_var", vec![1024]),
        ("encoder.network.1.3.weight", vec![1]),
        ("encoder.network.3.bias", vec![128]),
        ("decoder.network.0.0.weight", vec![1024, 128]),
        ("decoder.network.0.1.num_batches_tracked", vec![]),
        ("decoder.network.0.2.weight", vec![1]),
        ("decoder.network.1.1.weight", vec![1024, 1024]),
        ("decoder.network.2.3.weight", vec![1]),
        ("decoder.network.3.weight", vec![30, 1024]),
    ] {
        assert_eq!(found[name].size(), shape, "{name}");
    }
    let found = names(unet(&UnetKeys::default(), 128, 128).0);
    for (name, shape) in [
        ("time_embedding.time_embed.0.weight", vec![512, 512]),
        ("time_embedding.time_embed.2.bias", vec![512]),
        ("layers.3.fc.weight", vec![128, 256]),
        ("layers.0.emb_layer.1.weight", vec![512, 512]),
        ("reverse_layers.2.norm.weight", vec![512]),
        ("out1.weight", vec![1024, 512]),
        ("norm_out.bias", vec![1024]),
        ("out2.weight", vec![128, 1024]),
    ] {
        assert_eq!(found[name].size(), shape, "{name}");
    }
    let found = names(classifier(&CellClassifier::default(), 128, 12).0);
    for (name, shape) in [
        ("time_embed.2.weight", vec![512, 512]),
        ("fc3.weight", vec![256, 512]),
        ("emb_layers3.1.weight", vec![256, 512]),
        ("norm1.running_mean", vec![512]),
        ("out.bias", vec![12]),
    ] {
        assert_eq!(found[name].size(), shape, "{name}");
    }
}

/// The original never leaves training mode: a cell's latent and its decoding depended on the cells beside it.
#[test]
fn in_evaluation_a_cell_does_not_depend_on_the_cells_beside_it() {
    let (_vs, net) = autoencoder(&small_autoencoder(), 20);
    let x = Tensor::rand([8, 20], CPU) * 5.0;
    // Training moves the running statistics off their beginning.
    for _ in 0..20 {
        let _ = net.forward(&x, Some(&draws()));
    }
    let alone = |n: i64| x.narrow(0, n, 1);
    let latents = net.encode(&x, None);
    let cells = net.generate(&latents);
    for n in 0..8 {
        assert!(difference(&net.encode(&alone(n), None), &latents.narrow(0, n, 1)) < 1e-6);
        assert!(difference(&net.generate(&latents.narrow(0, n, 1)), &cells.narrow(0, n, 1)) < 1e-5);
    }
    let trained = net.encode(&x, Some(&draws()));
    assert!(difference(&trained, &latents) > 1e-3, "training mode is another one");
}

/// ReLU belongs to generated cells alone: the loss compares what the decoder says.
#[test]
fn generated_expression_is_never_negative_and_latents_have_length_one() {
    let (_vs, net) = autoencoder(&small_autoencoder(), 20);
    let x = Tensor::rand([8, 20], CPU);
    let latent = net.encode(&x, None);
    let length = latent.norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    assert!(difference(&length, &Tensor::ones([8], CPU)) < 1e-6);
    assert!(net.decode(&latent, None).min().double_value(&[]) < 0.0);
    assert_eq!(net.generate(&latent).min().double_value(&[]), 0.0);
    // A cell without any expression has a latent, and no NaN.
    let nothing = net.encode(&Tensor::zeros([2, 20], CPU), None);
    assert!(nothing.isfinite().all().int64_value(&[]) == 1);
}

/// Dropout of the network was constructed and never applied.
#[test]
fn dropout_of_the_unet_acts_in_training_and_only_there() {
    let keys = UnetKeys { dropout: 0.5, ..small_unet() };
    let (_vs, net) = unet(&keys, 6, 6);
    let (x, t) = (Tensor::randn([8, 6], CPU), Tensor::arange(8, (Kind::Int64, Device::Cpu)));
    let plain = net.forward(&x, &t, None);
    assert_eq!(net.forward(&x, &t, None), plain);
    let dropped = net.forward(&x, &t, Some(&draws()));
    assert!(difference(&dropped, &plain) > 1e-3);
    // The same draws give the same mask.
    assert_eq!(net.forward(&x, &t, Some(&draws())), dropped);
}

/// An odd width made the original crash.
#[test]
fn time_features_of_odd_width_end_with_a_zero() {
    let t = Tensor::from_slice(&[0i64, 3, 999]);
    let (odd, even) = (time_features(&t, 7), time_features(&t, 6));
    assert_eq!(odd.size(), [3, 7]);
    assert_eq!(odd.narrow(1, 0, 6), even);
    assert_eq!(odd.select(1, 6), Tensor::zeros([3], CPU));
    let keys = UnetKeys { hidden: vec![9, 5, 3], ..UnetKeys::default() };
    let (_vs, net) = unet(&keys, 4, 4);
    assert_eq!(net.forward(&Tensor::randn([3, 4], CPU), &t, None).size(), [3, 4]);
}

/// `emb_layers3` is in files and in no forward pass: as a parameter it would get weight decay, and leave an all-reduce waiting.
#[test]
fn the_unused_layer_of_the_classifier_is_kept_and_not_trained() {
    let (vs, net) = classifier(&small_classifier(), 6, 3);
    let unused = &vs.variables()["emb_layers3.1.weight"];
    assert!(!unused.requires_grad());
    let (x, t) = (Tensor::randn([8, 6], CPU), Tensor::arange(8, (Kind::Int64, Device::Cpu)));
    let loss = net.forward(&x, &t, Some(&draws())).square().mean(Kind::Float);
    let params = vs.trainable_variables();
    let gradients = Tensor::run_backward(&[loss], &params, false, false);
    assert!(gradients.iter().all(Tensor::defined), "every trained parameter has a gradient");
    assert_eq!(vs.variables().len() - params.len(), 2 + 3 * 3, "two of the unused layer, three per norm");
}

/// The original's network has no output for the variance.
#[test]
fn learn_sigma_has_a_head_of_twice_the_width() {
    let keys = CellDiffusion { learn_sigma: true, ..CellDiffusion::default() };
    let (vs, net) = unet(&small_unet(), 6, 6 * Diffusion::outputs_per_input(&keys));
    assert_eq!(vs.variables()["out2.weight"].size(), [12, 16]);
    let process = diffusion(&keys);
    let (x0, noise) = (Tensor::randn([8, 6], CPU), Tensor::randn([8, 6], CPU));
    let t = Tensor::arange(8, (Kind::Int64, Device::Cpu)) * 100;
    let losses = process.losses(&|x, time| net.forward(x, time, None), &x0, &t, &noise);
    assert!(losses.vb.unwrap().isfinite().all().int64_value(&[]) == 1);
}

/// A bias before a batch norm has no gradient. Rounding errors in its place made AdamW move it, and evaluation differ.
#[test]
fn biases_before_a_norm_have_a_gradient_of_exactly_zero() {
    let (vs, net) = autoencoder(&small_autoencoder(), 20);
    let loss = net.forward(&(Tensor::rand([8, 20], CPU) * 5.0), Some(&draws())).square().mean(Kind::Float);
    loss.backward();
    let gradient = |name: &str| vs.variables()[name].grad();
    for name in
        ["encoder.network.0.1.bias", "encoder.network.2.1.bias", "decoder.network.0.0.bias", "decoder.network.1.1.bias"]
    {
        assert_eq!(gradient(name).abs().max().double_value(&[]), 0.0, "{name}");
    }
    for name in ["encoder.network.0.1.weight", "encoder.network.3.bias", "decoder.network.3.bias"] {
        assert!(gradient(name).abs().max().double_value(&[]) > 0.0, "{name}");
    }
    let (vs, net) = classifier(&small_classifier(), 6, 3);
    let (x, t) = (Tensor::randn([8, 6], CPU), Tensor::arange(8, (Kind::Int64, Device::Cpu)));
    net.forward(&x, &t, Some(&draws())).square().mean(Kind::Float).backward();
    for name in ["fc1.bias", "fc3.bias", "emb_layers2.1.bias"] {
        assert_eq!(vs.variables()[name].grad().abs().max().double_value(&[]), 0.0, "{name}");
    }
    assert!(vs.variables()["emb_layers2.1.weight"].grad().abs().max().double_value(&[]) > 0.0);
}
