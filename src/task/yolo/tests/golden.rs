//! The file of expected values, and inputs that both sides compute by themselves.

use crate::task::yolo::data::batch::Boxes;
use crate::task::yolo::model::Detector;
use spec::task::yolo::ModelSize;
use std::collections::HashMap;
use std::path::Path;
use tch::{Device, Kind, Tensor, nn, no_grad};

pub const CLASSES: usize = 3;
pub const SIDE: i64 = 96;
pub const BATCH: i64 = 2;

pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yolo_golden.safetensors");
        Self(Tensor::read_safetensors(path).unwrap().into_iter().collect())
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no {name}")).shallow_clone()
    }

    /// Names and tensors below `prefix`, without it.
    pub fn below(&self, prefix: &str) -> Vec<(String, Tensor)> {
        let inside =
            |(name, value): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), value.shallow_clone()));
        self.0.iter().filter_map(inside).collect()
    }

    pub fn numbers(&self, name: &str) -> Vec<f64> {
        numbers(&self.get(name))
    }
}

pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).contiguous().flatten(0, -1)).unwrap()
}

/// `draw` of the script: uniform in [-1, 1).
pub fn draw(count: usize, salt: u64) -> Vec<f64> {
    let one = |index: u64| {
        let mask = 0xffff_ffff;
        let mut x = (index * 2_654_435_761 + salt * 40_503 + 12_345) & mask;
        x ^= x >> 15;
        x = (x * 2_246_822_519) & mask;
        x ^= x >> 13;
        x as f64 / 2f64.powi(31) - 1.0
    };
    (0..count as u64).map(one).collect()
}

/// `signature` of the script.
pub fn signature(tensor: &Tensor) -> Vec<f64> {
    let x = numbers(tensor);
    let along = |salt: u64| x.iter().zip(draw(x.len(), salt)).map(|(a, b)| a * b).sum::<f64>();
    let most = x.iter().fold(0f64, |most, value| most.max(value.abs()));
    let mut all = vec![x.iter().map(|value| value * value).sum::<f64>().sqrt(), most, along(1), along(2)];
    all.extend((0..8).map(|at| x.get(at).copied().unwrap_or(0.0)));
    all
}

/// How far a tensor is from a signature: single values in parts of the largest, sums in parts of the norm.
pub fn far_from(tensor: &Tensor, expected: &Tensor) -> f64 {
    let (own, expected) = (signature(tensor), numbers(expected));
    let (norm, most) = (expected[0].max(1e-12), expected[1].max(1e-12));
    let scale = |at: usize| if (1..2).contains(&at) || at >= 4 { most } else { norm };
    let parts = own.iter().zip(&expected).enumerate().map(|(at, (a, b))| (a - b).abs() / scale(at));
    parts.fold(0.0, f64::max)
}

/// Largest difference, in parts of the largest expected value.
pub fn relative(tensor: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(tensor.size(), expected.size());
    let most = expected.abs().max().double_value(&[]).max(1e-12);
    (tensor.detach().to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max().double_value(&[]) / most
}

/// YOLOv8n with the script's weights.
pub fn detector() -> (nn::VarStore, Detector) {
    let vs = nn::VarStore::new(Device::Cpu);
    let detector = Detector::new(&vs.root(), &ModelSize::named("yolov8n").unwrap(), CLASSES);
    set_weights(&vs);
    (vs, detector)
}

pub fn set_weights(vs: &nn::VarStore) {
    let mut all: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(all.len(), 355);
    for (salt, (name, value)) in (10..).zip(all) {
        if name.contains("dfl") || name.contains("num_batches") {
            continue;
        }
        let size = value.size();
        let scale = if size.len() == 4 { (3.0 / (size[1] * size[2] * size[3]) as f64).sqrt() } else { 1.0 };
        let one = |u: f64| {
            if name.ends_with("running_var") {
                1.0 + 0.5 * u.abs()
            } else if name.ends_with("running_mean") || name.contains(".bn.bias") {
                0.1 * u
            } else if name.contains(".bn.weight") {
                1.0 + 0.2 * u
            } else if name.ends_with("bias") {
                0.5 * u - if name.contains(".cv3.") { 1.0 } else { 0.0 }
            } else {
                u * scale
            }
        };
        let values: Vec<f32> = draw(value.numel(), salt).into_iter().map(|u| one(u) as f32).collect();
        no_grad(|| value.detach().copy_(&Tensor::from_slice(&values).view(size.as_slice())));
    }
}

/// Images u8 `[BATCH, 3, height, width]` of a number.
pub fn images(index: u64, height: i64, width: i64) -> Tensor {
    let count = (BATCH * 3 * height * width) as usize;
    let bytes: Vec<u8> = draw(count, 500 + index).into_iter().map(|u| ((u + 1.0) * 128.0) as u8).collect();
    Tensor::from_slice(&bytes).view([BATCH, 3, height, width])
}

/// Boxes and offsets of a batch, from rows of image, class, cx, cy, w, h.
pub fn ragged(rows: &Tensor) -> (Tensor, Tensor) {
    let images = numbers(&rows.select(1, 0));
    let before = |image: i64| images.iter().filter(|own| (**own as i64) < image).count() as i64;
    let offsets: Vec<i64> = (0..=BATCH).map(before).collect();
    (rows.narrow(1, 1, 5).contiguous(), Tensor::from_slice(&offsets))
}

pub fn with_boxes<T>(rows: &Tensor, work: impl FnOnce(&Boxes) -> T) -> T {
    let (values, offsets) = ragged(rows);
    work(&Boxes { values: &values, offsets: &offsets })
}
