//! `launch monitor`: memory of a run, of any program, or of the machine, watched from outside.
//!
//! ```text
//! subject (who) ──► watch's sampler ──► view (bars, or lines) ──► terminal
//!                                 └──► log (JSON array, report) ──► plots
//! ```
//! Architecture invariant: touches nothing of what it watches; plots are drawn by who is asked to ([`Options::draw`]).

mod log;
mod subject;
mod view;

pub use log::{Log, Report};
pub use subject::{Subject, living_run};
pub use view::Look;

use crate::machine::{GpuMeter, MemoryMeter, Probe};
use crate::run_dir::time_stamp;
use crate::supervise::Signals;
use crate::watch::Sampler;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Time between two looks with and without a terminal; the guide's is the latter.
const LIVE_S: f64 = 1.0;
const PLAIN_S: f64 = 5.0;

/// What is to be watched, how long, and where the files go.
pub struct Options<'a> {
    pub subject: Subject,
    /// Absent: until a signal, or until what is watched has ended.
    pub duration_s: Option<f64>,
    /// Seconds between two looks; absent: as the terminal suggests.
    pub interval_s: Option<f64>,
    /// Seconds between two plots; absent: one at the end.
    pub plot_interval_s: Option<f64>,
    pub out: PathBuf,
    /// Draws the log (first path) as PNG (second path).
    pub draw: &'a dyn Fn(&Path, &Path) -> io::Result<()>,
}

/// What a monitor leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    pub log: PathBuf,
    pub report: PathBuf,
    pub plots: Vec<PathBuf>,
}

/// Watches until the time is up, a signal comes, or all watched processes have ended.
///
/// # Errors
/// Files cannot be written.
pub fn monitor(options: &Options) -> io::Result<Done> {
    let signals = Signals::take()?;
    let stamp = time_stamp(SystemTime::now()).replace('-', "_");
    let mut session = Session::start(options, &stamp)?;
    let screen = Screen::open();
    let period_s = options.interval_s.unwrap_or(if screen.live { LIVE_S } else { PLAIN_S });
    loop {
        let look = session.look();
        screen.show(&look)?;
        session.keep(&look)?;
        let gone = look.members.is_empty() && options.subject != Subject::Machine;
        let left_s = options.duration_s.map_or(f64::INFINITY, |duration| duration - session.elapsed_s());
        if gone || left_s <= 0.0 || wait(&signals, period_s.min(left_s))? {
            break;
        }
    }
    drop(screen);
    session.finish()
}

/// True: a signal asks for the end.
fn wait(signals: &Signals, seconds: f64) -> io::Result<bool> {
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600));
    let timeout = Timespec { tv_sec: whole.as_secs() as i64, tv_nsec: i64::from(whole.subsec_nanos()) };
    let mut fds = [PollFd::new(&signals.pipe, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

struct Session<'a> {
    options: &'a Options<'a>,
    began: Instant,
    meter: MemoryMeter,
    sampler: Option<(Vec<i32>, Sampler)>,
    log: Log,
    report: Report,
    plots: Vec<PathBuf>,
    plotted: Instant,
}

impl<'a> Session<'a> {
    fn start(options: &'a Options, stamp: &str) -> io::Result<Self> {
        Ok(Self {
            options,
            began: Instant::now(),
            meter: MemoryMeter::new(&Probe::default(), None),
            sampler: None,
            log: Log::create(&options.out, stamp)?,
            report: Report::default(),
            plots: Vec::new(),
            plotted: Instant::now(),
        })
    }

    fn elapsed_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn look(&mut self) -> Look {
        let members = self.options.subject.members();
        let run = self.options.subject.records();
        let cache_bytes = run.node.as_ref().map_or(0, |node| node.cache_bytes);
        let pids: Vec<i32> = members.iter().map(|member| member.pid).collect();
        if self.sampler.as_ref().is_none_or(|(known, _)| *known != pids) {
            let sampler = Sampler::new(self.meter.clone(), GpuMeter::open(), &pids);
            self.sampler = Some((pids, sampler));
        }
        let sample = self.sampler.as_mut().map(|(_, sampler)| sampler.take(cache_bytes, false)).unwrap_or_default();
        let labels = members.into_iter().map(|member| member.label);
        let members = labels.zip(sample.ranks.clone()).filter(|(_, now)| now.rss_bytes > 0).collect();
        Look { title: self.options.subject.title(), elapsed_s: self.elapsed_s(), sample, members, run }
    }

    fn keep(&mut self, look: &Look) -> io::Result<()> {
        let record = look.record(iso(SystemTime::now()));
        self.log.add(&record)?;
        self.report.add(&record);
        match self.options.plot_interval_s {
            Some(every) if self.plotted.elapsed().as_secs_f64() >= every => self.plot(),
            _ => Ok(()),
        }
    }

    fn plot(&mut self) -> io::Result<()> {
        self.plotted = Instant::now();
        let number = self.plots.len() + 1;
        let png = self.log.path.with_file_name(format!("{}_{number}.png", stem(&self.log.path, "memory_plot")));
        (self.options.draw)(&self.log.path, &png)?;
        self.plots.push(png);
        Ok(())
    }

    fn finish(mut self) -> io::Result<Done> {
        if self.options.plot_interval_s.is_none() || self.plots.is_empty() {
            self.plot()?;
        }
        let report = self.log.path.with_file_name(format!("{}.json", stem(&self.log.path, "memory_report")));
        std::fs::write(&report, serde_json::to_vec_pretty(&self.report)?)?;
        Ok(Done { log: self.log.path, report, plots: self.plots })
    }
}

/// Name of a file that belongs to a log: another word before the same time stamp.
fn stem(log: &Path, word: &str) -> String {
    let name = log.file_stem().unwrap_or_default().to_string_lossy();
    name.replacen("memory_log", word, 1)
}

/// `YYYY-mm-ddTHH:MM:SS`, UTC.
fn iso(now: SystemTime) -> String {
    let stamp = time_stamp(now);
    let part = |from: usize, to: usize| stamp.get(from..to).unwrap_or_default();
    let (date, time) = ([part(0, 4), part(4, 6), part(6, 8)], [part(9, 11), part(11, 13), part(13, 15)]);
    format!("{}T{}Z", date.join("-"), time.join(":"))
}

/// The terminal's other screen while this lives; plain lines where there is no terminal.
struct Screen {
    live: bool,
    colour: bool,
}

impl Screen {
    fn open() -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let screen = Self { live: io::stdout().is_terminal() && !dumb, colour: !plain };
        if screen.live {
            print!("\u{1b}[?1049h\u{1b}[?25l");
        }
        screen
    }

    fn show(&self, look: &Look) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !self.live {
            writeln!(out, "{}", look.line())?;
            return out.flush();
        }
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let (width, height) = size.map_or((80, 24), |size| (usize::from(size.ws_col), usize::from(size.ws_row)));
        let mut lines = look.screen(width, self.colour);
        lines.push("Ctrl-C ends the monitor; what it watches goes on".into());
        lines.truncate(height.max(2) - 1);
        let text: String = lines.iter().map(|line| format!("{line}\u{1b}[K\r\n")).collect();
        write!(out, "\u{1b}[H{text}\u{1b}[J")?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.live {
            print!("\u{1b}[?25h\u{1b}[?1049l");
            let _ = io::stdout().flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_stamps_follow_the_guide() {
        assert_eq!(
            stem(Path::new("a/memory_log_20241205_143022.json"), "memory_report"),
            "memory_report_20241205_143022"
        );
        assert_eq!(iso(SystemTime::UNIX_EPOCH + Duration::from_secs(951_782_400)), "2000-02-29T00:00:00Z");
    }
}
