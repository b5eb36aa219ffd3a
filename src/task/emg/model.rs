//! The TDS-LSTM: encoder, rollout, loss.
//!
//! EMG `[B, T, 16]` → encoder `[B, T', F]` → linear interpolation to the rollout's `round(T / 2000 × 50)` steps →
//! decoder, one pose per step from an initial pose of zeros → linear interpolation to `[B, T, 20]` radians.
//! Both interpolations keep the ends (`align_corners`). Parameters are named `encoder.stages.0.conv.weight`,
//! `encoder.stages.0.blocks.1.tds.conv.weight`, `decoder.lstm.weight_ih_l0`, `decoder.head.weight`, ...

use super::{decoder::Decoder, loss::Loss, resample, tds::Encoder};
use crate::task::{Batch, Model, Output};
use spec::task::emg::EmgModel;
use tch::{Device, Tensor, nn};

/// Builds the model under `vs` for windows of `window_size` samples; initial values come from torch's generator.
pub fn build(config: &EmgModel, loss: Loss, window_size: usize, vs: &nn::Path) -> Box<dyn Model> {
    Box::new(EmgNet::new(config, loss, window_size, vs))
}

/// Encoder, decoder and loss.
pub struct EmgNet {
    encoder: Encoder,
    decoder: Decoder,
    loss: Loss,
    rate: f64,
    freq: f64,
    timing: Timing,
}

/// How windows of one length are resampled.
struct Timing {
    window: i64,
    /// Encoder frames that the rollout reads; `None` means all.
    frames: Option<Tensor>,
    /// `[S, N]`: those frames to rollout steps.
    down: Tensor,
    /// `[T, S]`: rollout steps to samples.
    up: Tensor,
}

impl Timing {
    fn new(encoder: &Encoder, window: i64, rate: f64, freq: f64, device: Device) -> Self {
        let steps = resample::rollout_steps(window, rate, freq);
        let (frames, down) = resample::sparse(encoder.frames(window).max(1), steps, device);
        Self { window, frames, down, up: resample::matrix(steps, window, device) }
    }
}

impl EmgNet {
    pub fn new(config: &EmgModel, loss: Loss, window_size: usize, vs: &nn::Path) -> Self {
        let encoder = Encoder::new(&(vs / "encoder"), config.input_size, &config.tds_stages, config.dropout);
        let decoder = Decoder::new(&(vs / "decoder"), encoder.features(), config);
        let (rate, freq) = (config.original_sampling_rate, config.rollout_freq);
        let timing = Timing::new(&encoder, window_size as i64, rate, freq, vs.device());
        Self { encoder, decoder, loss, rate, freq, timing }
    }

    /// EMG `[B, T, 16]` to poses at the rollout's steps `[B, S, 20]`.
    fn rollout(&self, emg: &Tensor, timing: &Timing, train: bool) -> Tensor {
        let features = self.encoder.forward(emg, timing.frames.as_ref(), train);
        self.decoder.forward(&timing.down.matmul(&features).transpose(0, 1).contiguous())
    }

    /// Poses at the rollout's steps, `[B, S, 20]` radians, of EMG `[B, T, 16]`.
    pub fn rollout_of(&self, emg: &Tensor) -> Tensor {
        self.with_timing(emg, |timing| self.rollout(emg, timing, false))
    }

    /// Runs `act` with the timing of this window length: the one that was planned for, or one made on the spot.
    fn with_timing<T>(&self, emg: &Tensor, act: impl FnOnce(&Timing) -> T) -> T {
        let window = emg.size()[1];
        if window == self.timing.window {
            return act(&self.timing);
        }
        act(&Timing::new(&self.encoder, window, self.rate, self.freq, emg.device()))
    }

    /// EMG `[B, T, 16]` to angles `[B, T, 20]` in radians, differentiable.
    pub fn predict(&self, emg: &Tensor, train: bool) -> Tensor {
        self.with_timing(emg, |timing| timing.up.matmul(&self.rollout(emg, timing, train)))
    }
}

impl Model for EmgNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let (emg, target) = (&batch.fields[0], &batch.fields[1]);
        self.with_timing(emg, |timing| {
            let poses = self.rollout(emg, timing, train);
            let (loss, prediction) = self.loss.of_poses(&poses, &timing.up, target);
            Output::new(loss, prediction)
        })
    }

    fn predict(&self, batch: &Batch) -> Tensor {
        Self::predict(self, &batch.fields[0], false)
    }
}
