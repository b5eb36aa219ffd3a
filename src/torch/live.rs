//! Bytes that a thread's CPU tensors hold, as libtorch's allocator reports them to a profiler.

use super::{TorchError, check};
use std::ffi::{c_char, c_void};
use std::marker::PhantomData;

unsafe extern "C" {
    fn hr_watch_start(out: *mut *mut c_void) -> *mut c_char;
    fn hr_watch_read(watch: *const c_void, live: *mut i64, peak: *mut i64);
    fn hr_watch_stop(watch: *mut c_void) -> *mut c_char;
}

/// Counts, from its start until it is dropped, what this thread allocates and frees for CPU tensors. A backward pass on
/// the CPU runs on the thread that asks for it, so it is counted too. Watches of a thread must nest.
#[derive(Debug)]
pub struct LiveBytes {
    watch: *mut c_void,
    // The hook belongs to the thread: this keeps the watch on it.
    _thread: PhantomData<*const ()>,
}

impl LiveBytes {
    /// # Errors
    /// No memory for the watch itself.
    pub fn start() -> Result<LiveBytes, TorchError> {
        let mut watch = std::ptr::null_mut();
        // SAFETY: a place to write to; on success it holds a watch of our own.
        check("memory watch", unsafe { hr_watch_start(&mut watch) })?;
        Ok(LiveBytes { watch, _thread: PhantomData })
    }

    /// Bytes allocated since the start and still held, less what was freed of older tensors that an earlier watch saw.
    pub fn live(&self) -> i64 {
        self.read().0
    }

    /// The largest value that [`LiveBytes::live`] had.
    pub fn peak(&self) -> i64 {
        self.read().1
    }

    fn read(&self) -> (i64, i64) {
        let (mut live, mut peak) = (0, 0);
        // SAFETY: the watch lives until `drop`; two places to write to.
        unsafe { hr_watch_read(self.watch, &mut live, &mut peak) };
        (live, peak)
    }
}

impl Drop for LiveBytes {
    fn drop(&mut self) {
        // SAFETY: made by `start` on this thread, and dropped once.
        let _ = check("memory watch", unsafe { hr_watch_stop(self.watch) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn tensors_are_counted_while_they_live() {
        let watch = LiveBytes::start().unwrap();
        let a = Tensor::zeros([1 << 16], (Kind::Float, Device::Cpu));
        let held = watch.live();
        assert!((1 << 18..1 << 19).contains(&held), "{held}");
        drop(&a + 1.0);
        assert!(watch.peak() >= 2 * held && watch.live() == held);
        drop(a);
        assert_eq!(watch.live(), 0);
    }
}
