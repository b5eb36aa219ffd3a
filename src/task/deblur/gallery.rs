//! Pictures of validation clips: `blur | output | sharp | error` of the middle frame, one row per clip.

use super::data::voxel;
use super::quality::psnr;
use crate::data::source::video::image::{ImageSize, png_bytes};
use crate::task::{Batch, Gallery, Output};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};
use std::sync::Once;
use tch::{Kind, Tensor, no_grad};

/// Factor on the absolute error, so that it is seen.
const AMPLIFIED: f64 = 4.0;
/// A picture's width on the sheet: smaller frames are enlarged by whole numbers, larger ones shrunk.
const WIDTH: i64 = 384;
const GAP: i64 = 8;
const CAPTION: i64 = 26;
const FONT: &str = "headroom-sans";
const INK: RGBColor = RGBColor(51, 51, 51);

/// Collects the first clips that come by.
pub struct ClipGallery {
    wanted: usize,
    rows: Vec<Row>,
}

/// One clip's middle frame: four pictures u8 `[h, w, 3]` and their captions.
struct Row {
    pictures: [Tensor; 4],
    captions: [String; 4],
}

impl ClipGallery {
    pub fn new(wanted: usize) -> Self {
        Self { wanted, rows: Vec::new() }
    }
}

impl Gallery for ClipGallery {
    fn look(&mut self, batch: &Batch, output: &Output) {
        for clip in 0..batch.len() as i64 {
            if self.rows.len() < self.wanted {
                self.rows.push(no_grad(|| row(batch, output, clip)));
            }
        }
    }

    fn picture(&mut self) -> Option<Result<Vec<u8>, String>> {
        let rows = std::mem::take(&mut self.rows);
        (!rows.is_empty()).then(|| sheet(&rows))
    }
}

fn row(batch: &Batch, output: &Output, clip: i64) -> Row {
    let middle = batch.fields[0].size().get(1).map_or(0, |frames| frames / 2);
    // One frame [1, 3, h, w] of fields [B, T, h, w, 3] in bytes.
    let field = |n: usize| voxel::frames(&batch.fields[n].narrow(0, clip, 1).narrow(1, middle, 1)).select(1, 0);
    let (blur, sharp) = (field(0), field(1));
    let restored = output.prediction.detach().narrow(0, clip, 1).select(1, middle).to_kind(Kind::Float).clamp(0.0, 1.0);
    let error = ((&restored - &sharp).abs() * AMPLIFIED).clamp(0.0, 1.0);
    let db = |frame: &Tensor| psnr(frame, &sharp).double_value(&[0]);
    let captions = [
        format!("blurred input, {:.2} dB", db(&blur)),
        format!("output, {:.2} dB", db(&restored)),
        "sharp".to_owned(),
        format!("|output − sharp| × {AMPLIFIED}"),
    ];
    Row { pictures: [blur, restored, sharp, error].map(|frame| to_pixels(&frame)), captions }
}

/// A frame `[1, 3, h, w]` in 0..1 → u8 `[h', w', 3]` of about [`WIDTH`] columns.
fn to_pixels(frame: &Tensor) -> Tensor {
    let (_, _, h, w) = frame.size4().unwrap_or((1, 3, 1, 1));
    let sized = if w > WIDTH {
        // Each pixel the mean of its part: what is shrunk does not flicker.
        frame.adaptive_avg_pool2d([(h * WIDTH / w).max(1), WIDTH])
    } else {
        let times = (WIDTH / w).max(1);
        frame.upsample_nearest2d([h * times, w * times], None, None)
    };
    (sized * 255.0)
        .round()
        .squeeze_dim(0)
        .permute([1, 2, 0])
        .to_kind(Kind::Uint8)
        .contiguous()
        .to_device(tch::Device::Cpu)
}

/// All rows on white, as a PNG.
fn sheet(rows: &[Row]) -> Result<Vec<u8>, String> {
    let size = |row: &Row| (row.pictures[0].size()[0], row.pictures[0].size()[1]);
    let (tall, wide) = rows.iter().map(size).fold((1, 1), |(h, w), (y, x)| (h.max(y), w.max(x)));
    let (width, height) = (4 * (wide + GAP) + GAP, rows.len() as i64 * (tall + CAPTION + GAP) + GAP);
    let mut pixels = vec![255u8; (width * height * 3) as usize];
    for (n, row) in rows.iter().enumerate() {
        let top = GAP + CAPTION + n as i64 * (tall + CAPTION + GAP);
        for (column, picture) in row.pictures.iter().enumerate() {
            paste(&mut pixels, width, (GAP + column as i64 * (wide + GAP), top), picture)?;
        }
    }
    write_captions(&mut pixels, (width, height), rows, (wide, tall)).map_err(|e| format!("captions: {e}"))?;
    png_bytes(&pixels, ImageSize { height: height as usize, width: width as usize }).map_err(|e| e.to_string())
}

fn paste(pixels: &mut [u8], width: i64, (x, y): (i64, i64), picture: &Tensor) -> Result<(), String> {
    let columns = picture.size()[1];
    let bytes = Vec::<u8>::try_from(picture.flatten(0, -1)).map_err(|e| e.to_string())?;
    for (n, line) in bytes.chunks_exact(columns as usize * 3).enumerate() {
        let at = (((y + n as i64) * width + x) * 3) as usize;
        pixels[at..at + line.len()].copy_from_slice(line);
    }
    Ok(())
}

fn write_captions(
    pixels: &mut [u8],
    (width, height): (i64, i64),
    rows: &[Row],
    (wide, tall): (i64, i64),
) -> Result<(), Box<dyn std::error::Error>> {
    static FONT_READY: Once = Once::new();
    FONT_READY.call_once(|| {
        // It fails for a broken font only, and then the text below fails with its name.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
    // Words grow with what they stand on, so that those of small frames do not run into each other.
    let style = (FONT, (wide as f64 / 16.0).clamp(8.0, 17.0)).into_font().color(&INK);
    let style = style.transform(FontTransform::None).pos(Pos::new(HPos::Left, VPos::Center));
    let area = BitMapBackend::with_buffer(pixels, (width as u32, height as u32)).into_drawing_area();
    let mut said = Ok(());
    for (n, row) in rows.iter().enumerate() {
        let y = GAP + CAPTION / 2 + n as i64 * (tall + CAPTION + GAP);
        for (column, caption) in row.captions.iter().enumerate() {
            let x = GAP + column as i64 * (wide + GAP);
            said = said.and(area.draw_text(caption, &style, (x as i32, y as i32)).map_err(|e| e.to_string()));
        }
    }
    Ok(said.and_then(|()| area.present().map_err(|e| e.to_string()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn batch(clips: i64, h: i64, w: i64) -> (Batch, Output) {
        let values = |step: f64| {
            let count = clips * 3 * h * w * 3;
            let wave = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 100.0 + 120.0;
            wave.view([clips, 3, h, w, 3]).to_kind(Kind::Uint8)
        };
        let prediction = voxel::frames(&values(0.02));
        let batch = Batch::new(vec![values(0.01), values(0.02)], vec![0; clips as usize]);
        (batch, Output::new(Tensor::from(0.0), prediction))
    }

    fn decoded(png: &[u8]) -> (usize, usize, Vec<u8>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        (info.width as usize, info.height as usize, pixels)
    }

    #[test]
    fn a_row_per_clip_with_pictures_side_by_side_and_a_black_error_where_there_is_none() {
        let mut gallery = ClipGallery::new(2);
        assert!(gallery.picture().is_none());
        let (batch, output) = batch(3, 48, 64);
        gallery.look(&batch, &output);
        let (width, height, pixels) = decoded(&gallery.picture().unwrap().unwrap());
        assert_eq!((width, height), (4 * (384 + 8) + 8, 2 * (288 + 26 + 8) + 8));
        let at = |x: usize, y: usize| &pixels[(y * width + x) * 3..][..3];
        // The output is the sharp frame: its picture equals that, and the error is black.
        let (x, y) = (8 + 100, 8 + 26 + 50);
        assert_eq!(at(x + 392, y), at(x + 2 * 392, y));
        assert_ne!(at(x, y), at(x + 2 * 392, y));
        assert_eq!(at(x + 3 * 392, y), [0, 0, 0]);
        let dark = pixels[..width * (8 + 26) * 3].iter().filter(|value| **value < 100).count();
        assert!(dark > 200, "captions are written above: {dark} dark values");
        assert!(gallery.picture().is_none());
    }

    #[test]
    fn wide_frames_are_shrunk() {
        let (batch, output) = batch(1, 60, 1000);
        let mut gallery = ClipGallery::new(1);
        gallery.look(&batch, &output);
        let (width, height, _) = decoded(&gallery.picture().unwrap().unwrap());
        assert_eq!((width, height), (4 * (384 + 8) + 8, 23 + 26 + 8 + 8));
    }
}
