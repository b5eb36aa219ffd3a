//! Pictures of any size and kind → u8 `[H, W, 3]`, upright.
//!
//! PNG, JPEG, BMP, TIFF and WebP. Orientation by EXIF is applied; of 16-bit samples the high byte is kept, alpha is dropped,
//! palettes, grey and CMYK become RGB.
//!
//! JPEG is decoded by `zune-jpeg`; far above the size that is wanted, at 1/4 or 1/8 by `jpeg-decoder`, which computes DCT blocks
//! of that size. Measured on one core, in ms for 640×480 and 2560×1920, noisy pictures:
//!
//! | decoder | 640×480 | 2560×1920 | at 1/2 | at 1/4 | at 1/8 |
//! |---|---|---|---|---|---|
//! | `zune-jpeg` | 2.0 | 33 | – | – | – |
//! | `jpeg-decoder` | 3.4 | 38 | 31 | 24 | 23 |
//! | `turbojpeg`, built without an assembler | 3.5 | 65 | 33 | 21 | 15 |
//!
//! libjpeg-turbo is the fastest with `nasm`, which the set-up does not bring, and no faster than these without. At 1/2 decoding
//! in full costs the same.

mod exif;
pub mod resize;

use super::file_error;
use super::video::image::{ImageSize, decode as decode_frame, size_of};
use crate::data::DataError;
use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::Path;

/// Endings of files that are taken for pictures.
pub const EXTENSIONS: &[&str] = &["bmp", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp"];
/// Largest picture: far above any camera, far below a decompression bomb.
const MAX_PIXELS: u64 = 1 << 27;
/// Orientations of EXIF that exchange rows and columns.
const TURNED: std::ops::RangeInclusive<u8> = 5..=8;
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";
const JPEG: &[u8] = b"\xff\xd8\xff";

/// Facts from a picture's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Upright.
    pub size: ImageSize,
    /// EXIF's number, 1 to 8; 1 is upright.
    pub orientation: u8,
}

impl Header {
    /// Size as stored.
    fn stored(&self) -> ImageSize {
        turned(self.size, self.orientation)
    }
}

/// Pixels, `[H, W, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    pub size: ImageSize,
    pub pixels: Vec<u8>,
}

fn turned(size: ImageSize, orientation: u8) -> ImageSize {
    if TURNED.contains(&orientation) { ImageSize { height: size.width, width: size.height } } else { size }
}

/// Looks at the header of the picture at `path`.
///
/// # Errors
/// It cannot be read, is no picture, or larger than any camera's.
pub fn header(path: &Path) -> Result<Header, DataError> {
    let mut file = File::open(path).map_err(|error| file_error(path, error.to_string()))?;
    let mut head = [0; 12];
    let known = std::os::unix::fs::FileExt::read_at(&file, &mut head, 0).unwrap_or(0);
    let head = &head[..known];
    let (stored, orientation) = if head.starts_with(PNG) {
        (size_of(path, &mut file)?, exif::of_png(&mut file))
    } else if head.starts_with(JPEG) {
        (size_of(path, &mut file)?, exif::of_jpeg(&mut file))
    } else {
        (other_size(path, file)?, None)
    };
    let orientation = orientation.unwrap_or(1);
    Ok(Header { size: turned(stored, orientation), orientation })
}

/// Size of a picture that is neither PNG nor JPEG.
fn other_size(path: &Path, mut file: File) -> Result<ImageSize, DataError> {
    use std::io::Seek;
    file.rewind().map_err(|error| file_error(path, error.to_string()))?;
    let failed = |error: image::ImageError| file_error(path, unreadable(&error));
    let reader = image::ImageReader::new(BufReader::new(file)).with_guessed_format();
    let reader = reader.map_err(|error| file_error(path, error.to_string()))?;
    let (width, height) = reader.into_dimensions().map_err(failed)?;
    if u64::from(width) * u64::from(height) > MAX_PIXELS || width == 0 || height == 0 {
        return Err(file_error(
            path,
            format!("an image of {height}×{width} pixels: expected 1 to {MAX_PIXELS} pixels"),
        ));
    }
    Ok(ImageSize { height: height as usize, width: width as usize })
}

fn unreadable(error: &image::ImageError) -> String {
    match error {
        image::ImageError::Unsupported(_) => {
            "no picture that is read (expected PNG, JPEG, BMP, TIFF or WebP): convert it, or leave it out".into()
        }
        image::ImageError::IoError(_) => "it is cut off: copy it again, or leave it out".into(),
        image::ImageError::Limits(_) => "its header names more pixels than any camera has: write it again".into(),
        _ => "it is damaged: copy it again, or leave it out".into(),
    }
}

/// The part, 1, 4 or 8, to which a JPEG of `size` can be decoded so that its longest side is no shorter than `side`.
pub fn shrink_for(size: ImageSize, side: usize) -> usize {
    let longest = size.height.max(size.width);
    [8, 4].into_iter().find(|part| longest.div_ceil(*part) >= side).unwrap_or(1)
}

/// Decodes the picture's bytes. A JPEG may be decoded at a part of its size: see [`shrink_for`].
///
/// # Errors
/// The bytes are not those that `header` was read from, or damaged.
pub fn decode(path: &Path, bytes: &[u8], header: &Header, shrink: usize) -> Result<Rgb, DataError> {
    let stored = header.stored();
    let rgb = if bytes.starts_with(JPEG) && shrink > 1 {
        match shrunk_jpeg(path, bytes, stored, shrink)? {
            Some(rgb) => rgb,
            None => whole(path, bytes, stored)?,
        }
    } else {
        whole(path, bytes, stored)?
    };
    Ok(upright(rgb, header.orientation))
}

fn whole(path: &Path, bytes: &[u8], size: ImageSize) -> Result<Rgb, DataError> {
    if bytes.starts_with(PNG) || bytes.starts_with(JPEG) {
        let mut pixels = vec![0; size.bytes()];
        decode_frame(path, bytes, size, &mut pixels).map_err(content)?;
        return Ok(Rgb { size, pixels });
    }
    let damaged = |problem: String| DataError::Content { path: path.to_owned(), problem };
    let mut reader = image::ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| damaged(error.to_string()))?;
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(16 * MAX_PIXELS);
    reader.limits(limits);
    let picture = reader.decode().map_err(|error| damaged(unreadable(&error)))?;
    if (picture.height() as usize, picture.width() as usize) != (size.height, size.width) {
        return Err(damaged(format!("an image of {}×{} pixels: expected {size}", picture.height(), picture.width())));
    }
    Ok(Rgb { size, pixels: high_bytes(picture) })
}

/// RGB of 8 bits; of 16 bits the high byte, as elsewhere.
fn high_bytes(picture: image::DynamicImage) -> Vec<u8> {
    let is_deep = matches!(picture.color().bytes_per_pixel() / picture.color().channel_count(), 2);
    if is_deep {
        return picture.into_rgb16().into_raw().into_iter().map(|sample| (sample >> 8) as u8).collect();
    }
    picture.into_rgb8().into_raw()
}

/// A file whose bytes are wrong is so for every reader.
fn content(error: DataError) -> DataError {
    match error {
        DataError::File { path, problem } => DataError::Content { path, problem },
        other => other,
    }
}

/// `None`: a kind of JPEG that is decoded at full size.
fn shrunk_jpeg(path: &Path, bytes: &[u8], size: ImageSize, shrink: usize) -> Result<Option<Rgb>, DataError> {
    let part = |side: usize| side.div_ceil(shrink) as u16;
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    decoder.set_max_decoding_buffer_size(4 * size.bytes());
    // Damage is reported by the decoder of full size, in its words.
    let Ok((width, height)) = decoder.scale(part(size.width), part(size.height)) else { return Ok(None) };
    let Ok(decoded) = decoder.decode() else { return Ok(None) };
    let pixels = match decoder.info().map(|info| info.pixel_format) {
        Some(jpeg_decoder::PixelFormat::RGB24) => decoded,
        Some(jpeg_decoder::PixelFormat::L8) => decoded.iter().flat_map(|grey| [*grey; 3]).collect(),
        _ => return Ok(None),
    };
    let size = ImageSize { height: height.into(), width: width.into() };
    if pixels.len() != size.bytes() {
        let problem = format!("{} bytes of pixels: expected {} for {size}", pixels.len(), size.bytes());
        return Err(DataError::Content { path: path.to_owned(), problem });
    }
    Ok(Some(Rgb { size, pixels }))
}

/// Turns and mirrors stored pixels (EXIF 2.32, tag 0x0112).
fn upright(rgb: Rgb, orientation: u8) -> Rgb {
    if !(2..=8).contains(&orientation) {
        return rgb;
    }
    let ImageSize { height, width } = rgb.size;
    let size = turned(rgb.size, orientation);
    let mut pixels = Vec::with_capacity(rgb.pixels.len());
    for y in 0..size.height {
        for x in 0..size.width {
            let (row, column) = match orientation {
                2 => (y, width - 1 - x),
                3 => (height - 1 - y, width - 1 - x),
                4 => (height - 1 - y, x),
                5 => (x, y),
                6 => (height - 1 - x, y),
                7 => (height - 1 - x, width - 1 - y),
                _ => (x, width - 1 - y),
            };
            let at = 3 * (row * width + column);
            pixels.extend_from_slice(&rgb.pixels[at..at + 3]);
        }
    }
    Rgb { size, pixels }
}

#[cfg(test)]
mod tests;
