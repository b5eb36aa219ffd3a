//! Exponential moving averages of the weights.

use super::TrainError;
use super::buffers::{Buffers, is_float};
use crate::comm::Collective;
use crate::torch::operators::lerp_all;
use spec::config::{BufferMode, EmaBuffers, TrainConfig};
use std::sync::Arc;
use tch::{Tensor, no_grad};

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

/// A shadow of every parameter: `shadow ← decay · shadow + (1 − decay) · weight` after each optimizer step.
pub struct Ema {
    rate: f64,
    /// Steps over which the decay rises; 0: it is constant.
    ramp: f64,
    shadow: Named,
}

impl Ema {
    /// Starts as a copy of `live`.
    pub fn new(rate: f64, ramp: f64, live: &[(String, Tensor)]) -> Self {
        let shadow = no_grad(|| live.iter().map(|(name, t)| (name.clone(), t.detach().copy())).collect());
        Self { rate, ramp, shadow }
    }

    /// The decay at update `n`, from 1.
    fn decay(&self, n: u64) -> f64 {
        if self.ramp > 0.0 { self.rate * (1.0 - (-(n as f64) / self.ramp).exp()) } else { self.rate }
    }

    /// Takes update `n` of the average, from 1; `live` in the order given to [`Ema::new`].
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn update(&mut self, n: u64, live: &[(String, Tensor)]) -> Result<(), TrainError> {
        let weight = 1.0 - self.decay(n);
        let (shadows, lives): (Vec<Tensor>, Vec<Tensor>) =
            self.shadow.iter().zip(live).map(|((_, a), (_, b))| (a.shallow_clone(), b.shallow_clone())).unzip();
        Ok(lerp_all(&shadows, &lives, weight)?)
    }

    /// Exchanges the average and the live tensors, in place. Twice is the identity.
    pub fn swap(&mut self, live: &[(String, Tensor)]) {
        no_grad(|| {
            for ((_, shadow), (_, live)) in self.shadow.iter_mut().zip(live) {
                let copy = live.detach().copy();
                let mut live = live.detach();
                live.copy_(shadow);
                shadow.copy_(&copy);
            }
        });
    }

    /// The averaged tensors by name.
    pub fn tensors(&self) -> Named {
        self.shadow.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }

    /// Takes the averaged tensors of a checkpoint; those whose name is not there keep their value.
    pub fn load(&mut self, saved: &[(String, Tensor)]) {
        no_grad(|| {
            for (name, shadow) in &mut self.shadow {
                if let Some((_, tensor)) = saved.iter().find(|(saved, _)| saved == name) {
                    shadow.copy_(tensor);
                }
            }
        });
    }
}

/// The averages of a run: one for each of `train.ema_decay`.
pub struct Averages {
    list: Vec<Ema>,
    /// Tensors that are averaged: parameters, and buffers of floating point where those are averaged too.
    live: Named,
    /// Buffers that are copied.
    copied: Named,
    /// Buffers of each average: ranks bring them together as they do the model's.
    buffers: Vec<Buffers>,
}

impl Averages {
    /// Each starts as a copy of the weights.
    ///
    /// # Errors
    /// As [`Buffers::new`].
    pub fn new(
        train: &TrainConfig,
        params: &[(String, Tensor)],
        buffers: &[(String, Tensor)],
        (mode, collective): (BufferMode, &Arc<dyn Collective>),
    ) -> Result<Self, TrainError> {
        let clone = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        let averages = |tensor: &Tensor| train.ema_buffers == EmaBuffers::Average && is_float(tensor.kind());
        let (averaged, copied): (Named, Named) = buffers.iter().map(clone).partition(|(_, tensor)| averages(tensor));
        let live: Named = params.iter().map(clone).chain(averaged).collect();
        let list: Vec<_> = train.ema_decay.0.iter().map(|rate| Ema::new(*rate, train.ema_ramp, &live)).collect();
        let own = |ema: &Ema| {
            let named = ema.tensors().split_off(params.len());
            Buffers::new(&format!("ema-{}.buffers", ema.rate), named, mode, Arc::clone(collective))
        };
        let buffers = list.iter().map(own).collect::<Result<_, _>>()?;
        Ok(Self { list, live, copied, buffers })
    }

    /// Before an evaluation and a checkpoint: `ddp.buffers`. All ranks call it together.
    ///
    /// # Errors
    /// A peer failed.
    pub fn meet(&mut self) -> Result<(), TrainError> {
        self.buffers.iter_mut().try_for_each(Buffers::meet)
    }

    /// The averages' buffers, one [`Buffers`] per rate; empty ones where buffers are copied.
    pub fn buffers(&mut self) -> &mut [Buffers] {
        &mut self.buffers
    }

    /// Takes update `n`, from 1.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn update(&mut self, n: u64) -> Result<(), TrainError> {
        self.list.iter_mut().try_for_each(|ema| ema.update(n, &self.live))
    }

    /// Exchanges the first average and the live weights, where there is one.
    pub fn swap(&mut self) {
        if let Some(first) = self.list.first_mut() {
            first.swap(&self.live);
        }
    }

    /// Each rate with everything that a file of its weights holds.
    pub fn content(&self) -> Vec<(f64, Named)> {
        let whole = |ema: &Ema| {
            let mut all = ema.tensors();
            all.extend(self.copied.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
            (ema.rate, all)
        };
        self.list.iter().map(whole).collect()
    }

    /// The averaged tensors alone, one list per rate.
    pub fn tensors(&self) -> Vec<Named> {
        self.list.iter().map(Ema::tensors).collect()
    }

    /// Takes the averages of a checkpoint, each by its rate; a single one also where the rate has changed, or is not known.
    /// Gives the rates that it has none for: those begin at the weights.
    pub fn load(&mut self, saved: &[(Option<f64>, Named)]) -> Vec<f64> {
        let single = self.list.len() == 1 && saved.len() == 1;
        let mut missing = Vec::new();
        for ema in &mut self.list {
            match saved.iter().find(|(rate, _)| single || *rate == Some(ema.rate)) {
                Some((_, tensors)) => ema.load(tensors),
                None => missing.push(ema.rate),
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Solo;
    use spec::config::Rates;
    use tch::{Device, Kind};

    fn set(tensor: &Tensor, value: f64) {
        no_grad(|| drop(tensor.detach().fill_(value)));
    }

    fn values(named: &[(String, Tensor)]) -> Vec<Vec<f32>> {
        named
            .iter()
            .map(|(_, t)| Vec::<f32>::try_from(t.detach().to_kind(Kind::Float).reshape([-1])).unwrap())
            .collect()
    }

    #[test]
    fn follows_the_weights_and_swaps_back() {
        let param = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let params = vec![("w".to_string(), param.shallow_clone())];
        let mut ema = Ema::new(0.75, 0.0, &params);
        set(&param, 5.0);
        ema.update(1, &params).unwrap();
        assert_eq!(values(&ema.tensors()), [[2.0, 2.75]]);
        ema.swap(&params);
        assert_eq!(values(&params), [[2.0, 2.75]]);
        ema.swap(&params);
        assert_eq!(values(&params), [[5.0, 5.0]]);
    }

    fn model() -> (Named, Named) {
        let w = Tensor::from_slice(&[0.5_f32, -1.0]).set_requires_grad(true);
        let count = Tensor::zeros([], (Kind::Int64, Device::Cpu));
        let mean = Tensor::from_slice(&[0.25_f32]);
        (vec![("w".into(), w)], vec![("mean".into(), mean), ("count".into(), count)])
    }

    fn averages(train: &TrainConfig, params: &Named, buffers: &Named) -> Averages {
        let solo: Arc<dyn Collective> = Arc::new(Solo::new(Device::Cpu));
        Averages::new(train, params, buffers, (BufferMode::Broadcast, &solo)).unwrap()
    }

    fn config(buffers: EmaBuffers) -> TrainConfig {
        let rates = Rates(vec![0.9, 0.5]);
        TrainConfig { ema_decay: rates, ema_ramp: 3.0, ema_buffers: buffers, ..TrainConfig::default() }
    }

    /// Reference: PyTorch 2.11, f32, `d = rate * (1 - math.exp(-n / 3)); v.mul_(d).add_((1 - d) * live)` as Ultralytics'
    /// `ModelEMA`, with w = sin(n + [0, 1]) and mean = cos(n) for n = 1, 2, 3.
    #[test]
    fn ramped_averages_of_several_rates_are_pytorchs() {
        for buffers in [EmaBuffers::Copy, EmaBuffers::Average] {
            let (params, own) = model();
            let mut all = averages(&config(buffers), &params, &own);
            for n in 1..=3_u64 {
                let w = Tensor::from_slice(&[(n as f32).sin(), (n as f32 + 1.0).sin()]);
                no_grad(|| params[0].1.detach().copy_(&w));
                set(&own[0].1, (n as f64).cos());
                let _ = own[1].1.shallow_clone().g_add_scalar_(1);
                all.update(n).unwrap();
            }
            let content = all.content();
            assert_eq!([content[0].0, content[1].0], [0.9, 0.5]);
            let expected =
                [([0.539_540_3, -0.175_940_25], -0.443_689_88_f32), ([0.374_973_3, -0.434_744_75], -0.738_240_66)];
            for ((_, tensors), (w, mean)) in content.iter().zip(expected) {
                let mean = if buffers == EmaBuffers::Average { mean } else { 3.0_f32.cos() };
                let found = values(tensors);
                let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{found:?}: {a} against {b}");
                near(found[0][0], w[0]);
                near(found[0][1], w[1]);
                near(found[1][0], mean);
                assert_eq!(found[2], [3.0], "whole numbers are copied");
            }
        }
    }

    #[test]
    fn averages_of_a_checkpoint_are_found_by_rate() {
        let (params, own) = model();
        let saved = |rate: Option<f64>, value: f32| (rate, vec![("w".to_owned(), Tensor::from_slice(&[value; 2]))]);
        let mut all = averages(&config(EmaBuffers::Copy), &params, &own);
        assert_eq!(all.load(&[saved(Some(0.5), 3.0), saved(Some(0.25), 4.0)]), [0.9]);
        assert_eq!(all.tensors().iter().map(|t| values(t)[0].clone()).collect::<Vec<_>>(), [[0.5, -1.0], [3.0, 3.0]]);
        let one = TrainConfig { ema_decay: Rates::one(0.99), ..TrainConfig::default() };
        for rate in [Some(0.99), Some(0.5), None] {
            let mut all = averages(&one, &params, &own);
            assert_eq!(all.load(&[saved(rate, 7.0)]), Vec::<f64>::new());
            assert_eq!(values(&all.tensors()[0]), [[7.0, 7.0]], "a single average follows a changed rate");
        }
        assert_eq!(averages(&TrainConfig::default(), &params, &own).content().len(), 0);
    }
}
