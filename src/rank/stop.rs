//! Signals that ask a rank to stop.

use super::RankError;
use rustix::process::{Signal, getpid};
use spec::contract::exit;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A hang-up among them, unless `nohup` made this process ignore it; and the processor time's soft limit.
const ASKING: [Signal; 5] = [Signal::TERM, Signal::INT, Signal::USR1, Signal::HUP, Signal::XCPU];

/// The request to stop.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Set by a signal.
    pub asked: Arc<AtomicBool>,
    /// Nothing is trained yet, so that there is nothing to save: a signal ends the rank with [`exit::UNSTARTED`].
    unstarted: Arc<AtomicBool>,
}

impl Stop {
    /// Heeds signals from now on. `says`: the rank prints why it ends early, since no launcher does.
    ///
    /// # Errors
    /// The system refuses a handler, or what the thread that prints needs.
    pub fn heed(says: bool) -> Result<Self, RankError> {
        let stop = Self { asked: Arc::default(), unstarted: Arc::new(AtomicBool::new(true)) };
        let refused = |e: std::io::Error| RankError::Io(format!("signals: {e}"));
        let told = if says { Some(stop.speaker().map_err(refused)?) } else { None };
        let heeded =
            ASKING.into_iter().filter(|signal| *signal != Signal::HUP || !host::inherited::is_ignored(Signal::HUP));
        for signal in heeded.map(Signal::as_raw) {
            match &told {
                Some(told) => told.try_clone().and_then(|told| signal_hook::low_level::pipe::register(signal, told)),
                None => {
                    let (code, unstarted) = (i32::from(exit::UNSTARTED), Arc::clone(&stop.unstarted));
                    signal_hook::flag::register_conditional_shutdown(signal, code, unstarted)
                }
            }
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop.asked)))
            .map_err(refused)?;
        }
        Ok(stop)
    }

    /// From now on a signal asks for a checkpoint. One that came just before does too.
    pub fn begin(&self) {
        self.unstarted.store(false, Ordering::SeqCst);
    }

    /// A thread that ends the rank, with words, when a signal arrives before training. Returns the end to write to.
    fn speaker(&self) -> std::io::Result<UnixStream> {
        let (mut heard, told) = UnixStream::pair()?;
        let unstarted = Arc::clone(&self.unstarted);
        let wait = move || {
            while heard.read(&mut [0; 16]).is_ok_and(|bytes| bytes > 0) {
                if unstarted.load(Ordering::SeqCst) {
                    eprintln!("stopped before the first step: nothing was trained; start the job again to go on");
                    // Without destructors: libtorch's threads may be at work.
                    signal_hook::low_level::exit(i32::from(exit::UNSTARTED));
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).stack_size(256 << 10).spawn(wait)?;
        Ok(told)
    }
}

/// The first process of a container gets no signal that has no handler: SIGTERM and SIGINT end it as they end any program.
///
/// # Errors
/// The system refuses a handler.
pub fn end_as_first_process() -> std::io::Result<()> {
    if getpid().is_init() {
        for signal in [Signal::TERM, Signal::INT].map(Signal::as_raw) {
            let code = i32::from(exit::SIGNAL_BASE) + signal;
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::new(AtomicBool::new(true)))?;
        }
    }
    Ok(())
}
