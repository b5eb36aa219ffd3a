//! The first rank of a node among those of the other nodes.

use super::links::{Links, numbers};
use crate::comm::{CommError, ShmCollective};
use crate::torch::TorchError;
use crate::torch::gloo::{Group, Pending};
use host::machine::awake::{self, Deadline};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tch::{Kind, Tensor};

/// How long a wait lasts before it looks after the clock and the other nodes.
const SLICE: Duration = Duration::from_millis(50);
/// After so long, the other nodes learn in which collective this one waits: whoever never says so is missing.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// A node that has taken its leave may have done its part of this collective; after so long it has not.
const LEFT_AFTER: Duration = Duration::from_secs(2);
/// After Gloo's error, how long to wait for the reason, which the failed node sends.
const REASON_LIMIT: Duration = Duration::from_secs(3);
/// Elements of the sum that is made before anything else.
const TRIAL: usize = 1024;

pub(super) struct Between {
    pub group: Group,
    pub links: Links,
    /// The ranks of this node.
    pub inner: Arc<ShmCollective>,
    pub node: usize,
    /// Ranks of each node.
    pub ranks: Vec<Vec<usize>>,
    pub timeout: Duration,
    /// Collectives so far. Each node makes the same.
    pub calls: AtomicU64,
}

impl Between {
    /// Adds up over the nodes, in place.
    pub fn sum(&self, tensor: &Tensor, name: &str) -> Result<(), CommError> {
        self.alive()?;
        let begun = self.group.sum(tensor);
        self.finish(begun, name)
    }

    pub fn broadcast(&self, tensor: &Tensor, node: usize, name: &str) -> Result<(), CommError> {
        self.alive()?;
        let begun = self.group.broadcast(tensor, node);
        self.finish(begun, name)
    }

    /// Every node's bytes, by its number.
    pub fn gather(&self, own: &[u8], name: &str) -> Result<Vec<Vec<u8>>, CommError> {
        let mut lengths = vec![0_i64; self.ranks.len()];
        lengths[self.node] = own.len() as i64;
        let lengths = Tensor::from_slice(&lengths);
        self.sum(&lengths, name)?;
        let lengths = Vec::<i64>::try_from(&lengths).map_err(|e| CommError::torch(name, e))?;
        let one = |(node, &length): (usize, &i64)| {
            if length == 0 {
                return Ok(Vec::new());
            }
            let bytes = match node == self.node {
                true => Tensor::f_from_slice(own),
                false => Tensor::f_zeros([length], (Kind::Uint8, tch::Device::Cpu)),
            };
            let bytes = bytes.map_err(|e| CommError::torch(name, e))?;
            self.broadcast(&bytes, node, name)?;
            Vec::<u8>::try_from(&bytes).map_err(|e| CommError::torch(name, e))
        };
        lengths.iter().enumerate().map(one).collect()
    }

    /// A sum whose result is known.
    pub fn trial(&self) -> Result<(), CommError> {
        let ones = Tensor::from_slice(&[1.0_f32; TRIAL]);
        self.sum(&ones, "the trial all-reduce")?;
        let sums = Vec::<f32>::try_from(&ones).map_err(|e| CommError::torch("the trial all-reduce", e))?;
        let (sum, right) = (sums.iter().copied().map(f64::from).sum(), (TRIAL * self.ranks.len()) as f64);
        if sum == right { Ok(()) } else { Err(CommError::Trial { sum, right }) }
    }

    fn alive(&self) -> Result<(), CommError> {
        self.links.board.reason().map_or(Ok(()), Err)
    }

    fn finish(&self, begun: Result<Pending, TorchError>, name: &str) -> Result<(), CommError> {
        let call = self.calls.fetch_add(1, Ordering::AcqRel) + 1;
        let mut pending = begun.map_err(|e| self.why(name, e))?;
        let deadline = Deadline::in_slices(self.timeout, SLICE);
        let mut told = false;
        loop {
            if pending.wait(SLICE).map_err(|e| self.why(name, e))? {
                return Ok(());
            }
            self.alive().and_then(|()| self.inner.check())?;
            let waited = deadline.waited();
            if let Some(node) = self.links.board.left().filter(|_| waited >= LEFT_AFTER) {
                return Err(self.left(node, name));
            }
            if !told && waited >= TELL_AFTER.min(self.timeout / 4) {
                self.links.at(call);
                told = true;
            }
            if deadline.left_unless(awake::others_are_suspended).is_zero() {
                return Err(self.timed_out(name, call, waited));
            }
        }
    }

    fn left(&self, node: usize, name: &str) -> CommError {
        let rank = self.ranks[node].first().copied().unwrap_or(0) as u32;
        let error =
            format!("node {node} ended while others waited for it in {name}; the output of its launcher says why");
        CommError::PeerFailed { rank, error }
    }

    fn timed_out(&self, name: &str, call: u64, waited: Duration) -> CommError {
        let named = |node: &usize| format!("{} (node {node})", numbers(&self.ranks[*node]));
        let missing: Vec<String> = self.links.board.missing(call).iter().map(named).collect();
        let missing = match missing.is_empty() {
            true => "none: every node waits, so the network between them does not carry the data".to_owned(),
            false => missing.join(", "),
        };
        let (waited_s, timeout_s) = (waited.as_secs_f64(), self.timeout.as_secs_f64());
        CommError::Timeout { collective: name.to_owned(), waited_s, missing, timeout_s }
    }

    /// What lies behind an error of Gloo, which knows addresses alone.
    fn why(&self, name: &str, error: TorchError) -> CommError {
        let board = &self.links.board;
        let left = || board.left().map(|node| self.left(node, name));
        let reason = board.reason_within(REASON_LIMIT).or_else(left);
        reason.unwrap_or_else(|| CommError::torch(format!("{name} between the nodes"), error))
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        // Gloo closes its connections next, which other nodes may still wait at in their last collective.
        self.links.leave();
    }
}
