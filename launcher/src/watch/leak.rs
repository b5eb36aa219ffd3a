//! Detection of endless growth of a rank's memory: a robust slope over steps.
//!
//! Theil and Sen's estimate is the median of the slopes between all pairs of points; outliers up to 29 % of the points
//! do not move it. Mann and Kendall's count of rising pairs says whether there is a trend at all. A warm-up rises too,
//! but its last part rises much less than its whole.

/// Points kept; when full, every second one goes and the next ones come half as often.
const MOST: usize = 256;
/// Points from which on a verdict is given.
const LEAST: usize = 100;
/// Share of the first points that are skipped: start-up is no leak.
const SKIPPED_SHARE: usize = 5;
/// Growth over the points looked at, bytes, below which nothing is said.
const LEAST_GROWTH_BYTES: f64 = (8 << 20) as f64;
/// Deviations of the Mann-Kendall count from chance.
const LEAST_TREND: f64 = 5.0;
/// Rise of the last third over that of all points: 1 for a straight line, and about 0 at the end of a warm-up.
const LEAST_CONTINUED: f64 = 0.6;
/// Equal parts of the points, each higher than the one before by this share at least of what the slope says: a heap that grew
/// twice, at the ends of two epochs, has a slope too.
const PARTS: usize = 6;
const LEAST_PART: f64 = 0.25;

/// A lasting growth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Leak {
    pub bytes_per_step: f64,
    /// Bytes now, by the latest point.
    pub now_bytes: f64,
}

impl Leak {
    /// Steps until `limit_bytes` is reached; 0: it is.
    pub fn steps_until(&self, limit_bytes: f64) -> f64 {
        ((limit_bytes - self.now_bytes) / self.bytes_per_step).max(0.0)
    }
}

/// Memory of one rank over its steps.
#[derive(Clone, Debug, Default)]
pub struct Trend {
    /// (step, bytes), steps rising.
    points: Vec<(f64, f64)>,
    /// One of so many samples is kept, as a power of two.
    stride_log2: u32,
    seen: u64,
}

impl Trend {
    /// Samples from which on a verdict is given.
    pub const NEEDED: u64 = ((LEAST * SKIPPED_SHARE - 1) / (SKIPPED_SHARE - 1)) as u64;

    /// Adds a sample. Samples without a new step say nothing about growth per step and are skipped.
    pub fn add(&mut self, step: u64, bytes: u64) {
        if self.points.last().is_some_and(|(last, _)| step as f64 <= *last) {
            return;
        }
        self.seen += 1;
        if !(self.seen - 1).is_multiple_of(1 << self.stride_log2) {
            return;
        }
        self.points.push((step as f64, bytes as f64));
        if self.points.len() == MOST {
            self.points = self.points.iter().copied().step_by(2).collect();
            self.stride_log2 += 1;
        }
    }

    /// How many samples were taken in.
    pub fn samples(&self) -> u64 {
        self.seen
    }

    /// Finds a lasting growth, if any. Compares some 30,000 pairs: about half a millisecond.
    pub fn leak(&self) -> Option<Leak> {
        let points = self.points.get(self.points.len() / SKIPPED_SHARE..)?;
        if points.len() < LEAST {
            return None;
        }
        let (first, last) = (points.first()?, points.last()?);
        let slope = theil_sen(points)?;
        let late = theil_sen(points.get(points.len() * 2 / 3..)?)?;
        let leaks = slope * (last.0 - first.0) >= LEAST_GROWTH_BYTES
            && mann_kendall(points) >= LEAST_TREND
            && late >= LEAST_CONTINUED * slope
            && rises_throughout(points, slope);
        leaks.then_some(Leak { bytes_per_step: slope, now_bytes: last.1 })
    }
}

/// True if each part of the points is higher than the one before, by their medians.
fn rises_throughout(points: &[(f64, f64)], slope: f64) -> bool {
    let middle = |part: &[(f64, f64)]| {
        let mut values: Vec<f64> = part.iter().map(|point| point.1).collect();
        let at = values.len() / 2;
        (part[part.len() / 2].0, *values.select_nth_unstable_by(at, f64::total_cmp).1)
    };
    // Rounded down: a few of the latest points are left over.
    let middles: Vec<(f64, f64)> = points.chunks_exact((points.len() / PARTS).max(1)).map(middle).collect();
    middles.windows(2).all(|pair| pair[1].1 - pair[0].1 >= LEAST_PART * slope * (pair[1].0 - pair[0].0))
}

fn pairs(points: &[(f64, f64)]) -> impl Iterator<Item = ((f64, f64), (f64, f64))> + '_ {
    points.iter().enumerate().flat_map(|(n, a)| points[n + 1..].iter().map(|b| (*a, *b)))
}

/// Median of the slopes between all pairs, bytes per step.
fn theil_sen(points: &[(f64, f64)]) -> Option<f64> {
    let mut slopes: Vec<f64> = pairs(points).map(|(a, b)| (b.1 - a.1) / (b.0 - a.0)).collect();
    let middle = slopes.len() / 2;
    (!slopes.is_empty()).then(|| *slopes.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// Rising less falling pairs, in standard deviations of the same count for points in random order.
fn mann_kendall(points: &[(f64, f64)]) -> f64 {
    let count: f64 = pairs(points).map(|(a, b)| (b.1 - a.1).partial_cmp(&0.0).map_or(0.0, |o| o as i8 as f64)).sum();
    let n = points.len() as f64;
    count / (n * (n - 1.0) * (2.0 * n + 5.0) / 18.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;

    /// Noise of about ±1 by a congruential generator.
    fn noise(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
    }

    /// The sample at which a leak is first seen.
    fn seen(samples: u64, per_sample: u64, mut mib: impl FnMut(f64) -> f64) -> Option<(u64, Leak)> {
        let mut trend = Trend::default();
        (0..samples).find_map(|n| {
            trend.add(n * per_sample + 1, (mib(n as f64) * MIB) as u64);
            trend.leak().map(|leak| (n + 1, leak))
        })
    }

    #[test]
    fn checklist_49_a_synthetic_leak_is_flagged_within_200_samples() {
        for (slope, jitter) in [(0.2, 0.5), (1.0, 5.0), (0.12, 1.0), (10.0, 0.0)] {
            let mut state = 7;
            let (at, leak) = seen(200, 10, |n| 400.0 + slope * n + jitter * noise(&mut state)).unwrap();
            println!("{slope} MiB per sample ± {jitter}: at sample {at}, {:.0} B per step", leak.bytes_per_step);
            let true_slope = slope * MIB / 10.0;
            assert!((leak.bytes_per_step / true_slope - 1.0).abs() < 0.25, "{slope}: {leak:?}");
        }
        let leak = Leak { bytes_per_step: 10.0, now_bytes: 1000.0 };
        assert_eq!((leak.steps_until(2000.0), leak.steps_until(500.0)), (100.0, 0.0));
    }

    #[test]
    fn a_leak_behind_a_warm_up_and_among_outliers_is_flagged() {
        let mut state = 3;
        let found = seen(200, 1, |n| {
            let spike = if (n as u64).is_multiple_of(9) { 300.0 } else { 0.0 };
            300.0 * (1.0 - (-n / 10.0).exp()) + 0.5 * n + spike + noise(&mut state)
        });
        assert!(found.is_some());
    }

    #[test]
    fn checklist_49_flat_memory_noise_and_warm_up_are_not_flagged() {
        for tau in [3.0, 10.0, 20.0, 40.0] {
            let found = seen(1000, 10, |n| 300.0 + 500.0 * (1.0 - (-n / tau).exp()));
            assert_eq!(found, None, "warm-up of {tau} samples");
        }
        for seed in 0..20 {
            let mut state = seed;
            assert_eq!(seen(600, 10, |_| 400.0 + 20.0 * noise(&mut state)), None, "noise {seed}");
        }
        assert_eq!(seen(1000, 10, |n| if n < 300.0 { 400.0 } else { 600.0 }), None, "one step up");
        // The deblurring baseline: evaluations after steps 52 and 130 leave a larger heap. MiB as recorded.
        let grown = |n: f64| [442.0, 457.0, 468.0][(n > 52.0) as usize + (n > 130.0) as usize];
        let found = seen(208, 1, |n| if n < 26.0 { 335.0 } else { grown(n) });
        assert_eq!(found, None, "two steps up");
        assert_eq!(seen(1000, 10, |n| 400.0 + 50.0 * (n / 25.0).sin()), None, "a wave");
        assert_eq!(seen(1000, 0, |n| n), None, "no steps");
    }
}
