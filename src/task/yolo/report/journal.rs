//! `results.csv`, with the package's columns, and its picture `results.png`.

use super::canvas::INK;
use super::chart::{Curve, Panel, sheet};
use crate::task::Journal;
use spec::contract::MetricsRecord;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Columns behind `epoch` and `time`, and where their values are in a record.
const COLUMNS: [(&str, &str); 13] = [
    ("train/box_loss", "train.box_loss"),
    ("train/cls_loss", "train.cls_loss"),
    ("train/dfl_loss", "train.dfl_loss"),
    ("metrics/precision(B)", "val.precision"),
    ("metrics/recall(B)", "val.recall"),
    ("metrics/mAP50(B)", "val.map50"),
    ("metrics/mAP50-95(B)", "val.map50_95"),
    ("val/box_loss", "val.box_loss"),
    ("val/cls_loss", "val.cls_loss"),
    ("val/dfl_loss", "val.dfl_loss"),
    ("lr/pg0", "lr.weight"),
    ("lr/pg1", "lr.bn"),
    ("lr/pg2", "lr.bias"),
];
/// Columns with a panel: all but the rates.
const DRAWN: usize = 10;
const TABLE: &str = "results.csv";
const PICTURE: &str = "results.png";

/// Keeps both.
pub struct YoloJournal {
    folder: PathBuf,
    began: Instant,
    plots: bool,
    /// Rows so far; `None` before the first.
    rows: Option<Rows>,
}

/// Rows of the table.
struct Rows {
    /// Time of what earlier processes did, seconds.
    before: f64,
    rows: Vec<(u64, String)>,
}

impl YoloJournal {
    /// For a run's folder. `plots`: draw the picture.
    pub fn new(folder: &Path, plots: bool) -> Self {
        Self { folder: folder.to_owned(), began: Instant::now(), plots, rows: None }
    }
}

impl Journal for YoloJournal {
    fn epoch(&mut self, record: &MetricsRecord) -> Result<(), String> {
        let path = self.folder.join(TABLE);
        let rows = self.rows.get_or_insert_with(|| Rows::read(&path, record.epoch));
        rows.rows.retain(|(epoch, _)| *epoch < record.epoch);
        let seconds = rows.before + self.began.elapsed().as_secs_f64();
        rows.rows.push((record.epoch, row(record, seconds)));
        replace(&path, rows.text().as_bytes())?;
        if self.plots {
            replace(&self.folder.join(PICTURE), &picture(&rows.rows)?)?;
        }
        Ok(())
    }
}

impl Rows {
    /// Rows of an interrupted run that a resumed one, whose first epoch is `epoch`, keeps.
    fn read(path: &Path, epoch: u64) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let number = |line: &str, at: usize| line.split(',').nth(at).and_then(|cell| cell.trim().parse::<f64>().ok());
        let kept = text.lines().skip(1).filter_map(|line| Some((number(line, 0)? as u64, line.to_owned())));
        let rows: Vec<(u64, String)> = kept.filter(|(own, _)| *own < epoch).collect();
        let before = rows.last().and_then(|(_, line)| number(line, 1)).unwrap_or(0.0);
        Self { before, rows }
    }

    fn text(&self) -> String {
        let lines = self.rows.iter().map(|(_, line)| line.as_str());
        std::iter::once(header().as_str()).chain(lines).map(|line| format!("{line}\n")).collect()
    }
}

fn header() -> String {
    let names = COLUMNS.iter().map(|(name, _)| *name);
    ["epoch", "time"].into_iter().chain(names).collect::<Vec<_>>().join(",")
}

/// Losses and metrics have five decimals, all numbers six digits, as the package writes them.
fn row(record: &MetricsRecord, seconds: f64) -> String {
    let cell = |(name, key): &(&str, &str)| {
        let value = record.metrics.get(*key).copied().unwrap_or(f64::NAN);
        let rounded = (value * 1e5).round_ties_even() / 1e5;
        general(if name.starts_with("lr/") { value } else { rounded })
    };
    let numbers = [record.epoch.to_string(), general(seconds)];
    numbers.into_iter().chain(COLUMNS.iter().map(cell)).collect::<Vec<_>>().join(",")
}

/// C's `%.6g`.
pub fn general(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".into()
        } else if value > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    if value == 0.0 {
        return "0".into();
    }
    let scientific = format!("{value:.5e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |text: &str| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text.to_owned() }
    };
    if (-4..6).contains(&exponent) {
        return trimmed(&format!("{value:.*}", (5 - exponent) as usize));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(digits), exponent.abs())
}

fn picture(rows: &[(u64, String)]) -> Result<Vec<u8>, String> {
    let values = |column: usize| {
        let cell = |line: &str| line.split(',').nth(column + 2).and_then(|cell| cell.parse().ok()).unwrap_or(f64::NAN);
        rows.iter().map(|(epoch, line)| (*epoch as f64, cell(line))).collect::<Vec<(f64, f64)>>()
    };
    let panel = |column: usize| Panel {
        title: COLUMNS[column].0.into(),
        across: "epoch".into(),
        curves: vec![Curve { name: String::new(), points: values(column), colour: INK, width: 2 }],
        unit: false,
    };
    let panels: Vec<Panel> = (0..DRAWN).map(panel).collect();
    sheet(&panels, DRAWN / 2, (300, 240), false)
}

/// Writes a sibling and renames it: no reader sees half a file.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: cannot be written: {e}", path.display());
    let sibling = path.with_added_extension("new");
    std::fs::write(&sibling, bytes).and_then(|()| std::fs::rename(&sibling, path)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64, map50: f64) -> MetricsRecord {
        let mut metrics: std::collections::BTreeMap<String, f64> =
            COLUMNS.iter().map(|(_, key)| ((*key).to_owned(), 0.123_456_789)).collect();
        metrics.insert("val.map50".into(), map50);
        metrics.insert("lr.bias".into(), 0.000_012_345_678);
        MetricsRecord { epoch, metrics, ..MetricsRecord::default() }
    }

    #[test]
    fn numbers_are_written_as_by_percent_g() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.5, "0.5"),
            (123_456.7, "123457"),
            (1_234_567.0, "1.23457e+06"),
            (0.000_123_456_789, "0.000123457"),
            (0.000_012_345_6, "1.23456e-05"),
            (-2.5, "-2.5"),
            (99_999.95, "99999.9"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(general(value), text);
        }
    }

    #[test]
    fn the_table_has_the_packages_columns_and_survives_a_resume() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = YoloJournal::new(folder.path(), true);
        for epoch in 1..=3 {
            journal.epoch(&record(epoch, 0.25 * epoch as f64)).unwrap();
        }
        let text = || std::fs::read_to_string(folder.path().join(TABLE)).unwrap();
        let lines: Vec<String> = text().lines().map(str::to_owned).collect();
        assert_eq!(
            lines[0],
            "epoch,time,train/box_loss,train/cls_loss,train/dfl_loss,metrics/precision(B),metrics/recall(B),\
             metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss,val/cls_loss,val/dfl_loss,lr/pg0,lr/pg1,lr/pg2"
        );
        let cells: Vec<&str> = lines[2].split(',').collect();
        assert_eq!((cells[0], cells[2], cells[7]), ("2", "0.12346", "0.5"));
        assert_eq!((cells[12], cells[14]), ("0.123457", "1.23457e-05"));
        assert!(std::fs::read(folder.path().join(PICTURE)).unwrap().starts_with(b"\x89PNG"));
        // Resumed after the second epoch: its third takes the place of the first one's.
        let mut journal = YoloJournal::new(folder.path(), false);
        journal.epoch(&record(3, 0.875)).unwrap();
        let resumed: Vec<String> = text().lines().map(str::to_owned).collect();
        assert_eq!((resumed.len(), &resumed[..3]), (4, &lines[..3]));
        assert_eq!(resumed[3].split(',').nth(7), Some("0.875"));
    }
}
