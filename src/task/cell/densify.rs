//! Cells of a batch as a matrix, on the device of the batch: sparse counts travel, expression is made where it is used.

use crate::task::Batch;
use crate::torch::host::{Element, filled_rows, read};
use tch::{Device, Kind, Tensor};

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
    let on_cpu = batch.fields.iter().all(|field| field.device() == Device::Cpu);
    let made = if on_cpu { on_this_thread(batch, genes as usize, scale) } else { None };
    made.unwrap_or_else(|| on_device(batch, genes, scale))
}

/// Counts below this one have their expression worked out once per cell: there are few different ones.
const SMALL: usize = 256;

/// Counts below this one, which most are, have it worked out ahead.
const FEW: usize = 32;

/// [`dense`] without a chain of tensors. `None`: the batch is not what it must be, and libtorch says how.
fn on_this_thread(batch: &Batch, genes: usize, scale: &Scale) -> Option<Tensor> {
    let [ids, offsets, values, ..] = &batch.fields[..] else { return None };
    let offsets = read(offsets, |offsets: &[i64]| offsets.to_vec())?;
    match (ids.kind(), values.kind()) {
        (Kind::Int16, Kind::Int16) => by_kinds::<i16, i16>(ids, values, &offsets, genes, scale),
        (Kind::Int16, Kind::Float) => by_kinds::<i16, f32>(ids, values, &offsets, genes, scale),
        (Kind::Int, Kind::Int16) => by_kinds::<i32, i16>(ids, values, &offsets, genes, scale),
        (Kind::Int, Kind::Float) => by_kinds::<i32, f32>(ids, values, &offsets, genes, scale),
        _ => None,
    }
}

fn by_kinds<I: Place, V: Amount>(
    ids: &Tensor,
    values: &Tensor,
    offsets: &[i64],
    genes: usize,
    scale: &Scale,
) -> Option<Tensor> {
    read(ids, |ids: &[I]| read(values, |values: &[V]| fill(ids, values, offsets, genes, scale)))??
}

fn fill<I: Place, V: Amount>(ids: &[I], values: &[V], offsets: &[i64], genes: usize, scale: &Scale) -> Option<Tensor> {
    let cells = offsets.len().checked_sub(1)?;
    let fits = offsets.is_sorted()
        && offsets.first() == Some(&0)
        && offsets.last().is_some_and(|end| *end as usize == ids.len() && ids.len() == values.len());
    if !fits {
        return None;
    }
    let mut inside = true;
    let made = filled_rows(cells, genes, |cell, row| {
        let range = offsets[cell] as usize..offsets[cell + 1] as usize;
        inside &= V::spread(&ids[range.clone()], &values[range], scale, row);
    });
    made.ok().filter(|_| inside)
}

/// A gene as a batch has it.
trait Place: Element {
    fn place(self) -> usize;
}

impl Place for i16 {
    /// The bits of a u16.
    fn place(self) -> usize {
        usize::from(self as u16)
    }
}

impl Place for i32 {
    fn place(self) -> usize {
        self as usize
    }
}

/// Values as a batch has them.
trait Amount: Element {
    /// Writes the expression of a cell's values to the places of its genes in `row`. False: a gene has no place.
    fn spread<I: Place>(ids: &[I], values: &[Self], scale: &Scale, row: &mut [f32]) -> bool;
}

/// Writes `expressed` of each value to its gene's place.
#[inline(always)]
fn write<I: Place, V: Copy>(ids: &[I], values: &[V], row: &mut [f32], mut expressed: impl FnMut(V) -> f32) -> bool {
    let mut inside = true;
    for (id, value) in ids.iter().zip(values) {
        match row.get_mut(id.place()) {
            Some(cell) => *cell = expressed(*value),
            None => inside = false,
        }
    }
    inside
}

impl Amount for i16 {
    /// The bits of u16: counts.
    fn spread<I: Place>(ids: &[I], values: &[Self], scale: &Scale, row: &mut [f32]) -> bool {
        let (mut sum, mut most) = (0u64, 0u16);
        // Sums of a few values fit 32 bits, of which processors add more at once where nobody checks each.
        for some in values.chunks(1 << 15) {
            sum += u64::from(some.iter().fold(0u32, |sum, value| sum.wrapping_add(u32::from(*value as u16))));
            most = some.iter().fold(most, |most, value| most.max(*value as u16));
        }
        let divisor = scale.divisor(sum as f64);
        let few: [f32; FEW] =
            std::array::from_fn(|n| if n <= usize::from(most) { scale.of(n as f32, divisor) } else { 0.0 });
        if usize::from(most) < FEW {
            return write(ids, values, row, |value| few[usize::from(value as u16) % FEW]);
        }
        let mut known = [f32::NAN; SMALL];
        write(ids, values, row, |value| {
            let count = value as u16;
            match (few.get(usize::from(count)), known.get_mut(usize::from(count))) {
                (Some(few), _) => *few,
                (None, Some(known)) => {
                    if known.is_nan() {
                        *known = scale.of(f32::from(count), divisor);
                    }
                    *known
                }
                (None, None) => scale.of(f32::from(count), divisor),
            }
        })
    }
}

impl Amount for f32 {
    fn spread<I: Place>(ids: &[I], values: &[Self], scale: &Scale, row: &mut [f32]) -> bool {
        let divisor = scale.divisor(values.iter().map(|value| f64::from(*value)).sum());
        write(ids, values, row, |value| scale.of(value, divisor))
    }
}

impl Scale {
    /// Divisor of the values of a cell with this sum.
    fn divisor(&self, sum: f64) -> f32 {
        let divisor = if self.target_sum > 0.0 { (sum / self.target_sum) as f32 } else { 1.0 };
        if divisor > 0.0 { divisor } else { 1.0 }
    }

    fn of(&self, value: f32, divisor: f32) -> f32 {
        let scaled = value / divisor;
        if self.log1p { scaled.ln_1p() } else { scaled }
    }
}

/// [`dense`] by the device of the batch.
fn on_device(batch: &Batch, genes: i64, scale: &Scale) -> Tensor {
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
        values /= divisor.index_select(0, &rows);
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

    #[test]
    fn both_ways_agree() {
        let lengths = [0i64, 300, 7, 900, 0, 55];
        let offsets: Vec<i64> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |at, n| {
                *at += n;
                Some(*at)
            }))
            .collect();
        let ids: Vec<i16> = lengths.iter().flat_map(|n| (0..*n).map(|id| id as i16)).collect();
        let counts: Vec<i16> = (0..ids.len())
            .map(|n| if n < 300 { n as i16 % 32 } else { [1, 2, 3, 700, 255, 256, -9, 1][n % 8] })
            .collect();
        let numbers: Vec<f32> = counts.iter().map(|count| f32::from(*count as u16) / 7.0).collect();
        let wide: Vec<i32> = ids.iter().map(|id| i32::from(*id)).collect();
        let labels = Tensor::from_slice(&[0i64; 6]);
        let batch = |ids: Tensor, values: Tensor| {
            Batch::new(vec![ids, Tensor::from_slice(&offsets), values, labels.shallow_clone()], (0..6).collect())
        };
        let batches = [
            batch(Tensor::from_slice(&ids), Tensor::from_slice(&counts)),
            batch(Tensor::from_slice(&wide), Tensor::from_slice(&numbers)),
        ];
        for batch in batches {
            for (target_sum, log1p) in [(1e4, true), (0.0, true), (1e4, false), (0.0, false)] {
                let scale = Scale { target_sum, log1p };
                let (here, there) = (on_this_thread(&batch, 1000, &scale).unwrap(), on_device(&batch, 1000, &scale));
                let far = ((&here - &there).abs() / (there.abs() + 1e-6)).max().double_value(&[]);
                assert!(far < 1e-6, "{far} {scale:?}");
                assert_eq!(
                    here.ne_tensor(&Tensor::zeros_like(&here)).sum(Kind::Int64),
                    there.ne_tensor(&Tensor::zeros_like(&there)).sum(Kind::Int64)
                );
            }
        }
        // Gene 2 of two.
        assert!(on_this_thread(&self::batch(), 2, &Scale { target_sum: 1e4, log1p: true }).is_none());
    }
}
