//! System calls that this kernel or sandbox refuses: named, with what to change, and what stands in for them.

use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// A system call that old kernels lack and sandboxes refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: (u32, u32),
}

pub const PIDFD_OPEN: Call = Call { name: "pidfd_open", since: (5, 3) };
pub const MEMFD_CREATE: Call = Call { name: "memfd_create", since: (3, 17) };
pub const EPOLL_CREATE: Call = Call { name: "epoll_create1", since: (2, 6) };
pub const PRCTL: Call = Call { name: "prctl", since: (2, 6) };

/// A run cannot go on without a call that is refused here.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

/// True if `error` means that the call is not available here at all.
pub fn is_refusal(error: Errno) -> bool {
    matches!(error, Errno::NOSYS | Errno::PERM | Errno::ACCESS)
}

impl Call {
    /// `pidfd_open is refused here (…): this kernel is 4.18, it needs Linux 5.3 or newer`.
    pub fn refused(&self, error: Errno) -> String {
        self.refused_by(error, &rustix::system::uname().release().to_string_lossy())
    }

    /// The same as an error, of the kind [`Refused`] where the call is refused.
    pub fn error(&self, error: Errno) -> std::io::Error {
        match is_refusal(error) {
            true => std::io::Error::other(Refused(self.refused(error))),
            false => error.into(),
        }
    }

    fn refused_by(&self, error: Errno, release: &str) -> String {
        let (name, (major, minor)) = (self.name, self.since);
        let why = if error == Errno::NOSYS && version(release).is_some_and(|kernel| kernel < self.since) {
            format!("this kernel is {release}, and the call needs Linux {major}.{minor} or newer")
        } else {
            format!(
                "the container's seccomp profile or the sandbox forbids it (kernel {release} has it): allow {name} there, as \
                 with docker run --security-opt seccomp=PROFILE"
            )
        };
        format!("{name} is refused here ({error}): {why}")
    }
}

/// `6.18.44-arch` is (6, 18).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// A line that is said once per process.
pub struct Once(AtomicBool);

impl Once {
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// The line, the first time.
    pub fn say(&self, line: impl FnOnce() -> String) -> Option<String> {
        (!self.0.swap(true, Ordering::Relaxed)).then(line)
    }
}

impl Default for Once {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_and_a_sandbox_are_told_apart() {
        let old = PIDFD_OPEN.refused_by(Errno::NOSYS, "4.18.0-553.el8");
        assert!(old.contains("pidfd_open is refused") && old.contains("needs Linux 5.3 or newer"), "{old}");
        for (error, release) in [(Errno::NOSYS, "6.1.0"), (Errno::PERM, "4.18.0"), (Errno::NOSYS, "odd")] {
            let sandbox = PIDFD_OPEN.refused_by(error, release);
            assert!(sandbox.contains("seccomp profile") && sandbox.contains("allow pidfd_open"), "{sandbox}");
        }
        assert!(is_refusal(Errno::PERM) && !is_refusal(Errno::MFILE));
    }

    #[test]
    fn a_line_is_said_once() {
        let once = Once::new();
        assert_eq!((once.say(|| "a".into()), once.say(|| "a".into())), (Some("a".into()), None));
    }
}
