//! Precision, recall and average precision of classes.

use super::matching::THRESHOLDS;
use super::records::Judged;

/// Confidences at which curves are read.
pub const POINTS: usize = 1000;
/// Recalls at which a precision is read for the average.
const RECALLS: usize = 101;
/// Width of the window that smooths the mean F1, as a share of the curve. Source: TASKS 2.7.16.
const SMOOTHED: f64 = 0.1;
/// Keeps divisions finite.
const EPS: f64 = 1e-16;

/// Curves of one class, over confidences from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassCurves {
    pub class: usize,
    /// Labelled objects.
    pub objects: u64,
    /// At overlap .50.
    pub precision: Vec<f64>,
    pub recall: Vec<f64>,
    /// Precision over recalls from 0 to 1, at overlap .50.
    pub by_recall: Vec<f64>,
    /// Average precision at each threshold of overlap.
    pub average: [f64; THRESHOLDS],
}

impl ClassCurves {
    pub fn f1(&self, at: usize) -> f64 {
        let (p, r) = (self.precision[at], self.recall[at]);
        2.0 * p * r / (p + r + EPS)
    }

    /// Mean over the thresholds.
    pub fn mean(&self) -> f64 {
        self.average.iter().sum::<f64>() / THRESHOLDS as f64
    }
}

/// Curves of all classes that have labelled objects, and values at the confidence of the best mean F1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    pub classes: Vec<ClassCurves>,
    /// Place of that confidence on the curves.
    pub best: usize,
}

impl Curves {
    /// `objects`: labelled objects of each class.
    pub fn new(judged: &[Judged], objects: &[u64]) -> Self {
        let mut by_class: Vec<Vec<Judged>> = vec![Vec::new(); objects.len()];
        for one in judged {
            if let Some(list) = by_class.get_mut(usize::from(one.class)) {
                list.push(*one);
            }
        }
        let present = by_class.into_iter().zip(objects).enumerate().filter(|(_, (_, objects))| **objects > 0);
        let classes: Vec<_> = present.map(|(class, (list, objects))| of_class(class, list, *objects)).collect();
        let best = best_f1(&classes);
        Self { classes, best }
    }

    /// Mean over the classes; 0 without any.
    pub fn mean(&self, of: impl Fn(&ClassCurves) -> f64) -> f64 {
        self.classes.iter().map(of).sum::<f64>() / self.classes.len().max(1) as f64
    }

    pub fn precision(&self) -> f64 {
        self.mean(|class| class.precision[self.best])
    }

    pub fn recall(&self) -> f64 {
        self.mean(|class| class.recall[self.best])
    }

    pub fn map50(&self) -> f64 {
        self.mean(|class| class.average[0])
    }

    pub fn map50_95(&self) -> f64 {
        self.mean(ClassCurves::mean)
    }
}

/// Confidence at a place of the curves.
pub fn confidence(at: usize) -> f64 {
    at as f64 / (POINTS - 1) as f64
}

fn of_class(class: usize, mut list: Vec<Judged>, objects: u64) -> ClassCurves {
    list.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    let mut curves = ClassCurves {
        class,
        objects,
        precision: vec![0.0; POINTS],
        recall: vec![0.0; POINTS],
        by_recall: vec![0.0; POINTS],
        average: [0.0; THRESHOLDS],
    };
    if list.is_empty() {
        return curves;
    }
    let falling: Vec<f64> = list.iter().map(|one| -f64::from(one.confidence)).collect();
    for threshold in 0..THRESHOLDS {
        let (recall, precision) = running(&list, threshold, objects);
        let envelope = Envelope::new(&recall, &precision);
        curves.average[threshold] = envelope.average();
        if threshold == 0 {
            let read =
                |ys: &[f64], left: f64| (0..POINTS).map(|at| interp(-confidence(at), &falling, ys, left)).collect();
            (curves.recall, curves.precision) = (read(&recall, 0.0), read(&precision, 1.0));
            curves.by_recall = (0..POINTS).map(|at| envelope.at(confidence(at))).collect();
        }
    }
    curves
}

/// Recall and precision after each detection.
fn running(list: &[Judged], threshold: usize, objects: u64) -> (Vec<f64>, Vec<f64>) {
    let mut right = 0.0;
    let after = |(at, one): (usize, &Judged)| {
        right += f64::from(one.right >> threshold & 1);
        (right / (objects as f64 + EPS), right / (at + 1) as f64)
    };
    list.iter().enumerate().map(after).unzip()
}

/// The best precision at a recall or beyond it.
struct Envelope {
    recall: Vec<f64>,
    precision: Vec<f64>,
}

impl Envelope {
    /// Between recall 0 with precision 1, and the last recall, from where on it is 0.
    fn new(recall: &[f64], precision: &[f64]) -> Self {
        let last = recall.last().copied().unwrap_or(1.0);
        let recall: Vec<f64> = [&[0.0], recall, &[last, 1.0]].concat();
        let mut precision: Vec<f64> = [&[1.0], precision, &[0.0, 0.0]].concat();
        for at in (0..precision.len() - 1).rev() {
            precision[at] = precision[at].max(precision[at + 1]);
        }
        Self { recall, precision }
    }

    fn at(&self, recall: f64) -> f64 {
        interp(recall, &self.recall, &self.precision, self.precision[0])
    }

    /// Area under it, by trapezes between [`RECALLS`] points.
    fn average(&self) -> f64 {
        let at = |point: usize| point as f64 / (RECALLS - 1) as f64;
        let height = |point: usize| self.at(at(point));
        let strip = |point: usize| (at(point) - at(point - 1)) * (height(point) + height(point - 1)) / 2.0;
        (1..RECALLS).map(strip).sum()
    }
}

/// The line through the points `(xs, ys)` at `x`, as `numpy.interp`: xs do not fall; of equal ones the last counts; `left`
/// before the first, the last value behind the last.
fn interp(x: f64, xs: &[f64], ys: &[f64], left: f64) -> f64 {
    let next = xs.partition_point(|other| *other <= x);
    if next == 0 {
        return left;
    }
    let at = next - 1;
    if next == xs.len() {
        return ys[at];
    }
    let slope = (ys[next] - ys[at]) / (xs[next] - xs[at]);
    slope * (x - xs[at]) + ys[at]
}

/// Place of the largest mean F1 after smoothing; the first of several.
fn best_f1(classes: &[ClassCurves]) -> usize {
    if classes.is_empty() {
        return 0;
    }
    let mean = |at: usize| classes.iter().map(|class| class.f1(at)).sum::<f64>() / classes.len() as f64;
    let smooth = smoothed(&(0..POINTS).map(mean).collect::<Vec<_>>(), SMOOTHED);
    let better = |best: usize, at: usize| if smooth[at] > smooth[best] { at } else { best };
    (0..smooth.len()).fold(0, better)
}

/// Mean over a window of this share of the curve, whose ends are continued with their value.
fn smoothed(values: &[f64], share: f64) -> Vec<f64> {
    let half = ((values.len() as f64 * share * 2.0).round_ties_even() as usize / 2).div_ceil(2);
    let window = (2 * half + 1) as f64;
    let at = |place: isize| values[place.clamp(0, values.len() as isize - 1) as usize];
    let mean = |place: usize| {
        let (from, to) = (place as isize - half as isize, place as isize + half as isize);
        (from..=to).map(at).sum::<f64>() / window
    };
    (0..values.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(list: &[(f32, u16, bool)]) -> Vec<Judged> {
        let one = |(confidence, class, right): &(f32, u16, bool)| Judged {
            confidence: *confidence,
            class: *class,
            right: if *right { (1 << THRESHOLDS) - 1 } else { 0 },
        };
        list.iter().map(one).collect()
    }

    fn average(list: &[(f32, u16, bool)], objects: u64) -> f64 {
        Curves::new(&judged(list), &[objects]).map50()
    }

    /// Source: TASKS 2.7.15.
    #[test]
    fn averages_of_small_curves() {
        assert!((average(&[(0.9, 0, true), (0.8, 0, true)], 2) - 0.995).abs() < 1e-9, "a perfect class");
        assert!((average(&[(0.9, 0, true)], 2) - 0.495).abs() < 1e-9, "it drops to 0 behind the last recall");
        assert_eq!(average(&[], 3), 0.0);
        assert_eq!(average(&[(0.9, 0, false)], 3), 0.0);
    }

    #[test]
    fn classes_without_objects_do_not_count() {
        let list = judged(&[(0.9, 0, true), (0.8, 1, false), (0.7, 7, true)]);
        let curves = Curves::new(&list, &[1, 0, 2]);
        assert_eq!(curves.classes.iter().map(|class| class.class).collect::<Vec<_>>(), [0, 2]);
        assert!((curves.map50() - 0.995 / 2.0).abs() < 1e-9);
        assert_eq!(Curves::new(&list, &[0, 0]).map50(), 0.0);
    }

    #[test]
    fn precision_and_recall_are_read_where_f1_is_best() {
        let list = judged(&[(0.9, 0, true), (0.8, 0, true), (0.3, 0, false), (0.2, 0, false)]);
        let curves = Curves::new(&list, &[2]);
        assert!(curves.precision() > 0.95 && (curves.recall() - 1.0).abs() < 1e-9);
        assert!((0.7..0.8).contains(&confidence(curves.best)), "{}", confidence(curves.best));
        // Above every confidence nothing is found, and nothing is wrong.
        assert_eq!((curves.classes[0].recall[999], curves.classes[0].precision[999]), (0.0, 1.0));
    }

    #[test]
    fn lines_are_numpys() {
        let (xs, ys) = ([0.0, 1.0, 1.0, 3.0], [0.0, 10.0, 20.0, 40.0]);
        for (x, y) in [(-1.0, 5.0), (0.0, 0.0), (0.5, 5.0), (1.0, 20.0), (2.0, 30.0), (3.0, 40.0), (9.0, 40.0)] {
            assert_eq!(interp(x, &xs, &ys, 5.0), y, "{x}");
        }
        assert_eq!(smoothed(&[1.0; 20], 0.1), [1.0; 20]);
    }
}
