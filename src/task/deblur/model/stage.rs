//! A stage of the U-net: change of scale, attention, parallel warping.

use super::block::{Context, Group, GroupShape};
use super::layers::{Geglu, Linear, Norm, maybe_recompute};
use super::warp::{DeformShape, FlowGuidedDeform, Outside, warp};
use tch::{Tensor, nn};

/// Share of blocks with mutual attention.
const MUTUAL_SHARE: f64 = 0.75;
/// Largest offset beyond the flow at full scale, pixels.
const REACH: f64 = 10.0;

/// How a stage changes the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    Keep,
    /// 2×2 pixels become channels.
    Down,
    /// Channels become 2×2 pixels.
    Up,
}

/// Numbers of a stage.
#[derive(Clone, Copy, Debug)]
pub struct StageShape<'a> {
    pub inputs: i64,
    pub features: i64,
    pub window: [i64; 3],
    pub heads: i64,
    pub scale: Scale,
    /// How much smaller than the input the stage's tensors are: 1, 2, 4, 8.
    pub factor: i64,
    pub deform_groups: i64,
    /// Absent deformable convolution: neighbours are warped by the flow alone.
    pub deformable: bool,
    pub drop_path: &'a [f64],
}

/// Flow between neighbouring frames at one scale, `[B, T-1, 2, h, w]`: from each frame to the next, and back.
#[derive(Clone, Copy)]
pub struct ScaleFlow<'a> {
    pub backward: &'a Tensor,
    pub forward: &'a Tensor,
}

pub struct Stage {
    scale: Scale,
    norm: Norm,
    reshape: Option<Linear>,
    group1: Group,
    linear1: Linear,
    group2: Group,
    linear2: Linear,
    deform: Option<FlowGuidedDeform>,
    fuse: Geglu,
}

impl Stage {
    pub fn new(p: &nn::Path, shape: &StageShape) -> Self {
        let c = shape.features;
        let width = match shape.scale {
            Scale::Keep => c,
            Scale::Down => 4 * shape.inputs,
            Scale::Up => shape.inputs / 4,
        };
        let mutual = (shape.drop_path.len() as f64 * MUTUAL_SHARE) as usize;
        let [_, h, w] = shape.window;
        let group = |name: &str, window, mutual, drop_path| {
            let shape = GroupShape { features: c, window, heads: shape.heads, mutual, drop_path };
            Group::new(&(p / name), &shape)
        };
        let deform = DeformShape { features: c, groups: shape.deform_groups, reach: REACH / shape.factor as f64 };
        Self {
            scale: shape.scale,
            norm: Norm::new(&(p / "reshape" / 1), width),
            reshape: (shape.scale != Scale::Keep).then(|| Linear::new(&(p / "reshape" / 2), width, c)),
            group1: group("residual_group1", [2, h, w], true, &shape.drop_path[..mutual]),
            linear1: Linear::new(&(p / "linear1"), c, c),
            group2: group("residual_group2", shape.window, false, &shape.drop_path[mutual..]),
            linear2: Linear::new(&(p / "linear2"), c, c),
            deform: shape.deformable.then(|| FlowGuidedDeform::new(&(p / "pa_deform"), deform)),
            fuse: Geglu::new(&(p / "pa_fuse"), 3 * c, 3 * c, c),
        }
    }

    /// `[B, T, H, W, C]` to this stage's scale and number of features. Without `flow` nothing moves.
    pub fn forward(&self, x: &Tensor, flow: Option<ScaleFlow>, context: &Context) -> Tensor {
        let mut x = self.norm.forward(&rearrange(x, self.scale));
        if let Some(linear) = &self.reshape {
            x = linear.forward(&x);
        }
        let x = self.linear1.forward(&self.group1.forward(&x, context)) + x;
        let x = self.linear2.forward(&self.group2.forward(&x, context)) + x;
        self.parallel_warping(&x, flow, context)
    }

    /// Each frame's neighbours, brought to where the frame sees them, and all three fused.
    fn parallel_warping(&self, x: &Tensor, flow: Option<ScaleFlow>, context: &Context) -> Tensor {
        let size = x.size();
        let (pairs, fuse) = (size[1] - 1, self.fuse.clone());
        let zero = x.zeros_like().narrow(1, 0, 1);
        let (next, last) =
            if pairs == 0 { (zero.shallow_clone(), zero) } else { self.neighbours(x, flow, context, &zero) };
        maybe_recompute(context.checkpoint_ffn, &[x, &next, &last], move |x| fuse.forward(&Tensor::cat(x, 4)))
    }

    /// Next and previous frame for each frame, aligned to it: `[B, T, H, W, C]` each, zero at the ends.
    fn neighbours(&self, x: &Tensor, flow: Option<ScaleFlow>, context: &Context, zero: &Tensor) -> (Tensor, Tensor) {
        let size = x.size();
        let (b, pairs, h, w, c) = (size[0], size[1] - 1, size[2], size[3], size[4]);
        let flat = |t: Tensor| t.reshape([b * pairs, h, w, c]).permute([0, 3, 1, 2]);
        let (early, late) = (flat(x.narrow(1, 0, pairs)), flat(x.narrow(1, 1, pairs)));
        let (from, to) = (Tensor::cat(&[&late, &early], 0), Tensor::cat(&[&early, &late], 0));
        let aligned = self.align(&from, &to, flow, context).permute([0, 2, 3, 1]);
        let half = |first: i64| aligned.narrow(0, first, b * pairs).reshape([b, pairs, h, w, c]);
        let zero = zero.to_kind(aligned.kind());
        (Tensor::cat(&[&half(0), &zero], 1), Tensor::cat(&[&zero, &half(b * pairs)], 1))
    }

    /// Frames `from` as seen from `to`, `[N, C, H, W]`: first those one step ahead, then those one step back.
    fn align(&self, from: &Tensor, to: &Tensor, flow: Option<ScaleFlow>, context: &Context) -> Tensor {
        let size = from.size();
        let flat = |t: &Tensor| t.reshape([-1, 2, size[2], size[3]]);
        let flow = flow.map(|flow| Tensor::cat(&[flat(flow.backward), flat(flow.forward)], 0));
        let moves = flow.is_some();
        let Some(deform) = self.deform.clone() else {
            return flow.map_or_else(|| from.shallow_clone(), |flow| warp(from, &flow, Outside::Zeros));
        };
        let still = || Tensor::zeros([size[0], 2, size[2], size[3]], (tch::Kind::Float, from.device()));
        let flow = flow.unwrap_or_else(still);
        // The nine taps of every pixel are the largest tensors of a stage.
        maybe_recompute(context.checkpoint_attn, &[from, to, &flow], move |t| {
            let warped = if moves { warp(&t[0], &t[2], Outside::Zeros) } else { t[0].shallow_clone() };
            deform.forward(&t[0], &warped, &t[1], &t[2])
        })
    }
}

/// Pixels to channels or back: `[B, T, H, W, C]` to `[B, T, H/2, W/2, 4C]`, channels in the order (column, row, C), or
/// the reverse.
fn rearrange(x: &Tensor, scale: Scale) -> Tensor {
    let size = x.size();
    let (b, t, h, w, c) = (size[0], size[1], size[2], size[3], size[4]);
    match scale {
        Scale::Keep => x.shallow_clone(),
        Scale::Down => {
            let split = x.reshape([b, t, h / 2, 2, w / 2, 2, c]);
            split.permute([0, 1, 2, 4, 5, 3, 6]).reshape([b, t, h / 2, w / 2, 4 * c])
        }
        Scale::Up => {
            let split = x.reshape([b, t, h, w, 2, 2, c / 4]);
            split.permute([0, 1, 2, 5, 3, 4, 6]).reshape([b, t, 2 * h, 2 * w, c / 4])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn up_undoes_down_and_channels_are_column_row_feature() {
        let x = Tensor::arange(2 * 3 * 4 * 6 * 5, (Kind::Float, Device::Cpu)).reshape([2, 3, 4, 6, 5]);
        let down = rearrange(&x, Scale::Down);
        assert_eq!(down.size(), [2, 3, 2, 3, 20]);
        assert_eq!(rearrange(&down, Scale::Up), x);
        // Column 1, row 0, feature 2 of the block at (1, 2).
        assert_eq!(down.double_value(&[0, 0, 1, 2, 10 + 2]), x.double_value(&[0, 0, 2, 5, 2]));
    }
}
