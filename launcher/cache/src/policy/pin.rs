use super::{Entries, Policy};
use spec::contract::cache::Item;

/// Steady hit rate of an epoch that reads each entry once: exactly the share cached, which no policy can pass.
pub struct Pin;

impl Policy for Pin {
    fn victim(&mut self, _item: &Item, _entries: &dyn Entries) -> Option<u64> {
        None
    }
}
