//! Which noise step a training sample gets.
//!
//! `loss-second-moment` draws a step in proportion to the root mean square of its last [`KEPT`] losses, mixed with [`UNIFORM`] of a
//! uniform draw, once every step has that many; each loss is weighted by 1 / (T p), so that the mean stays the same.
//! The published program needs a process group for it; here every rank hears every rank's losses and one rank is a group too.

use crate::task::cell::stream;
use crate::task::draw::Draws;
use spec::task::cell::ScheduleSampler;
use tch::{Device, Kind, Tensor};

/// Losses kept per step.
pub const KEPT: usize = 10;
/// Share of the uniform distribution.
const UNIFORM: f64 = 0.001;

/// The distribution of steps.
pub struct StepChoice {
    sampler: ScheduleSampler,
    steps: usize,
    /// Last losses of each step, oldest first: `[T × KEPT]`, and how many there are.
    losses: Vec<f32>,
    counts: Vec<u8>,
    device: Device,
    /// Cumulative distribution and weights on the device, f64 and f32 `[T]`; `None` means uniform.
    learned: Option<(Tensor, Tensor)>,
}

impl StepChoice {
    pub fn new(sampler: ScheduleSampler, steps: usize, device: Device) -> Self {
        let (losses, counts) = (vec![0.0; steps * KEPT], vec![0; steps]);
        Self { sampler, steps, losses, counts, device, learned: None }
    }

    /// Steps `[B]`, i64, and weights of their losses `[B]`, f32. Without `learned`, uniformly: for evaluation.
    pub fn draw(&self, draws: &Draws, learned: bool) -> (Tensor, Tensor) {
        let u = draws.uniform(stream::STEP);
        match self.learned.as_ref().filter(|_| learned) {
            Some((cumulative, weights)) => {
                let t =
                    u.searchsorted::<Tensor>(cumulative, false, true, "right", None).clamp_max(self.steps as i64 - 1);
                let weights = weights.index_select(0, &t);
                (t, weights)
            }
            None => {
                let t = (u * self.steps as f64).floor().to_kind(Kind::Int64);
                let weights = t.ones_like().to_kind(Kind::Float);
                (t, weights)
            }
        }
    }

    /// True if losses are to be heard.
    pub fn listens(&self) -> bool {
        self.sampler == ScheduleSampler::LossSecondMoment
    }

    /// Takes the unweighted losses of a whole step of training, of all ranks: pairs of step and loss. They are taken in an
    /// order that depends on their values alone, so that the same samples on another number of ranks lead to the same
    /// distribution.
    pub fn hear(&mut self, mut pairs: Vec<(usize, f32)>) {
        if !self.listens() {
            return;
        }
        pairs.retain(|(t, loss)| *t < self.steps && loss.is_finite());
        pairs.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        for (t, loss) in pairs {
            let kept = &mut self.losses[t * KEPT..(t + 1) * KEPT];
            let count = &mut self.counts[t];
            if usize::from(*count) == KEPT {
                kept.rotate_left(1);
                kept[KEPT - 1] = loss;
            } else {
                kept[usize::from(*count)] = loss;
                *count += 1;
            }
        }
        self.learn();
    }

    /// Probability of each step.
    pub fn probabilities(&self) -> Vec<f64> {
        let uniform = 1.0 / self.steps as f64;
        if !self.listens() || self.counts.iter().any(|&count| usize::from(count) < KEPT) {
            return vec![uniform; self.steps];
        }
        let square = |loss: &f32| f64::from(*loss) * f64::from(*loss);
        let root = |kept: &[f32]| (kept.iter().map(square).sum::<f64>() / KEPT as f64).sqrt();
        let weights: Vec<f64> = self.losses.chunks(KEPT).map(root).collect();
        let sum: f64 = weights.iter().sum();
        // Losses of zero say nothing about the steps.
        if sum <= 0.0 {
            return vec![uniform; self.steps];
        }
        weights.iter().map(|weight| weight / sum * (1.0 - UNIFORM) + uniform * UNIFORM).collect()
    }

    fn learn(&mut self) {
        if self.counts.iter().any(|&count| usize::from(count) < KEPT) {
            return;
        }
        let p = self.probabilities();
        let total: f64 = p.iter().sum();
        let sums = p.iter().scan(0.0, |sum, p| {
            *sum += p / total;
            Some(*sum)
        });
        let cumulative: Vec<f64> = sums.collect();
        let weights: Vec<f32> = p.iter().map(|p| (1.0 / (self.steps as f64 * p / total)) as f32).collect();
        let tensors = (Tensor::from_slice(&cumulative), Tensor::from_slice(&weights));
        self.learned = Some((tensors.0.to_device(self.device), tensors.1.to_device(self.device)));
    }

    /// State for a checkpoint: losses `[T, KEPT]` f32 and counts `[T]` i64.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        if !self.listens() {
            return Vec::new();
        }
        let counts: Vec<i64> = self.counts.iter().map(|&count| i64::from(count)).collect();
        let losses = Tensor::from_slice(&self.losses).view([self.steps as i64, KEPT as i64]);
        vec![("step_losses".into(), losses), ("step_loss_counts".into(), Tensor::from_slice(&counts))]
    }

    /// Takes the state of a checkpoint.
    ///
    /// # Errors
    /// It is of another number of steps.
    pub fn restore(&mut self, saved: &[(String, Tensor)]) -> Result<(), String> {
        let find = |name: &str| saved.iter().find(|(saved, _)| saved == name).map(|(_, tensor)| tensor);
        let (Some(losses), Some(counts)) = (find("step_losses"), find("step_loss_counts")) else { return Ok(()) };
        if losses.size() != [self.steps as i64, KEPT as i64] || counts.size() != [self.steps as i64] {
            let shape = losses.size();
            return Err(format!(
                "step_losses has shape {shape:?}, expected [{}, {KEPT}]: another cell.diffusion",
                self.steps
            ));
        }
        let read = |error: tch::TchError| error.to_string();
        self.losses = Vec::try_from(losses.flatten(0, -1).to_kind(Kind::Float)).map_err(read)?;
        let counts = Vec::<i64>::try_from(counts).map_err(read)?;
        self.counts = counts.iter().map(|&count| count.clamp(0, KEPT as i64) as u8).collect();
        self.learn();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(steps: usize) -> StepChoice {
        StepChoice::new(ScheduleSampler::LossSecondMoment, steps, Device::Cpu)
    }

    fn draws(count: i64) -> Draws {
        Draws::new(1, 0, Tensor::arange(count, (Kind::Int64, Device::Cpu)))
    }

    fn fill(choice: &mut StepChoice, losses: &[f32]) {
        for _ in 0..KEPT {
            choice.hear(losses.iter().copied().enumerate().collect());
        }
    }

    #[test]
    fn uniform_until_every_step_has_ten_losses() {
        let mut choice = choice(4);
        for _ in 0..KEPT {
            choice.hear(vec![(0, 5.0), (1, 1.0), (2, 1.0)]);
        }
        assert_eq!(choice.probabilities(), [0.25; 4]);
        let (t, weights) = choice.draw(&draws(1000), true);
        assert_eq!(Vec::<f32>::try_from(weights).unwrap(), [1.0; 1000]);
        let counts = Vec::<i64>::try_from(t.bincount::<Tensor>(None, 4)).unwrap();
        assert!(counts.iter().all(|count| (200..300).contains(count)), "{counts:?}");
    }

    #[test]
    fn steps_with_larger_losses_are_drawn_more_often_and_weighted_less() {
        let mut choice = choice(4);
        fill(&mut choice, &[4.0, 2.0, 1.0, 1.0]);
        let p = choice.probabilities();
        for (p, expected) in p.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((p - (expected * 0.999 + 0.25 * 0.001)).abs() < 1e-12, "{p}");
        }
        let (t, weights) = choice.draw(&draws(20_000), true);
        let counts = Vec::<i64>::try_from(t.bincount::<Tensor>(None, 4)).unwrap();
        for (count, p) in counts.iter().zip(&p) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.012, "{counts:?}");
        }
        // E[weight] is 1: the mean of the loss stays what it is.
        assert!((weights.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.02);
        let evaluated = choice.draw(&draws(8), false).1;
        assert_eq!(Vec::<f32>::try_from(evaluated).unwrap(), [1.0; 8]);
    }

    /// The last ten losses count, in whatever order ranks hand them over.
    #[test]
    fn old_losses_leave_and_the_order_of_ranks_does_not_matter() {
        let (mut one, mut two) = (choice(2), choice(2));
        let losses: Vec<(usize, f32)> = (0..26).map(|n| (n % 2, n as f32)).collect();
        one.hear(losses.clone());
        two.hear(losses.into_iter().rev().collect());
        assert_eq!(one.probabilities(), two.probabilities());
        // Of step 0: 0, 2, … 24; the last ten are 6 … 24.
        assert_eq!(one.losses[..KEPT], [6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0]);
    }

    #[test]
    fn state_survives_a_checkpoint_and_another_length_is_refused() {
        let mut choice = choice(3);
        fill(&mut choice, &[3.0, 1.0, 2.0]);
        let mut other = self::choice(3);
        other.restore(&choice.state()).unwrap();
        assert_eq!(other.probabilities(), choice.probabilities());
        assert_eq!(other.draw(&draws(64), true).0, choice.draw(&draws(64), true).0);
        assert!(self::choice(4).restore(&choice.state()).unwrap_err().contains("expected [4, 10]"));
    }

    #[test]
    fn losses_of_no_use_change_nothing() {
        let mut choice = choice(2);
        choice.hear(vec![(7, 1.0), (0, f32::NAN)]);
        assert_eq!(choice.counts, [0, 0]);
        fill(&mut choice, &[0.0, 0.0]);
        assert_eq!(choice.probabilities(), [0.5, 0.5]);
    }
}
