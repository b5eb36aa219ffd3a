//! Which config fits this machine: the guides' tables, from its memory, cores and GPUs.

use serde::Serialize;
use spec::contract::Machine;
use std::fmt::{self, Display};

const GIB: f64 = (1u64 << 30) as f64;
/// A GPU or a machine sold as "16 GB" reports a little less.
const SOLD_AS: f64 = 0.92;
/// Share of memory above which the guides refuse a cache.
const MOST_CACHE: f64 = 0.5;

/// Training settings that the second guide gives for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceProfile {
    pub device: &'static str,
    pub batch_size: usize,
    pub workers: usize,
    pub cache: bool,
    pub amp: bool,
    pub pin_memory: bool,
}

/// `cpu`, `cuda`.
pub const DEVICE_PROFILES: [DeviceProfile; 2] = [
    DeviceProfile { device: "cpu", batch_size: 4, workers: 2, cache: false, amp: false, pin_memory: false },
    DeviceProfile { device: "cuda", batch_size: 16, workers: 8, cache: true, amp: true, pin_memory: true },
];

/// Recommended settings and the reasons. GB are GiB, as in the guides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation {
    pub memory_gb: f64,
    pub cores: usize,
    pub gpus: usize,
    pub gpu_memory_gb: Option<f64>,
    /// Name in `configs/`.
    pub config: &'static str,
    /// Memory that the guide expects that config to use, GB.
    pub expected_gb: &'static str,
    /// `train.num_workers`, per rank.
    pub num_workers: usize,
    /// `data.cache_size_gb`, from and to. `None` leaves it to the plan.
    pub cache_gb: Option<(f64, f64)>,
    /// Profile of the device: `cpu` or `cuda`.
    pub device: &'static str,
    pub batch_size: usize,
    pub microbatch: Option<usize>,
    pub amp: &'static str,
    pub pin_memory: bool,
    /// For detection.
    pub profile: DeviceProfile,
}

/// The tables' answer for `machine`; pure.
pub fn recommend(machine: &Machine) -> Recommendation {
    let memory_gb = machine.memory_bytes() as f64 / GIB;
    let gpu_memory_gb = machine.gpus.iter().map(|gpu| gpu.memory_total_bytes as f64 / GIB).reduce(f64::min);
    let (config, expected_gb) = by_memory(memory_gb);
    let (batch_size, microbatch, amp) = match gpu_memory_gb {
        Some(gb) => by_gpu(gb),
        None => (4, None, "off"),
    };
    let cuda = gpu_memory_gb.is_some();
    Recommendation {
        memory_gb,
        cores: machine.cores,
        gpus: machine.gpus.len(),
        gpu_memory_gb,
        config,
        expected_gb,
        num_workers: workers(machine.cores, machine.gpus.len()),
        cache_gb: cache(memory_gb),
        device: if cuda { "cuda" } else { "cpu" },
        batch_size,
        microbatch,
        amp,
        pin_memory: cuda,
        profile: DEVICE_PROFILES[usize::from(cuda)],
    }
}

/// The environment matrix of the first guide.
fn by_memory(gb: f64) -> (&'static str, &'static str) {
    match gb / SOLD_AS {
        gb if gb < 8.0 => ("low_memory", "1 to 2"),
        gb if gb <= 16.0 / SOLD_AS => ("default", "2 to 4"),
        _ => ("high_performance", "6 to 8"),
    }
}

/// The cell task's table: batch, micro-batch, mixed precision.
fn by_gpu(gb: f64) -> (usize, Option<usize>, &'static str) {
    match gb / SOLD_AS {
        gb if gb >= 16.0 => (64, Some(16), "off"),
        gb if gb >= 12.0 => (32, Some(8), "off"),
        _ => (16, Some(4), "fp16"),
    }
}

/// The deblurring guide's cache by memory, never above half of it.
fn cache(gb: f64) -> Option<(f64, f64)> {
    let (from, to) = match gb / SOLD_AS {
        gb if gb >= 256.0 => (50.0, 80.0),
        gb if gb >= 128.0 => (20.0, 40.0),
        gb if gb >= 64.0 => (10.0, 20.0),
        _ => return None,
    };
    Some((f64::min(from, gb * MOST_CACHE), f64::min(to, gb * MOST_CACHE)))
}

/// Four per GPU, four to eight for one, at most half of the cores; two without a GPU.
fn workers(cores: usize, gpus: usize) -> usize {
    let half = (cores / 2).max(1);
    match gpus {
        0 => half.min(2),
        1 => half.min(8),
        gpus => (half / gpus).clamp(1, 4),
    }
}

impl Recommendation {
    /// The command line that follows from it.
    pub fn command(&self) -> String {
        let ranks = self.gpus.max(1);
        let mut line = format!("launch --gpus {ranks} --config {}", self.config);
        line += &format!(" --set train.num_workers={}", self.num_workers);
        if self.gpus > 0 && self.amp != "off" {
            line += &format!(" --set train.amp={}", self.amp);
        }
        line
    }
}

impl Display for Recommendation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus = match self.gpu_memory_gb {
            Some(gb) => format!("{} GPU of {gb:.1} GB", self.gpus),
            None => "no GPU".into(),
        };
        writeln!(f, "this machine    {:.1} GB memory, {} cores, {gpus}", self.memory_gb, self.cores)?;
        writeln!(f, "config          {} (the guide expects {} GB)", self.config, self.expected_gb)?;
        writeln!(f, "num_workers     {} per rank (at most half of the cores)", self.num_workers)?;
        match self.cache_gb {
            Some((from, to)) => writeln!(f, "cache_size_gb   {from:.0} to {to:.0}, one for all ranks of the node")?,
            None => writeln!(f, "cache_size_gb   leave it out: the plan gives the page cache what is left")?,
        }
        let micro = self.microbatch.map_or("whole batch".into(), |n| n.to_string());
        writeln!(f, "large models    batch_size {}, microbatch {micro}, amp {}", self.batch_size, self.amp)?;
        let pinned = if self.pin_memory { "on" } else { "off" };
        writeln!(f, "device profile  {}, pin_memory {pinned}", self.device)?;
        write!(f, "\n{}", self.command())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::Gpu;

    fn machine(gb: u64, cores: usize, gpus: &[u64]) -> Machine {
        let gpu = |(index, gb): (usize, &u64)| Gpu {
            index: index as u32,
            memory_total_bytes: gb << 30,
            memory_free_bytes: gb << 30,
            ..Gpu::default()
        };
        let gpus = gpus.iter().enumerate().map(gpu).collect();
        Machine { memory_total_bytes: gb << 30, cores, gpus, ..Machine::default() }
    }

    #[test]
    fn device_profiles_have_the_guides_five_values() {
        let values = DEVICE_PROFILES.map(|p| (p.device, p.batch_size, p.workers, p.cache, p.amp, p.pin_memory));
        let expected = [("cpu", 4, 2, false, false, false), ("cuda", 16, 8, true, true, true)];
        assert_eq!(values, expected);
        assert_eq!(recommend(&Machine::default()).profile, DEVICE_PROFILES[0]);
    }

    #[test]
    fn the_environment_matrix() {
        for (gb, config) in [
            (4, "low_memory"),
            (7, "low_memory"),
            (8, "default"),
            (12, "default"),
            (16, "default"),
            (32, "high_performance"),
            (256, "high_performance"),
        ] {
            assert_eq!(recommend(&machine(gb, 8, &[])).config, config, "{gb} GB");
        }
    }

    #[test]
    fn checklist_67_gpu_memory_gives_the_cell_task_batch_microbatch_and_precision() {
        let of = |gb| {
            let found = recommend(&machine(64, 32, &[gb]));
            (found.batch_size, found.microbatch, found.amp)
        };
        assert_eq!(of(8), (16, Some(4), "fp16"));
        assert_eq!(of(12), (32, Some(8), "off"));
        assert_eq!(of(16), (64, Some(16), "off"));
        assert_eq!(of(80), (64, Some(16), "off"));
    }

    #[test]
    fn cache_size_by_memory_never_above_half() {
        let of = |gb| recommend(&machine(gb, 32, &[])).cache_gb;
        assert_eq!(of(256), Some((50.0, 80.0)));
        assert_eq!(of(128), Some((20.0, 40.0)));
        assert_eq!(of(64), Some((10.0, 20.0)));
        assert_eq!(of(16), None);
        for gb in 1..600 {
            assert!(of(gb).is_none_or(|(from, to)| from <= to && to <= gb as f64 / 2.0), "{gb} GB");
        }
    }

    #[test]
    fn workers_by_gpus_and_cores() {
        let of = |cores, gpus: usize| recommend(&machine(64, cores, &vec![24; gpus])).num_workers;
        assert_eq!((of(64, 3), of(64, 1), of(8, 1), of(4, 3), of(2, 0), of(64, 0)), (4, 8, 4, 1, 1, 2));
    }

    #[test]
    fn the_text_ends_in_a_command() {
        let text = recommend(&machine(24, 2, &[])).to_string();
        assert!(text.ends_with("launch --gpus 1 --config high_performance --set train.num_workers=1"), "{text}");
    }
}
