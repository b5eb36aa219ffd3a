//! One crop for all frames and modalities of a clip.
//!
//! Offsets and sizes are multiples of the smallest number of pixels that is a whole number of spikes, so that the spike
//! camera's part is exact: 2 for 720×1280 frames with 360×640 spikes.

use crate::data::DataError;
use crate::data::loader::mix;
use crate::data::source::video::image::ImageSize;

/// Where a crop lies: its first row and column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Corner {
    pub y: usize,
    pub x: usize,
}

/// How clips are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    image: ImageSize,
    spikes: Option<ImageSize>,
    size: ImageSize,
    /// Smallest step of a row and a column, pixels.
    step: ImageSize,
}

/// Pixels of the smallest step that is whole in spikes too.
fn step(pixels: usize, spikes: usize) -> usize {
    let (mut a, mut b) = (pixels, spikes);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    pixels / a.max(1)
}

impl Crop {
    /// Squares of `side` pixels; `None`: whole frames.
    ///
    /// # Errors
    /// The square is larger than the frame, or no whole number of spikes.
    pub fn new(image: ImageSize, spikes: Option<ImageSize>, side: Option<usize>) -> Result<Self, DataError> {
        let camera = spikes.unwrap_or(image);
        let step = ImageSize { height: step(image.height, camera.height), width: step(image.width, camera.width) };
        let Some(side) = side else {
            return Ok(Self { image, spikes, size: image, step });
        };
        let size = ImageSize { height: side, width: side };
        if side == 0 || side > image.height || side > image.width {
            let problem =
                format!("a crop of {size} pixels from frames of {image}: set deblur.crop_size so that it fits");
            return Err(DataError::setting("deblur.crop_size", problem));
        }
        if !side.is_multiple_of(step.height) || !side.is_multiple_of(step.width) {
            let problem = format!(
                "a crop of {size} pixels of frames of {image} with {camera} spikes: deblur.crop_size must be a multiple of {} \
                 rows and of {} columns, so that its spikes are whole",
                step.height, step.width
            );
            return Err(DataError::setting("deblur.crop_size", problem));
        }
        Ok(Self { image, spikes, size, step })
    }

    /// Rows and columns of what is cut from frames.
    pub fn size(&self) -> ImageSize {
        self.size
    }

    /// Crop of the spike planes. `None` means no spikes.
    pub fn spike_size(&self) -> Option<ImageSize> {
        self.spikes.map(|camera| ImageSize {
            height: self.size.height * camera.height / self.image.height,
            width: self.size.width * camera.width / self.image.width,
        })
    }

    /// The place in spike planes of a place in frames.
    pub fn spike_place(&self, place: Corner) -> Corner {
        let camera = self.spikes.unwrap_or(self.image);
        Corner { y: place.y * camera.height / self.image.height, x: place.x * camera.width / self.image.width }
    }

    /// A place drawn from (seed, epoch, clip), every one equally likely.
    pub fn random(&self, seed: u64, epoch: u64, clip: u64) -> Corner {
        let key = mix(mix(mix(seed ^ 0x4352_4f50).wrapping_add(epoch)).wrapping_add(clip));
        let draw = |key: u64, room: usize, step: usize| {
            let choices = (room / step) as u128 + 1;
            ((u128::from(mix(key)) * choices) >> 64) as usize * step
        };
        let (rows, columns) = (self.image.height - self.size.height, self.image.width - self.size.width);
        Corner { y: draw(key, rows, self.step.height), x: draw(key ^ u64::MAX, columns, self.step.width) }
    }

    /// The middle, rounded to a whole step.
    pub fn centre(&self) -> Corner {
        let (rows, columns) = (self.image.height - self.size.height, self.image.width - self.size.width);
        let middle = |room: usize, step: usize| room / 2 / step * step;
        Corner { y: middle(rows, self.step.height), x: middle(columns, self.step.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOPRO: ImageSize = ImageSize { height: 720, width: 1280 };
    const SPIKES: ImageSize = ImageSize { height: 360, width: 640 };

    #[test]
    fn places_are_inside_whole_in_spikes_and_a_function_of_seed_epoch_and_clip() {
        let crop = Crop::new(GOPRO, Some(SPIKES), Some(256)).unwrap();
        assert_eq!(crop.spike_size(), Some(ImageSize { height: 128, width: 128 }));
        let places: Vec<Corner> = (0..4000).map(|clip| crop.random(1, clip / 100, clip)).collect();
        for place in &places {
            assert!(place.y <= 720 - 256 && place.x <= 1280 - 256 && place.y % 2 == 0 && place.x % 2 == 0);
            assert_eq!(crop.spike_place(*place), Corner { y: place.y / 2, x: place.x / 2 });
        }
        let mean = places.iter().map(|place| place.x as f64).sum::<f64>() / 4000.0;
        assert!((mean - 512.0).abs() < 25.0, "{mean}");
        assert!(places.iter().any(|place| place.x == 0) && places.iter().any(|place| place.x == 1024));
        assert_eq!(crop.random(1, 2, 3), crop.random(1, 2, 3));
        assert_ne!(crop.random(1, 2, 3), crop.random(1, 3, 3));
        assert_eq!(crop.centre(), Corner { y: 232, x: 512 });
    }

    #[test]
    fn crops_that_do_not_fit_say_so() {
        let vidar = Some(ImageSize { height: 250, width: 400 });
        let whole = Crop::new(GOPRO, vidar, None).unwrap();
        assert_eq!((whole.random(1, 2, 3), whole.spike_size()), (Corner::default(), vidar));
        let error = Crop::new(GOPRO, vidar, Some(256)).unwrap_err().to_string();
        assert!(error.contains("multiple of 72 rows and of 16 columns"), "{error}");
        assert!(Crop::new(GOPRO, vidar, Some(144)).is_ok());
        assert!(Crop::new(GOPRO, None, Some(255)).is_ok());
        assert!(Crop::new(GOPRO, None, Some(721)).unwrap_err().to_string().contains("so that it fits"));
    }
}
