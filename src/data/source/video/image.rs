//! Frames: PNG and JPEG files → u8 `[H, W, 3]`.
//!
//! Grey images become three equal channels, palettes their colours; alpha is dropped, of 16-bit samples the high byte
//! is kept. Nothing is allocated by what a header claims: its size must be the one that is expected.

use super::super::file_error;
use super::words;
use crate::data::DataError;
use png::{BitDepth, ColorType, Limits, Transformations};
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Largest frame that is taken for one: far above any camera, far below a decompression bomb.
const MAX_PIXELS: u64 = 1 << 27;
/// Bytes that decoders may allocate beside the pixels.
const SLACK_BYTES: usize = 16 << 20;
/// Segments and chunks of a file's header that are looked at: far above any real file's.
const MAX_PARTS: usize = 1 << 20;
const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// The empty chunk that ends every PNG file.
const PNG_END: &[u8] = b"\0\0\0\0IEND\xae\x42\x60\x82";
const JPEG_SIGNATURE: &[u8] = b"\xff\xd8\xff";

/// Height and width in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageSize {
    pub height: usize,
    pub width: usize,
}

impl ImageSize {
    /// Bytes of the decoded frame, `[H, W, 3]`.
    pub fn bytes(self) -> usize {
        self.height * self.width * 3
    }
}

impl std::fmt::Display for ImageSize {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}×{}", self.height, self.width)
    }
}

/// Size of the image by its header; of PNG files the end is looked at too, so that most truncated files are seen. Bytes
/// behind a PNG's end, as some cameras and tools add, do no harm.
///
/// # Errors
/// No PNG or JPEG file, cut off, or larger than any frame.
pub fn size_of(path: &Path, file: &mut File) -> Result<ImageSize, DataError> {
    let failed = |e: std::io::Error| file_error(path, e.to_string());
    let mut head = Vec::with_capacity(64);
    file.by_ref().take(33).read_to_end(&mut head).map_err(failed)?;
    let size = if head.starts_with(PNG_SIGNATURE) {
        let size = png_size(path, &head)?;
        let mut tail = Vec::with_capacity(PNG_END.len());
        file.seek(SeekFrom::End(-(PNG_END.len() as i64))).map_err(failed)?;
        file.read_to_end(&mut tail).map_err(failed)?;
        if tail != PNG_END && !has_end(file).map_err(failed)? {
            return Err(file_error(path, "this PNG file is cut off: its last part, IEND, is missing"));
        }
        size
    } else if head.starts_with(JPEG_SIGNATURE) {
        jpeg_size(path, file)?
    } else {
        return Err(neither(path));
    };
    checked(path, size)
}

/// Goes from chunk to chunk of a PNG file: one of them is its end.
fn has_end(file: &mut File) -> std::io::Result<bool> {
    let bytes = file.metadata()?.len();
    let mut reader = BufReader::new(file);
    let mut at = reader.seek(SeekFrom::Start(PNG_SIGNATURE.len() as u64))?;
    for _ in 0..MAX_PARTS {
        let mut chunk = [0; 8];
        if at + PNG_END.len() as u64 > bytes {
            return Ok(false);
        }
        reader.read_exact(&mut chunk)?;
        if &chunk[4..] == b"IEND" {
            return Ok(true);
        }
        // The data, and their checksum.
        let length = i64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]])) + 4;
        reader.seek_relative(length)?;
        at += 8 + length as u64;
    }
    Ok(false)
}

fn neither(path: &Path) -> DataError {
    file_error(path, "neither a PNG nor a JPEG file")
}

fn checked(path: &Path, size: ImageSize) -> Result<ImageSize, DataError> {
    let pixels = size.height as u64 * size.width as u64;
    if pixels == 0 || pixels > MAX_PIXELS {
        return Err(file_error(path, format!("an image of {size} pixels: expected 1 to {MAX_PIXELS} pixels")));
    }
    Ok(size)
}

/// From the header chunk, which the format wants first.
fn png_size(path: &Path, head: &[u8]) -> Result<ImageSize, DataError> {
    if head.len() < 33 || &head[12..16] != b"IHDR" {
        return Err(file_error(path, "this PNG file is cut off, or does not begin with its header"));
    }
    let number = |at: usize| u32::from_be_bytes(std::array::from_fn(|n| head[at + n])) as usize;
    Ok(ImageSize { height: number(20), width: number(16) })
}

/// Goes from segment to segment, past metadata and previews of any length, to the frame's header (ITU T.81, B.1.1.4 and
/// B.2.2).
fn jpeg_size(path: &Path, file: &mut File) -> Result<ImageSize, DataError> {
    let cut_off = |_: std::io::Error| file_error(path, "this JPEG file is cut off before its size");
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(2)).map_err(cut_off)?;
    for _ in 0..MAX_PARTS {
        let mut byte = [0; 1];
        reader.read_exact(&mut byte).map_err(cut_off)?;
        if byte[0] != 0xFF {
            return Err(file_error(
                path,
                "this JPEG file is damaged: a segment of its header does not begin with a marker",
            ));
        }
        // Any number of fill bytes may stand before a marker.
        while byte[0] == 0xFF {
            reader.read_exact(&mut byte).map_err(cut_off)?;
        }
        let marker = byte[0];
        if matches!(marker, 0x01 | 0xD0..=0xD8) {
            continue;
        }
        let mut length = [0; 2];
        reader.read_exact(&mut length).map_err(cut_off)?;
        let behind = i64::from(u16::from_be_bytes(length)) - 2;
        if behind < 0 || matches!(marker, 0xD9 | 0xDA) {
            return Err(file_error(path, "this JPEG file is damaged: its pixels begin before its size is named"));
        }
        if matches!(marker, 0xC0..=0xCF) && !matches!(marker, 0xC4 | 0xC8 | 0xCC) {
            let mut frame = [0; 5];
            reader.read_exact(&mut frame).map_err(cut_off)?;
            words::jpeg_kind(marker, frame[0]).map_err(|problem| file_error(path, problem))?;
            let number = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
            return Ok(ImageSize { height: number(1), width: number(3) });
        }
        reader.seek_relative(behind).map_err(cut_off)?;
    }
    Err(file_error(path, "this JPEG file has no frame header"))
}

/// Decodes the file's bytes into `out`, `[H, W, 3]` of `expected` size.
///
/// # Errors
/// Another size, or not what the format asks for.
pub fn decode(path: &Path, bytes: &[u8], expected: ImageSize, out: &mut [u8]) -> Result<(), DataError> {
    if out.len() != expected.bytes() {
        return Err(file_error(path, format!("room for {} bytes, a frame has {}", out.len(), expected.bytes())));
    }
    if bytes.starts_with(PNG_SIGNATURE) {
        decode_png(path, bytes, expected, out)
    } else if bytes.starts_with(JPEG_SIGNATURE) {
        decode_jpeg(path, bytes, expected, out)
    } else {
        Err(neither(path))
    }
}

fn decode_png(path: &Path, bytes: &[u8], expected: ImageSize, out: &mut [u8]) -> Result<(), DataError> {
    let failed = |e: png::DecodingError| file_error(path, format!("PNG: {}", words::of_png(&e)));
    let limits = Limits { bytes: 4 * expected.bytes() + SLACK_BYTES };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info().map_err(failed)?;
    let info = reader.info();
    same_size(path, ImageSize { height: info.height as usize, width: info.width as usize }, expected)?;
    let (color, depth) = reader.output_color_type();
    if depth != BitDepth::Eight {
        return Err(file_error(path, format!("PNG: samples of {} bits: expected 8", depth as u8)));
    }
    if color == ColorType::Rgb {
        reader.next_frame(out).map_err(failed)?;
        return Ok(());
    }
    let mut other = vec![0; expected.height * expected.width * color.samples()];
    reader.next_frame(&mut other).map_err(failed)?;
    to_rgb(&other, color.samples(), out);
    Ok(())
}

/// Grey (1), grey with alpha (2), colours with alpha (4) → three channels.
fn to_rgb(pixels: &[u8], channels: usize, out: &mut [u8]) {
    for (pixel, out) in pixels.chunks_exact(channels).zip(out.chunks_exact_mut(3)) {
        match pixel {
            [grey] | [grey, _] => out.fill(*grey),
            [r, g, b, ..] => out.copy_from_slice(&[*r, *g, *b]),
            [] => {}
        }
    }
}

fn decode_jpeg(path: &Path, bytes: &[u8], expected: ImageSize, out: &mut [u8]) -> Result<(), DataError> {
    let options = DecoderOptions::new_safe().jpeg_set_out_colorspace(ColorSpace::RGB).set_strict_mode(true);
    let mut decoder = JpegDecoder::new_with_options(zune_core::bytestream::ZCursor::new(bytes), options);
    let failed = |e: zune_jpeg::errors::DecodeErrors| file_error(path, format!("JPEG: {}", words::of_jpeg(&e)));
    decoder.decode_headers().map_err(failed)?;
    let info = decoder.info().ok_or_else(|| file_error(path, "this JPEG file has no header"))?;
    same_size(path, ImageSize { height: usize::from(info.height), width: usize::from(info.width) }, expected)?;
    decoder.decode_into(out).map_err(failed)
}

fn same_size(path: &Path, found: ImageSize, expected: ImageSize) -> Result<(), DataError> {
    if found == expected {
        return Ok(());
    }
    Err(file_error(path, format!("an image of {found} pixels: expected {expected}, as the other frames have")))
}

/// `[H, W, 3]` as the bytes of an 8-bit RGB PNG.
///
/// # Errors
/// `pixels` has not the image's size.
pub fn png_bytes(pixels: &[u8], size: ImageSize) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, size.width as u32, size.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(pixels));
    written.map_err(|e| DataError::Encode(e.into()))?;
    Ok(bytes)
}

/// Writes `[H, W, 3]` as an 8-bit RGB PNG file.
///
/// # Errors
/// The file cannot be written, or `pixels` has not the image's size.
pub fn write_png(path: &Path, pixels: &[u8], size: ImageSize) -> Result<(), DataError> {
    let failed = |e: png::EncodingError| file_error(path, format!("PNG: {e}"));
    let file = File::create(path).map_err(|e| file_error(path, e.to_string()))?;
    let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), size.width as u32, size.height as u32);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(pixels).map_err(failed)?;
    writer.finish().map_err(failed)
}
