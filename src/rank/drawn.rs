//! Pictures of the training data, drawn in a thread while training begins.

use super::observer::write_whole;
use crate::report::Reporter;
use crate::task::Drawing;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// The thread, which is waited for: no picture is left half written.
pub struct Drawn(Option<JoinHandle<()>>);

impl Drawn {
    /// Draws into a run's folder. A picture that cannot be drawn or written is a line.
    pub fn start(drawing: Option<Drawing>, run_dir: &Path, reporter: &Reporter) -> Self {
        let (folder, reporter) = (run_dir.to_owned(), reporter.clone());
        let draw = |drawing: Drawing| {
            let thread = std::thread::Builder::new().name("drawing".into());
            // Without a thread there are no pictures, and training is the same.
            thread.spawn(move || write(drawing, &folder, &reporter)).ok()
        };
        Self(drawing.and_then(draw))
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // Its panic was printed.
            let _ = thread.join();
        }
    }
}

fn write(drawing: Drawing, folder: &Path, reporter: &Reporter) {
    for (name, picture) in drawing() {
        let path = PathBuf::from(&name);
        let (parent, file) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
        let write =
            |png: Vec<u8>| write_whole(&folder.join(parent), &file.to_string_lossy(), &png).map_err(|e| e.to_string());
        let written = picture.and_then(write);
        if let Err(error) = written {
            reporter.line(format!("{name}: {error}"));
        }
    }
}
