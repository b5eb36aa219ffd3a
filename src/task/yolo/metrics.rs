//! Metrics: terms of the loss, and precision, recall and average precision of detections.
//!
//! | name | meaning |
//! |---|---|
//! | `box_loss`, `cls_loss`, `dfl_loss` | terms of the loss with their gains, mean over batches |
//! | `loss` | their sum |
//! | `precision`, `recall` | means over classes at the confidence of the best mean F1, overlap .50 |
//! | `map50`, `map50_95` | mean over classes of the average precision, at overlap .50 and over .50 to .95 |
//!
//! Memory: fixed sums, with a confusion matrix of up to 1,000 classes, and at most `8 + 8 · max_det` bytes for each image of a
//! validation ([`super::measure::records`]).

use super::data::batch::rectangles;
use super::detect::{Detection, from_tensor};
use super::measure::Evaluated;
use super::measure::curves::Curves;
use super::measure::matching::{confuse, matched};
use super::measure::records::{Records, together};
use super::measure::truth::truths;
use super::report;
use crate::task::{Batch, Metrics, Output};
use tch::{Device, Kind, TchError, Tensor};

/// Terms of the loss.
const TERMS: usize = 3;
/// Places among the sums.
const PASSES: usize = TERMS;
const IMAGES: usize = TERMS + 1;
const OBJECTS: usize = TERMS + 2;
/// Most classes with a confusion matrix, whose memory grows with their square: 8 MB here.
const MOST_CONFUSED: usize = 1000;

/// Cells of the confusion matrix of so many classes.
fn cells(classes: usize) -> usize {
    if classes > MOST_CONFUSED { 0 } else { (classes + 1) * (classes + 1) }
}

/// Sums and records of one part of the data.
pub struct YoloMetrics {
    names: Vec<String>,
    sums: Vec<f64>,
    /// Sums of terms on a device, so that no step waits for them.
    pending: Option<Tensor>,
    records: Records,
    /// Records of all ranks, for the values asked for next.
    gathered: Vec<Vec<u8>>,
    last: std::cell::RefCell<Option<Evaluated>>,
}

impl YoloMetrics {
    /// For classes of these names.
    pub fn new(names: &[String]) -> Self {
        let classes = names.len();
        Self {
            names: names.to_vec(),
            sums: vec![0.0; OBJECTS + classes + cells(classes)],
            pending: None,
            records: Records::default(),
            gathered: Vec::new(),
            last: None.into(),
        }
    }

    fn add_terms(&mut self, terms: &Tensor) {
        let terms = terms.detach().to_kind(Kind::Double);
        match &mut self.pending {
            Some(pending) => {
                let _ = pending.g_add_(&terms);
            }
            None => self.pending = Some(terms.copy()),
        }
        self.sums[PASSES] += 1.0;
    }

    /// Sums with those on the device.
    fn settled(&self) -> Vec<f64> {
        let mut sums = self.sums.clone();
        let pending = self.pending.as_ref().map(|pending| pending.to_device(Device::Cpu));
        let values = pending.and_then(|pending| Vec::<f64>::try_from(pending).ok()).unwrap_or_default();
        for (sum, value) in sums.iter_mut().zip(values).take(TERMS) {
            *sum += value;
        }
        sums
    }

    fn judge(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), TchError> {
        let Some((rectangles, boxes)) = rectangles(batch) else { return Ok(()) };
        let found = from_tensor(prediction)?;
        let classes = self.names.len();
        for rectangle in rectangles {
            let size = (rectangle.images.size()[2], rectangle.images.size()[3]);
            let truths = truths(&boxes, (rectangle.places.start, rectangle.places.len()), size, classes)?;
            for (place, truth) in rectangle.places.zip(truths) {
                let none = Vec::new();
                let found: &Vec<Detection> = found.get(place).unwrap_or(&none);
                self.records.add(batch.sample_ids[place], found, &matched(found, &truth));
                self.sums[IMAGES] += 1.0;
                for one in &truth {
                    self.sums[OBJECTS + usize::from(one.class)] += 1.0;
                }
                confuse(&mut self.sums[OBJECTS + classes..], classes, found, &truth);
            }
        }
        Ok(())
    }
}

impl Metrics for YoloMetrics {
    fn update(&mut self, batch: &Batch, output: &Output) {
        if let Some(terms) = &output.terms {
            self.add_terms(terms);
        }
        if let Err(error) = self.judge(batch, &output.prediction) {
            // As every operator of tch does that libtorch refuses.
            panic!("{error}");
        }
    }

    fn sums(&self) -> Vec<f64> {
        self.settled()
    }

    fn records(&self) -> Option<Vec<u8>> {
        Some(self.records.bytes().to_vec())
    }

    fn gather(&mut self, ranks: &[Vec<u8>]) {
        self.gathered = ranks.to_vec();
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let passes = sums[PASSES].max(1.0);
        let [boxes, classes, sides] = [0, 1, 2].map(|term| sums[term] / passes);
        let mut values = vec![
            ("loss".to_owned(), boxes + classes + sides),
            ("box_loss".to_owned(), boxes),
            ("cls_loss".to_owned(), classes),
            ("dfl_loss".to_owned(), sides),
        ];
        if sums[IMAGES] == 0.0 {
            return values;
        }
        let count = self.names.len();
        let objects: Vec<u64> = sums[OBJECTS..OBJECTS + count].iter().map(|sum| *sum as u64).collect();
        let curves = Curves::new(&together(&self.gathered), &objects);
        values.extend([
            ("precision".to_owned(), curves.precision()),
            ("recall".to_owned(), curves.recall()),
            ("map50".to_owned(), curves.map50()),
            ("map50_95".to_owned(), curves.map50_95()),
        ]);
        let confusion = sums[OBJECTS + count..].to_vec();
        self.last.replace(Some(Evaluated { curves, confusion, images: sums[IMAGES] as u64 }));
        values
    }

    fn headline(&self) -> &[&str] {
        &["map50", "map50_95"]
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.last.borrow().as_ref().map(|last| report::files(last, &self.names)).unwrap_or_default()
    }

    fn reset(&mut self) {
        self.sums.fill(0.0);
        self.pending = None;
        self.records.clear();
        self.gathered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::data::batch::Shape;
    use crate::task::yolo::detect::to_tensor;

    /// Images of 64 × 32 with one object each, of class 1, in the middle.
    fn batch(ids: &[u64]) -> Batch {
        let count = ids.len() as i64;
        let shape = Shape { height: 64, width: 32, original_height: 64, original_width: 32, ..Shape::default() };
        let bytes = 3 * 64 * 32;
        let fields = vec![
            Tensor::zeros([count * bytes], (Kind::Uint8, Device::Cpu)),
            Tensor::arange(count + 1, (Kind::Int64, Device::Cpu)) * bytes,
            Tensor::from_slice(&shape.numbers()).repeat([count]).view([count, 6]),
            Tensor::from_slice(&[1f32, 0.5, 0.5, 0.5, 0.25]).repeat([count]).view([count, 5]),
            Tensor::arange(count + 1, (Kind::Int64, Device::Cpu)),
        ];
        Batch::new(fields, ids.to_vec())
    }

    fn found(confidence: f32, class: u16) -> Vec<Detection> {
        vec![Detection { corners: [8.0, 24.0, 24.0, 40.0], confidence, class }]
    }

    fn output(images: &[Vec<Detection>]) -> Output {
        let terms = Tensor::from_slice(&[1f32, 2.0, 3.0]);
        Output::new(Tensor::from(6f32), to_tensor(images, 4)).with_terms(terms)
    }

    fn value(values: &[(String, f64)], name: &str) -> f64 {
        values.iter().find(|(own, _)| own == name).unwrap().1
    }

    fn metrics() -> YoloMetrics {
        YoloMetrics::new(&["cat".to_owned(), "dog".to_owned()])
    }

    /// Three images on one rank, and on two.
    #[test]
    fn values_do_not_depend_on_the_number_of_ranks() {
        let images = [found(0.9, 1), found(0.8, 0), found(0.7, 1)];
        let mut one = metrics();
        one.update(&batch(&[0, 1, 2]), &output(&images));
        let (sums, records) = (one.sums(), one.records().unwrap());
        one.gather(&[records]);
        let whole = one.values(&sums);
        assert!((value(&whole, "recall") - 2.0 / 3.0).abs() < 1e-6, "{whole:?}");
        assert!(value(&whole, "map50") > 0.6 && value(&whole, "map50") < 0.7, "{whole:?}");
        assert_eq!((value(&whole, "loss"), value(&whole, "dfl_loss")), (6.0, 3.0));
        let mut ranks = [metrics(), metrics()];
        ranks[0].update(&batch(&[2]), &output(&images[2..]));
        ranks[1].update(&batch(&[0, 1]), &output(&images[..2]));
        let sums: Vec<f64> = ranks[0].sums().iter().zip(ranks[1].sums()).map(|(a, b)| a + b).collect();
        let records = [ranks[0].records().unwrap(), ranks[1].records().unwrap()];
        for rank in &mut ranks {
            rank.gather(&records);
            assert_eq!(rank.values(&sums), whole);
        }
        ranks[0].reset();
        assert!(ranks[0].sums().iter().all(|sum| *sum == 0.0) && ranks[0].records().unwrap().is_empty());
    }

    #[test]
    fn many_classes_have_no_confusion_matrix() {
        let names: Vec<String> = (0..65_536).map(|class| class.to_string()).collect();
        let mut all = YoloMetrics::new(&names);
        all.update(&batch(&[0]), &output(&[found(0.9, 1)]));
        let (sums, records) = (all.sums(), all.records().unwrap());
        assert_eq!(sums.len(), OBJECTS + names.len());
        all.gather(&[records]);
        assert!((value(&all.values(&sums), "map50") - 0.995).abs() < 1e-9);
        assert!(all.files().iter().all(|(name, _)| name != "confusion_matrix.png"));
    }

    #[test]
    fn training_has_the_terms_of_the_loss_alone() {
        let mut all = metrics();
        let fields = [
            Tensor::zeros([1, 3, 32, 32], (Kind::Uint8, Device::Cpu)),
            Tensor::zeros([0, 5], (Kind::Float, Device::Cpu)),
            Tensor::from_slice(&[0i64, 0]),
        ];
        for _ in 0..2 {
            all.update(&Batch::new(fields.iter().map(Tensor::shallow_clone).collect(), vec![0]), &output(&[vec![]]));
        }
        let names: Vec<String> = all.values(&all.sums()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["loss", "box_loss", "cls_loss", "dfl_loss"]);
        assert_eq!(value(&all.values(&all.sums()), "cls_loss"), 2.0);
        assert!(all.files().is_empty());
    }

    #[test]
    fn an_evaluation_has_tables_and_figures() {
        let mut all = metrics();
        all.update(&batch(&[0, 1]), &output(&[found(0.9, 1), found(0.4, 1)]));
        let records = all.records().unwrap();
        all.gather(&[records]);
        let values = all.values(&all.sums());
        assert!((value(&values, "map50") - 0.995).abs() < 1e-9);
        let files = all.files();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["classes.csv", "PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"]
        );
        let table = String::from_utf8(files[0].1.clone()).unwrap();
        assert!(table.lines().nth(2).unwrap().starts_with("dog,2,"), "{table}");
        assert!(files[1..].iter().all(|(_, bytes)| bytes.starts_with(b"\x89PNG")));
    }
}
