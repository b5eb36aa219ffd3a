//! Sizes of clips and of their data set for a plan, from file names, sizes and one picture's header: nothing is decoded.

use super::FrameFacts;
use crate::data::source::find_files;
use crate::data::{DataError, Dtype, FieldSpec};
use crate::task::outline::{Outline, SCRATCH_BYTES};
use spec::config::Config;
use spec::contract::files::{SpikeBytes, SpikeVerdict};
use spec::contract::{CacheMode, DataSizes};
use spec::plan::bytes_text;
use spec::task::deblur::{DeblurConfig, SpikeEncoding};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Worker processes of the guide: 36 per GPU on 3 GPUs.
const GUIDE_WORKERS: u64 = 36 * 3;
/// Spike planes of a frame where there is no file: two per sub-frame of 33.
const USUAL_PLANES: usize = 66;
/// Pixels of a frame for each of the spike camera, along a side, where there is no file: 720×1280 beside 360×640.
const USUAL_SCALE: usize = 2;
/// Bytes of a spike file that are read to detect its encoding.
const PEEKED_BYTES: u64 = 64 << 10;
/// Entries of the page cache start on cache lines.
const LINE_BYTES: usize = 64;
/// Factor by which the sides of a shrunk clip are smaller.
const SHRINK: usize = 2;
/// Smallest side of a shrunk clip, pixels: a stage at an eighth of it still has a window of its own.
const SMALLEST_SIDE: usize = 64;

/// Findings on the files below a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Files `.png`, `.jpg` and `.jpeg`.
    pub images: usize,
    /// Rows and columns by the header of one `.png`. 0 means that no `.png` was found.
    pub height: usize,
    pub width: usize,
    /// Size of the largest `.dat` file.
    pub spike_file_bytes: u64,
    /// That file holds a byte per spike, not a bit: see [`SpikeBytes`].
    pub spikes_are_bytes: bool,
}

impl Seen {
    /// Below `root`; nothing where there is no such folder.
    pub fn below(root: &Path) -> Self {
        let mut seen = Self::default();
        let extensions = ["png", "jpg", "jpeg", "dat"];
        for path in find_files(root, &extensions).unwrap_or_default().files {
            seen.add(&path);
        }
        seen
    }

    fn add(&mut self, path: &PathBuf) {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if extension == "dat" {
            let bytes = std::fs::metadata(path).map_or(0, |file| file.len());
            if bytes > self.spike_file_bytes {
                self.spike_file_bytes = bytes;
                self.spikes_are_bytes = are_bytes(path).unwrap_or(false);
            }
            return;
        }
        self.images += 1;
        if self.height == 0 && extension == "png" {
            (self.height, self.width) = png_size(path).unwrap_or_default();
        }
    }
}

/// Rows and columns by a PNG's first chunk (PNG specification, 11.2.2: width, then height, after 16 bytes).
fn png_size(path: &Path) -> Option<(usize, usize)> {
    let mut head = [0; 24];
    std::fs::File::open(path).ok()?.read_exact(&mut head).ok()?;
    let whole = head.starts_with(b"\x89PNG\r\n\x1a\n") && &head[12..16] == b"IHDR";
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    whole.then(|| (number(20), number(16)))
}

/// True if the file holds a byte per spike, by its beginning.
fn are_bytes(path: &Path) -> Option<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path).ok()?.take(PEEKED_BYTES).read_to_end(&mut head).ok()?;
    let mut bytes = SpikeBytes::default();
    bytes.add(&head);
    Some(bytes.verdict() == SpikeVerdict::Bytes)
}

/// Shapes by the files below `data.dataset_path` and the config; by the config alone where there are none.
pub fn outline(config: &Config) -> Result<Outline, DataError> {
    of_files(config, &Seen::below(&config.data.dataset_path))
}

/// The same for clips to predict for: whole frames without sharp ones, as samples of validation.
///
/// # Errors
/// As [`outline`].
pub fn predict_outline(config: &Config) -> Result<Outline, DataError> {
    let seen = Seen::below(&config.data.dataset_path);
    let outline = of_files(config, &seen)?;
    let fields = |data: &Arc<dyn crate::data::Dataset>| data.fields().to_vec();
    let (train, mut val) = (fields(&outline.datasets.train), fields(&outline.datasets.val));
    val.retain(|field| field.name != "sharp");
    let mut blurred = Outline::new(train, val, outline.sizes);
    blurred.datasets.facts = outline.datasets.facts;
    Ok(blurred)
}

/// The same of files that were looked at.
///
/// # Errors
/// The number of bytes overflows.
pub fn of_files(config: &Config, seen: &Seen) -> Result<Outline, DataError> {
    let absurd =
        || DataError::Other("clips are beyond any machine: check the section deblur and the size of its frames".into());
    let data = &config.section::<DeblurConfig>();
    let frame = Frame::of(data, seen);
    let fields = |side| frame.cut(side).fields(config);
    let sizes = frame.sizes(config, (seen.images / 2) as u64).ok_or_else(absurd)?;
    let mut outline = Outline::new(fields(data.crop_size), fields(data.val_crop_size), sizes);
    outline.datasets.facts = Some(Arc::new(FrameFacts { image_width: frame.width }));
    Ok(outline)
}

/// The config with clips of half the side, and how many times more pixels its own clips have; `None`: they are small
/// already.
pub fn shrunk(config: &Config) -> Option<(Config, f64)> {
    let frame = Frame::of(&config.section(), &Seen::below(&config.data.dataset_path));
    let mut smaller = config.clone();
    let mut data: DeblurConfig = smaller.section();
    let mut factors = Vec::new();
    for side in [&mut data.crop_size, &mut data.val_crop_size] {
        let whole = frame.cut(*side);
        let cut = whole.height.min(whole.width) / SHRINK;
        *side = cut / LINE_BYTES * LINE_BYTES;
        if *side < SMALLEST_SIDE {
            return None;
        }
        factors.push((whole.height * whole.width) as f64 / (*side * *side) as f64);
    }
    smaller.with_section(|section: &mut DeblurConfig| *section = data);
    Some((smaller, factors[0].max(factors[1])))
}

/// Sizes of one frame and its planes.
#[derive(Clone, Debug, PartialEq)]
struct Frame {
    height: usize,
    width: usize,
    planes: usize,
    spike_height: usize,
    spike_width: usize,
}

impl Frame {
    fn of(data: &DeblurConfig, seen: &Seen) -> Self {
        let (spike_height, spike_width) = (data.spike_h, data.spike_w);
        let (height, width) = match (seen.height, seen.width) {
            (0, _) | (_, 0) => (spike_height.saturating_mul(USUAL_SCALE), spike_width.saturating_mul(USUAL_SCALE)),
            found => found,
        };
        let spikes = (spike_height as u64).saturating_mul(spike_width as u64).max(1);
        let bytes = match data.spike_encoding {
            SpikeEncoding::Auto => seen.spikes_are_bytes,
            encoding => encoding == SpikeEncoding::Bytes,
        };
        let planes = match seen.spike_file_bytes {
            0 => USUAL_PLANES,
            size if bytes => (size / spikes) as usize,
            size => (size.saturating_mul(8) / spikes) as usize,
        };
        Self { height, width, planes, spike_height, spike_width }
    }

    /// A square of `side` pixels of it, spikes in proportion and rounded up; 0: all.
    fn cut(&self, side: usize) -> Self {
        if side == 0 {
            return self.clone();
        }
        let (height, width) = (side.min(self.height), side.min(self.width));
        let part = |whole: usize, cut: usize, of: usize| whole.saturating_mul(cut).div_ceil(of.max(1));
        Self {
            height,
            width,
            planes: self.planes,
            spike_height: part(self.spike_height, height, self.height),
            spike_width: part(self.spike_width, width, self.width),
        }
    }

    /// Blurred, sharp, and spikes or voxels of a clip.
    fn fields(&self, config: &Config) -> Vec<FieldSpec> {
        let data = &config.section::<DeblurConfig>();
        let image = |name| FieldSpec::new(name, &[data.clip_len, self.height, self.width, 3], Dtype::U8);
        let mut fields = vec![image("blur"), image("sharp")];
        if !data.vrt.use_spike {
            return fields;
        }
        fields.push(if data.use_precomputed_voxels {
            let shape = vec![data.clip_len, data.voxel_bins, self.height, self.width];
            FieldSpec::new("voxels", &shape, Dtype::F32)
        } else {
            let shape = vec![data.clip_len, self.planes, self.spike_height, self.spike_width.div_ceil(8)];
            FieldSpec::new("spikes", &shape, Dtype::U8)
        });
        fields
    }

    /// Bytes of one frame's entries in the page cache.
    fn entry_bytes(&self, config: &Config) -> Option<u64> {
        let entry = |field: &FieldSpec| {
            // One frame of the clip.
            let element = field.dtype.bytes();
            let bytes = field.shape[1..].iter().try_fold(element, |n, factor| n.checked_mul(*factor))?;
            bytes.checked_next_multiple_of(LINE_BYTES)
        };
        self.fields(config).iter().try_fold(0u64, |sum, field| sum.checked_add(entry(field)? as u64))
    }

    /// As the guide's data set holds a frame: two pictures and `bins` voxels per pixel, all f32.
    fn tensor_bytes(&self, bins: usize) -> Option<u64> {
        let per_pixel = (bins as u64).checked_add(6)?.checked_mul(4)?;
        (self.height as u64).checked_mul(self.width as u64)?.checked_mul(per_pixel)
    }

    /// Sizes of a data set of `count` frames.
    fn sizes(&self, config: &Config, count: u64) -> Option<DataSizes> {
        let entries = self.entry_bytes(config)?;
        Some(DataSizes {
            // Two pictures and the spikes of a frame are entries of their own.
            entry_bytes: [entries / 3; 2],
            // A file as read, and its picture or planes as decoded.
            scratch_bytes: entries.max(SCRATCH_BYTES),
            chunk_bytes: None,
            // Whole pages, so that all of it fits a cache of this size.
            useful_bytes: count.checked_mul(entries)?,
            useful: format!("{} frames × {} B of entries", grouped(count), grouped(entries)),
            useful_is_exact: true,
            auto_policy: auto_policy(config),
            facts: self.facts(config, count, entries)?,
        })
    }

    /// The guide's arithmetic for this data set.
    fn facts(&self, config: &Config, count: u64, entries: u64) -> Option<Vec<String>> {
        let data = &config.section::<DeblurConfig>();
        let tensors = self.tensor_bytes(data.voxel_bins)?;
        let (all_tensors, all_entries) = (tensors.checked_mul(count)?, entries.checked_mul(count)?);
        let ratio = tensors as f64 / entries.max(1) as f64;
        let spikes = match data.vrt.use_spike {
            false => String::new(),
            true if data.use_precomputed_voxels => format!(", {} voxels per pixel from files", data.voxel_bins),
            true => format!(", {} spike planes of {}×{}", self.planes, self.spike_height, self.spike_width),
        };
        let mut facts = vec![
            format!("{} frames of {}×{}{spikes}", grouped(count), self.height, self.width),
            format!("as f32 tensors {} per frame, {} in all", bytes_text(tensors), bytes_text(all_tensors)),
            format!("as cached {} per frame (1/{ratio:.1}), {} in all", bytes_text(entries), bytes_text(all_entries)),
        ];
        let kept = all_tensors.checked_mul(GUIDE_WORKERS)?;
        let mut guide =
            format!("{GUIDE_WORKERS} worker processes that keep all tensors would hold {}", bytes_text(kept));
        if let Some(gb) = config.data.cache_size_gb {
            let each = ((gb * f64::from(1 << 30)) as u64).min(all_tensors);
            let bounded = each.checked_mul(GUIDE_WORKERS)?;
            guide += &format!(", with {gb} GiB each {}", bytes_text(bounded));
        }
        facts.push(guide + "; here the node holds one page cache");
        Some(facts)
    }
}

/// Clips that overlap share frames: an entry serves up to `clip_len` clips of an epoch, so what is needed again soonest is
/// worth more than the rest. Where each frame has one clip, all entries are read once, and what stays is as good as what
/// goes.
fn auto_policy(config: &Config) -> CacheMode {
    if config.data.stride < config.section::<DeblurConfig>().clip_len { CacheMode::NextUse } else { CacheMode::Pin }
}

/// Thousands apart: `282,996`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let comma = |i: usize| i > 0 && (digits.len() - i).is_multiple_of(3);
    digits.char_indices().flat_map(|(i, digit)| comma(i).then_some(',').into_iter().chain([digit])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_of_the_guide_is_compact_by_the_factor_promised() {
        let config = spec::task::config("deblur");
        let seen = Seen { images: 4444, height: 720, width: 1280, ..Seen::default() };
        let frame = Frame::of(&config.section(), &seen);
        let (tensors, entries) = (frame.tensor_bytes(32).unwrap(), frame.entry_bytes(&config).unwrap());
        assert_eq!(tensors, 140_083_200);
        assert_eq!(entries, 2 * 720 * 1280 * 3 + 66 * 360 * 80);
        assert!(tensors >= 15 * entries, "{tensors} {entries}");
    }

    #[test]
    fn clips_that_overlap_want_a_policy_that_looks_ahead() {
        let mut config = spec::task::config("deblur");
        use CacheMode::{NextUse, Pin};
        for (clip_len, stride, policy) in [(5, 1, NextUse), (5, 4, NextUse), (5, 5, Pin), (1, 1, Pin)] {
            config.with_section(|deblur: &mut DeblurConfig| deblur.clip_len = clip_len);
            config.data.stride = stride;
            assert_eq!(auto_policy(&config), policy, "{clip_len} {stride}");
        }
    }

    #[test]
    fn planes_come_from_the_file_and_its_encoding() {
        let mut data = DeblurConfig { spike_h: 48, spike_w: 64, ..DeblurConfig::default() };
        let mut seen = Seen { spike_file_bytes: 66 * 48 * 64 / 8, ..Seen::default() };
        assert_eq!(Frame::of(&data, &seen).planes, 66);
        seen = Seen { spike_file_bytes: 66 * 48 * 64, spikes_are_bytes: true, ..seen };
        assert_eq!(Frame::of(&data, &seen).planes, 66);
        data.spike_encoding = SpikeEncoding::Packed;
        assert_eq!(Frame::of(&data, &seen).planes, 8 * 66);
        let frame = Frame { height: 96, width: 128, ..Frame::of(&data, &seen) };
        let cut = frame.cut(64);
        assert_eq!((cut.height, cut.width, cut.spike_height, cut.spike_width), (64, 64, 32, 32));
        assert_eq!(frame.cut(0), frame);
    }

    #[test]
    fn frames_are_counted_and_one_header_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        png.extend([1280u32.to_be_bytes(), 720u32.to_be_bytes()].concat());
        write("0.png", &png);
        write("1.PNG", &png);
        write("a.dat", &[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        write("b.dat", &[0, 200]);
        let seen = Seen::below(folder.path());
        assert_eq!((seen.images, seen.height, seen.width), (2, 720, 1280));
        assert_eq!((seen.spike_file_bytes, seen.spikes_are_bytes), (10, true));
        write("b.dat", &[0, 200, 1, 3].repeat(9));
        assert!(!Seen::below(folder.path()).spikes_are_bytes);
        write("0.png", b"\x89PNG");
        std::fs::remove_file(folder.path().join("1.PNG")).unwrap();
        let broken = Seen::below(folder.path());
        assert_eq!((broken.images, broken.height, broken.width), (1, 0, 0));
        assert_eq!(Seen::below(Path::new("no/such/folder")), Seen::default());
    }

    #[test]
    fn clips_shrink_to_whole_windows_and_say_by_how_much() {
        let mut config = spec::task::config("deblur");
        config.data.dataset_path = "no/such/folder".into();
        config.with_section(|deblur: &mut DeblurConfig| (deblur.crop_size, deblur.val_crop_size) = (256, 256));
        let sides = |config: &Config| {
            let deblur: DeblurConfig = config.section();
            (deblur.crop_size, deblur.val_crop_size)
        };
        let (half, factor) = shrunk(&config).unwrap();
        assert_eq!((sides(&half), factor), ((128, 128), 4.0));
        let (quarter, factor) = shrunk(&half).unwrap();
        assert_eq!((sides(&quarter).0, factor), (64, 4.0));
        assert_eq!(shrunk(&quarter), None);
    }

    #[test]
    fn shapes_are_those_of_the_open_data_set() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = spec::task::config("deblur");
        config.data.dataset_path = folder.path().join("clips");
        config.with_section(|data: &mut DeblurConfig| {
            (data.spike_h, data.spike_w, data.crop_size, data.val_crop_size, data.clip_len) = (48, 64, 48, 0, 3);
        });
        let request = crate::task::SampleRequest {
            task: "deblur".into(),
            out: config.data.dataset_path.clone(),
            seed: 1,
            layout: None,
            sessions: Some(1),
            seconds: None,
            cells: None,
            genes: None,
        };
        super::super::sample::sample_data(&request).unwrap();
        let open = crate::task::Task::open(&super::super::Deblur, &config, &crate::task::Team::alone(), folder.path());
        let (open, outline) = (open.unwrap(), outline(&config).unwrap());
        assert_eq!(outline.datasets.train.fields(), open.train.fields());
        assert_eq!(outline.datasets.val.fields(), open.val.fields());
    }
}
