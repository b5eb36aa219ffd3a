//! Orders of the watch, queued until the loop takes them: only the loop touches children.

use super::Watcher;
use crate::watch::{CacheNow, Hands};
use cache::CacheHost;
use rustix::fd::OwnedFd;
use spec::contract::Relief;
use std::io;
use std::sync::{Mutex, PoisonError};

/// An order of the watch to the loop.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Relieve {
        order: u64,
        action: Relief,
    },
    /// Ask every rank by a signal.
    Stop,
}

/// The watch's access to the job: it queues orders for the loop, and reads and resizes the page cache.
pub struct OrderQueue<'a> {
    pub watcher: &'a dyn Watcher,
    pub cache: Option<&'a CacheHost>,
    orders: Mutex<Vec<Order>>,
    /// Readable when there are orders: a pipe, since sandboxes may refuse an eventfd.
    pub bell: OwnedFd,
    rope: OwnedFd,
}

impl<'a> OrderQueue<'a> {
    pub fn new(watcher: &'a dyn Watcher, cache: Option<&'a CacheHost>) -> io::Result<Self> {
        let (bell, rope) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
        Ok(Self { watcher, cache, orders: Mutex::default(), bell, rope })
    }

    /// All orders since the last call.
    pub fn take(&self) -> Vec<Order> {
        while matches!(rustix::io::read(&self.bell, &mut [0; 64]), Ok(1..)) {}
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        // A full pipe is readable anyway.
        let _ = rustix::io::write(&self.rope, b"o");
    }
}

impl Hands for OrderQueue<'_> {
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
