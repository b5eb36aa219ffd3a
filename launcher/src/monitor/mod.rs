//! `launch monitor`: memory of a run, of any program, or of the machine, watched from outside.
//!
//! ```text
//! subject (who) ──► watch's sampler ──► view (bars, or lines) ──► screen
//!                                 ├──► serve (metrics: a textfile, HTTP)
//!                                 └──► log (JSON array, report) ──► plots
//! ```
//! Architecture invariant: touches nothing of what it watches; plots are drawn by who is asked to ([`Options::draw`]).

mod bar;
mod log;
mod openmetrics;
mod screen;
mod serve;
mod subject;
mod view;

pub use log::{Log, Report};
pub use serve::Listen;
pub use subject::{Subject, living_runs};
pub use view::Look;

use crate::supervise::Signals;
use crate::watch::{ProcessNow, Sampler};
use host::journal;
use host::machine::{GpuMeter, MemoryMeter, Probe};
use host::stamp::time_stamp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, getpid, kill_process};
use screen::Screen;
use serve::Outlets;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use subject::{Launcher, Member};

/// Time between two looks with and without a terminal; the guide's is the latter.
const LIVE_S: f64 = 1.0;
const PLAIN_S: f64 = 5.0;

/// Target of the monitor, its duration, and the place of its files.
pub struct Options<'a> {
    pub subject: Subject,
    /// `None` watches until a signal, or until the target has ended.
    pub duration_s: Option<f64>,
    /// Seconds between two looks. `None` depends on the terminal.
    pub interval_s: Option<f64>,
    /// Seconds between two plots. `None` makes one at the end.
    pub plot_interval_s: Option<f64>,
    pub out: PathBuf,
    /// One JSON object per look on standard output.
    pub json: bool,
    /// File that always holds the last look as metrics.
    pub textfile: Option<PathBuf>,
    pub listen: Option<Listen>,
    /// Draws the log (first path) as PNG (second path).
    pub draw: &'a dyn Fn(&Path, &Path) -> io::Result<()>,
}

/// Results of a monitor.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    pub log: PathBuf,
    pub report: PathBuf,
    pub plots: Vec<PathBuf>,
    /// Peaks and means, as in the report.
    pub found: Report,
    /// How the target ended, in words. `None` means that it is still running.
    pub end: Option<String>,
}

/// Watches until the time is up, SIGINT, SIGTERM or SIGHUP comes, nobody reads its lines, or what it watches has ended.
///
/// # Errors
/// Files cannot be written.
pub fn monitor(options: &Options) -> io::Result<Done> {
    let signals = Signals::take()?;
    let stamp = time_stamp(SystemTime::now()).replace('-', "_");
    let mut session = Session::start(options, &stamp)?;
    let (outlets, listening) = Outlets::open(options.textfile.clone(), options.listen.as_ref())?;
    if let Some(at) = listening {
        let _ = writeln!(io::stderr(), "launch: metrics are at {at}");
    }
    let screen = Screen::open(options.json);
    let period_s = options.interval_s.unwrap_or(if screen.live { LIVE_S } else { PLAIN_S });
    loop {
        let look = session.look();
        let read = screen.show(&look)?;
        outlets.show(&look)?;
        session.keep(&look)?;
        let gone = look.members.is_empty() && options.subject != Subject::Machine;
        if gone {
            session.end = Some(options.subject.end(session.last_ranks));
        }
        let left_s = options.duration_s.map_or(f64::INFINITY, |duration| duration - session.elapsed_s());
        if gone || !read || left_s <= 0.0 || wait(&signals, &screen, period_s.min(left_s))? {
            break;
        }
    }
    drop(screen);
    session.finish()
}

/// True: a signal asks for the end. Less than `seconds` where another one came.
fn wait(signals: &Signals, screen: &Screen, seconds: f64) -> io::Result<bool> {
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600));
    let timeout = Timespec { tv_sec: whole.as_secs() as i64, tv_nsec: i64::from(whole.subsec_nanos()) };
    let mut fds = [PollFd::new(&signals.pipe, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    while let Some(signal) = signals.receive() {
        match signal {
            Signal::INT | Signal::TERM | Signal::HUP => return Ok(true),
            Signal::TSTP => {
                screen.leave();
                kill_process(getpid(), Signal::STOP)?;
            }
            Signal::CONT => screen.enter(),
            _ => {}
        }
    }
    Ok(false)
}

/// With the path that it is about.
fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
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
    /// A run's, from the first look that shows it; between two attempts or legs it is all there is.
    launcher: Option<Launcher>,
    /// When a rank was last seen.
    last_ranks: SystemTime,
    end: Option<String>,
    /// The last sample could not be kept.
    failing: bool,
}

impl<'a> Session<'a> {
    fn start(options: &'a Options, stamp: &str) -> io::Result<Self> {
        Ok(Self {
            options,
            began: Instant::now(),
            meter: MemoryMeter::new(&Probe::default(), None),
            sampler: None,
            log: Log::create(&options.out, stamp).map_err(at(&options.out))?,
            report: Report::default(),
            plots: Vec::new(),
            plotted: Instant::now(),
            launcher: None,
            last_ranks: SystemTime::now(),
            end: None,
            failing: false,
        })
    }

    fn elapsed_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn look(&mut self) -> Look {
        let members = self.members();
        let run = self.options.subject.records();
        let cache_bytes = run.node.as_ref().map_or(0, |node| node.cache_bytes);
        let restarts = run.plan.as_ref().and(members.first()).and_then(|member| subject::restarts(member.pid));
        let pids: Vec<i32> = members.iter().map(|member| member.pid).collect();
        if self.sampler.as_ref().is_none_or(|(known, _)| *known != pids) {
            let sampler = Sampler::new(self.meter.clone(), GpuMeter::open(), &pids);
            self.sampler = Some((pids, sampler));
        }
        let sample = self.sampler.as_mut().map(|(_, sampler)| sampler.take(cache_bytes, false)).unwrap_or_default();
        let lent_bytes = self.launcher.as_ref().map_or(0, Launcher::lent_bytes);
        let label = |(member, mut now): (Member, ProcessNow)| {
            if self.launcher.as_ref().is_some_and(|launcher| launcher.member() == member) {
                now.own_bytes += lent_bytes;
            }
            (member.label, now)
        };
        // A process that has ended meanwhile has no memory.
        let living = members.into_iter().zip(sample.ranks.clone()).filter(|(_, now)| now.rss_bytes > 0);
        let members = living.map(label).collect();
        let run_name = self.options.subject.run_name();
        Look {
            title: self.options.subject.title(),
            elapsed_s: self.elapsed_s(),
            sample,
            members,
            run,
            run_name,
            restarts,
        }
    }

    fn members(&mut self) -> Vec<Member> {
        let mut members = self.options.subject.members();
        if !members.is_empty() {
            self.last_ranks = SystemTime::now();
        }
        if let Subject::Run(_) = self.options.subject {
            let parent = members.first().and_then(|member| Launcher::of(member.pid));
            self.launcher = parent.or(self.launcher.take()).filter(Launcher::lives);
            members.extend(self.launcher.as_ref().map(Launcher::member));
        }
        members
    }

    fn keep(&mut self, look: &Look) -> io::Result<()> {
        let record = look.record(iso(SystemTime::now()));
        match self.log.add(&record) {
            Ok(()) => self.failing = false,
            Err(error) if !journal::is_passing(&error) => return Err(at(&self.log.path)(error)),
            // The next sample is written over what this one left.
            Err(error) if !std::mem::replace(&mut self.failing, true) => {
                let path = self.log.path.display();
                let text = format!("launch: warning: {path}: {error}: samples are left out until there is room");
                let _ = writeln!(io::stderr(), "{text}");
            }
            Err(_) => {}
        }
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
        let report = self.log.path.with_file_name(format!("{}.json", stem(&self.log.path, "memory_report")));
        let text = serde_json::to_vec_pretty(&self.report)?;
        let written = journal::when_there_is_room(journal::ROOM_LIMIT, || std::fs::write(&report, &text));
        written.map_err(at(&report))?;
        if self.options.plot_interval_s.is_none() || self.plots.is_empty() {
            self.plot()?;
        }
        Ok(Done { log: self.log.path, report, plots: self.plots, found: self.report, end: self.end })
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
