//! The rank's way to the node's page cache: the launcher's, or one that local rank 0 hosts for ranks that another launcher
//! (torchrun, srun, mpirun) started.

use super::RankError;
use crate::comm::rendezvous::{self, Links};
use crate::comm::shm::inherit;
use crate::comm::{Collective, CommError, RankEnv};
use crate::report::Reporter;
use cache::client::{CacheClient, ClientSpec, inherited_memory};
use cache::{CacheHost, HostPlan, PolicyKind, with_causes};
use host::machine::memfd_room;
use rustix::event::{PollFd, PollFlags, poll};
use spec::config::CachePolicy;
use spec::contract::cache::CacheStats;
use spec::contract::env;
use spec::job::Job;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// `1`: every entry of the page cache carries a checksum, verified at every acquire. The same on all ranks.
const CACHE_VERIFY: &str = "HEADROOM_CACHE_VERIFY";

/// The node's page cache as one rank has it.
pub struct NodeCache {
    pub client: Arc<CacheClient>,
    /// Ranks host it among themselves: they part together.
    of_ranks: bool,
    host: Option<Host>,
}

/// The directory in this process, and the thread that prints its notes.
struct Host {
    directory: Arc<CacheHost>,
    teller: Option<JoinHandle<()>>,
}

impl NodeCache {
    /// Joins the page cache that the launcher made, or, where `links` connect ranks without one, makes it with them.
    /// `None`: the plan has none. Losing the directory aborts `collective`.
    ///
    /// # Errors
    /// The node has too little room for what was planned, local rank 0 is gone, or what was inherited cannot be used.
    pub fn join(
        job: &Job,
        place: &RankEnv,
        links: Option<&Links>,
        collective: &Arc<dyn Collective>,
        reporter: &Reporter,
    ) -> Result<Option<Self>, RankError> {
        if job.config.data.cache == CachePolicy::Off {
            return Ok(None);
        }
        let joined = match links {
            Some(links) => of_ranks(job, place, links, reporter)?,
            None => of_launcher(place)?,
        };
        if let Some(cache) = &joined {
            let collective = Arc::clone(collective);
            // Now, not at the next read: a rank may wait for others in a collective for long.
            let by_rank_0 = cache.of_ranks && cache.host.is_none();
            cache.client.when_lost(move |problem| {
                collective.abort(match by_rank_0 {
                    true => CommError::PeerFailed { rank: 0, error: problem },
                    false => CommError::Cache(problem),
                });
            });
        }
        Ok(joined)
    }

    /// At the end of a run, when no rank reads any more: the ranks part before their host leaves. Returns the node's
    /// counters on the rank that hosts.
    ///
    /// # Errors
    /// A peer failed.
    pub fn part(&mut self, collective: &dyn Collective) -> Result<Option<CacheStats>, CommError> {
        if !self.of_ranks {
            return Ok(None);
        }
        self.client.expect_end();
        collective.barrier()?;
        let Some(host) = &mut self.host else { return Ok(None) };
        host.end();
        Ok(Some(host.directory.stats()))
    }
}

impl Host {
    fn start(directory: CacheHost, reporter: Reporter) -> std::io::Result<Self> {
        let directory = Arc::new(directory);
        let told = Arc::clone(&directory);
        let tell = move || {
            let mut ended = false;
            // The alarm ends with the directory.
            while !ended {
                let mut fds = [PollFd::new(&told.alarm, PollFlags::IN)];
                let _ = poll(&mut fds, None);
                ended = fds[0].revents().contains(PollFlags::HUP);
                told.notes().iter().for_each(|note| reporter.line(format!("page cache: {note}")));
            }
        };
        let teller = std::thread::Builder::new().name("cache-notes".into()).stack_size(256 << 10).spawn(tell)?;
        Ok(Self { directory, teller: Some(teller) })
    }

    fn end(&mut self) {
        self.directory.ask_to_end();
        if let Some(teller) = self.teller.take() {
            let _ = teller.join();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

/// Half of the cache is for batches announced ahead, in equal shares.
fn connect(stream: UnixStream, memfd: &File, place: &RankEnv) -> Result<Arc<CacheClient>, RankError> {
    let capacity_bytes = memfd.metadata().map_err(|e| RankError::system("the page cache's memory", e))?.len();
    let spec = ClientSpec {
        rank: place.rank as u32,
        ahead_bytes: capacity_bytes / (2 * place.local_world_size.max(1) as u64),
        verify: std::env::var(CACHE_VERIFY).is_ok_and(|value| value == "1"),
    };
    Ok(CacheClient::connect(stream, memfd, spec)?)
}

fn of_launcher(place: &RankEnv) -> Result<Option<NodeCache>, RankError> {
    let named = |name| std::env::var(name).ok();
    let (Some(socket), Some(memory)) = (named(env::CACHE_FD), named(env::CACHE_MEMFD)) else {
        return Ok(None);
    };
    let refused = |problem: String| RankError::Inherited {
        name: env::CACHE_FD,
        value: socket.clone(),
        problem,
        way_out: "; it is set by `launch`: start the run again",
    };
    let fd = socket.parse().map_err(|_| refused("expected the number of a descriptor".into()))?;
    let stream = inherit::inherited_socket(fd).map_err(|e| refused(e.to_string()))?;
    let client = connect(stream, &inherited_memory(&memory)?, place)?;
    Ok(Some(NodeCache { client, of_ranks: false, host: None }))
}

fn of_ranks(job: &Job, place: &RankEnv, links: &Links, reporter: &Reporter) -> Result<Option<NodeCache>, RankError> {
    let budget = &job.plan.budget;
    let Some(policy) = PolicyKind::of(budget.cache_policy).filter(|_| budget.page_cache_bytes > 0) else {
        return Ok(None);
    };
    let (memfd, socket, host) = match links {
        Links::Host(guests) => {
            let ranks = std::iter::once(place.rank as u32).chain(guests.iter().map(|(rank, _)| *rank)).collect();
            let plan = HostPlan { capacity_bytes: budget.page_cache_bytes, policy, ranks };
            let (memfd, socket, directory) = open(&plan, guests)?;
            let host =
                Host::start(directory, reporter.clone()).map_err(|e| RankError::system("the page cache's notes", e))?;
            (memfd, socket, Some(host))
        }
        Links::Guest(link) => {
            let timeout = Duration::try_from_secs_f64(job.config.train.step_timeout).unwrap_or(Duration::MAX);
            let mut fds = rendezvous::receive(link.as_fd(), 2, "the node's page cache", timeout)?;
            let (Some(socket), Some(memfd)) = (fds.pop(), fds.pop()) else {
                return Err(RankError::Io("the node's page cache: local rank 0 sent less than two descriptors".into()));
            };
            (memfd, socket, None)
        }
    };
    let client = connect(socket.into(), &File::from(memfd), place)?;
    Ok(Some(NodeCache { client, of_ranks: true, host }))
}

/// Makes the cache and gives every guest its end; returns the memory, the own end and the directory.
fn open(plan: &HostPlan, guests: &[(u32, OwnedFd)]) -> Result<(OwnedFd, OwnedFd, CacheHost), RankError> {
    let mut directory = CacheHost::start(plan, memfd_room)
        .map_err(|e| RankError::NoRoom(format!("the page cache of the plan: {}", with_causes(&e))))?;
    let taken = |problem: String| RankError::Io(format!("the page cache's sockets: {problem}"));
    let mut ends = Vec::new();
    for rank in &plan.ranks {
        ends.push(directory.take_socket(*rank).ok_or_else(|| taken(format!("two processes are rank {rank}")))?);
    }
    let mut ends = ends.into_iter();
    let own = ends.next().ok_or_else(|| taken("no rank".into()))?;
    for ((_, link), end) in guests.iter().zip(ends) {
        // One that has ended will be missed in the next collective.
        let _ = rendezvous::send(link.as_fd(), &[directory.memfd.as_fd(), end.as_fd()]);
    }
    let memfd = directory.memfd.try_clone().map_err(|e| taken(e.to_string()))?;
    Ok((memfd, own, directory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ShmCollective;
    use cache::client::CacheError;
    use spec::config::Config;
    use spec::contract::VERSION;
    use spec::contract::cache::{Item, ToDirectory};
    use spec::contract::wire::encode;
    use spec::plan::{BudgetPlan, Plan};
    use std::io::{Read, Write};
    use std::time::Instant;

    const LIMIT: Duration = Duration::from_secs(60);

    fn job() -> Job {
        let budget = BudgetPlan {
            page_cache_bytes: 1 << 20,
            cache_policy: spec::contract::CacheMode::Pin,
            ..BudgetPlan::default()
        };
        let plan = Plan { budget, ..Plan::default() };
        Job {
            version: VERSION,
            config: Config::default(),
            plan,
            run_dir: "runs/x".into(),
            resume: None,
            start: String::new(),
            resume_split: None,
            work: spec::job::Work::Train,
            earlier: Vec::new(),
            origin: None,
        }
    }

    fn place(rank: usize) -> RankEnv {
        RankEnv { rank, local_rank: rank, world_size: 2, local_world_size: 2, ..RankEnv::alone() }
    }

    fn met(rank: usize, run: &str) -> (Arc<dyn Collective>, Links) {
        let run = format!("{run}-{}", std::process::id());
        let node = rendezvous::meet_node(&place(rank), &run, LIMIT).unwrap();
        (Arc::new(ShmCollective::new(node.memfd, rank, 2, LIMIT).unwrap()), node.links)
    }

    fn join(rank: usize, collective: &Arc<dyn Collective>, links: &Links) -> NodeCache {
        let reporter = Reporter::plain().unwrap();
        NodeCache::join(&job(), &place(rank), Some(links), collective, &reporter).unwrap().unwrap()
    }

    fn read(cache: &NodeCache, key: u64) -> bool {
        let want = Item { key, bytes: 1000, next_use: key, offer: false };
        let mut fill = |key: u64, out: &mut [u8]| {
            out.fill(key as u8);
            Ok::<(), CacheError>(())
        };
        let held = cache.client.read(want, &mut fill).unwrap();
        held.inspect(|bytes| assert!(bytes.iter().all(|&b| b == key as u8))).is_some()
    }

    #[test]
    fn ranks_host_a_directory_among_themselves_and_part_in_order() {
        let parted: Vec<_> = std::thread::scope(|scope| {
            let rank = |rank: usize| {
                let (collective, links) = met(rank, "host");
                let mut cache = join(rank, &collective, &links);
                (0..20).for_each(|key| assert!(read(&cache, key)));
                collective.barrier().unwrap();
                cache.part(&*collective).unwrap()
            };
            let ranks: Vec<_> = [1, 0].map(|number| scope.spawn(move || rank(number))).into_iter().collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let [None, Some(stats)] = parted[..] else { panic!("{parted:?}") };
        assert_eq!((stats.entries, stats.misses, stats.hits), (20, 20, 20));
        assert_eq!(stats.capacity_bytes, 1 << 20);
    }

    /// A guest that is killed leaves nothing but closed sockets, so this one only closes them, in the middle of a fill.
    #[test]
    fn a_guest_that_dies_gives_back_what_it_filled() {
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let node = rendezvous::meet_node(&place(1), &format!("dies-{}", std::process::id()), LIMIT).unwrap();
                let Links::Guest(link) = &node.links else { panic!("a host") };
                let mut fds = rendezvous::receive(link.as_fd(), 2, "cache", LIMIT).unwrap();
                let mut socket = UnixStream::from(fds.pop().unwrap());
                let item = Item { key: 7, bytes: 1000, next_use: 7, offer: false };
                let mut bytes = Vec::new();
                encode(&ToDirectory::Hello { version: VERSION, rank: 1 }, &mut bytes).unwrap();
                encode(&ToDirectory::Acquire { ticket: 1, items: vec![item] }, &mut bytes).unwrap();
                socket.write_all(&bytes).unwrap();
                assert!(socket.read(&mut [0; 256]).unwrap() > 0, "granted");
            });
            let name = format!("dies-{}", std::process::id());
            let node = rendezvous::meet_node(&place(0), &name, LIMIT).unwrap();
            let collective: Arc<dyn Collective> = Arc::new(crate::comm::Solo::new(tch::Device::Cpu));
            let cache = join(0, &collective, &node.links);
            guest.join().unwrap();
            assert!(read(&cache, 7), "the space of the dead rank's fill is filled by the next reader");
            let directory = &cache.host.as_ref().unwrap().directory;
            assert_eq!((directory.stats().entries, directory.stats().misses), (1, 2));
        });
    }

    /// A rank that waits for its peers for up to a minute hears at once that the directory is gone.
    #[test]
    fn a_lost_directory_ends_collectives_that_wait() {
        std::thread::scope(|scope| {
            let (ready, go) = std::sync::mpsc::channel();
            let waiting = scope.spawn(move || {
                let (collective, links) = met(1, "lost");
                let cache = join(1, &collective, &links);
                assert!(read(&cache, 3));
                ready.send(()).unwrap();
                let error = collective.barrier().unwrap_err();
                (error, Instant::now(), RankError::from(collective.barrier().unwrap_err()).exit_code())
            });
            let (collective, links) = met(0, "lost");
            let cache = join(0, &collective, &links);
            go.recv().unwrap();
            let began = Instant::now();
            // Its thread alone ends: both processes and all their threads live on.
            cache.host.as_ref().unwrap().directory.ask_to_end();
            let (error, ended, code) = waiting.join().unwrap();
            println!("the barrier ended {:?} after the directory", ended - began);
            // Whichever rank heard it first, all are out.
            let lost = |error: CommError| match error {
                CommError::Cache(text) => text.contains("directory is gone"),
                other => matches!(other, CommError::PeerFailed { .. }),
            };
            assert!(lost(error));
            assert!([spec::contract::exit::DATA, spec::contract::exit::PEER].contains(&code));
            assert!(lost(collective.barrier().unwrap_err()));
        });
    }

    #[test]
    fn a_cache_without_room_is_refused_with_numbers() {
        let mut job = job();
        job.plan.budget.page_cache_bytes = 1 << 60;
        let collective: Arc<dyn Collective> = Arc::new(crate::comm::Solo::new(tch::Device::Cpu));
        let reporter = Reporter::plain().unwrap();
        let refused = NodeCache::join(&job, &RankEnv::alone(), Some(&Links::Host(Vec::new())), &collective, &reporter);
        let error = refused.err().unwrap();
        assert_eq!(error.exit_code(), spec::contract::exit::PLAN);
        assert!(error.to_string().contains("1152921504606846976 bytes"), "{error}");
    }
}
