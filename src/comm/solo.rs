//! A world of one rank: every collective is done at once.

use super::{Collective, CommError};
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// The collective of a job with one rank.
#[derive(Debug)]
pub struct Solo {
    device: Device,
    aborted: OnceLock<CommError>,
}

impl Solo {
    /// Flat buffers will live on `device`.
    pub fn new(device: Device) -> Solo {
        Solo { device, aborted: OnceLock::new() }
    }

    fn check(&self) -> Result<(), CommError> {
        self.aborted.get().map_or(Ok(()), |reason| Err(reason.clone()))
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn backend(&self) -> &'static str {
        "solo"
    }

    fn flat_buffer(&self, len: usize) -> Result<Tensor, CommError> {
        let len = i64::try_from(len).map_err(|_| CommError::Tensor(format!("a buffer of {len} elements")))?;
        Tensor::f_zeros([len], (Kind::Float, self.device)).map_err(|e| CommError::torch("flat buffer", e))
    }

    fn all_reduce_sum(&self, _tensor: &Tensor) -> Result<(), CommError> {
        self.check()
    }

    fn broadcast(&self, _tensor: &Tensor, root: usize) -> Result<(), CommError> {
        if root != 0 {
            return Err(CommError::NoRoot { root, world: 1 });
        }
        self.check()
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.check()?;
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.check()
    }

    fn abort(&self, reason: CommError) {
        let _ = self.aborted.set(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_back_what_it_got_until_aborted() {
        let solo = Solo::new(Device::Cpu);
        let mut t = solo.flat_buffer(3).unwrap();
        solo.all_reduce_sum(&t.f_add_scalar_(1.0).unwrap()).unwrap();
        assert_eq!(Vec::<f32>::try_from(&t).unwrap(), [1.0; 3]);
        assert_eq!(solo.all_gather(b"x").unwrap(), [b"x".to_vec()]);
        assert!(solo.broadcast(&t, 1).is_err());
        solo.abort(CommError::PeerFailed { rank: 7, error: "gone".into() });
        assert_eq!(solo.barrier().unwrap_err().to_string(), "rank 7 failed: gone");
    }
}
