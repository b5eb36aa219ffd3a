//! Draws of one training sample: a pure function of (seed, epoch, index).

use crate::data::loader::mix;
use crate::task::sample::Random;
use spec::task::yolo::YoloAugment;

/// Spread of the share that mixup takes of each image: Beta(32, 32).
const MIXUP_SHAPE: usize = 32;

/// Draws of a sample in one epoch. Each part is drawn whether it is used or not, so that a key changes nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Draws {
    pub main: View,
    /// Another sample to mix in, its place among candidates in 0..1, and the share of the first image.
    pub mixup: Option<(f64, f64, View)>,
    /// Factors of hue (added, as a share of the circle), saturation and brightness.
    pub hsv: [f64; 3],
    pub flips: [bool; 2],
    pub bgr: bool,
}

/// Draws of one image before it is mixed.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Centre of the mosaic as shares of the canvas, and places of three partners among candidates.
    pub mosaic: Option<([f64; 2], [f64; 3])>,
    /// Shift as a share of the side: where the centre comes to lie.
    pub translate: [f64; 2],
    pub scale: f64,
    /// Radians.
    pub angle: f64,
    pub shear: [f64; 2],
    pub perspective: [f64; 2],
}

impl Draws {
    /// `mixes`: the epoch has mosaic and mixup.
    pub fn new(augment: &YoloAugment, (seed, epoch, index): (u64, u64, u64), mixes: bool) -> Self {
        let mut random = Random(mix(mix(mix(seed ^ 0x594F_4C4F).wrapping_add(epoch)).wrapping_add(index)));
        let main = View::new(augment, &mut random, mixes);
        let mixed = random.uniform();
        let (place, share) = (random.uniform(), beta(&mut random));
        let other = View::new(augment, &mut random, mixes);
        let mut around = |share: f64| share * (2.0 * random.uniform() - 1.0);
        let hsv = [around(augment.hsv_h), 1.0 + around(augment.hsv_s), 1.0 + around(augment.hsv_v)];
        let flips = [augment.flipud, augment.fliplr].map(|share| random.uniform() < share);
        let bgr = random.uniform() < augment.bgr;
        let mixup = (mixes && mixed < augment.mixup).then_some((place, share, other));
        Self { main, mixup, hsv, flips, bgr }
    }
}

impl View {
    fn new(augment: &YoloAugment, random: &mut Random, mixes: bool) -> Self {
        let is_mosaic = random.uniform() < augment.mosaic;
        let centre = [0.25 + 0.5 * random.uniform(), 0.25 + 0.5 * random.uniform()];
        let partners = [random.uniform(), random.uniform(), random.uniform()];
        let mut around = |most: f64| most * (2.0 * random.uniform() - 1.0);
        let perspective = [around(augment.perspective), around(augment.perspective)];
        let angle = around(augment.degrees).to_radians();
        let scale = 1.0 + around(augment.scale);
        let shear = [around(augment.shear).to_radians(), around(augment.shear).to_radians()];
        let translate = [0.5 + around(augment.translate), 0.5 + around(augment.translate)];
        let mosaic = (mixes && is_mosaic).then_some((centre, partners));
        Self { mosaic, translate, scale, angle, shear, perspective }
    }
}

/// Beta(32, 32) as a share of two sums of exponential draws.
fn beta(random: &mut Random) -> f64 {
    let mut gamma = || (0..MIXUP_SHAPE).map(|_| -(1.0 - random.uniform()).ln()).sum::<f64>();
    let (a, b) = (gamma(), gamma());
    a / (a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_seed_epoch_and_index_alone() {
        let augment = YoloAugment { mixup: 1.0, degrees: 5.0, ..YoloAugment::default() };
        let at = |seed, epoch, index| Draws::new(&augment, (seed, epoch, index), true);
        assert_eq!(at(1, 2, 3), at(1, 2, 3));
        for other in [at(2, 2, 3), at(1, 3, 3), at(1, 2, 4), at(1, 3, 2)] {
            assert_ne!(other, at(1, 2, 3));
        }
        // Another part does not change with a key of this one.
        let less = Draws::new(&YoloAugment { hsv_s: 0.0, mosaic: 0.0, ..augment }, (1, 2, 3), true);
        assert_eq!((less.flips, less.main.scale, less.main.mosaic), (at(1, 2, 3).flips, at(1, 2, 3).main.scale, None));
        let closed = Draws::new(&augment, (1, 2, 3), false);
        assert!(closed.mixup.is_none() && closed.main.mosaic.is_none() && closed.main.scale == less.main.scale);
    }

    #[test]
    fn draws_have_their_ranges() {
        let augment = YoloAugment { mixup: 0.3, ..YoloAugment::default() };
        let all: Vec<Draws> = (0..2000).map(|index| Draws::new(&augment, (7, 0, index), true)).collect();
        let range = |of: &dyn Fn(&Draws) -> f64| {
            let values = all.iter().map(of);
            (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max))
        };
        let near = |(least, most): (f64, f64), low: f64, high: f64| {
            let slack = (high - low) / 100.0;
            assert!(least >= low && least < low + slack && most <= high && most > high - slack, "{least} {most}");
        };
        near(range(&|draws| draws.main.scale), 0.5, 1.5);
        near(range(&|draws| draws.main.translate[1]), 0.4, 0.6);
        near(range(&|draws| draws.main.mosaic.as_ref().unwrap().0[0]), 0.25, 0.75);
        near(range(&|draws| draws.hsv[1]), 0.3, 1.7);
        let share = |of: &dyn Fn(&Draws) -> bool| all.iter().filter(|draws| of(draws)).count() as f64 / 2000.0;
        assert!((share(&|draws| draws.flips[1]) - 0.5).abs() < 0.05 && !all.iter().any(|draws| draws.flips[0]));
        assert!((share(&|draws| draws.mixup.is_some()) - 0.3).abs() < 0.04);
        let mut random = Random(3);
        let drawn: Vec<f64> = (0..2000).map(|_| beta(&mut random)).collect();
        let mean = drawn.iter().sum::<f64>() / 2000.0;
        let spread = (drawn.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 2000.0).sqrt();
        // Variance of Beta(32, 32): 1 / (4 · 65).
        assert!((mean - 0.5).abs() < 0.005 && (spread - 0.062).abs() < 0.004, "{mean} {spread}");
    }
}
