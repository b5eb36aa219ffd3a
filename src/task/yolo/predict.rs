//! `launch predict`: objects in images, as label files, JSON, and pictures with boxes.
//!
//! One folder, `predictions`: `labels/NAME.txt` with a line `class cx cy w h` per object, as labels of training have it (a file
//! without lines: no object), `images/NAME.png` with boxes drawn, and `predictions.json` in COCO's format of results, by
//! falling confidence within an image. NAME is the image's, with a number where several images have the same.

use super::data::batch::{Shape, rectangles};
use super::data::{self, YoloFacts};
use super::detect::{Detection, from_tensor};
use super::report::{Canvas, Marked, boxed, general};
use crate::data::DataError;
use crate::task::Batch;
use crate::task::pass::{Opening, Pass, PassOutput, PassRange, Predictor};
use serde_json::{Value, json};
use spec::task::yolo::YoloConfig;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, TchError, Tensor};

/// Images of a range.
const RANGE: u64 = 64;
const FOLDER: &str = "predictions";
const JSON: &str = "predictions.json";

/// Opens images for prediction.
///
/// # Errors
/// There are none, or they cannot be used.
pub fn predictor(opening: &Opening) -> Result<Pass, DataError> {
    let datasets = data::unlabelled(opening)?;
    let facts = datasets.facts.as_ref().and_then(|facts| facts.downcast_ref::<YoloFacts>()).cloned();
    let facts = facts.unwrap_or_default();
    let paths = facts.images[1].iter();
    let outputs = vec![PassOutput { name: FOLDER.into(), samples: 0..datasets.val.len() as u64 }];
    let identity = paths.clone().map(|path| format!("{}\n", path.display())).collect();
    let writer = Writer {
        files: unique(paths.map(PathBuf::as_path)),
        classes: facts.names.clone(),
        imgsz: opening.config.section::<YoloConfig>().imgsz,
        outputs,
        identity,
        part: PathBuf::new(),
        objects: Vec::new(),
    };
    Ok(Pass { datasets, weights: Vec::new(), predictor: Box::new(writer) })
}

/// An image's file name, and the name of its results.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    file: String,
    stem: String,
}

/// Names of results, all different.
fn unique<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<Named> {
    let (mut taken, mut seen) = (HashSet::new(), HashMap::<String, usize>::new());
    let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let named = |path: &'a Path| {
        let (file, mut stem) = (text(path.file_name()), text(path.file_stem()));
        let first = stem.clone();
        let next = seen.entry(stem.clone()).or_insert(2usize);
        // Another image may have the very name that a number makes.
        while !taken.insert(stem.clone()) {
            stem = format!("{first}-{next}");
            *next += 1;
        }
        Named { file, stem }
    };
    paths.map(named).collect()
}

/// A box of the canvas on the picture itself: left, top, right, bottom in its pixels.
fn on_picture(corners: &[f32; 4], shape: &Shape, imgsz: usize) -> [f64; 4] {
    let (width, height) = (shape.original_width as f64, shape.original_height as f64);
    let gain = imgsz as f64 / width.max(height).max(1.0);
    let back = |value: f32, pad: usize, most: f64| ((f64::from(value) - pad as f64) / gain).clamp(0.0, most);
    let [left, top, right, bottom] = *corners;
    [
        back(left, shape.left, width),
        back(top, shape.top, height),
        back(right, shape.left, width),
        back(bottom, shape.top, height),
    ]
}

/// A line of a label file.
fn line(object: &Detection, [left, top, right, bottom]: [f64; 4], shape: &Shape) -> String {
    let (width, height) = (shape.original_width.max(1) as f64, shape.original_height.max(1) as f64);
    let numbers =
        [(left + right) / 2.0 / width, (top + bottom) / 2.0 / height, (right - left) / width, (bottom - top) / height];
    let numbers: Vec<String> = numbers.iter().map(|number| general(*number)).collect();
    format!("{} {}\n", object.class, numbers.join(" "))
}

/// Rounds to so many decimals.
fn rounded(value: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (value * scale).round() / scale
}

/// Writes a part per range.
struct Writer {
    files: Vec<Named>,
    classes: Vec<String>,
    imgsz: usize,
    outputs: Vec<PassOutput>,
    identity: String,
    part: PathBuf,
    /// Objects of the running range.
    objects: Vec<Value>,
}

impl Writer {
    fn image(&mut self, sample: u64, found: &[Detection], shape: &Shape, pixels: &Tensor) -> Result<(), DataError> {
        let missing = || DataError::NothingUsable(format!("image {sample} has no name"));
        let Named { file, stem } = self.files.get(sample as usize).cloned().ok_or_else(missing)?;
        let mut text = String::new();
        for object in found {
            let corners = on_picture(&object.corners, shape, self.imgsz);
            text.push_str(&line(object, corners, shape));
            let [left, top, right, bottom] = corners;
            let sides = [left, top, right - left, bottom - top].map(|value| rounded(value, 3));
            let class = usize::from(object.class);
            self.objects.push(json!({
                "image_id": stem, "file_name": file, "category_id": class + 1, "name": self.classes.get(class),
                "bbox": sides, "score": rounded(f64::from(object.confidence), 5),
            }));
        }
        let write = |path: PathBuf, bytes: &[u8]| fs::write(&path, bytes).map_err(|e| DataError::output(&path, e));
        write(self.part.join("labels").join(format!("{stem}.txt")), text.as_bytes())?;
        let png = self.picture(found, shape, pixels)?;
        write(self.part.join("images").join(format!("{stem}.png")), &png)
    }

    /// The image without its padding, boxes drawn on it.
    fn picture(&self, found: &[Detection], shape: &Shape, pixels: &Tensor) -> Result<Vec<u8>, DataError> {
        let refused = |e: TchError| DataError::Encode(e.into());
        let gain = self.imgsz as f64 / (shape.original_width.max(shape.original_height)).max(1) as f64;
        let side = |original: usize, pad: usize, canvas: usize| {
            ((original as f64 * gain).ceil() as usize).min(canvas.saturating_sub(pad)).max(1) as i64
        };
        let rows = side(shape.original_height, shape.top, shape.height);
        let columns = side(shape.original_width, shape.left, shape.width);
        let part = pixels.f_narrow(1, shape.top as i64, rows).and_then(|p| p.f_narrow(2, shape.left as i64, columns));
        let bytes = part.map_err(refused)?.permute([1, 2, 0]).to_kind(Kind::Uint8).contiguous().to_device(Device::Cpu);
        let bytes = Vec::<u8>::try_from(bytes.flatten(0, -1)).map_err(refused)?;
        let moved = |object: &Detection| {
            let [left, top, right, bottom] = object.corners;
            let (x, y) = (shape.left as f32, shape.top as f32);
            let corners = [left - x, top - y, right - x, bottom - y];
            Marked::found(&Detection { corners, ..*object }, &self.classes)
        };
        let mut canvas = Canvas::new(columns as i32, rows as i32);
        canvas.paste((0, 0), columns as i32, &bytes);
        let marks: Vec<Marked> = found.iter().map(moved).collect();
        let drawn = boxed(&mut canvas, (0, 0), 1.0, &marks).and_then(|()| canvas.png());
        drawn.map_err(|problem| DataError::Encode(problem.into()))
    }
}

impl Predictor for Writer {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        RANGE
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        for folder in ["labels", "images"] {
            let path = part.join(folder);
            fs::create_dir_all(&path).map_err(|e| DataError::output(&path, e))?;
        }
        (self.part, self.objects) = (part.to_owned(), Vec::new());
        Ok(())
    }

    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let refused = |e: TchError| DataError::Encode(e.into());
        let found = from_tensor(prediction).map_err(refused)?;
        let Some((all, _)) = rectangles(batch) else {
            return Err(DataError::NothingUsable("a batch without shapes".into()));
        };
        for rectangle in all {
            for (at, (place, shape)) in rectangle.places.zip(&rectangle.shapes).enumerate() {
                let pixels = rectangle.images.f_get(at as i64).map_err(refused)?;
                let objects = found.get(place).map(Vec::as_slice).unwrap_or_default();
                self.image(batch.sample_ids[place], objects, shape, &pixels)?;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), DataError> {
        let path = self.part.join(JSON);
        let text = Value::from(std::mem::take(&mut self.objects)).to_string();
        fs::write(&path, text).map_err(|e| DataError::output(&path, e))
    }

    fn join(&mut self, _: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        for folder in ["labels", "images"] {
            let target = into.join(folder);
            fs::create_dir_all(&target).map_err(|e| DataError::output(&target, e))?;
            for part in parts {
                link_all(&part.join(folder), &target)?;
            }
        }
        join_lists(parts, &into.join(JSON))
    }
}

/// Writes the lists of all parts as one, part by part: those of many images do not fit in memory together.
fn join_lists(parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
    let failed = |e| DataError::output(into, e);
    let mut out = BufWriter::new(File::create(into).map_err(failed)?);
    let mut between = "[";
    for part in parts {
        let path = part.join(JSON);
        let text = fs::read_to_string(&path).map_err(|e| DataError::output(&path, e))?;
        let list = text.trim().strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let list = list.ok_or_else(|| DataError::output(&path, std::io::ErrorKind::InvalidData.into()))?;
        if !list.is_empty() {
            out.write_all(between.as_bytes()).and_then(|()| out.write_all(list.as_bytes())).map_err(failed)?;
            between = ",";
        }
    }
    let end = if between == "[" { "[]" } else { "]" };
    out.write_all(end.as_bytes()).and_then(|()| out.flush()).map_err(failed)
}

/// Links where the file system has them, so that files are not written twice.
fn link_all(from: &Path, target: &Path) -> Result<(), DataError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |e| DataError::output(&path, e)
    };
    for entry in fs::read_dir(from).map_err(failed(from))? {
        let file = entry.map_err(failed(from))?.path();
        let to = target.join(file.file_name().unwrap_or_default());
        if fs::hard_link(&file, &to).is_err() {
            fs::copy(&file, &to).map_err(failed(&to))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::detect::to_tensor;

    #[test]
    fn names_of_results_are_unique() {
        let stems = |paths: &[&str]| {
            let named = unique(paths.iter().map(Path::new));
            named.into_iter().map(|named| named.stem).collect::<Vec<String>>()
        };
        assert_eq!(stems(&["a/one.jpg", "b/one.png", "b/two.jpg"]), ["one", "one-2", "two"]);
        let clash = stems(&["a/one.jpg", "b/one.jpg", "c/one-2.jpg", "d/one.jpg", "e/one-2.jpg"]);
        assert_eq!(clash, ["one", "one-2", "one-2-2", "one-3", "one-2-3"]);
    }

    #[test]
    fn lists_of_parts_become_one() {
        let folder = tempfile::tempdir().unwrap();
        let part = |name: &str, text: &str| {
            let part = folder.path().join(name);
            fs::create_dir_all(&part).unwrap();
            fs::write(part.join(JSON), text).unwrap();
            part
        };
        let into = folder.path().join("all.json");
        let joined = |parts: &[PathBuf]| {
            join_lists(parts, &into).unwrap();
            serde_json::from_slice::<Value>(&fs::read(&into).unwrap()).unwrap()
        };
        let parts = [part("a", "[]"), part("b", "[{\"n\":1},{\"n\":2}]"), part("c", "[]"), part("d", "[{\"n\":3}]")];
        assert_eq!(joined(&parts), json!([{"n": 1}, {"n": 2}, {"n": 3}]));
        assert_eq!((joined(&parts[..1]), joined(&[])), (json!([]), json!([])));
        assert!(join_lists(&[part("e", "{")], &into).is_err());
    }

    #[test]
    fn boxes_are_moved_to_the_picture() {
        // 100 × 50 at 160: 160 × 80 in the middle of 192 × 96.
        let shape = Shape { height: 96, width: 192, original_height: 50, original_width: 100, left: 16, top: 8 };
        assert_eq!(on_picture(&[16.0, 8.0, 176.0, 88.0], &shape, 160), [0.0, 0.0, 100.0, 50.0]);
        assert_eq!(on_picture(&[0.0, 24.0, 96.0, 200.0], &shape, 160), [0.0, 10.0, 50.0, 50.0]);
        let object = Detection { corners: [0.0; 4], confidence: 0.5, class: 7 };
        assert_eq!(line(&object, [0.0, 10.0, 50.0, 50.0], &shape), "7 0.25 0.6 0.5 0.8\n");
    }

    #[test]
    fn predictions_are_label_files_json_and_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let shape = Shape { height: 64, width: 96, original_height: 32, original_width: 64, left: 16, top: 16 };
        let bytes = 3 * 64 * 96;
        let fields = vec![
            Tensor::full([2 * bytes], 128, (Kind::Uint8, Device::Cpu)),
            Tensor::from_slice(&[0, bytes, 2 * bytes]),
            Tensor::from_slice(&shape.numbers()).repeat([2]).view([2, 6]),
            Tensor::zeros([0, 5], (Kind::Float, Device::Cpu)),
            Tensor::from_slice(&[0i64; 3]),
        ];
        let batch = Batch::new(fields, vec![0, 1]);
        let object = Detection { corners: [16.0, 16.0, 48.0, 48.0], confidence: 0.875, class: 1 };
        let mut writer = Writer {
            files: unique(["x.jpg", "y.jpg"].map(Path::new).into_iter()),
            classes: vec!["cat".into(), "dog".into()],
            imgsz: 64,
            outputs: vec![PassOutput { name: FOLDER.into(), samples: 0..2 }],
            identity: String::new(),
            part: PathBuf::new(),
            objects: Vec::new(),
        };
        let (part, into) = (folder.path().join("part"), folder.path().join("into"));
        writer.begin(&PassRange { output: 0, samples: 0..2 }, &part).unwrap();
        writer.take(&batch, &to_tensor(&[vec![object], vec![]], 3)).unwrap();
        writer.end().unwrap();
        let output = writer.outputs()[0].clone();
        writer.join(&output, &[part], &into).unwrap();
        let read = |name: &str| fs::read_to_string(into.join(name)).unwrap();
        assert_eq!((read("labels/x.txt"), read("labels/y.txt")), ("1 0.25 0.5 0.5 1\n".into(), String::new()));
        let json: Value = serde_json::from_str(&read(JSON)).unwrap();
        assert_eq!(json[0]["bbox"], json!([0.0, 0.0, 32.0, 32.0]));
        assert_eq!(
            (&json[0]["name"], &json[0]["score"], json.as_array().unwrap().len()),
            (&json!("dog"), &json!(0.875), 1)
        );
        let png = fs::read(into.join("images/x.png")).unwrap();
        let info = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap().info().clone();
        assert_eq!((info.width, info.height), (64, 32));
    }
}
