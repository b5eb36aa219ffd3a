//! Sample sequences in the true format: what a moving camera, a long exposure and a spike camera make of a scene.
//!
//! A band-limited texture pans behind three moving rectangles. An exposure is 33 sub-frames: their mean is the blurred
//! frame, the middle one the sharp frame. At half resolution a spike camera integrates the luminance of every sub-frame
//! in two steps; a pixel that reaches 1 fires and loses 1. So 66 spike planes of a frame hold the motion that the blur lost.

use crate::data::DataError;
use crate::data::source::video::image::{ImageSize, write_png};
use crate::data::source::video::spikes::to_packed_file;
use crate::data::source::video::{Layout, SpikeEncoding};
use crate::data::source::{file_error, in_threads};
use crate::task::SampleRequest;
use crate::task::sample::{Random, new_folder};
use std::f64::consts::TAU;
use std::path::{Path, PathBuf};

/// Sub-frames of an exposure; exposures follow each other without a gap.
const SUBFRAMES: usize = 33;
/// Spike planes of a sub-frame.
const STEPS: usize = 2;
const RECTANGLES: usize = 3;
/// Side of the texture's tile, pixels: it repeats, so that a camera may pan as far as it likes.
const TILE: usize = 256;
/// Waves of a texture, at most so many per tile: periods of 8 pixels and more.
const WAVES: usize = 24;
const HIGHEST: f64 = 20.0;
/// Range of a wave's weight over the colour channels; its brightness has 0.2 to 1.
const COLOUR: f64 = 0.2;
/// Motion during one exposure, pixels.
const MOTION: (f64, f64) = (3.0, 12.0);

/// Request for sample data.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    /// Sequences of training, validation and test.
    pub sequences: [usize; 3],
    /// Frames of a sequence.
    pub frames: usize,
    /// Size of frames; the spike camera has half as many rows and columns.
    pub size: ImageSize,
    pub layout: Layout,
    pub encoding: SpikeEncoding,
    /// Standard deviation of the sensor's noise in frames, levels of 255.
    pub noise: f64,
    pub seed: u64,
}

impl Default for SampleSpec {
    /// 8, 2 and 2 sequences of 12 frames of 96×128, spikes as the camera packs them.
    fn default() -> Self {
        Self {
            sequences: [8, 2, 2],
            frames: 12,
            size: ImageSize { height: 96, width: 128 },
            layout: Layout::Unified,
            encoding: SpikeEncoding::Packed,
            noise: 0.0,
            seed: 42,
        }
    }
}

/// Does what `launch sample-data --task deblur` asks for.
///
/// # Errors
/// An unknown layout, or as [`write_sample_data`].
pub fn sample_data(request: &SampleRequest) -> Result<(), DataError> {
    let mut spec = SampleSpec { seed: request.seed, ..SampleSpec::default() };
    match request.layout.as_deref().unwrap_or("packed") {
        "packed" => {}
        "bytes" => spec.encoding = SpikeEncoding::Bytes,
        "kair" => spec.layout = Layout::Kair,
        other => {
            let problem = format!("--layout {other} is unknown: choose packed, bytes or kair");
            return Err(DataError::setting("--layout", problem));
        }
    }
    if request.seconds.is_some() {
        let problem = "--seconds is for recordings: sequences have a fixed number of frames";
        return Err(DataError::setting("--seconds", problem));
    }
    spec.sequences[0] = request.sessions.unwrap_or(spec.sequences[0]);
    write_sample_data(&request.out, &spec)
}

/// Writes the sequences into the new folder `out`, which is never half there.
///
/// # Errors
/// A size that is not even; `out` exists and is not an empty folder; there is no room or permission.
pub fn write_sample_data(out: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    let ImageSize { height, width } = spec.size;
    if height == 0 || width == 0 || height % 2 != 0 || width % 2 != 0 {
        let problem = format!("sample frames of {}: expected even numbers of pixels", spec.size);
        return Err(DataError::setting("size of sample frames", problem));
    }
    new_folder(out, |folder| write_all(folder, spec))
}

/// One sequence to write.
struct Job {
    split: &'static str,
    number: usize,
}

fn write_all(folder: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    let splits = ["train", "val", "test"];
    let jobs: Vec<Job> = splits
        .iter()
        .zip(spec.sequences)
        .flat_map(|(split, sequences)| (0..sequences).map(move |number| Job { split, number }))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    in_threads(threads, &jobs, |job| write_sequence(folder, spec, job)).into_iter().collect::<Result<(), _>>()?;
    if spec.layout == Layout::Kair {
        for (split, sequences) in splits.iter().zip(spec.sequences) {
            write_meta(folder, spec, split, sequences)?;
        }
    }
    Ok(())
}

fn name(number: usize) -> String {
    format!("seq{number:03}")
}

/// Lines "clip frames shape start", as KAIR has them.
fn write_meta(folder: &Path, spec: &SampleSpec, split: &str, sequences: usize) -> Result<(), DataError> {
    let ImageSize { height, width } = spec.size;
    let line = |number| format!("{} {} ({height},{width},3) 000000\n", name(number), spec.frames);
    let path = folder.join(format!("meta_info_{split}.txt"));
    let text: String = (0..sequences).map(line).collect();
    std::fs::write(&path, text).map_err(|e| file_error(&path, e.to_string()))
}

/// Folders of blurred frames, sharp frames and spikes.
fn folders(folder: &Path, spec: &SampleSpec, job: &Job) -> [PathBuf; 3] {
    let (split, name) = (job.split, name(job.number));
    match spec.layout {
        Layout::Unified => ["blur", "sharp", "spike"].map(|kind| folder.join(split).join(&name).join(kind)),
        Layout::Kair => ["GT_blurred", "GT", "spike"].map(|kind| folder.join(format!("{split}_{kind}")).join(&name)),
    }
}

fn write_sequence(folder: &Path, spec: &SampleSpec, job: &Job) -> Result<(), DataError> {
    let places = folders(folder, spec, job);
    for place in &places {
        std::fs::create_dir_all(place).map_err(|e| file_error(place, e.to_string()))?;
    }
    let [blur_dir, sharp_dir, spike_dir] = places;
    // Splits differ as their names do.
    let split = job.split.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut random = Random(spec.seed ^ split.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (job.number as u64 + 1) << 32);
    let scene = Scene::new(&mut random, spec.size);
    let mut camera = SpikeCamera::new(&mut random, spec.size);
    for frame in 0..spec.frames {
        let (mut blur, mut sharp, spikes) = exposure(&scene, &mut camera, frame, spec.size);
        [&mut blur, &mut sharp].into_iter().for_each(|pixels| add_noise(pixels, spec.noise, &mut random));
        let image = format!("{frame:06}.png");
        write_png(&blur_dir.join(&image), &blur, spec.size)?;
        write_png(&sharp_dir.join(&image), &sharp, spec.size)?;
        let content = match spec.encoding {
            SpikeEncoding::Packed => to_packed_file(&spikes, spec.size.height / 2, spec.size.width / 2),
            SpikeEncoding::Bytes => spikes,
        };
        let path = spike_dir.join(format!("{frame:06}.dat"));
        std::fs::write(&path, content).map_err(|e| file_error(&path, e.to_string()))?;
    }
    Ok(())
}

/// Blurred and sharp frame `[H, W, 3]`, and spikes `[66, H/2, W/2]` of one byte.
fn exposure(scene: &Scene, camera: &mut SpikeCamera, frame: usize, size: ImageSize) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let mut sum = vec![0f32; size.bytes()];
    let mut picture = vec![0f32; size.bytes()];
    let (mut sharp, mut spikes) = (Vec::new(), Vec::new());
    for sub in 0..SUBFRAMES {
        scene.render(frame as f64 + sub as f64 / SUBFRAMES as f64, size, &mut picture);
        sum.iter_mut().zip(&picture).for_each(|(sum, value)| *sum += value);
        camera.see(&picture, size.width, &mut spikes);
        if sub == SUBFRAMES / 2 {
            sharp = picture.iter().map(|value| to_u8(*value)).collect();
        }
    }
    let blur = sum.iter().map(|sum| to_u8(sum / SUBFRAMES as f32)).collect();
    (blur, sharp, spikes)
}

fn add_noise(pixels: &mut [u8], levels: f64, random: &mut Random) {
    if levels > 0.0 {
        pixels.iter_mut().for_each(|value| *value = (f64::from(*value) + levels * random.normal()).round() as u8);
    }
}

fn to_u8(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0).round() as u8
}

/// A tile of band-limited colour, 0.1 to 0.9, that repeats every [`TILE`] pixels.
struct Texture(Vec<[f32; 3]>);

impl Texture {
    fn new(random: &mut Random) -> Self {
        let mut wave = |_| -> ([f64; 3], [f64; 3]) {
            let mut number = || (random.uniform() * 2.0 - 1.0) * HIGHEST;
            let (rows, columns) = (number().round(), number().round());
            let phase = random.uniform() * TAU;
            // As in nature, most of what changes is brightness: channels go together up to a tenth.
            let grey = 0.2 + 0.8 * random.uniform();
            ([rows, columns, phase], std::array::from_fn(|_| grey + COLOUR * (random.uniform() - 0.5)))
        };
        let waves: Vec<_> = (0..WAVES).map(&mut wave).collect();
        let colour = |at: usize| -> [f32; 3] {
            let (y, x) = ((at / TILE) as f64, (at % TILE) as f64);
            let mut sums = [0.0; 3];
            for ([rows, columns, phase], weights) in &waves {
                let value = ((rows * y + columns * x) * TAU / TILE as f64 + phase).sin();
                sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight * value);
            }
            // Standard deviation 0.2 at 24 waves of mean square weight 0.4.
            sums.map(|sum| (0.5 + 0.09 * sum).clamp(0.1, 0.9) as f32)
        };
        Self((0..TILE * TILE).map(colour).collect())
    }

    /// Colours of a row of pixels from `(y, x)` on, between texels by bilinear weights.
    fn row(&self, y: f64, x: f64, out: &mut [f32]) {
        let fold = |at: f64| at.rem_euclid(TILE as f64);
        let (y, x) = (fold(y), fold(x));
        let (top, left) = (y as usize % TILE, x as usize % TILE);
        let (down, right) = ((y - y.floor()) as f32, (x - x.floor()) as f32);
        let rows = [top, (top + 1) % TILE].map(|row| &self.0[row * TILE..(row + 1) * TILE]);
        let column = |at: usize| -> [f32; 3] {
            let (above, below) = (rows[0][at % TILE], rows[1][at % TILE]);
            std::array::from_fn(|c| above[c] + (below[c] - above[c]) * down)
        };
        let mut here = column(left);
        for (n, pixel) in out.chunks_exact_mut(3).enumerate() {
            let next = column(left + n + 1);
            pixel.iter_mut().enumerate().for_each(|(c, value)| *value = here[c] + (next[c] - here[c]) * right);
            here = next;
        }
    }
}

/// Motion of something: place at time 0, pixels per exposure.
struct Motion {
    start: (f64, f64),
    speed: (f64, f64),
}

impl Motion {
    fn new(random: &mut Random, size: ImageSize) -> Self {
        let start = (random.uniform() * size.height as f64, random.uniform() * size.width as f64);
        let speed = MOTION.0 + random.uniform() * (MOTION.1 - MOTION.0);
        let angle = random.uniform() * TAU;
        Self { start, speed: (speed * angle.sin(), speed * angle.cos()) }
    }

    fn at(&self, time: f64) -> (f64, f64) {
        (self.start.0 + self.speed.0 * time, self.start.1 + self.speed.1 * time)
    }
}

struct Rectangle {
    motion: Motion,
    size: (f64, f64),
    colour: [f32; 3],
}

/// Scene before the cameras.
struct Scene {
    texture: Texture,
    pan: Motion,
    rectangles: Vec<Rectangle>,
}

impl Scene {
    fn new(random: &mut Random, size: ImageSize) -> Self {
        let (texture, pan) = (Texture::new(random), Motion::new(random, size));
        let side = |random: &mut Random, pixels: usize| (0.15 + 0.25 * random.uniform()) * pixels as f64;
        let rectangle = |_| Rectangle {
            motion: Motion::new(random, size),
            size: (side(random, size.height), side(random, size.width)),
            colour: std::array::from_fn(|_| random.uniform() as f32),
        };
        Self { texture, pan, rectangles: (0..RECTANGLES).map(rectangle).collect() }
    }

    /// Draws the scene at `time`, in exposures, as linear colour `[H, W, 3]`.
    fn render(&self, time: f64, size: ImageSize, out: &mut [f32]) {
        let (y, x) = self.pan.at(time);
        for (row, out) in out.chunks_exact_mut(size.width * 3).enumerate() {
            self.texture.row(y + row as f64, x, out);
        }
        for Rectangle { motion, size: (height, width), colour } in &self.rectangles {
            let (y, x) = motion.at(time);
            // Each comes back on the other side once it is out of sight.
            let top = (y + height).rem_euclid(size.height as f64 + height) - height;
            let left = (x + width).rem_euclid(size.width as f64 + width) - width;
            let rows = covered(top, top + height, size.height);
            let columns = covered(left, left + width, size.width);
            for (row, down) in rows {
                for (column, across) in columns.clone() {
                    let pixel = &mut out[(row * size.width + column) * 3..][..3];
                    pixel.iter_mut().zip(colour).for_each(|(value, c)| *value += (c - *value) * down * across);
                }
            }
        }
    }
}

/// Pixels that `from..to` covers, with the part of each.
fn covered(from: f64, to: f64, pixels: usize) -> impl Iterator<Item = (usize, f32)> + Clone {
    let (first, last) = (from.max(0.0).floor() as usize, (to.max(0.0).ceil() as usize).min(pixels));
    (first..last).map(move |pixel| {
        let part = (to.min(pixel as f64 + 1.0) - from.max(pixel as f64)).clamp(0.0, 1.0);
        (pixel, part as f32)
    })
}

/// Integrate and fire, at half resolution.
struct SpikeCamera {
    charge: Vec<f32>,
}

impl SpikeCamera {
    /// A camera that has been running: charges are anywhere below the threshold.
    fn new(random: &mut Random, size: ImageSize) -> Self {
        Self { charge: (0..size.height * size.width / 4).map(|_| random.uniform() as f32).collect() }
    }

    /// Appends the planes of one sub-frame, a byte per spike.
    fn see(&mut self, picture: &[f32], width: usize, spikes: &mut Vec<u8>) {
        let luminance = |pixel: &[f32]| 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2];
        let bright: Vec<f32> = picture
            .chunks_exact(2 * width * 3)
            .flat_map(|pair| {
                let (upper, lower) = pair.split_at(width * 3);
                upper.chunks_exact(6).zip(lower.chunks_exact(6)).map(move |(a, b)| {
                    let sum = luminance(&a[..3]) + luminance(&a[3..]) + luminance(&b[..3]) + luminance(&b[3..]);
                    sum / 4.0
                })
            })
            .collect();
        for _ in 0..STEPS {
            spikes.extend(self.charge.iter_mut().zip(&bright).map(|(charge, bright)| {
                *charge += bright;
                let fires = *charge >= 1.0;
                *charge -= f32::from(u8::from(fires));
                u8::from(fires)
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::video::image;

    fn small() -> SampleSpec {
        SampleSpec { sequences: [1, 1, 0], frames: 3, size: ImageSize { height: 24, width: 32 }, ..Default::default() }
    }

    #[test]
    fn sample_data_is_deterministic_and_the_encodings_hold_the_same_spikes() {
        let dir = tempfile::tempdir().unwrap();
        write_sample_data(&dir.path().join("a"), &small()).unwrap();
        write_sample_data(&dir.path().join("b"), &SampleSpec { encoding: SpikeEncoding::Bytes, ..small() }).unwrap();
        write_sample_data(&dir.path().join("c"), &SampleSpec { seed: 1, ..small() }).unwrap();
        let read = |path: &str| std::fs::read(dir.path().join(path)).unwrap();
        assert_eq!(read("a/train/seq000/blur/000001.png"), read("b/train/seq000/blur/000001.png"));
        assert_ne!(read("a/train/seq000/blur/000001.png"), read("c/train/seq000/blur/000001.png"));
        assert_ne!(read("a/train/seq000/blur/000001.png"), read("a/val/seq000/blur/000001.png"));
        assert_eq!(read("a/train/seq000/spike/000002.dat").len(), 66 * 12 * 16 / 8);
        let bytes = read("b/train/seq000/spike/000002.dat");
        assert_eq!(to_packed_file(&bytes, 12, 16), read("a/train/seq000/spike/000002.dat"));
        let error = write_sample_data(&dir.path().join("a"), &small()).unwrap_err().to_string();
        assert!(error.contains("already holds files"), "{error}");
    }

    #[test]
    fn blur_is_the_mean_of_what_moves_and_spikes_count_the_light() {
        let mut random = Random(3);
        let size = ImageSize { height: 48, width: 64 };
        let (scene, mut camera) = (Scene::new(&mut random, size), SpikeCamera::new(&mut random, size));
        let (blur, sharp, spikes) = exposure(&scene, &mut camera, 0, size);
        assert_eq!((blur.len(), sharp.len(), spikes.len()), (size.bytes(), size.bytes(), 66 * 24 * 32));
        let error = |a: &[u8], b: &[u8]| {
            let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
            a.iter().zip(b).map(square).sum::<f64>() / a.len() as f64
        };
        // 10 to 40 dB: blurred, yet the same scene.
        let psnr = 10.0 * (255.0f64.powi(2) / error(&blur, &sharp)).log10();
        assert!((10.0..40.0).contains(&psnr), "{psnr}");
        // Spikes of a pixel over the exposure are 66 × its mean luminance, within one.
        let pixel = |y: usize, x: usize| {
            let at = &blur[(y * size.width + x) * 3..][..3];
            (0.299 * f64::from(at[0]) + 0.587 * f64::from(at[1]) + 0.114 * f64::from(at[2])) / 255.0
        };
        for (y, x) in [(0, 0), (11, 7), (23, 31)] {
            let count: u32 = spikes.chunks(24 * 32).map(|plane| u32::from(plane[y * 32 + x])).sum();
            let light = (0..4).map(|n| pixel(2 * y + n / 2, 2 * x + n % 2)).sum::<f64>() / 4.0 * 66.0;
            assert!((f64::from(count) - light).abs() < 1.3, "{count} spikes, {light} light");
        }
    }

    #[test]
    fn frames_that_are_written_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let size = ImageSize { height: 5, width: 7 };
        let pixels: Vec<u8> = (0..size.bytes()).map(|n| (n * 37) as u8).collect();
        let path = dir.path().join("a.png");
        write_png(&path, &pixels, size).unwrap();
        let mut file = std::fs::File::open(&path).unwrap();
        assert_eq!(image::size_of(&path, &mut file).unwrap(), size);
        let mut out = vec![0; size.bytes()];
        image::decode(&path, &std::fs::read(&path).unwrap(), size, &mut out).unwrap();
        assert_eq!(out, pixels);
    }
}
