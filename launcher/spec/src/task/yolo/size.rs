//! Sizes of the model.

use super::YoloConfig;

/// Names, depth, width and most channels. Source: the published table of YOLOv8.
const SIZES: &[(&str, f64, f64, usize)] = &[
    ("n", 0.33, 0.25, 1024),
    ("s", 0.33, 0.5, 1024),
    ("m", 0.67, 0.75, 768),
    ("l", 1.0, 1.0, 512),
    ("x", 1.0, 1.25, 512),
];

/// Numbers of blocks and channels follow from these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelSize {
    /// A stage of n blocks has `max(round(n · depth), 1)`.
    pub depth: f64,
    /// A layer of c channels has `ceil(min(c, max_channels) · width / 8) · 8`.
    pub width: f64,
    pub max_channels: usize,
}

impl ModelSize {
    /// The size of a model called `yolov8n`, `yolov8n.yaml` or `n`.
    pub fn named(name: &str) -> Option<Self> {
        let stem = name.trim_end_matches(".yaml").trim_end_matches(".pt");
        let letter = stem.strip_prefix("yolov8").unwrap_or(stem);
        let (_, depth, width, max_channels) = *SIZES.iter().find(|(known, ..)| *known == letter)?;
        Some(Self { depth, width, max_channels })
    }

    /// Channels of a layer that has `channels` at width 1.
    pub fn channels(&self, channels: usize) -> usize {
        (channels.min(self.max_channels) as f64 * self.width / 8.0).ceil() as usize * 8
    }

    /// Blocks of a stage that has `blocks` at depth 1.
    pub fn blocks(&self, blocks: usize) -> usize {
        ((blocks as f64 * self.depth).round() as usize).max(1)
    }
}

impl YoloConfig {
    /// The size of the model; that of `yolov8n` for a name that the checks refuse.
    pub fn size(&self) -> ModelSize {
        let named = ModelSize::named(&self.model).unwrap_or(ModelSize { depth: 0.33, width: 0.25, max_channels: 1024 });
        ModelSize {
            depth: self.depth.unwrap_or(named.depth),
            width: self.width.unwrap_or(named.width),
            max_channels: self.max_channels.unwrap_or(named.max_channels),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_the_published_channels_and_blocks() {
        for (name, channels, blocks) in [
            ("yolov8n", [16, 32, 64, 128, 256], [1, 2]),
            ("yolov8s.yaml", [32, 64, 128, 256, 512], [1, 2]),
            ("m", [48, 96, 192, 384, 576], [2, 4]),
            ("yolov8l", [64, 128, 256, 512, 512], [3, 6]),
            ("yolov8x.pt", [80, 160, 320, 640, 640], [3, 6]),
        ] {
            let size = ModelSize::named(name).unwrap();
            assert_eq!([64, 128, 256, 512, 1024].map(|c| size.channels(c)), channels, "{name}");
            assert_eq!([3, 6].map(|n| size.blocks(n)), blocks, "{name}");
        }
        assert_eq!(ModelSize::named("yolov5n"), None);
        let own = YoloConfig { width: Some(0.125), ..YoloConfig::default() };
        assert_eq!((own.size().channels(64), own.size().depth), (8, 0.33));
    }
}
