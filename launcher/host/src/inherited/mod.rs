//! State that a process inherits from whoever started it, set to what this program needs.

mod unix;

use self::unix::{is_idle_for_disks, reset_signals};
use crate::machine::{ProcessLimits, low_priorities};
use rustix::fs::Mode;
use rustix::process::umask;

/// Sets inherited state to its default: blocked and ignored signals, a file mode mask that takes rights from the owner, a soft
/// limit of descriptors below the hard one. Descriptors 0 to 2 that were closed are open already: the standard library opens
/// them on `/dev/null` before `main`. Call it first, while there is one thread. Returns lines about what cannot be set right
/// and makes the run slow.
pub fn set_defaults() -> Vec<String> {
    reset_signals();
    let mut lines: Vec<String> = own_rights().into_iter().collect();
    // Raises the limit of descriptors.
    let _ = ProcessLimits::now();
    lines.extend(low_priorities(is_idle_for_disks()));
    lines
}

/// Makes files readable and writable for their owner, whatever the inherited mask.
fn own_rights() -> Option<String> {
    let inherited = umask(Mode::RWXG | Mode::RWXO);
    let kept = inherited & (Mode::RWXG | Mode::RWXO);
    umask(kept);
    (inherited != kept).then(|| {
        let (inherited, kept) = (inherited.bits(), kept.bits());
        format!("umask {inherited:04o} would take the owner's own rights: {kept:04o} is used")
    })
}

/// True if this process ignores `signal`, as it does a hang-up under `nohup`.
pub fn is_ignored(signal: rustix::process::Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let bits = ignored.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    bits >> (signal.as_raw() - 1) & 1 == 1
}
