//! The loop itself: epochs of steps.

use super::close::EpochEnd;
use super::{Loop, Status};
use crate::data::loader::{BatchStream, Loader, LoaderSpec};
use crate::ledger::{self, Holding, Part};
use crate::train::TrainError;
use crate::train::device::DeviceStep;
use crate::train::step::{Attempt, Parts, StepOutcome, StepRunner};
use host::machine::awake::Stopwatch;
use spec::contract::Phase;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use tch::Device;

/// A loader, and its slots as the ledger counts them.
type Counted = (Loader, Holding);

/// Why a run of the loader ended.
enum Leg {
    /// The epoch is over.
    Over,
    /// Micro-batches have another size from here on.
    Resized,
    /// Training ends.
    Ends(Status),
}

impl Loop<'_, '_> {
    pub(super) fn steps_total(&self) -> u64 {
        let by_epochs = self.state.steps_of(self.fit.config.train.num_epochs as u64);
        self.fit.config.train.max_steps.map_or(by_epochs, |max| max.min(by_epochs))
    }

    pub(super) fn train(&mut self) -> Result<Status, TrainError> {
        let mut loader = None;
        let ended = catch_unwind(AssertUnwindSafe(|| self.epochs(&mut loader)));
        if let Some(device) = &mut self.on_device
            && !matches!(ended, Ok(Ok(_)))
        {
            // Before the communicator ends: it waits for the last recorded step to be gone.
            device.forget_recording();
        }
        match &ended {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.observer.failing(error),
            Err(_) => self.observer.panicking(),
        }
        if let Some(device) = &mut self.on_device {
            // Before the loader's memory goes.
            device.input.unpin();
        }
        ended.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn epochs(&mut self, loader: &mut Option<Counted>) -> Result<Status, TrainError> {
        let total = self.steps_total();
        if self.monitor.is_over() {
            // Killed between the checkpoint of its last epoch and its end.
            return Ok(Status::EarlyStopped);
        }
        if let Some(status) = self.end_broken_epoch()? {
            return self.seal(status);
        }
        while self.state.step < total {
            let last = self.state.steps_of(self.state.epoch() + 1).min(total);
            self.observer.phase(Phase::Train, self.state.step);
            while let Leg::Resized = match self.leg(loader, last)? {
                Leg::Ends(status) => return self.seal(status),
                other => other,
            } {}
        }
        self.seal(Status::Finished)
    }

    /// The loader for micro-batches as they are now; an earlier one's memory is given back first.
    fn fitting<'l>(&mut self, loader: &'l mut Option<Counted>) -> Result<&'l mut Loader, TrainError> {
        let micro_batch = self.planner.micro_batch as usize;
        if let Some(device) = &mut self.on_device {
            device.begin(micro_batch)?;
        }
        if loader.as_ref().is_some_and(|(loader, _)| loader.micro_batch() != micro_batch) {
            *loader = None;
        }
        let loader = match loader {
            Some((loader, _)) => loader,
            None => {
                let spec = LoaderSpec {
                    threads: self.fit.plan.loader.threads,
                    slots: self.fit.plan.loader.slots,
                    micro_batch,
                    persistent: self.fit.config.train.persistent_workers,
                    throttle: Arc::clone(self.orders.controls.throttle()),
                    gives_back: self.fit.device == Device::Cpu,
                    lends: self.on_device.is_some() && self.fit.config.train.pin_memory,
                    ..LoaderSpec::default()
                };
                let new = Loader::new(Arc::clone(&self.fit.datasets.train), spec)?;
                let slots = ledger::hold(Part::Slots, new.pool_bytes() as u64);
                &mut loader.insert((new, slots)).0
            }
        };
        if let Some(device) = self.on_device.as_mut().filter(|_| self.fit.config.train.pin_memory)
            && let Some(line) = device.input.pin(loader.pool_range())
        {
            self.observer.line(line);
        }
        Ok(loader)
    }

    /// Steps up to `last`, the epoch's, as long as micro-batches keep their size.
    fn leg(&mut self, loader: &mut Option<Counted>, last: u64) -> Result<Leg, TrainError> {
        let epoch = self.state.epoch();
        let requests = self.planner.requests(epoch, self.state.step_in_epoch());
        let mut batches = self.fitting(loader)?.run(requests)?;
        loop {
            self.orders.obey(self.state.step, &batches, self.observer);
            let Some(outcome) = self.step(&mut batches, last)? else { return Ok(Leg::Resized) };
            if outcome.halve {
                self.halve_as_ordered();
            }
            self.clean_up_if_due(&batches);
            self.check_saved()?;
            if self.state.step == last {
                drop(batches);
                return self.end_of_epoch(epoch, &outcome);
            }
            let record = self.record_if_due(&outcome, epoch, outcome.stop)?;
            self.write(record);
            if outcome.stop {
                return Ok(Leg::Ends(Status::Stopped));
            }
            self.save_if_due()?;
            if outcome.halve {
                return Ok(Leg::Resized);
            }
        }
    }

    fn end_of_epoch(&mut self, epoch: u64, outcome: &StepOutcome) -> Result<Leg, TrainError> {
        let record = self.record(outcome, epoch)?;
        if let Some(device) = &mut self.on_device {
            // Validation may be long: nothing of the page cache is held meanwhile.
            device.input.clear();
        }
        let ended = self.end_epoch(epoch, record)?;
        if let EpochEnd::Interrupted = ended {
            return Ok(Leg::Ends(Status::Stopped));
        }
        self.save_if_due()?;
        Ok(match ended {
            EpochEnd::EarlyStopped => Leg::Ends(Status::EarlyStopped),
            _ if outcome.stop => Leg::Ends(Status::Stopped),
            _ => Leg::Over,
        })
    }

    /// `log.save_every_steps`.
    fn save_if_due(&mut self) -> Result<(), TrainError> {
        let every = self.fit.config.log.save_every_steps;
        if every > 0 && self.state.step.is_multiple_of(every) {
            self.save_once()?;
        }
        Ok(())
    }

    /// One optimizer step over all ranks. `None`: memory ran out on some rank, nothing has changed but the micro-batch.
    fn step(&mut self, batches: &mut BatchStream, last: u64) -> Result<Option<StepOutcome>, TrainError> {
        let started = Stopwatch::start();
        let step = self.state.step;
        let numbers: Vec<_> = self.groups.courses.iter().map(|course| self.schedule.numbers(step, course)).collect();
        let runner = StepRunner {
            config: self.fit.config,
            planner: &self.planner,
            model: self.fit.model,
            device: self.fit.device,
            narrow: self.narrow,
            collective: self.fit.collective.as_ref(),
            step,
            step_in_epoch: self.state.step_in_epoch(),
            epoch: self.state.epoch(),
            warming: self.schedule.is_warming(step) && numbers.iter().any(|numbers| numbers.momentum.is_some()),
            lr: self.schedule.rate(step),
            numbers: &numbers,
            peers: self.peers.as_ref(),
            wishes: self.orders.wishes(step),
            trial: self.trial.as_ref().is_some_and(|trial| !trial.is_over()),
        };
        // A device is asked for them only where somebody reads them.
        let sums = if self.on_device.is_some() { Vec::new() } else { self.local_sums() };
        let exact = runner.trial || step + 1 == last || (step + 1).is_multiple_of(self.fit.config.log.log_every.max(1));
        let samples = runner.samples();
        let mut parts = Parts {
            ddp: &mut self.ddp,
            optimizer: &mut self.optimizer,
            metrics: self.fit.metrics.as_mut(),
            buffers: &mut self.buffers,
        };
        let result = match &mut self.on_device {
            Some(device) => device.run(&runner, batches, &mut parts, exact),
            None => runner.run(batches, &mut parts),
        };
        let mut outcome = match result {
            Err(error @ TrainError::NonFinite { good, .. }) => {
                // A device reports it a step late; the weights are those of `good` all the same.
                self.state.step = good;
                // The failed step counts for nothing: its sums may be no numbers, which JSON cannot hold.
                self.forget_step(sums);
                self.save_once()?;
                return Err(error);
            }
            Ok(Attempt::OutOfMemory { message }) => {
                match &mut self.on_device {
                    // Steps that were counted since, and changed nothing.
                    Some(device) => self.state.step = device.good_step(),
                    None => self.forget_step(sums),
                }
                self.recover(message)?;
                return Ok(None);
            }
            Ok(Attempt::Done(outcome)) => outcome,
            Err(error) => return Err(error),
        };
        self.averages.update(step + 1)?;
        outcome.step_s = started.elapsed().as_secs_f64();
        self.tell_device(outcome.step_s)?;
        self.count(&outcome, samples);
        Ok(Some(outcome))
    }

    /// Reports lines of the device and of a trial of precisions after a step.
    fn tell_device(&mut self, step_s: f64) -> Result<(), TrainError> {
        for line in self.on_device.iter_mut().flat_map(DeviceStep::take_lines) {
            self.observer.line(line);
        }
        if let Some(trial) = &mut self.trial {
            let line = trial.add(step_s, self.fit.collective.as_ref())?;
            self.narrow = trial.kind();
            line.into_iter().for_each(|line| self.observer.line(line));
        }
        Ok(())
    }

    /// Takes the metrics back to where they were before a failed step.
    fn forget_step(&mut self, sums: Vec<f64>) {
        self.fit.metrics.reset();
        self.carried_sums = sums;
    }

    fn count(&mut self, outcome: &StepOutcome, samples: u64) {
        self.state.step += 1;
        self.state.train_s += outcome.step_s;
        self.state.samples += samples;
        self.steps_here += 1;
        self.samples_here += samples;
        self.train_s_here += outcome.step_s;
        let progress = self.progress(outcome);
        self.observer.step(&progress);
    }
}
