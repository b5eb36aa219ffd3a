//! From a batch slot to tensors on the rank's device.

use crate::data::Dtype;
use crate::data::loader::HostBatch;
use crate::task::Batch;
use tch::{Device, Kind, Tensor};

/// Copies a micro-batch out of its slot: one tensor `[B, shape...]` per field.
pub fn to_tensors(host: &HostBatch, device: Device) -> Batch {
    let tensor = |(index, field): (usize, &crate::data::FieldSpec)| {
        let mut shape = vec![host.len() as i64];
        shape.extend(field.shape.iter().map(|&n| n as i64));
        let kind = match field.dtype {
            Dtype::U8 => Kind::Uint8,
            Dtype::F32 => Kind::Float,
            Dtype::I64 => Kind::Int64,
        };
        Tensor::from_data_size(host.field(index), &shape, kind).to_device(device)
    };
    Batch { fields: host.fields().iter().enumerate().map(tensor).collect(), sample_ids: host.sample_ids().to_vec() }
}
