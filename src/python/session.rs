//! The trainer's questions to the user's Python.

#![allow(unsafe_code)]

use crate::tensor::{to_python, to_rust};
use headroom::task::python::{Facts, Host, Named, OptimizerState, Passed, UserError, WorkerEnds, be_hosted_by};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use tch::{Device, Tensor};

/// The user's model and data sets, and `torch._C`.
struct Session {
    object: Py<PyAny>,
    torch: Py<PyAny>,
}

/// This process is the user's interpreter; `object` answers for it.
pub fn host(object: Py<PyAny>) {
    let torch = Python::attach(|py| py.import("torch._C").map(|module| module.into_any().unbind()));
    if let Ok(torch) = torch {
        // Lives as long as the process.
        be_hosted_by(Box::leak(Box::new(Session { object, torch })));
    }
}

impl Session {
    fn ask<T>(
        &self,
        question: impl for<'py> FnOnce(&Bound<'py, PyAny>, &Bound<'py, PyAny>) -> PyResult<T>,
    ) -> Result<T, UserError> {
        Python::attach(|py| {
            question(self.object.bind(py), self.torch.bind(py)).map_err(|error| {
                let memory = error.value(py).getattr("memory").and_then(|memory| memory.extract()).unwrap_or(false);
                let text = error.value(py).to_string();
                let kind = error.get_type(py).name().map(|name| name.to_string()).unwrap_or_default();
                let text = if kind == "UserFailure" { text } else { format!("{kind}: {text}") };
                UserError { text, memory }
            })
        })
    }
}

fn fields<'py>(torch: &Bound<'py, PyAny>, fields: &[Tensor]) -> PyResult<Bound<'py, PyList>> {
    let tensors = fields.iter().map(|tensor| to_python(torch, tensor)).collect::<PyResult<Vec<_>>>()?;
    PyList::new(torch.py(), tensors)
}

impl Host for Session {
    fn facts(&self) -> Result<Facts, UserError> {
        let text: String = self.ask(|session, _| session.call_method0("facts")?.extract())?;
        serde_json::from_str(&text)
            .map_err(|e| UserError { text: format!("facts of python.build: {e}"), memory: false })
    }

    fn worker(&self, old: Option<i32>) -> Result<WorkerEnds, UserError> {
        self.ask(|session, _| {
            let (socket, scratch, process, end): (RawFd, RawFd, i32, String) =
                session.call_method1("worker", (old,))?.extract()?;
            // SAFETY: the session has detached both numbers from its own objects, for this call alone.
            let [socket, scratch] = [socket, scratch].map(|number| unsafe { OwnedFd::from_raw_fd(number) });
            Ok(WorkerEnds { socket: UnixStream::from(socket), scratch: File::from(scratch), process, end })
        })
    }

    fn use_structure(&self, structure: &str) -> Result<(), UserError> {
        self.ask(|session, _| session.call_method1("use_structure", (structure,)).map(drop))
    }

    fn model(&self, seed: u64, device: Device) -> Result<Vec<Named>, UserError> {
        let on = match device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".to_owned(),
        };
        self.ask(|session, torch| {
            let named = session.call_method1("model", (seed, on))?;
            let one = |item: Bound<'_, PyAny>| -> PyResult<Named> {
                let (name, tensor, trained): (String, Bound<'_, PyAny>, bool) = item.extract()?;
                Ok(Named { name, tensor: to_rust(torch, &tensor)?, trained })
            };
            named.try_iter()?.map(|item| one(item?)).collect()
        })
    }

    fn forward(&self, tensors: &[Tensor], train: bool, measure: bool) -> Result<Passed, UserError> {
        self.ask(|session, torch| {
            let result = session.call_method1("forward", (fields(torch, tensors)?, train, measure))?;
            let result = result.cast::<PyTuple>()?;
            Ok(Passed {
                loss: to_rust(torch, &result.get_item(0)?)?,
                prediction: to_rust(torch, &result.get_item(1)?)?,
                sums: result.get_item(2)?.extract()?,
            })
        })
    }

    fn backward(&self, loss: &Tensor) -> Result<(), UserError> {
        self.ask(|session, torch| session.call_method1("backward", (to_python(torch, loss)?,)).map(drop))
    }

    fn make_optimizer(&self, rate: f64, weight_decay: f64) -> Result<(), UserError> {
        self.ask(|session, _| session.call_method1("make_optimizer", (rate, weight_decay)).map(drop))
    }

    fn step(&self, rate: f64) -> Result<(), UserError> {
        self.ask(|session, _| session.call_method1("step", (rate,)).map(drop))
    }

    fn optimizer_state(&self) -> Result<OptimizerState, UserError> {
        self.ask(|session, torch| {
            let (structure, named): (String, Vec<(String, Bound<'_, PyAny>)>) =
                session.call_method0("optimizer_state")?.extract()?;
            let tensors = named.into_iter().map(|(name, tensor)| Ok((name, to_rust(torch, &tensor)?)));
            Ok((structure, tensors.collect::<PyResult<_>>()?))
        })
    }

    fn load_optimizer(&self, structure: &str, tensors: &[(String, Tensor)]) -> Result<(), UserError> {
        self.ask(|session, torch| {
            let named = tensors.iter().map(|(name, tensor)| Ok((name.as_str(), to_python(torch, tensor)?)));
            let named = named.collect::<PyResult<Vec<_>>>()?;
            session.call_method1("load_optimizer", (structure, named)).map(drop)
        })
    }

    fn predict(&self, tensors: &[Tensor]) -> Result<Tensor, UserError> {
        self.ask(|session, torch| to_rust(torch, &session.call_method1("predict", (fields(torch, tensors)?,))?))
    }
}
