//! Small tensors that depend on sizes alone, kept on each device: to bring one there waits for the device, and cannot be
//! recorded.

use std::sync::{Mutex, PoisonError};
use tch::{Device, Tensor};

/// Name and sizes.
type Key = (&'static str, [i64; 4]);

/// Most that are kept. Recorded steps read them in place, so none is ever let go.
const MOST: usize = 1024;

/// The constant `name` of these sizes on `device`; `make` gives it on the CPU, where it is made anew each time.
pub fn constant(name: &'static str, sizes: [i64; 4], device: Device, make: impl FnOnce() -> Tensor) -> Tensor {
    static KEPT: Mutex<Vec<(Key, Device, Tensor)>> = Mutex::new(Vec::new());
    if device == Device::Cpu {
        return make();
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let same = |(key, on, _): &&(Key, Device, Tensor)| *key == (name, sizes) && *on == device;
    if let Some((_, _, tensor)) = kept.iter().find(same) {
        return tensor.shallow_clone();
    }
    let made = tch::no_grad(|| make().to_device(device));
    if kept.len() < MOST {
        kept.push(((name, sizes), device, made.shallow_clone()));
    }
    made
}
