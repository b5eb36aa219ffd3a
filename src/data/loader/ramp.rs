//! Steps at the beginning of training that accumulate fewer batches than later ones.

use std::sync::Arc;

/// Sizes of the steps of the first epochs (`train.warmup_accumulation`); by default all steps are alike.
///
/// Batches of the warm-up are counted from 0. At batch `n` of `N`, a step is to hold `1 + (A - 1) · n / N` batches, rounded
/// to the nearest whole number (half to even), and it ends with the first batch that makes it so long. A step never crosses
/// the end of an epoch: what is left there is dropped, as in any epoch.
#[derive(Clone, Debug, Default)]
pub struct Ramp {
    /// Samples of one batch over the whole job.
    unit: u64,
    /// For each of the first epochs, batches before each step, and after the last.
    epochs: Arc<Vec<Vec<u64>>>,
}

impl Ramp {
    /// For epochs of `len` samples and steps of `global_batch`, which is a multiple of `accumulation`; over `warmup`
    /// batches.
    pub fn new(len: u64, global_batch: u64, accumulation: u64, warmup: u64) -> Self {
        let unit = global_batch / accumulation.max(1);
        if accumulation <= 1 || warmup == 0 || unit == 0 || len < global_batch {
            return Self::default();
        }
        let wanted = |batch: u64| {
            let share = batch.min(warmup) as f64 / warmup as f64;
            (1.0 + (accumulation - 1) as f64 * share).round_ties_even() as u64
        };
        let (mut epochs, mut done) = (Vec::new(), 0);
        while done <= warmup {
            let mut starts = vec![0];
            let mut at = 0;
            loop {
                let mut batches = 1;
                while batches < wanted(done + at + batches - 1) {
                    batches += 1;
                }
                if (at + batches) * unit > len {
                    break;
                }
                at += batches;
                starts.push(at);
            }
            done += at;
            epochs.push(starts);
        }
        Self { unit, epochs: Arc::new(epochs) }
    }

    /// Steps of each of the first epochs; empty where all are alike.
    pub fn steps(&self) -> Vec<u64> {
        self.epochs.iter().map(|starts| starts.len() as u64 - 1).collect()
    }

    /// First sample and number of samples of a step; `None` in later epochs, whose steps are alike.
    pub(super) fn samples(&self, epoch: u64, step: u64) -> Option<(u64, u64)> {
        let starts = self.epochs.get(usize::try_from(epoch).ok()?)?;
        let at = |index: u64| starts.get(index as usize).or(starts.last()).copied().unwrap_or(0) * self.unit;
        Some((at(step), at(step + 1) - at(step)))
    }

    /// Batches of all steps before this one, from the beginning of training; `None` without a ramp. `full`: batches of each
    /// later step, `per_epoch`: later steps of an epoch.
    pub fn batches_before(&self, epoch: u64, step: u64, full: u64, per_epoch: u64) -> Option<u64> {
        if self.epochs.is_empty() {
            return None;
        }
        let count = self.epochs.len() as u64;
        let whole: u64 = self.epochs.iter().take(epoch as usize).filter_map(|starts| starts.last()).sum();
        Some(match self.epochs.get(epoch as usize) {
            Some(starts) => whole + starts.get(step as usize).or(starts.last()).copied().unwrap_or(0),
            None => whole + ((epoch - count) * per_epoch + step) * full,
        })
    }
}

/// Epoch and step in it of optimizer step `step`. `early`: steps of the first epochs; later ones have `per_epoch`.
pub fn locate(step: u64, per_epoch: u64, early: &[u64]) -> (u64, u64) {
    let mut left = step;
    for (epoch, steps) in early.iter().enumerate() {
        if left < *steps {
            return (epoch as u64, left);
        }
        left -= steps;
    }
    let later = (left.checked_div(per_epoch).unwrap_or(0), left.checked_rem(per_epoch).unwrap_or(0));
    (early.len() as u64 + later.0, later.1)
}

/// Steps of the first `epochs` epochs.
pub fn steps_of(epochs: u64, per_epoch: u64, early: &[u64]) -> u64 {
    let first: u64 = early.iter().take(usize::try_from(epochs).unwrap_or(usize::MAX)).sum();
    epochs.saturating_sub(early.len() as u64).saturating_mul(per_epoch).saturating_add(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_found_in_epochs_of_different_length() {
        let all: Vec<_> = (0..9).map(|step| locate(step, 2, &[3, 1])).collect();
        assert_eq!(all, [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]);
        assert_eq!((0..5).map(|epochs| steps_of(epochs, 2, &[3, 1])).collect::<Vec<_>>(), [0, 3, 4, 6, 8]);
        assert_eq!((locate(7, 3, &[]), steps_of(u64::MAX, 3, &[]), locate(7, 0, &[])), ((2, 1), u64::MAX, (0, 0)));
    }

    /// Batches of each step of an epoch.
    fn sizes(ramp: &Ramp, epoch: usize) -> Vec<u64> {
        ramp.epochs[epoch].windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Reference: `if ni - last >= accumulate` with `np.interp`, as Ultralytics' loop has it, cut at epochs.
    #[test]
    fn steps_grow_as_in_a_loop_over_batches() {
        let (accumulation, warmup, batches) = (4_u64, 11_u64, 14_u64);
        let ramp = Ramp::new(batches * 3 + 2, 3 * accumulation, accumulation, warmup);
        let mut expected = Vec::new();
        let mut last = -1_i64;
        for ni in 0..batches as i64 {
            let wanted = (1.0 + 3.0 * (ni.min(11) as f64) / 11.0).round_ties_even() as i64;
            if ni - last >= wanted {
                expected.push((ni - last) as u64);
                last = ni;
            }
        }
        assert_eq!(sizes(&ramp, 0), expected);
        assert_eq!(expected, [1, 1, 2, 2, 3, 4], "the one batch that is left does not fill a step");
        assert_eq!(ramp.steps(), [6], "the second epoch has steps of four batches, as all later ones");
    }

    #[test]
    fn samples_follow_each_other_and_batches_are_counted_over_epochs() {
        let ramp = Ramp::new(20, 8, 4, 14);
        assert_eq!((sizes(&ramp, 0), sizes(&ramp, 1)), (vec![1, 1, 1, 2, 2, 3], vec![4, 4]));
        let all: Vec<_> = (0..6).map(|step| ramp.samples(0, step).unwrap()).collect();
        assert_eq!(all, [(0, 2), (2, 2), (4, 2), (6, 4), (10, 4), (14, 6)]);
        assert_eq!((ramp.samples(1, 1), ramp.samples(2, 0)), (Some((8, 8)), None));
        let before = |epoch, step| ramp.batches_before(epoch, step, 4, 2).unwrap();
        assert_eq!([before(0, 0), before(0, 4), before(1, 1), before(2, 1), before(3, 0)], [0, 5, 14, 22, 26]);
        for none in [Ramp::new(20, 8, 1, 14), Ramp::new(20, 8, 4, 0), Ramp::default()] {
            assert!(none.steps().is_empty() && none.samples(0, 0).is_none());
            assert!(none.batches_before(1, 0, 4, 2).is_none());
        }
    }
}
