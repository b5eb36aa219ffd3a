//! Ends: of an epoch, of a run; and the checkpoints between.

use super::{Finished, Loop, Status, named_state};
use crate::data::{Dataset, FieldSpec};
use crate::torch;
use crate::train::TrainError;
use crate::train::checkpoint::{self, Checkpointer, Content};
use crate::train::device::DeviceStep;
use crate::train::ema::Named;
use crate::train::evaluate::{EvalSpec, Evaluated, Watch, evaluate};
use crate::train::state::BestState;
use spec::contract::{MetricsRecord, Phase};
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Reasons why a checkpoint stays: see [`Content`].
#[derive(Clone, Copy, Default)]
struct Mark {
    best: bool,
    keep: bool,
    last: bool,
}

/// How an epoch ended.
pub(super) enum EpochEnd {
    GoesOn,
    EarlyStopped,
    /// A request to stop broke the validation off: it is done on resume.
    Interrupted,
}

impl Loop<'_, '_> {
    /// Validation, schedule, early stopping, checkpoint. `record`: of the epoch's last step; it is written here.
    pub(super) fn end_epoch(&mut self, epoch: u64, mut record: MetricsRecord) -> Result<EpochEnd, TrainError> {
        let Some(values) = self.validate()? else {
            self.state.unvalidated = Some(record.clone());
            self.carried_sums.clear();
            self.write(Some(record));
            return Ok(EpochEnd::Interrupted);
        };
        self.carried_sums.clear();
        // JSON has no NaN: what is not finite is left out.
        record.metrics.extend(values.iter().filter(|(_, v)| v.is_finite()).map(|(k, v)| (k.clone(), *v)));
        record.files_skipped = self.files_skipped();
        self.last_values.extend(values);
        let monitored = self.monitored()?;
        let verdict = self.monitor.end_epoch(epoch, monitored);
        self.schedule.end_epoch(self.state.step, monitored);
        let improved = verdict.improved;
        if improved {
            self.state.best = Some(BestState { value: monitored, step: self.state.step });
        }
        self.tell_epoch(epoch, improved);
        let log = &self.fit.config.log;
        let due = log.save_every > 0 && (epoch + 1).is_multiple_of(log.save_every) && !log.save_best_only;
        let keeps_best = improved && self.fit.config.train.restore_best_weights;
        let keep = log.keep_every > 0 && epoch.is_multiple_of(log.keep_every);
        if due || keep || keeps_best || (improved && log.save_best_only) {
            self.save(Mark { best: improved, keep, last: false })?;
        }
        self.write(Some(record));
        Ok(if verdict.stop { EpochEnd::EarlyStopped } else { EpochEnd::GoesOn })
    }

    /// On resume: the end of an epoch whose validation was broken off. `Some`: training ends here.
    pub(super) fn end_broken_epoch(&mut self) -> Result<Option<Status>, TrainError> {
        let Some(record) = self.state.unvalidated.take() else { return Ok(None) };
        // The checkpoint there is still says that the validation is to be done.
        self.saved_step = None;
        self.last_values.extend(record.metrics.clone());
        Ok(match self.end_epoch(self.state.epoch().saturating_sub(1), record)? {
            EpochEnd::GoesOn => None,
            EpochEnd::EarlyStopped => Some(Status::EarlyStopped),
            EpochEnd::Interrupted => Some(Status::Stopped),
        })
    }

    fn validate(&mut self) -> Result<Option<BTreeMap<String, f64>>, TrainError> {
        self.observer.phase(Phase::Val, self.state.step);
        let dataset = Arc::clone(&self.fit.datasets.val);
        let values = self.evaluate(dataset, "val.")?;
        self.tell_left_out()?;
        // A validation that was broken off shows no pictures.
        let picture = self.fit.gallery.as_mut().and_then(|gallery| gallery.picture());
        if let Some(values) = &values {
            self.observer.validated(self.state.step, values, picture);
        }
        Ok(values)
    }

    /// With the averaged weights where there are any. `None`: broken off by a request to stop.
    fn evaluate(
        &mut self,
        dataset: Arc<dyn Dataset>,
        prefix: &str,
    ) -> Result<Option<BTreeMap<String, f64>>, TrainError> {
        self.meet()?;
        self.averages.swap();
        let trims = self.evaluation_is_larger();
        if trims {
            torch::release_caches();
        }
        let evaluated = loop {
            match self.evaluate_once(&dataset, prefix) {
                Ok(Evaluated::Values(values)) => break Ok(Some(values)),
                Ok(Evaluated::Interrupted) => break Ok(None),
                Ok(Evaluated::OutOfMemory { message }) => {
                    if let Err(error) = self.recover_evaluation(message) {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.averages.swap();
        if trims {
            torch::release_caches();
        }
        evaluated
    }

    /// True if an evaluation's batch has more bytes than a step's, as whole frames have more than crops. Tensors of the
    /// one then do not fit in the place of the other, and a CPU's heap would hold both from the first evaluation on.
    fn evaluation_is_larger(&self) -> bool {
        let bytes = |data: &Arc<dyn Dataset>| data.fields().iter().map(FieldSpec::sample_bytes).sum::<usize>() as u64;
        let (train, val) = (bytes(&self.fit.datasets.train), bytes(&self.fit.datasets.val));
        self.fit.device == Device::Cpu && val * self.val_batch as u64 > train * self.planner.micro_batch
    }

    fn evaluate_once(&mut self, dataset: &Arc<dyn Dataset>, prefix: &str) -> Result<Evaluated, TrainError> {
        let spec = EvalSpec {
            batch: self.val_batch,
            threads: self.fit.plan.loader.threads,
            device: self.fit.device,
            narrow: self.narrow,
            throttle: Arc::clone(self.orders.controls.throttle()),
            seed: self.fit.config.seed,
        };
        let (orders, observer, step) = (&mut self.orders, &mut *self.observer, self.state.step);
        let collective = self.fit.collective.as_ref();
        let mut watch = Watch { metrics: self.fit.metrics.as_mut(), gallery: None };
        if prefix == "val." {
            watch.gallery = self.fit.gallery.as_deref_mut();
        }
        evaluate(self.fit.model, &mut watch, dataset, &spec, collective, prefix, &mut |batches| {
            orders.obey(step, batches, observer);
            orders.controls.stops()
        })
    }

    /// Brings the ranks' buffers together: `ddp.buffers`. All ranks call it.
    fn meet(&mut self) -> Result<(), TrainError> {
        self.buffers.meet()?;
        self.averages.meet()
    }

    fn monitored(&self) -> Result<f64, TrainError> {
        let name = &self.fit.config.train.monitor_metric;
        self.last_values.get(name).copied().ok_or_else(|| {
            let known: Vec<&str> = self.last_values.keys().map(String::as_str).collect();
            TrainError::Config(format!(
                "train.monitor_metric {name} is not measured: choose one of {}",
                known.join(", ")
            ))
        })
    }

    /// The last checkpoint of a run that ends.
    pub(super) fn seal(&mut self, status: Status) -> Result<Status, TrainError> {
        // The checkpoint of this step may have failed in the background, as rank 0 alone knows.
        let step = self.state.step;
        let lost = match &mut self.fit.checkpoints {
            Some(checkpoints) if self.saved_step == Some(step) => match checkpoints.wait() {
                Err(error) if !error.is_passing() => return Err(error.into()),
                _ => checkpoints.has_lost(step),
            },
            _ => false,
        };
        if self.fit.collective.all_gather(&[u8::from(lost)])?.iter().any(|flag| flag == &[1]) {
            self.saved_step = None;
        }
        if self.saved_step != Some(step) {
            self.save(Mark { last: true, ..Mark::default() })?;
        }
        Ok(status)
    }

    /// Ends the run when a checkpoint failed for good.
    pub(super) fn check_saved(&mut self) -> Result<(), TrainError> {
        Ok(self.fit.checkpoints.as_mut().map_or(Ok(()), Checkpointer::check)?)
    }

    /// A checkpoint of this step that is there already stays: it may be marked as the best.
    pub(super) fn save_once(&mut self) -> Result<(), TrainError> {
        if self.saved_step == Some(self.state.step) { Ok(()) } else { self.save(Mark::default()) }
    }

    /// Every rank calls it; rank 0 writes, in the background.
    fn save(&mut self, Mark { best, keep, last }: Mark) -> Result<(), TrainError> {
        self.observer.phase(Phase::Checkpoint, self.state.step);
        // Weights are read back below, and the step that made them may wait for other ranks.
        self.fit.collective.catch_up("the step to save")?;
        let mut state = self.state.clone();
        state.train_sums = if state.step_in_epoch() == 0 { Vec::new() } else { self.train_sums()? };
        state.schedule = Some(self.schedule.state().clone());
        state.monitor = Some(self.monitor.state().clone());
        state.scaler = self.on_device.as_ref().map(DeviceStep::scaler_state).transpose()?.flatten();
        self.saved_step = Some(state.step);
        self.meet()?;
        let mut rest = named_state(self.fit.model);
        for buffers in std::iter::once(&mut self.buffers).chain(self.averages.buffers()) {
            if buffers.are_local() {
                rest.extend(buffers.of_all_ranks()?);
            }
        }
        // Ranks that divide the optimizer's state bring it together for this.
        let divided = self.ddp.is_sharded().then(|| self.optimizer.export(&self.ddp)).transpose()?;
        if let Some(checkpoints) = &mut self.fit.checkpoints {
            let optimizer = match divided {
                Some(whole) => whole,
                None => self.optimizer.export(&self.ddp)?,
            };
            let model: Named = self.fit.params.iter().chain(self.buffers.named()).map(clone).collect();
            checkpoints.save(Content {
                step: state.step,
                model: &model,
                optimizer: &optimizer,
                ema: &self.averages.content(),
                rest: &rest,
                facts: self.fit.facts.clone(),
                best,
                keep,
                last,
                state: serde_json::to_value(&state).map_err(|e| TrainError::Config(format!("loop state: {e}")))?,
            })?;
        }
        Ok(())
    }

    /// The best weights back, the test split, the result.
    pub(super) fn close(mut self, mut status: Status) -> Result<Finished, TrainError> {
        if status != Status::Stopped {
            // Ranks meet here: rank 0's checkpoints are on disk.
            self.fit.collective.barrier()?;
            self.tell_agreement()?;
            self.restore_best()?;
            self.observer.phase(Phase::Test, self.state.step);
            match self.evaluate(Arc::clone(&self.fit.datasets.test), "test.")? {
                Some(values) => {
                    self.last_values.extend(values);
                    if self.planner.rank == 0 {
                        self.observer.files(self.fit.metrics.files());
                    }
                }
                // All is trained and saved; a resumed run continues here.
                None => status = Status::Stopped,
            }
            self.tell_left_out()?;
        }
        let stopped = status == Status::Stopped;
        self.orders.close(self.state.step, stopped, self.observer);
        let reason = if stopped { self.reason()? } else { None };
        let mut headline = self.headline("test.");
        if headline.is_empty() {
            headline = self.headline("val.");
        }
        self.last_values.retain(|_, value| value.is_finite());
        let files_skipped = self.files_skipped();
        Ok(Finished {
            status,
            steps: self.state.step,
            epochs: self.state.epoch(),
            train_s: self.train_s_here,
            samples_per_s: self.samples_here as f64 / self.train_s_here.max(1e-9),
            metrics: self.last_values,
            headline,
            best: self.state.best,
            reason,
            cleanups: self.cleanups,
            files_skipped,
        })
    }

    /// Why the run stops, as the lowest rank that knows says. All ranks call it together.
    fn reason(&self) -> Result<Option<String>, TrainError> {
        let own = self.orders.controls.reason().unwrap_or_default();
        let all = self.fit.collective.all_gather(own.as_bytes())?;
        Ok(all.iter().find(|text| !text.is_empty()).map(|text| String::from_utf8_lossy(text).into_owned()))
    }

    /// CUDA ranks each apply the summed gradient for themselves: what they end with is compared once.
    fn tell_agreement(&mut self) -> Result<(), TrainError> {
        let world = self.fit.collective.world_size();
        if world == 1 || !self.fit.device.is_cuda() {
            return Ok(());
        }
        self.observer.line(match self.ddp.differing_rank()? {
            None => format!("parameters: the same bits on all {world} ranks"),
            Some(rank) => format!("warning: rank {rank}'s parameters differ from rank 0's"),
        });
        Ok(())
    }

    /// Rank 0 reads the best checkpoint, all ranks get its weights.
    fn restore_best(&mut self) -> Result<(), TrainError> {
        let Some(best) = self.state.best else { return Ok(()) };
        if !self.fit.config.train.restore_best_weights || best.step == self.state.step {
            return Ok(());
        }
        let averaged = self.averages.tensors();
        let model: Named = self.fit.params.iter().chain(self.buffers.named()).map(clone).collect();
        let lost = self.fit.checkpoints.as_ref().is_some_and(|checkpoints| checkpoints.has_lost(best.step));
        if lost {
            let step = best.step;
            self.observer.line(format!(
                "warning: the best weights, of step {step}, could not be saved: the last ones are tested instead"
            ));
        }
        if self.planner.rank == 0 && !lost {
            let loaded = checkpoint::load(&self.fit.checkpoint_dir.join(format!("step-{}", best.step)))?;
            checkpoint::apply(&loaded.path, &loaded.model, &model)?;
            self.averages.load(&loaded.ema);
        }
        for (_, tensor) in model.iter().chain(averaged.iter().flatten()) {
            self.fit.collective.broadcast(&tensor.detach(), 0)?;
        }
        self.buffers.keep()
    }
}

fn clone((name, tensor): &(String, Tensor)) -> (String, Tensor) {
    (name.clone(), tensor.shallow_clone())
}
