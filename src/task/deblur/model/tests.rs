use super::*;
use crate::torch::{LiveBytes, on_grad_ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// For CPUs: 364,343 parameters for images and 163,392 for spikes, zero flow.
fn cpu_small() -> VrtShape {
    VrtShape {
        dims: vec![16; 8],
        depths: [vec![4; 7], vec![2; 2]].concat(),
        heads: 2,
        window: [2, 4, 4],
        deform_groups: 4,
        independent_groups: vec![8],
        flow: Flow::Zero,
        checkpoint_attn: false,
        checkpoint_ffn: false,
        ..VrtShape::seed_baseline()
    }
}

fn build(shape: &VrtShape) -> (nn::VarStore, Vrt) {
    tch::manual_seed(1);
    shape.check().unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let vrt = Vrt::new(&vs.root(), shape);
    (vs, vrt)
}

fn count(shape: &VrtShape) -> usize {
    build(shape).0.trainable_variables().iter().map(Tensor::numel).sum()
}

/// Sum over the parameters whose names start so.
fn count_of(vs: &nn::VarStore, start: &str) -> usize {
    vs.variables().iter().filter(|(name, _)| name.starts_with(start)).map(|(_, v)| v.numel()).sum()
}

/// The smallest model with every kind of part, quick enough to train in a test.
fn tiny() -> VrtShape {
    VrtShape { dims: vec![8; 8], depths: [vec![2; 7], vec![2; 2]].concat(), drop_path: 0.0, ..cpu_small() }
}

fn clip(frames: i64, h: i64, w: i64) -> (Tensor, Tensor) {
    tch::manual_seed(7);
    (Tensor::rand([1, frames, 3, h, w], CPU), Tensor::rand([1, frames, 32, h, w], CPU))
}

/// Sets everything that starts at zero to something, so that every path carries a gradient.
fn stir(vs: &nn::VarStore) {
    tch::manual_seed(5);
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    tch::no_grad(|| {
        for (_, variable) in &mut variables {
            if variable.std(false).double_value(&[]) == 0.0 {
                let noise = variable.randn_like() * 0.02;
                let _ = variable.g_add_(&noise);
            }
        }
    });
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn public_gopro_has_the_published_number_of_parameters() {
    assert_eq!(count(&VrtShape::public_gopro()), 18_320_007);
}

#[test]
fn guides_baseline_has_its_number_of_parameters() {
    let (vs, _) = build(&VrtShape::seed_baseline());
    let [encoder, tsa, fuse] = ["spike_encoder", "spike_tsa", "spike_fuse"].map(|part| count_of(&vs, part));
    assert_eq!((encoder, tsa, fuse), (4_812_672, 299_136, 299_904));
    let all = count_of(&vs, "");
    assert_eq!((all - encoder - tsa - fuse, all), (18_263_751, 23_675_463));
}

#[test]
fn small_model_has_its_number_of_parameters() {
    assert_eq!(count(&cpu_small()), 364_343 + 163_392);
    assert_eq!(count(&VrtShape { spike: None, ..cpu_small() }), 364_343);
}

#[test]
fn untrained_model_is_close_to_identity_at_any_size() {
    let (_vs, vrt) = build(&tiny());
    for (frames, h, w) in [(5, 24, 40), (1, 16, 16), (2, 13, 27), (3, 7, 5)] {
        let (blur, spikes) = clip(frames, h, w);
        let y = tch::no_grad(|| vrt.forward(&blur, Some(&spikes), false));
        assert!(distance(&y, &blur) < 0.3, "{frames} {h} {w}: {}", distance(&y, &blur));
        assert!((&y - &blur).square().mean(Kind::Float).double_value(&[]) < 0.01);
        let plain = tch::no_grad(|| vrt.forward(&blur, None, false));
        assert!(distance(&y, &plain) > 0.0, "spikes count");
    }
}

#[test]
fn flow_model_runs_and_every_parameter_gets_a_gradient() {
    let (vs, vrt) = build(&VrtShape { flow: Flow::SpyNet, ..tiny() });
    stir(&vs);
    let (blur, spikes) = clip(3, 32, 40);
    vrt.forward(&blur, Some(&spikes), true).square().sum(Kind::Float).backward();
    for (name, variable) in vs.variables() {
        let grad = variable.grad();
        assert!(grad.defined() && grad.isfinite().all().int64_value(&[]) == 1, "{name}");
        // Keys' biases shift all scores of a query alike: their true gradient is zero.
        assert!(grad.abs().max().double_value(&[]) > 0.0, "{name}");
    }
}

#[test]
fn bad_numbers_are_named() {
    let message = |change: &dyn Fn(&mut VrtShape)| {
        let mut shape = cpu_small();
        change(&mut shape);
        shape.check().unwrap_err()
    };
    assert_eq!(message(&|s| s.heads = 3), "dims: 16 is no multiple of heads 3");
    assert_eq!(message(&|s| s.dims.truncate(3)), "dims: 3 values, expected 8, one per stage");
    assert_eq!(message(&|s| s.independent_groups = vec![9]), "independent_groups: 9, expected one of 7 to 8");
    assert_eq!(message(&|s| s.window[1] = 0), "window: 0, expected at least 1");
}

/// Output and gradients of a model with drop-path on and the parameters of `like`.
fn run(shape: &VrtShape, like: &nn::VarStore, clip: &(Tensor, Tensor)) -> (Tensor, Vec<(String, Tensor)>) {
    let (mut vs, vrt) = build(shape);
    vs.copy(like).unwrap();
    let y = vrt.forward_seeded(&clip.0, Some(&clip.1), Some(11));
    (&y - 0.5).square().mean(Kind::Float).backward();
    let mut grads: Vec<_> = vs.variables().into_iter().map(|(name, v)| (name, v.grad())).collect();
    grads.sort_by(|a, b| a.0.cmp(&b.0));
    (y.detach(), grads)
}

#[test]
fn recomputation_changes_neither_output_nor_gradients() {
    for flow in [Flow::Zero, Flow::SpyNet] {
        let plain = VrtShape { drop_path: 0.3, flow, ..tiny() };
        let (like, _) = build(&plain);
        stir(&like);
        let clip = clip(4, 24, 24);
        let (right, right_grads) = run(&plain, &like, &clip);
        for (checkpoint_attn, checkpoint_ffn) in [(true, true), (true, false), (false, true)] {
            let (y, grads) = run(&VrtShape { checkpoint_attn, checkpoint_ffn, ..plain.clone() }, &like, &clip);
            assert!(distance(&y, &right) < 1e-6);
            for ((name, grad), (_, right)) in grads.iter().zip(&right_grads) {
                assert!(distance(grad, right) < 1e-5, "{name}: {}", distance(grad, right));
            }
        }
    }
}

#[test]
fn recomputation_lowers_the_peak_by_two_fifths() {
    let peak = |checkpoint: bool| {
        let (vs, vrt) = build(&VrtShape { checkpoint_attn: checkpoint, checkpoint_ffn: checkpoint, ..cpu_small() });
        let (blur, spikes) = clip(5, 32, 32);
        let step = || vrt.forward(&blur, Some(&spikes), true).square().mean(Kind::Float).backward();
        // The first pass allocates gradients, which stay.
        step();
        let watch = LiveBytes::start().unwrap();
        step();
        drop(vs);
        watch.peak()
    };
    let (plain, recomputed) = (peak(false), peak(true));
    assert!((recomputed as f64) < 0.6 * plain as f64, "{recomputed} against {plain} bytes");
}

#[test]
fn hooks_fire_once_per_parameter_and_pass_with_recomputation() {
    let (vs, vrt) = build(&VrtShape { checkpoint_attn: true, checkpoint_ffn: true, ..tiny() });
    let fired: Vec<_> = vs.variables().into_iter().map(|(name, v)| (name, v, Arc::new(AtomicUsize::new(0)))).collect();
    for (_, variable, count) in &fired {
        let count = count.clone();
        on_grad_ready(variable, Box::new(move || _ = count.fetch_add(1, Ordering::SeqCst))).unwrap();
    }
    let (blur, spikes) = clip(3, 16, 16);
    for pass in 1..3 {
        vrt.forward(&blur, Some(&spikes), true).square().sum(Kind::Float).backward();
        for (name, _, count) in &fired {
            assert_eq!(count.load(Ordering::SeqCst), pass, "{name}");
        }
    }
}
