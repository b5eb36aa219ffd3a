//! Which samples a rank's batch has, as a pure function of (seed, epoch, position).

use cache::order::{Order as Keyed, Shuffle, mix};
use pyo3::prelude::*;

/// The order of a data set's samples in every epoch, the same for any number of ranks.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Order {
    keyed: Keyed,
}

#[pymethods]
impl Order {
    #[new]
    fn new(len: u64, seed: u64, shuffle: bool) -> Self {
        let shuffle = if shuffle { Shuffle::Global } else { Shuffle::Off };
        Self { keyed: Keyed { len, seed, shuffle } }
    }

    /// Samples of one rank in the global batch of `size` samples from `position` of `epoch` on, with their next uses. `pad`:
    /// a last batch that is short gives every rank as many samples, some of them again.
    fn batch(&self, epoch: u64, position: u64, size: u64, place: (u64, u64), pad: bool) -> (Vec<u64>, Vec<u64>) {
        let (order, next) = (self.keyed.epoch(epoch), self.keyed.epoch(epoch.saturating_add(1)));
        let (len, (rank, world)) = (self.keyed.len, place);
        let here = size.min(len.saturating_sub(position));
        let world = world.max(1);
        let count = if pad { here.div_ceil(world) } else { here.saturating_sub(rank).div_ceil(world) };
        let ids = (0..count).filter_map(|item| {
            let item = rank + item * world;
            // Beyond the end come samples of the epoch's beginning.
            order.at(if item < here { position + item } else { (item - here) % len })
        });
        let use_of = |id: u64| {
            let at = next.position_of(id).unwrap_or(0);
            epoch.saturating_add(1).saturating_mul(len).saturating_add(at)
        };
        ids.map(|id| (id, use_of(id))).unzip()
    }

    /// Samples at `first`, `first + step`, … of `epoch`, at most `count` of them.
    fn ids(&self, epoch: u64, first: u64, step: u64, count: usize) -> Vec<u64> {
        let order = self.keyed.epoch(epoch);
        (0..count as u64).map_while(|item| order.at(first + item * step.max(1))).collect()
    }
}

/// A number from two, for seeds of transforms.
#[pyfunction]
pub fn mixed(a: u64, b: u64) -> u64 {
    mix(mix(a.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(b))
}
