//! Lookups per second of the page cache's directory over real sockets, hits only, and the time to make its memory:
//! `directory [--ranks 3] [--keys 64] [--ahead 4] [--seconds 2] [--entries 20000] [--gib 1]`. One line of JSON.

use cache::{CacheHost, HostPlan, PolicyKind};
use spec::contract::cache::{FromDirectory, Grant, Item, ToDirectory};
use spec::contract::wire::{Decoder, encode};
use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const ENTRY_BYTES: u64 = 64;

/// One rank's socket, as a client uses it.
struct Client {
    socket: UnixStream,
    decoder: Decoder,
    bytes: Vec<u8>,
    out: Vec<u8>,
}

impl Client {
    fn new(socket: UnixStream) -> Self {
        Self { socket, decoder: Decoder::default(), bytes: vec![0; 64 << 10], out: Vec::new() }
    }

    fn flush(&mut self) -> Result<()> {
        self.socket.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    fn granted(&mut self) -> Result<Vec<Grant>> {
        loop {
            match self.decoder.next_message()? {
                Some(FromDirectory::Granted { grants, .. }) => return Ok(grants),
                Some(other) => return Err(format!("{other:?} was not asked for").into()),
                None => match self.socket.read(&mut self.bytes)? {
                    0 => return Err("the directory closed the socket".into()),
                    n => self.decoder.push(&self.bytes[..n]),
                },
            }
        }
    }

    /// Fills `keys` so that every later lookup hits.
    fn fill(&mut self, keys: Vec<u64>) -> Result<()> {
        for keys in keys.chunks(1000) {
            let items = keys.iter().map(|key| item(*key)).collect();
            encode(&ToDirectory::Acquire { ticket: 0, items }, &mut self.out)?;
            encode(&ToDirectory::Publish { keys: keys.to_vec() }, &mut self.out)?;
            encode(&ToDirectory::Release { keys: keys.iter().map(|key| (*key, *key)).collect() }, &mut self.out)?;
            self.flush()?;
            if self.granted()?.iter().any(|grant| !matches!(grant, Grant::Fill { .. })) {
                return Err("the cache has no room for the bench's entries".into());
            }
        }
        Ok(())
    }

    /// Asks `ahead` batches ahead until `until`; returns lookups and the round trip of each batch in seconds.
    fn look_up(&mut self, keys: u64, ahead: usize, entries: u64, until: Instant, seed: u64) -> Result<(u64, Vec<f64>)> {
        let (mut state, mut lookups, mut trips) = (seed, 0, Vec::new());
        let mut under_way = std::collections::VecDeque::new();
        while Instant::now() < until {
            while under_way.len() <= ahead {
                let batch: Vec<u64> = (0..keys).map(|_| next(&mut state) % entries).collect();
                let items = batch.iter().map(|key| item(*key)).collect();
                encode(&ToDirectory::Acquire { ticket: 0, items }, &mut self.out)?;
                under_way.push_back((Instant::now(), batch));
            }
            self.flush()?;
            let hits = self.granted()?.iter().filter(|grant| matches!(grant, Grant::Ready { .. })).count() as u64;
            if let Some((asked, batch)) = under_way.pop_front() {
                trips.push(asked.elapsed().as_secs_f64());
                let keys = batch.into_iter().map(|key| (key, key + entries)).collect();
                encode(&ToDirectory::Release { keys }, &mut self.out)?;
            }
            lookups += hits;
        }
        Ok((lookups, trips))
    }
}

fn item(key: u64) -> Item {
    Item { key, bytes: ENTRY_BYTES, next_use: key, offer: false }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state >> 33
}

/// Seconds per GiB until a mapping of `gib` GiB has all its pages.
fn allocation(gib: u64) -> Result<f64> {
    let plan = HostPlan { capacity_bytes: gib << 30, policy: PolicyKind::Pin, ranks: Vec::new() };
    let started = Instant::now();
    let host = CacheHost::start(&plan, || None)?;
    while host.present_bytes() < gib << 30 {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(started.elapsed().as_secs_f64() / gib as f64)
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: u64| match args.iter().position(|arg| arg == name) {
        Some(at) => args.get(at + 1).and_then(|text| text.parse().ok()).ok_or(format!("{name} takes a number")),
        None => Ok(default),
    };
    let (ranks, keys, ahead) = (number("--ranks", 3)?, number("--keys", 64)?, number("--ahead", 4)?);
    let (seconds, entries, gib) = (number("--seconds", 2)?, number("--entries", 20_000)?, number("--gib", 1)?);
    for policy in [PolicyKind::Pin, PolicyKind::Lru, PolicyKind::NextUse] {
        let plan = HostPlan { capacity_bytes: entries * ENTRY_BYTES, policy, ranks: (0..ranks as u32).collect() };
        let mut host = CacheHost::start(&plan, || None)?;
        let sockets: Option<Vec<_>> = plan.ranks.iter().map(|rank| host.take_socket(*rank)).collect();
        let mut clients: Vec<Client> =
            sockets.ok_or("no socket")?.into_iter().map(|socket| Client::new(socket.into())).collect();
        clients.first_mut().ok_or("--ranks: at least 1")?.fill((0..entries).collect())?;
        let until = Instant::now() + Duration::from_secs(seconds);
        let run = |(seed, mut client): (usize, Client)| {
            std::thread::spawn(move || client.look_up(keys, ahead as usize, entries, until, seed as u64))
        };
        let threads: Vec<_> = clients.into_iter().enumerate().map(run).collect();
        let (mut lookups, mut trips) = (0, Vec::new());
        for thread in threads {
            let (own, times) = thread.join().map_err(|_| "a client panicked")??;
            lookups += own;
            trips.extend(times);
        }
        trips.sort_by(f64::total_cmp);
        println!(
            r#"{{"policy":"{policy}","ranks":{ranks},"keys":{keys},"lookups_per_s":{:.0},"batch_p50_us":{:.1},"batch_p99_us":{:.1}}}"#,
            lookups as f64 / seconds as f64,
            1e6 * trips[trips.len() / 2],
            1e6 * trips[trips.len() * 99 / 100],
        );
    }
    if gib > 0 {
        println!(r#"{{"memory_gib":{gib},"fallocate_s_per_gib":{:.3}}}"#, allocation(gib)?);
    }
    Ok(())
}
