//! GPUs by NVML, the driver's management library: no CUDA context is made.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use spec::contract::Gpu;

/// GPUs in the order of CUDA's numbers, and the reason if there are none although a driver is present.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Found {
    pub gpus: Vec<Gpu>,
    pub note: Option<String>,
}

/// Asks NVML. `visible`: the value of `CUDA_VISIBLE_DEVICES`, if set.
pub(super) fn probe(visible: Option<&str>) -> Found {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        // No library, or no kernel module: a machine without a GPU.
        Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound | NvmlError::DriverNotLoaded) => {
            return Found::default();
        }
        Err(error) => return unusable(&error),
    };
    match all(&nvml) {
        Ok(all) => select(all, visible),
        Err(error) => unusable(&error),
    }
}

/// Versions of the driver and of the newest CUDA that it serves. `None` means that no driver answers.
pub fn driver() -> Option<String> {
    let nvml = Nvml::init().ok()?;
    let cuda = nvml.sys_cuda_driver_version().ok()?;
    Some(format!("{}, CUDA {}.{}", nvml.sys_driver_version().ok()?, cuda / 1000, cuda % 1000 / 10))
}

/// NVML kept open, to ask for the devices' memory again and again.
pub struct GpuMeter {
    nvml: Nvml,
}

impl GpuMeter {
    /// `None`: no usable GPU here.
    pub fn open() -> Option<Self> {
        let nvml = Nvml::init().ok()?;
        (nvml.device_count().ok()? > 0).then_some(Self { nvml })
    }

    /// Index (in NVML's order), used and total bytes of every device; all users of it together.
    pub fn read(&self) -> Vec<(u32, u64, u64)> {
        let one = |index| {
            let memory = self.nvml.device_by_index(index).ok()?.memory_info().ok()?;
            Some((index, memory.used, memory.total))
        };
        (0..self.nvml.device_count().unwrap_or(0)).filter_map(one).collect()
    }
}

fn unusable(error: &NvmlError) -> Found {
    Found { gpus: Vec::new(), note: Some(format!("an NVIDIA driver is present but no GPU is usable: {error}")) }
}

/// Every GPU with its UUID.
fn all(nvml: &Nvml) -> Result<Vec<(Gpu, String)>, NvmlError> {
    let describe = |index| {
        let device = nvml.device_by_index(index)?;
        let memory = device.memory_info()?;
        let gpu = Gpu { index, name: device.name()?, memory_total_bytes: memory.total, memory_free_bytes: memory.free };
        Ok((gpu, device.uuid()?))
    };
    (0..nvml.device_count()?).map(describe).collect()
}

/// `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs; as CUDA does, the list ends at the first entry that names
/// no device. [`Gpu::index`] becomes the index that CUDA will use, which counts the visible devices from 0.
fn select(all: Vec<(Gpu, String)>, visible: Option<&str>) -> Found {
    let Some(visible) = visible else {
        return Found { gpus: all.into_iter().map(|(gpu, _)| gpu).collect(), note: None };
    };
    let find = |name: &str| {
        let by_index = |gpu: &Gpu| name.parse::<u32>().is_ok_and(|index| index == gpu.index);
        let by_uuid = |uuid: &str| name.starts_with("GPU-") && uuid.starts_with(name);
        all.iter().find(|(gpu, uuid)| by_index(gpu) || by_uuid(uuid)).map(|(gpu, _)| gpu.clone())
    };
    let chosen = visible.split(',').map(|name| find(name.trim())).map_while(|gpu| gpu);
    let gpus: Vec<_> = chosen.zip(0..).map(|(gpu, index)| Gpu { index, ..gpu }).collect();
    let hidden = gpus.is_empty() && !all.is_empty();
    let note = hidden.then(|| format!("CUDA_VISIBLE_DEVICES={visible:?} hides all {} GPUs of this machine", all.len()));
    Found { gpus, note }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Vec<(Gpu, String)> {
        let gpu = |index| Gpu { index, name: format!("gpu {index}"), memory_total_bytes: 80, memory_free_bytes: 70 };
        vec![(gpu(0), "GPU-aaaa".into()), (gpu(1), "GPU-bbbb".into()), (gpu(2), "GPU-cccc".into())]
    }

    fn names(visible: Option<&str>) -> Vec<(u32, String)> {
        select(node(), visible).gpus.into_iter().map(|gpu| (gpu.index, gpu.name)).collect()
    }

    #[test]
    fn visible_devices_are_renumbered_in_the_order_given() {
        assert_eq!(names(None).len(), 3);
        assert_eq!(names(Some("2, 0")), [(0, "gpu 2".into()), (1, "gpu 0".into())]);
        assert_eq!(names(Some("GPU-bb")), [(0, "gpu 1".into())]);
    }

    #[test]
    fn the_list_ends_at_the_first_unknown_device() {
        assert_eq!(names(Some("1,9,0")), [(0, "gpu 1".into())]);
        let hidden = select(node(), Some("-1"));
        assert!(hidden.gpus.is_empty() && hidden.note.unwrap().contains("hides all 3 GPUs"));
        assert!(select(node(), Some("")).gpus.is_empty());
    }
}
