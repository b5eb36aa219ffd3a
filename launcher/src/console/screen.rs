//! Lines on stdout and stderr, and the progress bar below them.

use super::text::{clean, duration};
use crate::supervise::Stream;
use host::machine::colour;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use spec::contract::{Phase, Progress};
use spec::plan::bytes_text;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Without a terminal, progress is a plain line at most this often; less often in long runs.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
const PLAIN_EVERY_LATER: Duration = Duration::from_secs(60);
/// Steps before the remaining time is shown: the first ones are slow.
const ETA_STEPS: u64 = 3;

pub struct Screen {
    out: Pending,
    err: Pending,
    /// Drawn on stderr when that is a terminal, from the first progress on.
    bar: Option<ProgressBar>,
    draws: bool,
    apart: bool,
    colour_bar: bool,
    node_bytes: u64,
    pace: Option<Pace>,
    last_plain: Option<(Instant, u64, Phase)>,
}

/// Text that is written in one go.
struct Pending {
    text: String,
    colour: bool,
}

/// Start of the step count, for the remaining time.
struct Pace {
    since: Instant,
    step: u64,
}

impl Screen {
    /// `apart`: nothing is written to standard output.
    pub fn new(apart: bool) -> Self {
        let (out, err) = (std::io::stdout().is_terminal(), std::io::stderr().is_terminal());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self {
            out: Pending { text: String::new(), colour: colour::wanted(out) },
            err: Pending { text: String::new(), colour: colour::wanted(err) },
            bar: None,
            apart,
            draws: err && !dumb,
            colour_bar: colour::wanted(err),
            node_bytes: 0,
            pace: None,
            last_plain: None,
        }
    }

    pub fn line(&mut self, rank: u32, stream: Stream, text: &str) {
        let to = if stream == Stream::Err { &mut self.err } else { &mut self.out };
        to.push(&format!("[rank {rank}] "), text);
    }

    /// The launcher's own words.
    pub fn note(&mut self, text: &str) {
        text.lines().for_each(|line| self.err.push("[launch] ", line));
    }

    pub fn memory(&mut self, node_bytes: u64) {
        self.node_bytes = node_bytes;
    }

    pub fn progress(&mut self, progress: Progress, now: Instant) {
        let pace = self.pace.get_or_insert(Pace { since: now, step: progress.step });
        let left = pace.left(&progress, now);
        let memory = self.node_bytes.max(progress.pss_bytes);
        let text = describe(&progress, left, memory);
        if !self.draws {
            return self.plain(&progress, text, now);
        }
        let colour = self.colour_bar;
        let bar = self.bar.get_or_insert_with(|| new_bar(colour));
        bar.update(|state| {
            state.set_len(progress.steps);
            state.set_pos(progress.step);
        });
        bar.set_message(text);
    }

    fn plain(&mut self, progress: &Progress, text: String, now: Instant) {
        let last = self.last_plain.as_ref();
        let news = last.is_none_or(|(_, epoch, phase)| *epoch != progress.epoch || *phase != progress.phase);
        let run = self.pace.as_ref().map_or(Duration::ZERO, |pace| now.duration_since(pace.since));
        let every = (run / 20).clamp(PLAIN_EVERY, PLAIN_EVERY_LATER);
        let due = last.is_none_or(|(at, ..)| now.duration_since(*at) >= every);
        let done = progress.steps > 0 && progress.step >= progress.steps;
        if news || due || done {
            self.last_plain = Some((now, progress.epoch, progress.phase));
            self.out.push("", &text);
        }
    }

    /// Writes what has gathered, above the bar.
    pub fn flush(&mut self) {
        if self.out.text.is_empty() && self.err.text.is_empty() {
            return;
        }
        let (out, err) = (std::mem::take(&mut self.out.text), std::mem::take(&mut self.err.text));
        // A reader that has gone away is no reason to stop the job: its output is in the log files.
        let write = || {
            let _ = match self.apart {
                true => std::io::stderr().write_all(out.as_bytes()),
                false => std::io::stdout().write_all(out.as_bytes()).and_then(|()| std::io::stdout().flush()),
            };
            let _ = std::io::stderr().write_all(err.as_bytes());
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Pending {
    fn push(&mut self, prefix: &str, text: &str) {
        let text = clean(text, self.colour);
        self.text.extend([prefix, text.trim_end(), "\n"]);
    }
}

impl Pace {
    /// Seconds to the last step at the pace so far.
    fn left(&self, progress: &Progress, now: Instant) -> Option<f64> {
        let done = progress.step.checked_sub(self.step).filter(|done| *done >= ETA_STEPS)?;
        let each_s = now.duration_since(self.since).as_secs_f64() / done as f64;
        Some(each_s * progress.steps.checked_sub(progress.step)? as f64)
    }
}

fn new_bar(colour: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    // The text alone takes some 73 columns; what does not fit is cut rather than wrapped.
    let columns = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(0, |size| size.ws_col);
    let width = if columns >= 110 { 24 } else { 6 };
    let style = if colour { ".cyan/blue" } else { "" };
    match ProgressStyle::with_template(&format!("{{bar:{width}{style}}} {{wide_msg}}")) {
        Ok(style) => bar.with_style(style.progress_chars("█▉▊▋▌▍▎▏ ")),
        Err(_) => bar,
    }
}

/// `epoch 2/10, step 340/1200, loss 0.1234, 701 samples/s, ETA 12:05, 1.42 GiB`
fn describe(progress: &Progress, left_s: Option<f64>, memory_bytes: u64) -> String {
    // A user's own program may not say how many there are.
    let of =
        |what: &str, now: u64, all: u64| if all > 0 { format!("{what} {now}/{all}") } else { format!("{what} {now}") };
    let mut parts = match progress.phase {
        Phase::Predict => vec![format!("sample {}/{}", progress.step, progress.steps)],
        _ => vec![
            of("epoch", progress.epoch, progress.epochs),
            of("step", progress.step, progress.steps),
            format!("loss {:.4}", progress.loss),
        ],
    };
    parts.push(format!("{:.0} samples/s", progress.samples_per_s));
    parts.extend(left_s.filter(|seconds| *seconds > 0.0).map(|seconds| format!("ETA {}", duration(seconds))));
    if memory_bytes > 0 {
        parts.push(bytes_text(memory_bytes));
    }
    parts.extend(progress.cache_hit_rate.map(|rate| format!("cache {:.0} %", 100.0 * rate)));
    if !matches!(progress.phase, Phase::Other | Phase::Train) {
        parts.insert(0, progress.phase.to_string());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> Progress {
        Progress {
            phase: Phase::Train,
            epoch: 2,
            epochs: 10,
            step,
            steps: 1200,
            loss: 0.12345,
            samples_per_s: 700.6,
            ..Progress::default()
        }
    }

    #[test]
    fn a_line_tells_where_the_run_stands() {
        let text = describe(&at(340), Some(725.0), 1_520_000_000);
        assert_eq!(text, "epoch 2/10, step 340/1200, loss 0.1235, 701 samples/s, ETA 12:05, 1.42 GiB");
        let unknown = Progress { epochs: 0, steps: 0, ..at(340) };
        assert_eq!(describe(&unknown, None, 0), "epoch 2, step 340, loss 0.1235, 701 samples/s");
        let phase = Progress { phase: Phase::Val, cache_hit_rate: Some(0.8245), ..at(340) };
        let text = describe(&phase, None, 0);
        assert_eq!(text, "val, epoch 2/10, step 340/1200, loss 0.1235, 701 samples/s, cache 82 %");
    }

    #[test]
    fn a_pass_counts_samples() {
        let pass = Progress { phase: Phase::Predict, loss: 0.0, ..at(340) };
        assert_eq!(describe(&pass, Some(60.0), 0), "predict, sample 340/1200, 701 samples/s, ETA 1:00");
    }

    #[test]
    fn time_left_counts_from_the_first_step_seen() {
        let since = Instant::now();
        let pace = Pace { since, step: 200 };
        assert_eq!(pace.left(&at(201), since), None);
        assert_eq!(pace.left(&at(700), since + Duration::from_secs(50)), Some(50.0));
    }
}
