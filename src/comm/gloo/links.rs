//! Links between the first ranks of the nodes: who waits in which collective, who failed, who has left.
//!
//! Every node has a link to node 0, which passes on what concerns all. Sums travel elsewhere, over Gloo.

use crate::comm::CommError;
use serde::{Deserialize, Serialize};
use spec::contract::{read_frame, write_frame};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest wait of a word for a node that takes none.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// A machine that has lost its power or its network says nothing: it is asked every [`PROBE`] after so much silence.
const SILENCE: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(10);
const PROBES: u32 = 6;
/// Longest wait for others to take their leave.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
const STACK_BYTES: usize = 256 << 10;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Word {
    /// Node `node` has waited in its `call`-th collective for a while.
    At {
        node: usize,
        call: u64,
    },
    Failed {
        rank: u32,
        error: String,
    },
    /// The last word of a node that takes its leave.
    Done {
        node: usize,
    },
}

/// Facts that the links brought.
pub(super) struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The collective that each node has last been seen waiting in, counted from 1.
    at: Vec<u64>,
    /// Nodes that have taken their leave.
    left: Vec<usize>,
    /// This node has taken its own leave: what becomes of the others is nothing to it.
    closed: bool,
    /// Why all collectives end.
    reason: Option<CommError>,
}

impl Board {
    fn new(nodes: usize) -> Self {
        Self {
            state: Mutex::new(State { at: vec![0; nodes], left: Vec::new(), closed: false, reason: None }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values: a panic leaves them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn reason(&self) -> Option<CommError> {
        self.lock().reason.clone()
    }

    /// The reason, once there is one; at most `limit` later.
    pub fn reason_within(&self, limit: Duration) -> Option<CommError> {
        let wait = self.changed.wait_timeout_while(self.lock(), limit, |state| state.reason.is_none());
        wait.unwrap_or_else(PoisonError::into_inner).0.reason.clone()
    }

    /// True if this is the first reason.
    pub fn end(&self, reason: CommError) -> bool {
        let mut state = self.lock();
        let first = state.reason.is_none() && !state.closed;
        state.reason.get_or_insert(reason);
        self.changed.notify_all();
        first
    }

    pub fn is_at(&self, node: usize, call: u64) {
        if let Some(at) = self.lock().at.get_mut(node) {
            *at = call.max(*at);
        }
    }

    fn leaves(&self, node: usize) {
        self.lock().left.push(node);
        self.changed.notify_all();
    }

    /// A node that has taken its leave.
    pub fn left(&self) -> Option<usize> {
        self.lock().left.first().copied()
    }

    /// True if nothing more is to be heard of `node`.
    fn is_over(&self, node: usize) -> bool {
        let state = self.lock();
        state.closed || state.left.contains(&node)
    }

    /// Nodes that have not been seen in collective `call`.
    pub fn missing(&self, call: u64) -> Vec<usize> {
        let state = self.lock();
        (0..state.at.len()).filter(|node| state.at[*node] < call).collect()
    }
}

/// One end of a link, and the node at the other.
struct End {
    node: usize,
    write: Mutex<TcpStream>,
}

impl End {
    /// One that cannot be told any more is found to have ended by who reads.
    fn tell(&self, word: &Word) {
        let _ = write_frame(&mut *self.write.lock().unwrap_or_else(PoisonError::into_inner), word);
    }
}

/// The links of this node.
pub(super) struct Links {
    pub board: Arc<Board>,
    node: usize,
    ends: Arc<Vec<End>>,
}

/// Who is told of a failure on another node.
pub(super) type OnFailure = Arc<dyn Fn(&CommError) + Send + Sync>;

impl Links {
    /// Listens to every node that this one is connected with. `ranks` are those of each node.
    pub fn new(
        node: usize,
        streams: Vec<(usize, TcpStream)>,
        ranks: &[Vec<usize>],
        on_failure: OnFailure,
    ) -> Result<Self, CommError> {
        let failed = |e: std::io::Error| CommError::system("the links between the nodes", e);
        let board = Arc::new(Board::new(ranks.len()));
        let mut readers = Vec::new();
        let mut ends = Vec::new();
        for (node, stream) in streams {
            probe(&stream).map_err(failed)?;
            readers.push((node, stream.try_clone().map_err(failed)?));
            ends.push(End { node, write: Mutex::new(stream) });
        }
        let ends = Arc::new(ends);
        for (from, stream) in readers {
            let lost = lost(from, ranks.get(from).map_or(&[], Vec::as_slice));
            let listener = Listener {
                from,
                lost,
                board: Arc::clone(&board),
                ends: Arc::clone(&ends),
                on_failure: Arc::clone(&on_failure),
            };
            let thread = std::thread::Builder::new().name(format!("node-{from}")).stack_size(STACK_BYTES);
            thread.spawn(move || listener.listen(stream)).map_err(failed)?;
        }
        Ok(Self { board, node, ends })
    }

    /// Takes leave of the others, and waits until all have done so, at most [`LEAVE_LIMIT`]: no collective is under way then.
    pub fn leave(&self) {
        if std::thread::panicking() || self.board.reason().is_some() {
            return;
        }
        self.ends.iter().for_each(|end| end.tell(&Word::Done { node: self.node }));
        let state = self.board.lock();
        let waits = |state: &mut State| state.reason.is_none() && state.left.len() + 1 < state.at.len();
        drop(self.board.changed.wait_timeout_while(state, LEAVE_LIMIT, waits));
    }

    /// This node has waited in its `call`-th collective for a while.
    pub fn at(&self, call: u64) {
        self.board.is_at(self.node, call);
        self.ends.iter().for_each(|end| end.tell(&Word::At { node: self.node, call }));
    }

    /// Ends the job on all nodes, for the first reason that there is.
    pub fn fail(&self, own_rank: usize, reason: CommError) {
        let word = match &reason {
            CommError::PeerFailed { rank, error } => Word::Failed { rank: *rank, error: error.clone() },
            CommError::GivenUp { error } => Word::Failed { rank: own_rank as u32, error: error.clone() },
            other => Word::Failed { rank: own_rank as u32, error: other.to_string() },
        };
        if self.board.end(reason) {
            self.ends.iter().for_each(|end| end.tell(&word));
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.board.lock().closed = true;
        for end in self.ends.iter() {
            // Wakes the thread that listens; what was written before still arrives.
            let _ = end.write.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
        }
    }
}

/// The end of a node without a word.
fn lost(node: usize, ranks: &[usize]) -> CommError {
    let which = match ranks {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", numbers(ranks)),
    };
    let error =
        format!("node {node} with {which} is gone: the output of its launcher says why, if the machine is still there");
    CommError::PeerFailed { rank: ranks.first().copied().unwrap_or(0) as u32, error }
}

/// `1, 3`.
pub(super) fn numbers(of: &[usize]) -> String {
    of.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn probe(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, SILENCE)?;
    sockopt::set_tcp_keepintvl(stream, PROBE)?;
    Ok(sockopt::set_tcp_keepcnt(stream, PROBES)?)
}

/// The thread that hears one node.
struct Listener {
    from: usize,
    /// Reason if its link ends without a last word.
    lost: CommError,
    board: Arc<Board>,
    ends: Arc<Vec<End>>,
    on_failure: OnFailure,
}

impl Listener {
    fn listen(self, mut stream: TcpStream) {
        loop {
            match read_frame::<Word>(&mut stream) {
                Ok(Some(word)) => {
                    self.pass_on(&word);
                    match word {
                        Word::At { node, call } => self.board.is_at(node, call),
                        Word::Failed { rank, error } => self.failed(CommError::PeerFailed { rank, error }),
                        Word::Done { node } => self.board.leaves(node),
                    }
                }
                // After its last word, or this node's.
                Ok(None) | Err(_) if self.board.is_over(self.from) => return,
                Ok(None) | Err(_) => {
                    if let CommError::PeerFailed { rank, error } = &self.lost {
                        self.pass_on(&Word::Failed { rank: *rank, error: error.clone() });
                    }
                    return self.failed(self.lost.clone());
                }
            }
        }
    }

    /// Node 0 is the only one with several links.
    fn pass_on(&self, word: &Word) {
        self.ends.iter().filter(|end| end.node != self.from).for_each(|end| end.tell(word));
    }

    fn failed(&self, reason: CommError) {
        if self.board.end(reason.clone()) {
            (self.on_failure)(&reason);
        }
    }
}
