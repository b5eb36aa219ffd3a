//! The C++ shim: what tch lacks. Safe functions over `shim.cpp`.
//!
//! Every C++ exception comes back as a [`TorchError`]; no Rust panic crosses into C++.

#![allow(unsafe_code)]

pub mod device;
mod function;
pub mod gloo;
pub mod graph;
mod handle;
pub mod host;
mod live;
mod memory;
pub mod operators;
mod recompute;

pub use function::with_backward;
pub use handle::{from_handle, handle};
pub use live::LiveBytes;
pub use memory::{
    DeviceMemory, catch_out_of_memory, count_tensors, device_memory, device_statistics, error_of, is_out_of_memory,
    most_tensor_bytes, release_caches,
};
pub use recompute::recompute;

use std::any::Any;
use std::ffi::{CStr, c_char, c_double, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Device, Kind, Tensor};

/// Errors of libtorch.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TorchError {
    #[error("libtorch, {call}: {message}")]
    Cpp { call: &'static str, message: String },
    #[error("{call}: {problem}")]
    Argument { call: &'static str, problem: String },
    /// Memory of the device, or of the host.
    #[error("out of memory: {message}")]
    OutOfMemory { message: String },
    /// The user's own code failed within a pass; the text ends with its place.
    #[error("{message}")]
    User { message: String },
}

type Callback = unsafe extern "C" fn(*mut c_void);
type Raw = *mut c_void;

unsafe extern "C" {
    fn hr_free(text: *mut c_char);
    fn hr_set_grad_hook(leaf: Raw, context: Raw, call: Callback, drop: Callback) -> *mut c_char;
    fn hr_clear_grad_hook(leaf: Raw) -> *mut c_char;
    fn hr_set_grad(leaf: Raw, grad: Raw) -> *mut c_char;
    fn hr_fused_adam(
        adamw: c_int,
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: c_double,
        beta1: c_double,
        beta2: c_double,
        weight_decay: c_double,
        eps: c_double,
    ) -> *mut c_char;
    fn hr_fused_sgd(
        params: *const Raw,
        grads: *const Raw,
        buffers: *const Raw,
        n: usize,
        lr: c_double,
        momentum: c_double,
        weight_decay: c_double,
        nesterov: c_int,
        first_step: c_int,
    ) -> *mut c_char;
    fn hr_total_norm(tensors: *const Raw, n: usize, out: *mut Raw) -> *mut c_char;
    fn hr_autocast_enter(
        device: c_int,
        enabled: c_int,
        dtype: c_int,
        was: *mut c_int,
        was_dtype: *mut c_int,
    ) -> *mut c_char;
    fn hr_autocast_leave(device: c_int, was_enabled: c_int, was_dtype: c_int) -> *mut c_char;
    fn hr_set_threads(intra_op: c_int, inter_op: c_int) -> *mut c_char;
    fn hr_set_flush_denormal(on: c_int) -> c_int;
    fn hr_set_deterministic(on: c_int) -> *mut c_char;
    fn hr_from_memory(
        data: *mut c_void,
        dims: *const i64,
        ndims: usize,
        dtype: c_int,
        owner: *mut c_void,
        drop: Callback,
        out: *mut Raw,
    ) -> *mut c_char;
}

fn check(call: &'static str, error: *mut c_char) -> Result<(), TorchError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a NUL-terminated string from strdup, owned by us until hr_free.
    let message = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        hr_free(error);
        text
    };
    Err(TorchError::Cpp { call, message: message.lines().next().unwrap_or_default().to_owned() })
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut().cast()
}

fn raws(tensors: &[Tensor]) -> Vec<Raw> {
    tensors.iter().map(raw).collect()
}

/// libtorch's number of an element type.
fn scalar_type(kind: Kind) -> Result<c_int, TorchError> {
    Ok(match kind {
        Kind::Uint8 => 0,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        other => {
            return Err(TorchError::Argument { call: "element type", problem: format!("{other:?} is not offered") });
        }
    })
}

type GradReady = Box<dyn Fn() + Send + Sync>;

/// Calls `ready` each time a gradient has been added into `leaf`'s `.grad`, on the autograd thread that did it, after a hook
/// of the leaf's own. Replaces an earlier one of this function; a panic inside ends at the C++ border and is dropped.
///
/// # Errors
/// `leaf` is not a leaf that requires a gradient.
pub fn on_grad_ready(leaf: &Tensor, ready: GradReady) -> Result<(), TorchError> {
    unsafe extern "C" fn call(context: *mut c_void) {
        // SAFETY: `context` is the box made below, alive until `drop_context`; the closure is Sync.
        let ready = unsafe { &*context.cast::<GradReady>() };
        let _ = catch_unwind(AssertUnwindSafe(ready));
    }
    unsafe extern "C" fn drop_context(context: *mut c_void) {
        // SAFETY: the hook's destructor calls this once, with the box made below.
        let ready = unsafe { Box::from_raw(context.cast::<GradReady>()) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(ready)));
    }
    let context = Box::into_raw(Box::new(ready)).cast();
    // SAFETY: `leaf` is a live tensor; the shim takes the box over and calls both functions with it alone.
    check("set_post_acc_grad_hooks", unsafe { hr_set_grad_hook(raw(leaf), context, call, drop_context) })
}

/// Takes the hook of [`on_grad_ready`] away; a hook of the leaf's own stays.
///
/// # Errors
/// libtorch refuses, which it does not for a leaf.
pub fn clear_grad_ready(leaf: &Tensor) -> Result<(), TorchError> {
    // SAFETY: `leaf` is a live tensor.
    check("set_post_acc_grad_hooks", unsafe { hr_clear_grad_hook(raw(leaf)) })
}

/// Makes `grad` the `.grad` of `leaf`: later backward passes add into its memory.
///
/// # Errors
/// Shape or element type differ.
pub fn set_grad(leaf: &Tensor, grad: &Tensor) -> Result<(), TorchError> {
    // SAFETY: both are live tensors.
    check("set .grad", unsafe { hr_set_grad(raw(leaf), raw(grad)) })
}

/// Numbers of an Adam step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// Decoupled weight decay (AdamW).
    pub decoupled: bool,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// Tensors of an Adam step, one entry per list and parameter; `steps` are f32 scalars that count this step already.
pub struct AdamState<'a> {
    pub params: &'a [Tensor],
    pub grads: &'a [Tensor],
    pub exp_avgs: &'a [Tensor],
    pub exp_avg_sqs: &'a [Tensor],
    pub steps: &'a [Tensor],
}

/// `torch._fused_adam_` or `torch._fused_adamw_`, in place.
///
/// # Errors
/// Lists of different lengths, or tensors that the kernel refuses.
pub fn fused_adam(state: &AdamState, step: &AdamStep) -> Result<(), TorchError> {
    let n = state.params.len();
    let lists = [state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps];
    if lists.iter().any(|list| list.len() != n) {
        return Err(TorchError::Argument { call: "fused_adam", problem: format!("lists must all have {n} entries") });
    }
    let (p, g, m, v, s) = (raws(state.params), raws(lists[0]), raws(lists[1]), raws(lists[2]), raws(lists[3]));
    let AdamStep { decoupled, lr, beta1, beta2, eps, weight_decay } = *step;
    let (p, g, m, v, s) = (p.as_ptr(), g.as_ptr(), m.as_ptr(), v.as_ptr(), s.as_ptr());
    // SAFETY: five arrays of n live tensors, checked above; they outlive the call.
    let error = unsafe { hr_fused_adam(decoupled.into(), p, g, m, v, s, n, lr, beta1, beta2, weight_decay, eps) };
    check("_fused_adam_", error)
}

/// Numbers of an SGD step, without dampening.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    pub lr: f64,
    pub momentum: f64,
    pub weight_decay: f64,
    pub nesterov: bool,
    /// Momentum buffers hold nothing yet: they become the gradient.
    pub first: bool,
}

/// `torch._fused_sgd_`, in place. Without momentum `buffers` is not read.
///
/// # Errors
/// Lists of different lengths, or tensors that the kernel refuses.
pub fn fused_sgd(params: &[Tensor], grads: &[Tensor], buffers: &[Tensor], step: &SgdStep) -> Result<(), TorchError> {
    let n = params.len();
    if grads.len() != n || (step.momentum != 0.0 && buffers.len() != n) {
        return Err(TorchError::Argument { call: "fused_sgd", problem: format!("lists must all have {n} entries") });
    }
    let (p, g, b) = (raws(params), raws(grads), raws(buffers));
    let SgdStep { lr, momentum, weight_decay, nesterov, first } = *step;
    let (p, g, b) = (p.as_ptr(), g.as_ptr(), b.as_ptr());
    // SAFETY: arrays of n live tensors, checked above; `b` is read only with momentum; all outlive the call.
    let error = unsafe { hr_fused_sgd(p, g, b, n, lr, momentum, weight_decay, nesterov.into(), first.into()) };
    check("_fused_sgd_", error)
}

/// Two-norm over all elements of all tensors as `torch.nn.utils.get_total_norm` takes it: the norm of the tensors'
/// norms, in their order. A scalar on their device.
///
/// # Errors
/// No tensors, or tensors of different devices.
pub fn total_norm(tensors: &[Tensor]) -> Result<Tensor, TorchError> {
    let list = raws(tensors);
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: an array of live tensors; on success `out` is a tensor of our own.
    unsafe {
        check("_foreach_norm", hr_total_norm(list.as_ptr(), list.len(), &mut out))?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

/// Autocast of this thread for a device, until dropped. Guards of a thread must nest.
#[derive(Debug)]
pub struct Autocast {
    device: c_int,
    was_enabled: c_int,
    was_dtype: c_int,
    // Autocast state belongs to the thread: this keeps the guard on it.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Autocast {
    /// Turns autocast to `kind` (`BFloat16` or `Half`) on, or off.
    ///
    /// # Errors
    /// A device or an element type that autocast does not know.
    pub fn enter(device: Device, enabled: bool, kind: Kind) -> Result<Autocast, TorchError> {
        let device = match device {
            Device::Cpu => 0,
            Device::Cuda(_) => 1,
            other => {
                return Err(TorchError::Argument { call: "autocast", problem: format!("no autocast for {other:?}") });
            }
        };
        let dtype = scalar_type(kind)?;
        let (mut was_enabled, mut was_dtype) = (0, 0);
        // SAFETY: plain numbers and two places to write to.
        let error = unsafe { hr_autocast_enter(device, enabled.into(), dtype, &mut was_enabled, &mut was_dtype) };
        check("set_autocast_enabled", error)?;
        Ok(Autocast { device, was_enabled, was_dtype, _thread: std::marker::PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: plain numbers, as `enter` got them, on the same thread.
        let _ = check("leave autocast", unsafe { hr_autocast_leave(self.device, self.was_enabled, self.was_dtype) });
    }
}

/// Threads inside one operator and between operators; 0 leaves a number as it is. The second can be set once only,
/// before any parallel work.
///
/// # Errors
/// The number between operators was fixed already.
pub fn set_threads(intra_op: u16, inter_op: u16) -> Result<(), TorchError> {
    // SAFETY: plain numbers.
    check("set_num_threads", unsafe { hr_set_threads(intra_op.into(), inter_op.into()) })
}

/// Treats denormal numbers as zero on this thread and threads started later; false where the CPU cannot.
pub fn set_flush_denormal(on: bool) -> bool {
    // SAFETY: a plain number.
    unsafe { hr_set_flush_denormal(on.into()) != 0 }
}

/// Asks operators for run-to-run equal results; operators without such a variant warn and continue.
///
/// # Errors
/// libtorch refuses.
pub fn set_deterministic(on: bool) -> Result<(), TorchError> {
    // SAFETY: a plain number.
    check("set_deterministic", unsafe { hr_set_deterministic(on.into()) })
}

/// Contiguous CPU tensor over memory that `owner` keeps alive; `owner` is dropped with the tensor's last view.
///
/// # Errors
/// An element type other than u8, i64, f16, bf16, f32, f64, or a negative or overflowing shape.
///
/// # Safety
/// `data` must be aligned for `kind`, valid for reads and writes of the whole shape while `owner` lives, and not be
/// accessed in a way that conflicts with the tensor's users.
pub unsafe fn from_memory(
    data: *mut u8,
    shape: &[i64],
    kind: Kind,
    owner: Box<dyn Any + Send + Sync>,
) -> Result<Tensor, TorchError> {
    unsafe extern "C" fn drop_owner(owner: *mut c_void) {
        // SAFETY: the shared_ptr's deleter runs once, with the box made below.
        let owner = unsafe { Box::from_raw(owner.cast::<Box<dyn Any + Send + Sync>>()) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(owner)));
    }
    let dtype = scalar_type(kind)?;
    let elements = shape.iter().try_fold(1_i64, |n, &dim| if dim < 0 { None } else { n.checked_mul(dim) });
    if elements.is_none() {
        return Err(TorchError::Argument { call: "from_memory", problem: format!("shape {shape:?}") });
    }
    let owner = Box::into_raw(Box::new(owner)).cast();
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: the caller vouches for the memory; the shim takes the box over in every case.
    unsafe {
        let error = hr_from_memory(data.cast(), shape.as_ptr(), shape.len(), dtype, owner, drop_owner, &mut out);
        check("from_blob", error)?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn hook_runs_after_the_gradient_is_there_and_in_its_memory() {
        let leaf = Tensor::from_slice(&[1.0_f32, 2.0]).set_requires_grad(true);
        let grad = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        set_grad(&leaf, &grad).unwrap();
        let seen = Arc::new(AtomicUsize::new(0));
        let (count, view) = (seen.clone(), std::sync::Mutex::new(grad.shallow_clone()));
        on_grad_ready(
            &leaf,
            Box::new(move || {
                let sum = view.lock().unwrap().sum(Kind::Float).double_value(&[]);
                count.fetch_add(sum as usize, Ordering::SeqCst);
            }),
        )
        .unwrap();
        (&leaf * 3.0).sum(Kind::Float).backward();
        assert_eq!(seen.load(Ordering::SeqCst), 6);
        (&leaf * 3.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(&grad).unwrap(), [6.0, 6.0]);
        clear_grad_ready(&leaf).unwrap();
        assert_eq!(Arc::strong_count(&seen), 1, "the closure is dropped with its hook");
        (&leaf * 3.0).sum(Kind::Float).backward();
        assert_eq!(seen.load(Ordering::SeqCst), 18);
    }

    #[test]
    fn panic_in_a_hook_stays_in_rust() {
        let leaf = Tensor::from_slice(&[1.0_f32]).set_requires_grad(true);
        on_grad_ready(&leaf, Box::new(|| panic!("on purpose"))).unwrap();
        (&leaf * 2.0).sum(Kind::Float).backward();
        assert_eq!(leaf.grad().double_value(&[0]), 2.0);
    }

    #[test]
    fn exceptions_become_errors() {
        let leaf = Tensor::from_slice(&[1.0_f32]).set_requires_grad(true);
        let error = set_grad(&leaf, &Tensor::zeros([3], (Kind::Float, Device::Cpu))).unwrap_err().to_string();
        assert!(error.contains("shape [3]"), "{error}");
        let error = on_grad_ready(&(&leaf * 2.0), Box::new(|| ())).unwrap_err().to_string();
        assert!(error.contains("leaf"), "{error}");
        assert!(total_norm(&[]).is_err());
    }

    #[test]
    fn foreign_memory_lives_as_long_as_the_last_view() {
        let owner = Arc::new(vec![1.0_f32, 2.0, 3.0, 4.0]);
        let data = owner.as_ptr().cast_mut().cast();
        // SAFETY: four f32 in a vector that the owner keeps; nothing writes to it.
        let tensor = unsafe { from_memory(data, &[2, 2], Kind::Float, Box::new(owner.clone())) }.unwrap();
        let row = tensor.get(1);
        drop(tensor);
        assert_eq!(Arc::strong_count(&owner), 2);
        assert_eq!(Vec::<f32>::try_from(&row).unwrap(), [3.0, 4.0]);
        drop(row);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn autocast_narrows_matmul_and_ends_with_its_guard() {
        let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        {
            let _on = Autocast::enter(Device::Cpu, true, Kind::BFloat16).unwrap();
            assert_eq!(a.matmul(&a).kind(), Kind::BFloat16);
            let _off = Autocast::enter(Device::Cpu, false, Kind::BFloat16).unwrap();
            assert_eq!(a.matmul(&a).kind(), Kind::Float);
        }
        assert_eq!(a.matmul(&a).kind(), Kind::Float);
    }
}
