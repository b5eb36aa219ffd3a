//! A CUDA device as libtorch sees it: its library, streams, events, allocator, page-locked memory and copies.
//!
//! The binary links no CUDA. [`load_cuda`] brings `libtorch_cuda.so` in where there is a device; every call before that,
//! or without it, is an error value.

use super::{AdamState, AdamStep, Raw, SgdStep, TorchError, check, raw, raws, scalar_type};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_double, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use tch::{Kind, Tensor};

unsafe extern "C" {
    fn hr_device_count(out: *mut c_int) -> *mut c_char;
    fn hr_set_device(device: c_int) -> *mut c_char;
    fn hr_stream_new(device: c_int, high_priority: c_int, id: *mut i64) -> *mut c_char;
    fn hr_stream_current(device: c_int, id: *mut i64) -> *mut c_char;
    fn hr_stream_set(device: c_int, id: i64, was: *mut i64) -> *mut c_char;
    fn hr_stream_native(device: c_int, id: i64, out: *mut *mut c_void) -> *mut c_char;
    fn hr_stream_sync(device: c_int, id: i64) -> *mut c_char;
    fn hr_event_new(timing: c_int, out: *mut Raw) -> *mut c_char;
    fn hr_event_free(event: Raw);
    fn hr_event_record(event: Raw, device: c_int, id: i64) -> *mut c_char;
    fn hr_event_block(event: Raw, device: c_int, id: i64) -> *mut c_char;
    fn hr_event_query(event: Raw, done: *mut c_int) -> *mut c_char;
    fn hr_event_sync(event: Raw) -> *mut c_char;
    fn hr_event_elapsed(from: Raw, to: Raw, ms: *mut c_double) -> *mut c_char;
    fn hr_upload(dst: Raw, src: *const c_void, bytes: usize, device: c_int, id: i64) -> *mut c_char;
    fn hr_copy(dst: Raw, src: Raw) -> *mut c_char;
    fn hr_pinned(dims: *const i64, ndims: usize, dtype: c_int, out: *mut Raw) -> *mut c_char;
    fn hr_device_stats(device: c_int, out: *mut i64) -> *mut c_char;
    fn hr_device_free(device: c_int, free: *mut usize, total: *mut usize) -> *mut c_char;
    fn hr_empty_cache() -> *mut c_char;
    fn hr_reset_peak(device: c_int) -> *mut c_char;
    fn hr_device_sync(device: c_int) -> *mut c_char;
    fn hr_unscale(grads: *const Raw, n: usize, found: Raw, inv_scale: Raw) -> *mut c_char;
    fn hr_update_scale(
        scale: Raw,
        tracker: Raw,
        found: Raw,
        growth: c_double,
        backoff: c_double,
        interval: i64,
    ) -> *mut c_char;
    fn hr_fused_adam_unless(
        adamw: c_int,
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: Raw,
        beta1: c_double,
        beta2: c_double,
        weight_decay: c_double,
        eps: c_double,
        found: Raw,
    ) -> *mut c_char;
    fn hr_fused_sgd_unless(
        params: *const Raw,
        grads: *const Raw,
        buffers: *const Raw,
        n: usize,
        lr: Raw,
        momentum: c_double,
        weight_decay: c_double,
        nesterov: c_int,
        first_step: c_int,
        found: Raw,
    ) -> *mut c_char;
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

/// A stream of a device: work given to it runs in order. Lives as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    device: c_int,
    id: i64,
}

impl Stream {
    /// One of libtorch's pool.
    ///
    /// # Errors
    /// No CUDA.
    pub fn new(device: usize, high_priority: bool) -> Result<Stream, TorchError> {
        let mut stream = Stream { device: device as c_int, id: 0 };
        // SAFETY: plain numbers and a place to write to.
        check("new stream", unsafe { hr_stream_new(stream.device, high_priority.into(), &mut stream.id) })?;
        Ok(stream)
    }

    /// This thread's current stream on `device`.
    ///
    /// # Errors
    /// No CUDA.
    pub fn current(device: usize) -> Result<Stream, TorchError> {
        let mut stream = Stream { device: device as c_int, id: 0 };
        // SAFETY: a plain number and a place to write to.
        check("current stream", unsafe { hr_stream_current(stream.device, &mut stream.id) })?;
        Ok(stream)
    }

    /// Makes it this thread's current stream until the guard is dropped.
    ///
    /// # Errors
    /// No CUDA.
    pub fn enter(self) -> Result<StreamGuard, TorchError> {
        let mut was = self;
        // SAFETY: numbers of a stream of this process, and a place to write to.
        check("set stream", unsafe { hr_stream_set(self.device, self.id, &mut was.id) })?;
        Ok(StreamGuard { was, _thread: std::marker::PhantomData })
    }

    /// The `cudaStream_t`.
    ///
    /// # Errors
    /// No CUDA.
    pub fn native(self) -> Result<*mut c_void, TorchError> {
        let mut out = std::ptr::null_mut();
        // SAFETY: numbers of a stream of this process, and a place to write to.
        check("native stream", unsafe { hr_stream_native(self.device, self.id, &mut out) })?;
        Ok(out)
    }

    /// Waits on the host for everything given to the stream.
    ///
    /// # Errors
    /// Work on the device failed.
    pub fn synchronize(self) -> Result<(), TorchError> {
        // SAFETY: numbers of a stream of this process.
        check("stream", unsafe { hr_stream_sync(self.device, self.id) })
    }
}

/// Puts the former stream back.
#[derive(Debug)]
pub struct StreamGuard {
    was: Stream,
    // The current stream belongs to the thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let mut ignored = 0;
        // SAFETY: numbers of a stream of this process.
        let _ = check("set stream", unsafe { hr_stream_set(self.was.device, self.was.id, &mut ignored) });
    }
}

/// A place in a stream's work. It can be recorded again and again; waits mean the latest record.
#[derive(Debug)]
pub struct Event(Raw);

// SAFETY: a c10::Event is two numbers and a CUDA handle that any thread may use; `&self` methods neither move nor free it.
unsafe impl Send for Event {}

impl Event {
    /// `timing`: for [`Event::elapsed_ms`], which costs a little.
    ///
    /// # Errors
    /// No CUDA.
    pub fn new(timing: bool) -> Result<Event, TorchError> {
        let mut out = std::ptr::null_mut();
        // SAFETY: a number and a place to write to; the event is ours until Drop.
        check("new event", unsafe { hr_event_new(timing.into(), &mut out) })?;
        Ok(Event(out))
    }

    /// Marks what `stream` has been given so far.
    ///
    /// # Errors
    /// The event belongs to another device.
    pub fn record(&mut self, stream: Stream) -> Result<(), TorchError> {
        // SAFETY: a live event, numbers of a stream of this process; `&mut self` keeps others off.
        check("record event", unsafe { hr_event_record(self.0, stream.device, stream.id) })
    }

    /// `stream` goes on only after the marked work; the host does not wait.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn block(&self, stream: Stream) -> Result<(), TorchError> {
        // SAFETY: a live event, numbers of a stream of this process.
        check("wait for event", unsafe { hr_event_block(self.0, stream.device, stream.id) })
    }

    /// Whether the marked work is done; true when nothing was marked.
    ///
    /// # Errors
    /// Work on the device failed.
    pub fn is_done(&self) -> Result<bool, TorchError> {
        let mut done = 0;
        // SAFETY: a live event and a place to write to.
        check("query event", unsafe { hr_event_query(self.0, &mut done) })?;
        Ok(done != 0)
    }

    /// Waits on the host.
    ///
    /// # Errors
    /// Work on the device failed.
    pub fn synchronize(&self) -> Result<(), TorchError> {
        // SAFETY: a live event.
        check("event", unsafe { hr_event_sync(self.0) })
    }

    /// Milliseconds from `from` to this event, both made with timing and done.
    ///
    /// # Errors
    /// They are not.
    pub fn elapsed_ms(&self, from: &Event) -> Result<f64, TorchError> {
        let mut ms = 0.0;
        // SAFETY: live events and a place to write to.
        check("elapsed time", unsafe { hr_event_elapsed(from.0, self.0, &mut ms) })?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by hr_event_new, freed once.
        unsafe { hr_event_free(self.0) }
    }
}

/// Host memory that a copy reads until it is done. The parts must stay where they are while the owner lives, moved or
/// not: heap memory, or a mapping.
pub trait HostMemory: Send {
    fn parts(&self) -> Vec<&[u8]>;
}

/// A copy to the device under way. It keeps the host memory; dropping it early waits.
pub struct Upload<H: HostMemory> {
    host: Option<Box<H>>,
    done: Option<Event>,
}

/// Begins to copy each part of `host` into the contiguous tensor at its place in `into`, on `stream`; absent: tensors on
/// the CPU, copied at once. Asynchronous where the memory is page-locked.
///
/// # Errors
/// Numbers or sizes differ, or CUDA refuses.
pub fn upload<H: HostMemory>(host: H, into: &[Tensor], stream: Option<Stream>) -> Result<Upload<H>, TorchError> {
    let mut upload = Upload { host: Some(Box::new(host)), done: None };
    let parts = upload.host.as_ref().map(|host| host.parts()).unwrap_or_default();
    if parts.len() != into.len() {
        let problem = format!("{} parts for {} tensors", parts.len(), into.len());
        return Err(TorchError::Argument { call: "upload", problem });
    }
    let mut result = Ok(());
    for (part, tensor) in parts.iter().zip(into) {
        let (device, id) = stream.map_or((0, 0), |stream| (stream.device, stream.id));
        // SAFETY: the shim compares sizes; the part is read until the event below, and `upload` keeps its owner until then.
        let error = unsafe { hr_upload(raw(tensor), part.as_ptr().cast(), part.len(), device, id) };
        result = result.and(check("copy to the device", error));
    }
    drop(parts);
    if let Some(stream) = stream {
        let recorded = Event::new(false).and_then(|mut event| event.record(stream).map(|()| event));
        match recorded {
            Ok(event) => upload.done = Some(event),
            Err(error) => {
                // Without an event only the stream can say when the memory is free again.
                let _ = stream.synchronize();
                result = result.and(Err(error));
            }
        }
    }
    result.map(|()| upload)
}

impl<H: HostMemory> Upload<H> {
    /// What `stream` is given from now on sees the copied bytes.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn before(&self, stream: Stream) -> Result<(), TorchError> {
        self.done.as_ref().map_or(Ok(()), |event| event.block(stream))
    }

    /// Whether the host memory is free again.
    ///
    /// # Errors
    /// The copy failed.
    pub fn is_done(&self) -> Result<bool, TorchError> {
        self.done.as_ref().map_or(Ok(true), Event::is_done)
    }

    /// Waits, and gives the host memory back.
    ///
    /// # Errors
    /// The copy failed.
    pub fn finish(mut self) -> Result<Option<Box<H>>, TorchError> {
        self.done.as_ref().map_or(Ok(()), Event::synchronize)?;
        self.done = None;
        Ok(self.host.take())
    }
}

impl<H: HostMemory> Drop for Upload<H> {
    fn drop(&mut self) {
        if let Some(done) = &self.done
            && done.synchronize().is_err()
        {
            // The device may still read: better lost than reused.
            std::mem::forget(self.host.take());
        }
    }
}

/// `dst ← src` on the current stream, asynchronous where host memory is page-locked.
///
/// # Errors
/// Shapes that do not fit.
pub fn copy(dst: &Tensor, src: &Tensor) -> Result<(), TorchError> {
    // SAFETY: live tensors.
    check("copy", unsafe { hr_copy(raw(dst), raw(src)) })
}

/// Page-locked host memory.
///
/// # Errors
/// No CUDA, or no memory.
pub fn pinned(shape: &[i64], kind: Kind) -> Result<Tensor, TorchError> {
    let dtype = scalar_type(kind)?;
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: a shape and a place to write to; on success the tensor is ours.
    unsafe {
        check("page-locked memory", hr_pinned(shape.as_ptr(), shape.len(), dtype, &mut out))?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

/// What libtorch's allocator holds of a device.
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

/// Waits on the host for all work of a device.
///
/// # Errors
/// Work on the device failed.
pub fn synchronize(device: usize) -> Result<(), TorchError> {
    // SAFETY: a plain number.
    check("synchronizeDevice", unsafe { hr_device_sync(device as c_int) })
}

/// Multiplies gradients by `inv_scale` (f32 `[1]`), and sets `found` (f32 `[1]`) to 1 where a result is infinite or no
/// number, on their device.
///
/// # Errors
/// Tensors that the kernel refuses.
pub fn unscale(grads: &[Tensor], found: &Tensor, inv_scale: &Tensor) -> Result<(), TorchError> {
    let list = raws(grads);
    // SAFETY: an array of live tensors and two more; all outlive the call.
    check("unscale", unsafe { hr_unscale(list.as_ptr(), list.len(), raw(found), raw(inv_scale)) })
}

/// How a loss scale moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleRule {
    pub growth: f64,
    pub backoff: f64,
    /// Steps without overflow before it grows.
    pub interval: i64,
}

/// The rule of `torch.amp.GradScaler.update` on the device: `scale` f32 `[1]`, `tracker` i32 `[1]`, `found` f32 `[1]`.
///
/// # Errors
/// Tensors that the kernel refuses.
pub fn update_scale(scale: &Tensor, tracker: &Tensor, found: &Tensor, rule: ScaleRule) -> Result<(), TorchError> {
    let ScaleRule { growth, backoff, interval } = rule;
    // SAFETY: live tensors and plain numbers.
    let error = unsafe { hr_update_scale(raw(scale), raw(tracker), raw(found), growth, backoff, interval) };
    check("update scale", error)
}

/// [`super::fused_adam`] with the rate in a tensor (`step.lr` is not read), undone on the device where `found` holds 1.
///
/// # Errors
/// As there.
pub fn fused_adam_unless(state: &AdamState, step: &AdamStep, lr: &Tensor, found: &Tensor) -> Result<(), TorchError> {
    let n = state.params.len();
    let lists = [state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps];
    if lists.iter().any(|list| list.len() != n) {
        return Err(TorchError::Argument { call: "fused_adam", problem: format!("lists must all have {n} entries") });
    }
    let lists = lists.map(raws);
    let [p, g, m, v, s] = lists.each_ref().map(Vec::as_ptr);
    let AdamStep { decoupled, beta1, beta2, eps, weight_decay, .. } = *step;
    let (lr, found) = (raw(lr), raw(found));
    // SAFETY: five arrays of n live tensors, checked above, and two more; they outlive the call.
    let error =
        unsafe { hr_fused_adam_unless(decoupled.into(), p, g, m, v, s, n, lr, beta1, beta2, weight_decay, eps, found) };
    check("_fused_adam_", error)
}

/// [`super::fused_sgd`] with the rate in a tensor (`step.lr` is not read), undone on the device where `found` holds 1.
///
/// # Errors
/// As there.
pub fn fused_sgd_unless(
    params: &[Tensor],
    grads: &[Tensor],
    buffers: &[Tensor],
    step: &SgdStep,
    lr: &Tensor,
    found: &Tensor,
) -> Result<(), TorchError> {
    let n = params.len();
    if grads.len() != n || (step.momentum != 0.0 && buffers.len() != n) {
        return Err(TorchError::Argument { call: "fused_sgd", problem: format!("lists must all have {n} entries") });
    }
    let (p, g, b) = (raws(params), raws(grads), raws(buffers));
    let (p, g, b) = (p.as_ptr(), g.as_ptr(), b.as_ptr());
    let SgdStep { momentum, weight_decay, nesterov, first, .. } = *step;
    let (lr, found) = (raw(lr), raw(found));
    // SAFETY: arrays of n live tensors, checked above, `b` read only with momentum; all outlive the call.
    let error =
        unsafe { hr_fused_sgd_unless(p, g, b, n, lr, momentum, weight_decay, nesterov.into(), first.into(), found) };
    check("_fused_sgd_", error)
}

/// Largest range that is registered in one call: measured at 0.05 s/GiB, a limit on how long one call may take.
pub const SLAB_BYTES: usize = 1 << 30;

type Register = unsafe extern "C" fn(*mut c_void, usize, c_uint) -> c_int;
type Unregister = unsafe extern "C" fn(*mut c_void) -> c_int;
type ErrorText = unsafe extern "C" fn(c_int) -> *const c_char;

/// The CUDA runtime that libtorch runs with.
struct Runtime {
    register: Register,
    unregister: Unregister,
    error_text: ErrorText,
}

impl Runtime {
    fn get() -> Result<&'static Runtime, TorchError> {
        static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
        let runtime = RUNTIME.get_or_init(|| {
            let all = Library::this();
            // SAFETY: the three functions have these types in every CUDA runtime (cuda_runtime_api.h).
            unsafe {
                Some(Runtime {
                    register: *all.get::<Register>(b"cudaHostRegister\0").ok()?,
                    unregister: *all.get::<Unregister>(b"cudaHostUnregister\0").ok()?,
                    error_text: *all.get::<ErrorText>(b"cudaGetErrorString\0").ok()?,
                })
            }
        });
        let problem = || "this process has no CUDA runtime: it comes with libtorch_cuda.so".to_owned();
        runtime.as_ref().ok_or_else(|| TorchError::Argument { call: "cudaHostRegister", problem: problem() })
    }

    fn check(&self, code: c_int) -> Result<(), TorchError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the runtime returns a static string for every number.
        let text = unsafe { CStr::from_ptr((self.error_text)(code)) }.to_string_lossy();
        Err(TorchError::Argument { call: "cudaHostRegister", problem: format!("{text} (error {code})") })
    }
}

/// Host memory that the device reads directly, registered in slabs; given back on drop.
///
/// Registering locks pages and neither reads nor writes them, so any range is safe to name: one that is not mapped is an
/// error. It must be given back before the memory behind it is punched out or unmapped, else the device goes on reading
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
            runtime.check(unsafe { (runtime.register)(at, len, PORTABLE) })?;
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
            runtime.check(unsafe { (runtime.unregister)(std::ptr::without_provenance_mut(self.slabs[index].0)) })?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    struct Bytes(Vec<u8>, Vec<u8>);

    impl HostMemory for Bytes {
        fn parts(&self) -> Vec<&[u8]> {
            vec![&self.0, &self.1]
        }
    }

    #[test]
    fn uploads_to_the_cpu_are_done_at_once_and_give_the_memory_back() {
        let into = [Tensor::zeros([2, 2], (Kind::Uint8, Device::Cpu)), Tensor::zeros([1], (Kind::Float, Device::Cpu))];
        let host = Bytes(vec![1, 2, 3, 4], 2.5_f32.to_ne_bytes().to_vec());
        let upload = upload(host, &into, None).unwrap();
        assert!(upload.is_done().unwrap());
        assert_eq!(Vec::<u8>::try_from(into[0].reshape([-1])).unwrap(), [1, 2, 3, 4]);
        assert_eq!(into[1].double_value(&[0]), 2.5);
        assert_eq!(upload.finish().unwrap().unwrap().0, [1, 2, 3, 4]);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let into = [Tensor::zeros([3], (Kind::Uint8, Device::Cpu)), Tensor::zeros([1], (Kind::Float, Device::Cpu))];
        let error = upload(Bytes(vec![1], vec![0; 4]), &into, None).err().unwrap().to_string();
        assert!(error.contains("1 bytes for a tensor of 3"), "{error}");
        let error = upload(Bytes(vec![1], vec![0; 4]), &into[..1], None).err().unwrap().to_string();
        assert!(error.contains("2 parts for 1 tensors"), "{error}");
    }

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

    #[test]
    fn the_loss_scale_moves_by_the_rule() {
        let one = |value: f32| Tensor::from_slice(&[value]);
        let (scale, tracker) = (one(8.0), Tensor::from_slice(&[0_i32]));
        let rule = ScaleRule { growth: 2.0, backoff: 0.5, interval: 2 };
        let mut seen = Vec::new();
        for overflow in [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0] {
            update_scale(&scale, &tracker, &one(overflow), rule).unwrap();
            seen.push(scale.double_value(&[0]));
        }
        assert_eq!(seen, [8.0, 16.0, 8.0, 8.0, 4.0, 4.0, 8.0]);
    }

    #[test]
    fn unscale_finds_what_is_not_finite_and_adam_then_changes_nothing() {
        for (bad, kept) in [(f32::INFINITY, true), (f32::NAN, true), (4.0, false)] {
            let (grads, found) = (Tensor::from_slice(&[2.0_f32, bad]), Tensor::from_slice(&[0_f32]));
            unscale(&[grads.shallow_clone()], &found, &Tensor::from_slice(&[0.5_f32])).unwrap();
            assert_eq!((grads.double_value(&[0]), found.double_value(&[0])), (1.0, f64::from(u8::from(kept))));
            let zeros = || [Tensor::zeros([2], (Kind::Float, Device::Cpu))];
            let (param, m, v) = ([Tensor::from_slice(&[1.0_f32, 1.0])], zeros(), zeros());
            let steps = [Tensor::from(1_f32)];
            let grads = [grads];
            let state = AdamState { params: &param, grads: &grads, exp_avgs: &m, exp_avg_sqs: &v, steps: &steps };
            let step = AdamStep { decoupled: true, lr: 0.0, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
            fused_adam_unless(&state, &step, &Tensor::from(0.1_f32), &found).unwrap();
            assert_eq!(param[0].double_value(&[0]) == 1.0, kept);
            assert_eq!(m[0].double_value(&[0]) == 0.0, kept);
        }
    }
}
