//! Activation recomputation: a part of a model keeps its inputs only, and runs again during backward.

use super::{Callback, Raw, TorchError, check, raw};
use std::any::Any;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use tch::Tensor;

type Body = unsafe extern "C" fn(*mut c_void, *const Raw, usize, *mut Raw, *mut c_char, usize) -> c_int;

unsafe extern "C" {
    fn hr_recompute(
        inputs: *const Raw,
        n: usize,
        context: *mut c_void,
        run: Body,
        drop: Callback,
        out: *mut Raw,
    ) -> *mut c_char;
}

type Part = Box<dyn Fn(&[Tensor]) -> Tensor + Send>;

/// State that C++ holds for a part: its closure, and a place for the panic of a run on the caller's thread.
struct Context {
    part: Part,
    panic: std::sync::Arc<Mutex<Option<Box<dyn Any + Send>>>>,
}

/// Runs `part` on `inputs` without keeping its intermediate results. Backward runs it again on the same inputs, with
/// the autocast of now, and differentiates that run: gradients of the inputs are passed on, those of parameters that
/// `part` holds add up in their own `.grad`, whose hooks fire then. Without gradients it is a plain call.
///
/// - `part` must give the same result twice: draw random masks before, and let it hold them.
/// - A parameter should belong to one part and to nothing outside: else its hooks fire once for each.
/// - The result can be differentiated once.
///
/// A panic of `part` continues in the caller; during backward it becomes that pass's error.
///
/// # Errors
/// libtorch refuses an operation.
pub fn recompute<F>(inputs: &[&Tensor], part: F) -> Result<Tensor, TorchError>
where
    F: Fn(&[Tensor]) -> Tensor + Send + 'static,
{
    let panic = std::sync::Arc::new(Mutex::new(None));
    let context = Context { part: Box::new(part), panic: panic.clone() };
    let context = Box::into_raw(Box::new(context)).cast();
    let list: Vec<Raw> = inputs.iter().map(|tensor| raw(tensor)).collect();
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: live tensors; the shim takes the box over in every case and calls both functions with it alone.
    let error = unsafe { hr_recompute(list.as_ptr(), list.len(), context, run, drop_context, &mut out) };
    let failed = check("recompute", error);
    if let Some(payload) = panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
        resume_unwind(payload);
    }
    failed?;
    // SAFETY: on success `out` is a tensor of our own.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

unsafe extern "C" fn run(
    context: *mut c_void,
    inputs: *const Raw,
    n: usize,
    out: *mut Raw,
    why: *mut c_char,
    room: usize,
) -> c_int {
    // SAFETY: `context` is the box of `recompute`, alive until `drop_context`, and only one run is under way: forward
    // comes before backward, which the shim lets happen once.
    let context = unsafe { &*context.cast::<Context>() };
    // SAFETY: the shim hands over n tensors, each ours from now on.
    let inputs: Vec<Tensor> = unsafe {
        let list = std::slice::from_raw_parts(inputs, n);
        list.iter().map(|&tensor| Tensor::from_ptr(tensor.cast())).collect()
    };
    match catch_unwind(AssertUnwindSafe(|| (context.part)(&inputs))) {
        Ok(result) => {
            // SAFETY: `out` is a place for one tensor, which the shim owns from now on: ours is not dropped.
            unsafe { *out = raw(&result) };
            std::mem::forget(result);
            0
        }
        Err(payload) => {
            // SAFETY: `why` has `room` bytes.
            unsafe { write_text(&text_of(&*payload), why, room) };
            *context.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            1
        }
    }
}

unsafe extern "C" fn drop_context(context: *mut c_void) {
    // SAFETY: the shim calls this once, with the box of `recompute`.
    let context = unsafe { Box::from_raw(context.cast::<Context>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(context)));
}

pub(super) fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a recomputed part panicked").to_owned()
}

/// Writes as much of `text` as fits, and a NUL.
///
/// # Safety
/// `at` is valid for writes of `room` bytes.
pub(super) unsafe fn write_text(text: &str, at: *mut c_char, room: usize) {
    let length = text.len().min(room.saturating_sub(1));
    // SAFETY: length + 1 bytes at most, which the caller vouches for.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), at.cast(), length);
        *at.add(length) = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::{Autocast, LiveBytes, on_grad_ready, set_grad};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tch::{Device, Kind};

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn random(shape: &[i64], seed: i64) -> Tensor {
        tch::manual_seed(seed);
        Tensor::randn(shape, CPU)
    }

    /// Two layers with a wide middle, held by the closure that is returned.
    fn layers(w1: &Tensor, w2: &Tensor) -> impl Fn(&[Tensor]) -> Tensor + Send + 'static {
        let (w1, w2) = (w1.shallow_clone(), w2.shallow_clone());
        move |x: &[Tensor]| x[0].matmul(&w1).gelu("none").tanh().matmul(&w2) * &x[1]
    }

    fn leaf(shape: &[i64], seed: i64) -> Tensor {
        random(shape, seed).set_requires_grad(true)
    }

    #[test]
    fn gradients_of_inputs_and_parameters_equal_the_plain_path() {
        let (w1, w2) = (leaf(&[4, 32], 1), leaf(&[32, 3], 2));
        let (x, scale) = (leaf(&[5, 4], 3), leaf(&[5, 3], 4));
        let part = layers(&w1, &w2);
        let grads = |y: &Tensor| {
            y.square().sum(Kind::Float).backward();
            [&w1, &w2, &x, &scale].map(|t| {
                let grad = t.grad().copy();
                let _ = t.grad().detach_().zero_();
                grad
            })
        };
        let plain = part(&[&x * 1.0, &scale * 1.0]);
        let right = grads(&plain);
        let again = recompute(&[&(&x * 1.0), &(&scale * 1.0)], part).unwrap();
        assert!((&plain - &again).abs().max().double_value(&[]) < 1e-7);
        for (got, right) in grads(&again).iter().zip(&right) {
            assert!((got - right).abs().max().double_value(&[]) < 1e-6);
        }
    }

    #[test]
    fn inputs_without_gradients_still_reach_the_parameters() {
        let (w1, w2) = (leaf(&[4, 32], 1), leaf(&[32, 3], 2));
        let y = recompute(&[&random(&[5, 4], 3), &random(&[5, 3], 4)], layers(&w1, &w2)).unwrap();
        y.sum(Kind::Float).backward();
        assert!(w1.grad().abs().max().double_value(&[]) > 0.0);
        let _guard = tch::no_grad_guard();
        let y = recompute(&[&random(&[5, 4], 3), &random(&[5, 3], 4)], layers(&w1, &w2)).unwrap();
        assert!(!y.requires_grad());
    }

    #[test]
    fn hooks_fire_once_and_gradients_land_in_their_own_memory() {
        let (w1, w2) = (leaf(&[4, 32], 1), leaf(&[32, 3], 2));
        let (flat, fired) = (Tensor::zeros([4, 32], CPU), Arc::new(AtomicUsize::new(0)));
        set_grad(&w1, &flat).unwrap();
        let count = fired.clone();
        on_grad_ready(&w1, Box::new(move || _ = count.fetch_add(1, Ordering::SeqCst))).unwrap();
        for pass in 1..3 {
            let y = recompute(&[&random(&[5, 4], 3), &random(&[5, 3], 4)], layers(&w1, &w2)).unwrap();
            y.sum(Kind::Float).backward();
            assert_eq!(fired.load(Ordering::SeqCst), pass);
        }
        assert_eq!(w1.grad().data_ptr(), flat.data_ptr());
        assert!(flat.abs().max().double_value(&[]) > 0.0);
    }

    #[test]
    fn a_wide_middle_is_not_kept() {
        let (w1, w2) = (leaf(&[16, 4096], 1), leaf(&[4096, 16], 2));
        let (x, scale) = (random(&[64, 16], 3), random(&[64, 16], 4));
        let held = |run: &dyn Fn() -> Tensor| {
            let watch = LiveBytes::start().unwrap();
            let y = run();
            let held = watch.live();
            drop(y);
            held
        };
        let plain = held(&|| layers(&w1, &w2)(&[x.shallow_clone(), scale.shallow_clone()]));
        let again = held(&|| recompute(&[&x, &scale], layers(&w1, &w2)).unwrap());
        assert!(plain >= 2 * 64 * 4096 * 4 && again < 64 * 1024, "{plain} {again}");
    }

    #[test]
    fn autocast_of_the_forward_pass_is_restored_in_the_second_run() {
        let w = leaf(&[8, 8], 1);
        let kinds = Arc::new(Mutex::new(Vec::new()));
        let (seen, weight) = (kinds.clone(), w.shallow_clone());
        let y = {
            let _narrow = Autocast::enter(Device::Cpu, true, Kind::BFloat16).unwrap();
            recompute(&[&random(&[2, 8], 3)], move |x| {
                let y = x[0].matmul(&weight);
                seen.lock().unwrap().push(y.kind());
                y
            })
            .unwrap()
        };
        y.sum(Kind::Float).backward();
        assert_eq!(*kinds.lock().unwrap(), [Kind::BFloat16; 2]);
        assert!(w.grad().abs().max().double_value(&[]) > 0.0);
        assert_eq!(random(&[2, 2], 1).matmul(&random(&[2, 2], 2)).kind(), Kind::Float);
    }

    #[test]
    fn panics_go_on_in_forward_and_become_errors_in_backward() {
        let forward = catch_unwind(|| recompute(&[&random(&[2], 1)], |_| panic!("on purpose")));
        assert_eq!(*forward.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
        let (w, runs) = (leaf(&[2], 1), AtomicUsize::new(0));
        let y = recompute(&[&(&w * 2.0)], move |x| {
            assert!(runs.fetch_add(1, Ordering::SeqCst) == 0, "the second run fails");
            x[0].square()
        })
        .unwrap();
        let error = y.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("the second run fails"), "{error}");
    }

    #[test]
    fn parts_may_nest() {
        let w = leaf(&[3, 3], 5);
        let (inner, x) = (w.shallow_clone(), leaf(&[2, 3], 6));
        let y = recompute(&[&(&x * 1.0)], move |x| {
            let w = inner.shallow_clone();
            recompute(&[&x[0]], move |x| x[0].matmul(&w).tanh()).unwrap().square()
        })
        .unwrap();
        y.sum(Kind::Float).backward();
        let (got, got_w) = (x.grad().copy(), w.grad().copy());
        let _ = x.grad().detach_().zero_();
        let _ = w.grad().detach_().zero_();
        (&x * 1.0).matmul(&w).tanh().square().sum(Kind::Float).backward();
        assert!((got - x.grad()).abs().max().double_value(&[]) < 1e-6);
        assert!((got_w - w.grad()).abs().max().double_value(&[]) < 1e-6);
    }
}
