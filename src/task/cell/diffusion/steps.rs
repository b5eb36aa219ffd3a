//! Which noise step a training sample gets.
//!
//! `loss-second-moment` draws a step in proportion to the root mean square of its last [`KEPT`] losses, mixed with [`UNIFORM`] of a
//! uniform draw, once every step has that many; each loss is weighted by 1 / (T p), so that the mean stays the same.
//! The published program needs a process group for it; here every rank gets every rank's losses, and one rank is a group too.

use crate::task::cell::stream;
use crate::task::draw::Draws;
use spec::task::cell::ScheduleSampler;
use tch::{Device, Kind, Tensor, no_grad};

/// Losses kept per step.
pub const KEPT: i64 = 10;
/// Share of the uniform distribution.
const UNIFORM: f64 = 0.001;

/// The distribution of steps. All of it is tensors on the device: no step waits for the host.
pub struct StepChoice {
    steps: i64,
    device: Device,
    history: Option<History>,
}

/// Losses of training.
struct History {
    /// The last losses of each step, a ring: f32 `[T, KEPT]`.
    losses: Tensor,
    /// Losses that each step has had: i64 `[T]`.
    counts: Tensor,
}

impl StepChoice {
    pub fn new(sampler: ScheduleSampler, steps: usize, device: Device) -> Self {
        let steps = steps as i64;
        let history = (sampler == ScheduleSampler::LossSecondMoment).then(|| History {
            losses: Tensor::zeros([steps, KEPT], (Kind::Float, device)),
            counts: Tensor::zeros([steps], (Kind::Int64, device)),
        });
        Self { steps, device, history }
    }

    /// True if losses are to be heard.
    pub fn listens(&self) -> bool {
        self.history.is_some()
    }

    /// Steps `[B]`, i64, and weights of their losses `[B]`, f32. Without `learned`, uniformly: for evaluation.
    pub fn draw(&self, draws: &Draws, learned: bool) -> (Tensor, Tensor) {
        let u = draws.uniform(stream::STEP);
        let last = self.steps - 1;
        if !learned || self.history.is_none() {
            let t = (u * self.steps as f64).floor().to_kind(Kind::Int64).clamp_max(last);
            let weights = t.ones_like().to_kind(Kind::Float);
            return (t, weights);
        }
        no_grad(|| {
            let p = self.probabilities();
            let cumulative = p.cumsum(0, Kind::Double);
            let t = u.searchsorted::<Tensor>(&cumulative, false, true, "right", None).clamp_max(last);
            let weights = (p.index_select(0, &t) * self.steps as f64).reciprocal().to_kind(Kind::Float);
            (t, weights)
        })
    }

    /// Probability of each step, f64 `[T]`.
    pub fn probabilities(&self) -> Tensor {
        let even = 1.0 / self.steps as f64;
        let uniform = Tensor::full([self.steps], even, (Kind::Double, self.device));
        let Some(History { losses, counts }) = &self.history else { return uniform };
        let root = losses.to_kind(Kind::Double).square().mean_dim([1i64].as_slice(), false, Kind::Double).sqrt();
        let sum = root.sum(Kind::Double);
        // Losses of zero say nothing about the steps.
        let warm = counts.min().ge(KEPT).logical_and(&sum.gt(0.0));
        let learned = root / sum * (1.0 - UNIFORM) + UNIFORM * even;
        learned.where_self(&warm, &uniform)
    }

    /// Takes the unweighted losses of a whole step of training, of all ranks in the order of the global batch: f32 `[N, 2]`, step
    /// and loss.
    pub fn hear(&self, values: &Tensor) {
        let Some(History { losses, counts }) = &self.history else { return };
        no_grad(|| {
            let t = values.select(1, 0).round().to_kind(Kind::Int64).clamp(0, self.steps - 1);
            let loss = values.select(1, 1);
            // Of each sample: those of the same step before it, and all of them.
            let same = t.unsqueeze(1).eq_tensor(&t.unsqueeze(0)).to_kind(Kind::Int64);
            let [before, all] = [same.tril(-1), same.shallow_clone()]
                .map(|pairs| pairs.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64));
            let kept = before.ge_tensor(&(all - KEPT)).logical_and(&loss.isfinite());
            let place = (counts.index_select(0, &t) + before).remainder(KEPT) + &t * KEPT;
            // What is not kept goes to a place behind the ring.
            let room = self.steps * KEPT;
            let place = place.where_self(&kept, &place.full_like(room));
            let behind = Tensor::zeros([1], (Kind::Float, self.device));
            let ring = Tensor::cat(&[losses.flatten(0, -1), behind], 0).scatter(0, &place, &loss);
            losses.shallow_clone().copy_(&ring.narrow(0, 0, room).view_as(losses));
            let _ = counts.shallow_clone().scatter_add_(0, &t, &t.ones_like());
        });
    }

    /// Live tensors for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let live = |History { losses, counts }: &History| {
            vec![
                ("step_losses".to_owned(), losses.shallow_clone()),
                ("step_loss_counts".to_owned(), counts.shallow_clone()),
            ]
        };
        self.history.as_ref().map(live).unwrap_or_default()
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

    fn pairs(losses: &[(usize, f32)]) -> Tensor {
        let flat: Vec<f32> = losses.iter().flat_map(|(t, loss)| [*t as f32, *loss]).collect();
        Tensor::from_slice(&flat).view([-1, 2])
    }

    fn fill(choice: &StepChoice, losses: &[f32]) {
        let losses: Vec<(usize, f32)> = losses.iter().copied().enumerate().collect();
        (0..KEPT).for_each(|_| choice.hear(&pairs(&losses)));
    }

    fn p(choice: &StepChoice) -> Vec<f64> {
        Vec::try_from(choice.probabilities()).unwrap()
    }

    fn histogram(t: &Tensor, steps: i64) -> Vec<i64> {
        Vec::try_from(t.bincount::<Tensor>(None, steps)).unwrap()
    }

    #[test]
    fn uniform_until_every_step_has_ten_losses() {
        let choice = choice(4);
        for _ in 0..KEPT {
            choice.hear(&pairs(&[(0, 5.0), (1, 1.0), (2, 1.0)]));
        }
        assert_eq!(p(&choice), [0.25; 4]);
        let (t, weights) = choice.draw(&draws(1000), true);
        assert_eq!(Vec::<f32>::try_from(weights).unwrap(), [1.0; 1000]);
        let counts = histogram(&t, 4);
        assert!(counts.iter().all(|count| (200..300).contains(count)), "{counts:?}");
    }

    #[test]
    fn steps_with_larger_losses_are_drawn_more_often_and_weighted_less() {
        let choice = choice(4);
        fill(&choice, &[4.0, 2.0, 1.0, 1.0]);
        let p = p(&choice);
        for (p, expected) in p.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((p - (expected * 0.999 + 0.25 * 0.001)).abs() < 1e-12, "{p}");
        }
        let (t, weights) = choice.draw(&draws(20_000), true);
        for (count, p) in histogram(&t, 4).iter().zip(&p) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.012, "{count} for {p}");
        }
        // E[weight] is 1: the mean of the loss stays what it is.
        assert!((weights.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.02);
        let evaluated = choice.draw(&draws(8), false).1;
        assert_eq!(Vec::<f32>::try_from(evaluated).unwrap(), [1.0; 8]);
    }

    /// The last ten of each step count, also where one batch brings more than ten, and sample by sample as in one batch.
    #[test]
    fn the_last_ten_losses_of_a_step_count_however_batches_are_cut() {
        let losses: Vec<(usize, f32)> = (0..34).map(|n| (n % 2, n as f32 + 1.0)).collect();
        let (whole, parts) = (choice(2), choice(2));
        whole.hear(&pairs(&losses));
        losses.chunks(5).for_each(|part| parts.hear(&pairs(part)));
        assert_eq!(p(&whole), p(&parts));
        let root = |first: i32| (0..10).map(|n| f64::from(first - 2 * n).powi(2)).sum::<f64>().sqrt();
        let share = root(33) / (root(33) + root(34)) * 0.999 + 0.0005;
        assert!((p(&whole)[0] - share).abs() < 1e-7, "{} is not {share}", p(&whole)[0]);
    }

    /// A resumed run copies saved values into the live tensors.
    #[test]
    fn state_copied_into_live_tensors_gives_the_same_draws() {
        let (one, two) = (choice(3), choice(3));
        fill(&one, &[3.0, 1.0, 2.0]);
        for ((_, live), (_, saved)) in two.state().iter().zip(one.state()) {
            live.shallow_clone().copy_(&saved);
        }
        assert_eq!(p(&one), p(&two));
        assert_eq!(one.draw(&draws(64), true).0, two.draw(&draws(64), true).0);
        assert!(StepChoice::new(ScheduleSampler::Uniform, 3, Device::Cpu).state().is_empty());
    }

    #[test]
    fn losses_of_no_use_change_no_distribution() {
        let choice = choice(2);
        fill(&choice, &[0.0, 0.0]);
        assert_eq!(p(&choice), [0.5, 0.5]);
        fill(&choice, &[1.0, 3.0]);
        let before = p(&choice);
        choice.hear(&pairs(&[(0, f32::NAN)]));
        assert_eq!(p(&choice), before);
    }
}
