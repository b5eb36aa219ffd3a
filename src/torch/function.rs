//! Functions with a backward pass of their own, written in Rust.

use super::recompute::{text_of, write_text};
use super::{Callback, Raw, TorchError, check, raw};
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;

type Run = unsafe extern "C" fn(*mut c_void, Raw, *mut Raw, usize, *mut c_char, usize) -> c_int;

unsafe extern "C" {
    fn hr_with_backward(
        inputs: *const Raw,
        n: usize,
        result: Raw,
        context: *mut c_void,
        run: Run,
        drop: Callback,
        out: *mut Raw,
    ) -> *mut c_char;
}

type Backward = Box<dyn FnOnce(&Tensor) -> Vec<Option<Tensor>> + Send>;

/// Gives `result`, computed from `inputs` without a graph, back as a differentiable function of them: `backward` takes the
/// gradient of the result and gives one for each input, or `None` where there is none. It runs once, on autograd's thread
/// of the device, without a graph; what it holds is freed right after.
///
/// A panic of `backward` becomes the error of that pass.
///
/// # Errors
/// libtorch refuses.
pub fn with_backward<F>(inputs: &[&Tensor], result: &Tensor, backward: F) -> Result<Tensor, TorchError>
where
    F: FnOnce(&Tensor) -> Vec<Option<Tensor>> + Send + 'static,
{
    let boxed: Backward = Box::new(backward);
    let context = Box::into_raw(Box::new(Some(boxed))).cast();
    let list: Vec<Raw> = inputs.iter().map(|tensor| raw(tensor)).collect();
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: live tensors; the shim takes the box over in every case and calls both functions with it alone.
    let error =
        unsafe { hr_with_backward(list.as_ptr(), list.len(), raw(result), context, run, drop_context, &mut out) };
    check("with_backward", error)?;
    // SAFETY: on success `out` is a tensor of our own.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

unsafe extern "C" fn run(
    context: *mut c_void,
    grad: Raw,
    out: *mut Raw,
    n: usize,
    why: *mut c_char,
    room: usize,
) -> c_int {
    // SAFETY: `context` is the box of `with_backward`, alive until `drop_context`; the shim runs it once.
    let backward = unsafe { &mut *context.cast::<Option<Backward>>() }.take();
    // SAFETY: the shim hands the gradient over.
    let grad = unsafe { Tensor::from_ptr(grad.cast()) };
    let grads = catch_unwind(AssertUnwindSafe(|| backward.map_or_else(Vec::new, |backward| backward(&grad))));
    let problem = match grads {
        Ok(grads) if grads.len() == n => {
            for (at, grad) in grads.into_iter().enumerate() {
                let Some(grad) = grad else { continue };
                // SAFETY: `out` has n places; the shim owns what is written there: ours is not dropped.
                unsafe { *out.add(at) = raw(&grad) };
                std::mem::forget(grad);
            }
            return 0;
        }
        Ok(grads) => format!("{} gradients for {n} inputs", grads.len()),
        Err(payload) => text_of(&*payload),
    };
    // SAFETY: `why` has `room` bytes.
    unsafe { write_text(&problem, why, room) };
    1
}

unsafe extern "C" fn drop_context(context: *mut c_void) {
    // SAFETY: the shim calls this once, with the box of `with_backward`.
    let context = unsafe { Box::from_raw(context.cast::<Option<Backward>>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(context)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tch::{Kind, no_grad};

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn the_closure_gives_the_gradients_and_is_freed_after_its_one_run() {
        let (x, w, held) = (leaf(&[1.0, 2.0]), leaf(&[3.0, 5.0]), Arc::new(()));
        let (keep, saved) = (Arc::clone(&held), [x.detach(), w.detach()]);
        let y = with_backward(&[&x, &w], &no_grad(|| &x * &w), move |grad| {
            let _keep = &keep;
            vec![Some(grad * &saved[1]), Some(grad * &saved[0])]
        });
        let y = y.unwrap();
        assert_eq!(Vec::<f32>::try_from(&y).unwrap(), [3.0, 10.0]);
        let loss = (&y * 2.0).sum(Kind::Float);
        loss.backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [6.0, 10.0]);
        assert_eq!(Vec::<f32>::try_from(w.grad()).unwrap(), [2.0, 4.0]);
        assert_eq!(Arc::strong_count(&held), 1, "while the graph is still held by {loss:?}");
    }

    #[test]
    fn without_gradients_the_result_is_plain_and_the_closure_is_freed() {
        let (x, held) = (Tensor::from_slice(&[1.0_f32]), Arc::new(()));
        let keep = Arc::clone(&held);
        let y = with_backward(&[&x], &(&x * 2.0), move |_| vec![Some(Tensor::from(Arc::strong_count(&keep) as f32))]);
        assert!(!y.unwrap().requires_grad());
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn panics_and_wrong_counts_are_errors_of_the_pass() {
        let x = leaf(&[1.0]);
        let error_of = |y: Tensor| y.sum(Kind::Float).f_backward().unwrap_err().to_string();
        let y = with_backward(&[&x], &no_grad(|| &x * 2.0), |_| panic!("on purpose")).unwrap();
        assert!(error_of(y).contains("on purpose"));
        let y = with_backward(&[&x], &no_grad(|| &x * 2.0), |_| vec![]).unwrap();
        assert!(error_of(y).contains("0 gradients for 1 inputs"));
    }
}
