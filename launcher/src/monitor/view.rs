//! What the monitor shows: bars on a terminal, one line without. Pure; every line fits the width it is told.

use super::subject::RunNow;
use crate::advise::MonitorSample;
use crate::plan::{Plan, bytes_text};
use crate::watch::{ProcessNow, Sample};

/// Most processes with a bar of their own.
const MOST_BARS: usize = 16;
const LABEL: usize = 10;
/// `  100.0 MiB of 100.0 MiB planned  100.0 %`
const NUMBERS: usize = 44;

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Look {
    pub title: String,
    pub elapsed_s: f64,
    pub sample: Sample,
    /// Label and memory of each process.
    pub members: Vec<(String, ProcessNow)>,
    pub run: RunNow,
}

impl Look {
    /// Memory of all that is watched, shared pages once; absent: the machine alone is watched.
    pub fn job_bytes(&self) -> Option<u64> {
        let own: u64 =
            self.members.iter().map(|(_, now)| if self.is_run() { now.own_bytes } else { now.pss_bytes }).sum();
        (!self.members.is_empty()).then(|| own + self.sample.cache_bytes)
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
            // From outside a process, allocated and reserved cannot be told apart.
            gpu_allocated_gb: gpu.then(|| gb(gpu_used)),
            gpu_reserved_gb: gpu.then(|| gb(gpu_used)),
            gpu_total_gb: gpu.then(|| gb(gpu_total)),
            gpu_memory_percent: gpu.then(|| percent(gpu_used, gpu_total)),
            elapsed_time: self.elapsed_s,
            job_gb: self.job_bytes().map(gb),
        }
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

    /// Lines of a terminal `width` columns wide. `colour`: escape codes for bold and red; the default foreground else.
    pub fn screen(&self, width: usize, colour: bool) -> Vec<String> {
        let width = width.max(60);
        let ink = Ink { colour };
        let mut lines = vec![ink.bold(&cut(&format!("{}, watched for {:.0} s", self.title, self.elapsed_s), width))];
        let memory = &self.sample.memory;
        let used = memory.total_bytes.saturating_sub(memory.available_bytes);
        let mut bar = |label: &str, used, total, mark: Option<u64>, of: &str| {
            lines.push(ink.bar(&Bar { label, used, total, mark, of }, width));
        };
        bar("machine", used, memory.total_bytes, None, "");
        if let Some((group, limit)) = memory.group.and_then(|group| Some((group, group.limit_bytes?))) {
            bar("cgroup", group.used_bytes, limit, None, "");
        }
        if let (Some(plan), Some(job)) = (&self.run.plan, self.job_bytes()) {
            bar("job", job, plan.budget.total_bytes, Some(plan.budget.need_bytes()), "budget");
        }
        let of_rank = self.run.plan.as_ref().map_or(0, rank_bytes);
        let of_launch = self.run.plan.as_ref().map_or(0, launcher_bytes);
        let largest = self.members.iter().map(|(_, now)| now.pss_bytes).max().unwrap_or(0);
        for (label, now) in self.members.iter().take(MOST_BARS) {
            let planned = if label.starts_with("rank ") { of_rank } else { of_launch };
            match (self.is_run(), planned) {
                (true, 1..) => bar(label, now.uss_bytes, planned, None, "planned"),
                _ => bar(label, now.pss_bytes, largest, None, "largest"),
            }
        }
        if let Some(plan) = self.run.plan.as_ref().filter(|plan| plan.budget.page_cache_bytes > 0) {
            bar("cache", self.sample.cache_bytes, plan.budget.page_cache_bytes, None, "planned");
        }
        for gpu in &self.sample.gpus {
            bar(&format!("GPU {}", gpu.index), gpu.used_bytes, gpu.total_bytes, None, "");
        }
        if let Some(more) = self.members.len().checked_sub(MOST_BARS).filter(|more| *more > 0) {
            lines.push(format!("and {more} more processes"));
        }
        let training = self.training();
        if !training.is_empty() {
            lines.push(cut(&training.join(", "), width));
        }
        if let Some(event) = self.run.node.as_ref().and_then(|node| node.event.as_ref()) {
            // A warning is several lines.
            lines.extend(event.lines().map(|line| cut(line, width)));
        }
        lines
    }
}

/// Lines of one rank.
fn rank_bytes(plan: &Plan) -> u64 {
    plan.budget.lines.iter().filter_map(|line| line.per_rank_bytes).sum()
}

fn launcher_bytes(plan: &Plan) -> u64 {
    plan.budget.lines.iter().find(|line| line.name == "launcher").map_or(0, |line| line.bytes)
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// At most `width` columns of `text`.
fn cut(text: &str, width: usize) -> String {
    if text.chars().map(columns).sum::<usize>() <= width {
        return text.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let fits = |c: &char| {
        let fits = columns(*c) <= left;
        left = left.saturating_sub(columns(*c));
        fits
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

/// Columns that a terminal gives a character: two for Chinese and for the levels' marks.
fn columns(c: char) -> usize {
    let wide = matches!(u32::from(c), 0x1100..=0x115F | 0x2E80..=0xA4CF | 0xAC00..=0xD7A3 | 0xF900..=0xFAFF
        | 0xFE30..=0xFE6F | 0xFF00..=0xFF60 | 0xFFE0..=0xFFE6 | 0x1F300..=0x1FAFF);
    1 + usize::from(wide)
}

struct Bar<'a> {
    label: &'a str,
    used: u64,
    total: u64,
    /// Bytes at which a line stands in the bar.
    mark: Option<u64>,
    /// What `total` is, in a word; may be empty.
    of: &'a str,
}

struct Ink {
    colour: bool,
}

impl Ink {
    fn bold(&self, text: &str) -> String {
        if self.colour { format!("\u{1b}[1m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// Label, bar, numbers. Above nine tenths the filled part is red and bold, which is legible on any background.
    fn bar(&self, bar: &Bar, width: usize) -> String {
        let room = width - LABEL - 1 - NUMBERS;
        let cells = |bytes: u64| ((bytes as f64 / bar.total.max(1) as f64).min(1.0) * room as f64).round() as usize;
        let filled = cells(bar.used);
        let mark = bar.mark.map(|bytes| cells(bytes).min(room - 1));
        let cell = |i: usize| match i {
            _ if mark == Some(i) => '│',
            _ if i < filled => '█',
            _ => '·',
        };
        let (full, rest): (String, String) = ((0..filled).map(cell).collect(), (filled..room).map(cell).collect());
        let share = percent(bar.used, bar.total);
        // A full cache is as it should be.
        let full = if self.colour && share >= 90.0 && bar.label != "cache" {
            format!("\u{1b}[1;31m{full}\u{1b}[0m")
        } else {
            full
        };
        let mut numbers = format!("{:>10} of {} {}", bytes_text(bar.used), bytes_text(bar.total), bar.of);
        numbers = format!("{:<36}{share:>5.1} %", numbers.trim_end());
        format!("{:<LABEL$}{full}{rest} {numbers}", cut(bar.label, LABEL - 1)).trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{GpuUse, MetricsRecord};
    use crate::machine::MemoryNow;
    use crate::plan::BudgetLine;

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
            run: RunNow { plan: Some(plan), metrics: Some(metrics), node: None },
        }
    }

    #[test]
    fn every_line_fits_and_bars_stand_below_each_other() {
        for (width, ranks) in [(60, 1), (80, 3), (160, 40)] {
            let lines = look(ranks).screen(width, false);
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{width}\n{}", lines.join("\n"));
            let bars: Vec<&String> = lines.iter().filter(|line| line.contains(" of ")).collect();
            assert!(bars.iter().all(|line| line.ends_with(" %") && line.chars().count() == bars[0].chars().count()));
            assert_eq!(lines.iter().filter(|line| line.starts_with("rank ")).count(), ranks.min(MOST_BARS));
        }
        let lines = look(3).screen(80, false).join("\n");
        for part in [
            "machine",
            "300.0 MiB of 1.00 GiB planned",
            "50.0 MiB of 100.0 MiB planned",
            "950.0 MiB of 18.00 GiB budget",
        ] {
            assert!(lines.contains(part), "{part}\n{lines}");
        }
        assert!(lines.ends_with("step 340, loss 0.1235, 1408 samples/s, data wait 2 %, cache hits 98 %"), "{lines}");
    }

    #[test]
    fn a_warning_of_several_lines_in_chinese_fits_as_well() {
        let mut look = look(1);
        let event = "🟠 警告: 系统内存 85.1% (20.0GB / 23.5GB)\n   其他程序自启动以来多占用 3.0GB，最大的是 python (pid 4242, 2.9GB)：请关闭它，或降低 memory.budget";
        look.run.node = Some(crate::contract::NodeRecord { event: Some(event.into()), ..Default::default() });
        let lines = look.screen(80, false);
        let [first, second] = &lines[lines.len() - 2..] else { panic!("{lines:?}") };
        assert!(first.starts_with("🟠 警告: 系统内存 85.1%") && second.ends_with('…'), "{lines:?}");
        let wide = |line: &String| line.chars().map(columns).sum::<usize>();
        assert!(lines.iter().all(|line| wide(line) <= 80 && !line.contains('\n')), "{lines:?}");
        assert!(wide(second) >= 79, "{second}");
        assert_eq!(cut("内存", 3), "内…");
    }

    #[test]
    fn only_bold_and_red_are_used_and_red_only_near_the_limit() {
        let lines = look(1).screen(100, true);
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
