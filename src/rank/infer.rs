//! A rank that trains nothing: evaluation of a trained model, predictions, and the passes of stages.
//!
//! Facts on the training data that a model needs with other data lie in the run's folder, [`CARRIED`].

use super::RankError;
use super::start::{Start, end_records, named, observer, tell_skipped};
use crate::data::DataError;
use crate::data::split::KeptSplit;
use crate::report::memory::MemorySampler;
use crate::report::records::write_summary;
use crate::task::pass::{Opening, PartWeights, Pass, StageInputs};
use crate::task::{self, Datasets, Model, Task, Team};
use crate::train::checkpoint::{self, Chosen};
use crate::train::{EvalSpec, Evaluated, PassRun, Passed, Status, TrainError, Watch, evaluate, narrow_kind};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use spec::contract::files::SplitChoice;
use spec::contract::{Evaluation, Phase, RunStatus, Summary, env, exit};
use spec::job::{Job, Subject, Trained, Work};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Tensor, nn};

/// [`Datasets::carried`] of a run, in its folder.
pub(super) const CARRIED: &str = "carried.json";
/// Origin of the parts of a pass, kept in its folder.
const MADE_FROM: &str = "pass.json";
/// Parts of outputs, in the pass's folder.
const PARTS: &str = "parts";

/// Origin of a pass's outputs: a pass that was stopped continues where all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MadeFrom {
    weights: String,
    data: String,
    config: String,
}

/// Keeps the facts that predictions for other data need.
pub(super) fn keep_carried(run_dir: &Path, datasets: &Datasets) -> Result<(), RankError> {
    let Some(carried) = &datasets.carried else { return Ok(()) };
    let path = run_dir.join(CARRIED);
    let failed = |e: std::io::Error| RankError::system(path.display().to_string(), e);
    let text = serde_json::to_vec_pretty(carried).map_err(|e| failed(e.into()))?;
    let sibling = run_dir.join(format!("{CARRIED}.new"));
    host::journal::replace(&path, &sibling, &text, Duration::ZERO).map_err(failed)
}

fn carried_of(folder: &Path) -> Result<Option<Value>, RankError> {
    let path = folder.join(CARRIED);
    let text = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| DataError::File { path: path.clone(), problem: e.to_string() })?,
    };
    let value = serde_json::from_slice(&text).map_err(|e| DataError::File {
        path,
        problem: format!("is damaged ({e}): resume the run once, which writes it anew"),
    })?;
    Ok(Some(value))
}

/// Does the work of `start`'s job, which is no training.
pub(super) fn run(start: &Start, memory: MemorySampler) -> Result<u8, RankError> {
    let task = task::find(&start.job.config.task).map_err(RankError::Usage)?;
    match &start.job.work {
        Work::Evaluate { of, on } => Inference { start, task, of: Some(of) }.evaluate(on, memory),
        Work::Predict { of, out, .. } => Inference { start, task, of: Some(of) }.predict(out, memory),
        Work::Train | Work::Pass => Inference { start, task, of: None }.pass(memory),
    }
}

struct Inference<'a> {
    start: &'a Start,
    task: &'static dyn Task,
    /// `None`: the pass of a stage, which names its weights itself.
    of: Option<&'a Trained>,
}

/// A model whose weights are in place.
struct Built {
    model: Box<dyn Model>,
    /// Owns the weights.
    _vs: nn::VarStore,
    chosen: Vec<Chosen>,
}

impl Inference<'_> {
    fn job(&self) -> &Job {
        &self.start.job
    }

    /// Calls `open` with the data that the job names.
    fn opened<T>(
        &self,
        kept: Option<&KeptSplit>,
        open: impl FnOnce(&Opening) -> Result<T, DataError>,
    ) -> Result<T, RankError> {
        let Start { job, env, collective, .. } = self.start;
        let gather = |bytes: &[u8]| collective.all_gather(bytes).map_err(|e| DataError::Gather(e.into()));
        let stages = stages(job);
        let team = Team { rank: env.rank, world_size: env.world_size, gather: &gather, cache: None, kept, stages };
        let carried = self.of.map(|of| carried_of(&of.folder)).transpose()?.flatten();
        let index = job.runs_dir().join(".index");
        let opening = Opening { config: &job.config, team: &team, index_dir: &index, carried: carried.as_ref() };
        Ok(open(&opening)?)
    }

    fn tell(&self, datasets: &Datasets) {
        if self.start.env.rank == 0 {
            datasets.notes.iter().for_each(|line| self.start.reporter.line(line.clone()));
            tell_skipped(&datasets.skipped, &self.start.reporter);
        }
    }

    /// Builds the model for `datasets` and loads `parts`.
    fn build(&self, datasets: &Datasets, parts: &[PartWeights]) -> Result<Built, RankError> {
        let Start { job, device, env, reporter, .. } = self.start;
        tch::manual_seed(job.config.seed as i64);
        let mut vs = nn::VarStore::new(*device);
        let model = self.task.model(&job.config, datasets, &vs.root())?;
        let mut chosen = Vec::with_capacity(parts.len());
        for part in parts {
            let weights = checkpoint::choose(&part.folder, &part.weights)?;
            let targets = below(&mut vs, &part.prefix, &weights.tensors);
            checkpoint::apply(&weights.path, &weights.tensors, &targets)?;
            if env.rank == 0 {
                reporter.line(format!("weights: {}", weights.path.display()));
            }
            chosen.push(weights);
        }
        // Only the names and origins are of use from here on.
        chosen.iter_mut().for_each(|weights| weights.tensors.clear());
        Ok(Built { model, _vs: vs, chosen })
    }

    /// Weights by the command line.
    fn whole(&self) -> Vec<PartWeights> {
        let part = |of: &Trained| PartWeights {
            prefix: String::new(),
            folder: of.folder.clone(),
            weights: of.weights.clone(),
        };
        self.of.into_iter().map(part).collect()
    }

    fn evaluate(&self, on: &Subject, memory: MemorySampler) -> Result<u8, RankError> {
        let Start { job, device, collective, controls, env, .. } = self.start;
        let (config, plan) = (&job.config, &job.plan);
        let kept = self.kept_split(on)?;
        let datasets = self.opened(kept.as_ref(), |opening| match on {
            Subject::Data(_) => self.task.evaluation(opening),
            _ => self.task.open(opening.config, opening.team, opening.index_dir),
        })?;
        self.tell(&datasets);
        let built = self.build(&datasets, &self.whole())?;
        let (dataset, prefix) = match on {
            Subject::Train => (datasets.train_whole.as_ref().unwrap_or(&datasets.train), "train."),
            Subject::Val => (&datasets.val, "val."),
            Subject::Test => (&datasets.test, "test."),
            Subject::Data(_) => (&datasets.val, "data."),
        };
        let mut metrics = self.task.metrics(config, &datasets)?;
        let mut observer = observer(self.start, memory, None, None)?;
        let (narrow, _) = narrow_kind(config.train.amp, device.is_cuda());
        let mut batch = plan.batch.val_batch.max(1);
        collective.barrier()?;
        self.start.stop.begin();
        crate::train::Observer::phase(&mut observer, Phase::Val, 0);
        let (values, pass_s) = loop {
            let passing = Instant::now();
            let spec = EvalSpec {
                batch,
                threads: plan.loader.threads,
                device: *device,
                narrow,
                seed: config.seed,
                throttle: Arc::clone(controls.throttle()),
            };
            let mut watch = Watch { metrics: metrics.as_mut(), gallery: None };
            let evaluated =
                evaluate(built.model.as_ref(), &mut watch, dataset, &spec, collective.as_ref(), prefix, &mut |_| {
                    controls.stops()
                })?;
            match evaluated {
                Evaluated::Values(values) => break (Some(values), passing.elapsed().as_secs_f64()),
                Evaluated::Interrupted => break (None, 0.0),
                Evaluated::OutOfMemory { message } => batch = self.smaller(batch, message)?,
            }
        };
        if env.rank == 0 && values.is_some() {
            crate::train::Observer::files(&mut observer, metrics.files());
        }
        end_records(observer);
        let Some(values) = values else {
            if env.rank == 0 {
                self.start.reporter.line("stopped: nothing was evaluated".to_owned());
            }
            return Ok(exit::UNSTARTED);
        };
        if env.rank == 0 {
            let weights = built.chosen.first();
            let mut headline: Vec<String> = Vec::new();
            for name in std::iter::once(&"loss").chain(metrics.headline()).map(|name| format!("{prefix}{name}")) {
                if values.contains_key(&name) && !headline.contains(&name) {
                    headline.push(name);
                }
            }
            let result = Evaluation {
                on: prefix.trim_end_matches('.').to_owned(),
                data: config.data.dataset_path.clone(),
                weights: weights.map(|weights| weights.path.clone()).unwrap_or_default(),
                step: weights.and_then(|weights| weights.step),
                samples: dataset.len() as u64,
                files_skipped: datasets.skipped.len() as u64,
                metrics: values,
                headline,
            };
            self.close_evaluation(&result, pass_s)?;
        }
        Ok(exit::OK)
    }

    /// Batches of half as many samples, where memory ran out on some rank.
    fn smaller(&self, batch: usize, message: Option<String>) -> Result<usize, RankError> {
        let Start { collective, env, reporter, .. } = self.start;
        let all = collective.all_gather(message.unwrap_or_default().as_bytes())?;
        let (rank, message) = all.into_iter().enumerate().find(|(_, text)| !text.is_empty()).unwrap_or_default();
        let message = String::from_utf8_lossy(&message).into_owned();
        crate::torch::release_caches();
        if batch <= 1 {
            return Err(TrainError::PassOutOfMemory { rank, message }.into());
        }
        let now = batch.div_ceil(2);
        if env.rank == 0 {
            reporter.line(format!("rank {rank}: out of memory ({message}): batches {batch} → {now}; once more"));
        }
        Ok(now)
    }

    /// The split of the checkpoint whose weights are evaluated: files may have come since.
    fn kept_split(&self, on: &Subject) -> Result<Option<KeptSplit>, RankError> {
        let (Some(of), false) = (self.of, matches!(on, Subject::Data(_))) else { return Ok(None) };
        let checkpoint = of.folder.join("checkpoints");
        let list = checkpoint::split_of_run(&of.folder, &of.weights)?;
        Ok(list.map(|list| KeptSplit { list, choice: Some(SplitChoice::Keep), checkpoint }))
    }

    /// Writes what was found in a pass of `pass_s` seconds.
    fn close_evaluation(&self, result: &Evaluation, pass_s: f64) -> Result<(), RankError> {
        let Start { job, reporter, began, .. } = self.start;
        let path = job.run_dir.join("metrics.json");
        let failed = |e: std::io::Error| RankError::Train(DataError::output(&path, e).into());
        let text = serde_json::to_vec_pretty(result).map_err(|e| failed(e.into()))?;
        let sibling = path.with_added_extension("new");
        host::journal::replace(&path, &sibling, &text, host::journal::ROOM_LIMIT).map_err(failed)?;
        let summary = Summary {
            status: RunStatus::Finished,
            wall_s: began.elapsed().as_secs_f64(),
            samples: Some(result.samples),
            samples_per_s: result.samples as f64 / pass_s.max(1e-9),
            metrics: result.metrics.clone().into_iter().filter(|(_, value)| value.is_finite()).collect(),
            headline: result.headline.clone(),
            files_skipped: result.files_skipped,
            restarts: restarts(),
            record_gaps: reporter.gaps(),
            start: job.start.clone(),
            ..Summary::default()
        };
        self.write(summary);
        Ok(())
    }

    fn predict(&self, out: &Path, memory: MemorySampler) -> Result<u8, RankError> {
        let pass = self.opened(None, |opening| self.task.predictor(opening))?;
        let parts = if pass.weights.is_empty() { self.whole() } else { self.by_choice(&pass.weights) };
        self.finish(pass, parts, out, memory)
    }

    /// `--weights` chooses those of the run that was named; other parts of the model are as the task says.
    fn by_choice(&self, parts: &[PartWeights]) -> Vec<PartWeights> {
        let choose = |part: &PartWeights| match self.of {
            Some(of) if of.folder == part.folder => PartWeights { weights: of.weights.clone(), ..part.clone() },
            _ => part.clone(),
        };
        parts.iter().map(choose).collect()
    }

    fn pass(&self, memory: MemorySampler) -> Result<u8, RankError> {
        let pass = self.opened(None, |opening| self.task.pass(opening))?;
        let parts = pass.weights.clone();
        self.finish(pass, parts, &self.job().run_dir, memory)
    }

    /// Runs a pass whose outputs go to `out`.
    fn finish(
        &self,
        pass: Pass,
        weights: Vec<PartWeights>,
        out: &Path,
        memory: MemorySampler,
    ) -> Result<u8, RankError> {
        let Start { job, device, collective, controls, env, .. } = self.start;
        self.tell(&pass.datasets);
        let built = self.build(&pass.datasets, &weights)?;
        let parts = job.run_dir.join(PARTS);
        self.agree(|| self.claim(&pass, &built.chosen, out, &parts))?;
        let mut observer = observer(self.start, memory, None, None)?;
        let run = PassRun {
            config: &job.config,
            plan: &job.plan,
            device: *device,
            collective: Arc::clone(collective),
            model: built.model.as_ref(),
            pass,
            out,
            parts: &parts,
            controls: Arc::clone(controls),
        };
        collective.barrier()?;
        self.start.stop.begin();
        let passed = run.run(&mut observer)?;
        end_records(observer);
        if env.rank == 0 {
            self.close_pass(&passed);
        }
        Ok(if passed.status == Status::Stopped { exit::STOPPED } else { exit::OK })
    }

    /// Rank 0 does `work` before any other rank continues; its error is every rank's.
    fn agree(&self, work: impl FnOnce() -> Result<(), RankError>) -> Result<(), RankError> {
        let Start { collective, env, .. } = self.start;
        let own = if env.rank == 0 { work() } else { Ok(()) };
        let problem = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let all = collective.all_gather(problem.as_bytes())?;
        own?;
        match all.first().filter(|problem| !problem.is_empty()) {
            Some(problem) => {
                let error = String::from_utf8_lossy(problem).into_owned();
                Err(crate::comm::CommError::PeerFailed { rank: 0, error }.into())
            }
            None => Ok(()),
        }
    }

    /// Makes sure that what is in the folder was made from the same as what will be.
    fn claim(&self, pass: &Pass, chosen: &[Chosen], out: &Path, parts: &Path) -> Result<(), RankError> {
        let job = self.job();
        let now = made_from(pass, chosen, job);
        let path = job.run_dir.join(MADE_FROM);
        let failed = |path: &Path, e: std::io::Error| RankError::Train(DataError::output(path, e).into());
        match std::fs::read(&path).map(|text| serde_json::from_slice::<MadeFrom>(&text)) {
            Ok(Ok(before)) => differing(&before, &now, out)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Ok(Err(e)) => return Err(failed(&path, e.into())),
            Err(e) => return Err(failed(&path, e)),
        }
        std::fs::create_dir_all(parts).map_err(|e| failed(parts, e))?;
        std::fs::create_dir_all(out).map_err(|e| failed(out, e))?;
        let text = serde_json::to_vec_pretty(&now).map_err(|e| failed(&path, e.into()))?;
        let sibling = path.with_added_extension("new");
        host::journal::replace(&path, &sibling, &text, host::journal::ROOM_LIMIT).map_err(|e| failed(&path, e))
    }

    fn close_pass(&self, passed: &Passed) {
        let Start { job, reporter, began, .. } = self.start;
        self.write(Summary {
            status: if passed.status == Status::Stopped { RunStatus::Stopped } else { RunStatus::Finished },
            wall_s: began.elapsed().as_secs_f64(),
            samples: Some(passed.samples),
            outputs: passed.outputs,
            samples_per_s: passed.samples_per_s,
            files_skipped: passed.files_skipped,
            reason: passed.reason.clone(),
            restarts: restarts(),
            record_gaps: reporter.gaps(),
            start: job.start.clone(),
            ..Summary::default()
        });
    }

    fn write(&self, summary: Summary) {
        let Start { job, reporter, .. } = self.start;
        if let Err(error) = write_summary(&job.run_dir.join("summary.json"), &summary) {
            reporter.line(format!("warning: {error}"));
            reporter.summary(summary);
        }
    }
}

fn restarts() -> u32 {
    std::env::var(env::RESTARTS).ok().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Stages before this one, as the launcher wrote them down.
pub(super) fn stages(job: &Job) -> StageInputs {
    StageInputs::new(job.earlier.iter().map(|stage| (stage.name.clone(), stage.folder.clone())).collect())
}

/// Tensors of `vs` below `prefix`, without it, that weights are loaded into: all that are trained, and those others that
/// the weights have.
fn below(vs: &mut nn::VarStore, prefix: &str, weights: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let (trained, others) = named(vs);
    let short = |(name, tensor): (String, Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor));
    let has = |name: &str| weights.iter().any(|(other, _)| other == name);
    let others = others.into_iter().filter_map(short).filter(|(name, _)| has(name));
    trained.into_iter().filter_map(short).chain(others).collect()
}

fn made_from(pass: &Pass, chosen: &[Chosen], job: &Job) -> MadeFrom {
    let weights: Vec<String> =
        chosen.iter().map(|weights| format!("{} {:08x}", weights.path.display(), weights.crc32)).collect();
    let mut config = serde_json::to_value(&job.config.data).unwrap_or_default();
    if let Some(keys) = config.as_object_mut() {
        // Ways of reading, which change nothing in what is read.
        keys.retain(|key, _| !key.starts_with("cache") && !key.starts_with("shuffle") && key != "chunk_cache_size");
    }
    let text = format!("{config} {} {:?} {}", job.config.task_section(), job.config.train.amp, job.config.seed);
    MadeFrom {
        weights: weights.join(", "),
        data: format!("{:08x}", libdeflater::crc32(pass.predictor.identity().as_bytes())),
        config: format!("{:08x}", libdeflater::crc32(text.as_bytes())),
    }
}

fn differing(before: &MadeFrom, now: &MadeFrom, out: &Path) -> Result<(), RankError> {
    let what = if before.weights != now.weights {
        format!("weights ({}; now {})", before.weights, now.weights)
    } else if before.data != now.data {
        "data: files were added, removed or changed since".into()
    } else if before.config != now.config {
        "settings: keys of the config differ".into()
    } else {
        return Ok(());
    };
    Err(RankError::Usage(format!(
        "{} holds outputs made with other {what}: choose another folder, or remove it to make all of them anew",
        PathBuf::from(out).display()
    )))
}
