//! Before training, on a machine that is rather full already: the second guide's smaller settings. Pure.

use super::words;
use spec::config::{CachePolicy, Config};
use spec::contract::{CacheMode, Gpu, Machine};
use spec::plan::Plan;

/// Percent above which settings are made smaller, of memory and of each device. Source: the guide's own number.
const FULL_PERCENT: f64 = 80.0;
/// Loader threads and epochs between checkpoints then: at most, and at least.
const MOST_WORKERS: usize = 2;
const LEAST_SAVE_EVERY: u64 = 20;

/// How full memory is before the job takes any of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Before {
    /// Bytes that can still be had.
    pub available_bytes: u64,
    /// Use of physical memory or of the cgroup's limit, whichever is fuller.
    pub percent: f64,
    /// Use of the fullest device. `None` means that no device is used.
    pub gpu_percent: Option<f64>,
}

impl Before {
    /// `None`: the machine does not say.
    pub fn of(machine: &Machine, plan: &Plan) -> Option<Self> {
        let percent = |used: u64, total: u64| if total == 0 { 0.0 } else { 100.0 * used as f64 / total as f64 };
        let (total, available) = (machine.memory_total_bytes, machine.memory_available_bytes);
        (total > 0).then_some(())?;
        let group = machine.cgroup_limit_bytes.zip(machine.cgroup_used_bytes);
        let used = plan.budget.gpu.as_ref().map(|_| {
            let share = |gpu: &Gpu| {
                percent(gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes), gpu.memory_total_bytes)
            };
            machine.gpus.iter().map(share).fold(0.0, f64::max)
        });
        Some(Self {
            available_bytes: available.min(machine.cgroup_room_bytes.unwrap_or(u64::MAX)),
            percent: percent(total.saturating_sub(available), total)
                .max(group.map_or(0.0, |(limit, used)| percent(used, limit))),
            gpu_percent: used,
        })
    }

    fn fullest(&self) -> f64 {
        self.percent.max(self.gpu_percent.unwrap_or(0.0))
    }
}

/// Smaller settings to begin with where memory is fuller than 80 %: half the batch per pass (the accumulation doubles,
/// so that the global batch stays), at most two loader threads, no cache, fewer checkpoints, no plots. The second value
/// is the line that announces them. `None` means that there is room, `watch.ease` is off, or the settings are that
/// small already.
pub fn ease(config: &Config, plan: &Plan, before: &Before) -> Option<(Config, String)> {
    let watch = &config.watch;
    if !(watch.enabled && watch.ease && before.fullest() > FULL_PERCENT) {
        return None;
    }
    let mut eased = config.clone();
    let mut changes = Vec::new();
    let mut change = |key: &str, from: String, to: String| {
        if from != to {
            changes.push(format!("{key}: {from} → {to}"));
        }
    };
    let micro_batch = (plan.batch.micro_batch / 2).max(1);
    eased.train.microbatch = Some(micro_batch);
    change("train.microbatch", plan.batch.micro_batch.to_string(), micro_batch.to_string());
    let workers = plan.loader.threads.min(MOST_WORKERS);
    eased.train.num_workers = Some(workers);
    change("train.num_workers", plan.loader.threads.to_string(), workers.to_string());
    if config.data.cache != CachePolicy::Off {
        eased.data.cache = CachePolicy::Off;
        change("data.cache", plan.budget.cache_policy.to_string(), CacheMode::Off.to_string());
    }
    if config.log.save_every > 0 {
        eased.log.save_every = config.log.save_every.max(LEAST_SAVE_EVERY);
        change("log.save_every", config.log.save_every.to_string(), eased.log.save_every.to_string());
    }
    if config.log.keep_every > 0 {
        eased.log.keep_every = config.log.keep_every.max(LEAST_SAVE_EVERY);
        change("log.keep_every", config.log.keep_every.to_string(), eased.log.keep_every.to_string());
    }
    eased.log.plots = false;
    change("log.plots", config.log.plots.to_string(), "false".into());
    let line = words::eased(config.log.language, before.fullest(), &changes.join(", "));
    (!changes.is_empty()).then_some((eased, line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::config::Language;

    fn full(percent: f64) -> Before {
        Before { percent, ..Before::default() }
    }

    fn planned(micro_batch: usize, threads: usize) -> Plan {
        let mut plan = Plan::default();
        (plan.batch.micro_batch, plan.loader.threads) = (micro_batch, threads);
        plan.budget.cache_policy = CacheMode::Pin;
        plan
    }

    #[test]
    fn checklist_58_above_eighty_percent_the_guides_table_holds() {
        // Batch per pass, workers, save_every: before and after.
        for (batch, workers, save_every, expected) in
            [(64, 8, 5, (32, 2, 20)), (16, 1, 50, (8, 1, 50)), (1, 0, 0, (1, 0, 0)), (7, 2, 20, (3, 2, 20))]
        {
            let mut config = Config::default();
            (config.log.save_every, config.log.keep_every) = (save_every, save_every);
            let plan = planned(batch, workers);
            assert_eq!(ease(&config, &plan, &full(80.0)), None, "80 % is not above 80 %");
            for before in [full(80.1), Before { gpu_percent: Some(95.0), ..full(10.0) }] {
                let (eased, _) = ease(&config, &plan, &before).unwrap();
                let found = (eased.train.microbatch.unwrap(), eased.train.num_workers.unwrap(), eased.log.save_every);
                assert_eq!(found, expected);
                assert_eq!(
                    (eased.data.cache, eased.log.plots, eased.log.keep_every),
                    (CachePolicy::Off, false, expected.2)
                );
                assert_eq!(eased.train.batch_size, config.train.batch_size, "the global batch stays");
            }
        }
    }

    #[test]
    fn the_change_is_printed_and_can_be_turned_off() {
        let (mut config, plan) = (Config::default(), planned(64, 4));
        config.log.save_every = 5;
        let (eased, line) = ease(&config, &plan, &full(83.24)).unwrap();
        let changes = "train.microbatch: 64 → 32, train.num_workers: 4 → 2, data.cache: pin → off, log.save_every: 5 → 20, \
                       log.plots: true → false";
        assert_eq!(line, format!("memory is 83.2% full before training, smaller from the start: {changes}"));
        config.log.language = Language::Zh;
        let zh = ease(&config, &plan, &full(83.24)).unwrap().1;
        assert_eq!(zh, format!("训练前内存使用率 {:.1}%，已自动优化配置: {changes}", 83.2));
        assert_eq!(ease(&eased, &planned(1, 2), &full(99.0)), None, "nothing is left to change");
        config.watch.ease = false;
        assert_eq!(ease(&config, &plan, &full(99.0)), None);
    }

    #[test]
    fn the_fuller_of_machine_and_cgroup_counts() {
        let mut machine =
            Machine { memory_total_bytes: 100 << 30, memory_available_bytes: 60 << 30, ..Machine::default() };
        let before = Before::of(&machine, &Plan::default()).unwrap();
        assert_eq!((before.percent, before.available_bytes, before.gpu_percent), (40.0, 60 << 30, None));
        (machine.cgroup_limit_bytes, machine.cgroup_used_bytes) = (Some(8 << 30), Some(6 << 30));
        machine.cgroup_room_bytes = Some(2 << 30);
        let before = Before::of(&machine, &Plan::default()).unwrap();
        assert_eq!((before.percent, before.available_bytes), (75.0, 2 << 30));
        assert_eq!(Before::of(&Machine::default(), &Plan::default()), None);
    }
}
