use super::constants::{GIB, MIB};
use super::topology::topology_with;
use super::*;
use crate::config::{Budget, OptimizerKind, Rates, ShuffleMode};
use crate::contract::{Gpu, GpuSizes};
use crate::task::emg::EmgConfig;
use proptest::prelude::*;

fn emg() -> Config {
    crate::task::config("emg")
}

fn machine(cores: usize, memory: u64) -> Machine {
    Machine {
        cores,
        memory_total_bytes: memory,
        memory_available_bytes: memory,
        page_bytes: 4096,
        numa_nodes: 1,
        ..Machine::default()
    }
}

fn with_gpus(count: u32) -> Machine {
    let gpu = |index| Gpu { index, name: "card".into(), memory_total_bytes: 80 * GIB, memory_free_bytes: 79 * GIB };
    Machine { gpus: (0..count).map(gpu).collect(), ..machine(16, 64 * GIB) }
}

fn gpus(count: usize) -> Request {
    Request { gpus: Some(count), ..Request::default() }
}

fn ranks(count: usize) -> Request {
    Request { ranks: Some(count), ..Request::default() }
}

/// Answer of `rank describe` for configs/default.yaml on two cores, without a data set; fields by the config's window.
pub(super) fn measured_default(config: &Config) -> Measured {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/measured/default.json"));
    let mut measured: Measured = serde_json::from_str(text).unwrap();
    let window = config.section::<EmgConfig>().window_size as u64;
    let field = |channels: u64| window.saturating_mul(4 * channels);
    measured.model.train.fields = vec![field(16), field(20)];
    measured.model.val.fields = measured.model.train.fields.clone();
    measured
}

/// The same beside recordings of so many bytes, which are twice as many when decoded.
pub(super) fn with_data(config: &Config, bytes: u64) -> Measured {
    let mut measured = measured_default(config);
    (measured.data.useful_bytes, measured.data.useful) = (2 * bytes, "recordings × 2".into());
    measured
}

fn planned(config: &Config, machine: &Machine, request: &Request) -> Plan {
    plan(config, machine, &measured_default(config), request).unwrap()
}

fn refused(config: &Config, machine: &Machine, request: &Request) -> PlanError {
    plan(config, machine, &measured_default(config), request).unwrap_err()
}

fn line<'a>(plan: &'a Plan, name: &str) -> &'a BudgetLine {
    plan.budget.lines.iter().find(|line| line.name.text() == name).unwrap()
}

#[test]
fn gpus_asked_for_on_a_cpu_machine_become_cpu_ranks() {
    let plan = planned(&emg(), &machine(8, 32 * GIB), &gpus(3));
    assert_eq!(plan.topology.local_world_size, 3);
    assert_eq!((plan.topology.device, plan.topology.threads_per_rank), (Device::Cpu, 2));
    assert_eq!(plan.batch, BatchPlan { global_batch: 192, micro_batch: 64, micro_steps: 1, val_batch: 64 });
    let note = "3 GPUs asked for, none present: training on 3 CPU ranks; the global batch stays";
    assert!(plan.notes.iter().any(|n| n == note), "{:?}", plan.notes);
}

#[test]
fn nodes_of_unequal_ranks_make_one_world() {
    let share = |ranks, asked| NodeShare { ranks, asked };
    let job = |node_rank, nodes: &[NodeShare], request: Request| {
        let request = Request { nnodes: nodes.len(), node_rank, nodes: nodes.to_vec(), ..request };
        planned(&emg(), &machine(8, 32 * GIB), &request)
    };
    let nodes = [share(2, 2), share(1, 1)];
    let (first, second) = (job(0, &nodes, ranks(2)), job(1, &nodes, ranks(1)));
    for (plan, local) in [(&first, 2), (&second, 1)] {
        assert_eq!((plan.topology.local_world_size, plan.topology.world_size), (local, 3));
        assert_eq!(plan.topology.node_ranks, [2, 1]);
        assert_eq!(plan.batch, BatchPlan { global_batch: 192, micro_batch: 64, micro_steps: 1, val_batch: 64 });
    }
    // Four GPUs were asked for on node 1, which has one: the batch is what was asked for, on every node.
    let batch = job(0, &[share(2, 2), share(1, 4)], ranks(2)).batch;
    assert_eq!((batch.global_batch, batch.micro_steps), (6 * 64, 2));
    let machine = machine(8, 32 * GIB);
    assert_eq!(node_share(&emg(), &machine, &gpus(3)).unwrap(), share(3, 3));
    let stale = Request { nnodes: 3, nodes: nodes.to_vec(), ..ranks(2) };
    assert!(refused(&emg(), &machine, &stale).to_string().contains("--nnodes 3, but 2 nodes"));
}

#[test]
fn ranks_override_gpus_and_keep_the_global_batch() {
    let request = Request { ranks: Some(1), ..gpus(3) };
    let plan = planned(&emg(), &machine(2, 32 * GIB), &request);
    assert_eq!(plan.topology.local_world_size, 1);
    assert_eq!((plan.batch.global_batch, plan.batch.micro_batch, plan.batch.micro_steps), (192, 64, 3));
}

#[test]
fn strict_refuses_missing_gpus() {
    let request = Request { strict: true, ..gpus(3) };
    let error = refused(&emg(), &machine(8, 32 * GIB), &request);
    assert!(matches!(error, PlanError::Device { .. }), "{error:?}");
    let text = "3 GPUs asked for, none present; leave out --strict to train on CPU ranks";
    assert_eq!(error.to_string(), text);
}

#[test]
fn a_present_gpu_that_cannot_train_is_named() {
    let plan = planned(&emg(), &with_gpus(1), &Request::default());
    assert_eq!((plan.topology.device, plan.notes.len()), (Device::Cuda, 0));
    let mut notes = Vec::new();
    let topology = topology_with(&emg(), &with_gpus(1), &Request::default(), &mut notes, false).unwrap();
    assert_eq!(topology.device, Device::Cpu);
    assert!(notes[0].contains("ranks train on the CPU only"), "{notes:?}");
}

#[test]
fn ranks_beyond_the_gpus_share_them_in_turn() {
    let request = Request { ranks: Some(3), ..Request::default() };
    let plan = planned(&emg(), &with_gpus(1), &request);
    assert_eq!((plan.topology.world_size, plan.topology.devices.as_slice()), (3, &[0, 0, 0][..]));
    assert!(plan.notes[0].contains("3 ranks share 1 GPU"), "{:?}", plan.notes);
    assert_eq!(plan.budget.gpu.unwrap().total_bytes, 79 * GIB / 3);
}

#[test]
fn fewer_gpus_than_asked_are_used() {
    let mut notes = Vec::new();
    let config = emg();
    let topology = topology_with(&config, &with_gpus(2), &gpus(3), &mut notes, true).unwrap();
    assert_eq!((topology.device, topology.devices.as_slice()), (Device::Cuda, &[0, 1][..]));
    assert_eq!(notes, ["3 GPUs asked for, 2 present: training on 2 CUDA ranks; the global batch stays"]);
    let batch = topology::batch(&config, &gpus(3), &topology).unwrap();
    assert_eq!((batch.global_batch, batch.micro_batch, batch.micro_steps), (192, 64, 2));
    let strict = Request { strict: true, ..gpus(3) };
    assert!(topology_with(&config, &with_gpus(2), &strict, &mut notes, true).is_err());
}

#[test]
fn a_cuda_plan_puts_the_model_on_the_device() {
    let mut draft = Plan::default();
    let (config, machine) = (emg(), with_gpus(2));
    draft.topology = topology_with(&config, &machine, &gpus(2), &mut draft.notes, true).unwrap();
    draft.batch = topology::batch(&config, &gpus(2), &draft.topology).unwrap();
    draft.loader =
        topology::loader(&config, &machine, &measured_default(&config), &draft.topology, &mut draft.notes).unwrap();
    draft.budget = budget::budget(&config, &machine, &measured_default(&config), &mut draft).unwrap();
    let gpu = draft.budget.gpu.as_ref().unwrap();
    assert_eq!(gpu.total_bytes, 79 * GIB);
    assert!(gpu.lines.iter().any(|line| line.name == LineId::ModelState && line.bytes == 282_996 * 4 * 4));
    assert!(!draft.budget.lines.iter().any(|line| line.name == LineId::ModelState));
    assert!(draft.table().contains("each GPU: 79.00 GiB free"));
}

#[test]
fn lines_are_exact() {
    let mut config = emg();
    config.train.num_workers = Some(2);
    let plan = planned(&config, &machine(16, 32 * GIB), &ranks(2));
    assert_eq!(plan.loader, LoaderPlan { threads: 2, slots: 6, chunk_cache_bytes: 64 * MIB });
    assert_eq!(line(&plan, "model state").per_rank_bytes, Some(282_996 * 4 * 4));
    assert_eq!(line(&plan, "model state").bytes, 2 * 282_996 * 4 * 4);
    assert_eq!(line(&plan, "staging slots").per_rank_bytes, Some(6 * 64 * 500 * 36 * 4));
    assert_eq!(line(&plan, "validation slots").per_rank_bytes, Some(4 * 64 * 500 * 36 * 4));
    assert_eq!(line(&plan, "decode scratch").per_rank_bytes, Some(2 * 4 * MIB));
    assert_eq!((line(&plan, "chunk cache").per_rank_bytes, line(&plan, "chunk cache").bound), (Some(64 * MIB), true));
    let saved = 282_996 * 4 * 3;
    assert_eq!(line(&plan, "checkpoint staging").bytes, saved + saved / 24 + (32 << 10));
    assert_eq!(line(&plan, "collectives").per_rank_bytes, Some(MIB + (40 << 10)));
    assert_eq!((line(&plan, "libraries").per_rank_bytes, line(&plan, "libraries").bound), (None, true));
    assert_eq!(line(&plan, "page cache").bytes, 0);
    config.train.batch_size = 1;
    config.with_section(|emg: &mut EmgConfig| emg.window_size = 501);
    // 501 × 20 × 4 B is no whole number of cache lines: 40,080 becomes 40,128.
    let odd = planned(&config, &machine(16, 32 * GIB), &ranks(2));
    assert_eq!(line(&odd, "staging slots").per_rank_bytes, Some(6 * (501 * 64 + 40_128)));
    config.train.ema_decay = Rates::one(0.999);
    config.train.optimizer = OptimizerKind::Sgd;
    let sgd = planned(&config, &machine(16, 32 * GIB), &ranks(2));
    assert_eq!(line(&sgd, "model state").per_rank_bytes, Some(282_996 * 4 * 4));
}

#[test]
fn buffers_and_every_average_have_their_place_in_the_plan() {
    let (mut config, machine) = (emg(), machine(16, 32 * GIB));
    let bytes = |config: &Config, buffer_bytes: u64| {
        let mut measured = measured_default(config);
        measured.model.buffer_bytes = buffer_bytes;
        let plan = plan(config, &machine, &measured, &ranks(2)).unwrap();
        let state = line(&plan, "model state");
        (state.per_rank_bytes.unwrap(), line(&plan, "checkpoint staging").bytes, state.formula.clone())
    };
    let (state, saved, _) = bytes(&config, 0);
    config.train.ema_decay = Rates(vec![0.9, 0.99, 0.999]);
    let (averaged, _, formula) = bytes(&config, 0);
    assert_eq!(averaged - state, 3 * 4 * 282_996);
    assert!(formula.ends_with("+ 2 moments + 3 EMA)"), "{formula}");
    // Buffers as they are and as they were before the step; each file of weights holds them.
    let (with, staged, formula) = bytes(&config, 1000);
    assert_eq!(with - averaged, 2 * 1000);
    assert!(formula.contains("of buffers"), "{formula}");
    let copies = 4 * 282_996 * 3 + 4 * 1000;
    assert!(staged - saved >= copies && staged - saved < copies + copies / 20, "{staged} {saved}");
    config.train.ema_buffers = crate::config::EmaBuffers::Average;
    assert_eq!(bytes(&config, 1000).0 - averaged, (2 + 2 * 3) * 1000);
}

#[test]
fn libraries_count_once_and_each_rank_and_thread_for_itself() {
    let of = |count, cores| planned(&emg(), &machine(cores, 64 * GIB), &ranks(count));
    let (one, three) = (of(1, 3), of(3, 3));
    assert_eq!(line(&one, "libraries").bytes, line(&three, "libraries").bytes);
    let runtime = |plan: &Plan| line(plan, "runtime").per_rank_bytes.unwrap();
    assert_eq!(runtime(&one) - runtime(&three), 2 * (256 << 10));
    let heap = |plan: &Plan| line(plan, "heap").per_rank_bytes.unwrap();
    // Three compute threads beside one; two were there when it was measured.
    assert_eq!(heap(&one) - heap(&three), 5 * MIB);
    assert_eq!(line(&one, "activations").per_rank_bytes, line(&three, "activations").per_rank_bytes);
    assert!(!one.budget.lines.iter().any(|line| line.name == LineId::Collectives));
    let cuda = planned(&emg(), &with_gpus(2), &gpus(2));
    assert!(!cuda.budget.lines.iter().any(|line| [LineId::Libraries, LineId::Collectives].contains(&line.name)));
}

#[test]
fn the_launchers_directory_grows_with_the_page_cache() {
    let launcher = |data: u64, cap: Option<f64>| {
        let mut config = emg();
        config.data.cache_size_gb = cap;
        let plan = plan(&config, &machine(8, 256 * GIB), &with_data(&config, data), &ranks(2)).unwrap();
        (line(&plan, "launcher").bytes, line(&plan, "launcher").bound)
    };
    let own = (8448 + 2 * 16) << 10;
    assert_eq!(launcher(0, None), (own, false));
    // All data in chunks of 256 KiB at the least; a part of it in halves of windows.
    assert_eq!(launcher(10 * GIB, None), (own + 20 * 4096 * 448, true));
    assert_eq!(launcher(400 * GIB, Some(36e8 / GIB as f64)), (own + 100_000 * 448, true));
}

#[test]
fn loader_threads_follow_the_half_of_cores_rule() {
    let threads = |cores, count, workers: Option<usize>| {
        let mut config = emg();
        config.train.num_workers = workers;
        let plan = planned(&config, &machine(cores, 64 * GIB), &ranks(count));
        (plan.loader.threads, plan.notes.iter().any(|note| note.contains("50 % of")))
    };
    assert_eq!(threads(32, 2, None), (4, false));
    assert_eq!(threads(8, 2, None), (2, false));
    assert_eq!(threads(2, 3, None), (1, false));
    assert_eq!(threads(8, 2, Some(3)), (3, true));
    assert_eq!(threads(8, 2, Some(0)), (0, false));
}

#[test]
fn page_cache_is_a_line_cut_by_config_and_data_set() {
    let mut config = emg();
    let machine = machine(8, 32 * GIB);
    let (facts, large) = (100 * MIB, 1 << 40);
    let cache = |config: &Config, bytes: &u64| {
        let plan = plan(config, &machine, &with_data(config, *bytes), &ranks(1)).unwrap();
        let budget = plan.budget.clone();
        assert_eq!(line(&plan, "page cache").bytes, budget.page_cache_bytes);
        assert_eq!(budget.least_bytes() + budget.page_cache_bytes, budget.need_bytes());
        (budget.page_cache_bytes, budget.cache_policy, budget.total_bytes - budget.need_bytes())
    };
    let (bytes, policy, _) = cache(&config, &facts);
    assert_eq!((bytes, policy), (200 * MIB, CacheMode::NextUse));
    // A data set larger than the budget gets what is left, to the page.
    let (bytes, _, spare) = cache(&config, &large);
    assert!(bytes > 20 * GIB && spare < 8192, "{bytes} {spare}");
    config.data.cache_size_gb = Some(0.125);
    config.data.cache = crate::config::CachePolicy::Lru;
    let (bytes, policy, _) = cache(&config, &facts);
    assert_eq!((bytes, policy), (128 * MIB, CacheMode::Lru));
    config.data.cache = crate::config::CachePolicy::Off;
    let (bytes, policy, _) = cache(&config, &facts);
    assert_eq!((bytes, policy), (0, CacheMode::Off));
}

#[test]
fn a_page_cache_for_all_holds_the_last_entry_too() {
    let (config, machine) = (emg(), machine(8, 64 << 30));
    for (useful, wanted) in [(4096, 4096), (4097, 8192), (16_348_031, 16_351_232)] {
        let mut measured = with_data(&config, useful);
        measured.data.useful_bytes = useful;
        let plan = plan(&config, &machine, &measured, &ranks(1)).unwrap();
        assert_eq!(plan.budget.page_cache_bytes, wanted, "of {useful}");
    }
}

#[test]
fn a_cache_above_half_of_the_memory_is_refused_with_the_number_that_passes() {
    let mut config = emg();
    config.data.cache_size_gb = Some(50.0);
    let machine = machine(8, 31 * GIB);
    let PlanError::CacheTooLarge { fits_gb, .. } = refused(&config, &machine, &ranks(1)) else { panic!() };
    assert_eq!(fits_gb, 15.5);
    config.data.cache_size_gb = Some(fits_gb);
    planned(&config, &machine, &ranks(1));
}

#[test]
fn the_cgroup_limit_is_the_basis_where_it_is_smaller() {
    let limited = Machine {
        cgroup_limit_bytes: Some(8 * GIB),
        cgroup_used_bytes: Some(0),
        cgroup_version: Some(2),
        ..machine(8, 64 * GIB)
    };
    let plan = planned(&emg(), &limited, &ranks(1));
    assert_eq!(plan.budget.total_bytes, 8 * GIB * 8 / 10);
    assert!(plan.budget.formula.contains("cgroup limit"));
}

#[test]
fn what_others_use_beyond_their_share_is_reserved() {
    let reserve = |available| {
        let machine = Machine { memory_available_bytes: available, ..machine(8, 20 * GIB) };
        line(&planned(&emg(), &machine, &ranks(1)), "reserve").bytes
    };
    // Budget 16 GiB, margin 2 %; 4 GiB are the others' by the budget's definition.
    let margin = 16 * GIB / 50;
    assert_eq!(reserve(20 * GIB), margin);
    assert_eq!(reserve(16 * GIB), margin);
    assert_eq!(reserve(10 * GIB), margin + 6 * GIB);
}

#[test]
fn too_little_available_memory_is_refused_although_the_machine_is_large() {
    let full = Machine { memory_available_bytes: 300 * MIB, ..machine(8, 64 * GIB) };
    let error = refused(&emg(), &full, &ranks(2));
    assert!(!matches!(error, PlanError::Device { .. } | PlanError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("largest lines: reserve"), "{error}");
}

#[test]
fn absurd_configs_are_errors() {
    let machine = machine(8, 32 * GIB);
    let mut config = emg();
    config.train.batch_size = usize::MAX;
    assert!(matches!(refused(&config, &machine, &ranks(3)), PlanError::Overflow { .. }));
    config.train.batch_size = usize::MAX / 8;
    assert!(matches!(refused(&config, &machine, &ranks(1)), PlanError::Overflow { .. }));
    config = emg();
    config.with_section(|emg: &mut EmgConfig| emg.window_size = usize::MAX);
    assert!(matches!(refused(&config, &machine, &ranks(1)), PlanError::Overflow { .. }));
    config = emg();
    config.train.prefetch_factor = usize::MAX;
    assert!(matches!(refused(&config, &machine, &ranks(1)), PlanError::Overflow { .. }));
    config = emg();
    config.train.batch_size = 0;
    assert!(matches!(refused(&config, &machine, &ranks(1)), PlanError::Invalid(_)));
    assert!(matches!(refused(&emg(), &machine, &ranks(0)), PlanError::Invalid(_)));
    config = emg();
    config.memory.budget = Budget::Bytes(33 * GIB);
    assert!(refused(&config, &machine, &ranks(1)).to_string().contains("set it to 32.00 GiB or less"));
}

#[test]
fn more_ranks_than_samples_are_refused() {
    let mut config = emg();
    config.train.batch_size = 1;
    let request = Request { ranks: Some(3), ..gpus(1) };
    let error = refused(&config, &machine(8, 32 * GIB), &request).to_string();
    assert!(error.contains("= 1 samples per step, but 3") && error.contains("raise train.batch_size to 3"), "{error}");
}

#[test]
fn a_refusal_names_every_single_change_that_fits() {
    let mut config = emg();
    config.train.batch_size = 4096;
    config.train.num_workers = Some(8);
    let machine = machine(32, 128 * GIB);
    let need_bytes = planned(&config, &machine, &ranks(3)).budget.need_bytes();
    config.memory.budget = Budget::Bytes(need_bytes - need_bytes / 50);
    let error = refused(&config, &machine, &ranks(3));
    let text = error.to_string();
    let loader = ["train.num_workers: ", "train.prefetch_factor: 1 instead of 2"];
    let all = ["train.microbatch: ", "train.batch_size: ", "--ranks 2 instead of 3", "memory.budget: "];
    for key in loader.iter().chain(&all) {
        assert!(text.contains(key), "{text}");
    }
}

#[test]
fn tables_keep_to_their_width() {
    let mut config = emg();
    config.train.ema_decay = Rates::one(0.999);
    let plan = planned(&config, &machine(2, 24 * GIB), &gpus(3));
    for width in [80, 160] {
        let table = plan.table_at(width);
        assert!(table.lines().all(|line| line.chars().count() <= width), "{table}");
        assert!(plan.budget.lines.iter().all(|line| table.contains(line.name.text())));
    }
}

#[test]
fn plans_survive_json() {
    let plan = planned(&emg(), &machine(4, 24 * GIB), &gpus(3));
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

/// Configs, machines and requests of all sizes, fitting and not.
fn cases() -> impl Strategy<Value = (Config, Machine, Request)> {
    let sizes = (1usize..3000, 1usize..5, proptest::option::of(1usize..3000), 1usize..4000);
    let loading = (proptest::option::of(0usize..12), 0usize..6, 0u64..(1 << 30));
    let node = (1usize..64, (64 * MIB)..(64 * GIB), 0u64..=100, proptest::option::of(64 * MIB..32 * GIB));
    let asked = (proptest::option::of(1usize..9), proptest::option::of(1usize..9), 1u32..=100);
    (sizes, loading, node, asked).prop_map(|(sizes, loading, node, asked)| {
        let mut config = emg();
        config.train.batch_size = sizes.0;
        config.train.gradient_accumulation_steps = sizes.1;
        config.train.microbatch = sizes.2;
        config.with_section(|emg: &mut EmgConfig| emg.window_size = sizes.3);
        config.train.num_workers = loading.0;
        config.train.prefetch_factor = loading.1;
        config.data.chunk_cache_size = loading.2;
        config.memory.budget = Budget::Percent(asked.2.into());
        let mut machine = machine(node.0, node.1);
        machine.memory_available_bytes = node.1 / 100 * node.2;
        machine.cgroup_limit_bytes = node.3;
        machine.cgroup_used_bytes = node.3.map(|limit| limit / 7);
        machine.cgroup_room_bytes = node.3.map(|limit| limit - limit / 7);
        (config, machine, Request { gpus: asked.0, ranks: asked.1, ..Request::default() })
    })
}

proptest! {
    #[test]
    fn lines_and_page_cache_never_exceed_the_budget((config, machine, request) in cases(), data in 0u64..1 << 40) {
        if let Ok(plan) = plan(&config, &machine, &with_data(&config, data), &request) {
            let budget = &plan.budget;
            prop_assert!(budget.need_bytes() <= budget.total_bytes);
            prop_assert!(budget.total_bytes <= machine.memory_bytes());
            // Headroom's own lines are free now.
            let own = budget.need_bytes() - line(&plan, "reserve").bytes;
            prop_assert!(own <= machine.memory_available_bytes);
            for line in &budget.lines {
                let ranks = plan.topology.local_world_size as u64;
                prop_assert!(line.per_rank_bytes.is_none_or(|each| each * ranks == line.bytes));
            }
        }
    }

    #[test]
    fn the_global_batch_is_the_same_for_every_world_size(
        batch in 8usize..200, accumulation in 1usize..4, asked in 1usize..9, present in 1usize..9,
    ) {
        let mut config = emg();
        config.train.batch_size = batch;
        config.train.gradient_accumulation_steps = accumulation;
        let request = Request { ranks: Some(present), ..gpus(asked) };
        let plan = planned(&config, &machine(8, 1024 * GIB), &request);
        prop_assert_eq!(plan.batch.global_batch, batch * accumulation * asked);
        // The largest share is covered, and not by one micro-batch too many.
        let share = plan.batch.global_batch.div_ceil(present);
        let (micro, steps) = (plan.batch.micro_batch, plan.batch.micro_steps);
        prop_assert!(micro * steps >= share && micro * (steps - 1) < share && micro <= batch);
    }

    #[test]
    fn need_grows_with_each_number((config, machine, request) in cases()) {
        let need = |config: &Config| {
            draft(config, &machine, &measured_default(config), &request).map(|plan| plan.budget.need_bytes())
        };
        let grow: [fn(&mut Config); 4] = [
            |config| config.train.batch_size += 1,
            |config| config.train.num_workers = Some(config.train.num_workers.unwrap_or(0) + 1),
            |config| config.train.prefetch_factor += 1,
            |config| config.data.chunk_cache_size += 1,
        ];
        let mut base = config;
        base.train.num_workers.get_or_insert(0);
        if let Ok(before) = need(&base) {
            for grow in grow {
                let mut larger = base.clone();
                grow(&mut larger);
                prop_assert!(need(&larger).unwrap() >= before);
            }
        }
    }

    #[test]
    fn suggestions_fit_when_applied((config, machine, request) in cases()) {
        let measured = measured_default(&config);
        if let Err(PlanError::DoesNotFit { suggestions, need_bytes, budget_bytes, .. }) =
            plan(&config, &machine, &measured, &request)
        {
            prop_assert!(need_bytes > budget_bytes);
            for suggestion in suggestions {
                let (mut config, mut request) = (config.clone(), request.clone());
                suggestion.change.apply(suggestion.to, &mut config, &mut request);
                let fitting = plan(&config, &machine, &measured, &request);
                prop_assert!(fitting.is_ok(), "{suggestion}: {fitting:?}");
                prop_assert_eq!(fitting.unwrap().budget.need_bytes(), suggestion.need_bytes);
            }
        }
    }
}

#[test]
fn a_cache_too_small_for_the_order_is_named_with_numbers() {
    let small = |mode: ShuffleMode, window: usize, cache_mib: u64| {
        let mut config = emg();
        config.data.shuffle_mode = mode;
        config.data.shuffle_window = window;
        config.data.cache_size_gb = Some(cache_mib as f64 / 1024.0);
        let notes = plan(&config, &machine(8, 32 * GIB), &with_data(&config, 8 * GIB), &ranks(1)).unwrap().notes;
        notes.into_iter().find(|note| note.contains("the page cache of"))
    };
    let note = small(ShuffleMode::Block, 64, 64).unwrap();
    for part in ["64.0 MiB holds about 128 pages", "4 × 64 = 256", "data.shuffle_window to 32"] {
        assert!(note.contains(part), "{note}");
    }
    assert_eq!([small(ShuffleMode::Block, 64, 128), small(ShuffleMode::Block, 32, 64)], [None, None]);
    assert!(small(ShuffleMode::Global, 64, 48).unwrap().contains("one batch of 1 rank may lie in 64"));
    assert_eq!([small(ShuffleMode::Global, 64, 64), small(ShuffleMode::Grouped, 64, 1)], [None, None]);
}

#[test]
fn a_measured_device_gives_its_lines_and_an_unmeasured_one_says_so() {
    let config = Config::default();
    let mut measured = measured_default(&config);
    let of = |measured: &Measured| plan(&config, &with_gpus(1), measured, &gpus(1)).unwrap();
    let gpu_line = |plan: &Plan, name: &str| {
        plan.budget.gpu.as_ref().unwrap().lines.iter().find(|line| line.name.text() == name).unwrap().clone()
    };
    let assumed = of(&measured);
    assert!(gpu_line(&assumed, "activations").formula.contains("× 1.5 assumed"));
    assert!(line(&assumed, "runtime").formula.ends_with("assumed"));
    measured.model.gpu = Some(GpuSizes { context_bytes: 500 * MIB, host_bytes: 900 * MIB });
    let known = of(&measured);
    assert_eq!(gpu_line(&known, "CUDA runtime").bytes, 500 * MIB);
    assert_eq!(line(&known, "runtime").per_rank_bytes, Some(900 * MIB));
    let activations = gpu_line(&known, "activations");
    assert!(activations.formula.contains("that the allocator keeps"), "{}", activations.formula);
}

#[test]
fn lines_say_what_they_rest_on_where_passes_were_not_measured() {
    let config = Config::default();
    let mut measured = measured_default(&config);
    let whole = plan(&config, &machine(8, 64 * GIB), &measured, &ranks(1)).unwrap();
    assert!(whole.notes.is_empty(), "{:?}", whole.notes);
    (measured.model.enlarged, measured.model.short) = (4.0, Some("memory ran out".into()));
    let scaled = plan(&config, &machine(8, 64 * GIB), &measured, &ranks(1)).unwrap();
    let activations = line(&scaled, "activations");
    assert!(activations.formula.ends_with("measured with samples of 1/4.0 the size"), "{}", activations.formula);
    assert!(activations.bytes.abs_diff(4 * line(&whole, "activations").bytes) < 8);
    assert_eq!(scaled.notes, ["model sizes: memory ran out"]);
    (measured.model.train.seen, measured.model.val.seen) = (Vec::new(), Vec::new());
    let assumed = plan(&config, &machine(8, 64 * GIB), &measured, &ranks(1)).unwrap();
    assert!(line(&assumed, "activations").formula.ends_with("assumed: not measured"));
    assert!(line(&assumed, "activations").bytes > line(&whole, "activations").bytes);
}

#[test]
fn a_pass_is_planned_without_what_only_training_needs() {
    let (config, machine, training) = (emg(), machine(8, 32 * GIB), ranks(2));
    let pass = Request { infers: true, ..training.clone() };
    let (trained, passed) = (planned(&config, &machine, &training), planned(&config, &machine, &pass));
    let of = |plan: &Plan, name: &str| line(plan, name).per_rank_bytes.unwrap();
    // Weights, gradients and two moments; weights alone.
    assert_eq!(of(&trained, "model state"), 4 * of(&passed, "model state"));
    assert!(passed.budget.lines.iter().all(|line| line.name != LineId::StagingSlots));
    assert_eq!(of(&trained, "validation slots"), of(&passed, "validation slots"));
    assert!(of(&passed, "activations") <= of(&trained, "activations") && passed.rank_bytes() < trained.rank_bytes());
    assert_eq!((passed.batch.global_batch, passed.batch.val_batch), (0, trained.batch.val_batch));
    assert!(passed.table().contains("64 samples at a time on each"), "{}", passed.table());
    // Of all changes those that shrink a pass are offered.
    let mut tight = config.clone();
    tight.memory.budget = crate::config::Budget::Bytes(passed.budget.least_bytes() - (16 << 20));
    tight.train.val_batch_size = Some(512);
    let text = refused(&tight, &machine, &pass).to_string();
    assert!(text.contains("train.val_batch_size") && !text.contains("train.microbatch"), "{text}");
    let less = super::smaller(&config, &machine, &with_data(&config, GIB), &pass, &passed).unwrap().unwrap();
    assert!(less.changes.contains(&"train.val_batch_size: 64 → 32".to_owned()), "{:?}", less.changes);
}
