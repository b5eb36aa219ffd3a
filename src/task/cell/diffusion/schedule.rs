//! The noise schedule, in f64; tables leave as f32.
//!
//! Schedules in f32, as a fork of the public program has them, are off by 1e-3 in `√(1/ᾱ − 1)` of the cosine schedule and divide by
//! zero at its end.

use spec::task::cell::{CellDiffusion, NoiseSchedule, respace};
use std::f64::consts::FRAC_PI_2;

/// Largest β of the cosine schedule.
const LARGEST: f64 = 0.999;

/// Coefficients of every kept noise step, index 0 the least noise.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Number of each kept step among all of them.
    pub places: Vec<usize>,
    /// All steps, kept or not.
    pub all: usize,
    pub betas: Vec<f64>,
    /// ᾱ, the product of all 1 − β up to and with this step.
    pub alpha_bar: Vec<f64>,
    /// ᾱ of the step before; 1 at the first.
    pub alpha_bar_before: Vec<f64>,
}

impl Schedule {
    /// # Errors
    /// `timestep_respacing` cannot be followed.
    pub fn new(keys: &CellDiffusion) -> Result<Self, String> {
        let base = cumulative(&betas(keys.noise_schedule, keys.steps));
        let places = respace::kept_steps(keys.steps, &keys.timestep_respacing)?;
        let mut before = 1.0;
        let kept = |&place: &usize| {
            let beta = 1.0 - base[place] / before;
            before = base[place];
            beta
        };
        let betas: Vec<f64> = places.iter().map(kept).collect();
        let alpha_bar = cumulative(&betas);
        let alpha_bar_before = std::iter::once(1.0).chain(alpha_bar.iter().copied()).take(betas.len()).collect();
        Ok(Self { places, all: keys.steps, betas, alpha_bar, alpha_bar_before })
    }

    /// Kept steps.
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    pub fn is_empty(&self) -> bool {
        self.betas.is_empty()
    }

    /// `act` of every step's β, ᾱ and ᾱ of the step before.
    pub fn table(&self, act: impl Fn(f64, f64, f64) -> f64) -> Vec<f64> {
        let steps = self.betas.iter().zip(&self.alpha_bar).zip(&self.alpha_bar_before);
        steps.map(|((&beta, &bar), &before)| act(beta, bar, before)).collect()
    }

    /// Variance of `q(x_{t−1} | x_t, x_0)`; 0 at the first step.
    pub fn posterior_variance(&self) -> Vec<f64> {
        self.table(|beta, bar, before| beta * (1.0 - before) / (1.0 - bar))
    }

    /// Its logarithm, the first step's taken from the second.
    pub fn posterior_log_variance(&self) -> Vec<f64> {
        first_from_second(self.posterior_variance()).into_iter().map(f64::ln).collect()
    }

    /// The fixed variance of a sampling step: β, or the posterior's where `small`. At the first step the large one is the
    /// posterior's of the second.
    pub fn fixed_variance(&self, small: bool) -> Vec<f64> {
        let posterior = self.posterior_variance();
        if small {
            return posterior;
        }
        let mut large = self.betas.clone();
        if let (Some(first), Some(&second)) = (large.first_mut(), posterior.get(1)) {
            *first = second;
        }
        large
    }
}

/// β of every step.
pub fn betas(kind: NoiseSchedule, steps: usize) -> Vec<f64> {
    match kind {
        NoiseSchedule::Linear => {
            let scale = 1000.0 / steps as f64;
            let (first, last) = (scale * 1e-4, scale * 0.02);
            let stride = (last - first) / (steps - 1).max(1) as f64;
            (0..steps).map(|step| if step + 1 == steps { last } else { first + step as f64 * stride }).collect()
        }
        NoiseSchedule::Cosine => {
            let bar = |step: usize| ((step as f64 / steps as f64 + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
            (0..steps).map(|step| (1.0 - bar(step + 1) / bar(step)).min(LARGEST)).collect()
        }
    }
}

fn cumulative(betas: &[f64]) -> Vec<f64> {
    betas
        .iter()
        .scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        })
        .collect()
}

/// The list with its first value replaced by the second.
pub fn first_from_second(mut values: Vec<f64>) -> Vec<f64> {
    if let [first, second, ..] = values.as_mut_slice() {
        *first = *second;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: NoiseSchedule, steps: usize, respacing: &str) -> Schedule {
        let keys = CellDiffusion {
            steps,
            noise_schedule: kind,
            timestep_respacing: respacing.into(),
            ..CellDiffusion::default()
        };
        Schedule::new(&keys).unwrap()
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12 * b.abs().max(1e-12), "{a} is not {b}");
    }

    /// Values of numpy's `linspace` and `cumprod` in f64.
    #[test]
    fn linear_and_cosine_schedules_have_the_published_values() {
        let linear = schedule(NoiseSchedule::Linear, 1000, "");
        close(linear.betas[0], 1e-4);
        close(linear.betas[999], 0.02);
        assert!((linear.alpha_bar[999] - 4.035_829_765_29e-5).abs() < 1e-14, "{:e}", linear.alpha_bar[999]);
        let short = schedule(NoiseSchedule::Linear, 100, "");
        close(short.betas[0], 1e-3);
        close(short.betas[99], 0.2);
        let cosine = schedule(NoiseSchedule::Cosine, 1000, "");
        close(cosine.betas[999], 0.999);
        assert!((cosine.betas[0] - 4.128_422_482_197e-5).abs() < 1e-16, "{:e}", cosine.betas[0]);
    }

    /// Defect of the fork: f32 arithmetic lost the last steps of the cosine schedule to a division by zero.
    #[test]
    fn every_coefficient_of_the_cosine_schedule_is_finite() {
        let cosine = schedule(NoiseSchedule::Cosine, 1000, "");
        let inverse = cosine.table(|_, bar, _| (1.0 / bar - 1.0).sqrt());
        assert!(inverse.iter().all(|value| (*value as f32).is_finite() && *value > 0.0));
        assert!(cosine.posterior_log_variance().iter().all(|value| value.is_finite()));
    }

    /// A respaced process visits the same ᾱ.
    #[test]
    fn respacing_keeps_the_noise_of_the_kept_steps() {
        let (all, some) = (schedule(NoiseSchedule::Linear, 1000, ""), schedule(NoiseSchedule::Linear, 1000, "ddim50"));
        assert_eq!(some.len(), 50);
        for (index, &place) in some.places.iter().enumerate() {
            close(some.alpha_bar[index], all.alpha_bar[place]);
        }
    }

    #[test]
    fn fixed_variance_starts_with_the_posterior_of_the_second_step() {
        let schedule = schedule(NoiseSchedule::Linear, 1000, "");
        let (large, posterior) = (schedule.fixed_variance(false), schedule.posterior_variance());
        assert_eq!(posterior[0], 0.0);
        assert_eq!(large[0], posterior[1]);
        assert_eq!(large[1..], schedule.betas[1..]);
        close(schedule.posterior_log_variance()[0], posterior[1].ln());
    }
}
