//! Sums of metrics, kept on the device while a step runs: no step waits for the host.

use crate::data::DataError;
use tch::{Kind, Tensor, no_grad};

/// Sums of a fixed number of values.
pub struct Sums {
    sums: Vec<f64>,
    /// Those of batches on a device, f64.
    pending: Option<Tensor>,
}

impl Sums {
    pub fn new(count: usize) -> Self {
        Self { sums: vec![0.0; count], pending: None }
    }

    /// Adds `values`, of as many elements as there are sums.
    pub fn add(&mut self, values: &Tensor) {
        let values = no_grad(|| values.detach().flatten(0, -1).to_kind(Kind::Double));
        if values.device().is_cuda() {
            self.pending = Some(match self.pending.take() {
                Some(before) => before + values,
                None => values,
            });
        } else {
            add(&mut self.sums, &values);
        }
    }

    pub fn sums(&self) -> Vec<f64> {
        let mut sums = self.sums.clone();
        self.pending.iter().for_each(|pending| add(&mut sums, pending));
        sums
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.sums.len());
    }
}

fn add(sums: &mut [f64], values: &Tensor) {
    // A flat f64 tensor: this cannot fail.
    for (sum, value) in sums.iter_mut().zip(Vec::<f64>::try_from(values).unwrap_or_default()) {
        *sum += value;
    }
}

/// `number / of`; `None` where there is nothing to divide by.
pub fn ratio(number: f64, of: f64) -> Option<f64> {
    (of > 0.0).then(|| number / of)
}

/// An error of libtorch while results of a pass are written.
pub fn unreadable(error: tch::TchError) -> DataError {
    DataError::Encode(Box::new(error))
}
