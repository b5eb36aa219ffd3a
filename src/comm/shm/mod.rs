//! Collectives between the CPU ranks of one node, through a shared memfd.
//!
//! Flat buffers live in the shared memory itself, so an all-reduce copies nothing: ranks take chunks from a common
//! counter, add the chunk's range of all ranks' buffers in rank order, and write the sum into all of them. Whoever has a
//! core does the work; the result is bitwise the same whoever that was. Other tensors go through a small staging region.

#![allow(unsafe_code)]

pub mod inherit;
mod segment;
mod sum;
mod sync;

use super::{Collective, CommError};
use crate::ledger::{self, Holding, Part};
use crate::torch;
use cache::{SharedMemory, shared_memory};
use rustix::io::Errno;
use segment::{MAX_RANKS, Region, Segment};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use sync::{Call, Name, Sync};
use tch::{Device, Kind, Tensor};

/// Bytes of one rank's staging slice: what other tensors move per round.
const STAGE_BYTES: usize = 1 << 20;
/// Bytes of one rank's buffer that are summed at a time.
const CHUNK_BYTES: usize = 128 << 10;

/// The ranks of one node, on CPU.
pub struct ShmCollective {
    segment: Segment,
    sync: Sync,
    /// Held over every collective: calls of one rank never mix.
    regions: Mutex<Regions>,
    /// This rank's part of header and staging.
    _held: Holding,
}

struct Regions {
    next_offset: usize,
    /// The first one is for staging.
    list: Vec<Arc<Region>>,
}

impl Regions {
    /// A number that no other range has, and not 0.
    fn place(&self, index: usize, offset: usize) -> usize {
        self.list[..index].iter().map(|region| region.slice_bytes).sum::<usize>() + offset + 1
    }
}

/// Makes the memory that the ranks of a node share: a memfd, or a file without a name where that is refused. Inherited over
/// `exec` unless `close_on_exec`.
///
/// # Errors
/// The kernel gives no file.
pub fn create_memfd(close_on_exec: bool) -> Result<OwnedFd, CommError> {
    let failed = |call, e: std::io::Error| CommError::system(call, e);
    let SharedMemory { fd, note, .. } =
        shared_memory("headroom-comm", 0).map_err(|e| CommError::system("the memory in which ranks meet", e))?;
    if let Some(note) = note {
        tracing::warn!("{note}");
    }
    if !close_on_exec {
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).map_err(|e| failed("fcntl", e.into()))?;
    }
    Ok(fd)
}

impl ShmCollective {
    /// Joins the node's ranks in a memfd that no earlier run has used, and waits for all of them.
    ///
    /// `timeout` bounds every later wait too (`train.step_timeout`).
    ///
    /// # Errors
    /// A rank outside the world or joined twice, a used memfd, no memory, or ranks that do not come in time.
    pub fn new(fd: OwnedFd, rank: usize, world: usize, timeout: Duration) -> Result<ShmCollective, CommError> {
        if world > MAX_RANKS || rank >= world {
            return Err(CommError::Membership(format!(
                "rank {rank} of {world}: a node has ranks 0 to {}",
                MAX_RANKS - 1
            )));
        }
        let segment = Segment::open(fd).map_err(|e| no_room(Segment::header_bytes(), e))?;
        let regions = Mutex::new(Regions { next_offset: Segment::header_bytes(), list: Vec::new() });
        let shared = Segment::header_bytes() + Segment::region_bytes(STAGE_BYTES, world).unwrap_or(0);
        let held = ledger::hold(Part::Meeting, (shared / world.max(1)) as u64);
        let new = ShmCollective { segment, sync: Sync::new(rank, world, timeout), regions, _held: held };
        new.join()?;
        let mut regions = new.lock();
        new.grow(&mut regions, STAGE_BYTES)?;
        drop(regions);
        Ok(new)
    }

    fn join(&self) -> Result<(), CommError> {
        let (header, rank, world) = (self.segment.header(), self.sync.rank, self.sync.world as u32);
        if let Err(found) = header.world.0.compare_exchange(0, world, Ordering::AcqRel, Ordering::Acquire)
            && found != world
        {
            return Err(CommError::Membership(format!(
                "rank {rank} expects {world} ranks on this node, others {found}"
            )));
        }
        if header.generation.0.load(Ordering::Acquire) & !sync::POISON != 0 {
            let problem = "the shared memory holds an earlier run: each start needs a new memfd";
            return Err(CommError::Membership(format!("rank {rank}: {problem}")));
        }
        let line = &header.ranks[rank];
        line.pid_namespace.store(pid_namespace(), Ordering::Relaxed);
        if line.pid.compare_exchange(0, std::process::id(), Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return Err(CommError::Membership(format!(
                "rank {rank} has joined already: two processes have the same rank"
            )));
        }
        self.sync.barrier(header, call(Name::Join, 0, 0))?;
        self.sync.watch_peers(header);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        // A panic while it was held leaves the list as it was: pushes are last.
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region with `slice_bytes` for each rank. All ranks get it, or all get an error.
    fn grow(&self, regions: &mut Regions, slice_bytes: usize) -> Result<Arc<Region>, CommError> {
        let (header, rank, world) = (self.segment.header(), self.sync.rank, self.sync.world);
        let offset = regions.next_offset;
        let bytes = Segment::region_bytes(slice_bytes, world).ok_or_else(|| no_room(slice_bytes, Errno::OVERFLOW))?;
        let grow = call(Name::Grow, offset, slice_bytes);
        self.sync.barrier(header, grow)?;
        let code = |e: Errno| e.raw_os_error() as u64;
        let reserved = if rank == 0 { self.segment.reserve(offset, bytes) } else { Ok(()) };
        let own = reserved.err().map_or(0, code);
        check_growth(&self.sync.barrier(header, Call { own, ..grow })?, bytes)?;
        let mapped = self.segment.map(offset, slice_bytes, world);
        let own = mapped.as_ref().err().copied().map_or(0, code);
        check_growth(&self.sync.barrier(header, Call { own, ..grow })?, bytes)?;
        let region = Arc::new(mapped.map_err(|e| no_room(bytes, e))?);
        regions.next_offset = offset + bytes;
        regions.list.push(region.clone());
        Ok(region)
    }

    /// Sums `len` elements of type `T` from byte `offset` of all slices, in all slices.
    fn reduce<T>(&self, region: &Region, offset: usize, len: usize, call: Call) -> Result<(), CommError>
    where
        T: Copy + Default + std::ops::AddAssign,
    {
        let header = self.segment.header();
        self.sync.barrier(header, call)?;
        let per_chunk = CHUNK_BYTES / size_of::<T>();
        let total = len.div_ceil(per_chunk) as u32;
        let working = &header.ranks[self.sync.rank].working;
        working.store(1, Ordering::Release);
        loop {
            let chunk = header.next_chunk.0.fetch_add(1, Ordering::Relaxed);
            if chunk >= total {
                break;
            }
            let start = chunk as usize * per_chunk;
            let n = per_chunk.min(len - start);
            let at = |rank| region.slice(rank).wrapping_add(offset).cast::<T>().wrapping_add(start);
            let mut buffers = [std::ptr::null_mut(); MAX_RANKS];
            let buffers = &mut buffers[..self.sync.world];
            buffers.iter_mut().enumerate().for_each(|(rank, buffer)| *buffer = at(rank));
            // SAFETY: offset + len elements lie inside every slice (checked by the callers), slices do not overlap, and
            // the counter gave this chunk to this rank alone. Owners keep off their buffers until `wait_done`.
            unsafe { sum::sum_into_all(buffers, n) };
            if header.done.0.fetch_add(2, Ordering::AcqRel) >> 1 == total - 1 {
                sync::wake(&header.done.0);
            }
        }
        working.store(0, Ordering::Release);
        self.sync.wait_done(header, total, call.name)
    }

    /// All-reduce of any memory, piece by piece through the staging region.
    fn reduce_staged<T>(&self, stage: &Region, data: *mut u8, len: usize, name: Name) -> Result<(), CommError>
    where
        T: Copy + Default + std::ops::AddAssign,
    {
        let own = stage.slice(self.sync.rank);
        let per_piece = STAGE_BYTES / size_of::<T>();
        let mut start = 0;
        // At least one round, so that ranks meet over an empty tensor too.
        loop {
            let n = per_piece.min(len - start);
            let (at, bytes) = (data.wrapping_add(start * size_of::<T>()), n * size_of::<T>());
            // SAFETY: `data` holds `len` elements; the stage holds a piece and is this rank's own between collectives.
            unsafe { std::ptr::copy_nonoverlapping(at, own, bytes) };
            self.reduce::<T>(stage, 0, n, call(name, start, len * size_of::<T>()))?;
            // SAFETY: as above; all chunks are summed, and nobody writes here before this rank's next barrier.
            unsafe { std::ptr::copy_nonoverlapping(own, at, bytes) };
            start += n;
            if start >= len {
                return Ok(());
            }
        }
    }

    /// Where `tensor` lies in the shared memory: region number and byte offset in this rank's slice.
    fn find(&self, regions: &Regions, data: *mut u8, bytes: usize) -> Option<(usize, usize)> {
        regions.list.iter().enumerate().skip(1).find_map(|(index, region)| {
            let offset = (data as usize).checked_sub(region.slice(self.sync.rank) as usize)?;
            (offset.checked_add(bytes)? <= region.slice_bytes).then_some((index, offset))
        })
    }

    /// Copies `root`'s tensor to all ranks, piece by piece through the staging region. The wait for `root` has a limit of its
    /// own.
    fn copy_staged(&self, regions: &Regions, tensor: &Tensor, root: usize, limit: Duration) -> Result<(), CommError> {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        let data = tensor.data_ptr().cast::<u8>();
        let (header, stage) = (self.segment.header(), regions.list[0].slice(root));
        for start in (0..bytes.max(1)).step_by(STAGE_BYTES) {
            let n = STAGE_BYTES.min(bytes - start);
            let at = data.wrapping_add(start);
            let round = call(Name::Broadcast, start * MAX_RANKS + root, bytes);
            if self.sync.rank == root {
                // SAFETY: n bytes of a contiguous tensor; the last round's readers have all left.
                unsafe { std::ptr::copy_nonoverlapping(at, stage, n) };
            }
            self.sync.barrier_within(header, round, limit)?;
            if self.sync.rank != root {
                // SAFETY: as above; the root keeps off its stage until the next barrier.
                unsafe { std::ptr::copy_nonoverlapping(stage, at, n) };
            }
            self.sync.barrier(header, round)?;
        }
        Ok(())
    }

    /// Copies local rank 0's tensor to the others of the node, which wait for it at most `limit`: it may come from other
    /// nodes. One in a flat buffer is read in place.
    pub(super) fn spread(&self, tensor: &Tensor, limit: Duration) -> Result<(), CommError> {
        check_tensor(tensor)?;
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        let data = tensor.data_ptr().cast::<u8>();
        let regions = self.lock();
        let Some((index, offset)) = self.find(&regions, data, bytes).filter(|_| bytes > 0) else {
            return self.copy_staged(&regions, tensor, 0, limit);
        };
        let round = call(Name::Spread, regions.place(index, offset), bytes);
        self.sync.barrier_within(self.segment.header(), round, limit)?;
        if self.sync.rank != 0 {
            let from = regions.list[index].slice(0).wrapping_add(offset);
            // SAFETY: `offset` and `bytes` lie inside every slice of the region (`find`), slices do not overlap, and every rank
            // copies the same range (the call was compared); local rank 0 keeps off its slice until the next barrier.
            unsafe { std::ptr::copy_nonoverlapping(from, data, bytes) };
        }
        self.sync.barrier(self.segment.header(), round).map(drop)
    }

    /// Numbers of the node's ranks within the job, for messages.
    pub(super) fn name_ranks(&self, names: Vec<usize>) {
        let _ = self.sync.names.set(names);
    }

    /// The reason for which this rank was told to abort, once there is one; at most `limit` later.
    pub(super) fn reason_within(&self, limit: Duration) -> Option<CommError> {
        self.sync.told_within(limit)
    }

    /// # Errors
    /// A rank of the node has aborted.
    pub(super) fn check(&self) -> Result<(), CommError> {
        self.sync.check(self.segment.header())
    }

    fn all_reduce<T>(&self, tensor: &Tensor, name: Name) -> Result<(), CommError>
    where
        T: Copy + Default + std::ops::AddAssign,
    {
        let (len, data) = (tensor.numel(), tensor.data_ptr().cast::<u8>());
        let bytes = len * size_of::<T>();
        let regions = self.lock();
        match self.find(&regions, data, bytes) {
            Some((index, offset)) if len > 0 => {
                // The place is part of the call: every rank must reduce the same range.
                let place = regions.place(index, offset);
                self.reduce::<T>(&regions.list[index], offset, len, call(name, place, bytes))
            }
            _ => self.reduce_staged::<T>(&regions.list[0], data, len, name),
        }
    }
}

impl Collective for ShmCollective {
    fn rank(&self) -> usize {
        self.sync.rank
    }

    fn world_size(&self) -> usize {
        self.sync.world
    }

    fn backend(&self) -> &'static str {
        "shm"
    }

    fn flat_buffer(&self, len: usize) -> Result<Tensor, CommError> {
        let bytes = len.checked_mul(4).ok_or_else(|| no_room(len, Errno::OVERFLOW))?;
        let region = self.grow(&mut self.lock(), bytes.max(1))?;
        let data = region.slice(self.sync.rank);
        let shape = [i64::try_from(len).map_err(|_| no_room(len, Errno::OVERFLOW))?];
        // SAFETY: the slice holds `len` f32, is 64-byte aligned and lives as long as the region that the tensor keeps;
        // other ranks write to it only inside collectives on it, which this rank has entered too.
        unsafe { torch::from_memory(data, &shape, Kind::Float, Box::new(region)) }
            .map_err(|e| CommError::torch(format!("flat buffer of {len} elements"), e))
    }

    fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), CommError> {
        check_tensor(tensor)?;
        match tensor.kind() {
            Kind::Float => self.all_reduce::<f32>(tensor, Name::ReduceF32),
            Kind::Double => self.all_reduce::<f64>(tensor, Name::ReduceF64),
            other => Err(CommError::Tensor(format!("all_reduce_sum adds f32 or f64, not {other:?}"))),
        }
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        check_tensor(tensor)?;
        if root >= self.sync.world {
            return Err(CommError::NoRoot { root, world: self.sync.world });
        }
        self.copy_staged(&self.lock(), tensor, root, self.sync.timeout)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let regions = self.lock();
        let (header, stage) = (self.segment.header(), &regions.list[0]);
        let own = bytes.len() as u64;
        let lengths = self.sync.barrier(header, Call { own, ..call(Name::Gather, 0, 0) })?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&n| Vec::with_capacity(n as usize)).collect();
        for start in (0..longest).step_by(STAGE_BYTES) {
            let part = |len: usize| len.saturating_sub(start).min(STAGE_BYTES);
            let round = call(Name::Gather, start + 1, longest);
            let mine = &bytes[start.min(bytes.len())..][..part(bytes.len())];
            // SAFETY: at most STAGE_BYTES into this rank's own stage; the last round's readers have all left.
            unsafe { std::ptr::copy_nonoverlapping(mine.as_ptr(), stage.slice(self.sync.rank), mine.len()) };
            self.sync.barrier(header, round)?;
            for (rank, out) in all.iter_mut().enumerate() {
                let n = part(lengths[rank] as usize);
                // SAFETY: the stage holds n bytes that its owner leaves alone until the next barrier.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(stage.slice(rank), n) });
            }
            self.sync.barrier(header, round)?;
        }
        Ok(all)
    }

    fn barrier(&self) -> Result<(), CommError> {
        let _calls = self.lock();
        self.sync.check(self.segment.header())?;
        self.sync.barrier(self.segment.header(), call(Name::Barrier, 0, 0)).map(|_| ())
    }

    fn abort(&self, reason: CommError) {
        self.sync.abort(self.segment.header(), reason);
    }
}

fn call(name: Name, place: usize, len: usize) -> Call {
    Call { name, place: place as u64, len: len as u64, own: 0 }
}

fn check_tensor(tensor: &Tensor) -> Result<(), CommError> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        let (shape, device) = (tensor.size(), tensor.device());
        return Err(CommError::Tensor(format!(
            "shm moves contiguous CPU tensors; this one of shape {shape:?} is on {device:?} or not contiguous"
        )));
    }
    Ok(())
}

/// Checks every rank's error number of a growth; the first non-zero one is returned on every rank.
fn check_growth(codes: &[u64], bytes: usize) -> Result<(), CommError> {
    match codes.iter().find(|&&code| code != 0) {
        Some(&code) => Err(no_room(bytes, Errno::from_raw_os_error(code as i32))),
        None => Ok(()),
    }
}

fn no_room(bytes: usize, error: Errno) -> CommError {
    if error == Errno::FBIG {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        return CommError::FileLimit { bytes, limit };
    }
    CommError::NoRoom { mib: bytes as f64 / f64::from(1 << 20), source: std::sync::Arc::new(error.into()) }
}

fn pid_namespace() -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/ns/pid").map_or(0, |m| m.ino())
}

#[cfg(test)]
mod tests;
