//! The page cache's mapping made known to this rank's device.

use super::RankError;
use crate::report::Reporter;
use crate::torch::device::{self, HostPin, SLAB_BYTES};
use cache::client::{CacheClient, Registrar, Registration};
use std::sync::{Arc, Mutex, PoisonError};
use tch::Device;

/// `slab:least`: bytes of a slab and of the smallest part that is lent, where a CPU stands for a device: small caches have
/// several slabs then, and small entries are lent. Tests set it.
const SIZES: &str = "HEADROOM_TEST_LEND";

/// Page-locks ranges for a CUDA device.
struct DeviceRegistrar {
    device: usize,
    pins: Mutex<Vec<(usize, HostPin)>>,
}

impl Registrar for DeviceRegistrar {
    fn register(&self, address: usize, bytes: usize) -> Result<(), String> {
        // The calling thread belongs to the cache: without selecting the device it would make a context on the first
        // one.
        let pin = device::set_device(self.device).and_then(|()| HostPin::new(address, bytes, usize::MAX));
        let pin = pin.map_err(|e| e.to_string())?;
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).push((address, pin));
        Ok(())
    }

    fn unregister(&self, address: usize, bytes: usize) -> Result<(), String> {
        device::set_device(self.device).map_err(|e| e.to_string())?;
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let at = pins.iter().position(|(start, _)| *start == address).ok_or("it was never page-locked")?;
        pins[at].1.release(address, bytes).map_err(|e| e.to_string())?;
        pins.swap_remove(at);
        Ok(())
    }
}

/// A CPU that stands for a device reads all memory as it is.
struct Nothing;

impl Registrar for Nothing {
    fn register(&self, _address: usize, _bytes: usize) -> Result<(), String> {
        Ok(())
    }

    fn unregister(&self, _address: usize, _bytes: usize) -> Result<(), String> {
        Ok(())
    }
}

/// Registers the page cache with `on`; on a CPU only where its steps are those of a device (`always`).
///
/// # Errors
/// No thread for it. A refusal of the device is reported in a line, and training continues without.
pub fn register(cache: &CacheClient, on: Device, always: bool, reporter: &Reporter) -> Result<(), RankError> {
    let sizes = Registration { slab_bytes: SLAB_BYTES, ..Registration::default() };
    let (registrar, sizes): (Arc<dyn Registrar>, _) = match on {
        Device::Cuda(index) => (Arc::new(DeviceRegistrar { device: index, pins: Mutex::default() }), sizes),
        _ if always => (Arc::new(Nothing), test_sizes().unwrap_or(sizes)),
        _ => return Ok(()),
    };
    let reporter = reporter.clone();
    Ok(cache.register(registrar, sizes, move |line| reporter.line(line))?)
}

fn test_sizes() -> Option<Registration> {
    let text = std::env::var(SIZES).ok()?;
    let (slab, least) = text.split_once(':')?;
    Some(Registration { slab_bytes: slab.parse().ok()?, lend_bytes: least.parse().ok()? })
}
