//! The monitor's files: a JSON array that can be read after every sample, and a report at the end.

use crate::advise::MonitorSample;
use serde::Serialize;
use spec::plan::bytes_text;
use std::fmt::{self, Display};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `memory_log_YYYYmmdd_HHMMSS.json`: an array of [`MonitorSample`]s.
pub struct Log {
    pub path: PathBuf,
    file: File,
    /// Where the closing bracket stands.
    end: u64,
    samples: u64,
}

impl Log {
    /// A new file in `dir`; `stamp`: `YYYYmmdd_HHMMSS`. Two monitors of one second get files of their own.
    ///
    /// # Errors
    /// No such folder, no permission.
    pub fn create(dir: &Path, stamp: &str) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut path = dir.join(format!("memory_log_{stamp}.json"));
        for number in 2.. {
            match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    file.write_all_at(b"[\n]\n", 0)?;
                    return Ok(Self { path, file, end: 2, samples: 0 });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => {
                    path = dir.join(format!("memory_log_{stamp}_{number}.json"));
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Appends a sample. The sample and the new bracket go out in one write over the old bracket, so that a reader at
    /// any moment, or after a kill, finds a whole array.
    ///
    /// # Errors
    /// No room.
    pub fn add(&mut self, sample: &MonitorSample) -> io::Result<()> {
        if self.file.metadata()?.len() < self.end {
            // Rotated by copying and truncating: a new array begins.
            self.file.write_all_at(b"[\n]\n", 0)?;
            (self.end, self.samples) = (2, 0);
        }
        let between = if self.samples == 0 { "" } else { ",\n" };
        let text = format!("{between}{}", serde_json::to_string(sample)?);
        self.file.write_all_at(format!("{text}\n]\n").as_bytes(), self.end)?;
        self.end += text.len() as u64;
        self.samples += 1;
        Ok(())
    }
}

/// `memory_report_YYYYmmdd_HHMMSS.json`. GB are GiB, as in the guides.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    pub duration_s: f64,
    pub samples: u64,
    pub max_ram_percent: f64,
    pub avg_ram_percent: f64,
    pub max_ram_gb: f64,
    pub max_gpu_percent: Option<f64>,
    pub max_gpu_gb: Option<f64>,
    /// The watched processes and their page cache together.
    pub max_job_gb: Option<f64>,
    /// Mean over the samples in which there were any.
    pub avg_job_gb: Option<f64>,
    #[serde(skip)]
    job_samples: u64,
}

impl Report {
    /// Counts one more sample.
    pub fn add(&mut self, sample: &MonitorSample) {
        let most = |old: Option<f64>, new: Option<f64>| old.into_iter().chain(new).reduce(f64::max);
        self.samples += 1;
        self.duration_s = sample.elapsed_time;
        self.max_ram_percent = self.max_ram_percent.max(sample.ram_percent);
        self.avg_ram_percent += (sample.ram_percent - self.avg_ram_percent) / self.samples as f64;
        self.max_ram_gb = self.max_ram_gb.max(sample.ram_used_gb);
        self.max_gpu_percent = most(self.max_gpu_percent, sample.gpu_memory_percent);
        self.max_gpu_gb = most(self.max_gpu_gb, sample.gpu_reserved_gb);
        self.max_job_gb = most(self.max_job_gb, sample.job_gb);
        if let Some(job_gb) = sample.job_gb {
            self.job_samples += 1;
            let before = self.avg_job_gb.unwrap_or(0.0);
            self.avg_job_gb = Some(before + (job_gb - before) / self.job_samples as f64);
        }
    }
}

/// `12 s, 4 samples: RAM peak 2.41 GiB (10.2 %), mean 9.9 %; watched: peak 683.4 MiB, mean 651.0 MiB`
impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |gb: f64| bytes_text((gb * f64::from(1 << 30)) as u64);
        let samples = if self.samples == 1 { "sample" } else { "samples" };
        write!(f, "{:.0} s, {} {samples}: ", self.duration_s, self.samples)?;
        let (peak, percent, mean) = (text(self.max_ram_gb), self.max_ram_percent, self.avg_ram_percent);
        write!(f, "RAM peak {peak} ({percent:.1} %), mean {mean:.1} %")?;
        if let (Some(peak), Some(mean)) = (self.max_job_gb, self.avg_job_gb) {
            write!(f, "; watched: peak {}, mean {}", text(peak), text(mean))?;
        }
        if let (Some(peak), Some(percent)) = (self.max_gpu_gb, self.max_gpu_percent) {
            write!(f, "; GPU peak {} ({percent:.1} %)", text(peak))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_an_array_after_every_sample() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::create(dir.path(), "20241205_143022").unwrap();
        let other = Log::create(dir.path(), "20241205_143022").unwrap();
        assert_eq!(log.path.file_name().unwrap(), "memory_log_20241205_143022.json");
        assert_ne!(log.path, other.path);
        for count in 0..20 {
            let text = std::fs::read_to_string(&log.path).unwrap();
            let samples: Vec<MonitorSample> = serde_json::from_str(&text).unwrap();
            assert_eq!(samples.len(), count);
            let elapsed_time = 5.0 * count as f64;
            log.add(&MonitorSample { elapsed_time, ram_percent: 50.0, ..Default::default() }).unwrap();
        }
    }

    #[test]
    fn a_log_that_is_copied_and_truncated_is_an_array_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::create(dir.path(), "20241205_143022").unwrap();
        let sample = |elapsed_time| MonitorSample { elapsed_time, ..Default::default() };
        (0..3).for_each(|n| log.add(&sample(f64::from(n))).unwrap());
        std::fs::File::options().write(true).open(&log.path).unwrap().set_len(0).unwrap();
        (3..5).for_each(|n| log.add(&sample(f64::from(n))).unwrap());
        let samples: Vec<MonitorSample> = serde_json::from_slice(&std::fs::read(&log.path).unwrap()).unwrap();
        assert_eq!(samples.iter().map(|sample| sample.elapsed_time).collect::<Vec<_>>(), [3.0, 4.0]);
    }

    #[test]
    fn the_report_holds_peaks_and_means() {
        let mut report = Report::default();
        for (t, percent, job_gb) in [(0.0, 40.0, None), (5.0, 80.0, Some(2.0)), (10.0, 60.0, Some(1.0))] {
            report.add(&MonitorSample { elapsed_time: t, ram_percent: percent, job_gb, ..Default::default() });
        }
        assert_eq!((report.samples, report.duration_s, report.max_ram_percent), (3, 10.0, 80.0));
        assert!((report.avg_ram_percent - 60.0).abs() < 1e-9);
        assert_eq!((report.max_job_gb, report.max_gpu_gb), (Some(2.0), None));
        let text = "10 s, 3 samples: RAM peak 0 B (80.0 %), mean 60.0 %; watched: peak 2.00 GiB, mean 1.50 GiB";
        assert_eq!(report.to_string(), text);
    }
}
