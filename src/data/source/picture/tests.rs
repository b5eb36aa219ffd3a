use super::*;

/// 3 × 2 pixels, each another colour.
fn pixels() -> Vec<u8> {
    (0..18).map(|n| 10 * n).collect()
}

fn write(name: &str, encode: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    let mut bytes = Vec::new();
    encode(&mut bytes);
    std::fs::write(&path, &bytes).unwrap();
    (dir, path, bytes)
}

fn png_of(color: png::ColorType, depth: png::BitDepth, data: &[u8], palette: Option<Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 3, 2);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if let Some(palette) = palette {
        encoder.set_palette(palette);
    }
    encoder.write_header().unwrap().write_image_data(data).unwrap();
    bytes
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind.as_slice(), data].concat();
    [&(data.len() as u32).to_be_bytes()[..], &body, &libdeflater::crc32(&body).to_be_bytes()].concat()
}

/// A TIFF block with one entry, the orientation.
fn tiff(orientation: u16, little: bool) -> Vec<u8> {
    let short = |n: u16| if little { n.to_le_bytes() } else { n.to_be_bytes() };
    let long = |n: u32| if little { n.to_le_bytes() } else { n.to_be_bytes() };
    let mark: &[u8] = if little { b"II" } else { b"MM" };
    [mark, &short(42), &long(8), &short(1), &short(0x112), &short(3), &long(1), &short(orientation), &[0; 6]].concat()
}

#[test]
fn every_kind_of_png_becomes_rgb() {
    use png::{BitDepth, ColorType};
    let deep: Vec<u8> = pixels().iter().flat_map(|value| [*value, 255]).collect();
    let alpha: Vec<u8> = pixels().chunks(3).flat_map(|rgb| [rgb[0], rgb[1], rgb[2], 9]).collect();
    let grey = |values: &[u8]| values.iter().flat_map(|value| [*value; 3]).collect::<Vec<u8>>();
    let six = [0, 50, 100, 150, 200, 250];
    for (bytes, expected) in [
        (png_of(ColorType::Rgb, BitDepth::Eight, &pixels(), None), pixels()),
        (png_of(ColorType::Rgb, BitDepth::Sixteen, &deep, None), pixels()),
        (png_of(ColorType::Rgba, BitDepth::Eight, &alpha, None), pixels()),
        (png_of(ColorType::Grayscale, BitDepth::Eight, &six, None), grey(&six)),
        (png_of(ColorType::Indexed, BitDepth::Eight, &[0, 1, 2, 3, 4, 5], Some(pixels())), pixels()),
    ] {
        let (_dir, path, bytes) = write("a.png", |out| *out = bytes);
        let header = header(&path).unwrap();
        assert_eq!((header.size.height, header.size.width, header.orientation), (2, 3, 1));
        assert_eq!(decode(&path, &bytes, &header, 1).unwrap().pixels, expected);
    }
}

#[test]
fn orientation_is_applied_in_png_and_jpeg() {
    let plain = png_of(png::ColorType::Rgb, png::BitDepth::Eight, &pixels(), None);
    // Corners of the upright picture: first pixel, and the one right of it, as numbers of stored pixels.
    for (orientation, first, second, little) in [
        (1, 0, 1, true),
        (2, 2, 1, false),
        (3, 5, 4, true),
        (4, 3, 4, false),
        (5, 0, 3, true),
        (6, 3, 0, false),
        (7, 5, 2, true),
        (8, 2, 5, false),
    ] {
        let at = plain.len() - 12;
        let bytes = [&plain[..at], &chunk(b"eXIf", &tiff(orientation, little)), &plain[at..]].concat();
        let (_dir, path, bytes) = write("a.png", |out| *out = bytes);
        let header = header(&path).unwrap();
        assert_eq!(u16::from(header.orientation), orientation);
        let rgb = decode(&path, &bytes, &header, 1).unwrap();
        assert_eq!(rgb.size, header.size, "{orientation}");
        assert_eq!((rgb.size.height, rgb.size.width), if orientation < 5 { (2, 3) } else { (3, 2) });
        let pixel = |n: usize| &rgb.pixels[3 * n..3 * n + 3];
        assert_eq!((pixel(0), pixel(1)), (&pixels()[3 * first..][..3], &pixels()[3 * second..][..3]), "{orientation}");
    }
    let block = tiff(6, true);
    let length = (block.len() + 8) as u16;
    let start = [b"\xff\xd8\xff\xe1".as_slice(), &length.to_be_bytes(), b"Exif\0\0", &block, b"\xff\xda"].concat();
    let (_dir, path, _) = write("a.jpg", |out| *out = start);
    assert_eq!(exif::of_jpeg(&mut File::open(&path).unwrap()), Some(6));
    for cut in 2..block.len() {
        let (_dir, path, _) = write("a.jpg", |out| *out = b"\xff\xd8\xff\xe1\0\x10Exif\0\0".to_vec());
        std::fs::write(&path, &block[..cut]).unwrap();
        assert_eq!(exif::of_jpeg(&mut File::open(&path).unwrap()), None);
    }
}

#[test]
fn other_formats_are_read_and_no_picture_is_refused() {
    let picture = image::RgbImage::from_raw(3, 2, pixels()).unwrap();
    for (name, format) in [("a.bmp", image::ImageFormat::Bmp), ("a.tif", image::ImageFormat::Tiff)] {
        let (_dir, path, bytes) = write(name, |out| picture.write_to(&mut Cursor::new(out), format).unwrap());
        let header = header(&path).unwrap();
        assert_eq!(decode(&path, &bytes, &header, 4).unwrap(), Rgb { size: header.size, pixels: pixels() });
        let cut = decode(&path, &bytes[..bytes.len() - 9], &header, 1).unwrap_err();
        assert!(matches!(cut, DataError::Content { .. }), "{cut}");
    }
    let (_dir, path, _) = write("a.jpg", |out| *out = b"not a picture".to_vec());
    assert!(header(&path).unwrap_err().to_string().contains("no picture that is read"));
}

#[test]
fn jpegs_are_decoded_at_the_part_that_is_needed() {
    let size = |height, width| ImageSize { height, width };
    for (picture, side, part) in [
        (size(480, 640), 640, 1),
        (size(480, 1279), 640, 1),
        (size(2560, 900), 640, 4),
        (size(3000, 4000), 640, 4),
        (size(3000, 4000), 160, 8),
        (size(100, 100), 160, 1),
    ] {
        assert_eq!(shrink_for(picture, side), part, "{picture} {side}");
    }
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yolo/gradient.jpg");
    let (bytes, header) = (std::fs::read(&fixture).unwrap(), header(&fixture).unwrap());
    let whole = decode(&fixture, &bytes, &header, 1).unwrap();
    for part in [2, 4, 8] {
        let small = decode(&fixture, &bytes, &header, part).unwrap();
        assert_eq!((small.size.height, small.size.width), (80usize.div_ceil(part), 120usize.div_ceil(part)));
        // A pixel is about the mean of those it stands for.
        for (y, x) in [(2, 3), (4, 5), (1, 9)] {
            let at = |image: &Rgb, y: usize, x: usize| f64::from(image.pixels[3 * (y * image.size.width + x)]);
            let block = (0..part * part).map(|n| at(&whole, part * y + n / part, part * x + n % part)).sum::<f64>();
            assert!((block / (part * part) as f64 - at(&small, y, x)).abs() < 4.0, "{part} {y} {x}");
        }
    }
}

/// The same picture in the four colours of print.
#[test]
fn cmyk_becomes_rgb() {
    let fixture = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yolo").join(name);
    let [rgb, cmyk] = ["gradient.jpg", "cmyk.jpg"].map(|name| {
        let path = fixture(name);
        decode(&path, &std::fs::read(&path).unwrap(), &header(&path).unwrap(), 1).unwrap()
    });
    assert_eq!(rgb.size, cmyk.size);
    let apart = rgb.pixels.iter().zip(&cmyk.pixels).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
    assert!(apart / (rgb.pixels.len() as f64) < 4.0, "{}", apart / rgb.pixels.len() as f64);
}
