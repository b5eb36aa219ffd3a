//! Sample images in the true formats: shapes of three classes on noise, learnable by design.

use super::labels::{Row, text};
use crate::data::DataError;
use crate::data::loader::mix;
use crate::data::source::in_threads;
use crate::data::source::video::image::{ImageSize, write_png};
use crate::task::SampleRequest;
use crate::task::sample::{Random, new_folder};
use std::path::Path;

/// Names of the classes.
pub const CLASSES: [&str; 3] = ["circle", "square", "triangle"];
/// Least and most side of a shape, pixels.
const SIDES: [f64; 2] = [20.0, 60.0];
/// Tries to place a shape where it hides no other.
const TRIES: usize = 20;

/// Request for sample images.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    pub train: usize,
    pub val: usize,
    /// Side of an image.
    pub side: usize,
    /// Most objects of an image.
    pub objects: usize,
    pub layout: Layout,
    pub seed: u64,
}

/// How labels are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Yolo,
    Coco,
    Labelme,
}

impl Default for SampleSpec {
    fn default() -> Self {
        Self { train: 80, val: 20, side: 160, objects: 4, layout: Layout::Yolo, seed: 42 }
    }
}

/// Writes what `request` asks for.
///
/// # Errors
/// An unknown layout, or no room.
pub fn write(request: &SampleRequest) -> Result<(), DataError> {
    let layout = match request.layout.as_deref().unwrap_or("yolo") {
        "yolo" => Layout::Yolo,
        "coco" => Layout::Coco,
        "labelme" => Layout::Labelme,
        other => {
            let problem = format!("--layout {other} is unknown: choose yolo, coco or labelme");
            return Err(DataError::setting("--layout", problem));
        }
    };
    write_sample_data(&request.out, &SampleSpec { layout, seed: request.seed, ..SampleSpec::default() })
}

/// Writes the new folder `out`, which is never half there.
///
/// # Errors
/// `out` exists and is not an empty folder, or there is no room or permission.
pub fn write_sample_data(out: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    new_folder(out, |folder| {
        for (split, first, count) in [("train", 0, spec.train), ("val", spec.train, spec.val)] {
            write_split(folder, split, first..first + count, spec)?;
        }
        if spec.layout == Layout::Yolo {
            let names: String = CLASSES.iter().enumerate().map(|(n, name)| format!("  {n}: {name}\n")).collect();
            let yaml = format!("path: .\ntrain: images/train\nval: images/val\nnames:\n{names}");
            put(&folder.join("data.yaml"), &yaml)?;
        }
        Ok(())
    })
}

fn put(path: &Path, text: &str) -> Result<(), DataError> {
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
    written.map_err(|error| DataError::output(path, error))
}

/// Folder of a split's images.
fn images_of(layout: Layout, split: &str) -> String {
    match layout {
        Layout::Yolo => format!("images/{split}"),
        Layout::Coco => format!("{split}2017"),
        Layout::Labelme => split.into(),
    }
}

fn write_split(folder: &Path, split: &str, images: std::ops::Range<usize>, spec: &SampleSpec) -> Result<(), DataError> {
    let place = folder.join(images_of(spec.layout, split));
    std::fs::create_dir_all(&place).map_err(|error| DataError::output(&place, error))?;
    let all: Vec<usize> = images.collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let size = ImageSize { height: spec.side, width: spec.side };
    let made = in_threads(threads, &all, |number| {
        let (pixels, rows) = picture(*number, spec);
        write_png(&place.join(name(*number, "png")), &pixels, size)?;
        Ok((*number, rows))
    });
    let made: Vec<(usize, Vec<Row>)> = made.into_iter().collect::<Result<_, DataError>>()?;
    match spec.layout {
        Layout::Yolo => made.iter().try_for_each(|(number, rows)| {
            put(&folder.join("labels").join(split).join(name(*number, "txt")), &text(rows))
        }),
        Layout::Coco => put(&folder.join(format!("annotations/instances_{split}2017.json")), &coco(&made, spec.side)),
        Layout::Labelme => made
            .iter()
            .try_for_each(|(number, rows)| put(&place.join(name(*number, "json")), &labelme(*number, rows, spec.side))),
    }
}

fn name(number: usize, ending: &str) -> String {
    format!("{number:05}.{ending}")
}

fn corners(row: &Row, side: usize) -> [f64; 4] {
    let [_, x, y, w, h] = row.map(f64::from);
    [x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0].map(|share| share * side as f64)
}

fn coco(made: &[(usize, Vec<Row>)], side: usize) -> String {
    let images: Vec<serde_json::Value> = made
        .iter()
        .map(|(number, _)| serde_json::json!({"id": number, "file_name": name(*number, "png"), "width": side, "height": side}))
        .collect();
    let objects = made.iter().flat_map(|(number, rows)| rows.iter().map(move |row| (number, row)));
    let annotations: Vec<serde_json::Value> = objects
        .enumerate()
        .map(|(id, (number, row))| {
            let [left, top, right, bottom] = corners(row, side);
            let bbox = [left, top, right - left, bottom - top];
            serde_json::json!({"id": id, "image_id": number, "category_id": row[0] as usize + 1, "bbox": bbox, "iscrowd": 0})
        })
        .collect();
    let categories: Vec<serde_json::Value> =
        CLASSES.iter().zip(1..).map(|(name, id)| serde_json::json!({"id": id, "name": name})).collect();
    serde_json::json!({"images": images, "annotations": annotations, "categories": categories}).to_string()
}

fn labelme(number: usize, rows: &[Row], side: usize) -> String {
    let shapes: Vec<serde_json::Value> = rows
        .iter()
        .map(|row| {
            let [left, top, right, bottom] = corners(row, side);
            serde_json::json!({
                "label": CLASSES[row[0] as usize], "points": [[left, top], [right, bottom]], "shape_type": "rectangle",
            })
        })
        .collect();
    let image = name(number, "png");
    serde_json::json!({"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": null,
                       "imageHeight": side, "imageWidth": side})
    .to_string()
}

/// Picture `number` with its boxes, the same however pictures are divided among threads.
pub fn picture(number: usize, spec: &SampleSpec) -> (Vec<u8>, Vec<Row>) {
    let mut random = Random(mix(spec.seed ^ mix(number as u64 + 1)));
    let side = spec.side;
    let base: [f64; 3] = std::array::from_fn(|_| 60.0 + 100.0 * random.uniform());
    let mut pixels = vec![0; 3 * side * side];
    for pixel in pixels.chunks_exact_mut(3) {
        let shade = 14.0 * random.normal();
        for (value, base) in pixel.iter_mut().zip(base) {
            *value = (base + shade + 6.0 * random.normal()).clamp(0.0, 255.0) as u8;
        }
    }
    let mut rows: Vec<Row> = Vec::new();
    let count = 1 + (random.draw() % spec.objects.max(1) as u64) as usize;
    for _ in 0..count {
        let class = (random.draw() % CLASSES.len() as u64) as usize;
        let most = SIDES[1].min(side as f64 / 2.0);
        let size = (SIDES[0].min(most) + (most - SIDES[0].min(most)) * random.uniform()).round();
        let free = (0..TRIES).find_map(|_| {
            let [x, y] = [(); 2].map(|()| (random.uniform() * (side as f64 - size)).floor());
            let apart = rows.iter().all(|row| {
                let [left, top, right, bottom] = corners(row, side);
                x >= right || y >= bottom || x + size <= left || y + size <= top
            });
            apart.then_some([x, y])
        });
        let Some([x, y]) = free else { continue };
        let colour = colour(&mut random, base);
        draw(&mut pixels, side, (class, x, y, size), colour);
        let share = |at: f64| (at / side as f64) as f32;
        rows.push([class as f32, share(x + size / 2.0), share(y + size / 2.0), share(size), share(size)]);
    }
    (pixels, rows)
}

/// A colour that stands out.
fn colour(random: &mut Random, base: [f64; 3]) -> [u8; 3] {
    loop {
        let drawn: [f64; 3] = std::array::from_fn(|_| 255.0 * random.uniform());
        if drawn.iter().zip(base).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) > 80.0 {
            return drawn.map(|value| value as u8);
        }
    }
}

fn draw(pixels: &mut [u8], side: usize, (class, x, y, size): (usize, f64, f64, f64), colour: [u8; 3]) {
    let half = size / 2.0;
    for row in y as usize..((y + size) as usize).min(side) {
        for column in x as usize..((x + size) as usize).min(side) {
            let (across, down) = (column as f64 + 0.5 - x - half, row as f64 + 0.5 - y);
            let inside = match CLASSES[class] {
                "circle" => across.hypot(down - half) <= half,
                "triangle" => across.abs() <= down / 2.0,
                _ => true,
            };
            if inside {
                pixels[3 * (row * side + column)..][..3].copy_from_slice(&colour);
            }
        }
    }
}
