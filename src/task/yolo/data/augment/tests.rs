use super::*;
use crate::task::sample::Random;

const SIDE: usize = 64;

fn size(height: usize, width: usize) -> ImageSize {
    ImageSize { height, width }
}

fn plain() -> View {
    View { mosaic: None, translate: [0.5; 2], scale: 1.0, angle: 0.0, shear: [0.0; 2], perspective: [0.0; 2] }
}

fn draws(flips: [bool; 2]) -> Draws {
    Draws { main: plain(), mixup: None, hsv: [0.0, 1.0, 1.0], flips, bgr: false }
}

/// Boxes of samples lie around the pixels that they lay around before: a bright block is found where its box says.
#[test]
fn boxes_follow_their_pixels_through_every_step() {
    let (mut random, mut seen) = (Random(5), 0);
    for round in 0..80 {
        let sizes = [size(64, 48), size(40, 64), size(64, 64), size(50, 64)];
        let mut all = Vec::new();
        for (n, of) in sizes.iter().enumerate() {
            let (w, h) = (12 + (random.draw() % 12) as usize, 12 + (random.draw() % 12) as usize);
            let (x, y) = (random.draw() as usize % (of.width - w), random.draw() as usize % (of.height - h));
            let mut pixels = vec![0u8; of.bytes()];
            for row in y..y + h {
                // One of the four has a block, bright in all colours.
                let bright = if n == round % 4 { 255 } else { 0 };
                pixels[3 * (row * of.width + x)..3 * (row * of.width + x + w)].fill(bright);
            }
            let (width, height) = (of.width as f32, of.height as f32);
            let row = [
                n as f32,
                (x as f32 + w as f32 / 2.0) / width,
                (y as f32 + h as f32 / 2.0) / height,
                w as f32 / width,
                h as f32 / height,
            ];
            all.push((pixels, row));
        }
        let centre = [0.25 + 0.5 * random.uniform(), 0.25 + 0.5 * random.uniform()];
        let turned = round % 3 == 0;
        let of = View {
            mosaic: Some((centre, [0.0; 3])),
            scale: 0.5 + random.uniform(),
            angle: if turned { 0.3 * (random.uniform() - 0.5) } else { 0.0 },
            translate: [0.4 + 0.2 * random.uniform(), 0.4 + 0.2 * random.uniform()],
            ..plain()
        };
        let sources: Vec<Source> = all
            .iter()
            .zip(&sizes)
            .map(|((pixels, row), size)| Source { pixels, size: *size, rows: std::slice::from_ref(row) })
            .collect();
        let mut out = vec![0; 3 * SIDE * SIDE];
        let boxes = view(&sources, &of, SIDE, &mut out, &mut Rows::default());
        let flips = [round % 2 == 0, round % 4 < 2];
        for [class, x, y, w, h] in finish(&draws(flips), boxes, SIDE, &mut out) {
            let side = SIDE as f32;
            if class as usize != round % 4 {
                continue;
            }
            seen += 1;
            // Grey of the border is darker than half.
            let found: Vec<(usize, usize)> =
                (0..SIDE * SIDE).filter(|at| out[*at] >= 128).map(|at| (at % SIDE, at / SIDE)).collect();
            let ends = |of: &dyn Fn(&(usize, usize)) -> usize| {
                (found.iter().map(of).min().unwrap() as f32, found.iter().map(of).max().unwrap() as f32 + 1.0)
            };
            let near = |(low, high): (f32, f32), centre: f32, size: f32| {
                let slack = if turned { 2.5 } else { 1.6 };
                let (left, right) = ((centre - size / 2.0) * side, (centre + size / 2.0) * side);
                assert!(
                    (low - left).abs() < slack && (high - right).abs() < slack,
                    "{round}: {low} {high} {left} {right}"
                );
            };
            near(ends(&|at| at.0), x, w);
            near(ends(&|at| at.1), y, h);
        }
    }
    assert!(seen > 20, "{seen}");
}

#[test]
fn an_image_alone_lies_in_the_middle() {
    let pixels = vec![10; size(32, 64).bytes()];
    let source = Source { pixels: &pixels, size: size(32, 64), rows: &[[1.0, 0.5, 0.5, 0.5, 0.5]] };
    let mut out = vec![0; 3 * SIDE * SIDE];
    let boxes = view(&[source], &plain(), SIDE, &mut out, &mut Rows::default());
    assert_eq!(boxes, [[1.0, 16.0, 24.0, 48.0, 40.0]]);
    assert_eq!((out[15 * SIDE], out[16 * SIDE], out[47 * SIDE + 63], out[48 * SIDE]), (114, 10, 10, 114));
}

#[test]
fn mixed_images_keep_their_shares() {
    let mut out = [100, 0, 255];
    mix_in(&mut out, &[200, 0, 255], 0.5);
    assert_eq!(out, [150, 0, 255]);
    mix_in(&mut out, &[0, 0, 0], 1.0);
    assert_eq!(out, [150, 0, 255]);
}

#[test]
fn colours_change_places() {
    let mut out = vec![1, 2, 3];
    let rows = finish(&Draws { bgr: true, ..draws([false; 2]) }, vec![[0.0, 0.0, 0.0, 1.0, 1.0]], 1, &mut out);
    assert_eq!((out, rows), (vec![3, 2, 1], vec![[0.0, 0.5, 0.5, 1.0, 1.0]]));
}
