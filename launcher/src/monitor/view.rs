//! Display of the monitor: bars on a terminal, single lines without one. Pure; the output fits the given size.

use super::bar::{Bar, Ink, LABEL, Widths, columns, cut, percent};
use super::subject::RunNow;
use crate::advise::MonitorSample;
use crate::watch::{ProcessNow, Sample, event_text};
use spec::config::Language;
use spec::contract::LineId;
use spec::plan::{Plan, bytes_text};

/// Most processes with a bar of their own.
const MOST_BARS: usize = 16;
/// Most columns of a process's name and number.
const MOST_LABEL: usize = 22;
const HINT: &str = "Ctrl-C ends the monitor; its target keeps running";

/// Kinds of lines, in the order in which they are dropped where rows are few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Launcher,
    More,
    Process,
    Cache,
    Limit,
    Hint,
    Event,
    Training,
    Job,
    Machine,
    Title,
}

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Look {
    pub title: String,
    pub elapsed_s: f64,
    pub sample: Sample,
    /// Label and memory of each process.
    pub members: Vec<(String, ProcessNow)>,
    pub run: RunNow,
    /// Name of the run, where the target is one.
    pub run_name: Option<String>,
    /// Restarts of its ranks so far.
    pub restarts: Option<u64>,
}

impl Look {
    /// Memory of the whole target, shared pages counted once. `None` means that the machine alone is watched.
    pub fn job_bytes(&self) -> Option<u64> {
        let all: u64 = self.members.iter().map(|(_, now)| self.bytes_of(now)).sum();
        (!self.members.is_empty()).then(|| all + self.sample.cache_bytes)
    }

    /// Bytes counted for one process. The page cache and the ranks' shared memory are counted once for the run.
    fn bytes_of(&self, now: &ProcessNow) -> u64 {
        if self.is_run() { now.own_bytes } else { now.pss_bytes }
    }

    fn is_run(&self) -> bool {
        self.run.plan.is_some()
    }

    /// As the log holds it.
    pub fn record(&self, timestamp: String) -> MonitorSample {
        let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let memory = &self.sample.memory;
        let used = memory.total_bytes.saturating_sub(memory.available_bytes);
        let gpu = !self.sample.gpus.is_empty();
        let (gpu_used, gpu_total) =
            self.sample.gpus.iter().fold((0, 0), |sum, gpu| (sum.0 + gpu.used_bytes, sum.1 + gpu.total_bytes));
        MonitorSample {
            ram_used_gb: gb(used),
            ram_total_gb: gb(memory.total_bytes),
            ram_percent: percent(used, memory.total_bytes),
            timestamp: timestamp.into(),
            // From outside a process, allocated and reserved bytes cannot be distinguished.
            gpu_allocated_gb: gpu.then(|| gb(gpu_used)),
            gpu_reserved_gb: gpu.then(|| gb(gpu_used)),
            gpu_total_gb: gpu.then(|| gb(gpu_total)),
            gpu_memory_percent: gpu.then(|| percent(gpu_used, gpu_total)),
            elapsed_time: self.elapsed_s,
            job_gb: self.job_bytes().map(gb),
        }
    }

    /// One line of JSON, for programs.
    pub fn json(&self) -> String {
        let process = |(label, now): &(String, ProcessNow)| {
            serde_json::json!({"process": label, "rss_bytes": now.rss_bytes, "pss_bytes": now.pss_bytes,
                               "own_bytes": now.own_bytes})
        };
        let node = self.run.node.as_ref();
        serde_json::json!({
            "t": self.sample.t,
            "target": self.title,
            "elapsed_s": self.elapsed_s,
            "memory_total_bytes": self.sample.memory.total_bytes,
            "memory_available_bytes": self.sample.memory.available_bytes,
            "job_bytes": self.job_bytes(),
            "processes": self.members.iter().map(process).collect::<Vec<_>>(),
            "gpus": self.sample.gpus,
            "cache_bytes": node.map(|node| node.cache_bytes),
            "level": node.map(|node| node.level),
            "restarts": self.restarts,
            "metrics": self.run.metrics,
        })
        .to_string()
    }

    /// One line, for logs.
    pub fn line(&self) -> String {
        let memory = &self.sample.memory;
        let used = memory.total_bytes.saturating_sub(memory.available_bytes);
        let mut parts = vec![format!(
            "{:>7.1} s  RAM {} of {} ({:.1} %)",
            self.elapsed_s,
            bytes_text(used),
            bytes_text(memory.total_bytes),
            percent(used, memory.total_bytes)
        )];
        parts.extend(self.job_bytes().map(|bytes| format!("{} {}", self.title, bytes_text(bytes))));
        for gpu in &self.sample.gpus {
            let (used, total) = (bytes_text(gpu.used_bytes), bytes_text(gpu.total_bytes));
            parts.push(format!("GPU {} {used} of {total}", gpu.index));
        }
        parts.extend(self.training());
        parts.join(", ")
    }

    /// `step 340, loss 0.1234, 1408 samples/s, data wait 2 %, cache hits 98 %`
    fn training(&self) -> Vec<String> {
        let Some(last) = &self.run.metrics else { return Vec::new() };
        let mut parts = vec![format!("step {}", last.step), format!("loss {:.4}", last.loss)];
        parts.push(format!("{:.0} samples/s", last.samples_per_s));
        if last.step_s > 0.0 {
            parts.push(format!("data wait {:.0} %", 100.0 * last.data_wait_s / last.step_s));
        }
        parts.extend(last.cache_hit_rate.map(|rate| format!("cache hits {:.0} %", 100.0 * rate)));
        parts
    }

    /// At most `height` lines of at most `width` columns; what matters least is left out first. `colour`: escape codes for
    /// bold and red; the default foreground else.
    pub fn screen(&self, width: usize, height: usize, colour: bool) -> Vec<String> {
        let ink = Ink { colour, widths: Widths::of(width, self.label_columns()) };
        let title = cut(&format!("{}, watched for {:.0} s", self.title, self.elapsed_s), width);
        let mut lines = vec![(Kind::Title, ink.bold(&title))];
        let memory = &self.sample.memory;
        let used = memory.total_bytes.saturating_sub(memory.available_bytes);
        lines.push((Kind::Machine, ink.bar(&Bar::new("machine", used, memory.total_bytes, ""))));
        if let Some((group, limit)) = memory.group.and_then(|group| Some((group, group.limit_bytes?))) {
            lines.push((Kind::Limit, ink.bar(&Bar::new("cgroup", group.used_bytes, limit, "limit"))));
        }
        match &self.run.plan {
            Some(plan) => self.bars_of_run(plan, &ink, &mut lines),
            None => self.bars_of_processes(&ink, &mut lines),
        }
        for gpu in &self.sample.gpus {
            let label = format!("GPU {}", gpu.index);
            lines.push((Kind::Limit, ink.bar(&Bar::new(&label, gpu.used_bytes, gpu.total_bytes, ""))));
        }
        if let Some(more) = self.members.len().checked_sub(MOST_BARS).filter(|more| *more > 0) {
            lines.push((Kind::More, cut(&format!("and {more} smaller processes"), width)));
        }
        let training = self.training();
        if !training.is_empty() {
            lines.push((Kind::Training, cut(&training.join(", "), width)));
        }
        if let Some(event) = self.run.node.as_ref().and_then(|node| node.event.as_ref()) {
            // A warning is several lines.
            let text = event_text(self.run.language.unwrap_or(Language::En), event);
            lines.extend(text.lines().map(|line| (Kind::Event, cut(line, width))));
        }
        lines.push((Kind::Hint, cut(HINT, width)));
        fit(lines, height)
    }

    fn bars_of_run(&self, plan: &Plan, ink: &Ink, lines: &mut Vec<(Kind, String)>) {
        if let Some(job) = self.job_bytes() {
            let bar = Bar::new("job", job, plan.budget.total_bytes, "budget");
            lines.push((Kind::Job, ink.bar(&Bar { mark: Some(plan.budget.need_bytes()), ..bar })));
        }
        for (label, now) in self.members.iter().take(MOST_BARS) {
            let (kind, planned) = match label.starts_with("rank ") {
                true => (Kind::Process, plan.rank_bytes()),
                false => (Kind::Launcher, plan.budget.line_bytes(LineId::Launcher)),
            };
            // As full as planned is as it should be.
            let bar = Bar { alarm: Some(100.1), ..Bar::new(label, now.own_bytes, planned, "planned") };
            lines.push((kind, ink.bar(&bar)));
        }
        if plan.budget.page_cache_bytes > 0 {
            let bar = Bar::new("cache", self.sample.cache_bytes, plan.budget.page_cache_bytes, "planned");
            // So is a full cache.
            lines.push((Kind::Cache, ink.bar(&Bar { alarm: None, ..bar })));
        }
    }

    /// All processes beside the machine; then, where there are several, each beside all, the largest first.
    fn bars_of_processes(&self, ink: &Ink, lines: &mut Vec<(Kind, String)>) {
        let Some(all) = self.job_bytes() else { return };
        let first = if let [(label, _)] = &self.members[..] { label } else { "watched" };
        lines.push((Kind::Job, ink.bar(&Bar::new(first, all, self.sample.memory.total_bytes, "machine"))));
        if self.members.len() == 1 {
            return;
        }
        let mut members: Vec<(&String, u64)> =
            self.members.iter().map(|(label, now)| (label, self.bytes_of(now))).collect();
        members.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        for (label, bytes) in members.into_iter().take(MOST_BARS) {
            // A part of the whole is no alarm.
            let bar = Bar { alarm: None, ..Bar::new(label, bytes, all, "watched") };
            lines.push((Kind::Process, ink.bar(&bar)));
        }
    }

    /// Columns that the longest label and a blank take.
    fn label_columns(&self) -> usize {
        let wide = |label: &String| label.chars().map(columns).sum::<usize>() + 1;
        self.members.iter().map(|(label, _)| wide(label)).max().unwrap_or(0).clamp(LABEL, MOST_LABEL)
    }
}

/// Leaves out what matters least, of several alike the last, until `height` lines are left.
fn fit(mut lines: Vec<(Kind, String)>, height: usize) -> Vec<String> {
    while lines.len() > height {
        let least = lines.iter().enumerate().rev().min_by_key(|(_, (kind, _))| *kind);
        let Some(index) = least.map(|(index, _)| index) else { break };
        lines.remove(index);
    }
    lines.into_iter().map(|(_, line)| line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::machine::MemoryNow;
    use spec::contract::{GpuUse, MetricsRecord};
    use spec::plan::BudgetLine;

    fn look(ranks: usize) -> Look {
        let mut plan = Plan::default();
        plan.budget.total_bytes = 18 << 30;
        plan.budget.page_cache_bytes = 100 << 20;
        let line = |bytes: u64, per_rank_bytes| BudgetLine { bytes, per_rank_bytes, ..BudgetLine::default() };
        plan.budget.lines = vec![line(3 << 30, Some(1 << 30)), line(100 << 20, None)];
        let one = |rank: usize| {
            let bytes = (300 << 20) + rank as u64;
            (
                format!("rank {rank}"),
                ProcessNow { pss_bytes: bytes, own_bytes: bytes, uss_bytes: bytes, ..Default::default() },
            )
        };
        let memory = MemoryNow { total_bytes: 24 << 30, available_bytes: 2 << 30, ..Default::default() };
        let gpus = vec![GpuUse { index: 0, used_bytes: 10 << 30, total_bytes: 140 << 30 }];
        let metrics = MetricsRecord {
            step: 340,
            loss: 0.12345,
            samples_per_s: 1408.0,
            step_s: 0.1,
            data_wait_s: 0.002,
            cache_hit_rate: Some(0.98),
            ..Default::default()
        };
        Look {
            title: "run demo".into(),
            elapsed_s: 12.0,
            sample: Sample { memory, cache_bytes: 50 << 20, gpus, ..Default::default() },
            members: (0..ranks).map(one).collect(),
            run: RunNow { plan: Some(plan), metrics: Some(metrics), ..RunNow::default() },
            ..Look::default()
        }
    }

    fn wide(line: &str) -> usize {
        line.chars().map(columns).sum()
    }

    #[test]
    fn every_line_fits_and_bars_stand_below_each_other() {
        for (width, ranks) in [(60, 1), (80, 3), (160, 40)] {
            let lines = look(ranks).screen(width, 100, false);
            assert!(lines.iter().all(|line| wide(line) <= width), "{width}\n{}", lines.join("\n"));
            let bars: Vec<&String> = lines.iter().filter(|line| line.contains(" of ")).collect();
            assert!(bars.iter().all(|line| line.ends_with(" %") && line.chars().count() == bars[0].chars().count()));
            assert_eq!(lines.iter().filter(|line| line.starts_with("rank ")).count(), ranks.min(MOST_BARS));
        }
        let lines = look(3).screen(80, 24, false).join("\n");
        for part in [
            "machine",
            "300.0 MiB of 1.00 GiB planned",
            "50.0 MiB of 100.0 MiB planned",
            "950.0 MiB of 18.00 GiB budget",
            "\nstep 340, loss 0.1235, 1408 samples/s, data wait 2 %, cache hits 98 %\n",
        ] {
            assert!(lines.contains(part), "{part}\n{lines}");
        }
    }

    #[test]
    fn a_small_terminal_gets_short_numbers_and_what_matters_most() {
        let mut look = look(3);
        look.members.push(("launch".into(), ProcessNow { own_bytes: 4 << 20, ..Default::default() }));
        for width in 1..60 {
            let lines = look.screen(width, 24, false);
            assert!(lines.iter().all(|line| wide(line) <= width), "{width}\n{}", lines.join("\n"));
        }
        let lines = look.screen(50, 24, false);
        assert!(lines.iter().any(|line| line.starts_with("rank 0    ███") && line.ends_with("300M/1.0G    29 %")));
        let starts = |lines: &[String]| lines.iter().map(|line| line[..4].to_owned()).collect::<Vec<_>>();
        let all = look.screen(80, 24, false);
        assert_eq!(all.len(), 11, "{all:?}");
        assert!(look.screen(80, 10, false).iter().all(|line| !line.starts_with("launch")));
        assert_eq!(starts(&look.screen(40, 6, false)), ["run ", "mach", "job ", "GPU ", "step", "Ctrl"]);
        assert_eq!(starts(&look.screen(40, 3, false)), ["run ", "mach", "job "]);
        assert_eq!(look.screen(40, 1, false).len(), 1);
    }

    fn processes(megabytes: &[u64]) -> Look {
        let one = |(at, mb): (usize, &u64)| {
            let now = ProcessNow { pss_bytes: *mb << 20, ..Default::default() };
            (format!("worker {}", 4000 + at), now)
        };
        let members = megabytes.iter().enumerate().map(one).collect();
        Look { members, run: RunNow::default(), sample: Sample { cache_bytes: 0, ..look(0).sample }, ..look(0) }
    }

    #[test]
    fn one_process_stands_beside_the_machine_and_is_no_alarm() {
        let lines = processes(&[240]).screen(100, 24, true);
        let of_it: Vec<&String> = lines.iter().filter(|line| line.starts_with("worker 4000")).collect();
        assert!(of_it.len() == 1 && of_it[0].contains("240.0 MiB of 24.00 GiB machine"), "{lines:?}");
        assert!(!of_it[0].contains("\u{1b}[1;31m"), "{lines:?}");
    }

    #[test]
    fn of_many_processes_the_largest_are_shown_with_their_number_below_their_sum() {
        let sizes: Vec<u64> = (1..=20).collect();
        let lines = processes(&sizes).screen(100, 40, false);
        assert!(lines.iter().any(|line| line.starts_with("watched") && line.contains("210.0 MiB of 24.00 GiB")));
        let shown: Vec<&String> = lines.iter().filter(|line| line.starts_with("worker")).collect();
        assert_eq!(shown.len(), MOST_BARS);
        assert!(
            shown[0].starts_with("worker 4019 ") && shown[0].contains("20.0 MiB of 210.0 MiB watched"),
            "{shown:?}"
        );
        assert!(lines.iter().any(|line| line == "and 4 smaller processes"), "{lines:?}");
    }

    #[test]
    fn a_warning_of_several_lines_in_chinese_fits_as_well() {
        let mut look = look(1);
        let event = "🟠 警告: 系统内存 85.1% (20.0GB / 23.5GB)\n   其他程序自启动以来多占用 3.0GB，最大的是 python (pid 4242, 2.9GB)：请关闭它，或降低 memory.budget";
        look.run.node = Some(spec::contract::NodeRecord {
            event: Some(spec::contract::Event::Text { text: event.into() }),
            ..Default::default()
        });
        let lines = look.screen(80, 24, false);
        let [first, second, _] = &lines[lines.len() - 3..] else { panic!("{lines:?}") };
        assert!(first.starts_with("🟠 警告: 系统内存 85.1%") && second.ends_with('…'), "{lines:?}");
        assert!(lines.iter().all(|line| wide(line) <= 80 && !line.contains('\n')), "{lines:?}");
        assert!(wide(second) >= 79, "{second}");
    }

    #[test]
    fn only_bold_and_red_are_used_and_red_only_near_the_limit() {
        let lines = look(1).screen(100, 24, true);
        let red: Vec<&String> = lines.iter().filter(|line| line.contains("\u{1b}[1;31m")).collect();
        assert_eq!(red.len(), 1, "{lines:?}");
        assert!(red[0].starts_with("machine"));
        assert!(lines.iter().all(|line| !line.contains("[33m") && !line.contains("[37m")));
    }

    #[test]
    fn a_look_becomes_the_guides_sample_and_a_line() {
        let sample = look(2).record("2024-12-05T14:30:22".into());
        assert_eq!((sample.ram_total_gb, sample.ram_used_gb, sample.gpu_total_gb), (24.0, 22.0, Some(140.0)));
        assert!(sample.job_gb.unwrap() > 0.6 && sample.ram_percent > 91.0);
        let line = look(2).line();
        assert!(line.contains("RAM 22.00 GiB of 24.00 GiB (91.7 %), run demo 650.0 MiB, GPU 0 10.00 GiB"), "{line}");
    }
}
