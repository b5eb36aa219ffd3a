//! Any data set that is read here, written as YOLO label files: `images/<split>` (links), `labels/<split>` and `data.yaml`.

use super::form::{self, Division};
use super::index::Finding;
use super::labels::text;
use super::scan::scan;
use crate::data::DataError;
use crate::data::source::file_error;
use crate::task::sample::new_folder;
use crate::task::{ConvertRequest, Team};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

const SPLITS: [&str; 3] = ["train", "val", "test"];

/// Writes what `request` asks for; returns lines for the user.
///
/// # Errors
/// No data set is there, its labels cannot be used, or there is no room.
pub fn convert(request: &ConvertRequest) -> Result<Vec<String>, DataError> {
    let shares = shares(&request.split_ratio)?;
    let root = request.data.as_path();
    let found = form::find(root, Division { shares, seed: request.seed, trains: false })?;
    // Findings are of this once: nothing is kept beside the data.
    let scratch = std::env::temp_dir().join(format!("headroom-convert-{}", std::process::id()));
    let findings = scan(&found, root, &Team::alone(), &scratch);
    // It may not have been made.
    let _ = std::fs::remove_dir_all(&scratch);
    let findings = findings?;
    let mut lines = found.notes.clone();
    lines.extend(found.unreadable.iter().cloned());
    let mut counts = [[0usize; 2]; 3];
    new_folder(&request.out, |folder| {
        for (split, (items, findings)) in found.splits.iter().zip(&findings).enumerate() {
            let mut taken = HashSet::new();
            for (item, finding) in items.iter().zip(findings) {
                match finding {
                    Finding::Good(good) => {
                        write(folder, SPLITS[split], &item.image, &text(&good.rows), &mut taken)?;
                        counts[split] = [counts[split][0] + 1, counts[split][1] + good.rows.len()];
                    }
                    Finding::Bad(line) => lines.push(format!("left out: {line}")),
                }
            }
        }
        let classes = findings.iter().flatten().filter_map(|finding| match finding {
            Finding::Good(good) => good.rows.iter().map(|row| row[0] as usize + 1).max(),
            Finding::Bad(_) => None,
        });
        let numbered = || (0..classes.max().unwrap_or(1)).map(|class| class.to_string()).collect();
        let names: Vec<String> = found.names.clone().unwrap_or_else(numbered);
        put(&folder.join("data.yaml"), &yaml(&names, &counts))
    })?;
    for (split, [images, objects]) in SPLITS.iter().zip(counts) {
        lines.push(format!("{split}: {images} images with {objects} objects"));
    }
    Ok(lines)
}

fn shares(text: &str) -> Result<[f64; 3], DataError> {
    let numbers: Vec<f64> = text.split(',').filter_map(|share| share.trim().parse().ok()).collect();
    match numbers[..] {
        [train, val, test] if (train + val + test - 1.0).abs() < 1e-6 && train > 0.0 && val >= 0.0 && test >= 0.0 => {
            Ok([train, val, test])
        }
        _ => {
            let problem = format!("--split-ratio {text}: expected three shares that add up to 1, such as 0.7,0.2,0.1");
            Err(DataError::setting("--split-ratio", problem))
        }
    }
}

fn yaml(names: &[String], counts: &[[usize; 2]; 3]) -> String {
    let splits: String = SPLITS
        .iter()
        .zip(counts)
        .filter(|(_, [images, _])| *images > 0)
        .map(|(split, _)| format!("{split}: images/{split}\n"))
        .collect();
    // A JSON string is a YAML string.
    let names: String =
        names.iter().enumerate().map(|(class, name)| format!("  {class}: {}\n", serde_json::json!(name))).collect();
    format!("path: .\n{splits}names:\n{names}")
}

/// A link to the image, and its labels. Images of one name from several folders get numbers.
fn write(
    folder: &Path,
    split: &str,
    image: &Path,
    labels: &str,
    taken: &mut HashSet<PathBuf>,
) -> Result<(), DataError> {
    let whole = std::path::absolute(image).map_err(|error| file_error(image, error.to_string()))?;
    let (stem, ending) = (image.file_stem().unwrap_or_default(), image.extension().unwrap_or_default());
    let (stem, ending) = (stem.to_string_lossy(), ending.to_string_lossy());
    let names = std::iter::once(stem.to_string()).chain((2..).map(|number| format!("{stem}-{number}")));
    let Some(name) = names.into_iter().find(|name| taken.insert(PathBuf::from(name))) else { return Ok(()) };
    let link = folder.join("images").join(split).join(format!("{name}.{ending}"));
    let place = link.parent().unwrap_or(folder);
    std::fs::create_dir_all(place)
        .and_then(|()| std::os::unix::fs::symlink(&whole, &link))
        .map_err(|error| DataError::output(&link, error))?;
    put(&folder.join("labels").join(split).join(format!("{name}.txt")), labels)
}

fn put(path: &Path, text: &str) -> Result<(), DataError> {
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
    written.map_err(|error| DataError::output(path, error))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Layout, SampleSpec, write_sample_data};
    use super::*;

    #[test]
    fn every_layout_becomes_label_files_that_say_the_same() {
        for layout in [Layout::Coco, Layout::Labelme, Layout::Yolo] {
            let dir = tempfile::tempdir().unwrap();
            let (from, out) = (dir.path().join("from"), dir.path().join("to"));
            let spec = SampleSpec { train: 4, val: 2, side: 64, objects: 3, layout, seed: 3 };
            write_sample_data(&from, &spec).unwrap();
            let request = ConvertRequest {
                task: "yolo".into(),
                data: from,
                out: out.clone(),
                seed: 1,
                split_ratio: "0.7,0.2,0.1".into(),
            };
            let lines = convert(&request).unwrap();
            assert!(lines.iter().any(|line| line.starts_with("train: 4 images with ")), "{lines:?}");
            let found = form::find(&out, Division { shares: [1.0, 0.0, 0.0], seed: 0, trains: true }).unwrap();
            assert_eq!(found.names.unwrap(), ["circle", "square", "triangle"]);
            assert_eq!(found.splits.each_ref().map(Vec::len), [4, 2, 0]);
            let (_, rows) = super::super::sample::picture(1, &spec);
            let written = std::fs::read(out.join("labels/train/00001.txt")).unwrap();
            let read = super::super::labels::parse(&written, Some(3)).unwrap();
            let apart = read.iter().flatten().zip(rows.iter().flatten()).map(|(a, b)| (a - b).abs());
            assert!(read.len() == rows.len() && apart.fold(0.0, f32::max) < 1e-5, "{layout:?}");
            assert!(out.join("images/val/00005.png").is_file());
            assert!(convert(&request).unwrap_err().to_string().contains("already holds files"));
        }
        let error = shares("0.5,0.6").unwrap_err().to_string();
        assert!(error.contains("--split-ratio 0.5,0.6: expected three shares"), "{error}");
    }
}
