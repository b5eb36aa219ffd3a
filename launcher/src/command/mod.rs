//! The verbs of `launch`: the other rooms joined. Errors are printed here, once.

mod around;
mod bench;
mod close;
mod data;
mod early;
mod exec;
mod figures;
mod help;
mod helper;
mod infer;
mod interpreter;
mod measure;
mod nodes;
mod print;
mod program;
mod scope;
mod setup;
mod smart;
mod stages;
mod supervised;
mod tools;

use crate::advise;
use crate::cli::{self, CliError, Command, PlanArgs, RunArgs, SampleDataArgs};
use crate::console::{self, Console};
use crate::plots::PlotError;
use crate::run_dir::{Ask, Resume, RunDir, RunDirError};
use crate::supervise::{self, CacheSpec, Limits, Outcome, Signals, Spec, Watcher};
use crate::track;
use crate::watch::{self, Before, WatchSpec};
use around::live::{Live, Tracked};
use around::requeue;
use cache::refused::Refused;
use cache::{HostError, PolicyKind};
use close::{close, explain};
use early::{Early, Moment, Undo};
use host::lock::RunLock;
use host::logging;
use host::machine::ProcessLimits;
use host::machine::{self, dataset_facts};
use host::nodes::{MeetError, SecretError};
use interpreter::Started;
use setup::Setup;
use spec::config::{Config, ConfigError, DeviceChoice, Folders};
use spec::contract::{LineId, Machine, env, exit};
use spec::job::{PassKind, Work};
use spec::plan::{self, CUDA_TRAINS, Plan, PlanError, Request};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Anything that ends `launch` before or after its ranks.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Cli(#[from] CliError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error(transparent)]
    Log(#[from] advise::LogError),
    #[error(transparent)]
    Plot(#[from] PlotError),
    #[error(transparent)]
    Export(#[from] track::ExportError),
    #[error("{0}")]
    Data(String),
    /// `rank describe` could not build the model.
    #[error("{text}")]
    Model { code: u8, text: String },
    #[error("{0}")]
    Target(String),
    #[error(transparent)]
    Meet(#[from] MeetError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{0}")]
    Disagree(String),
    #[error("node {node} cannot take part: {problem}")]
    Node { node: usize, problem: String },
    #[error(transparent)]
    Limit(#[from] host::limits::LimitError),
    #[error("{what}")]
    Io { what: String, code: u8, source: std::io::Error },
}

impl Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Cli(_) | Error::Config(_) | Error::Target(_) | Error::Disagree(_) | Error::Secret(_) => exit::USAGE,
            Error::Plan(error) => plan_exit_code(error),
            Error::Limit(_) => exit::PLAN,
            Error::RunDir(error) => error.exit_code(),
            Error::Data(_) | Error::Log(_) | Error::Export(_) => exit::DATA,
            Error::Meet(_) | Error::Node { .. } => exit::COMM,
            Error::Plot(PlotError::Draw { .. }) => exit::INTERNAL,
            Error::Plot(_) => exit::DATA,
            Error::Io { code, .. } | Error::Model { code, .. } => *code,
        }
    }
}

/// Exit code of a refused plan.
fn plan_exit_code(error: &PlanError) -> u8 {
    match error {
        PlanError::Device { .. } => exit::DEVICE,
        PlanError::DoesNotFit { .. }
        | PlanError::Program { .. }
        | PlanError::CacheTooLarge { .. }
        | PlanError::Budget(_)
        | PlanError::Overflow { .. } => exit::PLAN,
        PlanError::Invalid(_) => exit::USAGE,
    }
}

fn io(what: impl Into<String>, code: u8) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, code, source }
}

/// Runs the command line; returns the exit code.
pub fn main(line: impl IntoIterator<Item = OsString>) -> u8 {
    let inherited = host::inherited::set_defaults();
    let result = Command::parse(line).map_err(Error::from).and_then(|command| show_logs(&command).map(|()| command));
    let result = result.and_then(settled).and_then(|mut command| {
        requeue::prepare(&mut command)?;
        Ok(requeue::after(done(command, &inherited)?))
    });
    match result {
        Ok(code) => code,
        Err(Error::Cli(CliError::Shown(text))) => {
            print::say(text);
            exit::OK
        }
        Err(error) => {
            let code = error.exit_code();
            print::note(format_args!("error: {:#}", anyhow::Error::from(error)));
            code
        }
    }
}

/// Does what the command line asks for.
fn done(command: Command, inherited: &[String]) -> Result<u8, Error> {
    match command {
        Command::Train(run) if run.dry_run => show_plan(&run, None, false),
        Command::Plan(args) => plan_verb(&args),
        Command::Train(run) if run.smart => smart::smart(&run, early(Moment::BeforeRanks, inherited)?),
        Command::Train(run) => train(&run, early(Moment::BeforeRanks, inherited)?),
        Command::Predict(args) => infer::predict(&args, early(Moment::BeforeRanks, inherited)?),
        Command::Evaluate(args) => infer::evaluate(&args, early(Moment::BeforeRanks, inherited)?),
        Command::Exec { run, with, program, args } => {
            exec::exec(&run, &with, program, args, early(Moment::OfOthers, inherited)?)
        }
        Command::PlanExec { run, with, form, program, args } => program::show(&run, &with, &form, (&program, &args)),
        Command::SampleData(args) => data::by_rank(&args.words()),
        Command::Convert(args) => data::by_rank(&args.words()),
        Command::Batch(args) => data::batch(&args),
        Command::Recommend(args) => tools::recommend(&args),
        Command::Doctor(args) => tools::doctor(&args),
        Command::Analyze(args) => tools::analyze(&args),
        Command::Monitor(args) => tools::monitor_memory(&args),
        Command::Plot(args) => figures::plot(&args),
        Command::BenchMemory(args) => bench::bench_memory(&args),
        Command::Help(args) => help::help(&args),
        Command::Around(verb) => around::around(&verb),
    }
}

/// Ranks as the command line counts them: one per GPU or core.
fn settled(mut command: Command) -> Result<Command, Error> {
    let machine = || {
        let machine = machine::probe();
        (machine.gpus.len(), machine.cores)
    };
    command.settle(machine)?;
    Ok(command)
}

/// Log lines go to the console of a job that runs, else to standard error.
fn show_logs(command: &Command) -> Result<(), Error> {
    let variable = std::env::var_os(env::LOG).map(|value| value.to_string_lossy().into_owned());
    let filter = logging::filter(command.log_level(), variable.as_deref());
    let filter = filter.map_err(|error| Error::Target(error.to_string()))?;
    let show = |line: String| {
        if !console::note(&line) {
            print::note(line);
        }
    };
    logging::install(filter, show, show);
    Ok(())
}

/// The variable by which ranks learn of `--log-level`.
fn log_env(run: &RunArgs) -> Option<(String, String)> {
    run.log_level.as_ref().map(|level| (env::LOG.to_owned(), level.clone()))
}

/// Takes the signals of a verb that starts ranks, and says what was inherited and slows them.
fn early(moment: Moment, inherited: &[String]) -> Result<Early, Error> {
    inherited.iter().for_each(print::note);
    Early::take(moment).map_err(io("cannot take signals", exit::INTERNAL))
}

/// A config with the machine's facts: what the plan is made from.
struct Ready {
    config: Config,
    /// The task's stages; `config` is that of the one at hand, once there is one.
    stages: Vec<cli::Stage>,
    /// The machine that is planned for.
    machine: Machine,
    /// This machine, on which sizes are measured.
    here: Machine,
    request: Request,
    /// Passes of the model that are planned for.
    passes: PassKind,
    /// Gets what is half done while a signal may end the program.
    undo: Undo,
    /// What the ranks of all nodes share, where the launchers share a secret.
    ranks_key: Option<String>,
}

fn here() -> Result<(PathBuf, PathBuf), Error> {
    let exe = std::env::current_exe().map_err(io("cannot find this program", exit::INTERNAL))?;
    let cwd = std::env::current_dir().map_err(io("cannot find the working folder", exit::INTERNAL))?;
    Ok((exe, cwd))
}

fn prepare(config: &cli::ConfigArgs, request: Request, undo: &Undo) -> Result<Ready, Error> {
    prepare_for(config, request, undo, None)
}

/// `machine`: another one than this.
fn prepare_for(
    config: &cli::ConfigArgs,
    request: Request,
    undo: &Undo,
    machine: Option<Machine>,
) -> Result<Ready, Error> {
    let (exe, cwd) = here()?;
    let here = machine::probe();
    let machine = machine.unwrap_or_else(|| here.clone());
    let gpu = CUDA_TRAINS && !machine.gpus.is_empty();
    let (headroom, home) = (cli::home(&exe), std::env::home_dir());
    let folders = Folders { cwd: &cwd, headroom: headroom.as_deref(), home: home.as_deref() };
    let prepared = config.prepare(gpu, &folders)?;
    for note in &prepared.notes {
        print::note(note);
    }
    let cli::Prepared { mut config, stages, .. } = prepared;
    // What is missing or impossible is the plan's to say.
    if let (Some(task), Ok(share)) = (spec::task::find(&config.task), plan::node_share(&config, &machine, &request)) {
        task.for_ranks(&mut config, share.asked.saturating_mul(request.nnodes));
    }
    Ok(Ready { config, stages, machine, here, request, passes: PassKind::Train, undo: undo.clone(), ranks_key: None })
}

fn request(run: &RunArgs) -> Request {
    Request {
        gpus: run.gpus,
        ranks: run.ranks,
        device: run.config.device.unwrap_or(DeviceChoice::Auto),
        strict: run.strict,
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        ..Request::default()
    }
}

impl Ready {
    fn plan(&self) -> Result<Plan, Error> {
        let measured = measure::measured(self)?;
        Ok(plan::plan(&self.config, &self.machine, &measured, &self.request)?)
    }

    /// Refuses a plan that the limits of this process make impossible; says which others may matter.
    fn check_limits(&self, plan: &Plan) -> Result<(), Error> {
        let lines = host::limits::check_limits(plan, &ProcessLimits::now(), machine::tasks_of_user)?;
        lines.iter().for_each(print::note);
        Ok(())
    }

    /// The same, with smaller settings where memory is rather full already; the plan notes what was changed. Not for one of
    /// several nodes, whose settings are to be alike.
    fn eased_plan(&mut self) -> Result<Plan, Error> {
        let plan = self.plan()?;
        let eased = Before::of(&self.machine, &plan).and_then(|before| watch::ease(&self.config, &plan, &before));
        let Some((config, line)) = eased else { return Ok(plan) };
        self.config = config;
        let mut plan = self.plan()?;
        plan.notes.push(line);
        Ok(plan)
    }

    /// Sample data where the config wants it and nothing is there. It appears whole or not at all, so that an
    /// interrupted first run does not leave half a data set for the next.
    fn sample_if_missing(&self) -> Result<(), Error> {
        let data = &self.config.data;
        let path = &data.dataset_path;
        let empty = || path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        if !data.sample_if_missing || (dataset_facts(path).exists && !empty()) {
            return Ok(());
        }
        let shown = path.display();
        print::note(format_args!("no data at {shown}: making sample data there"));
        let partial = path.with_added_extension(format!("partial-{}", std::process::id()));
        self.undo.add(&partial);
        std::fs::create_dir_all(&partial).map_err(io(format!("cannot make {}", partial.display()), exit::DATA))?;
        let made = self
            .make_sample(&partial)
            .and_then(|()| std::fs::rename(&partial, path).map_err(io(format!("cannot make {shown}"), exit::DATA)));
        if made.is_err() {
            let _ = std::fs::remove_dir_all(&partial);
        }
        self.undo.forget(&partial);
        made
    }

    fn make_sample(&self, out: &Path) -> Result<(), Error> {
        let args = SampleDataArgs::of(&self.config.task, out, self.config.seed);
        let mut command = rank_command(&args.words())?;
        supervise::prepare_helper(&mut command);
        let status = command.status().map_err(io("cannot start rank", exit::INTERNAL))?;
        let path = self.config.data.dataset_path.display();
        let failed = || Error::Data(format!("no sample data at {path}: `rank sample-data` ended with {status}"));
        if status.success() { Ok(()) } else { Err(failed()) }
    }
}

fn rank_program() -> Result<PathBuf, Error> {
    let (exe, _) = here()?;
    Ok(cli::rank_program(std::env::var_os(cli::RANK_PROGRAM), &exe)?)
}

fn rank_command(words: &[OsString]) -> Result<std::process::Command, Error> {
    let mut command = std::process::Command::new(rank_program()?);
    command.args(words);
    Ok(command)
}

/// Columns of the terminal; 80 without a terminal.
fn columns() -> usize {
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(80, |size| usize::from(size.ws_col).max(40))
}

/// The plan as people read it.
fn text_of(plan: &Plan) -> String {
    let width = columns();
    format!("{}\n{}", plan.table_at(width), plan.notes_at(width))
}

fn plan_verb(args: &PlanArgs) -> Result<u8, Error> {
    if let Some(path) = &args.write_machine {
        measure::write_machine(&machine::probe(), path)?;
        print::note(format_args!("this machine is in {}; plan for it elsewhere with --machine", shown(path)));
        if args.run.config.config.is_none() {
            return Ok(exit::OK);
        }
    }
    let machine = args.machine.as_deref().map(measure::read_machine).transpose()?;
    show_plan(&args.run, machine, args.json)
}

fn show_plan(run: &RunArgs, machine: Option<Machine>, json: bool) -> Result<u8, Error> {
    let is_here = machine.is_none();
    let mut ready = prepare_for(&run.config, request(run), &Undo::default(), machine)?;
    let chosen = stages::chosen(run, &ready)?;
    let mut plans = Vec::with_capacity(chosen.len().max(1));
    if chosen.is_empty() {
        plans.push((None, ready.eased_plan()?));
    }
    for stage in &chosen {
        stages::enter(&mut ready, stage);
        plans.push((Some(stage.spec.name), ready.eased_plan()?));
    }
    for (stage, plan) in &plans {
        if is_here {
            ready.check_limits(plan)?;
        }
        if json {
            continue;
        }
        let heading = stage.map(|name| format!("stage {name}\n")).unwrap_or_default();
        print::out(format!("{heading}{}", text_of(plan)))?;
    }
    if json {
        let by_stage: serde_json::Map<_, _> = plans
            .iter()
            .filter_map(|(stage, plan)| Some(((*stage)?.to_owned(), serde_json::to_value(plan).ok()?)))
            .collect();
        let text = match plans.first() {
            Some((None, plan)) => serde_json::to_string_pretty(plan),
            _ => serde_json::to_string_pretty(&by_stage),
        };
        print::out(text.unwrap_or_default())?;
    }
    Ok(exit::OK)
}

fn train(run: &RunArgs, mut early: Early) -> Result<u8, Error> {
    let mut ready = prepare(&run.config, request(run), early.undo())?;
    let program = rank_program()?;
    if !stages::chosen(run, &ready)?.is_empty() {
        return stages::run(run, ready, &program, early);
    }
    let (plan, mut folder, _lock) =
        if run.nnodes > 1 { nodes::together(run, &mut ready)? } else { alone(run, &mut ready)? };
    print::say(text_of(&plan));
    announce(&folder, &run.resume());
    pre_flight(&ready, &plan);
    let mut setup = Setup { config: ready.config.clone(), plan, reduced: Vec::new() };
    let outcome = supervise_run(run, &ready, &mut setup, &mut folder, &program, early.hand_over())?;
    close(&folder, &setup, &outcome);
    Ok(outcome.exit_code)
}

fn alone(run: &RunArgs, ready: &mut Ready) -> Result<(Plan, RunDir, RunLock), Error> {
    ready.plan()?;
    ready.sample_if_missing()?;
    // Again: the sample data weigh something now.
    let plan = ready.eased_plan()?;
    ready.check_limits(&plan)?;
    let (folder, lock) = open_folder(run, ready)?;
    Ok((plan, folder, lock))
}

/// The run's folder, locked: one job trains in it at a time.
fn open_folder(run: &RunArgs, ready: &Ready) -> Result<(RunDir, RunLock), Error> {
    let resume = run.resume();
    let ask = Ask {
        runs_dir: &ready.config.log.runs_dir,
        config_name: &ready.config.name,
        name: run.name.as_deref(),
        resume: &resume,
        node_rank: run.node_rank,
        now: SystemTime::now(),
    };
    let mut folder = RunDir::open(&ask)?;
    folder.resume_split = run.resume_split;
    let lock = folder.lock(&resume, print::note)?;
    ready.undo.add(lock.path());
    Ok((folder, lock))
}

/// The guides' check before training; silent where the watch is off.
fn pre_flight(ready: &Ready, plan: &Plan) {
    if ready.config.watch.enabled
        && let Some(Before { available_bytes, percent, .. }) = Before::of(&ready.machine, plan)
    {
        let lines = watch::pre_flight(ready.config.log.language, available_bytes, percent);
        lines.iter().for_each(print::say);
    }
}

/// Relative to the working folder where it lies below it.
fn shown(path: &Path) -> String {
    let cwd = std::env::current_dir().unwrap_or_default();
    spec::contract::shown(path.strip_prefix(cwd).unwrap_or(path))
}

fn announce(folder: &RunDir, resume: &Resume) {
    let what = match (&folder.resume, resume) {
        (Some(checkpoint), _) => format!("going on from {}", shown(checkpoint)),
        (None, Resume::Auto) => "no checkpoint yet, starting afresh".into(),
        (None, _) => format!("in {}", shown(&folder.path)),
    };
    print::say(format_args!("run {}: {what}", folder.name()));
}

/// Where a restart begins.
fn going_on(folder: &RunDir) -> String {
    if folder.work != Work::Train {
        return "going on with what is not done yet".into();
    }
    match folder.resume.as_deref().and_then(Path::file_name) {
        Some(checkpoint) => format!("going on from the checkpoint {}", checkpoint.display()),
        None => "no checkpoint yet: from the beginning".into(),
    }
}

fn supervise_run(
    run: &RunArgs,
    ready: &Ready,
    setup: &mut Setup,
    folder: &mut RunDir,
    program: &Path,
    signals: &Signals,
) -> Result<Outcome, Error> {
    let console =
        Console::start_on(print::is_result_apart()).map_err(io("cannot start the console", exit::INTERNAL))?;
    let tracked = Tracked::of(&setup.config, folder);
    let mut made = None;
    let spec = |restarts: u32, last: Option<&Outcome>| {
        if restarts > 0 {
            folder.resume_newest();
            console.note(&going_on(folder));
            setup.reduce(ready, last, &console);
        }
        let spec = train_spec(run, ready, setup, folder, program, restarts);
        spec.map_err(|error| {
            let text = error.to_string();
            made = Some(error);
            std::io::Error::other(text)
        })
    };
    let live = Live::start(&tracked, &console);
    let outcome = supervise::run_with_restarts(run.max_restarts, spec, &live, signals);
    live.finish(outcome.as_ref().ok());
    console.finish();
    outcome.map_err(|source| {
        made.unwrap_or(Error::Io { what: "cannot run the ranks".into(), code: start_code(&source), source })
    })
}

/// The exit code where the ranks could not be started: the machine lacks what they need, or something else.
fn start_code(error: &std::io::Error) -> u8 {
    let Some(inner) = error.get_ref() else { return exit::INTERNAL };
    match inner.downcast_ref::<HostError>() {
        Some(HostError::Memory(_)) => exit::PLAN,
        Some(HostError::System(error)) => start_code(error),
        None if inner.is::<Refused>() => exit::PLAN,
        None => exit::INTERNAL,
    }
}

fn train_spec(
    run: &RunArgs,
    ready: &Ready,
    setup: &Setup,
    folder: &RunDir,
    program: &Path,
    restarts: u32,
) -> Result<Spec, Error> {
    let Setup { config, plan, .. } = setup;
    let (_, job) = folder.write(config, plan)?;
    let topology = &plan.topology;
    let mut env = vec![
        (env::JOB.to_string(), job.display().to_string()),
        (env::RUN_ID.to_string(), folder.id()),
        (env::RESTARTS.to_string(), restarts.to_string()),
    ];
    if run.nnodes > 1 {
        env.push((env::JOIN_KEY.to_string(), ready.ranks_key.clone().unwrap_or_default()));
    }
    let again = restarts > 0 || folder.resume.is_some();
    env.extend(torch_env(|name| std::env::var_os(name).is_some()));
    env.extend(log_env(run));
    let started = Started::of(config, program)?;
    env.extend(started.env);
    Ok(Spec {
        program: started.program,
        args: started.words,
        forks: started.forks,
        env,
        ranks: nodes::ranks(run, topology.local_world_size, topology.node_ranks.clone(), topology.threads_per_rank)?,
        log_dir: Some(folder.path.clone()),
        grace: Duration::try_from_secs_f64(config.train.stop_grace).unwrap_or(exec::GRACE),
        control: true,
        cache: cache_spec(plan),
        watch: WatchSpec { again, ..WatchSpec::of(config, plan, Some(&folder.path)) },
        limits: limits(config, plan),
    })
}

/// The ranks' part of the budget, and a quarter more as the limit: estimates are no reason to be killed. The launcher
/// and the page cache, whose pages it makes, are charged elsewhere.
fn limits(config: &Config, plan: &Plan) -> Option<Limits> {
    let (budget, watch) = (&plan.budget, &config.watch);
    let high_bytes = budget.total_bytes.checked_sub(budget.page_cache_bytes + budget.line_bytes(LineId::Launcher))?;
    let wanted = watch.enabled && watch.cgroup;
    wanted.then_some(Limits { high_bytes, max_bytes: high_bytes.saturating_add(high_bytes / 4) })
}

/// The page cache as planned; `None`: off, or no room for it.
fn cache_spec(plan: &Plan) -> Option<CacheSpec> {
    let (capacity_bytes, policy) = (plan.budget.page_cache_bytes, PolicyKind::of(plan.budget.cache_policy)?);
    (capacity_bytes > 0).then_some(CacheSpec { capacity_bytes, policy })
}

/// Environment that suits libtorch, where the user has not set it.
///
/// libtorch's own chatter is for its developers. A step's tensors are given back and asked for again in every step: the
/// C library would hand the large ones to the kernel each time and get zeroed pages for them. With these thresholds
/// they stay in the heap, whose peak is the same (TUNABLES).
fn torch_env(is_set: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let tunables = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296";
    let wanted = [("TORCH_CPP_LOG_LEVEL", "ERROR"), ("GLIBC_TUNABLES", tunables)];
    wanted.into_iter().filter(|(name, _)| !is_set(name)).map(|(name, value)| (name.into(), value.into())).collect()
}
