//! A pass over data without training: ranges of samples, divided among ranks, whose results are whole files or not there.
//!
//! ```text
//! rounds: every rank takes its next range ─► part ─► ranks meet ─► outputs whose parts are all there are joined
//! ```
//! Ranks meet after each range, so that none runs ahead of a rank that failed or was asked to stop. What is whole stays: a
//! later pass does the rest.

mod ranges;

use super::controls::Controls;
use super::fit::Orders;
use super::{Observer, Status, TrainError, amp, evaluate, to_tensors};
use crate::comm::Collective;
use crate::data::loader::{BatchRequest, Loader, LoaderSpec};
use crate::data::{DataError, Dataset};
use crate::ledger::{self, Part};
use crate::task::Model;
use crate::task::pass::{Pass, PassOutput};
use crate::torch::{self, TorchError};
use host::machine::awake::Stopwatch;
use ranges::{Ranges, count};
use spec::config::Config;
use spec::contract::{Effect, Phase, Progress};
use spec::plan::Plan;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, no_grad};

/// A pass, made ready by `rank`.
pub struct PassRun<'a> {
    pub config: &'a Config,
    pub plan: &'a Plan,
    pub device: Device,
    pub collective: Arc<dyn Collective>,
    pub model: &'a dyn Model,
    pub pass: Pass,
    /// Folder of the outputs, and of the parts; both exist.
    pub out: &'a Path,
    pub parts: &'a Path,
    pub controls: Arc<Controls>,
}

/// Result of a pass; the same on every rank.
#[derive(Clone, Debug)]
pub struct Passed {
    /// [`Status::Finished`] or [`Status::Stopped`].
    pub status: Status,
    /// Samples of all ranges that are done, those of earlier, stopped passes among them.
    pub samples: u64,
    pub outputs: u64,
    pub pass_s: f64,
    pub samples_per_s: f64,
    pub reason: Option<String>,
    pub files_skipped: u64,
}

/// How a rank's range ended.
enum Ended {
    Done,
    Stopped,
}

struct Runner<'a, 'o> {
    run: PassRun<'a>,
    observer: &'o mut dyn Observer,
    orders: Orders,
    ranges: Ranges,
    outputs: Vec<PassOutput>,
    dataset: Arc<dyn Dataset>,
    narrow: Option<Kind>,
    /// Samples of a forward pass.
    batch: usize,
    began: Stopwatch,
    /// Samples done by all ranks in this process.
    samples_here: u64,
    left_out: u64,
}

impl<'a> PassRun<'a> {
    /// Does what is left of the pass, or stops on request.
    ///
    /// # Errors
    /// See [`TrainError`]; whatever is whole stays.
    pub fn run(self, observer: &mut dyn Observer) -> Result<Passed, TrainError> {
        let outputs = self.pass.predictor.outputs().to_vec();
        let dataset = Arc::clone(&self.pass.datasets.val);
        check(&outputs, dataset.len() as u64)?;
        let ranges = Ranges::find(&outputs, self.pass.predictor.range_samples(), self.out, self.parts);
        let (narrow, note) = amp::narrow_kind(self.config.train.amp, self.device.is_cuda());
        if let Some(note) = note.filter(|_| self.collective.rank() == 0) {
            observer.line(note.to_owned());
        }
        // What is there is looked at before any rank adds to it.
        self.collective.barrier()?;
        let mut runner = Runner {
            orders: Orders::new(Arc::clone(&self.controls)),
            batch: self.plan.batch.val_batch.max(1),
            run: self,
            observer,
            ranges,
            outputs,
            dataset,
            narrow,
            began: Stopwatch::start(),
            samples_here: 0,
            left_out: 0,
        };
        let result = runner.rounds();
        if let Err(error) = &result {
            runner.observer.failing(error);
        }
        runner.close(result?)
    }
}

/// Samples of outputs follow each other and are all there are.
fn check(outputs: &[PassOutput], samples: u64) -> Result<(), TrainError> {
    let mut at = 0;
    for output in outputs {
        if output.samples.start != at || output.samples.end < at {
            let (name, range) = (output.name.display(), &output.samples);
            return Err(TrainError::Config(format!("output {name} has samples {range:?}: expected from {at} on")));
        }
        at = output.samples.end;
    }
    if at != samples {
        return Err(TrainError::Config(format!("outputs have {at} samples, the data {samples}")));
    }
    Ok(())
}

impl Runner<'_, '_> {
    fn rounds(&mut self) -> Result<Status, TrainError> {
        let [done, all] = self.ranges.samples();
        if done > 0 && self.run.collective.rank() == 0 {
            self.observer.line(format!("{done} of {all} samples are done already"));
        }
        self.observer.phase(Phase::Predict, 0);
        self.join_ready()?;
        let (rank, world) = (self.run.collective.rank(), self.run.collective.world_size());
        let pending = self.ranges.pending.clone();
        let mut loader = None;
        for round in pending.chunks(world) {
            let own = round.get(rank).copied();
            let ended = own.map_or(Ok(Ended::Done), |range| self.range(range, &mut loader))?;
            let stops = matches!(ended, Ended::Stopped) || self.run.controls.stops();
            let broken = matches!(ended, Ended::Stopped);
            let votes = self.run.collective.all_gather(&[u8::from(stops), u8::from(broken)])?;
            for (range, vote) in round.iter().zip(&votes) {
                if vote.get(1) == Some(&0) {
                    self.ranges.done(*range);
                    self.samples_here += count(self.ranges.get(*range));
                }
            }
            self.tell_progress(done, all);
            self.tell_left_out()?;
            if votes.iter().any(|vote| vote.first() == Some(&1)) {
                return Ok(Status::Stopped);
            }
            self.join_ready()?;
        }
        drop(loader);
        self.finish()?;
        Ok(Status::Finished)
    }

    /// One range of this rank, again with smaller batches where memory runs out.
    fn range(&mut self, range: usize, loader: &mut Option<Loader>) -> Result<Ended, TrainError> {
        loop {
            let unfinished = self.ranges.unfinished(&format!("{range:08}"));
            remove(&unfinished)?;
            match self.try_range(range, &unfinished, loader) {
                Err(TrainError::Torch(TorchError::OutOfMemory { message })) => self.smaller(message, loader)?,
                Ok(Ended::Done) => {
                    let part = self.ranges.part(range);
                    std::fs::rename(&unfinished, &part).map_err(|e| DataError::output(&part, e))?;
                    return Ok(Ended::Done);
                }
                other => {
                    // What is left behind is nothing that a later pass would take for a part.
                    let _ = remove(&unfinished);
                    return other;
                }
            }
        }
    }

    fn smaller(&mut self, message: String, loader: &mut Option<Loader>) -> Result<(), TrainError> {
        *loader = None;
        torch::release_caches();
        let (before, rank) = (self.batch, self.run.collective.rank());
        if before <= 1 {
            return Err(TrainError::PassOutOfMemory { rank, message });
        }
        self.batch = before.div_ceil(2);
        let now = self.batch;
        self.observer.line(format!("rank {rank}: out of memory ({message}): batches {before} → {now}; once more"));
        Ok(())
    }

    fn loader<'l>(&self, loader: &'l mut Option<Loader>) -> Result<&'l mut Loader, TrainError> {
        if loader.as_ref().is_some_and(|loader| loader.micro_batch() != self.batch) {
            *loader = None;
        }
        Ok(match loader {
            Some(loader) => loader,
            None => {
                let threads = self.run.plan.loader.threads;
                let spec = LoaderSpec {
                    threads,
                    slots: threads + 2,
                    micro_batch: self.batch,
                    throttle: Arc::clone(self.run.controls.throttle()),
                    gives_back: self.run.device == Device::Cpu,
                    ..LoaderSpec::default()
                };
                loader.insert(Loader::new(Arc::clone(&self.dataset), spec)?)
            }
        })
    }

    fn try_range(&mut self, range: usize, part: &Path, loader: &mut Option<Loader>) -> Result<Ended, TrainError> {
        let of = self.ranges.get(range).clone();
        self.run.pass.predictor.begin(&of, part)?;
        let batch = self.batch as u64;
        let samples = of.samples.clone();
        let starts = samples.clone().step_by(self.batch);
        let requests = starts.enumerate().map(move |(step, start)| BatchRequest {
            step: step as u64,
            micros: 1,
            sample_ids: (start..(start + batch).min(samples.end)).collect(),
            ..BatchRequest::default()
        });
        let loader = self.loader(loader)?;
        let _slots = ledger::hold(Part::ValSlots, loader.pool_bytes() as u64);
        let mut batches = loader.run(requests)?;
        loop {
            self.orders.obey(range as u64, &batches, self.observer);
            self.halve_as_ordered(range as u64);
            if self.run.controls.stops() {
                return Ok(Ended::Stopped);
            }
            let Some(host) = batches.next().transpose()? else { break };
            let usable: Vec<usize> =
                (0..host.len()).filter(|n| !self.dataset.is_left_out(host.sample_ids()[*n])).collect();
            self.left_out += (host.len() - usable.len()) as u64;
            if usable.is_empty() {
                continue;
            }
            let passed = torch::catch_out_of_memory(|| -> Result<Result<(), DataError>, TorchError> {
                let batch = evaluate::chosen(to_tensors(&host, self.run.device), host.fields(), &usable);
                let prediction = no_grad(|| amp::predict(self.run.model, &batch, self.narrow))?;
                Ok(self.run.pass.predictor.take(&batch, &prediction))
            });
            passed.and_then(|inner| inner)??;
        }
        self.run.pass.predictor.end()?;
        Ok(Ended::Done)
    }

    /// Smaller batches from the next range on: a pass needs no other rank's consent.
    fn halve_as_ordered(&mut self, step: u64) {
        while self.orders.wishes(step).halve {
            let before = self.batch;
            self.batch = before.div_ceil(2);
            let now = self.batch;
            let (text, effect) = match before {
                1 => ("batches hold one sample already: nothing to halve".to_owned(), Effect::Smallest),
                _ => (
                    format!("batches {before} → {now} from the next range on"),
                    Effect::Halved { micro_batch: [before as u64, now as u64], accumulation: [1, 1] },
                ),
            };
            self.orders.halved(step, text, effect, self.observer);
        }
    }

    /// Makes outputs of their parts, each on one rank.
    fn join_ready(&mut self) -> Result<(), TrainError> {
        let (rank, world) = (self.run.collective.rank(), self.run.collective.world_size());
        for output in self.ranges.ready() {
            if output % world == rank {
                self.join(output)?;
            }
            self.ranges.joined(output);
        }
        Ok(())
    }

    fn join(&mut self, output: usize) -> Result<(), TrainError> {
        let of = &self.outputs[output];
        let parts: Vec<PathBuf> = self.ranges.of_output(output).map(|range| self.ranges.part(range)).collect();
        let target = self.run.out.join(&of.name);
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder).map_err(|e| DataError::output(folder, e))?;
        }
        let is_output = parts.len() == 1 && self.run.pass.predictor.parts_are_outputs();
        let unfinished = if is_output { parts[0].clone() } else { self.ranges.unfinished(&format!("output-{output}")) };
        if !is_output {
            remove(&unfinished)?;
            self.run.pass.predictor.join(of, &parts, &unfinished)?;
        }
        std::fs::rename(&unfinished, &target).map_err(|e| DataError::output(&target, e))?;
        parts.iter().try_for_each(|part| remove(part))?;
        Ok(())
    }

    /// Rank 0's last work, when every output is there.
    fn finish(&mut self) -> Result<(), TrainError> {
        self.run.collective.barrier()?;
        if self.run.collective.rank() == 0 {
            let lines = self.run.pass.predictor.finish(self.run.out)?;
            lines.into_iter().for_each(|line| self.observer.line(line));
            remove(self.run.parts)?;
        }
        self.run.collective.barrier()?;
        Ok(())
    }

    fn tell_progress(&mut self, before: u64, all: u64) {
        let done = before + self.samples_here;
        self.observer.step(&Progress {
            phase: Phase::Predict,
            epoch: 1,
            epochs: 1,
            step: done,
            steps: all,
            samples_per_s: self.samples_here as f64 / self.began.elapsed().as_secs_f64().max(1e-9),
            ..Progress::default()
        });
    }

    /// Rank 0 names files that reading found to be unusable, whichever rank met them.
    fn tell_left_out(&mut self) -> Result<(), TrainError> {
        // A data set has such lines on all ranks or on none.
        let Some(lines) = self.dataset.take_left_out() else { return Ok(()) };
        for text in self.run.collective.all_gather(lines.join("\n").as_bytes())? {
            let text = String::from_utf8_lossy(&text).into_owned();
            text.lines().for_each(|line| self.observer.line(format!("warning: left out: {line}")));
        }
        Ok(())
    }

    fn close(mut self, status: Status) -> Result<Passed, TrainError> {
        let stopped = status == Status::Stopped;
        self.orders.close(0, stopped, self.observer);
        let own = self.run.controls.reason().filter(|_| stopped).unwrap_or_default();
        let mut facts = self.left_out.to_le_bytes().to_vec();
        facts.extend(own.as_bytes());
        let (mut left_out, mut reason) = (0, None);
        for text in self.run.collective.all_gather(&facts)? {
            let Some((count, words)) = text.split_first_chunk::<8>() else { continue };
            left_out += u64::from_le_bytes(*count);
            let words = Some(String::from_utf8_lossy(words).into_owned()).filter(|words| !words.is_empty());
            reason = reason.or(words);
        }
        if left_out > 0 && self.run.collective.rank() == 0 {
            self.observer.line(format!("warning: {left_out} samples could not be used: they have no prediction"));
        }
        let pass_s = self.began.elapsed().as_secs_f64();
        let [before, _] = self.ranges.samples();
        Ok(Passed {
            status,
            samples: before + self.samples_here,
            outputs: self.ranges.outputs_done() as u64,
            pass_s,
            samples_per_s: self.samples_here as f64 / pass_s.max(1e-9),
            reason,
            files_skipped: self.run.pass.datasets.skipped.len() as u64,
        })
    }
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<(), DataError> {
    let facts = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| DataError::output(path, e))?,
    };
    let removed = if facts.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.map_err(|e| DataError::output(path, e))
}
