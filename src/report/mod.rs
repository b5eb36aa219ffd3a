//! Records, progress, memory lines.
//!
//! Architecture invariant: nothing here makes a step wait; whatever writes does so on a thread of its own.

pub mod memory;
pub mod records;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use host::journal::News;
use spec::contract::{
    FromRank, MAX_FRAME_BYTES, Progress, RecordGap, Relief, Relieved, Summary, ToRank, VERSION, read_frame, write_frame,
};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Least time between two progress messages to the launcher, and between two progress lines without one.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
const PLAIN_PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// How long the last words of a rank may take to reach the launcher.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Longest line of text sent, bytes; JSON escapes need at most six bytes for one.
const MAX_TEXT_BYTES: usize = MAX_FRAME_BYTES / 8;

/// The launcher's end of the conversation could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("no thread for reports: {0}")]
    Thread(#[from] io::Error),
}

enum Out {
    Message(FromRank),
    /// The newest progress waits in its slot.
    Progress,
    /// Answered when all before it is out.
    Flush(Sender<()>),
}

/// A rank's line to its launcher; without a launcher it prints plain lines. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Reporter {
    out: Sender<Out>,
    /// Last words were said.
    failed: Arc<AtomicBool>,
    progress: Arc<Mutex<Option<Progress>>>,
    gaps: Arc<Mutex<Vec<RecordGap>>>,
}

impl Reporter {
    /// Prints lines to stdout and errors to stderr.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn plain() -> Result<Self, ReportError> {
        Self::start(Sink::Plain, PLAIN_PROGRESS_EVERY)
    }

    /// Speaks over `socket`; says hello first. The launcher's words go to `on_peer_failed` (which rank, and its error) and
    /// to `on_relief` (the order's number, and what to do), on a thread of their own.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn over(
        socket: UnixStream,
        rank: u32,
        on_peer_failed: impl Fn(u32, String) + Send + 'static,
        on_relief: impl Fn(u64, Relief) + Send + 'static,
    ) -> Result<Self, ReportError> {
        let incoming = socket.try_clone()?;
        let reporter = Self::start(Sink::Launcher(socket), PROGRESS_EVERY)?;
        reporter.send(FromRank::Hello { version: VERSION, rank });
        std::thread::Builder::new().name("control".into()).spawn({
            let reporter = reporter.clone();
            move || listen(incoming, &reporter, on_peer_failed, on_relief)
        })?;
        Ok(reporter)
    }

    fn start(sink: Sink, every: Duration) -> Result<Self, ReportError> {
        let (out, queue) = unbounded();
        let progress = Arc::new(Mutex::new(None));
        let mut speaker = Speaker { sink, every, last: None, progress: progress.clone() };
        std::thread::Builder::new().name("report".into()).spawn(move || speaker.run(&queue))?;
        Ok(Self { out, failed: Arc::default(), progress, gaps: Arc::default() })
    }

    /// Prints one line; the launcher adds the rank's prefix.
    pub fn line(&self, text: impl Into<String>) {
        let text = shorten(text.into());
        self.send(FromRank::Line { text });
    }

    /// A line for users about a file of records; its gap goes to the summary.
    pub fn news(&self, news: News) {
        self.line(news.text);
        if let Some(gap) = news.gap {
            lock(&self.gaps).push(gap.clone());
            self.send(FromRank::Gap(gap));
        }
    }

    /// Times so far in which records of this rank could not be written.
    pub fn gaps(&self) -> Vec<RecordGap> {
        lock(&self.gaps).clone()
    }

    /// The run's summary, where its file could not be written: the launcher may have more luck.
    pub fn summary(&self, summary: Summary) {
        self.send(FromRank::Summary(Box::new(summary)));
    }

    /// Reports the result of an order.
    pub fn relieved(&self, answer: Relieved) {
        self.send(FromRank::Relieved(answer));
    }

    /// Where the run stands. Call it after every step: only the newest is kept, and about ten per second are sent.
    pub fn progress(&self, now: Progress) {
        let before = lock(&self.progress).replace(now);
        if before.is_none() {
            let _ = self.out.send(Out::Progress);
        }
    }

    /// The rank's last words; waits until they are out, two seconds at most. Only the first are said: what fails while the
    /// rank ends is not its cause.
    pub fn failed(&self, code: u8, step: Option<u64>, error: impl Into<String>) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let error = shorten(error.into());
        self.send(FromRank::Failed { code, step, error });
        self.flush();
    }

    /// True once the final message was sent.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// All is done and written; waits until the launcher can know, two seconds at most.
    pub fn done(&self) {
        self.send(FromRank::Done);
        self.flush();
    }

    fn send(&self, message: FromRank) {
        let _ = self.out.send(Out::Message(message));
    }

    fn flush(&self) {
        let (done, wait) = bounded(1);
        if self.out.send(Out::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(LAST_WORDS);
        }
    }
}

fn lock<T>(held: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    held.lock().unwrap_or_else(|e| e.into_inner())
}

fn shorten(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
    text
}

enum Sink {
    Launcher(UnixStream),
    Plain,
}

/// The thread that writes.
struct Speaker {
    sink: Sink,
    every: Duration,
    /// Time of the last progress message.
    last: Option<Instant>,
    progress: Arc<Mutex<Option<Progress>>>,
}

impl Speaker {
    fn run(&mut self, queue: &Receiver<Out>) {
        let mut due: Option<Instant> = None;
        loop {
            let next = match due {
                Some(at) => queue.recv_deadline(at),
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match next {
                Ok(Out::Message(message)) => {
                    // Progress sent before a line must not arrive after it.
                    if matches!(message, FromRank::Done | FromRank::Failed { .. }) {
                        self.tell_progress();
                        due = None;
                    }
                    self.tell(&message);
                }
                Ok(Out::Progress) => due = Some(self.last.map_or_else(Instant::now, |last| last + self.every)),
                Ok(Out::Flush(done)) => drop(done),
                Err(RecvTimeoutError::Timeout) => {
                    due = None;
                    self.tell_progress();
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn tell_progress(&mut self) {
        let newest = lock(&self.progress).take();
        if let Some(progress) = newest {
            self.last = Some(Instant::now());
            self.tell(&FromRank::Progress(progress));
        }
    }

    fn tell(&mut self, message: &FromRank) {
        if let Sink::Launcher(socket) = &mut self.sink {
            match write_frame(socket, message) {
                Ok(()) => return,
                // The launcher is gone: say it where someone may read it.
                Err(_) => self.sink = Sink::Plain,
            }
        }
        print(message);
    }
}

/// Printing to a closed pipe must not end training: errors are passed over.
fn print(message: &FromRank) {
    let _ = match message {
        FromRank::Line { text } => writeln!(io::stdout(), "{text}"),
        FromRank::Failed { error, step: Some(step), .. } => writeln!(io::stderr(), "error at step {step}: {error}"),
        FromRank::Failed { error, step: None, .. } => writeln!(io::stderr(), "error: {error}"),
        FromRank::Progress(p) => writeln!(
            io::stdout(),
            "{} epoch {}/{} step {}/{} loss {:.5} {:.1} samples/s",
            p.phase,
            p.epoch,
            p.epochs,
            p.step,
            p.steps,
            p.loss,
            p.samples_per_s
        ),
        FromRank::Hello { .. } | FromRank::Relieved(_) | FromRank::Done => Ok(()),
        // A line has said it; the summary holds it.
        FromRank::Gap(_) | FromRank::Summary(_) => Ok(()),
    };
}

/// Reads until the launcher closes its end; a launcher's death is the kernel's business (PDEATHSIG).
fn listen(
    mut socket: UnixStream,
    reporter: &Reporter,
    on_peer_failed: impl Fn(u32, String),
    on_relief: impl Fn(u64, Relief),
) {
    loop {
        match read_frame::<ToRank>(&mut socket) {
            Ok(Some(ToRank::PeerFailed { rank, error })) => on_peer_failed(rank, error),
            Ok(Some(ToRank::Relieve { order, action })) => on_relief(order, action),
            Ok(None) => return,
            Err(error) => {
                reporter.line(format!(
                    "warning: no more messages from the launcher are understood ({error}): orders to give memory back, and \
                     failures of other ranks, do not reach this rank; build launch and rank together"
                ));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::Effect;

    fn pair() -> (Reporter, UnixStream, Receiver<(u32, String)>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (told, peers) = unbounded();
        let reporter =
            Reporter::over(ours, 3, move |rank, error| told.send((rank, error)).unwrap(), |_, _| ()).unwrap();
        (reporter, theirs, peers)
    }

    fn next(socket: &mut UnixStream) -> FromRank {
        read_frame(socket).unwrap().unwrap()
    }

    #[test]
    fn messages_arrive_in_order_and_the_newest_progress_before_the_end() {
        let (reporter, mut launcher, _) = pair();
        reporter.line("opened 3 files");
        for step in 1..=1000 {
            reporter.progress(Progress { step, loss: f64::from(step as u32), ..Default::default() });
        }
        reporter.done();
        assert_eq!(next(&mut launcher), FromRank::Hello { version: VERSION, rank: 3 });
        assert_eq!(next(&mut launcher), FromRank::Line { text: "opened 3 files".into() });
        let mut steps = vec![];
        loop {
            match next(&mut launcher) {
                FromRank::Progress(p) => steps.push(p.step),
                FromRank::Done => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(steps.is_sorted() && steps.last() == Some(&1000), "{steps:?}");
        assert!(steps.len() < 1000, "progress is not rate-limited");
    }

    #[test]
    fn a_launcher_that_does_not_read_makes_no_step_wait() {
        let (reporter, launcher, _) = pair();
        // Never read and never closed.
        std::mem::forget(launcher);
        let text = "x".repeat(64 << 10);
        for step in 0..200 {
            reporter.line(text.clone());
            reporter.progress(Progress { step, ..Default::default() });
        }
    }

    #[test]
    fn a_failed_peer_is_told() {
        let (_reporter, mut launcher, peers) = pair();
        let body = serde_json::to_vec(&ToRank::PeerFailed { rank: 1, error: "boom".into() }).unwrap();
        launcher.write_all(&(body.len() as u32).to_le_bytes()).unwrap();
        launcher.write_all(&body).unwrap();
        assert_eq!(peers.recv().unwrap(), (1, "boom".into()));
    }

    #[test]
    fn orders_are_passed_on_and_answered() {
        let (ours, mut launcher) = UnixStream::pair().unwrap();
        let (given, orders) = unbounded();
        let on_relief = move |order, action| given.send((order, action)).unwrap();
        let reporter = Reporter::over(ours, 0, |_, _| (), on_relief).unwrap();
        for (order, action) in [(4, Relief::HalveMicroBatch), (5, Relief::Stop { reason: "full".into() })] {
            write_frame(&mut launcher, &ToRank::Relieve { order, action: action.clone() }).unwrap();
            assert_eq!(orders.recv().unwrap(), (order, action));
        }
        let effect = Effect::Halved { micro_batch: [4, 2], accumulation: [1, 2] };
        let text = "micro-batch 4 → 2".into();
        let answer = Relieved { order: 4, step: 7, uss_before_bytes: 2, uss_after_bytes: 1, text, effect };
        reporter.relieved(answer.clone());
        assert!(matches!(next(&mut launcher), FromRank::Hello { .. }));
        assert_eq!(next(&mut launcher), FromRank::Relieved(answer));
    }

    #[test]
    fn only_the_first_failure_is_told_whoever_tells_it() {
        let (reporter, mut launcher, _) = pair();
        let again = reporter.clone();
        assert!(!again.has_failed());
        reporter.failed(6, Some(7), "rank 1 never arrived");
        assert!(again.has_failed());
        again.failed(1, None, "the communicator was aborted");
        again.line("bye");
        assert!(matches!(next(&mut launcher), FromRank::Hello { .. }));
        assert!(matches!(next(&mut launcher), FromRank::Failed { code: 6, step: Some(7), .. }));
        assert!(matches!(next(&mut launcher), FromRank::Line { .. }));
    }

    #[test]
    fn last_words_survive_a_launcher_that_is_gone_and_a_text_that_is_too_long() {
        let (reporter, launcher, _) = pair();
        drop(launcher);
        reporter.failed(4, Some(7), "data ended early");
        let (reporter, mut launcher, _) = pair();
        reporter.failed(1, None, "é\u{1}".repeat(MAX_FRAME_BYTES));
        assert!(matches!(next(&mut launcher), FromRank::Hello { .. }));
        assert!(matches!(next(&mut launcher), FromRank::Failed { code: 1, step: None, .. }));
    }
}
