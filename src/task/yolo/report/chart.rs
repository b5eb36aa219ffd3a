//! Panels of curves, and the confusion matrix.

use super::canvas::{Anchor, Canvas, INK, PALE};
use plotters::style::RGBColor;

const WORDS: f64 = 14.0;
const TITLE: f64 = 17.0;
const LEFT: i32 = 56;
const BOTTOM: i32 = 34;
const TOP: i32 = 34;
const RIGHT: i32 = 14;
/// Classes of a confusion matrix whose cells hold numbers.
const NUMBERED: usize = 16;
/// Columns that a confusion matrix has room for.
const MATRIX: i32 = 720;

/// One curve.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub colour: RGBColor,
    pub width: u32,
}

/// A panel of curves.
pub struct Panel {
    pub title: String,
    pub across: String,
    pub curves: Vec<Curve>,
    /// Range of both axes. `None`: that of the points.
    pub unit: bool,
}

/// Panels in rows of `columns`, each of this size, as a PNG. `legend`: names of curves are written beside the first.
///
/// # Errors
/// It cannot be drawn.
pub fn sheet(panels: &[Panel], columns: usize, (width, height): (i32, i32), legend: bool) -> Result<Vec<u8>, String> {
    let rows = panels.len().div_ceil(columns.max(1));
    let beside = if legend { 200 } else { 0 };
    let mut canvas = Canvas::new(columns as i32 * width + beside, rows as i32 * height);
    for (at, panel) in panels.iter().enumerate() {
        let place = ((at % columns) as i32 * width, (at / columns) as i32 * height);
        draw(&mut canvas, panel, place, (width, height))?;
    }
    if let (true, Some(panel)) = (legend, panels.first()) {
        let left = columns as i32 * width;
        for (at, curve) in panel.curves.iter().rev().take((height as usize - 60) / 22).enumerate() {
            let y = TOP + 12 + at as i32 * 22;
            canvas.line(vec![(left, y), (left + 18, y)], curve.colour, 3)?;
            let name: String = curve.name.chars().take(24).collect();
            canvas.words(&name, (left + 24, y), (WORDS, Anchor::Left, INK))?;
        }
    }
    canvas.png()
}

/// Least and largest of finite numbers, apart from each other.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    match (low, high) {
        (low, high) if low > high => (0.0, 1.0),
        (low, high) if low == high => (low - 0.5, high + 0.5),
        range => range,
    }
}

fn draw(canvas: &mut Canvas, panel: &Panel, (x, y): (i32, i32), (width, height): (i32, i32)) -> Result<(), String> {
    let all = || panel.curves.iter().flat_map(|curve| &curve.points);
    let (across, up) = if panel.unit {
        ((0.0, 1.0), (0.0, 1.0))
    } else {
        (range(all().map(|point| point.0)), range(all().map(|point| point.1)))
    };
    let (left, right, top, bottom) = (x + LEFT, x + width - RIGHT, y + TOP, y + height - BOTTOM);
    let part = |value: f64, (low, high): (f64, f64)| ((value - low) / (high - low)).clamp(0.0, 1.0);
    let place = |point: &(f64, f64)| {
        let (h, v) = (part(point.0, across), part(point.1, up));
        (left + (h * f64::from(right - left)) as i32, bottom - (v * f64::from(bottom - top)) as i32)
    };
    canvas.frame([(left, top), (right, bottom)], PALE, 1)?;
    canvas.words(&panel.title, ((left + right) / 2, y + TOP / 2), (TITLE, Anchor::Middle, INK))?;
    canvas.words(&panel.across, ((left + right) / 2, y + height - 8), (WORDS, Anchor::Middle, INK))?;
    for (value, at) in [(up.0, bottom), (up.1, top)] {
        canvas.words(&short(value), (left - 6, at), (WORDS, Anchor::Right, INK))?;
    }
    for (value, at) in [(across.0, left), (across.1, right)] {
        canvas.words(&short(value), (at, bottom + 12), (WORDS, Anchor::Middle, INK))?;
    }
    for curve in &panel.curves {
        let finite = curve.points.iter().filter(|point| point.1.is_finite());
        canvas.line(finite.map(place).collect(), curve.colour, curve.width)?;
    }
    Ok(())
}

/// Three significant digits.
fn short(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 6) };
    format!("{value:.*}", digits as usize)
}

/// The confusion matrix `[side × side]`, each column as shares of its sum: rows are predictions, columns the truth.
///
/// # Errors
/// It cannot be drawn.
pub fn matrix(counts: &[f64], names: &[String]) -> Result<Vec<u8>, String> {
    let side = names.len() + 1;
    let cell = (MATRIX / side as i32).clamp(1, 60);
    let (left, top) = (170, 40);
    let mut canvas = Canvas::new(left + cell * side as i32 + 20, top + cell * side as i32 + 60);
    let name = |at: usize| names.get(at).map_or("background", String::as_str).chars().take(18).collect::<String>();
    canvas.words("predicted (rows) against true (columns)", (left, top / 2), (TITLE, Anchor::Left, INK))?;
    for column in 0..side {
        let sum: f64 = (0..side).map(|row| counts[row * side + column]).sum();
        for row in 0..side {
            let share = if sum > 0.0 { counts[row * side + column] / sum } else { 0.0 };
            let corner = (left + column as i32 * cell, top + row as i32 * cell);
            let fade = |full: f64| (255.0 - share * (255.0 - full)) as u8;
            canvas.fill([corner, (corner.0 + cell, corner.1 + cell)], RGBColor(fade(8.0), fade(48.0), fade(107.0)))?;
            if side <= NUMBERED && share > 0.0 {
                let ink = if share > 0.5 { RGBColor(255, 255, 255) } else { INK };
                let middle = (corner.0 + cell / 2, corner.1 + cell / 2);
                canvas.words(&format!("{share:.2}"), middle, (WORDS, Anchor::Middle, ink))?;
            }
        }
        if cell >= 12 {
            let y = top + column as i32 * cell + cell / 2;
            canvas.words(&name(column), (left - 8, y), (WORDS.min(f64::from(cell)), Anchor::Right, INK))?;
        }
        if cell >= 40 {
            let x = left + column as i32 * cell + cell / 2;
            let short: String = name(column).chars().take(7).collect();
            canvas.words(&short, (x, top + side as i32 * cell + 14), (WORDS - 2.0, Anchor::Middle, INK))?;
        }
    }
    let end = (left + side as i32 * cell, top + side as i32 * cell);
    canvas.frame([(left, top), end], PALE, 1)?;
    canvas.png()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let values = [0.0, 1.0, 0.123_45, 12.345, 1234.5, 0.000_012_3];
        assert_eq!(values.map(short), ["0", "1.00", "0.123", "12.3", "1234", "0.000012"]);
        assert_eq!((range([].into_iter()), range([2.0, f64::NAN].into_iter())), ((0.0, 1.0), (1.5, 2.5)));
    }

    #[test]
    fn curves_and_matrices_become_pictures() {
        let curve = |points| Curve { name: "a".into(), points, colour: INK, width: 2 };
        let panel = |points| Panel { title: "t".into(), across: "x".into(), curves: vec![curve(points)], unit: false };
        let panels = [panel(vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)]), panel(vec![])];
        assert!(sheet(&panels, 2, (200, 150), true).unwrap().starts_with(b"\x89PNG"));
        assert!(matrix(&[1.0, 0.0, 2.0, 0.0], &["a".into()]).unwrap().starts_with(b"\x89PNG"));
        let many: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        assert!(matrix(&vec![0.0; 1001 * 1001], &many).unwrap().starts_with(b"\x89PNG"));
    }
}
