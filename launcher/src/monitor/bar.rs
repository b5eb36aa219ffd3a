//! Label, bar and numbers in one line, as wide as there is room.

use spec::plan::bytes_text;

/// Columns of a label and the blank behind it.
pub const LABEL: usize = 10;
/// Columns from which on numbers are written out.
const WIDE: usize = 60;
/// `  100.0 MiB of 100.0 MiB planned  100.0 %`, and the blank before it.
const NUMBERS: usize = 44;
/// `18.8G/23.5G  100 %`, and the blank before it.
const SHORT_NUMBERS: usize = 18;
/// A narrower bar says nothing.
const LEAST_BAR: usize = 4;

pub struct Bar<'a> {
    pub label: &'a str,
    pub used: u64,
    pub total: u64,
    /// Bytes at which a line stands in the bar.
    pub mark: Option<u64>,
    /// Name of `total` in a word; may be empty.
    pub of: &'a str,
    /// Percentage from which the bar is red and bold. `None` means never.
    pub alarm: Option<f64>,
}

impl<'a> Bar<'a> {
    pub fn new(label: &'a str, used: u64, total: u64, of: &'a str) -> Self {
        Self { label, used, total, mark: None, of, alarm: Some(90.0) }
    }
}

/// How a terminal's columns are shared out.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    all: usize,
    label: usize,
    /// 0: no bar.
    bar: usize,
    wide: bool,
}

impl Widths {
    /// `label`: what labels would like to have.
    pub fn of(all: usize, label: usize) -> Self {
        let wide = all >= WIDE;
        let numbers = if wide { NUMBERS } else { SHORT_NUMBERS };
        let label = label.min(all.saturating_sub(numbers + 2 * LEAST_BAR).max(LABEL));
        let bar = all.saturating_sub(label + numbers);
        Self { all, label, bar: if bar < LEAST_BAR { 0 } else { bar }, wide }
    }
}

pub struct Ink {
    pub colour: bool,
    pub widths: Widths,
}

impl Ink {
    pub fn bold(&self, text: &str) -> String {
        if self.colour { format!("\u{1b}[1m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// The filled part of an alarm is red and bold, which is legible on any background.
    pub fn bar(&self, bar: &Bar) -> String {
        let Widths { all, label, bar: room, wide } = self.widths;
        let cells = |bytes: u64| ((bytes as f64 / bar.total.max(1) as f64).min(1.0) * room as f64).round() as usize;
        let filled = cells(bar.used);
        let mark = bar.mark.filter(|_| room > 0).map(|bytes| cells(bytes).min(room - 1));
        let cell = |i: usize| match i {
            _ if mark == Some(i) => '│',
            _ if i < filled => '█',
            _ => '·',
        };
        let (full, rest): (String, String) = ((0..filled).map(cell).collect(), (filled..room).map(cell).collect());
        let share = percent(bar.used, bar.total);
        let numbers = if wide {
            let sizes = format!("{:>10} of {} {}", bytes_text(bar.used), bytes_text(bar.total), bar.of);
            format!("{:<36}{:>5.1} %", sizes.trim_end(), share.min(9999.9))
        } else {
            let sizes = format!("{}/{}", short(bar.used), short(bar.total));
            format!("{sizes:<11}{:>4.0} %", share.min(9999.0))
        };
        let name = pad(&cut(bar.label, label - 1), label);
        if room == 0 {
            return cut(&format!("{name}{numbers}"), all);
        }
        let full = match self.colour && bar.alarm.is_some_and(|alarm| share >= alarm) {
            true => format!("\u{1b}[1;31m{full}\u{1b}[0m"),
            false => full,
        };
        format!("{name}{full}{rest} {numbers}")
    }
}

pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// `456K`, `245M`, `18.8G`: at most five columns.
fn short(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 'B');
    for next in ['K', 'M', 'G', 'T', 'P'] {
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if matches!(unit, 'B' | 'K' | 'M') || value >= 99.95 {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}

/// At most `width` columns of `text`.
pub fn cut(text: &str, width: usize) -> String {
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

/// Blanks behind `text` up to `width` columns.
fn pad(text: &str, width: usize) -> String {
    let blanks = width.saturating_sub(text.chars().map(columns).sum());
    format!("{text}{}", " ".repeat(blanks))
}

/// Columns that a terminal gives a character: two for Chinese and for the levels' marks.
pub fn columns(c: char) -> usize {
    let wide = matches!(u32::from(c), 0x1100..=0x115F | 0x2E80..=0xA4CF | 0xAC00..=0xD7A3 | 0xF900..=0xFAFF
        | 0xFE30..=0xFE6F | 0xFF00..=0xFF60 | 0xFFE0..=0xFFE6 | 0x1F300..=0x1FAFF);
    1 + usize::from(wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sizes_take_five_columns_at_most() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (456 << 10, "456K"),
            (1020 << 10, "1M"),
            (245 << 20, "245M"),
            (1 << 30, "1.0G"),
            (24 << 30, "24.0G"),
            (256 << 30, "256G"),
            (3 << 40, "3.0T"),
        ] {
            assert_eq!(short(bytes), text);
        }
    }

    #[test]
    fn names_are_cut_and_padded_by_columns() {
        assert_eq!(cut("内存", 3), "内…");
        assert_eq!(pad("内存", 6), "内存  ");
        assert_eq!(cut("abc", 0), "…");
    }
}
