//! Sampling: from noise to latents, ancestral or by DDIM, guided by a classifier or not.
//!
//! Nothing but the present latents is kept from step to step: memory does not depend on the number of steps.

use super::process::{Diffusion, Network, Prediction};
use tch::{Kind, Tensor};

/// A guide: latents and the time that networks see, to the gradient of its log probability, scaled.
pub type Guide<'a> = dyn Fn(&Tensor, &Tensor) -> Tensor + 'a;

/// How latents are sampled.
pub struct Walk<'a> {
    pub network: &'a Network<'a>,
    pub guide: Option<&'a Guide<'a>>,
    /// Ancestral steps are guided where their number among all steps is below this one. DDIM is guided in every step.
    pub guide_below: usize,
    /// Clip clean latents to −1..1. After a guide has moved them they are not clipped again.
    pub clip: bool,
    /// DDIM with this share of fresh noise; `None` means ancestral.
    pub ddim: Option<f64>,
    /// Standard normal noise of a step, of the latents' shape.
    pub noise: &'a dyn Fn(usize) -> Tensor,
}

impl Diffusion {
    /// Latents `[B, L]` from `x`, which are latents as noisy as the kept step `from − 1` leaves them. `from` = all steps for
    /// pure noise. No graph is kept. `stop` is asked before each step, and `None` returned once it says yes.
    pub fn sample(&self, walk: &Walk, x: Tensor, from: usize, stop: &mut dyn FnMut() -> bool) -> Option<Tensor> {
        tch::no_grad(|| {
            let mut x = x;
            for step in (0..from.min(self.steps())).rev() {
                if stop() {
                    return None;
                }
                x = self.step(walk, &x, step);
            }
            Some(x)
        })
    }

    /// One step: `x_t` to `x_{t−1}`.
    fn step(&self, walk: &Walk, x: &Tensor, step: usize) -> Tensor {
        let t = Tensor::full([x.size()[0]], step as i64, (Kind::Int64, x.device()));
        let time = self.network_time(&t);
        let output = (walk.network)(x, &time).to_kind(Kind::Float);
        let predicted = self.predict(&output, x, &t, walk.clip);
        match walk.ddim {
            Some(eta) => self.ddim_step(walk, x, (step, &t, &time), predicted, eta),
            None => self.ancestral_step(walk, x, step, &time, predicted),
        }
    }

    fn ancestral_step(&self, walk: &Walk, x: &Tensor, step: usize, time: &Tensor, predicted: Prediction) -> Tensor {
        let mut mean = predicted.mean;
        if let Some(guide) = walk.guide.filter(|_| self.places()[step] < walk.guide_below) {
            mean += &predicted.variance * guide(x, time);
        }
        if step == 0 {
            return mean;
        }
        mean + (predicted.log_variance * 0.5).exp() * (walk.noise)(step)
    }

    fn ddim_step(
        &self,
        walk: &Walk,
        x: &Tensor,
        (step, t, time): (usize, &Tensor, &Tensor),
        predicted: Prediction,
        eta: f64,
    ) -> Tensor {
        let (bar, before) = self.bars(t);
        let mut x0 = predicted.x0;
        if let Some(guide) = walk.guide {
            let noise = self.noise_of_x0(x, t, &x0) - (-&bar + 1.0).sqrt() * guide(x, time);
            x0 = self.x0_of_noise(x, t, &noise);
        }
        let noise = self.noise_of_x0(x, t, &x0);
        let sigma = ((-&before + 1.0) / (-&bar + 1.0)).sqrt() * (-(bar / &before) + 1.0).sqrt() * eta;
        let mean = x0 * before.sqrt() + (-before + 1.0 - sigma.square()).sqrt() * noise;
        if step == 0 || eta == 0.0 { mean } else { mean + sigma * (walk.noise)(step) }
    }
}
