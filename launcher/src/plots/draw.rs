//! Pixels: panels below each other, each with title, legend above the plot area, axes, light grid and curves.

use super::axis::Axis;
use super::{History, PlotError};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};
use std::path::Path;
use std::sync::Once;

const WIDTH: u32 = 1200;
const PANEL_HEIGHT: u32 = 560;
/// Room around a panel's plot area, pixels.
const LEFT: i32 = 120;
const RIGHT: i32 = 36;
const TOP: i32 = 96;
const BOTTOM: i32 = 76;
const FONT: &str = "headroom-sans";
const INK: RGBColor = RGBColor(51, 51, 51);
const FAINT: RGBColor = RGBColor(228, 228, 228);
const ALERT: RGBColor = RGBColor(179, 0, 0);
/// Colours distinguishable with most kinds of colour blindness (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];
/// Dash and gap of a limit, pixels.
const DASH: (i32, i32) = (10, 6);
/// Least distance of two limits' names, pixels.
const LABEL_HEIGHT: i32 = 22;
/// Least distance of two marks' numbers, pixels.
const NUMBER_WIDTH: i32 = 44;

/// One line of a panel.
pub(super) struct Curve {
    name: String,
    pub(super) history: History,
    colour: RGBColor,
    /// Few, far-apart values: each is marked.
    dots: bool,
    /// Filled down to the horizontal axis.
    filled: bool,
}

impl Curve {
    pub(super) fn line(name: &str, history: History, colour: usize) -> Self {
        Self { name: name.into(), history, colour: COLOURS[colour % COLOURS.len()], dots: false, filled: false }
    }

    /// The top of a stacked area; areas are drawn in order, so the highest comes first.
    pub(super) fn area(name: &str, history: History, colour: usize) -> Self {
        Self { filled: true, ..Self::line(name, history, colour) }
    }

    pub(super) fn dots(name: &str, history: History, colour: usize) -> Self {
        Self { dots: true, ..Self::line(name, history, colour) }
    }

    /// Largest value; 0 without values.
    pub(super) fn highest(&self) -> f64 {
        self.history.points.iter().map(|p| p.1).fold(0.0, f64::max)
    }

    fn legend(&self) -> String {
        match self.history.lost {
            0 => self.name.clone(),
            lost => format!("{} ({lost} not finite, left out)", self.name),
        }
    }
}

/// One plot area with its axes.
pub(super) struct Panel {
    pub title: String,
    pub x: &'static str,
    pub y: String,
    /// Logarithmic where the values span decades.
    pub may_log: bool,
    pub curves: Vec<Curve>,
    /// Horizontal lines with their names, such as a budget.
    pub limits: Vec<(String, f64)>,
    /// Numbered vertical lines: where something happened.
    pub marks: Vec<f64>,
}

impl Panel {
    pub(super) fn new(title: String, x: &'static str, y: String, curves: Vec<Curve>) -> Self {
        Self { title, x, y, may_log: false, curves, limits: Vec::new(), marks: Vec::new() }
    }

    pub(super) fn log(self) -> Self {
        Self { may_log: true, ..self }
    }

    fn values(&self) -> impl Iterator<Item = f64> + '_ {
        let floor = self.curves.iter().any(|curve| curve.filled).then_some(0.0);
        let points = self.curves.iter().flat_map(|c| c.history.points.iter().map(|p| p.1));
        points.chain(self.limits.iter().map(|limit| limit.1)).chain(floor)
    }
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), String>;

/// Draws the panels into a sibling of `path` and renames it, so that a viewer never sees half a figure.
pub(super) fn figure(path: &Path, panels: &[Panel]) -> Result<(), PlotError> {
    static FONT_READY: Once = Once::new();
    FONT_READY.call_once(|| {
        // It fails for a broken font only, and then the text below fails with its name.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
    let fail = |problem: String| PlotError::Draw { path: path.to_owned(), problem };
    // One axis of steps for all, so that panels can be compared.
    let points = panels.iter().flat_map(|panel| &panel.curves).flat_map(|curve| &curve.history.points);
    let xs = Axis::steps(points.map(|p| p.0), 8);
    let sibling = path.with_extension(format!("tmp-{}.png", std::process::id()));
    {
        let root = BitMapBackend::new(&sibling, (WIDTH, PANEL_HEIGHT * panels.len() as u32)).into_drawing_area();
        let areas = root.split_evenly((panels.len(), 1));
        let drawn = root
            .fill(&WHITE)
            .map_err(text)
            .and_then(|()| panels.iter().zip(&areas).try_for_each(|(panel, area)| draw_panel(area, panel, &xs)));
        drawn.and_then(|()| root.present().map_err(text)).map_err(fail)?;
    }
    std::fs::rename(&sibling, path).map_err(|e| fail(e.to_string()))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn style(size: i32, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour).pos(Pos::new(h, v))
}

/// Pixel bounds of a plot area.
struct Frame {
    x0: i32,
    x1: i32,
    y0: i32,
    y1: i32,
}

impl Frame {
    fn x(&self, place: f64) -> i32 {
        self.x0 + (place * f64::from(self.x1 - self.x0)).round() as i32
    }

    fn y(&self, place: f64) -> i32 {
        self.y1 - (place * f64::from(self.y1 - self.y0)).round() as i32
    }
}

fn draw_panel(area: &Area, panel: &Panel, xs: &Axis) -> Drawn {
    let (width, height) = area.dim_in_pixel();
    let frame = Frame { x0: LEFT, x1: width as i32 - RIGHT, y0: TOP, y1: height as i32 - BOTTOM };
    let points = || panel.curves.iter().flat_map(|c| c.history.points.iter());
    let ys = Axis::new(panel.values(), 7, panel.may_log);
    area.draw(&Text::new(panel.title.clone(), (LEFT, 22), style(24, INK, HPos::Left, VPos::Top))).map_err(text)?;
    draw_axes(area, &frame, xs, &ys)?;
    draw_names(area, &frame, panel)?;
    draw_legend(area, panel)?;
    for curve in &panel.curves {
        if curve.filled {
            draw_area(area, &frame, xs, &ys, curve)?;
        } else {
            draw_curve(area, &frame, xs, &ys, curve)?;
        }
    }
    draw_limits(area, &frame, &ys, &panel.limits)?;
    draw_marks(area, &frame, xs, &panel.marks)?;
    if points().next().is_none() {
        let middle = ((frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2);
        area.draw(&Text::new("no values yet", middle, style(20, INK, HPos::Center, VPos::Center))).map_err(text)?;
    }
    Ok(())
}

fn draw_axes(area: &Area, frame: &Frame, xs: &Axis, ys: &Axis) -> Drawn {
    let line = |from, to, colour: RGBColor| area.draw(&PathElement::new([from, to], colour)).map_err(text);
    for (at, label) in &xs.ticks {
        let x = frame.x(xs.place_of_tick(*at));
        line((x, frame.y0), (x, frame.y1), FAINT)?;
        line((x, frame.y1), (x, frame.y1 + 5), INK)?;
        let label = Text::new(label.clone(), (x, frame.y1 + 10), style(17, INK, HPos::Center, VPos::Top));
        area.draw(&label).map_err(text)?;
    }
    for (at, label) in &ys.ticks {
        let y = frame.y(ys.place_of_tick(*at));
        line((frame.x0, y), (frame.x1, y), FAINT)?;
        line((frame.x0 - 5, y), (frame.x0, y), INK)?;
        let label = Text::new(label.clone(), (frame.x0 - 10, y), style(17, INK, HPos::Right, VPos::Center));
        area.draw(&label).map_err(text)?;
    }
    line((frame.x0, frame.y0), (frame.x0, frame.y1), INK)?;
    line((frame.x0, frame.y1), (frame.x1, frame.y1), INK)
}

fn draw_names(area: &Area, frame: &Frame, panel: &Panel) -> Drawn {
    let below = ((frame.x0 + frame.x1) / 2, frame.y1 + 40);
    area.draw(&Text::new(panel.x, below, style(19, INK, HPos::Center, VPos::Top))).map_err(text)?;
    let beside = (24, (frame.y0 + frame.y1) / 2);
    let upwards = (FONT, 19).into_font().transform(FontTransform::Rotate270).color(&INK);
    let upwards = upwards.pos(Pos::new(HPos::Center, VPos::Center));
    area.draw(&Text::new(panel.y.clone(), beside, upwards)).map_err(text)
}

/// Draws the legend on a line between title and plot area, where it can cover no data.
fn draw_legend(area: &Area, panel: &Panel) -> Drawn {
    let mut x = LEFT;
    for curve in panel.curves.iter().filter(|c| !c.history.points.is_empty() || c.history.lost > 0) {
        let y = 72;
        let stroke = curve.colour.stroke_width(3);
        area.draw(&PathElement::new([(x, y), (x + 34, y)], stroke)).map_err(text)?;
        if curve.dots {
            area.draw(&Circle::new((x + 17, y), 5, curve.colour.filled())).map_err(text)?;
        }
        let style = style(17, INK, HPos::Left, VPos::Center);
        let (wide, _) = area.estimate_text_size(&curve.legend(), &style).map_err(text)?;
        area.draw(&Text::new(curve.legend(), (x + 44, y), style)).map_err(text)?;
        x += 44 + wide as i32 + 36;
    }
    Ok(())
}

/// From the curve down to the axis. What was drawn before is covered, so that a stack shows each part once.
fn draw_area(area: &Area, frame: &Frame, xs: &Axis, ys: &Axis, curve: &Curve) -> Drawn {
    let pixel = |(x, y): &(f64, f64)| Some((frame.x(xs.place(*x)?), frame.y(ys.place(*y)?)));
    let top: Vec<(i32, i32)> = curve.history.points.iter().filter_map(pixel).collect();
    let (Some(first), Some(last)) = (top.first().copied(), top.last().copied()) else { return Ok(()) };
    let mut outline = top.clone();
    outline.extend([(last.0, frame.y1), (first.0, frame.y1)]);
    area.draw(&Polygon::new(outline.clone(), WHITE.filled())).map_err(text)?;
    area.draw(&Polygon::new(outline, curve.colour.mix(0.55).filled())).map_err(text)?;
    area.draw(&PathElement::new(top, curve.colour.stroke_width(2))).map_err(text)
}

/// Dashed lines across the plot area; names stand above them, those of lines close together beside each other.
fn draw_limits(area: &Area, frame: &Frame, ys: &Axis, limits: &[(String, f64)]) -> Drawn {
    let known = limits.iter().filter_map(|(name, value)| Some((name.as_str(), frame.y(ys.place(*value)?))));
    for (names, y) in labels(known.collect()) {
        let at = (frame.x1 - 4, y - 3);
        area.draw(&Text::new(names, at, style(16, ALERT, HPos::Right, VPos::Bottom))).map_err(text)?;
    }
    for place in limits.iter().filter_map(|limit| ys.place(limit.1)) {
        let y = frame.y(place);
        for x in (frame.x0..frame.x1).step_by((DASH.0 + DASH.1) as usize) {
            let dash = [(x, y), ((x + DASH.0).min(frame.x1), y)];
            area.draw(&PathElement::new(dash, ALERT.stroke_width(2))).map_err(text)?;
        }
    }
    Ok(())
}

/// Names of limits and their heights in pixels from the top; those that stand too close for two lines of text share one,
/// over the highest of them.
fn labels(mut limits: Vec<(&str, i32)>) -> Vec<(String, i32)> {
    limits.sort_by_key(|(_, y)| std::cmp::Reverse(*y));
    let mut labels: Vec<(String, i32)> = Vec::new();
    for (name, y) in limits {
        match labels.last_mut() {
            Some((names, last)) if *last - y < LABEL_HEIGHT => {
                *names = format!("{names}, {name}");
                *last = y;
            }
            _ => labels.push((name.to_owned(), y)),
        }
    }
    labels
}

/// Vertical lines, numbered at their upper end.
fn draw_marks(area: &Area, frame: &Frame, xs: &Axis, marks: &[f64]) -> Drawn {
    let places = marks.iter().enumerate().filter_map(|(index, at)| Some((index + 1, frame.x(xs.place(*at)?))));
    let places: Vec<(usize, i32)> = places.collect();
    for (_, x) in &places {
        area.draw(&PathElement::new([(*x, frame.y0), (*x, frame.y1)], INK.stroke_width(1))).map_err(text)?;
    }
    for (numbers, x) in numbers(&places) {
        let at = (x, frame.y0 - 2);
        area.draw(&Text::new(numbers, at, style(15, INK, HPos::Center, VPos::Bottom))).map_err(text)?;
    }
    Ok(())
}

/// Labels over marks, and their places, pixels from the left. Marks too close for two numbers share one label.
fn numbers(marks: &[(usize, i32)]) -> Vec<(String, i32)> {
    let close = |a: &(usize, i32), b: &(usize, i32)| b.1 - a.1 < NUMBER_WIDTH;
    let of = |group: &[(usize, i32)]| match group {
        [] => None,
        [(number, x)] => Some((number.to_string(), *x)),
        [first, .., last] => Some((format!("{}–{}", first.0, last.0), (first.1 + last.1) / 2)),
    };
    marks.chunk_by(close).filter_map(of).collect()
}

fn draw_curve(area: &Area, frame: &Frame, xs: &Axis, ys: &Axis, curve: &Curve) -> Drawn {
    let pixel = |(x, y): &(f64, f64)| Some((frame.x(xs.place(*x)?), frame.y(ys.place(*y)?)));
    let pixels: Vec<(i32, i32)> = curve.history.points.iter().filter_map(pixel).collect();
    let columns: Vec<&[(i32, i32)]> = pixels.chunk_by(|a, b| a.0 == b.0).collect();
    let mut path = pixels.clone();
    if pixels.len() > 2 * columns.len() {
        // Many values per pixel: their range as a pale band, their mean as the line.
        for column in &columns {
            let (low, high) = column.iter().fold((i32::MAX, i32::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
            let band = PathElement::new([(column[0].0, low), (column[0].0, high)], curve.colour.mix(0.3));
            area.draw(&band).map_err(text)?;
        }
        path = columns.iter().map(|column| mean(column)).collect();
    }
    if path.len() > 1 {
        area.draw(&PathElement::new(path, curve.colour.stroke_width(2))).map_err(text)?;
    }
    if (curve.dots && pixels.len() <= 120) || pixels.len() == 1 {
        for at in &pixels {
            area.draw(&Circle::new(*at, 5, curve.colour.filled())).map_err(text)?;
        }
    }
    Ok(())
}

fn mean(column: &[(i32, i32)]) -> (i32, i32) {
    let sum: i64 = column.iter().map(|p| i64::from(p.1)).sum();
    (column[0].0, (sum / column.len() as i64) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_stand_close_are_one_range() {
        let found = numbers(&[(1, 100), (2, 200), (3, 220), (4, 240), (5, 400)]);
        assert_eq!(found, [("1", 100), ("2–4", 220), ("5", 400)].map(|(text, x)| (text.to_owned(), x)));
    }

    #[test]
    fn names_of_limits_that_stand_close_share_a_line() {
        let found = labels(vec![("budget", 100), ("planned", 101), ("80 %", 150), ("70 %", 172)]);
        let expected = [("70 %", 172), ("80 %", 150), ("planned, budget", 100)];
        assert_eq!(found, expected.map(|(name, y)| (name.to_owned(), y)));
    }
}
