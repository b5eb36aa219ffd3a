//! A look as metrics: `OpenMetrics` 1.0, or Prometheus' older text format, which `node_exporter`'s textfile collector reads.
//!
//! Source: <https://prometheus.io/docs/specs/om/open_metrics_spec/>.

use super::view::Look;
use spec::contract::Level;
use std::fmt::Write;

/// Form of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    OpenMetrics,
    /// Version 0.0.4.
    Prometheus,
}

impl Dialect {
    pub fn content_type(self) -> &'static str {
        match self {
            Dialect::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Dialect::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

struct Page {
    dialect: Dialect,
    text: String,
    /// Labels that every sample has.
    common: String,
}

impl Page {
    /// Writes a family of gauges: labels and values. Families without values are left out.
    fn gauges(&mut self, name: &str, unit: &str, help: &str, values: &[(String, f64)]) {
        self.family(name, "gauge", unit, help, values);
    }

    fn gauge(&mut self, name: &str, unit: &str, help: &str, value: Option<f64>) {
        let values: Vec<_> = value.into_iter().map(|value| (String::new(), value)).collect();
        self.gauges(name, unit, help, &values);
    }

    /// `name` without `_total`.
    fn counter(&mut self, name: &str, help: &str, value: Option<f64>) {
        let values: Vec<_> = value.into_iter().map(|value| (String::new(), value)).collect();
        self.family(name, "counter", "", help, &values);
    }

    fn family(&mut self, name: &str, kind: &str, unit: &str, help: &str, values: &[(String, f64)]) {
        if values.is_empty() {
            return;
        }
        let is_counter = kind == "counter";
        let sample = if is_counter { format!("{name}_total") } else { name.to_owned() };
        // The older format names a counter by its sample.
        let family = if self.dialect == Dialect::Prometheus { &sample } else { name };
        let _ = writeln!(self.text, "# TYPE {family} {kind}");
        if self.dialect == Dialect::OpenMetrics && !unit.is_empty() {
            let _ = writeln!(self.text, "# UNIT {family} {unit}");
        }
        let _ = writeln!(self.text, "# HELP {family} {help}");
        for (labels, value) in values {
            let labels: Vec<&str> =
                [labels.as_str(), &self.common].into_iter().filter(|part| !part.is_empty()).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(self.text, "{sample}{labels} {}", number(*value));
        }
    }
}

fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".into(),
        value if value.is_infinite() => if value > 0.0 { "+Inf" } else { "-Inf" }.into(),
        value => value.to_string(),
    }
}

/// `name="value"`, escaped.
fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// Metrics of one look.
pub fn render(look: &Look, dialect: Dialect) -> String {
    let run = look.run_name.as_deref();
    let common = run.map(|run| label("run", run)).unwrap_or_default();
    let mut page = Page { dialect, text: String::new(), common };
    machine(&mut page, look);
    processes(&mut page, look);
    training(&mut page, look);
    plan(&mut page, look);
    if dialect == Dialect::OpenMetrics {
        page.text.push_str("# EOF\n");
    }
    page.text
}

fn machine(page: &mut Page, look: &Look) {
    let memory = &look.sample.memory;
    let bytes = |bytes: u64| Some(bytes as f64);
    page.gauge("headroom_machine_memory_bytes", "bytes", "Memory of this machine.", bytes(memory.total_bytes));
    page.gauge(
        "headroom_machine_memory_available_bytes",
        "bytes",
        "Memory that programs can have now.",
        bytes(memory.available_bytes),
    );
    if let Some(group) = memory.group {
        page.gauge(
            "headroom_cgroup_memory_used_bytes",
            "bytes",
            "Use of the memory cgroup that binds.",
            bytes(group.used_bytes),
        );
        let limit = group.limit_bytes.map(|limit| limit as f64);
        page.gauge("headroom_cgroup_memory_limit_bytes", "bytes", "Limit of that cgroup.", limit);
    }
    page.counter(
        "headroom_oom_kills",
        "Processes that the kernel killed for memory on this machine.",
        bytes(memory.oom_kills),
    );
    if let Some(pressure) = memory.pressure {
        let values = [("some", pressure.some_avg10), ("full", pressure.full_avg10)];
        let values = values.map(|(kind, percent)| (label("kind", kind), percent / 100.0));
        page.gauges(
            "headroom_memory_pressure_ratio",
            "ratio",
            "Share of the last 10 s spent waiting for memory.",
            &values,
        );
    }
    let gpus = &look.sample.gpus;
    let of = |value: fn(&spec::contract::GpuUse) -> u64| -> Vec<(String, f64)> {
        gpus.iter().map(|gpu| (label("gpu", &gpu.index.to_string()), value(gpu) as f64)).collect()
    };
    page.gauges(
        "headroom_gpu_memory_used_bytes",
        "bytes",
        "Memory of a GPU in use, by all programs.",
        &of(|gpu| gpu.used_bytes),
    );
    page.gauges("headroom_gpu_memory_bytes", "bytes", "Memory of a GPU.", &of(|gpu| gpu.total_bytes));
}

fn processes(page: &mut Page, look: &Look) {
    let mut values = Vec::new();
    for (name, now) in &look.members {
        let process = label("process", name);
        for (kind, bytes) in [("rss", now.rss_bytes), ("pss", now.pss_bytes), ("own", now.own_bytes)] {
            values.push((format!("{process},{}", label("kind", kind)), bytes as f64));
        }
    }
    page.gauges(
        "headroom_process_memory_bytes",
        "bytes",
        "Memory of a process: resident, proportional, and proportional without shared memory.",
        &values,
    );
    let job = look.job_bytes().map(|bytes| bytes as f64);
    page.gauge("headroom_job_memory_bytes", "bytes", "Memory of the whole job, shared pages once.", job);
    let cache = look.run.node.as_ref().map(|node| node.cache_bytes as f64);
    page.gauge("headroom_page_cache_bytes", "bytes", "Memory behind the page cache.", cache);
    let level = look.run.node.as_ref().map(|node| f64::from(node.level as u8));
    let levels = [Level::Normal, Level::Note, Level::Warning, Level::Critical];
    let help = levels.map(|level| format!("{} {level}", level as u8)).join(", ");
    page.gauge("headroom_memory_level", "", &format!("Level of memory use: {help}."), level);
    page.counter("headroom_restarts", "Restarts of the run after failures.", look.restarts.map(|count| count as f64));
}

fn training(page: &mut Page, look: &Look) {
    let Some(metrics) = &look.run.metrics else { return };
    page.gauge("headroom_step", "", "Optimizer steps done.", Some(metrics.step as f64));
    page.gauge("headroom_epoch", "", "Epoch that runs, from 1.", Some(metrics.epoch as f64));
    page.gauge("headroom_loss", "", "Loss of the last step that was recorded.", Some(metrics.loss));
    page.gauge("headroom_learning_rate", "", "Learning rate of that step.", Some(metrics.lr));
    page.gauge(
        "headroom_samples_per_second",
        "",
        "Samples trained on per second, all ranks.",
        Some(metrics.samples_per_s),
    );
    page.gauge("headroom_step_seconds", "seconds", "Time of a step.", Some(metrics.step_s));
    page.gauge("headroom_data_wait_seconds", "seconds", "Time that a step waited for data.", Some(metrics.data_wait_s));
    page.gauge("headroom_cache_hit_ratio", "ratio", "Share of reads served by the page cache.", metrics.cache_hit_rate);
    page.gauge("headroom_last_record_timestamp_seconds", "seconds", "Time of the last record.", Some(metrics.t));
    let task: Vec<_> = metrics.metrics.iter().map(|(name, value)| (label("metric", name), *value)).collect();
    page.gauges("headroom_task_metric", "", "Last values of the task's metrics.", &task);
}

fn plan(page: &mut Page, look: &Look) {
    let Some(plan) = &look.run.plan else { return };
    page.gauge(
        "headroom_budget_bytes",
        "bytes",
        "Memory that the run may use on this node.",
        Some(plan.budget.total_bytes as f64),
    );
    let lines = plan.budget.lines.iter().filter(|line| line.bytes > 0);
    let values: Vec<_> = lines.map(|line| (label("line", line.name.text()), line.bytes as f64)).collect();
    page.gauges("headroom_budget_line_bytes", "bytes", "Lines of the memory plan, all ranks of this node.", &values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::subject::RunNow;
    use crate::watch::ProcessNow;
    use spec::contract::{LineId, MetricsRecord, NodeRecord};
    use spec::plan::{BudgetLine, Plan};

    fn look() -> Look {
        let mut plan = Plan::default();
        plan.budget.total_bytes = 100;
        plan.budget.lines.push(BudgetLine { name: LineId::ModelState, bytes: 7, ..BudgetLine::default() });
        let run = RunNow {
            plan: Some(plan),
            metrics: Some(MetricsRecord { step: 9, loss: f64::NAN, ..MetricsRecord::default() }),
            node: Some(NodeRecord { cache_bytes: 5, level: Level::Warning, ..NodeRecord::default() }),
            ..RunNow::default()
        };
        let members = vec![("rank \"0\"".to_owned(), ProcessNow { rss_bytes: 3, ..ProcessNow::default() })];
        Look { run, members, run_name: Some("night".into()), restarts: Some(2), ..Look::default() }
    }

    /// Every name that the dashboard asks for is one of ours.
    #[test]
    fn the_dashboard_shows_metrics_that_there_are() {
        let dashboard: serde_json::Value = serde_json::from_str(include_str!("grafana.json")).unwrap();
        let source = include_str!("openmetrics.rs");
        let mut seen = 0;
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap();
                let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                for name in words.filter(|word| word.starts_with("headroom_")) {
                    let family = name.trim_end_matches("_total");
                    assert!(source.contains(&format!("\"{family}\"")), "{name}");
                    seen += 1;
                }
            }
        }
        assert!(seen > 15, "{seen}");
    }

    #[test]
    fn counters_and_units_follow_each_dialect() {
        let text = render(&look(), Dialect::OpenMetrics);
        for line in [
            "# TYPE headroom_restarts counter\n",
            "headroom_restarts_total{run=\"night\"} 2\n",
            "# UNIT headroom_budget_line_bytes bytes\n",
            "headroom_budget_line_bytes{line=\"model state\",run=\"night\"} 7\n",
            "headroom_loss{run=\"night\"} NaN\n",
            "headroom_memory_level{run=\"night\"} 2\n",
            "headroom_process_memory_bytes{process=\"rank \\\"0\\\"\",kind=\"rss\",run=\"night\"} 3\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        let old = render(&look(), Dialect::Prometheus);
        assert!(
            old.contains("# TYPE headroom_restarts_total counter\n") && !old.contains("# UNIT") && !old.contains("EOF")
        );
        let machine = render(&Look::default(), Dialect::OpenMetrics);
        assert!(!machine.contains("headroom_step") && machine.contains("headroom_machine_memory_bytes 0"));
    }
}
