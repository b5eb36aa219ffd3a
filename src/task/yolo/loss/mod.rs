//! The loss: overlap of boxes, distribution of their sides, classes.

pub mod assigner;
pub mod overlap;
pub mod targets;

use super::model::{BINS, Raw, boxes_from_sides, expected_sides};
use assigner::{Assigned, Predicted, assign};
use overlap::ciou;
use spec::task::yolo::YoloLoss;
use targets::Targets;
use tch::{Kind, Tensor};

/// Distance that targets of sides stay below: the last bin has a neighbour then.
const MOST_SIDE: f64 = (BINS - 1) as f64 - 0.01;

/// The terms before they are divided, each with its gain: f32 scalars.
pub struct Terms {
    pub boxes: Tensor,
    pub classes: Tensor,
    pub sides: Tensor,
    /// Sum of the target scores, without gradient. The terms of a batch are divided by it, or by 1 where it is less.
    pub divisor: Tensor,
}

impl Terms {
    pub fn sum(&self) -> Tensor {
        &self.boxes + &self.classes + &self.sides
    }

    /// The three terms divided by the divisor, f32 `[3]`, without gradient: what is reported.
    pub fn items(&self) -> Tensor {
        let all = [&self.boxes, &self.classes, &self.sides].map(|term| term.detach());
        Tensor::stack(&all, 0) / self.divisor.clamp_min(1.0)
    }
}

/// The terms for predictions in f32 and the boxes of their images.
pub fn terms(raw: &Raw, targets: &Targets, gains: &YoloLoss) -> Terms {
    let anchors = raw.anchors();
    let (logits, classes) = (raw.boxes.transpose(1, 2), raw.classes.transpose(1, 2).contiguous());
    let predicted = boxes_from_sides(&expected_sides(&logits), &anchors.centres);
    let pixels = predicted.detach() * &anchors.strides;
    let scores = classes.detach().sigmoid();
    let found = Predicted { scores: &scores, boxes: &pixels, cells: raw.cells };
    let assigned = assign(&found, targets, gains.topk as i64);
    let count = classes.size()[2];
    let of_classes = class_term(&classes, targets, &assigned, count) * gains.cls;
    let divisor = assigned.scores.sum(Kind::Float);
    let zero = || Tensor::zeros([], (Kind::Float, classes.device()));
    if assigned.anchors.size()[0] == 0 {
        return Terms { boxes: zero(), classes: of_classes, sides: zero(), divisor };
    }
    let total = anchors.centres.size()[0];
    let cell = assigned.anchors.remainder(total);
    let (centres, strides) = (anchors.centres.index_select(0, &cell), anchors.strides.index_select(0, &cell));
    let pick = |all: &Tensor, width: i64| all.reshape([-1, width]).index_select(0, &assigned.anchors);
    let truth = targets.boxes.reshape([-1, 4]).index_select(0, &assigned.boxes) / &strides;
    let overlap = ciou(&pick(&predicted, 4), &truth);
    let boxes = ((1f64 - overlap) * &assigned.scores).sum(Kind::Float) * gains.boxes;
    let distances = Tensor::cat(&[&centres - truth.narrow(1, 0, 2), truth.narrow(1, 2, 2) - &centres], 1);
    let distribution = sides_term(&pick(&logits, 4 * BINS), &distances.clamp(0.0, MOST_SIDE));
    let sides = (distribution * &assigned.scores).sum(Kind::Float) * gains.dfl;
    Terms { boxes, classes: of_classes, sides, divisor }
}

/// Binary cross-entropy of all anchors and classes, summed: `Σ softplus(x) - Σ x t`, whose targets `t` are 0 but for the
/// class of an assigned anchor.
fn class_term(logits: &Tensor, targets: &Targets, assigned: &Assigned, classes: i64) -> Tensor {
    let class = targets.classes.flatten(0, -1).index_select(0, &assigned.boxes);
    let hit = logits.flatten(0, -1).index_select(0, &(&assigned.anchors * classes + class));
    logits.softplus().sum(Kind::Float) - (hit * &assigned.scores).sum(Kind::Float)
}

/// Cross-entropy to the two bins about each distance, weighted linearly, and its mean over the four sides: logits
/// `[K, 4 · BINS]`, distances `[K, 4]`; `[K]`.
fn sides_term(logits: &Tensor, distances: &Tensor) -> Tensor {
    let likely = logits.view([-1, 4, BINS]).log_softmax(-1, Kind::Float);
    let below = distances.floor();
    let above = &below + 1.0;
    let weight = &above - distances;
    let at = |bin: &Tensor| -likely.gather(2, &bin.to_kind(Kind::Int64).unsqueeze(-1), false).squeeze_dim(-1);
    let sides = at(&below) * &weight + at(&above) * (1f64 - &weight);
    sides.mean_dim([-1i64].as_slice(), false, Kind::Float)
}

#[cfg(test)]
mod tests;
