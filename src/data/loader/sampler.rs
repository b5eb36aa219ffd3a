//! The order of samples, as a pure function of (seed, epoch, position): nothing is kept per sample.
//! Orders that keep pages or sequences together are in [`paged`].
//!
//! An epoch's order is a keyed permutation: a balanced Feistel network over the smallest even power of two that holds
//! the data set, walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It
//! runs backwards too, so that a sample's next use can be computed.

mod paged;

pub use paged::Paged;

use super::BatchRequest;
use super::ramp::{Ramp, locate};
use crate::data::DataError;
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
pub(super) struct Permutation {
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

/// How an epoch is cut into steps, ranks and micro-batches.
///
/// Step `s` covers positions `s·G .. (s+1)·G` of the epoch, the same for every world size; rank `r` of `W` takes its
/// items `r, r+W, …`, and runs them in micro-batches of at most `micro_batch`.
#[derive(Clone, Debug)]
pub struct BatchPlanner {
    pub order: Order,
    /// Samples of one step over the whole job (`G`).
    pub global_batch: u64,
    /// Most samples of one forward and backward pass.
    pub micro_batch: u64,
    pub rank: u64,
    pub world_size: u64,
    /// Training leaves out a last incomplete global batch; validation keeps it.
    pub drop_last: bool,
    pub cut: Cut,
}

/// Differences between steps, and between ranks; none by default.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    /// Smaller steps at the beginning of training.
    pub ramp: Ramp,
    /// All ranks run as many micro-batches as the one with the most samples, of nearly equal size: passes of all ranks
    /// belong together. Otherwise each runs as few as it can.
    pub even: bool,
}

impl BatchPlanner {
    /// The same planner, its numbers checked.
    ///
    /// # Errors
    /// A factor is 0, the rank is outside the world, a rank would have no sample in a training step, or a training set
    /// does not fill one global batch.
    pub fn checked(self) -> Result<Self, DataError> {
        let Self { ref order, global_batch, micro_batch, rank, world_size, drop_last, .. } = self;
        let problem = if global_batch == 0 || micro_batch == 0 || world_size == 0 {
            format!(
                "global batch {global_batch}, micro-batch {micro_batch} and {world_size} ranks must each be at least 1"
            )
        } else if rank >= world_size {
            format!("rank {rank} is outside a world of {world_size} ranks")
        } else if drop_last && global_batch < world_size {
            format!(
                "a global batch of {global_batch} samples leaves some of {world_size} ranks without any: raise train.batch_size or use fewer ranks"
            )
        } else if drop_last && order.len < global_batch {
            format!(
                "the training set has {} samples, fewer than one global batch of {global_batch} (about {} per rank × {world_size} ranks, accumulation included): lower train.batch_size or train.gradient_accumulation_steps, use fewer ranks, or add files",
                order.len,
                global_batch.div_ceil(world_size),
            )
        } else {
            return Ok(self);
        };
        Err(DataError::setting("train.batch_size", problem))
    }

    /// Steps of one epoch, but for the first ones of a ramp; the same on every rank.
    pub fn steps_per_epoch(&self) -> u64 {
        if self.drop_last { self.order.len / self.global_batch } else { self.order.len.div_ceil(self.global_batch) }
    }

    /// Epoch of the step `step` from the beginning of training, and its place there.
    pub fn locate(&self, step: u64) -> (u64, u64) {
        locate(step, self.steps_per_epoch(), &self.cut.ramp.steps())
    }

    /// Steps of `epoch`.
    pub fn steps_of(&self, epoch: u64) -> u64 {
        let early = usize::try_from(epoch).ok().and_then(|epoch| self.cut.ramp.steps().get(epoch).copied());
        early.unwrap_or_else(|| self.steps_per_epoch())
    }

    /// First position of a step in its epoch, and samples over all ranks.
    fn range(&self, epoch: u64, step: u64) -> (u64, u64) {
        if let Some(range) = self.cut.ramp.samples(epoch, step) {
            return range;
        }
        let start = step.saturating_mul(self.global_batch);
        if step >= self.steps_per_epoch() {
            return (start, 0);
        }
        (start, (self.order.len - start).min(self.global_batch))
    }

    /// Samples of a step over all ranks.
    pub fn step_samples(&self, epoch: u64, step: u64) -> u64 {
        self.range(epoch, step).1
    }

    /// Samples of a step on this rank.
    pub fn rank_samples(&self, epoch: u64, step: u64) -> u64 {
        self.step_samples(epoch, step).saturating_sub(self.rank).div_ceil(self.world_size)
    }

    /// Micro-batches that this rank runs in a step; 0 where a last validation batch has nothing for it.
    pub fn micro_batches(&self, epoch: u64, step: u64) -> u64 {
        let most = self.step_samples(epoch, step).div_ceil(self.world_size).div_ceil(self.micro_batch);
        let own = self.rank_samples(epoch, step);
        if self.cut.even { most.min(own) } else { own.div_ceil(self.micro_batch) }
    }

    /// Sample ids of `step` over all ranks, in order.
    pub fn global_ids(&self, epoch: u64, step: u64) -> Vec<u64> {
        let order = self.order.epoch(epoch);
        let (start, samples) = self.range(epoch, step);
        (0..samples).filter_map(|item| order.at(start + item)).collect()
    }

    /// This rank's micro-batch `micro` of `step`.
    pub fn request(&self, epoch: u64, step: u64, micro: u64) -> BatchRequest {
        let order = self.order.epoch(epoch);
        let start = self.range(epoch, step).0 + self.rank;
        let (samples, micros) = (self.rank_samples(epoch, step), self.micro_batches(epoch, step));
        let bound = |micro: u64| match self.cut.even {
            true => samples * micro.min(micros) / micros.max(1),
            false => (micro * self.micro_batch).min(samples),
        };
        let items = bound(micro)..bound(micro + 1);
        let sample_ids = items.filter_map(|item| order.at(start + item * self.world_size)).collect();
        BatchRequest { epoch, step, micro, micros, sample_ids }
    }

    /// This rank's micro-batches of `epoch` from `first_step` on, computed as they are asked for.
    pub fn requests(&self, epoch: u64, first_step: u64) -> impl Iterator<Item = BatchRequest> + Send + use<> {
        let planner = Arc::new(self.clone());
        (first_step..planner.steps_of(epoch)).flat_map(move |step| {
            let planner = Arc::clone(&planner);
            (0..planner.micro_batches(epoch, step)).map(move |micro| planner.request(epoch, step, micro))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(len: u64, seed: u64) -> Order {
        Order { len, seed, shuffle: Shuffle::Global }
    }

    fn planner(len: u64, global_batch: u64, micro_batch: u64, rank: u64, world_size: u64) -> BatchPlanner {
        BatchPlanner {
            order: order(len, 9),
            global_batch,
            micro_batch,
            rank,
            world_size,
            drop_last: false,
            cut: Cut::default(),
        }
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

    #[test]
    fn a_global_batch_is_the_same_for_every_world_size() {
        for step in 0..9 {
            let whole = planner(103, 12, 5, 0, 1).global_ids(2, step);
            for world in [1, 2, 3, 5, 12] {
                let mut items = vec![None; whole.len()];
                for rank in 0..world {
                    let cut = planner(103, 12, 5, rank, world);
                    assert_eq!(cut.global_ids(2, step), whole);
                    let ids: Vec<u64> =
                        (0..cut.micro_batches(2, step)).flat_map(|m| cut.request(2, step, m).sample_ids).collect();
                    assert_eq!(ids.len() as u64, cut.rank_samples(2, step));
                    for (item, id) in ids.into_iter().enumerate() {
                        items[rank as usize + item * world as usize] = Some(id);
                    }
                }
                assert_eq!(items.into_iter().flatten().collect::<Vec<_>>(), whole, "world {world}");
            }
        }
    }

    #[test]
    fn ranks_run_as_many_micro_batches_of_nearly_equal_size_where_they_belong_together() {
        // 14 samples over 3 ranks: 5, 5 and 4, of which micro-batches of 4 would make 2, 2 and 1.
        let cut = |rank, even| BatchPlanner { cut: Cut { even, ..Cut::default() }, ..planner(103, 14, 4, rank, 3) };
        let sizes = |even| -> Vec<Vec<usize>> {
            let of = |rank| cut(rank, even).requests(0, 0).take_while(|r| r.step == 0).map(|r| r.sample_ids.len());
            (0..3).map(|rank| of(rank).collect()).collect()
        };
        assert_eq!(sizes(false), [vec![4, 1], vec![4, 1], vec![4]]);
        assert_eq!(sizes(true), [vec![2, 3], vec![2, 3], vec![2, 2]]);
        for rank in 0..3 {
            let ids = |even| -> Vec<u64> { cut(rank, even).requests(1, 2).flat_map(|r| r.sample_ids).collect() };
            assert_eq!(ids(true), ids(false));
        }
    }

    #[test]
    fn a_ramp_gives_every_rank_its_share_of_smaller_steps() {
        let ramp = Ramp::new(103, 12, 3, 20);
        let cut = |rank, world| BatchPlanner {
            drop_last: true,
            cut: Cut { ramp: ramp.clone(), even: false },
            ..planner(103, 12, 3, rank, world)
        };
        for epoch in 0..3 {
            let whole: Vec<u64> = cut(0, 1).requests(epoch, 0).flat_map(|request| request.sample_ids).collect();
            let steps = cut(0, 1).steps_of(epoch);
            assert_eq!(whole, (0..steps).flat_map(|step| cut(1, 2).global_ids(epoch, step)).collect::<Vec<_>>());
            let shares: u64 = (0..2)
                .flat_map(|rank| cut(rank, 2).requests(epoch, 0))
                .map(|request| request.sample_ids.len() as u64)
                .sum();
            assert_eq!(shares, whole.len() as u64);
            let mut unique = whole.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), whole.len(), "no sample comes twice");
        }
        assert!(cut(0, 1).steps_of(0) > cut(0, 1).steps_of(2));
        assert_eq!((cut(0, 1).step_samples(0, 0), cut(0, 1).step_samples(2, 0)), (4, 12));
    }

    #[test]
    fn a_last_incomplete_batch_is_dropped_in_training_and_kept_in_validation() {
        let val = planner(103, 12, 5, 2, 3);
        let train = BatchPlanner { drop_last: true, ..val.clone() };
        assert_eq!((val.steps_per_epoch(), train.steps_per_epoch()), (9, 8));
        assert_eq!((val.step_samples(0, 8), val.rank_samples(0, 8), train.step_samples(0, 8)), (7, 2, 0));
        let all: u64 = (0..3)
            .flat_map(|rank| planner(103, 12, 5, rank, 3).requests(0, 0))
            .map(|request| request.sample_ids.len() as u64)
            .sum();
        assert_eq!(all, 103);
    }

    #[test]
    fn a_resumed_epoch_continues_where_it_stopped() {
        let cut = planner(500, 24, 5, 1, 2);
        let all: Vec<_> = cut.requests(3, 0).collect();
        let rest: Vec<_> = cut.requests(3, 7).collect();
        assert_eq!(all.into_iter().filter(|request| request.step >= 7).collect::<Vec<_>>(), rest);
        assert_eq!((rest[0].micros, rest[2].sample_ids.len()), (3, 2));
    }

    #[test]
    fn too_small_a_training_set_is_refused_with_every_factor() {
        let train = BatchPlanner { drop_last: true, ..planner(11, 12, 4, 0, 3) };
        let error = train.checked().unwrap_err().to_string();
        for part in ["11 samples", "global batch of 12", "4 per rank × 3 ranks", "train.batch_size"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(planner(11, 12, 4, 0, 3).checked().is_ok());
        assert!(planner(11, 12, 4, 3, 3).checked().is_err());
        assert!(planner(11, 0, 4, 0, 3).checked().is_err());
        let thin = BatchPlanner { drop_last: true, ..planner(11, 2, 4, 0, 3) };
        assert!(thin.checked().unwrap_err().to_string().contains("without any"));
    }
}
