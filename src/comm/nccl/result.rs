//! NCCL's numbers as errors with words, and the waiting that non-blocking calls need.

use super::sys::{Api, Code, IN_PROGRESS, RawComm, SUCCESS};
use crate::comm::CommError;
use launcher::machine::awake::{self, Deadline};
use std::ffi::CStr;
use std::time::{Duration, Instant};

/// Why there is no NCCL, or what it had to say.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NcclError {
    #[error(
        "no NCCL found ({}): install the nvidia-nccl-cu13 package beside PyTorch, or name a libnccl.so.2 in HEADROOM_NCCL",
        tried.join("; ")
    )]
    Missing { tried: Vec<String> },
    #[error("NCCL {} at {origin} is too old: 2.14 or newer is needed; name another libnccl.so.2 in HEADROOM_NCCL", version_text(*version))]
    TooOld { origin: String, version: u32 },
    #[error("the NCCL library has no function {0}: name another libnccl.so.2 in HEADROOM_NCCL")]
    NoSymbol(&'static str),
    #[error("{call}: {text}")]
    Call { call: &'static str, text: String },
    #[error("{call} took longer than {limit_s:.0} s")]
    Late { call: &'static str, limit_s: f64 },
}

impl From<NcclError> for CommError {
    fn from(error: NcclError) -> Self {
        CommError::Other(error.to_string())
    }
}

/// `2.28.9` of 22809; versions up to 2.8 counted in thousands.
pub fn version_text(version: u32) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

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

/// Asks until the communicator has done what it was told without waiting, `stop` says otherwise, or time is over.
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
