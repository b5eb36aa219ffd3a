//! `throughput.png`: samples per second, and what part of a step waited for data.

use super::draw::{self, Curve, Panel};
use super::{History, PlotError, each_metrics, make_dir};
use std::path::Path;

/// Draws `throughput.png` below `dir` from `metrics.jsonl`: samples/s of all ranks, and `data_wait_s / step_s` in percent.
///
/// # Errors
/// The metrics cannot be read, or the file cannot be written.
pub fn plot_throughput(metrics: &Path, dir: &Path, run: &str) -> Result<(), PlotError> {
    let (mut rate, mut wait, mut hits) = (History::default(), History::default(), History::default());
    each_metrics(metrics, |record| {
        let step = record.step as f64;
        rate.add(step, record.samples_per_s);
        if record.step_s > 0.0 {
            wait.add(step, 100.0 * record.data_wait_s / record.step_s);
        }
        if let Some(rate) = record.cache_hit_rate {
            hits.add(step, 100.0 * rate);
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
