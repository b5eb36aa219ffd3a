//! Collectives between the ranks of a job.

#[cfg(test)]
#[path = "../../tests/benches/conformance.rs"]
mod conformance;
mod error;
pub mod gloo;
pub mod nccl;
pub mod rendezvous;
pub mod shm;
pub mod solo;
#[cfg(test)]
mod tests;

pub use error::CommError;
pub use gloo::GlooCollective;
pub use nccl::NcclCollective;
pub use rendezvous::RankEnv;
pub use shm::ShmCollective;
pub use solo::Solo;

use crate::torch::device::Event;
use tch::Tensor;

/// Ranks acting together. Every call is made by all ranks, in the same order, with the same shapes.
///
/// Sums are bitwise equal on all ranks. On CPU each element is added in rank order, so that they are equal from run to
/// run too; NCCL's order depends on how it connects the devices.
pub trait Collective: Send + Sync {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// `solo`, `shm`, `gloo` or `nccl`.
    fn backend(&self) -> &'static str;
    /// A zeroed f32 tensor `[len]` in memory where [`Collective::all_reduce_sum`] needs no copy. It lives as long as
    /// the collective.
    ///
    /// # Errors
    /// No room for the node's shared segment.
    fn flat_buffer(&self, len: usize) -> Result<Tensor, CommError>;
    /// Sums a contiguous f32 or f64 tensor over all ranks, in place. Any tensor will do; one from
    /// [`Collective::flat_buffer`], or a contiguous slice of it, is fastest.
    ///
    /// # Errors
    /// A peer failed, or did not arrive in time.
    fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), CommError>;
    /// Begins what [`Collective::all_reduce_sum`] does; it is done for this thread's device stream after
    /// [`Collective::join`]. `exact`: at full width even where the wire is narrow. On CPU it is done at once.
    ///
    /// # Errors
    /// A peer failed, or did not arrive in time.
    fn start_all_reduce(&self, tensor: &Tensor, exact: bool) -> Result<(), CommError> {
        let _ = exact;
        self.all_reduce_sum(tensor)
    }
    /// True if inexact reductions travel narrowed, so that exact ones must be started apart.
    fn narrows(&self) -> bool {
        false
    }
    /// Orders later work of this thread's device stream after all reductions begun so far. The host does not wait.
    ///
    /// # Errors
    /// The collective was aborted.
    fn join(&self) -> Result<(), CommError> {
        Ok(())
    }
    /// Waits on the host for an event of the device, as long as a collective `name` may take.
    ///
    /// # Errors
    /// A peer failed, time is over, or work on the device failed.
    fn wait(&self, event: &Event, name: &str) -> Result<(), CommError> {
        event.synchronize().map_err(|e| CommError::torch(name, e))
    }
    /// Waits on the host until this thread's device stream has done all that it was given, as long as a collective `name` may
    /// take: to be called before a value is read back that a collective brought. Nothing to wait for on a CPU.
    ///
    /// # Errors
    /// As [`Collective::wait`].
    fn catch_up(&self, name: &str) -> Result<(), CommError> {
        let _ = name;
        Ok(())
    }
    /// Brings every rank's slice of a contiguous flat tensor to all ranks, in place: slice `r` of `slice_len` elements, the
    /// last one as long as there are elements, is rank `r`'s. Done for this thread's device stream when it returns.
    ///
    /// # Errors
    /// A peer failed, or did not arrive in time.
    fn gather_slices(&self, flat: &Tensor, slice_len: usize) -> Result<(), CommError> {
        for rank in 0..self.world_size() {
            let (start, end) = ((rank * slice_len).min(flat.numel()), ((rank + 1) * slice_len).min(flat.numel()));
            let slice = flat.f_narrow(0, start as i64, (end - start) as i64);
            self.broadcast(&slice.map_err(|e| CommError::torch("a rank's slice", e))?, rank)?;
        }
        Ok(())
    }
    /// Copies `root`'s contiguous tensor (any dtype) to all ranks, in place.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError>;
    /// Every rank's bytes (lengths may differ), in rank order.
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;
    fn barrier(&self) -> Result<(), CommError>;
    /// Ends every collective that waits, now and later, with this reason. Callable from any thread.
    fn abort(&self, reason: CommError);
}
