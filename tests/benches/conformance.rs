//! Conformance of a collective, checked by running it: the same code for `solo`, `shm` and `nccl`, in tests and on a machine
//! whose devices are to be checked.

use headroom::comm::{Collective, CommError};
use headroom::torch::TorchError;
use headroom::torch::device::{Event, Stream};
use headroom::torch::graph::Graph;
use tch::{Device, Kind, Tensor};

/// Runs every call of the trait and compares the results with what they must be. All ranks call it together; `device` is
/// where this rank's tensors live.
///
/// # Errors
/// The call that failed or gave something else, and what it gave.
pub fn check(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let devices = if device == Device::Cpu { vec![device] } else { vec![device, Device::Cpu] };
    for device in devices {
        sums(collective, device)?;
        broadcasts(collective, device)?;
    }
    slices(collective)?;
    gathers(collective)?;
    collective.barrier().map_err(said("barrier"))
}

fn said(call: &'static str) -> impl Fn(CommError) -> String {
    move |error| format!("{call}: {error}")
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, right: &T) -> Result<(), String> {
    if found == right { Ok(()) } else { Err(format!("{what}: expected {right:?}, found {found:?}")) }
}

/// Whole numbers, so that no order of addition matters.
fn pattern(rank: usize, len: usize, device: Device) -> Tensor {
    let values: Vec<f32> = (0..len).map(|i| ((i * 7 + rank * 13) % 101) as f32).collect();
    Tensor::from_slice(&values).to_device(device)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Float)).unwrap_or_default()
}

fn sums(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let (rank, world) = (collective.rank(), collective.world_size());
    // Empty, tiny, and longer than any staging buffer.
    for len in [0, 1, 17, 700_001] {
        let right: Vec<f32> = (0..len).map(|i| (0..world).map(|r| ((i * 7 + r * 13) % 101) as f32).sum()).collect();
        let tensor = pattern(rank, len, device);
        collective.all_reduce_sum(&tensor).map_err(said("all_reduce_sum"))?;
        expect(&format!("sum of {len} f32 on {device:?}"), &(floats(&tensor) == right), &true)?;
    }
    let double = Tensor::from_slice(&[0.5_f64, rank as f64]).to_device(device);
    collective.all_reduce_sum(&double).map_err(said("all_reduce_sum of f64"))?;
    let right = [0.5 * world as f64, (world * (world - 1) / 2) as f64];
    expect(
        "sum of f64",
        &Vec::<f64>::try_from(double.to_device(Device::Cpu)).unwrap_or_default().as_slice(),
        &&right[..],
    )
}

/// Reductions begun in a row on parts of one buffer leave the rest alone and are there after the join.
fn slices(collective: &dyn Collective) -> Result<(), String> {
    let flat = collective.flat_buffer(3000).map_err(said("flat_buffer"))?;
    expect("a new buffer", &floats(&flat).iter().all(|&x| x == 0.0), &true)?;
    let _ = flat.shallow_clone().fill_(1.0);
    for start in [0, 1000] {
        collective.start_all_reduce(&flat.narrow(0, start, 500), true).map_err(said("start_all_reduce"))?;
    }
    collective.join().map_err(said("join"))?;
    let world = collective.world_size() as f32;
    let right = |i: usize| if i < 500 || (1000..1500).contains(&i) { world } else { 1.0 };
    expect("parts of a buffer", &floats(&flat).iter().enumerate().all(|(i, &x)| x == right(i)), &true)
}

fn broadcasts(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let root = collective.world_size() - 1;
    let tensor = pattern(collective.rank(), 5000, device);
    collective.broadcast(&tensor, root).map_err(said("broadcast"))?;
    expect("broadcast f32", &(floats(&tensor) == floats(&pattern(root, 5000, Device::Cpu))), &true)?;
    let bytes = Tensor::from_slice(&[collective.rank() as u8; 3]).to_device(device);
    collective.broadcast(&bytes, root).map_err(said("broadcast of u8"))?;
    expect("broadcast u8", &floats(&bytes), &vec![root as f32; 3])?;
    let refused = collective.broadcast(&tensor, root + 1).is_err();
    expect("a root that is no rank is refused", &refused, &true)
}

fn gathers(collective: &dyn Collective) -> Result<(), String> {
    let bytes = |rank: usize| vec![rank as u8 + 1; rank * 1000];
    let all = collective.all_gather(&bytes(collective.rank())).map_err(said("all_gather"))?;
    let right: Vec<Vec<u8>> = (0..collective.world_size()).map(bytes).collect();
    expect("all_gather", &(all == right), &true)?;
    let empty = collective.all_gather(&[]).map_err(said("all_gather of nothing"))?;
    expect("all_gather of nothing", &empty, &vec![Vec::new(); collective.world_size()])
}

/// Slices that ranks bring together, and a sum that is recorded and replayed.
///
/// # Errors
/// As [`check`].
pub fn of_nccl(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let (rank, world) = (collective.rank(), collective.world_size());
    let flat = Tensor::from_slice(&vec![rank as f32; 4 * world]).to_device(device);
    collective.gather_slices(&flat, 4).map_err(said("gather_slices"))?;
    collective.catch_up("gather_slices").map_err(said("catch_up"))?;
    let right: Vec<f32> = (0..4 * world).map(|i| (i / 4) as f32).collect();
    expect("gathered slices", &floats(&flat), &right)?;
    recorded(collective, device)
}

/// A sum inside a CUDA graph: nothing happens while it is recorded, and it is added up with every replay.
fn recorded(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let failed = |error: TorchError| format!("recording a sum: {error}");
    let tensor = Tensor::from_slice(&[1.0_f32; 64]).to_device(device);
    let (graph, ()) = Graph::record(|| {
        collective
            .start_all_reduce(&tensor, true)
            .and_then(|()| collective.join())
            .map_err(|error| TorchError::Argument { call: "a recorded sum", problem: error.to_string() })
    })
    .map_err(failed)?;
    (0..2).try_for_each(|_| graph.replay()).map_err(failed)?;
    collective.catch_up("a replayed sum").map_err(said("catch_up"))?;
    drop(graph);
    Ok(())
}

/// A sum on a narrow wire, a wait whose limit passes, and an abort. The collective is at its end afterwards.
///
/// # Errors
/// As [`check`].
pub fn narrow_then_ended(collective: &dyn Collective, device: Device) -> Result<(), String> {
    let Device::Cuda(index) = device else { return Ok(()) };
    expect("a narrow wire", &collective.narrows(), &true)?;
    let flat = collective.flat_buffer(1000).map_err(said("flat_buffer"))?;
    collective.start_all_reduce(&flat, false).map_err(said("a narrow sum"))?;
    collective.join().map_err(said("join"))?;
    let failed = |error: TorchError| format!("an event: {error}");
    let mut event = Event::new(false).map_err(failed)?;
    event.record(Stream::current(index).map_err(failed)?).map_err(failed)?;
    collective.wait(&event, "a narrow sum").map_err(said("wait"))?;
    collective.abort(CommError::GivenUp { error: "the check is over".into() });
    let after = collective.barrier().err().map(|error| error.to_string()).unwrap_or_default();
    expect("a call after the abort is refused with its reason", &after.contains("the check is over"), &true)
}
