//! Copies between host and device, and the host memory that they read.

use super::{Event, Stream};
use crate::torch::{Raw, TorchError, check, raw, scalar_type};
use std::ffi::{c_char, c_int, c_void};
use tch::{Kind, Tensor};

unsafe extern "C" {
    fn hr_upload(dst: Raw, start: usize, src: *const c_void, bytes: usize, device: c_int, id: i64) -> *mut c_char;
    fn hr_copy(dst: Raw, src: Raw) -> *mut c_char;
    fn hr_pinned(dims: *const i64, ndims: usize, dtype: c_int, out: *mut Raw) -> *mut c_char;
}

/// Some bytes of host memory, and where they go.
pub struct HostPart<'a> {
    /// Which tensor.
    pub into: usize,
    /// From which of its bytes on.
    pub at: usize,
    pub bytes: &'a [u8],
}

/// Host memory that a copy reads until it is done. The parts must stay where they are while the owner lives, moved or
/// not: heap memory, or a mapping.
pub trait HostMemory: Send {
    /// Every byte of every tensor once: tensor by tensor, from the first byte to the last.
    fn parts(&self) -> Vec<HostPart<'_>>;
}

/// A copy to the device under way. It keeps the host memory; dropping it early waits.
pub struct Upload<H: HostMemory> {
    host: Option<Box<H>>,
    /// Before and after the copies, with their times.
    begun: Option<Event>,
    done: Option<Event>,
}

/// Events before and after a copy, with their times: made once, used again and again.
pub struct Marks {
    begun: Event,
    done: Event,
}

/// As [`upload`], with the marks of an earlier copy that is done.
///
/// # Errors
/// As there.
pub fn upload_marked<H: HostMemory>(
    host: H,
    into: &[Tensor],
    stream: Option<Stream>,
    marks: Option<Marks>,
) -> Result<Upload<H>, TorchError> {
    let mut upload = Upload { host: Some(Box::new(host)), begun: None, done: None };
    let parts = upload.host.as_ref().map(|host| host.parts()).unwrap_or_default();
    check_parts(&parts, into)?;
    let mut after = None;
    if let Some(stream) = stream {
        let Marks { mut begun, done } = match marks {
            Some(marks) => marks,
            None => Marks { begun: Event::new(true)?, done: Event::new(true)? },
        };
        begun.record(stream)?;
        (upload.begun, after) = (Some(begun), Some(done));
    }
    let mut result = Ok(());
    for HostPart { into: number, at, bytes } in &parts {
        let (device, id) = stream.map_or((0, 0), |stream| (stream.device, stream.id));
        // SAFETY: the shim compares sizes; the part is read until the event below, and `upload` keeps its owner until then.
        let error = unsafe { hr_upload(raw(&into[*number]), *at, bytes.as_ptr().cast(), bytes.len(), device, id) };
        result = result.and(check("copy to the device", error));
    }
    drop(parts);
    if let (Some(stream), Some(mut done)) = (stream, after) {
        match done.record(stream) {
            Ok(()) => upload.done = Some(done),
            Err(error) => {
                // Without an event only the stream can say when the memory is free again.
                if stream.synchronize().is_err() {
                    std::mem::forget(upload.host.take());
                }
                result = result.and(Err(error));
            }
        }
    }
    result.map(|()| upload)
}

/// Begins to copy the parts of `host` into the contiguous tensors `into`, on `stream`. `None` means tensors on the CPU,
/// copied at once. Asynchronous where the memory is page-locked.
///
/// # Errors
/// The parts are not what the tensors hold, or CUDA refuses.
pub fn upload<H: HostMemory>(host: H, into: &[Tensor], stream: Option<Stream>) -> Result<Upload<H>, TorchError> {
    upload_marked(host, into, stream, None)
}

/// # Errors
/// A byte of a tensor is missing, or there twice.
fn check_parts(parts: &[HostPart], into: &[Tensor]) -> Result<(), TorchError> {
    let wrong = |problem: String| Err(TorchError::Argument { call: "upload", problem });
    let mut rest = parts.iter().peekable();
    for (number, tensor) in into.iter().enumerate() {
        let (mut at, bytes) = (0, tensor.numel() * tensor.kind().elt_size_in_bytes());
        while let Some(part) = rest.next_if(|part| part.into == number) {
            if part.at != at {
                return wrong(format!("a part at byte {} of tensor {number}, {at} bytes are there", part.at));
            }
            at += part.bytes.len();
        }
        if at != bytes {
            return wrong(format!("{at} bytes for a tensor of {bytes}"));
        }
    }
    match rest.next() {
        Some(part) => wrong(format!("a part for tensor {} of {}", part.into, into.len())),
        None => Ok(()),
    }
}

impl<H: HostMemory> Upload<H> {
    /// Orders later work of `stream` after the copy.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn before(&self, stream: Stream) -> Result<(), TorchError> {
        self.done.as_ref().map_or(Ok(()), |event| event.block(stream))
    }

    /// True once the host memory is free again.
    ///
    /// # Errors
    /// The copy failed.
    pub fn is_done(&self) -> Result<bool, TorchError> {
        self.done.as_ref().map_or(Ok(true), Event::is_done)
    }

    /// Seconds that a copy which is done took on the device; `None` on a CPU.
    ///
    /// # Errors
    /// It is not done.
    pub fn copied_s(&self) -> Result<Option<f64>, TorchError> {
        match (&self.begun, &self.done) {
            (Some(begun), Some(done)) => Ok(Some(done.elapsed_ms(begun)? / 1e3)),
            _ => Ok(None),
        }
    }

    /// The marks of a copy that [`Upload::is_done`], for the next one.
    pub fn take_marks(&mut self) -> Option<Marks> {
        let (begun, done) = (self.begun.take()?, self.done.take()?);
        Some(Marks { begun, done })
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

    fn part(into: usize, at: usize, bytes: &[u8]) -> HostPart<'_> {
        HostPart { into, at, bytes }
    }

    impl HostMemory for Bytes {
        fn parts(&self) -> Vec<HostPart<'_>> {
            vec![part(0, 0, &self.0), part(1, 0, &self.1)]
        }
    }

    /// The parts of a tensor `[2, 2]` of f32 as they are cut here.
    struct Cut(Vec<u8>, Vec<std::ops::Range<usize>>);

    impl HostMemory for Cut {
        fn parts(&self) -> Vec<HostPart<'_>> {
            self.1.iter().map(|range| part(0, range.start, &self.0[range.clone()])).collect()
        }
    }

    #[test]
    fn parts_of_a_tensor_may_come_from_anywhere_and_must_cover_it() {
        let values = [1.5_f32, -2.0, 3.25, 4.0];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let into = [Tensor::zeros([2, 2], (Kind::Float, Device::Cpu))];
        upload(Cut(bytes.clone(), vec![0..3, 3..3, 3..9, 9..16]), &into, None).unwrap();
        assert_eq!(Vec::<f32>::try_from(into[0].reshape([-1])).unwrap(), values);
        for (cut, says) in [
            (vec![0..8, 9..16], "a part at byte 9 of tensor 0, 8 bytes are there"),
            (vec![0..4, 4..8], "8 bytes for a tensor of 16"),
            (vec![4..8, 8..16], "a part at byte 4"),
        ] {
            let error = upload(Cut(bytes.clone(), cut), &into, None).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
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
        assert!(error.contains("1 bytes for a tensor of 3"), "{error}");
        let error = upload(Bytes(vec![1; 3], vec![0; 4]), &into[..1], None).err().unwrap().to_string();
        assert!(error.contains("a part for tensor 1 of 1"), "{error}");
    }
}
