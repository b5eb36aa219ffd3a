//! Host memory registered with the device.

use crate::torch::TorchError;
use libloading::os::unix::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// Largest range that is registered in one call: measured at 0.05 s/GiB, a limit on how long one call may take.
pub const SLAB_BYTES: usize = 1 << 30;

type Register = unsafe extern "C" fn(*mut c_void, usize, c_uint) -> c_int;
type Unregister = unsafe extern "C" fn(*mut c_void) -> c_int;
type LastError = unsafe extern "C" fn() -> c_int;
type ErrorText = unsafe extern "C" fn(c_int) -> *const c_char;
type BusId = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;

/// The CUDA runtime that libtorch runs with.
struct Runtime {
    register: Register,
    unregister: Unregister,
    last_error: LastError,
    error_text: ErrorText,
    bus_id: BusId,
}

impl Runtime {
    fn get() -> Result<&'static Runtime, TorchError> {
        static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
        let runtime = RUNTIME.get_or_init(|| {
            let all = Library::this();
            // SAFETY: the five functions have these types in every CUDA runtime (cuda_runtime_api.h).
            unsafe {
                Some(Runtime {
                    register: *all.get::<Register>(b"cudaHostRegister\0").ok()?,
                    unregister: *all.get::<Unregister>(b"cudaHostUnregister\0").ok()?,
                    last_error: *all.get::<LastError>(b"cudaGetLastError\0").ok()?,
                    error_text: *all.get::<ErrorText>(b"cudaGetErrorString\0").ok()?,
                    bus_id: *all.get::<BusId>(b"cudaDeviceGetPCIBusId\0").ok()?,
                })
            }
        });
        let problem = || "this process has no CUDA runtime: it comes with libtorch_cuda.so".to_owned();
        runtime.as_ref().ok_or_else(|| TorchError::Argument { call: "cudaHostRegister", problem: problem() })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), TorchError> {
        if code == 0 {
            return Ok(());
        }
        // The runtime keeps the error for whoever looks next on this thread: libtorch would, after its next kernel.
        // SAFETY: no arguments; the runtime returns a static string for every number.
        let text = unsafe {
            (self.last_error)();
            CStr::from_ptr((self.error_text)(code))
        };
        let text = text.to_string_lossy();
        Err(TorchError::Argument { call, problem: format!("{text} (error {code})") })
    }
}

/// Place of device `index` on the machine's bus, such as `0000:3b:00.0`.
///
/// # Errors
/// No CUDA, or no such device.
pub fn bus_id(index: usize) -> Result<String, TorchError> {
    let runtime = Runtime::get()?;
    let mut text = [0 as c_char; 32];
    let number = c_int::try_from(index).unwrap_or(c_int::MAX);
    // SAFETY: room for as many bytes as are named; the runtime ends the text with a zero.
    let code = unsafe { (runtime.bus_id)(text.as_mut_ptr(), text.len() as c_int - 1, number) };
    runtime.check("cudaDeviceGetPCIBusId", code)?;
    // SAFETY: the last byte is zero in any case.
    Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().to_lowercase())
}

/// Host memory that the device reads directly, registered in slabs; given back on drop.
///
/// Registering locks pages and neither reads nor writes them, so any range is safe to name: one that is not mapped is an
/// error. It must be given back before the memory behind it is punched out or unmapped, else the device keeps reading
/// the old pages.
#[derive(Debug, Default)]
pub struct HostPin {
    /// Address and bytes of each slab.
    slabs: Vec<(usize, usize)>,
}

impl HostPin {
    /// Registers `bytes` from `address` in slabs of at most `slab_bytes`. A copy must not cross from one into the next.
    ///
    /// # Errors
    /// No CUDA, or the range cannot be locked; nothing stays registered then.
    pub fn new(address: usize, bytes: usize, slab_bytes: usize) -> Result<HostPin, TorchError> {
        let runtime = Runtime::get()?;
        let mut pin = HostPin::default();
        let mut start = 0;
        while start < bytes {
            let len = (bytes - start).min(slab_bytes.max(1));
            const PORTABLE: c_uint = 1;
            let at = std::ptr::without_provenance_mut(address + start);
            // SAFETY: the call locks pages and leaves their bytes alone; the kernel refuses what is not mapped.
            runtime.check("cudaHostRegister", unsafe { (runtime.register)(at, len, PORTABLE) })?;
            pin.slabs.push((address + start, len));
            start += len;
        }
        Ok(pin)
    }

    /// Registered bytes.
    pub fn bytes(&self) -> usize {
        self.slabs.iter().map(|(_, len)| len).sum()
    }

    /// Gives back every slab that touches the range, before its pages are punched out. The device must be done with them.
    ///
    /// # Errors
    /// CUDA refuses; the slab stays listed.
    pub fn release(&mut self, address: usize, bytes: usize) -> Result<(), TorchError> {
        let runtime = Runtime::get()?;
        let touched = |(start, len): &(usize, usize)| *start < address + bytes && address < start + len;
        while let Some(index) = self.slabs.iter().position(touched) {
            // SAFETY: a range that `new` registered and that was not given back yet.
            let code = unsafe { (runtime.unregister)(std::ptr::without_provenance_mut(self.slabs[index].0)) };
            runtime.check("cudaHostUnregister", code)?;
            self.slabs.swap_remove(index);
        }
        Ok(())
    }
}

impl Drop for HostPin {
    fn drop(&mut self) {
        let _ = self.release(0, usize::MAX);
    }
}
