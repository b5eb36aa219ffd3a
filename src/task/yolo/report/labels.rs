//! `labels.png`: how many objects of each class, where they are, and how large.

use super::canvas::{Anchor, Canvas, INK, PALE, colour};
use crate::task::yolo::data::{GRID, LabelCounts};
use plotters::style::RGBColor;

/// Side of a panel, and room around its picture.
const SIDE: i32 = 400;
const ROOM: i32 = 40;
/// Classes with a bar: those of most objects.
const BARS: usize = 80;
/// Bars with a name beside them.
const NAMED: usize = 20;

/// Draws objects of the training images as a PNG.
///
/// # Errors
/// It cannot be drawn.
pub fn labels(counts: &LabelCounts, names: &[String]) -> Result<Vec<u8>, String> {
    let mut canvas = Canvas::new(3 * SIDE, SIDE);
    bars(&mut canvas, &counts.classes, names)?;
    grid(&mut canvas, SIDE, "centres in the image", &counts.centres, false)?;
    grid(&mut canvas, 2 * SIDE, "width (across) and height", &counts.sizes, true)?;
    canvas.png()
}

fn bars(canvas: &mut Canvas, classes: &[u64], names: &[String]) -> Result<(), String> {
    let mut order: Vec<usize> = (0..classes.len()).collect();
    if classes.len() > NAMED {
        order.sort_by_key(|class| (std::cmp::Reverse(classes[*class]), *class));
    }
    order.truncate(BARS);
    let title = format!("{} objects of {} classes", classes.iter().sum::<u64>(), classes.len());
    canvas.words(&title, (SIDE / 2, ROOM / 2), (16.0, Anchor::Middle, INK))?;
    let most = classes.iter().copied().max().unwrap_or(0).max(1) as f64;
    let named = order.len() <= NAMED;
    let (left, right) = (if named { 3 * ROOM } else { ROOM }, SIDE - 2 * ROOM);
    let step = f64::from(SIDE - 2 * ROOM) / order.len().max(1) as f64;
    for (at, class) in order.into_iter().enumerate() {
        let [top, bottom] = [at, at + 1].map(|at| ROOM + (at as f64 * step) as i32);
        let long = (classes[class] as f64 / most * f64::from(right - left)) as i32;
        canvas.fill([(left, top), (left + long, (bottom - 2).max(top))], colour(class))?;
        if named {
            let (middle, size) = ((top + bottom) / 2, step.min(14.0));
            let name: String = names.get(class).map_or("", String::as_str).chars().take(14).collect();
            canvas.words(&name, (left - 6, middle), (size, Anchor::Right, INK))?;
            canvas.words(&classes[class].to_string(), (left + long + 6, middle), (size, Anchor::Left, INK))?;
        }
    }
    Ok(())
}

/// Cells as shades. `up`: the first row is the lowest.
fn grid(canvas: &mut Canvas, x: i32, title: &str, cells: &[u64], up: bool) -> Result<(), String> {
    canvas.words(title, (x + SIDE / 2, ROOM / 2), (16.0, Anchor::Middle, INK))?;
    let cell = (SIDE - 2 * ROOM) / GRID as i32;
    // Counts range over powers of ten.
    let shade = |count: u64| (count as f64).ln_1p();
    let most = shade(cells.iter().copied().max().unwrap_or(0).max(1));
    for (row, line) in cells.chunks(GRID).enumerate() {
        let row = if up { GRID - 1 - row } else { row } as i32;
        for (column, count) in (0..).zip(line).filter(|(_, count)| **count > 0) {
            let share = shade(*count) / most;
            let fade = |full: f64| (235.0 - share * (235.0 - full)) as u8;
            let corner = (x + ROOM + column * cell, ROOM + row * cell);
            let ink = RGBColor(fade(8.0), fade(48.0), fade(107.0));
            canvas.fill([corner, (corner.0 + cell - 1, corner.1 + cell - 1)], ink)?;
        }
    }
    let far = GRID as i32 * cell;
    canvas.frame([(x + ROOM, ROOM), (x + ROOM + far, ROOM + far)], PALE, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_many_and_no_objects_become_a_picture() {
        for (rows, classes) in
            [(vec![], 0), (vec![[1.0, 0.5, 0.5, 0.1, 0.2]; 3], 2), (vec![[999.0, 0.0, 1.0, 1.0, 1.0]], 1000)]
        {
            let names: Vec<String> = (0..classes).map(|class| class.to_string()).collect();
            let png = labels(&LabelCounts::of(rows.iter(), classes), &names).unwrap();
            let info = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap().info().clone();
            assert_eq!((info.width, info.height), (1200, 400));
        }
    }
}
