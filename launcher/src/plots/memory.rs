//! `memory.png`: what each rank holds for itself, stacked on the page cache, under the budget.

use super::draw::{self, Curve, Panel};
use super::{History, PlotError, make_dir};
use crate::advise::{MonitorSample, Run, each_record, forwards, starts};
use spec::contract::{MemoryRecord, NodeRecord, Phase};
use spec::plan::Plan;
use std::collections::BTreeMap;
use std::path::Path;

const GIB: f64 = (1u64 << 30) as f64;
/// Ranks with an area of their own; the rest of many are one area.
const OWN_AREAS: usize = 6;
/// Steps of the common clock that the ranks' samples are put on.
const MOMENTS: usize = 1000;

/// A last record stands for the moments until all ranks have ended, seconds.
const HOLD_S: f64 = 2.0;

/// (seconds since the Unix epoch, bytes).
type Points = Vec<(f64, f64)>;

/// One rank's records.
#[derive(Clone, Debug, Default)]
struct RankSeries {
    uss: Points,
    cache: Points,
    /// Where its processes begin in the others.
    starts: Vec<usize>,
}

/// The launcher's records.
#[derive(Clone, Debug, Default)]
struct NodeSeries {
    cache: Points,
    /// When something was said or done.
    events: Vec<f64>,
}

/// Draws `from` into `out`: a run's folder as [`plot_memory`] does, a monitor's log as [`plot_monitor`].
///
/// # Errors
/// `from` is neither, or the file cannot be written.
pub fn plot_any(from: &Path, out: &Path) -> Result<(), PlotError> {
    let fail = |problem: String| PlotError::Unreadable { path: from.to_owned(), problem };
    let name = spec::contract::shown(from.file_stem().unwrap_or_default());
    if from.is_dir() {
        let text = std::fs::read(from.join("plan.json")).map_err(|e| fail(format!("plan.json: {e}")))?;
        let plan = serde_json::from_slice(&text).map_err(|e| fail(format!("plan.json: {e}")))?;
        return plot_memory(from, out, &name, &plan);
    }
    plot_monitor(&Run::read(from, Path::new(""))?.monitor, out, &name)
}

/// Draws a monitor's samples: memory of the machine, of what is watched beside it and once more by itself, GPU memory where
/// there is one. Dashed lines are the guides' levels.
///
/// # Errors
/// The file cannot be written.
pub fn plot_monitor(samples: &[MonitorSample], out: &Path, name: &str) -> Result<(), PlotError> {
    // The guide's axis is minutes; a short watch would have one tick there.
    let minutes = samples.last().is_some_and(|last| last.elapsed_time > 300.0);
    let (unit, x) = if minutes { (60.0, "minutes") } else { (1.0, "seconds") };
    let history = |value: &dyn Fn(&MonitorSample) -> Option<f64>| {
        let mut history = History::default();
        samples.iter().filter_map(|s| Some((s.elapsed_time / unit, value(s)?))).for_each(|(t, v)| history.add(t, v));
        history
    };
    let levels = |total: f64, percents: [u32; 3]| -> Vec<(String, f64)> {
        percents.map(|percent| (format!("{percent} %"), total * f64::from(percent) / 100.0)).into()
    };
    let largest = |value: &dyn Fn(&MonitorSample) -> f64| samples.iter().map(value).fold(0.0, f64::max);
    let total = largest(&|s| s.ram_total_gb);
    let curves = vec![
        Curve::area("machine", history(&|s| Some(s.ram_used_gb)), 0),
        Curve::area("watched", history(&|s| s.job_gb), 1),
    ];
    let mut panels = vec![Panel::new(format!("{name}: RAM, {total:.1} GiB"), x, "GiB".into(), curves)];
    panels[0].limits = if total > 0.0 { levels(total, [70, 80, 90]) } else { Vec::new() };
    // On the machine's axis a small program is a flat line.
    let most = largest(&|s| s.job_gb.unwrap_or(0.0));
    if most > 0.0 {
        let (scale, unit) = if most < 1.0 { (1024.0, "MiB") } else { (1.0, "GiB") };
        let curve = Curve::area("watched", history(&|s| Some(s.job_gb? * scale)), 1);
        let title = format!("{name}: what is watched, peak {:.1} {unit}", most * scale);
        panels.push(Panel::new(title, x, unit.into(), vec![curve]));
    }
    let gpu = largest(&|s| s.gpu_total_gb.unwrap_or(0.0));
    if gpu > 0.0 {
        let curve = Curve::area("used", history(&|s| s.gpu_reserved_gb), 2);
        let panel = Panel::new(format!("{name}: GPU, {gpu:.1} GiB"), x, "GiB".into(), vec![curve]);
        panels.push(Panel { limits: levels(gpu, [80, 90, 95]), ..panel });
    }
    make_dir(out.parent().unwrap_or(Path::new("")))?;
    draw::figure(out, &panels)
}

/// Draws the `memory.rank<R>.jsonl` files of `run_dir` into `out`. Unique bytes of each rank are stacked on the page
/// cache, which all share; dashed lines are the plan's sum and the node's budget; numbered lines are the events of
/// `memory.node.jsonl`, with numbers and on a clock as in `launch analyze`. Where no rank was alive nothing is drawn.
///
/// # Errors
/// The file cannot be written. Records that cannot be read are left out.
pub fn plot_memory(run_dir: &Path, out: &Path, run: &str, plan: &Plan) -> Result<(), PlotError> {
    let (mut node, events) = read_node(run_dir);
    let mut ranks: Vec<RankSeries> = (0..plan.topology.world_size).map(|rank| read(run_dir, rank)).collect();
    set_forwards(&mut ranks, &mut node);
    node.events = events.iter().filter_map(|index| Some(node.cache.get(*index)?.0)).collect();
    let all = || ranks.iter().map(|rank| &rank.uss).chain([&node.cache]);
    let began = all().flat_map(|points| points.first()).map(|p| p.0).fold(f64::INFINITY, f64::min);
    let ended = all().flat_map(|points| points.last()).map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    let planned = [("planned", plan.budget.need_bytes()), ("budget", plan.budget.total_bytes)];
    let limits =
        planned.into_iter().filter(|limit| limit.1 > 0).map(|(name, bytes)| named_limit(name, bytes)).collect();
    let mut panel = Panel::new(
        format!("{run}: memory of the node"),
        if node.events.is_empty() {
            "seconds since the start"
        } else {
            "seconds since the start; `launch analyze RUN` tells what the numbers are"
        },
        "GiB".into(),
        areas(&ranks, &node, began, ended),
    );
    // A plan far above what is used would press the areas into a line: then its name and number say enough.
    let top = panel.curves.first().map_or(0.0, Curve::highest);
    (panel.limits, panel.title) = readable(limits, top, panel.title);
    panel.marks = node.events.iter().map(|t| t - began).collect();
    make_dir(out.parent().unwrap_or(Path::new("")))?;
    draw::figure(out, &[panel])
}

/// In case the clock was set back.
fn set_forwards(ranks: &mut [RankSeries], node: &mut NodeSeries) {
    fn times(points: &mut Points) -> Vec<&mut f64> {
        points.iter_mut().map(|point| &mut point.0).collect()
    }
    let mut files: Vec<Vec<&mut f64>> =
        ranks.iter_mut().flat_map(|rank| [times(&mut rank.uss), times(&mut rank.cache)]).collect();
    files.push(times(&mut node.cache));
    forwards(&mut files);
}

/// The launcher's records, without the times of events, and which records are events.
fn read_node(run_dir: &Path) -> (NodeSeries, Vec<usize>) {
    let (mut series, mut events) = (NodeSeries::default(), Vec::new());
    // Without the launcher's records there is a figure as well.
    let _ = each_record(&run_dir.join("memory.node.jsonl"), |record: NodeRecord| {
        events.extend(record.event.is_some().then_some(series.cache.len()));
        series.cache.push((record.t, record.cache_bytes as f64));
    });
    (series, events)
}

fn named_limit(name: &str, bytes: u64) -> (String, f64) {
    (format!("{name} {}", spec::plan::bytes_text(bytes)), bytes as f64 / GIB)
}

/// Limits within reach of the axis stay lines; those beyond four times the top go into the title.
fn readable(limits: Vec<(String, f64)>, top: f64, title: String) -> (Vec<(String, f64)>, String) {
    let (near, far): (Vec<_>, Vec<_>) = limits.into_iter().partition(|limit| top <= 0.0 || limit.1 <= 4.0 * top);
    let far: Vec<String> = far.into_iter().map(|limit| limit.0).collect();
    let title = if far.is_empty() { title } else { format!("{title} ({}, above the axis)", far.join(", ")) };
    (near, title)
}

fn read(run_dir: &Path, rank: usize) -> RankSeries {
    let mut series = RankSeries::default();
    let mut starting = Vec::new();
    // A rank without records has no area.
    let _ = each_record(&run_dir.join(format!("memory.rank{rank}.jsonl")), |record: MemoryRecord| {
        series.uss.push((record.t, own_bytes(&record) as f64));
        series.cache.push((record.t, record.cache_bytes as f64));
        starting.push(record.phase == Phase::Start);
    });
    series.starts = starts(starting.into_iter());
    series
}

/// Memory that the rank holds for itself. Pages of the page cache that no other rank has touched yet are unique to it
/// as well, and are drawn with the cache.
fn own_bytes(record: &MemoryRecord) -> u64 {
    match record.anon_bytes + record.file_bytes {
        // Records of earlier versions.
        0 => record.uss_bytes,
        unshared => record.uss_bytes.min(unshared),
    }
}

/// Stacked tops in GiB, the highest first: ranks on each other, all on the page cache.
fn areas(ranks: &[RankSeries], node: &NodeSeries, began: f64, ended: f64) -> Vec<Curve> {
    if began > ended {
        return Vec::new();
    }
    let times: Vec<f64> = moments(began, ended);
    let alive: Vec<Vec<bool>> = ranks.iter().map(|rank| rank.alive(&node.events, &times)).collect();
    let mut tops = cache(ranks, node, &times, &alive);
    let mut stack: BTreeMap<usize, (String, Vec<f64>)> = BTreeMap::new();
    stack.insert(0, ("page cache, shared".into(), tops.clone()));
    for (rank, series) in ranks.iter().enumerate() {
        add(&mut tops, &masked(at_times(&series.uss, &times), &alive[rank]));
        let place = (rank + 1).min(OWN_AREAS);
        let name =
            if rank + 1 > OWN_AREAS { format!("ranks {} to {rank}", OWN_AREAS - 1) } else { format!("rank {rank}") };
        stack.insert(place, (name, tops.clone()));
    }
    let curve = |(place, (name, tops)): (usize, (String, Vec<f64>))| {
        let mut history = History::default();
        times.iter().zip(tops).for_each(|(t, bytes)| history.add(t - began, bytes / GIB));
        // The cache has the green of a thing that all share; ranks take the other colours.
        Curve::area(&name, history, [2, 0, 1, 3, 4, 5, 6][place])
    };
    stack.into_iter().rev().map(curve).collect()
}

/// The page cache by the launcher, who looks most often; without its records the most that a rank knew of. It lives as long
/// as its ranks.
fn cache(ranks: &[RankSeries], node: &NodeSeries, times: &[f64], alive: &[Vec<bool>]) -> Vec<f64> {
    let any: Vec<bool> = (0..times.len()).map(|at| alive.iter().any(|rank| rank[at])).collect();
    if !node.cache.is_empty() {
        return masked(at_times(&node.cache, times), &any);
    }
    ranks.iter().zip(alive).fold(vec![0.0; times.len()], |most, (rank, alive)| {
        most.iter().zip(masked(at_times(&rank.cache, times), alive)).map(|(a, b)| a.max(b)).collect()
    })
}

impl RankSeries {
    /// True at each moment where one of its processes existed: from its first record to a while after its last, for an
    /// earlier process to the event that reports its end.
    fn alive(&self, events: &[f64], times: &[f64]) -> Vec<bool> {
        let ends = self.starts.iter().skip(1).copied().chain([self.uss.len()]);
        let spans = self.starts.iter().zip(ends).filter_map(|(first, end)| {
            let (from, last) = (self.uss.get(*first)?.0, self.uss.get(end.checked_sub(1)?)?.0);
            let told = events.iter().find(|at| end < self.uss.len() && (last..last + HOLD_S).contains(*at));
            Some((from, told.copied().unwrap_or(last + HOLD_S)))
        });
        let spans: Vec<(f64, f64)> = spans.collect();
        times.iter().map(|t| spans.iter().any(|(from, to)| (from..=to).contains(&t))).collect()
    }
}

fn moments(began: f64, ended: f64) -> Vec<f64> {
    (0..MOMENTS).map(|i| began + (ended - began) * i as f64 / (MOMENTS - 1) as f64).collect()
}

/// The last value known at each moment; 0 before the first.
fn at_times(points: &[(f64, f64)], times: &[f64]) -> Vec<f64> {
    let mut next = 0;
    let mut value = 0.0;
    let mut at = |t: f64| {
        while next < points.len() && points[next].0 <= t {
            value = points[next].1;
            next += 1;
        }
        value
    };
    times.iter().map(|t| at(*t)).collect()
}

/// Nothing where nobody is alive.
fn masked(values: Vec<f64>, alive: &[bool]) -> Vec<f64> {
    values.into_iter().zip(alive).map(|(value, alive)| if *alive { value } else { 0.0 }).collect()
}

fn add(tops: &mut [f64], more: &[f64]) {
    tops.iter_mut().zip(more).for_each(|(top, more)| *top += more);
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::Event;

    #[test]
    fn ranks_are_stacked_on_the_cache_at_common_moments() {
        let cache = vec![(0.0, GIB), (2.0, 2.0 * GIB)];
        let series = |uss: &[(f64, f64)]| RankSeries { uss: uss.to_vec(), cache: cache.clone(), starts: vec![0] };
        let ranks = [series(&[(0.0, GIB), (2.0, 3.0 * GIB)]), series(&[(1.0, GIB), (2.0, GIB)])];
        let curves = areas(&ranks, &NodeSeries::default(), 0.0, 2.0);
        let tops: Vec<f64> = curves.iter().map(Curve::highest).collect();
        assert_eq!(tops, [6.0, 5.0, 2.0], "both ranks on the cache, one rank on it, the cache alone");
    }

    #[test]
    fn a_clock_that_was_set_back_leaves_the_picture_in_order() {
        let points = vec![(100.0, GIB), (110.0, GIB), (10.0, 3.0 * GIB), (20.0, GIB)];
        let mut ranks = [RankSeries { uss: points.clone(), cache: points.clone(), starts: vec![0] }];
        let mut node = NodeSeries { cache: points, events: Vec::new() };
        set_forwards(&mut ranks, &mut node);
        let times = |points: &Points| points.iter().map(|point| point.0).collect::<Vec<_>>();
        assert_eq!(times(&ranks[0].uss), [100.0, 110.0, 110.0, 120.0]);
        assert_eq!(times(&node.cache), times(&ranks[0].cache));
    }

    #[test]
    fn between_two_processes_there_is_nothing() {
        let rank = RankSeries {
            uss: vec![(0.0, GIB), (10.0, GIB), (100.0, GIB), (110.0, GIB)],
            cache: vec![(0.0, 0.0); 4],
            starts: vec![0, 2],
        };
        // The launcher sees the cache more often, and begins before its ranks.
        let node = NodeSeries { cache: vec![(-1.0, 0.0), (5.0, 2.0 * GIB), (99.0, GIB)], events: Vec::new() };
        let killed = NodeSeries { events: vec![10.5], ..node.clone() };
        assert_eq!(
            areas(std::slice::from_ref(&rank), &killed, -1.0, 110.0)[0].history.points[112].1,
            0.0,
            "a second after it"
        );
        let curves = areas(&[rank], &node, -1.0, 110.0);
        let at = |curve: &Curve, t: f64| {
            let points = curve.history.points.iter();
            points.rev().find(|point| point.0 - 1.0 <= t).unwrap().1
        };
        let seen = |t: f64| (at(&curves[0], t), at(&curves[1], t));
        assert_eq!([seen(-0.5), seen(2.0), seen(8.0)], [(0.0, 0.0), (1.0, 0.0), (3.0, 2.0)]);
        assert_eq!([seen(11.5), seen(50.0), seen(105.0)], [(3.0, 2.0), (0.0, 0.0), (2.0, 1.0)]);
    }

    #[test]
    fn cache_pages_that_one_rank_alone_has_touched_are_not_counted_twice() {
        let record = |uss_bytes, anon_bytes, file_bytes| MemoryRecord {
            uss_bytes,
            anon_bytes,
            file_bytes,
            ..Default::default()
        };
        assert_eq!(
            [record(300, 100, 50), record(120, 100, 50), record(300, 0, 0)].map(|r| own_bytes(&r)),
            [150, 120, 300]
        );
    }

    #[test]
    fn a_budget_far_above_what_is_used_does_not_flatten_the_picture() {
        let limits: Vec<(String, f64)> =
            vec![("planned 2 GiB".to_string(), 2.0), ("budget 100 GiB".to_string(), 100.0)];
        let (near, title) = readable(limits, 1.5, "run".into());
        assert_eq!(near.len(), 1);
        assert_eq!(title, "run (budget 100 GiB, above the axis)");
    }

    #[test]
    fn a_monitors_log_gives_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let sample = |i: u32| MonitorSample {
            elapsed_time: 5.0 * f64::from(i),
            ram_total_gb: 16.0,
            ram_used_gb: 6.0 + 0.05 * f64::from(i),
            job_gb: Some(2.0 + 0.04 * f64::from(i)),
            gpu_total_gb: Some(80.0),
            gpu_reserved_gb: Some(40.0),
            ..Default::default()
        };
        let samples: Vec<MonitorSample> = (0..100).map(sample).collect();
        let log = dir.path().join("memory_log_20241205_143022.json");
        std::fs::write(&log, serde_json::to_vec(&samples).unwrap()).unwrap();
        let out =
            std::env::var_os("HEADROOM_KEEP_PLOTS").map_or(dir.path().join("new"), Into::into).join("monitor.png");
        plot_any(&log, &out).unwrap();
        assert!(std::fs::read(&out).unwrap().starts_with(b"\x89PNG"));
        assert!(plot_any(&dir.path().join("none.json"), &out).unwrap_err().to_string().contains("none.json"));
    }

    #[test]
    fn any_records_give_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Plan::default();
        plan.topology.world_size = 3;
        plan.budget.total_bytes = 3 << 30;
        plot_memory(dir.path(), &dir.path().join("plots/memory.png"), "empty", &plan).unwrap();
        let record = |t: f64, uss: u64| {
            serde_json::to_string(&MemoryRecord { t, uss_bytes: uss, cache_bytes: 1 << 29, ..Default::default() })
                .unwrap()
        };
        for rank in 0..3u64 {
            let lines: Vec<String> =
                (0..90).map(|i| record(1e9 + i as f64, (200 + 2 * i * (rank + 1)) << 20)).collect();
            std::fs::write(dir.path().join(format!("memory.rank{rank}.jsonl")), lines.join("\n") + "\nbroken").unwrap();
        }
        let keep = std::env::var_os("HEADROOM_KEEP_PLOTS").map_or(dir.path().join("plots"), Into::into);
        let event = |t: f64| NodeRecord { t, event: Some(Event::Continued), ..Default::default() };
        let events = [event(1e9 + 30.0), event(1e9 + 61.5)].map(|e| serde_json::to_string(&e).unwrap());
        std::fs::write(dir.path().join("memory.node.jsonl"), events.join("\n")).unwrap();
        plot_memory(dir.path(), &keep.join("memory.png"), "quick_demo", &plan).unwrap();
        let bytes = std::fs::read(keep.join("memory.png")).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 4000, "{} bytes", bytes.len());
    }
}
