//! Facts on this process and this machine.

use host::machine::{Probe, Resident, Shares};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustix::process::{Signal, set_parent_process_death_signal};

/// Memory of this process, or of `pid`, in bytes; a value that cannot be read is missing.
#[pyfunction]
#[pyo3(signature = (pid=None))]
pub fn process_memory<'py>(py: Python<'py>, pid: Option<i32>) -> PyResult<Bound<'py, PyDict>> {
    let pid = pid.unwrap_or_else(|| i32::try_from(std::process::id()).unwrap_or(0));
    let memory = PyDict::new(py);
    let (resident, shares) = py.detach(|| (Resident::of(pid), Shares::of(pid)));
    if let Some(Resident { rss, anonymous }) = resident {
        memory.set_item("rss_bytes", rss)?;
        memory.set_item("anonymous_bytes", anonymous)?;
    }
    if let Some(Shares { pss, uss, shared, .. }) = shares {
        memory.set_item("pss_bytes", pss)?;
        memory.set_item("uss_bytes", uss)?;
        memory.set_item("shared_bytes", shared)?;
    }
    Ok(memory)
}

/// Memory of this machine, in bytes.
#[pyfunction]
pub fn machine_memory<'py>(py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
    let machine = py.detach(|| Probe::default().machine());
    let memory = PyDict::new(py);
    memory.set_item("total_bytes", machine.memory_bytes())?;
    memory.set_item("available_bytes", machine.memfd_room_bytes())?;
    if let Some(limit) = machine.cgroup_limit_bytes {
        memory.set_item("cgroup_limit_bytes", limit)?;
    }
    memory.set_item("cores", machine.cores)?;
    Ok(memory)
}

/// Has the kernel end this process when the thread ends that started it. False: the kernel refuses.
#[pyfunction]
pub fn end_with_parent() -> bool {
    set_parent_process_death_signal(Some(Signal::KILL)).is_ok()
}
