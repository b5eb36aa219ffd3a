//! Checks of values together.

use super::EmgConfig;
use crate::config::Verdict;

/// More stages than any model of this kind has: a slip of the pen, and minutes of building.
const MOST_STAGES: usize = 64;

pub(super) fn check(emg: &EmgConfig, v: &mut Verdict) {
    let model = &emg.model;
    v.need(model.input_size == emg.emg_channels, || {
        format!("emg.model.input_size {} ≠ emg.emg_channels {}; they must be equal", model.input_size, emg.emg_channels)
    });
    v.need(model.output_size == emg.joint_angles_channels, || {
        let joints = emg.joint_angles_channels;
        format!("emg.model.output_size {} ≠ emg.joint_angles_channels {joints}; they must be equal", model.output_size)
    });
    stages(emg, v);
    v.need(model.decoder_mlp_hidden.len() <= MOST_STAGES, || {
        format!(
            "emg.model.decoder_mlp_hidden has {} sizes; it must have at most {MOST_STAGES}",
            model.decoder_mlp_hidden.len()
        )
    });
    v.need(model.output_scale.is_finite() && model.output_scale != 0.0, || {
        format!("emg.model.output_scale is {}; it must not be 0", model.output_scale)
    });
    rollout(emg, v);
}

fn stages(emg: &EmgConfig, v: &mut Verdict) {
    let stages = &emg.model.tds_stages;
    v.need(!stages.is_empty(), || "emg.model.tds_stages is empty; the encoder needs at least one stage".into());
    v.need(stages.len() <= MOST_STAGES, || {
        format!("emg.model.tds_stages has {} stages; it must have at most {MOST_STAGES}", stages.len())
    });
}

fn rollout(emg: &EmgConfig, v: &mut Verdict) {
    let (window, rate, freq) = (emg.window_size, emg.model.original_sampling_rate, emg.model.rollout_freq);
    v.need(freq <= rate, || {
        format!(
            "emg.model.rollout_freq {freq:e} > emg.model.original_sampling_rate {rate}; the decoder takes at most one \
             step per sample"
        )
    });
    let steps = window as f64 / rate * freq;
    v.need(window == 0 || rate <= 0.0 || steps.round_ties_even() >= 1.0, || {
        format!(
            "emg.window_size {window} / emg.model.original_sampling_rate {rate} × emg.model.rollout_freq {freq} = \
             {steps:.2} decoder steps; at least 1 is needed: make the window longer or the rollout denser"
        )
    });
}
