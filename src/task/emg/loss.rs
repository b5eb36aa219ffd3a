//! Losses over whole windows: mean over all elements.

use crate::torch::Autocast;
use spec::task::emg::EmgLoss;
use tch::{Kind, Tensor, no_grad};

/// Which loss, and the weight of its MAE term.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    pub kind: EmgLoss,
    pub mae_weight: f64,
}

impl Loss {
    /// The loss called `name`.
    ///
    /// # Errors
    /// This task has no such loss.
    pub fn of(name: &str, mae_weight: f64) -> Result<Self, String> {
        let kind = name.parse().map_err(|problem| format!("train.loss_type is {name}: {problem}"))?;
        Ok(Self { kind, mae_weight })
    }

    /// Factors of mean squared and mean absolute error.
    fn weights(self) -> (f64, f64) {
        match self.kind {
            EmgLoss::Mse => (1.0, 0.0),
            EmgLoss::Mae => (0.0, 1.0),
            EmgLoss::MseMae => (1.0, self.mae_weight),
        }
    }

    /// Loss (scalar) and prediction `[B, T, P]` of poses `[B, S, P]` interpolated by `upsample` `[T, S]`, against
    /// `target` `[B, T, P]`.
    ///
    /// Both losses have a gradient in closed form, `(2·e·w_mse + sign(e)·w_mae) / n`, and interpolation is linear. So
    /// the gradient with respect to the poses is computed here and carried by a product of the poses with it: autograd
    /// never walks the 40 times larger prediction.
    pub fn of_poses(self, poses: &Tensor, upsample: &Tensor, target: &Tensor) -> (Tensor, Tensor) {
        // Under autocast too, everything from here on is f32. A device without autocast has none to turn off.
        let _full = Autocast::enter(poses.device(), false, Kind::BFloat16).ok();
        let poses = poses.to_kind(Kind::Float);
        let (value, prediction, gradient) = no_grad(|| self.closed_form(&poses, upsample, target));
        if !poses.requires_grad() {
            return (value, prediction);
        }
        let carrier = (poses * gradient).sum(Kind::Float);
        let rest = no_grad(|| value - &carrier);
        (carrier + rest, prediction)
    }

    /// Value, prediction `[B, T, P]`, and the value's gradient with respect to the poses `[B, S, P]`.
    fn closed_form(self, poses: &Tensor, upsample: &Tensor, target: &Tensor) -> (Tensor, Tensor, Tensor) {
        let (squared, absolute) = self.weights();
        let prediction = upsample.matmul(&poses.detach());
        let error = &prediction - target;
        let count = error.numel().max(1) as f64;
        let flat = error.view([-1]);
        let mut value = flat.dot(&flat) * (squared / count);
        if absolute != 0.0 {
            value += flat.abs().sum(Kind::Float) * (absolute / count);
        }
        // sign(e) by clamping: the sign operation itself is an order of magnitude slower on a CPU.
        let mut gradient = if absolute == 0.0 {
            Tensor::zeros_like(&error)
        } else {
            let mut sign = &error * 1e37;
            sign.clamp_(-1.0, 1.0) * (absolute / count)
        };
        if squared != 0.0 {
            gradient += &error * (2.0 * squared / count);
        }
        let gradient = upsample.transpose(0, 1).matmul(&gradient);
        (value, prediction, gradient)
    }
}
