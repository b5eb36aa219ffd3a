//! The picture of real and generated cells: two principal components of both together, coloured by type.

use super::quality::principal_components;
use crate::data::source::video::image::{ImageSize, png_bytes};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};
use std::sync::Once;
use tch::{Kind, Tensor};

const PANEL: (i32, i32) = (520, 480);
const TOP: i32 = 40;
const LEGEND: i32 = 190;
const MARGIN: i32 = 16;
const FONT: &str = "headroom-sans";
const INK: RGBColor = RGBColor(51, 51, 51);
const FRAME: RGBColor = RGBColor(200, 200, 200);
/// Types with a line in the legend; the others are drawn all the same.
const NAMED: usize = 20;

/// Draws real cells (left) and generated ones (right) `[N, G]`, each with the number of its type (−1: none), as a PNG.
///
/// # Errors
/// It cannot be drawn.
pub fn draw(cells: [&Tensor; 2], types: [&[i64]; 2], names: &[String]) -> Result<Vec<u8>, String> {
    let both = Tensor::cat(&cells.map(|cells| cells.to_kind(Kind::Float)), 0);
    let points = points(&both).map_err(|e| e.to_string())?;
    let (real, generated) = points.split_at(types[0].len().min(points.len()));
    let size = (2 * PANEL.0 + 3 * MARGIN + LEGEND, PANEL.1 + TOP + MARGIN);
    let mut pixels = vec![255u8; (size.0 * size.1 * 3) as usize];
    paint(&mut pixels, size, [real, generated], types, names).map_err(|e| e.to_string())?;
    let size = ImageSize { height: size.1 as usize, width: size.0 as usize };
    png_bytes(&pixels, size).map_err(|e| e.to_string())
}

/// The first two components of each row, scaled to 0..1.
fn points(cells: &Tensor) -> Result<Vec<(f64, f64)>, tch::TchError> {
    let rows = cells.size()[0];
    let components = principal_components(cells, 2);
    let columns = (0..2).map(|column| {
        if column >= components.size()[1] {
            return Ok(vec![0.5; rows as usize]);
        }
        let values = Vec::<f64>::try_from(components.select(1, column))?;
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        let span = if high > low { high - low } else { 1.0 };
        Ok(values.iter().map(|value| (value - low) / span).collect())
    });
    let columns = columns.collect::<Result<Vec<Vec<f64>>, tch::TchError>>()?;
    Ok(columns[0].iter().copied().zip(columns[1].iter().copied()).collect())
}

fn colour(class: i64) -> RGBColor {
    if class < 0 {
        return RGBColor(150, 150, 150);
    }
    let (r, g, b) = Palette99::COLORS[class as usize % Palette99::COLORS.len()];
    RGBColor(r, g, b)
}

fn paint(
    pixels: &mut [u8],
    (width, height): (i32, i32),
    panels: [&[(f64, f64)]; 2],
    types: [&[i64]; 2],
    names: &[String],
) -> Result<(), Box<dyn std::error::Error>> {
    static FONT_READY: Once = Once::new();
    FONT_READY.call_once(|| {
        // It fails for a broken font only, and then the text below fails with its name.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
    let area = BitMapBackend::with_buffer(pixels, (width as u32, height as u32)).into_drawing_area();
    let style = |size: f64| {
        let style = (FONT, size).into_font().color(&INK);
        style.transform(FontTransform::None).pos(Pos::new(HPos::Left, VPos::Center))
    };
    let failed = |e: DrawingAreaErrorKind<_>| e.to_string();
    for (n, (points, types)) in panels.iter().zip(types).enumerate() {
        let left = MARGIN + n as i32 * (PANEL.0 + MARGIN);
        let title = format!("{} {} cells", points.len(), ["real", "generated"][n]);
        area.draw_text(&title, &style(17.0), (left, TOP / 2)).map_err(failed)?;
        let frame = Rectangle::new([(left, TOP), (left + PANEL.0, TOP + PANEL.1)], FRAME.stroke_width(1));
        area.draw(&frame).map_err(failed)?;
        for ((x, y), class) in points.iter().zip(types) {
            let place = |value: f64, room: i32| 8 + (value * f64::from(room - 16)) as i32;
            let at = (left + place(*x, PANEL.0), TOP + PANEL.1 - place(*y, PANEL.1));
            area.draw(&Circle::new(at, 2, colour(*class).mix(0.7).filled())).map_err(failed)?;
        }
    }
    let left = 2 * PANEL.0 + 3 * MARGIN;
    for (n, name) in names.iter().take(NAMED).enumerate() {
        let y = TOP + 12 + n as i32 * 22;
        area.draw(&Circle::new((left + 6, y), 5, colour(n as i64).filled())).map_err(failed)?;
        let name: String = name.chars().take(20).collect();
        area.draw_text(&name, &style(14.0), (left + 18, y)).map_err(failed)?;
    }
    Ok(area.present().map_err(failed)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn real_and_generated_cells_stand_side_by_side_in_the_colours_of_their_types() {
        tch::manual_seed(4);
        let cells = Tensor::randn([60, 5], (Kind::Float, Device::Cpu));
        let types: Vec<i64> = (0..60).map(|n| n % 3 - 1).collect();
        let names = ["one".to_owned(), "two".to_owned()];
        let png = draw([&cells, &cells], [&types, &types], &names).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (2 * 520 + 48 + 190, 480 + 56));
        // The same cells in both panels: the same pictures.
        let panel = |n: usize| {
            let rows = (41..519).map(|y| &pixels[(y * info.width as usize + 17 + n * 536) * 3..][..518 * 3]);
            rows.flatten().copied().collect::<Vec<u8>>()
        };
        assert_eq!(panel(0), panel(1));
        assert!(panel(0).chunks(3).filter(|p| p.iter().any(|v| *v < 250)).count() > 300);
    }
}
