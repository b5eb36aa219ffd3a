//! The ranks as layers see them that take statistics over all samples (`train.sync_batchnorm`).

use super::TrainError;
use crate::comm::{Collective, CommError};
use crate::task::norm::Peers;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::Tensor;

/// A collective behind [`Peers`]. A layer cannot fail: a failure is kept, and [`AllRanks::check`] gives it after the pass.
pub struct AllRanks {
    collective: Arc<dyn Collective>,
    failure: Mutex<Option<CommError>>,
}

impl AllRanks {
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        Self { collective, failure: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<CommError>> {
        // Every update is one assignment.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The failure of a sum, if any. The passes since have no meaning then.
    ///
    /// # Errors
    /// As the collective said.
    pub fn check(&self) -> Result<(), TrainError> {
        match self.lock().as_ref() {
            Some(error) => Err(error.clone().into()),
            None => Ok(()),
        }
    }
}

impl Peers for AllRanks {
    fn sum(&self, tensor: &Tensor) {
        let mut failure = self.lock();
        if failure.is_none() {
            *failure = self.collective.start_all_reduce(tensor, true).and_then(|()| self.collective.join()).err();
        }
    }
}
