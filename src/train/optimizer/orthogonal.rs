//! Steps along the orthogonalised momentum of matrices and filters, beside those of SGD.
//!
//! Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the shares are those of the YOLO
//! package's MuSGD (release 8.4). Arithmetic: the momentum is an average of gradients in f32, its orthogonalisation runs in bf16.

use crate::train::ddp::DdpError;
use tch::{Kind, TchError, Tensor};

/// Factor on the rate, beside 1 of SGD's step.
const SHARE: f64 = 0.2;
/// Coefficients of the quintic Newton-Schulz iteration, which brings singular values to between 0.7 and 1.2.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
const EPS: f64 = 1e-7;

/// A parameter of 2 or 4 dimensions: views of itself, its gradient and its average gradient, all of one shape.
pub struct Matrix {
    pub param: Tensor,
    pub grad: Tensor,
    pub average: Tensor,
}

/// Numbers of a step.
#[derive(Clone, Copy)]
pub struct Along<'a> {
    pub lr: Rate<'a>,
    pub momentum: f64,
    pub nesterov: bool,
}

/// The learning rate.
#[derive(Clone, Copy)]
pub enum Rate<'a> {
    Host(f64),
    /// A f32 scalar on the device. Where `found` (f32 `[1]`) holds 1 nothing changes; gradients are divided by `divisor`.
    Device {
        lr: &'a Tensor,
        found: &'a Tensor,
        divisor: Option<&'a Tensor>,
    },
}

impl Matrix {
    /// True for parameters with such a step: matrices, and filters `[out, in, h, w]`.
    pub fn fits(shape: &[i64]) -> bool {
        matches!(shape.len(), 2 | 4)
    }

    /// # Errors
    /// libtorch refuses.
    pub fn step(&self, along: &Along) -> Result<(), DdpError> {
        let (mut param, mut average) = (self.param.shallow_clone(), self.average.shallow_clone());
        let (grad, held) = self.gradient(along)?;
        let fresh = blend(&average, &grad, along.momentum)?;
        let update = if along.nesterov { blend(&fresh, &grad, along.momentum)? } else { fresh.shallow_clone() };
        average.f_copy_(&match held {
            Some(held) => average.f_where_self(&held, &fresh)?,
            None => fresh,
        })?;
        let update = orthogonal(&update)?;
        let _ = match along.lr {
            Rate::Host(lr) => param.f_sub_(&update.f_mul_scalar(lr * SHARE)?)?,
            Rate::Device { lr, found, .. } => {
                let moves = found.f_neg()?.f_add_scalar(1.0)?.f_mul(lr)?.f_mul_scalar(SHARE)?;
                param.f_sub_(&update.f_mul(&moves)?)?
            }
        };
        Ok(())
    }

    /// The gradient, zeros where the step is left out, and the mask of that.
    fn gradient(&self, along: &Along) -> Result<(Tensor, Option<Tensor>), TchError> {
        let Rate::Device { found, divisor, .. } = along.lr else { return Ok((self.grad.shallow_clone(), None)) };
        let grad = divisor.map_or_else(|| Ok(self.grad.shallow_clone()), |divisor| self.grad.f_div(divisor))?;
        let held = found.f_gt(0.0)?;
        Ok((grad.f_masked_fill(&held, 0.0)?, Some(held)))
    }
}

/// `momentum · a + (1 - momentum) · b`.
fn blend(a: &Tensor, b: &Tensor, momentum: f64) -> Result<Tensor, TchError> {
    a.f_mul_scalar(momentum)?.f_add(&b.f_mul_scalar(1.0 - momentum)?)
}

/// The nearest matrix with singular values of about 1, a filter as `[out, in · h · w]`; times `sqrt(max(1, rows / columns))` of the
/// last two dimensions.
fn orthogonal(update: &Tensor) -> Result<Tensor, TchError> {
    let shape = update.size();
    let (rows, last) = (shape.first().copied().unwrap_or(1), shape.len().saturating_sub(2));
    let scale = (shape[last] as f64 / shape[last + 1] as f64).max(1.0).sqrt();
    let mut x = update.f_reshape([1, rows, -1])?.f_to_kind(Kind::BFloat16)?;
    let tall = rows > x.size()[2];
    let norm = x.f_norm_scalaropt_dim(2.0, [-2i64, -1].as_slice(), true)?;
    x = x.f_div(&norm.f_add_scalar(EPS)?)?;
    if tall {
        x = x.f_transpose(-2, -1)?;
    }
    let [first, third, fifth] = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let square = x.f_bmm(&x.f_transpose(-2, -1)?)?;
        let both = square.f_baddbmm(&square, &square, third, fifth)?;
        x = x.f_baddbmm(&both, &x, first, 1.0)?;
    }
    if tall {
        x = x.f_transpose(-2, -1)?;
    }
    x.f_contiguous()?.f_to_kind(Kind::Float)?.f_mul_scalar(scale)?.f_view(shape.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn matrix(size: &[i64]) -> Matrix {
        let count = size.iter().product::<i64>();
        let line = Tensor::arange(count, (Kind::Float, Device::Cpu));
        let param = (&line * 0.37).sin().view(size);
        // Its rows are not shifts of each other: no singular value is near 0.
        let (grad, average) = ((&line * &line * 0.013).cos().view(size), param.zeros_like());
        Matrix { param, grad, average }
    }

    #[test]
    fn singular_values_are_near_one() {
        for size in [[6i64, 20].as_slice(), &[20, 6], &[5, 3, 3, 3]] {
            let update = orthogonal(&matrix(size).grad).unwrap();
            assert_eq!(update.size(), size);
            let scale = (size[size.len() - 2] as f64 / size[size.len() - 1] as f64).max(1.0).sqrt();
            let values = (update.flatten(1, -1) / scale).svd(true, false).1;
            let (low, high) = (values.min().double_value(&[]), values.max().double_value(&[]));
            assert!(low > 0.3 && high < 1.4, "{size:?}: {low} to {high}");
        }
    }

    #[test]
    fn on_a_device_the_step_is_the_same_or_none() {
        let (host, device) = (matrix(&[4, 3, 3, 3]), matrix(&[4, 3, 3, 3]));
        let (one, zero) = (Tensor::from_slice(&[1f32]), Tensor::from_slice(&[0f32]));
        let (lr, four) = (Tensor::from(0.05f32), Tensor::from_slice(&[4f32]));
        let along = |lr| Along { lr, momentum: 0.8, nesterov: true };
        for _ in 0..2 {
            host.step(&along(Rate::Host(0.05))).unwrap();
            let _ = device.grad.shallow_clone().g_mul_scalar_(4.0);
            let on = |found| Rate::Device { lr: &lr, found, divisor: Some(&four) };
            device.step(&along(on(&zero))).unwrap();
            let (param, average) = (device.param.copy(), device.average.copy());
            let whole = device.grad.copy();
            let _ = device.grad.shallow_clone().fill_(f64::NAN);
            device.step(&along(on(&one))).unwrap();
            assert!(device.param.equal(&param) && device.average.equal(&average));
            device.grad.shallow_clone().copy_(&(whole / 4.0));
        }
        for (a, b) in [(&host.param, &device.param), (&host.average, &device.average)] {
            assert!((a - b).abs().max().double_value(&[]) < 1e-6);
        }
    }
}
