//! Facts on the images that the model, its metrics and its reports need.

use super::labels::Row;
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
    /// Their objects, counted.
    pub labels: Arc<LabelCounts>,
}

/// Cells of a side of [`LabelCounts::centres`] and [`LabelCounts::sizes`].
pub const GRID: usize = 48;

/// Objects of the training images, counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelCounts {
    /// By class.
    pub classes: Vec<u64>,
    /// By the place of their centre in the image: `[GRID, GRID]`, rows from the top.
    pub centres: Vec<u64>,
    /// By height and width as shares of the image: rows from the lowest.
    pub sizes: Vec<u64>,
}

impl LabelCounts {
    /// Counts rows of `classes` classes.
    pub fn of<'a>(rows: impl Iterator<Item = &'a Row>, classes: usize) -> Self {
        let mut counts = Self { classes: vec![0; classes], centres: vec![0; GRID * GRID], sizes: vec![0; GRID * GRID] };
        // A float becomes an integer by saturation: what lies outside counts at the border.
        let cell = |down: f32, across: f32| {
            let [row, column] = [down, across].map(|share| ((share * GRID as f32) as usize).min(GRID - 1));
            row * GRID + column
        };
        for [class, x, y, width, height] in rows {
            if let Some(count) = counts.classes.get_mut(*class as usize) {
                *count += 1;
            }
            counts.centres[cell(*y, *x)] += 1;
            counts.sizes[cell(*height, *width)] += 1;
        }
        counts
    }
}

impl YoloFacts {
    /// Number of classes.
    pub fn nc(&self) -> usize {
        self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_counted_by_class_place_and_size() {
        let rows = [[1.0, 0.5, 0.0, 0.25, 1.0], [1.0, 0.5, 0.0, 0.25, 1.0], [0.0, 1.0, 1.5, -0.1, f32::NAN], [7.0; 5]];
        let counts = LabelCounts::of(rows.iter(), 3);
        assert_eq!(counts.classes, [1, 2, 0]);
        let at = |cells: &[u64], row: usize, column: usize| cells[row * GRID + column];
        assert_eq!((at(&counts.centres, 0, GRID / 2), at(&counts.sizes, GRID - 1, GRID / 4)), (2, 2));
        assert_eq!((at(&counts.centres, GRID - 1, GRID - 1), at(&counts.sizes, 0, 0)), (2, 1));
        assert!([&counts.centres, &counts.sizes].iter().all(|cells| cells.iter().sum::<u64>() == 4));
    }
}
