//! Whole runs of several ranks in this process, on a model that can run out of memory where the test wants it to. The
//! allocator's refusal is real: it is asked for more than any machine has.

use super::*;
use crate::comm::{ShmCollective, shm::create_memfd};
use crate::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use crate::task::{Batch, Output};
use crate::train::checkpoint;
use spec::contract::{MetricsRecord, Phase, Progress, Relief, Relieved};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tch::nn;

mod memory;
mod orders;
mod rich;

const GLOBAL_BATCH: usize = 12;
const INPUTS: i64 = 5;

/// Sample `i`: inputs f32 `[5]`, target f32 `[1]`.
struct Points {
    len: usize,
    fields: [FieldSpec; 2],
}

fn points(len: usize) -> Arc<dyn Dataset> {
    let field = |name, n| FieldSpec::new(name, &[n], Dtype::F32);
    Arc::new(Points { len, fields: [field("x", INPUTS as usize), field("y", 1)] })
}

impl Dataset for Points {
    fn len(&self) -> usize {
        self.len
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        let index = request.index;
        for (k, bytes) in out[0].chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&((index * 7 + k) as f32 * 0.31).sin().to_ne_bytes());
        }
        out[1].copy_from_slice(&(index as f32 * 0.17).cos().to_ne_bytes());
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("point {index}")
    }
}

/// Where memory runs out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Forward,
    /// After the last layer's gradients were there, before the first layer's.
    Backward,
}

/// More than any machine has.
const TOO_MUCH: i64 = 1 << 50;

/// Two layers. Training pass number `n` (from 0) of a rank fails where `faults` has `(n, place)`.
struct Net {
    layers: [nn::Linear; 2],
    rich: Option<rich::Rich>,
    faults: Vec<(usize, Place)>,
    /// Evaluation fails with more samples than this.
    most_in_evaluation: usize,
    passes: AtomicUsize,
    /// Samples of every training pass.
    seen: Mutex<Vec<Vec<u64>>>,
}

impl Net {
    fn new(vs: &nn::Path, faults: Vec<(usize, Place)>, most_in_evaluation: usize, rich: bool) -> Self {
        let layers =
            [nn::linear(vs / "a", INPUTS, 8, Default::default()), nn::linear(vs / "b", 8, 1, Default::default())];
        for (seed, layer) in layers.iter().enumerate() {
            for tensor in [&layer.ws, layer.bs.as_ref().unwrap()] {
                let values = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)) * 1.3 + seed as f64;
                tch::no_grad(|| tensor.shallow_clone().copy_(&(values.sin() * 0.4).view(tensor.size().as_slice())));
            }
        }
        let rich = rich.then(|| rich::Rich::new(vs));
        Self { layers, rich, faults, most_in_evaluation, passes: AtomicUsize::new(0), seen: Mutex::default() }
    }

    fn fault(&self, batch: &Batch, train: bool) -> Option<Place> {
        if !train {
            return (batch.len() > self.most_in_evaluation).then_some(Place::Forward);
        }
        self.seen.lock().unwrap().push(batch.sample_ids.clone());
        let pass = self.passes.fetch_add(1, Ordering::Relaxed);
        self.faults.iter().find(|(n, _)| *n == pass).map(|(_, place)| *place)
    }
}

impl Model for Net {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let fault = self.fault(batch, train);
        let mut hidden = batch.fields[0].apply(&self.layers[0]);
        if let Some(rich) = &self.rich {
            hidden = rich.hidden(&hidden, batch, train);
        }
        hidden = hidden.tanh();
        match fault {
            Some(Place::Forward) => drop(Tensor::empty([TOO_MUCH], (Kind::Float, Device::Cpu))),
            // No memory is needed forward: the gradient of a selection has the size of what was selected from.
            Some(Place::Backward) => {
                let row = hidden.select(0, 0).select(0, 0);
                hidden = row.expand([TOO_MUCH], false).select(0, 0) * 0.0 + hidden;
            }
            None => {}
        }
        let prediction = hidden.apply(&self.layers[1]);
        let losses = (&prediction - &batch.fields[1]).square();
        if let Some(rich) = &self.rich {
            return rich.output(&losses, &prediction);
        }
        Output::new(losses.mean(Kind::Float), prediction.detach())
    }

    fn share_width(&self) -> usize {
        self.rich.as_ref().map_or(0, |_| 2)
    }

    fn shared(&self, values: &Tensor) {
        if let Some(rich) = &self.rich {
            rich.shared(values);
        }
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        self.rich.as_ref().map(|rich| vec![("history".into(), rich.history.shallow_clone())]).unwrap_or_default()
    }

    fn reads_step(&self) -> bool {
        self.rich.is_some()
    }
}

/// Sum of losses and of samples.
#[derive(Default)]
struct Losses([f64; 2]);

impl Metrics for Losses {
    fn update(&mut self, batch: &Batch, output: &Output) {
        self.0[0] += output.loss.double_value(&[]) * batch.len() as f64;
        self.0[1] += batch.len() as f64;
    }

    fn sums(&self) -> Vec<f64> {
        self.0.to_vec()
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        vec![("loss".into(), sums[0] / sums[1]), ("samples".into(), sums[1])]
    }

    fn reset(&mut self) {
        self.0 = [0.0; 2];
    }
}

/// Messages of a run to its observer.
enum Event {
    Phase(Phase),
    Step(u64),
    /// True while the run still holds its resources.
    Panicking(bool),
}

type Script = dyn Fn(usize, Event, &Controls) + Sync;

/// Writes down what it hears and lets the script act on it.
struct Spy<'a> {
    rank: usize,
    script: &'a Script,
    controls: Arc<Controls>,
    told: Told,
}

#[derive(Default)]
struct Told {
    lines: Vec<String>,
    records: Vec<MetricsRecord>,
    answers: Vec<Relieved>,
    failures: Vec<String>,
}

impl Observer for Spy<'_> {
    fn phase(&mut self, phase: Phase, _: u64) {
        (self.script)(self.rank, Event::Phase(phase), &self.controls);
    }

    fn step(&mut self, progress: &Progress) {
        (self.script)(self.rank, Event::Step(progress.step), &self.controls);
    }

    fn record(&mut self, record: &MetricsRecord) {
        self.told.records.push(record.clone());
    }

    fn line(&mut self, text: String) {
        self.told.lines.push(text);
    }

    fn uss_bytes(&mut self) -> u64 {
        1 << 20
    }

    fn relieved(&mut self, answer: Relieved) {
        self.told.answers.push(answer);
    }

    fn failing(&mut self, error: &TrainError) {
        self.told.failures.push(error.to_string());
    }

    fn panicking(&mut self) {
        let held = Arc::strong_count(&self.controls) > 1;
        (self.script)(self.rank, Event::Panicking(held), &self.controls);
    }
}

/// A run to make.
#[derive(Clone)]
struct Job {
    ranks: usize,
    micro_batch: usize,
    steps: u64,
    /// Samples of the training set: three epochs of these many fit most tests.
    samples: usize,
    dir: std::path::PathBuf,
    /// Checkpoint to resume from.
    resume: Option<u64>,
    /// By rank.
    faults: Vec<Vec<(usize, Place)>>,
    most_in_evaluation: usize,
    ema: Option<f64>,
    cleanup_every: u64,
    /// With batch normalisation, draws and numbers that ranks share.
    rich: bool,
    /// Further changes of the config.
    change: fn(&mut Config),
    groups: Vec<GroupSpec>,
    /// Numbers of a step stay on the device.
    on_device: bool,
}

impl Job {
    fn new(dir: &tempfile::TempDir) -> Self {
        Self {
            ranks: 3,
            micro_batch: 4,
            steps: 10,
            samples: 50,
            dir: dir.path().into(),
            resume: None,
            faults: vec![vec![]; 3],
            most_in_evaluation: usize::MAX,
            ema: None,
            cleanup_every: 0,
            rich: false,
            change: |_| (),
            groups: Vec::new(),
            on_device: false,
        }
    }

    fn config(&self) -> Config {
        let mut config = Config { seed: 5, ..Config::default() };
        config.train.max_steps = Some(self.steps);
        config.train.num_epochs = 1000;
        config.train.learning_rate = 0.02;
        config.train.scheduler = spec::config::SchedulerKind::None;
        config.train.ema_decay = self.ema.map(spec::config::Rates::one).unwrap_or_default();
        config.train.early_stopping = false;
        config.train.warmup_epochs = 0.0;
        config.train.restore_best_weights = false;
        // Every parameter has a separate bucket: peers wait in the reduction of one while a rank fails in the next.
        config.ddp.bucket_mb = 1e-5;
        config.log.log_every = 1;
        config.log.save_every = 0;
        config.memory.cleanup_every = self.cleanup_every;
        (self.change)(&mut config);
        config
    }

    fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        (plan.batch.global_batch, plan.batch.micro_batch) = (GLOBAL_BATCH, self.micro_batch);
        plan.batch.val_batch = 8;
        (plan.loader.threads, plan.loader.slots) = (1, 4);
        plan
    }
}

/// Result of one rank's run.
struct Ended {
    result: Result<Finished, TrainError>,
    told: Told,
    /// Samples of every training pass, failed ones included.
    seen: Vec<Vec<u64>>,
    params: Vec<f32>,
    /// One after the other, by name.
    buffers: Vec<f64>,
    /// The model's state.
    state: Vec<f64>,
}

fn quiet(_: usize, _: Event, _: &Controls) {}

fn run(job: &Job) -> Vec<Ended> {
    run_with(job, &quiet)
}

fn run_with(job: &Job, script: &Script) -> Vec<Ended> {
    let fd = create_memfd(true).unwrap();
    std::thread::scope(|scope| {
        let fd = &fd;
        let start = |rank| {
            let fd = fd.try_clone().unwrap();
            scope.spawn(move || {
                let collective = ShmCollective::new(fd, rank, job.ranks, Duration::from_secs(60)).unwrap();
                run_rank(job, Arc::new(collective), script)
            })
        };
        let ranks: Vec<_> = (0..job.ranks).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn run_rank(job: &Job, collective: Arc<dyn Collective>, script: &Script) -> Ended {
    let (config, plan, rank) = (job.config(), job.plan(), collective.rank());
    let vs = nn::VarStore::new(Device::Cpu);
    let net = Net::new(&vs.root(), job.faults[rank].clone(), job.most_in_evaluation, job.rich);
    let mut whole: Named = vs.variables().into_iter().collect();
    whole.sort_by(|a, b| a.0.cmp(&b.0));
    let copy = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
    let (params, buffers): (Named, Named) = whole.iter().map(copy).partition(|(_, tensor)| tensor.requires_grad());
    let resume = job.resume.map(|step| {
        let loaded = checkpoint::load(&job.dir.join(format!("step-{step}"))).unwrap();
        checkpoint::apply(&loaded.path, &loaded.model, &whole).unwrap();
        Resume { state: loaded.state().unwrap(), optimizer: loaded.optimizer, ema: loaded.ema, rest: loaded.rest }
    });
    // All have read it before rank 0 may write there.
    collective.barrier().unwrap();
    let controls = Arc::new(Controls::default());
    let mut spy = Spy { rank, script, controls: Arc::clone(&controls), told: Told::default() };
    let held = params.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    let datasets = Datasets::new(points(job.samples), points(20), points(10));
    let fit = Fit {
        device_options: crate::train::DeviceOptions { always: job.on_device, ..Default::default() },
        config: &config,
        plan: &plan,
        device: Device::Cpu,
        collective: Arc::clone(&collective),
        datasets: &datasets,
        model: &net,
        params: held,
        buffers: buffers.iter().map(copy).collect(),
        groups: job.groups.clone(),
        metrics: Box::new(Losses::default()),
        gallery: None,
        facts: Facts::default(),
        checkpoints: (rank == 0).then(|| Checkpointer::open(&job.dir, 100).unwrap()),
        checkpoint_dir: &job.dir,
        controls,
    };
    let result = fit.run(resume, &mut spy);
    if let Err(error) = &result {
        collective.abort(crate::comm::CommError::GivenUp { error: error.to_string() });
    }
    let told = spy.told;
    let flat: Vec<Tensor> = params.iter().map(|(_, t)| t.detach().reshape([-1])).collect();
    let doubles = |named: Named| -> Vec<f64> {
        let one = |(_, tensor): (String, Tensor)| tensor.to_kind(Kind::Double).reshape([-1]);
        named.into_iter().flat_map(|tensor| Vec::<f64>::try_from(one(tensor)).unwrap()).collect()
    };
    let (buffers, state) = (doubles(buffers), doubles(net.state()));
    let seen = net.seen.into_inner().unwrap();
    Ended { result, told, seen, params: Vec::<f32>::try_from(Tensor::cat(&flat, 0)).unwrap(), buffers, state }
}

/// Samples of each pass, by how many.
fn sizes(ended: &Ended) -> Vec<usize> {
    ended.seen.iter().map(Vec::len).collect()
}

/// Order of samples on this rank, passes of a repeated step left out: a repeat begins where its step began.
fn order(ended: &Ended, failed: &[usize]) -> Vec<u64> {
    let kept = ended.seen.iter().enumerate().filter(|(pass, _)| !failed.contains(pass));
    kept.flat_map(|(_, ids)| ids.clone()).collect()
}

fn losses(ended: &Ended) -> Vec<f64> {
    ended.told.records.iter().map(|record| record.loss).collect()
}

fn close(a: &[f32], b: &[f32], bound: f32) {
    assert_eq!(a.len(), b.len());
    let far = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far <= bound, "weights differ by {far}");
}

#[test]
fn a_panic_in_the_loop_is_told_while_everything_is_held_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { ranks: 1, ..Job::new(&dir) };
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let script = move |_: usize, event: Event, _: &Controls| match event {
        Event::Step(2) => panic!("on purpose"),
        Event::Panicking(held) => telling.lock().unwrap().push(held),
        _ => {}
    };
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_with(&job, &script)));
    assert!(panics.is_err());
    assert_eq!(*told.lock().unwrap(), [true]);
}
