//! Limits of this process (`ulimit`), and its priorities.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most descriptors that the soft limit is raised to: programs that close every possible one take long with millions.
const MOST_DESCRIPTORS: u64 = 65_536;

/// Soft limits. `None`: unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessLimits {
    /// `ulimit -f`, bytes.
    pub file_bytes: Option<u64>,
    /// `ulimit -v`, bytes.
    pub address_bytes: Option<u64>,
    /// `ulimit -d`, bytes.
    pub data_bytes: Option<u64>,
    /// `ulimit -n`, after [`ProcessLimits::now`] raised it.
    pub descriptors: Option<u64>,
    /// `ulimit -u`: processes and threads of the user. Does not bind root.
    pub processes: Option<u64>,
    /// `ulimit -l`, bytes.
    pub locked_bytes: Option<u64>,
    /// `ulimit -t`, seconds.
    pub cpu_s: Option<u64>,
}

impl ProcessLimits {
    /// This process's limits, inherited by its ranks. Raises the soft limit of descriptors as far as the hard one allows.
    pub fn now() -> Self {
        raise_descriptors();
        let soft = |resource| getrlimit(resource).current;
        Self {
            file_bytes: soft(Resource::Fsize),
            address_bytes: soft(Resource::As),
            data_bytes: soft(Resource::Data),
            descriptors: soft(Resource::Nofile),
            processes: soft(Resource::Nproc).filter(|_| !rustix::process::geteuid().is_root()),
            locked_bytes: soft(Resource::Memlock),
            cpu_s: soft(Resource::Cpu),
        }
    }

    /// The limits that are set and end a process, or a file's growth, in the middle of a run: `ulimit -t is 60 s`.
    pub fn in_force(&self) -> Vec<String> {
        let bytes = |name: &str, value: Option<u64>| value.map(|bytes| format!("ulimit -{name} is {bytes} bytes"));
        let of = [
            bytes("f (size of a file)", self.file_bytes),
            bytes("v (address space of a process)", self.address_bytes),
            bytes("d (data of a process)", self.data_bytes),
            self.cpu_s.map(|s| format!("ulimit -t (processor time of a process) is {s} s")),
        ];
        of.into_iter().flatten().collect()
    }
}

fn raise_descriptors() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(MOST_DESCRIPTORS).min(MOST_DESCRIPTORS);
    if current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}

/// Processes and threads of this process's user.
pub fn tasks_of_user() -> u64 {
    let uid = rustix::process::getuid().as_raw();
    let names = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let pids = names.filter_map(|name| name.to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| tasks_of(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, uid)).sum()
}

/// Threads of the process with this `/proc/<pid>/status`, where `uid` owns it.
fn tasks_of(status: &str, uid: u32) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next();
    let owned = field("Uid:")?.parse::<u32>().ok()? == uid;
    owned.then(|| field("Threads:")?.parse().ok()).flatten()
}

/// Lines about priorities that make this process, and its ranks, wait for other programs. `idle_for_disks`: the disk class.
pub fn low_priorities(idle_for_disks: bool) -> Vec<String> {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    lines_of(&stat, idle_for_disks)
}

fn lines_of(stat: &str, idle_for_disks: bool) -> Vec<String> {
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    // Counted from the state, which is field 3: niceness is 19, the scheduling policy 41.
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
    let mut lines = Vec::new();
    if number(19) > 0 {
        let nice = number(19);
        lines.push(format!(
            "niceness is {nice}: steps take longer while other programs use the cores; start without nice to avoid that"
        ));
    }
    if number(41) == 5 {
        lines.push(
            "the scheduling policy is idle: training stands still while other programs use the cores; start without chrt \
             --idle to avoid that"
                .into(),
        );
    }
    if idle_for_disks {
        lines.push(
            "the disk class is idle: data are read only while no other program uses the disk; start without ionice -c 3 to \
             avoid that"
                .into(),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_below_the_usual_are_said() {
        let stat = |nice: i32, policy: i32| {
            let zeros = |n: usize| vec!["0"; n].join(" ");
            format!("7 (a) b) R {} {nice} {} {policy} 0 0", zeros(15), zeros(21))
        };
        assert_eq!(lines_of(&stat(0, 0), false), Vec::<String>::new());
        assert_eq!(lines_of("", false), Vec::<String>::new());
        let lines = lines_of(&stat(10, 5), true);
        assert!(lines[0].starts_with("niceness is 10") && lines[1].contains("chrt"), "{lines:?}");
        assert!(lines[2].contains("ionice -c 3"), "{lines:?}");
    }

    #[test]
    fn tasks_are_those_of_the_user() {
        let status = "Name:\ta\nUid:\t1000\t1000\t1000\t1000\nThreads:\t9\n";
        assert_eq!((tasks_of(status, 1000), tasks_of(status, 0), tasks_of("", 0)), (Some(9), None, None));
        assert!(tasks_of_user() >= 1);
    }

    #[test]
    fn limits_that_are_set_are_named() {
        let limits = ProcessLimits { file_bytes: Some(1024), cpu_s: Some(60), ..ProcessLimits::default() };
        let named = limits.in_force();
        assert_eq!(named[0], "ulimit -f (size of a file) is 1024 bytes");
        assert_eq!(named[1], "ulimit -t (processor time of a process) is 60 s");
        assert!(ProcessLimits::default().in_force().is_empty());
        assert!(ProcessLimits::now().descriptors.is_none_or(|n| n >= 64));
    }
}
