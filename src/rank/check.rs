//! `rank check-gpu`: what a device and the ways between devices really do, as one line of JSON. `scripts/check-gpu` and
//! people with a new machine run it; with `--cpu` the same code runs without a device.

use super::RankError;
use crate::comm::nccl::{Nccl, NcclCollective, Place, UniqueId, Wire};
use crate::comm::{Collective, CommError, RankEnv, ShmCollective, Solo, contract, rendezvous};
use crate::torch::device::{self, HostMemory, HostPart, HostPin, SLAB_BYTES, Stream, upload};
use crate::torch::{Autocast, TorchError};
use crate::train::TrainError;
use crate::train::ddp::{Ddp, DdpOptions};
use crate::train::optimizer::{Optimizer, Rule};
use clap::{Args, ValueEnum};
use memmap2::MmapMut;
use serde_json::{Value, json};
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

/// What `rank check-gpu` is asked.
#[derive(Args, Debug)]
pub struct Request {
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

/// Runs the check and prints its figures; rank 0 alone where there are several.
///
/// # Errors
/// There is no such device, or what was checked is not so.
pub fn run(request: &Request) -> Result<(), RankError> {
    let env = rendezvous::from_env(|name| std::env::var(name).ok()).map_err(|e| RankError::Usage(e.to_string()))?;
    let on = ready(request)?;
    let _stream = super::device::own_stream(on)?;
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

fn ready(request: &Request) -> Result<Device, RankError> {
    if request.cpu {
        return Ok(Device::Cpu);
    }
    device::load_cuda()
        .and_then(|()| device::set_device(request.device))
        .map_err(|e| RankError::Usage(e.to_string()))?;
    Ok(Device::Cuda(request.device))
}

fn torch(error: TorchError) -> RankError {
    TrainError::from(error).into()
}

fn tch_error(error: tch::TchError) -> RankError {
    torch(crate::torch::error_of("check", &error))
}

fn check_contract(env: &RankEnv, on: Device) -> Result<Value, RankError> {
    let (collective, library): (Box<dyn Collective>, String) = match on {
        Device::Cuda(index) => {
            let nccl = Nccl::load(std::env::var_os("HEADROOM_NCCL").map(Into::into)).map_err(CommError::from)?;
            let own = if env.rank == 0 { nccl.unique_id().map_err(CommError::from)?.to_vec() } else { Vec::new() };
            let run = std::env::var(spec::contract::env::RUN_ID).unwrap_or_default();
            let id = rendezvous::share_id(env, &run, &own, LIMIT)?;
            let wrong = |_| CommError::Other("rank 0 sent no id of NCCL".into());
            let place = Place { rank: env.rank, world_size: env.world_size, device: index };
            let id = UniqueId::try_from(id).map_err(wrong)?;
            let text = format!("NCCL {} ({})", nccl.version(), nccl.origin());
            (Box::new(NcclCollective::new(nccl, id, place, Wire::F32, LIMIT)?), text)
        }
        _ if env.world_size == 1 => (Box::new(Solo::new(on)), "none".into()),
        _ => {
            let memfd = rendezvous::meet_node(env, "check-gpu", LIMIT)?.memfd;
            (Box::new(ShmCollective::new(memfd, env.local_rank, env.local_world_size, LIMIT)?), "shm".into())
        }
    };
    let held = contract::check(&*collective, on);
    let failed = |problem| RankError::Comm(CommError::Other(format!("rank {}: {problem}", env.rank)));
    held.map_err(failed)?;
    Ok(json!({ "world_size": env.world_size, "backend": collective.backend(), "library": library }))
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

/// Memory that libtorch page-locked, as bytes of a registered buffer of our own.
fn copies(on: Device, bytes: usize) -> Result<Value, RankError> {
    let to = Tensor::f_zeros([bytes as i64], (Kind::Uint8, on)).map_err(tch_error)?;
    let touched = || Arc::new(vec![7_u8; bytes]);
    let pageable = rate(&touched(), bytes, &to).map_err(torch)?;
    let io = |e: std::io::Error| RankError::Io(format!("memory for the check: {e}"));
    let locked = touched();
    let mut shared = MmapMut::map_anon(bytes).map_err(io)?;
    shared.fill(9);
    let shared = Arc::new(shared);
    if !on.is_cuda() {
        let shared = rate(&shared, bytes, &to).map_err(torch)?;
        return Ok(json!({ "pageable_gb_s": pageable, "registered_gb_s": shared }));
    }
    let pin = |address: *const u8, slab| HostPin::new(address as usize, bytes, slab).map_err(torch);
    let _locked = pin(locked.as_ptr(), usize::MAX)?;
    let pinned = rate(&locked, bytes, &to).map_err(torch)?;
    let start = Instant::now();
    let registered = pin(shared.as_ptr(), SLAB_BYTES)?;
    let register_s = start.elapsed().as_secs_f64();
    let mapped = rate(&shared, bytes.min(SLAB_BYTES), &to).map_err(torch)?;
    let right = to.f_eq(9).and_then(|same| same.f_all()).map_err(tch_error)?.int64_value(&[]) == 1;
    if !right {
        return Err(RankError::Io("the device read other bytes than the mapping holds".into()));
    }
    Ok(json!({
        "pageable_gb_s": pageable, "pinned_gb_s": pinned, "registered_gb_s": mapped,
        "register_s_per_gib": register_s * f64::from(1 << 30) / registered.bytes() as f64,
    }))
}

/// Milliseconds per step of `layers` × Linear(`width`) + ReLU under SGD: in buckets, and with gradients left where autograd
/// puts them.
fn net(on: Device, request: &Request) -> Result<Value, RankError> {
    let narrow = match request.amp.as_str() {
        "bf16" => Some(Kind::BFloat16),
        "fp16" => Some(Kind::Half),
        "off" => None,
        other => return Err(RankError::Usage(format!("--amp {other}: choose off, bf16 or fp16"))),
    };
    tch::manual_seed(1);
    let x = Tensor::f_randn([request.batch, request.width], (Kind::Float, on)).map_err(tch_error)?;
    let weights = |_| {
        let weight = Tensor::f_randn([request.width, request.width], (Kind::Float, on)).map_err(tch_error)?;
        Ok((weight * (1.0 / (request.width as f64).sqrt())).set_requires_grad(true))
    };
    let all = (0..request.layers).map(weights).collect::<Result<Vec<_>, RankError>>()?;
    let backward = |weights: &[Tensor]| -> Result<(), RankError> {
        let _narrow = narrow.map(|kind| Autocast::enter(on, true, kind)).transpose().map_err(torch)?;
        let y = weights.iter().fold(x.shallow_clone(), |x, w| x.linear::<Tensor>(w, None).relu());
        y.square().mean(Kind::Float).f_backward().map_err(tch_error)
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
                let _ = param.f_sub_(&(&grad * 1e-3)).map_err(tch_error)?;
                let _ = grad.f_zero_().map_err(tch_error)?;
            }
            Ok(())
        })?
    };
    let train = |error| RankError::from(TrainError::from(error));
    let named = all.into_iter().enumerate().map(|(i, w)| (format!("layer{i}"), w)).collect();
    let mut ddp = Ddp::new(named, solo(), DdpOptions::default()).map_err(train)?;
    let mut optimizer = Optimizer::new(rule, &ddp).map_err(train)?;
    let lr = Tensor::f_full([0; 0], 1e-3, (Kind::Float, on)).map_err(tch_error)?;
    let found = Tensor::f_zeros([1], (Kind::Float, on)).map_err(tch_error)?;
    let buckets = timed(on, request.steps, || {
        ddp.zero_grad().map_err(train)?;
        ddp.set_sync(true);
        backward(ddp.variables())?;
        ddp.finish_on_device().map_err(train)?;
        optimizer.step_unless(&ddp, &lr, &found).map_err(train)
    })?;
    Ok(json!({ "buckets_ms": buckets, "plain_ms": plain, "amp": request.amp, "width": request.width }))
}

/// Median milliseconds of a step over groups of five, the device waited for around each group.
fn timed(on: Device, steps: usize, mut step: impl FnMut() -> Result<(), RankError>) -> Result<f64, RankError> {
    const GROUP: usize = 5;
    let wait = || match on {
        Device::Cuda(index) => device::synchronize(index).map_err(torch),
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
