//! Checks of values together.

use super::respace::kept_steps;
use super::{CellConfig, NoiseSchedule};
use crate::config::Verdict;

/// More layers than any model of this kind has.
const MOST_LAYERS: usize = 64;
/// Fewest steps of the linear schedule: with 20 the last one leaves nothing of the signal.
const FEWEST_LINEAR: usize = 21;
/// Hidden layers of the classifier.
const CLASSIFIER_LAYERS: usize = 3;

pub(super) fn check(cell: &CellConfig, v: &mut Verdict) {
    matrix(&cell.matrix, v);
    for (key, hidden) in [("autoencoder", &cell.autoencoder.hidden), ("unet", &cell.unet.hidden)] {
        v.need((1..=MOST_LAYERS).contains(&hidden.len()), || {
            format!("cell.{key}.hidden has {} widths; it must have 1 to {MOST_LAYERS}", hidden.len())
        });
    }
    v.need(cell.unet.hidden.len() >= 2, || {
        "cell.unet.hidden has one width; it must have at least 2: the second is half the head's".into()
    });
    let widths = cell.classifier.hidden.len();
    v.need(widths == CLASSIFIER_LAYERS, || {
        format!("cell.classifier.hidden has {widths} widths; it must have {CLASSIFIER_LAYERS}")
    });
    times(cell, v);
    let sample = &cell.sample;
    v.need(sample.second_class.is_none() || sample.class.is_some(), || {
        "cell.sample.second_class is set without cell.sample.class; set both, or neither".into()
    });
    v.warn(cell.log1p || cell.target_sum == 0.0, || {
        "cell.log1p is false with a cell.target_sum: the published models take ln(1 + value)".into()
    });
}

fn matrix(matrix: &str, v: &mut Verdict) {
    let layer = matrix.strip_prefix("layers/").is_some_and(|name| !name.is_empty() && !name.contains('/'));
    v.need(matrix == "X" || matrix == "raw/X" || layer, || {
        format!("cell.matrix is {matrix}; it must be X, raw/X or layers/NAME")
    });
}

/// Times lie on the chain.
fn times(cell: &CellConfig, v: &mut Verdict) {
    let steps = cell.diffusion.steps;
    v.warn(cell.classifier.start_guide_time <= steps, || {
        let time = cell.classifier.start_guide_time;
        format!("cell.classifier.start_guide_time {time} > cell.diffusion.steps {steps}: all times are drawn")
    });
    v.need(cell.sample.init_cells.is_none() || cell.sample.init_time < steps, || {
        let time = cell.sample.init_time;
        format!("cell.sample.init_time is {time}; it must be below cell.diffusion.steps {steps}")
    });
    respacing(cell, v);
}

/// The process has at least two steps, and noise that neither starts nor ends at once.
fn respacing(cell: &CellConfig, v: &mut Verdict) {
    let diffusion = &cell.diffusion;
    if let Err(problem) = kept_steps(diffusion.steps, &diffusion.timestep_respacing) {
        v.need(false, || format!("cell.diffusion.timestep_respacing: {problem}"));
    }
    let linear = diffusion.noise_schedule == NoiseSchedule::Linear;
    v.need(!linear || diffusion.steps >= FEWEST_LINEAR, || {
        format!(
            "cell.diffusion.steps is {}; linear noise needs at least {FEWEST_LINEAR} steps: its last one adds 20 / steps. Use \
             noise_schedule: cosine, or keep the steps and set timestep_respacing",
            diffusion.steps
        )
    });
    v.warn(!diffusion.rescale_learned_sigmas || diffusion.learn_sigma, || {
        "cell.diffusion.rescale_learned_sigmas is set without learn_sigma: it has no effect".into()
    });
    v.warn(!(diffusion.sigma_small && diffusion.learn_sigma), || {
        "cell.diffusion.sigma_small is set with learn_sigma: the variance is learned, sigma_small has no effect".into()
    });
}
