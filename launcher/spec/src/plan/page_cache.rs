//! The page cache's line: what is left of the budget, cut by the config and by what the data set can use.

use super::constants::*;
use super::sizes::once;
use super::table::{bytes_text, count};
use super::{BudgetLine, Plan};
use crate::config::{CachePolicy, Config, ShuffleMode};
use crate::contract::{CacheMode, DataSizes, LineId};

pub(super) struct PageCache<'a> {
    config: &'a Config,
    data: &'a DataSizes,
}

impl<'a> PageCache<'a> {
    pub fn new(config: &'a Config, data: &'a DataSizes) -> Self {
        Self { config, data }
    }

    /// Entries of a page cache of so many bytes.
    pub fn entries(&self, cache_bytes: u64) -> u64 {
        let [all, short] = self.data.entry_bytes;
        let holds_all = cache_bytes.saturating_add(PAGE_BYTES) > self.data.useful_bytes;
        cache_bytes.div_ceil(if holds_all { all } else { short }.max(1))
    }

    /// Part of `room` left for entries, since each entry also takes a place in the launcher's directory.
    fn beside_directory(&self, room: u64) -> u64 {
        let each = self.data.entry_bytes[1].max(1);
        let share = u128::from(room) * u128::from(each) / u128::from(each.saturating_add(DIRECTORY_ENTRY_BYTES));
        // One entry may be a part.
        u64::try_from(share).unwrap_or(room).saturating_sub(DIRECTORY_ENTRY_BYTES)
    }

    /// Line for the node's `room` beside all other lines.
    pub fn line(&self, room: u64) -> BudgetLine {
        let room = self.beside_directory(room);
        let cap = self.config.data.cache_size_gb.map(|gb| (gb * GIB as f64) as u64);
        let useful = self.data.useful_bytes;
        // Whole pages: no more than there is room for, no less than all entries need.
        let pages = room.min(cap.unwrap_or(u64::MAX)) / PAGE_BYTES;
        let capacity = pages.min(useful.div_ceil(PAGE_BYTES)) * PAGE_BYTES;
        let off = self.config.data.cache == CachePolicy::Off;
        let bytes = if off { 0 } else { capacity };
        let cut = match capacity {
            _ if off => "data.cache is off".to_owned(),
            _ if useful == 0 => "no data set to keep".to_owned(),
            _ if room <= useful && room <= cap.unwrap_or(u64::MAX) => "all that is left".to_owned(),
            _ if cap.is_some_and(|cap| cap <= useful) => "cut by data.cache_size_gb".to_owned(),
            _ => self.data.useful.clone(),
        };
        let policy = self.policy(bytes);
        let share = (bytes as f64 / useful.max(1) as f64).min(1.0);
        let exact = self.data.useful_is_exact;
        let rate = match policy {
            // Entries that stay are hit in every epoch.
            CacheMode::Pin => format!(", steady hit rate {:.1} %", 100.0 * share),
            _ if exact && bytes >= useful => ", steady hit rate 100.0 %".into(),
            // An entry that is read several times in an epoch may hit in between, too.
            CacheMode::NextUse if exact => format!(", steady hit rate {:.1} % or more", 100.0 * share),
            _ => String::new(),
        };
        once(LineId::PageCache, bytes, if bytes == 0 { cut } else { format!("{cut}, policy {policy}{rate}") })
    }

    /// Policy of a cache of so many bytes.
    pub fn policy(&self, bytes: u64) -> CacheMode {
        match self.config.data.cache {
            _ if bytes == 0 => CacheMode::Off,
            CachePolicy::Off => CacheMode::Off,
            CachePolicy::Auto => self.data.auto_policy,
            CachePolicy::NextUse => CacheMode::NextUse,
            CachePolicy::Pin => CacheMode::Pin,
            CachePolicy::Lru => CacheMode::Lru,
        }
    }

    /// A sentence on a cache that is too small for the order of samples, where chunks serve many of them.
    pub fn too_small(&self, draft: &Plan, bytes: u64) -> Option<String> {
        let (data, chunk) = (&self.config.data, self.data.chunk_bytes?);
        let useful = self.data.useful_bytes / PAGE_BYTES * PAGE_BYTES;
        if bytes == 0 || bytes >= useful || !data.shuffle {
            return None;
        }
        let pages = bytes / chunk.max(1);
        let (window, ranks) = (data.shuffle_window as u64, draft.topology.local_world_size as u64);
        let holds =
            format!("the page cache of {} holds about {pages} pages of {}", bytes_text(bytes), bytes_text(chunk));
        let wanted = window.saturating_mul(WINDOWS_HELD);
        match data.shuffle_mode {
            ShuffleMode::Block if pages < wanted => Some(format!(
                "{holds}; data.shuffle_mode: block draws samples from {window} at a time and needs about {WINDOWS_HELD} × {window} = \
                 {wanted} to read each once: lower data.shuffle_window to {}, or raise data.cache_size_gb or memory.budget",
                (pages / WINDOWS_HELD).max(1)
            )),
            ShuffleMode::Global => {
                let batch = ranks.saturating_mul(draft.batch.micro_batch as u64);
                (pages < batch.saturating_mul(2)).then(|| {
                    format!(
                        "{holds}; the samples of one batch of {} may lie in {batch}, and half of the cache is for batches ahead: most \
                         reads will pass it by; data.shuffle_mode: block needs far fewer",
                        count(ranks as usize, "rank")
                    )
                })
            }
            _ => None,
        }
    }
}
