//! Sizes of the deblurring task by formula: the VRT's parameters and activations, samples, and the data set's arithmetic.
//!
//! With `C` channels, `g` groups of the deformable convolution and `lin(a, b) = a·b + b`:
//!
//! ```text
//! block    2C + (2t-1)(2h-1)(2w-1)·heads + lin(C, 3C) + lin(C, C)            (self-attention in a window t×h×w)
//!          + 2C + 2·lin(C, 2C) + lin(2C, C)                                  (GEGLU)
//!          mutual: + lin(C, 3C), and lin(2C, C) in place of lin(C, C)
//! stage    norm and linear of the change of scale + ⌊¾·depth⌋ mutual blocks of 2 frames + the rest + 2·lin(C, C)
//!          + deformable warping 9C² + C + offsets (2C+2)·9C + C + 2(9C² + C) + 27g·9C + 27g
//!          + GEGLU 3C → 3C → C
//! stage 8  norm and linear, groups of blocks with lin(C, C) each, norm and linear back
//! spikes   3×3×3 convolutions K → C, 8 of residual blocks, 3 of stride 2 in space; then on each of 4 scales attention
//!          over time and cross-attention, heads and an MLP of 2C
//! ```
//! It gives 18,320,007 for the public GoPro model, 23,675,463 for the guide's baseline with spikes.

use super::constants::*;
use super::table::{bytes_text, grouped};
use super::task::{SampleSizes, TaskSizes, product, sum};
use super::vrt::activation_scalars;
use crate::config::{Config, DeblurData, FlowKind, SpikeEncoding, VrtModel};
use crate::contract::{CacheMode, DatasetFacts, FrameFacts};

/// Six levels of five 7×7 convolutions, 8 → 32 → 64 → 32 → 16 → 2.
const SPYNET: u64 = 1_440_300;
/// Stages of the U-net, and how each changes the scale.
pub(super) const STAGES: usize = 7;
pub(super) const SCALE: [u64; STAGES] = [1, 2, 4, 8, 4, 2, 1];
/// Scales that spikes are fused on.
pub(super) const SPIKE_SCALES: usize = 4;
/// Neighbours on the grid around a warped position, three channels each, are read by the first convolution.
pub(super) const FIRST_CHANNELS: u64 = 3 * (1 + 2 * 4);
/// VGG16's convolutions up to relu3_3; all thirteen, with LPIPS's five layers.
const RELU3_3_PARAMETERS: u64 = 1_735_488;
const LPIPS_PARAMETERS: u64 = 14_714_688 + 64 + 128 + 256 + 512 + 512;
/// Scalars per pixel of a frame up to relu3_3: 2·64 channels at full size, 2·128 at a quarter, 3·256 at a sixteenth, each as
/// a convolution and its ReLU, with the pooled and the normalised input.
const VGG_KEPT_PER_PIXEL: u64 = 2 * (2 * 64 + 2 * 128 / 4 + 3 * 256 / 16) + 3 + 16 + 8 + 64;
/// Three tensors of 64 channels: what goes into a convolution, comes out, and its ReLU.
const VGG_WORK_PER_PIXEL: u64 = 3 * 64;
/// The features of both frames at all five places, and their difference.
const LPIPS_KEPT_PER_PIXEL: u64 = 3 * (64 + 128 / 4 + 256 / 16 + 512 / 64 + 2);
/// Worker processes of the guide's 36 per GPU on 3 GPUs.
const GUIDE_WORKERS: u64 = 36 * 3;
/// Spike planes of a frame where no file tells: two per sub-frame of 33.
const USUAL_PLANES: u64 = 66;
/// Pixels of a frame for each of the spike camera, along a side, where no file tells: 720×1280 beside 360×640.
const USUAL_SCALE: u64 = 2;

/// Scalars of the model with `bins` voxels per frame; absent: the product overflows, or a list is too short.
pub fn parameters(model: &VrtModel, bins: u64) -> Option<u64> {
    let dims: Vec<u64> = model.dims.iter().map(|dim| *dim as u64).collect();
    let (first, last) = (*dims.first()?, *dims.get(STAGES)?);
    let mut terms = vec![conv(FIRST_CHANNELS, first, 9)?];
    if model.flow == FlowKind::SpyNet {
        terms.push(SPYNET);
    }
    for stage in 0..STAGES {
        let input = dims[stage.saturating_sub(1)];
        terms.push(stage_parameters(model, stage, input, dims[stage])?);
    }
    terms.extend([norm(dims[STAGES - 1])?, linear(dims[STAGES - 1], last)?]);
    for group in STAGES..model.depths.len() {
        let blocks = product(&[model.depths[group] as u64, block(model, last, window(model, group), false)?])?;
        terms.extend([blocks, linear(last, last)?]);
    }
    terms.extend([norm(last)?, linear(last, first)?, conv(first, 3, 9)?]);
    if model.use_spike {
        terms.push(spike_parameters(&dims, bins)?);
    }
    sum(&terms)
}

/// Attention window of a group of stage 8.
fn window(model: &VrtModel, group: usize) -> [u64; 3] {
    let [frames, rows, columns] = whole_window(model);
    [if model.independent_groups.contains(&group) { 1 } else { frames }, rows, columns]
}

pub(super) fn whole_window(model: &VrtModel) -> [u64; 3] {
    let side = |n: usize| model.window.get(n).map_or(1, |side| *side as u64).max(1);
    [side(0), side(1), side(2)]
}

fn stage_parameters(model: &VrtModel, stage: usize, input: u64, dim: u64) -> Option<u64> {
    let depth = *model.depths.get(stage)? as u64;
    let mutual = depth * 3 / 4;
    let [frames, rows, columns] = whole_window(model);
    let scale = match stage {
        0 => norm(dim)?,
        1..=3 => sum(&[norm(input.checked_mul(4)?)?, linear(input.checked_mul(4)?, dim)?])?,
        _ => sum(&[norm(input / 4)?, linear(input / 4, dim)?])?,
    };
    let blocks = [
        mutual.checked_mul(block(model, dim, [2, rows, columns], true)?)?,
        (depth - mutual).checked_mul(block(model, dim, [frames, rows, columns], false)?)?,
    ];
    let wide = dim.checked_mul(3)?;
    let fuse = sum(&[linear(wide, wide)?.checked_mul(2)?, linear(wide, dim)?])?;
    let warp = if model.deformable { warping(dim, model.deform_groups as u64)? } else { 0 };
    sum(&[scale, sum(&blocks)?, linear(dim, dim)?.checked_mul(2)?, warp, fuse])
}

/// The deformable convolution and the net of its offsets and masks.
fn warping(dim: u64, groups: u64) -> Option<u64> {
    let offsets = groups.checked_mul(27)?;
    let middle = conv(dim, dim, 9)?.checked_mul(2)?;
    sum(&[conv(dim, dim, 9)?, conv(dim.checked_mul(2)?.checked_add(2)?, dim, 9)?, middle, conv(dim, offsets, 9)?])
}

fn block(model: &VrtModel, dim: u64, window: [u64; 3], mutual: bool) -> Option<u64> {
    let places = window.iter().map(|side| side.checked_mul(2)?.checked_sub(1)).collect::<Option<Vec<_>>>()?;
    let bias = product(&places)?.checked_mul(model.heads as u64)?;
    let (double, triple) = (dim.checked_mul(2)?, dim.checked_mul(3)?);
    let out = if mutual { sum(&[linear(dim, triple)?, linear(double, dim)?])? } else { linear(dim, dim)? };
    let mlp = sum(&[linear(dim, double)?.checked_mul(2)?, linear(double, dim)?])?;
    sum(&[norm(dim)?, bias, linear(dim, triple)?, out, norm(dim)?, mlp])
}

/// Encoder, attention over time and cross-attention of the spike branch.
fn spike_parameters(dims: &[u64], bins: u64) -> Option<u64> {
    let mut terms = vec![conv(bins, *dims.first()?, 27)?];
    for scale in 0..SPIKE_SCALES {
        let dim = dims[scale];
        if scale > 0 {
            terms.push(conv(dims[scale - 1], dim, 27)?);
        }
        terms.push(conv(dim, dim, 27)?.checked_mul(4)?);
        let mlp = sum(&[linear(dim, dim.checked_mul(2)?)?, linear(dim.checked_mul(2)?, dim)?])?;
        let attention = sum(&[linear(dim, dim)?.checked_mul(4)?, norm(dim)?.checked_mul(2)?, mlp])?;
        // Cross-attention norms what it reads, too.
        terms.extend([attention, attention.checked_add(norm(dim)?)?]);
    }
    sum(&terms)
}

fn linear(input: u64, output: u64) -> Option<u64> {
    conv(input, output, 1)
}

/// Convolution with bias.
fn conv(input: u64, output: u64, taps: u64) -> Option<u64> {
    product(&[input, output, taps])?.checked_add(output)
}

/// Layer norm.
fn norm(dim: u64) -> Option<u64> {
    dim.checked_mul(2)
}

/// Everything the planner asks of this task; absent: a product overflows.
pub(super) fn sizes(config: &Config, dataset: &DatasetFacts) -> Option<TaskSizes> {
    let (data, model) = (&config.data.deblur, &config.model.vrt);
    let frame = Frame::of(data, &dataset.frames);
    let (train, val) = (frame.cut(data.crop_size), frame.cut(data.val_crop_size));
    let sample = |frame: &Frame, train: bool| {
        let fields = frame.fields(config)?;
        let vgg = vgg_scalars(config, frame, train)?;
        let activation_scalars = activation_scalars(model, data, frame, train)?.checked_add(vgg)?;
        Some(SampleSizes {
            fields,
            activation_scalars,
            heap_scalars: activation_scalars,
            device_scalars: device_scalars(model, data, frame, train)?.checked_add(vgg)?,
        })
    };
    let entries = frame.entry_bytes(config)?;
    let count = (dataset.frames.images / 2) as u64;
    // Whole pages, so that all of it fits a cache of this size.
    let useful_bytes = count.checked_mul(entries)?.checked_next_multiple_of(PAGE_BYTES)?;
    Some(TaskSizes {
        parameters: parameters(model, data.voxel_bins as u64)?,
        train: sample(&train, true)?,
        val: sample(&val, false)?,
        step_scalars: 0,
        heap_factors: [VIDEO_HEAP_FACTOR, VIDEO_VAL_HEAP_FACTOR],
        // Within the scalars already.
        device_factor: (1, 1),
        library_bytes: VIDEO_LIBRARY_BYTES,
        // Two pictures and the spikes of a frame are entries of their own.
        entry_bytes: [entries / 3; 2],
        // A file as read, and its picture or planes as decoded.
        scratch_bytes: entries.max(DECODE_SCRATCH_BYTES),
        useful_bytes,
        useful: format!("{} frames × {} B of entries", grouped(count), grouped(entries)),
        useful_is_exact: true,
        auto_policy: auto_policy(config),
        facts: facts(config, &frame, count)?,
    })
}

/// Clips that overlap share frames: an entry serves up to `clip_len` clips of an epoch, so what is needed again soonest is
/// worth more than the rest. Where each frame has one clip, all entries are read once, and what stays is as good as what
/// goes.
fn auto_policy(config: &Config) -> CacheMode {
    if config.data.stride < config.data.deblur.clip_len { CacheMode::NextUse } else { CacheMode::Pin }
}

/// Bytes that one clip of so many pixels holds at the peak of a training step or of an evaluation's pass, on a CPU; `None`: a
/// product overflows, or a list is too short.
pub fn activation_bytes(config: &Config, height: u64, width: u64, train: bool) -> Option<u64> {
    let frame = Frame { height, width, planes: 0, spike_height: 0, spike_width: 0 };
    activation_scalars(&config.model.vrt, &config.data.deblur, &frame, train)?.checked_mul(F32_BYTES)
}

/// Sizes of one frame and its planes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Frame {
    pub height: u64,
    pub width: u64,
    planes: u64,
    spike_height: u64,
    spike_width: u64,
}

impl Frame {
    fn of(data: &DeblurData, facts: &FrameFacts) -> Self {
        let (spike_height, spike_width) = (data.spike_h as u64, data.spike_w as u64);
        let (height, width) = match (facts.height as u64, facts.width as u64) {
            (0, _) | (_, 0) => (spike_height.saturating_mul(USUAL_SCALE), spike_width.saturating_mul(USUAL_SCALE)),
            found => found,
        };
        let spikes = spike_height.saturating_mul(spike_width).max(1);
        let bytes = match data.spike_encoding {
            SpikeEncoding::Auto => facts.spikes_are_bytes,
            encoding => encoding == SpikeEncoding::Bytes,
        };
        let planes = match facts.spike_file_bytes {
            0 => USUAL_PLANES,
            size if bytes => size / spikes,
            size => size.saturating_mul(8) / spikes,
        };
        Self { height, width, planes, spike_height, spike_width }
    }

    /// A square of `side` pixels of it, spikes in proportion and rounded up; 0: all.
    fn cut(&self, side: usize) -> Self {
        let side = side as u64;
        if side == 0 {
            return self.clone();
        }
        let (height, width) = (side.min(self.height), side.min(self.width));
        let part = |whole: u64, cut: u64, of: u64| whole.saturating_mul(cut).div_ceil(of.max(1));
        Self {
            height,
            width,
            planes: self.planes,
            spike_height: part(self.spike_height, height, self.height),
            spike_width: part(self.spike_width, width, self.width),
        }
    }

    /// Blurred, sharp, and spikes or voxels of one frame, bytes as entries and slots hold them.
    fn parts(&self, config: &Config) -> Option<Vec<u64>> {
        let picture = product(&[self.height, self.width, 3])?;
        let mut parts = vec![picture, picture];
        if config.model.vrt.use_spike {
            let data = &config.data.deblur;
            parts.push(if data.use_precomputed_voxels {
                product(&[data.voxel_bins as u64, self.height, self.width, F32_BYTES])?
            } else {
                product(&[self.planes, self.spike_height, self.spike_width.div_ceil(8)])?
            });
        }
        Some(parts)
    }

    fn entry_bytes(&self, config: &Config) -> Option<u64> {
        // Entries start on cache lines.
        let lines = |bytes: u64| bytes.checked_next_multiple_of(FIELD_ALIGN_BYTES);
        sum(&self.parts(config)?.into_iter().map(lines).collect::<Option<Vec<_>>>()?)
    }

    fn fields(&self, config: &Config) -> Option<Vec<u64>> {
        let clip = config.data.deblur.clip_len as u64;
        self.parts(config)?.into_iter().map(|bytes| bytes.checked_mul(clip)).collect()
    }

    /// As the guide's data set holds it: two pictures and `bins` voxels per pixel, all f32.
    fn tensor_bytes(&self, bins: u64) -> Option<u64> {
        product(&[self.height, self.width, bins.checked_add(6)?, F32_BYTES])
    }
}

/// The guide's arithmetic for this data set.
fn facts(config: &Config, frame: &Frame, count: u64) -> Option<Vec<String>> {
    let data = &config.data.deblur;
    let (tensors, entries) = (frame.tensor_bytes(data.voxel_bins as u64)?, frame.entry_bytes(config)?);
    let (all_tensors, all_entries) = (tensors.checked_mul(count)?, entries.checked_mul(count)?);
    let ratio = tensors as f64 / entries.max(1) as f64;
    let spikes = match config.model.vrt.use_spike {
        false => String::new(),
        true if data.use_precomputed_voxels => format!(", {} voxels per pixel from files", data.voxel_bins),
        true => format!(", {} spike planes of {}×{}", frame.planes, frame.spike_height, frame.spike_width),
    };
    let mut facts = vec![
        format!("{} frames of {}×{}{spikes}", grouped(count), frame.height, frame.width),
        format!("as f32 tensors {} per frame, {} in all", bytes_text(tensors), bytes_text(all_tensors)),
        format!("as cached {} per frame (1/{ratio:.1}), {} in all", bytes_text(entries), bytes_text(all_entries)),
    ];
    let kept = all_tensors.checked_mul(GUIDE_WORKERS)?;
    let mut guide = format!("{GUIDE_WORKERS} worker processes that keep all tensors would hold {}", bytes_text(kept));
    if let Some(gb) = config.data.cache_size_gb {
        let each = ((gb * GIB as f64) as u64).min(all_tensors);
        let bounded = each.checked_mul(GUIDE_WORKERS)?;
        guide += &format!(", with {gb} GiB each {}", bytes_text(bounded));
    }
    facts.push(guide + "; here the node holds one page cache");
    Some(facts)
}

/// Scalars that a clip's forward pass holds at its peak on a device, an assumption: in training for backward, from above. Per token and channel of
/// a block: attention 9 (norm, q, k, v, product, projection, residual), 8 more where it is mutual, and two values per
/// head and neighbour in the window; feed-forward 12. Recomputed parts keep their input alone.
fn device_scalars(model: &VrtModel, data: &DeblurData, frame: &Frame, train: bool) -> Option<u64> {
    let pixels = product(&[data.clip_len as u64, frame.height, frame.width])?;
    let bins = if model.use_spike { data.voxel_bins as u64 } else { 0 };
    // Input, sharp frames, warped neighbours, voxels; flow's pyramid.
    let mut total = pixels.checked_mul(2 * FIRST_CHANNELS + 12 + 3 * bins)?;
    let mut peak = 0u64;
    let [frames, rows, columns] = whole_window(model);
    for (group, depth) in model.depths.iter().enumerate() {
        let stage = group.min(STAGES);
        let dim = *model.dims.get(stage)? as u64;
        let scale = SCALE.get(group).copied().unwrap_or(1);
        let tokens = pixels.div_ceil(scale * scale);
        let depth = *depth as u64;
        let mutual = if group < STAGES { depth * 3 / 4 } else { 0 };
        let wide = [frames, rows, columns].iter().product::<u64>();
        let parts = |places: u64, more: u64| (9 + more) * dim + 2 * model.heads as u64 * places;
        let (shared, own) = (parts(3 * rows * columns, 8), parts(wide, 0));
        let feed = 12 * dim;
        // Where only the input is kept, the part is whole again once, while it is recomputed.
        let kept = |whole: u64, again: bool| if again { dim } else { whole };
        let attention =
            mutual * kept(shared, model.checkpoint_attn) + (depth - mutual) * kept(own, model.checkpoint_attn);
        let blocks = attention + depth * kept(feed, model.checkpoint_ffn);
        // Linears, sums and, in the U-net, two directions of warping (nine samples each) with their fusion.
        // Recomputed with the attention (warping) and the feed-forward parts (fusion).
        let warp = 2 * 18 * dim + 2 * 54 * model.deform_groups as u64;
        let rest = match group {
            STAGES.. => 4 * dim,
            _ => 4 * dim + kept(warp, model.checkpoint_attn) + kept(12 * dim, model.checkpoint_ffn),
        };
        total = total.checked_add(tokens.checked_mul(blocks + rest)?)?;
        peak = peak.max(tokens.checked_mul(shared.max(own).max(feed).max(warp))?);
        if model.use_spike && group < SPIKE_SCALES {
            let attention = kept(30 * dim, model.checkpoint_attn && model.checkpoint_ffn);
            total = total.checked_add(tokens.checked_mul(10 * dim + 2 * attention)?)?;
        }
    }
    // Validation keeps the skip connections and the largest part alone.
    let (numerator, denominator) = VIDEO_DEVICE_FACTOR;
    if train {
        Some(total.checked_add(peak)?.checked_mul(numerator)? / denominator)
    } else {
        product(&[pixels, 8, *model.dims.first()? as u64])?.checked_add(peak)
    }
}

/// The same of VGG16 with its weights, where a file of them is given: the perceptual term keeps convolutions and ReLUs of all
/// frames for backward, LPIPS the features of one frame and its pair.
fn vgg_scalars(config: &Config, frame: &Frame, train: bool) -> Option<u64> {
    let pixels = product(&[frame.height, frame.width])?;
    let clip = pixels.checked_mul(config.data.deblur.clip_len as u64)?;
    let (perceptual, lpips) = (config.train.perceptual_weight > 0.0, &config.train.lpips_file);
    let loss = match config.train.perceptual_file {
        // Without backward three of the widest tensors at a time.
        Some(_) if perceptual => {
            let per_pixel = if train { VGG_KEPT_PER_PIXEL } else { VGG_WORK_PER_PIXEL };
            product(&[clip, per_pixel])?.checked_add(RELU3_3_PARAMETERS)?
        }
        _ => 0,
    };
    let metric = match lpips {
        Some(_) if train => LPIPS_PARAMETERS,
        Some(_) => product(&[pixels, VGG_WORK_PER_PIXEL + LPIPS_KEPT_PER_PIXEL])?.checked_add(LPIPS_PARAMETERS)?,
        None => 0,
    };
    loss.checked_add(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(depths: &[usize], dims: [usize; 8], window: [usize; 3], independent: &[usize]) -> VrtModel {
        VrtModel {
            depths: depths.to_vec(),
            dims: dims.to_vec(),
            window: window.to_vec(),
            independent_groups: independent.to_vec(),
            ..VrtModel::default()
        }
    }

    #[test]
    fn parameters_of_the_three_sizes() {
        let mut public = [96; 8];
        public[7] = 120;
        let depths = [[8; 7].as_slice(), &[4; 4]].concat();
        let public = VrtModel { use_spike: false, ..shape(&depths, public, [6, 8, 8], &[9, 10]) };
        assert_eq!(parameters(&public, 32), Some(18_320_007));
        assert_eq!(parameters(&VrtModel::default(), 32), Some(23_675_463));
        let frames_alone = VrtModel { use_spike: false, ..VrtModel::default() };
        assert_eq!(parameters(&frames_alone, 32), Some(18_263_751));
        let small = VrtModel {
            heads: 2,
            deform_groups: 4,
            flow: FlowKind::Zero,
            ..shape(&[[4; 7].as_slice(), &[2; 2]].concat(), [16; 8], [2, 4, 4], &[8])
        };
        assert_eq!(parameters(&small, 32), Some(364_343 + 163_392));
    }

    #[test]
    fn absurd_sizes_overflow_to_none() {
        let wide = shape(&[1; 8], [usize::MAX / 2; 8], [2, 4, 4], &[]);
        assert_eq!(parameters(&wide, 32), None);
        assert_eq!(parameters(&VrtModel { dims: vec![8], ..VrtModel::default() }, 32), None);
    }

    #[test]
    fn a_frame_of_the_guide_is_compact_by_the_factor_promised() {
        let config = Config::of_task("deblur");
        let facts = FrameFacts { images: 4444, height: 720, width: 1280, ..FrameFacts::default() };
        let frame = Frame::of(&config.data.deblur, &facts);
        let (tensors, entries) = (frame.tensor_bytes(32).unwrap(), frame.entry_bytes(&config).unwrap());
        assert_eq!(tensors, 140_083_200);
        assert_eq!(entries, 2 * 720 * 1280 * 3 + 66 * 360 * 80);
        assert!(tensors >= 15 * entries, "{tensors} {entries}");
    }

    #[test]
    fn clips_that_overlap_want_a_policy_that_looks_ahead() {
        use CacheMode::{NextUse, Pin};
        let mut config = Config::of_task("deblur");
        for (clip_len, stride, policy) in [(5, 1, NextUse), (5, 4, NextUse), (5, 5, Pin), (1, 1, Pin)] {
            (config.data.deblur.clip_len, config.data.stride) = (clip_len, stride);
            assert_eq!(auto_policy(&config), policy, "{clip_len} {stride}");
        }
    }

    #[test]
    fn planes_come_from_the_file_and_its_encoding() {
        let mut data = DeblurData { spike_h: 48, spike_w: 64, ..DeblurData::default() };
        let mut facts = FrameFacts { spike_file_bytes: 66 * 48 * 64 / 8, ..FrameFacts::default() };
        assert_eq!(Frame::of(&data, &facts).planes, 66);
        facts = FrameFacts { spike_file_bytes: 66 * 48 * 64, spikes_are_bytes: true, ..facts };
        assert_eq!(Frame::of(&data, &facts).planes, 66);
        data.spike_encoding = SpikeEncoding::Packed;
        assert_eq!(Frame::of(&data, &facts).planes, 8 * 66);
        let frame = Frame { height: 96, width: 128, ..Frame::of(&data, &facts) };
        let cut = frame.cut(64);
        assert_eq!((cut.height, cut.width, cut.spike_height, cut.spike_width), (64, 64, 32, 32));
        assert_eq!(frame.cut(0), frame);
    }

    #[test]
    fn files_of_vgg_weigh_what_they_add() {
        let mut config = Config::of_task("deblur");
        let frame = Frame { height: 64, width: 64, planes: 66, spike_height: 32, spike_width: 32 };
        let of = |config: &Config, train| vgg_scalars(config, &frame, train).unwrap();
        config.train.perceptual_weight = 0.1;
        assert_eq!((of(&config, true), of(&config, false)), (0, 0));
        config.train.lpips_file = Some("lpips".into());
        assert_eq!(of(&config, true), LPIPS_PARAMETERS);
        let (metric, pixels) = (of(&config, false), 64 * 64);
        assert!(metric > LPIPS_PARAMETERS + 2 * 122 * pixels);
        config.train.perceptual_file = Some("vgg".into());
        // 3·3 taps and a bias each.
        let counted = |pairs: &[(u64, u64)]| pairs.iter().map(|(i, o)| 9 * i * o + o).sum::<u64>();
        let first = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)];
        assert_eq!(counted(&first), RELU3_3_PARAMETERS);
        let rest = [(256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)];
        assert_eq!(counted(&first) + counted(&rest) + 64 + 128 + 256 + 512 + 512, LPIPS_PARAMETERS);
        assert!(of(&config, true) > LPIPS_PARAMETERS + 5 * 480 * pixels && of(&config, false) > metric);
    }

    #[test]
    fn recomputation_lowers_the_estimate() {
        let config = Config::of_task("deblur");
        let (data, mut model) = (&config.data.deblur, config.model.vrt.clone());
        let frame = Frame { height: 256, width: 256, planes: 66, spike_height: 90, spike_width: 128 };
        let of = |model: &VrtModel, train| activation_scalars(model, data, &frame, train).unwrap();
        let recomputed = of(&model, true);
        (model.checkpoint_attn, model.checkpoint_ffn) = (false, false);
        assert!(of(&model, true) > 3 * recomputed);
        assert!(of(&model, false) < recomputed);
        let device = |model: &VrtModel| device_scalars(model, data, &frame, true).unwrap();
        assert!(device(&model) > 3 * device(&config.model.vrt));
    }
}
