//! Keys of the section `cell`. Other names are the guide's flags.

use crate::config::Range::{AtLeast, Filled, Share, Within};
use crate::config::{choices, keys};
use std::path::PathBuf;

/// Widest layer, and longest chain of diffusion: beyond lies a slip of the pen.
pub(super) const MOST: f64 = 65_536.0;

keys! {
    /// Task `cell`: counts of genes in single cells (`.h5ad`), an autoencoder, and diffusion over its latents.
    #[serde(default, deny_unknown_fields)]
    pub struct CellConfig in "cell." {
        /// Matrix of counts: `X`, `layers/NAME` or `raw/X`.
        matrix: String = "X".into(), range = Filled;
        /// Column of `obs` with each cell's label. Null: cells have no labels.
        label: Option<String> = Some("celltype".into()), range = Filled;
        /// Genes that are expressed in fewer cells are left out, but for those of a `reference`.
        min_cells: usize = 3, range = Within(0.0, 1000.0), unit = "cells";
        /// Cells that express fewer of the genes in use are left out.
        min_genes: usize = 10, unit = "genes";
        /// Sum that the values of a cell are scaled to. 0: they are not scaled.
        target_sum: f64 = 1e4, range = AtLeast(0.0);
        /// Scaled values become `ln(1 + value)`.
        log1p: bool = true;
        /// File whose genes, in its order, every cell is brought to: `.h5ad`, or text with one name a line. Genes that a
        /// file lacks are 0. Null: the genes that all files have.
        reference: Option<PathBuf> = None;
        /// Decoded copy of a matrix beside the index, from which any cell is read at the cost of its own bytes: 4 bytes for a
        /// count that is not 0, written once. Only where the page cache holds less than all cells, and there is room.
        copy: CopyPolicy = CopyPolicy::Auto;
        /// Element type of the latents that the stage `latents` keeps.
        latents: LatentType = LatentType::Bf16;
    }
    sections {
        autoencoder: CellAutoencoder;
        unet: CellUnet;
        classifier: CellClassifier;
        diffusion: CellDiffusion;
        sample: CellSample;
    }
    inert {
        "class_cond" => "the guide's network takes no class; cell.sample.class guides by the classifier";
        "num_genes" => "the number of genes follows from the data";
        "num_gene" => "the number of genes follows from the data";
        "num_class" => "the number of classes follows from the data";
        "max_minutes" => "train.max_steps and train.num_epochs end a stage";
    }
}

choices! {
    /// Use of decoded copies.
    pub enum CopyPolicy {
        /// Of compressed matrices whose cells are shuffled over the whole data set.
        Auto = "auto",
        /// Of all sparse matrices and in every order: a plain file has 8 bytes for a value, mostly, and may be far away.
        Always = "always",
        /// Chunks are decoded each time.
        Off = "off",
    }
}

choices! {
    /// Element type of kept latents.
    pub enum LatentType {
        /// Half the bytes.
        Bf16 = "bf16",
        F32 = "f32",
    }
}

keys! {
    /// Autoencoder: genes to a latent of length 1, and back.
    #[serde(default, deny_unknown_fields)]
    pub struct CellAutoencoder in "cell.autoencoder." {
        /// Widths of the encoder's hidden layers; the decoder mirrors them.
        hidden: Vec<usize> = vec![1024; 3], range = Within(1.0, MOST);
        /// Numbers of a latent.
        latent: usize = 128, range = Within(1.0, MOST), aliases = &["latent_dim", "input_dim"];
        /// Dropout before each hidden layer.
        dropout: f64 = 0.0, range = Share;
        /// Function of decoded genes where cells are generated. In training there is none.
        decoder_activation: DecoderActivation = DecoderActivation::Relu, aliases = &["decoder_activation"];
    }
}

choices! {
    /// Function of decoded genes.
    pub enum DecoderActivation {
        /// Negative values become 0.
        Relu = "relu",
        /// Values as the decoder gives them.
        None = "none",
    }
}

keys! {
    /// Denoising network over latents.
    #[serde(default, deny_unknown_fields)]
    pub struct CellUnet in "cell.unet." {
        /// Widths of the layers down; those up mirror them.
        hidden: Vec<usize> = vec![512, 512, 256, 128], range = Within(1.0, MOST), aliases = &["hidden_dim"];
        /// Width of the embedding of time. Null: that of the first layer.
        time: Option<usize> = None, range = Within(1.0, MOST);
        /// Dropout before the last layer. The guide's code has it and does not apply it.
        dropout: f64 = 0.0, range = Share, aliases = &["dropout"];
    }
}

keys! {
    /// Classifier of noised latents, which guides generation.
    #[serde(default, deny_unknown_fields)]
    pub struct CellClassifier in "cell.classifier." {
        /// Widths of the three hidden layers.
        hidden: Vec<usize> = vec![512, 512, 256], range = Within(1.0, MOST);
        /// Width of the embedding of time. Null: that of the first layer.
        time: Option<usize> = None, range = Within(1.0, MOST);
        /// Dropout after each hidden layer.
        dropout: f64 = 0.1, range = Share;
        /// Train on noised latents. False: on clean ones.
        noised: bool = true, aliases = &["noised"];
        /// Noise is drawn for times below this one.
        start_guide_time: usize = 500, range = Within(1.0, MOST), aliases = &["start_guide_time"];
    }
}

keys! {
    /// Diffusion: schedule, target and loss.
    #[serde(default, deny_unknown_fields)]
    pub struct CellDiffusion in "cell.diffusion." {
        /// Steps of the chain.
        steps: usize = 1000, range = Within(2.0, MOST), aliases = &["diffusion_steps"];
        /// Course of the noise.
        noise_schedule: NoiseSchedule = NoiseSchedule::Linear, aliases = &["noise_schedule"];
        /// Steps in use: a number, numbers per section (`10,15,20`), or `ddim50`. Empty: all.
        timestep_respacing: String = String::new(), aliases = &["timestep_respacing"];
        /// Predict the variance too.
        learn_sigma: bool = false, aliases = &["learn_sigma"];
        /// Fixed variance of a step: the posterior's, which is smaller. False: that of the noise added.
        sigma_small: bool = false, aliases = &["sigma_small"];
        /// Train by the variational bound. False: by the mean squared error.
        use_kl: bool = false, aliases = &["use_kl"];
        /// Predict the latent instead of the noise.
        predict_xstart: bool = false, aliases = &["predict_xstart"];
        /// The network sees times scaled to 0 to 1000.
        rescale_timesteps: bool = false, aliases = &["rescale_timesteps"];
        /// Scale the bound by which variances are learned.
        rescale_learned_sigmas: bool = false, aliases = &["rescale_learned_sigmas"];
        /// Draw of training times.
        schedule_sampler: ScheduleSampler = ScheduleSampler::Uniform, aliases = &["schedule_sampler"];
    }
}

choices! {
    /// Course of the noise.
    pub enum NoiseSchedule {
        Linear = "linear",
        Cosine = "cosine",
    }
}

choices! {
    /// Draw of training times.
    pub enum ScheduleSampler {
        Uniform = "uniform",
        /// Times with large losses more often, by the root of the mean of the last ten squared.
        LossSecondMoment = "loss-second-moment",
    }
}

keys! {
    /// Generated cells.
    #[serde(default, deny_unknown_fields)]
    pub struct CellSample in "cell.sample." {
        /// Cells to generate.
        num_samples: usize = 12_000, range = AtLeast(1.0), unit = "cells", aliases = &["num_samples"];
        /// Cells to generate besides of each label in the data, guided by it. 0: none.
        per_class: usize = 0, unit = "cells";
        /// Cells generated at a time on a rank. Null: `train.batch_size` of the stage.
        batch_size: Option<usize> = None, range = AtLeast(1.0), unit = "cells";
        /// DDIM instead of ancestral sampling.
        use_ddim: bool = false, aliases = &["use_ddim"];
        /// Share of ancestral noise in DDIM.
        ddim_eta: f64 = 0.0, range = Within(0.0, 1.0);
        /// Cut predicted latents to -1 to 1. Null: where a class guides.
        clip_denoised: Option<bool> = None, aliases = &["clip_denoised"];
        /// Class that guides: a label of the data. Null: unguided; `all`: each label in turn.
        class: Option<String> = None, range = Filled;
        /// Second class, for cells between two.
        second_class: Option<String> = None, range = Filled;
        /// Strength of the guidance.
        classifier_scale: f64 = 2.0, range = AtLeast(0.0), aliases = &["classifier_scale"];
        /// Weights of the two classes; each guides with its weight × `classifier_scale` / 10.
        class_weights: [f64; 2] = [5.0, 5.0], range = AtLeast(0.0);
        /// Ancestral sampling is guided at times below this one.
        start_guide_steps: usize = 500, range = Within(0.0, MOST), aliases = &["start_guide_steps"];
        /// Time from which cells of `init_cells` are denoised.
        init_time: usize = 600, range = Within(0.0, MOST), aliases = &["init_time"];
        /// `.h5ad` of cells to begin with instead of noise.
        init_cells: Option<PathBuf> = None, aliases = &["init_cell_path"];
        /// Keep the guided cells alone that the classifier takes for the class.
        filter: bool = false, aliases = &["filter"];
    }
}
