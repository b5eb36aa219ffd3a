//! Keys of the section `deblur`.

use crate::config::Range::{Above, AtLeast, Folder, Share, Within};
use crate::config::{choices, keys};
use std::path::PathBuf;

/// Longest clip and most bins: beyond lies a slip of the pen.
pub(super) const MOST: f64 = 1024.0;
/// Longest side of a frame, a crop or a camera, and most channels.
pub(super) const MOST_WIDE: f64 = 65_536.0;

keys! {
    /// Task `deblur`: clips of blurred and sharp frames with the spike camera's stream.
    #[serde(default, deny_unknown_fields)]
    pub struct DeblurConfig in "deblur.", earlier "data.deblur." {
        /// How sequences lie below `data.dataset_path`.
        layout: ClipLayout = ClipLayout::Auto;
        /// Folder of the training sequences.
        train_split: String = "train".into(), range = Folder, aliases = &["data.train_split"];
        /// Folder of the validation sequences.
        val_split: String = "val".into(), range = Folder, aliases = &["data.val_split"];
        /// Folder of the test sequences.
        test_split: String = "test".into(), range = Folder;
        /// Endings of frame files, with the dot.
        image_exts: Vec<String> = vec![".png".into()], aliases = &["data.image_exts"];
        /// Consecutive frames of a clip.
        clip_len: usize = 5, range = Within(1.0, MOST), unit = "frames", aliases = &["data.clip_len"];
        /// Side of the random square cut from a training clip. 0: whole frames.
        crop_size: usize = 256, range = Within(0.0, MOST_WIDE), unit = "pixels", aliases = &["data.crop_size"];
        /// Side of the square cut from the middle of a validation clip. 0: whole frames.
        val_crop_size: usize = 0, range = Within(0.0, MOST_WIDE), unit = "pixels";
        /// Frames between the clips of `launch predict`. A frame that several clips have is taken from the one in whose middle
        /// it is. Null: clips do not overlap.
        predict_stride: Option<usize> = None, range = AtLeast(1.0), unit = "frames";
        /// Side of the squares in which `launch predict` restores a frame, with overlaps of a quarter: memory does not grow with
        /// the frame. 0: whole frames.
        predict_tile: usize = 0, range = Within(0.0, MOST_WIDE), unit = "pixels";
        /// Folder of `.dat` files in each sequence.
        spike_dir: String = "spike".into(), range = Folder, aliases = &["data.spike_dir"];
        /// Rows of the spike camera.
        spike_h: usize = 360, range = Within(1.0, MOST_WIDE), unit = "pixels", aliases = &["data.spike_h"];
        /// Columns of the spike camera.
        spike_w: usize = 640, range = Within(1.0, MOST_WIDE), unit = "pixels", aliases = &["data.spike_w"];
        /// How a `.dat` file holds its spikes.
        spike_encoding: SpikeEncoding = SpikeEncoding::Auto;
        /// Time bins that a frame's spike planes are summed into.
        voxel_bins: usize = 32, range = Within(1.0, MOST), aliases = &["data.k", "data.num_voxel_bins"];
        /// Counts become `ln(1 + count)`.
        log1p: bool = true;
        /// Mean that voxels are normalised with: `(x - mean) / std`.
        norm_mean: f64 = 0.0, aliases = &["data.norm.mean"];
        /// Standard deviation that voxels are normalised with.
        norm_std: f64 = 1.0, range = Above(0.0), aliases = &["data.norm.std"];
        /// Read `.npy` voxels from `voxel_dir` instead of spikes.
        use_precomputed_voxels: bool = false, aliases = &["data.use_precomputed_voxels"];
        /// Folder of `.npy` voxels in each sequence.
        voxel_dir: String = "spike_vox".into(), range = Folder, aliases = &["data.voxel_cache_dirname"];
    }
    sections {
        vrt: VrtModel;
        loss: LossConfig;
    }
    inert {
        "data.align_log_paths" => "spikes and frames are paired by file name";
        "model.vrt_cfg" => "the sizes are keys of deblur.vrt";
        "model.channels_per_scale" => "the spike branch has the channels of deblur.vrt.dims";
        "model.layers" => "the spike branch has the U-net's four scales";
        "model.img_size_h" => "any frame size is taken";
        "model.img_size_w" => "any frame size is taken";
        "model.spike_tsa.adaptive_chunk" => TILES;
        "model.spike_tsa.chunk_shape" => TILES;
        "model.fuse.type" => "cross-attention over time is the one fusion there is";
        "model.fuse.adaptive_chunk" => TILES;
        "model.fuse.chunk_shape" => TILES;
    }
}

const TILES: &str = "tiles are square, of deblur.vrt.chunk_size and deblur.vrt.max_batch_tokens";

choices! {
    /// How sequences lie on disk.
    pub enum ClipLayout {
        /// As the folders show.
        Auto = "auto",
        /// `<split>/<sequence>/{blur,sharp,spike}`.
        Gopro = "gopro",
        /// `train_GT`, `train_GT_blurred` and a meta_info file.
        Kair = "kair",
    }
}

choices! {
    /// How a `.dat` file holds its spikes.
    pub enum SpikeEncoding {
        /// As the files' sizes show.
        Auto = "auto",
        /// One bit per spike, lowest bit first.
        Packed = "packed",
        /// One byte, 0 or 1, per spike.
        Bytes = "bytes",
    }
}

keys! {
    /// Video restoration transformer with a spike branch. The defaults are the guide's baseline: 23.7 million parameters.
    #[serde(default, deny_unknown_fields)]
    pub struct VrtModel in "deblur.vrt.", earlier "model.vrt." {
        /// Channels of the seven U-net stages and of stage 8.
        dims: Vec<usize> = vec![96; 8], range = Within(0.0, MOST_WIDE);
        /// Blocks of the seven U-net stages, then of each group of stage 8.
        depths: Vec<usize> = vec![8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4], range = Within(1.0, 64.0);
        /// Heads of the attention in blocks.
        heads: usize = 6, range = AtLeast(1.0);
        /// Attention window: frames, rows, columns.
        window: Vec<usize> = vec![5, 8, 8], aliases = &["model.window_size"];
        /// Groups of the deformable convolution.
        deform_groups: usize = 16, range = AtLeast(1.0);
        /// Groups, counted over `depths`, that attend within single frames.
        independent_groups: Vec<usize> = vec![11, 12];
        /// Source of the optical flow that neighbours are warped by.
        flow: FlowKind = FlowKind::SpyNet;
        /// Warp neighbours by deformable convolution. False: by flow alone.
        deformable: bool = true;
        /// Share of residual branches that are left out in training.
        drop_path: f64 = 0.2, range = Share;
        /// Fuse the spike stream. False: frames only.
        use_spike: bool = true, aliases = &["model.use_spike"];
        /// Heads of the spikes' attention over time.
        tsa_heads: usize = 4, range = AtLeast(1.0), aliases = &["model.spike_tsa.heads"];
        /// Heads of the cross-attention from frames to spikes.
        fuse_heads: usize = 4, range = AtLeast(1.0), aliases = &["model.fuse.heads"];
        /// Most pixels that spike attention takes at a time.
        max_batch_tokens: usize = 49_152, range = AtLeast(1.0), unit = "pixels",
            aliases = &["model.spike_tsa.max_batch_tokens", "model.fuse.max_batch_tokens"];
        /// Side of a tile of spike attention.
        chunk_size: usize = 64, range = AtLeast(1.0), unit = "pixels",
            aliases = &["model.spike_tsa.chunk_size", "model.fuse.chunk_size"];
        /// Recompute attention in the backward pass instead of keeping its activations.
        checkpoint_attn: bool = true, aliases = &["model.vrt.use_checkpoint_attn"];
        /// The same for the feed-forward parts.
        checkpoint_ffn: bool = true, aliases = &["model.vrt.use_checkpoint_ffn"];
    }
}

choices! {
    /// Source of the optical flow that neighbours are warped by.
    pub enum FlowKind {
        /// No flow.
        Zero = "zero",
        /// SpyNet, trained from scratch with the rest.
        SpyNet = "spynet",
    }
}

keys! {
    /// Terms of the loss beside `train.loss_type`, and measures that need a file.
    #[serde(default, deny_unknown_fields)]
    pub struct LossConfig in "deblur.loss.", earlier "train." {
        /// `charbonnier`: where the loss turns from square to absolute, in units of the prediction.
        charbonnier_delta: f64 = 1e-3, range = Above(0.0), aliases = &["loss.charbonnier.delta"];
        /// Weight of the perceptual term; needs `perceptual_file`.
        perceptual_weight: f64 = 0.0, range = AtLeast(0.0), aliases = &["loss.vgg_perceptual.weight"];
        /// Safetensors file with VGG16's convolutions, torchvision's names. Null: no perceptual term.
        perceptual_file: Option<PathBuf> = None;
        /// Safetensors file with all of VGG16's convolutions and the five layers of LPIPS. Null: LPIPS is not measured.
        lpips_file: Option<PathBuf> = None;
    }
    inert {
        "loss.charbonnier.weight" => "this term has weight 1, see deblur.loss.perceptual_weight";
        "loss.vgg_perceptual.layers" => "the features are those of relu3_3";
    }
}

choices! {
    /// `train.loss_type` of this task.
    pub enum DeblurLoss {
        /// Mean of `sqrt(e² + delta²)`.
        Charbonnier = "charbonnier",
        Mse = "mse",
        Mae = "mae",
    }
}
