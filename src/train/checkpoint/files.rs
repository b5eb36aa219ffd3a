//! The files' bytes: tensors staged in host memory, safetensors, the manifest and its own checksum.

use super::{CheckpointError, FileFacts, Manifest, io_error};
use libdeflater::Crc;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Bytes written between two checks of the sum; fits a cache.
const CHUNK_BYTES: usize = 1 << 20;

/// A tensor's bytes in host memory.
pub(super) struct Staged {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

/// Host memory that saving these tensors takes, bytes.
pub fn staging_bytes<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> u64 {
    tensors.into_iter().map(|t| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum()
}

/// Copies tensors from wherever they are.
pub(super) fn stage(step: u64, tensors: &[(String, Tensor)]) -> Result<Vec<Staged>, CheckpointError> {
    let fail = |name: &str, problem: String| CheckpointError::Tensor { step, name: name.into(), problem };
    let one = |(name, tensor): &(String, Tensor)| -> Result<Staged, CheckpointError> {
        let torch = |e: tch::TchError| fail(name, e.to_string());
        let dtype = dtype_of(tensor.f_kind().map_err(torch)?).map_err(|problem| fail(name, problem))?;
        let host = tensor.detach().f_to_device(Device::Cpu).and_then(|t| t.f_contiguous()).map_err(torch)?;
        let mut bytes = vec![0; host.numel() * host.kind().elt_size_in_bytes()];
        host.f_copy_data_u8(&mut bytes, host.numel()).map_err(torch)?;
        let shape = host.size().iter().map(|d| *d as usize).collect();
        Ok(Staged { name: name.clone(), shape, dtype, bytes })
    };
    let mut staged = tensors.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    // Wide types first keeps every tensor aligned; then by name, so that equal states are equal files.
    staged.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    if let Some(twice) = staged.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(fail(&twice[0].name, "is named twice".into()));
    }
    Ok(staged)
}

/// The safetensors file of these tensors: header length, header, then the data (`safetensors` format, version 1).
pub(super) struct Image {
    head: Vec<u8>,
    tensors: Vec<Staged>,
}

impl Image {
    pub(super) fn new(path: &Path, tensors: Vec<Staged>) -> Result<Self, CheckpointError> {
        let corrupt = |problem: String| CheckpointError::Corrupt { path: path.to_owned(), problem };
        let mut at = 0;
        let infos = tensors.iter().map(|t| {
            let data_offsets = (at, at + t.bytes.len());
            at = data_offsets.1;
            (t.name.clone(), TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets })
        });
        let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(about), infos.collect()).map_err(|e| corrupt(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| corrupt(e.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(&header);
        Ok(Self { head, tensors })
    }

    /// A file of these bytes, without tensors.
    pub(super) fn plain(bytes: Vec<u8>) -> Self {
        Self { head: bytes, tensors: Vec::new() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.parts().map(|part| part.len() as u64).sum()
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(self.head.as_slice()).chain(self.tensors.iter().map(|t| t.bytes.as_slice()))
    }

    /// Writes and syncs the file.
    pub(super) fn write(&self, path: &Path) -> io::Result<FileFacts> {
        let mut file = File::create(path)?;
        let mut sum = Crc::new();
        for chunk in self.parts().flat_map(|part| part.chunks(CHUNK_BYTES)) {
            sum.update(chunk);
            file.write_all(chunk)?;
        }
        file.sync_all()?;
        Ok(FileFacts { bytes: self.bytes(), crc32: sum.sum() })
    }
}

/// Manifest as JSON with the CRC-32 of its other keys, which serialise in sorted order, under `crc32`.
pub(super) fn encode_manifest(manifest: &Manifest) -> serde_json::Result<Vec<u8>> {
    let mut value = serde_json::to_value(manifest)?;
    let crc32 = libdeflater::crc32(&serde_json::to_vec(&value)?);
    value["crc32"] = crc32.into();
    let mut text = serde_json::to_vec_pretty(&value)?;
    text.push(b'\n');
    Ok(text)
}

pub(super) fn read_manifest(path: &Path) -> Result<Manifest, CheckpointError> {
    let corrupt = |problem: String| CheckpointError::Corrupt { path: path.to_owned(), problem };
    let text = std::fs::read(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => corrupt("the manifest is missing, so this is no whole checkpoint".into()),
        _ => io_error(path, "read")(e),
    })?;
    let mut value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| corrupt(format!("the manifest is damaged: {e}")))?;
    let stored = value.as_object_mut().and_then(|map| map.remove("crc32")).and_then(|crc| crc.as_u64());
    let found = u64::from(libdeflater::crc32(&serde_json::to_vec(&value).map_err(|e| corrupt(e.to_string()))?));
    let manifest: Result<Manifest, _> = serde_json::from_value(value);
    if stored != Some(found) {
        return Err(corrupt("the manifest is damaged: its checksum does not fit".into()));
    }
    manifest.map_err(|e| corrupt(format!("the manifest is of another version: {e}")))
}

/// Torch's kinds and the format's types, both ways.
const TYPES: [(Kind, Dtype); 10] = [
    (Kind::Bool, Dtype::BOOL),
    (Kind::Uint8, Dtype::U8),
    (Kind::Int8, Dtype::I8),
    (Kind::Int16, Dtype::I16),
    (Kind::Int, Dtype::I32),
    (Kind::Int64, Dtype::I64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
];

fn dtype_of(kind: Kind) -> Result<Dtype, String> {
    let found = TYPES.iter().find(|(k, _)| *k == kind).map(|(_, d)| *d);
    found.ok_or_else(|| format!("has type {kind:?}, which safetensors files cannot hold"))
}

pub(super) fn kind_of(dtype: Dtype) -> Result<Kind, String> {
    let found = TYPES.iter().find(|(_, d)| *d == dtype).map(|(k, _)| *k);
    found.ok_or_else(|| format!("has type {dtype:?}, which is not supported"))
}
