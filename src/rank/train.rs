//! A training rank, from its environment to its exit code.

use super::device;
use super::drawn::Drawn;
use super::meet;
use super::node_cache::NodeCache;
use super::numa;
use super::observer::{end_device_work, tell_failure};
use super::start::{Start, end_records, named, observer, open_records, tell_skipped};
use super::stop::Stop;
use super::{RankError, infer, read_job, registrar};
use crate::comm::rendezvous::{self, Links};
use crate::comm::shm::inherit;
use crate::comm::{Collective, CommError, Solo};
use crate::data::DataError;
use crate::data::split::KeptSplit;
use crate::ledger;
use crate::report::Reporter;
use crate::report::memory::{MemorySampler, MemorySnapshot};
use crate::report::records::write_summary;
use crate::task::{self, Datasets, ParamInfo, Team};
use crate::torch::{count_tensors, most_tensor_bytes};
use crate::train::checkpoint::{self, CheckpointError, Checkpointer, Facts, Loaded};
use crate::train::{Controls, Finished, Fit, LoopState, Resume, Status, TrainError};
use cache::client::CacheClient;
use host::lock::RunLock;
use host::machine::{self, ProcessLimits, awake};
use spec::contract::cache::CacheStats;
use spec::contract::{Best, CacheSummary, Held, Relief, RunStatus, Summary, env, exit};
use spec::job::{Job, Work};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tch::{Device, Tensor, nn};

/// Time between two memory records, besides those at phases and steps.
const MEMORY_PERIOD: Duration = Duration::from_secs(2);

/// Trains the run that the environment names; returns the exit code. Errors are reported to the launcher once.
pub fn main(inherited: Vec<String>) -> u8 {
    let began = Instant::now();
    if let Err(error) = awake::watch_own() {
        eprintln!("warning: no thread to watch for suspensions: {error}; throughput counts them");
    }
    let alone = !has_launcher();
    let stop = Stop::heed(alone);
    let result = stop.and_then(|stop| start(began, stop, if alone { inherited } else { Vec::new() })).map(|start| {
        let (reporter, rank) = (start.reporter.clone(), start.env.rank);
        (reporter, rank, caught(|| train(start)))
    });
    match result {
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code()
        }
        Ok((reporter, _, Ok(code))) => {
            reporter.done();
            code
        }
        Ok((reporter, rank, Err(error))) => {
            tell(&reporter, rank, &error);
            error.exit_code_of(rank)
        }
    }
}

/// A panic as the error that it ends the rank with.
fn caught(work: impl FnOnce() -> Result<u8, RankError>) -> Result<u8, RankError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(RankError::Panic(super::panic_text())))
}

/// Last words; once.
fn tell(reporter: &Reporter, rank: usize, error: &RankError) {
    match error {
        RankError::Train(error) => tell_failure(reporter, rank, error),
        other => reporter.failed(other.exit_code(), None, other.to_string()),
    }
}

/// True if `launch` started this rank, and looks after limits, priorities and the run's lock.
fn has_launcher() -> bool {
    std::env::var_os(env::CONTROL_FD).is_some()
}

/// Reads environment and job, meets the other ranks. `inherited`: lines about this process.
fn start(began: Instant, stop: Stop, inherited: Vec<String>) -> Result<Start, RankError> {
    let job = read_job(None)?;
    let env = rendezvous::from_env(|name| std::env::var(name).ok()).map_err(RankError::Environment)?;
    // A failure of a peer may arrive before this rank has met the others.
    // The thread that hears of it must not keep the collective: the last owner says goodbye to the other ranks.
    let meeting: Arc<OnceLock<Weak<dyn Collective>>> = Arc::new(OnceLock::new());
    let controls = Arc::new(Controls::new(Arc::clone(&stop.asked)));
    let peer_failed = {
        let meeting = Arc::clone(&meeting);
        move |rank, error| match meeting.get() {
            Some(collective) => {
                if let Some(collective) = collective.upgrade() {
                    collective.abort(CommError::PeerFailed { rank, error });
                }
            }
            None => std::process::exit(i32::from(exit::PEER)),
        }
    };
    let reporter = reporter(env.rank as u32, peer_failed, {
        let controls = Arc::clone(&controls);
        move |number, action| controls.order(number, action)
    })?;
    super::log::speak_through(&reporter);
    let told = |error: RankError| {
        reporter.failed(error.exit_code(), None, error.to_string());
        error
    };
    if env.local_rank == 0 {
        inherited.into_iter().for_each(|line| reporter.line(line));
    }
    if !has_launcher() {
        check_limits(&job, &reporter).map_err(told)?;
    }
    let timeout = Duration::try_from_secs_f64(job.config.train.step_timeout).unwrap_or(Duration::MAX);
    // Before any tensor is made: libtorch asks once whether there is CUDA.
    let device = device::prepare(&job, &env).map_err(told)?;
    if let (Device::Cuda(index), true) = (device, job.config.train.bind_numa) {
        let bound = crate::torch::device::bus_id(index).ok().and_then(|id| numa::bind(&id));
        bound.into_iter().for_each(|line| reporter.line(line));
    }
    let (collective, links): (Arc<dyn Collective>, _) = match device {
        Device::Cuda(index) if env.world_size == 1 && meet::wants_nccl() => {
            let alone = (!has_launcher()).then(|| Links::Host(Vec::new()));
            (Arc::new(meet::alone(&job, index, timeout, &reporter).map_err(told)?), alone)
        }
        _ if env.world_size == 1 => {
            let alone = (!has_launcher()).then(|| Links::Host(Vec::new()));
            (Arc::new(Solo::new(device)), alone)
        }
        Device::Cuda(index) => {
            let (nccl, links) = meet::on_devices(&job, &env, index, timeout, &reporter).map_err(told)?;
            (Arc::new(nccl), links)
        }
        _ if env.nodes > 1 => {
            let (gloo, links) = meet::on_nodes(&env, timeout, &reporter).map_err(told)?;
            (Arc::new(gloo), links)
        }
        _ => {
            let (shm, links) = meet::on_node(&env, timeout).map_err(told)?;
            (Arc::new(shm), links)
        }
    };
    let _ = meeting.set(Arc::downgrade(&collective));
    Ok(Start { job, env, device, collective, links, reporter, controls, stop, began })
}

/// Reports to the launcher over the inherited socket; prints where there is no launcher.
fn reporter(
    rank: u32,
    on_peer_failed: impl Fn(u32, String) + Send + 'static,
    on_relief: impl Fn(u64, Relief) + Send + 'static,
) -> Result<Reporter, RankError> {
    let Ok(number) = std::env::var(env::CONTROL_FD) else {
        return Ok(Reporter::plain()?);
    };
    let refused = |problem: String| RankError::Inherited {
        name: env::CONTROL_FD,
        value: number.clone(),
        problem,
        way_out: "; it is set by `launch`: unset it to run this rank by hand",
    };
    let fd = number.parse().map_err(|_| refused("expected the number of a descriptor".into()))?;
    let socket = inherit::inherited_socket(fd).map_err(|e| refused(e.to_string()))?;
    Ok(Reporter::over(socket, rank, on_peer_failed, on_relief)?)
}

/// Refuses limits with which the run cannot work.
fn check_limits(job: &Job, reporter: &Reporter) -> Result<(), RankError> {
    let checked = host::limits::check_limits(&job.plan, &ProcessLimits::now(), machine::tasks_of_user);
    let lines = checked.map_err(|e| RankError::NoRoom(e.to_string()))?;
    lines.into_iter().for_each(|line| reporter.line(line));
    Ok(())
}

/// Rank 0 locks the run's folder, as `launch` does for its ranks, before any rank writes there.
fn lock_run(start: &Start) -> Result<Option<RunLock>, RankError> {
    let Start { job, env, collective, reporter, .. } = start;
    let lost = |other: String| {
        eprintln!("error: the run was taken over by {other}, since this process gave no sign of life: ending");
        // Without destructors: libtorch's threads are at work.
        signal_hook::low_level::exit(i32::from(exit::USAGE));
    };
    let say = |line: String| reporter.line(line);
    let own = (env.rank == 0).then(|| RunLock::take(&job.run_dir, 0, "rank 0", say, Box::new(lost))).transpose();
    let problem = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = collective.all_gather(problem.as_bytes())?;
    let lock = own.map_err(|e| RankError::Usage(e.to_string()))?;
    match all.first().filter(|problem| !problem.is_empty()) {
        Some(problem) => {
            let error = String::from_utf8_lossy(problem).into_owned();
            Err(CommError::PeerFailed { rank: 0, error }.into())
        }
        None => Ok(lock),
    }
}

fn train(start: Start) -> Result<u8, RankError> {
    let Start { job, env, device, collective, links, reporter, .. } = &start;
    let _lock = if has_launcher() { None } else { lock_run(&start)? };
    let _stream = device::own_stream(*device)?;
    let threads = job.plan.topology.threads_per_rank.clamp(1, usize::from(u16::MAX)) as u16;
    crate::torch::set_threads(threads, 1).map_err(TrainError::from)?;
    let train = &job.config.train;
    crate::torch::operators::set_backends(train.tf32, train.cudnn_benchmark).map_err(TrainError::from)?;
    let resume = job.resume.as_deref().filter(|_| job.work == Work::Train).map(checkpoint::load).transpose()?;
    let mut node = NodeCache::join(job, env, links.as_ref(), collective, reporter)?;
    let cache = node.as_ref().map(|node| Arc::clone(&node.client));
    if let Some(cache) = cache.as_ref().filter(|_| job.config.train.pin_memory) {
        registrar::register(cache, *device, device::options(env.rank).always, reporter)?;
    }
    let trained = caught(|| with_cache(&start, resume, node.as_mut()));
    // While the page cache is there: the device forgets its pages when its work is done, and that may wait for other ranks.
    trained.inspect_err(|error| {
        tell(reporter, env.rank, error);
        // On other nodes nobody else tells the ranks.
        if device.is_cuda() || env.nodes > 1 {
            end_device_work(&**collective, error);
        }
    })
}

fn with_cache(start: &Start, resume: Option<Loaded>, node: Option<&mut NodeCache>) -> Result<u8, RankError> {
    let Start { job, env, device, collective, reporter, controls, began, .. } = start;
    let (config, plan) = (&job.config, &job.plan);
    let cache = node.as_ref().map(|node| Arc::clone(&node.client));
    let resumed_step = resume.as_ref().map(|loaded| loaded.step);
    let task = task::find(&config.task).map_err(RankError::Usage)?;
    let memory = memory_sampler(start, resumed_step, cache.clone())?;
    if job.work != Work::Train {
        return infer::run(start, memory);
    }
    let kept = kept_split(start, resume.as_ref());
    let datasets = open(start, task, cache.clone(), kept.as_ref())?;
    memory.print("After dataset creation");
    if env.rank == 0 {
        datasets.notes.iter().for_each(|line| reporter.line(line.clone()));
        tell_skipped(&datasets.skipped, reporter);
        infer::keep_carried(&job.run_dir, &datasets)?;
    }

    let mut settled = config.clone();
    let lines = task.settle(&mut settled, &datasets, plan.batch.global_batch as u64);
    lines.into_iter().filter(|_| env.rank == 0).for_each(|line| reporter.line(line));
    let config = &settled;
    tch::manual_seed(config.seed as i64);
    let mut vs = nn::VarStore::new(Device::Cpu);
    let mut model = task.model(config, &datasets, &vs.root())?;
    if device.is_cuda() {
        // Built twice: weights are drawn on the CPU, so that they do not depend on the device.
        let drawn = std::mem::replace(&mut vs, nn::VarStore::new(*device));
        model = task.model(config, &datasets, &vs.root())?;
        vs.copy(&drawn).map_err(|e| crate::torch::error_of("weights to the device", &e)).map_err(TrainError::from)?;
    }
    let allocator = device::allocator();
    if env.rank == 0 && (device.is_cuda() || allocator.is_some()) {
        reporter.line(device::told(*device, allocator.as_deref()));
    }
    let (params, buffers) = named(&vs);
    let infos: Vec<ParamInfo> =
        params.iter().map(|(name, tensor)| ParamInfo { name: name.clone(), shape: tensor.size() }).collect();
    let groups = task.groups(config, &infos, plan.batch.global_batch as u64);
    let facts = facts(start, task);
    let whole: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    let resume = match resume {
        Some(loaded) => Some(resume_from(loaded, &facts, &whole)?),
        None => first_weights(start, task, &whole).map(|()| None)?,
    };
    let recorded_step = resume.as_ref().map(|resume| resume.state.recorded_step());
    let mut observer = observer(start, memory, recorded_step, cache)?;
    observer.journal = (env.rank == 0).then(|| task.journal(config, &job.run_dir)).flatten();
    // Rank 0 of a new run.
    let drawing = (env.rank == 0 && recorded_step.is_none()).then(|| task.drawing(config, &datasets)).flatten();
    let checkpoints = job.run_dir.join("checkpoints");
    let writer = || Checkpointer::open(&checkpoints, config.log.keep_last)?.with_split(datasets.split.as_ref());
    let writer = (env.rank == 0).then(writer).transpose()?;
    let writer = writer.map(|writer| {
        let reporter = reporter.clone();
        writer.telling(move |line| reporter.line(line))
    });
    let fit = Fit {
        config,
        plan,
        device: *device,
        collective: Arc::clone(collective),
        datasets: &datasets,
        model: model.as_ref(),
        params,
        buffers,
        groups,
        metrics: task.metrics(config, &datasets)?,
        gallery: (env.rank == 0).then(|| task.gallery(config, &datasets)).flatten(),
        facts,
        checkpoints: writer,
        checkpoint_dir: &checkpoints,
        controls: Arc::clone(controls),
        device_options: device::options(env.rank),
    };
    // From here on a signal asks for a checkpoint. Ranks meet first: all begin to listen at the same time.
    collective.barrier()?;
    start.stop.begin();
    let drawn = Drawn::start(drawing, &job.run_dir, reporter);
    let finished = fit.run(resume, &mut observer)?;
    drop(drawn);
    let counted = match node {
        Some(node) => node.part(&**collective)?,
        None => None,
    };
    end_records(observer);
    if env.rank == 0 {
        close(start, &finished, counted, began.elapsed())?;
    }
    Ok(if finished.status == Status::Stopped { exit::STOPPED } else { exit::OK })
}

/// `train.init_from`, where it names a file. Tensors that the task lets begin anew keep what was drawn where the file has
/// none of their shape; one line names them.
fn first_weights(start: &Start, task: &dyn task::Task, whole: &[(String, Tensor)]) -> Result<(), RankError> {
    let Some(path) = &start.job.config.train.init_from else { return Ok(()) };
    let mut weights = checkpoint::load_weights(path).map_err(CheckpointError::of_weights)?;
    let fits =
        |name: &str, tensor: &Tensor| weights.iter().any(|(own, found)| own == name && found.size() == tensor.size());
    let drawn: BTreeSet<&str> = whole
        .iter()
        .filter(|(name, tensor)| task.begins_anew(name) && !fits(name, tensor))
        .map(|(name, _)| name.as_str())
        .collect();
    weights.retain(|(name, _)| !drawn.contains(name.as_str()));
    let rest: Vec<(String, Tensor)> = whole
        .iter()
        .filter(|(name, _)| !drawn.contains(name.as_str()))
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    checkpoint::apply(path, &weights, &rest).map_err(CheckpointError::of_weights)?;
    if let (Some(first), 0) = (drawn.iter().next(), start.env.rank) {
        start.reporter.line(format!(
            "{}: {} of {} tensors do not fit this data set's classes and are drawn anew, such as {first}",
            path.display(),
            drawn.len(),
            whole.len()
        ));
    }
    Ok(())
}

/// The split of the checkpoint that this run resumes from. A checkpoint without one is from before there were any: a line
/// says that its split cannot be compared.
fn kept_split(start: &Start, resume: Option<&Loaded>) -> Option<KeptSplit> {
    let loaded = resume?;
    if loaded.split.is_none() && start.env.rank == 0 {
        let path = loaded.path.display();
        start.reporter.line(format!(
            "{path} does not say which files each split had (an earlier version saved it): if files were added, removed or \
             renamed since, held-out ones may be trained on now"
        ));
    }
    let list = loaded.split.clone()?;
    Some(KeptSplit { list, choice: start.job.resume_split, checkpoint: loaded.path.clone() })
}

fn open(
    start: &Start,
    task: &dyn task::Task,
    cache: Option<Arc<CacheClient>>,
    kept: Option<&KeptSplit>,
) -> Result<Datasets, RankError> {
    let Start { job, env, collective, .. } = start;
    let gather = |bytes: &[u8]| collective.all_gather(bytes).map_err(|e| DataError::Gather(e.into()));
    let stages = infer::stages(job);
    let team = Team { rank: env.rank, world_size: env.world_size, gather: &gather, cache, kept, stages };
    let index = job.runs_dir().join(".index");
    Ok(task.open(&job.config, &team, &index)?)
}

fn memory_sampler(
    start: &Start,
    resumed_step: Option<u64>,
    cache: Option<Arc<CacheClient>>,
) -> Result<MemorySampler, RankError> {
    // Before the first one. A refusal leaves the records without them.
    count_tensors();
    let name = format!("memory.rank{}.jsonl", start.env.rank);
    let records = open_records(start, &name, resumed_step)?;
    let reporter = start.reporter.clone();
    let device = start.device;
    let probe = move |now: &mut MemorySnapshot| {
        now.held = Held { tensors_bytes: most_tensor_bytes(), ..ledger::take_most() };
        device::see_memory(device, now);
        let Some(cache) = &cache else { return };
        let (node, own) = (cache.node_stats(), cache.stats());
        now.cache_bytes = node.used_bytes;
        (now.cache_hits, now.cache_misses) = (own.hits, own.misses + own.bypasses);
    };
    MemorySampler::start(MEMORY_PERIOD, records, probe, move |line| reporter.line(line))
        .map_err(|e| RankError::system("memory sampling", e))
}

/// Facts that a checkpoint must share with this run.
fn facts(start: &Start, task: &dyn task::Task) -> Facts {
    let config = &start.job.config;
    Facts {
        model: format!("{} {}", config.task, task.architecture(config)),
        global_batch: start.job.plan.batch.global_batch as u64,
        seed: config.seed,
        world_size: start.env.world_size as u64,
    }
}

fn resume_from(loaded: Loaded, facts: &Facts, whole: &[(String, Tensor)]) -> Result<Resume, RankError> {
    loaded.check_facts(facts)?;
    checkpoint::apply(&loaded.path, &loaded.model, whole)?;
    let state: LoopState = loaded.state()?;
    Ok(Resume { state, optimizer: loaded.optimizer, ema: loaded.ema, rest: loaded.rest })
}

/// Rank 0's last work: the summary. The launcher draws the figures and adds the peaks of all processes and, where it hosted the
/// page cache, the cache's numbers; `cache` has them where rank 0 hosted it.
fn close(start: &Start, finished: &Finished, cache: Option<CacheStats>, wall: Duration) -> Result<(), RankError> {
    let Start { job, reporter, .. } = start;
    let config = &job.config;
    let summary = Summary {
        status: match finished.status {
            Status::Finished => RunStatus::Finished,
            Status::EarlyStopped => RunStatus::EarlyStopped,
            Status::Stopped => RunStatus::Stopped,
        },
        steps: finished.steps,
        epochs: finished.epochs,
        wall_s: wall.as_secs_f64(),
        train_s: finished.train_s,
        samples_per_s: finished.samples_per_s,
        metrics: finished.metrics.clone(),
        headline: finished.headline.clone(),
        best: finished.best.map(|best| Best {
            metric: config.train.monitor_metric.clone(),
            value: best.value,
            step: best.step,
        }),
        files_skipped: finished.files_skipped,
        reason: finished.reason.clone(),
        memory_cleanups: finished.cleanups,
        cache: cache.map_or_else(CacheSummary::default, |stats| CacheSummary::of(job.plan.budget.cache_policy, &stats)),
        restarts: std::env::var(env::RESTARTS).ok().and_then(|n| n.parse().ok()).unwrap_or(0),
        record_gaps: reporter.gaps(),
        start: job.start.clone(),
        ..Summary::default()
    };
    if let Err(error) = write_summary(&job.run_dir.join("summary.json"), &summary) {
        reporter.line(format!("warning: {error}"));
        reporter.summary(summary);
    }
    if let Some(stats) = &cache {
        reporter.line(stats.text(&config.task));
    }
    if config.log.plots && std::env::var_os(env::CONTROL_FD).is_none() {
        plot(&job.run_dir, reporter);
    }
    Ok(())
}

/// Lets `launch`, which lies beside this program, draw the figures of a run that another launcher started.
fn plot(run_dir: &Path, reporter: &Reporter) {
    let launch = std::env::current_exe().map(|own| own.with_file_name("launch"));
    let job = std::env::var_os(env::JOB).unwrap_or_default();
    let drawn = launch.and_then(|launch| {
        Command::new(launch).arg("plot").arg("--job").arg(job).arg("--").arg(run_dir).stdin(Stdio::null()).output()
    });
    let problem = match drawn {
        Ok(ended) if ended.status.success() => return,
        Ok(ended) => String::from_utf8_lossy(&ended.stderr).trim().to_owned(),
        Err(error) => format!("launch beside this program: {error}"),
    };
    reporter.line(format!(
        "no figures: {problem}; draw them with `launch plot {}`, or set log.plots to false to train without",
        run_dir.display()
    ));
}
