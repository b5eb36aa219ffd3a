//! NCCL's numbers as errors with words, and the waiting that non-blocking calls need.

use super::error::NcclError;
use super::sys::{Api, Code, IN_PROGRESS, RawComm, SUCCESS};
use crate::comm::CommError;
use host::machine::awake::{self, Deadline};
use std::ffi::CStr;
use std::time::{Duration, Instant};

/// `code` of `call` as a result; [`IN_PROGRESS`] is one too.
pub fn check(api: &Api, comm: RawComm, call: &'static str, code: Code) -> Result<(), NcclError> {
    if code == SUCCESS || code == IN_PROGRESS {
        return Ok(());
    }
    // SAFETY: NCCL returns a static string for every number, and for a null communicator the thread's last error.
    let (short, long) = unsafe { (text((api.error_string)(code)), text((api.last_error)(comm))) };
    let text = if long.is_empty() { short } else { format!("{short}: {long}") };
    Err(NcclError::Call { call, text })
}

/// # Safety
/// Null or a NUL-terminated string.
unsafe fn text(from: *const std::ffi::c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: see the function's contract.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().trim().replace('\n', "; ")
}

/// Polls until the communicator has finished a non-blocking call, `stop` says otherwise, or time is over.
pub fn settle(
    api: &Api,
    comm: RawComm,
    call: &'static str,
    limit: Duration,
    stop: impl Fn() -> Option<CommError>,
) -> Result<(), CommError> {
    let (start, deadline) = (Instant::now(), Deadline::new(limit));
    loop {
        let mut state = SUCCESS;
        // SAFETY: a live communicator and a place to write to.
        let code = unsafe { (api.comm_async_error)(comm, &mut state) };
        check(api, comm, "ncclCommGetAsyncError", code)?;
        check(api, comm, call, state)?;
        if state != IN_PROGRESS {
            return Ok(());
        }
        if let Some(reason) = stop() {
            return Err(reason);
        }
        if deadline.left_unless(awake::others_are_suspended).is_zero() {
            return Err(NcclError::Late { call, limit_s: limit.as_secs_f64() }.into());
        }
        pause(start.elapsed());
    }
}

/// Short at first, a millisecond when it takes longer.
pub fn pause(waited: Duration) {
    if waited < Duration::from_micros(200) {
        std::hint::spin_loop();
    } else if waited < Duration::from_millis(20) {
        std::thread::sleep(Duration::from_micros(50));
    } else {
        std::thread::sleep(Duration::from_millis(1));
    }
}
