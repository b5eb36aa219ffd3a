//! Warping by optical flow, and modulated deformable convolution, built from `grid_sample`.

use super::layers::{Conv, Shared};
use tch::{Device, Kind, Tensor, nn};

const BILINEAR: i64 = 0;
const NEAREST: i64 = 1;
const ZEROS: i64 = 0;
const BORDER: i64 = 1;

/// Elements of a sampled tensor above which images are taken one by one: 1 GiB of f32.
const MOST_SAMPLED: i64 = 1 << 28;

/// Values read outside the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outside {
    Zeros,
    Border,
}

/// Position of each pixel: x then y, `[1, H, W]` each, f32.
fn positions(h: i64, w: i64, device: Device) -> (Tensor, Tensor) {
    let axis = |n: i64| Tensor::arange(n, (Kind::Float, device));
    (axis(w).reshape([1, 1, w]).expand([1, h, w], false), axis(h).reshape([1, h, 1]).expand([1, h, w], false))
}

/// `grid_sample`'s coordinates (-1 to 1 between the outer edges of the image) of pixel positions, stacked in the last
/// dimension.
fn grid(x: &Tensor, y: &Tensor, h: i64, w: i64) -> Tensor {
    let scaled = |at: &Tensor, n: i64| at * (2.0 / n as f64) + (1.0 / n as f64 - 1.0);
    Tensor::stack(&[scaled(x, w), scaled(y, h)], -1)
}

/// Image `[N, C, H, W]` read at `pixel + flow`, bilinearly; `flow` is `[N, 2, H, W]`, x then y, in pixels.
pub fn warp(image: &Tensor, flow: &Tensor, outside: Outside) -> Tensor {
    let size = image.size();
    let (h, w) = (size[2], size[3]);
    let (x, y) = positions(h, w, image.device());
    let flow = flow.to_kind(Kind::Float);
    let at = grid(&(flow.select(1, 0) + x), &(flow.select(1, 1) + y), h, w).to_kind(image.kind());
    image.grid_sampler(&at, BILINEAR, if outside == Outside::Zeros { ZEROS } else { BORDER }, false)
}

/// The four pixels around `pixel + flow`, unweighted: `[N, 4C, H, W]` in the order of (floor or ceil of x, of y). No
/// gradient reaches the flow (as in VRT, where rounding stops it).
pub fn four_nearest(image: &Tensor, flow: &Tensor) -> Tensor {
    let size = image.size();
    let (h, w) = (size[2], size[3]);
    let (x, y) = positions(h, w, image.device());
    let flow = flow.detach().to_kind(Kind::Float);
    let (x, y) = (flow.select(1, 0) + x, flow.select(1, 1) + y);
    let read =
        |x: &Tensor, y: &Tensor| image.grid_sampler(&grid(x, y, h, w).to_kind(image.kind()), NEAREST, ZEROS, false);
    let (x0, x1, y0, y1) = (x.floor(), x.ceil(), y.floor(), y.ceil());
    Tensor::cat(&[read(&x0, &y0), read(&x0, &y1), read(&x1, &y0), read(&x1, &y1)], 1)
}

/// Numbers of a flow-guided deformable convolution.
#[derive(Clone, Copy, Debug)]
pub struct DeformShape {
    pub features: i64,
    pub groups: i64,
    /// Largest offset beyond the flow, pixels of this scale.
    pub reach: f64,
}

/// Modulated deformable 3×3 convolution whose offsets start from the flow: four convolutions look at the warped
/// neighbour, the frame itself and the flow, and yield an offset and a weight for each of 9 taps of each group.
#[derive(Clone, Debug)]
pub struct FlowGuidedDeform {
    shape: DeformShape,
    weight: Shared,
    bias: Shared,
    offsets: [Conv; 4],
}

impl FlowGuidedDeform {
    pub fn new(p: &nn::Path, shape: DeformShape) -> Self {
        let (c, net) = (shape.features, p / "conv_offset");
        let bound = 1.0 / ((9 * c) as f64).sqrt();
        let conv = |place: i64, inputs: i64, outputs: i64, gain: f64| {
            Conv::new(&(&net / place), inputs, outputs, &[3, 3], gain)
        };
        // Offsets start as the flow alone, every weight as one half.
        let offsets =
            [conv(0, 2 * c + 2, c, 1.0), conv(2, c, c, 1.0), conv(4, c, c, 1.0), conv(6, c, 27 * shape.groups, 0.0)];
        Self {
            shape,
            weight: Shared::new(p.var("weight", &[c, c, 3, 3], nn::Init::Uniform { lo: -bound, up: bound })),
            bias: Shared::new(p.var("bias", &[c], nn::Init::Const(0.0))),
            offsets,
        }
    }

    /// `neighbour`, as seen from `current`: all `[N, C, H, W]`, `warped` is the neighbour warped by `flow`
    /// `[N, 2, H, W]`.
    pub fn forward(&self, neighbour: &Tensor, warped: &Tensor, current: &Tensor, flow: &Tensor) -> Tensor {
        let mut out = Tensor::cat(&[warped, current, &flow.to_kind(warped.kind())], 1);
        for (i, conv) in self.offsets.iter().enumerate() {
            out = conv.forward(&if i == 0 { out } else { out.maximum(&(&out * 0.1)) });
        }
        let groups = self.shape.groups;
        let parts = out.to_kind(Kind::Float).split(18 * groups, 1);
        let flow = flow.to_kind(Kind::Float).flip([1]).repeat([1, 9 * groups, 1, 1]);
        let offset = parts[0].tanh() * self.shape.reach + flow;
        deform_conv(neighbour, &offset, &parts[1].sigmoid(), &self.weight, &self.bias)
    }
}

/// Modulated deformable 3×3 convolution with padding 1 (DCNv2, in torchvision's layout): `x` `[N, C, H, W]`, `offset`
/// `[N, G · 9 · 2, H, W]` (y, x) in pixels, `mask` `[N, G · 9, H, W]`, `weight` `[C', C, 3, 3]`. All groups and taps are
/// read in one `grid_sample`.
pub fn deform_conv(x: &Tensor, offset: &Tensor, mask: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    let size = x.size();
    if size[0] > 1 && 9 * x.numel() as i64 > MOST_SAMPLED {
        let one = |i: i64| {
            let part = |t: &Tensor| t.narrow(0, i, 1);
            deform_conv(&part(x), &part(offset), &part(mask), weight, bias)
        };
        return Tensor::cat(&(0..size[0]).map(one).collect::<Vec<_>>(), 0);
    }
    let (n, c, h, w) = (size[0], size[1], size[2], size[3]);
    let groups = mask.size()[1] / 9;
    let at = tap_grid(offset, groups, h, w);
    let source = x.reshape([n * groups, c / groups, h, w]).to_kind(at.kind());
    let read = source.grid_sampler(&at, BILINEAR, ZEROS, false).reshape([n, groups, c / groups, 9, h, w]);
    let taps = (read * mask.reshape([n, groups, 1, 9, h, w])).reshape([n, c * 9, h * w]);
    let rows = weight.size()[0];
    (weight.reshape([rows, c * 9]).matmul(&taps).reshape([n, rows, h, w])) + bias.reshape([1, -1, 1, 1])
}

/// `[N · G, 9 · H, W, 2]`: where each tap of each group reads.
fn tap_grid(offset: &Tensor, groups: i64, h: i64, w: i64) -> Tensor {
    let size = offset.size();
    let device = offset.device();
    let taps = Tensor::arange(9, (Kind::Int64, device)).reshape([1, 9, 1, 1]);
    let (x, y) = positions(h, w, device);
    let x = x.unsqueeze(1) + taps.remainder(3) - 1.0;
    let y = y.unsqueeze(1) + taps.divide_scalar_mode(3, "floor") - 1.0;
    let offset = offset.reshape([size[0] * groups, 9, 2, h, w]);
    grid(&(offset.select(2, 1) + x), &(offset.select(2, 0) + y), h, w).reshape([size[0] * groups, 9 * h, w, 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn image(seed: i64, shape: &[i64]) -> Tensor {
        tch::manual_seed(seed);
        Tensor::rand(shape, CPU)
    }

    fn flow(n: i64, dx: f64, dy: f64, h: i64, w: i64) -> Tensor {
        Tensor::from_slice(&[dx, dy]).to_kind(Kind::Float).reshape([1, 2, 1, 1]).expand([n, 2, h, w], false)
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn warping_by_whole_pixels_is_a_shift() {
        let x = image(1, &[2, 3, 9, 14]);
        let y = warp(&x, &flow(2, 3.0, -2.0, 9, 14), Outside::Zeros);
        let (from, to) = (x.narrow(2, 0, 7).narrow(3, 3, 11), y.narrow(2, 2, 7).narrow(3, 0, 11));
        assert!(distance(&from, &to) < 1e-5);
        assert!(y.narrow(2, 0, 2).abs().max().double_value(&[]) < 1e-5, "outside is zero");
        let border = warp(&x, &flow(2, 0.0, -2.0, 9, 14), Outside::Border);
        assert!(distance(&border.select(2, 0), &x.select(2, 0)) < 1e-5);
    }

    #[test]
    fn four_nearest_are_the_corners_around_the_place() {
        let x = image(2, &[1, 1, 6, 7]);
        let y = four_nearest(&x, &flow(1, 1.25, 0.5, 6, 7));
        let corner = |i: i64| y.double_value(&[0, i, 2, 3]);
        let pixel = |row: i64, column: i64| x.double_value(&[0, 0, row, column]);
        assert_eq!([0, 1, 2, 3].map(corner), [pixel(2, 4), pixel(3, 4), pixel(2, 5), pixel(3, 5)]);
    }

    #[test]
    fn without_offsets_it_is_a_convolution() {
        let (x, weight, bias) = (image(3, &[2, 8, 7, 10]), image(4, &[6, 8, 3, 3]), image(5, &[6]));
        let (offset, mask) = (Tensor::zeros([2, 2 * 9 * 4, 7, 10], CPU), Tensor::ones([2, 9 * 4, 7, 10], CPU));
        let right = x.conv2d(&weight, Some(&bias), [1, 1], [1, 1], [1, 1], 1);
        assert!(distance(&deform_conv(&x, &offset, &mask, &weight, &bias), &right) < 1e-4);
        let half = deform_conv(&x, &offset, &(mask * 0.5), &weight, &Tensor::zeros([6], CPU));
        assert!(distance(&(half * 2.0 + bias.reshape([1, 6, 1, 1])), &right) < 1e-4);
    }

    #[test]
    fn offsets_are_y_then_x_of_each_tap_of_each_group() {
        let x = image(6, &[1, 4, 8, 8]);
        let weight = Tensor::zeros([4, 4, 3, 3], CPU);
        // The middle tap alone, each channel for itself.
        let _ = weight.select(3, 1).select(2, 1).diagonal(0, 0, 1).fill_(1.0);
        let offset = Tensor::zeros([1, 2, 9, 2, 8, 8], CPU);
        // Group 1 (channels 2 and 3), tap 4, two pixels down.
        let _ = offset.select(1, 1).select(1, 4).select(1, 0).fill_(2.0);
        let (offset, mask) = (offset.reshape([1, 36, 8, 8]), Tensor::ones([1, 18, 8, 8], CPU));
        let y = deform_conv(&x, &offset, &mask, &weight, &Tensor::zeros([4], CPU));
        assert!(distance(&y.narrow(1, 0, 2), &x.narrow(1, 0, 2)) < 1e-5);
        assert!(distance(&y.narrow(1, 2, 2).narrow(2, 0, 6), &x.narrow(1, 2, 2).narrow(2, 2, 6)) < 1e-5);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let double = |t: Tensor| t.to_kind(Kind::Double);
        let inputs = [
            double(image(7, &[1, 2, 4, 5])),
            // Away from whole pixels, where bilinear reading has no derivative.
            double(image(8, &[1, 18, 4, 5])) * 0.5 + 0.2,
            double(image(9, &[1, 9, 4, 5])),
            double(image(10, &[3, 2, 3, 3])),
        ];
        let run =
            |t: &[Tensor]| deform_conv(&t[0], &t[1], &t[2], &t[3], &Tensor::zeros([3], (Kind::Double, Device::Cpu)));
        let loss = |t: &[Tensor]| run(t).sin().sum(Kind::Double);
        let leaves: Vec<_> = inputs.iter().map(|t| t.copy().set_requires_grad(true)).collect();
        loss(&leaves).backward();
        for (which, at) in [(0, 7), (0, 33), (1, 21), (1, 200), (2, 50), (2, 3), (3, 11), (3, 50)] {
            let moved = |by: f64| {
                let mut all: Vec<_> = inputs.iter().map(Tensor::copy).collect();
                let _ = all[which].view([-1]).narrow(0, at, 1).g_add_scalar_(by);
                loss(&std::mem::take(&mut all)).double_value(&[])
            };
            let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            let grad = leaves[which].grad().reshape([-1]).double_value(&[at]);
            assert!((slope - grad).abs() < 1e-5 * (1.0 + slope.abs()), "input {which} at {at}: {slope} {grad}");
        }
    }
}
