//! `launch`: what each command does, and the one place where errors are printed.

use anyhow::{Context, Result, anyhow};
use launcher::cli::{self, BatchArgs, CliError, Command, ConfigArgs, Prepared, RANK_PROGRAM, RunArgs, SampleDataArgs};
use launcher::config::{Config, ConfigError, DeviceChoice};
use launcher::console::{Console, closing_table};
use launcher::contract::{Summary, env, exit};
use launcher::machine::{Machine, dataset_facts};
use launcher::plan::{self, Plan, PlanError, Request};
use launcher::run_dir::{Ask, RunDir, RunDirError};
use launcher::supervise::{self, Meeting, Outcome, Spec};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::{Duration, SystemTime};

/// From asking programs under `--exec` to end to SIGKILL; a config says its own (`train.stop_grace`).
const EXEC_GRACE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let outcome = Command::parse(std::env::args_os()).map_err(Into::into).and_then(dispatch);
    let code = outcome.unwrap_or_else(|error| {
        if let Some(CliError::Shown(text)) = error.downcast_ref() {
            print!("{text}");
            return exit::OK;
        }
        eprintln!("launch: error: {error:#}");
        exit_code(&error)
    });
    ExitCode::from(code)
}

fn dispatch(command: Command) -> Result<u8> {
    match command {
        Command::Train(run) if run.dry_run => print_plan(&run),
        Command::Plan(run) => print_plan(&run),
        Command::Train(run) => train(&run),
        Command::SampleData(args) => sample_data(&args),
        Command::Batch(args) => batch(&args),
        Command::Exec { run, program, args } => exec(&run, program, args),
    }
}

/// The code of the first error in the chain that has one.
fn exit_code(error: &anyhow::Error) -> u8 {
    let code = |cause: &(dyn std::error::Error + 'static)| {
        if cause.is::<ConfigError>() || cause.is::<CliError>() {
            return Some(exit::USAGE);
        }
        let plan = cause.downcast_ref::<PlanError>().map(PlanError::exit_code);
        let run_dir = || cause.downcast_ref::<RunDirError>().map(RunDirError::exit_code);
        let io = || cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        let in_use = || (io() == Some(std::io::ErrorKind::AddrInUse)).then_some(exit::COMM);
        plan.or_else(run_dir).or_else(in_use)
    };
    error.chain().find_map(code).unwrap_or(exit::INTERNAL)
}

/// Where this program stands.
struct Here {
    cwd: PathBuf,
    exe: PathBuf,
}

impl Here {
    fn find() -> Result<Self> {
        let cwd = std::env::current_dir().context("cannot tell the current folder")?;
        let exe = std::env::current_exe().context("cannot tell where launch lies")?;
        Ok(Self { cwd, exe })
    }

    fn rank_program(&self) -> Result<PathBuf> {
        Ok(cli::rank_program(std::env::var_os(RANK_PROGRAM), &self.exe)?)
    }

    fn prepare(&self, args: &ConfigArgs, machine: &Machine) -> Result<Prepared> {
        let choose = |choice| plan::choose_device(choice, machine);
        let prepared = args.prepare(choose, &self.cwd, cli::home(&self.exe).as_deref())?;
        prepared.notes.iter().for_each(|note| eprintln!("launch: {note}"));
        Ok(prepared)
    }
}

fn make_plan(run: &RunArgs, config: &Config, machine: &Machine) -> Result<Plan> {
    let request = Request {
        gpus: run.gpus,
        ranks: run.ranks,
        device: run.config.device.unwrap_or(DeviceChoice::Auto),
        strict: run.strict,
        nnodes: run.nnodes,
        node_rank: run.node_rank,
    };
    Ok(plan::plan(config, machine, &dataset_facts(&config.data.dataset_path), &request)?)
}

fn print_plan(run: &RunArgs) -> Result<u8> {
    let machine = Machine::probe();
    let Prepared { config, .. } = Here::find()?.prepare(&run.config, &machine)?;
    show_plan(&make_plan(run, &config, &machine)?);
    Ok(exit::OK)
}

fn show_plan(plan: &Plan) {
    print!("{}", plan.table());
    plan.notes.iter().for_each(|note| println!("note: {note}"));
}

/// Config, data, plan, folder, ranks; then what came of it.
fn train(run: &RunArgs) -> Result<u8> {
    let here = Here::find()?;
    let machine = Machine::probe();
    let Prepared { config, .. } = here.prepare(&run.config, &machine)?;
    let program = here.rank_program()?;
    make_missing_data(&config, &program)?;
    let plan = make_plan(run, &config, &machine)?;
    let mut run_dir = RunDir::open(&Ask {
        runs_dir: &config.log.runs_dir,
        config_name: &config.name,
        name: run.name.as_deref(),
        resume: &run.resume(),
        node_rank: run.node_rank,
        now: SystemTime::now(),
    })?;
    show_plan(&plan);
    println!("run {}", run_dir.path.display());
    if let Some(checkpoint) = &run_dir.resume {
        println!("continuing from {}", checkpoint.display());
    }
    // What an earlier part of this run left must not pass for this one's result.
    let _ = std::fs::remove_file(run_dir.path.join("summary.json"));
    let outcome = run_ranks(run, &config, &plan, &mut run_dir, &program)?;
    close(run, &run_dir, &plan, &outcome)
}

fn run_ranks(run: &RunArgs, config: &Config, plan: &Plan, run_dir: &mut RunDir, program: &Path) -> Result<Outcome> {
    let logs = run_dir.path.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let (_, job) = run_dir.write(config, plan)?;
    // Nodes share the name; on one node the process number keeps two jobs apart.
    let run_id = if run.nnodes > 1 { run_dir.name() } else { format!("{}-{}", run_dir.name(), process::id()) };
    let spec = |restarts: u32| {
        if restarts > 0 {
            run_dir.resume_newest();
            run_dir.write(config, plan).map_err(std::io::Error::other)?;
        }
        let ranks = supervise::ranks(&meeting(run, plan.topology.local_world_size, plan.topology.threads_per_rank))?;
        let env = vec![
            (env::JOB.to_owned(), job.display().to_string()),
            (env::RUN_ID.to_owned(), run_id.clone()),
            (env::RESTARTS.to_owned(), restarts.to_string()),
        ];
        let grace = Duration::try_from_secs_f64(config.train.stop_grace).unwrap_or(Duration::MAX);
        let log_dir = Some(logs.clone());
        Ok(Spec { program: program.to_path_buf(), args: Vec::new(), env, ranks, log_dir, grace, control: true })
    };
    let console = Console::start().context("cannot start the console")?;
    let outcome = supervise::run_with_restarts(run.max_restarts, spec, &console);
    console.finish();
    outcome.context("cannot run the ranks")
}

fn meeting(run: &RunArgs, local_world_size: usize, threads_per_rank: usize) -> Meeting {
    Meeting {
        local_world_size,
        nnodes: run.nnodes,
        node_rank: run.node_rank,
        master_addr: run.master_addr.clone(),
        master_port: run.master_port,
        threads_per_rank,
    }
}

/// Adds to `summary.json` what only the launcher knows, shows it, and says why a run failed or stopped.
fn close(run: &RunArgs, run_dir: &RunDir, plan: &Plan, outcome: &Outcome) -> Result<u8> {
    if run.node_rank == 0 {
        let path = run_dir.path.join("summary.json");
        let mut summary = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("cannot read {}", path.display()))?,
            Err(_) => unfinished(outcome),
        };
        summary.peak_pss_bytes_per_rank = outcome.peaks.pss_bytes_per_rank.clone();
        summary.peak_node_bytes = outcome.peaks.node_bytes;
        summary.restarts = outcome.restarts;
        let text = serde_json::to_vec_pretty(&summary)?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", closing_table(&summary, plan));
    }
    let again = format!("continue with --name {} --resume auto", run_dir.name());
    match &outcome.first_failure {
        Some(failure) => eprintln!("launch: error: {failure}\nlogs in {}/logs; {again}", run_dir.path.display()),
        None if outcome.exit_code == exit::STOPPED => eprintln!("launch: stopped on request; {again}"),
        None => {}
    }
    Ok(outcome.exit_code)
}

/// The summary of a run whose rank 0 did not live to write one.
fn unfinished(outcome: &Outcome) -> Summary {
    let progress = outcome.progress.clone().unwrap_or_default();
    let status = if outcome.stopped_by.is_some() { "stopped" } else { "failed" };
    Summary {
        status: status.into(),
        steps: progress.step,
        epochs: progress.epoch,
        wall_s: outcome.wall.as_secs_f64(),
        samples_per_s: progress.samples_per_s,
        ..Summary::default()
    }
}

/// Makes sample data where the config asks for it and nothing is there. It appears whole or not at all.
fn make_missing_data(config: &Config, program: &Path) -> Result<()> {
    let path = &config.data.dataset_path;
    let empty = || path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if !config.data.sample_if_missing || (path.exists() && !empty()) {
        return Ok(());
    }
    println!("no data at {}: making sample data of task {} there", path.display(), config.task);
    let partial = path.with_added_extension(format!("partial-{}", process::id()));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    let mut command = process::Command::new(program);
    let made = command.args(["sample-data", "--task", &config.task, "--seed", &config.seed.to_string(), "--out"]);
    let status = made.arg(&partial).status().with_context(|| format!("cannot start {}", program.display()))?;
    let renamed = if status.success() {
        std::fs::rename(&partial, path).with_context(|| format!("cannot make {}", path.display()))
    } else {
        Err(anyhow!("making sample data failed: {} sample-data ended with {status}", program.display()))
    };
    if renamed.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    renamed
}

/// Becomes `rank sample-data`.
fn sample_data(args: &SampleDataArgs) -> Result<u8> {
    let program = Here::find()?.rank_program()?;
    let mut command = process::Command::new(&program);
    command.args(["sample-data", "--task", &args.task, "--seed", &args.seed.to_string(), "--out"]).arg(&args.out);
    Err(command.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// Runs `rank batch` on a job planned for `--world` ranks; nothing of it stays.
fn batch(args: &BatchArgs) -> Result<u8> {
    let here = Here::find()?;
    let machine = Machine::probe();
    let Prepared { config, .. } = here.prepare(&args.config, &machine)?;
    let program = here.rank_program()?;
    let run = RunArgs { config: args.config.clone(), ranks: Some(args.world), nnodes: 1, ..RunArgs::default() };
    let plan = make_plan(&run, &config, &machine)?;
    let folder = std::env::temp_dir().join(format!("headroom-batch-{}", process::id()));
    std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let status = run_batch(args, &config, &plan, &program, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    let status = status?;
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    let code = status.code().or(signal.map(|n| i32::from(exit::SIGNAL_BASE) + n));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::INTERNAL))
}

fn run_batch(
    args: &BatchArgs,
    config: &Config,
    plan: &Plan,
    program: &Path,
    folder: &Path,
) -> Result<process::ExitStatus> {
    let (_, job) = RunDir::scratch(folder).write(config, plan)?;
    let mut command = process::Command::new(program);
    command.arg("batch").arg("--job").arg(job).arg("--out").arg(&args.out);
    command.args(["--step", &args.step.to_string(), "--rank", &args.rank.to_string()]);
    let status = command.args(["--world", &args.world.to_string()]).status();
    status.with_context(|| format!("cannot start {}", program.display()))
}

/// Supervises any program with the ranks' environment.
fn exec(run: &RunArgs, program: OsString, args: Vec<OsString>) -> Result<u8> {
    let ranks = run.local_ranks().unwrap_or(1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from) / ranks;
    let spec = |restarts: u32| {
        Ok(Spec {
            program: PathBuf::from(&program),
            args: args.clone(),
            env: vec![(env::RESTARTS.to_owned(), restarts.to_string())],
            ranks: supervise::ranks(&meeting(run, ranks, threads))?,
            log_dir: None,
            grace: EXEC_GRACE,
            control: false,
        })
    };
    let console = Console::start().context("cannot start the console")?;
    let outcome = supervise::run_with_restarts(run.max_restarts, spec, &console);
    console.finish();
    let outcome = outcome.with_context(|| format!("cannot run {}", PathBuf::from(&program).display()))?;
    if let Some(failure) = &outcome.first_failure {
        eprintln!("launch: error: {failure}");
    }
    Ok(outcome.exit_code)
}
