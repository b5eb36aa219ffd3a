//! `launch predict` and `launch evaluate`: a trained run on data, planned, started and watched as training is.
//!
//! The job of a prediction lies in `<out>/.predict`, that of an evaluation in `<run>/evaluate/<split>-<weights>`.

use super::close::{conclude, tell_end, tell_stop};
use super::early::Early;
use super::{Error, Ready, Setup, io, pre_flight, print, rank_program, shown, supervise_run, text_of};
use crate::advise;
use crate::cli::{EvaluateArgs, PredictArgs, RunArgs, TrainedArgs};
use crate::console::closing_table;
use crate::run_dir::{Resume, RunDir, StagesOf};
use host::machine;
use spec::config::{CachePolicy, DeviceChoice, StageKind};
use spec::contract::{Evaluation, Weights, exit};
use spec::job::{EarlierStage, Job, PassKind, Subject, Trained, Work};
use spec::plan::CUDA_TRAINS;
use std::path::{Path, PathBuf};

/// Folder of a prediction's job, in that of its outputs.
const PREDICT: &str = ".predict";

/// A model that was trained, ready for other work.
struct Model {
    ready: Ready,
    run: RunArgs,
    of: Trained,
}

pub(super) fn predict(args: &PredictArgs, mut early: Early) -> Result<u8, Error> {
    let mut model = trained(&args.of, &early)?;
    let (data, out) = (absolute(&args.data)?, absolute(&args.out)?);
    apart(&data, &out, &model.of.folder)?;
    let config = &mut model.ready.config;
    config.data.dataset_path = data.clone();
    if let Some(task) = spec::task::find(&config.task) {
        task.predicts(config);
    }
    config.data.max_val_windows = 0;
    model.ready.passes = PassKind::Predict;
    let of = model.of.clone();
    let Some((plan, program)) = model.plan(args.of.dry_run)? else { return Ok(exit::OK) };
    claim(&out)?;
    let folder = make(out.join(PREDICT))?;
    let work = Work::Predict { of, data, out: out.clone() };
    let mut folder = RunDir::at(folder).for_work(work);
    folder.earlier = model.basis();
    model.run(folder, (plan, &program), &mut early, || {
        print::say(format_args!("predictions: {}", shown(&out)));
        Ok(())
    })
}

pub(super) fn evaluate(args: &EvaluateArgs, mut early: Early) -> Result<u8, Error> {
    let mut model = trained(&args.of, &early)?;
    let on = match (&args.data, args.split.as_deref().unwrap_or("val")) {
        (Some(data), _) => Subject::Data(absolute(data)?),
        (None, "train") => Subject::Train,
        (None, "test") => Subject::Test,
        (None, _) => Subject::Val,
    };
    let word = match &on {
        Subject::Data(data) => {
            if !data.exists() {
                return Err(Error::Data(format!("--data {}: no such file or folder", shown(data))));
            }
            model.ready.config.data.dataset_path = data.clone();
            model.ready.config.data.max_val_windows = 0;
            "data"
        }
        Subject::Train => "train",
        Subject::Val => "val",
        Subject::Test => "test",
    };
    model.ready.passes = PassKind::Evaluate;
    let of = model.of.clone();
    let Some((plan, program)) = model.plan(args.of.dry_run)? else { return Ok(exit::OK) };
    let folder = make(of.folder.join("evaluate").join(format!("{word}-{}", of.weights.word())))?;
    let result = folder.join("metrics.json");
    // An earlier result belongs to other weights or data.
    match std::fs::remove_file(&result) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(io(format!("cannot remove {}", shown(&result)), exit::USAGE)(e));
        }
        _ => {}
    }
    let work = Work::Evaluate { of, on };
    let json = args.json;
    if json {
        print::result_apart();
    }
    let mut folder = RunDir::at(folder).for_work(work);
    folder.earlier = model.basis();
    model.run(folder, (plan, &program), &mut early, || tell(&result, json))
}

/// Prints the metrics of an evaluation.
fn tell(path: &Path, json: bool) -> Result<(), Error> {
    let text = std::fs::read(path).map_err(io(format!("cannot read {}", shown(path)), exit::INTERNAL))?;
    if json {
        return print::out(String::from_utf8_lossy(&text));
    }
    let found: Evaluation = serde_json::from_slice(&text)
        .map_err(|e| io(format!("cannot read {}", shown(path)), exit::INTERNAL)(e.into()))?;
    let at = found.step.map(|step| format!(", step {step}")).unwrap_or_default();
    print::say(format_args!(
        "{} of {}, {} samples; {}{at}",
        found.on,
        shown(&found.data),
        found.samples,
        shown(&found.weights)
    ));
    let width = found.metrics.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    for (name, value) in &found.metrics {
        print::say(format_args!("{name:<width$}  {value}"));
    }
    print::say(format_args!("metrics: {}", shown(path)));
    Ok(())
}

impl Model {
    /// Stages that this one was made from, and itself: their folders hold what its model needs. Empty for a run without stages.
    fn basis(&self) -> Vec<EarlierStage> {
        let text = std::fs::read(self.of.folder.join("job.json")).unwrap_or_default();
        let Ok(job) = serde_json::from_slice::<Job>(&text) else { return Vec::new() };
        let own = job.config.stage.map(|name| EarlierStage { name, folder: self.of.folder.clone(), start: job.start });
        job.earlier.into_iter().chain(own).collect()
    }
}

/// The run's config and weights.
fn trained(args: &TrainedArgs, early: &Early) -> Result<Model, Error> {
    let found = advise::locate(&args.run, &args.runs_dir)?;
    let folder = of_stage(&absolute(&found)?, args.stage.as_deref())?;
    let path = folder.join("config.yaml");
    let text = std::fs::read_to_string(&path).map_err(|e| {
        Error::Data(format!("{}: {e}: give the folder or the name of a run that was trained", shown(&path)))
    })?;
    let mut sets = args.set.clone();
    if let Some(device) = args.device {
        sets.push(format!("train.device={}", device.word()));
    }
    let raw = spec::task::parse_config(&text, &shown(&path))?.with_home(std::env::home_dir().as_deref());
    let here = machine::probe();
    let cuda = CUDA_TRAINS && !here.gpus.is_empty() && raw.device(&sets)? != DeviceChoice::Cpu;
    let mut config = raw.resolve(if cuda { "cuda" } else { "cpu" }, &sets)?;
    // Each sample is read once, and figures of training are the run's.
    config.data.cache = CachePolicy::Off;
    (config.data.sample_if_missing, config.log.plots) = (false, false);
    let weights = match &args.weights {
        Weights::File(file) => Weights::File(absolute(file)?),
        other => other.clone(),
    };
    has_weights(&folder, &weights)?;
    let run = args.run_args();
    let request = spec::plan::Request { infers: true, ..super::request(&run) };
    let ready = Ready {
        config,
        stages: Vec::new(),
        machine: here.clone(),
        here,
        request,
        passes: PassKind::Evaluate,
        undo: early.undo().clone(),
        ranks_key: None,
    };
    Ok(Model { ready, run, of: Trained { folder, weights } })
}

/// Refuses a run without checkpoints before anything is planned; ranks look closer.
fn has_weights(folder: &Path, weights: &Weights) -> Result<(), Error> {
    let refuse = |path: &Path, problem: &str| {
        let path = shown(path);
        Err(Error::Model { code: exit::CHECKPOINT, text: format!("{path}: {problem}") })
    };
    match weights {
        Weights::File(file) if !file.is_file() => {
            refuse(file, "no such file: --weights takes best, last, ema:DECAY or a safetensors file")
        }
        Weights::File(_) => Ok(()),
        _ if crate::run_dir::newest_checkpoint(folder).is_none() => {
            refuse(&folder.join("checkpoints"), "holds no checkpoint: train first, or name a file with --weights FILE")
        }
        _ => Ok(()),
    }
}

/// The folder of a stage: the one that is named, else the last that trained and has a checkpoint.
fn of_stage(folder: &Path, stage: Option<&str>) -> Result<PathBuf, Error> {
    let Some(stages) = StagesOf::read(folder) else {
        return match stage {
            None => Ok(folder.to_owned()),
            Some(stage) => Err(Error::Target(format!("--stage {stage}: the run {} has no stages", shown(folder)))),
        };
    };
    let names: Vec<&str> = stages.stages.iter().map(|stage| stage.name.as_str()).collect();
    let trained = stages.stages.iter().rev().filter(|stage| stage.kind == StageKind::Train);
    let mut saved = trained.filter(|stage| crate::run_dir::newest_checkpoint(&folder.join(&stage.name)).is_some());
    match stage {
        Some(stage) if names.contains(&stage) => Ok(folder.join(stage)),
        Some(stage) => {
            Err(Error::Target(format!("--stage {stage}: the stages of {} are {}", shown(folder), names.join(", "))))
        }
        None => match saved.next() {
            Some(stage) => Ok(folder.join(&stage.name)),
            None => Err(Error::Model {
                code: exit::CHECKPOINT,
                text: format!(
                    "{}: none of its stages ({}) has a checkpoint: train first",
                    shown(folder),
                    names.join(", ")
                ),
            }),
        },
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(io(format!("cannot find {}", path.display()), exit::USAGE))
}

/// Outputs are never among the inputs, nor in the run.
fn apart(data: &Path, out: &Path, run: &Path) -> Result<(), Error> {
    let real = |path: &Path| {
        let known = path.ancestors().find_map(|folder| Some((folder, folder.canonicalize().ok()?)));
        known.map_or_else(|| path.to_owned(), |(folder, real)| real.join(path.strip_prefix(folder).unwrap_or(path)))
    };
    if !data.exists() {
        return Err(Error::Data(format!("--data {}: no such file or folder", shown(data))));
    }
    let (data, out, run) = (real(data), real(out), real(run));
    let inside = |inner: &Path, outer: &Path| inner.starts_with(outer);
    if inside(&out, &data) || inside(&data, &out) || inside(&out, &run) || inside(&run, &out) {
        let place = if inside(&out, &run) || inside(&run, &out) { "the run's folder" } else { "the data" };
        let out = shown(&out);
        return Err(Error::Target(format!("--out {out} and {place} lie in each other: choose a folder apart from it")));
    }
    Ok(())
}

/// A folder that is new, empty, or of an earlier prediction.
fn claim(out: &Path) -> Result<(), Error> {
    let refuse = |problem: &str| Err(Error::Target(format!("--out {}: {problem}", shown(out))));
    if out.join(PREDICT).is_dir() {
        return Ok(());
    }
    match out.read_dir() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => refuse(&format!("{e}: name a folder for the predictions")),
        Ok(mut entries) => match entries.next() {
            Some(_) => refuse("holds files that are no predictions of an earlier call: name a new folder"),
            None => Ok(()),
        },
    }
}

fn make(folder: PathBuf) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(&folder).map_err(io(format!("cannot make {}", shown(&folder)), exit::USAGE))?;
    Ok(folder)
}

impl Model {
    /// Plan and rank program; `None`: the plan was all that was asked for.
    fn plan(&mut self, dry: bool) -> Result<Option<(spec::plan::Plan, PathBuf)>, Error> {
        let plan = self.ready.eased_plan()?;
        self.ready.check_limits(&plan)?;
        if dry {
            print::out(text_of(&plan))?;
            return Ok(None);
        }
        Ok(Some((plan, rank_program()?)))
    }

    fn run(
        self,
        mut folder: RunDir,
        (plan, program): (spec::plan::Plan, &Path),
        early: &mut Early,
        tell: impl FnOnce() -> Result<(), Error>,
    ) -> Result<u8, Error> {
        let Self { ready, run, .. } = self;
        let lock = folder.lock(&Resume::No, print::note)?;
        ready.undo.add(lock.path());
        print::say(text_of(&plan));
        pre_flight(&ready, &plan);
        let mut setup = Setup { config: ready.config.clone(), plan, reduced: Vec::new() };
        let outcome = supervise_run(&run, &ready, &mut setup, &mut folder, program, early.hand_over())?;
        let summary = conclude(&folder, &setup, &outcome);
        let table = closing_table(&summary, &setup.plan);
        tell_end(&folder, &setup, &outcome, &summary, Some(table));
        tell_stop(&folder, &outcome, "run the same command again");
        if outcome.exit_code == exit::OK {
            tell()?;
        }
        Ok(outcome.exit_code)
    }
}
