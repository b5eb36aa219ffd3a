//! GPUs by NVML, the driver's management library: no CUDA context is made.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use spec::contract::Gpu;
use std::path::Path;

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
        // No library, or no kernel module: a machine without a GPU, or a container that was given the device alone.
        Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound | NvmlError::DriverNotLoaded) => {
            return Found { gpus: Vec::new(), note: without_nvml(&DEVICE_FILES.map(|path| Path::new(path).exists())) };
        }
        Err(error) => return unusable(&error),
    };
    match all(&nvml) {
        Ok(all) => {
            let chosen = select(&all, visible, |name| mig(&nvml, name));
            Found { gpus: chosen.gpus.into_iter().map(|(gpu, _)| gpu).collect(), note: chosen.note }
        }
        Err(error) => unusable(&error),
    }
}

/// Versions of the driver and of the newest CUDA that it serves. `None` means that no driver answers.
pub fn driver() -> Option<String> {
    let nvml = Nvml::init().ok()?;
    let cuda = nvml.sys_cuda_driver_version().ok()?;
    Some(format!("{}, CUDA {}.{}", nvml.sys_driver_version().ok()?, cuda / 1000, cuda % 1000 / 10))
}

/// Files that are there where the kernel drives an NVIDIA GPU.
const DEVICE_FILES: [&str; 2] = ["/dev/nvidia0", "/proc/driver/nvidia/version"];

fn without_nvml(signs: &[bool]) -> Option<String> {
    signs.contains(&true).then(|| {
        "this machine has an NVIDIA device but no libnvidia-ml.so.1, by which GPUs are counted: start the container with \
         NVIDIA_DRIVER_CAPABILITIES=compute,utility (docker: --gpus all), or install the driver's libraries"
            .to_owned()
    })
}

/// NVML kept open, to ask for the devices' memory again and again.
pub struct GpuMeter {
    nvml: Nvml,
    /// UUIDs in the order of CUDA's numbers.
    uuids: Vec<String>,
}

impl GpuMeter {
    /// `None`: no usable GPU here.
    pub fn open() -> Option<Self> {
        let nvml = Nvml::init().ok()?;
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let chosen = select(&all(&nvml).ok()?, visible.as_deref(), |name| mig(&nvml, name));
        let uuids: Vec<String> = chosen.gpus.into_iter().map(|(_, uuid)| uuid).collect();
        (!uuids.is_empty()).then_some(Self { nvml, uuids })
    }

    /// Index (CUDA's, as in [`Gpu::index`]), used and total bytes of every device; all users of it together.
    pub fn read(&self) -> Vec<(u32, u64, u64)> {
        let one = |(uuid, index): (&String, u32)| {
            let memory = self.nvml.device_by_uuid(uuid.as_str()).ok()?.memory_info().ok()?;
            Some((index, memory.used, memory.total))
        };
        self.uuids.iter().zip(0..).filter_map(one).collect()
    }
}

fn unusable(error: &NvmlError) -> Found {
    Found { gpus: Vec::new(), note: Some(format!("an NVIDIA driver is present but no GPU is usable: {error}")) }
}

/// Every GPU with its UUID.
fn all(nvml: &Nvml) -> Result<Vec<(Gpu, String)>, NvmlError> {
    (0..nvml.device_count()?).map(|index| describe(&nvml.device_by_index(index)?, index)).collect()
}

fn describe(device: &nvml_wrapper::Device, index: u32) -> Result<(Gpu, String), NvmlError> {
    let memory = device.memory_info()?;
    let gpu = Gpu { index, name: device.name()?, memory_total_bytes: memory.total, memory_free_bytes: memory.free };
    Ok((gpu, device.uuid()?))
}

/// A part of a divided GPU, by its UUID.
fn mig(nvml: &Nvml, uuid: &str) -> Option<(Gpu, String)> {
    describe(&nvml.device_by_uuid(uuid).ok()?, 0).ok()
}

/// Devices with their UUIDs, in the order of CUDA's numbers.
struct Chosen {
    gpus: Vec<(Gpu, String)>,
    note: Option<String>,
}

/// `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs; as CUDA does, the list ends at the first entry that names
/// no device. [`Gpu::index`] becomes the index that CUDA will use, which counts the visible devices from 0. `mig` finds a
/// part of a divided GPU by its UUID; a process sees the first of them alone.
fn select(all: &[(Gpu, String)], visible: Option<&str>, mig: impl Fn(&str) -> Option<(Gpu, String)>) -> Chosen {
    let Some(visible) = visible else {
        return Chosen { gpus: all.to_vec(), note: None };
    };
    let find = |name: &str| {
        let by_index = |gpu: &Gpu| name.parse::<u32>().is_ok_and(|index| index == gpu.index);
        let by_uuid = |uuid: &str| name.starts_with("GPU-") && uuid.starts_with(name);
        if name.starts_with("MIG-") {
            return mig(name);
        }
        all.iter().find(|(gpu, uuid)| by_index(gpu) || by_uuid(uuid)).cloned()
    };
    let names: Vec<&str> = visible.split(',').map(str::trim).collect();
    let parts = names.iter().filter(|name| name.starts_with("MIG-")).count();
    let most = if parts > 0 { 1 } else { usize::MAX };
    let chosen = names.iter().map(|name| find(name)).map_while(|gpu| gpu).take(most);
    let gpus: Vec<_> = chosen.zip(0..).map(|((gpu, uuid), index)| (Gpu { index, ..gpu }, uuid)).collect();
    let hidden = gpus.is_empty() && !all.is_empty();
    let note = if hidden {
        Some(format!("CUDA_VISIBLE_DEVICES={visible:?} hides all {} GPUs of this machine", all.len()))
    } else {
        (parts > 1).then(|| {
            format!("CUDA_VISIBLE_DEVICES names {parts} parts of divided GPUs: CUDA shows a process the first alone")
        })
    };
    Chosen { gpus, note }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Vec<(Gpu, String)> {
        let gpu = |index| Gpu { index, name: format!("gpu {index}"), memory_total_bytes: 80, memory_free_bytes: 70 };
        vec![(gpu(0), "GPU-aaaa".into()), (gpu(1), "GPU-bbbb".into()), (gpu(2), "GPU-cccc".into())]
    }

    /// One part of a divided GPU is there.
    fn chosen(visible: Option<&str>) -> Chosen {
        let part = Gpu { index: 0, name: "part".into(), memory_total_bytes: 10, memory_free_bytes: 9 };
        select(&node(), visible, |name| (name == "MIG-1").then(|| (part.clone(), name.to_owned())))
    }

    fn names(visible: Option<&str>) -> Vec<(u32, String)> {
        chosen(visible).gpus.into_iter().map(|(gpu, _)| (gpu.index, gpu.name)).collect()
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
        let hidden = chosen(Some("-1"));
        assert!(hidden.gpus.is_empty() && hidden.note.unwrap().contains("hides all 3 GPUs"));
        assert!(chosen(Some("")).gpus.is_empty());
    }

    #[test]
    fn a_part_of_a_divided_gpu_is_found_by_its_uuid_and_counts_alone() {
        assert_eq!(names(Some("MIG-1")), [(0, "part".into())]);
        assert!(chosen(Some("MIG-1")).note.is_none());
        let several = chosen(Some("MIG-1,MIG-1"));
        assert!(several.gpus.len() == 1 && several.note.unwrap().contains("2 parts"));
        assert!(chosen(Some("MIG-2")).note.unwrap().contains("hides all 3 GPUs"));
    }

    #[test]
    fn a_device_without_nvml_is_said() {
        assert_eq!(without_nvml(&[false, false]), None);
        assert!(without_nvml(&[true, false]).unwrap().contains("compute,utility"));
    }
}
