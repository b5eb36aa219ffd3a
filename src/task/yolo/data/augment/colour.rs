//! Colours: hue is added, saturation and brightness are multiplied.
//!
//! Colours pass through hue (0 to 179), saturation and value of 8 bits, as in OpenCV, whose tables the recipe changes: a change is
//! rounded down. Loops have neither branches nor calls, so that they run in vectors.

/// Pixels of a block that stays in the nearest cache.
const BLOCK: usize = 256;

/// Changes the planes `[3, area]` in place. Gains: hue as a share of the circle, saturation, value.
pub fn change(planes: &mut [u8], gains: [f64; 3]) {
    if gains == [0.0, 1.0, 1.0] {
        return;
    }
    let area = planes.len() / 3;
    let (red, rest) = planes.split_at_mut(area);
    let (green, blue) = rest.split_at_mut(area);
    let blocks = red.chunks_mut(BLOCK).zip(green.chunks_mut(BLOCK)).zip(blue.chunks_mut(BLOCK));
    let gains = [gains[0] * 180.0, gains[1], gains[2]].map(|gain| gain as f32);
    for ((red, green), blue) in blocks {
        change_block(red, green, blue, gains);
    }
}

/// Adding it to a small number leaves no bits for fractions: the number is rounded, and its bits are those of a whole number.
const MAGIC: f32 = 12_582_912.0;

fn nearest(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

fn floor(x: f32) -> f32 {
    let near = nearest(x);
    near - if near > x { 1.0 } else { 0.0 }
}

fn change_block(red: &mut [u8], green: &mut [u8], blue: &mut [u8], [hue, saturation, value]: [f32; 3]) {
    for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
        let (r, g, b) = (f32::from(*red), f32::from(*green), f32::from(*blue));
        let most = if r > g { r } else { g };
        let most = if most > b { most } else { b };
        let least = if r < g { r } else { g };
        let least = if least < b { least } else { b };
        let spread = most - least;
        let per = 30.0 / if spread > 0.0 { spread } else { 1.0 };
        // Degrees / 2, from the colour that is strongest.
        let of_green = 60.0 + (b - r) * per;
        let of_blue = 120.0 + (r - g) * per;
        let h = if most == g { of_green } else { of_blue };
        let h = if most == r { (g - b) * per } else { h };
        let h = nearest(if h < 0.0 { h + 180.0 } else { h });
        let h = if h >= 180.0 { h - 180.0 } else { h } + hue;
        let h = if h < 0.0 { h + 180.0 } else { h };
        let h = floor(if h >= 180.0 { h - 180.0 } else { h }) * (1.0 / 30.0);
        let s = nearest(spread * 255.0 / if most > 0.0 { most } else { 1.0 }) * saturation;
        let s = floor(if s < 255.0 { s } else { 255.0 }) * (1.0 / 255.0);
        let v = most * value;
        let v = floor(if v < 255.0 { v } else { 255.0 });
        let channel = |n: f32| {
            let k = n + h;
            let k = if k >= 6.0 { k - 6.0 } else { k };
            let other = 4.0 - k;
            let part = if k < other { k } else { other };
            let part = if part < 1.0 { part } else { 1.0 };
            let part = if part > 0.0 { part } else { 0.0 };
            (v - v * s * part + MAGIC).to_bits() as u8
        };
        (*red, *green, *blue) = (channel(5.0), channel(3.0), channel(1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(rgb: [u8; 3], gains: [f64; 3]) -> [u8; 3] {
        let mut planes = rgb.to_vec();
        change(&mut planes, gains);
        [planes[0], planes[1], planes[2]]
    }

    #[test]
    fn hue_is_added_and_the_rest_multiplied() {
        assert_eq!(changed([255, 0, 0], [1.0 / 3.0, 1.0, 1.0]), [0, 255, 0]);
        assert_eq!(changed([255, 0, 0], [-1.0 / 3.0, 1.0, 1.0]), [0, 0, 255]);
        assert_eq!(changed([200, 100, 50], [0.0, 1.0, 0.5]), [100, 50, 25]);
        assert_eq!(changed([200, 100, 100], [0.0, 0.0, 1.0]), [200, 200, 200]);
        // Grey has no hue and stays grey; brightness has an end.
        assert_eq!(changed([120, 120, 120], [0.3, 1.7, 1.0]), [120, 120, 120]);
        assert_eq!(changed([200, 200, 200], [0.0, 1.0, 1.5]), [255, 255, 255]);
        assert_eq!(changed([0, 0, 0], [0.2, 1.5, 1.5]), [0, 0, 0]);
        assert_eq!(changed([255, 0, 0], [0.0, 1.0, 1.0]), [255, 0, 0]);
    }

    /// Hue and saturation have 8 bits: colours come back to within their steps.
    #[test]
    fn without_a_change_colours_come_back() {
        for n in 0..4096u32 {
            let rgb = [n % 16 * 17, n / 16 % 16 * 17, n / 256 * 17].map(|value| value as u8);
            let back = changed(rgb, [1e-9, 1.0, 1.0]);
            let apart = rgb.iter().zip(back).map(|(a, b)| a.abs_diff(b)).max().unwrap();
            assert!(apart <= 6, "{rgb:?} {back:?}");
        }
    }
}
