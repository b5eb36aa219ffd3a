//! Checks of values together.

use super::keys::MOST;
use super::{DeblurConfig, VrtModel};
use crate::config::Verdict;

/// Stages with separate dimensions: seven of the U-net, and stage 8.
const STAGES: usize = 8;
/// Stages whose output meets spikes.
const FUSED: usize = 4;
/// Coarsest scale of the U-net, as a share of the frame's side.
const COARSEST: usize = 8;
/// More groups than any model of this kind has.
const MOST_DEPTHS: usize = 64;

pub(super) fn check(deblur: &DeblurConfig, v: &mut Verdict) {
    for (key, value) in [
        ("crop_size", deblur.crop_size),
        ("val_crop_size", deblur.val_crop_size),
        ("predict_tile", deblur.predict_tile),
    ] {
        v.need(value == 0 || value >= COARSEST, || {
            format!("deblur.{key} is {value}; it must be 0, for whole frames, or at least {COARSEST}")
        });
    }
    let dotted = |ext: &String| ext.len() > 1 && ext.starts_with('.');
    let exts = &deblur.image_exts;
    v.need(!exts.is_empty() && exts.iter().all(dotted), || {
        format!("deblur.image_exts is {exts:?}; it must list endings with their dot, such as .png")
    });
    v.warn(deblur.loss.perceptual_weight == 0.0 || deblur.loss.perceptual_file.is_some(), || {
        let weight = deblur.loss.perceptual_weight;
        format!(
            "deblur.loss.perceptual_weight {weight} has no effect without deblur.loss.perceptual_file, VGG16's weights"
        )
    });
    vrt(&deblur.vrt, v);
    heads(&deblur.vrt, v);
}

fn vrt(model: &VrtModel, v: &mut Verdict) {
    let (dims, depths) = (&model.dims, &model.depths);
    v.need(dims.len() == STAGES, || {
        format!("deblur.vrt.dims has {} numbers; it needs {STAGES}, one per stage", dims.len())
    });
    v.need(depths.len() >= STAGES, || {
        format!(
            "deblur.vrt.depths has {} numbers; it needs at least {STAGES}: 7 stages, then stage 8's groups",
            depths.len()
        )
    });
    v.need(depths.len() <= MOST_DEPTHS, || {
        format!("deblur.vrt.depths has {} numbers; it must have at most {MOST_DEPTHS}", depths.len())
    });
    v.need(model.window.len() == 3 && model.window.iter().all(|side| (1..=MOST as usize).contains(side)), || {
        format!("deblur.vrt.window is {:?}; it must be frames, rows and columns of 1 to {MOST}", model.window)
    });
    for group in &model.independent_groups {
        v.need((STAGES - 1..depths.len()).contains(group), || {
            let last = depths.len().saturating_sub(1);
            format!(
                "deblur.vrt.independent_groups names {group}; stage 8's groups in deblur.vrt.depths are 7 to {last}"
            )
        });
    }
    let fused = dims.get(..FUSED).unwrap_or_default();
    v.need(!model.use_spike || fused.iter().all(|dim| Some(dim) == fused.first()), || {
        format!("deblur.vrt.dims is {dims:?}; with deblur.vrt.use_spike the first {FUSED} must be equal")
    });
    v.need(dims.iter().skip(3).take(3).all(|dim| dim.is_multiple_of(4)), || {
        format!("deblur.vrt.dims is {dims:?}; those of stages 4 to 6 must be multiples of 4, which going up divides by")
    });
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
        for (stage, dim) in model.dims.iter().enumerate() {
            // Stage 8 neither warps nor meets spikes.
            let touches = key == "heads" || stage + 1 < STAGES;
            v.need(!touches || count == 0 || (*dim > 0 && dim.is_multiple_of(count)), || {
                format!("deblur.vrt.dims[{stage}] is {dim}; it must be a multiple of deblur.vrt.{key} {count}")
            });
        }
    }
}
