//! Checks of values together.

use super::CellConfig;
use crate::config::Verdict;

/// More layers than any model of this kind has.
const MOST_LAYERS: usize = 64;
/// Hidden layers of the classifier.
const CLASSIFIER_LAYERS: usize = 3;

pub(super) fn check(cell: &CellConfig, v: &mut Verdict) {
    matrix(&cell.matrix, v);
    for (key, hidden) in [("autoencoder", &cell.autoencoder.hidden), ("unet", &cell.unet.hidden)] {
        v.need((1..=MOST_LAYERS).contains(&hidden.len()), || {
            format!("cell.{key}.hidden has {} widths; it must have 1 to {MOST_LAYERS}", hidden.len())
        });
    }
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
    let respacing = cell.diffusion.timestep_respacing.trim();
    let numbers = respacing.strip_prefix("ddim").unwrap_or(respacing);
    let counts: Option<Vec<usize>> = numbers.split(',').map(|part| part.trim().parse().ok()).collect();
    let fits = counts.is_some_and(|counts| {
        let ddim = respacing.starts_with("ddim");
        counts.iter().all(|count| (1..=steps).contains(count))
            && counts.iter().sum::<usize>() <= steps
            && !(ddim && counts.len() != 1)
    });
    v.need(respacing.is_empty() || fits, || {
        format!(
            "cell.diffusion.timestep_respacing is {respacing:?}; it must be a number of steps, numbers separated by commas, \
             or ddim and a number, {steps} steps at most"
        )
    });
}
