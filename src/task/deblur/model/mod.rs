//! VRT (Liang et al. 2022) with a spike branch.
//!
//! ```text
//! blur ─► conv_first ─► stage 1 ─► 2 ─► 3 ─► 4 ─► 5 ─► 6 ─► 7 ─► stage 8 ─► conv_last ─► + blur
//!    └► SpyNet: flow      ▲ scale 1   1/2   1/4   1/8  1/4  1/2   1
//! spikes ─► encoder ─► attention over time ─► fusion into the outputs of stages 1 to 4
//! ```
//!
//! Tensors run as `[B, T, H, W, C]`: attention and feed-forward act on the last dimension, and a permuted view of it is
//! what convolutions call channels-last. Parameters have VRT's names (`stage1.residual_group1.blocks.0.attn.proj.weight`);
//! the spike branch's are `spike_encoder`, `spike_tsa.0` to `.3`, `spike_fuse.0` to `.3`.

mod attention;
mod block;
mod layers;
mod spike;
mod spynet;
mod stage;
mod warp;
mod window;

pub use spike::SpikeShape;

use block::{Context, Group, GroupShape};
use layers::{Conv, Draws, Linear, Norm, child};
use spike::{SpikeEncoder, TemporalAttention, Tiles};
use spynet::{Flows, SCALES, SpyNet};
use stage::{Scale, ScaleFlow, Stage, StageShape};
use tch::{Device, Kind, Tensor, nn};
use window::Geometries;

/// Stages of the U-net.
const STAGES: usize = 7;
/// Sides must halve three times.
const MULTIPLE: i64 = 8;
/// Image channels, with the four pixels around each neighbour's: 3 · (1 + 2 · 4).
const INPUTS: i64 = 27;
/// Factor on the last convolution's usual initial range: an untrained model returns nearly its input.
const LAST_GAIN: f64 = 0.1;

/// Where optical flow comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Nothing moves: deformable convolution alone finds neighbours.
    Zero,
    SpyNet,
}

/// Numbers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct VrtShape {
    /// Features of the seven stages of the U-net, then of stage 8.
    pub dims: Vec<i64>,
    /// Blocks of the seven stages, then of each group of stage 8.
    pub depths: Vec<i64>,
    /// Attention heads; they divide all dims.
    pub heads: i64,
    /// Frames, rows, columns.
    pub window: [i64; 3],
    /// Groups of the deformable convolution; they divide the dims of stages 1 to 7.
    pub deform_groups: i64,
    /// Places in `depths` (from 7) of groups that see one frame at a time.
    pub independent_groups: Vec<i64>,
    pub flow: Flow,
    /// Deformable convolution in parallel warping; else neighbours move by the flow alone.
    pub deformable: bool,
    pub spike: Option<SpikeShape>,
    /// Most pixels that attention over time takes at once.
    pub max_batch_tokens: i64,
    /// Longest side of such a tile.
    pub chunk_size: i64,
    /// Recompute attention, over windows and over time, and deformable warping during backward.
    pub checkpoint_attn: bool,
    /// Recompute feed-forward parts and the fusion of frames during backward.
    pub checkpoint_ffn: bool,
    /// Drop-path rate of the last block; it grows from zero at the first.
    pub drop_path: f64,
}

impl VrtShape {
    /// The published GoPro model (006): 18,320,007 parameters.
    pub fn public_gopro() -> Self {
        Self {
            dims: [vec![96; 7], vec![120]].concat(),
            depths: [vec![8; 7], vec![4; 4]].concat(),
            heads: 6,
            window: [6, 8, 8],
            deform_groups: 16,
            independent_groups: vec![9, 10],
            flow: Flow::SpyNet,
            deformable: true,
            spike: None,
            max_batch_tokens: 49_152,
            chunk_size: 64,
            checkpoint_attn: false,
            checkpoint_ffn: false,
            drop_path: 0.2,
        }
    }

    /// The guide's baseline: 18,263,751 parameters for images, 23,675,463 with spikes.
    pub fn seed_baseline() -> Self {
        Self {
            dims: vec![96; 8],
            depths: [vec![8; 7], vec![4; 6]].concat(),
            window: [5, 8, 8],
            independent_groups: vec![11, 12],
            spike: Some(SpikeShape::default()),
            checkpoint_attn: true,
            checkpoint_ffn: true,
            ..Self::public_gopro()
        }
    }

    /// Checks these numbers.
    ///
    /// # Errors
    /// The first problem, naming the field, the value found and what is expected.
    pub fn check(&self) -> Result<(), String> {
        let positive = |name: &str, values: &[i64]| match values.iter().find(|&&v| v < 1) {
            Some(v) => Err(format!("{name}: {v}, expected at least 1")),
            None => Ok(()),
        };
        let divides = |name: &str, by: i64, dims: &[i64]| match dims.iter().find(|&&d| d % by != 0) {
            Some(d) => Err(format!("dims: {d} is no multiple of {name} {by}")),
            None => Ok(()),
        };
        if self.dims.len() != STAGES + 1 {
            return Err(format!("dims: {} values, expected 8, one per stage", self.dims.len()));
        }
        if self.depths.len() <= STAGES {
            let found = self.depths.len();
            return Err(format!("depths: {found} values, expected 7 stages and at least one group of stage 8"));
        }
        positive("dims", &self.dims)?;
        positive("depths", &self.depths)?;
        positive("window", &self.window)?;
        positive("heads", &[self.heads])?;
        positive("deform_groups", &[self.deform_groups])?;
        divides("heads", self.heads, &self.dims)?;
        divides("deform_groups", self.deform_groups, &self.dims[..STAGES])?;
        divides("4, which going up divides by,", 4, &self.dims[3..6])?;
        let groups = STAGES as i64..self.depths.len() as i64;
        if let Some(at) = self.independent_groups.iter().find(|at| !groups.contains(at)) {
            return Err(format!("independent_groups: {at}, expected one of {} to {}", groups.start, groups.end - 1));
        }
        if let Some(spike) = &self.spike {
            positive("spike bins, heads and ratio", &[spike.bins, spike.tsa_heads, spike.fuse_heads, spike.mlp_ratio])?;
            positive("max_batch_tokens, chunk_size", &[self.max_batch_tokens, self.chunk_size])?;
            divides("tsa_heads", spike.tsa_heads, &self.dims[..SCALES])?;
            divides("fuse_heads", spike.fuse_heads, &self.dims[..SCALES])?;
            if self.dims[..SCALES].iter().any(|d| *d != self.dims[0]) {
                return Err(format!(
                    "dims: {:?}, expected equal dims of stages 1 to 4 with spikes",
                    &self.dims[..SCALES]
                ));
            }
        }
        Ok(())
    }

    /// Drop-path rates of block after block.
    fn drop_paths(&self) -> Vec<f64> {
        let blocks: i64 = self.depths.iter().sum();
        (0..blocks).map(|i| self.drop_path * i as f64 / (blocks - 1).max(1) as f64).collect()
    }
}

/// A group of stage 8: `x + linear(blocks(x))`.
struct Refine(Group, Linear);

/// The spike branch.
struct Spikes {
    encoder: SpikeEncoder,
    tsa: Vec<TemporalAttention>,
    fuse: Vec<TemporalAttention>,
}

/// The model.
pub struct Vrt {
    spynet: Option<SpyNet>,
    conv_first: Conv,
    stages: Vec<Stage>,
    norm8: Norm,
    linear8: Linear,
    refine: Vec<Refine>,
    norm: Norm,
    conv_after_body: Linear,
    conv_last: Conv,
    spikes: Option<Spikes>,
    tiles: Tiles,
    checkpoint: [bool; 2],
    geometries: Geometries,
}

impl Vrt {
    /// Builds the parameters under `p`; `shape` must pass [`VrtShape::check`]. Initial values come from torch's
    /// generator. The last convolution starts at a tenth of the usual range, so that an untrained model gives nearly its
    /// input; offsets and flow start at zero.
    pub fn new(p: &nn::Path, shape: &VrtShape) -> Self {
        let rates = shape.drop_paths();
        let (dims, c) = (&shape.dims, shape.dims[0]);
        let starts: Vec<usize> =
            (0..=shape.depths.len()).map(|i| shape.depths[..i].iter().sum::<i64>() as usize).collect();
        let rates_of = |i: usize| &rates[starts[i]..starts[i + 1]];
        let spynet = (shape.flow == Flow::SpyNet).then(|| SpyNet::new(&(p / "spynet")));
        let conv_first = Conv::new(&(p / "conv_first"), INPUTS, c, &[1, 3, 3], 1.0);
        let stages = (0..STAGES).map(|i| build_stage(p, shape, i, rates_of(i))).collect();
        let p8 = p / "stage8";
        let last = dims[STAGES];
        let refine = (STAGES..shape.depths.len()).map(|i| {
            let alone = shape.independent_groups.contains(&(i as i64));
            let window = if alone { [1, shape.window[1], shape.window[2]] } else { shape.window };
            let group =
                GroupShape { features: last, window, heads: shape.heads, mutual: false, drop_path: rates_of(i) };
            let p = child(&p8, i + 1 - STAGES);
            Refine(Group::new(&(&p / "residual_group"), &group), Linear::new(&(&p / "linear"), last, last))
        });
        Self {
            spynet,
            conv_first,
            stages,
            norm8: Norm::new(&(&p8 / 0 / 1), dims[STAGES - 1]),
            linear8: Linear::new(&(&p8 / 0 / 2), dims[STAGES - 1], last),
            refine: refine.collect(),
            norm: Norm::new(&(p / "norm"), last),
            conv_after_body: Linear::new(&(p / "conv_after_body"), last, c),
            conv_last: Conv::new(&(p / "conv_last"), c, 3, &[1, 3, 3], LAST_GAIN),
            spikes: shape.spike.as_ref().map(|spike| Spikes::new(p, spike, c)),
            tiles: Tiles { max_tokens: shape.max_batch_tokens, side: shape.chunk_size },
            checkpoint: [shape.checkpoint_attn, shape.checkpoint_ffn],
            geometries: Geometries::default(),
        }
    }

    /// Sharp frames of blurred ones: `blur` `[B, T, 3, H, W]` in [0, 1], `spikes` `[B, T, K, H, W]` or absent, result
    /// `[B, T, 3, H, W]`, not clamped. Any height and width: sides are padded to multiples of 8 inside. Without spikes
    /// a model with a spike branch runs on images alone. `train`: drop-path on, with a seed from torch's generator.
    pub fn forward(&self, blur: &Tensor, spikes: Option<&Tensor>, train: bool) -> Tensor {
        let draw = || Tensor::randint(i64::MAX, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]) as u64;
        self.forward_seeded(blur, spikes, train.then(draw))
    }

    /// [`Vrt::forward`] with drop-path drawn from `seed`; `None` turns it off.
    pub fn forward_seeded(&self, blur: &Tensor, spikes: Option<&Tensor>, seed: Option<u64>) -> Tensor {
        let size = blur.size();
        let clip = pad(blur);
        let context = Context {
            geometries: &self.geometries,
            draws: Draws::new(seed),
            checkpoint_attn: self.checkpoint[0],
            checkpoint_ffn: self.checkpoint[1],
        };
        let flows = self.spynet.as_ref().filter(|_| size[1] > 1).map(|net| net.flows(&clip));
        let shallow = convolve(&self.conv_first, &with_neighbours(&clip, flows.as_ref()));
        let spikes = self
            .spikes
            .as_ref()
            .zip(spikes)
            .map(|(branch, spikes)| (branch, branch.features(&pad(spikes), self.tiles, self.checkpoint)));
        let deep = self.u_net(&shallow, flows.as_ref(), spikes.as_ref(), &context);
        let deep = self.norm.forward(&self.stage8(&deep, &context));
        let features = shallow + self.conv_after_body.forward(&deep);
        let correction = convolve(&self.conv_last, &features).permute([0, 1, 4, 2, 3]);
        blur + correction.narrow(3, 0, size[3]).narrow(4, 0, size[4])
    }

    fn u_net(
        &self,
        x: &Tensor,
        flows: Option<&Flows>,
        spikes: Option<&(&Spikes, Vec<Tensor>)>,
        context: &Context,
    ) -> Tensor {
        let run = |stage: usize, x: &Tensor| {
            let scale = scale_of(stage);
            let flow =
                flows.map(|flows| ScaleFlow { backward: &flows.backward[scale], forward: &flows.forward[scale] });
            let y = self.stages[stage].forward(x, flow, context);
            match spikes.filter(|_| stage < SCALES) {
                Some((branch, features)) => {
                    branch.fuse[stage].forward(&y, Some(&features[stage]), self.tiles, self.checkpoint)
                }
                None => y,
            }
        };
        let x1 = run(0, x);
        let x2 = run(1, &x1);
        let x3 = run(2, &x2);
        let x4 = run(3, &x3);
        let x5 = run(4, &x4);
        let x6 = run(5, &(x5 + x3));
        run(6, &(x6 + x2)) + x1
    }

    fn stage8(&self, x: &Tensor, context: &Context) -> Tensor {
        let x = self.linear8.forward(&self.norm8.forward(x));
        self.refine.iter().fold(x, |x, Refine(group, linear)| linear.forward(&group.forward(&x, context)) + x)
    }
}

impl Spikes {
    fn new(p: &nn::Path, shape: &SpikeShape, features: i64) -> Self {
        let attention = |name: &str, heads: i64, cross: bool| {
            let p = p / name;
            (0..SCALES)
                .map(|i| TemporalAttention::new(&child(&p, i), features, heads, shape.mlp_ratio, cross))
                .collect()
        };
        Self {
            encoder: SpikeEncoder::new(&(p / "spike_encoder"), shape.bins, features),
            tsa: attention("spike_tsa", shape.tsa_heads, false),
            fuse: attention("spike_fuse", shape.fuse_heads, true),
        }
    }

    /// `[B, T, H/s, W/s, C]` for each scale s.
    fn features(&self, voxels: &Tensor, tiles: Tiles, checkpoint: [bool; 2]) -> Vec<Tensor> {
        let scales = self.encoder.forward(voxels);
        self.tsa.iter().zip(&scales).map(|(tsa, x)| tsa.forward(x, None, tiles, checkpoint)).collect()
    }
}

/// Scale of a stage as a power of two: 0, 1, 2, 3, 2, 1, 0.
fn scale_of(stage: usize) -> usize {
    stage.min(STAGES - 1 - stage)
}

fn build_stage(p: &nn::Path, shape: &VrtShape, index: usize, drop_path: &[f64]) -> Stage {
    let scale = match index {
        0 => Scale::Keep,
        1..=3 => Scale::Down,
        _ => Scale::Up,
    };
    let numbers = StageShape {
        inputs: shape.dims[index.saturating_sub(1)],
        features: shape.dims[index],
        window: shape.window,
        heads: shape.heads,
        scale,
        factor: 1 << scale_of(index),
        deform_groups: shape.deform_groups,
        deformable: shape.deformable,
        drop_path,
    };
    Stage::new(&(p / format!("stage{}", index + 1)), &numbers)
}

/// Repeats the last row and column until both sides are multiples of 8: `[B, T, C, H, W]`.
fn pad(x: &Tensor) -> Tensor {
    let size = x.size();
    let more = |n: i64| (n + MULTIPLE - 1) / MULTIPLE * MULTIPLE - n;
    let (down, right) = (more(size[3]), more(size[4]));
    if (down, right) == (0, 0) {
        return x.shallow_clone();
    }
    let flat = x.reshape([-1, size[2], size[3], size[4]]).replication_pad2d([0, right, 0, down]);
    flat.reshape([size[0], size[1], size[2], size[3] + down, size[4] + right])
}

/// A convolution of `[B, T, H, W, C]`.
fn convolve(conv: &Conv, x: &Tensor) -> Tensor {
    conv.over_time(&x.permute([0, 1, 4, 2, 3])).permute([0, 1, 3, 4, 2])
}

/// Each frame with the four pixels around where the flow puts it in the next frame and in the one before:
/// `[B, T, 3, H, W]` to `[B, T, H, W, 27]`.
fn with_neighbours(clip: &Tensor, flows: Option<&Flows>) -> Tensor {
    let size = clip.size();
    let (b, pairs, h, w) = (size[0], size[1] - 1, size[3], size[4]);
    let zero = Tensor::zeros([b, 1, 12, h, w], (clip.kind(), clip.device()));
    let near = |frames: Tensor, flow: Option<&Tensor>| match flow {
        None => frames.repeat([1, 1, 4, 1, 1]),
        Some(flow) => warp::four_nearest(&frames.reshape([b * pairs, 3, h, w]), &flow.reshape([b * pairs, 2, h, w]))
            .reshape([b, pairs, 12, h, w]),
    };
    let (next, last) = if pairs == 0 {
        (zero.shallow_clone(), zero)
    } else {
        let next = near(clip.narrow(1, 1, pairs), flows.map(|flows| &flows.backward[0]));
        let last = near(clip.narrow(1, 0, pairs), flows.map(|flows| &flows.forward[0]));
        (Tensor::cat(&[&next, &zero], 1), Tensor::cat(&[&zero, &last], 1))
    };
    Tensor::cat(&[clip, &next, &last], 2).permute([0, 1, 3, 4, 2])
}

#[cfg(test)]
mod tests;
