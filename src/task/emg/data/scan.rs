//! One streaming pass over a recording, in bounded memory: failure-free blocks, bad samples, statistics, mean pose.

use crate::data::source::Identity;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::gather::Transform;
use crate::data::source::hdf5::{Reader, Table, Target, Wanted, open};
use crate::data::{DataError, Scratch};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// All angles this small at a sample: inverse kinematics failed there.
const ZERO_RAD: f32 = 1e-8;
/// Rows read at a time.
const BLOCK_ROWS: usize = 4096;

/// Settings that the scan depends on besides the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScanFacts {
    pub group: String,
    pub table: String,
    pub emg_channels: usize,
    pub angle_channels: usize,
    pub rectify: bool,
    pub max_samples: usize,
}

impl ScanFacts {
    pub fn wanted(&self) -> Wanted {
        Wanted {
            group: self.group.clone(),
            dataset: self.table.clone(),
            fields: vec![("emg".into(), self.emg_channels), ("joint_angles".into(), self.angle_channels)],
        }
    }
}

/// Count, mean and sum of squared deviations per channel (Welford), mergeable (Chan et al. 1979).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    pub count: u64,
    pub mean: Vec<f64>,
    pub m2: Vec<f64>,
}

impl Moments {
    pub fn new(channels: usize) -> Self {
        Self { count: 0, mean: vec![0.0; channels], m2: vec![0.0; channels] }
    }

    pub fn push(&mut self, values: impl Iterator<Item = f64>) {
        self.count += 1;
        let count = self.count as f64;
        for ((value, mean), m2) in values.zip(&mut self.mean).zip(&mut self.m2) {
            let delta = value - *mean;
            *mean += delta / count;
            *m2 += delta * (value - *mean);
        }
    }

    pub fn merge(&mut self, other: &Moments) {
        if other.count == 0 {
            return;
        }
        let (a, b) = (self.count as f64, other.count as f64);
        let total = a + b;
        for (channel, (mean, m2)) in self.mean.iter_mut().zip(&mut self.m2).enumerate() {
            let delta = other.mean[channel] - *mean;
            *mean += delta * b / total;
            *m2 += other.m2[channel] + delta * delta * a * b / total;
        }
        self.count += other.count;
    }

    /// Population standard deviation + 1e-8.
    pub fn std(&self) -> Vec<f64> {
        let count = self.count.max(1) as f64;
        self.m2.iter().map(|m2| (m2 / count).sqrt() + 1e-8).collect()
    }
}

/// Facts from one pass over a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileFacts {
    pub table: Table,
    pub identity: Identity,
    /// Runs of rows `[start, end)` where inverse kinematics succeeded.
    pub valid: Vec<[u64; 2]>,
    /// Moments of sampled EMG rows, after rectification when on.
    pub emg: Moments,
    /// Sum of the angles over all rows, radians.
    pub angle_sum: Vec<f64>,
}

impl FileFacts {
    /// # Errors
    /// The first fact that cannot be true of its table.
    pub fn validate(&self, facts: &ScanFacts) -> Result<(), String> {
        self.table.validate()?;
        let lens: Vec<usize> = self.table.members.iter().map(|member| member.len).collect();
        let sorted = self.valid.iter().flatten().is_sorted_by(|a, b| a < b);
        let written = self.table.written();
        let within = |block: &[u64; 2]| written.iter().any(|run| run[0] <= block[0] && block[1] <= run[1]);
        let inside = self.valid.iter().all(within);
        let stats = self.emg.mean.len() == facts.emg_channels && self.emg.m2.len() == facts.emg_channels;
        if lens != [facts.emg_channels, facts.angle_channels] || !sorted || !inside || !stats {
            return Err("facts that do not fit the file".into());
        }
        if self.angle_sum.len() != facts.angle_channels {
            return Err("angles that do not fit the file".into());
        }
        Ok(())
    }

    /// Rows that were written, though inverse kinematics failed there.
    pub fn failed_rows(&self) -> u64 {
        self.table.written_rows() - self.valid_rows()
    }

    pub fn valid_rows(&self) -> u64 {
        self.valid.iter().map(|block| block[1] - block[0]).sum()
    }
}

/// Opens and scans one file.
///
/// # Errors
/// Whatever [`open::open`] refuses, chunks that do not decode, NaN or infinite samples, and a file that changes meanwhile.
pub fn scan_file(path: &Path, facts: &ScanFacts) -> Result<FileFacts, DataError> {
    // Opened first: that refuses a pipe, which would never be read.
    let table = open::open(path, &facts.wanted())?.table;
    let identity = Identity::now(path)?;
    if table.written_rows() == 0 {
        let problem = format!("none of its {} rows was ever written: leave it out", table.rows);
        return Err(DataError::File { path: path.to_owned(), problem });
    }
    let mut pass = Pass::new(&table, facts);
    let step = table.chunk_rows().unwrap_or(BLOCK_ROWS).clamp(1, BLOCK_ROWS) as u64;
    // One chunk is enough: rows come in order.
    let chunk_bytes = table.chunk_rows().unwrap_or(0) * table.used_row_bytes();
    let reader = Reader::new(vec![table.clone()], Arc::new(LruChunks::new(chunk_bytes as u64)));
    let mut scratch = Scratch::default();
    let (mut emg, mut angles) = (Vec::new(), Vec::new());
    // Rows that were never written are no data: neither statistics nor windows know of them.
    for (row, rows) in blocks_of(&table.written(), step) {
        emg.resize(rows * facts.emg_channels * 4, 0);
        angles.resize(rows * facts.angle_channels * 4, 0);
        let transform = &Transform::IDENTITY;
        let mut targets =
            [Target { member: 0, transform, out: &mut emg }, Target { member: 1, transform, out: &mut angles }];
        reader.read(0, row, rows, &mut targets, &mut scratch)?;
        let refused = |problem| DataError::File { path: path.to_owned(), problem };
        pass.block(row, &floats(&emg), &floats(&angles)).map_err(refused)?;
    }
    if Identity::now(path)? != identity {
        let problem = "changed while it was looked at: start again when nobody writes there".into();
        return Err(DataError::File { path: path.to_owned(), problem });
    }
    Ok(pass.finish(table, identity))
}

/// First row and number of rows of each block; a block ends where a step or a run ends.
fn blocks_of(runs: &[[u64; 2]], step: u64) -> impl Iterator<Item = (u64, usize)> {
    let next = move |row: u64, end: u64| ((row / step + 1) * step).min(end);
    runs.iter().flat_map(move |[start, end]| {
        let (mut row, end) = (*start, *end);
        std::iter::from_fn(move || {
            let first = (row < end).then_some(row)?;
            row = next(first, end);
            Some((first, (row - first) as usize))
        })
    })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|cell| f32::from_ne_bytes(*cell)).collect()
}

/// Row `k` of `samples` rows spread evenly over `rows`: `linspace(0, rows - 1, samples)` rounded down.
pub fn sampled_row(k: u64, samples: u64, rows: u64) -> u64 {
    match samples {
        0 | 1 => 0,
        _ => (u128::from(k) * u128::from(rows - 1) / u128::from(samples - 1)) as u64,
    }
}

/// State of the pass.
struct Pass<'a> {
    facts: &'a ScanFacts,
    rows: u64,
    samples: u64,
    next_sample: u64,
    valid: Vec<[u64; 2]>,
    emg: Moments,
    angle_sum: Vec<f64>,
}

impl<'a> Pass<'a> {
    fn new(table: &Table, facts: &'a ScanFacts) -> Self {
        Self {
            facts,
            rows: table.rows,
            samples: table.rows.min(facts.max_samples.max(1) as u64),
            next_sample: 0,
            valid: Vec::new(),
            emg: Moments::new(facts.emg_channels),
            angle_sum: vec![0.0; facts.angle_channels],
        }
    }

    /// Takes rows from `first` on.
    fn block(&mut self, first: u64, emg: &[f32], angles: &[f32]) -> Result<(), String> {
        finite("emg", first, emg, self.facts.emg_channels)?;
        finite("joint_angles", first, angles, self.facts.angle_channels)?;
        let rows = (emg.len() / self.facts.emg_channels) as u64;
        while self.next_sample < self.samples {
            let at = sampled_row(self.next_sample, self.samples, self.rows);
            if at >= first + rows {
                break;
            }
            // It lies among rows that were never written.
            if at < first {
                self.next_sample += 1;
                continue;
            }
            let channels = &emg[(at - first) as usize * self.facts.emg_channels..][..self.facts.emg_channels];
            let rectify = self.facts.rectify;
            self.emg.push(channels.iter().map(|x| f64::from(if rectify { x.abs() } else { *x })));
            self.next_sample += 1;
        }
        for (row, pose) in (first..).zip(angles.chunks_exact(self.facts.angle_channels)) {
            self.angle_sum.iter_mut().zip(pose).for_each(|(sum, x)| *sum += f64::from(*x));
            if pose.iter().all(|x| x.abs() <= ZERO_RAD) {
                continue;
            }
            match self.valid.last_mut() {
                Some(block) if block[1] == row => block[1] += 1,
                _ => self.valid.push([row, row + 1]),
            }
        }
        Ok(())
    }

    fn finish(self, table: Table, identity: Identity) -> FileFacts {
        FileFacts { table, identity, valid: self.valid, emg: self.emg, angle_sum: self.angle_sum }
    }
}

fn finite(field: &str, first: u64, values: &[f32], channels: usize) -> Result<(), String> {
    // A sum of x * 0 is 0 unless some x is NaN or infinite.
    let fold = |values: &[f32]| values.iter().fold(true, |fine, x| fine & x.is_finite());
    if fold(values) {
        return Ok(());
    }
    let at = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (row, channel) = (first + (at / channels) as u64, at % channels);
    Err(format!("{field} is {} at row {row}, channel {channel}: repair the file or leave it out", values[at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_moments_equal_two_passes() {
        let value = |i: usize, c: usize| ((i * 7919 + c * 104_729) % 1000) as f64 / 37.0 + 1e3 * c as f64;
        let mut merged = Moments::new(3);
        for part in [0..1, 1..400, 400..400, 400..1000] {
            let mut moments = Moments::new(3);
            part.for_each(|i| moments.push((0..3).map(|c| value(i, c))));
            merged.merge(&moments);
        }
        for c in 0..3 {
            let mean = (0..1000).map(|i| value(i, c)).sum::<f64>() / 1000.0;
            let variance = (0..1000).map(|i| (value(i, c) - mean).powi(2)).sum::<f64>() / 1000.0;
            assert!((merged.mean[c] - mean).abs() <= 1e-10 * mean.abs().max(1.0));
            assert!((merged.std()[c] - variance.sqrt() - 1e-8).abs() <= 1e-10 * variance.sqrt().max(1.0));
        }
        assert_eq!(merged.count, 1000);
    }

    #[test]
    fn sampled_rows_are_linspace_rounded_down() {
        let rows = |samples, rows| (0..samples).map(|k| sampled_row(k, samples, rows)).collect::<Vec<_>>();
        assert_eq!(rows(5, 10), [0, 2, 4, 6, 9]);
        assert_eq!(rows(4, 4), [0, 1, 2, 3]);
        assert_eq!(rows(1, 10), [0]);
    }
}
