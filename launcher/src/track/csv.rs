//! `metrics.jsonl` as one table.

use super::Source;
use super::facts::of_metrics;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub(super) fn write(source: &Source, out: &Path) -> io::Result<PathBuf> {
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let rows: Vec<Vec<(String, f64)>> = source.run.metrics.iter().map(of_metrics).collect();
    let mut names: Vec<&str> = vec!["epoch", "loss", "lr"];
    let others: BTreeSet<&str> = rows.iter().flatten().map(|(name, _)| name.as_str()).collect();
    names.extend(others.into_iter().filter(|name| !["epoch", "loss", "lr"].contains(name)));
    let mut text = Vec::new();
    let head: Vec<String> = ["step", "t"].iter().chain(&names).map(|name| field(name)).collect();
    writeln!(text, "{}", head.join(","))?;
    for (record, row) in source.run.metrics.iter().zip(&rows) {
        write!(text, "{},{}", record.step, record.t)?;
        for name in &names {
            // A value that is missing is empty; one that is not finite has its name, as tools for tables read it.
            match row.iter().find(|(known, _)| known == name) {
                Some((_, value)) if value.is_nan() => write!(text, ",nan")?,
                Some((_, value)) => write!(text, ",{value}")?,
                None => write!(text, ",")?,
            }
        }
        writeln!(text)?;
    }
    host::journal::replace(out, &out.with_added_extension("new"), &text, host::journal::ROOM_LIMIT)?;
    Ok(out.to_owned())
}

/// RFC 4180.
fn field(name: &str) -> String {
    match name.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", name.replace('"', "\"\"")),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::tests::run;

    #[test]
    fn each_metric_is_a_column_and_gaps_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        let folder = run(dir.path());
        let out = crate::track::export(&folder, crate::track::Form::Csv, None).unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("step,t,epoch,loss,lr,"), "{text}");
        let column = lines[0].split(',').position(|name| name == "val.loss").unwrap();
        let cells: Vec<&str> = lines[1..].iter().map(|line| line.split(',').nth(column).unwrap()).collect();
        assert_eq!(cells, ["", "0.25", ""]);
        assert!(lines[3].contains(",nan"), "{text}");
        assert_eq!(field("a,\"b"), "\"a,\"\"b\"");
    }
}
