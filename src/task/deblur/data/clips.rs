//! Clips as numbers: which frames clip `n` has. Memory is O(runs of frames), never O(clips).

use crate::data::Pages;
use crate::data::source::video::Sequence;
use std::ops::Range;

/// Clips in a run of frames without a gap.
struct Run {
    /// The first clip's number, of all.
    first_clip: u64,
    first_frame: usize,
    sequence: usize,
}

/// Clips of `clip_len` consecutive frames; none crosses a gap or the end of a sequence.
pub struct Clips {
    runs: Vec<Run>,
    names: Vec<String>,
    clip_len: usize,
    stride: usize,
    /// Clips there are.
    all: u64,
    /// Clips in use, evenly among them.
    used: u64,
}

impl Clips {
    /// `limit`: most clips; 0: all.
    pub fn new(sequences: &[Sequence], clip_len: usize, stride: usize, limit: usize) -> Self {
        let (mut runs, mut all) = (Vec::new(), 0);
        for (number, sequence) in sequences.iter().enumerate() {
            for frames in sequence.runs.iter().filter(|run| run.len() >= clip_len) {
                runs.push(Run { first_clip: all, first_frame: frames.start, sequence: number });
                all += ((frames.len() - clip_len) / stride + 1) as u64;
            }
        }
        let used = if limit == 0 { all } else { all.min(limit as u64) };
        let names = sequences.iter().map(|sequence| sequence.name.clone()).collect();
        Self { runs, names, clip_len, stride, all, used }
    }

    pub fn len(&self) -> usize {
        self.used as usize
    }

    pub fn clip_len(&self) -> usize {
        self.clip_len
    }

    /// Corner among all clips of the one with number `index`.
    fn place(&self, index: u64) -> u64 {
        (u128::from(index) * u128::from(self.all) / u128::from(self.used.max(1))) as u64
    }

    fn run(&self, index: u64) -> Option<(&Run, u64)> {
        if index >= self.used {
            return None;
        }
        let place = self.place(index);
        let run = self.runs.get(self.runs.partition_point(|run| run.first_clip <= place).checked_sub(1)?)?;
        Some((run, place - run.first_clip))
    }

    /// Numbers of the clip's frames; `None`: there is no such clip.
    pub fn frames(&self, index: u64) -> Option<Range<usize>> {
        let (run, within) = self.run(index)?;
        let first = run.first_frame + within as usize * self.stride;
        Some(first..first + self.clip_len)
    }

    /// Name of the clip's sequence; empty when there is no such clip.
    pub fn name(&self, index: u64) -> &str {
        self.run(index).and_then(|(run, _)| self.names.get(run.sequence)).map_or("", String::as_str)
    }

    /// Clips that have `frame`.
    pub fn with_frame(&self, frame: usize) -> Range<u64> {
        // Frames of clips rise with their numbers.
        let split = |before: &dyn Fn(Range<usize>) -> bool| {
            let (mut low, mut high) = (0, self.used);
            while low < high {
                let middle = low + (high - low) / 2;
                if self.frames(middle).is_some_and(before) { low = middle + 1 } else { high = middle }
            }
            low
        };
        split(&|frames| frames.end <= frame)..split(&|frames| frames.start <= frame)
    }

    /// Runs of clips that share frames, and sequences.
    pub fn pages(&self) -> Pages {
        let mut pages = Pages::default();
        let (mut page, mut sequence) = (None, None);
        for index in 0..self.used {
            let Some((run, within)) = self.run(index) else { continue };
            let here = (run.first_clip, within as usize * self.stride / self.clip_len);
            if page.replace(here) != Some(here) {
                pages.pages.push(index);
            }
            if sequence.replace(run.sequence) != Some(run.sequence) {
                pages.sequences.push(index);
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clips_equal_a_plain_list(
            lengths in proptest::collection::vec(proptest::collection::vec(1usize..14, 0..4), 1..5),
            clip_len in 1usize..7, stride in 1usize..5, limit in 0usize..40,
        ) {
            let (mut at, mut plain, mut sequences) = (0, Vec::new(), Vec::new());
            for (number, runs) in lengths.iter().enumerate() {
                let mut sequence = Sequence { name: format!("s{number}"), runs: Vec::new() };
                for length in runs {
                    sequence.runs.push(at..at + length);
                    plain.extend((0..*length).step_by(stride).filter(|s| s + clip_len <= *length).map(|s| (at + s, number)));
                    at += length;
                }
                sequences.push(sequence);
            }
            let clips = Clips::new(&sequences, clip_len, stride, limit);
            let used = if limit == 0 { plain.len() } else { limit.min(plain.len()) };
            prop_assert_eq!(clips.len(), used);
            prop_assert_eq!(clips.frames(used as u64), None);
            let mut before = None;
            for index in 0..used {
                let (first, number) = plain[index * plain.len() / used];
                let (frames, name) = (clips.frames(index as u64).unwrap(), clips.name(index as u64));
                prop_assert_eq!((&frames, name), (&(first..first + clip_len), &*format!("s{number}")));
                prop_assert!(before < Some(first), "clips rise");
                before = Some(first);
                for frame in 0..at {
                    let has = clips.with_frame(frame).contains(&(index as u64));
                    prop_assert_eq!(has, frames.contains(&frame), "clip {} frame {}", index, frame);
                }
            }
            let pages = clips.pages();
            prop_assert!(pages.pages.is_sorted() && pages.sequences.is_sorted());
            prop_assert!(used == 0 || (pages.pages[0], pages.sequences[0]) == (0, 0));
            prop_assert!(pages.sequences.iter().all(|start| pages.pages.contains(start)));
        }
    }
}
