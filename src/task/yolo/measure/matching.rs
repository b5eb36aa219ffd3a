//! Which detections of an image are right, at ten thresholds of overlap.

use crate::task::yolo::detect::{Detection, iou};

/// Thresholds of overlap, .50 to .95.
pub const THRESHOLDS: usize = 10;
/// Keeps a union from being 0. Source: TASKS 2.7.17.
const EPS: f32 = 1e-7;
/// Confidence and overlap of the confusion matrix.
const CONFUSED: (f32, f32) = (0.25, 0.45);

/// A labelled object in pixels of the image as the model sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truth {
    /// Left, top, right, bottom.
    pub corners: [f32; 4],
    pub class: u16,
}

/// The thresholds in f32, as `torch.linspace(0.5, 0.95, 10)` makes them.
pub fn thresholds() -> [f32; THRESHOLDS] {
    let (first, last) = (0.5f32, 0.95f32);
    let step = (last - first) / (THRESHOLDS - 1) as f32;
    std::array::from_fn(|at| {
        if at < THRESHOLDS / 2 { first + step * at as f32 } else { last - step * (THRESHOLDS - 1 - at) as f32 }
    })
}

/// For each detection a bit per threshold: it is right there. By falling confidence, which is their order, each takes the
/// free object of its class that it overlaps most with.
pub fn matched(found: &[Detection], truth: &[Truth]) -> Vec<u16> {
    let mut bits = vec![0u16; found.len()];
    let limits = thresholds();
    // Bit n of an object: it is taken at threshold n.
    let mut taken = vec![0u16; truth.len()];
    for (bits, object) in bits.iter_mut().zip(found) {
        let own = truth.iter().enumerate().filter(|(_, truth)| truth.class == object.class);
        let overlaps: Vec<(usize, f32)> = own
            .map(|(at, truth)| (at, iou(&truth.corners, &object.corners, EPS)))
            .filter(|(_, o)| *o >= limits[0])
            .collect();
        for (n, limit) in limits.iter().enumerate() {
            let free = overlaps.iter().filter(|(at, overlap)| overlap >= limit && taken[*at] & (1 << n) == 0);
            // The first of equal ones.
            let best = free.fold(None::<(usize, f32)>, |best, &(at, overlap)| match best {
                Some((_, most)) if most >= overlap => best,
                _ => Some((at, overlap)),
            });
            if let Some((at, _)) = best {
                taken[at] |= 1 << n;
                *bits |= 1 << n;
            }
        }
    }
    bits
}

/// Adds an image to the confusion matrix `[(C + 1) × (C + 1)]`: rows are predicted classes, columns true ones, the last of
/// each is the background.
pub fn confuse(matrix: &mut [f64], classes: usize, found: &[Detection], truth: &[Truth]) {
    let (least, overlap) = CONFUSED;
    let (side, background) = (classes + 1, classes);
    let mut count = |predicted: usize, actual: usize| {
        if let Some(cell) = matrix.get_mut(predicted * side + actual) {
            *cell += 1.0;
        }
    };
    let mut taken = vec![false; truth.len()];
    for object in found.iter().filter(|object| object.confidence > least) {
        let overlaps = truth.iter().enumerate().map(|(at, truth)| (at, iou(&truth.corners, &object.corners, EPS)));
        let free = overlaps.filter(|(at, o)| !taken[*at] && *o > overlap);
        match free.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))) {
            Some((at, _)) => {
                taken[at] = true;
                count(usize::from(object.class), usize::from(truth[at].class));
            }
            None => count(usize::from(object.class), background),
        }
    }
    for (truth, _) in truth.iter().zip(taken).filter(|(_, taken)| !taken) {
        count(background, usize::from(truth.class));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(left: f32, confidence: f32, class: u16) -> Detection {
        Detection { corners: [left, 0.0, left + 10.0, 10.0], confidence, class }
    }

    fn truth(left: f32, class: u16) -> Truth {
        Truth { corners: [left, 0.0, left + 10.0, 10.0], class }
    }

    #[test]
    fn thresholds_are_evenly_spaced() {
        for (at, limit) in thresholds().iter().enumerate() {
            assert!((limit - (0.5 + 0.05 * at as f32)).abs() < 1e-6);
        }
    }

    #[test]
    fn an_object_is_found_once_by_the_most_confident_detection() {
        let found = [object(1.0, 0.9, 0), object(0.0, 0.8, 0), object(0.0, 0.7, 1)];
        // IoU 9/11 with the first: right up to .80; the second is right where the first is not.
        let bits = matched(&found, &[truth(0.0, 0)]);
        assert_eq!(bits, [0b00_0111_1111, 0b11_1000_0000, 0]);
    }

    #[test]
    fn a_detection_takes_its_best_free_object() {
        let found = [object(2.0, 0.9, 0), object(2.0, 0.8, 0)];
        // 3 away and 1 away: IoU 7/13 and 9/11.
        let bits = matched(&found, &[truth(5.0, 0), truth(1.0, 0)]);
        assert_eq!(bits[0], 0b00_0111_1111);
        assert_eq!(bits[1], 0b1, "only at .50 is the other near enough");
        assert!(matched(&[], &[truth(0.0, 0)]).is_empty());
        assert_eq!(matched(&found, &[]), [0, 0]);
    }

    #[test]
    fn confusions_are_counted() {
        let mut matrix = vec![0.0; 9];
        let found = [object(0.0, 0.9, 0), object(50.0, 0.8, 1), object(90.0, 0.7, 0), object(0.0, 0.2, 1)];
        confuse(&mut matrix, 2, &found, &[truth(0.0, 0), truth(50.0, 0), truth(200.0, 1)]);
        assert_eq!(matrix, [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
    }
}
