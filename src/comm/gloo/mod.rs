//! Collectives of CPU ranks on several nodes: shared memory within a node, Gloo between the first ranks of the nodes.
//!
//! A sum is made within each node first, then between the nodes, and then handed out within each node: every rank has the
//! same bits. Which rank adds to which depends on where ranks sit, so that other nodes give another rounding.

mod between;
mod links;
mod meeting;
#[cfg(test)]
mod tests;

pub use meeting::First;

use super::{Collective, CommError, ShmCollective};
use between::Between;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// How long a rank waits for the launcher's word on a failure that the node's first rank has reported.
const REASON_LIMIT: Duration = Duration::from_secs(1);

/// The ranks of several nodes, on CPU.
pub struct GlooCollective {
    inner: Arc<ShmCollective>,
    rank: usize,
    /// Node and local rank of every rank.
    places: Vec<(usize, usize)>,
    node: usize,
    nodes: usize,
    /// Of the node's first rank.
    between: Option<Between>,
    timeout: Duration,
    /// Held over every collective: what happens within a node and between nodes never mixes.
    calls: Mutex<()>,
}

impl GlooCollective {
    /// Joins the ranks of this node, who have met in `inner`, with those of the other nodes. `first` is of local rank 0.
    /// `timeout` bounds every later wait too (`train.step_timeout`).
    ///
    /// # Errors
    /// A node does not come in time, or somebody else answers in its place.
    pub fn new(
        inner: ShmCollective,
        rank: usize,
        world: usize,
        first: Option<First>,
        timeout: Duration,
    ) -> Result<GlooCollective, CommError> {
        let inner = Arc::new(inner);
        let here: Vec<usize> =
            inner.all_gather(&(rank as u64).to_le_bytes())?.iter().map(|bytes| number(bytes)).collect();
        inner.name_ranks(here.clone());
        let between = first.map(|first| {
            meeting::meet(first, Arc::clone(&inner), &here, world).inspect_err(|error| inner.abort(error.clone()))
        });
        let between = between.transpose()?;
        let own = between.as_ref().map(|between| encode(&between.ranks)).unwrap_or_default();
        let nodes = decode(&hand_out(&inner, own, timeout.saturating_mul(3))?);
        let mut places = vec![(0, 0); world];
        for (node, ranks) in nodes.iter().enumerate() {
            for (local, rank) in ranks.iter().enumerate() {
                if let Some(place) = places.get_mut(*rank) {
                    *place = (node, local);
                }
            }
        }
        let node = places.get(rank).map_or(0, |place| place.0);
        Ok(Self { inner, rank, places, node, nodes: nodes.len(), between, timeout, calls: Mutex::new(()) })
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For what the first rank brings from the other nodes: longer than it waits there, so that it speaks first, since it
    /// knows who is missing.
    fn patience(&self) -> Duration {
        let margin = (self.timeout / 4).clamp(Duration::from_secs(1), Duration::from_secs(60)) * 2;
        self.timeout.saturating_add(margin)
    }

    /// Hands a tensor of the node's first rank to the others of the node.
    fn spread(&self, tensor: &Tensor) -> Result<(), CommError> {
        match self.inner.world_size() {
            1 => Ok(()),
            _ => self.inner.spread(tensor, self.patience()),
        }
    }

    /// One that fails ends those of all nodes: they would wait for this rank.
    fn or_abort<T>(&self, result: Result<T, CommError>) -> Result<T, CommError> {
        result.map_err(|error| {
            let error = self.explained(error);
            self.abort(error.clone());
            error
        })
    }

    /// Ranks of a node learn from the shared memory which rank of another node failed; the first of them knows why, and speaks
    /// first.
    fn explained(&self, error: CommError) -> CommError {
        match &error {
            CommError::PeerFailed { rank, .. } if self.between.is_none() && !self.is_here(*rank as usize) => {
                self.inner.reason_within(REASON_LIMIT).unwrap_or(error)
            }
            _ => error,
        }
    }

    fn is_here(&self, rank: usize) -> bool {
        self.places.get(rank).is_some_and(|place| place.0 == self.node)
    }

    fn sum(&self, tensor: &Tensor) -> Result<(), CommError> {
        self.inner.all_reduce_sum(tensor)?;
        if tensor.numel() == 0 {
            return Ok(());
        }
        if let Some(between) = &self.between {
            between.sum(tensor, "all_reduce_sum")?;
        }
        self.spread(tensor)
    }

    fn send(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        let Some(&(node, local)) = self.places.get(root) else {
            return Err(CommError::NoRoot { root, world: self.places.len() });
        };
        if node == self.node {
            self.inner.broadcast(tensor, local)?;
        }
        if tensor.numel() == 0 {
            return Ok(());
        }
        if let Some(between) = &self.between {
            between.broadcast(tensor, node, "broadcast")?;
        }
        if node == self.node { Ok(()) } else { self.spread(tensor) }
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let here = self.inner.all_gather(bytes)?;
        let all = match &self.between {
            Some(between) => between.gather(&pack(&here), "all_gather")?.concat(),
            None => Vec::new(),
        };
        let all = unpack(&hand_out(&self.inner, all, self.patience())?);
        // By node and local rank so far.
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|rank| self.places[*rank]);
        let mut out = vec![Vec::new(); self.places.len()];
        order.into_iter().zip(all).for_each(|(rank, bytes)| out[rank] = bytes);
        Ok(out)
    }
}

impl Collective for GlooCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.places.len()
    }

    fn backend(&self) -> &'static str {
        "gloo"
    }

    fn flat_buffer(&self, len: usize) -> Result<Tensor, CommError> {
        let _calls = self.lock();
        self.inner.flat_buffer(len)
    }

    fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), CommError> {
        let _calls = self.lock();
        self.or_abort(self.sum(tensor))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        let _calls = self.lock();
        match self.send(tensor, root) {
            // Every rank is told, and none waits.
            Err(error @ CommError::NoRoot { .. }) => Err(error),
            sent => self.or_abort(sent),
        }
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let _calls = self.lock();
        self.or_abort(self.gather(bytes))
    }

    fn barrier(&self) -> Result<(), CommError> {
        let _calls = self.lock();
        self.or_abort(self.inner.barrier().and_then(|()| {
            let word = Tensor::from_slice(&[0.0_f32]);
            if let Some(between) = &self.between {
                between.sum(&word, "barrier")?;
            }
            self.spread(&word)
        }))
    }

    fn abort(&self, reason: CommError) {
        if let Some(between) = &self.between {
            between.links.fail(self.rank, reason.clone());
        }
        self.inner.abort(reason);
    }
}

/// Hands bytes of the node's first rank to the others of the node.
fn hand_out(inner: &ShmCollective, own: Vec<u8>, patience: Duration) -> Result<Vec<u8>, CommError> {
    let length = Tensor::from_slice(&[own.len() as i64]);
    inner.spread(&length, patience)?;
    let bytes = match inner.rank() {
        0 => Tensor::f_from_slice(&own),
        _ => Tensor::f_zeros([length.int64_value(&[0])], (Kind::Uint8, Device::Cpu)),
    };
    let bytes = bytes.map_err(|e| CommError::torch("what a node's first rank hands out", e))?;
    inner.spread(&bytes, patience)?;
    match inner.rank() {
        0 => Ok(own),
        _ => Vec::<u8>::try_from(&bytes).map_err(|e| CommError::torch("what a node's first rank hands out", e)),
    }
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte))
}

/// Lengths keep parts apart.
fn pack(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part].concat()).collect()
}

fn unpack(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<8>() {
        let (part, rest) = rest.split_at(number(head).min(rest.len()));
        parts.push(part.to_vec());
        bytes = rest;
    }
    parts
}

fn encode(nodes: &[Vec<usize>]) -> Vec<u8> {
    let one = |ranks: &Vec<usize>| ranks.iter().flat_map(|rank| (*rank as u64).to_le_bytes()).collect();
    pack(&nodes.iter().map(one).collect::<Vec<Vec<u8>>>())
}

fn decode(bytes: &[u8]) -> Vec<Vec<usize>> {
    unpack(bytes).iter().map(|ranks| ranks.chunks(8).map(number).collect()).collect()
}
