//! Spike streams: `.dat` files → bit planes `[S, H, ceil(W/8)]`, rows on whole bytes so that crops are cheap.
//!
//! Two encodings are met. *Packed*, as the camera writes: bit `(t·H + y)·W + x`, least significant bit first, upside
//! down. *Bytes*, as prepared data sets have it: one byte per spike, 0 or one other value such as 1 or 255, upright.

use super::super::file_error;
use super::bits;
use crate::data::DataError;
use spec::contract::files::{SpikeBytes, SpikeVerdict};
use std::path::{Path, PathBuf};

/// Files that are read to detect the encoding.
const INSPECTED: usize = 16;

/// How a `.dat` file holds spikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpikeEncoding {
    Packed,
    Bytes,
}

impl SpikeEncoding {
    pub fn name(self) -> &'static str {
        match self {
            SpikeEncoding::Packed => "packed",
            SpikeEncoding::Bytes => "bytes",
        }
    }

    /// Planes in a file of `bytes` bytes; `None`: no file of whole planes has this size.
    pub fn planes(self, bytes: u64, height: usize, width: usize) -> Option<usize> {
        let spikes = (height as u64).checked_mul(width as u64).filter(|spikes| *spikes > 0)?;
        let (planes, whole) = match self {
            SpikeEncoding::Bytes => (bytes / spikes, bytes.is_multiple_of(spikes)),
            // The last byte may be filled up.
            SpikeEncoding::Packed => (bytes.checked_mul(8)? / spikes, bytes * 8 % spikes < 8),
        };
        (whole && planes > 0).then(|| usize::try_from(planes).ok()).flatten()
    }
}

/// Where spikes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpikeInput {
    /// None are read.
    None,
    /// `.dat` files of a camera of this height and width; encoding `None`: found out by [`tell_encoding`].
    Dat { encoding: Option<SpikeEncoding>, height: usize, width: usize },
    /// Precomputed voxels, `.npy`. `counts`: their logarithm is taken, so that negative values are refused.
    Voxels { counts: bool },
}

/// Tells how the `.dat` files of a data set are encoded. All are taken to be alike; up to 16 of them are looked into. A size
/// that only one encoding allows decides, else their bytes do: see [`SpikeBytes::verdict`].
///
/// # Errors
/// Sizes and bytes leave a doubt (names the config's key), or a file cannot be read.
pub fn tell_encoding(files: &[(PathBuf, u64)], height: usize, width: usize) -> Result<SpikeEncoding, DataError> {
    let every = files.len().div_ceil(INSPECTED).max(1);
    let mut bytes_of = SpikeBytes::default();
    let mut first = None;
    for (path, bytes) in files.iter().step_by(every) {
        let fits = |encoding: SpikeEncoding| encoding.planes(*bytes, height, width).is_some();
        match (fits(SpikeEncoding::Packed), fits(SpikeEncoding::Bytes)) {
            // Not whole either way: whoever scans this file says so.
            (false, false) => continue,
            (true, false) => return Ok(SpikeEncoding::Packed),
            (false, true) => return Ok(SpikeEncoding::Bytes),
            (true, true) => {}
        }
        bytes_of.add(&std::fs::read(path).map_err(|e| file_error(path, e.to_string()))?);
        first.get_or_insert(path);
        // More bytes cannot change this verdict.
        if bytes_of.verdict() == SpikeVerdict::Packed {
            return Ok(SpikeEncoding::Packed);
        }
    }
    let Some(first) = first else {
        let problem = "no spike file has a size of whole planes";
        let way_out = "check deblur.spike_h and deblur.spike_w";
        return Err(DataError::NothingUsable(format!(
            "{problem} of {height}×{width}: {way_out}{}",
            example(files, height, width)
        )));
    };
    match bytes_of.verdict() {
        SpikeVerdict::Bytes => Ok(SpikeEncoding::Bytes),
        SpikeVerdict::Packed => Ok(SpikeEncoding::Packed),
        SpikeVerdict::Unsure(why) => Err(file_error(
            first,
            format!(
                "{why}, so the encoding of this file and the others looked into is not certain: set \
                 deblur.spike_encoding to packed (a bit per spike) or bytes (a byte per spike)"
            ),
        )),
    }
}

fn example(files: &[(PathBuf, u64)], height: usize, width: usize) -> String {
    files.first().map_or(String::new(), |(path, bytes)| {
        format!(" ({}: {})", path.display(), wrong_size(*bytes, None, height, width))
    })
}

/// Message about a file of `bytes` bytes, with the sizes that are right.
pub fn wrong_size(bytes: u64, encoding: Option<SpikeEncoding>, height: usize, width: usize) -> String {
    let plane = (height * width) as f64;
    let sizes = match encoding {
        Some(SpikeEncoding::Packed) => format!("{} (packed)", plane / 8.0),
        Some(SpikeEncoding::Bytes) => format!("{plane} (bytes)"),
        None => format!("{} (packed) or {plane} (bytes)", plane / 8.0),
    };
    format!("{bytes} bytes: expected a multiple of {sizes}, planes of {height}×{width} spikes")
}

/// Planes of spikes, as entries and batches hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    pub encoding: SpikeEncoding,
    /// Time steps of a frame, `S`.
    pub planes: usize,
    pub height: usize,
    pub width: usize,
}

impl Planes {
    /// Bytes of a frame's planes, `[S, H, ceil(W/8)]`.
    pub fn bytes(&self) -> usize {
        self.planes * self.height * bits::row_bytes(self.width)
    }

    /// A file's content → upright planes with rows on whole bytes.
    ///
    /// # Errors
    /// Another size than these planes have, or bytes that are no spikes.
    pub fn unpack(&self, path: &Path, content: &[u8], out: &mut [u8]) -> Result<(), DataError> {
        let found = self.encoding.planes(content.len() as u64, self.height, self.width);
        if found != Some(self.planes) || out.len() != self.bytes() {
            let wrong = wrong_size(content.len() as u64, Some(self.encoding), self.height, self.width);
            return Err(file_error(path, format!("{wrong}, {} of them", self.planes)));
        }
        let rows = out.chunks_exact_mut(bits::row_bytes(self.width)).enumerate();
        match self.encoding {
            SpikeEncoding::Packed => rows.for_each(|(row, out)| {
                let (plane, y) = (row / self.height, row % self.height);
                let stored = plane * self.height + self.height - 1 - y;
                bits::copy_bits(content, stored * self.width, out, self.width);
            }),
            SpikeEncoding::Bytes => {
                // Value of every spike: 1 or, where masks were saved as pictures are, 255.
                let spike = content.iter().copied().find(|byte| *byte != 0).unwrap_or(1);
                for ((row, out), spikes) in rows.zip(content.chunks_exact(self.width)) {
                    if let Some(at) = bits::pack(spikes, spike, out) {
                        let (byte, at) = (spikes[at], row * self.width + at);
                        let way_out = "or deblur.spike_encoding: packed";
                        let problem = format!("byte {at} is {byte}: expected 0 or {spike}, as before it, {way_out}");
                        return Err(file_error(path, problem));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Upright spikes, one byte of 0 or 1 each, `[S, H, W]` → a camera's packed file.
pub fn to_packed_file(spikes: &[u8], height: usize, width: usize) -> Vec<u8> {
    let mut upside_down = Vec::with_capacity(spikes.len());
    for plane in spikes.chunks_exact((height * width).max(1)) {
        plane.chunks_exact(width).rev().for_each(|row| upside_down.extend_from_slice(row));
    }
    let mut packed = vec![0; bits::row_bytes(upside_down.len())];
    bits::pack(&upside_down, 1, &mut packed);
    packed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unpacked(encoding: SpikeEncoding, file: &[u8], planes: usize, height: usize, width: usize) -> Vec<u8> {
        let form = Planes { encoding, planes, height, width };
        let mut out = vec![0xFF; form.bytes()];
        form.unpack(Path::new("a.dat"), file, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn both_encodings_give_the_same_planes_and_every_spike_is_where_it_was(
            planes in 1usize..6, height in 1usize..7, width in 1usize..30, seed in any::<u64>(),
        ) {
            let spike = |n: usize| ((seed ^ n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61 == 0) as u8;
            let spikes: Vec<u8> = (0..planes * height * width).map(spike).collect();
            let packed = to_packed_file(&spikes, height, width);
            prop_assume!(SpikeEncoding::Packed.planes(packed.len() as u64, height, width) == Some(planes));
            let from_packed = unpacked(SpikeEncoding::Packed, &packed, planes, height, width);
            prop_assert_eq!(&from_packed, &unpacked(SpikeEncoding::Bytes, &spikes, planes, height, width));
            for (n, spike) in spikes.iter().enumerate() {
                let (row, x) = (n / width, n % width);
                let found = bits::bit(&from_packed[row * bits::row_bytes(width)..], x);
                prop_assert_eq!(found, *spike == 1, "spike {}", n);
            }
        }
    }

    #[test]
    fn the_formula_of_the_camera_places_each_bit() {
        // T = 2, H = 2, W = 3: bit (t·H + y)·W + x, upside down.
        let mut file = [0u8; 2];
        let (t, y, x) = (1, 0, 2);
        let index = (t * 2 + y) * 3 + x;
        file[index / 8] |= 1 << (index % 8);
        let out = unpacked(SpikeEncoding::Packed, &file, 2, 2, 3);
        assert_eq!(out, [0, 0, 0, 0b100], "row 0 of the file is the last row of the image");
    }

    #[test]
    fn the_encoding_is_told_by_size_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let files = |contents: &[Vec<u8>]| -> Vec<(PathBuf, u64)> {
            let file = |(n, content): (usize, &Vec<u8>)| {
                let path = dir.path().join(format!("{n}.dat"));
                std::fs::write(&path, content).unwrap();
                (path, content.len() as u64)
            };
            contents.iter().enumerate().map(file).collect()
        };
        let tell = |contents: &[Vec<u8>]| tell_encoding(&files(contents), 4, 8).map_err(|e| e.to_string());
        let many: Vec<u8> = (0..64u32).map(|n| (n * 37 % 255) as u8).collect();
        assert_eq!(tell(&[vec![0; 64], many]), Ok(SpikeEncoding::Packed));
        for value in [1, 3, 255] {
            assert_eq!(tell(&[vec![0; 64], vec![value; 64]]), Ok(SpikeEncoding::Bytes), "0 and {value} alone");
        }
        // Four bytes are one packed plane, and no whole plane of bytes: the size decides.
        assert_eq!(tell(&[vec![0; 4]]), Ok(SpikeEncoding::Packed));
        for doubtful in
            [vec![vec![0; 64]], vec![vec![0; 64], vec![255; 64], vec![1; 64]], vec![[0, 1, 2, 2].repeat(16)]]
        {
            let error = tell(&doubtful).unwrap_err();
            assert!(error.contains("0.dat: ") && error.contains("set deblur.spike_encoding to packed"), "{error}");
        }
        let error = tell(&[vec![0; 65]]).unwrap_err();
        assert!(error.contains("65 bytes") && error.contains("4 (packed) or 32 (bytes)"), "{error}");
    }

    #[test]
    fn a_wrong_size_and_a_wrong_byte_name_the_file() {
        let form = Planes { encoding: SpikeEncoding::Bytes, planes: 2, height: 2, width: 3 };
        let mut out = [0; 4];
        let error = form.unpack(Path::new("a.dat"), &[0; 11], &mut out).unwrap_err().to_string();
        assert!(error.contains("a.dat: 11 bytes: expected a multiple of 6 (bytes)"), "{error}");
        let error = form.unpack(Path::new("a.dat"), &[0, 1, 1, 0, 0, 0, 0, 7, 0, 0, 0, 0], &mut out).unwrap_err();
        assert!(error.to_string().contains("byte 7 is 7: expected 0 or 1, as before it"), "{error}");
        let mut masks = [0u8, 255, 255, 0, 0, 0, 0, 255, 0, 0, 0, 0];
        form.unpack(Path::new("a.dat"), &masks, &mut out).unwrap();
        assert_eq!(out, [0b110, 0, 0b010, 0], "a byte of 255 is a spike as one of 1 is");
        masks[7] = 128;
        let error = form.unpack(Path::new("a.dat"), &masks, &mut out).unwrap_err().to_string();
        assert!(error.contains("byte 7 is 128: expected 0 or 255"), "{error}");
    }
}
