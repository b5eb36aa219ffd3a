//! Sums and broadcasts between nodes, by c10d's Gloo that libtorch holds.

use super::{Raw, TorchError, check, raw};
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tch::Tensor;

type Take = unsafe extern "C" fn(*mut c_void, *const u8, usize);
type Exchange = unsafe extern "C" fn(*mut c_void, *const u8, usize, Take, *mut c_void) -> c_int;

unsafe extern "C" {
    fn hr_gloo_connect(
        node: c_int,
        nodes: c_int,
        host: *const c_char,
        interface: *const c_char,
        limit_ms: i64,
        context: *mut c_void,
        exchange: Exchange,
        out: *mut Raw,
    ) -> *mut c_char;
    fn hr_gloo_seal(group: Raw) -> c_int;
    fn hr_gloo_sum(group: Raw, tensor: Raw, out: *mut Raw) -> *mut c_char;
    fn hr_gloo_broadcast(group: Raw, tensor: Raw, root: c_int, out: *mut Raw) -> *mut c_char;
    fn hr_gloo_wait(pending: Raw, limit_us: i64, done: *mut c_int) -> *mut c_char;
    fn hr_gloo_forget(pending: Raw);
    fn hr_gloo_free(group: Raw) -> *mut c_char;
}

/// Where this process stands among those that connect.
#[derive(Clone, Debug)]
pub struct Member {
    pub node: usize,
    pub nodes: usize,
    /// Own address, at which the others reach this process.
    pub address: String,
    /// Name of the network interface that is used in place of the address. `None`: that of the address.
    pub interface: Option<String>,
}

/// One process of every node, each connected with each.
pub struct Group(Arc<Connected>);

struct Connected {
    raw: Raw,
    /// A collective did not end: Gloo's threads are in it, and nobody can call them out.
    lost: AtomicBool,
}

// SAFETY: c10d's process groups take calls from any thread; the pointer is never changed.
unsafe impl Send for Connected {}
// SAFETY: as above; `hr_gloo_seal` only reads, and `hr_gloo_free` is called by the last owner.
unsafe impl Sync for Connected {}

/// A collective that has begun.
pub struct Pending {
    raw: Raw,
    group: Arc<Connected>,
    ended: bool,
}

/// Gives this node's bytes to all nodes, and returns those of every node.
type Meet<'a> = dyn FnMut(&[u8]) -> Result<Vec<Vec<u8>>, String> + 'a;

struct Asked<'a, 'b> {
    meet: &'a mut Meet<'b>,
    problem: Option<String>,
}

unsafe extern "C" fn exchange(context: *mut c_void, own: *const u8, n: usize, take: Take, into: *mut c_void) -> c_int {
    // SAFETY: `context` is the `Asked` of `Group::connect`, which is in its call, and used on its thread alone.
    let asked = unsafe { &mut *context.cast::<Asked>() };
    // SAFETY: the shim passes n bytes that live during the call.
    let own = if n == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(own, n) } };
    let met = catch_unwind(AssertUnwindSafe(|| (asked.meet)(own))).unwrap_or_else(|_| Err("a panic".to_owned()));
    match met {
        Ok(all) => {
            // SAFETY: `take` copies the bytes before it returns; `into` is what the shim gave for it.
            all.iter().for_each(|bytes| unsafe { take(into, bytes.as_ptr(), bytes.len()) });
            0
        }
        Err(problem) => {
            asked.problem = Some(problem);
            1
        }
    }
}

impl Group {
    /// Connects with the other nodes; `meet` carries the addresses. Every node calls it at the same time.
    ///
    /// # Errors
    /// The address is not of this machine, `meet` failed, or the others cannot be reached within `limit`.
    pub fn connect(member: &Member, limit: Duration, meet: &mut Meet) -> Result<Group, TorchError> {
        let call = "gloo";
        let text =
            |text: &str| CString::new(text).map_err(|e| TorchError::Argument { call: "gloo", problem: e.to_string() });
        let (host, interface) = (text(&member.address)?, text(member.interface.as_deref().unwrap_or_default())?);
        let limit_ms = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX).clamp(1, 1 << 40);
        let mut asked = Asked { meet, problem: None };
        let mut out: Raw = std::ptr::null_mut();
        let context = (&raw mut asked).cast::<c_void>();
        let (node, nodes) = (member.node as c_int, member.nodes as c_int);
        // SAFETY: two strings and a place for the result that live during the call; `exchange` takes an `Asked` and does not
        // unwind, and the shim does not keep it.
        let error = unsafe {
            hr_gloo_connect(node, nodes, host.as_ptr(), interface.as_ptr(), limit_ms, context, exchange, &mut out)
        };
        match (check(call, error), asked.problem) {
            (Err(_), Some(message)) => Err(TorchError::Cpp { call, message }),
            (Err(error), None) => Err(error),
            (Ok(()), _) => Ok(Group(Arc::new(Connected { raw: out, lost: AtomicBool::new(false) }))),
        }
    }

    /// Takes no further connection. False: the system does not know how.
    pub fn seal(&self) -> bool {
        // SAFETY: a live group.
        unsafe { hr_gloo_seal(self.0.raw) > 0 }
    }

    /// Begins the sum over all nodes of a contiguous CPU tensor, in place. Bitwise equal on all nodes.
    ///
    /// # Errors
    /// It cannot be added up.
    pub fn sum(&self, tensor: &Tensor) -> Result<Pending, TorchError> {
        let mut out: Raw = std::ptr::null_mut();
        // SAFETY: a live group and tensor, and a place for the result. Gloo keeps a handle to the tensor's memory until it is done.
        check("gloo all_reduce", unsafe { hr_gloo_sum(self.0.raw, raw(tensor), &mut out) })?;
        Ok(Pending { raw: out, group: Arc::clone(&self.0), ended: false })
    }

    /// Begins to copy node `root`'s contiguous CPU tensor of any type to all nodes, in place.
    ///
    /// # Errors
    /// It cannot be moved.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending, TorchError> {
        let mut out: Raw = std::ptr::null_mut();
        // SAFETY: as in `sum`.
        let error = unsafe { hr_gloo_broadcast(self.0.raw, raw(tensor), root as c_int, &mut out) };
        check("gloo broadcast", error)?;
        Ok(Pending { raw: out, group: Arc::clone(&self.0), ended: false })
    }
}

impl Pending {
    /// Waits at most `limit`; true once it is done. One that is given up before takes its group along: that is never closed.
    ///
    /// # Errors
    /// Another node ended, or the connection to it.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, TorchError> {
        let mut done: c_int = 0;
        let limit_us = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX).min(1 << 40);
        // SAFETY: a live collective and a place for the result.
        let result = check("gloo", unsafe { hr_gloo_wait(self.raw, limit_us, &mut done) });
        self.ended |= done != 0;
        if result.is_err() {
            // What the others sent meanwhile may be on its way still.
            self.group.lost.store(true, Ordering::Release);
        }
        result.map(|()| done != 0)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.ended {
            self.group.lost.store(true, Ordering::Release);
        }
        // SAFETY: this was the only owner; Gloo's thread keeps the collective itself as long as it is in it.
        unsafe { hr_gloo_forget(self.raw) };
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if self.lost.load(Ordering::Acquire) {
            // Closing would wait for a collective that may never end; the process ends instead.
            return;
        }
        // SAFETY: the last owner; no collective is under way.
        let _ = check("gloo close", unsafe { hr_gloo_free(self.raw) });
    }
}
