//! Output of the verbs. A closed pipe (`| head -1`) is no error and no panic.

use super::{Error, io};
use spec::contract::exit;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Prints a result, one line end behind it.
pub(super) fn out(text: impl Display) -> Result<(), Error> {
    write(std::io::stdout().lock(), text).map_err(io("cannot print the result", exit::INTERNAL))
}

/// Standard output is for the result alone.
static APART: AtomicBool = AtomicBool::new(false);

/// From now on standard output is for the result of [`out`] alone; all else goes to standard error.
pub(super) fn result_apart() {
    APART.store(true, Ordering::Relaxed);
}

pub(super) fn is_result_apart() -> bool {
    APART.load(Ordering::Relaxed)
}

/// As [`out`], beside a run, which continues even if nobody reads.
pub(super) fn say(text: impl Display) {
    let _ = match is_result_apart() {
        true => write(std::io::stderr().lock(), text),
        false => write(std::io::stdout().lock(), text),
    };
}

/// The launcher's own words, on standard error.
pub(super) fn note(text: impl Display) {
    let _ = write(std::io::stderr().lock(), format_args!("launch: {text}"));
}

fn write(mut to: impl Write, text: impl Display) -> std::io::Result<()> {
    let text = text.to_string();
    let line = format!("{}\n", text.strip_suffix('\n').unwrap_or(&text));
    match to.write_all(line.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        write(writer, "unread").unwrap();
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write(full, "lost").unwrap_err().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn there_is_one_line_end() {
        let mut text = Vec::new();
        write(&mut text, "a").unwrap();
        write(&mut text, "b\n").unwrap();
        assert_eq!(text, b"a\nb\n");
    }
}
