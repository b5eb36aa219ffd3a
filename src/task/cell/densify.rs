//! Cells of a batch as a matrix, on the device of the batch: sparse counts travel, expression is made where it is used.

use crate::task::Batch;
use tch::{Kind, Tensor};

/// How counts become expression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Sum that a cell's values are scaled to; 0: as they are.
    pub target_sum: f64,
    /// Scaled values become `ln(1 + value)`.
    pub log1p: bool,
}

/// Expression f32 `[B, G]`. The sum of a cell is taken in f64; a cell whose sum is 0 stays 0.
pub fn dense(batch: &Batch, genes: i64, scale: &Scale) -> Tensor {
    let (ids, offsets, values) = (unsigned(&batch.fields[0]), &batch.fields[1], &batch.fields[2]);
    let values =
        if values.kind() == Kind::Int16 { unsigned(values).to_kind(Kind::Float) } else { values.to_kind(Kind::Float) };
    let cells = offsets.size()[0] - 1;
    let lengths = offsets.narrow(0, 1, cells) - offsets.narrow(0, 0, cells);
    let rows = Tensor::arange(cells, (Kind::Int64, offsets.device()));
    let rows = rows.repeat_interleave_self_tensor(&lengths, None, values.size()[0]);
    let mut values = values;
    if scale.target_sum > 0.0 {
        let zeros = Tensor::zeros([cells], (Kind::Double, values.device()));
        let sums = zeros.index_add(0, &rows, &values.to_kind(Kind::Double));
        let divisor = (sums / scale.target_sum).to_kind(Kind::Float);
        let divisor = divisor.where_self(&divisor.gt(0.0), &divisor.ones_like());
        values = values / divisor.index_select(0, &rows);
    }
    if scale.log1p {
        values = values.log1p();
    }
    let places = rows * genes + ids;
    let flat = Tensor::zeros([cells * genes], (Kind::Float, values.device()));
    flat.scatter(0, &places, &values).view([cells, genes])
}

/// Classes of the batch's cells, i64 `[B]`; −1: none.
pub fn labels(batch: &Batch) -> Tensor {
    batch.fields[3].shallow_clone()
}

/// Whole numbers as i64; those of 16 bits are unsigned.
fn unsigned(field: &Tensor) -> Tensor {
    let wide = field.to_kind(Kind::Int64);
    if field.kind() == Kind::Int16 { wide.bitwise_and(0xFFFF) } else { wide }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        let ids = Tensor::from_slice(&[0i16, 2, 1, 2]);
        let values = Tensor::from_slice(&[1i16, 3, -1, 1]);
        let fields = vec![ids, Tensor::from_slice(&[0i64, 2, 2, 4]), values, Tensor::from_slice(&[1i64, -1, 0])];
        Batch::new(fields, vec![0, 1, 2])
    }

    #[test]
    fn counts_become_expression_as_scanpy_makes_it() {
        let x = dense(&batch(), 3, &Scale { target_sum: 0.0, log1p: false });
        // 0xFFFF is a count of 65,535.
        assert_eq!(Vec::<f32>::try_from(x.flatten(0, -1)).unwrap(), [1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 65535.0, 1.0]);
        let x = dense(&batch(), 3, &Scale { target_sum: 8.0, log1p: true });
        let expected = [2f32.ln_1p(), 0.0, 6f32.ln_1p(), 0.0, 0.0, 0.0];
        let found = Vec::<f32>::try_from(x.narrow(0, 0, 2).flatten(0, -1)).unwrap();
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        assert_eq!(Vec::<i64>::try_from(labels(&batch())).unwrap(), [1, -1, 0]);
    }
}
