//! A sparse cell as 16-bit genes and counts, in one pass over the bytes of its file.
//!
//! Most cells are small counts of genes in rising order. [`narrow`] writes those; for every other cell it returns `None`, and the
//! long way by [`Cells`](super::Cells) takes over. Loops hold additions and signs in place of branches, which compilers turn into
//! instructions on several numbers at once.

use crate::data::source::hdf5::array::Number;

/// Raw bytes of one sparse cell.
#[derive(Clone, Copy)]
pub struct Raw<'a> {
    pub ids: (Number, &'a [u8]),
    pub values: (Number, &'a [u8]),
    /// Genes of the file.
    pub genes: u64,
}

/// Writes genes and counts of `cell` as u16; their number. `columns`: place of each gene, [`u32::MAX`] for those left out; `None`:
/// the gene itself. Result `None`: genes do not rise or are out of range, a value is no count from 1 to 65,535, types are unusual,
/// or there is no room. What the slices hold is undefined then.
pub fn narrow(cell: Raw, columns: Option<&[u32]>, ids: &mut [[u8; 2]], values: &mut [[u8; 2]]) -> Option<usize> {
    let count = cell.ids.1.len() / cell.ids.0.bytes();
    if cell.values.1.len() != count * cell.values.0.bytes() {
        return None;
    }
    let (ids, values) = (ids.get_mut(..count)?, values.get_mut(..count)?);
    if count == 0 {
        return Some(0);
    }
    let bytes = cell.ids.1;
    let last = match cell.ids.0 {
        Number::U16 => rising(bytes.as_chunks().0, ids, |id| i32::from(u16::from_ne_bytes(*id))),
        Number::I32 => rising(bytes.as_chunks().0, ids, |id| i32::from_ne_bytes(*id)),
        // Numbers beyond i32 become negative ones.
        Number::U32 => rising(bytes.as_chunks().0, ids, |id| i32::from_ne_bytes(*id)),
        Number::I64 => {
            let ids_of = bytes.as_chunks::<8>().0;
            let far = ids_of.iter().fold(0, |far, id| far | (i64::from_ne_bytes(*id) >> 31));
            (far == 0).then(|| rising(ids_of, ids, |id| i64::from_ne_bytes(*id) as i32)).flatten()
        }
        _ => None,
    };
    last.filter(|last| u64::from(*last) < cell.genes && *last <= i32::from(u16::MAX) as u32)?;
    let bytes = cell.values.1;
    let fits = match cell.values.0 {
        Number::U8 => counts(bytes.as_chunks::<1>().0, values, |value| i32::from(value[0])),
        Number::U16 => counts(bytes.as_chunks().0, values, |value| i32::from(u16::from_ne_bytes(*value))),
        Number::I16 => counts(bytes.as_chunks().0, values, |value| i32::from(i16::from_ne_bytes(*value))),
        Number::I32 | Number::U32 => counts(bytes.as_chunks().0, values, |value| i32::from_ne_bytes(*value)),
        Number::I64 | Number::U64 => {
            let wide = bytes.as_chunks::<8>().0;
            let far = wide.iter().fold(0, |far, value| far | (i64::from_ne_bytes(*value) >> 31));
            far == 0 && counts(wide, values, |value| i64::from_ne_bytes(*value) as i32)
        }
        Number::F32 => floats(bytes.as_chunks().0, values),
        Number::F64 => doubles(bytes.as_chunks().0, values),
        Number::I8 => counts(bytes.as_chunks::<1>().0, values, |value| i32::from(value[0] as i8)),
    };
    if !fits {
        return None;
    }
    match columns {
        None => Some(count),
        Some(columns) => in_columns(columns, ids, values),
    }
}

/// The last gene. `None`: they do not rise from 0 on.
#[inline(always)]
fn rising<const N: usize>(from: &[[u8; N]], out: &mut [[u8; 2]], id: impl Fn(&[u8; N]) -> i32) -> Option<u32> {
    let (first, last) = (id(from.first()?), id(from.last()?));
    for (out, from) in out.iter_mut().zip(from) {
        *out = (id(from) as u16).to_ne_bytes();
    }
    // By how much each exceeds the one before, less 1, and each itself: signs of all together.
    let signs = from.windows(2).fold(first, |signs, pair| {
        let (a, b) = (id(&pair[0]), id(&pair[1]));
        signs | b | b.wrapping_sub(a).wrapping_sub(1)
    });
    (signs >= 0).then_some(last as u32)
}

/// False: one is not from 1 to 65,535.
#[inline(always)]
fn counts<const N: usize>(from: &[[u8; N]], out: &mut [[u8; 2]], value: impl Fn(&[u8; N]) -> i32) -> bool {
    let mut odd = 0;
    for (out, from) in out.iter_mut().zip(from) {
        let value = value(from);
        *out = (value as u16).to_ne_bytes();
        odd |= value | value.wrapping_sub(1) | (i32::from(u16::MAX) - value.max(0));
    }
    odd >= 0
}

/// [`counts`] of f32. Adding 2²³ leaves a count in the low bits of the sum.
fn floats(from: &[[u8; 4]], out: &mut [[u8; 2]]) -> bool {
    const WHOLE: f32 = (1 << 23) as f32;
    let mut odd = 0u32;
    for (out, from) in out.iter_mut().zip(from) {
        let value = f32::from_ne_bytes(*from);
        let sum = value + WHOLE;
        *out = (sum.to_bits() as u16).to_ne_bytes();
        odd |= u32::from(!((value >= 1.0) & (value <= f32::from(u16::MAX)) & (sum - WHOLE == value)));
    }
    odd == 0
}

/// [`counts`] of f64, by 2⁵².
fn doubles(from: &[[u8; 8]], out: &mut [[u8; 2]]) -> bool {
    const WHOLE: f64 = (1u64 << 52) as f64;
    let mut odd = 0u64;
    for (out, from) in out.iter_mut().zip(from) {
        let value = f64::from_ne_bytes(*from);
        let sum = value + WHOLE;
        *out = (sum.to_bits() as u16).to_ne_bytes();
        odd |= u64::from(!((value >= 1.0) & (value <= f64::from(u16::MAX)) & (sum - WHOLE == value)));
    }
    odd == 0
}

/// Genes without a column, in 16 bits, where columns are fewer.
const LEFT_OUT: u16 = u16::MAX;

/// Replaces genes by their columns and closes the gaps of those left out; the number left. Few cells have one of those: they are rare
/// genes.
fn in_columns(columns: &[u32], ids: &mut [[u8; 2]], values: &mut [[u8; 2]]) -> Option<usize> {
    let mut most = 0;
    for id in ids.iter_mut() {
        let column = columns.get(usize::from(u16::from_ne_bytes(*id))).copied().unwrap_or(u32::MAX);
        most = most.max(column);
        *id = (column as u16).to_ne_bytes();
    }
    if most < u32::MAX {
        return Some(ids.len());
    }
    if columns.len() > usize::from(LEFT_OUT) {
        return None;
    }
    let mut count = 0;
    for n in 0..ids.len() {
        // What is left out is written over by the next.
        (ids[count], values[count]) = (ids[n], values[n]);
        count += usize::from(u16::from_ne_bytes(ids[n]) != LEFT_OUT);
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::hdf5::array::with_type;
    use proptest::prelude::*;

    fn bytes_of(number: Number, values: &[f64]) -> Vec<u8> {
        macro_rules! each {
            ($type:ty) => {
                values.iter().flat_map(|value| (*value as $type).to_ne_bytes()).collect()
            };
        }
        with_type!(number, each)
    }

    type Pairs = Vec<(u16, u16)>;

    fn made(
        numbers: (Number, Number),
        ids: &[f64],
        values: &[f64],
        genes: u64,
        columns: Option<&[u32]>,
    ) -> Option<Pairs> {
        let (id_bytes, value_bytes) = (bytes_of(numbers.0, ids), bytes_of(numbers.1, values));
        let cell = Raw { ids: (numbers.0, &id_bytes), values: (numbers.1, &value_bytes), genes };
        let (mut into_ids, mut into_values) = ([[0; 2]; 64], [[0; 2]; 64]);
        let count = narrow(cell, columns, &mut into_ids, &mut into_values)?;
        let pairs = into_ids.iter().zip(&into_values).take(count);
        Some(pairs.map(|(id, value)| (u16::from_ne_bytes(*id), u16::from_ne_bytes(*value))).collect())
    }

    const IDS: [Number; 4] = [Number::U16, Number::I32, Number::U32, Number::I64];
    const VALUES: [Number; 10] = [
        Number::U8,
        Number::I8,
        Number::U16,
        Number::I16,
        Number::U32,
        Number::I32,
        Number::U64,
        Number::I64,
        Number::F32,
        Number::F64,
    ];

    #[test]
    fn every_type_gives_the_same_pairs() {
        for number in IDS {
            for value in VALUES {
                let found = made((number, value), &[0.0, 3.0, 9.0], &[1.0, 127.0, 2.0], 10, None);
                assert_eq!(found, Some(vec![(0, 1), (3, 127), (9, 2)]), "{number:?} {value:?}");
                assert_eq!(made((number, value), &[], &[], 10, None), Some(vec![]));
            }
        }
        let columns = [2, u32::MAX, 0, 7];
        let found = made((Number::I32, Number::F32), &[0.0, 1.0, 3.0], &[5.0, 6.0, 65_535.0], 4, Some(&columns));
        assert_eq!(found, Some(vec![(2, 5), (7, 65_535)]));
        // The last of 65,536 columns has the number of none.
        let many: Vec<u32> = (0..65_536).collect();
        let last =
            |columns: &[u32]| made((Number::I32, Number::F32), &[1.0, 65_535.0], &[5.0, 6.0], 65_536, Some(columns));
        assert_eq!(last(&many), Some(vec![(1, 5), (65_535, 6)]));
        let holed: Vec<u32> = many.iter().map(|gene| if *gene == 1 { u32::MAX } else { *gene }).collect();
        assert_eq!(last(&holed), None);
    }

    #[test]
    fn unusual_cells_are_left_to_the_long_way() {
        let plain = |ids: &[f64], values: &[f64]| made((Number::I32, Number::F32), ids, values, 10, None);
        for (ids, why) in
            [([3.0, 3.0], "twice"), ([4.0, 3.0], "falls"), ([-1.0, 3.0], "negative"), ([3.0, 10.0], "out of range")]
        {
            assert_eq!(plain(&ids, &[1.0, 1.0]), None, "{why}");
        }
        for number in [Number::F32, Number::F64] {
            for value in [0.0, -0.0, -1.0, 0.5, 1.5, 65_536.0, 1e30, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert_eq!(
                    made((Number::I32, number), &[1.0, 2.0], &[value, 1.0], 10, None),
                    None,
                    "{number:?} {value}"
                );
            }
        }
        for number in [Number::I16, Number::I32, Number::U32, Number::I64, Number::U64] {
            for value in [0.0, -1.0, 65_536.0, 4_294_967_295.0, 4_294_967_297.0] {
                let cast = bytes_of(number, &[value]);
                let mut known = Vec::new();
                number.widen(&cast, &mut known);
                let expected = (1.0..=65_535.0).contains(&known[0]).then(|| vec![(1, known[0] as u16)]);
                assert_eq!(made((Number::I32, number), &[1.0], &[value], 10, None), expected, "{number:?} {value}");
            }
        }
        assert_eq!(made((Number::I64, Number::F32), &[4_294_967_296.0], &[1.0], u64::MAX, None), None);
        assert_eq!(made((Number::I32, Number::F32), &[65_536.0], &[1.0], 100_000, None), None);
        assert_eq!(made((Number::I8, Number::F32), &[1.0], &[1.0], 10, None), None);
        // No room, and one array longer than the other.
        let many: Vec<f64> = (0..65).map(f64::from).collect();
        assert_eq!(made((Number::I32, Number::F32), &many, &vec![1.0; 65], 100, None), None);
        assert_eq!(plain(&[1.0, 2.0], &[1.0]), None);
    }

    proptest! {
        #[test]
        fn agrees_with_the_long_way(ids in proptest::collection::vec(-2i32..40, 0..20),
                                    values in proptest::collection::vec(prop_oneof![-1i32..70_000, 0i32..4], 20),
                                    halves in any::<bool>()) {
            let value = |n: i32| f64::from(n) / if halves { 2.0 } else { 1.0 };
            let ids_of: Vec<f64> = ids.iter().map(|id| f64::from(*id)).collect();
            let values_of: Vec<f64> = values[..ids.len()].iter().map(|n| value(*n)).collect();
            let plain = ids.windows(2).all(|pair| pair[0] < pair[1])
                && ids.iter().all(|id| (0..38).contains(id))
                && values_of.iter().all(|value| value.fract() == 0.0 && (1.0..=65_535.0).contains(value));
            let expected = plain.then(|| ids.iter().zip(&values_of).map(|(id, value)| (*id as u16, *value as u16)).collect());
            prop_assert_eq!(made((Number::I32, Number::F32), &ids_of, &values_of, 38, None), expected);
        }
    }
}
