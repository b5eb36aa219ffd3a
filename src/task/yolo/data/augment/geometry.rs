//! Places: where images lie on a canvas, the transform from canvas to sample, and which boxes survive it.

use super::draw::View;
use crate::data::source::video::image::ImageSize;

/// Boxes narrower than this are dropped, pixels.
const LEAST_SIDE: f64 = 2.0;
/// Least share of a box's area that must be left.
const LEAST_AREA: f64 = 0.1;
/// Most that one side may exceed the other.
const MOST_ASPECT: f64 = 100.0;
const EPS: f64 = 1e-16;

/// A box in pixels: class, left, top, right, bottom.
pub type Corners = [f64; 5];

/// Part of an image that lies on a canvas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where the image's first pixel comes to lie; outside of the canvas where it is cut.
    pub left: i64,
    pub top: i64,
    pub size: ImageSize,
}

/// Where four images lie on a canvas of `2 · side`: their inner corners touch at `centre` (x, y). Order: left above, right
/// above, left below, right below.
pub fn mosaic(centre: [usize; 2], sizes: [ImageSize; 4]) -> [Placed; 4] {
    let [x, y] = centre.map(|at| at as i64);
    std::array::from_fn(|n| {
        let size = sizes[n];
        let left = if n % 2 == 0 { x - size.width as i64 } else { x };
        let top = if n < 2 { y - size.height as i64 } else { y };
        Placed { left, top, size }
    })
}

/// Boxes of a placed image on the canvas, cut to `canvas` (width, height); empty ones are dropped.
pub fn on_canvas(rows: &[[f32; 5]], placed: &Placed, canvas: [f64; 2]) -> Vec<Corners> {
    let (width, height) = (placed.size.width as f64, placed.size.height as f64);
    let corners = rows.iter().map(|row| {
        let [class, x, y, w, h] = row.map(f64::from);
        let (left, top) = (placed.left as f64, placed.top as f64);
        let along = |centre: f64, size: f64, whole: f64, from: f64, most: f64| {
            [centre - size / 2.0, centre + size / 2.0].map(|share| (share * whole + from).clamp(0.0, most))
        };
        let ([x1, x2], [y1, y2]) = (along(x, w, width, left, canvas[0]), along(y, h, height, top, canvas[1]));
        [class, x1, y1, x2, y2]
    });
    corners.filter(|[_, x1, y1, x2, y2]| x2 > x1 && y2 > y1).collect()
}

/// A projective transform, rows first.
pub type Matrix = [[f64; 3]; 3];

fn times(a: &Matrix, b: &Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

/// From a canvas (width, height) to a sample of `side`: T · S · R · P · C.
pub fn transform(view: &View, canvas: [f64; 2], side: f64) -> Matrix {
    let centre = [[1.0, 0.0, -canvas[0] / 2.0], [0.0, 1.0, -canvas[1] / 2.0], [0.0, 0.0, 1.0]];
    let perspective = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [view.perspective[0], view.perspective[1], 1.0]];
    let (sin, cos) = (view.angle.sin() * view.scale, view.angle.cos() * view.scale);
    let rotation = [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]];
    let shear = [[1.0, view.shear[0].tan(), 0.0], [view.shear[1].tan(), 1.0, 0.0], [0.0, 0.0, 1.0]];
    let [x, y] = view.translate.map(|share| share * side);
    let translation = [[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]];
    [shear, rotation, perspective, centre].iter().fold(translation, |all, next| times(&all, next))
}

/// The inverse; `None` where there is none.
pub fn inverse(m: &Matrix) -> Option<Matrix> {
    let minor = |i: usize, j: usize| {
        let (a, b, c, d) = ((i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3);
        m[a][c] * m[b][d] - m[a][d] * m[b][c]
    };
    let determinant = (0..3).map(|j| m[0][j] * minor(0, j)).sum::<f64>();
    let inverse: Matrix = std::array::from_fn(|i| std::array::from_fn(|j| minor(j, i) / determinant));
    inverse.iter().flatten().all(|number| number.is_finite()).then_some(inverse)
}

/// A point through a transform.
pub fn through(m: &Matrix, x: f64, y: f64) -> [f64; 2] {
    let row = |r: &[f64; 3]| r[0] * x + r[1] * y + r[2];
    let w = row(&m[2]);
    [row(&m[0]) / w, row(&m[1]) / w]
}

/// The box around a box's corners after the transform, cut to the sample; `None`: it is too small, too thin, or too little of
/// it is left.
pub fn moved(corners: &Corners, m: &Matrix, scale: f64, side: f64) -> Option<Corners> {
    let [class, x1, y1, x2, y2] = *corners;
    let points = [[x1, y1], [x2, y2], [x1, y2], [x2, y1]].map(|[x, y]| through(m, x, y));
    let ends = |axis: usize| {
        let along = points.iter().map(|point| point[axis]);
        [along.clone().fold(f64::INFINITY, f64::min), along.fold(f64::NEG_INFINITY, f64::max)]
            .map(|at| at.clamp(0.0, side))
    };
    let ([left, right], [top, bottom]) = (ends(0), ends(1));
    let (width, height) = (right - left, bottom - top);
    let before = (x2 - x1) * scale * (y2 - y1) * scale;
    let aspect = (width / (height + EPS)).max(height / (width + EPS));
    let kept = width > LEAST_SIDE
        && height > LEAST_SIDE
        && width * height / (before + EPS) > LEAST_AREA
        && aspect < MOST_ASPECT;
    kept.then_some([class, left, top, right, bottom])
}

/// Corners as a row of a batch.
pub fn row_of(corners: &Corners, side: f64) -> [f32; 5] {
    let [class, x1, y1, x2, y2] = *corners;
    [class, (x1 + x2) / 2.0 / side, (y1 + y2) / 2.0 / side, (x2 - x1) / side, (y2 - y1) / side]
        .map(|number| number as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> ImageSize {
        ImageSize { height, width }
    }

    fn view(scale: f64, translate: [f64; 2], degrees: f64) -> View {
        let angle = f64::to_radians(degrees);
        View { mosaic: None, translate, scale, angle, shear: [0.0; 2], perspective: [0.0; 2] }
    }

    #[test]
    fn images_touch_with_their_inner_corners() {
        let placed = mosaic([70, 120], [size(100, 50), size(40, 100), size(100, 100), size(80, 60)]);
        let at: Vec<_> = placed.iter().map(|placed| (placed.left, placed.top)).collect();
        assert_eq!(at, [(20, 20), (70, 80), (-30, 120), (70, 120)]);
    }

    #[test]
    fn boxes_are_cut_to_the_canvas() {
        let placed = Placed { left: -30, top: 120, size: size(100, 100) };
        let rows = [[2.0, 0.5, 0.5, 0.4, 0.2], [1.0, 0.1, 0.5, 0.2, 0.2], [0.0, 0.9, 0.95, 0.2, 0.4]];
        let found = on_canvas(&rows, &placed, [200.0, 200.0]);
        // The second lies left of the canvas.
        let expected = [[2.0, 0.0, 160.0, 40.0, 180.0], [0.0, 50.0, 195.0, 70.0, 200.0]];
        assert_eq!(found.len(), 2);
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
        }
    }

    #[test]
    fn the_centre_of_the_canvas_comes_where_the_shift_says() {
        for (view, point, to) in [
            (view(1.0, [0.5, 0.5], 0.0), [100.0, 100.0], [50.0, 50.0]),
            (view(1.5, [0.4, 0.6], 0.0), [100.0, 100.0], [40.0, 60.0]),
            (view(0.5, [0.5, 0.5], 0.0), [120.0, 80.0], [60.0, 40.0]),
            // Counter-clockwise, as the eye sees it.
            (view(1.0, [0.5, 0.5], 90.0), [110.0, 100.0], [50.0, 40.0]),
        ] {
            let m = transform(&view, [200.0, 200.0], 100.0);
            let found = through(&m, point[0], point[1]);
            assert!((found[0] - to[0]).abs() + (found[1] - to[1]).abs() < 1e-9, "{found:?} {to:?}");
            let back = through(&inverse(&m).unwrap(), found[0], found[1]);
            assert!((back[0] - point[0]).abs() + (back[1] - point[1]).abs() < 1e-9);
        }
        let odd = View { perspective: [1e-3, -5e-4], shear: [0.1, 0.2], ..view(0.8, [0.5, 0.5], 30.0) };
        let m = transform(&odd, [160.0, 90.0], 100.0);
        let [x, y] = through(&m, 31.0, 70.0);
        let back = through(&inverse(&m).unwrap(), x, y);
        assert!((back[0] - 31.0).abs() + (back[1] - 70.0).abs() < 1e-9);
        assert!(inverse(&[[0.0; 3]; 3]).is_none());
    }

    #[test]
    fn boxes_that_are_too_small_too_thin_or_mostly_gone_are_dropped() {
        let m = transform(&view(1.0, [0.5, 0.5], 0.0), [200.0, 200.0], 100.0);
        for (corners, expected) in [
            ([1.0, 60.0, 70.0, 90.0, 80.0], Some([1.0, 10.0, 20.0, 40.0, 30.0])),
            ([1.0, 20.0, 70.0, 90.0, 80.0], Some([1.0, 0.0, 20.0, 40.0, 30.0])),
            // 2 pixels are not enough, and 1/20 of the area.
            ([1.0, 60.0, 70.0, 62.0, 80.0], None),
            ([1.0, 0.0, 70.0, 52.4, 80.0], None),
            ([1.0, 60.0, 70.0, 160.0, 72.1], Some([1.0, 10.0, 20.0, 100.0, 22.1])),
            ([1.0, 0.0, 0.0, 40.0, 40.0], None),
        ] {
            let found = moved(&corners, &m, 1.0, 100.0);
            let near = found.zip(expected).map(|(a, b)| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9));
            assert_eq!((found.is_some(), near.unwrap_or(true)), (expected.is_some(), true), "{corners:?} {found:?}");
        }
        assert_eq!(row_of(&[3.0, 10.0, 20.0, 40.0, 30.0], 100.0), [3.0, 0.25, 0.25, 0.3, 0.1]);
        // Thin: 100 times as long as wide, the area left all the same.
        let long = transform(&view(1.0, [0.5, 0.5], 0.0), [2000.0, 2000.0], 1000.0);
        assert!(moved(&[0.0, 500.0, 900.0, 1500.0, 909.9], &long, 1.0, 1000.0).is_none());
        assert!(moved(&[0.0, 500.0, 900.0, 1500.0, 910.1], &long, 1.0, 1000.0).is_some());
    }
}
