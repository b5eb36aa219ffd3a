//! The order in which memory is given back, one rung at a time. Pure: fed with seconds and views, gives acts.
//!
//! ```text
//! pause prefetching ─► fewer decoders ─► page cache ÷ 2 ─► trim allocators ─► micro-batch ÷ 2 … ─► checkpoint and stop
//!        from warning on                                  │  only while critical
//! ```
//! On a device only the last three help. Calm for a while: prefetching and decoders as planned, the page cache grows back;
//! the micro-batch stays. Pressure that comes back soon makes the next wait twice as long.

use spec::contract::{Level, Relief};

/// Seconds that a rung is given to take effect.
const SETTLE_S: f64 = 1.0;
/// The same for the page cache, and for what waits for a step of all ranks.
const SETTLE_CACHE_S: f64 = 2.0;
const SETTLE_STEP_S: f64 = 5.0;
/// The longest of them when there is almost nothing left; halvings that are tried then before the run stops.
const SETTLE_LAST_S: f64 = 1.0;
const MOST_LAST_HALVINGS: u32 = 2;
/// A page cache of less is given back as a whole.
const LEAST_CACHE_BYTES: u64 = 64 << 20;
/// Most times that the wait before recovery is doubled.
const MOST_DOUBLINGS: i32 = 4;
/// After a request by hand the page cache stays small for so long, seconds.
const MANUAL_HOLD_S: f64 = 600.0;
/// Decoders left under pressure. Source: the guides' "at most 2 workers".
const FEW_DECODERS: usize = 2;

/// Inputs of the ladder's decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    /// Present level of the fullest source.
    pub level: Level,
    /// That source is a device.
    pub gpu: bool,
    /// It is the job's own budget, while the node has room: no reason to slow down or stop.
    pub budget_only: bool,
    /// Fuller than `watch.stop_percent`.
    pub last: bool,
    /// Present and planned size of the page cache; 0 means no page cache.
    pub cache_bytes: u64,
    pub cache_capacity_bytes: u64,
    /// Bytes that may be taken before the first threshold.
    pub room_bytes: u64,
}

/// Action of the ladder.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Order to every rank.
    Ranks(Relief),
    /// The page cache's new size.
    Cache { bytes: u64 },
    /// The end of the ladder: a checkpoint and a clean stop.
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rung {
    Prefetch,
    Decoders,
    Cache,
    Trim,
    Halve,
    Stop,
    End,
}

/// Where the job stands on the ladder.
#[derive(Clone, Debug)]
pub struct Ladder {
    /// Loader threads and samples per pass of each rank, as planned.
    threads: usize,
    micro_batch: usize,
    recover_s: f64,
    next: Rung,
    acted_at: f64,
    settle_s: f64,
    /// Halvings since there was almost nothing left.
    last_halvings: u32,
    calm_since: Option<f64>,
    doublings: i32,
    recovered_at: Option<f64>,
    stopped: bool,
}

impl Ladder {
    /// `recover_s`: see `watch.recover`.
    pub fn new(threads: usize, micro_batch: usize, recover_s: f64) -> Self {
        Self {
            threads,
            micro_batch,
            recover_s,
            next: Rung::Prefetch,
            acted_at: f64::NEG_INFINITY,
            settle_s: 0.0,
            last_halvings: 0,
            calm_since: None,
            doublings: 0,
            recovered_at: None,
            stopped: false,
        }
    }

    /// Decides on the action at second `now`.
    pub fn step(&mut self, now: f64, view: &View) -> Option<Act> {
        if self.stopped {
            return None;
        }
        if view.level < Level::Warning {
            return self.recover(now, view);
        }
        self.calm_since = None;
        if self.recovered_at.take().is_some_and(|at| now - at < 4.0 * self.wait_s()) {
            self.doublings = (self.doublings + 1).min(MOST_DOUBLINGS);
        }
        let settle_s = if view.last { self.settle_s.min(SETTLE_LAST_S) } else { self.settle_s };
        if now < self.acted_at + settle_s { None } else { self.climb(now, view) }
    }

    /// The run goes on after [`Act::Stop`]: it could not be asked. It is asked again after a time without pressure.
    pub fn was_not_stopped(&mut self) {
        self.stopped = false;
    }

    /// The user wants memory back now: half the page cache.
    pub fn by_hand(&mut self, now: f64, view: &View) -> Option<Act> {
        self.calm_since = Some(now + MANUAL_HOLD_S);
        self.shrink(now, view)
    }

    fn climb(&mut self, now: f64, view: &View) -> Option<Act> {
        if view.gpu {
            self.next = self.next.max(Rung::Trim);
        }
        loop {
            match self.next {
                Rung::Prefetch => {
                    self.next = Rung::Decoders;
                    if self.threads > 0 {
                        return self.act(now, SETTLE_S, Relief::PausePrefetch);
                    }
                }
                Rung::Decoders => {
                    self.next = Rung::Cache;
                    let threads = FEW_DECODERS.min(self.threads / 2).max(1);
                    if threads < self.threads {
                        return self.act(now, SETTLE_S, Relief::Decoders { threads });
                    }
                }
                Rung::Cache => {
                    let whole = view.cache_bytes == view.cache_capacity_bytes;
                    if view.level < Level::Critical && !whole || view.cache_bytes == 0 {
                        self.next = Rung::Trim;
                        continue;
                    }
                    return self.shrink(now, view);
                }
                Rung::Trim => {
                    self.next = Rung::Halve;
                    return self.act(now, SETTLE_S, Relief::TrimAllocators);
                }
                // The remaining rungs cost speed: they are not used for a mere warning.
                _ if view.level < Level::Critical || view.budget_only => {
                    // Grown again since, or critical only now.
                    if view.level == Level::Critical && view.cache_bytes > 0 && !view.gpu {
                        return self.shrink(now, view);
                    }
                    return None;
                }
                Rung::Halve => {
                    if view.cache_bytes > 0 && !view.gpu {
                        return self.shrink(now, view);
                    }
                    if self.micro_batch > 1 && self.last_halvings < MOST_LAST_HALVINGS {
                        self.micro_batch = self.micro_batch.div_ceil(2);
                        self.last_halvings += u32::from(view.last);
                        return self.act(now, SETTLE_STEP_S, Relief::HalveMicroBatch);
                    }
                    self.next = Rung::Stop;
                }
                Rung::Stop if view.last => {
                    self.next = Rung::End;
                    self.stopped = true;
                    return Some(Act::Stop);
                }
                Rung::Stop | Rung::End => return None,
            }
        }
    }

    fn act(&mut self, now: f64, settle_s: f64, relief: Relief) -> Option<Act> {
        (self.acted_at, self.settle_s) = (now, settle_s);
        Some(Act::Ranks(relief))
    }

    fn shrink(&mut self, now: f64, view: &View) -> Option<Act> {
        if view.cache_bytes == 0 {
            return None;
        }
        (self.acted_at, self.settle_s) = (now, SETTLE_CACHE_S);
        let half = view.cache_bytes / 2;
        Some(Act::Cache { bytes: if half < LEAST_CACHE_BYTES.min(view.cache_capacity_bytes / 4) { 0 } else { half } })
    }

    fn wait_s(&self) -> f64 {
        self.recover_s * 2f64.powi(self.doublings)
    }

    fn recover(&mut self, now: f64, view: &View) -> Option<Act> {
        let shrunk = view.cache_bytes < view.cache_capacity_bytes;
        if self.next == Rung::Prefetch && !shrunk {
            return None;
        }
        let calm_since = *self.calm_since.get_or_insert(now);
        if view.level != Level::Normal || now - calm_since < self.wait_s() || now < self.acted_at + self.settle_s {
            return None;
        }
        if self.next > Rung::Prefetch {
            self.next = Rung::Prefetch;
            self.last_halvings = 0;
            self.recovered_at = Some(now);
            return self.act(now, SETTLE_S, Relief::Resume);
        }
        // Doubling: what was taken in one go is given in several, so that what went wrong shows early.
        let bytes = (view.cache_bytes * 2).max(LEAST_CACHE_BYTES).min(view.cache_capacity_bytes);
        if bytes - view.cache_bytes > view.room_bytes {
            return None;
        }
        (self.acted_at, self.settle_s) = (now, SETTLE_CACHE_S.max(self.wait_s() / 4.0));
        self.recovered_at = Some(now);
        Some(Act::Cache { bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CACHE: u64 = 1 << 30;

    /// Seconds and acts of `seconds` of pressure as `view` says, which sees what the cache has become.
    fn play(ladder: &mut Ladder, from: f64, seconds: f64, cache: &mut u64, mut view: View) -> Vec<(f64, Act)> {
        let mut acts = Vec::new();
        let mut now = from;
        while now < from + seconds {
            view.cache_bytes = *cache;
            if let Some(act) = ladder.step(now, &view) {
                if let Act::Cache { bytes } = act {
                    *cache = bytes;
                }
                acts.push((now, act));
            }
            now += 0.1;
        }
        acts
    }

    fn view(level: Level) -> View {
        View { level, cache_capacity_bytes: CACHE, room_bytes: u64::MAX, ..View::default() }
    }

    fn words(acts: &[(f64, Act)]) -> Vec<String> {
        acts.iter().map(|(_, act)| format!("{act:?}").replace("Ranks(", "").replace(')', "")).collect()
    }

    #[test]
    fn a_warning_takes_the_first_rungs_once_and_in_order() {
        let (mut ladder, mut cache) = (Ladder::new(4, 64, 30.0), CACHE);
        let acts = play(&mut ladder, 0.0, 600.0, &mut cache, view(Level::Warning));
        assert_eq!(
            words(&acts),
            ["PausePrefetch", "Decoders { threads: 2 }", "Cache { bytes: 536870912 }", "TrimAllocators"]
        );
        assert!(acts.windows(2).all(|two| two[1].0 - two[0].0 >= SETTLE_S - 1e-6), "{acts:?}");
    }

    #[test]
    fn critical_halves_the_batch_and_then_stops_cleanly() {
        let (mut ladder, mut cache) = (Ladder::new(1, 8, 30.0), CACHE);
        let acts = play(&mut ladder, 0.0, 600.0, &mut cache, View { last: true, ..view(Level::Critical) });
        let words = words(&acts);
        assert_eq!(words[0], "PausePrefetch", "one thread is not made fewer");
        assert!(words[1..6].iter().all(|act| act.starts_with("Cache")), "{words:?}");
        assert_eq!(cache, 0);
        let rest = ["TrimAllocators", "HalveMicroBatch", "HalveMicroBatch", "Stop"];
        assert_eq!(words[6..], rest);
    }

    #[test]
    fn a_full_node_that_is_not_at_its_end_is_no_reason_to_stop() {
        let (mut ladder, mut cache) = (Ladder::new(0, 2, 30.0), 0);
        let acts = play(&mut ladder, 0.0, 600.0, &mut cache, view(Level::Critical));
        assert_eq!(words(&acts), ["TrimAllocators", "HalveMicroBatch"]);
        let (mut ladder, mut cache) = (Ladder::new(0, 2, 30.0), CACHE);
        let acts =
            play(&mut ladder, 0.0, 600.0, &mut cache, View { budget_only: true, last: true, ..view(Level::Critical) });
        assert!(words(&acts).iter().all(|act| act.starts_with("Cache") || act == "TrimAllocators"), "{acts:?}");
    }

    #[test]
    fn a_full_device_trims_and_halves_and_leaves_the_cache() {
        let (mut ladder, mut cache) = (Ladder::new(4, 4, 30.0), CACHE);
        let acts = play(&mut ladder, 0.0, 60.0, &mut cache, View { gpu: true, ..view(Level::Critical) });
        assert_eq!(words(&acts), ["TrimAllocators", "HalveMicroBatch", "HalveMicroBatch"]);
    }

    #[test]
    fn calm_gives_back_and_pressure_that_returns_makes_the_wait_longer() {
        let (mut ladder, mut cache) = (Ladder::new(4, 64, 30.0), CACHE);
        play(&mut ladder, 0.0, 20.0, &mut cache, view(Level::Warning));
        let acts = play(&mut ladder, 20.0, 100.0, &mut cache, view(Level::Normal));
        assert_eq!(words(&acts), ["Resume", "Cache { bytes: 1073741824 }"]);
        assert!(acts[0].0 >= 50.0 - 1e-6, "{acts:?}");
        play(&mut ladder, 120.0, 20.0, &mut cache, view(Level::Warning));
        let acts = play(&mut ladder, 140.0, 100.0, &mut cache, view(Level::Normal));
        assert!(acts[0].0 >= 200.0 - 1e-6, "{acts:?}");
        // Where growing would trip the threshold again, the cache stays.
        let mut half = CACHE / 2;
        let tight = View { room_bytes: 1 << 20, ..view(Level::Normal) };
        assert_eq!(words(&play(&mut ladder, 1000.0, 600.0, &mut half, tight)), Vec::<String>::new());
    }

    #[test]
    fn a_second_emergency_halves_what_is_left_before_it_stops() {
        let (mut ladder, mut cache) = (Ladder::new(1, 64, 30.0), 0);
        let full = View { last: true, ..view(Level::Critical) };
        let first = play(&mut ladder, 0.0, 2.5, &mut cache, full);
        assert_eq!(words(&first), ["PausePrefetch", "TrimAllocators", "HalveMicroBatch"]);
        play(&mut ladder, 2.5, 1.0, &mut cache, full);
        play(&mut ladder, 3.5, 60.0, &mut cache, view(Level::Normal));
        let second = play(&mut ladder, 63.5, 60.0, &mut cache, full);
        let words = words(&second);
        assert_eq!(words[words.len() - 3..], ["HalveMicroBatch", "HalveMicroBatch", "Stop"]);
    }

    #[test]
    fn a_request_by_hand_halves_the_cache_for_a_while() {
        let (mut ladder, mut cache) = (Ladder::new(4, 64, 30.0), CACHE / 2);
        let now = View { cache_bytes: CACHE, ..view(Level::Normal) };
        assert_eq!(ladder.by_hand(0.0, &now), Some(Act::Cache { bytes: CACHE / 2 }));
        let acts = play(&mut ladder, 0.1, 900.0, &mut cache, view(Level::Normal));
        assert_eq!(words(&acts), ["Cache { bytes: 1073741824 }"]);
        assert!(acts[0].0 >= MANUAL_HOLD_S, "{acts:?}");
        let nothing = View { cache_capacity_bytes: 0, ..View::default() };
        assert_eq!(ladder.by_hand(0.0, &nothing), None);
    }
}
