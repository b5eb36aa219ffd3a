//! Memory of batches, used again and again: a batch's tensors give it back when the last of them dies.

use cache::client::CacheError;
use cache::mapping::Piece;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Memory is taken in whole multiples of this.
const ROUND_BYTES: usize = 64 << 10;

/// Free memory of one loader.
pub struct Pool {
    free: Mutex<Vec<Piece>>,
    /// Most pieces that are kept.
    most: usize,
}

impl Pool {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), most })
    }

    /// Memory of at least `bytes`, written by `fill`.
    ///
    /// # Errors
    /// The system has no memory, or `fill` fails.
    pub fn filled<E: From<CacheError>>(
        self: &Arc<Self>,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Buffer, E> {
        let mut piece = match self.take(bytes) {
            Some(piece) => piece,
            None => Piece::allocate(bytes.max(1).next_multiple_of(ROUND_BYTES))?,
        };
        let room = piece.bytes_mut();
        let address = room.as_mut_ptr() as usize;
        let filled = fill(&mut room[..bytes]);
        let buffer = Buffer { address, bytes, piece: Some(piece), pool: Arc::downgrade(self) };
        filled.map(|()| buffer)
    }

    /// The smallest free piece that fits and is not far too large.
    fn take(&self, bytes: usize) -> Option<Piece> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |piece: &Piece| (bytes..=2 * bytes + ROUND_BYTES).contains(&piece.bytes().len());
        let (at, _) =
            free.iter().enumerate().filter(|(_, piece)| fits(piece)).min_by_key(|(_, piece)| piece.bytes().len())?;
        Some(free.swap_remove(at))
    }
}

/// Bytes of a batch. Nothing of this library reads or writes them once the batch is handed out: they are its tensors'.
pub struct Buffer {
    address: usize,
    bytes: usize,
    /// Taken on drop alone.
    piece: Option<Piece>,
    pool: Weak<Pool>,
}

impl Buffer {
    pub fn address(&self) -> usize {
        self.address
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The bytes, for a batch that nobody has yet.
    pub fn bytes(&self) -> &[u8] {
        self.piece.as_ref().map(|piece| &piece.bytes()[..self.bytes]).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(pool), Some(piece)) = (self.pool.upgrade(), self.piece.take()) {
            let mut free = pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.len() < pool.most {
                free.push(piece);
            } else if let Some(smallest) = free.iter_mut().min_by_key(|piece| piece.bytes().len())
                && smallest.bytes().len() < piece.bytes().len()
            {
                *smallest = piece;
            }
        }
    }
}
