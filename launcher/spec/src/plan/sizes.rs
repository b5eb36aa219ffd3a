//! Checked arithmetic on bytes, and budget lines made of it.

use super::{BudgetLine, PlanError};
use crate::contract::LineId;

pub(super) const OVERFLOW: PlanError = PlanError::Overflow {
    what: "the memory plan",
    keys: "train.batch_size, train.num_workers, train.prefetch_factor, sample and model sizes and the number of ranks",
};

pub(super) fn product(factors: &[u64]) -> Result<u64, PlanError> {
    factors.iter().try_fold(1u64, |product, factor| product.checked_mul(*factor)).ok_or(OVERFLOW)
}

pub(super) fn sum(terms: &[u64]) -> Result<u64, PlanError> {
    terms.iter().try_fold(0u64, |sum, term| sum.checked_add(*term)).ok_or(OVERFLOW)
}

/// `bytes` times a fraction, rounded up.
pub(super) fn times(bytes: u64, (numerator, denominator): (u64, u64)) -> Result<u64, PlanError> {
    Ok(product(&[bytes, numerator])?.div_ceil(denominator))
}

pub(super) fn once(name: LineId, bytes: u64, formula: String) -> BudgetLine {
    BudgetLine { name, bytes, formula, ..BudgetLine::default() }
}

pub(super) fn per_rank(name: LineId, bytes: u64, ranks: u64, formula: String) -> Result<BudgetLine, PlanError> {
    let all = product(&[bytes, ranks])?;
    Ok(BudgetLine { name, bytes: all, per_rank_bytes: Some(bytes), formula, bound: false })
}
