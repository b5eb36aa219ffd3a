//! Memory that allocators keep, and running out of it: an error value instead of a panic.

#![allow(unsafe_code)]

use super::TorchError;
use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

unsafe extern "C" {
    fn hr_trim_host() -> c_int;
    fn hr_count_tensors() -> c_int;
    fn hr_most_tensor_bytes() -> i64;
    fn hr_empty_device_cache() -> c_int;
    fn hr_device_memory(index: c_int, out: *mut i64) -> c_int;
    fn hr_device_statistics(
        index: c_int,
        put: extern "C" fn(*mut c_void, *const c_char, i64),
        into: *mut c_void,
    ) -> c_int;
    fn hr_grad_enabled() -> c_int;
    fn hr_set_grad_enabled(on: c_int);
}

/// Words by which the allocators of libtorch, CUDA and its libraries say that there is no more.
const OUT_OF_MEMORY: &[&str] = &[
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
];

/// Device memory as libtorch's caching allocator counts it, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    pub allocated_bytes: u64,
    /// Held by the allocator, in use or not.
    pub reserved_bytes: u64,
    /// Most ever allocated at once.
    pub peak_bytes: u64,
}

/// True if a message of libtorch reports that memory ran out, on the device or on the host.
pub fn is_out_of_memory(text: &str) -> bool {
    OUT_OF_MEMORY.iter().any(|words| text.contains(words))
}

/// Runs `body`. Memory that runs out within it comes back as [`TorchError::OutOfMemory`]; other panics continue. tch
/// panics where it has no error values, so that a model's forward pass needs this.
///
/// # Errors
/// [`TorchError::OutOfMemory`] with the first line of what the allocator said.
pub fn catch_out_of_memory<T>(body: impl FnOnce() -> T) -> Result<T, TorchError> {
    // SAFETY: reads and, below, writes a flag of this thread.
    let grad = unsafe { hr_grad_enabled() };
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let Some(message) = allocator_words(panic.as_ref()) else { resume_unwind(panic) };
        // `tch::no_grad` does not undo itself while a panic passes.
        // SAFETY: as above.
        unsafe { hr_set_grad_enabled(grad) };
        TorchError::OutOfMemory { message }
    })
}

/// The first line of an allocator's complaint, out of the debug form in which `unwrap` panics with it.
fn allocator_words(panic: &(dyn Any + Send)) -> Option<String> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())?;
    is_out_of_memory(text).then(|| first_line(text))
}

pub(super) fn first_line(text: &str) -> String {
    let inner = text.split_once("Torch(\"").map_or(text, |(_, inner)| inner);
    let line = inner.lines().next().unwrap_or_default();
    line.split("\\n").next().unwrap_or_default().trim_end_matches("\")").to_owned()
}

/// Converts an error of tch, with memory that ran out as a separate case.
pub fn error_of(call: &'static str, error: &tch::TchError) -> TorchError {
    let text = match error {
        tch::TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    let message = first_line(&text);
    if is_out_of_memory(&text) { TorchError::OutOfMemory { message } } else { TorchError::Cpp { call, message } }
}

/// Gives back what the C library and libtorch keep for later: free heap pages, and the device's cached blocks. Live
/// tensors stay. Takes milliseconds; what is needed again costs page faults.
pub fn release_caches() {
    // SAFETY: no arguments; every exception ends in the shim.
    unsafe {
        hr_empty_device_cache();
        hr_trim_host();
    }
}

/// From now on all threads' CPU tensors are counted, for [`most_tensor_bytes`], at the cost of two additions each; those
/// that are there already are not. `false`: libtorch's allocator cannot be counted.
pub fn count_tensors() -> bool {
    // SAFETY: no arguments; replaces the allocator by one that hands out the same memory.
    unsafe { hr_count_tensors() != 0 }
}

/// The most that CPU tensors held at once since this was last called, bytes as the C library rounds them; 0 before
/// [`count_tensors`].
pub fn most_tensor_bytes() -> u64 {
    // SAFETY: no arguments; reads and writes two atomics.
    u64::try_from(unsafe { hr_most_tensor_bytes() }).unwrap_or(0)
}

/// Memory of device `index`. `None` means that the device is missing or unused so far.
pub fn device_memory(index: usize) -> Option<DeviceMemory> {
    let mut out = [0_i64; 3];
    // SAFETY: three places, of which the shim writes three.
    let known = unsafe { hr_device_memory(c_int::try_from(index).ok()?, out.as_mut_ptr()) } != 0;
    let [allocated_bytes, reserved_bytes, peak_bytes] = out.map(|bytes| u64::try_from(bytes).unwrap_or(0));
    known.then_some(DeviceMemory { allocated_bytes, reserved_bytes, peak_bytes })
}

/// Every statistic of device `index`'s allocator, by the names of `torch.cuda.memory_stats`, sorted; bytes and counts.
/// `None` where there is no device, or none was used yet.
pub fn device_statistics(index: usize) -> Option<Vec<(String, i64)>> {
    statistics(c_int::try_from(index).ok()?)
}

/// The same; -1: the names with zeros, device or not.
fn statistics(index: c_int) -> Option<Vec<(String, i64)>> {
    extern "C" fn put(into: *mut c_void, name: *const c_char, value: i64) {
        // SAFETY: `into` is the list below, which nobody else holds while the shim runs; `name` ends in a zero byte and
        // lives until this call ends.
        let (list, name) = unsafe { (&mut *into.cast::<Vec<(String, i64)>>(), CStr::from_ptr(name)) };
        list.push((name.to_string_lossy().into_owned(), value));
    }
    let mut list: Vec<(String, i64)> = Vec::new();
    // SAFETY: `put` takes the list for what it is, and is called before this call ends or not at all.
    let known = unsafe { hr_device_statistics(index, put, (&raw mut list).cast()) } != 0;
    list.sort();
    known.then_some(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    /// More than any machine has: the allocator's own refusal.
    fn impossible() -> Tensor {
        Tensor::empty([1 << 50], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn memory_that_runs_out_is_an_error_value() {
        let error = catch_out_of_memory(impossible).unwrap_err();
        let TorchError::OutOfMemory { message } = &error else { panic!("{error}") };
        assert!(message.contains("can't allocate memory") && !message.contains('\n'), "{message}");
        assert!(!message.contains("\\n") && !message.contains("Torch("), "{message}");
        let tried = Tensor::f_empty([1 << 50], (Kind::Float, Device::Cpu)).unwrap_err();
        assert_eq!(error_of("empty", &tried).to_string(), error.to_string());
    }

    #[test]
    fn tensors_are_counted_from_any_thread() {
        const HUGE: i64 = 1 << 32;
        assert!(count_tensors() && count_tensors());
        let tensor = Tensor::empty([HUGE], (Kind::Uint8, Device::Cpu));
        // Other tests' tensors come meanwhile, and those from before the counting go: less than a half of this test's own.
        assert!(most_tensor_bytes() >= HUGE as u64 / 2);
        std::thread::spawn(move || drop(tensor)).join().unwrap();
        most_tensor_bytes();
        assert!(most_tensor_bytes() < HUGE as u64 / 2);
    }

    #[test]
    fn gradients_stay_on_after_a_panic_without_them() {
        let error = catch_out_of_memory(|| tch::no_grad(impossible));
        assert!(error.is_err());
        let leaf = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!((&leaf * 2.0).requires_grad());
    }

    #[test]
    fn other_panics_go_on() {
        let wrong = || Tensor::ones([2], (Kind::Float, Device::Cpu)).reshape([3]);
        let panic = catch_unwind(AssertUnwindSafe(|| catch_out_of_memory(wrong))).unwrap_err();
        assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("invalid for input of size")));
        let shape = Tensor::ones([2], (Kind::Float, Device::Cpu)).f_reshape([3]).unwrap_err();
        assert!(matches!(error_of("reshape", &shape), TorchError::Cpp { .. }));
    }

    #[test]
    fn the_words_of_devices_are_known() {
        for text in [
            "CUDA out of memory. Tried to allocate 20.00 GiB",
            "CUDA error: out of memory",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        ] {
            assert!(is_out_of_memory(text), "{text}");
        }
        assert!(!is_out_of_memory("CUDA error: an illegal memory access was encountered"));
    }

    #[test]
    fn the_allocators_statistics_bear_pytorchs_names() {
        let all = statistics(-1).unwrap();
        // torch.cuda.memory_stats of PyTorch 2.11: nine values by pool and kind, two by kind, six plain ones.
        assert_eq!(all.len(), 9 * 3 * 4 + 2 * 4 + 6);
        let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.is_sorted() && names.windows(2).all(|two| two[0] != two[1]), "{names:?}");
        for name in [
            "allocated_bytes.all.current",
            "allocated_bytes.all.peak",
            "reserved_bytes.large_pool.freed",
            "inactive_split_bytes.small_pool.current",
            "requested_bytes.all.allocated",
            "allocation.all.current",
            "segment.all.peak",
            "active.all.current",
            "oversize_segments.current",
            "num_alloc_retries",
            "num_ooms",
            "max_split_size",
        ] {
            assert!(names.contains(&name), "{name}");
        }
    }

    #[test]
    fn free_memory_goes_back_to_the_system() {
        let blocks: Vec<Vec<u8>> = (0..4000).map(|_| vec![1; 32 << 10]).collect();
        let status = || std::fs::read_to_string("/proc/self/statm").unwrap();
        let resident = |text: String| text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096;
        // One block at the end keeps the heap's top where it is: only trimming gives the rest back.
        let (last, all) = (blocks.last().cloned(), blocks);
        drop(all);
        let before = resident(status());
        release_caches();
        let after = resident(status());
        assert!(after + (60 << 20) < before, "{before} → {after}");
        drop(last);
    }
}
