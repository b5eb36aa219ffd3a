//! How an epoch is cut into steps, ranks and micro-batches; the order of samples is of package `cache` ([`cache::order`]).

pub use cache::order::{EpochOrder, Order, Paged, Shuffle, mix};

use super::BatchRequest;
use super::ramp::{Ramp, locate};
use crate::data::DataError;
use std::sync::Arc;

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

    /// A step of the usual size, on all ranks: not the rest at the end of an epoch, nor one of a ramp.
    pub fn is_full(&self, epoch: u64, step: u64) -> bool {
        self.step_samples(epoch, step) == self.global_batch
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

    fn planner(len: u64, global_batch: u64, micro_batch: u64, rank: u64, world_size: u64) -> BatchPlanner {
        let order = Order { len, seed: 9, shuffle: Shuffle::Global };
        BatchPlanner { order, global_batch, micro_batch, rank, world_size, drop_last: false, cut: Cut::default() }
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

    /// 31 samples in steps of 8 over two ranks: the last has 7, and rank 0's part of it is as large as ever.
    #[test]
    fn a_rest_is_no_full_step_on_any_rank() {
        for rank in 0..2 {
            let cut = planner(31, 8, 4, rank, 2);
            assert_eq!((cut.rank_samples(0, 3), cut.micro_batches(0, 3)), (4 - rank, 1));
            assert_eq!([0, 2, 3].map(|step| cut.is_full(0, step)), [true, true, false]);
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
