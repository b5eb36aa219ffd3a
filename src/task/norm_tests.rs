//! Right values come from `torch.nn.BatchNorm1d` 2.11 on CPU: two training passes on waves, gradients of the second.

use super::*;
use std::sync::{Barrier, Mutex};
use tch::Device;

fn wave(shape: &[i64], step: f64, offset: f64) -> Tensor {
    let n = shape.iter().product::<i64>();
    (Tensor::arange(n, (Kind::Float, Device::Cpu)) * step + offset).sin().view(shape)
}

fn layer(affine: bool) -> (nn::VarStore, BatchNorm) {
    let vs = nn::VarStore::new(Device::Cpu);
    let layer = BatchNorm::new(&vs.root(), 3, BatchNormConfig { eps: 1e-3, momentum: 0.03, affine });
    if affine {
        let set = |tensor: &Option<Tensor>, values: &[f32]| {
            no_grad(|| tensor.as_ref().unwrap().shallow_clone().copy_(&Tensor::from_slice(values)));
        };
        set(&layer.weight, &[0.5, 1.5, -1.0]);
        set(&layer.bias, &[0.1, -0.2, 0.3]);
    }
    (vs, layer)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.detach().to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

fn near(found: &[f32], expected: &[f32], bound: f32) {
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= bound * b.abs().max(1.0), "{found:?}\n{expected:?}");
    }
}

/// What a layer gives and keeps.
struct Passed {
    y: Tensor,
    dx: Tensor,
    dw: Vec<f32>,
    db: Vec<f32>,
    mean: Vec<f32>,
    var: Vec<f32>,
    eval: Tensor,
}

/// Two passes of `rows` of the batch, with gradients of the second.
fn passed(shape: &[i64], affine: bool, rows: &[i64], peers: Option<Arc<dyn Peers>>) -> Passed {
    let (_vs, layer) = layer(affine);
    let rows = Tensor::from_slice(rows);
    let input = |k: f64| (wave(shape, 0.7, k) * 2.0 + 5.0).index_select(0, &rows);
    let _together = Together::with(peers);
    let _ = layer.forward(&input(0.0), true);
    let x = input(1.0).set_requires_grad(true);
    let y = layer.forward(&x, true);
    (&y * wave(shape, 1.3, 0.2).index_select(0, &rows)).sum(Kind::Float).backward();
    assert_eq!(layer.batches.int64_value(&[]), 2);
    let grad = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| values(&tensor.grad())).unwrap_or_default();
    Passed {
        dx: x.grad(),
        dw: grad(&layer.weight),
        db: grad(&layer.bias),
        mean: values(&layer.running_mean),
        var: values(&layer.running_var),
        eval: layer.forward(&input(0.0), false),
        y,
    }
}

/// A sum over one rank, so that the way over all ranks is taken.
struct Alone;

impl Peers for Alone {
    fn sum(&self, _: &Tensor) {}
}

#[test]
fn values_gradients_and_running_statistics_are_pytorchs() {
    for peers in [None, Some(Arc::new(Alone) as Arc<dyn Peers>)] {
        let got = passed(&[6, 3], true, &[0, 1, 2, 3, 4, 5], peers.clone());
        near(&values(&got.y), &[0.696_872, 1.900_486, -0.647_729, 0.129_566, -1.502_859, 1.682_467], 1e-5);
        near(&values(&got.dx), &[0.238_971, 0.106_849, -0.157_705, -0.304_929, -0.457_253, -0.395_852], 1e-5);
        near(&got.dw, &[-2.733_073_5, 3.275_673_2, 0.690_099_4], 1e-5);
        near(&got.db, &[0.411_281, 0.793_849_3, 0.013_428_3], 1e-5);
        near(&got.mean, &[0.295_332_1, 0.295_558_4, 0.295_757_2], 1e-6);
        near(&got.var, &[1.082_488_2, 1.082_273_1, 1.082_830_8], 1e-6);
        near(&values(&got.eval), &[2.359_888, 8.436_894, -6.111_797, 3.189_173, 7.545_575, -3.544_764], 1e-5);
        let got = passed(&[4, 3, 5], true, &[0, 1, 2, 3], peers);
        near(&values(&got.y), &[0.634_285, 0.741_069, 0.516_258, 0.065_583, -0.398_995, -2.156_793], 1e-5);
        near(&values(&got.dx), &[0.064_693, 0.348_614, 0.113_208, -0.296_549, -0.280_15, 0.382_407], 1e-5);
        near(&got.dw, &[0.013_330_4, -0.318_653_6, 0.726_507_7], 1e-5);
        near(&got.mean, &[0.308_966, 0.284_774, 0.302_123], 1e-6);
        near(&got.var, &[1.060_570_1, 1.062_608_5, 1.064_785_8], 1e-6);
    }
}

/// Ranks as threads: everybody adds, then everybody takes the sum.
struct Threads {
    meet: Barrier,
    sum: Mutex<Option<Tensor>>,
}

impl Peers for Threads {
    fn sum(&self, tensor: &Tensor) {
        {
            let mut sum = self.sum.lock().unwrap();
            *sum = Some(sum.take().map_or_else(|| tensor.copy(), |sum| sum + tensor));
        }
        self.meet.wait();
        tensor.shallow_clone().copy_(self.sum.lock().unwrap().as_ref().unwrap());
        if self.meet.wait().is_leader() {
            *self.sum.lock().unwrap() = None;
        }
        self.meet.wait();
    }
}

/// Each rank's part of a batch, and what one rank gives for all of it. Shares of different size: 7 samples of 2 or 3 ranks.
#[test]
fn ranks_together_give_what_one_rank_gives_for_all_samples() {
    for (shape, affine) in [([7, 3].as_slice(), true), (&[7, 3, 4], false), (&[7, 3, 2, 2], true)] {
        let all: Vec<i64> = (0..7).collect();
        let whole = passed(shape, affine, &all, None);
        for world in [2, 3] {
            let peers: Arc<dyn Peers> = Arc::new(Threads { meet: Barrier::new(world), sum: Mutex::new(None) });
            let parts: Vec<(Vec<i64>, Passed)> = std::thread::scope(|scope| {
                let rank = |rank: usize| {
                    let (peers, rows) = (Arc::clone(&peers), all.iter().copied().skip(rank).step_by(world).collect());
                    scope.spawn(move || {
                        let rows: Vec<i64> = rows;
                        let passed = passed(shape, affine, &rows, Some(peers));
                        (rows, passed)
                    })
                };
                let ranks: Vec<_> = (0..world).map(rank).collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            for (rows, part) in &parts {
                let rows = Tensor::from_slice(rows);
                for (found, all) in [(&part.y, &whole.y), (&part.dx, &whole.dx), (&part.eval, &whole.eval)] {
                    near(&values(found), &values(&all.index_select(0, &rows)), 1e-5);
                }
                near(&part.mean, &whole.mean, 1e-6);
                near(&part.var, &whole.var, 1e-6);
            }
            // Gradients of weight and bias are parts, whose sum is what one rank has.
            for of in [|part: &Passed| part.dw.clone(), |part: &Passed| part.db.clone()] {
                let sums: Vec<f32> =
                    (0..of(&whole).len()).map(|at| parts.iter().map(|(_, p)| of(p)[at]).sum()).collect();
                near(&sums, &of(&whole), 1e-5);
            }
        }
    }
}

#[test]
fn a_single_value_per_channel_leaves_the_running_variance() {
    for peers in [None, Some(Arc::new(Alone) as Arc<dyn Peers>)] {
        let (_vs, layer) = layer(true);
        let _together = Together::with(peers);
        let y = layer.forward(&wave(&[1, 3], 0.7, 0.0), true);
        near(&values(&y), &[0.1, -0.2, 0.3], 1e-6);
        assert_eq!(values(&layer.running_var), [1.0; 3]);
        assert!(values(&layer.running_mean)[1] > 0.0);
    }
}

#[test]
fn names_are_pytorchs_and_statistics_are_no_parameters() {
    let (vs, _layer) = layer(true);
    let mut names: Vec<String> = vs.variables().into_keys().collect();
    names.sort();
    assert_eq!(names, ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]);
    assert_eq!(vs.trainable_variables().len(), 2);
    assert_eq!(vs.variables()["num_batches_tracked"].kind(), Kind::Int64);
}
