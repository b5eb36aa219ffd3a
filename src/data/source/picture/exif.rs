//! Orientation by EXIF, in JPEG (segment APP1) and PNG (chunk eXIf).

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

/// Segments and chunks that are looked at.
const MAX_PARTS: usize = 4096;
/// Longest block of EXIF that is read; the tag stands at its beginning.
const MAX_BYTES: usize = 1 << 16;
const ORIENTATION: u16 = 0x0112;

/// Orientation of a JPEG file, 1 to 8; `None`: it names none.
pub(super) fn of_jpeg(file: &mut File) -> Option<u8> {
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(2)).ok()?;
    for _ in 0..MAX_PARTS {
        let mut marker = [0; 2];
        reader.read_exact(&mut marker).ok()?;
        while marker[1] == 0xFF {
            reader.read_exact(&mut marker[1..]).ok()?;
        }
        if marker[0] != 0xFF || matches!(marker[1], 0xD9 | 0xDA) {
            return None;
        }
        if matches!(marker[1], 0x01 | 0xD0..=0xD8) {
            continue;
        }
        let mut length = [0; 2];
        reader.read_exact(&mut length).ok()?;
        let length = usize::from(u16::from_be_bytes(length)).checked_sub(2)?;
        if marker[1] == 0xE1 {
            let mut block = vec![0; length];
            reader.read_exact(&mut block).ok()?;
            if let Some(tiff) = block.strip_prefix(b"Exif\0\0") {
                return of_tiff(tiff);
            }
        } else {
            reader.seek_relative(length as i64).ok()?;
        }
    }
    None
}

/// Orientation of a PNG file.
pub(super) fn of_png(file: &mut File) -> Option<u8> {
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(8)).ok()?;
    for _ in 0..MAX_PARTS {
        let mut head = [0; 8];
        reader.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        match &head[4..] {
            b"eXIf" => {
                let mut block = vec![0; length.min(MAX_BYTES)];
                reader.read_exact(&mut block).ok()?;
                return of_tiff(block.strip_prefix(b"Exif\0\0").unwrap_or(&block));
            }
            b"IEND" => return None,
            _ => reader.seek_relative(length as i64 + 4).ok()?,
        }
    }
    None
}

/// The tag in the first directory of a TIFF block (TIFF 6.0, section 2).
fn of_tiff(block: &[u8]) -> Option<u8> {
    let little = match block.get(..2)? {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let bytes = [*block.get(at)?, *block.get(at + 1)?];
        Some(if little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let long = |at: usize| {
        let (first, second) = (u32::from(short(at)?), u32::from(short(at + 2)?));
        Some(if little { first | second << 16 } else { first << 16 | second })
    };
    let directory = long(4)? as usize;
    let entries = usize::from(short(directory)?);
    let entry = (0..entries).map(|n| directory + 2 + 12 * n).find(|at| short(*at) == Some(ORIENTATION))?;
    let value = short(entry + 8)?;
    (1..=8).contains(&value).then_some(value as u8)
}
