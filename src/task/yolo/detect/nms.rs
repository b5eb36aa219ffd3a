//! Non-maximum suppression. Its work is bounded: a candidate is compared with what is kept, at most `most` of them.

use super::Detection;

/// Rules of suppression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Suppression {
    /// IoU above which the less confident of two goes.
    pub overlap: f64,
    /// Most objects of an image.
    pub most: usize,
    /// Objects of different classes suppress each other as well.
    pub across_classes: bool,
}

/// Keeps, by falling confidence, the candidates that overlap with nothing kept. `found` is sorted so.
///
/// Classes are compared as numbers. The package moves boxes of different classes 7680 px apart instead, whose coordinates
/// lose digits there: for class 79 a sixteenth of a pixel.
pub fn suppress(found: Vec<Detection>, suppression: &Suppression) -> Vec<Detection> {
    let mut kept: Vec<Detection> = Vec::new();
    let limit = suppression.overlap as f32;
    for candidate in found {
        if kept.len() >= suppression.most {
            break;
        }
        let rival = |other: &Detection| suppression.across_classes || other.class == candidate.class;
        if !kept.iter().any(|other| rival(other) && iou(&other.corners, &candidate.corners, 0.0) > limit) {
            kept.push(candidate);
        }
    }
    kept
}

/// Intersection over union of two boxes (left, top, right, bottom), with `eps` added to the union.
pub fn iou(a: &[f32; 4], b: &[f32; 4], eps: f32) -> f32 {
    let across = |low: usize, high: usize| (a[high].min(b[high]) - a[low].max(b[low])).max(0.0);
    let area = |of: &[f32; 4]| (of[2] - of[0]) * (of[3] - of[1]);
    let inter = across(0, 2) * across(1, 3);
    inter / (area(a) + area(b) - inter + eps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(left: f32, confidence: f32, class: u16) -> Detection {
        Detection { corners: [left, 0.0, left + 10.0, 10.0], confidence, class }
    }

    fn kept(found: &[Detection], most: usize, across_classes: bool) -> Vec<f32> {
        let suppression = Suppression { overlap: 0.5, most, across_classes };
        suppress(found.to_vec(), &suppression).iter().map(|object| object.confidence).collect()
    }

    #[test]
    fn overlapping_objects_of_a_class_are_one() {
        // Shifted by 3: IoU 7/13; by 4: 6/14.
        let found = [object(0.0, 0.9, 0), object(3.0, 0.8, 0), object(4.0, 0.7, 0), object(3.0, 0.6, 1)];
        assert_eq!(kept(&found, 300, false), [0.9, 0.7, 0.6]);
        assert_eq!(kept(&found, 300, true), [0.9, 0.7]);
        assert_eq!(kept(&found, 1, false), [0.9]);
        assert_eq!(kept(&[], 300, false), [0.0; 0]);
    }

    #[test]
    fn an_overlap_that_equals_the_limit_stays() {
        let half = [object(0.0, 0.9, 0), Detection { corners: [0.0, 0.0, 10.0, 5.0], ..object(0.0, 0.8, 0) }];
        assert_eq!(kept(&half, 300, false), [0.9, 0.8]);
    }

    #[test]
    fn boxes_without_area_suppress_nothing() {
        let flat = Detection { corners: [1.0, 1.0, 1.0, 1.0], ..object(0.0, 0.9, 0) };
        assert_eq!(kept(&[flat, flat], 300, false).len(), 2);
    }
}
