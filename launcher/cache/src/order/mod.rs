//! The order of samples, as a pure function of (seed, epoch, position): nothing is kept per sample.
//! Orders that keep pages or sequences together are in [`paged`].
//!
//! An epoch's order is a keyed permutation: a balanced Feistel network over the smallest even power of two that holds
//! the data set, walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It
//! runs backwards too, so that a sample's next use can be computed.

mod paged;

pub use paged::Paged;

use paged::PagedEpoch;
use std::sync::Arc;

const ROUNDS: usize = 6;
/// Halves of at least 4 bits: smaller networks have too few permutations to look random.
const MIN_HALF_BITS: u32 = 4;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A keyed permutation of `0..len`, and its inverse.
#[derive(Clone, Copy, Debug)]
struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    fn new(len: u64, start: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(MIN_HALF_BITS);
        let keys = std::array::from_fn(|round| mix(start.wrapping_add(GOLDEN.wrapping_mul(round as u64 + 1))));
        Self { len, half_bits, keys }
    }

    fn at(&self, position: u64) -> Option<u64> {
        self.walk(position, Self::encrypt)
    }

    fn position_of(&self, item: u64) -> Option<u64> {
        self.walk(item, Self::decrypt)
    }

    /// Applies `step` until it lands inside: under 4 times on average from 65 items up.
    fn walk(&self, from: u64, step: fn(&Self, u64) -> u64) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let mut x = step(self, from);
        while x >= self.len {
            x = step(self, x);
        }
        Some(x)
    }

    fn mask(&self) -> u64 {
        (1 << self.half_bits) - 1
    }

    fn encrypt(&self, x: u64) -> u64 {
        let (mut left, mut right) = (x >> self.half_bits, x & self.mask());
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & self.mask()));
        }
        (left << self.half_bits) | right
    }

    fn decrypt(&self, x: u64) -> u64 {
        let (mut left, mut right) = (x >> self.half_bits, x & self.mask());
        for key in self.keys.iter().rev() {
            (left, right) = (right ^ (mix(left ^ key) & self.mask()), left);
        }
        (left << self.half_bits) | right
    }
}

/// How an epoch mixes samples.
#[derive(Clone, Debug, Default)]
pub enum Shuffle {
    /// Samples come by index in every epoch.
    #[default]
    Off,
    /// Every sample is equally likely at every position.
    Global,
    /// Pages or sequences stay together.
    Paged(Arc<Paged>),
}

/// The order of a data set's samples in every epoch. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Order {
    /// Samples in the data set.
    pub len: u64,
    pub seed: u64,
    pub shuffle: Shuffle,
}

impl Order {
    /// The sample at `position` of `epoch`; `None` past the end.
    pub fn at(&self, epoch: u64, position: u64) -> Option<u64> {
        self.epoch(epoch).at(position)
    }

    /// Where `epoch` uses `sample`; `None` when the data set has no such sample.
    pub fn position_of(&self, epoch: u64, sample: u64) -> Option<u64> {
        self.epoch(epoch).position_of(sample)
    }

    /// One epoch's order, its keys worked out.
    pub fn epoch(&self, epoch: u64) -> EpochOrder {
        // Two rounds of mixing between seed and epoch: neighbouring pairs share no keys.
        let start = mix(mix(self.seed.wrapping_add(GOLDEN)).wrapping_add(epoch.wrapping_mul(GOLDEN)));
        EpochOrder(match &self.shuffle {
            Shuffle::Off => Keyed::Off(self.len),
            Shuffle::Global => Keyed::Global(Permutation::new(self.len, start)),
            Shuffle::Paged(paged) => Keyed::Paged(PagedEpoch::new(paged, start)),
        })
    }
}

/// The order of one epoch.
#[derive(Clone, Debug)]
pub struct EpochOrder(Keyed);

#[derive(Clone, Debug)]
enum Keyed {
    Off(u64),
    Global(Permutation),
    Paged(PagedEpoch),
}

impl EpochOrder {
    /// The sample at `position`; `None` past the end.
    pub fn at(&self, position: u64) -> Option<u64> {
        match &self.0 {
            Keyed::Off(len) => (position < *len).then_some(position),
            Keyed::Global(keyed) => keyed.at(position),
            Keyed::Paged(paged) => paged.at(position),
        }
    }

    /// The position of `sample`, the inverse of [`EpochOrder::at`].
    pub fn position_of(&self, sample: u64) -> Option<u64> {
        match &self.0 {
            Keyed::Off(len) => (sample < *len).then_some(sample),
            Keyed::Global(keyed) => keyed.position_of(sample),
            Keyed::Paged(paged) => paged.position_of(sample),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(len: u64, seed: u64) -> Order {
        Order { len, seed, shuffle: Shuffle::Global }
    }

    #[test]
    fn every_length_is_permuted_and_inverted() {
        for len in [1, 2, 3, 7, 15, 16, 17, 31, 97, 255, 256, 257, 1021, 4095, 4096, 4097, 65_537] {
            for epoch in 0..3 {
                let keyed = order(len, 42).epoch(epoch);
                let mut seen = vec![false; len as usize];
                for position in 0..len {
                    let sample = keyed.at(position).unwrap();
                    assert!(!std::mem::replace(&mut seen[sample as usize], true), "len {len}: {sample} twice");
                    assert_eq!(keyed.position_of(sample), Some(position));
                }
                assert_eq!((keyed.at(len), keyed.position_of(len)), (None, None));
            }
        }
        assert_eq!(order(0, 1).at(0, 0), None);
    }

    #[test]
    fn billions_of_samples_need_no_memory() {
        for len in [5_000_000_000, 1 << 40, u64::MAX] {
            let keyed = order(len, 3).epoch(5);
            for position in [0, 1, len / 2, len - 1] {
                let sample = keyed.at(position).unwrap();
                assert!(sample < len);
                assert_eq!(keyed.position_of(sample), Some(position));
            }
        }
    }

    /// Pearson's statistic of `counts` against equal expectation.
    fn chi_square(counts: &[u64]) -> f64 {
        let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        counts.iter().map(|&n| (n as f64 - expected).powi(2) / expected).sum()
    }

    /// Far out in the tail: mean + 6 standard deviations of a chi-square with this many degrees of freedom.
    fn limit(freedom: usize) -> f64 {
        freedom as f64 + 6.0 * (2.0 * freedom as f64).sqrt()
    }

    #[test]
    fn a_sample_is_equally_likely_at_every_position() {
        for len in [5_u64, 17, 64, 100] {
            for position in [0, 1, len - 1] {
                let mut counts = vec![0; len as usize];
                for draw in 0..200 * len {
                    // Over epochs of a few seeds, as runs use it.
                    counts[order(len, draw % 5).at(draw / 5, position).unwrap() as usize] += 1;
                }
                let found = chi_square(&counts);
                assert!(found < limit(len as usize - 1), "len {len}, position {position}: {found}");
            }
        }
    }

    #[test]
    fn neighbours_in_order_are_strangers_in_the_data() {
        let keyed = order(100_000, 1).epoch(0);
        let mut counts = [0; 50];
        for position in 0..99_999 {
            let (a, b) = (keyed.at(position).unwrap(), keyed.at(position + 1).unwrap());
            counts[((b + 100_000 - a) % 100_000 / 2_000) as usize] += 1;
        }
        assert!(chi_square(&counts) < limit(49), "{}", chi_square(&counts));
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let ids = |seed, epoch| (0..1000).map(|p| order(1000, seed).at(epoch, p).unwrap()).collect::<Vec<_>>();
        assert_eq!(ids(1, 0), ids(1, 0));
        for (other_seed, other_epoch) in [(1, 1), (2, 0), (0, 1), (1, u64::MAX)] {
            let same = ids(1, 0).iter().zip(ids(other_seed, other_epoch)).filter(|(a, b)| **a == *b).count();
            assert!(same < 12, "{same} of 1000 positions agree with seed {other_seed}, epoch {other_epoch}");
        }
        let plain = Order { len: 10, seed: 7, shuffle: Shuffle::Off };
        assert_eq!((0..10).map(|p| plain.at(4, p).unwrap()).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    }
}
