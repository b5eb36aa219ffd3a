//! `check-gpu`: figures of a device and of the ways between devices, as one line of JSON. `scripts/check-gpu` runs it, and so
//! does whoever has a new machine; with `--cpu` the same code runs without a device.

mod conformance;

use cache::mapping::{ReadSpan, SharedMap};
use clap::{Parser, ValueEnum};
use headroom::comm::nccl::{Member, Nccl, NcclCollective, UniqueId, Wire};
use headroom::comm::{Collective, RankEnv, ShmCollective, Solo, rendezvous};
use headroom::torch::device::{self, HostMemory, HostPart, HostPin, SLAB_BYTES, Stream, StreamGuard, upload};
use headroom::torch::{Autocast, TorchError};
use headroom::train::ddp::{Ddp, DdpOptions};
use headroom::train::optimizer::{Optimizer, Rule};
use serde_json::{Value, json};
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const LIMIT: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// The contract of the collectives, over all ranks of the environment.
    Contract,
    /// Host to device: pageable, page-locked, and the page cache's kind of memory, registered.
    Copy,
    /// Steps of a stack of linear layers, with and without the gradients' buckets.
    Net,
}

type Checked<T> = Result<T, Box<dyn Error>>;

/// A request that this machine or these words do not allow.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        to.write_str(&self.0)
    }
}

impl Error for Usage {}

fn usage(problem: impl ToString) -> Box<dyn Error> {
    Usage(problem.to_string()).into()
}

/// Checks a device, and the ways to and between devices; prints JSON.
#[derive(Parser, Debug)]
#[command(name = "check-gpu", version)]
struct Request {
    what: What,
    /// CUDA device of this rank
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Without a device
    #[arg(long)]
    cpu: bool,
    /// copy: bytes of one copy
    #[arg(long, default_value_t = 256 << 20)]
    bytes: usize,
    /// net: features of each layer
    #[arg(long, default_value_t = 4096)]
    width: i64,
    #[arg(long, default_value_t = 8)]
    layers: usize,
    #[arg(long, default_value_t = 512)]
    batch: i64,
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// net: off, bf16 or fp16
    #[arg(long, default_value = "off")]
    amp: String,
}

fn main() -> ExitCode {
    let done = run(&Request::parse());
    // An abort of NCCL runs on a thread that nobody joins: it ends before the libraries under it are taken down.
    std::thread::sleep(std::time::Duration::from_millis(500));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("check-gpu: error: {error}");
            let code = if error.is::<Usage>() { spec::contract::exit::USAGE } else { spec::contract::exit::INTERNAL };
            ExitCode::from(code)
        }
    }
}

/// Runs the check and prints its figures; rank 0 alone where there are several.
fn run(request: &Request) -> Checked<()> {
    let env = rendezvous::from_env(|name| std::env::var(name).ok()).map_err(usage)?;
    let on = ready(request)?;
    let _stream = own_stream(on)?;
    let mut figures = match request.what {
        What::Contract => check_contract(&env, on)?,
        What::Copy => copies(on, request.bytes)?,
        What::Net => net(on, request)?,
    };
    if let (Device::Cuda(index), Ok((_, total))) = (on, device::device_memory(request.device)) {
        figures["device"] = json!({ "index": index, "total_bytes": total });
    }
    if env.rank == 0 {
        println!("{figures}");
    }
    Ok(())
}

fn ready(request: &Request) -> Checked<Device> {
    if request.cpu {
        return Ok(Device::Cpu);
    }
    device::load_cuda().and_then(|()| device::set_device(request.device)).map_err(usage)?;
    Ok(Device::Cuda(request.device))
}

/// As a rank that trains: not on the default stream.
fn own_stream(on: Device) -> Checked<Option<StreamGuard>> {
    let Device::Cuda(index) = on else { return Ok(None) };
    Ok(Some(Stream::new(index, false)?.enter()?))
}

fn check_contract(env: &RankEnv, on: Device) -> Checked<Value> {
    let (collective, library): (Box<dyn Collective>, String) = match on {
        Device::Cuda(index) => {
            let nccl = Nccl::load(std::env::var_os("HEADROOM_NCCL").map(Into::into))?;
            let own = if env.rank == 0 { nccl.unique_id()?.to_vec() } else { Vec::new() };
            let run = std::env::var(spec::contract::env::RUN_ID).unwrap_or_default();
            let id = rendezvous::share_id(env, &run, None, &own, LIMIT)?;
            let place = Member { rank: env.rank, world_size: env.world_size, device: index };
            let id = UniqueId::try_from(id).map_err(|_| "rank 0 sent no id of NCCL")?;
            let text = format!("NCCL {} ({})", nccl.version(), nccl.origin());
            let whole = NcclCollective::new(nccl, id, place, Wire::F32, LIMIT)?;
            conformance::of_nccl(&whole, on).map_err(|problem| format!("rank {}: {problem}", env.rank))?;
            (Box::new(whole), text)
        }
        _ if env.world_size == 1 => (Box::new(Solo::new(on)), "none".into()),
        _ => {
            let memfd = rendezvous::meet_node(env, "check-gpu", LIMIT)?.memfd;
            (Box::new(ShmCollective::new(memfd, env.local_rank, env.local_world_size, LIMIT)?), "shm".into())
        }
    };
    let call_us = if on.is_cuda() { Some(call_us(&*collective)?) } else { None };
    let said = |problem| format!("rank {}: {problem}", env.rank);
    conformance::check(&*collective, on).map_err(said)?;
    if let Device::Cuda(index) = on {
        // A communicator of its own: it is ended on purpose.
        let nccl = Nccl::load(std::env::var_os("HEADROOM_NCCL").map(Into::into))?;
        let own = if env.rank == 0 { nccl.unique_id()?.to_vec() } else { Vec::new() };
        let id = collective.all_gather(&own)?.swap_remove(0);
        let place = Member { rank: env.rank, world_size: env.world_size, device: index };
        let id = UniqueId::try_from(id).map_err(|_| "rank 0 sent no id of NCCL")?;
        let narrow = NcclCollective::new(nccl, id, place, Wire::Bf16, LIMIT)?;
        conformance::narrow_then_ended(&narrow, on).map_err(said)?;
    }
    let backend = collective.backend();
    Ok(json!({ "world_size": env.world_size, "backend": backend, "library": library, "call_us": call_us }))
}

/// Microseconds of host time that one small reduction costs.
fn call_us(collective: &dyn Collective) -> Checked<f64> {
    const CALLS: u32 = 200;
    let flat = collective.flat_buffer(1024)?;
    let start = Instant::now();
    (0..CALLS).try_for_each(|_| collective.start_all_reduce(&flat, true))?;
    let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS);
    collective.join()?;
    collective.catch_up("small sums")?;
    Ok(us)
}

/// A range of some owner's memory.
struct Range<T>(Arc<T>, usize);

impl<T: AsRef<[u8]> + Send + Sync> HostMemory for Range<T> {
    fn parts(&self) -> Vec<HostPart<'_>> {
        vec![HostPart { into: 0, at: 0, bytes: &self.0.as_ref().as_ref()[..self.1] }]
    }
}

/// GB/s of the best of several copies of the first `bytes` of `host` into `to`.
fn rate<T: AsRef<[u8]> + Send + Sync>(host: &Arc<T>, bytes: usize, to: &Tensor) -> Result<f64, TorchError> {
    let stream = match to.device() {
        Device::Cuda(index) => Some(Stream::new(index, false)?),
        _ => None,
    };
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        upload(Range(Arc::clone(host), bytes), std::slice::from_ref(to), stream)?.finish()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best / 1e9)
}

/// A part of the page cache's kind of memory: a sealed memfd that ranks share.
fn shared_part(bytes: usize) -> Checked<(Arc<SharedMap>, ReadSpan)> {
    let memory = cache::shared_memory("check-gpu", bytes as u64)?;
    let file = std::fs::File::from(memory.fd);
    file.set_len(bytes as u64)?;
    let map = SharedMap::new(&file)?;
    let mut filled = map.write_span(0, bytes as u64)?;
    filled.bytes_mut().fill(9);
    drop(filled);
    let span = map.read_span(0, bytes as u64)?;
    Ok((map, span))
}

/// Bytes of a span, as a copy reads them.
struct Shown(ReadSpan);

impl AsRef<[u8]> for Shown {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// GB/s of the best of several copies from memory that `cudaHostAlloc` gave.
fn allocated_rate(bytes: usize, to: &Tensor, index: usize) -> Checked<f64> {
    let from = device::pinned(&[bytes as i64], Kind::Uint8)?;
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        device::copy(to, &from)?;
        Stream::current(index)?.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best / 1e9)
}

/// GB/s from pageable memory, from page-locked memory, and from a registered part of the page cache's kind of memory.
fn copies(on: Device, bytes: usize) -> Checked<Value> {
    let bytes = bytes.min(SLAB_BYTES);
    let to = Tensor::f_zeros([bytes as i64], (Kind::Uint8, on)).map_err(Box::<dyn Error>::from)?;
    let pageable = rate(&Arc::new(vec![7_u8; bytes]), bytes, &to)?;
    let (map, span) = shared_part(bytes)?;
    let shared = Arc::new(Shown(span));
    let Device::Cuda(index) = on else {
        let shared = rate(&shared, bytes, &to)?;
        return Ok(json!({ "pageable_gb_s": pageable, "registered_gb_s": shared }));
    };
    let pinned = allocated_rate(bytes, &to, index)?;
    let start = Instant::now();
    let registered = HostPin::new(map.address(), bytes, SLAB_BYTES)?;
    let register_s = start.elapsed().as_secs_f64();
    let mapped = rate(&shared, bytes, &to)?;
    // On the host: the device's own kernels are not on trial.
    let back = Vec::<u8>::try_from(&to.f_to_device(Device::Cpu)?)?;
    if back.iter().any(|&byte| byte != 9) {
        return Err("the device read other bytes than the mapping holds".into());
    }
    Ok(json!({
        "pageable_gb_s": pageable, "pinned_gb_s": pinned, "registered_gb_s": mapped,
        "register_s_per_gib": register_s * f64::from(1 << 30) / registered.bytes() as f64,
    }))
}

/// Milliseconds per step of `layers` × Linear(`width`) + ReLU under SGD: in buckets, and with gradients left where autograd
/// puts them.
fn net(on: Device, request: &Request) -> Checked<Value> {
    let narrow = match request.amp.as_str() {
        "bf16" => Some(Kind::BFloat16),
        "fp16" => Some(Kind::Half),
        "off" => None,
        other => return Err(usage(format!("--amp {other}: choose off, bf16 or fp16"))),
    };
    tch::manual_seed(1);
    let x = Tensor::f_randn([request.batch, request.width], (Kind::Float, on)).map_err(Box::<dyn Error>::from)?;
    let weights = |_| {
        let weight =
            Tensor::f_randn([request.width, request.width], (Kind::Float, on)).map_err(Box::<dyn Error>::from)?;
        Ok((weight * (1.0 / (request.width as f64).sqrt())).set_requires_grad(true))
    };
    let all = (0..request.layers).map(weights).collect::<Checked<Vec<_>>>()?;
    let backward = |weights: &[Tensor]| -> Checked<()> {
        let _narrow = narrow.map(|kind| Autocast::enter(on, true, kind)).transpose().map_err(Box::<dyn Error>::from)?;
        let y = weights.iter().fold(x.shallow_clone(), |x, w| x.linear::<Tensor>(w, None).relu());
        y.square().mean(Kind::Float).f_backward().map_err(Box::<dyn Error>::from)
    };
    let rule = Rule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let solo = || Arc::new(Solo::new(on));
    let plain = {
        let mut params: Vec<Tensor> = all.iter().map(|w| w.detach().copy().set_requires_grad(true)).collect();
        timed(on, request.steps, || {
            backward(&params)?;
            let _no_grad = tch::no_grad_guard();
            for param in &mut params {
                let mut grad = param.grad();
                let _ = param.f_sub_(&(&grad * 1e-3)).map_err(Box::<dyn Error>::from)?;
                let _ = grad.f_zero_().map_err(Box::<dyn Error>::from)?;
            }
            Ok(())
        })?
    };
    let named = all.into_iter().enumerate().map(|(i, w)| (format!("layer{i}"), w)).collect();
    let mut ddp = Ddp::new(named, solo(), DdpOptions::default()).map_err(Box::<dyn Error>::from)?;
    let mut optimizer = Optimizer::new(rule, &ddp).map_err(Box::<dyn Error>::from)?;
    let lr = Tensor::f_full([1], 1e-3, (Kind::Float, on)).map_err(Box::<dyn Error>::from)?;
    let found = Tensor::f_zeros([1], (Kind::Float, on)).map_err(Box::<dyn Error>::from)?;
    let buckets = timed(on, request.steps, || {
        ddp.zero_grad().map_err(Box::<dyn Error>::from)?;
        ddp.set_sync(true);
        backward(ddp.variables())?;
        ddp.finish_on_device().map_err(Box::<dyn Error>::from)?;
        optimizer.step_unless(&ddp, &lr, &[1e-3.into()], (&found, None)).map_err(Box::<dyn Error>::from)
    })?;
    Ok(json!({ "buckets_ms": buckets, "plain_ms": plain, "amp": request.amp, "width": request.width }))
}

/// Median milliseconds of a step over groups of five, the device waited for around each group.
fn timed(on: Device, steps: usize, mut step: impl FnMut() -> Checked<()>) -> Checked<f64> {
    const GROUP: usize = 5;
    let wait = || match on {
        Device::Cuda(index) => device::synchronize(index).map_err(Box::<dyn Error>::from),
        _ => Ok(()),
    };
    (0..GROUP).try_for_each(|_| step())?;
    let mut times = Vec::new();
    for _ in 0..steps.div_ceil(GROUP).max(1) {
        wait()?;
        let start = Instant::now();
        (0..GROUP).try_for_each(|_| step())?;
        wait()?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / GROUP as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
