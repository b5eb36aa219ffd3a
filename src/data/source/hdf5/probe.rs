//! A second process opens a file before this one does.
//!
//! libhdf5 follows what a file's metadata say: a tree whose node is its own child ends in a stack overflow, a soft link to a
//! pipe in waiting for ever. Neither can be caught in the process it happens in. So each scanning thread has a companion,
//! this same program under another verb, that goes ahead; it costs one round trip per file that no index knows.

use super::open::{self, Wanted};
use super::{Layout, Opened};
use crate::data::DataError;
use crate::data::source::{file_error, h5ad};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Verb of the companion.
pub const VERB: &str = "open-ahead";
/// Opening reads a few kilobytes; a network's bad minute is no hang.
const LIMIT: Duration = Duration::from_secs(120);

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// From now on files are opened ahead by `program`, which understands [`VERB`]. Without it nothing is.
pub fn open_ahead_by(program: PathBuf) {
    let _ = PROGRAM.set(program);
}

/// What a companion opens files for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Purpose {
    /// Rows of recordings.
    Rows(Wanted),
    /// Cells and their genes.
    Cells(h5ad::Wanted),
}

impl From<Wanted> for Purpose {
    fn from(wanted: Wanted) -> Self {
        Purpose::Rows(wanted)
    }
}

impl From<h5ad::Wanted> for Purpose {
    fn from(wanted: h5ad::Wanted) -> Self {
        Purpose::Cells(wanted)
    }
}

/// The companion of one thread, started at the first file.
pub struct Probe {
    wanted: Purpose,
    limit: Duration,
    running: Option<Running>,
}

struct Running {
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Probe {
    pub fn new(wanted: impl Into<Purpose>) -> Self {
        Self { wanted: wanted.into(), limit: LIMIT, running: None }
    }

    /// Checks that libhdf5 returns for `path`, with success or with an error that this process will meet too.
    ///
    /// # Errors
    /// It crashed, did not return in time, or was ended from outside twice. Where a companion cannot be started, the file is
    /// opened without.
    pub fn check(&mut self, path: &Path) -> Result<(), DataError> {
        for _ in 0..2 {
            if let (None, Some(program)) = (&self.running, PROGRAM.get()) {
                self.running = start(program, &self.wanted).ok();
            }
            let Some(running) = &mut self.running else { return Ok(()) };
            let problem = match running.ask(path, self.limit) {
                Ok(true) => return Ok(()),
                Ok(false) => Some(format!(
                    "libhdf5 did not return from its metadata in {} s: they lead in circles, or its file system does not \
                     answer; leave it out if that stays so",
                    self.limit.as_secs()
                )),
                Err(_) => running.child.wait().ok().and_then(|status| status.signal()).and_then(crash),
            };
            self.running = None;
            if let Some(problem) = problem {
                return Err(file_error(path, problem));
            }
        }
        let problem = "the process that opens it ahead was ended from outside twice, perhaps for want of memory: free some and \
                       start again, or leave it out";
        Err(file_error(path, problem))
    }
}

/// Words for the end of a companion by `signal`, if its own work led to it. Others end it for reasons that say nothing about the
/// file, such as a lack of memory.
fn crash(signal: i32) -> Option<String> {
    let own = [Signal::SEGV, Signal::BUS, Signal::ABORT, Signal::ILL, Signal::FPE];
    own.iter().any(|own| own.as_raw() == signal).then(|| {
        format!(
            "libhdf5 crashes on its metadata (in a process of its own, signal {signal}): it is damaged, replace it or leave it out"
        )
    })
}

fn start(program: &Path, wanted: &Purpose) -> io::Result<Running> {
    let mut command = Command::new(program);
    command.arg(VERB).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::Error::other("no pipes"));
    };
    let mut running = Running { child, to, from };
    running.to.write_all(&line(wanted)?)?;
    Ok(running)
}

fn line(value: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

impl Running {
    /// False: no answer in time.
    fn ask(&mut self, path: &Path, limit: Duration) -> io::Result<bool> {
        self.to.write_all(&line(&path.as_os_str().as_bytes())?)?;
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let ready = loop {
            match poll(&mut [PollFd::new(&self.from, PollFlags::IN)], Some(&limit)) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        if ready == 0 {
            return Ok(false);
        }
        self.from.read_exact(&mut [0])?;
        Ok(true)
    }
}

/// The companion's work: opens each path that comes on stdin and answers with a byte. Ends with its input.
///
/// # Errors
/// Input that does not come from [`Probe`].
pub fn serve() -> io::Result<()> {
    // If the rank dies while libhdf5 goes in circles here, nobody else ends this process; nobody wants its core either.
    // Where a sandbox refuses prctl, the end of the input ends it too, once libhdf5 returns.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let mut lines = io::stdin().lock().lines();
    let Some(wanted) = lines.next() else { return Ok(()) };
    let wanted: Purpose = serde_json::from_str(&wanted?)?;
    let mut out = io::stdout();
    for line in lines {
        let path = PathBuf::from(OsString::from_vec(serde_json::from_str::<Vec<u8>>(&line?)?));
        match &wanted {
            Purpose::Rows(wanted) => {
                if let Ok(opened) = open::open(&path, wanted) {
                    walk(&opened);
                }
            }
            Purpose::Cells(wanted) => drop(h5ad::open(&path, wanted)),
        }
        out.write_all(b"k")?;
        out.flush()?;
    }
    Ok(())
}

/// Where libhdf5 will read the rows, opening has not walked the list of chunks yet.
fn walk(opened: &Opened) {
    if let Layout::Library { .. } = &opened.table.layout {
        let dataset = ::hdf5::File::open(&opened.table.path).and_then(|file| file.dataset(&opened.table.dataset));
        let _ = dataset.and_then(|dataset| dataset.chunks_visit(|_| 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs that do what libhdf5 may: end by a signal, or not at all.
    #[test]
    fn a_companion_that_dies_or_hangs_is_an_error_that_names_the_file() {
        let ended = ("read w; read p; kill -KILL $$", "");
        for (script, says) in
            [ended, ("read w; read p; kill -SEGV $$", "signal 11"), ("read w; exec sleep 600", "in 1 s")]
        {
            let wanted = Wanted { group: "g".into(), dataset: "d".into(), fields: Vec::new() };
            let mut probe = Probe { limit: Duration::from_secs(1), ..Probe::new(wanted) };
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let (mut to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
            to.write_all(&line(&probe.wanted).unwrap()).unwrap();
            probe.running = Some(Running { child, to, from });
            let checked = probe.check(Path::new("odd.hdf5"));
            assert!(probe.running.is_none(), "the next file gets a new one");
            if says.is_empty() {
                // Ended from outside, as for want of memory: that says nothing about the file.
                checked.unwrap();
                continue;
            }
            let error = checked.unwrap_err().to_string();
            assert!(error.contains("odd.hdf5") && error.contains(says), "{error}");
        }
    }
}
