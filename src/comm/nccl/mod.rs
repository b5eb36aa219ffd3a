//! Collectives between CUDA ranks, on one node or several, through NCCL.
//!
//! Three storeys, with `error` below them: `sys` (symbols of a library found at run time), `result` (numbers as errors, waiting), and this one,
//! which is safe. Communicators are non-blocking: nothing here waits for a peer without a limit, and
//! [`Collective::abort`] ends every wait. An aborted or destroyed communicator waits inside NCCL until every CUDA graph that
//! recorded one of its collectives is gone, so `ending` calls both on a thread that nobody waits for without a limit.
//!
//! Work runs on one high-priority stream. A reduction begun by [`Collective::start_all_reduce`] starts when the caller's
//! stream has come to this point, and [`Collective::join`] makes the caller's stream wait for all that were begun: the
//! host waits for nothing.

#![allow(unsafe_code)]

mod ending;
mod error;
mod result;
mod sys;

pub use error::{NcclError, version_text};

use super::{Collective, CommError};
use crate::torch;
use crate::torch::device::{Event, Stream};
use host::machine::awake::{self, Deadline};
use result::{check, pause, settle};
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use sys::{Api, Loaded, RawComm, RawUniqueId};
use tch::{Device, Kind, Tensor};

/// Longest time for the first reduction, which opens the connections.
const PREFLIGHT_LIMIT: Duration = Duration::from_secs(120);
/// Time that saying goodbye may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// Advice when ranks cannot reach each other.
const HINTS: &str = "try NCCL_P2P_DISABLE=1 (GPUs that cannot reach each other), NCCL_SOCKET_IFNAME=<interface> (the wrong \
                     network), the same NCCL version on all nodes; NCCL_DEBUG=INFO tells more";

/// Identity of one communicator: made by rank 0, the same on all ranks.
pub type UniqueId = [u8; sys::UNIQUE_ID_BYTES];

/// An NCCL library in this process.
#[derive(Clone, Copy)]
pub struct Nccl(&'static Loaded);

impl Nccl {
    /// The library that libtorch mapped, else `named` (`HEADROOM_NCCL`), else the wheel's.
    ///
    /// # Errors
    /// The library is missing or too old.
    pub fn load(named: Option<PathBuf>) -> Result<Nccl, NcclError> {
        sys::load(&sys::SearchPaths { named, torch: torch::device::libtorch_folder() }).map(Nccl)
    }

    /// Such as `2.28.9`.
    pub fn version(&self) -> String {
        version_text(self.0.version)
    }

    /// Where the library was found.
    pub fn origin(&self) -> &str {
        &self.0.origin
    }

    /// A new name for a communicator; rank 0 calls it.
    ///
    /// # Errors
    /// NCCL finds no network interface, or has no CUDA.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = RawUniqueId([0; sys::UNIQUE_ID_BYTES]);
        // SAFETY: one place to write to, of the size that NCCL writes.
        let code = unsafe { (self.0.api.get_unique_id)(&mut id) };
        check(&self.0.api, std::ptr::null_mut(), "ncclGetUniqueId", code)?;
        Ok(id.0)
    }
}

/// Where a rank stands in its communicator.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub rank: usize,
    pub world_size: usize,
    /// CUDA index of this rank's device.
    pub device: usize,
}

/// The ranks of a job, each on a CUDA device.
pub struct NcclCollective {
    api: &'static Api,
    place: Member,
    stream: Stream,
    timeout: Duration,
    /// Gradients travel as bf16.
    narrow: bool,
    comm: Mutex<Comm>,
    aborted: OnceLock<CommError>,
}

struct Comm {
    raw: RawComm,
    /// The caller's stream has come so far.
    ready: Event,
    /// The communication stream has come so far.
    done: Event,
    /// bf16 copy of the longest range sent so far.
    wire: Option<Tensor>,
}

// SAFETY: a communicator may be used from any thread, one at a time, which the mutex around it ensures; ncclCommAbort is
// the exception that NCCL allows while another call waits.
unsafe impl Send for Comm {}

/// How a collective's gradients travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    #[default]
    F32,
    Bf16,
}

impl NcclCollective {
    /// Meets the other ranks, then adds up ones as a trial. `timeout` bounds every later wait (`train.step_timeout`).
    ///
    /// # Errors
    /// Ranks cannot reach each other in time, or NCCL refuses; the message says what to try.
    pub fn new(
        nccl: Nccl,
        id: UniqueId,
        place: Member,
        wire: Wire,
        timeout: Duration,
    ) -> Result<NcclCollective, CommError> {
        let hinted =
            |error: CommError| CommError::NcclStart { version: nccl.version(), hints: HINTS, error: Box::new(error) };
        let new = Self::connect(nccl, id, place, wire, timeout).map_err(hinted)?;
        new.or_abort(new.preflight()).map_err(hinted)?;
        Ok(new)
    }

    fn connect(
        nccl: Nccl,
        id: UniqueId,
        place: Member,
        wire: Wire,
        timeout: Duration,
    ) -> Result<NcclCollective, CommError> {
        let api = &nccl.0.api;
        torch::device::set_device(place.device).map_err(other)?;
        let stream = Stream::new(place.device, true).map_err(other)?;
        let (ready, done) = (Event::new(false).map_err(other)?, Event::new(false).map_err(other)?);
        let mut config = sys::Config::non_blocking();
        let mut raw: RawComm = std::ptr::null_mut();
        let (rank, world) = (place.rank as c_int, place.world_size as c_int);
        // SAFETY: a place for the communicator, an id of NCCL's size, and a config that NCCL copies before it returns.
        let code = unsafe { (api.comm_init_rank_config)(&mut raw, world, RawUniqueId(id), rank, &mut config) };
        check(api, raw, "ncclCommInitRankConfig", code)?;
        let new = NcclCollective {
            api,
            place,
            stream,
            timeout,
            narrow: wire == Wire::Bf16,
            comm: Mutex::new(Comm { raw, ready, done, wire: None }),
            aborted: OnceLock::new(),
        };
        let settled = settle(api, raw, "ncclCommInitRankConfig", timeout, || new.reason());
        new.or_abort(settled)?;
        Ok(new)
    }

    /// Aborts a communicator that failed: it cannot be finalized, and the device would wait for peers forever. Must be
    /// called without the lock.
    fn or_abort(&self, result: Result<(), CommError>) -> Result<(), CommError> {
        result.inspect_err(|error| self.abort(error.clone()))
    }

    /// One reduction whose sum is known.
    fn preflight(&self) -> Result<(), CommError> {
        const LEN: usize = 1024;
        let ones = Tensor::f_from_slice(&[1.0_f32; LEN]).and_then(|ones| ones.f_to_device(self.device()));
        let ones = ones.map_err(tch_error)?;
        self.begin("the trial all-reduce", &ones, |comm, stream| self.reduce_call(&ones, comm, stream))?;
        self.drain("the trial all-reduce", self.timeout.min(PREFLIGHT_LIMIT))?;
        // Added up on the host: the device's own kernels are not on trial.
        let mut sums = [0.0_f32; LEN];
        ones.f_to_device(Device::Cpu).and_then(|ones| ones.f_copy_data(&mut sums, LEN)).map_err(tch_error)?;
        let sum: f64 = sums.iter().copied().map(f64::from).sum();
        let right = (LEN * self.place.world_size) as f64;
        if sum == right {
            return Ok(());
        }
        Err(CommError::Trial { sum, right })
    }

    fn device(&self) -> Device {
        Device::Cuda(self.place.device)
    }

    fn reason(&self) -> Option<CommError> {
        self.aborted.get().cloned()
    }

    fn alive(&self) -> Result<(), CommError> {
        self.reason().map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, Comm> {
        // A panic while it was held left at most a stream ahead of its event: the next record mends it.
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `call` to NCCL behind what the caller's stream has been given so far.
    fn begin(
        &self,
        name: &'static str,
        tensor: &Tensor,
        call: impl FnOnce(RawComm, *mut c_void) -> Result<c_int, CommError>,
    ) -> Result<(), CommError> {
        self.alive()?;
        if tensor.device() != self.device() || !tensor.is_contiguous() {
            let (shape, device) = (tensor.size(), tensor.device());
            return Err(CommError::Tensor(format!(
                "NCCL moves contiguous tensors of {:?}; this one of shape {shape:?} is on {device:?} or not contiguous",
                self.device()
            )));
        }
        let mut comm = self.lock();
        // It may have been aborted while this thread waited for the lock: there is no communicator then.
        self.alive()?;
        let current = Stream::current(self.place.device).map_err(other)?;
        comm.ready.record(current).map_err(other)?;
        comm.ready.block(self.stream).map_err(other)?;
        let code = call(comm.raw, self.stream.native().map_err(other)?)?;
        let begun = check(self.api, comm.raw, name, code).map_err(CommError::from).and_then(|()| match code {
            sys::IN_PROGRESS => settle(self.api, comm.raw, name, self.timeout, || self.reason()),
            _ => Ok(()),
        });
        drop(comm);
        self.or_abort(begun)
    }

    fn reduce_call(&self, tensor: &Tensor, comm: RawComm, stream: *mut c_void) -> Result<c_int, CommError> {
        let (data, count, kind) = (tensor.data_ptr(), tensor.numel(), reducible(tensor.kind())?);
        // SAFETY: `count` elements of a contiguous tensor on this rank's device (checked by `begin`), which the caller keeps
        // until the stream has joined; a live communicator and stream.
        Ok(unsafe { (self.api.all_reduce)(data, data, count, kind, sys::SUM, comm, stream) })
    }

    /// Sends a bf16 copy and widens what comes back, all on the communication stream.
    fn begin_narrow(&self, tensor: &Tensor) -> Result<(), CommError> {
        let count = tensor.numel() as i64;
        let copy = {
            let mut comm = self.lock();
            if comm.wire.as_ref().is_none_or(|wire| (wire.numel() as i64) < count) {
                // On the communication stream, which alone uses it.
                let _on = self.stream.enter().map_err(other)?;
                comm.wire = Some(Tensor::f_empty([count], (Kind::BFloat16, self.device())).map_err(tch_error)?);
            }
            let wire = comm.wire.as_ref().map(|wire| wire.f_narrow(0, 0, count));
            wire.transpose().map_err(tch_error)?
        };
        let Some(copy) = copy else { return Ok(()) };
        let flat = tensor.f_view([-1]).map_err(tch_error)?;
        self.begin("ncclAllReduce", tensor, |comm, stream| {
            let _on = self.stream.enter().map_err(other)?;
            torch::device::copy(&copy, &flat).map_err(other)?;
            self.reduce_call(&copy, comm, stream)
        })?;
        let _on = self.stream.enter().map_err(other)?;
        torch::device::copy(&flat, &copy).map_err(other)
    }

    /// Waits on the host until the communication stream is done.
    fn drain(&self, name: &str, limit: Duration) -> Result<(), CommError> {
        let mut event = Event::new(false).map_err(other)?;
        event.record(self.stream).map_err(other)?;
        self.wait_for(&event, name, limit)
    }

    /// Whatever ends the wait but the event ends the communicator: what it left on the device would hold up all that is
    /// given back after it.
    fn wait_for(&self, event: &Event, name: &str, limit: Duration) -> Result<(), CommError> {
        self.or_abort(self.watch(event, name, limit))
    }

    fn watch(&self, event: &Event, name: &str, limit: Duration) -> Result<(), CommError> {
        let (start, deadline) = (Instant::now(), Deadline::new(limit));
        while !event.is_done().map_err(other)? {
            self.alive()?;
            if deadline.left_unless(awake::others_are_suspended).is_zero() {
                return Err(CommError::Timeout {
                    collective: name.to_owned(),
                    waited_s: deadline.waited().as_secs_f64(),
                    missing: "unknown to NCCL".to_owned(),
                    timeout_s: limit.as_secs_f64(),
                });
            }
            if start.elapsed() > Duration::from_millis(100) {
                self.check_async(name)?;
            }
            pause(start.elapsed());
        }
        self.alive()
    }

    /// An error that a peer's end left in the communicator.
    fn check_async(&self, name: &str) -> Result<(), CommError> {
        let Ok(comm) = self.comm.try_lock() else { return Ok(()) };
        self.alive()?;
        let mut state = sys::SUCCESS;
        // SAFETY: a live communicator and a place to write to.
        let code = unsafe { (self.api.comm_async_error)(comm.raw, &mut state) };
        let result = check(self.api, comm.raw, "ncclCommGetAsyncError", code)
            .and_then(|()| check(self.api, comm.raw, "NCCL", state));
        result.map_err(|source| CommError::NcclCall { call: name.to_string(), source })
    }

    /// `act` with a copy of `tensor` on the device, which then replaces it.
    fn staged(
        &self,
        tensor: &Tensor,
        name: &str,
        act: impl FnOnce(&Tensor) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let copy = tensor.f_to_device(self.device()).and_then(|t| t.f_contiguous()).map_err(tch_error)?;
        act(&copy)?;
        self.drain(name, self.timeout)?;
        let _no_grad = tch::no_grad_guard();
        tensor.shallow_clone().f_copy_(&copy).map(|_| ()).map_err(tch_error)
    }

    fn broadcast_device(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        let (data, bytes) = (tensor.data_ptr(), tensor.numel() * tensor.kind().elt_size_in_bytes());
        self.begin("ncclBroadcast", tensor, |comm, stream| {
            // SAFETY: `bytes` bytes of a contiguous tensor on this rank's device, kept until the stream has joined.
            Ok(unsafe { (self.api.broadcast)(data, data, bytes, sys::UINT8, root as c_int, comm, stream) })
        })?;
        self.join()
    }

    /// Every rank's `[n]` tensor side by side, on the CPU.
    fn gather(&self, own: &Tensor, kind: c_int) -> Result<Tensor, CommError> {
        let own = own.f_to_device(self.device()).map_err(tch_error)?;
        let n = own.numel();
        let all = Tensor::f_empty([(n * self.place.world_size) as i64], (own.kind(), self.device()));
        let all = all.map_err(tch_error)?;
        let (from, to) = (own.data_ptr(), all.data_ptr());
        self.begin("ncclAllGather", &own, |comm, stream| {
            // SAFETY: n elements to send and world × n to receive on this rank's device, both kept until `drain` returns.
            Ok(unsafe { (self.api.all_gather)(from, to, n, kind, comm, stream) })
        })?;
        self.drain("all_gather", self.timeout)?;
        all.f_to_device(Device::Cpu).map_err(tch_error)
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world_size(&self) -> usize {
        self.place.world_size
    }

    fn backend(&self) -> &'static str {
        "nccl"
    }

    fn flat_buffer(&self, len: usize) -> Result<Tensor, CommError> {
        let n = i64::try_from(len).map_err(|_| CommError::Tensor(format!("a buffer of {len} elements")))?;
        Tensor::f_zeros([n], (Kind::Float, self.device())).map_err(tch_error)
    }

    fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), CommError> {
        if tensor.numel() == 0 {
            return self.alive();
        }
        if tensor.device() == Device::Cpu {
            return self.staged(tensor, "all_reduce_sum", |copy| {
                self.begin("ncclAllReduce", copy, |comm, stream| self.reduce_call(copy, comm, stream))
            });
        }
        self.begin("ncclAllReduce", tensor, |comm, stream| self.reduce_call(tensor, comm, stream))?;
        self.join()
    }

    fn start_all_reduce(&self, tensor: &Tensor, exact: bool) -> Result<(), CommError> {
        if self.narrow && !exact {
            return self.begin_narrow(tensor);
        }
        self.begin("ncclAllReduce", tensor, |comm, stream| self.reduce_call(tensor, comm, stream))
    }

    fn narrows(&self) -> bool {
        self.narrow
    }

    fn join(&self) -> Result<(), CommError> {
        self.alive()?;
        let mut comm = self.lock();
        comm.done.record(self.stream).map_err(other)?;
        comm.done.block(Stream::current(self.place.device).map_err(other)?).map_err(other)
    }

    fn wait(&self, event: &Event, name: &str) -> Result<(), CommError> {
        self.wait_for(event, name, self.timeout)
    }

    fn catch_up(&self, name: &str) -> Result<(), CommError> {
        let mut event = Event::new(false).map_err(other)?;
        event.record(Stream::current(self.place.device).map_err(other)?).map_err(other)?;
        self.wait_for(&event, name, self.timeout)
    }

    fn gather_slices(&self, flat: &Tensor, slice_len: usize) -> Result<(), CommError> {
        let (rank, world, kind) = (self.place.rank, self.place.world_size, reducible(flat.kind())?);
        if flat.numel() != slice_len * world {
            return Err(CommError::Tensor(format!(
                "{} elements are not {world} slices of {slice_len}: NCCL gathers slices of one length",
                flat.numel()
            )));
        }
        let own = flat.f_narrow(0, (rank * slice_len) as i64, slice_len as i64).map_err(tch_error)?;
        let (from, to) = (own.data_ptr(), flat.data_ptr());
        self.begin("ncclAllGather", flat, |comm, stream| {
            // SAFETY: this rank's part of a contiguous tensor of `world` parts on its device, kept until the stream has joined.
            Ok(unsafe { (self.api.all_gather)(from, to, slice_len, kind, comm, stream) })
        })?;
        self.join()
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        if root >= self.place.world_size {
            return Err(CommError::NoRoot { root, world: self.place.world_size });
        }
        if tensor.numel() == 0 {
            return self.alive();
        }
        if tensor.device() == Device::Cpu {
            return self.staged(tensor, "broadcast", |copy| self.broadcast_device(copy, root));
        }
        self.broadcast_device(tensor, root)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let lengths = self.gather(&Tensor::from_slice(&[bytes.len() as i64]), sys::INT64)?;
        let lengths = Vec::<i64>::try_from(&lengths).map_err(tch_error)?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if longest == 0 {
            return Ok(vec![Vec::new(); self.place.world_size]);
        }
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = Vec::<u8>::try_from(&self.gather(&Tensor::from_slice(&padded), sys::UINT8)?).map_err(tch_error)?;
        let parts = all.chunks(longest).zip(&lengths);
        Ok(parts.map(|(part, &len)| part[..(len.max(0) as usize).min(part.len())].to_vec()).collect())
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.all_reduce_sum(&Tensor::from_slice(&[0.0_f32]))
    }

    fn abort(&self, reason: CommError) {
        if self.aborted.set(reason).is_err() {
            return;
        }
        // Whoever holds the lock looks at the reason within a millisecond and lets go.
        let start = Instant::now();
        while start.elapsed() < CLOSE_LIMIT {
            if let Ok(mut comm) = self.comm.try_lock() {
                let raw = std::mem::replace(&mut comm.raw, std::ptr::null_mut());
                // Not waited for: NCCL returns once the last recorded step is gone, which the caller has yet to forget. The
                // abort's first act is to make the device's kernels leave, and that is all that anybody waits for.
                drop(ending::end(self.api.comm_abort, raw, self.place.device));
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        let raw = std::mem::replace(&mut self.lock().raw, std::ptr::null_mut());
        if raw.is_null() {
            return;
        }
        // SAFETY: a live communicator; `&mut self` means that nobody else calls. Finalize only begins the goodbye.
        let code = unsafe { (self.api.comm_finalize)(raw) };
        let ended = check(self.api, raw, "ncclCommFinalize", code).map_err(CommError::from);
        let ended = ended.and_then(|()| settle(self.api, raw, "ncclCommFinalize", CLOSE_LIMIT, || None));
        let end = if ended.is_ok() { self.api.comm_destroy } else { self.api.comm_abort };
        if let Some(done) = ending::end(end, raw, self.place.device) {
            let _ = done.recv_timeout(CLOSE_LIMIT);
        }
    }
}

fn reducible(kind: Kind) -> Result<c_int, CommError> {
    Ok(match kind {
        Kind::Float => sys::FLOAT32,
        Kind::Double => sys::FLOAT64,
        Kind::Half => sys::FLOAT16,
        Kind::BFloat16 => sys::BFLOAT16,
        Kind::Int64 => sys::INT64,
        other => return Err(CommError::Tensor(format!("all_reduce_sum adds floats or i64, not {other:?}"))),
    })
}

fn other(error: torch::TorchError) -> CommError {
    CommError::torch("device", error)
}

fn tch_error(error: tch::TchError) -> CommError {
    CommError::torch("libtorch", error)
}

#[cfg(test)]
mod tests;
