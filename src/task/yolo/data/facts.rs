//! Facts on the images that the model, its metrics and its reports need.

use std::path::PathBuf;
use std::sync::Arc;

/// Facts on the images of a run, in [`crate::task::Datasets::facts`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct YoloFacts {
    /// Names of classes, by number.
    pub names: Vec<String>,
    /// Paths of images by sample: training, validation, test.
    pub images: [Arc<Vec<PathBuf>>; 3],
    /// Most objects of one image, before augmentation.
    pub most: usize,
    /// Images of training without an object.
    pub backgrounds: usize,
}

impl YoloFacts {
    /// Number of classes.
    pub fn nc(&self) -> usize {
        self.names.len()
    }
}
