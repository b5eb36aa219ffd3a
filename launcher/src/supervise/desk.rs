//! Where the watch leaves its orders, and the loop takes them: only the loop touches children.

use super::Watcher;
use crate::watch::{CacheNow, Hands};
use cache::CacheHost;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use spec::contract::Relief;
use std::io;
use std::sync::{Mutex, PoisonError};

/// What the loop has to do for the watch.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Relieve {
        order: u64,
        action: Relief,
    },
    /// Ask every rank by a signal.
    Stop,
}

/// The watch's hands.
pub struct Desk<'a> {
    pub watcher: &'a dyn Watcher,
    pub cache: Option<&'a CacheHost>,
    orders: Mutex<Vec<Order>>,
    /// Readable when there are orders.
    pub bell: OwnedFd,
}

impl<'a> Desk<'a> {
    pub fn new(watcher: &'a dyn Watcher, cache: Option<&'a CacheHost>) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { watcher, cache, orders: Mutex::default(), bell })
    }

    /// All orders since the last call.
    pub fn take(&self) -> Vec<Order> {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl Hands for Desk<'_> {
    fn say(&self, text: &str) {
        self.watcher.note(text);
    }

    fn job_bytes(&self, bytes: u64) {
        self.watcher.memory(bytes);
    }

    fn relieve(&self, order: u64, action: &Relief) {
        self.put(Order::Relieve { order, action: action.clone() });
    }

    fn stop(&self) {
        self.put(Order::Stop);
    }

    fn cache(&self) -> Option<CacheNow> {
        self.cache.map(|host| CacheNow {
            capacity_bytes: host.capacity_bytes(),
            wanted_bytes: host.wanted_bytes(),
            resident_bytes: host.resident_bytes(),
        })
    }

    fn resize_cache(&self, bytes: u64) -> u64 {
        self.cache.map_or(0, |host| host.resize(bytes))
    }
}
