//! A picture that lines, rectangles and words are drawn on.

use crate::data::source::video::image::{ImageSize, png_bytes};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};
use std::sync::Once;

const FONT: &str = "headroom-sans";
pub const INK: RGBColor = RGBColor(51, 51, 51);
pub const PALE: RGBColor = RGBColor(205, 205, 205);

/// Colour of a class.
pub fn colour(class: usize) -> RGBColor {
    let (r, g, b) = Palette99::COLORS[class % Palette99::COLORS.len()];
    RGBColor(r, g, b)
}

/// Pixels, three bytes each, white at first.
pub struct Canvas {
    pub width: i32,
    pub height: i32,
    pixels: Vec<u8>,
}

/// Where words stand from their place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Anchor {
    Left,
    Middle,
    Right,
}

impl Canvas {
    pub fn new(width: i32, height: i32) -> Self {
        static FONT_READY: Once = Once::new();
        FONT_READY.call_once(|| {
            // It fails for a broken font only, and then words fail with its name.
            let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
        });
        let (width, height) = (width.max(1), height.max(1));
        Self { width, height, pixels: vec![255; 3 * width as usize * height as usize] }
    }

    /// Copies pixels `[rows, columns, 3]` to a place; what lies outside is cut.
    pub fn paste(&mut self, (x, y): (i32, i32), columns: i32, pixels: &[u8]) {
        for (row, line) in (0..).zip(pixels.chunks_exact(columns.max(1) as usize * 3)) {
            let (top, room) = (y + row, (self.width - x).clamp(0, columns));
            if (0..self.height).contains(&top) && x >= 0 {
                let at = 3 * (top as usize * self.width as usize + x as usize);
                self.pixels[at..at + room as usize * 3].copy_from_slice(&line[..room as usize * 3]);
            }
        }
    }

    fn draw<E>(&mut self, element: &E) -> Result<(), String>
    where
        for<'b> &'b E: plotters::element::PointCollection<'b, (i32, i32)>,
        E: for<'b> plotters::element::Drawable<BitMapBackend<'b>>,
    {
        let size = (self.width as u32, self.height as u32);
        let area = BitMapBackend::with_buffer(&mut self.pixels, size).into_drawing_area();
        area.draw(element).map_err(|e| e.to_string())?;
        area.present().map_err(|e| e.to_string())
    }

    pub fn line(&mut self, points: Vec<(i32, i32)>, colour: RGBColor, width: u32) -> Result<(), String> {
        self.draw(&PathElement::new(points, colour.stroke_width(width)))
    }

    pub fn frame(&mut self, corners: [(i32, i32); 2], colour: RGBColor, width: u32) -> Result<(), String> {
        self.draw(&Rectangle::new(corners, colour.stroke_width(width)))
    }

    pub fn fill(&mut self, corners: [(i32, i32); 2], colour: RGBColor) -> Result<(), String> {
        self.draw(&Rectangle::new(corners, colour.filled()))
    }

    /// Words of this height whose middle line is at the place.
    pub fn words(
        &mut self,
        text: &str,
        place: (i32, i32),
        (size, anchor, colour): (f64, Anchor, RGBColor),
    ) -> Result<(), String> {
        let side = match anchor {
            Anchor::Left => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::Right => HPos::Right,
        };
        let style = (FONT, size).into_font().color(&colour);
        let style = style.transform(FontTransform::None).pos(Pos::new(side, VPos::Center));
        self.draw(&Text::new(text.to_owned(), place, style))
    }

    /// Encodes the picture as a PNG.
    ///
    /// # Errors
    /// It is too large.
    pub fn png(&self) -> Result<Vec<u8>, String> {
        let size = ImageSize { height: self.height as usize, width: self.width as usize };
        png_bytes(&self.pixels, size).map_err(|e| e.to_string())
    }
}
