//! Right values come from `torch.optim` 2.11 on CPU: parameters `w` and `b` as in [`variables`], three steps with
//! gradients `1.5 w - 0.3 k` and `b*b - k` for k = 0, 1, 2, and learning rate `lr * (k + 1)`.

use super::*;
use crate::comm::Solo;
use crate::train::ddp::DdpOptions;
use std::sync::Arc;
use tch::Device;

fn variables() -> Vec<(String, Tensor)> {
    let w = Tensor::from_slice(&[0.5_f32, -1.0, 2.0, 0.25]).set_requires_grad(true);
    let b = Tensor::from_slice(&[3.0_f32, -0.125]).reshape([2, 1]).set_requires_grad(true);
    vec![("w".to_owned(), w), ("b".to_owned(), b)]
}

fn ddp() -> Ddp {
    Ddp::new(variables(), Arc::new(Solo::new(Device::Cpu)), DdpOptions::default()).unwrap()
}

fn set_gradients(ddp: &Ddp, k: usize) {
    let (w, b) = (ddp.variables()[0].detach(), ddp.variables()[1].detach());
    ddp.variables()[0].grad().copy_(&(w * 1.5 - 0.3 * k as f64));
    ddp.variables()[1].grad().copy_(&(b.square() - k as f64));
}

fn values(ddp: &Ddp) -> Vec<f32> {
    ddp.variables().iter().flat_map(|v| Vec::<f32>::try_from(v.detach().reshape([-1])).unwrap()).collect()
}

fn close(got: &[f32], right: &[f64]) {
    assert_eq!(got.len(), right.len());
    for (&g, r) in got.iter().zip(right) {
        assert!((f64::from(g) - r).abs() <= 3e-7 * r.abs().max(0.1), "{got:?} against {right:?}");
    }
}

/// Three steps, with the buckets rebuilt after the first one.
fn run(rule: Rule, lr: f64, clip: f64) -> (Vec<f32>, f64) {
    let mut ddp = ddp();
    let mut optimizer = Optimizer::new(rule, &ddp).unwrap();
    let mut norm = 0.0;
    for k in 0..3 {
        set_gradients(&ddp, k);
        norm = clip_grad_norm(&ddp, clip).unwrap();
        optimizer.step(&ddp, &[(lr * (k + 1) as f64).into()]).unwrap();
        if k == 0 {
            // Makes `w` ready before `b`, which swaps their places.
            ddp.set_sync(true);
            ddp.variables()[0].sum(Kind::Float).backward();
            ddp.finish().unwrap();
            assert_eq!(ddp.layout_version(), 1);
        }
    }
    (values(&ddp), norm)
}

#[test]
fn adamw_is_pytorchs() {
    let (got, _) = run(Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 }, 0.01, 0.0);
    close(&got, &[0.446_382_462, -0.939_313_888, 1.939_293_861, 0.220_366_179, 2.938_789_844, -0.095_540_352]);
}

#[test]
fn adam_is_pytorchs() {
    let (got, _) = run(Rule::Adam { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.1 }, 0.01, 0.0);
    close(&got, &[0.445_691_585, -0.939_924_836, 1.940_415_859, 0.217_412_114, 2.940_520_286, -0.095_456_600]);
}

#[test]
fn sgd_is_pytorchs() {
    let (got, _) = run(Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.02 }, 0.01, 0.0);
    close(&got, &[0.435_754_299, -0.776_029_348, 1.647_537_946, 0.233_790_352, 2.028_877_735, -0.019_576_095]);
    let (got, _) = run(Rule::Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.0 }, 0.01, 0.0);
    close(&got, &[0.425_593_972, -0.695_442_020, 1.546_629_905, 0.238_754_630, 1.831_059_336, 0.048_987_329]);
    let (got, _) = run(Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 }, 0.01, 0.0);
    close(&got, &[0.479_957_401, -0.888_724_744, 1.848_639_488, 0.251_843_690, 2.592_004_299, -0.045_803_245]);
}

#[test]
fn clipping_is_pytorchs() {
    let (got, norm) = run(Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 }, 0.1, 1.0);
    close(&got, &[0.475_877_255, -0.848_491_251, 1.800_245_761, 0.255_149_186, 2.475_105_524, -0.009_590_967]);
    assert!((norm - 6.524_444_580).abs() < 1e-6, "{norm}");
}

#[test]
fn state_survives_another_layout_bit_by_bit() {
    let rule = Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };
    let (mut one, mut other) = (ddp(), ddp());
    // The other one's buckets are in another order.
    other.set_sync(true);
    other.variables()[0].sum(Kind::Float).backward();
    other.finish().unwrap();
    other.zero_grad().unwrap();
    assert_ne!(one.layout(), other.layout());

    let mut a = Optimizer::new(rule, &one).unwrap();
    for k in 0..2 {
        set_gradients(&one, k);
        a.step(&one, &[0.01.into()]).unwrap();
    }
    let state = a.export(&one).unwrap();
    let names: Vec<_> = state.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["step", "exp_avg.w", "exp_avg.b", "exp_avg_sq.w", "exp_avg_sq.b"]);
    let mut b = Optimizer::new(rule, &other).unwrap();
    b.import(&other, &state).unwrap();
    {
        let _no_grad = tch::no_grad_guard();
        other.variables().iter().zip(one.variables()).for_each(|(to, from)| to.shallow_clone().copy_(from));
    }
    set_gradients(&one, 2);
    set_gradients(&other, 2);
    a.step(&one, &[0.01.into()]).unwrap();
    b.step(&other, &[0.01.into()]).unwrap();
    assert_eq!(b.steps_taken().unwrap(), 3);
    assert_eq!(values(&one), values(&other));
    one.zero_grad().unwrap();
}

#[test]
fn state_of_another_model_is_refused_and_changes_nothing() {
    let ddp = ddp();
    let rule = Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    let mut optimizer = Optimizer::new(rule, &ddp).unwrap();
    set_gradients(&ddp, 0);
    optimizer.step(&ddp, &[0.1.into()]).unwrap();
    let mut state = optimizer.export(&ddp).unwrap();
    state[0].1 = Tensor::from(7.0_f32);
    state[2].1 = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let error = optimizer.import(&ddp, &state).unwrap_err().to_string();
    assert_eq!(error, "parameter momentum_buffer.b: has shape [3], expected [2, 1]");
    state.pop();
    assert!(optimizer.import(&ddp, &state).unwrap_err().to_string().contains("is missing"));
    assert_eq!(optimizer.steps_taken().unwrap(), 1);
}

/// Device memory that runs out after backward could not be repeated: other ranks have updated their weights by then. So
/// nothing is taken there that a backward pass does not leave a thousand times over: moments are there from the start, and
/// clipping and the update work in place.
#[test]
fn clipping_and_the_update_take_no_memory_to_speak_of() {
    const PARAMETERS: i64 = 1 << 20;
    let rules = [
        Rule::AdamW { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.01 },
        Rule::Adam { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.01 },
        Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.01 },
    ];
    for rule in rules {
        let w = Tensor::ones([PARAMETERS], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut ddp =
            Ddp::new(vec![("w".to_owned(), w)], Arc::new(Solo::new(Device::Cpu)), DdpOptions::default()).unwrap();
        let mut optimizer = Optimizer::new(rule, &ddp).unwrap();
        let (lr, found) = (Tensor::from_slice(&[0.1_f32]), Tensor::from_slice(&[0_f32]));
        for on_device in [false, true] {
            ddp.zero_grad().unwrap();
            ddp.set_sync(true);
            ddp.variables()[0].square().sum(Kind::Float).backward();
            ddp.finish().unwrap();
            let before = ddp.variables()[0].double_value(&[7]);
            let watch = torch::LiveBytes::start().unwrap();
            assert!(clip_grad_norm(&ddp, 1.0).unwrap() > 1.0);
            if on_device {
                optimizer.step_unless(&ddp, &lr, &[0.1.into()], (&found, None)).unwrap();
            } else {
                optimizer.step(&ddp, &[0.1.into()]).unwrap();
            }
            assert!(watch.peak() < 4 * PARAMETERS / 256, "{rule:?}: {} bytes", watch.peak());
            assert_ne!(ddp.variables()[0].double_value(&[7]), before);
        }
    }
}

/// `w` in group 0 and `b` in group 1, whose rate is twice as high: otherwise as [`run`]. `momenta`: of each step.
fn run_groups(rules: [Rule; 2], momenta: Option<[[f64; 2]; 3]>, on_device: bool) -> Vec<f32> {
    let options = DdpOptions { groups: vec![0, 1], ..DdpOptions::default() };
    let mut ddp = Ddp::new(variables(), Arc::new(Solo::new(Device::Cpu)), options).unwrap();
    let mut optimizer = Optimizer::with_groups(rules.to_vec(), &ddp).unwrap();
    for k in 0..3 {
        set_gradients(&ddp, k);
        let lrs = [1.0, 2.0].map(|factor| 0.01 * (k + 1) as f64 * factor);
        let momentum = |group: usize| momenta.map(|all| all[k][group]);
        let numbers = [0, 1].map(|group| Numbers { lr: lrs[group], momentum: momentum(group) });
        if on_device {
            let lrs = Tensor::from_slice(&lrs.map(|lr| lr as f32));
            optimizer.step_unless(&ddp, &lrs, &numbers, (&Tensor::from_slice(&[0_f32]), None)).unwrap();
            set_gradients(&ddp, 7);
            optimizer.step_unless(&ddp, &lrs, &numbers, (&Tensor::from_slice(&[1_f32]), None)).unwrap();
        } else {
            optimizer.step(&ddp, &numbers).unwrap();
        }
        if k == 0 {
            ddp.set_sync(true);
            ddp.variables()[0].sum(Kind::Float).backward();
            ddp.finish().unwrap();
        }
    }
    assert_eq!(optimizer.steps_taken().unwrap(), 3);
    values(&ddp)
}

#[test]
fn groups_with_their_own_decay_rate_and_momentum_are_pytorchs_param_groups() {
    let sgd = |momentum, weight_decay| Rule::Sgd { momentum, nesterov: true, weight_decay };
    let adamw = |weight_decay| Rule::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay };
    for on_device in [false, true] {
        close(
            &run_groups([sgd(0.9, 0.02), sgd(0.5, 0.0)], None, on_device),
            &[0.423_976_213, -0.692_245_543, 1.540_197_968, 0.237_939_253, 1.811_762_214, 0.127_678_290],
        );
        let warm = [[0.8, 0.3], [0.85, 0.4], [0.9, 0.5]];
        close(
            &run_groups([sgd(0.9, 0.02), sgd(0.5, 0.0)], Some(warm), on_device),
            &[0.427_141_517, -0.699_398_160, 1.553_681_254, 0.239_384_905, 1.871_093_512, 0.123_837_508],
        );
        close(
            &run_groups([adamw(0.02), adamw(0.0)], None, on_device),
            &[0.446_098_417, -0.938_724_995, 1.938_106_537, 0.220_233_500, 2.881_293_774, -0.066_252_083],
        );
    }
}

/// As on a rank whose slice holds no parameter of the first group.
#[test]
fn a_group_without_parameters_here_does_not_take_the_rates_of_others() {
    let rule = Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let options = DdpOptions { groups: vec![1, 2], ..DdpOptions::default() };
    let ddp = Ddp::new(variables(), Arc::new(Solo::new(Device::Cpu)), options).unwrap();
    let mut optimizer = Optimizer::with_groups(vec![rule; 3], &ddp).unwrap();
    for variable in ddp.variables() {
        let _ = variable.grad().fill_(1.0);
    }
    let rates = [100.0, 0.5, 0.25];
    let lrs = Tensor::from_slice(&rates.map(|rate| rate as f32));
    let found = Tensor::from_slice(&[0_f32]);
    optimizer.step_unless(&ddp, &lrs, &rates.map(Numbers::from), (&found, None)).unwrap();
    assert_eq!(values(&ddp), [0.0, -1.5, 1.5, -0.25, 2.75, -0.375]);
}

#[test]
fn neighbours_of_a_group_are_one_range_and_kinds_do_not_mix() {
    let parameters = |n: usize| -> Vec<(String, Tensor)> {
        let tensor = |_| Tensor::zeros([20], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        (0..n).map(|at| (format!("p{at}"), tensor(at))).collect()
    };
    let options = DdpOptions { groups: vec![0, 1, 0, 1, 0], ..DdpOptions::default() };
    let ddp = Ddp::new(parameters(5), Arc::new(Solo::new(Device::Cpu)), options).unwrap();
    assert_eq!(ranges(ddp.layout(), ddp.groups(), 0), [(0, 96)]);
    assert_eq!(ranges(ddp.layout(), ddp.groups(), 1), [(96, 64)]);
    assert_eq!(ranges(ddp.layout(), &[], 0), [(0, 160)]);
    let mixed = vec![
        Rule::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 },
        Rule::Adam { betas: [0.9, 0.9], eps: 1e-8, weight_decay: 0.0 },
    ];
    assert!(Optimizer::with_groups(mixed, &ddp).err().unwrap().to_string().contains("different kinds"));
}

/// Right values come from the YOLO package's MuSGD, release 8.4.190 with PyTorch 2.11, whose shares are 0.2 and 1. Its
/// orthogonalisation runs in bf16.
#[test]
fn musgd_is_the_yolo_packages() {
    let near = |got: &[f32], right: &[f64]| {
        assert_eq!(got.len(), right.len());
        let far = got.iter().zip(right).map(|(got, right)| (f64::from(*got) - right).abs()).fold(0.0, f64::max);
        assert!(far < 3e-5, "{got:?} against {right:?}");
    };
    let (got, _) = run(Rule::MuSgd { momentum: 0.9, nesterov: true, weight_decay: 0.01 }, 0.01, 0.0);
    near(&got, &[0.424_784_839, -0.693_843_246, 1.543_413_043, 0.238_346_815, 1.817_645_669, 0.050_872_013]);
    let (got, _) = run(Rule::MuSgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 }, 0.01, 0.0);
    near(&got, &[0.436_993_629, -0.778_497_279, 1.652_484_536, 0.234_411_821, 2.025_549_173, -0.018_773_489]);
    // A filter.
    let line = Tensor::arange(108, (Kind::Float, Device::Cpu));
    let filter = (&line * 0.37).sin().view([4, 3, 3, 3]).set_requires_grad(true);
    let ddp =
        Ddp::new(vec![("f".to_owned(), filter)], Arc::new(Solo::new(Device::Cpu)), DdpOptions::default()).unwrap();
    let mut optimizer =
        Optimizer::new(Rule::MuSgd { momentum: 0.8, nesterov: true, weight_decay: 5e-4 }, &ddp).unwrap();
    for k in 0..3 {
        ddp.variables()[0].grad().copy_(&(&line * 1.7 + k as f64).cos().view([4, 3, 3, 3]));
        optimizer.step(&ddp, &[0.05.into()]).unwrap();
    }
    near(&values(&ddp)[..6], &[-0.179_850_6, 0.568_781_4, 0.799_325_8, 0.654_150_4, 0.932_706_1, 1.219_347_8]);
    assert!((ddp.variables()[0].norm().double_value(&[]) - 7.596_254_348_754_883).abs() < 1e-4);
}
