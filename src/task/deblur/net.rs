//! The transformer with its input and its loss, as the trainer wants a model.

use super::data::voxel::{self, VoxelSpec, Voxeliser};
use super::loss::Loss;
use super::model::{Flow, SpikeShape, Vrt, VrtShape};
use crate::data::DataError;
use crate::task::{Batch, Model, Output};
use launcher::config::{Config, FlowKind, VrtModel};
use tch::{Tensor, nn};

/// Bytes in, restored frames and loss out.
pub struct DeblurNet {
    vrt: Vrt,
    loss: Loss,
    voxels: Voxeliser,
    /// The third field holds precomputed voxels, not spikes.
    precomputed: bool,
}

impl DeblurNet {
    /// `image_width`: columns of a whole frame, to know the spike camera's scale.
    ///
    /// # Errors
    /// The loss needs a file that cannot be used.
    pub fn new(config: &Config, image_width: usize, vs: &nn::Path) -> Result<Self, DataError> {
        let data = &config.data.deblur;
        let norm = ((data.norm_mean, data.norm_std) != (0.0, 1.0)).then_some((data.norm_mean, data.norm_std));
        let spec = VoxelSpec { bins: data.voxel_bins as i64, log1p: data.log1p, norm };
        Ok(Self {
            vrt: Vrt::new(vs, &shape(&config.model.vrt, data.voxel_bins)),
            loss: Loss::new(&config.train, vs.device())?,
            voxels: Voxeliser::new(spec, data.spike_w, image_width),
            precomputed: data.use_precomputed_voxels,
        })
    }

    /// The spike camera's part of `batch` as voxels f32 `[B, T, K, h, w]`.
    fn spikes(&self, batch: &Batch, (h, w): (i64, i64)) -> Option<Tensor> {
        let field = batch.fields.get(2)?;
        Some(if self.precomputed { self.voxels.finish(field, h, w) } else { self.voxels.voxels(field, h, w) })
    }
}

impl Model for DeblurNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let (blur, sharp) = (voxel::frames(&batch.fields[0]), voxel::frames(&batch.fields[1]));
        let size = sharp.size();
        let spikes = self.spikes(batch, (size[3], size[4]));
        let prediction = self.vrt.forward(&blur, spikes.as_ref(), train);
        Output { loss: self.loss.of(&prediction, &sharp), prediction }
    }
}
