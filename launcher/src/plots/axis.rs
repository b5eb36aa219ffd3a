//! From values to pixels: range, ticks, labels.

/// A value axis, linear or decadic.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
    pub ticks: Vec<(f64, String)>,
}

/// Ratio of largest to smallest value from which positive values get a logarithmic axis.
const LOG_FROM: f64 = 100.0;

impl Axis {
    /// An axis for these finite values with about `wanted` ticks; logarithmic where `may_log` and the range asks for it.
    pub(super) fn new(values: impl Iterator<Item = f64>, wanted: usize, may_log: bool) -> Self {
        let (low, high) = values
            .filter(|v| v.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            return Self::linear(0.0, 1.0, wanted);
        }
        if may_log && low > 0.0 && high / low >= LOG_FROM {
            return Self::decades(low, high, wanted);
        }
        // One value, or values that differ by rounding: an axis around them.
        let size = low.abs().max(high.abs()).clamp(1e-12, 1e300);
        let around = if high - low < 1e-6 * size { 0.1 * size } else { 0.0 };
        Self::linear(low - around, high + around, wanted)
    }

    /// Whole numbers such as steps: from the first to the last value, without a margin.
    pub(super) fn steps(values: impl Iterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
        let (low, high) = if high - low < 1.0 { (low - 1.0, high + 1.0) } else { (low, high) };
        let step = nice_step((high - low) / wanted as f64).max(1.0);
        Self { low, high, log: false, ticks: ticks_between(low, high, step) }
    }

    fn linear(low: f64, high: f64, wanted: usize) -> Self {
        let margin = (high / 2.0 - low / 2.0) * 0.1;
        let padded = low - margin;
        let low = if low >= 0.0 && padded < 0.0 { 0.0 } else { padded };
        let high = high + margin;
        let step = nice_step(high / wanted as f64 - low / wanted as f64);
        Self { low, high, log: false, ticks: ticks_between(low, high, step) }
    }

    fn decades(low: f64, high: f64, wanted: usize) -> Self {
        let (low, high) = (low.log10(), high.log10());
        let margin = (high - low) * 0.05;
        let (low, high) = (low - margin, high + margin);
        let every = ((high - low) / wanted as f64).round().max(1.0);
        let first = (low / every).ceil() as i64;
        let last = (high / every).floor() as i64;
        let ticks = (first..=last).map(|i| i as f64 * every).map(|e| (e, power_label(e as i32))).collect();
        Self { low, high, log: true, ticks }
    }

    /// Where a value lies, 0 at the low end and 1 at the high end; `None` for what cannot be drawn.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        let value = if self.log { value.log10() } else { value };
        let place = self.place_of_tick(value);
        place.is_finite().then_some(place)
    }

    /// The same for a tick's position, which is an exponent on a logarithmic axis.
    pub(super) fn place_of_tick(&self, at: f64) -> f64 {
        // Halves: the range of two doubles may exceed the largest double.
        (at / 2.0 - self.low / 2.0) / (self.high / 2.0 - self.low / 2.0)
    }
}

/// The smallest of 1, 2, 5 × 10ⁿ that is not below `raw`.
fn nice_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let found = [1.0, 2.0, 5.0].into_iter().map(|m| m * power).find(|step| *step >= raw * 0.999);
    found.unwrap_or(10.0 * power)
}

fn ticks_between(low: f64, high: f64, step: f64) -> Vec<(f64, String)> {
    let first = (low / step - 1e-9).ceil();
    let count = (high / step - first + 1e-9).floor().clamp(0.0, 50.0) as usize;
    (0..=count).map(|i| (first + i as f64) * step).map(|at| (at, label(at, step))).collect()
}

/// As many decimals as the step between ticks needs; very large and very small numbers as powers.
fn label(at: f64, step: f64) -> String {
    let size = at.abs().max(step);
    if size >= 1e6 || step < 1e-5 {
        if at == 0.0 {
            return "0".into();
        }
        let digits = ((at.abs() / step).log10().floor().max(0.0) as usize).min(6);
        return format!("{at:.digits$e}");
    }
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{at:.decimals$}")
}

fn power_label(exponent: i32) -> String {
    match exponent {
        0..=4 => format!("{}", 10i64.pow(exponent as u32)),
        -4..=-1 => format!("{:.*}", exponent.unsigned_abs() as usize, 10f64.powi(exponent)),
        _ => format!("1e{exponent}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(labels(&Axis::new([0.12, 0.93].into_iter(), 6, true)), ["0.2", "0.4", "0.6", "0.8"]);
        assert_eq!(labels(&Axis::steps([1.0, 1000.0].into_iter(), 6)), ["200", "400", "600", "800", "1000"]);
        assert_eq!(labels(&Axis::steps([1.0, 3.0].into_iter(), 8)), ["1", "2", "3"]);
        assert_eq!(labels(&Axis::new([1e-3, 5e2].into_iter(), 6, true)), ["0.001", "0.01", "0.1", "1", "10", "100"]);
    }

    #[test]
    fn any_values_give_a_usable_axis() {
        let cases: [&[f64]; 8] =
            [&[], &[f64::NAN], &[0.0], &[5.0], &[-3.0, -3.0], &[1e-300, 1e300], &[-1e308, 1e308], &[1.0, 1.0 + 1e-12]];
        for values in cases {
            let axis = Axis::new(values.iter().copied(), 6, true);
            assert!(axis.ticks.len() <= 51 && axis.low < axis.high, "{values:?} {axis:?}");
            for value in values.iter().filter(|v| v.is_finite()) {
                assert!((0.0..=1.0).contains(&axis.place(*value).unwrap()), "{values:?} {axis:?}");
            }
        }
        assert_eq!(Axis::new([1.0, 2.0].into_iter(), 6, true).place(f64::NAN), None);
    }
}
