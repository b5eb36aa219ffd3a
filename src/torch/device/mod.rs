#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! A CUDA device as libtorch sees it: its library, streams, events, allocator, page-locked memory and copies.
//!
//! The binary links no CUDA. [`load_cuda`] brings `libtorch_cuda.so` in where there is a device; every call before that,
//! or without it, is an error value.

mod pin;
mod scaled;
mod stats;
mod stream;
mod upload;

pub use pin::{HostPin, SLAB_BYTES, bus_id};
pub use scaled::{ScaleRule, fused_adam_unless, fused_sgd_unless, update_scale};
pub use stats::{DeviceStats, device_memory, device_stats, empty_cache, reset_peak};
pub use stream::{Event, Stream, StreamGuard};
pub use upload::{HostMemory, HostPart, Marks, Upload, copy, pinned, upload, upload_marked};

use super::{TorchError, check};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

unsafe extern "C" {
    fn hr_device_count(out: *mut c_int) -> *mut c_char;
    fn hr_set_device(device: c_int) -> *mut c_char;
    fn hr_device_sync(device: c_int) -> *mut c_char;
}

/// Brings libtorch's CUDA half into this process, with all its symbols visible to what is loaded later. To be called
/// before any tensor is made: libtorch asks once whether there is CUDA. Again is a no-op.
///
/// # Errors
/// The library or one of those that it needs is missing; the message says how to get them.
pub fn load_cuda() -> Result<(), TorchError> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let path = libtorch_folder().map_or_else(|| "libtorch_cuda.so".into(), |dir| dir.join("libtorch_cuda.so"));
        // SAFETY: the library's initialisers register kernels with the libtorch_cpu of the same build, found beside it.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| e.to_string())?;
        // Never closed: its kernels are registered for the life of the process.
        std::mem::forget(library);
        Ok(())
    });
    loaded.clone().map_err(|problem| TorchError::Argument {
        call: "loading libtorch_cuda.so",
        problem: format!(
            "{problem}; install PyTorch with its CUDA libraries (scripts/setup does so where a GPU is present), or train \
             with --device cpu"
        ),
    })
}

/// The folder of the libtorch that this process runs with.
pub fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().find_map(|line| line.split_once('/').filter(|(_, p)| p.ends_with("/libtorch_cpu.so")))?.1;
    PathBuf::from(format!("/{path}")).parent().map(PathBuf::from)
}

/// CUDA devices that libtorch can use; 0 before [`load_cuda`].
///
/// # Errors
/// libtorch refuses.
pub fn device_count() -> Result<usize, TorchError> {
    let mut count = 0;
    // SAFETY: one place to write to.
    check("deviceCount", unsafe { hr_device_count(&mut count) })?;
    Ok(count.max(0) as usize)
}

/// Makes `device` the one that this thread works on.
///
/// # Errors
/// There is no such device.
pub fn set_device(device: usize) -> Result<(), TorchError> {
    // SAFETY: a plain number.
    check("setDevice", unsafe { hr_set_device(device as c_int) })
}

/// Waits on the host for all work of a device.
///
/// # Errors
/// Work on the device failed.
pub fn synchronize(device: usize) -> Result<(), TorchError> {
    // SAFETY: a plain number.
    check("synchronizeDevice", unsafe { hr_device_sync(device as c_int) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn without_a_device_every_call_is_an_error_value() {
        if device_count().is_ok_and(|count| count > 0) {
            eprintln!("skipped: this machine has a CUDA device");
            return;
        }
        assert!(Stream::new(0, true).is_err() && Stream::current(0).is_err());
        assert!(device_stats(0).is_err() && device_memory(0).is_err() && empty_cache().is_err());
        assert!(pinned(&[4], Kind::Float).is_err());
        let memory = vec![0_u8; 1 << 16];
        let error = HostPin::new(memory.as_ptr() as usize, memory.len(), SLAB_BYTES).unwrap_err().to_string();
        assert!(error.starts_with("cudaHostRegister: "), "{error}");
    }
}
