//! Scalars that the VRT's passes hold for one clip, counted from its code: what autograd keeps for the backward pass, and the
//! largest part while it runs.
//!
//! With `C` channels, `N` tokens (frames × rows × columns at the scale of a stage), `N'` of them with the padding to whole
//! windows, `n` tokens in a window, `h` heads, `M` = 2 × pairs of frames × rows × columns, `g` groups of the deformable
//! convolution, autograd keeps of
//!
//! ```text
//! attention     C(2N + 5N') + n·h·N'     input, windows, q, k, v, scaled q, weights, joined heads
//! mutual too    C(N + 5N') + n/2·h·N'    input with places, q, k, v, scaled q, weights; both joined
//! GEGLU         10·C·N                   input, norm, two of 2C, their GELU and product
//! fusion        15·C·N                   three frames, four of 3C
//! warping       (30C + 2 + 45g)·M        three layers of offsets, tanh, sigmoid, grid, image, nine taps twice
//! over time     12·C·N + h·T·N           14 where a second input is read
//! spikes        3K·N + C·N, and 14·C·N + 3·C·N(before) + C·N per scale
//! ```
//! A part that is recomputed keeps its inputs alone, and is whole once while it is.

use super::deblur::{FIRST_CHANNELS, Frame, SCALE, SPIKE_SCALES, STAGES, whole_window};
use super::task::{product, sum};
use crate::config::{DeblurData, FlowKind, VrtModel};

/// Sides are padded to multiples of this.
const MULTIPLE: u64 = 8;
/// What SpyNet keeps per pixel of its pyramid and pair: inputs, outputs and flows of its five convolutions.
const SPYNET_KEPT: u64 = 170;
/// Per pixel and channel of a frame: what online metrics make (SSIM of two pairs in RGB and luma).
const METRICS: u64 = 66;

/// Parts of a pass, added up.
#[derive(Clone, Copy, Default)]
struct Pass {
    /// For backward.
    kept: u64,
    /// The most that is held while a part is recomputed: what was kept up to it, and the part whole, with its gradients. What
    /// came after it is gone by then.
    recomputed: u64,
    /// What the largest part holds while it runs without a backward pass to come.
    running: u64,
}

/// One part of a pass: scalars that it keeps whole, of its inputs, and at the most while it runs.
#[derive(Clone, Copy)]
struct Part {
    whole: u64,
    inputs: u64,
    running: u64,
}

impl Pass {
    fn add(&mut self, times: u64, part: Part, recomputed: bool) -> Option<()> {
        let kept = if recomputed { part.inputs } else { part.whole };
        self.kept = self.kept.checked_add(kept.checked_mul(times)?)?;
        if recomputed && times > 0 {
            self.recomputed = self.recomputed.max(sum(&[self.kept, part.whole, part.running])?);
        }
        if times > 0 {
            self.running = self.running.max(part.running);
        }
        Some(())
    }
}

/// A clip's frames at one scale.
#[derive(Clone, Copy)]
struct Grid([u64; 3]);

impl Grid {
    fn tokens(self) -> Option<u64> {
        product(&self.0)
    }

    /// Tokens of a window as it fits, and of all windows.
    fn windows(self, window: [u64; 3]) -> Option<(u64, u64)> {
        let (mut inside, mut all) = (1u64, 1u64);
        for (whole, side) in self.0.into_iter().zip(window) {
            let fits = side.min(whole).max(1);
            inside = inside.checked_mul(fits)?;
            all = all.checked_mul(whole.checked_next_multiple_of(fits)?)?;
        }
        Some((inside, all))
    }
}

/// Scalars that a clip of `frame`'s size holds at the peak of a training step, or of an evaluation's pass; `None`: a product
/// overflows, or a list is too short.
pub(super) fn activation_scalars(model: &VrtModel, data: &DeblurData, frame: &Frame, train: bool) -> Option<u64> {
    let clip = Clip::of(model, data, frame)?;
    let mut pass = Pass::default();
    // In the order in which they run.
    if model.use_spike {
        clip.add_spikes(&mut pass)?;
    }
    for group in 0..model.depths.len() {
        clip.add_group(&mut pass, group)?;
    }
    let (pixels, first) = (clip.pixels, *clip.dims.first()?);
    let metrics = pixels.checked_mul(METRICS)?;
    // Bytes, frames, prediction, error and its root; voxels.
    let voxels = if model.use_spike { clip.bins } else { 0 };
    let ends = pixels.checked_mul(voxels.checked_add(20)?)?;
    if train {
        let inputs = pixels.checked_mul(first.checked_add(FIRST_CHANNELS)?)?.checked_add(clip.flow()?)?;
        let last = pixels.checked_mul(clip.dims.last()?.checked_mul(8)?)?;
        // Statistics of norms, biases by place, zeros beyond the first and the last frame: a 32nd, as tests find.
        let kept = pass.kept.checked_add(pass.kept / 32)?;
        let recomputed = pass.recomputed.checked_add(pass.kept / 32)?;
        return sum(&[ends, inputs, kept.checked_add(metrics.max(last))?.max(recomputed)]);
    }
    // Outputs of stages that are needed again, and features of the spikes.
    let skips = pixels.checked_mul(first.checked_mul(if model.use_spike { 5 } else { 3 })?)?;
    sum(&[ends, skips, pass.running.max(metrics)])
}

struct Clip<'a> {
    model: &'a VrtModel,
    dims: Vec<u64>,
    bins: u64,
    /// Frames, rows, columns, padded.
    whole: [u64; 3],
    pixels: u64,
}

impl<'a> Clip<'a> {
    fn of(model: &'a VrtModel, data: &DeblurData, frame: &Frame) -> Option<Self> {
        let padded = |n: u64| n.max(1).checked_next_multiple_of(MULTIPLE);
        let whole = [(data.clip_len as u64).max(1), padded(frame.height)?, padded(frame.width)?];
        let dims = model.dims.iter().map(|dim| *dim as u64).collect();
        Some(Self { model, dims, bins: data.voxel_bins as u64, whole, pixels: product(&whole)? })
    }

    fn grid(&self, scale: u64) -> Grid {
        Grid([self.whole[0], self.whole[1] / scale, self.whole[2] / scale])
    }

    /// A stage of the U-net, or a group of stage 8.
    fn add_group(&self, pass: &mut Pass, group: usize) -> Option<()> {
        let (stage, model) = (group.min(STAGES), self.model);
        let (dim, depth) = (*self.dims.get(stage)?, *model.depths.get(group)? as u64);
        let grid = self.grid(SCALE.get(group).copied().unwrap_or(1));
        let one = grid.tokens()?.checked_mul(dim)?;
        let mutual = if group < STAGES { depth * 3 / 4 } else { 0 };
        let [frames, rows, columns] = whole_window(model);
        let alone = model.independent_groups.contains(&group);
        let own = [if alone { 1 } else { frames }, rows, columns];
        pass.add(mutual, self.attention(grid, dim, [2, rows, columns], true)?, model.checkpoint_attn)?;
        pass.add(depth - mutual, self.attention(grid, dim, own, false)?, model.checkpoint_attn)?;
        let times = |n: u64| one.checked_mul(n);
        pass.add(depth, Part { whole: times(10)?, inputs: one, running: times(8)? }, model.checkpoint_ffn)?;
        let plain = |whole: u64| Part { whole, inputs: 0, running: 0 };
        if group >= STAGES {
            // A linear after each group; norms with theirs before the first and after the last, and the last convolution.
            return pass.add(1, plain(times(if group == STAGES { 6 } else { 1 })?), false);
        }
        // Norm and linear of the change of scale, and two linears.
        let before = *self.dims.get(stage.saturating_sub(1))?;
        let wide = match stage {
            0 => before,
            1..=3 => before.checked_mul(8)?,
            _ => before / 2,
        };
        pass.add(1, plain(grid.tokens()?.checked_mul(wide)?.checked_add(times(2)?)?), false)?;
        pass.add(1, Part { whole: times(15)?, inputs: times(3)?, running: times(15)? }, model.checkpoint_ffn)?;
        pass.add(1, self.warping(grid, dim)?, model.checkpoint_attn)
    }

    fn attention(&self, grid: Grid, dim: u64, window: [u64; 3], mutual: bool) -> Option<Part> {
        let (tokens, (inside, padded)) = (grid.tokens()?, grid.windows(window)?);
        let one = tokens.checked_mul(dim)?;
        let weights = |inside: u64| product(&[inside, self.model.heads as u64, padded]);
        let channels = |own: u64, windows: u64| {
            dim.checked_mul(tokens.checked_mul(own)?.checked_add(padded.checked_mul(windows)?)?)
        };
        let mut whole = channels(2, 5)?.checked_add(weights(inside)?)?;
        if mutual {
            whole = sum(&[whole, channels(1, 5)?, weights(inside.div_ceil(2))?])?;
        }
        let running = channels(2, 6)?.checked_add(weights(inside)?.checked_mul(2)?)?;
        Some(Part { whole, inputs: one, running })
    }

    /// Both directions of a stage's alignment of neighbours.
    fn warping(&self, grid: Grid, dim: u64) -> Option<Part> {
        let [frames, rows, columns] = grid.0;
        let pairs = product(&[2, frames - 1, rows, columns])?;
        let groups = self.model.deform_groups as u64;
        let moves = self.model.flow == FlowKind::SpyNet;
        let of = |channels: u64, groups_times: u64, more: u64| {
            let each = sum(&[dim.checked_mul(channels)?, groups.checked_mul(groups_times)?, more])?;
            pairs.checked_mul(each)
        };
        let flow = if moves { of(1, 0, 2)? } else { 0 };
        if !self.model.deformable {
            return Some(Part { whole: flow, inputs: flow, running: of(3, 0, 2)? });
        }
        Some(Part { whole: of(30, 45, 2)?.checked_add(flow)?, inputs: of(2, 0, 2)?, running: of(21, 90, 2)? })
    }

    /// Encoder, attention over time, fusion.
    fn add_spikes(&self, pass: &mut Pass) -> Option<()> {
        let model = self.model;
        let input = self.pixels.checked_mul(self.bins.checked_mul(3)?)?;
        let plain = |whole: u64| Part { whole, inputs: whole, running: whole };
        pass.add(1, plain(input), false)?;
        let mut before = 0;
        for (scale, by) in SCALE.into_iter().enumerate().take(SPIKE_SCALES) {
            let (dim, tokens) = (*self.dims.get(scale)?, self.grid(by).tokens()?);
            let one = tokens.checked_mul(dim)?;
            let times = |n: u64| one.checked_mul(n);
            pass.add(1, plain(times(15)?.checked_add(before)?), false)?;
            before = times(3)?;
            for (kept, inputs, heads) in [(6, 1, model.tsa_heads), (8, 2, model.fuse_heads)] {
                let weights = product(&[tokens, self.whole[0], heads as u64])?;
                let whole = times(kept)?.checked_add(weights)?;
                let running = times(8)?.checked_add(weights.checked_mul(2)?)?;
                pass.add(1, Part { whole, inputs: times(inputs)?, running }, model.checkpoint_attn)?;
                pass.add(1, Part { whole: times(6)?, inputs: one, running: times(6)? }, model.checkpoint_ffn)?;
            }
        }
        Some(())
    }

    /// SpyNet over its pyramid, both ways.
    fn flow(&self) -> Option<u64> {
        let [frames, rows, columns] = self.whole;
        let pairs = product(&[2, frames - 1, rows, columns])?;
        Some(if self.model.flow == FlowKind::SpyNet { product(&[pairs, 4, SPYNET_KEPT])? / 3 } else { 0 })
    }
}
