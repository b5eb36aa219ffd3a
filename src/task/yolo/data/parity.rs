//! Labels and validation images are those of the package: `tests/fixtures/yolo/package.json`, made by
//! `tests/benches/reference/yolo_data.py`.

use super::labels::parse;
use super::{YoloFacts, batch, open};
use crate::data::source::video::image::{ImageSize, write_png};
use crate::data::{ReadRequest, Scratch};
use crate::task::Team;
use serde_json::Value;
use spec::task::yolo::YoloConfig;
use std::path::Path;

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yolo/package.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn rows(value: &Value) -> Vec<[f32; 5]> {
    let row = |row: &Value| std::array::from_fn(|n| row[n].as_f64().unwrap() as f32);
    value.as_array().unwrap().iter().map(row).collect()
}

fn near(a: &[[f32; 5]], b: &[[f32; 5]], slack: f32) -> bool {
    a.len() == b.len() && a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() <= slack)
}

#[test]
fn label_files_are_taken_and_refused_as_the_package_does() {
    let cases = fixture()["labels"].as_array().unwrap().clone();
    assert!(cases.len() >= 20);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ours = parse(text.as_bytes(), Some(3));
        match &case["rows"] {
            Value::Null => assert!(ours.is_err(), "{text:?}: {ours:?}"),
            // The package sorts rows of a file with duplicates.
            wanted => {
                let (mut ours, mut wanted) = (ours.unwrap(), rows(wanted));
                let order = |a: &[f32; 5], b: &[f32; 5]| a.partial_cmp(b).unwrap();
                ours.sort_by(order);
                wanted.sort_by(order);
                assert!(near(&ours, &wanted, 1e-6), "{text:?}: {ours:?} {wanted:?}");
            }
        }
    }
}

#[test]
fn validation_images_are_the_packages_byte_by_byte() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    for split in ["train", "val"] {
        for kind in ["images", "labels"] {
            std::fs::create_dir_all(dir.path().join(kind).join(split)).unwrap();
        }
    }
    let sizes = fixture["sizes"].as_array().unwrap();
    for (n, size) in sizes.iter().enumerate() {
        let [height, width] = [0, 1].map(|axis| size[axis].as_u64().unwrap());
        let pixels: Vec<u8> =
            (0..height * width * 3).map(|i| i + n as u64 * 7919).map(|i| ((i * i * 31 + i * 17) >> 3) as u8).collect();
        let size = ImageSize { height: height as usize, width: width as usize };
        for split in ["train", "val"] {
            write_png(&dir.path().join(format!("images/{split}/{n:03}.png")), &pixels, size).unwrap();
            let label = format!("{} 0.4 0.6 0.3 0.2\n", n % 3);
            std::fs::write(dir.path().join(format!("labels/{split}/{n:03}.txt")), label).unwrap();
        }
    }
    let mut config = spec::task::config("yolo");
    config.data.dataset_path = dir.path().to_owned();
    config.with_section(|yolo: &mut YoloConfig| {
        yolo.imgsz = fixture["side"].as_u64().unwrap() as usize;
        yolo.rect_batch = Some(fixture["batch"].as_u64().unwrap() as usize);
    });
    let data = open(&config, &Team::alone(), &dir.path().join("index")).unwrap();
    let facts = data.facts.unwrap().downcast::<YoloFacts>().unwrap();
    let cases = fixture["rectangles"].as_array().unwrap();
    assert_eq!(cases.len(), data.val.len());
    for case in cases {
        let name = format!("{:03}.png", case["number"].as_u64().unwrap());
        let index = facts.images[1].iter().position(|path| path.ends_with(&name)).unwrap();
        let mut fields: Vec<Vec<u8>> = data.val.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
        let mut out: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
        data.val.read(ReadRequest { epoch: 0, index }, &mut out, &mut Scratch::default()).unwrap();
        let numbers: Vec<i64> = out[1].as_chunks::<8>().0.iter().map(|bytes| i64::from_ne_bytes(*bytes)).collect();
        let shape = batch::Shape::of(*numbers.first_chunk().unwrap());
        assert_eq!(
            (shape.height as u64, shape.width as u64),
            (case["height"].as_u64().unwrap(), case["width"].as_u64().unwrap())
        );
        let own: Vec<f32> = out[2].as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
        assert!(near(own.as_chunks::<5>().0, &rows(&case["rows"]), 1e-5), "{name}: {own:?} {}", case["rows"]);
        assert_eq!(u64::from(libdeflater::crc32(out[0])), case["crc"].as_u64().unwrap(), "{name} {shape:?}");
    }
}
