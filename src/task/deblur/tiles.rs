//! Frames restored square by square: memory of a prediction does not grow with the frame.

use tch::{Device, Kind, Tensor};

/// First pixels of the tiles of `side` over `len`: evenly spread, neighbours share at least a quarter.
fn starts(len: i64, side: i64) -> Vec<i64> {
    if len <= side {
        return vec![0];
    }
    let step = (side - side / 4).max(1);
    let gaps = (len - side + step - 1) / step;
    (0..=gaps).map(|n| n * (len - side) / gaps).collect()
}

/// Weights f32 `[side]` that fall towards the edges.
fn ramp(side: i64, device: Device) -> Tensor {
    let up = Tensor::arange_start(1, side + 1, (Kind::Float, device));
    up.minimum(&up.flip([0]))
}

/// `[.., h, w]`: what `restore` makes of each tile, given its first row and column, height and width, mixed by weights that fall
/// towards the edges of a tile.
pub fn in_tiles((h, w): (i64, i64), side: i64, restore: impl Fn([i64; 4]) -> Tensor) -> Tensor {
    let (tall, wide) = (side.min(h), side.min(w));
    let mut mixed: Option<(Tensor, Tensor)> = None;
    for y in starts(h, side) {
        for x in starts(w, side) {
            let tile = restore([y, x, tall, wide]);
            let weight = ramp(tall, tile.device()).unsqueeze(1) * ramp(wide, tile.device());
            let (sum, weights) = mixed.get_or_insert_with(|| {
                let mut shape = tile.size();
                let last = shape.len() - 2;
                shape[last..].copy_from_slice(&[h, w]);
                let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, tile.device()));
                (zeros(&shape), zeros(&[h, w]))
            });
            let part = |of: &Tensor| of.narrow(-2, y, tall).narrow(-1, x, wide);
            let _ = part(sum).g_add_(&(tile.to_kind(Kind::Float) * &weight));
            let _ = part(weights).g_add_(&weight);
        }
    }
    match mixed {
        Some((sum, weights)) => sum / weights,
        None => Tensor::zeros([h, w], (Kind::Float, Device::Cpu)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_frame_and_share_a_quarter() {
        assert_eq!((starts(10, 16), starts(16, 16), starts(17, 16)), (vec![0], vec![0], vec![0, 1]));
        for (len, side) in [(720, 256), (1280, 256), (100, 33), (9, 1)] {
            let all = starts(len, side);
            assert!(all[0] == 0 && all[all.len() - 1] + side == len, "{len} {side}: {all:?}");
            assert!(
                all.windows(2).all(|two| two[1] > two[0] && two[0] + side - two[1] >= side / 4),
                "{len} {side}: {all:?}"
            );
        }
    }

    #[test]
    fn what_is_the_same_in_every_tile_stays_as_it_is() {
        let frames = Tensor::rand([2, 3, 3, 50, 41], (Kind::Float, Device::Cpu));
        for side in [8, 16, 45, 64] {
            let made = in_tiles((50, 41), side, |[y, x, h, w]| frames.narrow(-2, y, h).narrow(-1, x, w));
            assert_eq!(made.size(), frames.size());
            assert!((&made - &frames).abs().max().double_value(&[]) < 1e-6, "{side}");
        }
    }
}
