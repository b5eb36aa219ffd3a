//! Tensors that the Python of this process has too: the same memory, gradients and graph, without a copy.

#![allow(unsafe_code)]

use super::{Raw, TorchError, check, raw};
use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use tch::Tensor;

unsafe extern "C" {
    fn hr_from_handle(handle: *mut c_void, out: *mut Raw) -> *mut c_char;
    fn hr_handle(tensor: Raw) -> *mut c_void;
}

/// The tensor behind `handle`, which is that of `torch._C._tensor_impl_raw_handle`.
///
/// # Errors
/// libtorch refuses.
///
/// # Safety
/// `handle` is the address of a tensor of the libtorch that this process has loaded, and somebody holds that tensor during
/// this call.
pub unsafe fn from_handle(handle: NonNull<c_void>) -> Result<Tensor, TorchError> {
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: the caller vouches for the address; on success `out` is a tensor of our own, which holds the memory too.
    unsafe {
        check("tensor of Python", hr_from_handle(handle.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

/// Address of the tensor, for `torch._C._wrap_tensor_impl`; good while `tensor` lives.
pub fn handle(tensor: &Tensor) -> *mut c_void {
    // SAFETY: a live tensor; reads its address.
    unsafe { hr_handle(raw(tensor)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_handle_gives_the_same_tensor_with_its_graph() {
        let leaf = Tensor::from_slice(&[1.0_f32, 2.0]).set_requires_grad(true);
        let product = &leaf * 3.0;
        // SAFETY: `product` lives.
        let same = unsafe { from_handle(NonNull::new(handle(&product)).unwrap()) }.unwrap();
        drop(product);
        same.sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(leaf.grad()).unwrap(), [3.0, 3.0]);
    }
}
