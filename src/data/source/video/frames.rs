//! Frames as entries: three of them each, made from one file when they are asked for.

use super::super::file_error;
use super::image::{self, ImageSize};
use super::npy::{self, BadValue};
use super::scan::{Frame, Scan, SpikeForm, Stamp};
use crate::data::{DataError, Scratch};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicU64, Ordering};

/// Content of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modality {
    /// u8 `[H, W, 3]`.
    Blur,
    /// u8 `[H, W, 3]`.
    Sharp,
    /// As [`SpikeForm`] says.
    Spikes,
}

impl Modality {
    pub const ALL: [Modality; 3] = [Modality::Blur, Modality::Sharp, Modality::Spikes];
}

/// Counters since opening.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FramesStats {
    /// Files decoded.
    pub decoded: u64,
    /// Bytes read from files.
    pub read_bytes: u64,
}

/// All frames of a data set, by number. An entry's key is `3 × frame + modality`.
pub struct Frames {
    frames: Vec<Frame>,
    image: ImageSize,
    spikes: Option<SpikeForm>,
    decoded: AtomicU64,
    read_bytes: AtomicU64,
}

impl Frames {
    /// The frames that `scan` found.
    pub fn new(scan: Scan) -> Self {
        let Scan { frames, image, spikes, .. } = scan;
        Self { frames, image, spikes, decoded: AtomicU64::new(0), read_bytes: AtomicU64::new(0) }
    }

    pub fn len(&self) -> usize {
        self.frames.len()
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub fn image(&self) -> ImageSize {
        self.image
    }

    pub fn spikes(&self) -> Option<SpikeForm> {
        self.spikes
    }

    /// Content of the entries of each frame.
    pub fn modalities(&self) -> &'static [Modality] {
        if self.spikes.is_some() { &Modality::ALL } else { &Modality::ALL[..2] }
    }

    /// Bytes of all entries of one frame.
    pub fn frame_bytes(&self) -> u64 {
        self.modalities().iter().map(|modality| self.bytes(*modality) as u64).sum()
    }

    /// File name of a frame without its extension; empty when there is no such frame.
    pub fn stem(&self, frame: usize) -> &str {
        self.frames.get(frame).map_or("", |frame| &frame.stem)
    }

    pub fn stats(&self) -> FramesStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FramesStats { decoded: load(&self.decoded), read_bytes: load(&self.read_bytes) }
    }

    /// Key of an entry.
    pub fn key(frame: usize, modality: Modality) -> u64 {
        3 * frame as u64 + modality as u64
    }

    /// Bytes of an entry.
    pub fn bytes(&self, modality: Modality) -> usize {
        match modality {
            Modality::Blur | Modality::Sharp => self.image.bytes(),
            Modality::Spikes => self.spikes.map_or(0, |form| form.bytes()),
        }
    }

    /// Bytes of the entry with this key.
    pub fn entry_bytes(&self, key: u64) -> u64 {
        self.bytes(Modality::ALL[(key % 3) as usize]) as u64
    }

    /// Reads and decodes the entry's file into `out`, all of it.
    ///
    /// # Errors
    /// No such entry; the file is gone or changed since it was scanned; [`DataError::Content`]: it holds what it must not.
    pub fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        let modality = Modality::ALL[(key % 3) as usize];
        let frame = self.frames.get((key / 3) as usize);
        let stamp = frame.and_then(|frame| match modality {
            Modality::Blur => Some(&frame.blur),
            Modality::Sharp => Some(&frame.sharp),
            Modality::Spikes => frame.spikes.as_ref(),
        });
        let stamp = stamp.ok_or(DataError::OutOfRange {
            what: "page cache entry",
            index: key,
            place: "the data set",
            count: 3 * self.frames.len() as u64,
        })?;
        if out.len() != self.bytes(modality) {
            let problem = format!("room for {} bytes, its entry has {}", out.len(), self.bytes(modality));
            return Err(file_error(&stamp.path, problem));
        }
        match (modality, self.spikes) {
            (Modality::Spikes, Some(SpikeForm::Voxels { bins, height, width, counts })) => {
                self.read_voxels(stamp, out)?;
                let checked = npy::check_values(out, [bins, height, width], counts);
                checked.map_err(|bad| match bad {
                    // Leaving out every such file would hide that the config does not fit.
                    BadValue { problem, no_count: true } => file_error(&stamp.path, problem),
                    BadValue { problem, .. } => DataError::Content { path: stamp.path.clone(), problem },
                })?;
                if cfg!(target_endian = "big") {
                    out.chunks_exact_mut(4).for_each(<[u8]>::reverse);
                }
            }
            (Modality::Spikes, Some(SpikeForm::Planes(planes))) => {
                self.read_all(stamp, scratch)?;
                planes.unpack(&stamp.path, &scratch.raw, out).map_err(of_content)?;
            }
            _ => {
                self.read_all(stamp, scratch)?;
                image::decode(&stamp.path, &scratch.raw, self.image, out).map_err(of_content)?;
            }
        }
        self.decoded.fetch_add(1, Ordering::Relaxed);
        self.read_bytes.fetch_add(stamp.bytes(), Ordering::Relaxed);
        Ok(())
    }

    /// The file's content into `scratch.raw`.
    fn read_all(&self, stamp: &Stamp, scratch: &mut Scratch) -> Result<(), DataError> {
        let mut file = unchanged(stamp)?;
        scratch.raw.resize(usize::try_from(stamp.bytes()).unwrap_or(usize::MAX), 0);
        file.read_exact(&mut scratch.raw).map_err(|e| file_error(&stamp.path, e.to_string()))
    }

    /// The file's little-endian values as they are.
    fn read_voxels(&self, stamp: &Stamp, out: &mut [u8]) -> Result<(), DataError> {
        let failed = |e: std::io::Error| file_error(&stamp.path, e.to_string());
        let mut file = unchanged(stamp)?;
        let facts = npy::facts_of(&stamp.path, &mut file)?;
        file.seek(SeekFrom::Start(facts.data_start as u64)).map_err(failed)?;
        file.read_exact(out).map_err(failed)
    }
}

/// A decoder's complaint about bytes that were read whole from an unchanged file.
fn of_content(error: DataError) -> DataError {
    match error {
        DataError::File { path, problem } => DataError::Content { path, problem },
        other => other,
    }
}

/// The open file, still the one that was scanned.
fn unchanged(stamp: &Stamp) -> Result<File, DataError> {
    let failed = |e: std::io::Error| file_error(&stamp.path, e.to_string());
    let file = File::open(&stamp.path).map_err(failed)?;
    stamp.identity.check(&stamp.path, &file)?;
    Ok(file)
}
