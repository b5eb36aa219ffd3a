//! Checks of values together.

use super::{ModelSize, YoloConfig};
use crate::config::{Config, Verdict};

/// Coarsest stride of the model: images are multiples of it.
const STRIDE: usize = 32;

pub(super) fn check(config: &Config, v: &mut Verdict) {
    let yolo: YoloConfig = config.section();
    v.need(ModelSize::named(&yolo.model).is_some(), || {
        format!(
            "yolo.model is {:?}; the models there are: yolov8n, yolov8s, yolov8m, yolov8l, yolov8x (other sizes by \
             yolo.depth, yolo.width and yolo.max_channels)",
            yolo.model
        )
    });
    v.warn(!yolo.model.ends_with(".pt"), || {
        format!(
            "yolo.model is {:?}: its size is taken, not its weights; train.init_from takes them from a .safetensors file",
            yolo.model
        )
    });
    v.need(yolo.imgsz.is_multiple_of(STRIDE), || {
        let (below, imgsz) = (yolo.imgsz / STRIDE * STRIDE, yolo.imgsz);
        format!("yolo.imgsz is {imgsz}; it must be a multiple of {STRIDE}, such as {}", below.max(STRIDE))
    });
    v.need(yolo.fraction > 0.0, || "yolo.fraction is 0; it leaves no image to train on".into());
    let mixes = yolo.augment.mosaic > 0.0 || yolo.augment.mixup > 0.0;
    v.warn(!mixes || yolo.close_mosaic < config.train.num_epochs, || {
        let (last, all) = (yolo.close_mosaic, config.train.num_epochs);
        format!("yolo.close_mosaic {last} ≥ train.num_epochs {all}: no epoch has a mosaic")
    });
    v.warn(yolo.nms.candidates >= yolo.nms.max_det, || {
        let (compared, kept) = (yolo.nms.candidates, yolo.nms.max_det);
        format!("yolo.nms.candidates {compared} < yolo.nms.max_det {kept}: no image gets more than {compared} boxes")
    });
}
