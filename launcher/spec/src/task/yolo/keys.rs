//! Keys of the section `yolo`. Other names are those of the YOLO package's arguments.

use crate::config::Range::{AtLeast, Filled, Share, Within};
use crate::config::{choices, keys};

/// Longest side of an image as the model sees it: beyond lies a slip of the pen.
const MOST_SIDE: f64 = 8192.0;
/// Most images of a mosaic's window, and most boxes of an image.
const MOST: f64 = 1_000_000.0;

keys! {
    /// Task `yolo`: objects in images. `data.dataset_path` is a `data.yaml`, a COCO or labelme folder.
    #[serde(default, deny_unknown_fields)]
    pub struct YoloConfig in "yolo." {
        /// The model: `yolov8n`, `yolov8s`, `yolov8m`, `yolov8l` or `yolov8x`.
        model: String = "yolov8n".into(), range = Filled, aliases = &["model"];
        /// Factor of the model's numbers of blocks. Null: the model's own.
        depth: Option<f64> = None, range = Within(0.01, 16.0);
        /// Factor of the model's channels. Null: the model's own.
        width: Option<f64> = None, range = Within(0.01, 16.0);
        /// Most channels before `width`. Null: the model's own.
        max_channels: Option<usize> = None, range = Within(8.0, 65_536.0);
        /// Side of the square that training images are brought to, and longest side in validation. A multiple of 32.
        imgsz: usize = 640, range = Within(32.0, MOST_SIDE), unit = "pixels", aliases = &["imgsz", "img_size", "train.img_size"];
        /// Images of a step: batches of all ranks are accumulated up to it, where `train.gradient_accumulation_steps` is 1, and
        /// `train.weight_decay` is meant for so many. 0: those of a batch.
        nbs: usize = 64, unit = "images", aliases = &["nbs"];
        /// Learning rate of biases at the beginning of the warm-up.
        warmup_bias_lr: f64 = 0.1, range = AtLeast(0.0), aliases = &["warmup_bias_lr"];
        /// Last epochs without mosaic and mixup.
        close_mosaic: usize = 10, unit = "epochs", aliases = &["close_mosaic"];
        /// All objects are of one class.
        single_cls: bool = false, aliases = &["single_cls"];
        /// Validate batches of similar shapes in rectangles. False: in squares.
        rect: bool = true;
        /// Images of a rectangle's batch, by which shapes are chosen. Null: 2 × `train.batch_size`.
        rect_batch: Option<usize> = None, range = Within(1.0, MOST), unit = "images";
        /// Content of the page cache.
        cache: ImageCache = ImageCache::Auto, aliases = &["cache", "train.cache"];
        /// JPEG images far larger than `imgsz` are decoded at 1/2, 1/4 or 1/8 of their size.
        dct_scaling: DctScaling = DctScaling::Train;
        /// Images before an image in an epoch's order that its mosaic takes others from. 0: all images.
        mosaic_window: usize = 128, range = Within(0.0, MOST), unit = "images";
        /// Epochs between checkpoints that are kept for good, `epochN`. 0 or -1: none.
        save_period: f64 = -1.0, range = Within(-1.0, MOST), unit = "epochs", aliases = &["save_period", "train.save_period"];
        /// Share of the training images in use.
        fraction: f64 = 1.0, range = Within(0.0, 1.0), aliases = &["fraction"];
    }
    sections {
        loss: YoloLoss;
        augment: YoloAugment;
        nms: YoloNms;
    }
    inert {
        "cos_lr" => "train.scheduler: cosine does this";
        "mode" => "the subcommand of launch says what to do";
        "exist_ok" => "a run's folder is never overwritten; launch --resume continues one";
        "pretrained" => "train.init_from names a file with initial weights";
        "verbose" => "lines are always printed; log.log_every says how often";
        "deterministic" => "batches and draws are always a function of the seed";
        "rect" => "training images are squares; yolo.rect is about validation";
        "resume" => "launch --resume continues a run";
        "multi_scale" => "training images have one size, yolo.imgsz";
        "freeze" => "all parameters are trained";
        "overlap_mask" => NO_MASKS;
        "mask_ratio" => NO_MASKS;
        "val" => "validation is at the end of every epoch";
        "split" => "launch evaluate --split chooses a split";
        "save" => "checkpoints are always kept; log.save_every says how often";
        "save_json" => "launch predict writes JSON";
        "half" => "train.amp says in which precision passes run";
        "dnn" => "models are run by libtorch alone";
        "copy_paste" => NO_MASKS;
        "copy_paste_mode" => NO_MASKS;
        "auto_augment" => CLASSIFICATION;
        "erasing" => CLASSIFICATION;
        "crop_fraction" => CLASSIFICATION;
        "pose" => "this is detection: there are no key points";
        "kobj" => "this is detection: there are no key points";
        "cutmix" => "mixup and mosaic mix images";
        "time" => "train.num_epochs and train.max_steps end a run";
        "compile" => "there is no graph compiler to switch on";
    }
}

const NO_MASKS: &str = "this is detection: masks are read as boxes";
const CLASSIFICATION: &str = "this is detection, and it is a setting of classification";

choices! {
    /// Content of the page cache.
    pub enum ImageCache {
        /// Resized images where memory holds them all, else files as they are.
        Auto = "auto",
        /// Files as they are: decoded whenever they are needed.
        Encoded = "encoded",
        /// Decoded images, their longest side brought to `imgsz`.
        Resized = "resized",
        /// The package's word for `resized`.
        Ram = "ram",
        /// The package's word for decoded files on disk; here it is `encoded`.
        Disk = "disk",
        /// Nothing.
        Off = "off",
    }
}

choices! {
    /// Where JPEG images are decoded at a part of their size.
    pub enum DctScaling {
        /// In training. Validation sees the pixels that other programs see.
        Train = "train",
        Always = "always",
        Never = "never",
    }
}

keys! {
    /// Gains of the loss's three terms.
    #[serde(default, deny_unknown_fields)]
    pub struct YoloLoss in "yolo.loss." {
        /// Gain of the boxes' overlap.
        boxes: f64 = 7.5, range = AtLeast(0.0), aliases = &["box"];
        /// Gain of the classes.
        cls: f64 = 0.5, range = AtLeast(0.0), aliases = &["cls"];
        /// Gain of the distribution of the boxes' sides.
        dfl: f64 = 1.5, range = AtLeast(0.0), aliases = &["dfl"];
        /// Anchors per object that the assigner takes.
        topk: usize = 10, range = Within(1.0, 1000.0);
    }
}

keys! {
    /// Augmentation of training images.
    #[serde(default, deny_unknown_fields)]
    pub struct YoloAugment in "yolo.augment." {
        /// Share of images that are made a mosaic of four.
        mosaic: f64 = 1.0, range = Within(0.0, 1.0), aliases = &["mosaic"];
        /// Share of images that are mixed with another.
        mixup: f64 = 0.0, range = Within(0.0, 1.0), aliases = &["mixup"];
        /// Change of the hue, as a share of the circle.
        hsv_h: f64 = 0.015, range = Within(0.0, 1.0), aliases = &["hsv_h"];
        /// Change of the saturation, as a share.
        hsv_s: f64 = 0.7, range = Within(0.0, 1.0), aliases = &["hsv_s"];
        /// Change of the brightness, as a share.
        hsv_v: f64 = 0.4, range = Within(0.0, 1.0), aliases = &["hsv_v"];
        /// Rotation.
        degrees: f64 = 0.0, range = Within(0.0, 180.0), unit = "degrees", aliases = &["degrees"];
        /// Shift, as a share of the side.
        translate: f64 = 0.1, range = Within(0.0, 1.0), aliases = &["translate"];
        /// Change of the scale, as a share.
        scale: f64 = 0.5, range = Share, aliases = &["scale"];
        /// Shear.
        shear: f64 = 0.0, range = Within(0.0, 89.0), unit = "degrees", aliases = &["shear"];
        /// Perspective, per pixel.
        perspective: f64 = 0.0, range = Within(0.0, 0.001), aliases = &["perspective"];
        /// Share of images turned upside down.
        flipud: f64 = 0.0, range = Within(0.0, 1.0), aliases = &["flipud"];
        /// Share of images that are mirrored.
        fliplr: f64 = 0.5, range = Within(0.0, 1.0), aliases = &["fliplr"];
        /// Share of images whose colours change places, red with blue.
        bgr: f64 = 0.0, range = Within(0.0, 1.0), aliases = &["bgr"];
    }
}

keys! {
    /// Non-maximum suppression.
    #[serde(default, deny_unknown_fields)]
    pub struct YoloNms in "yolo.nms." {
        /// Least confidence in validation.
        conf: f64 = 0.001, range = Share;
        /// Least confidence in predictions.
        predict_conf: f64 = 0.25, range = Share, aliases = &["conf"];
        /// Overlap from which on boxes of a class are one.
        iou: f64 = 0.7, range = Within(0.0, 1.0), aliases = &["iou"];
        /// Most boxes of an image.
        max_det: usize = 300, range = Within(1.0, MOST), aliases = &["max_det"];
        /// Most boxes of an image that are compared.
        candidates: usize = 30_000, range = Within(1.0, MOST);
        /// Boxes suppress those of other classes.
        agnostic: bool = false, aliases = &["agnostic_nms"];
    }
}
