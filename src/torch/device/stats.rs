//! Memory of a device by the allocator and the driver.

use crate::torch::{TorchError, check};
use std::ffi::{c_char, c_int};

unsafe extern "C" {
    fn hr_device_stats(device: c_int, out: *mut i64) -> *mut c_char;
    fn hr_device_free(device: c_int, free: *mut usize, total: *mut usize) -> *mut c_char;
    fn hr_empty_cache() -> *mut c_char;
    fn hr_reset_peak(device: c_int) -> *mut c_char;
}

/// Memory that libtorch's allocator holds on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    pub allocated_bytes: u64,
    pub peak_allocated_bytes: u64,
    pub reserved_bytes: u64,
    pub peak_reserved_bytes: u64,
    /// Calls that asked the driver for memory; flat in steady training.
    pub device_allocs: u64,
    pub retries: u64,
    pub out_of_memory: u64,
}

/// The allocator's numbers.
///
/// # Errors
/// No CUDA.
pub fn device_stats(device: usize) -> Result<DeviceStats, TorchError> {
    let mut out = [0_i64; 7];
    // SAFETY: room for the seven numbers that the shim writes.
    check("getDeviceStats", unsafe { hr_device_stats(device as c_int, out.as_mut_ptr()) })?;
    let [allocated_bytes, peak_allocated_bytes, reserved_bytes, peak_reserved_bytes, device_allocs, retries, oom] =
        out.map(|n| n.max(0) as u64);
    Ok(DeviceStats {
        allocated_bytes,
        peak_allocated_bytes,
        reserved_bytes,
        peak_reserved_bytes,
        device_allocs,
        retries,
        out_of_memory: oom,
    })
}

/// Free and total bytes of a device, all processes counted, as the driver reports them.
///
/// # Errors
/// No CUDA.
pub fn device_memory(device: usize) -> Result<(u64, u64), TorchError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: two places to write to.
    check("getMemoryInfo", unsafe { hr_device_free(device as c_int, &mut free, &mut total) })?;
    Ok((free as u64, total as u64))
}

/// Gives the device memory that the allocator keeps unused back to the driver.
///
/// # Errors
/// No CUDA.
pub fn empty_cache() -> Result<(), TorchError> {
    // SAFETY: no arguments.
    check("emptyCache", unsafe { hr_empty_cache() })
}

/// Peaks count from now.
///
/// # Errors
/// No CUDA.
pub fn reset_peak(device: usize) -> Result<(), TorchError> {
    // SAFETY: a plain number.
    check("resetPeakStats", unsafe { hr_reset_peak(device as c_int) })
}
