//! Memory of this rank by the plan's lines, counted where it is allocated, so that the plan can be compared with it.
//!
//! Architecture invariant: numbers alone. Nothing is decided by them.

use spec::contract::Held;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A line of the plan, or a part of one, that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Model,
    /// The part of [`Part::Model`] that lies in memory shared by the ranks.
    ModelShared,
    Slots,
    ValSlots,
    Scratch,
    Chunks,
    Staging,
    Meeting,
}

const PARTS: usize = 8;

struct Account {
    now: AtomicU64,
    most: AtomicU64,
}

static ACCOUNTS: [Account; PARTS] = [const { Account { now: AtomicU64::new(0), most: AtomicU64::new(0) } }; PARTS];

impl Part {
    fn account(self) -> &'static Account {
        &ACCOUNTS[self as usize]
    }
}

/// Bytes that are held until this is dropped.
#[derive(Debug)]
pub struct Holding {
    part: Part,
    bytes: u64,
}

/// Counts `bytes` for `part`.
pub fn hold(part: Part, bytes: u64) -> Holding {
    let mut holding = Holding { part, bytes: 0 };
    holding.set(bytes);
    holding
}

impl Holding {
    /// It holds another number of bytes from now on.
    pub fn set(&mut self, bytes: u64) {
        let account = self.part.account();
        if bytes >= self.bytes {
            let more = bytes - self.bytes;
            let now = account.now.fetch_add(more, Relaxed) + more;
            account.most.fetch_max(now, Relaxed);
        } else {
            account.now.fetch_sub(self.bytes - bytes, Relaxed);
        }
        self.bytes = bytes;
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The most that each part held since this was last called; tensors are not counted here.
pub fn take_most() -> Held {
    let most = |part: Part| {
        let account = part.account();
        let now = account.now.load(Relaxed);
        account.most.swap(now, Relaxed).max(now)
    };
    Held {
        model_bytes: most(Part::Model),
        model_shared_bytes: most(Part::ModelShared),
        slots_bytes: most(Part::Slots),
        val_slots_bytes: most(Part::ValSlots),
        scratch_bytes: most(Part::Scratch),
        chunks_bytes: most(Part::Chunks),
        staging_bytes: most(Part::Staging),
        meeting_bytes: most(Part::Meeting),
        ..Held::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_since_the_last_look_is_told() {
        // No other test of this process counts so much.
        const HUGE: u64 = 1 << 50;
        let mut held = hold(Part::Staging, HUGE);
        held.set(3 * HUGE);
        held.set(2 * HUGE);
        assert!(take_most().staging_bytes >= 3 * HUGE);
        let now = take_most().staging_bytes;
        assert!((2 * HUGE..3 * HUGE).contains(&now), "{now}");
        drop(held);
        take_most();
        assert!(take_most().staging_bytes < HUGE);
    }
}
