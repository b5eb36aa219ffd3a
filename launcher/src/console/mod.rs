//! Terminal output of a job: prefixed lines, one progress bar, a closing table.
//!
//! A thread of its own writes, so that a terminal that takes no more never holds up supervision.

mod screen;
mod table;
mod text;

pub use table::{StageEnd, aligned, closing_table, stages_table};

use crate::supervise::{Stream, Watcher};
use screen::Screen;
use spec::contract::Progress;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes waiting to be shown from which on ranks have to wait with theirs.
const FULL_BYTES: usize = 1 << 20;

enum Message {
    Line {
        rank: u32,
        stream: Stream,
        text: String,
    },
    Note(String),
    Progress(Progress),
    Memory(u64),
    /// Take the bar away and answer.
    Pause(SyncSender<()>),
}

/// The job's voice on stdout and stderr. Lines of a rank keep the stream they were written to.
pub struct Console {
    sender: Option<std::sync::mpsc::Sender<Message>>,
    waiting: Arc<AtomicUsize>,
    writer: Option<JoinHandle<()>>,
    /// Lines of ranks that are shown; `None`: all.
    shows: Option<Shows>,
}

/// True for a line of this rank and stream that is to be shown.
type Shows = Box<dyn Fn(u32, Stream) -> bool + Send + Sync>;

impl Console {
    /// # Errors
    /// When no thread can be started.
    pub fn start() -> std::io::Result<Self> {
        Self::start_on(false)
    }

    /// `apart`: standard output is for something else, everything is shown on standard error.
    ///
    /// # Errors
    /// As [`Console::start`].
    pub fn start_on(apart: bool) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let shared = Arc::clone(&waiting);
        let writer = std::thread::Builder::new()
            .name("console".into())
            .stack_size(512 << 10)
            .spawn(move || write_all(&receiver, &shared, apart))?;
        *current() = Some((sender.clone(), Arc::clone(&waiting)));
        Ok(Self { sender: Some(sender), waiting, writer: Some(writer), shows: None })
    }

    /// Leaves out lines of ranks that `shows` refuses; their logs hold them.
    #[must_use]
    pub fn only(mut self, shows: impl Fn(u32, Stream) -> bool + Send + Sync + 'static) -> Self {
        self.shows = Some(Box::new(shows));
        self
    }

    /// Shows everything that waits, takes the bar away and ends.
    pub fn finish(mut self) {
        self.close();
    }

    fn close(&mut self) {
        // The writer ends when nobody can send any more.
        *current() = None;
        self.sender = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }

    fn send(&self, message: Message) {
        self.waiting.fetch_add(message.cost(), Ordering::Relaxed);
        if let Some(sender) = &self.sender {
            let _ = sender.send(message);
        }
    }
}

type Current = Option<(std::sync::mpsc::Sender<Message>, Arc<AtomicUsize>)>;

/// The console that is there, for lines that come from anywhere in this process.
fn current() -> MutexGuard<'static, Current> {
    static CURRENT: Mutex<Current> = Mutex::new(None);
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows a line of the launcher above the bar of the present console. Returns false if there is no console.
pub fn note(text: &str) -> bool {
    let current = current();
    let Some((sender, waiting)) = current.as_ref() else { return false };
    let message = Message::Note(text.to_owned());
    waiting.fetch_add(message.cost(), Ordering::Relaxed);
    sender.send(message).is_ok()
}

impl Drop for Console {
    fn drop(&mut self) {
        self.close();
    }
}

impl Watcher for Console {
    fn line(&self, rank: u32, stream: Stream, text: &str) {
        if self.shows.as_ref().is_none_or(|shows| shows(rank, stream)) {
            self.send(Message::Line { rank, stream, text: text.to_owned() });
        }
    }

    fn note(&self, text: &str) {
        self.send(Message::Note(text.to_owned()));
    }

    fn progress(&self, progress: &Progress) {
        self.send(Message::Progress(progress.clone()));
    }

    fn memory(&self, node_bytes: u64) {
        self.send(Message::Memory(node_bytes));
    }

    fn ready(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < FULL_BYTES
    }

    fn pause(&self) {
        let (answer, answered) = sync_channel(1);
        self.send(Message::Pause(answer));
        // A terminal that takes nothing must not keep Ctrl-Z from working.
        let _ = answered.recv_timeout(Duration::from_millis(200));
    }
}

impl Message {
    /// Bytes this message holds, about.
    fn cost(&self) -> usize {
        match self {
            Message::Line { text, .. } | Message::Note(text) => text.len() + 64,
            _ => 64,
        }
    }
}

fn write_all(receiver: &Receiver<Message>, waiting: &AtomicUsize, apart: bool) {
    let mut screen = Screen::new(apart);
    while let Ok(first) = receiver.recv() {
        // A burst of messages is written at once, and the bar is drawn once.
        let batch: Vec<Message> = std::iter::once(first).chain(receiver.try_iter().take(256)).collect();
        let cost: usize = batch.iter().map(Message::cost).sum();
        let now = Instant::now();
        for message in batch {
            match message {
                Message::Line { rank, stream, text } => screen.line(rank, stream, &text),
                Message::Note(text) => screen.note(&text),
                Message::Progress(progress) => screen.progress(progress, now),
                Message::Memory(bytes) => screen.memory(bytes),
                Message::Pause(answer) => {
                    screen.flush();
                    screen.clear();
                    let _ = answer.send(());
                }
            }
        }
        screen.flush();
        waiting.fetch_sub(cost, Ordering::Relaxed);
    }
    screen.clear();
}
