//! Assignment of anchors to boxes. Feng and others, 2021 (task-aligned assignment).
//!
//! ```text
//! candidates (anchor in box) ─► metric = score^½ · CIoU⁶ ─► the best `topk` of each box ─► an anchor that several boxes
//! chose goes to the candidate box of highest CIoU ─► target score = metric · max CIoU / max metric of its box
//! ```
//! Only pairs of a box and an anchor in it are kept: their number is that of the anchors that boxes cover, while a table of
//! all boxes and anchors has hundreds of megabytes for crowded images.

use super::overlap::ciou;
use super::targets::Targets;
use crate::task::yolo::model::STRIDES;
use tch::{Kind, Tensor, no_grad};

/// Least distance of an anchor to the sides of its box.
const INSIDE: f64 = 1e-9;
/// Keeps the division finite.
const EPS: f64 = 1e-9;
const SCORE_POWER: f64 = 0.5;
const OVERLAP_POWER: f64 = 6.0;
/// Sides are widened to this before anchors are looked for. Source: TASKS 2.7.4.
const LEAST_SIDE: f64 = STRIDES[1] as f64;

/// Predictions that are assigned; no gradient.
pub struct Predicted<'a> {
    /// Probabilities of the classes, f32 `[B, A, C]`.
    pub scores: &'a Tensor,
    /// Boxes in pixels, f32 `[B, A, 4]`.
    pub boxes: &'a Tensor,
    /// Rows and columns of cells of each level.
    pub cells: [(i64, i64); 3],
}

/// Anchors with a box, `K` of them.
pub struct Assigned {
    /// Number of the anchor, `image · A + anchor`: i64 `[K]`.
    pub anchors: Tensor,
    /// Number of its box, `image · M + row`: i64 `[K]`.
    pub boxes: Tensor,
    /// Target score of the box's class, f32 `[K]`.
    pub scores: Tensor,
}

/// Finds the anchors of each box, at most `topk`.
pub fn assign(predicted: &Predicted, targets: &Targets, topk: i64) -> Assigned {
    no_grad(|| Pairs::find(predicted, targets).assigned(topk))
}

/// Pairs of a box and an anchor in it, in the order of image, box, anchor: all `[P]`.
struct Pairs {
    boxes: Tensor,
    anchors: Tensor,
    overlaps: Tensor,
    metrics: Tensor,
    /// Numbers of boxes and anchors of the batch.
    counts: (i64, i64),
}

impl Pairs {
    fn find(predicted: &Predicted, targets: &Targets) -> Self {
        let size = predicted.scores.size();
        let (images, anchors, classes) = (size[0], size[1], size[2]);
        let rows = targets.classes.size()[1];
        let found = inside(targets, predicted.cells).nonzero();
        let column = |at: i64| found.select(1, at);
        let (image, row, anchor) = (column(0), column(1), column(2));
        let (box_numbers, anchor_numbers) = (&image * rows + row, &image * anchors + anchor);
        let of = |all: &Tensor, width: i64, at: &Tensor| all.reshape([-1, width]).index_select(0, at);
        let class = targets.classes.flatten(0, -1).index_select(0, &box_numbers);
        let scores = predicted.scores.flatten(0, -1).index_select(0, &(&anchor_numbers * classes + class));
        let truth = of(&targets.boxes, 4, &box_numbers);
        let overlaps = ciou(&truth, &of(predicted.boxes, 4, &anchor_numbers)).clamp_min(0.0);
        let metrics = scores.pow_tensor_scalar(SCORE_POWER) * overlaps.pow_tensor_scalar(OVERLAP_POWER);
        let counts = (images * rows, images * anchors);
        Self { boxes: box_numbers, anchors: anchor_numbers, overlaps, metrics, counts }
    }

    fn assigned(&self, topk: i64) -> Assigned {
        let chosen = self.best_of_boxes(topk);
        let of_chosen = self.anchors.index_select(0, &chosen);
        let claims = of_chosen.bincount(None::<&Tensor>, self.counts.1);
        let alone = chosen.masked_select(&claims.index_select(0, &of_chosen).eq(1));
        let contested = claims.gt(1).index_select(0, &self.anchors).nonzero().squeeze_dim(1);
        let kept = Tensor::cat(&[alone, self.best_of_anchors(&contested)], 0);
        let (anchors, boxes) = (self.anchors.index_select(0, &kept), self.boxes.index_select(0, &kept));
        let (metrics, overlaps) = (self.metrics.index_select(0, &kept), self.overlaps.index_select(0, &kept));
        let most = |values: &Tensor| {
            let first = first_of_groups(values, &boxes);
            let none = Tensor::zeros([self.counts.0], (Kind::Float, values.device()));
            let all = none.index_copy(0, &boxes.index_select(0, &first), &values.index_select(0, &first));
            all.index_select(0, &boxes)
        };
        let scores = &metrics * most(&overlaps) / (most(&metrics) + EPS);
        Assigned { anchors, boxes, scores }
    }

    /// The pairs of highest metric of each box, at most `topk`, none of metric 0.
    fn best_of_boxes(&self, topk: i64) -> Tensor {
        let order = by_group(&self.metrics, &self.boxes);
        let groups = self.boxes.index_select(0, &order);
        let counts = self.boxes.bincount(None::<&Tensor>, self.counts.0);
        let starts = counts.cumsum(0, Kind::Int64) - counts;
        let place = Tensor::arange(order.size()[0], (Kind::Int64, order.device())) - starts.index_select(0, &groups);
        let good = self.metrics.index_select(0, &order).gt(0.0);
        order.masked_select(&place.lt(topk).logical_and(&good))
    }

    /// The pair with the highest overlap of each anchor among these; the first box of several.
    fn best_of_anchors(&self, pairs: &Tensor) -> Tensor {
        let (overlaps, anchors) = (self.overlaps.index_select(0, pairs), self.anchors.index_select(0, pairs));
        pairs.index_select(0, &first_of_groups(&overlaps, &anchors))
    }
}

/// Place of the largest value of each group; the first of equal ones.
fn first_of_groups(values: &Tensor, groups: &Tensor) -> Tensor {
    let order = by_group(values, groups);
    let sorted = groups.index_select(0, &order);
    let count = sorted.size()[0];
    if count < 2 {
        return order;
    }
    let differs = sorted.narrow(0, 1, count - 1).ne_tensor(&sorted.narrow(0, 0, count - 1));
    let first = Tensor::cat(&[differs.new_ones([1], (Kind::Bool, sorted.device())), differs], 0);
    order.masked_select(&first)
}

/// Places in the order of groups; within a group by falling value, equal ones as they were.
fn by_group(values: &Tensor, groups: &Tensor) -> Tensor {
    let falling = values.argsort_stable(true, 0, true);
    let grouped = groups.index_select(0, &falling).argsort_stable(true, 0, false);
    falling.index_select(0, &grouped)
}

/// True where an anchor lies in a box: bool `[B, M, A]`. Rows and columns are compared apart, so that nothing larger is made.
fn inside(targets: &Targets, cells: [(i64, i64); 3]) -> Tensor {
    let boxes = &targets.boxes;
    let (low, high) = (boxes.narrow(2, 0, 2), boxes.narrow(2, 2, 2));
    let (centre, size) = ((&low + &high) / 2.0, &high - &low);
    let narrow = size.lt(LEAST_SIDE).logical_and(&targets.real.unsqueeze(-1));
    let half = size.masked_fill(&narrow, LEAST_SIDE) / 2.0;
    let (low, high) = (&centre - &half, &centre + &half);
    let (images, rows) = (boxes.size()[0], boxes.size()[1]);
    let level = |((down, across), stride): ((i64, i64), i64)| {
        let between = |count: i64, side: i64| {
            let centres = (Tensor::arange(count, (Kind::Float, boxes.device())) + 0.5) * stride as f64;
            let from_low = (&centres - low.select(2, side).unsqueeze(-1)).gt(INSIDE);
            from_low.logical_and(&(high.select(2, side).unsqueeze(-1) - &centres).gt(INSIDE))
        };
        let (x, y) = (between(across, 0), between(down, 1));
        x.unsqueeze(2).logical_and(&y.unsqueeze(3)).reshape([images, rows, down * across])
    };
    let levels: Vec<Tensor> = cells.into_iter().zip(STRIDES).map(level).collect();
    Tensor::cat(&levels, 2).logical_and(&targets.real.unsqueeze(-1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::model::Anchors;
    use tch::Device;

    const CELLS: [(i64, i64); 3] = [(4, 4), (2, 2), (1, 1)];

    fn targets(boxes: &[[f32; 4]], real: &[bool]) -> Targets {
        let flat: Vec<f32> = boxes.iter().flatten().copied().collect();
        Targets {
            boxes: Tensor::from_slice(&flat).view([1, boxes.len() as i64, 4]),
            classes: Tensor::zeros([1, boxes.len() as i64], (Kind::Int64, Device::Cpu)),
            real: Tensor::from_slice(real).unsqueeze(0),
        }
    }

    /// Predictions that have the same score everywhere and the box `own` at every anchor.
    fn predicted(own: [f32; 4]) -> (Tensor, Tensor) {
        let scores = Tensor::full([1, 21, 1], 0.25, (Kind::Float, Device::Cpu));
        (scores, Tensor::from_slice(&own).view([1, 1, 4]).expand([1, 21, 4], false).contiguous())
    }

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        let mut all: Vec<i64> = Vec::try_from(tensor).unwrap();
        all.sort_unstable();
        all
    }

    #[test]
    fn anchors_lie_in_boxes_and_small_boxes_are_widened() {
        // 4 px about (12, 12): widened to 4..20 it holds the anchors at 12, 8 and 16 (and none on the border at 4 or 20).
        let found = inside(&targets(&[[10.0, 10.0, 14.0, 14.0], [0.0; 4]], &[true, false]), CELLS);
        assert_eq!(numbers(&found.get(0).get(0).nonzero().squeeze_dim(1)), [5, 16, 20]);
        assert_eq!(found.get(0).get(1).sum(Kind::Int64).int64_value(&[]), 0);
        let wide = inside(&targets(&[[0.0, 0.0, 32.0, 8.5]], &[true]), CELLS);
        // Height 8.5 becomes 16 about 4.25: rows of centres up to 12.25.
        assert_eq!(numbers(&wide.get(0).get(0).nonzero().squeeze_dim(1)), [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]);
    }

    #[test]
    fn the_best_anchors_of_a_box_get_a_score_of_its_best_overlap() {
        let (scores, boxes) = predicted([0.0, 0.0, 32.0, 32.0]);
        // A better one at anchor 6.
        boxes.get(0).get(6).copy_(&Tensor::from_slice(&[0f32, 0.0, 32.0, 30.0]));
        let all = assign(
            &Predicted { scores: &scores, boxes: &boxes, cells: CELLS },
            &targets(&[[0.0, 0.0, 32.0, 30.0]], &[true]),
            3,
        );
        assert_eq!(all.anchors.size(), [3]);
        assert!(numbers(&all.anchors).contains(&6));
        let best = all.scores.max().double_value(&[]);
        assert!((best - 1.0).abs() < 1e-5, "{best}");
    }

    #[test]
    fn a_contested_anchor_goes_to_the_box_of_highest_overlap_even_where_that_had_not_chosen_it() {
        let (scores, boxes) = predicted([0.0, 0.0, 32.0, 32.0]);
        let pair = [[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 32.0, 28.0]];
        let all =
            assign(&Predicted { scores: &scores, boxes: &boxes, cells: CELLS }, &targets(&pair, &[true, true]), 30);
        // Anchors below row 28 of the second box are in the first alone; all the others overlap more with it as well.
        assert_eq!(all.anchors.size(), [21]);
        assert_eq!(all.boxes.sum(Kind::Int64).int64_value(&[]), 0);
        let mut once = numbers(&all.anchors);
        once.dedup();
        assert_eq!(once.len(), 21);
    }

    #[test]
    fn nothing_is_assigned_without_boxes_or_overlap() {
        let (scores, boxes) = predicted([100.0, 100.0, 132.0, 132.0]);
        let predicted = Predicted { scores: &scores, boxes: &boxes, cells: CELLS };
        for targets in [targets(&[], &[]), targets(&[[0.0; 4]], &[false]), targets(&[[0.0, 0.0, 32.0, 32.0]], &[true])]
        {
            let all = assign(&predicted, &targets, 10);
            assert_eq!((all.anchors.size(), all.scores.size()), (vec![0], vec![0]));
        }
        assert_eq!(Anchors::new(CELLS, Device::Cpu).centres.size()[0], 21);
    }
}
