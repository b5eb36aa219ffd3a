//! Matching and average precision.

use super::golden::{Golden, numbers};
use crate::task::yolo::detect::Detection;
use crate::task::yolo::measure::curves::Curves;
use crate::task::yolo::measure::matching::{THRESHOLDS, Truth, matched};
use crate::task::yolo::measure::records::{Records, together};

const AVERAGE: f64 = 1e-6;
const CLASSES: usize = 3;

fn rows(golden: &Golden, name: &str, width: usize) -> Vec<Vec<f64>> {
    golden.numbers(name).chunks(width).map(<[f64]>::to_vec).collect()
}

fn corners(row: &[f64]) -> [f32; 4] {
    [row[0] as f32, row[1] as f32, row[2] as f32, row[3] as f32]
}

#[test]
fn matches_and_average_precisions_are_the_packages() {
    let golden = Golden::read();
    let mut records = Records::default();
    let mut objects = [0; CLASSES];
    for image in 0..12 {
        let truth: Vec<Truth> = rows(&golden, &format!("matching/{image}/truth"), 5)
            .iter()
            .map(|row| Truth { class: row[0] as u16, corners: corners(&row[1..]) })
            .collect();
        let found: Vec<Detection> = rows(&golden, &format!("matching/{image}/found"), 6)
            .iter()
            .map(|row| Detection { corners: corners(row), confidence: row[4] as f32, class: row[5] as u16 })
            .collect();
        let bits = matched(&found, &truth);
        let expected = rows(&golden, &format!("matching/{image}/right"), THRESHOLDS);
        for (own, expected) in bits.iter().zip(&expected) {
            let own: Vec<f64> = (0..THRESHOLDS).map(|at| f64::from(own >> at & 1)).collect();
            assert_eq!(&own, expected, "image {image}");
        }
        truth.iter().for_each(|truth| objects[usize::from(truth.class)] += 1);
        records.add(image, &found, &bits);
    }
    let curves = Curves::new(&together(&[records.bytes().to_vec()]), &objects);
    let classes: Vec<f64> = curves.classes.iter().map(|class| class.class as f64).collect();
    assert_eq!(classes, golden.numbers("curves/classes"));
    let near = |own: Vec<f64>, name: &str| {
        let expected = numbers(&golden.get(name));
        assert_eq!(own.len(), expected.len());
        for (own, expected) in own.iter().zip(&expected) {
            assert!((own - expected).abs() < AVERAGE, "{name}: {own} against {expected}");
        }
    };
    near(curves.classes.iter().flat_map(|class| class.average).collect(), "curves/average");
    near(curves.classes.iter().map(|class| class.precision[curves.best]).collect(), "curves/precision");
    near(curves.classes.iter().map(|class| class.recall[curves.best]).collect(), "curves/recall");
    near(curves.classes.iter().map(|class| class.f1(curves.best)).collect(), "curves/f1");
}
