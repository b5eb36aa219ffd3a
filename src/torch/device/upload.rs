//! Copies between host and device, and the host memory that they read.

use super::{Event, Stream};
use crate::torch::{Raw, TorchError, check, raw, scalar_type};
use std::ffi::{c_char, c_int, c_void};
use tch::{Kind, Tensor};

unsafe extern "C" {
    fn hr_upload(dst: Raw, src: *const c_void, bytes: usize, device: c_int, id: i64) -> *mut c_char;
    fn hr_copy(dst: Raw, src: Raw) -> *mut c_char;
    fn hr_pinned(dims: *const i64, ndims: usize, dtype: c_int, out: *mut Raw) -> *mut c_char;
}

/// Host memory that a copy reads until it is done. The parts must stay where they are while the owner lives, moved or
/// not: heap memory, or a mapping.
pub trait HostMemory: Send {
    fn parts(&self) -> Vec<&[u8]>;
}

/// A copy to the device under way. It keeps the host memory; dropping it early waits.
pub struct Upload<H: HostMemory> {
    host: Option<Box<H>>,
    done: Option<Event>,
}

/// Begins to copy each part of `host` into the contiguous tensor at its place in `into`, on `stream`; absent: tensors on
/// the CPU, copied at once. Asynchronous where the memory is page-locked.
///
/// # Errors
/// Numbers or sizes differ, or CUDA refuses.
pub fn upload<H: HostMemory>(host: H, into: &[Tensor], stream: Option<Stream>) -> Result<Upload<H>, TorchError> {
    let mut upload = Upload { host: Some(Box::new(host)), done: None };
    let parts = upload.host.as_ref().map(|host| host.parts()).unwrap_or_default();
    if parts.len() != into.len() {
        let problem = format!("{} parts for {} tensors", parts.len(), into.len());
        return Err(TorchError::Argument { call: "upload", problem });
    }
    let mut result = Ok(());
    for (part, tensor) in parts.iter().zip(into) {
        let (device, id) = stream.map_or((0, 0), |stream| (stream.device, stream.id));
        // SAFETY: the shim compares sizes; the part is read until the event below, and `upload` keeps its owner until then.
        let error = unsafe { hr_upload(raw(tensor), part.as_ptr().cast(), part.len(), device, id) };
        result = result.and(check("copy to the device", error));
    }
    drop(parts);
    if let Some(stream) = stream {
        let recorded = Event::new(false).and_then(|mut event| event.record(stream).map(|()| event));
        match recorded {
            Ok(event) => upload.done = Some(event),
            Err(error) => {
                // Without an event only the stream can say when the memory is free again.
                let _ = stream.synchronize();
                result = result.and(Err(error));
            }
        }
    }
    result.map(|()| upload)
}

impl<H: HostMemory> Upload<H> {
    /// What `stream` is given from now on sees the copied bytes.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn before(&self, stream: Stream) -> Result<(), TorchError> {
        self.done.as_ref().map_or(Ok(()), |event| event.block(stream))
    }

    /// Whether the host memory is free again.
    ///
    /// # Errors
    /// The copy failed.
    pub fn is_done(&self) -> Result<bool, TorchError> {
        self.done.as_ref().map_or(Ok(true), Event::is_done)
    }

    /// Waits, and gives the host memory back.
    ///
    /// # Errors
    /// The copy failed.
    pub fn finish(mut self) -> Result<Option<Box<H>>, TorchError> {
        self.done.as_ref().map_or(Ok(()), Event::synchronize)?;
        self.done = None;
        Ok(self.host.take())
    }
}

impl<H: HostMemory> Drop for Upload<H> {
    fn drop(&mut self) {
        if let Some(done) = &self.done
            && done.synchronize().is_err()
        {
            // The device may still read: better lost than reused.
            std::mem::forget(self.host.take());
        }
    }
}

/// `dst ← src` on the current stream, asynchronous where host memory is page-locked.
///
/// # Errors
/// Shapes that do not fit.
pub fn copy(dst: &Tensor, src: &Tensor) -> Result<(), TorchError> {
    // SAFETY: live tensors.
    check("copy", unsafe { hr_copy(raw(dst), raw(src)) })
}

/// Page-locked host memory.
///
/// # Errors
/// No CUDA, or no memory.
pub fn pinned(shape: &[i64], kind: Kind) -> Result<Tensor, TorchError> {
    let dtype = scalar_type(kind)?;
    let mut out: Raw = std::ptr::null_mut();
    // SAFETY: a shape and a place to write to; on success the tensor is ours.
    unsafe {
        check("page-locked memory", hr_pinned(shape.as_ptr(), shape.len(), dtype, &mut out))?;
        Ok(Tensor::from_ptr(out.cast()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    struct Bytes(Vec<u8>, Vec<u8>);

    impl HostMemory for Bytes {
        fn parts(&self) -> Vec<&[u8]> {
            vec![&self.0, &self.1]
        }
    }

    #[test]
    fn uploads_to_the_cpu_are_done_at_once_and_give_the_memory_back() {
        let into = [Tensor::zeros([2, 2], (Kind::Uint8, Device::Cpu)), Tensor::zeros([1], (Kind::Float, Device::Cpu))];
        let host = Bytes(vec![1, 2, 3, 4], 2.5_f32.to_ne_bytes().to_vec());
        let upload = upload(host, &into, None).unwrap();
        assert!(upload.is_done().unwrap());
        assert_eq!(Vec::<u8>::try_from(into[0].reshape([-1])).unwrap(), [1, 2, 3, 4]);
        assert_eq!(into[1].double_value(&[0]), 2.5);
        assert_eq!(upload.finish().unwrap().unwrap().0, [1, 2, 3, 4]);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let into = [Tensor::zeros([3], (Kind::Uint8, Device::Cpu)), Tensor::zeros([1], (Kind::Float, Device::Cpu))];
        let error = upload(Bytes(vec![1], vec![0; 4]), &into, None).err().unwrap().to_string();
        assert!(error.contains("1 bytes for a tensor of 3"), "{error}");
        let error = upload(Bytes(vec![1], vec![0; 4]), &into[..1], None).err().unwrap().to_string();
        assert!(error.contains("2 parts for 1 tensors"), "{error}");
    }
}
