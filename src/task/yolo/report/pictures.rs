//! Images with boxes drawn on them: the truth beside the prediction.

use super::canvas::{Anchor, Canvas, INK, colour};
use crate::task::yolo::data::batch::rectangles;
use crate::task::yolo::detect::{Detection, from_tensor};
use crate::task::yolo::measure::matching::Truth;
use crate::task::yolo::measure::truth::truths;
use crate::task::{Batch, Gallery, Output};
use tch::{Device, Kind, TchError, Tensor};

/// Least confidence of a box that is drawn.
const SHOWN: f32 = 0.25;
/// Columns of an image on the sheet, about.
const WIDTH: i64 = 320;
/// Rows of pixels of a sheet, about: what `log.images` asks for beyond them is left out, since all are held until it is drawn.
const MOST_ROWS: i32 = 20_000;
const GAP: i32 = 8;
const CAPTION: i32 = 24;

/// A box with words at its corner.
pub struct Marked {
    pub corners: [f32; 4],
    pub class: usize,
    pub words: String,
}

impl Marked {
    /// A detection: class and confidence.
    pub fn found(object: &Detection, names: &[String]) -> Self {
        let class = usize::from(object.class);
        let words = format!("{} {:.2}", named(names, class), object.confidence);
        Self { corners: object.corners, class, words }
    }

    fn labelled(truth: &Truth, names: &[String]) -> Self {
        let class = usize::from(truth.class);
        Self { corners: truth.corners, class, words: named(names, class) }
    }
}

fn named(names: &[String], class: usize) -> String {
    names.get(class).cloned().unwrap_or_else(|| class.to_string())
}

/// Draws boxes, given in pixels of an image of this size, on its copy at `place`, which is `scale` times as large.
///
/// # Errors
/// They cannot be drawn.
pub fn boxed(canvas: &mut Canvas, (x, y): (i32, i32), scale: f64, boxes: &[Marked]) -> Result<(), String> {
    for one in boxes {
        let at = |value: f32| (f64::from(value) * scale) as i32;
        let [left, top, right, bottom] = one.corners.map(at);
        let (left, right) = (x + left, x + right);
        let (top, bottom) = (y + top, y + bottom);
        canvas.frame([(left, top), (right, bottom)], colour(one.class), 2)?;
        let words: String = one.words.chars().take(24).collect();
        canvas.words(&words, (left + 3, top + 8), (12.0, Anchor::Left, colour(one.class)))?;
    }
    Ok(())
}

/// The first images of a validation: labelled boxes on the left, found ones on the right.
pub struct BoxGallery {
    wanted: usize,
    names: Vec<String>,
    rows: Vec<Row>,
}

struct Row {
    /// Rows, columns and bytes `[h, w, 3]` of the enlarged or shrunk image.
    size: (i32, i32),
    pixels: Vec<u8>,
    scale: f64,
    boxes: [Vec<Marked>; 2],
}

impl BoxGallery {
    /// So many images, with classes of these names.
    pub fn new(wanted: usize, names: Vec<String>) -> Self {
        Self { wanted, names, rows: Vec::new() }
    }

    fn take(&mut self, batch: &Batch, output: &Output) -> Result<(), TchError> {
        let Some((all, boxes)) = rectangles(batch) else { return Ok(()) };
        let found = from_tensor(&output.prediction)?;
        for rectangle in all {
            let size = (rectangle.images.size()[2], rectangle.images.size()[3]);
            let samples = (rectangle.places.start, rectangle.places.len());
            let truths = truths(&boxes, samples, size, self.names.len())?;
            for (at, (place, truth)) in rectangle.places.zip(truths).enumerate() {
                let rows: i32 = self.rows.iter().map(|row| row.size.0).sum();
                if self.rows.len() >= self.wanted || rows >= MOST_ROWS {
                    return Ok(());
                }
                let (pixels, size, scale) = shrunk(&rectangle.images.get(at as i64))?;
                let shown = found.get(place).into_iter().flatten().filter(|object| object.confidence > SHOWN);
                let boxes = [
                    truth.iter().map(|truth| Marked::labelled(truth, &self.names)).collect(),
                    shown.map(|object| Marked::found(object, &self.names)).collect(),
                ];
                self.rows.push(Row { size, pixels, scale, boxes });
            }
        }
        Ok(())
    }
}

/// Bytes `[h, w, 3]`, size, and the factor of an image made smaller.
type Shrunk = (Vec<u8>, (i32, i32), f64);

/// An image u8 `[3, H, W]` at about [`WIDTH`] columns.
fn shrunk(image: &Tensor) -> Result<Shrunk, TchError> {
    let (_, rows, columns) = image.size3()?;
    let scale = WIDTH as f64 / columns as f64;
    let (height, width) = (((rows as f64 * scale) as i64).max(1), WIDTH);
    let image = image.to_device(Device::Cpu).to_kind(Kind::Float).unsqueeze(0);
    let sized = if scale < 1.0 {
        image.f_adaptive_avg_pool2d([height, width])?
    } else {
        image.f_upsample_nearest2d([height, width], None, None)?
    };
    let bytes = sized.squeeze_dim(0).round().permute([1, 2, 0]).to_kind(Kind::Uint8).contiguous();
    Ok((Vec::<u8>::try_from(bytes.flatten(0, -1))?, (height as i32, width as i32), scale))
}

impl Gallery for BoxGallery {
    fn look(&mut self, batch: &Batch, output: &Output) {
        // What cannot be shown is not: training continues.
        let _ = self.take(batch, output);
    }

    fn picture(&mut self) -> Option<Result<Vec<u8>, String>> {
        let rows = std::mem::take(&mut self.rows);
        (!rows.is_empty()).then(|| sheet(&rows))
    }
}

fn sheet(rows: &[Row]) -> Result<Vec<u8>, String> {
    let tall: i32 = rows.iter().map(|row| row.size.0 + CAPTION + GAP).sum();
    let mut canvas = Canvas::new(2 * (WIDTH as i32 + GAP) + GAP, tall + GAP);
    let mut y = GAP;
    for row in rows {
        for (side, title) in ["labelled", "found"].into_iter().enumerate() {
            let x = GAP + side as i32 * (WIDTH as i32 + GAP);
            let title = format!("{title}: {}", row.boxes[side].len());
            canvas.words(&title, (x, y + CAPTION / 2), (14.0, Anchor::Left, INK))?;
            canvas.paste((x, y + CAPTION), row.size.1, &row.pixels);
            boxed(&mut canvas, (x, y + CAPTION), row.scale, &row.boxes[side])?;
        }
        y += row.size.0 + CAPTION + GAP;
    }
    canvas.png()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::data::batch::Shape;
    use crate::task::yolo::detect::to_tensor;

    #[test]
    fn truth_and_prediction_stand_side_by_side() {
        let shape = Shape { height: 64, width: 96, original_height: 64, original_width: 96, ..Shape::default() };
        let fields = vec![
            Tensor::full([3 * 64 * 96], 128, (Kind::Uint8, Device::Cpu)),
            Tensor::from_slice(&[0i64, 3 * 64 * 96]),
            Tensor::from_slice(&shape.numbers()).view([1, 6]),
            Tensor::from_slice(&[0f32, 0.5, 0.5, 0.5, 0.5]).view([1, 5]),
            Tensor::from_slice(&[0i64, 1]),
        ];
        let batch = Batch::new(fields, vec![0]);
        let sure = Detection { corners: [8.0, 8.0, 60.0, 60.0], confidence: 0.9, class: 0 };
        let found = vec![vec![sure, Detection { confidence: 0.1, ..sure }]];
        let output = Output::new(Tensor::from(0f32), to_tensor(&found, 5));
        let mut gallery = BoxGallery::new(1, vec!["circle".into()]);
        assert!(gallery.picture().is_none());
        gallery.look(&batch, &output);
        gallery.look(&batch, &output);
        assert_eq!((gallery.rows.len(), gallery.rows[0].boxes[1].len()), (1, 1));
        let png = gallery.picture().unwrap().unwrap();
        let info = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap().info().clone();
        assert_eq!((info.width, info.height), (2 * 328 + 8, 213 + 24 + 16));
        // However many are asked for, a sheet has an end: 94 · 213 are more than 20,000.
        let mut gallery = BoxGallery::new(usize::MAX, vec!["circle".into()]);
        (0..100).for_each(|_| gallery.look(&batch, &output));
        assert_eq!(gallery.rows.len(), 94);
        assert!(gallery.picture().unwrap().is_ok());
    }
}
