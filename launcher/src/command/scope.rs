//! A memory limit by `systemd-run --user --scope`, for users who may make no cgroup themselves.
//!
//! This process becomes systemd-run, which becomes this program again in a scope of its own: with the same process number, so
//! that whoever started it keeps what it holds. The limit binds the launcher and the page cache as well.

use super::print;
use crate::supervise::{Limits, may_limit};
use spec::contract::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

const SYSTEMD_RUN: &str = "systemd-run";

/// Ranks have a limit by the scope that this process is in.
pub(super) fn is_inside() -> bool {
    std::env::var_os(env::SCOPE).is_some()
}

/// Starts this program anew in a scope, where ranks could have no limit otherwise; returns where that is not needed or not
/// possible. `limits`: of the whole job.
pub(super) fn enter(limits: Limits) {
    if is_inside() || may_limit().is_ok() || !has_manager() {
        return;
    }
    let Ok(own) = std::env::current_exe() else { return };
    let (program, args) = (SYSTEMD_RUN, words(limits, own.as_os_str(), std::env::args_os().skip(1)));
    // Only a failure returns; then the run has no limit, and says so.
    let error = Command::new(program).args(args).env(env::SCOPE, "1").exec();
    print::note(format_args!("{SYSTEMD_RUN} does not start ({error}): the ranks have no memory limit"));
}

/// The user's own systemd can be asked.
fn has_manager() -> bool {
    let socket = std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|folder| Path::new(&folder).join("systemd").is_dir());
    let quiet =
        |command: &mut Command| command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    socket
        && quiet(Command::new(SYSTEMD_RUN).args(["--user", "--scope", "--quiet", "--", "true"]))
            .is_ok_and(|status| status.success())
}

fn words(limits: Limits, own: &OsStr, args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let Limits { high_bytes, max_bytes } = limits;
    let mut words: Vec<OsString> = ["--user", "--scope", "--quiet"].map(Into::into).into();
    for property in [format!("MemoryHigh={high_bytes}"), format!("MemoryMax={max_bytes}")] {
        words.extend(["-p".into(), property.into()]);
    }
    words.extend(["--".into(), own.to_owned()]);
    words.extend(args);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_words_run_again_behind_the_limits() {
        let limits = Limits { high_bytes: 1 << 30, max_bytes: 5 << 28 };
        let args = ["--cache", "1GiB", "--exec", "python", "a b.py"].map(OsString::from);
        let made = words(limits, OsStr::new("/bin/launch"), args.into_iter());
        let made: Vec<_> = made.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(
            made.join("|"),
            "--user|--scope|--quiet|-p|MemoryHigh=1073741824|-p|MemoryMax=1342177280|--|/bin/launch|--cache|1GiB|--exec|python|a b.py"
        );
    }
}
