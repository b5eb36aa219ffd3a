//! Requests to a running loop: to stop, and to give memory back. They come from any thread and are carried out between
//! two steps.

use crate::data::loader::Throttle;
use spec::contract::Relief;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One [`Relief`] and the number that its answer carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub number: u64,
    pub action: Relief,
}

/// The way into a loop. Cheap to share.
#[derive(Debug, Default)]
pub struct Controls {
    stop: Arc<AtomicBool>,
    throttle: Arc<Throttle>,
    orders: Mutex<VecDeque<Order>>,
    reason: Mutex<Option<String>>,
}

impl Controls {
    /// `stop`: set by a signal.
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Self { stop, ..Self::default() }
    }

    /// Takes an order; the loop does it between two steps, or between two batches of an evaluation.
    pub fn order(&self, number: u64, action: Relief) {
        if let Relief::Stop { reason } = &action {
            locked(&self.reason).get_or_insert_with(|| reason.clone());
            self.stop.store(true, Ordering::Relaxed);
        }
        locked(&self.orders).push_back(Order { number, action });
    }

    /// True if this rank was asked to stop.
    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Why, where someone said so.
    pub fn reason(&self) -> Option<String> {
        locked(&self.reason).clone()
    }

    /// Throttle that all loaders of the rank obey.
    pub fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    pub(super) fn next(&self) -> Option<Order> {
        locked(&self.orders).pop_front()
    }
}

fn locked<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every update under these locks is one assignment.
    value.lock().unwrap_or_else(PoisonError::into_inner)
}
