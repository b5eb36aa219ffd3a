//! The transformer with its input and its loss, as the trainer wants a model.

use super::data::voxel::{self, VoxelSpec, Voxeliser};
use super::loss::Loss;
use super::model::{Flow, SpikeShape, Vrt, VrtShape};
use super::tiles::in_tiles;
use crate::data::DataError;
use crate::task::{Batch, Model, Output};
use spec::config::Config;
use spec::task::deblur::{DeblurConfig, DeblurLoss, FlowKind, VrtModel};
use tch::{Tensor, nn};

/// Bytes in, restored frames and loss out.
pub struct DeblurNet {
    vrt: Vrt,
    loss: Loss,
    voxels: Voxeliser,
    /// The third field holds precomputed voxels, not spikes.
    precomputed: bool,
    /// Side of the squares in which frames of a pass are restored; 0: whole frames.
    tile: i64,
}

impl DeblurNet {
    /// `image_width`: columns of a whole frame, to know the spike camera's scale.
    ///
    /// # Errors
    /// The loss needs a file that cannot be used.
    pub fn new(config: &Config, image_width: usize, vs: &nn::Path) -> Result<Self, DataError> {
        let data: DeblurConfig = config.section();
        let shape = shape(&data.vrt, data.voxel_bins);
        shape.check().map_err(|problem| DataError::setting("deblur.vrt", format!("deblur.vrt, {problem}")))?;
        let name = &config.train.loss_type;
        let loss: Result<DeblurLoss, String> = name.parse();
        let loss = loss.map_err(|problem| {
            DataError::setting("train.loss_type", format!("train.loss_type is {name}: {problem}"))
        })?;
        let norm = ((data.norm_mean, data.norm_std) != (0.0, 1.0)).then_some((data.norm_mean, data.norm_std));
        let spec = VoxelSpec { bins: data.voxel_bins as i64, log1p: data.log1p, norm };
        Ok(Self {
            vrt: Vrt::new(vs, &shape),
            loss: Loss::new(loss, &data.loss, vs.device())?,
            voxels: Voxeliser::new(spec, data.spike_w, image_width),
            precomputed: data.use_precomputed_voxels,
            tile: data.predict_tile as i64,
        })
    }

    /// The spike camera's part of a batch, `field`, as voxels f32 `[B, T, K, h, w]`.
    fn spikes(&self, field: Option<&Tensor>, (h, w): (i64, i64)) -> Option<Tensor> {
        let field = field?;
        Some(if self.precomputed { self.voxels.finish(field, h, w) } else { self.voxels.voxels(field, h, w) })
    }
}

/// `deblur.vrt` as the model wants it, with `bins` voxels per frame.
pub fn shape(model: &VrtModel, bins: usize) -> VrtShape {
    let whole = |values: &[usize]| values.iter().map(|value| *value as i64).collect::<Vec<i64>>();
    let side = |n: usize| model.window.get(n).map_or(1, |side| *side as i64);
    let spike = SpikeShape {
        bins: bins as i64,
        tsa_heads: model.tsa_heads as i64,
        fuse_heads: model.fuse_heads as i64,
        ..SpikeShape::default()
    };
    VrtShape {
        dims: whole(&model.dims),
        depths: whole(&model.depths),
        heads: model.heads as i64,
        window: [side(0), side(1), side(2)],
        deform_groups: model.deform_groups as i64,
        independent_groups: whole(&model.independent_groups),
        flow: match model.flow {
            FlowKind::Zero => Flow::Zero,
            FlowKind::SpyNet => Flow::SpyNet,
        },
        deformable: model.deformable,
        spike: model.use_spike.then_some(spike),
        max_batch_tokens: model.max_batch_tokens as i64,
        chunk_size: model.chunk_size as i64,
        checkpoint_attn: model.checkpoint_attn,
        checkpoint_ffn: model.checkpoint_ffn,
        drop_path: model.drop_path,
    }
}

impl Model for DeblurNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let (blur, sharp) = (voxel::frames(&batch.fields[0]), voxel::frames(&batch.fields[1]));
        let size = sharp.size();
        let spikes = self.spikes(batch.fields.get(2), (size[3], size[4]));
        let prediction = self.vrt.forward(&blur, spikes.as_ref(), train);
        Output::new(self.loss.of(&prediction, &sharp), prediction)
    }

    /// The fields of a pass are `blur` and the spike camera's part.
    fn predict(&self, batch: &Batch) -> Tensor {
        let blur = voxel::frames(&batch.fields[0]);
        let size = blur.size();
        let (h, w) = (size[3], size[4]);
        let spikes = self.spikes(batch.fields.get(1), (h, w));
        if self.tile == 0 || self.tile >= h.max(w) {
            return self.vrt.forward(&blur, spikes.as_ref(), false);
        }
        in_tiles((h, w), self.tile, |[y, x, tall, wide]| {
            let part = |of: &Tensor| of.narrow(-2, y, tall).narrow(-1, x, wide);
            self.vrt.forward(&part(&blur), spikes.as_ref().map(part).as_ref(), false)
        })
    }
}
