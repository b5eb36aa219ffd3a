//! System calls on inherited signals and priorities that neither the standard library nor `rustix` offers safely.
#![allow(unsafe_code)]

use rustix::process::Signal;

const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;

// The C library is linked by the standard library; these are its documented signatures on Linux.
unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn sigemptyset(set: *mut SignalSet) -> i32;
    fn pthread_sigmask(how: i32, new: *const SignalSet, old: *mut SignalSet) -> i32;
    fn syscall(number: i64, ...) -> i64;
}

/// The C library's `sigset_t`: 1024 bits on Linux.
#[repr(C)]
struct SignalSet([u64; 16]);

const SIG_SETMASK: i32 = 2;
#[cfg(target_arch = "x86_64")]
const IOPRIO_GET: Option<i64> = Some(252);
#[cfg(target_arch = "aarch64")]
const IOPRIO_GET: Option<i64> = Some(31);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const IOPRIO_GET: Option<i64> = None;

/// Signals whose default this program relies on; all but these stay as they were inherited: `nohup` and a shell's job control
/// ignore HUP, INT, QUIT, TSTP, TTIN and TTOU on purpose.
const RELIED_ON: [Signal; 8] =
    [Signal::CHILD, Signal::TERM, Signal::USR1, Signal::USR2, Signal::CONT, Signal::ABORT, Signal::ALARM, Signal::XCPU];

/// Sets what a process inherits over `exec` from whoever started it, and cannot work with, to its default: no signal
/// blocked, none of [`RELIED_ON`] ignored. SIGXFSZ is ignored: a file that may not grow is an error of the write (EFBIG),
/// which names the file. Call it first, while there is one thread.
pub fn reset_signals() {
    let mut none = SignalSet([0; 16]);
    // SAFETY: `none` is as large as the C library's set and outlives both calls; no old mask is asked for.
    unsafe {
        sigemptyset(&raw mut none);
        pthread_sigmask(SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    for number in RELIED_ON {
        // SAFETY: only resets a disposition; no handler of this program is set yet.
        unsafe { signal(number.as_raw(), SIG_DFL) };
    }
    // SAFETY: ignoring a signal runs no code.
    unsafe { signal(Signal::XFSZ.as_raw(), SIG_IGN) };
}

/// True if this process has the disk class `idle`, in which it waits for every other program (`ionice -c 3`).
pub fn is_idle_for_disks() -> bool {
    const WHO_PROCESS: i64 = 1;
    const CLASS_SHIFT: i64 = 13;
    const CLASS_IDLE: i64 = 3;
    // SAFETY: `ioprio_get` takes two numbers and touches no memory of this process.
    let found = IOPRIO_GET.map_or(-1, |number| unsafe { syscall(number, WHO_PROCESS, 0i64) });
    found >= 0 && found >> CLASS_SHIFT == CLASS_IDLE
}
