//! Stages of a run: one after the other, each in a folder of the run that has its name, with a plan of its own.
//!
//! ```text
//! runs/<name>/stages.json        which stages there are
//! runs/<name>/<stage>/           job.json, plan.json, checkpoints/, summary.json: as a run's folder
//! ```

use super::close::{conclude, tell_end, tell_stop};
use super::early::{BETWEEN_STAGES, Early, Moment};
use super::{Error, Ready, Setup, io, pre_flight, print, shown, supervise_run, text_of};
use crate::cli::{CliError, RunArgs, Stage};
use crate::console::stages_table;
use crate::run_dir::{self, Ask, ConfigName, Resume, RunDir, StageOf, StagesOf};
use crate::supervise::signal_name;
use host::machine;
use spec::config::{CachePolicy, StageKind};
use spec::contract::{RunStatus, Summary, exit};
use spec::job::{EarlierStage, Job, PassKind, Work};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Stages that the command line asks for; none where the task has none.
///
/// # Errors
/// It names a stage that the task does not have.
pub(super) fn chosen(run: &RunArgs, ready: &Ready) -> Result<Vec<Stage>, Error> {
    let task = &ready.config.task;
    let one = run.stage.as_ref().or(ready.config.stage.as_ref());
    let names: Vec<&str> = ready.stages.iter().map(|stage| stage.spec.name).collect();
    let place = |name: &String| {
        names.iter().position(|known| known == name).ok_or_else(|| {
            Error::Target(match names[..] {
                [] => format!("stage {name}: task {task} has no stages"),
                _ => format!("unknown stage {name}; the stages of task {task} are: {}", names.join(", ")),
            })
        })
    };
    Ok(match (one, &run.from) {
        (Some(name), _) => vec![ready.stages[place(name)?].clone()],
        (None, Some(name)) => ready.stages[place(name)?..].to_vec(),
        (None, None) => ready.stages.clone(),
    })
}

/// Makes `stage` the one that is planned for.
pub(super) fn enter(ready: &mut Ready, stage: &Stage) {
    ready.config = stage.config.clone();
    let is_pass = stage.spec.kind == StageKind::Pass;
    if is_pass {
        // Each sample is read once.
        ready.config.data.cache = CachePolicy::Off;
    }
    ready.request.infers = is_pass;
    ready.passes = if is_pass { PassKind::Stage } else { PassKind::Train };
}

/// A run with stages, on its way.
struct Stages<'a> {
    run: &'a RunArgs,
    ready: Ready,
    program: &'a Path,
    early: Early,
    root: RunDir,
    /// Stages that are done, for the next one.
    earlier: Vec<EarlierStage>,
    /// All stages for the closing table.
    ends: Vec<(&'static str, Option<Summary>)>,
    budget_bytes: u64,
    /// Signal that asked for the end while a stage ended by itself.
    stopped_by: Option<i32>,
}

/// How a stage's folder is found.
enum Found {
    New,
    /// It was begun; its summary, if it is of the last start.
    Begun(Option<Box<Summary>>),
}

/// Runs the stages that the command line asks for.
///
/// # Errors
/// A stage before them is not done; one of them was run already and is not to be resumed; as for a training.
pub(super) fn run(run: &RunArgs, ready: Ready, program: &Path, early: Early) -> Result<u8, Error> {
    if run.nnodes > 1 {
        let task = &ready.config.task;
        return Err(Error::Target(format!("task {task} has stages, which run on one node: leave --nnodes out")));
    }
    let chosen = from_resumed(run, &ready, chosen(run, &ready)?)?;
    let root = open_root(run, &ready, &chosen)?;
    // Held to the end.
    let mut locked = root.clone();
    let lock = locked.lock(&Resume::No, print::note)?;
    ready.undo.add(lock.path());
    let all = ready.stages.clone();
    let of = |stage: &Stage| StageOf { name: stage.spec.name.into(), kind: stage.spec.kind };
    let listed = StagesOf {
        config: ConfigName { name: ready.config.name.clone() },
        task: ready.config.task.clone(),
        stages: all.iter().map(of).collect(),
    };
    listed.write(&root.path)?;
    let ends = all.iter().map(|stage| (stage.spec.name, None)).collect();
    let mut stages =
        Stages { run, ready, program, early, root, earlier: Vec::new(), ends, budget_bytes: 0, stopped_by: None };
    let is_wanted = |stage: &Stage| chosen.iter().any(|chosen| chosen.spec == stage.spec);
    // Stages behind the last one that is wanted do not matter.
    let behind = all.iter().rposition(is_wanted).map_or(0, |last| last + 1);
    let mut code = exit::OK;
    for (n, stage) in all[..behind].iter().enumerate() {
        let wanted = is_wanted(stage);
        if code != exit::OK {
            break;
        }
        if let Some(signal) = stages.stopped_by {
            print::note(format_args!("{}: {BETWEEN_STAGES}", signal_name(signal)));
            code = exit::STOPPED;
            break;
        }
        code = if wanted { stages.stage(n, stage)? } else { stages.pass_over(n, stage, &chosen)? };
    }
    stages.close();
    Ok(code)
}

/// `--resume PATH` of a stage or of its checkpoint: this stage and those behind it.
fn from_resumed(run: &RunArgs, ready: &Ready, chosen: Vec<Stage>) -> Result<Vec<Stage>, Error> {
    let Resume::Path(path) = run.resume() else { return Ok(chosen) };
    let Some((_, Some(stage))) = root_of(&path) else { return Ok(chosen) };
    if run.stage.is_some() || run.from.is_some() {
        let path = shown(&path);
        return Err(CliError::Usage(format!("--resume {path} names a stage: leave --stage and --from out")).into());
    }
    let at = ready.stages.iter().position(|known| known.spec.name == stage).unwrap_or(0);
    Ok(ready.stages[at..].to_vec())
}

/// The run's folder, and the stage, that `path` leads to: the folder itself, a stage in it, or a checkpoint of one.
fn root_of(path: &Path) -> Option<(PathBuf, Option<String>)> {
    let path = std::path::absolute(path).ok()?;
    let root = path.ancestors().take(4).find(|folder| StagesOf::read(folder).is_some())?.to_owned();
    let stage = path.strip_prefix(&root).ok()?.components().next();
    Some((root, stage.map(|stage| stage.as_os_str().to_string_lossy().into_owned())))
}

fn open_root(run: &RunArgs, ready: &Ready, chosen: &[Stage]) -> Result<RunDir, Error> {
    let asked = run.resume();
    if let Resume::Path(path) = &asked {
        let Some((root, _)) = root_of(path) else {
            let text =
                format!("--resume {}: no run with stages is there: give its folder, or that of a stage", shown(path));
            return Err(Error::Target(text));
        };
        return Ok(RunDir::at(root));
    }
    // Another stage of a run goes into the folder of those before it.
    let begins = chosen.first().map(|stage| stage.spec) == ready.stages.first().map(|stage| stage.spec);
    if !begins {
        let known = match &run.name {
            Some(name) => Some(ready.config.log.runs_dir.join(name)),
            None => run_dir::newest_run(&ready.config.log.runs_dir, &ready.config.name),
        };
        return match known.filter(|folder| StagesOf::read(folder).is_some()) {
            Some(folder) => {
                Ok(RunDir::at(std::path::absolute(&folder).map_err(io("cannot find the run", exit::USAGE))?))
            }
            None => {
                let stage = chosen.first().map_or("", |stage| stage.spec.name);
                let before = ready.stages.iter().map(|known| known.spec.name).take_while(|name| *name != stage);
                let before = before.collect::<Vec<_>>().join(", ");
                let run = run.name.as_ref().map_or_else(|| "of this config".into(), |name| format!("called {name}"));
                Err(Error::Target(format!(
                    "stage {stage} needs {before} before it, and there is no run {run}: leave --stage and --from out, or \
                     give the --name of a run"
                )))
            }
        };
    }
    let resume = asked;
    let ask = Ask {
        runs_dir: &ready.config.log.runs_dir,
        config_name: &ready.config.name,
        name: run.name.as_deref(),
        resume: &resume,
        node_rank: 0,
        now: SystemTime::now(),
    };
    Ok(RunDir::at(RunDir::open(&ask)?.path))
}

impl Stages<'_> {
    fn folder(&self, stage: &Stage) -> PathBuf {
        self.root.path.join(stage.spec.name)
    }

    fn found(&self, stage: &Stage) -> Found {
        let folder = self.folder(stage);
        let job: Option<Job> =
            std::fs::read(folder.join("job.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        if job.is_none() && !folder.join("job.json").exists() {
            return Found::New;
        }
        let summary = std::fs::read(folder.join("summary.json")).ok();
        let summary: Option<Summary> = summary.and_then(|text| serde_json::from_slice(&text).ok());
        Found::Begun(summary.filter(|summary| job.is_some_and(|job| job.start == summary.start)).map(Box::new))
    }

    /// A stage that is not to be run: it must be done.
    fn pass_over(&mut self, n: usize, stage: &Stage, chosen: &[Stage]) -> Result<u8, Error> {
        let name = stage.spec.name;
        let done = match self.found(stage) {
            Found::Begun(Some(summary)) if is_done(&summary) => summary,
            Found::New | Found::Begun(_) => {
                let (run, first) = (self.root.name(), chosen.first().map_or("", |stage| stage.spec.name));
                return Err(Error::Target(format!(
                    "stage {first} needs stage {name}, which is not done in run {run}: run it first, with --name {run} --from \
                     {name} --resume auto"
                )));
            }
        };
        self.check_basis(stage)?;
        self.done(n, stage, *done);
        Ok(exit::OK)
    }

    fn stage(&mut self, n: usize, stage: &Stage) -> Result<u8, Error> {
        let (name, asked) = (stage.spec.name, self.run.resume());
        match self.found(stage) {
            Found::New => {}
            Found::Begun(_) if asked == Resume::No => {
                let (run, folder) = (self.root.name(), shown(&self.folder(stage)));
                return Err(Error::Target(format!(
                    "stage {name} of run {run} was begun already ({folder}): continue it with --resume auto, or remove its \
                     folder to run it anew"
                )));
            }
            // A stage that is named is looked at again: there may be more to train now.
            Found::Begun(Some(summary)) if is_done(&summary) && self.run.stage.is_none() => {
                self.check_basis(stage)?;
                print::say(format_args!("stage {name}: done already"));
                self.done(n, stage, *summary);
                return Ok(exit::OK);
            }
            Found::Begun(_) => self.check_basis(stage)?,
        }
        self.train(n, stage, asked != Resume::No)
    }

    /// Checks that the inputs of a finished stage are those that are there now.
    fn check_basis(&self, stage: &Stage) -> Result<(), Error> {
        let path = self.folder(stage).join("job.json");
        let job: Option<Job> = std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let before = job.map(|job| job.earlier).unwrap_or_default();
        let changed = before
            .iter()
            .find(|before| self.earlier.iter().any(|now| now.name == before.name && now.start != before.start));
        match changed {
            None => Ok(()),
            Some(changed) => {
                let (name, folder, other) = (stage.spec.name, shown(&self.folder(stage)), &changed.name);
                Err(Error::Target(format!(
                    "stage {name} was made from an earlier state of stage {other}, which ran again since: remove {folder} and \
                     run --from {name}"
                )))
            }
        }
    }

    fn train(&mut self, n: usize, stage: &Stage, resumes: bool) -> Result<u8, Error> {
        let (name, first) = (stage.spec.name, self.budget_bytes == 0);
        if !first {
            self.early.wait(Moment::BetweenStages).map_err(io("cannot take signals", exit::INTERNAL))?;
            // What is free now decides.
            self.ready.here = machine::probe();
            self.ready.machine = self.ready.here.clone();
        }
        enter(&mut self.ready, stage);
        self.ready.sample_if_missing()?;
        let plan = self.ready.eased_plan()?;
        self.ready.check_limits(&plan)?;
        let mut folder = self.root.stage(name, resumes && stage.spec.kind == StageKind::Train)?;
        folder.work = if stage.spec.kind == StageKind::Pass { Work::Pass } else { Work::Train };
        (folder.earlier, folder.resume_split) = (self.earlier.clone(), self.run.resume_split);
        if let Resume::Path(path) = self.run.resume()
            && path.file_name().is_some_and(|at| at.to_string_lossy().starts_with("step-"))
            && path.starts_with(&folder.path)
        {
            folder.resume = std::path::absolute(&path).ok();
        }
        let asked = if resumes { Resume::Auto } else { Resume::No };
        let chosen = folder.resume.clone();
        let lock = folder.lock(&Resume::No, print::note)?;
        folder.resume = chosen;
        self.ready.undo.add(lock.path());
        print::say(format_args!("stage {name} ({} of {})", n + 1, self.ends.len()));
        print::say(text_of(&plan));
        tell_begin(&self.root, &folder, name, &asked);
        pre_flight(&self.ready, &plan);
        self.budget_bytes = plan.budget.total_bytes;
        let mut setup = Setup { config: self.ready.config.clone(), plan, reduced: Vec::new() };
        let signals = self.early.hand_over();
        let outcome = supervise_run(self.run, &self.ready, &mut setup, &mut folder, self.program, signals)?;
        let summary = conclude(&folder, &setup, &outcome);
        tell_end(&folder, &setup, &outcome, &summary, None);
        if outcome.exit_code == exit::OK {
            self.stopped_by = outcome.stopped_by;
            self.done(n, stage, summary);
            return Ok(exit::OK);
        }
        self.ends[n].1 = Some(summary);
        tell_stop(&folder, &outcome, &format!("add: --name {} --resume auto", self.root.name()));
        Ok(outcome.exit_code)
    }

    fn done(&mut self, n: usize, stage: &Stage, summary: Summary) {
        let (name, folder) = (stage.spec.name.to_owned(), self.folder(stage));
        self.earlier.push(EarlierStage { name, folder, start: summary.start.clone() });
        self.ends[n].1 = Some(summary);
    }

    fn close(&self) {
        let ends: Vec<_> = self.ends.iter().map(|(name, summary)| (*name, summary.as_ref())).collect();
        print::say(stages_table(&ends, self.budget_bytes));
        print::say(format_args!("run folder: {}", shown(&self.root.path)));
    }
}

fn is_done(summary: &Summary) -> bool {
    matches!(summary.status, RunStatus::Finished | RunStatus::EarlyStopped)
}

fn tell_begin(root: &RunDir, folder: &RunDir, name: &str, asked: &Resume) {
    let run = root.name();
    let what = match (&folder.resume, asked) {
        (Some(checkpoint), _) => format!("going on from {}", shown(checkpoint)),
        (None, _) => format!("in {}", shown(&folder.path)),
    };
    print::say(format_args!("run {run}, stage {name}: {what}"));
}
