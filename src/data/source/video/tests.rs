//! Files as they are met, and as an enemy would write them.

use super::image::{ImageSize, decode, size_of, write_png};
use super::*;
use crate::data::{DataError, Scratch};
use std::fs::File;
use std::path::{Path, PathBuf};

const SIZE: ImageSize = ImageSize { height: 6, width: 10 };

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

/// A PNG file of `color` and `depth` with these packed rows.
fn png_bytes(color: png::ColorType, depth: png::BitDepth, palette: Option<Vec<u8>>, rows: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIZE.width as u32, SIZE.height as u32);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if let Some(palette) = palette {
        encoder.set_palette(palette);
    }
    encoder.write_header().unwrap().write_image_data(rows).unwrap();
    bytes
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut bytes = (data.len() as u32).to_be_bytes().to_vec();
    bytes.extend(kind);
    bytes.extend(data);
    let crc = libdeflater::crc32(&bytes[4..]);
    bytes.extend(crc.to_be_bytes());
    bytes
}

fn header(width: u32, height: u32, depth: u8, color: u8, interlace: u8) -> Vec<u8> {
    let mut data = [width.to_be_bytes(), height.to_be_bytes()].concat();
    data.extend([depth, color, 0, 0, interlace]);
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &data)].concat()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
    let mut out = vec![0; compressor.zlib_compress_bound(bytes.len())];
    let length = compressor.zlib_compress(bytes, &mut out).unwrap();
    out.truncate(length);
    out
}

fn decoded(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = vec![7; SIZE.bytes()];
    decode(Path::new("a.png"), bytes, SIZE, &mut out).map_err(|e| e.to_string())?;
    Ok(out)
}

fn size(bytes: &[u8]) -> Result<ImageSize, String> {
    let (_dir, folder) = folder();
    let path = folder.join("a.png");
    std::fs::write(&path, bytes).unwrap();
    size_of(&path, &mut File::open(&path).unwrap()).map_err(|e| e.to_string())
}

#[test]
fn every_kind_of_png_becomes_rgb() {
    let pixels = SIZE.height * SIZE.width;
    let value = |n: usize| (n * 29 % 256) as u8;
    let rgb: Vec<u8> = (0..pixels * 3).map(value).collect();
    let eight = png::BitDepth::Eight;
    assert_eq!(decoded(&png_bytes(png::ColorType::Rgb, eight, None, &rgb)).unwrap(), rgb);
    let grey: Vec<u8> = (0..pixels).map(value).collect();
    let tripled: Vec<u8> = grey.iter().flat_map(|g| [*g; 3]).collect();
    assert_eq!(decoded(&png_bytes(png::ColorType::Grayscale, eight, None, &grey)).unwrap(), tripled);
    let with_alpha: Vec<u8> = rgb.chunks(3).flat_map(|p| [p[0], p[1], p[2], 9]).collect();
    assert_eq!(decoded(&png_bytes(png::ColorType::Rgba, eight, None, &with_alpha)).unwrap(), rgb);
    let wide: Vec<u8> = rgb.iter().flat_map(|v| [*v, 0x55]).collect();
    assert_eq!(decoded(&png_bytes(png::ColorType::Rgb, png::BitDepth::Sixteen, None, &wide)).unwrap(), rgb);
    let palette: Vec<u8> = (0..=255u8).flat_map(|n| [n, 255 - n, n ^ 0x5A]).collect();
    let colours: Vec<u8> = grey.iter().flat_map(|n| [*n, 255 - n, n ^ 0x5A]).collect();
    assert_eq!(decoded(&png_bytes(png::ColorType::Indexed, eight, Some(palette), &grey)).unwrap(), colours);
}

#[test]
fn interlaced_files_are_read_too() {
    // Adam7: the passes of an image whose pixel is its place.
    let passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)];
    let pixel = |y: usize, x: usize| [y as u8 * 16, x as u8 * 16, (y * x) as u8];
    let mut raw = Vec::new();
    for (y0, x0, dy, dx) in passes {
        for y in (y0..SIZE.height).step_by(dy).filter(|_| x0 < SIZE.width) {
            raw.push(0);
            (x0..SIZE.width).step_by(dx).for_each(|x| raw.extend(pixel(y, x)));
        }
    }
    let file = [header(10, 6, 8, 2, 1), chunk(b"IDAT", &zlib(&raw)), chunk(b"IEND", &[])].concat();
    let expected: Vec<u8> = (0..60).flat_map(|n| pixel(n / 10, n % 10)).collect();
    assert_eq!(decoded(&file).unwrap(), expected);
    assert_eq!(size(&file).unwrap(), SIZE);
}

#[test]
fn hostile_images_are_refused_with_their_name() {
    let good = png_bytes(png::ColorType::Rgb, png::BitDepth::Eight, None, &vec![3; SIZE.bytes()]);
    for cut in (0..good.len()).step_by(7).chain([good.len() - 1]) {
        assert!(size(&good[..cut]).is_err(), "cut at {cut}");
        let error = decoded(&good[..cut]);
        // Bytes after the pixels may be missing.
        assert!(error.is_err() || cut > good.len() - 16, "cut at {cut}");
        assert!(error.err().is_none_or(|error| error.contains("a.png")));
    }
    for at in 8..good.len() {
        let mut spoilt = good.clone();
        spoilt[at] ^= 0x41;
        // Whatever it says, it neither panics nor writes beyond its room.
        let _ = (size(&spoilt), decoded(&spoilt));
    }
    let bomb = [header(100_000, 100_000, 8, 2, 0), chunk(b"IDAT", &zlib(&[0; 4096])), chunk(b"IEND", &[])].concat();
    assert!(size(&bomb).unwrap_err().contains("100000×100000"));
    assert!(decoded(&bomb).unwrap_err().contains("100000×100000 pixels: expected 6×10"));
    let empty = [header(0, 6, 8, 2, 0), chunk(b"IEND", &[])].concat();
    assert!(size(&empty).is_err());
    // The right size, and too few rows.
    let short = [header(10, 6, 8, 2, 0), chunk(b"IDAT", &zlib(&[0; 31 * 3])), chunk(b"IEND", &[])].concat();
    assert!(decoded(&short).is_err());
    let other = [header(12, 6, 8, 2, 0), chunk(b"IDAT", &zlib(&[0; 37 * 6])), chunk(b"IEND", &[])].concat();
    assert!(decoded(&other).unwrap_err().contains("6×12 pixels: expected 6×10"));
    assert!(size(b"GIF89a\x01\x00").unwrap_err().contains("neither a PNG nor a JPEG"));
    assert!(decoded(b"\xff\xd8\xff\xe0").is_err() && size(b"\xff\xd8\xff\xe0\x00").is_err());
}

#[test]
fn jpeg_frames_are_read_colour_and_grey() {
    // 24×40: red rises by 6 a column, green by 10 a row, blue is 128; the grey one rises by 6 a column.
    let size = ImageSize { height: 24, width: 40 };
    let colour = |n: usize| [(n % 40 * 6) as u8, (n / 40 * 10) as u8, 128];
    let grey = |n: usize| [(n % 40 * 6) as u8; 3];
    for (name, pixel) in [("frame.jpg", &colour as &dyn Fn(usize) -> [u8; 3]), ("grey.jpg", &grey)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        assert_eq!(size_of(&path, &mut File::open(&path).unwrap()).unwrap(), size);
        let bytes = std::fs::read(&path).unwrap();
        let mut out = vec![0; size.bytes()];
        decode(&path, &bytes, size, &mut out).unwrap();
        for (n, found) in out.chunks(3).enumerate() {
            let far = found.iter().zip(pixel(n)).any(|(a, b)| a.abs_diff(b) > 6);
            assert!(!far, "{name} pixel {n}: {found:?}, expected about {:?}", pixel(n));
        }
        assert!(decode(&path, &bytes[..bytes.len() / 2], size, &mut out).is_err(), "{name} cut off");
        let wrong = ImageSize { height: 40, width: 24 };
        assert!(decode(&path, &bytes, wrong, &mut out).unwrap_err().to_string().contains("expected 40×24"));
    }
}

/// A data set of `sequences` of `frames` each, its pixels their frame's number.
fn frames_on_disk(root: &Path, sequences: usize, frames: usize) {
    for sequence in 0..sequences {
        let folder = root.join(format!("train/s{sequence}"));
        for kind in ["blur", "sharp", "spike"] {
            std::fs::create_dir_all(folder.join(kind)).unwrap();
        }
        for frame in 0..frames {
            for kind in ["blur", "sharp"] {
                let pixels = vec![frame as u8; SIZE.bytes()];
                write_png(&folder.join(kind).join(format!("{frame:06}.png")), &pixels, SIZE).unwrap();
            }
            // 4 planes of 3×5 spikes, packed: 60 bits.
            std::fs::write(folder.join(format!("spike/{frame:06}.dat")), [0x2F; 8]).unwrap();
        }
    }
}

fn spec(root: &Path) -> VideoSpec {
    VideoSpec::new(root, SpikeInput::Dat { encoding: None, height: 3, width: 5 })
}

fn found(spec: &VideoSpec) -> Result<Vec<SequencePaths>, DataError> {
    find_sequences(spec, "train")?.unwrap().sequences.into_iter().collect()
}

fn scanned(root: &Path, skip_bad: bool) -> Result<Scan, String> {
    let spec = spec(root);
    let found = found(&spec).map_err(|e| e.to_string())?;
    scan(&[found], &spec.spikes, skip_bad).map_err(|e| e.to_string())
}

fn runs(scan: &Scan) -> Vec<Vec<(usize, usize)>> {
    let ends = |sequence: &Sequence| sequence.runs.iter().map(|run| (run.start, run.end)).collect();
    scan.splits[0].iter().map(ends).collect()
}

#[test]
fn frames_that_deviate_name_file_and_clip_or_leave_a_gap() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 2, 6);
    assert_eq!(runs(&scanned(&root, false).unwrap()), [[(0, 6)], [(6, 12)]]);
    let at = |name: &str| root.join("train/s1").join(name);
    let spoil: [(&str, &dyn Fn(), &str); 5] = [
        (
            "blur/000002.png",
            &|| write_png(&at("blur/000002.png"), &[0; 18], ImageSize { height: 3, width: 2 }).unwrap(),
            "3×2",
        ),
        ("sharp/000002.png", &|| std::fs::write(at("sharp/000002.png"), b"\x89PNG").unwrap(), "PNG"),
        ("spike/000002.dat", &|| std::fs::write(at("spike/000002.dat"), [0; 9]).unwrap(), "9 bytes"),
        ("spike/000002.dat", &|| std::fs::write(at("spike/000002.dat"), [0; 4]).unwrap(), "2 spike planes: expected 4"),
        ("spike/000002.dat", &|| std::fs::remove_file(at("spike/000002.dat")).unwrap(), "No such file"),
    ];
    for (name, spoil, problem) in spoil {
        let before = std::fs::read(at(name)).unwrap();
        spoil();
        let error = scanned(&root, false).unwrap_err();
        for part in [problem, "train/s1", name, "data.skip_bad"] {
            assert!(error.contains(part), "{part} in {error}");
        }
        let scan = scanned(&root, true).unwrap();
        assert_eq!(runs(&scan), [vec![(0, 6)], vec![(6, 8), (8, 11)]], "{name}");
        assert_eq!(scan.skipped.len(), 1);
        std::fs::write(at(name), before).unwrap();
    }
    std::fs::remove_file(at("sharp/000005.png")).unwrap();
    let error = scanned(&root, false).unwrap_err();
    assert!(error.contains("6 blurred and 5 sharp") && error.contains("000005"), "{error}");
    // Both are gone: a gap, which no clip crosses.
    for name in ["blur/000005.png", "sharp/000003.png", "blur/000003.png"] {
        std::fs::remove_file(at(name)).unwrap();
    }
    assert_eq!(runs(&scanned(&root, false).unwrap()), [vec![(0, 6)], vec![(6, 9), (9, 10)]]);
}

#[test]
fn a_file_that_changes_during_the_run_is_named() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 1, 2);
    let frames = Frames::new(scanned(&root, false).unwrap());
    let mut out = vec![0; SIZE.bytes()];
    let mut fill = |modality, bytes| {
        frames
            .fill_entry(Frames::key(1, modality), &mut out[..bytes], &mut Scratch::default())
            .map_err(|e| e.to_string())
    };
    fill(Modality::Sharp, SIZE.bytes()).unwrap();
    fill(Modality::Spikes, 12).unwrap();
    assert!(fill(Modality::Spikes, 13).unwrap_err().contains("room for 13 bytes"));
    std::fs::write(root.join("train/s0/spike/000001.dat"), [0; 4]).unwrap();
    let error = fill(Modality::Spikes, 12).unwrap_err();
    assert!(error.contains("000001.dat: changed since the run began: it had 8 bytes, now 4"), "{error}");
    write_png(&root.join("train/s0/sharp/000001.png"), &vec![9; SIZE.bytes()], SIZE).unwrap();
    let error = fill(Modality::Sharp, SIZE.bytes()).unwrap_err();
    assert!(error.contains("sharp/000001.png") && error.contains("changed"), "{error}");
    assert!(frames.fill_entry(17, &mut [], &mut Scratch::default()).is_err());
    assert_eq!(frames.stats().decoded, 2);
}

#[test]
fn meta_info_says_which_frames_count() {
    let (_dir, root) = folder();
    for (kind, folder) in [("GT", "train_GT"), ("blurred", "train_GT_blurred")] {
        for clip in ["000", "001", "other"] {
            std::fs::create_dir_all(root.join(folder).join(clip)).unwrap();
            for frame in 0..5 {
                let value = if kind == "GT" { frame } else { 100 + frame };
                let path = root.join(folder).join(clip).join(format!("{frame:06}.png"));
                write_png(&path, &vec![value; SIZE.bytes()], SIZE).unwrap();
            }
        }
    }
    let spec = VideoSpec::new(&root, SpikeInput::None);
    let names = |spec: &VideoSpec| -> Vec<(String, usize)> {
        found(spec).unwrap().iter().map(|s| (s.name.clone(), s.frames.len())).collect()
    };
    assert_eq!(names(&spec).len(), 3, "without meta_info every folder counts");
    let meta = root.join("meta_info_train.txt");
    std::fs::write(&meta, "000 5 (6,10,3) 000000\n001 3 (6, 10, 3) 000002\n\n").unwrap();
    assert_eq!(names(&spec), [("train/000".to_string(), 5), ("train/001".to_string(), 3)]);
    let sequences = found(&spec).unwrap();
    assert_eq!((&*sequences[1].frames[0].stem, sequences[1].size), ("000002", Some(SIZE)));
    assert!(sequences[1].frames[0].blur.to_string_lossy().contains("train_GT_blurred/001"));
    let scan = scan(&[sequences], &spec.spikes, false).unwrap();
    assert_eq!((scan.frames.len(), scan.spikes), (8, None));
    for (text, problem) in [
        ("000 6 (6,10,3) 000000", "meta_info says 6"),
        ("000 five (6,10,3) 000000", "line 1"),
        ("000 5 6,10,3 000000", "line 1"),
        ("none 5 (6,10,3) 000000", "none"),
    ] {
        std::fs::write(&meta, text).unwrap();
        let error = found(&spec).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
    std::fs::write(&meta, "000 5 (6,12,3) 000000").unwrap();
    let error = super::scan(&[found(&spec).unwrap()], &spec.spikes, false).unwrap_err().to_string();
    assert!(error.contains("meta_info says 6×12"), "{error}");
}

#[test]
fn bytes_behind_the_end_of_a_png_do_no_harm() {
    let pixels = vec![3; SIZE.bytes()];
    let good = png_bytes(png::ColorType::Rgb, png::BitDepth::Eight, None, &pixels);
    for behind in [&b"\0"[..], &[0; 100], b"\xff\xd8\xff", &good] {
        let file = [good.clone(), behind.to_vec()].concat();
        assert_eq!(size(&file), Ok(SIZE), "{} bytes behind it", behind.len());
        assert_eq!(decoded(&file).unwrap(), pixels);
    }
    // IEND inside of pixels or of a comment is no end.
    let comment =
        [&good[..33], &chunk(b"tEXt", b"a\0\0\0\0\0IEND\xae\x42\x60\x82"), &good[33..good.len() - 20]].concat();
    assert!(size(&comment).unwrap_err().contains("cut off"));
    let huge = [&good[..33], &[0xFF; 4][..], b"IDAT", &[0; 60]].concat();
    assert!(size(&huge).unwrap_err().contains("cut off"));
}

#[test]
fn the_header_of_a_jpeg_may_be_long() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/frame.jpg");
    let plain = std::fs::read(path).unwrap();
    let (_dir, folder) = folder();
    let path = folder.join("a.jpg");
    // Depth maps and previews, 20 segments of 64 KiB, with a thumbnail of another size within; fill bytes before a marker.
    let segment = [b"\xff\xff\xff\xe1\xff\xff".to_vec(), plain.clone(), vec![b'x'; 65_533 - plain.len()]].concat();
    let long = [&plain[..2], &segment.repeat(20), &plain[2..]].concat();
    assert!(long.len() > 1 << 20);
    std::fs::write(&path, &long).unwrap();
    let expected = ImageSize { height: 24, width: 40 };
    assert_eq!(size_of(&path, &mut File::open(&path).unwrap()).unwrap(), expected);
    let (mut out, mut of_plain) = (vec![0; expected.bytes()], vec![0; expected.bytes()]);
    decode(&path, &long, expected, &mut out).unwrap();
    decode(&path, &plain, expected, &mut of_plain).unwrap();
    assert_eq!(out, of_plain);
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        size_of(&path, &mut File::open(&path).unwrap()).unwrap_err().to_string()
    };
    assert!(refused(&long[..700_000]).contains("cut off before its size"));
    assert!(refused(b"\xff\xd8\xff\xda\0\x08\0\0\0\0\0\0").contains("its pixels begin before its size"));
    assert!(refused(b"\xff\xd8\xff\xc0\0\x11\x0c\0\x18\0\x28\x03\0\0").contains("12 bits per sample"));
    assert!(refused(b"\xff\xd8\xff\xe0\0\x04ab\0\0\0").contains("does not begin with a marker"));
}

#[test]
fn no_error_shows_words_of_a_librarys_code() {
    let rgb =
        png_bytes(png::ColorType::Rgb, png::BitDepth::Eight, None, &(0..180).map(|n| n as u8).collect::<Vec<_>>());
    let jpeg = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/frame.jpg")).unwrap();
    let jpeg_size = ImageSize { height: 24, width: 40 };
    let mut errors = std::collections::BTreeSet::new();
    for at in 2..rgb.len() {
        let mut spoilt = rgb.clone();
        spoilt[at] ^= 0x55;
        errors.extend([decoded(&spoilt).err(), decoded(&rgb[..at]).err(), size(&spoilt).err()].into_iter().flatten());
    }
    for at in 2..jpeg.len() {
        for value in [0x00, 0xFF, 0x55] {
            let mut spoilt = jpeg.clone();
            spoilt[at] ^= value;
            let mut out = vec![0; jpeg_size.bytes()];
            let cut = decode(Path::new("a.jpg"), &jpeg[..at], jpeg_size, &mut out).err();
            let spoilt = decode(Path::new("a.jpg"), &spoilt, jpeg_size, &mut out).err();
            errors.extend([cut, spoilt].into_iter().flatten().map(|e| e.to_string()));
        }
    }
    assert!(errors.len() >= 8, "{errors:?}");
    for error in &errors {
        let error = error.split_once(": ").map_or(error.as_str(), |(_, problem)| problem);
        // Quotes, braces, paths of types and names such as ChunkType or FormatStatic.
        let camel = error
            .split(|c: char| !c.is_ascii_alphanumeric())
            .any(|word| word.chars().skip(1).any(char::is_uppercase) && word.chars().any(char::is_lowercase));
        assert!(!camel && !error.contains(['{', '"', '[']) && !error.contains("::"), "{error}");
    }
}

#[test]
fn frames_are_in_the_order_of_their_numbers_and_clips_cross_no_gap() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 1, 13);
    for kind in ["blur", "sharp", "spike"] {
        let folder = root.join("train/s0").join(kind);
        for frame in 0..13 {
            let ending = if kind == "spike" { "dat" } else { "png" };
            let (old, new) = (format!("{frame:06}.{ending}"), format!("frame_{}.{ending}", frame + 1));
            std::fs::rename(folder.join(old), folder.join(new)).unwrap();
        }
    }
    let stems = |scan: &Scan| scan.frames.iter().map(|frame| frame.stem.clone()).collect::<Vec<_>>();
    let scan = scanned(&root, false).unwrap();
    assert_eq!(stems(&scan), (1..14).map(|n| format!("frame_{n}")).collect::<Vec<_>>());
    assert_eq!(runs(&scan), [[(0, 13)]]);
    for kind in ["blur", "sharp"] {
        std::fs::remove_file(root.join("train/s0").join(kind).join("frame_10.png")).unwrap();
    }
    let sequences = found(&spec(&root)).unwrap();
    let gap = (Remark::Gap, "clip train/s0 between frame_9 and frame_11".to_string());
    assert_eq!(sequences[0].remarks, [gap]);
    assert_eq!(runs(&scanned(&root, false).unwrap()), [[(0, 9), (9, 12)]]);
    // One of another kind: nothing can be said of missing ones.
    for kind in ["blur", "sharp"] {
        let folder = root.join("train/s0").join(kind);
        std::fs::rename(folder.join("frame_13.png"), folder.join("last.png")).unwrap();
    }
    std::fs::rename(root.join("train/s0/spike/frame_13.dat"), root.join("train/s0/spike/last.dat")).unwrap();
    let sequences = found(&spec(&root)).unwrap();
    assert_eq!(sequences[0].remarks[0].0, Remark::NotAlike);
    assert!(sequences[0].remarks[0].1.ends_with("train/s0/blur (frame_1 to last)"), "{:?}", sequences[0].remarks);
}

#[test]
fn files_of_a_frame_are_found_by_one_rule() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 1, 3);
    let at = |name: &str| root.join("train/s0").join(name);
    let rename = |old: &str, new: &str| std::fs::rename(at(old), at(new)).unwrap();
    // Letter case of endings, of labels and of spikes.
    rename("sharp/000001.png", "sharp/000001.PNG");
    rename("spike/000002.dat", "spike/000002.Dat");
    for kind in ["blur", "sharp", "spike"] {
        let ending = if kind == "spike" { "dat" } else { "png" };
        let name = if kind == "sharp" { "A000000" } else { "a000000" };
        rename(&format!("{kind}/000000.{ending}"), &format!("{kind}/{name}.{ending}"));
    }
    let scan = scanned(&root, false).unwrap();
    assert_eq!(scan.frames.len(), 3);
    let first = scan.frames.iter().find(|frame| frame.stem == "a000000").unwrap();
    assert!(first.sharp.path.ends_with("A000000.png"));
    // Two endings of one frame: the one that comes first in the key counts.
    std::fs::copy(at("blur/000001.png"), at("blur/000001.jpg")).unwrap();
    let read = |endings: &[&str]| {
        let image_exts = endings.iter().map(|ending| ending.to_string()).collect();
        let sequences = found(&VideoSpec { image_exts, ..spec(&root) }).unwrap();
        let frame = sequences[0].frames.iter().find(|frame| frame.stem == "000001").unwrap().clone();
        let doubled: Vec<String> =
            sequences[0].remarks.iter().filter(|of| of.0 == Remark::Doubled).map(|of| of.1.clone()).collect();
        (frame.blur.extension().unwrap().to_str().unwrap().to_owned(), doubled.join(" "))
    };
    let (ending, remark) = read(&["png", "jpg"]);
    assert!(ending == "png" && remark.ends_with("blur: 000001.png is read, 000001.jpg is not"), "{ending}: {remark}");
    let (ending, remark) = read(&["jpg", "png"]);
    assert!(ending == "jpg" && remark.ends_with("000001.jpg is read, 000001.png is not"), "{ending}: {remark}");
    assert_eq!(read(&["png"]), ("png".into(), String::new()), "an ending that is not searched is no second file");
    // Two frames that differ in letter case alone, and two of one number.
    std::fs::copy(at("blur/a000000.png"), at("blur/A000000.png")).unwrap();
    let error = found(&spec(&root)).unwrap_err().to_string();
    assert!(error.contains("A000000.png and a000000.png differ in letter case alone"), "{error}");
    for name in ["blur/A000000.png", "blur/a000000.png", "sharp/A000000.png", "spike/a000000.dat"] {
        std::fs::remove_file(at(name)).unwrap();
    }
    for name in ["blur/1.png", "sharp/1.png"] {
        std::fs::copy(at("blur/000002.png"), at(name)).unwrap();
    }
    let error = found(&spec(&root)).unwrap_err().to_string();
    assert!(error.contains("frames 000001 and 1 have the same number"), "{error}");
}

#[test]
fn endings_that_are_not_searched_are_named_with_the_key() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 1, 3);
    let jpeg = VideoSpec { image_exts: vec!["jpg".into(), "jpeg".into()], ..spec(&root) };
    let error = found(&jpeg).unwrap_err().to_string();
    let expected = "train/s0/blur: no file ending in .jpg or .jpeg (deblur.image_exts): the folder holds 3 .png";
    assert!(error.ends_with(expected), "{error}");
    for frame in 0..3 {
        let spikes = root.join(format!("train/s0/spike/{frame:06}"));
        std::fs::rename(spikes.with_extension("dat"), spikes.with_extension("npy")).unwrap();
    }
    let error = found(&spec(&root)).unwrap_err().to_string();
    assert!(error.contains("spike: no file ending in .dat (deblur.spike_dir"), "{error}");
    assert!(error.ends_with("the folder holds 3 .npy"), "{error}");
    // Some of a sequence's frames only: a remark.
    let plain = VideoSpec { spikes: SpikeInput::None, ..spec(&root) };
    std::fs::write(root.join("train/s0/blur/000003.tif"), b"II").unwrap();
    std::fs::write(root.join("train/s0/blur/notes.txt"), b"").unwrap();
    let remarks = found(&plain).unwrap().remove(0).remarks;
    assert_eq!(remarks.len(), 1);
    assert!(remarks[0].0 == Remark::OtherEnding && remarks[0].1.ends_with("blur (.tif)"), "{remarks:?}");
}

#[test]
fn hidden_sequences_and_frames_are_no_data() {
    let (_dir, root) = folder();
    frames_on_disk(&root, 2, 3);
    std::fs::rename(root.join("train/s1"), root.join("train/.s1")).unwrap();
    std::fs::write(root.join("train/s0/blur/._000001.png"), b"\0\x05\x16\x07").unwrap();
    std::fs::write(root.join("train/s0/sharp/.DS_Store"), b"").unwrap();
    std::fs::create_dir(root.join("train/s0/blur/.ipynb_checkpoints")).unwrap();
    let split = find_sequences(&spec(&root), "train").unwrap().unwrap();
    assert_eq!(split.sequences.len(), 1);
    assert!(split.remarks[0].0 == Remark::NoData && split.remarks[0].1.ends_with("train/.s1"));
    let remarks = &split.sequences[0].as_ref().unwrap().remarks;
    assert!(remarks.len() == 1 && remarks[0].1.ends_with("blur/._000001.png"), "{remarks:?}");
    assert_eq!(scanned(&root, false).unwrap().frames.len(), 3);
}
