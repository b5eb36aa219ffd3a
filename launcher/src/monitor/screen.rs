//! The terminal's other screen while this lives; plain lines where there is no terminal.

use super::view::Look;
use host::machine::colour;
use std::cell::Cell;
use std::io::{self, IsTerminal, Write};

pub struct Screen {
    pub live: bool,
    colour: bool,
    /// One JSON object per look.
    json: bool,
    /// The other screen is on.
    entered: Cell<bool>,
}

impl Screen {
    pub fn open(json: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let live = io::stdout().is_terminal() && !dumb && !json;
        let screen = Self { live, colour: colour::wanted(live), json, entered: Cell::new(false) };
        screen.enter();
        screen
    }

    /// Takes the terminal, at the start and after a stop (Ctrl-Z). In the background it is the shell's.
    pub fn enter(&self) {
        if self.live && in_foreground() {
            write("\u{1b}[?1049h\u{1b}[?25l");
            self.entered.set(true);
        }
    }

    /// Gives the terminal back as it was.
    pub fn leave(&self) {
        if self.entered.replace(false) {
            write("\u{1b}[?25h\u{1b}[?1049l");
        }
    }

    /// False: nobody reads it any more (`| head -1`, a terminal that was closed).
    ///
    /// # Errors
    /// It cannot be written for another reason.
    pub fn show(&self, look: &Look) -> io::Result<bool> {
        let text = match (self.json, self.live) {
            (true, _) => look.json() + "\n",
            (false, true) => self.drawn(look),
            (false, false) => look.line() + "\n",
        };
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) if self.live && error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn drawn(&self, look: &Look) -> String {
        if !in_foreground() {
            return String::new();
        }
        // A shell brings a job to the foreground without a word to it, if it runs.
        if !self.entered.get() {
            self.enter();
        }
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let size = size.map(|size| (usize::from(size.ws_col), usize::from(size.ws_row)));
        let (width, height) = size.filter(|size| size.0 > 0 && size.1 > 0).unwrap_or((80, 24));
        let lines: Vec<String> =
            look.screen(width, height, self.colour).into_iter().map(|line| line + "\u{1b}[K").collect();
        // No line end behind the last: the screen would scroll.
        format!("\u{1b}[H{}\u{1b}[J", lines.join("\r\n"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
    }
}

/// True if this process may draw on the terminal.
fn in_foreground() -> bool {
    // An error: it controls no session, such as one made by a script, and nobody else draws.
    rustix::termios::tcgetpgrp(io::stdout()).map_or(true, |group| group == rustix::process::getpgrp())
}

fn write(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
