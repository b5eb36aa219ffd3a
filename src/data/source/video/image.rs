//! Frames: PNG and JPEG files → u8 `[H, W, 3]`.
//!
//! Grey images become three equal channels, palettes their colours; alpha is dropped, of 16-bit samples the high byte
//! is kept. Nothing is allocated by what a header claims: its size must be the one that is expected.

use super::super::file_error;
use crate::data::DataError;
use png::{BitDepth, ColorType, Limits, Transformations};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Largest frame that is taken for one: far above any camera, far below a decompression bomb.
const MAX_PIXELS: u64 = 1 << 27;
/// What decoders may allocate beside the pixels.
const SLACK_BYTES: usize = 16 << 20;
/// Bytes in which the header of a JPEG file must end, past its embedded previews.
const JPEG_HEADER_BYTES: u64 = 1 << 20;
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

/// Size of the image by its header; of PNG files the end is looked at too, so that most truncated files are seen.
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
        if tail != PNG_END {
            return Err(file_error(path, "this PNG file is cut off: it does not end with IEND"));
        }
        size
    } else if head.starts_with(JPEG_SIGNATURE) {
        file.take(JPEG_HEADER_BYTES).read_to_end(&mut head).map_err(failed)?;
        jpeg_size(path, &head)?
    } else {
        return Err(neither(path));
    };
    checked(path, size)
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

fn jpeg_size(path: &Path, head: &[u8]) -> Result<ImageSize, DataError> {
    let mut decoder = JpegDecoder::new(zune_core::bytestream::ZCursor::new(head));
    decoder.decode_headers().map_err(|e| file_error(path, format!("JPEG: {e}")))?;
    let info = decoder.info().ok_or_else(|| file_error(path, "this JPEG file has no header"))?;
    Ok(ImageSize { height: usize::from(info.height), width: usize::from(info.width) })
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
    let failed = |e: png::DecodingError| file_error(path, format!("PNG: {e}"));
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
        return Err(file_error(path, format!("samples of {depth:?} bits: expected 8")));
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
    let failed = |e: zune_jpeg::errors::DecodeErrors| file_error(path, format!("JPEG: {e}"));
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
