//! SpyNet: optical flow from coarse to fine (Ranjan and Black 2017), trained from scratch with the model.

use super::super::constants::constant;
use super::layers::{Conv, child};
use super::warp::{Outside, warp};
use tch::{Kind, Tensor, nn};

const LEVELS: usize = 6;
/// Scales at which the model wants flow: 1, 1/2, 1/4, 1/8.
pub const SCALES: usize = 4;
/// Sides must halve `LEVELS - 1` times.
const MULTIPLE: i64 = 1 << (LEVELS - 1);
/// ImageNet's statistics.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Six networks, one per level, each of five 7×7 convolutions (8 → 32 → 64 → 32 → 16 → 2), which add to the flow of the
/// coarser level. Their last convolutions start at zero, so that untrained flow is zero.
pub struct SpyNet {
    levels: Vec<[Conv; 5]>,
}

impl SpyNet {
    pub fn new(p: &nn::Path) -> Self {
        let p = p / "basic_module";
        let level = |i: usize| {
            let p = child(&p, i) / "basic_module";
            let conv = |place: usize, c: [i64; 2], gain: f64| Conv::new(&child(&p, place), c[0], c[1], &[7, 7], gain);
            [
                conv(0, [8, 32], 1.0),
                conv(2, [32, 64], 1.0),
                conv(4, [64, 32], 1.0),
                conv(6, [32, 16], 1.0),
                conv(8, [16, 2], 0.0),
            ]
        };
        Self { levels: (0..LEVELS).map(level).collect() }
    }

    /// Flow from `a` to `b`, images `[N, 3, H, W]` in [0, 1], sides multiples of 8: `a(p) ≈ b(p + flow(p))`. One tensor
    /// `[N, 2, H/s, W/s]` for each scale s = 1, 2, 4, 8, in pixels of that scale.
    pub fn forward(&self, a: &Tensor, b: &Tensor) -> Vec<Tensor> {
        let size = a.size();
        let (h, w) = (size[2], size[3]);
        let up = |n: i64| (n + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
        let (tall, wide) = (up(h), up(w));
        let (a, b) = (pyramid(a, tall, wide), pyramid(b, tall, wide));
        let mut flow = Tensor::zeros([size[0], 2, tall / MULTIPLE, wide / MULTIPLE], (a[0].kind(), a[0].device()));
        let mut flows = Vec::new();
        for (level, net) in self.levels.iter().enumerate() {
            let (a, b) = (&a[LEVELS - 1 - level], &b[LEVELS - 1 - level]);
            let side = a.size();
            let finer = flow.upsample_bilinear2d([side[2], side[3]], true, None, None) * 2.0;
            let input = Tensor::cat(&[a, &warp(b, &finer, Outside::Border), &finer], 1);
            flow = refine(net, &input).to_kind(finer.kind()) + finer;
            if level >= LEVELS - SCALES {
                let scale = 1 << (LEVELS - 1 - level);
                flows.insert(0, resize_flow(&flow, h / scale, w / scale));
            }
        }
        flows
    }
}

fn refine(net: &[Conv; 5], input: &Tensor) -> Tensor {
    let mut x = input.shallow_clone();
    for (i, conv) in net.iter().enumerate() {
        x = conv.forward(&if i == 0 { x } else { x.relu() });
    }
    x
}

/// Normalised images from fine to coarse, each half the size of the one before.
fn pyramid(image: &Tensor, tall: i64, wide: i64) -> Vec<Tensor> {
    let row = |name, values: &[f32; 3]| {
        constant(name, [0; 4], image.device(), || Tensor::from_slice(values).reshape([1, 3, 1, 1]))
    };
    let size = image.size();
    let image = image.to_kind(Kind::Float);
    let sized = if (size[2], size[3]) == (tall, wide) {
        image
    } else {
        image.upsample_bilinear2d([tall, wide], false, None, None)
    };
    let mut levels = vec![(sized - row("mean", &MEAN)) / row("deviation", &STD)];
    while levels.len() < LEVELS {
        let half = levels[levels.len() - 1].avg_pool2d([2, 2], [2, 2], [0, 0], false, false, None);
        levels.push(half);
    }
    levels
}

/// Flow in pixels of another size.
fn resize_flow(flow: &Tensor, h: i64, w: i64) -> Tensor {
    let size = flow.size();
    if (size[2], size[3]) == (h, w) {
        return flow.shallow_clone();
    }
    let factors = [w as f32 / size[3] as f32, h as f32 / size[2] as f32];
    let made = || Tensor::from_slice(&factors).reshape([1, 2, 1, 1]);
    let factors = constant("flow", [h, w, size[2], size[3]], flow.device(), made);
    flow.upsample_bilinear2d([h, w], false, None, None) * factors
}

/// Flows between neighbouring frames at each scale, `[B, T-1, 2, h, w]`.
pub struct Flows {
    /// From frame t to t+1: where in the next frame a pixel lies.
    pub backward: Vec<Tensor>,
    /// From frame t+1 to t.
    pub forward: Vec<Tensor>,
}

impl SpyNet {
    /// Both directions between the frames of a clip `[B, T, 3, H, W]`, T ≥ 2.
    pub fn flows(&self, clip: &Tensor) -> Flows {
        let size = clip.size();
        let pairs = size[1] - 1;
        let flat = |t: Tensor| t.reshape([size[0] * pairs, 3, size[3], size[4]]);
        let (early, late) = (flat(clip.narrow(1, 0, pairs)), flat(clip.narrow(1, 1, pairs)));
        let both = self.forward(&Tensor::cat(&[&early, &late], 0), &Tensor::cat(&[&late, &early], 0));
        let n = size[0] * pairs;
        let half = |flow: &Tensor, from: i64| {
            let side = flow.size();
            flow.narrow(0, from, n).reshape([size[0], pairs, 2, side[2], side[3]])
        };
        Flows {
            backward: both.iter().map(|flow| half(flow, 0)).collect(),
            forward: both.iter().map(|flow| half(flow, n)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn has_as_many_parameters_as_published_and_starts_at_zero_flow() {
        let vs = nn::VarStore::new(Device::Cpu);
        let net = SpyNet::new(&vs.root());
        let count: i64 = vs.trainable_variables().iter().map(|v| v.numel() as i64).sum();
        assert_eq!(count, 1_440_300);
        let clip = Tensor::rand([1, 3, 3, 40, 56], (Kind::Float, Device::Cpu));
        let flows = net.flows(&clip);
        let sizes: Vec<_> = flows.backward.iter().map(|f| (f.size()[3], f.size()[4])).collect();
        assert_eq!(sizes, [(40, 56), (20, 28), (10, 14), (5, 7)]);
        assert!(flows.backward.iter().chain(&flows.forward).all(|f| f.abs().max().double_value(&[]) == 0.0));
    }

    #[test]
    fn is_finite_on_identical_frames_and_all_levels_learn() {
        let vs = nn::VarStore::new(Device::Cpu);
        let net = SpyNet::new(&vs.root());
        tch::no_grad(|| vs.trainable_variables().iter_mut().for_each(|v| drop(v.uniform_(-0.05, 0.05))));
        let image = Tensor::rand([1, 3, 32, 64], (Kind::Float, Device::Cpu));
        let flows = net.forward(&image, &image);
        let sum: Tensor = flows.iter().map(|f| f.abs().sum(Kind::Float)).sum();
        sum.backward();
        assert!(flows.iter().all(|f| f.isfinite().all().int64_value(&[]) == 1));
        assert!(vs.trainable_variables().iter().all(|v| v.grad().abs().max().double_value(&[]) > 0.0));
    }
}
