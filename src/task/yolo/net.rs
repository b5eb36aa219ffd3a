//! The detector with its loss, as the trainer runs it.

use super::data::batch::{Boxes, rectangles, squares};
use super::detect::{Choice, Suppression, detections, to_tensor};
use super::loss::targets::Targets;
use super::loss::{Terms, terms};
use super::model::{Detector, Raw};
use crate::task::{Batch, Model, Output};
use spec::task::yolo::{YoloConfig, YoloLoss, YoloNms};
use tch::{Kind, TchError, Tensor, nn};

/// Largest value of a byte.
const WHITE: f64 = 255.0;

/// YOLOv8.
pub struct YoloNet {
    detector: Detector,
    gains: YoloLoss,
    nms: YoloNms,
    classes: usize,
    /// Most objects of an image that a validation keeps.
    most: usize,
}

impl YoloNet {
    /// For images with at most `most` labelled objects.
    pub fn new(config: &YoloConfig, classes: usize, most: usize, vs: &nn::Path) -> Self {
        let nms = config.nms.clone();
        // The default grows with crowded images, a limit that somebody has set stays.
        let default = nms.max_det == YoloNms::default().max_det;
        let most = if default { nms.max_det.max(most) } else { nms.max_det };
        Self { detector: Detector::new(vs, &config.size(), classes), gains: config.loss.clone(), nms, classes, most }
    }

    /// Most objects of an image in [`Output::prediction`].
    pub fn most(&self) -> usize {
        self.most
    }

    /// Raw output for images u8 `[B, 3, H, W]`.
    fn raw(&self, images: &Tensor, train: bool) -> Raw {
        self.detector.forward(&(images.to_kind(Kind::Float) / WHITE), train).widened()
    }

    fn terms(&self, raw: &Raw, boxes: &Boxes, samples: (usize, usize), size: (i64, i64)) -> Result<Terms, TchError> {
        Ok(terms(raw, &Targets::of(boxes, samples, size, self.classes as i64)?, &self.gains))
    }

    /// Objects as in validation, or as in predictions.
    fn choice(&self, predicts: bool) -> Choice {
        let nms = &self.nms;
        Choice {
            confidence: if predicts { nms.predict_conf } else { nms.conf },
            every_class: !predicts,
            candidates: nms.candidates,
            suppression: Suppression {
                overlap: nms.iou,
                most: if predicts { nms.max_det } else { self.most },
                across_classes: nms.agnostic,
            },
        }
    }

    /// `train`: normalisation by the statistics of the batch. The prediction is empty.
    fn train(&self, images: &Tensor, boxes: &Boxes, train: bool) -> Result<Output, TchError> {
        let size = (images.size()[2], images.size()[3]);
        let raw = self.raw(images, train);
        let terms = self.terms(&raw, boxes, (0, images.size()[0] as usize), size)?;
        let items = terms.items();
        let none = Tensor::zeros([0], (Kind::Float, images.device()));
        Ok(Output::new(terms.sum(), none).divided_by(terms.divisor).with_terms(items))
    }

    /// Objects, and the mean over rectangles of the loss's terms.
    fn evaluate(&self, batch: &Batch, predicts: bool) -> Result<Output, TchError> {
        let Some((all, boxes)) = rectangles(batch) else {
            return Err(TchError::Shape("a batch that is neither of training nor of validation".into()));
        };
        let (mut found, mut items) = (Vec::with_capacity(batch.len()), Vec::new());
        for rectangle in &all {
            let size = (rectangle.images.size()[2], rectangle.images.size()[3]);
            let raw = self.raw(&rectangle.images, false);
            if !predicts {
                let samples = (rectangle.places.start, rectangle.places.len());
                items.push(self.terms(&raw, &boxes, samples, size)?.items());
            }
            found.extend(detections(&raw, &self.choice(predicts))?);
        }
        let items = if items.is_empty() {
            Tensor::zeros([3], (Kind::Float, batch.fields[0].device()))
        } else {
            Tensor::stack(&items, 0).mean_dim([0i64].as_slice(), false, Kind::Float)
        };
        let most = if predicts { self.nms.max_det } else { self.most };
        Ok(Output::new(items.sum(Kind::Float), to_tensor(&found, most)).with_terms(items))
    }
}

/// As every operator of tch does that libtorch refuses; the trainer catches memory that ran out.
fn refused(error: &TchError) -> ! {
    panic!("{error}")
}

impl Model for YoloNet {
    /// Prediction: f32 `[B, most, 6]`, see [`to_tensor`]; in training empty.
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let output = match squares(batch) {
            Some((images, boxes)) => self.train(images, &boxes, train),
            None => self.evaluate(batch, false),
        };
        output.unwrap_or_else(|error| refused(&error))
    }

    fn divides(&self) -> bool {
        true
    }

    fn predict(&self, batch: &Batch) -> Tensor {
        self.evaluate(batch, true).unwrap_or_else(|error| refused(&error)).prediction
    }
}
