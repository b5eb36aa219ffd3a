//! YOLOv8's detector: backbone, neck, head.
//!
//! ```text
//! image ─► 0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5 ─► 6 ─► 7 ─► 8 ─► 9      strides 2 4 4 8 8 16 16 32 32 32
//!                              │         │              │
//!                              │    12 ◄─┼── up ◄───────┤
//!                         15 ◄─┼── up ◄──┤              │
//!                          │   └─────────│──────────────│      15: stride 8 ─► head
//!                          └─ 16 ─► 18 ◄─┘ (12)         │      18: stride 16 ─► head
//!                                   └─ 19 ─► 21 ◄───────┘      21: stride 32 ─► head
//! ```
//! Layers are numbered as in the package's file of weights, `model.<number>.…`; numbers that are left out have no weights
//! there: enlarging and joining.

mod head;
mod layers;

pub use head::{Anchors, BINS, Raw, STRIDES, boxes_from_sides, expected_sides};

use head::Head;
use layers::{C2f, Conv, Sppf};
use spec::task::yolo::ModelSize;
use tch::{Tensor, nn};

/// The detector.
pub struct Detector {
    backbone: Backbone,
    neck: Neck,
    head: Head,
}

/// Layers 0 to 9.
struct Backbone {
    convs: [Conv; 5],
    stages: [C2f; 4],
    pool: Sppf,
}

/// Layers 12 to 21.
struct Neck {
    /// Layers 12, 15, 18, 21.
    stages: [C2f; 4],
    /// Layers 16 and 19.
    down: [Conv; 2],
}

impl Detector {
    /// Parameters below `vs`, which is the root of the file of weights: `model.0.conv.weight`, …
    pub fn new(vs: &nn::Path, size: &ModelSize, classes: usize) -> Self {
        let [c1, c2, c3, c4, c5] = [64, 128, 256, 512, 1024].map(|channels| size.channels(channels) as i64);
        let (short, long) = (size.blocks(3), size.blocks(6));
        let model = vs / "model";
        let at = |number: usize| &model / number;
        let down = |number: usize, inputs: i64, outputs: i64| Conv::new(&at(number), inputs, outputs, 3, 2);
        let stage = |number: usize, inputs: i64, outputs: i64, blocks: usize, shortcut: bool| {
            C2f::new(&at(number), inputs, outputs, blocks, shortcut)
        };
        // In the order of their numbers: draws of weights follow it.
        let (l0, l1) = (down(0, 3, c1), down(1, c1, c2));
        let (l2, l3) = (stage(2, c2, c2, short, true), down(3, c2, c3));
        let (l4, l5) = (stage(4, c3, c3, long, true), down(5, c3, c4));
        let (l6, l7) = (stage(6, c4, c4, long, true), down(7, c4, c5));
        let (l8, l9) = (stage(8, c5, c5, short, true), Sppf::new(&at(9), c5));
        let (l12, l15) = (stage(12, c5 + c4, c4, short, false), stage(15, c4 + c3, c3, short, false));
        let (l16, l18) = (down(16, c3, c3), stage(18, c3 + c4, c4, short, false));
        let (l19, l21) = (down(19, c4, c4), stage(21, c4 + c5, c5, short, false));
        Self {
            backbone: Backbone { convs: [l0, l1, l3, l5, l7], stages: [l2, l4, l6, l8], pool: l9 },
            neck: Neck { stages: [l12, l15, l18, l21], down: [l16, l19] },
            head: Head::new(&at(22), [c3, c4, c5], classes as i64),
        }
    }

    /// Images f32 `[B, 3, H, W]` in 0..1, whose sides are multiples of 32.
    pub fn forward(&self, images: &Tensor, train: bool) -> Raw {
        let Backbone { convs, stages, pool } = &self.backbone;
        let x = stages[0].forward(&convs[1].forward(&convs[0].forward(images, train), train), train);
        let p3 = stages[1].forward(&convs[2].forward(&x, train), train);
        let p4 = stages[2].forward(&convs[3].forward(&p3, train), train);
        let p5 = pool.forward(&stages[3].forward(&convs[4].forward(&p4, train), train), train);
        let Neck { stages, down } = &self.neck;
        let joined = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 1);
        let middle = stages[0].forward(&joined(&enlarged(&p5), &p4), train);
        let small = stages[1].forward(&joined(&enlarged(&middle), &p3), train);
        let middle = stages[2].forward(&joined(&down[0].forward(&small, train), &middle), train);
        let large = stages[3].forward(&joined(&down[1].forward(&middle, train), &p5), train);
        self.head.forward([small, middle, large], train)
    }
}

/// Twice as many rows and columns, each value four times.
fn enlarged(x: &Tensor) -> Tensor {
    let size = x.size();
    x.upsample_nearest2d([2 * size[2], 2 * size[3]], None, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tch::{Device, Kind, no_grad};

    fn built(name: &str, classes: usize) -> (nn::VarStore, Detector) {
        let vs = nn::VarStore::new(Device::Cpu);
        let size = ModelSize::named(name).unwrap();
        let detector = Detector::new(&vs.root(), &size, classes);
        (vs, detector)
    }

    fn trained(vs: &nn::VarStore) -> usize {
        vs.trainable_variables().iter().map(Tensor::numel).sum()
    }

    /// Numbers that a package's model counts: all but statistics; the fixed kernel of 16 is one of its parameters.
    fn counted(vs: &nn::VarStore) -> usize {
        trained(vs) + 16
    }

    #[test]
    fn models_have_the_published_numbers_of_parameters() {
        for (name, count) in [("yolov8n", 3_157_200), ("yolov8s", 11_166_560), ("yolov8m", 25_902_640)] {
            assert_eq!(counted(&built(name, 80).0), count, "{name}");
        }
        for (classes, count) in [(1, 3_011_043), (2, 3_011_238), (3, 3_011_433), (10, 3_012_798)] {
            assert_eq!(counted(&built("n", classes).0), count, "{classes} classes");
        }
        let vs = nn::VarStore::new(Device::Cpu);
        let narrow = ModelSize { width: 0.125, ..ModelSize::named("n").unwrap() };
        Detector::new(&vs.root(), &narrow, 3);
        assert_eq!(counted(&vs), 912_929);
    }

    #[test]
    fn the_largest_models_have_the_published_numbers_of_parameters() {
        for (name, count) in [("yolov8l", 43_691_520), ("yolov8x", 68_229_648)] {
            assert_eq!(counted(&built(name, 80).0), count, "{name}");
        }
    }

    #[test]
    fn layers_have_the_published_numbers_of_parameters() {
        let (vs, _) = built("yolov8n", 80);
        let mut counts = [0; 23];
        for (name, tensor) in vs.variables() {
            let layer: usize = name.split('.').nth(1).unwrap().parse().unwrap();
            let counts_here = tensor.requires_grad() || name.ends_with("dfl.conv.weight");
            counts[layer] += if counts_here { tensor.numel() } else { 0 };
        }
        let expected = [
            464, 4_672, 7_360, 18_560, 49_664, 73_984, 197_632, 295_424, 460_288, 164_608, 0, 0, 148_224, 0, 0, 37_248,
            36_992, 0, 123_648, 147_712, 0, 493_056, 897_664,
        ];
        assert_eq!(counts, expected);
    }

    #[test]
    fn names_are_those_of_the_packages_files() {
        let names: BTreeSet<String> = built("yolov8n", 80).0.variables().into_keys().collect();
        assert_eq!(names.len(), 355);
        for name in [
            "model.0.conv.weight",
            "model.0.bn.num_batches_tracked",
            "model.2.m.0.cv2.bn.running_var",
            "model.9.cv2.conv.weight",
            "model.22.cv2.0.0.conv.weight",
            "model.22.cv2.2.2.bias",
            "model.22.cv3.1.1.bn.running_mean",
            "model.22.dfl.conv.weight",
        ] {
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn weights_begin_as_in_the_package() {
        let vs = built("yolov8n", 80).0;
        let all = vs.variables();
        let bias = |name: &str| all[name].mean(Kind::Double).double_value(&[]);
        assert!((bias("model.22.cv2.1.2.bias") - 2.0).abs() < 1e-6);
        let expected = (5.0 / 80.0 / f64::powi(640.0 / 16.0, 2)).ln();
        assert!((bias("model.22.cv3.1.2.bias") - expected).abs() < 1e-5);
        let weight = &all["model.5.conv.weight"];
        let (bound, most) = (1.0 / f64::sqrt(64.0 * 9.0), weight.abs().max().double_value(&[]));
        assert!(most <= bound && most > 0.99 * bound, "{most} against {bound}");
    }

    #[test]
    fn a_pass_gives_logits_for_every_cell_of_three_levels() {
        let (_vs, detector) = built("yolov8n", 3);
        let images = Tensor::zeros([2, 3, 64, 96], (Kind::Float, Device::Cpu));
        let raw = no_grad(|| detector.forward(&images, false));
        assert_eq!(raw.cells, [(8, 12), (4, 6), (2, 3)]);
        assert_eq!((raw.boxes.size(), raw.classes.size()), (vec![2, 64, 126], vec![2, 3, 126]));
        assert_eq!(raw.anchors().centres.size(), [126, 2]);
    }
}
