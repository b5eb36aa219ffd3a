//! Operators of libtorch that tch does not offer, and switches of its CUDA libraries.

use super::{Raw, TorchError, check, raw, raws};
use std::ffi::{c_char, c_double, c_int};
use tch::Tensor;

unsafe extern "C" {
    fn hr_leaky_relu(out: Raw, x: Raw, slope: c_double) -> *mut c_char;
    fn hr_lstm_cell(input: Raw, hidden: Raw, cell: Raw, out: *mut Raw) -> *mut c_char;
    fn hr_lstm_cell_backward(
        grad_out: Raw,
        grad_cell: Raw,
        before: Raw,
        after: Raw,
        gates: Raw,
        out: *mut Raw,
    ) -> *mut c_char;
    fn hr_lerp(from: *const Raw, to: *const Raw, n: usize, weight: c_double) -> *mut c_char;
    fn hr_set_backends(tf32: c_int, benchmark: c_int) -> *mut c_char;
}

/// `out ← x` where x is positive, `slope · x` elsewhere; without a gradient.
///
/// # Errors
/// Tensors of different shapes or devices.
pub fn leaky_relu_into(out: &Tensor, x: &Tensor, slope: f64) -> Result<(), TorchError> {
    // SAFETY: two live tensors.
    check("leaky_relu", unsafe { hr_leaky_relu(raw(out), raw(x), slope) })
}

/// Results of an LSTM cell.
pub struct LstmCell {
    /// `[B, H]`
    pub out: Tensor,
    /// `[B, H]`
    pub cell: Tensor,
    /// Activated gates `[B, 4H]`: what the backward pass needs.
    pub gates: Tensor,
}

/// An LSTM cell without biases and without a gradient: `input + hidden` are the gates `[B, 4H]` in PyTorch's order, `cell`
/// `[B, H]`. One kernel on CUDA.
///
/// # Errors
/// Shapes that do not go together.
pub fn lstm_cell(input: &Tensor, hidden: &Tensor, cell: &Tensor) -> Result<LstmCell, TorchError> {
    let mut out: [Raw; 3] = [std::ptr::null_mut(); 3];
    // SAFETY: live tensors and room for three; on success all three are tensors of our own.
    unsafe {
        check("lstm_cell", hr_lstm_cell(raw(input), raw(hidden), raw(cell), out.as_mut_ptr()))?;
        let [out, cell, gates] = out.map(|tensor| Tensor::from_ptr(tensor.cast()));
        Ok(LstmCell { out, cell, gates })
    }
}

/// Gradients of the gates and of the cell `before`, of a cell that gave `made`.
///
/// # Errors
/// Shapes that do not go together.
pub fn lstm_cell_backward(
    grad_out: &Tensor,
    grad_cell: Option<&Tensor>,
    before: &Tensor,
    made: &LstmCell,
) -> Result<(Tensor, Tensor), TorchError> {
    let mut out: [Raw; 2] = [std::ptr::null_mut(); 2];
    let cell = grad_cell.map_or(std::ptr::null_mut(), raw);
    let (after, gates) = (raw(&made.cell), raw(&made.gates));
    // SAFETY: live tensors, one of which may be missing, and room for two; on success both are tensors of our own.
    unsafe {
        let error = hr_lstm_cell_backward(raw(grad_out), cell, raw(before), after, gates, out.as_mut_ptr());
        check("lstm_cell_backward", error)?;
        Ok((Tensor::from_ptr(out[0].cast()), Tensor::from_ptr(out[1].cast())))
    }
}

/// `from ← from + weight · (to − from)` for every pair: a kernel or two on CUDA, however many there are.
///
/// # Errors
/// Lists of different lengths, or tensors that do not go together.
pub fn lerp_all(from: &[Tensor], to: &[Tensor], weight: f64) -> Result<(), TorchError> {
    if from.len() != to.len() {
        let problem = format!("{} tensors and {} partners", from.len(), to.len());
        return Err(TorchError::Argument { call: "lerp", problem });
    }
    if from.is_empty() {
        return Ok(());
    }
    let (from, to) = (raws(from), raws(to));
    // SAFETY: two arrays of live tensors of one length, which outlive the call.
    check("lerp", unsafe { hr_lerp(from.as_ptr(), to.as_ptr(), from.len(), weight) })
}

/// TF32 in products of f32, and the choice of convolution algorithms by trial; no effect on a CPU. Convolutions of f32 use
/// TF32 by libtorch's own default.
///
/// # Errors
/// libtorch refuses.
pub fn set_backends(tf32: bool, benchmark: bool) -> Result<(), TorchError> {
    // SAFETY: plain numbers.
    check("backends", unsafe { hr_set_backends(tf32.into(), benchmark.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn lerp_of_many_is_lerp_of_each() {
        let random = || Tensor::randn([37], (Kind::Float, Device::Cpu));
        let (from, to): (Vec<Tensor>, Vec<Tensor>) = (0..5).map(|_| (random(), random())).unzip();
        let right: Vec<Tensor> = from.iter().zip(&to).map(|(a, b)| a.lerp(b, 0.3)).collect();
        lerp_all(&from, &to, 0.3).unwrap();
        assert_eq!(from, right);
        assert!(lerp_all(&from, &to[1..], 0.3).is_err());
    }

    #[test]
    fn the_cells_gradients_are_those_of_its_parts() {
        let leaf = |n: i64| Tensor::randn([3, n], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let (input, hidden, cell) = (leaf(8), leaf(8), leaf(2));
        let parts = (&input + &hidden).chunk(4, 1);
        let [i, f, g, o] = [parts[0].sigmoid(), parts[1].sigmoid(), parts[2].tanh(), parts[3].sigmoid()];
        let c = f * &cell + i * g;
        let h = o * c.tanh();
        let (grad_h, grad_c) = (leaf(2).detach(), leaf(2).detach());
        (&h * &grad_h + &c * &grad_c).sum(Kind::Double).backward();
        let made = lstm_cell(&input.detach(), &hidden.detach(), &cell.detach()).unwrap();
        let near = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-12;
        assert!(near(&made.out, &h.detach()) && near(&made.cell, &c.detach()));
        let (gates, before) = lstm_cell_backward(&grad_h, Some(&grad_c), &cell.detach(), &made).unwrap();
        assert!(near(&gates, &input.grad()) && near(&gates, &hidden.grad()) && near(&before, &cell.grad()));
    }
}
