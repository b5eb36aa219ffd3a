//! Forward passes, loss, gradients, assigner, suppression.

use super::golden::{BATCH, CLASSES, Golden, SIDE, detector, far_from, images, numbers, ragged, relative, with_boxes};
use crate::task::yolo::detect::{Choice, Detection, Suppression, candidates, suppress};
use crate::task::yolo::loss::assigner::{Predicted, assign};
use crate::task::yolo::loss::targets::Targets;
use crate::task::yolo::loss::terms;
use crate::train::ema::Ema;
use spec::task::yolo::YoloLoss;
use tch::{Device, Kind, Tensor, no_grad};

const FORWARD: f64 = 2e-5;
const LOSS: f64 = 1e-5;
const GRADIENT: f64 = 3e-5;

#[test]
fn forward_passes_are_the_packages() {
    let golden = Golden::read();
    let (vs, detector) = detector();
    let x = images(0, 64, 96).to_kind(Kind::Float) / 255.0;
    for (train, case) in [(false, "forward"), (true, "forward_train")] {
        let raw = no_grad(|| detector.forward(&x, train));
        for (found, name) in [(&raw.boxes, "boxes"), (&raw.classes, "classes")] {
            let far = relative(found, &golden.get(&format!("{case}/{name}")));
            assert!(far < FORWARD, "{case}/{name} differs by {far:e}");
        }
    }
    let all = vs.variables();
    for (name, case) in [("model.21.cv2.bn.running_mean", "mean"), ("model.0.bn.running_var", "var")] {
        let far = far_from(&all[name], &golden.get(&format!("forward_train/{case}")));
        assert!(far < FORWARD, "{name} differs by {far:e}");
    }
}

/// True in a process whose libtorch has one thread, as the package's had; otherwise `test` has run in such a process. Threads add
/// in another order, by which gradients differ by up to 4e-5.
fn has_one_thread(test: &str) -> bool {
    const THREADS: &str = "OMP_NUM_THREADS";
    if std::env::var(THREADS).is_ok_and(|threads| threads == "1") {
        return true;
    }
    let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    let ended = alone.args([&name, "--exact", "--nocapture"]).env(THREADS, "1").output().unwrap();
    let text = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
    false
}

#[test]
fn losses_and_gradients_are_the_packages() {
    if !has_one_thread("losses_and_gradients_are_the_packages") {
        return;
    }
    let golden = Golden::read();
    for case in 0..4 {
        let rows = golden.get(&format!("loss/{case}/boxes"));
        // The pass of evaluation follows that of training, which moves the running statistics.
        let (vs, detector) = detector();
        for (train, kind) in [(true, "train"), (false, "eval")] {
            let raw = detector.forward(&(images(case, SIDE, SIDE).to_kind(Kind::Float) / 255.0), train);
            let all = with_boxes(&rows, |boxes| {
                let targets = Targets::of(boxes, (0, BATCH as usize), (SIDE, SIDE), CLASSES as i64).unwrap();
                terms(&raw, &targets, &YoloLoss::default())
            });
            let expected = golden.get(&format!("loss/{case}/{kind}/items"));
            let far = relative(&all.items(), &expected);
            assert!(far < LOSS, "loss {case}, {kind}: {} differs from {expected} by {far:e}", all.items());
            // What the trainer makes of sum and divisor.
            let total = all.sum() / all.divisor.clamp_min(1.0) * BATCH as f64;
            let far = relative(&total.detach().view([1]), &golden.get(&format!("loss/{case}/{kind}/sum")));
            assert!(far < LOSS, "loss {case}, {kind}: the sum differs by {far:e}");
            let gradients = golden.below(&format!("gradient/{case}/"));
            if train && !gradients.is_empty() {
                total.backward();
                let variables = vs.variables();
                for (name, expected) in gradients {
                    let own = variables[&name].grad();
                    let own = if own.defined() { own } else { variables[&name].detach().zeros_like() };
                    let far = far_from(&own, &expected);
                    assert!(far < GRADIENT, "gradient {case} of {name} differs by {far:e}");
                }
            }
        }
    }
}

/// Anchors and their boxes exactly, target scores to rounding.
#[test]
fn anchors_are_assigned_as_by_the_package() {
    let golden = Golden::read();
    let cells = [8, 16, 32].map(|stride| (SIDE / stride, SIDE / stride));
    for case in 0..6 {
        let get = |name: &str| golden.get(&format!("assigner/{case}/{name}"));
        let (scores, boxes) = (get("scores"), get("boxes"));
        let anchors = scores.size()[1];
        let targets = with_boxes(&get("rows"), |boxes| {
            Targets::of(boxes, (0, BATCH as usize), (SIDE, SIDE), CLASSES as i64).unwrap()
        });
        let rows = targets.classes.size()[1];
        let found = assign(&Predicted { scores: &scores, boxes: &boxes, cells }, &targets, 10);
        let expected = get("targets").flatten(0, -1);
        let positive = get("positive").flatten(0, -1).gt(0).logical_and(&expected.gt(0.0));
        let own = Tensor::zeros([BATCH * anchors], (Kind::Bool, Device::Cpu));
        let _ = own.shallow_clone().index_fill_(0, &found.anchors, 1);
        assert_eq!(own, positive, "case {case}");
        let numbers_of = get("numbers").to_kind(Kind::Int64).flatten(0, -1);
        assert_eq!(found.boxes.remainder(rows), numbers_of.index_select(0, &found.anchors), "case {case}");
        let far = relative(&found.scores, &expected.index_select(0, &found.anchors));
        assert!(far < 1e-6, "case {case}: target scores differ by {far:e}");
        assert!(found.anchors.size()[0] > 20, "case {case}");
    }
}

#[test]
fn suppression_keeps_what_the_package_keeps() {
    let golden = Golden::read();
    let raw = golden.get("nms/raw").get(0);
    let (centre, half) = (raw.narrow(0, 0, 2), raw.narrow(0, 2, 2) / 2.0);
    let boxes = Tensor::cat(&[&centre - &half, &centre + &half], 0).transpose(0, 1).contiguous();
    let scores = raw.narrow(0, 4, CLASSES as i64).transpose(0, 1).contiguous();
    let suppression = Suppression { overlap: 0.7, most: 300, across_classes: false };
    for (name, confidence, every_class) in [("val", 0.001, true), ("predict", 0.25, false)] {
        let choice = Choice { confidence, every_class, candidates: 30_000, suppression };
        let kept = suppress(candidates(&scores, &boxes, &choice).unwrap(), &suppression);
        let expected = golden.get(&format!("nms/{name}"));
        assert_eq!(kept.len() as i64, expected.size()[0], "{name}");
        for (row, Detection { corners, confidence, class }) in kept.iter().enumerate() {
            let row = numbers(&expected.get(row as i64));
            let own: Vec<f64> = corners.iter().chain([confidence]).map(|value| f64::from(*value)).collect();
            assert!(own.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-4), "{name}: {own:?} against {row:?}");
            assert_eq!(f64::from(*class), row[5], "{name}");
        }
    }
}

/// `decay · (1 - exp(-n / ramp))`: what an average that begins at 1 keeps of it when the weight is 0.
#[test]
fn averages_decay_as_the_packages() {
    let golden = Golden::read();
    for (n, expected) in [1, 2, 10, 100, 2000, 20_000].into_iter().zip(golden.numbers("ema/decays")) {
        let decay = 0.9999 * (1.0 - (-(n as f64) / 2000.0).exp());
        assert!((decay - expected).abs() < 1e-9);
        let one = Tensor::ones([1], (Kind::Double, Device::Cpu));
        let mut ema = Ema::new(0.9999, 2000.0, &[("w".to_owned(), one)]);
        ema.update(n, &[("w".to_owned(), Tensor::zeros([1], (Kind::Double, Device::Cpu)))]).unwrap();
        let far = (numbers(&ema.tensors()[0].1)[0] - expected).abs();
        assert!(far < 1e-9, "update {n} differs by {far:e}");
    }
    assert_eq!(ragged(&Tensor::zeros([0, 6], (Kind::Float, Device::Cpu))).1.size(), [BATCH + 1]);
}
