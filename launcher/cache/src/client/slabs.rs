//! Which parts of the mapping a device knows: registered in slabs, lent to copies, given back before their pages go.
//!
//! Pure state, a part of the table: what is to be done next is asked for, done without the lock by a thread of the client,
//! and reported. A slab that the device is to forget lends nothing more; it is forgotten when nothing of it is lent.

/// Makes ranges of this process's memory known to a device, so that it reads them without staging. One thread calls it,
/// with ranges that are disjoint and mapped; each is given back as it was made known.
pub trait Registrar: Send + Sync {
    /// The device may read `bytes` from `address` on.
    ///
    /// # Errors
    /// It refuses; the range is not known to it then.
    fn register(&self, address: usize, bytes: usize) -> Result<(), String>;
    /// The device forgets a range. Nothing of it is being read.
    ///
    /// # Errors
    /// It refuses; the range may still be known to it.
    fn unregister(&self, address: usize, bytes: usize) -> Result<(), String>;
}

/// How the mapping is made known, and what of it is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Largest range that is registered in one call: a limit on how long one may take.
    pub slab_bytes: usize,
    /// Parts from this size on are lent: a copy of their own costs less than gathering them (one call takes about 9 µs).
    pub lend_bytes: usize,
}

impl Default for Registration {
    fn default() -> Self {
        Self { slab_bytes: 1 << 30, lend_bytes: 1 << 20 }
    }
}

/// Something to do for a slab, whose range is in bytes from the mapping's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Register { start: u64, end: u64 },
    Unregister { start: u64, end: u64 },
}

#[derive(Clone, Copy, Debug, Default)]
struct Slab {
    /// The device knows the slab from its start up to here, or is about to; 0: nothing of it.
    end: u64,
    /// Ranges lent out now.
    lent: usize,
    /// Work on it is under way, or failed so that nobody knows what the device knows.
    busy: bool,
}

pub(super) struct Slabs {
    slab_bytes: u64,
    lend_bytes: u64,
    map_bytes: u64,
    slabs: Vec<Slab>,
    /// How much of the mapping has pages, and how much of it may be used.
    present: u64,
    limit: u64,
    /// The device refused a range: no more are tried.
    refused: bool,
    /// Everything is to be given back.
    closing: bool,
}

impl Slabs {
    pub(super) fn new(map_bytes: u64, sizes: Registration, limit: u64) -> Self {
        let (slab_bytes, lend_bytes) = (sizes.slab_bytes.max(1) as u64, sizes.lend_bytes as u64);
        let slabs = vec![Slab::default(); map_bytes.div_ceil(slab_bytes) as usize];
        Self { slab_bytes, lend_bytes, map_bytes, slabs, present: 0, limit, refused: false, closing: false }
    }

    pub(super) fn set_present(&mut self, bytes: u64) {
        self.present = bytes;
    }

    pub(super) fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    /// From now on all is given back.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    fn start(&self, slab: usize) -> u64 {
        slab as u64 * self.slab_bytes
    }

    /// Up to where the device should know a slab; 0: nothing of it.
    fn wanted(&self, slab: usize) -> u64 {
        let (start, now) = (self.start(slab), self.slabs[slab].end);
        let full = (start + self.slab_bytes).min(self.map_bytes);
        let limit = self.limit.min(self.map_bytes);
        let usable = self.present.min(limit);
        let end = match () {
            () if self.closing => 0,
            () if usable >= full => full,
            // Its last part, for now.
            () if self.present >= limit => usable,
            // Its pages are coming: it is registered once, when all are there. What is known already stays so.
            () => now.min(limit),
        };
        if end > start { end } else { 0 }
    }

    /// The next piece of work, which is under way until [`Slabs::done`].
    pub(super) fn next(&mut self) -> Option<Work> {
        for slab in 0..self.slabs.len() {
            let (start, wanted) = (self.start(slab), self.wanted(slab));
            let refused = self.refused;
            let it = &mut self.slabs[slab];
            if it.busy || it.end == wanted {
                continue;
            }
            if it.end > 0 && it.lent == 0 {
                it.busy = true;
                return Some(Work::Unregister { start, end: it.end });
            }
            if it.end == 0 && !refused {
                (it.busy, it.end) = (true, wanted);
                return Some(Work::Register { start, end: wanted });
            }
        }
        None
    }

    /// How work ended. What could not be forgotten counts as known for good.
    pub(super) fn done(&mut self, work: Work, well: bool) {
        let (Work::Register { start, .. } | Work::Unregister { start, .. }) = work;
        let Some(slab) = self.slabs.get_mut((start / self.slab_bytes) as usize) else { return };
        match work {
            Work::Register { .. } => {
                slab.busy = false;
                if !well {
                    slab.end = 0;
                    self.refused = true;
                }
            }
            Work::Unregister { .. } => {
                slab.busy = !well;
                if well {
                    slab.end = 0;
                }
            }
        }
    }

    /// True if the device knows anything beyond `bytes`.
    pub(super) fn beyond(&self, bytes: u64) -> bool {
        self.slabs.iter().any(|slab| slab.end > bytes)
    }

    pub(super) fn slab_bytes(&self) -> u64 {
        self.slab_bytes
    }

    /// The device will read the range, until [`Slabs::give_back`]; false: it is small, or the device does not know it, or is
    /// to forget it.
    pub(super) fn lend(&mut self, start: u64, end: u64) -> bool {
        let slabs = self.touched(start, end);
        let known = |slab: usize| {
            let it = &self.slabs[slab];
            let here = end.min(self.start(slab + 1));
            !it.busy && here <= it.end && self.wanted(slab) == it.end
        };
        if end.saturating_sub(start) < self.lend_bytes.max(1)
            || slabs.end > self.slabs.len()
            || !slabs.clone().all(known)
        {
            return false;
        }
        self.slabs[slabs].iter_mut().for_each(|slab| slab.lent += 1);
        true
    }

    /// A range that was lent was read. True: something may be to do now.
    pub(super) fn give_back(&mut self, start: u64, end: u64) -> bool {
        let slabs = self.touched(start, end);
        let Some(touched) = self.slabs.get_mut(slabs.clone()) else { return false };
        touched.iter_mut().for_each(|slab| slab.lent = slab.lent.saturating_sub(1));
        slabs.into_iter().any(|slab| self.slabs[slab].lent == 0 && self.wanted(slab) != self.slabs[slab].end)
    }

    fn touched(&self, start: u64, end: u64) -> std::ops::Range<usize> {
        (start / self.slab_bytes) as usize..end.div_ceil(self.slab_bytes) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(start: u64, end: u64) -> Option<Work> {
        Some(Work::Register { start, end })
    }

    fn unregister(start: u64, end: u64) -> Option<Work> {
        Some(Work::Unregister { start, end })
    }

    /// Slabs of 100 bytes over a mapping of `map_bytes`.
    fn over(map_bytes: u64) -> Slabs {
        Slabs::new(map_bytes, Registration { slab_bytes: 100, lend_bytes: 5 }, u64::MAX)
    }

    /// Does all that is to be done.
    fn settle(slabs: &mut Slabs) -> Vec<Work> {
        std::iter::from_fn(|| slabs.next().inspect(|work| slabs.done(*work, true))).collect()
    }

    #[test]
    fn slabs_are_registered_whole_and_the_last_part_when_nothing_more_comes() {
        let mut slabs = over(250);
        assert_eq!(slabs.next(), None, "nothing has pages yet");
        slabs.set_present(130);
        assert_eq!(settle(&mut slabs), [register(0, 100).unwrap()]);
        slabs.set_present(250);
        assert_eq!(settle(&mut slabs), [register(100, 200).unwrap(), register(200, 250).unwrap()]);
        assert!(slabs.lend(90, 210) && !slabs.lend(240, 251) && !slabs.lend(7, 11));
        slabs.close();
        assert_eq!(settle(&mut slabs), [], "all three are lent from");
        assert!(slabs.give_back(90, 210));
        assert_eq!(settle(&mut slabs).len(), 3);
        assert!(!slabs.beyond(0));
    }

    #[test]
    fn a_slab_cut_by_the_limit_is_forgotten_and_registered_anew_when_nothing_of_it_is_lent() {
        let mut slabs = over(200);
        slabs.set_present(200);
        settle(&mut slabs);
        assert!(slabs.lend(10, 20) && slabs.lend(120, 130));
        slabs.set_limit(50);
        assert!(slabs.beyond(50) && slabs.next().is_none());
        assert!(!slabs.lend(30, 40), "lends nothing more, though the range stays usable");
        assert!(slabs.give_back(120, 130));
        assert_eq!(slabs.next(), unregister(100, 200));
        assert!(slabs.beyond(150), "until it is done");
        slabs.done(Work::Unregister { start: 100, end: 200 }, true);
        assert!(slabs.beyond(50) && !slabs.beyond(100) && slabs.next().is_none());
        assert!(slabs.give_back(10, 20));
        assert_eq!(settle(&mut slabs), [unregister(0, 100).unwrap(), register(0, 50).unwrap()]);
        assert!(!slabs.beyond(50) && slabs.lend(30, 40) && !slabs.give_back(30, 40));
        // It grows back: the pages come one after the other, the slab is registered again once.
        slabs.set_limit(200);
        slabs.set_present(50);
        assert!(slabs.next().is_none() && slabs.lend(0, 50) && !slabs.give_back(0, 50));
        slabs.set_present(80);
        assert_eq!(slabs.next(), None);
        slabs.set_present(100);
        assert_eq!(settle(&mut slabs), [unregister(0, 50).unwrap(), register(0, 100).unwrap()]);
        slabs.set_present(200);
        assert_eq!(settle(&mut slabs), [register(100, 200).unwrap()]);
    }

    #[test]
    fn what_the_device_refuses_is_not_tried_again_and_what_it_knows_stays_usable() {
        let mut slabs = over(300);
        slabs.set_present(300);
        let first = slabs.next().unwrap();
        slabs.done(first, true);
        let second = slabs.next().unwrap();
        assert!(!slabs.lend(100, 110), "not known yet");
        slabs.done(second, false);
        assert_eq!(slabs.next(), None);
        assert!(slabs.lend(0, 100) && !slabs.give_back(0, 100) && !slabs.lend(50, 150));
        assert!(!slabs.beyond(100));
        // A limit that falls while a slab is being registered: it is forgotten at once.
        let mut slabs = over(100);
        slabs.set_present(100);
        let work = slabs.next().unwrap();
        slabs.set_limit(0);
        assert!(slabs.beyond(0));
        slabs.done(work, true);
        assert_eq!(slabs.next(), unregister(0, 100));
        slabs.done(Work::Unregister { start: 0, end: 100 }, false);
        assert!(slabs.beyond(0) && slabs.next().is_none() && !slabs.lend(0, 9), "nobody may punch it");
    }
}
