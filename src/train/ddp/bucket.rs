//! Where parameters lie in the flat tensors, and which ranges are reduced together.

use tch::{TchError, Tensor};

/// Bytes of the first bucket: small, so that communication starts early.
const FIRST_BUCKET_BYTES: usize = 1 << 20;
/// Parameters start on multiples of this many elements: a cache line.
pub(super) const ALIGN: usize = 16;

/// Place of one parameter in a flat tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First element.
    pub offset: usize,
    pub shape: Vec<i64>,
}

impl Slot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements with the gap that follows.
    pub fn padded_len(&self) -> usize {
        self.len().next_multiple_of(ALIGN)
    }
}

/// Places of all parameters, by their index as registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    len: usize,
}

impl Layout {
    /// Elements of the flat tensor, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Parameter `index` as a view of `flat`.
    ///
    /// # Errors
    /// `flat` is too short.
    pub fn view(&self, flat: &Tensor, index: usize) -> Result<Tensor, TchError> {
        let slot = &self.slots[index];
        flat.f_narrow(0, slot.offset as i64, slot.len() as i64)?.f_view(slot.shape.as_slice())
    }

    /// Moves a flat tensor from the places of `old` to those of `self`; what follows the places stays.
    ///
    /// # Errors
    /// `flat` is too short.
    pub fn refill(&self, flat: &mut Tensor, old: &Layout) -> Result<(), TchError> {
        let _no_grad = tch::no_grad_guard();
        let mut places = flat.f_narrow(0, 0, self.len as i64)?;
        // Every layout of the same parameters has the same length: each slot is padded on its own.
        let before = places.f_detach_copy()?;
        let _ = places.f_zero_()?;
        for index in 0..self.slots.len() {
            self.view(&places, index)?.f_copy_(&old.view(&before, index)?)?;
        }
        Ok(())
    }
}

/// A range of the flat gradients that is reduced at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    pub start: usize,
    pub len: usize,
    /// Indices of its parameters.
    pub members: Vec<usize>,
}

/// A layout with its buckets.
pub(super) struct Plan {
    pub layout: Layout,
    pub buckets: Vec<Bucket>,
}

impl Plan {
    /// Puts parameters into buckets in `order`, and closes a bucket when the next one would make it larger than
    /// `bucket_bytes`. Within a bucket parameters of a group (`groups`, by index; empty: one) are neighbours.
    pub fn new(shapes: &[Vec<i64>], order: &[usize], bucket_bytes: usize, groups: &[usize]) -> Plan {
        let mut slots: Vec<Slot> = shapes.iter().map(|shape| Slot { offset: 0, shape: shape.clone() }).collect();
        let mut buckets: Vec<Bucket> = vec![Bucket { start: 0, len: 0, members: Vec::new() }];
        let mut len = 0;
        for &index in order {
            let padded = slots[index].padded_len();
            let limit = if buckets.len() == 1 { FIRST_BUCKET_BYTES.min(bucket_bytes) } else { bucket_bytes };
            if buckets.last().is_some_and(|b| b.len > 0 && (b.len + padded) * 4 > limit) {
                buckets.push(Bucket { start: len, len: 0, members: Vec::new() });
            }
            if let Some(bucket) = buckets.last_mut() {
                bucket.len += padded;
                bucket.members.push(index);
            }
            len += padded;
        }
        for bucket in &mut buckets {
            bucket.members.sort_by_key(|&index| groups.get(index).copied().unwrap_or(0));
            let mut at = bucket.start;
            for &index in &bucket.members {
                slots[index].offset = at;
                at += slots[index].padded_len();
            }
        }
        Plan { layout: Layout { slots, len }, buckets }
    }
}

/// Reads an order of `n` parameters from little-endian `u64`; those that are not in it follow, last registered first.
/// None if it names one twice or one that there is not.
pub(super) fn complete_order(bytes: &[u8], n: usize) -> Option<Vec<usize>> {
    let mut used = vec![false; n];
    let mut order = Vec::with_capacity(n);
    for chunk in bytes.chunks(8) {
        let index = usize::try_from(u64::from_le_bytes(chunk.try_into().ok()?)).ok()?;
        if std::mem::replace(used.get_mut(index)?, true) {
            return None;
        }
        order.push(index);
    }
    order.extend((0..n).rev().filter(|&index| !used[index]));
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn first_bucket_is_small_and_all_places_are_disjoint() {
        let shapes = vec![vec![1000, 300], vec![7], vec![], vec![1000, 500], vec![3, 3]];
        let Plan { layout, buckets } = Plan::new(&shapes, &[4, 3, 2, 1, 0], 3 << 20, &[]);
        let members: Vec<_> = buckets.iter().map(|b| b.members.clone()).collect();
        assert_eq!(members, [vec![4], vec![3, 2, 1], vec![0]]);
        let mut used = vec![0; layout.len()];
        for slot in layout.slots() {
            assert_eq!(slot.offset % ALIGN, 0);
            used[slot.offset..slot.offset + slot.len()].iter_mut().for_each(|n| *n += 1);
        }
        assert!(used.iter().all(|&n| n <= 1));
        assert_eq!(used.iter().sum::<i32>(), 800_017);
        assert_eq!(buckets.iter().map(|b| b.len).sum::<usize>(), layout.len());
    }

    #[test]
    fn members_of_a_group_are_neighbours_in_each_bucket_and_buckets_keep_their_members() {
        // Weights and biases of four layers, two layers a bucket.
        let shapes =
            vec![vec![16, 16], vec![16], vec![16, 16], vec![16], vec![16, 16], vec![16], vec![16, 16], vec![16]];
        let (order, groups) = ([7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]);
        let members = |groups: &[usize]| -> Vec<Vec<usize>> {
            Plan::new(&shapes, &order, 2 * 272 * 4, groups).buckets.into_iter().map(|bucket| bucket.members).collect()
        };
        assert_eq!(members(&[]), [vec![7, 6, 5, 4], vec![3, 2, 1, 0]]);
        assert_eq!(members(&groups), [vec![6, 4, 7, 5], vec![2, 0, 3, 1]]);
        let layout = Plan::new(&shapes, &order, 2 * 272 * 4, &groups).layout;
        let offsets: Vec<usize> = [6, 4, 7, 5, 2].iter().map(|&index: &usize| layout.slots()[index].offset).collect();
        assert_eq!(offsets, [0, 256, 512, 528, 544]);
    }

    #[test]
    fn orders_are_completed_and_checked() {
        let bytes = |order: &[u64]| order.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(complete_order(&bytes(&[2, 0]), 4), Some(vec![2, 0, 3, 1]));
        assert_eq!(complete_order(&bytes(&[2, 2]), 4), None);
        assert_eq!(complete_order(&bytes(&[4]), 4), None);
        assert_eq!(complete_order(&[1, 2], 4), None);
    }

    #[test]
    fn refill_moves_every_parameter_and_keeps_the_tail() {
        let shapes = vec![vec![3], vec![20], vec![2, 2]];
        let old = Plan::new(&shapes, &[0, 1, 2], 1 << 20, &[]).layout;
        let new = Plan::new(&shapes, &[2, 0, 1], 1 << 20, &[]).layout;
        let mut flat = Tensor::zeros([old.len() as i64 + 2], (Kind::Float, Device::Cpu));
        let _ = flat.narrow(0, old.len() as i64, 2).fill_(9.0);
        for index in 0..3 {
            let _ = old.view(&flat, index).unwrap().fill_(index as f64 + 1.0);
        }
        new.refill(&mut flat, &old).unwrap();
        for (index, shape) in shapes.iter().enumerate() {
            let view = new.view(&flat, index).unwrap();
            assert_eq!((view.min().double_value(&[]), &view.size()), (index as f64 + 1.0, shape));
        }
        assert_eq!(flat.sum(Kind::Float).double_value(&[]), 3.0 + 40.0 + 12.0 + 18.0);
    }
}
