//! Sizes of images as the model sees them: the longest side is `imgsz`; in validation, padding up to a rectangle that the
//! images of a batch share.

use super::batch::{STRIDE, Shape};
use crate::data::source::video::image::ImageSize;

/// Value of pixels beyond an image.
pub const BORDER: u8 = 114;

/// Size at which the longest side is `imgsz`, up or down; the other is rounded up.
pub fn fitted(size: ImageSize, imgsz: usize) -> ImageSize {
    let ratio = imgsz as f64 / size.height.max(size.width).max(1) as f64;
    if ratio == 1.0 {
        return size;
    }
    let side = |side: usize| ((side as f64 * ratio).ceil() as usize).clamp(1, imgsz);
    ImageSize { height: side(size.height), width: side(size.width) }
}

/// Order of images by shape, and the shape of each in that order. Images of `batch` neighbours share one.
pub fn rectangles(sizes: &[ImageSize], imgsz: usize, batch: usize) -> (Vec<usize>, Vec<Shape>) {
    let ratio = |n: usize| sizes[n].height as f64 / sizes[n].width as f64;
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|a, b| ratio(*a).total_cmp(&ratio(*b)));
    let mut shapes = Vec::with_capacity(order.len());
    for group in order.chunks(batch.max(1)) {
        let (least, most) = (ratio(group[0]), group.last().map_or(1.0, |last| ratio(*last)));
        let (height, width) = match (least, most) {
            (_, most) if most < 1.0 => (most, 1.0),
            (least, _) if least > 1.0 => (1.0, 1.0 / least),
            _ => (1.0, 1.0),
        };
        // Half a stride more, as the package pads.
        let side = |share: f64| (share * imgsz as f64 / STRIDE as f64 + 0.5).ceil() as usize * STRIDE;
        let canvas = ImageSize { height: side(height), width: side(width) };
        shapes.extend(group.iter().map(|n| padded(sizes[*n], imgsz, canvas)));
    }
    (order, shapes)
}

/// Images in their order, each padded to a square.
pub fn squares(sizes: &[ImageSize], imgsz: usize) -> (Vec<usize>, Vec<Shape>) {
    let canvas = ImageSize { height: imgsz, width: imgsz };
    ((0..sizes.len()).collect(), sizes.iter().map(|size| padded(*size, imgsz, canvas)).collect())
}

/// Half of the padding, rounded down, lies left and above.
fn padded(size: ImageSize, imgsz: usize, canvas: ImageSize) -> Shape {
    let inner = fitted(size, imgsz);
    Shape {
        height: canvas.height,
        width: canvas.width,
        original_height: size.height,
        original_width: size.width,
        left: (canvas.width - inner.width.min(canvas.width)) / 2,
        top: (canvas.height - inner.height.min(canvas.height)) / 2,
    }
}

/// Writes an image `[h, w, 3]` into planes `[3, H, W]`, with its border.
pub fn pad(image: &[u8], inner: ImageSize, shape: &Shape, out: &mut [u8]) {
    out.fill(BORDER);
    let area = shape.height * shape.width;
    for (plane, out) in out.chunks_exact_mut(area).enumerate() {
        let rows = image.chunks_exact(3 * inner.width).zip(out.chunks_exact_mut(shape.width).skip(shape.top));
        for (row, out) in rows {
            let pixels = row.iter().skip(plane).step_by(3);
            out[shape.left..].iter_mut().zip(pixels).for_each(|(out, pixel)| *out = *pixel);
        }
    }
}

/// A box of the image as one of the padded canvas.
pub fn moved(row: [f32; 5], inner: ImageSize, shape: &Shape) -> [f32; 5] {
    let [class, x, y, w, h] = row;
    let (width, height) = (shape.width as f32, shape.height as f32);
    let (inner_width, inner_height) = (inner.width as f32, inner.height as f32);
    [
        class,
        (x * inner_width + shape.left as f32) / width,
        (y * inner_height + shape.top as f32) / height,
        w * inner_width / width,
        h * inner_height / height,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> ImageSize {
        ImageSize { height, width }
    }

    #[test]
    fn the_longest_side_is_fitted_up_or_down() {
        for (from, to) in [
            (size(160, 160), size(160, 160)),
            (size(80, 160), size(80, 160)),
            (size(100, 300), size(54, 160)),
            (size(30, 20), size(160, 107)),
            (size(1, 1000), size(1, 160)),
        ] {
            assert_eq!(fitted(from, 160), to);
        }
    }

    /// Shapes as the package chooses them.
    #[test]
    fn batches_share_a_rectangle() {
        let square = [size(160, 160)];
        assert_eq!((rectangles(&square, 160, 4).1[0].height, rectangles(&square, 640, 4).1[0].width), (192, 672));
        // Wide, wide, tall, tall; batches of two.
        let sizes = [size(200, 100), size(50, 100), size(300, 100), size(25, 100)];
        let (order, shapes) = rectangles(&sizes, 160, 2);
        assert_eq!(order, [3, 1, 0, 2]);
        let canvases: Vec<_> = shapes.iter().map(|shape| (shape.height, shape.width)).collect();
        // ceil(0.5 · 160 / 32 + 0.5) · 32 = 96.
        assert_eq!(canvases, [(96, 192), (96, 192), (192, 96), (192, 96)]);
        assert_eq!((shapes[1].top, shapes[1].left), (8, 16));
        assert_eq!((shapes[0].top, shapes[0].left), (28, 16));
        let (_, mixed) = rectangles(&sizes, 160, 4);
        assert!(mixed.iter().all(|shape| (shape.height, shape.width) == (192, 192)));
        let (order, shapes) = squares(&sizes, 160);
        assert_eq!((order, shapes[1].height, shapes[1].top), (vec![0, 1, 2, 3], 160, 40));
    }

    #[test]
    fn borders_are_grey_and_boxes_move_along() {
        let shape = Shape { height: 3, width: 4, left: 1, top: 1, ..Shape::default() };
        let mut out = vec![0; 36];
        pad(&[1, 2, 3, 4, 5, 6], size(1, 2), &shape, &mut out);
        let expected = |a: u8, b: u8| [[114; 4].as_slice(), &[114, a, b, 114], &[114; 4]].concat();
        assert_eq!(out, [expected(1, 4), expected(2, 5), expected(3, 6)].concat());
        assert_eq!(moved([7.0, 0.5, 0.5, 1.0, 1.0], size(1, 2), &shape), [7.0, 0.5, 0.5, 0.5, 1.0 / 3.0]);
    }
}
