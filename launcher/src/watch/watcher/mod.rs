//! The watch at work: one thread, one look after the other.

use super::findings::{Findings, Fullest, Moment, Seen};
use super::ladder::{Act, Ladder, View};
use super::leak::Trend;
use super::level::{Gauge, Scale, is_gpu};
use super::records::{Records, record};
use super::sample::{ProcessNow, Sample, Sampler};
use super::words;
use super::{CacheNow, Hands, REQUEST, Told, WatchSpec};
use host::machine::{GpuMeter, MemoryMeter, awake, first_that_catch, largest_other};
use spec::contract::{Cause, Event, Level, LevelChange, Relief, Relieved, Source};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Under pressure looks come so many times as often.
const HURRY: f64 = 5.0;
/// The same line about the same thing comes again after so long at the earliest, seconds.
const REPEAT_S: f64 = 600.0;
/// How long ranks and page cache may take before the bytes are taken as they are, seconds.
const ANSWER_S: f64 = 10.0;
/// Seconds after which ranks that were asked to stop receive a signal.
const STOP_S: f64 = 15.0;
/// A level falls after a share of `watch.recover` without pressure, at most after so long, seconds.
const CALM_SHARE: f64 = 1.0 / 3.0;
const MOST_CALM_S: f64 = 10.0;
/// Samples between two looks at a trend.
const TREND_EVERY: u64 = 16;
/// The fullest sample of so many seconds is kept; a fuller one takes its place from this share on.
const RECENT_S: f64 = 10.0;
const FULLER: f64 = 0.01;

/// A look that comes later than its period by this much was held up by a suspension; longer ones are reported.
const LATE: Duration = Duration::from_secs(1);
const TOLD_S: f64 = 3.0;
/// Request under way.
enum Asked {
    Ranks { order: u64, action: Relief },
    Cache { shrinks: bool },
}

/// An act whose effect is awaited.
struct Pending {
    asked: Asked,
    before_bytes: u64,
    until: f64,
    answers: BTreeMap<u32, Relieved>,
}

/// Watches one attempt at a job.
pub struct Watch<'a> {
    spec: &'a WatchSpec,
    pids: Vec<i32>,
    hands: &'a dyn Hands,
    sampler: Sampler,
    ladder: Ladder,
    gauges: BTreeMap<Source, Gauge>,
    /// When a line about a source and a level was last said.
    said: BTreeMap<(Source, Level), f64>,
    trends: Vec<(Trend, bool)>,
    /// Step of rank 0, and the time of its first step.
    step: u64,
    first_step: Option<(u64, f64)>,
    orders: u64,
    pending: Vec<Pending>,
    stop_at: Option<f64>,
    records: Records,
    findings: Findings,
    hurried: bool,
    /// Not yet in the records.
    again: bool,
    /// Ranks that were suspended at the last look, and since when some were.
    suspended: Vec<u32>,
    since_suspended: Option<Instant>,
}

/// Seconds in which the watch and the ranks ran.
struct Clock {
    at: f64,
    last: Instant,
    /// Longest time between two looks at it.
    period: Duration,
}

impl Clock {
    fn start(period: Duration) -> Self {
        Self { at: 0.0, last: Instant::now(), period }
    }

    /// The time now, and the seconds for which this process did not run before. `held`: ranks are suspended.
    fn now(&mut self, held: bool) -> (f64, f64) {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.last, now));
        let missed = if passed > self.period + LATE { passed - self.period } else { Duration::ZERO };
        if !held {
            self.at += (passed - missed).as_secs_f64();
        }
        (self.at, missed.as_secs_f64())
    }
}

impl<'a> Watch<'a> {
    /// `ranks`: number and process of each.
    pub fn new(spec: &'a WatchSpec, ranks: &[(u32, i32)], meter: MemoryMeter, hands: &'a dyn Hands) -> Self {
        let pids: Vec<i32> = ranks.iter().map(|(_, pid)| *pid).collect();
        let gpu = spec.planned.gpu_bytes.and_then(|_| GpuMeter::open());
        let (records, error) = Records::open(spec.run_dir.as_deref());
        error.iter().for_each(|error| hands.say(error));
        let planned = &spec.planned;
        let sampler = Sampler::new(meter.clone(), gpu, &pids);
        Self {
            spec,
            hands,
            sampler: if spec.foreign { sampler.with_families() } else { sampler },
            ladder: Ladder::new(planned.threads, planned.micro_batch, spec.recover_s),
            gauges: BTreeMap::new(),
            said: BTreeMap::new(),
            trends: vec![Default::default(); pids.len()],
            step: 0,
            first_step: None,
            orders: 0,
            pending: Vec::new(),
            stop_at: None,
            records,
            findings: Findings {
                ranks: ranks.iter().map(|(rank, _)| *rank).collect(),
                planned: planned.clone(),
                language: spec.language,
                foreign: spec.foreign,
                seen: vec![Seen::default(); pids.len()],
                meter: Some(meter),
                ..Findings::default()
            },
            pids,
            hurried: false,
            again: spec.again,
            suspended: Vec::new(),
            since_suspended: None,
        }
    }

    /// Runs until the channel is closed.
    pub fn run(mut self, told: &Receiver<Told>) -> Findings {
        let period = Duration::from_secs_f64(self.spec.period_s.clamp(0.01, 3600.0));
        let mut clock = Clock::start(period);
        // The first look soon, so that short jobs have one too.
        let mut due = Instant::now() + period / 10;
        loop {
            let heard = told.recv_timeout(due.saturating_duration_since(Instant::now()));
            let (now, missed_s) = clock.now(!self.suspended.is_empty());
            if missed_s > TOLD_S {
                self.tell(Event::DidNotRun { seconds: missed_s }, now);
            }
            match heard {
                Ok(told) => self.take(told, now),
                Err(RecvTimeoutError::Timeout) => {
                    self.look(now);
                    due = Instant::now() + if self.hurried { period.div_f64(HURRY) } else { period };
                }
                Err(RecvTimeoutError::Disconnected) => return self.end(),
            }
        }
    }

    fn end(self) -> Findings {
        let (gaps, lost) = self.records.close();
        lost.iter().for_each(|text| self.hands.say(text));
        Findings { gaps, ..self.findings }
    }

    /// Says which ranks are suspended, and that they run again.
    fn see_suspended(&mut self, now: f64) {
        let is = |(_, pid): &(usize, &i32)| awake::is_suspended(**pid);
        let seen: Vec<u32> =
            self.pids.iter().enumerate().filter(is).map(|(index, _)| self.findings.ranks[index]).collect();
        if seen == self.suspended {
            return;
        }
        let before = std::mem::replace(&mut self.suspended, seen.clone());
        let event = match (seen.is_empty(), self.since_suspended.take()) {
            (true, Some(since)) => Event::RanAgain { ranks: before, seconds: since.elapsed().as_secs_f64() },
            (_, since) => {
                self.since_suspended = Some(since.unwrap_or_else(Instant::now));
                Event::Suspended { ranks: seen }
            }
        };
        self.tell(event, now);
    }

    fn take(&mut self, told: Told, now: f64) {
        match told {
            Told::Step(step) => {
                self.step = step;
                self.first_step.get_or_insert((step, now));
            }
            Told::Relieved { rank, relieved } => {
                let ranks = self.findings.ranks.len();
                let mut done = None;
                for (at, pending) in self.pending.iter_mut().enumerate() {
                    if matches!(pending.asked, Asked::Ranks { order, .. } if order == relieved.order) {
                        pending.answers.insert(rank, relieved.clone());
                        done = (pending.answers.len() == ranks).then_some(at);
                    }
                }
                if let Some(at) = done {
                    self.settle(at, now);
                }
            }
            Told::Now => self.by_hand(now),
        }
    }

    /// One sample and all that follows from it.
    fn look(&mut self, now: f64) {
        let cache = self.hands.cache().unwrap_or_default();
        let sample = self.sampler.take(cache.resident_bytes, self.hurried);
        self.findings.peaks.see(&sample);
        self.hands.job_bytes(sample.pss_bytes());
        self.remember(&sample);
        let mut pressed = false;
        if self.spec.warn {
            self.see_suspended(now);
            if self.suspended.is_empty() {
                self.find_leaks(&sample, now);
            }
            let scales = self.scales(&sample);
            let event = self.warn(&scales, &sample, now).or_else(|| self.begun_again());
            let level = scales.iter().map(|scale| self.level_now(scale)).max().unwrap_or_default();
            pressed = level > Level::Normal;
            self.hurried = pressed || !self.pending.is_empty();
            self.settle_due(&cache, now);
            if self.suspended.is_empty() {
                // Ranks that do not run give nothing back.
                self.respond(&scales, &sample, &cache, now);
            }
            self.write(&sample, now, event);
        }
        self.remember_fullest(&sample, pressed, now);
        self.findings.last = Some(sample);
    }

    fn remember(&mut self, sample: &Sample) {
        if self.findings.base.is_none() {
            self.findings.base = Some(sample.clone());
        }
        for (seen, now) in self.findings.seen.iter_mut().zip(&sample.ranks) {
            if now.rss_bytes == 0 {
                continue;
            }
            let moment = Moment { step: self.step, now: *now };
            if self.step > 0 {
                seen.first.get_or_insert(moment);
            }
            seen.last = Some(moment);
        }
    }

    /// Keeps the fullest sample, which explains a kill: later samples show the state after it.
    fn remember_fullest(&mut self, sample: &Sample, pressed: bool, now: f64) {
        let ended = |(seen, rank): (&Seen, &ProcessNow)| seen.last.is_some() && rank.rss_bytes == 0;
        let share = sample.share();
        let counts = self.findings.fullest.as_ref().is_none_or(|fullest| {
            let fuller = share > fullest.sample.share() + FULLER || now - fullest.at > RECENT_S;
            fuller && !self.findings.seen.iter().zip(&sample.ranks).any(ended)
        });
        if counts {
            // Looking at every process is for when it matters.
            let largest_other = if pressed { largest_other(&self.pids, sample.is_limited()) } else { None };
            self.findings.fullest = Some(Fullest { at: now, sample: sample.clone(), largest_other });
        }
    }

    fn write(&mut self, sample: &Sample, now: f64, event: Option<Event>) {
        let level = self.gauges.values().map(Gauge::level).max().unwrap_or_default();
        self.findings.level = level;
        let (ranks, step) = (&self.findings.ranks, self.step);
        if let Some(error) = self.records.write(now, || record(sample, ranks, step, level), event) {
            self.hands.say(&error);
        }
    }

    /// Once, where an earlier attempt is in the records.
    fn begun_again(&mut self) -> Option<Event> {
        std::mem::take(&mut self.again).then_some(Event::Continued)
    }

    /// Prints an event.
    fn say(&self, event: &Event) {
        words::event_text(self.spec.language, event).lines().for_each(|line| self.hands.say(line));
    }

    /// Prints an event and records it beside the last sample.
    fn tell(&mut self, event: Event, now: f64) {
        self.say(&event);
        if let Some(last) = self.findings.last.clone() {
            self.write(&last, now, Some(event));
        }
    }

    fn thresholds(&self, source: Source) -> [f64; 3] {
        if is_gpu(source) { self.spec.gpu } else { self.spec.ram }
    }

    fn level_now(&self, scale: &Scale) -> Level {
        scale.level(self.thresholds(scale.source))
    }

    /// All that can fill up.
    fn scales(&self, sample: &Sample) -> Vec<Scale> {
        let planned = &self.spec.planned;
        let base = self.findings.base.as_ref().unwrap_or(sample);
        let memory = &sample.memory;
        let mut scales = vec![Scale {
            source: Source::System,
            used_bytes: memory.total_bytes.saturating_sub(memory.available_bytes),
            total_bytes: memory.total_bytes,
            planned_bytes: base.others_bytes() + planned.job_bytes,
        }];
        if let Some(group) = memory.group
            && let Some(limit) = group.limit_bytes
        {
            scales.push(Scale {
                source: Source::Cgroup,
                used_bytes: group.used_bytes,
                total_bytes: limit,
                planned_bytes: base.others_in_group_bytes().unwrap_or(0) + planned.job_bytes,
            });
        }
        if planned.budget_bytes > 0 {
            scales.push(Scale {
                source: Source::Budget,
                used_bytes: sample.job_bytes(),
                total_bytes: planned.budget_bytes,
                planned_bytes: planned.job_bytes,
            });
        }
        scales.extend(sample.gpus.iter().map(|gpu| Scale {
            source: Source::Gpu(gpu.index),
            used_bytes: gpu.used_bytes,
            total_bytes: gpu.total_bytes,
            planned_bytes: planned.gpu_bytes.unwrap_or(0),
        }));
        scales
    }

    /// Says what has changed, once, the fullest first; returns the event for the records.
    fn warn(&mut self, scales: &[Scale], sample: &Sample, now: f64) -> Option<Event> {
        let calm_s = (self.spec.recover_s * CALM_SHARE).min(MOST_CALM_S);
        let mut changes: Vec<(Level, Scale)> = Vec::new();
        let mut fallen = None;
        let mut highest = Level::Normal;
        for scale in scales {
            let thresholds = scale.thresholds(self.thresholds(scale.source));
            let gauge = self.gauges.entry(scale.source).or_default();
            let before = gauge.level();
            let changed = gauge.update(now, scale.share(), thresholds, calm_s);
            let level = gauge.level();
            highest = highest.max(level);
            if changed && level > before {
                changes.push((level, *scale));
            } else if changed && level == Level::Normal {
                fallen = Some((level, *scale));
            }
        }
        changes.sort_by(|(a, x), (b, y)| b.cmp(a).then(y.share().total_cmp(&x.share())));
        // All is normal when nothing is above it.
        changes.extend(fallen.filter(|_| highest == Level::Normal));
        // The same level of the same source is news only after a while.
        changes.retain(|(level, scale)| self.said.get(&(scale.source, *level)).is_none_or(|at| now - at >= REPEAT_S));
        self.said.extend(changes.iter().map(|(level, scale)| ((scale.source, *level), now)));
        let cause = self.cause(&changes.first()?.1, sample);
        let changes = changes.into_iter().map(|(level, scale)| LevelChange { level, at: scale.fill() }).collect();
        let event = Event::Level { changes, cause };
        self.say(&event);
        Some(event)
    }

    /// Finds what exceeds the plan.
    fn cause(&self, scale: &Scale, sample: &Sample) -> Cause {
        if is_gpu(scale.source) {
            return Cause::Device;
        }
        let planned = self.spec.planned.rank_bytes;
        let over = |(index, rank): (usize, &ProcessNow)| (rank.own_bytes.saturating_sub(planned), index);
        let (over_bytes, index) = sample.ranks.iter().enumerate().map(over).max().unwrap_or_default();
        let base = self.findings.base.as_ref().unwrap_or(sample);
        let grown_bytes = match scale.source {
            Source::Cgroup => {
                let others = |sample: &Sample| sample.others_in_group_bytes().unwrap_or(0);
                others(sample).saturating_sub(others(base))
            }
            Source::Budget => 0,
            _ => sample.others_bytes().saturating_sub(base.others_bytes()),
        };
        if planned > 0 && over_bytes > grown_bytes {
            let rank = self.findings.ranks.get(index).copied().unwrap_or_default();
            return Cause::Rank { rank, over_bytes };
        }
        if grown_bytes > scale.total_bytes / 50 {
            return Cause::Others { grown_bytes, largest: largest_other(&self.pids, scale.source == Source::Cgroup) };
        }
        match sample.cache_bytes {
            bytes if bytes > scale.used_bytes / 2 => Cause::PageCache { bytes },
            _ => Cause::Unknown,
        }
    }

    fn view(&self, scales: &[Scale], cache: &CacheNow) -> (View, Option<Scale>) {
        let worst = scales.iter().max_by(|a, b| {
            let rank = |scale: &Scale| (self.level_now(scale), scale.source != Source::Budget);
            rank(a).cmp(&rank(b)).then(a.share().total_cmp(&b.share()))
        });
        let gauge = self.gauges.values().map(Gauge::level).max().unwrap_or_default();
        let seen = worst.map_or(Level::Normal, |worst| self.level_now(worst));
        let node = |scale: &&Scale| matches!(scale.source, Source::System | Source::Cgroup);
        let view = View {
            level: if seen >= Level::Warning { seen } else { gauge.min(Level::Note) },
            gpu: worst.is_some_and(|worst| is_gpu(worst.source)),
            budget_only: worst.is_some_and(|worst| worst.source == Source::Budget),
            last: scales.iter().filter(node).any(|scale| scale.share() >= self.spec.stop),
            cache_bytes: cache.wanted_bytes,
            cache_capacity_bytes: cache.capacity_bytes,
            room_bytes: scales
                .iter()
                .filter(|scale| !is_gpu(scale.source))
                .map(|scale| scale.room_bytes(self.spec.ram))
                .min()
                .unwrap_or(0),
        };
        (view, worst.copied())
    }

    fn respond(&mut self, scales: &[Scale], sample: &Sample, cache: &CacheNow, now: f64) {
        if self.stop_at.is_some_and(|at| now >= at) {
            self.stop_at = None;
            self.hands.stop();
        }
        if !self.spec.response {
            return;
        }
        let (view, worst) = self.view(scales, cache);
        let Some(act) = self.ladder.step(now, &view) else { return };
        let held = sample.ranks.iter().map(|rank| rank.own_bytes).sum();
        if let (Act::Stop, Some(worst)) = (&act, worst) {
            self.stop(&worst, sample, now);
        } else {
            self.act(act, held, cache, now);
        }
    }

    fn stop(&mut self, worst: &Scale, sample: &Sample, now: f64) {
        let (at, cause) = (worst.fill(), self.cause(worst, sample));
        if self.spec.foreign && !self.pids.iter().any(|pid| !first_that_catch(*pid, REQUEST.as_raw()).is_empty()) {
            self.ladder.was_not_stopped();
            return self.tell(Event::Unstoppable { at, cause }, now);
        }
        let event = Event::Stop { at, cause };
        let reason = words::event_text(self.spec.language, &event);
        self.orders += 1;
        self.hands.relieve(self.orders, &Relief::Stop { reason: reason.clone() });
        self.tell(event, now);
        self.stop_at = Some(if self.spec.foreign { now } else { now + STOP_S });
        self.findings.stopped_for = Some(reason);
    }

    fn by_hand(&mut self, now: f64) {
        let cache = self.hands.cache().unwrap_or_default();
        let (view, _) = self.view(&[], &cache);
        let held = self.findings.last.as_ref().map_or(0, |last| last.ranks.iter().map(|rank| rank.own_bytes).sum());
        if let Some(act) = self.ladder.by_hand(now, &view) {
            self.act(act, held, &cache, now);
        }
        self.act(Act::Ranks(Relief::TrimAllocators), held, &cache, now);
    }

    fn act(&mut self, act: Act, ranks_bytes: u64, cache: &CacheNow, now: f64) {
        self.orders += 1;
        let (asked, before_bytes) = match act {
            // A user's own program hears no orders: its package sees that the page cache shrinks.
            Act::Ranks(_) if self.spec.foreign => return,
            Act::Ranks(action) => {
                self.hands.relieve(self.orders, &action);
                (Asked::Ranks { order: self.orders, action }, ranks_bytes)
            }
            Act::Cache { bytes } => {
                let shrinks = self.hands.resize_cache(bytes) < cache.wanted_bytes;
                (Asked::Cache { shrinks }, cache.resident_bytes)
            }
            Act::Stop => return,
        };
        self.hurried = true;
        self.pending.push(Pending { asked, before_bytes, until: now + ANSWER_S, answers: BTreeMap::new() });
    }

    /// Acts that have taken effect, or had time enough.
    fn settle_due(&mut self, cache: &CacheNow, now: f64) {
        let done = |pending: &Pending| {
            let of_cache = matches!(pending.asked, Asked::Cache { .. });
            now >= pending.until || (of_cache && cache.resident_bytes == cache.wanted_bytes)
        };
        while let Some(at) = self.pending.iter().position(done) {
            self.settle(at, now);
        }
    }

    /// Tells the result of an act, with bytes before and after.
    fn settle(&mut self, at: usize, now: f64) {
        let Pending { asked, before_bytes, answers, .. } = self.pending.remove(at);
        let event = match asked {
            Asked::Cache { shrinks } => {
                let cache = self.hands.cache().unwrap_or_default();
                let wanted_bytes = Some(cache.wanted_bytes).filter(|wanted| *wanted != cache.resident_bytes);
                Event::Cache { shrinks, wanted_bytes, before_bytes, after_bytes: cache.resident_bytes }
            }
            Asked::Ranks { action, .. } => match answers.values().next() {
                // All ranks do the same.
                Some(first) => Event::Relieved {
                    action,
                    effect: first.effect.clone(),
                    before_bytes: answers.values().map(|answer| answer.uss_before_bytes).sum(),
                    after_bytes: answers.values().map(|answer| answer.uss_after_bytes).sum(),
                },
                // Ranks between two long steps, or ranks of another program: the effect is unknown.
                None => Event::Unanswered { action },
            },
        };
        self.tell(event, now);
    }

    fn find_leaks(&mut self, sample: &Sample, now: f64) {
        if self.step == 0 {
            return;
        }
        let ranks = sample.ranks.len().max(1) as f64;
        let room = self.spec.planned.budget_bytes.saturating_sub(sample.job_bytes()) as f64 / ranks;
        let per_step = self.first_step.filter(|(first, _)| self.step > *first);
        let per_step = per_step.map(|(first, then)| (now - then) / (self.step - first) as f64);
        for index in 0..sample.ranks.len() {
            let (trend, told) = &mut self.trends[index];
            let own = sample.ranks[index].own_bytes;
            if *told || own == 0 {
                continue;
            }
            let before = trend.samples();
            trend.add(self.step, own);
            if trend.samples() == before || !trend.samples().is_multiple_of(TREND_EVERY) {
                continue;
            }
            let Some(leak) = trend.leak() else { continue };
            *told = true;
            let steps_left = leak.steps_until(leak.now_bytes + room);
            let hours_left = per_step.map(|seconds| steps_left * seconds / 3600.0);
            let (rank, bytes_per_step) = (self.findings.ranks[index], leak.bytes_per_step);
            self.tell(Event::Leak { rank, bytes_per_step, steps_left, hours_left }, now);
        }
    }
}

#[cfg(test)]
mod tests;
