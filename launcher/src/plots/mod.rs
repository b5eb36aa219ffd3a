//! Figures of a run as PNG, drawn from its records with a font that the program brings along.
//!
//! Figures are drawn in a process of their own (`launch plot`): the launcher that supervises a run stays small.

mod axis;
mod draw;
mod memory;
mod throughput;

pub use memory::{plot_any, plot_memory};
pub use throughput::plot_throughput;

use crate::advise::{self, each_record};
use draw::{Curve, Panel};
use spec::contract::{MetricsRecord, Summary};
use spec::job::Job;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Points that a curve keeps in memory; beyond twice as many, every other one goes.
const POINTS: usize = 4096;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    #[error("{path}: cannot be read", path = path.display())]
    Records { path: PathBuf, source: io::Error },
    #[error("{path}: no figure: {problem}", path = path.display())]
    Draw { path: PathBuf, problem: String },
    #[error("{path}: {problem}; expected a run's folder or a monitor's JSON log", path = path.display())]
    Unreadable { path: PathBuf, problem: String },
    #[error(transparent)]
    Log(#[from] advise::LogError),
}

/// One value over the steps, thinned to at most `2 × POINTS` points.
#[derive(Clone, Debug, Default)]
struct History {
    points: Vec<(f64, f64)>,
    /// Values seen but not finite.
    lost: u64,
    /// Every how many values one is taken.
    stride: u64,
    seen: u64,
}

impl History {
    fn add(&mut self, step: f64, value: f64) {
        if !value.is_finite() {
            self.lost += 1;
            return;
        }
        self.stride = self.stride.max(1);
        if self.seen.is_multiple_of(self.stride) {
            self.points.push((step, value));
        } else if let Some(last) = self.points.last_mut()
            && value.abs() > 4.0 * last.1.abs()
        {
            // A spike must not vanish between two kept points.
            *last = (step, value);
        }
        self.seen += 1;
        if self.points.len() > 2 * POINTS {
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.stride *= 2;
        }
    }
}

/// Draws all figures of a run's folder into `plots/` there, by its `summary.json`, its records, and `job` or else its `job.json`.
///
/// # Errors
/// It is not a run's folder, or a file cannot be read or written.
pub fn plot_folder(run_dir: &Path, job: Option<&Path>) -> Result<(), PlotError> {
    let unreadable = |problem: &str| PlotError::Unreadable { path: run_dir.to_owned(), problem: problem.into() };
    let job = job.map_or_else(|| run_dir.join("job.json"), Path::to_owned);
    let job: Job = advise::json(&job).ok_or_else(|| unreadable("its job.json cannot be read"))?;
    let summary: Summary = advise::json(&run_dir.join("summary.json")).unwrap_or_default();
    let (records, plots) = (run_dir.join("metrics.jsonl"), run_dir.join("plots"));
    let name = run_dir.file_name().map_or_else(|| job.config.name.clone(), |name| name.to_string_lossy().into_owned());
    let metric = &plotted(&job.config.train.monitor_metric, &summary.headline);
    plot_run(&records, &plots, &name, metric, unit(metric))?;
    plot_throughput(&records, &plots, &name)?;
    plot_memory(run_dir, &plots.join("memory.png"), &name, &job.plan)
}

/// The metric with a figure to itself: the monitored one, or, since the loss has its figure anyway, the task's first.
fn plotted(monitor: &str, headline: &[String]) -> String {
    let of_task = || headline.iter().filter_map(|name| name.split_once('.')).find(|(_, name)| *name != "loss");
    match monitor {
        "val.loss" => of_task().map_or_else(|| monitor.to_owned(), |(_, name)| format!("val.{name}")),
        other => other.to_owned(),
    }
}

/// Unit of a metric, from the ending of its name.
fn unit(metric: &str) -> &'static str {
    match metric {
        name if name.contains("_deg") => "degrees",
        name if name.ends_with("_rad") => "radians",
        name if name.contains("psnr") => "dB",
        _ => "",
    }
}

/// Calls `each` with every record of a metrics file.
fn each_metrics(path: &Path, each: impl FnMut(MetricsRecord)) -> Result<(), PlotError> {
    each_record(path, each).map_err(|source| PlotError::Records { path: path.to_owned(), source })
}

/// The value of a record that has this name in the file.
fn value(record: &MetricsRecord, name: &str) -> Option<f64> {
    match name {
        "loss" => Some(record.loss),
        "lr" => Some(record.lr),
        _ => record.metrics.get(name).copied(),
    }
}

/// Draws `loss.png` (training and validation loss) and `metrics.png` (one validation metric with its
/// training counterpart, and the learning rate) below `dir`. `monitor`: the metric's full name, e.g. `val.mae_deg`; `unit`: e.g. `degrees`, may be empty.
/// Values that are not finite are left out and counted in the figure.
///
/// # Errors
/// The metrics cannot be read, or a file cannot be written.
pub fn plot_run(metrics: &Path, dir: &Path, run: &str, monitor: &str, unit: &str) -> Result<(), PlotError> {
    let in_training = &monitor.replacen("val.", "train.", 1);
    let mut names: BTreeMap<&str, History> =
        ["loss", "val.loss", "lr", monitor, in_training].into_iter().map(|name| (name, History::default())).collect();
    each_metrics(metrics, |record| {
        for (name, history) in &mut names {
            if let Some(value) = value(&record, name) {
                history.add(record.step as f64, value);
            }
        }
    })?;
    let mut take = |name: &str| names.remove(name).unwrap_or_default();
    let validation = take("val.loss");
    let monitored = if monitor == "val.loss" { validation.clone() } else { take(monitor) };
    let mut curves = vec![Curve::dots(monitor, monitored, 1)];
    if in_training != monitor {
        curves.insert(0, Curve::line(in_training, take(in_training), 0));
    }
    let loss = vec![Curve::line("train", take("loss"), 0), Curve::dots("validation", validation, 1)];
    let loss = [Panel::new(format!("{run}: loss"), "step", "loss".into(), loss).log()];
    let value = if unit.is_empty() { monitor.to_owned() } else { format!("{monitor} [{unit}]") };
    let rate = vec![Curve::line("lr", take("lr"), 2)];
    let metrics = [
        Panel::new(format!("{run}: {monitor}"), "step", value, curves).log(),
        Panel::new(format!("{run}: learning rate"), "step", "learning rate".into(), rate),
    ];
    make_dir(dir)?;
    draw::figure(&dir.join("loss.png"), &loss)?;
    draw::figure(&dir.join("metrics.png"), &metrics)
}

fn make_dir(dir: &Path) -> Result<(), PlotError> {
    std::fs::create_dir_all(dir).map_err(|e| PlotError::Draw { path: dir.to_owned(), problem: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::MetricsRecord;

    /// Where HEADROOM_KEEP_PLOTS says, so that a person can look; else a folder that goes away.
    fn draw(name: &str, values: impl Iterator<Item = (u64, f64, Option<f64>)>) {
        let temporary = tempfile::tempdir().unwrap();
        let root = std::env::var_os("HEADROOM_KEEP_PLOTS").map_or(temporary.path().to_owned(), PathBuf::from);
        let dir = root.join(name);
        let metrics = temporary.path().join("metrics.jsonl");
        let mut lines = String::new();
        for (step, loss, val) in values {
            let lr = 5e-4 * (1.0 + (step as f64 / 800.0).cos()) / 2.0;
            let mut record = MetricsRecord { step, loss, lr, ..Default::default() };
            record.metrics.extend(val.map(|v| ("val.loss".into(), v)));
            record.metrics.extend(val.map(|v| ("val.mae_deg".into(), 30.0 * v)));
            // As on a device: a record with an object in it.
            record.input = Some(Default::default());
            lines += &(serde_json::to_string(&record).unwrap() + "\n");
        }
        std::fs::write(&metrics, lines).unwrap();
        plot_run(&metrics, &dir, "quick_demo", "val.mae_deg", "degrees").unwrap();
        for file in ["loss.png", "metrics.png"] {
            let bytes = std::fs::read(dir.join(file)).unwrap();
            assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 2000, "{file}: {} bytes", bytes.len());
        }
    }

    fn noisy(step: u64) -> f64 {
        0.2 + 0.8 * (-(step as f64) / 700.0).exp() + 0.03 * ((step * 7919 % 101) as f64 / 101.0)
    }

    #[test]
    fn any_history_gives_figures() {
        draw("usual", (1..=240).map(|i| (10 * i, noisy(10 * i), (i % 24 == 0).then(|| 0.05 + noisy(10 * i)))));
        draw("one_point", [(10, 0.5, Some(0.6))].into_iter());
        draw("nothing", std::iter::empty());
        draw("nan", (1..50).map(|i| (i, if i % 7 == 0 { f64::NAN } else { 1.0 / i as f64 }, None)));
        draw("huge", (1..60).map(|i| (i, 1e6 * (-(i as f64) / 3.0).exp(), Some(1e-30))));
        draw("many", (1..50_000).map(|i| (i, noisy(i / 20), (i % 5000 == 0).then(|| noisy(i / 20)))));
    }

    #[test]
    fn records_of_a_device_and_values_that_are_no_numbers_are_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let record = MetricsRecord { step: 3, loss: f64::NAN, input: Some(Default::default()), ..Default::default() };
        std::fs::write(&path, serde_json::to_string(&record).unwrap() + "\n{\"step\":").unwrap();
        let mut seen = Vec::new();
        each_metrics(&path, |record| seen.push((record.step, value(&record, "loss").unwrap().is_nan()))).unwrap();
        assert_eq!(seen, [(3, true)]);
        let missing = each_metrics(&dir.path().join("none.jsonl"), |_| ()).unwrap_err().to_string();
        assert!(missing.contains("none.jsonl"), "{missing}");
    }

    #[test]
    fn memory_is_bounded_and_a_spike_stays() {
        let mut history = History::default();
        (0..100_000u32).for_each(|i| history.add(f64::from(i), if i == 77_777 { 50.0 } else { 1.0 }));
        assert!(history.points.len() <= 2 * POINTS);
        assert!(history.points.iter().any(|p| p.1 == 50.0));
    }
}
