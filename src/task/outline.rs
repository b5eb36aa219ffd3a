//! Data sets without their samples: shapes and sizes, for a plan.

use super::{Batch, Datasets, Team};
use crate::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use spec::contract::{CacheMode, DataSizes};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Bytes that a loader thread has in hand at the least while it decodes. Source: chunks of the sample files, raw and decoded,
/// are 1 MiB together; larger ones are read all the same.
pub const SCRATCH_BYTES: u64 = 4 << 20;

/// Shapes of a task's samples, and sizes of its data set.
pub struct Outline {
    /// Data sets that [`super::Task::model`] and [`super::Task::metrics`] are built for. Nothing is read from them.
    pub datasets: Datasets,
    pub sizes: DataSizes,
}

impl Outline {
    /// For samples of these fields in training, and in evaluation.
    pub fn new(train: Vec<FieldSpec>, val: Vec<FieldSpec>, sizes: DataSizes) -> Self {
        let [train, val, test] =
            [train, val.clone(), val].map(|fields| -> Arc<dyn Dataset> { Arc::new(Shapes(fields)) });
        Self { datasets: Datasets::new(train, val, test), sizes }
    }

    /// Outline of data sets that are open: each sample counts as an entry of the page cache.
    pub fn of_open(datasets: Datasets) -> Self {
        let bytes = |data: &dyn Dataset| data.fields().iter().map(|field| field.sample_bytes() as u64).sum::<u64>();
        let sample = bytes(datasets.train.as_ref());
        let all = [&datasets.train, &datasets.val, &datasets.test];
        let useful_bytes = all.iter().map(|data| bytes(data.as_ref()).saturating_mul(data.len() as u64)).sum();
        let samples: usize = all.iter().map(|data| data.len()).sum();
        let sizes = DataSizes {
            entry_bytes: [sample; 2],
            scratch_bytes: sample.max(SCRATCH_BYTES),
            useful_bytes,
            useful: format!("{samples} samples of {sample} B"),
            auto_policy: CacheMode::Pin,
            ..DataSizes::default()
        };
        Self { datasets, sizes }
    }
}

impl Team<'_> {
    /// A team of one rank without a page cache.
    pub fn alone() -> Team<'static> {
        Team {
            rank: 0,
            world_size: 1,
            gather: &|bytes: &[u8]| Ok(vec![bytes.to_vec()]),
            cache: None,
            kept: None,
            stages: Default::default(),
        }
    }
}

/// libtorch's name of an element type.
pub fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bool => Kind::Bool,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::F16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::I32 => Kind::Int,
        Dtype::F32 => Kind::Float,
        Dtype::I64 => Kind::Int64,
        Dtype::F64 => Kind::Double,
    }
}

/// A batch of `samples` made-up samples: numbers between 0 and 1, random bytes, zeros for whole numbers. Ragged ones are as
/// long as they can be.
///
/// # Errors
/// There is no memory for it.
pub fn made_up(fields: &[FieldSpec], samples: usize, device: Device) -> Result<Batch, tch::TchError> {
    let tensor = |field: &FieldSpec| {
        let rows = samples * field.most_rows();
        let shape: Vec<i64> = std::iter::once(rows).chain(field.shape.iter().copied()).map(|n| n as i64).collect();
        let options = (kind(field.dtype), device);
        match field.dtype {
            Dtype::U8 => Tensor::f_randint(256, &shape, options),
            Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 => Tensor::f_rand(&shape, options),
            Dtype::Bool | Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => Tensor::f_zeros(&shape, options),
        }
    };
    let offsets = |field: &FieldSpec| {
        let most = field.most_rows() as i64;
        field.has_offsets().then(|| Tensor::f_arange(samples as i64 + 1, (Kind::Int64, device))?.f_mul_scalar(most))
    };
    let of = |field| std::iter::once(tensor(field)).chain(offsets(field));
    Ok(Batch::new(fields.iter().flat_map(of).collect::<Result<_, _>>()?, (0..samples as u64).collect()))
}

/// Fields without samples.
struct Shapes(Vec<FieldSpec>);

impl Dataset for Shapes {
    fn len(&self) -> usize {
        0
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.0
    }

    fn read(&self, request: ReadRequest, _: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        Err(DataError::NothingUsable(format!("sample {} of an outline, which has none", request.index)))
    }

    fn describe(&self, index: usize) -> String {
        format!("sample {index} of an outline")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_batches_have_the_shapes_and_types_of_their_fields() {
        let field = |name, shape: &[usize], dtype| FieldSpec::new(name, shape, dtype);
        let fields = [field("x", &[3, 2], Dtype::F32), field("y", &[5], Dtype::U8), field("label", &[], Dtype::I64)];
        let batch = made_up(&fields, 4, Device::Cpu).unwrap();
        let shapes: Vec<Vec<i64>> = batch.fields.iter().map(Tensor::size).collect();
        assert_eq!(shapes, [vec![4, 3, 2], vec![4, 5], vec![4]]);
        let kinds: Vec<Kind> = batch.fields.iter().map(Tensor::kind).collect();
        assert_eq!(kinds, [Kind::Float, Kind::Uint8, Kind::Int64]);
        assert_eq!(batch.len(), 4);
        let ids = FieldSpec::ragged("ids", &[], Dtype::I16, 7);
        let fields = [ids.clone(), FieldSpec::along("values", &[2], Dtype::F32, (0, &ids))];
        let batch = made_up(&fields, 3, Device::Cpu).unwrap();
        let shapes: Vec<Vec<i64>> = batch.fields.iter().map(Tensor::size).collect();
        assert_eq!(shapes, [vec![21], vec![4], vec![21, 2]]);
        assert_eq!(Vec::<i64>::try_from(&batch.fields[1]).unwrap(), [0, 7, 14, 21]);
    }
}
