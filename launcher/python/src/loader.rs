//! The loader's threads as Python starts and asks them.

use crate::disk::PyDisk;
use crate::engine::{Engine, Next, Plan, Respawn};
use crate::failure::Failure;
use crate::files::Files;
use crate::lane::Lane as Raw;
use crate::memory::FORKED;
use crate::node::Node;
use crate::own::Own;
use crate::sample::Batch;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The loader's end of a worker that is about to start.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Lane(Mutex<Option<Raw>>);

impl Lane {
    fn with<T>(&self, call: impl FnOnce(&mut Raw) -> Option<T>) -> PyResult<T> {
        let mut lane = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lane.as_mut().and_then(call).ok_or_else(|| PyRuntimeError::new_err("this lane was given away"))
    }

    fn take(&self) -> Option<Raw> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl Lane {
    #[new]
    fn new() -> PyResult<Self> {
        let lane = Raw::new().map_err(|error| PyOSError::new_err(format!("a decode worker's memory: {error}")))?;
        Ok(Self(Mutex::new(Some(lane))))
    }

    /// Descriptor of the worker's end, given away.
    fn socket(&self) -> PyResult<i32> {
        self.with(Raw::give_socket)
    }

    /// The worker runs as a child of this process.
    fn set_process(&self, pid: i32) -> PyResult<()> {
        self.with(|lane| {
            lane.set_process(pid);
            Some(())
        })
    }

    /// Descriptor of the memory that the worker writes batches to; it stays this object's.
    fn scratch(&self) -> PyResult<i32> {
        self.with(|lane| Some(lane.scratch_number()))
    }
}

/// `pool.respawn(lane, late) -> (Lane, how the old one ended)`, `pool.note(text)`.
struct Pool(Py<PyAny>);

impl Respawn for Pool {
    fn respawn(&self, lane: usize, late: bool) -> Result<(Raw, String), String> {
        let started = Python::try_attach(|py| {
            let answer = self.0.bind(py).call_method1("respawn", (lane, late))?;
            let (lane, end): (Bound<'_, Lane>, String) = answer.extract()?;
            lane.get().take().map(|lane| (lane, end)).ok_or_else(|| PyRuntimeError::new_err("no lane"))
        });
        match started {
            Some(started) => {
                started.map_err(|error| format!("a decode worker ended, and none can be started: {error}"))
            }
            None => Err("the program ends".into()),
        }
    }

    fn note(&self, text: &str) {
        // A line that cannot be written is lost.
        let _ = Python::try_attach(|py| self.0.bind(py).call_method1("note", (text,)).map(drop));
    }
}

/// Batches of one loader.
#[pyclass(module = "headroom_train._native")]
pub struct Loader {
    engine: Own<Engine>,
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (node, base, tag, lanes, pool, *, files, disk, threads, build, apart, timeout, batches))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        node: Option<PyRef<'_, Node>>,
        base: u64,
        tag: u64,
        lanes: Vec<Bound<'_, Lane>>,
        pool: Py<PyAny>,
        files: Option<PyRef<'_, Files>>,
        disk: Option<PyRef<'_, PyDisk>>,
        threads: usize,
        build: bool,
        apart: bool,
        timeout: f64,
        batches: usize,
    ) -> PyResult<Self> {
        let client = node.map(|node| node.part().map(|part| part.client.clone())).transpose()?;
        let limit = Duration::try_from_secs_f64(timeout)
            .map_err(|error| PyValueError::new_err(format!("timeout={timeout}: {error}")))?;
        let timeout = (limit > Duration::ZERO).then_some(limit);
        let files = files.map(|files| files.native()).transpose()?;
        let disk = disk.map(|disk| Arc::clone(&disk.0));
        let plan = Plan { client, base, tag, files, disk, build, apart, timeout, batches };
        let lanes: Vec<Raw> = lanes.iter().filter_map(|lane| lane.get().take()).collect();
        let engine = Engine::start(plan, threads, lanes, Box::new(Pool(pool)));
        let engine = engine.map_err(|error| PyOSError::new_err(format!("the loader's threads: {error}")))?;
        Ok(Self { engine: Own::new(engine) })
    }

    fn push(&self, py: Python<'_>, epoch: u64, ids: Vec<u64>, next_uses: Vec<u64>) -> PyResult<()> {
        let engine = self.engine()?;
        py.detach(|| engine.push(epoch, ids, next_uses));
        Ok(())
    }

    /// The next batch; bytes: the pickled error of the user's code; `None`: no batch was asked for.
    fn next<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let engine = self.engine()?;
        loop {
            match py.detach(|| engine.next()) {
                Next::Batch(made) => return Ok(Some(Bound::new(py, Batch::new(made))?.into_any())),
                Next::Failed(Failure::User(error)) => return Ok(Some(PyBytes::new(py, &error).into_any())),
                Next::Failed(failure) => return Err(failure.into()),
                Next::End => return Ok(None),
                Next::Wait => py.check_signals()?,
            }
        }
    }

    /// Forgets what was asked for.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine()?;
        py.detach(|| engine.cancel());
        Ok(())
    }

    /// Samples that workers decoded.
    #[getter]
    fn decodes(&self) -> PyResult<u64> {
        Ok(self.engine()?.shared().decodes.load(Ordering::Relaxed))
    }

    /// Ends the threads.
    fn close(&mut self, py: Python<'_>) {
        if let Some(mut engine) = self.engine.take() {
            py.detach(|| engine.close());
        }
    }
}

impl Loader {
    fn engine(&self) -> PyResult<&Engine> {
        self.engine.get().ok_or_else(|| PyRuntimeError::new_err(format!("the loader is closed, or {FORKED}")))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        if let Some(mut engine) = self.engine.take() {
            // A thread may wait for the interpreter's lock to start a worker.
            Python::try_attach(|py| py.detach(|| engine.close()));
        }
    }
}
