//! The diffusion process: noising, what a network's output means, and the losses.
//!
//! Vectors are latents `[B, L]` in f32; `t` (`[B]`, i64) numbers the kept steps. Coefficients are looked up in tables that were
//! computed in f64.

use super::schedule::Schedule;
use spec::task::cell::CellDiffusion;
use std::f64::consts::{LN_2, PI};
use tch::{Device, Kind, Tensor};

/// A network: noised latents and the time it is to see, to its output.
pub type Network<'a> = dyn Fn(&Tensor, &Tensor) -> Tensor + 'a;

/// Process and loss as a config describes them, on one device.
pub struct Diffusion {
    keys: CellDiffusion,
    /// Number of each kept step among all of them.
    places: Vec<usize>,
    tables: Tables,
}

/// Coefficients of every step, `[T]` f32.
struct Tables {
    /// The step's number among all steps, i64; and the time that the network sees.
    place: Tensor,
    time: Tensor,
    /// √ᾱ and √(1 − ᾱ).
    signal: Tensor,
    noise: Tensor,
    /// √(1/ᾱ) and √(1/ᾱ − 1).
    inverse: Tensor,
    inverse_noise: Tensor,
    bar: Tensor,
    bar_before: Tensor,
    /// Mean of `q(x_{t−1} | x_t, x_0)`: shares of x_0 and x_t.
    mean_x0: Tensor,
    mean_xt: Tensor,
    posterior_log: Tensor,
    log_beta: Tensor,
    fixed: Tensor,
    fixed_log: Tensor,
}

/// Meaning of a network's output at a noised latent.
pub struct Prediction {
    /// Mean of `p(x_{t−1} | x_t)`, `[B, L]`.
    pub mean: Tensor,
    /// Its variance and the logarithm: `[B, L]`, or `[B, 1]` where it is fixed.
    pub variance: Tensor,
    pub log_variance: Tensor,
    /// The clean latent, clipped if that was asked for.
    pub x0: Tensor,
}

/// Loss of each sample, `[B]`, and its parts.
pub struct Losses {
    pub loss: Tensor,
    /// Squared error of the prediction; `None` with `use_kl`.
    pub mse: Option<Tensor>,
    /// Variational bound in bits per number; `None` where it is not part of the loss.
    pub vb: Option<Tensor>,
}

impl Diffusion {
    /// # Errors
    /// `cell.diffusion.timestep_respacing` cannot be followed.
    pub fn new(keys: &CellDiffusion, device: Device) -> Result<Self, String> {
        let schedule = Schedule::new(keys)?;
        let tables = Tables::new(&schedule, keys, device);
        Ok(Self { keys: keys.clone(), places: schedule.places, tables })
    }

    /// Kept steps.
    pub fn steps(&self) -> usize {
        self.places.len()
    }

    /// Number of each kept step among all of them.
    pub fn places(&self) -> &[usize] {
        &self.places
    }

    /// Numbers of a network's output per number of a latent: 2 where it predicts the variance too.
    pub fn outputs_per_input(keys: &CellDiffusion) -> i64 {
        1 + i64::from(keys.learn_sigma)
    }

    /// Time that a network sees at `t`: the number of the step among all, or scaled to 0..1000.
    pub fn network_time(&self, t: &Tensor) -> Tensor {
        if self.keys.rescale_timesteps { self.tables.time.index_select(0, t) } else { self.place(t) }
    }

    /// Number of the steps `t` among all steps, i64.
    pub fn place(&self, t: &Tensor) -> Tensor {
        self.tables.place.index_select(0, t)
    }

    /// `x_t` of clean latents `x0` and standard normal `noise`.
    pub fn noised(&self, x0: &Tensor, t: &Tensor, noise: &Tensor) -> Tensor {
        let tables = &self.tables;
        at(&tables.signal, t) * x0 + at(&tables.noise, t) * noise
    }

    /// Losses of a network that sees `x0` with `noise` at the steps `t`.
    pub fn losses(&self, network: &Network, x0: &Tensor, t: &Tensor, noise: &Tensor) -> Losses {
        let x_t = self.noised(x0, t, noise);
        let output = network(&x_t, &self.network_time(t)).to_kind(Kind::Float);
        if self.keys.use_kl {
            let vb = self.bound(&output, x0, &x_t, t, false);
            return Losses { loss: &vb * self.steps() as f64, mse: None, vb: Some(vb) };
        }
        let (value, rest) = self.split(&output);
        let target = if self.keys.predict_xstart { x0 } else { noise };
        let mse = mean_of(&(target - &value).square());
        let Some(rest) = rest else {
            return Losses { loss: mse.shallow_clone(), mse: Some(mse), vb: None };
        };
        // The bound trains the variance alone: the mean is taken as given.
        let mut vb = self.bound(&Tensor::cat(&[value.detach(), rest], 1), x0, &x_t, t, false);
        if self.keys.rescale_learned_sigmas {
            vb *= self.steps() as f64 / 1000.0;
        }
        Losses { loss: &mse + &vb, mse: Some(mse), vb: Some(vb) }
    }

    /// Meaning of a network's output `[B, L or 2 L]` at `x_t`. `clip`: clean latents to −1..1.
    pub fn predict(&self, output: &Tensor, x_t: &Tensor, t: &Tensor, clip: bool) -> Prediction {
        let (value, rest) = self.split(output);
        let (variance, log_variance) = self.variance(rest.as_ref(), t);
        let x0 = if self.keys.predict_xstart { value } else { self.x0_of_noise(x_t, t, &value) };
        let x0 = if clip { x0.clamp(-1.0, 1.0) } else { x0 };
        Prediction { mean: self.posterior_mean(&x0, x_t, t), variance, log_variance, x0 }
    }

    /// The clean latent that `x_t` came from if `noise` was added.
    pub fn x0_of_noise(&self, x_t: &Tensor, t: &Tensor, noise: &Tensor) -> Tensor {
        at(&self.tables.inverse, t) * x_t - at(&self.tables.inverse_noise, t) * noise
    }

    /// The noise in `x_t` if `x0` is the clean latent.
    pub fn noise_of_x0(&self, x_t: &Tensor, t: &Tensor, x0: &Tensor) -> Tensor {
        (at(&self.tables.inverse, t) * x_t - x0) / at(&self.tables.inverse_noise, t)
    }

    /// Mean of `q(x_{t−1} | x_t, x_0)`.
    pub fn posterior_mean(&self, x0: &Tensor, x_t: &Tensor, t: &Tensor) -> Tensor {
        at(&self.tables.mean_x0, t) * x0 + at(&self.tables.mean_xt, t) * x_t
    }

    /// ᾱ at `t` and at the step before, `[B, 1]`.
    pub fn bars(&self, t: &Tensor) -> (Tensor, Tensor) {
        (at(&self.tables.bar, t), at(&self.tables.bar_before, t))
    }

    /// Term of the variational bound, bits per number, `[B]`: the KL divergence of a step, and at t = 0 the negative log
    /// likelihood of the clean latent.
    pub fn bound(&self, output: &Tensor, x0: &Tensor, x_t: &Tensor, t: &Tensor, clip: bool) -> Tensor {
        let predicted = self.predict(output, x_t, t, clip);
        let true_mean = self.posterior_mean(x0, x_t, t);
        let kl = normal_kl(&true_mean, &at(&self.tables.posterior_log, t), &predicted.mean, &predicted.log_variance);
        let likelihood = bin_log_likelihood(x0, &predicted.mean, &(&predicted.log_variance * 0.5));
        let (kl, first) = (mean_of(&kl) / LN_2, mean_of(&-likelihood) / LN_2);
        first.where_self(&t.eq(0), &kl)
    }

    /// Bits per number of `x0` under the model, `[B]`, over all steps and the prior: an evaluation. No graph is kept and
    /// nothing is collected per step, so that memory does not grow with the steps. `noise`: of each step.
    pub fn bits(&self, network: &Network, x0: &Tensor, noise: &dyn Fn(usize) -> Tensor, clip: bool) -> Tensor {
        tch::no_grad(|| {
            let mut total = self.prior_bits(x0);
            for step in (0..self.steps()).rev() {
                let t = Tensor::full([x0.size()[0]], step as i64, (Kind::Int64, x0.device()));
                let x_t = self.noised(x0, &t, &noise(step));
                let output = network(&x_t, &self.network_time(&t)).to_kind(Kind::Float);
                total += self.bound(&output, x0, &x_t, &t, clip);
            }
            total
        })
    }

    /// Bits per number that the last step keeps of `x0`, `[B]`.
    fn prior_bits(&self, x0: &Tensor) -> Tensor {
        let last = Tensor::full([x0.size()[0]], self.steps() as i64 - 1, (Kind::Int64, x0.device()));
        let mean = at(&self.tables.signal, &last) * x0;
        let log_variance = at(&self.tables.noise, &last).square().log();
        let zero = Tensor::zeros([1], (Kind::Float, x0.device()));
        mean_of(&normal_kl(&mean, &log_variance, &zero, &zero)) / LN_2
    }

    /// The output's prediction, and the numbers for the variance where it is learned.
    fn split(&self, output: &Tensor) -> (Tensor, Option<Tensor>) {
        if !self.keys.learn_sigma {
            return (output.shallow_clone(), None);
        }
        let half = output.size()[1] / 2;
        (output.narrow(1, 0, half), Some(output.narrow(1, half, half)))
    }

    /// Learned: between the posterior's and β on a logarithmic scale, by `(v + 1) / 2`.
    fn variance(&self, learned: Option<&Tensor>, t: &Tensor) -> (Tensor, Tensor) {
        let tables = &self.tables;
        let Some(learned) = learned else { return (at(&tables.fixed, t), at(&tables.fixed_log, t)) };
        let share = (learned + 1.0) / 2.0;
        let log = &share * at(&tables.log_beta, t) + (-&share + 1.0) * at(&tables.posterior_log, t);
        (log.exp(), log)
    }
}

impl Tables {
    fn new(schedule: &Schedule, keys: &CellDiffusion, device: Device) -> Self {
        let tensor = |values: Vec<f64>| {
            Tensor::from_slice(&values.iter().map(|&value| value as f32).collect::<Vec<_>>()).to_device(device)
        };
        let table = |act: &dyn Fn(f64, f64, f64) -> f64| tensor(schedule.table(act));
        let fixed = schedule.fixed_variance(keys.sigma_small);
        let log_of_fixed = if keys.sigma_small {
            schedule.posterior_log_variance()
        } else {
            fixed.iter().map(|variance| variance.ln()).collect()
        };
        let places: Vec<i64> = schedule.places.iter().map(|&place| place as i64).collect();
        let scale = (1000.0 / schedule.all as f64) as f32;
        let times: Vec<f32> = places.iter().map(|&place| place as f32 * scale).collect();
        Self {
            place: Tensor::from_slice(&places).to_device(device),
            time: Tensor::from_slice(&times).to_device(device),
            signal: table(&|_, bar, _| bar.sqrt()),
            noise: table(&|_, bar, _| (1.0 - bar).sqrt()),
            inverse: table(&|_, bar, _| (1.0 / bar).sqrt()),
            inverse_noise: table(&|_, bar, _| (1.0 / bar - 1.0).sqrt()),
            bar: table(&|_, bar, _| bar),
            bar_before: table(&|_, _, before| before),
            mean_x0: table(&|beta, bar, before| beta * before.sqrt() / (1.0 - bar)),
            mean_xt: table(&|beta, bar, before| (1.0 - before) * (1.0 - beta).sqrt() / (1.0 - bar)),
            posterior_log: tensor(schedule.posterior_log_variance()),
            log_beta: table(&|beta, _, _| beta.ln()),
            fixed: tensor(fixed),
            fixed_log: tensor(log_of_fixed),
        }
    }
}

/// Rows of a table `[T]` at `t`: `[B, 1]`.
fn at(table: &Tensor, t: &Tensor) -> Tensor {
    table.index_select(0, t).unsqueeze(1)
}

/// Mean over the numbers of each sample: `[B]`.
fn mean_of(x: &Tensor) -> Tensor {
    x.mean_dim([1i64].as_slice(), false, Kind::Float)
}

/// KL divergence of two normal distributions, nats.
fn normal_kl(mean: &Tensor, log_variance: &Tensor, mean2: &Tensor, log_variance2: &Tensor) -> Tensor {
    let ratio: Tensor = log_variance - log_variance2;
    let distance = (mean - mean2).square() * (-log_variance2).exp();
    (ratio.exp() - ratio - 1.0 + distance) * 0.5
}

/// Log mass that a normal distribution gives the bin of half width 1/255 around `x`; bins beyond ±0.999 are open.
fn bin_log_likelihood(x: &Tensor, mean: &Tensor, log_scale: &Tensor) -> Tensor {
    const FLOOR: f64 = 1e-12;
    const HALF: f64 = 1.0 / 255.0;
    let (centred, inverse) = (x - mean, (-log_scale).exp());
    let upper = normal_cdf(&(&inverse * (&centred + HALF)));
    let lower = normal_cdf(&(&inverse * (&centred - HALF)));
    let log = |mass: &Tensor| mass.clamp_min(FLOOR).log();
    let inside = log(&(&upper - &lower));
    let above = log(&(-lower + 1.0)).where_self(&x.gt(0.999), &inside);
    log(&upper).where_self(&x.lt(-0.999), &above)
}

/// The usual approximation of the normal distribution function by tanh.
fn normal_cdf(x: &Tensor) -> Tensor {
    ((x + x.pow_tensor_scalar(3) * 0.044_715) * (2.0 / PI).sqrt()).tanh() * 0.5 + 0.5
}
