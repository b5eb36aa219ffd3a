//! Streams and events: what a device does in order, and places in that order.

use crate::torch::{Raw, TorchError, check};
use std::ffi::{c_char, c_double, c_int, c_void};

unsafe extern "C" {
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
}

/// A stream of a device: work given to it runs in order. Lives as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    pub(super) device: c_int,
    pub(super) id: i64,
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

    /// Makes `stream` wait for the marked work; the host does not wait.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn block(&self, stream: Stream) -> Result<(), TorchError> {
        // SAFETY: a live event, numbers of a stream of this process.
        check("wait for event", unsafe { hr_event_block(self.0, stream.device, stream.id) })
    }

    /// True if the marked work is done or nothing was marked.
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
