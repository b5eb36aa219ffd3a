//! Tensors on the CPU that are written element by element.

use super::{TorchError, error_of};
use tch::{Device, Kind, Tensor};

/// A new tensor of f32 on the CPU, of zeros where `fill` writes nothing.
///
/// # Errors
/// There is no memory for it.
pub fn filled(shape: &[i64], fill: impl FnOnce(&mut [f32])) -> Result<Tensor, TorchError> {
    let tensor = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu)).map_err(|error| error_of("zeros", &error))?;
    let (start, elements) = (tensor.data_ptr().cast::<f32>(), tensor.numel());
    if elements > 0 && !start.is_null() {
        // SAFETY: a new tensor is contiguous, its elements are `elements` zeroed f32 in the CPU's memory, and nobody else has it:
        // the one handle is `tensor`, which outlives the slice.
        fill(unsafe { std::slice::from_raw_parts_mut(start, elements) });
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_tensor_holds_what_was_written_and_zeros() {
        let tensor = filled(&[2, 3], |cells| {
            assert_eq!(cells.len(), 6);
            (cells[1], cells[5]) = (1.5, -2.0);
        });
        let tensor = tensor.unwrap();
        assert_eq!((tensor.size(), tensor.kind()), (vec![2, 3], Kind::Float));
        assert_eq!(Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap(), [0.0, 1.5, 0.0, 0.0, 0.0, -2.0]);
        assert_eq!(filled(&[0, 3], |_| ()).unwrap().size(), [0, 3]);
    }
}
