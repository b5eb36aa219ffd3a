//! The first ranks of the nodes find each other, and make sure that nobody else did.

use super::between::Between;
use super::links::Links;
use crate::comm::{Collective, CommError, ShmCollective};
use crate::torch::gloo::{Group, Member};
use host::nodes::{MeetError, NodePlace, Nodes, hex, nonce, same, unhex};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tch::Tensor;

/// What the first rank of a node brings.
pub struct First {
    pub place: NodePlace,
    /// Network interface for the sums; `None`: the one that leads to node 0.
    pub interface: Option<String>,
}

/// First words of a node.
#[derive(Serialize, Deserialize)]
struct Facts {
    ranks: Vec<usize>,
    nonce: String,
}

/// Meets the first ranks of the other nodes. `ranks` are those of this node, by local rank, out of `world`.
///
/// # Errors
/// A node does not come, the nodes' ranks make no world, or somebody else answers as a node.
pub(super) fn meet(
    first: First,
    inner: Arc<ShmCollective>,
    ranks: &[usize],
    world: usize,
) -> Result<Between, CommError> {
    let (node, limit, interface) = (first.place.node_rank, first.place.limit, first.interface);
    let mut nodes = Nodes::meet(first.place).map_err(met)?;
    let own = Facts { ranks: ranks.to_vec(), nonce: nonce() };
    let own = serde_json::to_string(&own).map_err(|e| CommError::Membership(e.to_string()))?;
    let texts = nodes.all_gather(&own).map_err(met)?;
    let read = |text: &String| serde_json::from_str::<Facts>(text).map(|facts| facts.ranks);
    let ranks: Result<Vec<_>, _> = texts.iter().map(read).collect();
    let ranks = ranks.map_err(|e| CommError::Membership(format!("a node says which ranks it has: {e}")))?;
    check_world(&ranks, world)?;
    let address = nodes.local_address().map_err(|e| CommError::system("this node's address", e))?;
    let member = Member { node, nodes: ranks.len(), address, interface };
    let group = Group::connect(&member, limit, &mut |own| {
        let all = nodes.all_gather(&hex(own)).map_err(|e| e.to_string())?;
        all.iter().map(|text| unhex(text).ok_or_else(|| "a node sent no address".to_owned())).collect()
    });
    let group = group.map_err(|e| CommError::torch(format!("Gloo between {} nodes", ranks.len()), e))?;
    let about = texts.concat();
    let proofs = nodes.proofs(&about);
    let ended = Arc::clone(&inner);
    let on_failure = Arc::new(move |reason: &CommError| ended.abort(reason.clone()));
    let links = Links::new(node, nodes.into_streams(), &ranks, on_failure)?;
    let between = Between { group, links, inner, node, ranks, timeout: limit, calls: AtomicU64::new(0) };
    let sure = between.trial().and_then(|()| prove(&between, &proofs));
    match sure {
        Ok(()) => {
            // Whoever connects from here on is nobody's node.
            between.group.seal();
            Ok(between)
        }
        Err(error) => {
            between.links.fail(between.ranks[node].first().copied().unwrap_or(0), error.clone());
            Err(error)
        }
    }
}

/// Over Gloo's own connections, so that whoever came between is found out. Without a secret there is nothing to prove.
fn prove(between: &Between, proofs: &[String]) -> Result<(), CommError> {
    const NAME: &str = "the proof of a node";
    for (node, right) in proofs.iter().enumerate() {
        let own = if node == between.node { right.clone().into_bytes() } else { vec![0; right.len()] };
        let bytes = Tensor::from_slice(&own);
        between.broadcast(&bytes, node, NAME)?;
        let found = Vec::<u8>::try_from(&bytes).map_err(|e| CommError::torch(NAME, e))?;
        if !same(&found, right.as_bytes()) {
            return Err(CommError::Stranger { node });
        }
    }
    Ok(())
}

fn check_world(nodes: &[Vec<usize>], world: usize) -> Result<(), CommError> {
    let mut all: Vec<usize> = nodes.iter().flatten().copied().collect();
    all.sort_unstable();
    match all.iter().copied().eq(0..world) && nodes.iter().all(|ranks| !ranks.is_empty()) {
        true => Ok(()),
        false => Err(CommError::Membership(format!(
            "the nodes have the ranks {nodes:?}, expected 0 to {} once each: start every rank of the job with the same \
             WORLD_SIZE and a RANK of its own",
            world.saturating_sub(1)
        ))),
    }
}

fn met(error: MeetError) -> CommError {
    CommError::Meet(Arc::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_all_nodes_are_a_world() {
        assert!(check_world(&[vec![0, 2], vec![1]], 3).is_ok());
        for nodes in [vec![vec![0, 1], vec![1]], vec![vec![0], vec![2]], vec![vec![0, 1, 2], vec![]]] {
            assert!(check_world(&nodes, 3).unwrap_err().to_string().contains("expected 0 to 2 once each"));
        }
    }
}
