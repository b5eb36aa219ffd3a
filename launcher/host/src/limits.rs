//! Limits of the process (`ulimit`) against what a plan needs: what makes the run impossible is an error. Pure.

use crate::machine::ProcessLimits;
use spec::contract::{Device, LineId};
use spec::plan::{Plan, bytes_text};

/// Address space of a rank on a CPU without page cache and budget lines: libtorch's libraries, and the stacks and heaps of its
/// threads. Measured: 1.05 and 1.18 GB at the peak of two ranks of the smallest config, of which 0.2 GB vary.
const RANK_ADDRESS_BYTES: u64 = 900 << 20;
/// Descriptors of the launcher, its own and for each rank, and those of a rank. Measured: 31 with two ranks, 17 of rank 0.
const LAUNCHER_DESCRIPTORS: u64 = 24;
const LAUNCHER_DESCRIPTORS_PER_RANK: u64 = 8;
const RANK_DESCRIPTORS: u64 = 24;
/// Threads of the launcher, and of a rank beside those that compute and load. Measured: 6, and 6.
const LAUNCHER_THREADS: u64 = 8;
const RANK_THREADS: u64 = 8;
/// A run's logs and records reach this soon.
const LEAST_FILE_BYTES: u64 = 1 << 20;

/// A limit with which the run cannot work, and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {limit}, and {need}; raise it ({how}){instead}")]
pub struct LimitError {
    what: &'static str,
    limit: String,
    need: String,
    how: &'static str,
    instead: &'static str,
}

/// Checks `limits` against the plan. `tasks`: processes and threads of the user now; asked for where they are limited.
/// Returns lines about limits that do not stop the run and may matter.
///
/// # Errors
/// The run is impossible.
pub fn check_limits(
    plan: &Plan,
    limits: &ProcessLimits,
    tasks: impl FnOnce() -> u64,
) -> Result<Vec<String>, LimitError> {
    let needs = Needs::of(plan);
    let bytes = |limit: Option<u64>, need: u64| limit.filter(|limit| *limit < need);
    if let Some(limit) = bytes(limits.file_bytes, needs.file_bytes) {
        return Err(LimitError {
            what: "files may not become large enough",
            limit: format!("ulimit -f is {limit} bytes"),
            need: format!("{} needs {} bytes", needs.file, needs.file_bytes),
            how: "ulimit -f unlimited, fsize in limits.conf, LimitFSIZE= of the unit",
            instead: if needs.file == PAGE_CACHE {
                ", or lower data.cache_size_gb, or set data.cache: off"
            } else {
                ""
            },
        });
    }
    for (name, limit, need) in
        [("ulimit -v", limits.address_bytes, needs.address_bytes), ("ulimit -d", limits.data_bytes, needs.data_bytes)]
    {
        if let Some(limit) = bytes(limit, need) {
            return Err(LimitError {
                what: "a rank may not have enough memory",
                limit: format!("{name} is {limit} bytes"),
                need: format!("a rank needs at least {need} bytes ({})", bytes_text(need)),
                how: "ulimit -v unlimited -d unlimited; memory.budget bounds what Headroom uses",
                instead: "",
            });
        }
    }
    if let Some(limit) = bytes(limits.descriptors, needs.descriptors) {
        return Err(LimitError {
            what: "too few files may be open",
            limit: format!("ulimit -n is {limit}, the hard limit"),
            need: format!("launch and each rank need up to {}", needs.descriptors),
            how: "nofile in limits.conf, LimitNOFILE= of the unit, docker run --ulimit nofile=65536",
            instead: ", or use fewer ranks",
        });
    }
    if let Some(limit) = limits.processes {
        let now = tasks();
        if now.saturating_add(needs.tasks) > limit {
            return Err(LimitError {
                what: "too few processes and threads may run",
                limit: format!("ulimit -u is {limit}, of which this user has {now}"),
                need: format!("the run needs {} more", needs.tasks),
                how: "ulimit -u, nproc in limits.conf, TasksMax= and LimitNPROC= of the unit",
                instead: ", or lower train.num_workers, or use fewer ranks",
            });
        }
    }
    Ok(lines(plan, limits))
}

const PAGE_CACHE: &str = "the page cache";

/// The least that a plan needs of each limit.
struct Needs {
    file: &'static str,
    file_bytes: u64,
    address_bytes: u64,
    data_bytes: u64,
    descriptors: u64,
    tasks: u64,
}

impl Needs {
    fn of(plan: &Plan) -> Self {
        let (budget, topology) = (&plan.budget, &plan.topology);
        let ranks = topology.local_world_size as u64;
        let cuda = topology.device == Device::Cuda;
        let cache = budget.page_cache_bytes;
        // The model's weights are one of at most four equal parts of a checkpoint.
        let weights = budget.line_bytes(LineId::CheckpointStaging) / 4;
        // Ranks on a CPU reduce their gradients, as large as the weights, in one file, with a stage for each rank.
        let gradients = if cuda || ranks < 2 { 0 } else { ranks.saturating_mul(weights) };
        let meeting = gradients.saturating_add(budget.line_bytes(LineId::Collectives));
        let files = [
            (PAGE_CACHE, cache),
            ("a checkpoint", weights),
            ("the memory in which ranks meet", meeting),
            ("a record file", LEAST_FILE_BYTES),
        ];
        let (file, file_bytes) = files.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or((PAGE_CACHE, cache));
        // Slots are touched in full; other lines are bounds.
        let slots = budget.line_bytes(LineId::StagingSlots) / ranks.max(1);
        // How much address space a device's driver takes is not known here.
        let address_bytes = if cuda { 0 } else { cache.saturating_add(slots).saturating_add(RANK_ADDRESS_BYTES) };
        let launcher = LAUNCHER_DESCRIPTORS + LAUNCHER_DESCRIPTORS_PER_RANK.saturating_mul(ranks);
        let workers = plan.loader.threads as u64;
        let threads = (topology.threads_per_rank as u64).saturating_add(workers).saturating_add(RANK_THREADS);
        Self {
            file,
            file_bytes,
            address_bytes,
            data_bytes: if cuda { 0 } else { slots },
            descriptors: launcher.max(RANK_DESCRIPTORS.saturating_add(workers)),
            tasks: ranks.saturating_mul(threads).saturating_add(LAUNCHER_THREADS),
        }
    }
}

fn lines(plan: &Plan, limits: &ProcessLimits) -> Vec<String> {
    let cuda = plan.topology.device == Device::Cuda;
    let mut lines = Vec::new();
    if let Some(s) = limits.cpu_s {
        lines.push(format!("ulimit -t is {s} s: the kernel kills a rank that has used so much processor time"));
    }
    if let Some(bytes) = limits.address_bytes.filter(|_| cuda) {
        lines.push(format!(
            "ulimit -v is {bytes} bytes: CUDA reserves more address space than memory; if a rank cannot start, raise it"
        ));
    }
    if let Some(bytes) = limits.locked_bytes.filter(|_| cuda && plan.topology.nnodes > 1) {
        lines.push(format!(
            "ulimit -l is {bytes} bytes: NCCL over InfiniBand locks memory; if the nodes cannot meet, set it to unlimited"
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::plan::{BudgetLine, BudgetPlan};

    fn plan() -> Plan {
        let line = |name, bytes| BudgetLine { name, bytes, ..BudgetLine::default() };
        let lines = vec![line(LineId::CheckpointStaging, 40 << 20), line(LineId::StagingSlots, 20 << 20)];
        let mut plan = Plan {
            budget: BudgetPlan { page_cache_bytes: 1 << 30, lines, ..BudgetPlan::default() },
            ..Plan::default()
        };
        (plan.topology.local_world_size, plan.topology.threads_per_rank) = (2, 4);
        (plan.topology.device, plan.loader.threads) = (Device::Cpu, 3);
        plan
    }

    fn checked(plan: &Plan, limits: ProcessLimits, tasks: u64) -> Result<Vec<String>, String> {
        check_limits(plan, &limits, || tasks).map_err(|error| error.to_string())
    }

    #[test]
    fn what_makes_a_run_impossible_is_an_error_with_limit_need_and_way_out() {
        let none = ProcessLimits::default();
        assert_eq!(checked(&plan(), none, u64::MAX), Ok(Vec::new()));
        for (limits, says) in [
            (
                ProcessLimits { file_bytes: Some((1 << 30) - 1), ..none },
                ["ulimit -f is 1073741823 bytes", "data.cache: off"],
            ),
            (ProcessLimits { address_bytes: Some(1 << 30), ..none }, ["ulimit -v is 1073741824", "at least"]),
            (ProcessLimits { data_bytes: Some(1 << 20), ..none }, ["ulimit -d is 1048576", "ulimit -v unlimited"]),
            (ProcessLimits { descriptors: Some(39), ..none }, ["ulimit -n is 39", "need up to 40"]),
            (
                ProcessLimits { processes: Some(137), ..none },
                ["ulimit -u is 137, of which this user has 100", "38 more"],
            ),
        ] {
            let error = checked(&plan(), limits, 100).unwrap_err();
            assert!(says.iter().all(|part| error.contains(part)), "{error}");
        }
        let enough = ProcessLimits {
            file_bytes: Some(1 << 30),
            address_bytes: Some(2 << 30),
            data_bytes: Some(10 << 20),
            descriptors: Some(40),
            processes: Some(138),
            ..none
        };
        assert_eq!(checked(&plan(), enough, 100), Ok(Vec::new()));
    }

    #[test]
    fn without_a_page_cache_other_files_count() {
        let mut small = plan();
        small.budget.page_cache_bytes = 0;
        let error = |plan: &Plan, bytes| {
            let limits = ProcessLimits { file_bytes: Some(bytes), ..ProcessLimits::default() };
            checked(plan, limits, 0).unwrap_err()
        };
        let meeting = error(&small, 1 << 20);
        assert!(meeting.contains("the memory in which ranks meet needs 20971520 bytes"), "{meeting}");
        small.topology.local_world_size = 1;
        assert!(error(&small, 1 << 20).contains("a checkpoint needs 10485760 bytes"));
        small.budget.lines.clear();
        assert!(error(&small, 102_400).contains("a record file needs 1048576 bytes"));
    }

    #[test]
    fn limits_that_may_matter_are_lines() {
        let limits = ProcessLimits {
            cpu_s: Some(60),
            address_bytes: Some(4 << 30),
            locked_bytes: Some(1),
            ..ProcessLimits::default()
        };
        let mut cuda = plan();
        (cuda.topology.device, cuda.topology.nnodes) = (Device::Cuda, 2);
        let lines = checked(&cuda, limits, 0).unwrap();
        assert!(lines.len() == 3 && lines[0].contains("ulimit -t is 60 s"), "{lines:?}");
        assert_eq!(checked(&plan(), limits, 0).unwrap().len(), 1);
    }
}
