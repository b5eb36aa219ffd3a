//! Clips as numbers: which frames clip `n` has. Memory is O(runs of frames), never O(clips).

use crate::data::Pages;
use crate::data::source::video::Sequence;
use std::ops::Range;

/// Clips in a run of frames without a gap.
struct Run {
    /// The first clip's number, of all.
    first_clip: u64,
    first_frame: usize,
    /// First frame of the last clip.
    last_frame: usize,
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
        Self::made(sequences, (clip_len, stride), limit, false)
    }

    /// Clips that cover every frame of a run that holds one: the last clip of a run ends with it.
    pub fn covering(sequences: &[Sequence], clip_len: usize, stride: usize) -> Self {
        Self::made(sequences, (clip_len, stride.min(clip_len)), 0, true)
    }

    fn made(sequences: &[Sequence], (clip_len, stride): (usize, usize), limit: usize, covers: bool) -> Self {
        let (mut runs, mut all) = (Vec::new(), 0);
        for (number, sequence) in sequences.iter().enumerate() {
            for frames in sequence.runs.iter().filter(|run| run.len() >= clip_len) {
                let last_frame = frames.end - clip_len;
                runs.push(Run { first_clip: all, first_frame: frames.start, last_frame, sequence: number });
                let beyond = frames.len() - clip_len;
                all += if covers { beyond.div_ceil(stride) } else { beyond / stride } as u64 + 1;
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
        let first = (run.first_frame + within as usize * self.stride).min(run.last_frame);
        Some(first..first + self.clip_len)
    }

    /// The clip in which `frame` is farthest from the ends, of those that have it; the first of several. `None`: no clip has it.
    pub fn owner(&self, frame: usize) -> Option<u64> {
        let depth = |clip: &u64| {
            let frames = self.frames(*clip).unwrap_or_default();
            (frame - frames.start).min(frames.end - 1 - frame)
        };
        self.with_frame(frame).rev().max_by_key(depth)
    }

    /// Clips of sequence number `sequence`.
    pub fn of_sequence(&self, sequence: usize) -> Range<u64> {
        let first = |sequence: usize| {
            let at = self.runs.partition_point(|run| run.sequence < sequence);
            self.runs.get(at).map_or(self.all, |run| run.first_clip)
        };
        first(sequence)..first(sequence + 1)
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

    #[test]
    fn covering_clips_have_every_frame_of_a_run_that_holds_one_and_each_frame_has_one_owner() {
        let sequences: Vec<Sequence> = [vec![0..7, 7..9], vec![9..14, 14..15, 15..27]]
            .into_iter()
            .enumerate()
            .map(|(n, runs)| Sequence { name: format!("s{n}"), runs })
            .collect();
        for (stride, count) in [(1, 3 + 1 + 8), (3, 2 + 1 + 4), (5, 2 + 1 + 3), (9, 2 + 1 + 3)] {
            let clips = Clips::covering(&sequences, 5, stride);
            assert_eq!(clips.len(), count, "stride {stride}");
            assert_eq!(clips.of_sequence(1).end, count as u64);
            for frame in (0..7).chain(9..14).chain(15..27) {
                let owner = clips.owner(frame).unwrap();
                assert!(clips.frames(owner).unwrap().contains(&frame));
                let sequence = if frame < 9 { 0 } else { 1 };
                assert!(clips.of_sequence(sequence).contains(&owner), "frame {frame} stride {stride}");
            }
            assert!([7, 8, 14].iter().all(|frame| clips.owner(*frame).is_none()));
        }
        // Clips at 15 and 18: frame 18 is the second last of the one and the first of the other, frame 19 the last and the second.
        let clips = Clips::covering(&sequences[1..], 5, 3);
        assert_eq!([15, 18, 19, 20].map(|frame| clips.owner(frame).unwrap()), [1, 1, 2, 2]);
    }

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
