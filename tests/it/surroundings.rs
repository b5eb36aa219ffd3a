//! Surroundings that shape a program: inherited signals, limits, descriptors, priorities, and sandboxes that refuse
//! calls. The tests put them in place between fork and exec.
#![allow(unsafe_code)]

use rustix::process::{Resource, Rlimit, setrlimit};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

// The C library is linked by the standard library; these are its documented signatures on Linux.
unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn sigprocmask(how: i32, new: *const [u64; 16], old: *mut [u64; 16]) -> i32;
    fn close(fd: i32) -> i32;
    fn prctl(option: i32, a: usize, b: usize, c: usize, d: usize) -> i32;
    fn syscall(number: i64, ...) -> i64;
}

const SIG_IGN: usize = 1;
const SIG_BLOCK: i32 = 0;

/// Runs `setup` in the child that becomes `command`.
fn before_exec(command: &mut Command, setup: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: every `setup` of this file makes system calls only: no allocation, no locks.
    unsafe { command.pre_exec(setup) };
}

pub fn ignoring(command: &mut Command, number: i32) {
    before_exec(command, move || {
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal(number, SIG_IGN) };
        Ok(())
    });
}

pub fn blocking(command: &mut Command, numbers: &[i32]) {
    let mut set = [0u64; 16];
    numbers.iter().for_each(|number| set[0] |= 1 << (number - 1));
    before_exec(command, move || {
        // SAFETY: `set` is as large as the C library's sigset_t, 1024 bits.
        unsafe { sigprocmask(SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        Ok(())
    });
}

/// Closes descriptors 0 to 2.
pub fn without_descriptors(command: &mut Command) {
    before_exec(command, || {
        for fd in 0..3 {
            // SAFETY: nothing of the child uses them before exec.
            unsafe { close(fd) };
        }
        Ok(())
    });
}

pub fn limited(command: &mut Command, resource: Resource, soft: u64, hard: u64) {
    before_exec(command, move || Ok(setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) })?));
}

pub fn with_umask(command: &mut Command, mask: u32) {
    before_exec(command, move || {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
        Ok(())
    });
}

/// The disk class `idle`.
pub fn idle_for_disks(command: &mut Command) {
    before_exec(command, || {
        let number = if cfg!(target_arch = "x86_64") { 251 } else { 30 };
        // SAFETY: `ioprio_set` takes three numbers: this process, itself, class 3.
        unsafe { syscall(number, 1i64, 0i64, 3i64 << 13) };
        Ok(())
    });
}

/// A system call's number on x86-64 and on other machines, which share one table.
pub struct Call(pub &'static str, i64, i64);

pub const PIDFD_OPEN: Call = Call("pidfd_open", 434, 434);
pub const MEMFD_CREATE: Call = Call("memfd_create", 319, 279);
pub const EVENTFD: Call = Call("eventfd2", 290, 19);
pub const EPOLL_CREATE: Call = Call("epoll_create1", 291, 20);
pub const PRCTL: Call = Call("prctl", 157, 167);
pub const FLOCK: Call = Call("flock", 73, 32);
pub const LINK: Call = Call("linkat", 265, 37);
pub const PLAIN_LINK: Call = Call("link", 86, 1023);

/// An instruction of the kernel's packet filter.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u16,
    jump_if: u8,
    jump_else: u8,
    value: u32,
}

#[repr(C)]
struct Filter {
    len: u16,
    instructions: *const Instruction,
}

/// Has the kernel refuse calls with an error number, to `command` and all that it starts, as a container's profile does.
pub fn sandboxed(command: &mut Command, refused: &[(&Call, i32)]) {
    const LOAD_NUMBER: u16 = 0x20;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const REFUSE: u32 = 0x0005_0000;
    const ALLOW: u32 = 0x7fff_0000;
    let plain = |code, value| Instruction { code, jump_if: 0, jump_else: 0, value };
    let mut program = vec![plain(LOAD_NUMBER, 0)];
    for (Call(_, x86, other), errno) in refused {
        let number = if cfg!(target_arch = "x86_64") { *x86 } else { *other };
        program.push(Instruction { code: IF_EQUAL, jump_if: 0, jump_else: 1, value: number as u32 });
        program.push(plain(RETURN, REFUSE | *errno as u32));
    }
    program.push(plain(RETURN, ALLOW));
    before_exec(command, move || {
        let filter = Filter { len: program.len() as u16, instructions: program.as_ptr() };
        let (no_new_privileges, set_seccomp, by_filter) = (38, 22, 2);
        // SAFETY: both options read numbers, and the filter with its program, which live until the call returns.
        let installed = unsafe {
            prctl(no_new_privileges, 1, 0, 0, 0) == 0
                && prctl(set_seccomp, by_filter, &raw const filter as usize, 0, 0) == 0
        };
        if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
    });
}
