//! Bytes of a pass with any number of samples, from the few passes that were measured.
//!
//! The peak of a pass is the largest of several sums, each a fixed part and a part per sample. As a function of the number of
//! samples it is therefore convex: a straight line between two measured numbers is never below it, and beyond the last one
//! the last two give its direction.

use super::PlanError;
use super::constants::{ASSUMED_PER_FIELD_BYTE, F32_BYTES, FIELD_ALIGN_BYTES, TENSOR_MARGIN};
use super::sizes::{OVERFLOW, product, sum, times};
use crate::contract::{ModelSizes, Pass, Passes};

/// Memory of a pass of a given number of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub samples: u64,
    /// Bytes that one more sample adds.
    pub each: u64,
    /// Bytes of tensors at once.
    pub tensors: u64,
    /// The same with what allocators take beside them.
    pub total: u64,
}

impl Taken {
    /// Memory of training or evaluation with `samples` samples at a time.
    ///
    /// # Errors
    /// The number of bytes overflows.
    pub fn of(model: &ModelSizes, passes: &Passes, samples: usize) -> Result<Self, PlanError> {
        let samples = samples as u64;
        let Some(line) = Line::through(&passes.seen, samples) else { return Self::assumed(model, passes, samples) };
        let (tensors, each) = line.at(|pass| pass.tensor_bytes, samples)?;
        let (beside, _) = line.at(|pass| pass.beside_bytes, samples)?;
        let larger = |bytes: u64| enlarge(bytes, model.enlarged);
        let (tensors, each) = (times(larger(tensors)?, TENSOR_MARGIN)?, times(larger(each)?, TENSOR_MARGIN)?);
        Ok(Self { samples, each, tensors, total: sum(&[tensors, larger(beside)?])? })
    }

    /// Where nothing was measured. Source of both factors: an assumption, above what the shipped configs need.
    fn assumed(model: &ModelSizes, passes: &Passes, samples: u64) -> Result<Self, PlanError> {
        let each = product(&[sum(&passes.fields)?, ASSUMED_PER_FIELD_BYTE])?;
        let weights = product(&[model.parameters, F32_BYTES, 2])?;
        let tensors = sum(&[product(&[samples, each])?, weights])?;
        Ok(Self { samples, each, tensors, total: times(tensors, (3, 2))? })
    }

    /// Bytes that do not grow with the samples.
    pub fn fixed(&self) -> u64 {
        self.tensors.saturating_sub(self.samples.saturating_mul(self.each))
    }
}

fn enlarge(bytes: u64, by: f64) -> Result<u64, PlanError> {
    if by <= 1.0 {
        return Ok(bytes);
    }
    let larger = bytes as f64 * by;
    if larger < u64::MAX as f64 { Ok(larger.ceil() as u64) } else { Err(OVERFLOW) }
}

/// Two measured passes, below and above the wanted number of samples where there are such.
struct Line {
    from: Pass,
    to: Pass,
}

impl Line {
    fn through(seen: &[Pass], samples: u64) -> Option<Self> {
        let (&last, before) = seen.split_last()?;
        // One measurement alone: all of it counts as growing with the samples.
        let (&first, _) = before.split_first().unwrap_or((&Pass { samples: 0, ..Pass::default() }, &[]));
        let above = seen.iter().position(|pass| pass.samples >= samples).unwrap_or(seen.len() - 1);
        let from = if above == 0 { first } else { seen[above - 1] };
        let to = if above == 0 { *seen.get(1).unwrap_or(&last) } else { seen[above] };
        Some(Self { from, to })
    }

    /// Bytes at `samples`, and those that one sample more adds.
    fn at(&self, of: impl Fn(&Pass) -> u64, samples: u64) -> Result<(u64, u64), PlanError> {
        let (low, high) = (of(&self.from), of(&self.to));
        let step = self.to.samples.saturating_sub(self.from.samples).max(1);
        let each = high.saturating_sub(low).div_ceil(step);
        // Fewer samples than were measured need no less than the line has room for.
        let beyond = samples.saturating_sub(self.from.samples);
        Ok((sum(&[low, product(&[each, beyond])?])?, each))
    }
}

/// One batch slot: each field `[samples, …]`, rounded up to whole cache lines.
///
/// # Errors
/// The number of bytes overflows.
pub(super) fn slot_bytes(fields: &[u64], samples: u64) -> Result<u64, PlanError> {
    let field = |bytes: &u64| {
        let all = product(&[samples, *bytes])?;
        all.checked_next_multiple_of(FIELD_ALIGN_BYTES).ok_or(OVERFLOW)
    };
    sum(&fields.iter().map(field).collect::<Result<Vec<_>, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(seen: &[(u64, u64, u64)]) -> ModelSizes {
        let pass =
            |&(samples, tensor_bytes, beside_bytes): &(u64, u64, u64)| Pass { samples, tensor_bytes, beside_bytes };
        let train = Passes { fields: vec![10, 20], seen: seen.iter().map(pass).collect() };
        ModelSizes { parameters: 1000, enlarged: 1.0, train, ..ModelSizes::default() }
    }

    fn taken(model: &ModelSizes, samples: usize) -> Taken {
        Taken::of(model, &model.train, samples).unwrap()
    }

    fn margin(bytes: u64) -> u64 {
        times(bytes, TENSOR_MARGIN).unwrap()
    }

    #[test]
    fn between_measurements_and_beyond_the_last_lines_are_straight() {
        let model = model(&[(1, 1000, 10), (2, 1100, 10), (8, 2000, 40)]);
        for (samples, tensors, beside) in [(1, 1000, 10), (2, 1100, 10), (5, 1550, 25), (8, 2000, 40), (18, 3500, 90)] {
            let found = taken(&model, samples);
            assert_eq!(found.tensors, margin(tensors), "{samples}");
            assert_eq!(found.total, margin(tensors) + beside, "{samples}");
        }
        assert_eq!(taken(&model, 18).each, margin(150));
        assert_eq!(taken(&model, 18).fixed(), margin(3500) - 18 * margin(150));
    }

    #[test]
    fn one_measurement_alone_counts_as_growing_and_none_is_assumed() {
        assert_eq!(taken(&model(&[(1, 1000, 0)]), 3).tensors, margin(3000));
        let none = taken(&model(&[]), 3);
        assert_eq!(none.tensors, 3 * 30 * ASSUMED_PER_FIELD_BYTE + 8000);
        assert!(none.total > none.tensors);
    }

    #[test]
    fn small_samples_stand_for_larger_ones() {
        let small = ModelSizes { enlarged: 4.0, ..model(&[(1, 1000, 10), (2, 1500, 10)]) };
        let found = taken(&small, 2);
        assert_eq!((found.tensors, found.total), (margin(6000), margin(6000) + 40));
    }

    #[test]
    fn absurd_numbers_are_errors() {
        let model = model(&[(1, 1000, 0), (2, 2000, 0)]);
        assert_eq!(Taken::of(&model, &model.train, usize::MAX), Err(OVERFLOW));
        assert!(slot_bytes(&[u64::MAX], 2).is_err());
    }

    #[test]
    fn fields_of_a_slot_are_whole_cache_lines() {
        assert_eq!(slot_bytes(&[10, 64], 3).unwrap(), 64 + 192);
    }
}
