//! How optimizer steps make up batches and epochs.

use crate::data::loader::{BatchPlanner, Ramp, locate, steps_of};

/// Steps, batches and epochs of a run.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    pub steps_per_epoch: u64,
    /// Batches of a step, but for those of the ramp.
    accumulation: u64,
    early: Vec<u64>,
    ramp: Ramp,
}

impl Pace {
    /// All steps alike.
    pub fn even(steps_per_epoch: u64, accumulation: u64) -> Self {
        Self { steps_per_epoch: steps_per_epoch.max(1), accumulation: accumulation.max(1), ..Self::default() }
    }

    /// That of a training run's planner.
    pub fn of(planner: &BatchPlanner, accumulation: u64) -> Self {
        let ramp = planner.cut.ramp.clone();
        Self { early: ramp.steps(), ramp, ..Self::even(planner.steps_per_epoch(), accumulation) }
    }

    /// Steps of the first epochs, where they differ from those of later ones.
    pub fn early(&self) -> &[u64] {
        &self.early
    }

    /// Epoch of a step, from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        locate(step, self.steps_per_epoch, &self.early).0
    }

    /// Steps of so many epochs.
    pub fn steps(&self, epochs: u64) -> u64 {
        steps_of(epochs, self.steps_per_epoch, &self.early)
    }

    /// Number of the last batch of a step, counted from 0 at the beginning of training.
    pub fn last_batch(&self, step: u64) -> u64 {
        let (epoch, within) = locate(step, self.steps_per_epoch, &self.early);
        let before = self.ramp.batches_before(epoch, within + 1, self.accumulation, self.steps_per_epoch);
        before.unwrap_or_else(|| (step + 1).saturating_mul(self.accumulation)).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_counted_over_steps_of_different_size() {
        let even = Pace::even(10, 3);
        assert_eq!([even.last_batch(0), even.last_batch(9), even.last_batch(10)], [2, 29, 32]);
        // As in the test of the ramp: 1, 1, 1, 2, 2, 3 batches in the first epoch, then 4, 4 in each.
        let ramp = Ramp::new(20, 8, 4, 14);
        let pace = Pace { early: ramp.steps(), ramp, ..Pace::even(2, 4) };
        let last: Vec<_> = (0..11).map(|step| pace.last_batch(step)).collect();
        assert_eq!(last, [0, 1, 2, 4, 6, 9, 13, 17, 21, 25, 29]);
        assert_eq!([pace.epoch(5), pace.epoch(6), pace.epoch(8), pace.steps(3)], [0, 1, 2, 10]);
    }
}
