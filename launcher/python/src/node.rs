//! The node's page cache as a process of a user's program has it: hosted here, by another rank, or by the launcher.

use crate::memory::FORKED;
use crate::own::Own;
use crate::sample::Sample;
use cache::client::{CacheClient, CacheError, ClientSpec, Filling, Item, Taken};
use cache::{CacheHost, Door, DoorError, HostPlan, PolicyKind, knock, with_causes};
use host::machine::{Probe, memfd_room};
use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use spec::contract::cache::CacheStats;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest time in which processes of one job agree on who hosts.
const AGREE: Duration = Duration::from_secs(20);
/// Longest wait for the counters of a directory in another process.
const ANSWER: Duration = Duration::from_secs(1);
/// This share of the machine's memory stays free of cached samples.
const KEEP_FREE: u64 = 20;

/// Room for the cache of a process that nobody planned for: what can be had, less a twentieth of the machine.
fn room() -> Option<u64> {
    let machine = Probe::default().machine();
    Some(memfd_room()?.saturating_sub(machine.memory_bytes() / KEEP_FREE))
}

struct Hosted {
    host: CacheHost,
    _door: Option<Door>,
}

/// This process's part of the cache.
pub struct Part {
    pub client: Arc<CacheClient>,
    memory: File,
    hosted: Option<Hosted>,
}

fn os(error: impl std::fmt::Display) -> PyErr {
    PyOSError::new_err(error.to_string())
}

pyo3::create_exception!(_native, CacheLost, PyOSError, "The process that hosts the cache is gone.");

fn lost(error: CacheError) -> PyErr {
    match error {
        CacheError::Lost(_) | CacheError::Silent { .. } => CacheLost::new_err(error.to_string()),
        error => os(error),
    }
}

/// Joins the cache that is hosted under `name`, or hosts it.
fn agree(name: &str, capacity: u64) -> Result<Part, String> {
    let since = Instant::now();
    let mut unused: Option<CacheHost> = None;
    loop {
        match knock(name) {
            Ok(joined) => return connect(joined.rank, joined.socket, joined.memory, None),
            Err(DoorError::Nobody { .. }) => {}
            Err(error) => return Err(with_causes(&error)),
        }
        let host = match unused.take() {
            Some(host) => host,
            None => start(capacity)?,
        };
        match Door::open(name, host.joiner().map_err(|e| e.to_string())?) {
            Ok(door) => return own(host, Some(door)),
            // Another rank was faster, and is about to listen.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && since.elapsed() < AGREE => {
                unused = Some(host);
                std::thread::sleep(Duration::from_millis(3));
            }
            Err(error) => return Err(format!("the page cache {name} cannot be hosted: {error}")),
        }
    }
}

fn start(capacity: u64) -> Result<CacheHost, String> {
    let plan = HostPlan { capacity_bytes: capacity, policy: PolicyKind::NextUse, ranks: Vec::new() };
    CacheHost::start_lazily(&plan, room).map_err(|error| with_causes(&error))
}

fn own(host: CacheHost, door: Option<Door>) -> Result<Part, String> {
    let joined = || -> io::Result<(u32, OwnedFd, OwnedFd)> {
        let (rank, socket) = host.joiner()?.join()?;
        Ok((rank, socket, host.memfd.try_clone()?))
    };
    let (rank, socket, memory) = joined().map_err(|error| error.to_string())?;
    connect(rank, socket.into(), memory.into(), Some(Hosted { host, _door: door }))
}

fn connect(rank: u32, socket: UnixStream, memory: File, hosted: Option<Hosted>) -> Result<Part, String> {
    let capacity = memory.metadata().map_err(|error| error.to_string())?.len();
    let spec = ClientSpec { rank, ahead_bytes: capacity / 8, verify: false };
    let client = CacheClient::connect(socket, &memory, spec).map_err(|error| error.to_string())?;
    client.keep_idle();
    Ok(Part { client, memory, hosted })
}

/// The cache of this node.
#[pyclass(module = "headroom_train._native")]
pub struct Node {
    part: Own<Part>,
}

impl Node {
    pub fn part(&self) -> PyResult<&Part> {
        self.part.get().ok_or_else(|| PyRuntimeError::new_err(FORKED))
    }
}

/// Python's side of a fill in the caller's thread: `make() -> bytes needed`, then `write(offset)`.
struct Maker<'py>(Bound<'py, PyAny>);

/// A failure of the user's code or of the cache.
enum Trouble {
    Python(PyErr),
    Cache(CacheError),
}

impl From<CacheError> for Trouble {
    fn from(error: CacheError) -> Self {
        Trouble::Cache(error)
    }
}

#[pymethods]
impl Node {
    /// Joins the cache whose door is `name`, and hosts it with `capacity` bytes if nobody does and `may_host`; without a name
    /// hosts one for this process alone.
    #[staticmethod]
    fn join(py: Python<'_>, name: Option<String>, capacity: u64, may_host: bool) -> PyResult<Self> {
        let part = py.detach(|| match name {
            Some(name) if may_host => agree(&name, capacity),
            Some(name) => match knock(&name) {
                Ok(joined) => connect(joined.rank, joined.socket, joined.memory, None),
                Err(error) => Err(with_causes(&error)),
            },
            None => own(start(capacity)?, None),
        });
        Ok(Self { part: Own::new(part.map_err(os)?) })
    }

    #[getter]
    fn hosts(&self) -> PyResult<bool> {
        Ok(self.part()?.hosted.is_some())
    }

    #[getter]
    fn capacity(&self) -> PyResult<u64> {
        Ok(self.part()?.client.capacity_bytes())
    }

    /// Number of the memory's descriptor, by which workers write.
    #[getter]
    fn memory(&self) -> PyResult<i32> {
        Ok(self.part()?.memory.as_raw_fd())
    }

    /// Counters: of the node as last heard, and of this process.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let part = self.part()?;
        let CacheStats { capacity_bytes, used_bytes, entries, hits, misses, evictions, bypasses } = match &part.hosted {
            Some(hosted) => hosted.host.stats(),
            None => py.detach(|| part.client.fresh_stats(ANSWER)),
        };
        let own = part.client.stats();
        let stats = PyDict::new(py);
        for (name, value) in [
            ("capacity_bytes", capacity_bytes),
            ("used_bytes", used_bytes),
            ("entries", entries),
            ("node_lookups", hits + misses + bypasses),
            ("node_decodes", misses),
            ("evictions", evictions),
            ("bypasses", bypasses),
            ("hits", own.hits),
            ("misses", own.misses),
            ("passed", own.bypasses),
        ] {
            stats.set_item(name, value)?;
        }
        if let Some(hosted) = &part.hosted {
            stats.set_item("resident_bytes", hosted.host.resident_bytes())?;
        }
        Ok(stats)
    }

    /// Processes that use the cache which this one hosts, itself included.
    #[getter]
    fn guests(&self) -> PyResult<usize> {
        Ok(self.part()?.hosted.as_ref().map_or(0, |hosted| hosted.host.guests()))
    }

    /// Part of the cache may not be used, because memory is short or was a moment ago.
    #[getter]
    fn is_shrunk(&self) -> PyResult<bool> {
        Ok(self.part()?.client.is_shrunk())
    }

    /// Lines for the user since the last call.
    fn notes(&self) -> PyResult<Vec<String>> {
        Ok(self.part()?.hosted.as_ref().map(|hosted| hosted.host.notes()).unwrap_or_default())
    }

    /// The sample `key`, if it is stored.
    fn find(&self, py: Python<'_>, key: u64, tag: u64) -> PyResult<Option<Sample>> {
        let client = &self.part()?.client;
        let found = match client.kept(key) {
            Some(taken) => Ok(Some(taken)),
            None => py.detach(|| client.stored(key, u64::MAX)),
        };
        match found {
            Ok(taken) => taken.map(|taken| Sample::stored(taken, tag)).transpose(),
            Err(error) => Err(lost(error)),
        }
    }

    /// The sample `key`; one that is not stored is made by `maker.make()`, which returns its bytes, and written by
    /// `maker.write(offset)`. `None`: there is no room for it.
    fn open(
        &self,
        py: Python<'_>,
        key: (u64, u64),
        next_use: u64,
        guess: u64,
        maker: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Sample>> {
        let ((key, tag), client) = (key, &self.part()?.client);
        if let Some(taken) = client.kept(key) {
            return Sample::stored(taken, tag).map(Some);
        }
        let maker: Py<PyAny> = maker.clone().unbind();
        let want = Item { key, bytes: guess.max(1), next_use, offer: false };
        let opened = py.detach(|| {
            client.open::<Trouble>(want, true, key..=key, &mut |filling| {
                Python::attach(|py| Maker(maker.bind(py).clone()).fill(py, filling))
            })
        });
        match opened {
            Ok(taken) => taken.map(|taken: Taken| Sample::stored(taken, tag)).transpose(),
            Err(Trouble::Python(error)) => Err(error),
            Err(Trouble::Cache(error)) => Err(lost(error)),
        }
    }
}

impl Maker<'_> {
    fn fill(&self, py: Python<'_>, filling: &mut Filling) -> Result<(), Trouble> {
        let bytes: usize = self.0.call_method0("make").and_then(|n| n.extract()).map_err(Trouble::Python)?;
        if bytes > filling.room() && !py.detach(|| filling.enlarge(bytes))? {
            return Ok(());
        }
        self.0.call_method1("write", (filling.offset(),)).map_err(Trouble::Python)?;
        filling.set_length(bytes);
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Threads end without the interpreter's lock: none of them needs it, but the last one may take long.
        if let Some(part) = self.part.take() {
            Python::try_attach(|py| py.detach(|| drop(part)));
        }
    }
}
