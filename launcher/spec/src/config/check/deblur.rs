//! Checks of `data.deblur` and `model.vrt`.

use super::Verdict;
use crate::config::{DeblurData, VrtModel};

/// Longest clip, most bins and heads: beyond lies a slip of the pen.
const MOST: usize = 1024;
/// Longest side of a frame, a crop or a camera, and most channels.
const MOST_WIDE: usize = 1 << 16;
/// Stages with dimensions of their own: seven of the U-net, and stage 8.
const STAGES: usize = 8;
/// Stages whose output meets spikes.
const FUSED: usize = 4;
/// Coarsest scale of the U-net, as a share of the frame's side.
const COARSEST: usize = 8;

pub(super) fn clips(data: &DeblurData, v: &mut Verdict) {
    for (key, value) in [
        ("clip_len", data.clip_len),
        ("spike_h", data.spike_h),
        ("spike_w", data.spike_w),
        ("voxel_bins", data.voxel_bins),
    ] {
        v.at_least_one(&[(&format!("data.deblur.{key}"), value as u64)]);
    }
    for (key, value) in [("clip_len", data.clip_len), ("voxel_bins", data.voxel_bins)] {
        v.need(value <= MOST, || format!("data.deblur.{key} is {value}; it must be at most {MOST}"));
    }
    for (key, value) in [
        ("spike_h", data.spike_h),
        ("spike_w", data.spike_w),
        ("crop_size", data.crop_size),
        ("val_crop_size", data.val_crop_size),
    ] {
        v.need(value <= MOST_WIDE, || format!("data.deblur.{key} is {value}; it must be at most {MOST_WIDE}"));
    }
    for (key, value) in [("crop_size", data.crop_size), ("val_crop_size", data.val_crop_size)] {
        v.need(value == 0 || value >= COARSEST, || {
            format!("data.deblur.{key} is {value}; it must be 0, for whole frames, or at least {COARSEST}")
        });
    }
    for (key, name) in [
        ("train_split", &data.train_split),
        ("val_split", &data.val_split),
        ("test_split", &data.test_split),
        ("spike_dir", &data.spike_dir),
        ("voxel_dir", &data.voxel_dir),
    ] {
        let inside = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
        v.need(inside, || format!("data.deblur.{key} is {name:?}; it must name a folder, without a path"));
    }
    let dotted = |ext: &String| ext.len() > 1 && ext.starts_with('.');
    let exts = &data.image_exts;
    v.need(!exts.is_empty() && exts.iter().all(dotted), || {
        format!("data.deblur.image_exts is {exts:?}; it must list endings with their dot, such as .png")
    });
    v.above_zero(&[("data.deblur.norm_std", data.norm_std)]);
}

pub(super) fn vrt(model: &VrtModel, v: &mut Verdict) {
    let (dims, depths) = (&model.dims, &model.depths);
    v.need(dims.len() == STAGES, || {
        format!("model.vrt.dims has {} numbers; it needs {STAGES}, one per stage", dims.len())
    });
    v.need(dims.iter().all(|dim| *dim <= MOST_WIDE), || {
        format!("model.vrt.dims is {dims:?}; each must be at most {MOST_WIDE}")
    });
    v.need(depths.len() >= STAGES, || {
        format!(
            "model.vrt.depths has {} numbers; it needs at least {STAGES}: 7 stages, then stage 8's groups",
            depths.len()
        )
    });
    v.at_most_layers("the number of model.vrt.depths", depths.len());
    for (i, depth) in depths.iter().enumerate() {
        v.at_least_one(&[(&format!("model.vrt.depths[{i}]"), *depth as u64)]);
        v.at_most_layers(&format!("model.vrt.depths[{i}]"), *depth);
    }
    v.need(model.window.len() == 3 && model.window.iter().all(|side| (1..=MOST).contains(side)), || {
        format!("model.vrt.window is {:?}; it must be frames, rows and columns of 1 to {MOST}", model.window)
    });
    heads(model, v);
    for group in &model.independent_groups {
        v.need((STAGES - 1..depths.len()).contains(group), || {
            let last = depths.len().saturating_sub(1);
            format!("model.vrt.independent_groups names {group}; stage 8's groups in model.vrt.depths are 7 to {last}")
        });
    }
    let fused = dims.get(..FUSED).unwrap_or_default();
    v.need(!model.use_spike || fused.iter().all(|dim| Some(dim) == fused.first()), || {
        format!("model.vrt.dims is {dims:?}; with model.vrt.use_spike the first {FUSED} must be equal")
    });
    v.need(dims.iter().skip(3).take(3).all(|dim| dim.is_multiple_of(4)), || {
        format!("model.vrt.dims is {dims:?}; those of stages 4 to 6 must be multiples of 4, which going up divides by")
    });
    v.at_least_one(&[
        ("model.vrt.max_batch_tokens", model.max_batch_tokens as u64),
        ("model.vrt.chunk_size", model.chunk_size as u64),
    ]);
    v.share(&[("model.vrt.drop_path", model.drop_path)]);
}

/// Heads and groups split channels into equal parts.
fn heads(model: &VrtModel, v: &mut Verdict) {
    let parts = [
        ("heads", model.heads),
        ("deform_groups", model.deform_groups),
        ("tsa_heads", model.tsa_heads),
        ("fuse_heads", model.fuse_heads),
    ];
    for (key, count) in parts {
        let key = format!("model.vrt.{key}");
        v.at_least_one(&[(&key, count as u64)]);
        for (stage, dim) in model.dims.iter().enumerate() {
            // Stage 8 neither warps nor meets spikes.
            let touches = key.ends_with(".heads") || stage + 1 < STAGES;
            v.need(!touches || count == 0 || (*dim > 0 && dim.is_multiple_of(count)), || {
                format!("model.vrt.dims[{stage}] is {dim}; it must be a multiple of {key} {count}")
            });
        }
    }
}
