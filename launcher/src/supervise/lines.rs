//! Bytes of a rank's output, cut into lines.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Longest line that is shown in one piece, bytes; the log file always holds everything.
const LONGEST: usize = 16 << 10;
/// A line that a progress bar keeps rewriting with `\r` is shown at most this often.
const REWRITE: Duration = Duration::from_secs(5);

/// Cuts one stream into lines. `\r` within a line means that what stood before it was written over.
#[derive(Debug, Default)]
pub struct Lines {
    part: Vec<u8>,
    /// The last byte was `\r`: the next one decides whether it ends the line or rewrites it.
    returned: bool,
    shown: Option<Instant>,
}

impl Lines {
    /// Takes bytes and gives every line they complete.
    pub fn push(&mut self, bytes: &[u8], now: Instant, mut give: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|b| matches!(b, b'\n' | b'\r')) {
            let (body, end) = match piece {
                [body @ .., end @ (b'\n' | b'\r')] => (body, Some(*end)),
                body => (body, None),
            };
            if self.returned && !(body.is_empty() && end == Some(b'\n')) {
                self.rewrite(now, &mut give);
            }
            self.append(body, &mut give);
            self.returned = end == Some(b'\r') || (self.returned && body.is_empty() && end.is_none());
            if end == Some(b'\n') {
                self.shown = None;
                self.give(&mut give);
            }
        }
    }

    /// The end of the stream: gives what stands without a line break.
    pub fn finish(&mut self, mut give: impl FnMut(&str)) {
        self.returned = false;
        if !self.part.is_empty() {
            self.give(&mut give);
        }
    }

    fn rewrite(&mut self, now: Instant, give: &mut impl FnMut(&str)) {
        self.returned = false;
        let due = self.shown.is_none_or(|shown| now.duration_since(shown) >= REWRITE);
        if due && !self.part.is_empty() {
            self.shown = Some(now);
            self.give(give);
        }
        self.part.clear();
    }

    fn append(&mut self, mut body: &[u8], give: &mut impl FnMut(&str)) {
        while self.part.len() + body.len() > LONGEST {
            let (head, tail) = body.split_at(LONGEST - self.part.len());
            self.part.extend_from_slice(head);
            self.give(give);
            body = tail;
        }
        self.part.extend_from_slice(body);
    }

    fn give(&mut self, give: &mut impl FnMut(&str)) {
        give(&String::from_utf8_lossy(&self.part));
        self.part.clear();
    }
}

/// The last lines of a rank, kept for the message of its failure.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<String>);

impl Tail {
    pub const LINES: usize = 10;

    pub fn push(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        if self.0.len() == Self::LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.chars().take(400).collect());
    }

    pub fn lines(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut out, now) = (Lines::default(), Vec::new(), Instant::now());
        for piece in pieces {
            lines.push(piece, now, |line| out.push(line.to_owned()));
        }
        lines.finish(|line| out.push(line.to_owned()));
        out
    }

    #[test]
    fn lines_do_not_depend_on_how_the_bytes_arrive() {
        let text = b"one\r\ntwo\n\nthree";
        let whole = cut(&[text]);
        assert_eq!(whole, ["one", "two", "", "three"]);
        let single: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(cut(&single), whole);
    }

    #[test]
    fn a_rewritten_line_shows_its_first_and_last_state() {
        let bar = b"\r 10%\r 50%\r 90%\r100%\nnext\n";
        assert_eq!(cut(&[bar]), [" 10%", "100%", "next"]);
        let single: Vec<&[u8]> = bar.chunks(1).collect();
        assert_eq!(cut(&single), [" 10%", "100%", "next"]);
    }

    #[test]
    fn bytes_that_are_no_text_pass_and_long_lines_are_cut() {
        assert_eq!(cut(&[b"a\xffb\n"]), ["a\u{fffd}b"]);
        let long = vec![b'x'; 2 * LONGEST + 5];
        let lengths: Vec<usize> = cut(&[&long]).iter().map(String::len).collect();
        assert_eq!(lengths, [LONGEST, LONGEST, 5]);
    }

    #[test]
    fn tail_keeps_the_last_lines_without_empty_ones() {
        let mut tail = Tail::default();
        (0..30).for_each(|i| tail.push(&if i % 2 == 0 { i.to_string() } else { String::new() }));
        assert_eq!(tail.lines(), ["10", "12", "14", "16", "18", "20", "22", "24", "26", "28"]);
    }
}
