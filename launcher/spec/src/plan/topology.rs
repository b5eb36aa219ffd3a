//! Ranks, devices, batch and loader threads, and what to do when less is there than was asked for.

use super::constants::{CUDA_TRAINS, EXTRA_SLOTS, LOADER_THREADS_PER_RANK};
use super::{BatchPlan, LoaderPlan, NodeShare, PlanError, Request, Topology};
use crate::config::{Config, DeviceChoice};
use crate::contract::{Device, Machine, Measured};

/// Device that a run with this choice trains on here. Needed before the config is resolved, to pick its device profile.
pub fn choose_device(choice: DeviceChoice, machine: &Machine) -> Device {
    device(choice, machine, CUDA_TRAINS)
}

fn device(choice: DeviceChoice, machine: &Machine, cuda_trains: bool) -> Device {
    let possible = cuda_trains && !machine.gpus.is_empty();
    if possible && choice != DeviceChoice::Cpu { Device::Cuda } else { Device::Cpu }
}

/// Device on which ranks of this request train.
pub(super) fn device_of(config: &Config, machine: &Machine, request: &Request) -> Device {
    device(choice(config, request), machine, CUDA_TRAINS)
}

/// The command line's device wins over the config's.
fn choice(config: &Config, request: &Request) -> DeviceChoice {
    if request.device == DeviceChoice::Auto { config.train.device } else { request.device }
}

/// Ranks per node that the global batch is counted for, whatever is present: `None` where nothing was asked.
fn asked(request: &Request) -> Option<usize> {
    request.gpus.or(request.ranks)
}

/// Contribution of this node, decided without knowledge of the others.
///
/// # Errors
/// A device is missing (`strict`), or no ranks are asked for.
pub fn node_share(config: &Config, machine: &Machine, request: &Request) -> Result<NodeShare, PlanError> {
    let ranks = topology(config, machine, request, &mut Vec::new())?.local_world_size;
    Ok(NodeShare { ranks, asked: asked(request).unwrap_or(ranks) })
}

/// A number per node added up over the job: `own` here, and everywhere where nothing is known of the other nodes.
fn over_nodes(request: &Request, own: usize, of: impl Fn(&NodeShare) -> usize) -> Option<usize> {
    if request.nodes.is_empty() {
        return own.checked_mul(request.nnodes);
    }
    let others = request.nodes.iter().enumerate().filter(|(node, _)| *node != request.node_rank);
    others.map(|(_, share)| of(share)).try_fold(own, usize::checked_add)
}

pub(super) fn topology(
    config: &Config,
    machine: &Machine,
    request: &Request,
    notes: &mut Vec<String>,
) -> Result<Topology, PlanError> {
    topology_with(config, machine, request, notes, CUDA_TRAINS)
}

pub(super) fn topology_with(
    config: &Config,
    machine: &Machine,
    request: &Request,
    notes: &mut Vec<String>,
    cuda_trains: bool,
) -> Result<Topology, PlanError> {
    check(request)?;
    let choice = choice(config, request);
    let device = device(choice, machine, cuda_trains);
    let shortage = shortage(choice, device, machine, request);
    if let (Some(shortage), true) = (&shortage, request.strict) {
        return Err(PlanError::Device { problem: shortage.problem.clone(), fallback: shortage.fallback.clone() });
    }
    let local_world_size = local_ranks(device, machine, request);
    if let Some(shortage) = shortage {
        let kept = if request.gpus.is_some() { "; the global batch stays" } else { "" };
        let plural = if local_world_size == 1 { "rank" } else { "ranks" };
        notes.push(format!(
            "{}: training on {local_world_size} {} {plural}{kept}",
            shortage.problem,
            device_word(device)
        ));
    }
    let world_size = over_nodes(request, local_world_size, |node| node.ranks).ok_or(OVERFLOWING_RANKS)?;
    if device == Device::Cpu && local_world_size > machine.cores {
        notes.push(format!("{local_world_size} ranks share {} cores", machine.cores));
    }
    Ok(Topology {
        device,
        local_world_size,
        world_size,
        nnodes: request.nnodes,
        node_rank: request.node_rank,
        node_ranks: request.nodes.iter().map(|node| node.ranks).collect(),
        devices: devices(device, machine, local_world_size, notes),
        threads_per_rank: (machine.cores / local_world_size).max(1),
    })
}

/// Device of each local rank. More ranks than devices, which only `--ranks` asks for, take them in turn.
fn devices(device: Device, machine: &Machine, ranks: usize, notes: &mut Vec<String>) -> Vec<u32> {
    let present = machine.gpus.len();
    if device != Device::Cuda {
        return Vec::new();
    }
    if ranks > present {
        notes.push(format!(
            "{ranks} ranks share {}: to check that several ranks agree, never for speed; NCCL does so from 2.30.3 on, with \
             NCCL_MULTI_RANK_GPU_ENABLE=1",
            gpus_word(present)
        ));
    }
    (0..ranks).map(|rank| machine.gpus[rank % present].index).collect()
}

const OVERFLOWING_RANKS: PlanError = PlanError::Overflow { what: "the number of ranks", keys: "--ranks and --nnodes" };

fn check(request: &Request) -> Result<(), PlanError> {
    let bad = |text: String| Err(PlanError::Invalid(text));
    match request {
        Request { gpus: Some(0), .. } => {
            bad("--gpus 0: ask for at least 1, or train on the CPU by --device cpu".into())
        }
        Request { ranks: Some(0), .. } => bad("--ranks 0: ask for at least 1".into()),
        Request { nnodes: 0, .. } => bad("--nnodes 0: a job has at least 1 node".into()),
        Request { nnodes, node_rank, .. } if node_rank >= nnodes => {
            bad(format!("--node-rank {node_rank} of --nnodes {nnodes}: node ranks count from 0 to {}", nnodes - 1))
        }
        Request { nnodes, nodes, .. } if !nodes.is_empty() && nodes.len() != *nnodes => {
            bad(format!("--nnodes {nnodes}, but {} nodes announced themselves", nodes.len()))
        }
        _ => Ok(()),
    }
}

/// Difference between the devices asked for and those present.
struct Shortage {
    problem: String,
    fallback: String,
}

fn shortage(choice: DeviceChoice, device: Device, machine: &Machine, request: &Request) -> Option<Shortage> {
    let present = machine.gpus.len();
    if choice == DeviceChoice::Cpu {
        return None;
    }
    if device == Device::Cuda {
        let asked = request.gpus.filter(|asked| request.ranks.is_none() && *asked > present)?;
        let problem = format!("{} asked for, {present} present", gpus_word(asked));
        return Some(Shortage { problem, fallback: format!("train on {present}") });
    }
    let fallback = "train on CPU ranks".to_owned();
    if present > 0 {
        let name = &machine.gpus[0].name;
        let problem =
            format!("{} present ({name}), but ranks train on the CPU only in this version", gpus_word(present));
        return Some(Shortage { problem, fallback });
    }
    let wanted = match (request.gpus, choice) {
        (Some(gpus), _) => format!("{} asked for, none present", gpus_word(gpus)),
        (None, DeviceChoice::Cuda) => "device cuda asked for, no GPU present".to_owned(),
        _ => return None,
    };
    let reason = machine.gpu_note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
    Some(Shortage { problem: wanted + &reason, fallback })
}

fn local_ranks(device: Device, machine: &Machine, request: &Request) -> usize {
    match device {
        Device::Cuda => request.ranks.unwrap_or_else(|| request.gpus.unwrap_or(usize::MAX).min(machine.gpus.len())),
        Device::Cpu => request.ranks.or(request.gpus).unwrap_or(1),
    }
}

fn gpus_word(count: usize) -> String {
    format!("{count} GPU{}", if count == 1 { "" } else { "s" })
}

fn device_word(device: Device) -> &'static str {
    if device == Device::Cuda { "CUDA" } else { "CPU" }
}

/// Rank r of W takes items r, r + W, … of each global batch, so its share is the floor or the ceiling of G/W; it runs
/// the share in micro-batches.
pub(super) fn batch(config: &Config, request: &Request, topology: &Topology) -> Result<BatchPlan, PlanError> {
    let train = &config.train;
    let (batch, accumulation) = (train.batch_size, train.gradient_accumulation_steps);
    for (key, value) in [
        ("train.batch_size", Some(batch)),
        ("train.gradient_accumulation_steps", Some(accumulation)),
        ("train.microbatch", train.microbatch),
        ("train.val_batch_size", train.val_batch_size),
    ] {
        if value == Some(0) {
            return Err(PlanError::Invalid(format!("{key} is 0: at least 1 is needed")));
        }
    }
    if request.infers {
        let val_batch = train.val_batch_size.unwrap_or_else(|| train.microbatch.unwrap_or(batch).min(batch));
        return Ok(BatchPlan { global_batch: 0, micro_batch: val_batch, micro_steps: 1, val_batch });
    }
    let asked = over_nodes(request, asked(request).unwrap_or(topology.local_world_size), |node| node.asked);
    let overflow = PlanError::Overflow {
        what: "the global batch",
        keys: "train.batch_size, train.gradient_accumulation_steps and the number of ranks",
    };
    let asked = asked.ok_or(overflow.clone())?;
    let product = batch.checked_mul(accumulation).and_then(|product| product.checked_mul(asked));
    let global_batch = product.ok_or(overflow)?;
    let world = topology.world_size;
    if global_batch < world {
        return Err(PlanError::Invalid(format!(
            "batch_size {batch} × accumulation {accumulation} × ranks {} = {global_batch} samples per step, but {world} \
             ranks train: some would have none; raise train.batch_size to {} or start fewer ranks",
            asked,
            world.div_ceil(accumulation * asked)
        )));
    }
    let share = global_batch.div_ceil(world);
    let micro_batch = train.microbatch.unwrap_or(batch).min(batch).min(share);
    // Validation keeps to what was set to save memory; its metrics do not depend on the batch.
    let val_batch = train.val_batch_size.unwrap_or(micro_batch);
    Ok(BatchPlan { global_batch, micro_batch, micro_steps: share.div_ceil(micro_batch), val_batch })
}

/// Loader threads and slots of each rank. Source of the rule: the guides ("4 per GPU", "at most 50 % of cores").
pub(super) fn loader(
    config: &Config,
    machine: &Machine,
    measured: &Measured,
    topology: &Topology,
    notes: &mut Vec<String>,
) -> Result<LoaderPlan, PlanError> {
    let ranks = topology.local_world_size;
    let most = (machine.cores / 2 / ranks).max(1);
    let threads = config.train.num_workers.unwrap_or(LOADER_THREADS_PER_RANK.min(most));
    if threads > most {
        notes.push(format!(
            "train.num_workers {threads} × {ranks} ranks is more than 50 % of {} cores: {most} per rank would be the rule",
            machine.cores
        ));
    }
    let slots = (config.train.prefetch_factor as u64).checked_mul(threads as u64);
    let slots = slots.and_then(|slots| slots.checked_add(EXTRA_SLOTS)).and_then(|slots| usize::try_from(slots).ok());
    let overflow =
        PlanError::Overflow { what: "the number of batch slots", keys: "train.prefetch_factor and train.num_workers" };
    // Only a data set of chunks keeps any.
    let chunk_cache_bytes = if measured.data.chunk_bytes.is_some() { config.data.chunk_cache_size } else { 0 };
    Ok(LoaderPlan { threads, slots: slots.ok_or(overflow)?, chunk_cache_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Gpu;

    #[test]
    fn cuda_is_chosen_only_where_it_trains_and_a_gpu_is_present() {
        let none = Machine::default();
        let one = Machine { gpus: vec![Gpu::default()], ..Machine::default() };
        assert_eq!(device(DeviceChoice::Auto, &one, true), Device::Cuda);
        assert_eq!(device(DeviceChoice::Cpu, &one, true), Device::Cpu);
        assert_eq!(device(DeviceChoice::Cuda, &none, true), Device::Cpu);
        assert_eq!(device(DeviceChoice::Cuda, &one, false), Device::Cpu);
        let trains = if CUDA_TRAINS { Device::Cuda } else { Device::Cpu };
        assert_eq!(choose_device(DeviceChoice::Auto, &one), trains);
    }
}
