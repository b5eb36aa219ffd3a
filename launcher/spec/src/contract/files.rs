//! Rules on files of data sets that both programs follow: which names are no data, how spikes are stored, and which
//! split a resumed run uses.

use serde::{Deserialize, Serialize};
use std::ffi::OsStr;

/// `--resume-split`: the split of a run that resumes after its files changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitChoice {
    /// The checkpoint's, by names where contents changed.
    Keep,
    /// Made anew from the files that are there.
    New,
}

/// Names that file servers, archivers, Windows and Python leave inside a data set. Letter case is ignored.
const LEFTOVERS: [&str; 17] = [
    "$RECYCLE.BIN",
    "#recycle",
    "#snapshot",
    "@eaDir",
    "@Recently-Snapshot",
    "@Recycle",
    "@tmp",
    "__MACOSX",
    "__pycache__",
    "desktop.ini",
    "lost+found",
    "Network Trash Folder",
    "RECYCLER",
    "System Volume Information",
    "Temporary Items",
    "Thumbs.db",
    "~snapshot",
];

/// True if a file or folder of this name below a data set's folder is no data: hidden (the name begins with a dot, as
/// `.ipynb_checkpoints`, `.Trash-1000`, `.snapshot`, `.git` and `._frame.png` do), an editor's backup or lock (`x~`,
/// `~$x`, `#x#`), or a leftover of a file system. The name of the data set's folder itself does not matter.
pub fn is_no_data(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let backup = name.ends_with('~') || name.starts_with("~$") || (name.starts_with('#') && name.ends_with('#'));
    name.starts_with('.') || backup || LEFTOVERS.iter().any(|known| known.eq_ignore_ascii_case(&name))
}

/// Spikes that are needed for a verdict: this many at one and the same bit of a packed byte are no chance (8⁻⁷).
const ENOUGH_BYTES: u64 = 8;
/// Values other than 0 that packed spikes show at least: one spike in a byte makes eight of them.
const ENOUGH_VALUES: usize = 8;

/// Which bytes occur in spike files of unknown encoding.
#[derive(Clone, Debug)]
pub struct SpikeBytes {
    counts: [u64; 256],
}

/// Encoding of spike files by their bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpikeVerdict {
    /// A byte per spike.
    Bytes,
    /// A bit per spike.
    Packed,
    /// Both are possible; says why.
    Unsure(String),
}

impl Default for SpikeBytes {
    fn default() -> Self {
        Self { counts: [0; 256] }
    }
}

impl SpikeBytes {
    pub fn add(&mut self, content: &[u8]) {
        content.iter().for_each(|byte| self.counts[usize::from(*byte)] += 1);
    }

    /// The encoding, where the bytes leave no doubt:
    ///
    /// 1. 0 and one other value, as often as [`ENOUGH_BYTES`]: a byte per spike (packed, all spikes of a file would lie at
    ///    the same places of their bytes);
    /// 2. [`ENOUGH_VALUES`] other values or more, which together set each of the eight bits: packed;
    /// 3. anything else is unsure.
    pub fn verdict(&self) -> SpikeVerdict {
        let others: Vec<u8> = (1..=u8::MAX).filter(|value| self.counts[usize::from(*value)] > 0).collect();
        let set: u64 = self.counts[1..].iter().sum();
        match others[..] {
            [] => SpikeVerdict::Unsure("no spike in the files looked into".into()),
            [_] if set >= ENOUGH_BYTES && self.counts[0] > 0 => SpikeVerdict::Bytes,
            _ if others.len() >= ENOUGH_VALUES && others.iter().fold(0, |bits, value| bits | value) == u8::MAX => {
                SpikeVerdict::Packed
            }
            _ => {
                SpikeVerdict::Unsure(format!("{set} of {} bytes are not 0, {}", set + self.counts[0], listed(&others)))
            }
        }
    }
}

fn listed(values: &[u8]) -> String {
    let shown: Vec<String> = values.iter().take(5).map(u8::to_string).collect();
    let more = if values.len() > shown.len() { ", ..." } else { "" };
    format!("their values are {}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_files_backups_and_leftovers_are_no_data() {
        for name in [
            ".ipynb_checkpoints",
            ".Trash-1000",
            ".snapshot",
            ".git",
            "._000001.png",
            ".nfs0000a1",
            "@eaDir",
            "@EADIR",
            "lost+found",
            "#recycle",
            "__MACOSX",
            "s0.hdf5~",
            "~$s0.hdf5",
            "#s0.hdf5#",
            "~snapshot",
            "$RECYCLE.BIN",
        ] {
            assert!(is_no_data(OsStr::new(name)), "{name}");
        }
        for name in ["s0.hdf5", "a.b", "train", "lost", "s0-checkpoint.hdf5", "#1.png", "~a", "recycle", "eaDir"] {
            assert!(!is_no_data(OsStr::new(name)), "{name}");
        }
    }

    fn verdict(content: &[u8]) -> SpikeVerdict {
        let mut bytes = SpikeBytes::default();
        bytes.add(content);
        bytes.verdict()
    }

    #[test]
    fn the_encoding_is_told_where_the_bytes_leave_no_doubt() {
        let with = |values: &[u8]| [vec![0; 100], values.to_vec()].concat();
        for value in [1, 2, 3, 128, 200, 255] {
            assert_eq!(verdict(&with(&[value; 8])), SpikeVerdict::Bytes, "{value}");
            assert!(matches!(verdict(&with(&[value; 7])), SpikeVerdict::Unsure(_)), "{value}: too few to tell");
        }
        assert_eq!(verdict(&with(&[1, 2, 4, 8, 16, 32, 64, 128])), SpikeVerdict::Packed);
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(verdict(&all), SpikeVerdict::Packed);
        let counts: Vec<u8> = (0..100).map(|n| n % 20).collect();
        for doubtful in [
            &[0; 9][..],
            &[0, 1, 255],
            &[0, 1, 2, 3, 4, 1, 1, 1],
            &[255; 90],
            &[0, 4, 32],
            &[0, 100, 128, 228],
            &counts,
        ] {
            assert!(matches!(verdict(doubtful), SpikeVerdict::Unsure(_)), "{doubtful:?}");
        }
        let SpikeVerdict::Unsure(why) = verdict(&[0, 1, 2, 2]) else { panic!("counts are no spikes") };
        assert_eq!(why, "3 of 4 bytes are not 0, their values are 1, 2");
    }
}
