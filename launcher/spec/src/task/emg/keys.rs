//! Keys of the section `emg`.

use crate::config::Range::{Above, AtLeast, Filled, Share, Within};
use crate::config::{Kind, Typed, choices, keys, record};

keys! {
    /// Task `emg`: windows of EMG and joint angles in HDF5 sessions, and the loss.
    #[serde(default, deny_unknown_fields)]
    pub struct EmgConfig in "emg." {
        /// HDF5 group that holds the table.
        hdf5_group: String = "emg2pose".into(), range = Filled, aliases = &["data.hdf5_group"];
        /// Table in the group.
        table_name: String = "timeseries".into(), range = Filled, aliases = &["data.table_name"];
        /// Channels expected in the `emg` member.
        emg_channels: usize = 16, range = AtLeast(1.0), aliases = &["data.emg_channels"];
        /// Angles expected in the `joint_angles` member.
        joint_angles_channels: usize = 20, range = AtLeast(1.0), aliases = &["data.joint_angles_channels"];
        /// Rows of one window.
        window_size: usize = 500, range = AtLeast(1.0), unit = "rows", aliases = &["data.window_size"];
        /// Normalise EMG to zero mean and unit deviation, with statistics of the training files.
        normalize: bool = false, aliases = &["data.normalize"];
        /// Rows per file that the statistics are taken from.
        max_samples_for_normalize: usize = 10_000, range = AtLeast(1.0), unit = "rows",
            aliases = &["data.max_samples_for_normalize"];
        /// Full-wave rectification of the EMG (its absolute value), before normalisation.
        rectify: bool = false, aliases = &["data.rectify"];
        /// Control experiment: pair every window's angles with another window's EMG.
        shuffle_emg: bool = false, aliases = &["data.shuffle_emg"];
        /// Leave out windows that touch a block where inverse kinematics failed (all angles zero).
        skip_ik_failures: bool = true, aliases = &["data.skip_ik_failures"];
        /// Rows between the windows of `launch predict`. Where windows overlap, a row's angles are their mean, weighted by the
        /// distance to each window's nearer end. Null: half a window.
        predict_stride: Option<usize> = None, range = AtLeast(1.0), unit = "rows";
        /// Weight of the MAE term in the loss `mse+mae`.
        mae_weight: f64 = 0.5, range = AtLeast(0.0), aliases = &["train.mae_weight"];
    }
    sections { model: EmgModel; }
}

keys! {
    /// TDS-LSTM: convolutional stages over EMG, then a recurrent decoder that feeds its pose back.
    #[serde(default, deny_unknown_fields)]
    pub struct EmgModel in "emg.model.", earlier "model." {
        /// Channels of the input; equal to `emg.emg_channels`.
        input_size: usize = 16;
        /// Angles of the output; equal to `emg.joint_angles_channels`.
        output_size: usize = 20;
        /// Dropout.
        dropout: f64 = 0.1, range = Share;
        /// Stages of the encoder, each with all of its six keys.
        tds_stages: Vec<TdsStage> = vec![TdsStage::default(), TdsStage { feature_width: 8, kernel_width: 11, ..TdsStage::default() }];
        /// Decoder.
        decoder_type: DecoderType = DecoderType::Lstm;
        /// Units of a layer of the LSTM decoder.
        decoder_hidden_size: usize = 128, range = AtLeast(1.0);
        /// Layers of the LSTM decoder.
        decoder_num_layers: usize = 2, range = Within(1.0, 64.0);
        /// Hidden sizes of the MLP decoder.
        decoder_mlp_hidden: Vec<usize> = vec![256, 128], range = AtLeast(1.0);
        /// Feed the previous pose back into the decoder.
        decoder_state_condition: bool = true;
        /// The decoder's output is a velocity that is added to the previous pose. False: it is the pose.
        predict_velocity: bool = false;
        /// Factor on the decoder's output; not 0.
        output_scale: f64 = 1.0;
        /// Decoder steps per second.
        rollout_freq: f64 = 50.0, range = Above(0.0), unit = "Hz";
        /// Samples per second of the recording.
        original_sampling_rate: f64 = 2000.0, range = Above(0.0), unit = "Hz";
    }
}

keys! {
    /// A stage of the encoder.
    #[serde(deny_unknown_fields)]
    pub struct TdsStage in "" {
        /// Kernel of the convolution at the entry.
        in_conv_kernel: usize = 5, range = AtLeast(1.0);
        /// Its stride.
        in_conv_stride: usize = 2, range = AtLeast(1.0);
        /// Blocks.
        num_blocks: usize = 2, range = Within(0.0, 64.0);
        /// Channels.
        channels: usize = 8, range = AtLeast(1.0);
        /// Features per channel.
        feature_width: usize = 4, range = AtLeast(1.0);
        /// Kernel of the convolutions in blocks.
        kernel_width: usize = 21, range = AtLeast(1.0);
    }
}

impl Typed for TdsStage {
    const KIND: Kind = record::<TdsStage>();
}

choices! {
    /// Decoder of the TDS-LSTM.
    pub enum DecoderType {
        Lstm = "lstm",
        /// Fully connected layers of `decoder_mlp_hidden`.
        Mlp = "mlp",
    }
}

choices! {
    /// `train.loss_type` of this task.
    pub enum EmgLoss {
        Mse = "mse",
        Mae = "mae",
        /// MSE and `mae_weight` times MAE.
        MseMae = "mse+mae",
    }
}
