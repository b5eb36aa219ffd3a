//! `rank describe`: sizes of a task's model and data for a plan, measured by running passes on made-up samples.
//!
//! ```text
//! outline of the data ─► model ─► passes of 1, 2, … samples: training, evaluation ─► one line of JSON per stage
//! ```
//! A launcher starts it before it plans, ends it when its time is up, and reads the last whole line. Large samples are measured
//! in smaller versions first ([`crate::task::Task::shrunk`]), so that a line is there even where the real ones are too much.

mod gauge;
mod pages;

use super::RankError;
use super::start::named;
use crate::data::FieldSpec;
use crate::data::loader::slot_fields;
use crate::task::outline::{Outline, made_up};
use crate::task::{self, Batch, Model, Task};
use crate::torch::{TorchError, count_tensors, device};
use crate::train::checkpoint::staging_bytes;
use crate::train::{Rehearsal, TrainError};
use gauge::{Gauge, Limits};
use spec::config::Config;
use spec::contract::{FileStamp, GpuSizes, Measured, ModelSizes, OptimizerSizes, Pass, VERSION};
use spec::job::{DescribeJob, PassKind};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Device, nn};

/// Numbers of samples that are measured. The first two always are, within the limits; the others where they are cheap.
const SAMPLES: [u64; 4] = [1, 2, 8, 32];
/// Elements of a sample above which a smaller version is measured first.
const LARGE_ELEMENTS: u64 = 128 << 10;

/// One version of the samples: the config with which they have their size, and how many times larger real ones are.
struct Level {
    config: Config,
    outline: Outline,
    enlarged: f64,
}

/// Reads the job on standard input and answers on standard output.
///
/// # Errors
/// No job, or a model that cannot be built at all. That a limit was reached is no error: the answer says so.
pub fn run() -> Result<(), RankError> {
    let began = Instant::now();
    let job = read_job()?;
    count_tensors();
    let on = ready(&job)?;
    let task = task::find(&job.config.task).map_err(RankError::Usage)?;
    let mut answer = Measured { library: library(), ..Measured::default() };
    let levels = levels(task, &job.config, job.passes)?;
    let real = &levels[0];
    answer.data = real.outline.sizes.clone();
    answer.model = ModelSizes {
        device: job.device.as_ref().map_or_else(|| "cpu".into(), |gpu| gpu.name.clone()),
        threads: job.threads as u64,
        enlarged: 1.0,
        short: Some("the model was not built in time".into()),
        ..ModelSizes::default()
    };
    answer.model.train.fields = bytes_of(real.outline.datasets.train.fields())?;
    answer.model.val.fields = bytes_of(real.outline.datasets.val.fields())?;
    if let Some(known) = job.known.filter(|known| is_alike(&known.model, &answer.model)) {
        answer.model = known.model;
        return tell(&answer);
    }
    tell(&answer)?;
    // As in training: a CUDA graph cannot be recorded on the default stream.
    let _stream = super::device::own_stream(on)?;
    let limits = Limits::new(began, job.limit_s, job.limit_bytes, on)?;
    measure_all((task, job.passes), &levels, (on, &limits), &mut answer)?;
    if let Some(gpu) = job.device {
        answer.model.gpu = gpu_sizes(on, gpu.memory_free_bytes);
    }
    tell(&answer)
}

fn read_job() -> Result<DescribeJob, RankError> {
    let mut text = String::new();
    let refused = |problem: String| RankError::Usage(format!("rank describe, the job on standard input: {problem}"));
    std::io::stdin().read_to_string(&mut text).map_err(|e| refused(e.to_string()))?;
    let job: DescribeJob = serde_json::from_str(&text).map_err(|e| refused(e.to_string()))?;
    if job.version != VERSION {
        return Err(refused(format!("written by a launcher of contract {}, this rank speaks {VERSION}", job.version)));
    }
    Ok(job)
}

/// Readies the device. Before any tensor is made: libtorch asks once whether there is CUDA.
fn ready(job: &DescribeJob) -> Result<Device, RankError> {
    let threads = job.threads.clamp(1, usize::from(u16::MAX)) as u16;
    let on = match &job.device {
        None => Device::Cpu,
        Some(gpu) => {
            let index = gpu.index as usize;
            device::load_cuda().and_then(|()| device::set_device(index)).map_err(TrainError::from)?;
            Device::Cuda(index)
        }
    };
    crate::torch::set_threads(threads, 1).map_err(TrainError::from)?;
    Ok(on)
}

fn library() -> Option<FileStamp> {
    let path = device::libtorch_folder()?.join("libtorch_cpu.so");
    let file = std::fs::metadata(&path).ok()?;
    let modified_ns = u64::try_from(file.mtime()).ok()?.checked_mul(1_000_000_000)? + file.mtime_nsec() as u64;
    Some(FileStamp { path: path.display().to_string(), bytes: file.len(), modified_ns })
}

/// Writes one line of the answer.
fn tell(answer: &Measured) -> Result<(), RankError> {
    let io = |e: std::io::Error| RankError::system("rank describe, its answer", e);
    let mut line = serde_json::to_vec(answer).map_err(|e| io(e.into()))?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(io)
}

/// Real samples first, then ever smaller ones.
fn levels(task: &dyn Task, config: &Config, kind: PassKind) -> Result<Vec<Level>, RankError> {
    let index: PathBuf = config.log.runs_dir.join(".index");
    let level = |config: Config, enlarged| -> Result<Level, RankError> {
        let outline = match kind {
            PassKind::Predict => task.predict_outline(&config, &index)?,
            _ => task.outline(&config, &index)?,
        };
        Ok(Level { config, outline, enlarged })
    };
    let mut levels = vec![level(config.clone(), 1.0)?];
    while let Some(last) = levels.last() {
        let sets = &last.outline.datasets;
        let measured = if kind == PassKind::Train { &sets.train } else { &sets.val };
        let elements: u64 = elements(measured.fields())?;
        let Some((smaller, factor)) = (elements > LARGE_ELEMENTS).then(|| task.shrunk(&last.config)).flatten() else {
            break;
        };
        let enlarged = last.enlarged * factor;
        levels.push(level(smaller, enlarged)?);
    }
    Ok(levels)
}

/// Bytes of one sample as a slot holds them, offsets of ragged fields included.
fn bytes_of(fields: &[FieldSpec]) -> Result<Vec<u64>, RankError> {
    let bytes = |field: &FieldSpec| elements_of(field).and_then(|n| n.checked_mul(field.dtype.bytes() as u64));
    if let Some(field) = fields.iter().find(|field| bytes(field).is_none()) {
        return Err(absurd(field));
    }
    Ok(slot_fields(fields).map(|bytes| bytes as u64).collect())
}

fn elements(fields: &[FieldSpec]) -> Result<u64, RankError> {
    let add = |sum: u64, field| sum.checked_add(elements_of(field)?);
    fields.iter().try_fold(0, add).ok_or_else(|| absurd(&fields[0]))
}

fn elements_of(field: &FieldSpec) -> Option<u64> {
    let most = field.most_rows() as u64;
    field.shape.iter().try_fold(most, |n, side| n.checked_mul(*side as u64)).filter(|n| *n < 1 << 56)
}

fn absurd(field: &FieldSpec) -> RankError {
    RankError::NoRoom(format!(
        "a sample's {} of shape {:?} is beyond any machine: the number of bytes overflows; check the sizes of samples in \
         the config",
        field.name, field.shape
    ))
}

/// True if passes of a `known` model are valid for this one.
fn is_alike(known: &ModelSizes, here: &ModelSizes) -> bool {
    let fields = |model: &ModelSizes| [model.train.fields.clone(), model.val.fields.clone()];
    known.device == here.device && known.short.is_none() && fields(known) == fields(here)
}

/// Measures the smallest samples first, then larger ones while the limits allow it.
fn measure_all(
    (task, kind): (&dyn Task, PassKind),
    levels: &[Level],
    (on, limits): (Device, &Limits),
    answer: &mut Measured,
) -> Result<(), RankError> {
    let mut before: Option<(f64, Pass, f64)> = None;
    for level in levels.iter().rev() {
        if let Some((enlarged, pass, seconds)) = before {
            let ratio = enlarged / level.enlarged;
            if let Some(why) = limits.forbid(pass.tensor_bytes as f64 * ratio, seconds * ratio) {
                answer.model.short = Some(format!("{why} with samples of their real size"));
                return Ok(());
            }
        }
        let stage = Stage { task, kind, level, on, limits };
        match stage.measure(answer) {
            Ok(seconds) => {
                let seen = if kind == PassKind::Train { &answer.model.train.seen } else { &answer.model.val.seen };
                let Some(last) = seen.first() else { return Ok(()) };
                before = Some((level.enlarged, *last, seconds));
                tell(answer)?;
            }
            Err(error) if is_short(&error) => {
                let of = if before.is_some() { " with samples of their real size" } else { "" };
                answer.model.short = Some(format!("{}{of}", limits.ran_out()));
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_short(error: &RankError) -> bool {
    matches!(error, RankError::Train(TrainError::Torch(TorchError::OutOfMemory { .. })))
}

/// One size of samples to measure with.
struct Stage<'a> {
    task: &'a dyn Task,
    kind: PassKind,
    level: &'a Level,
    on: Device,
    limits: &'a Limits,
}

impl Stage<'_> {
    /// Builds the model and runs passes; seconds that the first pair of passes took.
    fn measure(&self, answer: &mut Measured) -> Result<f64, RankError> {
        let Level { config, outline, enlarged } = self.level;
        let vs = nn::VarStore::new(self.on);
        let built = crate::torch::catch_out_of_memory(|| self.task.model(config, &outline.datasets, &vs.root()));
        let model = match built {
            // Gradients and optimizer state come on top of the weights: a model beyond the limit does not train either.
            Err(TorchError::OutOfMemory { message }) => {
                return Err(RankError::NoRoom(format!(
                    "the model alone does not fit the memory of its measurement, a quarter of the budget ({message}): make \
                     the model sizes smaller, or raise memory.budget"
                )));
            }
            built => built.map_err(TrainError::from)??,
        };
        let (params, buffers) = named(&vs);
        let parameters: u64 = params.iter().map(|(_, tensor)| tensor.numel() as u64).sum();
        let found = &mut answer.model;
        found.buffer_bytes = staging_bytes(buffers.iter().chain(&model.state()).map(|(_, tensor)| tensor));
        let buffer_bytes = found.buffer_bytes;
        (found.parameters, found.short) = (parameters, Some("no pass was made in time".into()));
        tell(answer)?;
        let metrics = self.task.metrics(config, &outline.datasets)?;
        let trains = self.kind == PassKind::Train;
        let model = model.as_ref();
        let mut rehearsal = match trains {
            true => Rehearsal::new(config, model, params, metrics, self.on)?,
            false => Rehearsal::of_passes(config, model, metrics, self.on),
        };
        let gauge = Gauge::start(self.on, parameters * 4 * if trains { 2 } else { 1 } + buffer_bytes, model.compiles());
        let mut seen = Seen::default();
        let (seconds, cut) = self.passes(&mut rehearsal, &gauge, &mut seen)?;
        // It stays, whatever the samples.
        seen.train.iter_mut().chain(&mut seen.val).for_each(|pass| pass.beside_bytes += gauge.code_bytes());
        let found = &mut answer.model;
        if trains {
            found.optimizer = own_optimizer(config, model, &gauge)?;
        }
        (found.train.seen, found.val.seen) = (seen.train, seen.val);
        (found.enlarged, found.short) = (*enlarged, cut);
        if self.on == Device::Cpu {
            found.runtime_bytes = gauge.runtime_bytes();
            found.interpreter_bytes = super::INTERPRETER_BYTES.load(std::sync::atomic::Ordering::Relaxed);
            found.library_bytes = pages::library_bytes(Path::new("/proc/self"));
        }
        Ok(seconds)
    }

    /// Passes of every number of samples that is allowed; seconds of the first pair, and why there are fewer than two.
    fn passes(
        &self,
        rehearsal: &mut Rehearsal,
        gauge: &Gauge,
        seen: &mut Seen,
    ) -> Result<(f64, Option<String>), RankError> {
        let mut first_s = 0.0;
        for samples in SAMPLES {
            if let Some(last) = seen.last(self.kind) {
                let ratio = samples as f64 / last.samples as f64;
                let (bytes, seconds) = (last.tensor_bytes as f64 * ratio, seen.last_s * ratio);
                if samples > 2 && self.limits.is_dear(bytes, seen.computed_s * ratio) {
                    break;
                }
                // The plan then takes all of one sample's bytes as growing with the samples.
                if samples == 2 && gauge::is_slow(seen.computed_s * ratio) {
                    break;
                }
                if let Some(why) = self.limits.forbid(bytes, seconds) {
                    let cut = (samples == 2).then(|| format!("{why} with more than 1 sample"));
                    return Ok((first_s, cut));
                }
            }
            let settled = gauge.settle(|| self.pair(rehearsal, gauge, samples, &mut Seen::default()));
            let (began, computed_s) = (Instant::now(), gauge::computed_s());
            match settled.and_then(|()| self.pair(rehearsal, gauge, samples, seen)) {
                // Too few for some models, such as those that normalise over the batch.
                Err(RankError::Train(TrainError::Torch(TorchError::User { .. }))) if samples == 1 => {
                    *seen = Seen::default();
                    continue;
                }
                Err(error) if samples > 1 && is_short(&error) => {
                    // What fewer samples took is known.
                    seen.train.truncate(if self.kind == PassKind::Train { seen.val.len() } else { 0 });
                    let cut = || format!("{} with 2 samples at a time", self.limits.ran_out());
                    return Ok((first_s, (samples == 2).then(cut)));
                }
                other => other?,
            }
            (seen.last_s, seen.computed_s) = (began.elapsed().as_secs_f64(), gauge::computed_s() - computed_s);
            if first_s == 0.0 {
                first_s = seen.last_s;
            }
        }
        Ok((first_s, None))
    }

    /// A training pass and one of evaluation; the latter alone where nothing is trained.
    fn pair(&self, rehearsal: &mut Rehearsal, gauge: &Gauge, samples: u64, seen: &mut Seen) -> Result<(), RankError> {
        let sets = &self.level.outline.datasets;
        let of = |fields: &[FieldSpec]| Rehearsal::batch(|| made_up(fields, samples as usize, self.on));
        if self.kind != PassKind::Train {
            return self.pass(rehearsal, gauge, &of(sets.val.fields())?, seen);
        }
        let computed_s = gauge::computed_s();
        if seen.val.is_empty() {
            // Gradients are put in the order in which they come after the first pass, and libraries make their kernels.
            gauge.begin(true);
            rehearsal.train(&of(sets.train.fields())?)?;
            let first = gauge.end(samples);
            if gauge::is_slow(4.0 * (gauge::computed_s() - computed_s)) {
                seen.train.push(first);
            }
        }
        if seen.train.last().is_none_or(|last| last.samples < samples) {
            self.train_once(rehearsal, gauge, samples, seen)?;
        }
        // The heap stays as the training pass left it.
        gauge.begin(false);
        rehearsal.evaluate(&of(sets.val.fields())?)?;
        seen.val.push(gauge.end(samples));
        Ok(())
    }

    /// A pass without training; libraries make their kernels in the first one.
    fn pass(&self, rehearsal: &mut Rehearsal, gauge: &Gauge, batch: &Batch, seen: &mut Seen) -> Result<(), RankError> {
        let times = if seen.val.is_empty() { 2 } else { 1 };
        let mut pass = None;
        for _ in 0..times {
            gauge.begin(true);
            match self.kind {
                PassKind::Predict | PassKind::Stage => rehearsal.predict(batch)?,
                _ => rehearsal.evaluate(batch)?,
            }
            pass = Some(gauge.end(batch.len() as u64));
        }
        seen.val.extend(pass);
        Ok(())
    }

    fn train_once(
        &self,
        rehearsal: &mut Rehearsal,
        gauge: &Gauge,
        samples: u64,
        seen: &mut Seen,
    ) -> Result<(), RankError> {
        let fields = self.level.outline.datasets.train.fields();
        gauge.begin(true);
        let batch = Rehearsal::batch(|| made_up(fields, samples as usize, self.on))?;
        rehearsal.train(&batch)?;
        let _graph = rehearsal.record(&batch);
        seen.train.push(gauge.end(samples));
        Ok(())
    }
}

#[derive(Default)]
struct Seen {
    train: Vec<Pass>,
    val: Vec<Pass>,
    /// Seconds of the last pair of passes, by the clock and of all threads.
    last_s: f64,
    computed_s: f64,
}

impl Seen {
    /// The last pass of those that cost most.
    fn last(&self, kind: PassKind) -> Option<&Pass> {
        if kind == PassKind::Train { self.train.last() } else { self.val.last() }
    }
}

/// Sizes of the task's own optimizer, by a step with the gradients that the last pass left.
fn own_optimizer(config: &Config, model: &dyn Model, gauge: &Gauge) -> Result<Option<OptimizerSizes>, RankError> {
    let Some(mut own) = model.own_optimizer().map_err(TrainError::from)? else { return Ok(None) };
    gauge.begin(true);
    let stepped = crate::torch::catch_out_of_memory(|| own.step(config.train.learning_rate)).and_then(|inner| inner);
    stepped.map_err(TrainError::from)?;
    let pass = gauge.end(0);
    let state_bytes = own.bytes().map_err(TrainError::from)?;
    Ok(Some(OptimizerSizes { state_bytes, step_bytes: pass.tensor_bytes.saturating_sub(state_bytes) }))
}

/// Memory that CUDA takes beside tensors: `free_before` bytes of the device were free before this process began.
fn gpu_sizes(on: Device, free_before: u64) -> Option<GpuSizes> {
    let Device::Cuda(index) = on else { return None };
    let (stats, (free, _)) = (device::device_stats(index).ok()?, device::device_memory(index).ok()?);
    Some(GpuSizes {
        context_bytes: free_before.saturating_sub(free).saturating_sub(stats.reserved_bytes),
        host_bytes: gauge::own_bytes(),
    })
}
