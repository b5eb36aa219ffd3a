//! Exponential moving average of the weights.

use tch::{Tensor, no_grad};

/// A shadow of every parameter: `shadow ← decay · shadow + (1 − decay) · weight` after each optimizer step.
pub struct Ema {
    decay: f64,
    shadow: Vec<(String, Tensor)>,
}

impl Ema {
    /// Starts as a copy of `params`.
    pub fn new(decay: f64, params: &[(String, Tensor)]) -> Self {
        let shadow = no_grad(|| params.iter().map(|(name, t)| (name.clone(), t.detach().copy())).collect());
    }

    /// Takes one step of the average; `params` in the order given to [`Ema::new`].
    pub fn update(&mut self, params: &[(String, Tensor)]) {
        no_grad(|| {
            for ((_, shadow), (_, param)) in self.shadow.iter_mut().zip(params) {
                let _ = shadow.lerp_(param, 1.0 - self.decay);
            }
        });
    }

    /// Exchanges the average and the live weights, in place. Twice is the identity.
    pub fn swap(&mut self, params: &[(String, Tensor)]) {
        no_grad(|| {
            for ((_, shadow), (_, param)) in self.shadow.iter_mut().zip(params) {
                let live = param.detach().copy();
                let mut param = param.detach();
                param.copy_(shadow);
                shadow.copy_(&live);
            }
        });
    }

    /// The averaged weights by name.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.shadow.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }

    /// Takes the averaged weights of a checkpoint; names that are absent keep their value.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_weights_and_swaps_back() {
        let param = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let params = vec![("w".to_string(), param.shallow_clone())];
        let mut ema = Ema::new(0.75, &params);
        no_grad(|| {
            let _ = param.detach().fill_(5.0);
        });
        ema.update(&params);
        assert_eq!(Vec::<f32>::try_from(&ema.tensors()[0].1).unwrap(), [2.0, 2.75]);
        ema.swap(&params);
        assert_eq!(Vec::<f32>::try_from(param.detach()).unwrap(), [2.0, 2.75]);
        ema.swap(&params);
        assert_eq!(Vec::<f32>::try_from(param.detach()).unwrap(), [5.0, 5.0]);
    }
}
