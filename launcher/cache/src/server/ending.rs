//! The end of the directory's thread.

use super::{Shared, lock};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Closes the alarm when the server's thread ends, by return or by panic.
pub(super) struct Ending(pub(super) Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // No alarm for this note: its reader sees it together with the end.
            lock(&self.0.notes).push("the directory's thread ended in a panic: please report this".into());
        }
        self.0.ended.store(true, Ordering::Release);
        *lock(&self.0.alarm) = None;
    }
}
