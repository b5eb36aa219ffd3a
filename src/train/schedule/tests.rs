use super::*;

fn config(scheduler: SchedulerKind) -> TrainConfig {
    TrainConfig { scheduler, learning_rate: 0.1, warmup_epochs: 0.0, num_epochs: 10, ..TrainConfig::default() }
}

fn made(config: &TrainConfig, steps_per_epoch: u64) -> Schedule {
    Schedule::new(config, Pace::even(steps_per_epoch, 1))
}

fn assert_close(found: impl IntoIterator<Item = f64>, expected: &[f64]) {
    let found: Vec<f64> = found.into_iter().collect();
    assert_eq!(found.len(), expected.len());
    let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b.abs().max(1e-3);
    assert!(found.iter().zip(expected).all(close), "{found:?}\n{expected:?}");
}

// Expected rates below were printed by PyTorch 2.11's schedulers with SGD at 0.1.

#[test]
fn step_matches_pytorch() {
    let config = TrainConfig { step_size: 3, gamma: 0.5, ..config(SchedulerKind::Step) };
    let expected = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025];
    assert_close((0..8).map(|epoch| made(&config, 1).rate(epoch)), &expected);
    // With many steps per epoch the rate holds within the epoch.
    assert_close((0..8).map(|epoch| made(&config, 50).rate(epoch * 50 + 49)), &expected);
}

#[test]
fn cosine_matches_pytorch() {
    let config = TrainConfig { min_learning_rate: 0.01, ..config(SchedulerKind::Cosine) };
    let expected = [
        0.1,
        0.09779754323328192,
        0.09140576474687263,
        0.08145033635316129,
        0.06890576474687264,
        0.05500000000000001,
        0.04109423525312737,
        0.028549663646838717,
        0.01859423525312737,
        0.012202456766718092,
        0.01,
    ];
    assert_close((0..11).map(|step| made(&config, 1).rate(step)), &expected);
    assert_close((0..11).map(|epoch| made(&config, 7).rate(epoch * 7)), &expected);
    // Past the end the rate stays; PyTorch's would rise again.
    assert_close([made(&config, 1).rate(15)], &[0.01]);
    let shorter = TrainConfig { max_steps: Some(10), num_epochs: 999, ..config };
    assert_close((0..11).map(|step| made(&shorter, 7).rate(step)), &expected);
}

fn plateau_rates(config: &TrainConfig, metrics: &[f64]) -> Vec<f64> {
    let mut schedule = made(config, 5);
    let mut rates = Vec::new();
    for (epoch, &metric) in (0..).zip(metrics) {
        rates.push(schedule.rate(epoch * 5));
        // A checkpoint between epochs changes nothing.
        let json = serde_json::to_string(schedule.state()).unwrap();
        schedule = made(config, 5);
        schedule.restore(serde_json::from_str(&json).unwrap());
        schedule.end_epoch(epoch * 5 + 5, metric);
    }
    rates
}

#[test]
fn plateau_matches_pytorch() {
    let down = TrainConfig {
        gamma: 0.5,
        plateau_patience: 2,
        min_learning_rate: 0.02,
        monitor_mode: MonitorMode::Min,
        ..config(SchedulerKind::Plateau)
    };
    let metrics = [1.0, 0.9, 0.9, 0.89995, 0.95, 0.8, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85];
    let expected = [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.02, 0.02, 0.02];
    assert_close(plateau_rates(&down, &metrics), &expected);
    let up =
        TrainConfig { gamma: 0.1, plateau_patience: 1, min_learning_rate: 0.0, monitor_mode: MonitorMode::Max, ..down };
    let metrics = [0.5, 0.5, 0.6, 0.60001, 0.5, 0.7, 0.6];
    assert_close(plateau_rates(&up, &metrics), &[0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]);
}

#[test]
fn linear_matches_pytorch() {
    let to_lrf = TrainConfig { lrf: 0.01, ..config(SchedulerKind::Linear) };
    let expected = [0.1, 0.0901, 0.0802, 0.0703, 0.0604, 0.0505, 0.0406, 0.0307, 0.0208, 0.0109, 0.001, 0.001];
    assert_close((0..12).map(|step| made(&to_lrf, 1).rate(step)), &expected);
    assert_close((0..12).map(|epoch| made(&to_lrf, 7).rate(epoch * 7)), &expected);
    let to_zero = TrainConfig { max_steps: Some(8), num_epochs: 999, ..config(SchedulerKind::Linear) };
    let expected = [0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125, 0.0];
    assert_close((0..9).map(|step| made(&to_zero, 3).rate(step)), &expected);
    let floor = TrainConfig { min_learning_rate: 0.05, ..to_lrf };
    assert_close([made(&floor, 1).rate(5), made(&floor, 1).rate(10)], &[0.075, 0.05]);
    let cosine = TrainConfig { lrf: 0.1, ..config(SchedulerKind::Cosine) };
    assert_close([made(&cosine, 1).rate(0), made(&cosine, 1).rate(10)], &[0.1, 0.01]);
}

/// Reference: PyTorch 2.11's SGD with `LambdaLR` by epoch and the warm-up of Ultralytics' loop, which sets each group's
/// rate and momentum with `numpy.interp` before every batch: 5 epochs of 6 batches, 12 of them warm-up.
#[test]
fn a_warm_up_within_the_schedule_matches_a_loop_over_batches() {
    let config = TrainConfig {
        learning_rate: 0.01,
        lrf: 0.01,
        num_epochs: 5,
        warmup_epochs: 2.0,
        warmup_mode: WarmupMode::Within,
        schedule_by: ScheduleBy::Epoch,
        ..config(SchedulerKind::Linear)
    };
    let momentum = Some((0.8, 0.937));
    let (bias, others) = (Course { factor: 1.0, start: 0.1, momentum }, Course { factor: 1.0, start: 0.0, momentum });
    let schedule = made(&config, 6);
    for (batch, of_bias, of_others, of_momentum) in [
        (0, 0.1, 0.0, 0.8),
        (1, 0.0925, 0.000_833_333_333_333_333_4, 0.811_416_666_666_666_7),
        (5, 0.0625, 0.004_166_666_666_666_667, 0.857_083_333_333_333_4),
        (6, 0.05401, 0.004_01, 0.8685),
        (11, 0.015_684_999_999_999_99, 0.007_351_666_666_666_667, 0.925_583_333_333_333_4),
        (12, 0.00604, 0.00604, 0.937),
        (17, 0.00604, 0.00604, 0.937),
        (18, 0.00406, 0.00406, 0.937),
        (29, 0.00208, 0.00208, 0.937),
    ] {
        let numbers = [&bias, &others].map(|course| schedule.numbers(batch, course));
        assert_close(numbers.map(|n| n.lr), &[of_bias, of_others]);
        assert_close(numbers.map(|n| n.momentum.unwrap()), &[of_momentum; 2]);
        assert_eq!(schedule.is_warming(batch), batch < 12);
    }
    assert_close([schedule.rate(1)], &[0.000_833_333_333_333_333_4]);
    // Two batches a step: a step has the numbers of its last batch.
    let pairs = TrainConfig { gradient_accumulation_steps: 2, ..config };
    let pairs = Schedule::new(&pairs, Pace::even(3, 2));
    assert_close((0..15).map(|step| pairs.rate(step)), &(0..15).map(|s| schedule.rate(2 * s + 1)).collect::<Vec<_>>());
    // A group's factor is on the scheduler's rate, not on where the warm-up begins.
    let double = Course { factor: 2.0, start: 0.1, momentum: None };
    assert_close([0, 6, 29].map(|batch| schedule.numbers(batch, &double).lr), &[0.1, 0.05802, 0.00416]);
}

#[test]
fn before_the_schedule_groups_warm_up_by_their_factor_and_momentum_with_them() {
    let config = TrainConfig { warmup_steps: Some(4), ..config(SchedulerKind::None) };
    let schedule = made(&config, 2);
    let course = Course { factor: 3.0, start: 0.7, momentum: Some((0.5, 0.9)) };
    let numbers: Vec<_> = (0..5).map(|step| schedule.numbers(step, &course)).collect();
    assert_close(numbers.iter().map(|n| n.lr), &[0.075, 0.15, 0.225, 0.3, 0.3]);
    assert_close(numbers.iter().map(|n| n.momentum.unwrap()), &[0.6, 0.7, 0.8, 0.9, 0.9]);
}

#[test]
fn defect_e_warm_up_and_scheduler_never_act_at_the_same_time() {
    // LinearLR(start_factor=1/4, total_iters=3) of PyTorch, for every scheduler alike.
    for kind in [SchedulerKind::None, SchedulerKind::Step, SchedulerKind::Cosine, SchedulerKind::Plateau] {
        let config = TrainConfig { warmup_steps: Some(4), warmup_epochs: 9.0, step_size: 1, ..config(kind) };
        let schedule = made(&config, 2);
        assert_close((0..5).map(|step| schedule.rate(step)), &[0.025, 0.05, 0.075, 0.1, 0.1]);
        // After it, the scheduler runs as if training began there.
        let rest = TrainConfig { warmup_steps: Some(0), max_steps: Some(16), ..config };
        let rest = made(&rest, 2);
        assert!((0..16).all(|step| schedule.rate(4 + step) == rest.rate(step)), "{kind:?}");
    }
}

#[test]
fn plateau_ignores_epochs_inside_warm_up() {
    let config = TrainConfig { warmup_epochs: 3.0, plateau_patience: 0, gamma: 0.5, ..config(SchedulerKind::Plateau) };
    let mut schedule = made(&config, 10);
    assert_eq!(schedule.warmup, Warmup::Before(30));
    for (steps, metric, rate) in [(10, 1.0, 0.1), (20, 2.0, 0.1), (30, 3.0, 0.1), (40, 4.0, 0.1), (50, 4.0, 0.05)] {
        schedule.end_epoch(steps, metric);
        assert_close([schedule.rate(60)], &[rate]);
    }
    schedule.end_epoch(60, f64::NAN);
    assert_eq!((schedule.state().best, schedule.rate(60)), (Some(4.0), 0.025));
}

#[test]
fn early_stopping_counts_epochs_since_the_best() {
    let config = TrainConfig {
        early_stopping: true,
        patience: 2,
        min_delta: 0.1,
        monitor_mode: MonitorMode::Min,
        ..TrainConfig::default()
    };
    let run = |config: &TrainConfig, metrics: &[f64]| {
        let mut monitor = Monitor::new(config);
        let mut verdicts = Vec::new();
        for (epoch, &metric) in (0..).zip(metrics) {
            let json = serde_json::to_string(monitor.state()).unwrap();
            monitor = Monitor::new(config);
            monitor.restore(serde_json::from_str(&json).unwrap());
            let Verdict { improved, stop } = monitor.end_epoch(epoch, metric);
            verdicts.push((improved, stop));
        }
        (verdicts, monitor.state().clone())
    };
    let (verdicts, state) = run(&config, &[f64::NAN, 1.0, 0.95, 0.8, 0.75, 0.9]);
    let (bad, good, stop) = ((false, false), (true, false), (false, true));
    assert_eq!(verdicts, [bad, good, bad, good, bad, stop]);
    assert_eq!(state, MonitorState { best: Some(0.8), best_epoch: Some(3), bad_epochs: 2 });
    let up = TrainConfig { monitor_mode: MonitorMode::Max, early_stopping: false, ..config };
    assert_eq!(run(&up, &[0.1, 0.3, 0.2, 0.2, 0.2]).0, [good, good, bad, bad, bad]);
}

/// Rates and momenta of the YOLO package's own loop: `tests/benches/reference/yolo_schedule.py` wrote them down.
#[test]
fn warm_up_within_the_schedule_is_the_yolo_packages() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yolo/schedule.json");
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let batches = file["batches"].as_u64().unwrap();
    for (name, case) in file["cases"].as_object().unwrap() {
        let option = |key: &str, default: f64| case["options"][key].as_f64().unwrap_or(default);
        let cosine = case["options"]["cos_lr"].as_bool().unwrap_or(false);
        let config = TrainConfig {
            scheduler: if cosine { SchedulerKind::Cosine } else { SchedulerKind::Linear },
            schedule_by: ScheduleBy::Epoch,
            learning_rate: option("lr0", 0.01),
            lrf: option("lrf", 0.01),
            num_epochs: option("epochs", 0.0) as usize,
            warmup_epochs: option("warmup_epochs", 3.0),
            warmup_mode: WarmupMode::Within,
            ..TrainConfig::default()
        };
        let schedule = made(&config, batches);
        let moves = case["options"]["optimizer"].is_null();
        let momentum = (option("warmup_momentum", 0.8), option("momentum", 0.937));
        let rows = case["rows"].as_array().unwrap();
        assert_eq!(rows.len() as u64, batches * config.num_epochs as u64, "{name}");
        for (step, row) in (0..).zip(rows) {
            let expected: Vec<f64> = row.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
            let of = |start: f64| {
                schedule.numbers(step, &Course { factor: 1.0, start, momentum: moves.then_some(momentum) })
            };
            let (weight, bias) = (of(0.0), of(option("warmup_bias_lr", 0.1)));
            let own = [weight.lr, weight.lr, bias.lr, weight.momentum.unwrap_or(momentum.1)];
            for (own, expected) in own.iter().zip(&expected) {
                assert!((own - expected).abs() < 1e-9, "{name}, step {step}: {own} against {expected}");
            }
        }
    }
}
