//! `train.amp: auto`: a few steps with bf16 and a few without, then the faster of the two.
//!
//! Autocast adds casts to every matrix product. A model that is bound by the number of its kernels, not by their size,
//! gets slower with it; so it is measured instead of believed.

use super::TrainError;
use crate::comm::Collective;
use tch::Kind;

/// Steps of either kind before any is timed: they allocate and choose algorithms.
const WARM_UP: usize = 2;
/// Timed steps of either kind.
const TIMED: usize = 5;

/// Steps taken so far, alternately with and without.
#[derive(Debug, Default)]
pub struct AmpTrial {
    /// Seconds of each step: full width, then bf16.
    seconds: [Vec<f64>; 2],
    decided: Option<Option<Kind>>,
}

impl AmpTrial {
    /// Element type of autocast for the next step.
    pub fn kind(&self) -> Option<Kind> {
        let narrow = self.seconds[0].len() > self.seconds[1].len();
        self.decided.unwrap_or(narrow.then_some(Kind::BFloat16))
    }

    pub fn is_over(&self) -> bool {
        self.decided.is_some()
    }

    /// Counts a step that took `seconds`; all ranks call it together. After the last one, a line that says what was
    /// chosen: the kind whose sum over the ranks of median times is smaller.
    ///
    /// # Errors
    /// A peer failed.
    pub fn add(&mut self, seconds: f64, collective: &dyn Collective) -> Result<Option<String>, TrainError> {
        if self.is_over() {
            return Ok(None);
        }
        let narrow = usize::from(self.kind().is_some());
        self.seconds[narrow].push(seconds);
        if self.seconds.iter().any(|list| list.len() < WARM_UP + TIMED) {
            return Ok(None);
        }
        let own = self.seconds.each_ref().map(|list| median(&list[WARM_UP..]));
        let own: Vec<u8> = own.iter().flat_map(|s| s.to_le_bytes()).collect();
        let mut sums = [0.0; 2];
        for rank in collective.all_gather(&own)? {
            for (sum, bytes) in sums.iter_mut().zip(rank.chunks_exact(8)) {
                *sum += bytes.try_into().map_or(f64::INFINITY, f64::from_le_bytes);
            }
        }
        let ms = sums.map(|sum| sum / collective.world_size() as f64 * 1e3);
        let chosen = (sums[1] < sums[0]).then_some(Kind::BFloat16);
        self.decided = Some(chosen);
        let word = if chosen.is_some() { "bf16" } else { "off" };
        Ok(Some(format!("train.amp auto: {word} ({:.2} ms per step without, {:.2} ms with bf16)", ms[0], ms[1])))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Solo;
    use tch::Device;

    /// Runs a trial whose steps take so long; gives the line and the choice.
    fn trial(full: f64, narrow: f64) -> (String, Option<Kind>) {
        let (mut trial, solo) = (AmpTrial::default(), Solo::new(Device::Cpu));
        loop {
            // Warm-up steps take ten times as long and must not count.
            let slow = if trial.seconds.iter().any(|list| list.len() < WARM_UP) { 10.0 } else { 1.0 };
            let seconds = if trial.kind().is_some() { narrow } else { full } * slow;
            if let Some(line) = trial.add(seconds, &solo).unwrap() {
                assert!(trial.is_over() && trial.add(1.0, &solo).unwrap().is_none());
                return (line, trial.kind());
            }
        }
    }

    #[test]
    fn the_faster_kind_is_kept_and_told() {
        assert_eq!(trial(0.002, 0.003).1, None);
        let (line, kind) = trial(0.003, 0.002);
        assert_eq!(kind, Some(Kind::BFloat16));
        assert_eq!(line, "train.amp auto: bf16 (3.00 ms per step without, 2.00 ms with bf16)");
    }
}
