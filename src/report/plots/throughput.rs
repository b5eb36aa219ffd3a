//! `throughput.png`: samples per second, and what part of a step waited for data.

use super::draw::{self, Curve, Panel};
use super::{History, PlotError, make_dir};
use crate::report::records::for_each_metrics;
use std::path::Path;

/// Draws `throughput.png` below `dir` from `metrics.jsonl`: samples/s of all ranks, and `data_wait_s / step_s` in percent.
///
/// # Errors
/// The metrics cannot be read, or the file cannot be written.
pub fn plot_throughput(metrics: &Path, dir: &Path, run: &str) -> Result<(), PlotError> {
    let (mut rate, mut wait, mut hits) = (History::default(), History::default(), History::default());
    for_each_metrics(metrics, |record| {
        let of = |name: &str| record.get(name).copied();
        let Some(step) = of("step") else { return };
        if let Some(value) = of("samples_per_s") {
            rate.add(step, value);
        }
        if let (Some(waited), Some(took)) = (of("data_wait_s"), of("step_s").filter(|s| *s > 0.0)) {
            wait.add(step, 100.0 * waited / took);
        }
        if let Some(value) = of("cache_hit_rate") {
            hits.add(step, 100.0 * value);
        }
    })?;
    let shares = vec![Curve::line("waiting for data, % of the step", wait, 1), Curve::line("cache hits, %", hits, 2)];
    let panels = [
        Panel::new(format!("{run}: throughput"), "step", "samples/s".into(), vec![Curve::line("all ranks", rate, 0)]),
        Panel::new(format!("{run}: loading"), "step", "%".into(), shares),
    ];
    make_dir(dir)?;
    draw::figure(&dir.join("throughput.png"), &panels)
}
