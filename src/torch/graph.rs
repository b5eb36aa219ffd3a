//! CUDA graphs: work recorded once and given to the device again as a whole, through `libheadroom_graph.so` beside the
//! program. It is loaded when first asked for; a machine without it trains without graphs.

use super::TorchError;
use super::memory::first_line;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

type Raw = *mut c_void;

struct Api {
    text_free: unsafe extern "C" fn(*mut c_char),
    new: unsafe extern "C" fn(*mut Raw) -> *mut c_char,
    delete: unsafe extern "C" fn(Raw),
    begin: unsafe extern "C" fn(Raw) -> *mut c_char,
    end: unsafe extern "C" fn(Raw) -> *mut c_char,
    replay: unsafe extern "C" fn(Raw) -> *mut c_char,
}

impl Api {
    fn get() -> Result<&'static Api, TorchError> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        let problem = |problem: &String| TorchError::Argument { call: "CUDA graphs", problem: problem.clone() };
        API.get_or_init(Api::load).as_ref().map_err(problem)
    }

    fn load() -> Result<Api, String> {
        let exe = std::env::current_exe().map_err(|e| e.to_string())?;
        let path = exe.with_file_name("libheadroom_graph.so");
        if !path.exists() {
            return Err(format!("{} is missing: it is built with the program", path.display()));
        }
        // SAFETY: our own shared object; its symbols of libtorch resolve to the libraries that are loaded already.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
        // SAFETY: graph.cpp declares the six functions with these types.
        let api = unsafe {
            let of = |e: libloading::Error| e.to_string();
            Api {
                text_free: *library.get(b"hr_graph_text_free\0").map_err(of)?,
                new: *library.get(b"hr_graph_new\0").map_err(of)?,
                delete: *library.get(b"hr_graph_delete\0").map_err(of)?,
                begin: *library.get(b"hr_graph_begin\0").map_err(of)?,
                end: *library.get(b"hr_graph_end\0").map_err(of)?,
                replay: *library.get(b"hr_graph_replay\0").map_err(of)?,
            }
        };
        std::mem::forget(library);
        Ok(api)
    }

    fn check(&self, call: &'static str, error: *mut c_char) -> Result<(), TorchError> {
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: null or a NUL-terminated string from strdup, ours until freed.
        let message = unsafe {
            let text = first_line(&CStr::from_ptr(error).to_string_lossy());
            (self.text_free)(error);
            text
        };
        Err(TorchError::Cpp { call, message })
    }
}

/// Work of a device, recorded.
pub struct Graph {
    api: &'static Api,
    raw: Raw,
}

impl Graph {
    /// Records what `work` gives to this thread's current stream, which must not be the default one. Nothing of it runs.
    /// Tensors that it makes keep their place for every replay.
    ///
    /// # Errors
    /// There is no library, or `work` fails, panics, or does what cannot be recorded (reads a value back, for one).
    pub fn record<T, E: From<TorchError>>(work: impl FnOnce() -> Result<T, E>) -> Result<(Graph, T), E> {
        let api = Api::get()?;
        let mut raw: Raw = std::ptr::null_mut();
        // SAFETY: one place to write to; the graph is ours until Drop.
        api.check("new graph", unsafe { (api.new)(&mut raw) })?;
        let graph = Graph { api, raw };
        // SAFETY: a live graph.
        api.check("begin recording", unsafe { (api.begin)(graph.raw) })?;
        // tch panics where it has no error values; recording must end in every case.
        // A panic within `tch::no_grad` leaves gradients off; this guard puts them back as they were.
        let gradients = tch::no_grad_guard();
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tch::with_grad(work)));
        drop(gradients);
        // SAFETY: as above.
        let ended = api.check("end recording", unsafe { (api.end)(graph.raw) });
        let made = made.map_err(|panic| {
            let text = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
            TorchError::Argument { call: "recording", problem: first_line(text) }
        })??;
        ended?;
        Ok((graph, made))
    }

    /// Runs the recorded work on this thread's current stream.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn replay(&self) -> Result<(), TorchError> {
        // SAFETY: a live graph whose recording ended well, else `record` had not returned it.
        self.api.check("replay", unsafe { (self.api.replay)(self.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once.
        unsafe { (self.api.delete)(self.raw) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_device_recording_is_an_error_value() {
        if crate::torch::device::device_count().is_ok_and(|count| count > 0) {
            eprintln!("skipped: this machine has a CUDA device");
            return;
        }
        let error = Graph::record(|| Ok::<(), TorchError>(())).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("CUDA graphs: "), "{error}");
    }
}
