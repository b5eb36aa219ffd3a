//! Keys of the models of task `cell`: autoencoder, diffusion network, classifier, and the sampling of new cells.

use crate::config::Range::{Above, AtLeast, Share, Within};
use crate::config::{choices, keys};

keys! {
    /// Autoencoder of expression profiles: encoder to a latent vector of length 1, decoder back to genes.
    #[serde(default, deny_unknown_fields)]
    pub struct AutoencoderKeys in "cell.autoencoder." {
        /// Hidden sizes of the encoder; the decoder has them in reverse.
        hidden: Vec<usize> = vec![1024, 1024, 1024], range = AtLeast(1.0);
        /// Numbers of a latent vector.
        latent: usize = 128, range = AtLeast(1.0), aliases = &["cell.input_dim", "cell.latent_dim"];
        /// Dropout before every hidden layer but the first.
        dropout: f64 = 0.0, range = Share;
        /// Dropout of the genes that the encoder sees.
        input_dropout: f64 = 0.0, range = Share;
    }
}

keys! {
    /// The diffusion network (Cell_Unet): blocks down to the last hidden size and up again, with skip connections.
    #[serde(default, deny_unknown_fields)]
    pub struct UnetKeys in "cell.unet." {
        /// Hidden sizes, at least two; the first is also the width of the time embedding.
        hidden: Vec<usize> = vec![512, 512, 256, 128], range = AtLeast(1.0), aliases = &["cell.unet.hidden_dim", "cell.hidden_dim"];
        /// Dropout before the output. The published model declares 0.1 and never applies it.
        dropout: f64 = 0.0, range = Share;
    }
}

keys! {
    /// The diffusion process over latent vectors, and its loss.
    #[serde(default, deny_unknown_fields)]
    pub struct DiffusionKeys in "cell.diffusion." {
        /// Noise steps of the process.
        steps: usize = 1000, range = Within(2.0, 1e6), aliases = &["cell.diffusion_steps"];
        /// Course of the noise.
        noise_schedule: NoiseSchedule = NoiseSchedule::Linear, aliases = &["cell.noise_schedule"];
        /// Steps that are kept: a number (`250`), numbers per section of equal length (`10,15,20`), or `ddimN` for a constant
        /// stride. Empty: all. Training and sampling use the same.
        timestep_respacing: String = String::new(), aliases = &["cell.timestep_respacing"];
        /// The network predicts the clean latent. False: the noise.
        predict_xstart: bool = false, aliases = &["cell.predict_xstart"];
        /// The network predicts the variance too: its output is twice as wide.
        learn_sigma: bool = false, aliases = &["cell.learn_sigma"];
        /// Fixed variance: that of the posterior instead of β.
        sigma_small: bool = false, aliases = &["cell.sigma_small"];
        /// Train on the variational bound instead of the squared error.
        use_kl: bool = false, aliases = &["cell.use_kl"];
        /// The network sees time scaled to 0..1000 whatever `steps` is.
        rescale_timesteps: bool = false, aliases = &["cell.rescale_timesteps"];
        /// `learn_sigma`: weight the bound by steps / 1000.
        rescale_learned_sigmas: bool = false, aliases = &["cell.rescale_learned_sigmas"];
        /// How the step of a training sample is drawn.
        schedule_sampler: StepSampler = StepSampler::Uniform, aliases = &["cell.schedule_sampler"];
    }
}

choices! {
    /// Course of the noise over the steps.
    pub enum NoiseSchedule {
        /// β rises linearly from 1e-4 to 0.02, scaled by 1000 / steps.
        Linear = "linear",
        /// ᾱ falls as a squared cosine.
        Cosine = "cosine",
    }
}

choices! {
    /// Distribution that the step of a training sample is drawn from.
    pub enum StepSampler {
        Uniform = "uniform",
        /// By the root mean square of the last ten losses of each step, over all ranks.
        LossSecondMoment = "loss-second-moment",
    }
}

keys! {
    /// Classifier of noised latents, whose gradient guides sampling.
    #[serde(default, deny_unknown_fields)]
    pub struct ClassifierKeys in "cell.classifier." {
        /// Three hidden sizes; the first is also the width of the time embedding.
        hidden: Vec<usize> = vec![512, 512, 256], range = AtLeast(1.0);
        /// Dropout after each hidden layer.
        dropout: f64 = 0.1, range = Share;
        /// Train on latents noised up to `start_guide_time`. False: on clean ones.
        noised: bool = true;
        /// Training draws noise steps below this one.
        start_guide_time: usize = 500, range = AtLeast(1.0), unit = "steps", aliases = &["cell.start_guide_time"];
    }
}

keys! {
    /// Sampling of new cells.
    #[serde(default, deny_unknown_fields)]
    pub struct SampleKeys in "cell.sample." {
        /// Cells to generate without guidance.
        num_samples: usize = 12_000, aliases = &["cell.num_samples"];
        /// Cells to generate of each class in `classes`, guided by the classifier. 0: none.
        per_class: usize = 0;
        /// Classes of guided cells, as the label column names them. Empty: all.
        classes: Vec<String> = Vec::new();
        /// Cells of one pass of a rank.
        batch_size: usize = 3000, range = AtLeast(1.0);
        /// Sample by DDIM. False: ancestral sampling.
        use_ddim: bool = false, aliases = &["cell.use_ddim"];
        /// DDIM: share of fresh noise; 0 is deterministic.
        eta: f64 = 0.0, range = Within(0.0, 1.0);
        /// Clip predicted clean latents to -1..1. Null: for guided cells alone.
        clip_denoised: Option<bool> = None, aliases = &["cell.clip_denoised"];
        /// Factor on the classifier's gradient.
        classifier_scale: f64 = 2.0, range = AtLeast(0.0), aliases = &["cell.classifier_scale"];
        /// Ancestral sampling is guided in noise steps below this one.
        start_guide_steps: usize = 500, unit = "steps", aliases = &["cell.start_guide_steps"];
        /// Keep guided cells only if the classifier, without noise, assigns them their class.
        filter: bool = false, aliases = &["cell.filter"];
        /// Interpolate between two classes: cells of the first, noised up to `init_time`, are guided to a mixture of both.
        between: Vec<String> = Vec::new();
        /// Interpolation: weight of the first class, of 10; the second has the rest.
        weight: f64 = 5.0, range = Within(0.0, 10.0);
        /// Interpolation: cells to generate.
        num_between: usize = 0;
        /// Interpolation: noise step at which sampling starts.
        init_time: usize = 600, range = Above(0.0), unit = "steps", aliases = &["cell.init_time"];
        /// Weights of the diffusion network: of `train.ema_decay` where there is one, else the last.
        ema: bool = true;
    }
}
