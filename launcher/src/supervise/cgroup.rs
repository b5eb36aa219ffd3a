//! A cgroup per job, where one may be made: so that what a rank has forked can be found and ended.
//!
//! v2 has `cgroup.kill`. In v1 hierarchies members are listed and killed until none is left.

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// v1 hierarchies that do not change what a process may use, tried in this order.
const V1_CONTROLLERS: [&str; 4] = ["freezer", "name=systemd", "pids", "cpuacct"];

/// One job's own cgroup. Everything is made ready beforehand, so that ending it allocates nothing (see `Guard`).
#[derive(Clone, Debug)]
pub struct Cgroup {
    dir: CString,
    procs: CString,
    /// `cgroup.kill`, v2 of Linux 5.14 on.
    kill: Option<CString>,
}

impl Cgroup {
    /// Makes a cgroup for this process's job below its own, and removes those that dead launchers left there.
    /// `None`: no hierarchy here may be written. `limited`: the folder of the job's own memory cgroup, which has the same name:
    /// where it lies in v2, it serves for both.
    pub fn make(limited: Option<&Path>) -> Option<Self> {
        let places = without(own_places(), limited);
        places.into_iter().find_map(|parent| Self::make_in(&parent).ok()).map(|(made, _)| made)
    }

    /// The same in one hierarchy: `parent` is this process's own cgroup there. Returns its folder too.
    ///
    /// # Errors
    /// The hierarchy may not be written, or not be joined.
    pub fn make_in(parent: &Path) -> io::Result<(Self, PathBuf)> {
        let name = name_of(std::process::id()).ok_or(io::ErrorKind::NotFound)?;
        remove_stale(parent);
        let dir = parent.join(&name);
        if dir.exists()
            && let Some(earlier) = Self::at(&dir)
        {
            // The group of this launcher's last attempt, whose members took long to end.
            earlier.end(5000);
        }
        fs::create_dir(&dir)?;
        // Refused where the hierarchy may be listed but not joined.
        let made = Self::at(&dir).ok_or_else(|| io::ErrorKind::InvalidInput.into());
        match made.and_then(|made| made.open_procs().map(|_| made)) {
            Ok(made) => Ok((made, dir)),
            Err(e) => {
                let _ = fs::remove_dir(&dir);
                Err(e)
            }
        }
    }

    fn at(dir: &Path) -> Option<Self> {
        let path = |file: &str| CString::new(dir.join(file).as_os_str().as_bytes()).ok();
        let kill = dir.join("cgroup.kill").exists().then(|| path("cgroup.kill")).flatten();
        Some(Self { dir: CString::new(dir.as_os_str().as_bytes()).ok()?, procs: path("cgroup.procs")?, kill })
    }

    /// Opened for writing: `0` moves the writing process in.
    pub fn open_procs(&self) -> io::Result<OwnedFd> {
        Ok(open(&self.procs, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Kills every member and removes the cgroup, trying for about `tries` milliseconds. Allocates nothing.
    /// True when it is gone.
    pub fn end(&self, tries: u32) -> bool {
        for attempt in 0..tries.max(1) {
            self.kill_members();
            match rustix::fs::rmdir(&self.dir) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => return true,
                // Members are on their way out.
                Err(_) if attempt + 1 < tries => pause(),
                Err(_) => {}
            }
        }
        false
    }

    fn kill_members(&self) {
        if let Some(kill) = &self.kill
            && let Ok(file) = open(kill, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            && rustix::io::write(&file, b"1").is_ok()
        {
            return;
        }
        let Ok(file) = open(&self.procs, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
            return;
        };
        let (mut bytes, mut number) = ([0u8; 4096], 0i32);
        while let Ok(n @ 1..) = rustix::io::read(&file, &mut bytes) {
            for byte in &bytes[..n] {
                match byte {
                    b'0'..=b'9' => number = number.wrapping_mul(10).wrapping_add(i32::from(byte - b'0')),
                    _ => {
                        if let Some(pid) = Pid::from_raw(number).filter(|_| number > 1) {
                            let _ = kill_process(pid, Signal::KILL);
                        }
                        number = 0;
                    }
                }
            }
        }
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}

/// `headroom-<pid namespace>-<pid>-<start time>`: never mistaken for another launcher's, even when pids repeat.
fn name_of(pid: u32) -> Option<String> {
    Some(format!("headroom-{}-{pid}-{}", pid_namespace()?, start_time(pid)?))
}

fn pid_namespace() -> Option<String> {
    let link = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(link.to_str()?.chars().filter(char::is_ascii_digit).collect())
}

/// Field 22 of `/proc/<pid>/stat`, clock ticks since boot.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; 19 fields lie between it and the start time.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

/// Cgroups of dead launchers of this pid namespace: their members end, the folders go.
fn remove_stale(parent: &Path) {
    let Some(namespace) = pid_namespace() else { return };
    let prefix = format!("headroom-{namespace}-");
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(&prefix).and_then(|rest| rest.split('-').next()?.parse().ok()) else {
            continue;
        };
        if name_of(pid).as_deref() != Some(&name)
            && let Some(stale) = Cgroup::at(&entry.path())
        {
            stale.end(20);
        }
    }
}

/// Places that do not hold the folder `taken`.
fn without(places: Vec<PathBuf>, taken: Option<&Path>) -> Vec<PathBuf> {
    let taken = taken.and_then(Path::parent);
    places.into_iter().filter(|place| Some(place.as_path()) != taken).collect()
}

/// Folders of this process's own cgroup in the hierarchies worth trying, v2 first.
fn own_places() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    places(&mounts, &own)
}

fn places(mountinfo: &str, own: &str) -> Vec<PathBuf> {
    let wanted = std::iter::once("").chain(V1_CONTROLLERS);
    wanted
        .filter_map(|controller| {
            let path = own.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let controllers = parts.next()?;
                controllers.split(',').any(|c| c == controller).then(|| parts.next()).flatten()
            })?;
            mountinfo.lines().find_map(|line| mounted(line, controller, path))
        })
        .collect()
}

/// The folder of cgroup `path` when this line of mountinfo mounts the hierarchy of `controller` (empty: v2).
fn mounted(line: &str, controller: &str, path: &str) -> Option<PathBuf> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, at) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, options) = (right.next()?, right.nth(1)?);
    let fits = match controller {
        "" => kind == "cgroup2",
        name => kind == "cgroup" && options.split(',').any(|option| option == name),
    };
    // A container sees its own part of the tree: `root` is what the mount shows as its top.
    let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or("");
    fits.then(|| Path::new(at).join(below.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
38 31 0:35 /docker/ab /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn finds_own_cgroup_in_both_versions_and_inside_a_container() {
        let own = "9:freezer:/docker/ab/job\n4:cpu,cpuacct:/x\n0::/user.slice/a\n";
        let expected = ["/sys/fs/cgroup/unified/user.slice/a", "/sys/fs/cgroup/freezer/job"];
        assert_eq!(places(MOUNTS, own), expected.map(PathBuf::from));
        assert_eq!(places("", own), Vec::<PathBuf>::new());
        assert_eq!(places(MOUNTS, "garbage"), Vec::<PathBuf>::new());
        // The limits of a group that is made anew are gone.
        let taken = Path::new("/sys/fs/cgroup/unified/user.slice/a/headroom-1-2-3");
        assert_eq!(without(places(MOUNTS, own), Some(taken)), [PathBuf::from(expected[1])]);
        assert_eq!(without(places(MOUNTS, own), None).len(), 2);
    }

    /// Every hierarchy that may be written here: v2 by `cgroup.kill`, v1 by listing.
    #[test]
    fn members_end_with_their_cgroup_in_every_hierarchy() {
        for parent in own_places() {
            let dir = parent.join(format!("headroom-test-{}", std::process::id()));
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            let cgroup = Cgroup::at(&dir).unwrap();
            let mut member = std::process::Command::new("sleep").arg("600").spawn().unwrap();
            let joined = fs::write(dir.join("cgroup.procs"), member.id().to_string());
            let gone = joined.is_ok().then(|| {
                cgroup.kill_members();
                member.wait().unwrap();
                cgroup.end(1000)
            });
            if gone.is_none() {
                member.kill().unwrap();
                member.wait().unwrap();
                fs::remove_dir(&dir).unwrap();
            }
            assert_ne!(gone, Some(false), "{}", dir.display());
        }
    }

    #[test]
    fn name_holds_the_identity_of_a_process() {
        let own = name_of(std::process::id()).unwrap();
        assert_eq!(own.split('-').count(), 4, "{own}");
        assert!(own.contains(&format!("-{}-", std::process::id())));
        assert_eq!(name_of(u32::MAX), None);
    }
}
