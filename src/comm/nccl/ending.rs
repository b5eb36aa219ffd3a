//! The end of a communicator, on a thread of its own.

use super::sys::{Code, RawComm};
use crate::torch::device;
use std::sync::mpsc::{Receiver, channel};

/// `ncclCommAbort` or `ncclCommDestroy`.
type End = unsafe extern "C" fn(RawComm) -> Code;

struct Last(RawComm);

// SAFETY: the one handle of a communicator that nobody else uses any more; NCCL lets any thread end it.
unsafe impl Send for Last {}

/// Ends `raw`, which nobody may use from here on, on a separate thread. The receiver hears when that is done; `None`: there
/// was nothing to end.
///
/// Since NCCL 2.26 both calls return only after every CUDA graph with one of its collectives is gone, abort flag or not. The
/// thread works on this rank's device: a new one would make a context on device 0.
pub fn end(call: End, raw: RawComm, index: usize) -> Option<Receiver<()>> {
    if raw.is_null() {
        return None;
    }
    let (done, heard) = channel();
    let last = Last(raw);
    let work = move || {
        let last = last;
        let _ = device::set_device(index);
        // SAFETY: a live communicator of the library that `call` is of; each of the two calls frees it.
        unsafe { call(last.0) };
        let _ = done.send(());
    };
    // Without a thread the device is left as it is: the process ends soon, and its end frees all.
    std::thread::Builder::new().name("nccl-end".to_owned()).spawn(work).ok().map(|_| heard)
}
