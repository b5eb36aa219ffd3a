//! How an epoch is cut into steps, ranks and micro-batches; the order of samples is of package `cache` ([`cache::order`]).

pub use cache::order::{EpochOrder, Order, Paged, Shuffle, mix};

use super::BatchRequest;
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
}

impl BatchPlanner {
    /// The same planner, its numbers checked.
    ///
    /// # Errors
    /// A factor is 0, the rank is outside the world, a rank would have no sample in a training step, or a training set
    /// does not fill one global batch.
    pub fn checked(self) -> Result<Self, DataError> {
        let Self { ref order, global_batch, micro_batch, rank, world_size, drop_last } = self;
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

    /// Steps of one epoch, the same on every rank.
    pub fn steps_per_epoch(&self) -> u64 {
        if self.drop_last { self.order.len / self.global_batch } else { self.order.len.div_ceil(self.global_batch) }
    }

    /// Samples of `step` over all ranks.
    pub fn step_samples(&self, step: u64) -> u64 {
        if step >= self.steps_per_epoch() {
            return 0;
        }
        (self.order.len - step * self.global_batch).min(self.global_batch)
    }

    /// Samples of `step` on this rank.
    pub fn rank_samples(&self, step: u64) -> u64 {
        self.step_samples(step).saturating_sub(self.rank).div_ceil(self.world_size)
    }

    /// Micro-batches that this rank runs in `step`; 0 where a last validation batch has nothing for it.
    pub fn micro_batches(&self, step: u64) -> u64 {
        self.rank_samples(step).div_ceil(self.micro_batch)
    }

    /// Sample ids of `step` over all ranks, in order.
    pub fn global_ids(&self, epoch: u64, step: u64) -> Vec<u64> {
        let order = self.order.epoch(epoch);
        let start = step.saturating_mul(self.global_batch);
        (0..self.step_samples(step)).filter_map(|item| order.at(start + item)).collect()
    }

    /// This rank's micro-batch `micro` of `step`.
    pub fn request(&self, epoch: u64, step: u64, micro: u64) -> BatchRequest {
        let order = self.order.epoch(epoch);
        let start = step.saturating_mul(self.global_batch) + self.rank;
        let first = (micro * self.micro_batch).min(self.rank_samples(step));
        let last = (first + self.micro_batch).min(self.rank_samples(step));
        let sample_ids = (first..last).filter_map(|item| order.at(start + item * self.world_size)).collect();
        BatchRequest { epoch, step, micro, micros: self.micro_batches(step), sample_ids }
    }

    /// This rank's micro-batches of `epoch` from `first_step` on, computed as they are asked for.
    pub fn requests(&self, epoch: u64, first_step: u64) -> impl Iterator<Item = BatchRequest> + Send + use<> {
        let planner = Arc::new(self.clone());
        (first_step..planner.steps_per_epoch()).flat_map(move |step| {
            let planner = Arc::clone(&planner);
            (0..planner.micro_batches(step)).map(move |micro| planner.request(epoch, step, micro))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planner(len: u64, global_batch: u64, micro_batch: u64, rank: u64, world_size: u64) -> BatchPlanner {
        let order = Order { len, seed: 9, shuffle: Shuffle::Global };
        BatchPlanner { order, global_batch, micro_batch, rank, world_size, drop_last: false }
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
                        (0..cut.micro_batches(step)).flat_map(|m| cut.request(2, step, m).sample_ids).collect();
                    assert_eq!(ids.len() as u64, cut.rank_samples(step));
                    for (item, id) in ids.into_iter().enumerate() {
                        items[rank as usize + item * world as usize] = Some(id);
                    }
                }
                assert_eq!(items.into_iter().flatten().collect::<Vec<_>>(), whole, "world {world}");
            }
        }
    }

    #[test]
    fn a_last_incomplete_batch_is_dropped_in_training_and_kept_in_validation() {
        let val = planner(103, 12, 5, 2, 3);
        let train = BatchPlanner { drop_last: true, ..val.clone() };
        assert_eq!((val.steps_per_epoch(), train.steps_per_epoch()), (9, 8));
        assert_eq!((val.step_samples(8), val.rank_samples(8), train.step_samples(8)), (7, 2, 0));
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
