//! Task `cell`: single-cell latent diffusion on `.h5ad`.

mod model;
pub mod respace;

pub use model::{
    AutoencoderKeys, ClassifierKeys, DiffusionKeys, NoiseSchedule, SampleKeys, StepSampler, UnetKeys,
};
