//! Tensors on the CPU that are written element by element.

use super::{TorchError, error_of};
use tch::{Device, Kind, Tensor};

/// A new tensor `[rows, columns]` of f32 on the CPU. `fill` gets each row's number and its zeros, row by row: they are in the
/// processor's nearest cache then.
///
/// # Errors
/// There is no memory for it.
pub fn filled_rows(rows: usize, columns: usize, mut fill: impl FnMut(usize, &mut [f32])) -> Result<Tensor, TorchError> {
    let shape = [rows as i64, columns as i64];
    let tensor = Tensor::f_empty(shape, (Kind::Float, Device::Cpu)).map_err(|error| error_of("empty", &error))?;
    let start = tensor.data_ptr().cast::<f32>();
    if tensor.numel() == 0 || start.is_null() {
        return Ok(tensor);
    }
    for row in 0..rows {
        // SAFETY: a new tensor is contiguous and has `rows` × `columns` f32 in the CPU's memory, of which row `row` is written here
        // before a slice of it is made; nobody else has them: the one handle is `tensor`, which outlives the slice.
        let row_of = unsafe {
            let row_at = start.add(row * columns);
            std::ptr::write_bytes(row_at, 0, columns);
            std::slice::from_raw_parts_mut(row_at, columns)
        };
        fill(row, row_of);
    }
    Ok(tensor)
}

/// A new tensor on the CPU that holds `runs` one behind the other.
///
/// # Panics
/// They are not the bytes of the shape, or there is no memory for it, as [`Tensor::from_data_size`] does.
pub fn joined(runs: &[&[u8]], shape: &[i64], kind: Kind) -> Tensor {
    let bytes: usize = runs.iter().map(|run| run.len()).sum();
    if runs.len() == 1 || bytes == 0 {
        return Tensor::from_data_size(runs.first().copied().unwrap_or_default(), shape, kind);
    }
    let tensor = Tensor::empty(shape, (kind, Device::Cpu));
    assert_eq!(bytes, tensor.numel() * kind.elt_size_in_bytes(), "bytes of {shape:?} of {kind:?}");
    // SAFETY: a new tensor is contiguous in the CPU's memory and holds `bytes` bytes, checked above; nobody else has it, and the one
    // handle is `tensor`, which outlives the slice. Any byte is a byte of a number.
    let out = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), bytes) };
    let mut rest = out;
    for run in runs {
        let (into, behind) = rest.split_at_mut(run.len());
        into.copy_from_slice(run);
        rest = behind;
    }
    tensor
}

/// A type of elements that is read in place.
pub trait Element: tch::kind::Element + Copy {}

impl Element for i16 {}
impl Element for i32 {}
impl Element for i64 {}
impl Element for f32 {}

/// Gives the elements of a contiguous tensor on the CPU to `read`. `None`: it is on another device, of another type, or not
/// contiguous. Nobody may write to the tensor meanwhile.
pub fn read<T: Element, R>(tensor: &Tensor, read: impl FnOnce(&[T]) -> R) -> Option<R> {
    if tensor.device() != Device::Cpu || tensor.kind() != T::KIND || !tensor.is_contiguous() {
        return None;
    }
    let (start, elements) = (tensor.data_ptr().cast::<T>().cast_const(), tensor.numel());
    if elements == 0 || start.is_null() {
        return Some(read(&[]));
    }
    // SAFETY: the tensor is contiguous in the CPU's memory and holds `elements` of `T`, checked above; `tensor` keeps them for the
    // call. Rooms above write to a tensor only from the thread that runs the step, which is in this call.
    Some(read(unsafe { std::slice::from_raw_parts(start, elements) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_begin_as_zeros() {
        let tensor = filled_rows(3, 2, |row, cells| {
            assert_eq!(cells, [0.0, 0.0]);
            cells[row % 2] = row as f32 + 1.0;
        });
        let tensor = tensor.unwrap();
        assert_eq!(tensor.size(), [3, 2]);
        assert_eq!(Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap(), [1.0, 0.0, 0.0, 2.0, 3.0, 0.0]);
        assert_eq!(filled_rows(0, 5, |_, _| ()).unwrap().size(), [0, 5]);
        assert_eq!(filled_rows(4, 0, |_, _| ()).unwrap().size(), [4, 0]);
    }

    #[test]
    fn runs_are_joined() {
        let [one, two] = [[1i16, 2, 3], [4, 5, 6]].map(|numbers| numbers.map(i16::to_ne_bytes).concat());
        let tensor = joined(&[&one, &[], &two], &[3, 2], Kind::Int16);
        assert_eq!(
            (tensor.size(), Vec::<i16>::try_from(tensor.flatten(0, -1)).unwrap()),
            (vec![3, 2], vec![1, 2, 3, 4, 5, 6])
        );
        assert_eq!(joined(&[&one], &[3], Kind::Int16), Tensor::from_slice(&[1i16, 2, 3]));
        assert_eq!(joined(&[&[], &[]], &[0], Kind::Float).numel(), 0);
    }

    #[test]
    fn elements_are_read_where_they_can_be() {
        let tensor = Tensor::from_slice(&[3i16, -1, 7, 9]);
        assert_eq!(read(&tensor, |cells: &[i16]| cells.to_vec()), Some(vec![3, -1, 7, 9]));
        assert_eq!(read(&tensor.narrow(0, 1, 2), |cells: &[i16]| cells.to_vec()), Some(vec![-1, 7]));
        assert!(read(&tensor, |_: &[i32]| ()).is_none());
        assert!(read(&tensor.view([2, 2]).transpose(0, 1), |_: &[i16]| ()).is_none());
        assert_eq!(read(&tensor.narrow(0, 0, 0), |cells: &[i16]| cells.len()), Some(0));
    }
}
