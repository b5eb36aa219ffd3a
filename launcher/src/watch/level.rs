//! How full something is, in three levels, with thresholds that a plan cannot trip by itself and without flicker.

use spec::contract::{Fill, Level, Source};

pub fn is_gpu(source: Source) -> bool {
    matches!(source, Source::Gpu(_))
}

/// Share of a source that is used, 0 to 1; 0 when the total is not known.
pub fn share(fill: &Fill) -> f64 {
    ratio(fill.used_bytes, fill.total_bytes)
}

/// One thing that fills up. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    pub source: Source,
    pub used_bytes: u64,
    pub total_bytes: u64,
    /// Bytes used when all runs as planned.
    pub planned_bytes: u64,
}

impl Scale {
    /// The part that records keep.
    pub fn fill(&self) -> Fill {
        Fill { source: self.source, used_bytes: self.used_bytes, total_bytes: self.total_bytes }
    }

    pub fn share(&self) -> f64 {
        share(&self.fill())
    }

    /// `given` (shares, rising), moved up where the plan itself passes the first of them: then the three divide what
    /// is left above the plan as the given ones divide what is left above the first.
    pub fn thresholds(&self, given: [f64; 3]) -> [f64; 3] {
        let planned = ratio(self.planned_bytes, self.total_bytes).min(1.0);
        if planned <= given[0] || given[0] >= 1.0 {
            return given;
        }
        given.map(|threshold| planned + (1.0 - planned) * (threshold - given[0]) / (1.0 - given[0]))
    }

    /// Where the share stands now, without memory of what was.
    pub fn level(&self, given: [f64; 3]) -> Level {
        level_of(self.share(), self.thresholds(given))
    }

    /// Bytes that may still be used before the first threshold.
    pub fn room_bytes(&self, given: [f64; 3]) -> u64 {
        let most = (self.thresholds(given)[0] * self.total_bytes as f64) as u64;
        most.saturating_sub(self.used_bytes)
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn level_of(share: f64, thresholds: [f64; 3]) -> Level {
    match thresholds.iter().filter(|threshold| share > **threshold).count() {
        0 => Level::Normal,
        1 => Level::Note,
        2 => Level::Warning,
        _ => Level::Critical,
    }
}

/// A level falls only when the share is this far below its threshold for a while.
const BELOW: f64 = 0.02;

/// The level of one source over time: it rises at once and falls late.
#[derive(Clone, Debug, Default)]
pub struct Gauge {
    level: Level,
    /// Since when the share has been low enough to fall, and the highest level seen since.
    calm: Option<(f64, Level)>,
}

impl Gauge {
    pub fn level(&self) -> Level {
        self.level
    }

    /// Takes in a share at second `now`; true: the level changed. `calm_s`: how long the share has to stay low before the
    /// level falls, then to the highest that was seen meanwhile.
    pub fn update(&mut self, now: f64, share: f64, thresholds: [f64; 3], calm_s: f64) -> bool {
        let seen = level_of(share, thresholds);
        if seen > self.level {
            (self.level, self.calm) = (seen, None);
            return true;
        }
        let low = level_of(share + BELOW, thresholds);
        if low >= self.level {
            self.calm = None;
            return false;
        }
        let (since, highest) = self.calm.get_or_insert((now, low));
        *highest = low.max(*highest);
        if now - *since < calm_s {
            return false;
        }
        (self.level, self.calm) = (*highest, None);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: [f64; 3] = [0.7, 0.8, 0.9];
    const GPU: [f64; 3] = [0.8, 0.9, 0.95];
    const CALM_S: f64 = 10.0;

    fn scale(used: u64, planned: u64) -> Scale {
        Scale { source: Source::System, used_bytes: used, total_bytes: 1000, planned_bytes: planned }
    }

    #[test]
    fn checklist_48_thresholds_give_three_levels() {
        use Level::*;
        for (used, level) in [(700, Normal), (701, Note), (801, Warning), (900, Warning), (901, Critical)] {
            assert_eq!(scale(used, 500).level(RAM), level, "{used}");
        }
        for (used, level) in [(800, Normal), (801, Note), (901, Warning), (950, Warning), (951, Critical)] {
            assert_eq!(scale(used, 0).level(GPU), level, "{used}");
        }
        assert_eq!(scale(5, 0).share(), 0.005);
        assert_eq!(Scale { total_bytes: 0, ..scale(5, 5) }.level(RAM), Normal);
    }

    #[test]
    fn what_was_planned_is_no_pressure() {
        assert_eq!(scale(0, 700).thresholds(RAM), RAM);
        let [note, warning, critical] = scale(0, 820).thresholds(RAM);
        assert!((note - 0.82).abs() < 1e-9 && (warning - 0.88).abs() < 1e-9 && (critical - 0.94).abs() < 1e-9);
        assert_eq!(scale(820, 820).level(RAM), Level::Normal);
        assert_eq!(scale(999, 1000).level(RAM), Level::Normal);
        assert_eq!(scale(1001, 2000).level(RAM), Level::Critical);
        assert_eq!(scale(650, 500).room_bytes(RAM), 50);
    }

    #[test]
    fn a_share_that_swings_around_a_threshold_changes_the_level_once() {
        let mut gauge = Gauge::default();
        let mut changes = 0;
        for n in 0..2000 {
            let share = if n % 2 == 0 { 0.705 } else { 0.695 };
            changes += usize::from(gauge.update(f64::from(n) * 0.5, share, RAM, CALM_S));
        }
        assert_eq!((changes, gauge.level()), (1, Level::Note));
    }

    #[test]
    fn a_level_rises_at_once_and_falls_after_ten_calm_seconds_to_the_highest_seen_meanwhile() {
        let mut gauge = Gauge::default();
        let mut update = |second: i32, share: f64| {
            let changed = gauge.update(f64::from(second), share, RAM, CALM_S);
            (changed, gauge.level())
        };
        assert_eq!(update(0, 0.95), (true, Level::Critical));
        for second in 1..=10 {
            assert_eq!(update(second, if second == 5 { 0.75 } else { 0.5 }), (false, Level::Critical), "{second}");
        }
        assert_eq!(update(11, 0.5), (true, Level::Note));
        assert_eq!(update(12, 0.9), (true, Level::Warning));
        // A share that comes near the threshold again begins the wait anew.
        assert_eq!((update(13, 0.5), update(20, 0.79)), ((false, Level::Warning), (false, Level::Warning)));
        assert_eq!((update(22, 0.5), update(31, 0.5)), ((false, Level::Warning), (false, Level::Warning)));
        assert_eq!(update(32, 0.5), (true, Level::Normal));
    }
}
