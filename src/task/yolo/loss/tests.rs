use super::*;
use crate::task::yolo::data::batch::Boxes;
use tch::{Device, no_grad};

const CELLS: [(i64, i64); 3] = [(8, 8), (4, 4), (2, 2)];
const ANCHORS: i64 = 84;

fn raw(images: i64, classes: i64) -> Raw {
    tch::manual_seed(3);
    let draw = |channels: i64| Tensor::randn([images, channels, ANCHORS], (Kind::Float, Device::Cpu));
    Raw { boxes: draw(4 * BINS).set_requires_grad(true), classes: draw(classes).set_requires_grad(true), cells: CELLS }
}

fn targets(rows: &[[f32; 5]], offsets: &[i64]) -> Targets {
    let flat: Vec<f32> = rows.iter().flatten().copied().collect();
    let values = Tensor::from_slice(&flat).view([rows.len() as i64, 5]);
    let boxes = Boxes { values: &values, offsets: &Tensor::from_slice(offsets) };
    Targets::of(&boxes, (0, offsets.len() - 1), (64, 64), 3).unwrap()
}

fn value(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

#[test]
fn sides_are_weighted_to_the_bins_about_them() {
    let logits = Tensor::zeros([1, 4 * BINS], (Kind::Float, Device::Cpu));
    let distances = Tensor::from_slice(&[2.25f32, 0.0, 14.99, 7.5]).view([1, 4]);
    let uniform = f64::from(16f32).ln();
    assert!((value(&sides_term(&logits, &distances).squeeze()) - uniform).abs() < 1e-5);
    // All logits at bin 2: the left side has three quarters of its weight there.
    let _ = logits.get(0).get(2).fill_(50.0);
    let loss = value(&sides_term(&logits, &distances).squeeze());
    assert!((loss - (0.25 * 50.0 + 3.0 * uniform) / 4.0).abs() < 1e-3, "{loss}");
}

#[test]
fn without_boxes_only_classes_count() {
    let raw = raw(2, 3);
    let terms = terms(&raw, &targets(&[], &[0, 0, 0]), &YoloLoss::default());
    assert_eq!((value(&terms.boxes), value(&terms.sides), value(&terms.divisor)), (0.0, 0.0, 0.0));
    let zeros = raw.classes.zeros_like();
    let expected = raw.classes.binary_cross_entropy_with_logits::<Tensor>(&zeros, None, None, tch::Reduction::Sum);
    assert!((value(&terms.items().get(1)) - 0.5 * value(&expected)).abs() < 1e-2);
}

/// Two images at once are the sums of either.
#[test]
fn terms_are_sums_over_images() {
    let raw = raw(2, 3);
    let rows = [[0.0, 0.5, 0.5, 0.6, 0.4], [2.0, 0.3, 0.3, 0.1, 0.1], [1.0, 0.6, 0.5, 0.5, 0.7]];
    let both = terms(&raw, &targets(&rows, &[0, 2, 3]), &YoloLoss::default());
    let one = |image: i64, rows: &[[f32; 5]]| {
        let part = Raw { boxes: raw.boxes.narrow(0, image, 1), classes: raw.classes.narrow(0, image, 1), cells: CELLS };
        terms(&part, &targets(rows, &[0, rows.len() as i64]), &YoloLoss::default())
    };
    let (first, second) = (one(0, &rows[..2]), one(1, &rows[2..]));
    for (sum, a, b) in [
        (&both.boxes, &first.boxes, &second.boxes),
        (&both.classes, &first.classes, &second.classes),
        (&both.sides, &first.sides, &second.sides),
        (&both.divisor, &first.divisor, &second.divisor),
    ] {
        assert!((value(sum) - value(a) - value(b)).abs() < 1e-4 * value(sum).abs(), "{sum} {a} {b}");
    }
    assert!(value(&both.divisor) > 0.0 && value(&both.boxes) > 0.0 && value(&both.sides) > 0.0);
}

#[test]
fn gradients_reach_all_logits_of_classes_and_the_assigned_sides() {
    let raw = raw(1, 3);
    let rows = [[0.0, 0.5, 0.5, 0.6, 0.4]];
    let loss = terms(&raw, &targets(&rows, &[0, 1]), &YoloLoss::default()).sum();
    let gradients = Tensor::run_backward(&[loss], &[&raw.boxes, &raw.classes], false, false);
    let touched = |gradient: &Tensor| gradient.ne(0.0).any_dim(1, false).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(touched(&gradients[1]), ANCHORS);
    let sides = touched(&gradients[0]);
    assert!(sides > 0 && sides <= 10, "{sides}");
    assert!(no_grad(|| gradients.iter().all(|gradient| bool::try_from(gradient.isfinite().all()).unwrap())));
}
