//! Entries lent to a model of a device that records registrations: memory is returned only after it was unregistered.

use super::*;
use crate::CacheHost;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 16 * MIB;
/// The fifth slab is cut by a cache of half its size.
const SIZES: Registration = Registration { slab_bytes: 3 << 20, lend_bytes: 1 << 20 };

#[derive(Default)]
struct Recorder {
    /// Start → end of what the device knows.
    known: Mutex<BTreeMap<usize, usize>>,
    /// Start → end of what it reads.
    reads: Mutex<BTreeMap<usize, usize>>,
    calls: AtomicUsize,
    /// Registering fails from this call on.
    refuses_from: Option<usize>,
    forgotten: AtomicUsize,
}

impl Registrar for Recorder {
    fn register(&self, address: usize, bytes: usize) -> Result<(), String> {
        if self.refuses_from.is_some_and(|first| self.calls.fetch_add(1, Ordering::SeqCst) >= first) {
            return Err("no more page-locked memory".into());
        }
        assert!(bytes <= SIZES.slab_bytes);
        let mut known = self.known.lock().unwrap();
        let before = known.range(..address + bytes).next_back().map_or(0, |(_, end)| *end);
        assert!(before <= address, "{address:#x}..+{bytes} is known in part");
        known.insert(address, address + bytes);
        Ok(())
    }

    fn unregister(&self, address: usize, bytes: usize) -> Result<(), String> {
        let reads = self.reads.lock().unwrap();
        let touched = reads.range(..address + bytes).next_back().filter(|(_, end)| **end > address);
        assert_eq!(touched, None, "{address:#x}..+{bytes} is being read");
        assert_eq!(self.known.lock().unwrap().remove(&address), Some(address + bytes), "forgotten as it was told");
        self.forgotten.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Recorder {
    fn bytes(&self) -> u64 {
        self.known.lock().unwrap().iter().map(|(start, end)| (end - start) as u64).sum()
    }
}

/// Work of the device on a part while it has it.
struct DeviceRead<'a> {
    recorder: &'a Recorder,
    at: usize,
    // Ends after the entry in the recorder.
    _lent: Lent,
}

impl<'a> DeviceRead<'a> {
    fn begin(recorder: &'a Recorder, lent: Lent) -> Self {
        let at = lent.bytes().as_ptr() as usize;
        recorder.reads.lock().unwrap().insert(at, at + lent.bytes().len());
        Self { recorder, at, _lent: lent }
    }
}

impl Drop for DeviceRead<'_> {
    fn drop(&mut self) {
        self.recorder.reads.lock().unwrap().remove(&self.at);
    }
}

fn large(key: u64) -> Item {
    Item { key, bytes: MIB + 100 + key, next_use: key, offer: false }
}

fn fill_large(key: u64, out: &mut [u8]) -> Result<(), CacheError> {
    out.fill(key as u8);
    Ok(())
}

/// The entry without its first 50 bytes where it can be lent; its bytes are looked at in any case.
fn lend(client: &Arc<CacheClient>, key: u64) -> Option<Lent> {
    let part = 50..large(key).bytes as usize;
    let right = |bytes: &[u8]| assert!(bytes.iter().all(|&byte| byte == key as u8), "entry {key}");
    match client.read_or_lend(large(key), part.clone(), &mut fill_large).unwrap() {
        Reading::Lent(lent) => {
            assert_eq!(lent.bytes().len(), part.len());
            right(lent.bytes());
            Some(lent)
        }
        Reading::Held(bytes) => {
            right(&bytes);
            None
        }
        Reading::Bypass => None,
    }
}

type Told = Arc<Mutex<Vec<String>>>;

fn registered(refuses_from: Option<usize>) -> (CacheHost, Arc<CacheClient>, Arc<Recorder>, Told) {
    let (host, mut clients) = hosted(CAPACITY, PolicyKind::Pin, 1);
    let client = clients.remove(0);
    let recorder = Arc::new(Recorder { refuses_from, ..Recorder::default() });
    let told = Told::default();
    let tell = Arc::clone(&told);
    client.register(recorder.clone(), SIZES, move |line| tell.lock().unwrap().push(line)).unwrap();
    (host, client, recorder, told)
}

#[test]
fn pages_go_only_when_nothing_of_them_is_lent_and_the_device_has_forgotten_them() {
    let (host, client, recorder, told) = registered(None);
    assert!(client.register(recorder.clone(), SIZES, |_| ()).is_err(), "once");
    wait_for(|| recorder.bytes() == CAPACITY);
    let base = client.map.address() as u64;
    let mut lents: Vec<Lent> = (0..14).map(|key| lend(&client, key).expect("room for fourteen")).collect();
    // One reads across the border of two registrations: cut there.
    let cut: Vec<&Lent> = lents.iter().filter(|lent| lent.pieces().len() > 1).collect();
    assert!(cut.len() >= 3, "{}", cut.len());
    for lent in &lents {
        let mut at = lent.bytes().as_ptr() as u64 - base;
        for piece in lent.pieces() {
            let end = at + piece.len() as u64;
            assert_eq!(at / SIZES.slab_bytes as u64, (end - 1) / SIZES.slab_bytes as u64, "{at}..{end}");
            assert_eq!(piece.as_ptr() as u64 - base, at);
            at = end;
        }
        assert_eq!(lent.pieces().concat(), lent.bytes());
    }
    // All but one from the middle of the half that goes, and one from the slab that is cut.
    let start = |lent: &Lent| lent.bytes().as_ptr() as u64 - base;
    lents.retain(|lent| (10 * MIB..11 * MIB).contains(&start(lent)) || (6 * MIB..7 * MIB).contains(&start(lent)));
    assert_eq!(lents.len(), 2);
    let (low, high) = if start(&lents[0]) < start(&lents[1]) {
        (lents.remove(0), lents.remove(0))
    } else {
        (lents.remove(1), lents.remove(0))
    };
    let (low, high) = (DeviceRead::begin(&recorder, low), DeviceRead::begin(&recorder, high));
    host.resize(CAPACITY / 2);
    // The slabs of which nothing is read: 12..15 and 15..16 MiB.
    wait_for(|| recorder.bytes() == 12 * MIB);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!((recorder.bytes(), host.resident_bytes()), (12 * MIB, CAPACITY), "the device reads there");
    drop(high);
    wait_for(|| recorder.bytes() == 9 * MIB);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(host.resident_bytes(), CAPACITY, "the slab that is cut is known still");
    drop(low);
    wait_for(|| host.resident_bytes() == CAPACITY / 2);
    assert_eq!(recorder.forgotten.load(Ordering::SeqCst), 4);
    wait_for(|| recorder.bytes() == CAPACITY / 2);
    // The remaining entries are lent, and regrown ones are registered and lent again.
    assert!((0..14).any(|key| lend(&client, key).is_some()));
    host.resize(CAPACITY);
    wait_for(|| recorder.bytes() == CAPACITY);
    let lents: Vec<Option<Lent>> = (20..27).map(|key| lend(&client, key)).collect();
    assert!(lents.iter().flatten().any(|lent| lent.bytes().as_ptr() as u64 - base > CAPACITY / 2));
    drop(lents);
    // At the end of the run, before the mapping goes.
    drop(client);
    assert_eq!((recorder.bytes(), told.lock().unwrap().len()), (0, 0));
    assert_eq!(host.notes(), Vec::<String>::new(), "no rank broke the protocol");
}

#[test]
fn a_device_that_refuses_in_the_middle_is_one_line_and_the_cache_goes_on() {
    let (host, client, recorder, told) = registered(Some(2));
    wait_for(|| told.lock().unwrap().len() == 1);
    let line = told.lock().unwrap()[0].clone();
    assert!(line.contains("no more page-locked memory") && line.contains("batch slots"), "{line}");
    assert_eq!(recorder.bytes(), 6 * MIB);
    let lents: Vec<Option<Lent>> = (0..14).map(|key| lend(&client, key)).collect();
    let lent = lents.iter().flatten().count();
    assert!((4..7).contains(&lent), "{lent} entries lie where the device knows the memory");
    drop(lents);
    // Shrinking waits for no slab that never was.
    host.resize(8 * MIB);
    wait_for(|| host.resident_bytes() == 8 * MIB);
    assert_eq!(recorder.bytes(), 6 * MIB);
    host.resize(4 * MIB);
    wait_for(|| host.resident_bytes() == 4 * MIB);
    assert_eq!(recorder.bytes(), 3 * MIB, "the slab that is cut is not tried again");
    drop(client);
    assert_eq!((recorder.bytes(), told.lock().unwrap().len()), (0, 1));
    assert_eq!(host.notes(), Vec::<String>::new());
}

/// Three ranks lend, hold for a while and let go while the cache shrinks and grows over and over. The recorders fail the
/// test when anything is forgotten while it is read, and the watch below when a page goes that is still known.
#[test]
fn shrinking_and_growing_under_a_device_never_takes_pages_that_it_knows() {
    let (host, clients) = hosted(CAPACITY, PolicyKind::NextUse, 3);
    let recorders: Vec<Arc<Recorder>> = clients.iter().map(|_| Arc::default()).collect();
    for (client, recorder) in clients.iter().zip(&recorders) {
        client.register(recorder.clone(), SIZES, |line| panic!("{line}")).unwrap();
    }
    let known = |limit: u64| {
        let beyond = |(client, recorder): (&Arc<CacheClient>, &Arc<Recorder>)| {
            let end = recorder.known.lock().unwrap().values().max().map_or(0, |end| end - client.map.address());
            end as u64 > limit
        };
        clients.iter().zip(&recorders).any(beyond)
    };
    let (stop, lent) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (stop, lent) = (&stop, &lent);
        for (rank, (client, recorder)) in clients.iter().zip(&recorders).enumerate() {
            scope.spawn(move || {
                let mut held = std::collections::VecDeque::new();
                for n in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = (n * 5 + rank as u64 * 7) % 12;
                    if let Some(part) = lend(client, key) {
                        lent.fetch_add(1, Ordering::Relaxed);
                        // The same entry may be lent twice at once: the recorder keeps ranges apart.
                        if held.iter().all(|(other, _)| *other != key) {
                            held.push_back((key, DeviceRead::begin(recorder, part)));
                        }
                    }
                    if held.len() > 2 {
                        held.pop_front();
                    }
                }
            });
        }
        for _ in 0..4 {
            let before = lent.load(Ordering::Relaxed);
            wait_for(|| recorders.iter().all(|recorder| recorder.bytes() == CAPACITY));
            wait_for(|| lent.load(Ordering::Relaxed) > before + 20);
            let wanted = host.resize(CAPACITY / 2);
            wait_for(|| {
                let resident = host.resident_bytes();
                assert!(resident == CAPACITY || !known(wanted), "pages went that a device knows");
                resident == wanted
            });
            host.resize(CAPACITY);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(host.notes(), Vec::<String>::new());
    wait_for(|| clients.iter().all(|client| client.inner.lock().idle()));
    drop(clients);
    assert!(recorders.iter().all(|recorder| recorder.bytes() == 0));
}
