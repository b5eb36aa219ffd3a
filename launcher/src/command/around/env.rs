//! `launch env`: facts on this machine and these programs that a bug report needs. Nothing of it is sent anywhere.

use super::super::{Error, print, rank_program};
use crate::cli::EnvArgs;
use crate::console::aligned;
use host::machine::{self, Probe, ProcessLimits, low_priorities};
use serde_json::{Map, Value};
use spec::contract::exit;
use spec::plan::bytes_text;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables that change what programs do. Values of others are nobody's business.
const VARIABLES: [&str; 18] = [
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "GLIBC_TUNABLES",
    "GOMP_SPINCOUNT",
    "HEADROOM_LOG",
    "HEADROOM_NCCL",
    "HEADROOM_RANK",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "LIBTORCH",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "SLURM_JOB_ID",
    "TORCH_CPP_LOG_LEVEL",
];

/// The fact on one GPU.
const GPU: &str = "GPU";

type Facts = Vec<(&'static str, String)>;

pub(super) fn env(args: &EnvArgs) -> Result<u8, Error> {
    let sections =
        [("programs", programs()), ("machine", machine_facts()), ("limits", limits()), ("environment", variables())];
    if args.json {
        let all: Map<String, Value> =
            sections.iter().map(|(name, facts)| ((*name).to_owned(), by_name(facts).into())).collect();
        print::out(serde_json::to_string_pretty(&all).unwrap_or_default())?;
        return Ok(exit::OK);
    }
    let rows: Vec<Vec<String>> = sections
        .iter()
        .flat_map(|(_, facts)| facts)
        .map(|(name, value)| vec![(*name).to_owned(), value.clone()])
        .collect();
    print::out(aligned(&rows, &[]))?;
    Ok(exit::OK)
}

/// Facts by their names; what there may be several of is a list.
fn by_name(facts: &Facts) -> Map<String, Value> {
    let mut found = Map::new();
    for (name, value) in facts {
        let value = Value::from(value.as_str());
        if *name == GPU {
            let list = found.entry(*name).or_insert_with(|| Value::Array(Vec::new()));
            list.as_array_mut().into_iter().for_each(|list| list.push(value.clone()));
        } else {
            found.insert((*name).to_owned(), value);
        }
    }
    found
}

fn programs() -> Facts {
    let mut facts = vec![("headroom", env!("CARGO_PKG_VERSION").to_owned())];
    let path =
        |path: std::io::Result<PathBuf>| path.map_or_else(|error| error.to_string(), |path| path.display().to_string());
    facts.push(("launch", path(std::env::current_exe())));
    let rank = rank_program();
    facts.push(("rank", rank.as_ref().map_or_else(ToString::to_string, |path| path.display().to_string())));
    let library = |rank: &Path| library_of(rank, "libtorch_cpu.so").or_else(|| library_by(rank));
    if let Some(library) = rank.ok().and_then(|rank| library(&rank)) {
        let torch = library.ancestors().nth(2).unwrap_or(Path::new(""));
        facts.push(("libtorch", format!("{} ({})", torch_version(torch), torch.display())));
        let cuda = text_of(&torch.join("version.py"));
        facts.extend(assigned(&cuda, "cuda").map(|cuda| ("libtorch's CUDA", cuda)));
        facts.extend(nccl(torch).map(|version| ("NCCL", version)));
    } else {
        facts.push(("libtorch", "not found: see `ldd rank`".into()));
    }
    facts.push(("python3", said("python3", &["--version"])));
    facts.push(("C library", said("getconf", &["GNU_LIBC_VERSION"])));
    facts
}

fn machine_facts() -> Facts {
    let machine = machine::probe();
    let uname = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let limit = machine.cgroup_limit_bytes.map_or("no limit".to_owned(), bytes_text);
    let group = Probe::default().memory_group().map(|(_, path)| path.display().to_string());
    let mut facts = vec![
        ("kernel", format!("{} {} {}", text(uname.sysname()), text(uname.release()), text(uname.machine()))),
        ("system", os_name()),
        ("processor", processor()),
        ("cores", machine.cores.to_string()),
        ("NUMA nodes", machine.numa_nodes.to_string()),
        (
            "memory",
            format!(
                "{}, {} available",
                bytes_text(machine.memory_total_bytes),
                bytes_text(machine.memory_available_bytes)
            ),
        ),
        ("swap", bytes_text(machine.swap_total_bytes)),
        ("cgroup", machine.cgroup_version.map_or("none".into(), |version| format!("v{version}, {limit}"))),
        ("cgroup's folder", group.unwrap_or_else(|| "none".into())),
        ("/dev/shm", machine.shm_room_bytes.map_or("not there".into(), |room| format!("{} free", bytes_text(room)))),
    ];
    match (machine.gpus.len(), &machine.gpu_note) {
        (0, Some(note)) => facts.push(("GPUs", note.clone())),
        (0, None) => facts.push(("GPUs", "none".into())),
        (count, _) => {
            facts.push(("GPUs", count.to_string()));
            facts.extend(machine::gpu_driver().map(|driver| ("driver", driver)));
            for gpu in &machine.gpus {
                let (free, total) = (bytes_text(gpu.memory_free_bytes), bytes_text(gpu.memory_total_bytes));
                facts.push((GPU, format!("{}: {}, {free} free of {total}", gpu.index, gpu.name)));
            }
        }
    }
    facts
}

fn limits() -> Facts {
    let limits = ProcessLimits::now();
    let or_none = |value: Option<u64>| value.map_or("unlimited".into(), |value| value.to_string());
    let mut facts = vec![
        ("ulimit -n", or_none(limits.descriptors)),
        ("ulimit -l", or_none(limits.locked_bytes)),
        ("ulimit -u", or_none(limits.processes)),
        ("ulimit -v", or_none(limits.address_bytes)),
    ];
    facts.extend(low_priorities(false).into_iter().map(|text| ("priority", text)));
    facts.push(("overcommit", text_of(Path::new("/proc/sys/vm/overcommit_memory")).trim().to_owned()));
    facts.push(("oom_score_adj", text_of(Path::new("/proc/self/oom_score_adj")).trim().to_owned()));
    facts
}

fn variables() -> Facts {
    let value = |name: &'static str| Some((name, std::env::var_os(name)?.to_string_lossy().into_owned()));
    VARIABLES.into_iter().filter_map(value).collect()
}

/// Path of a library that a program would load, by the loader's own word.
fn library_of(program: &Path, name: &str) -> Option<PathBuf> {
    let output = Command::new("ldd").arg(program).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.trim_start().starts_with(name))?;
    let path = line.split("=>").nth(1)?.trim().split(" (").next()?.trim();
    Some(PathBuf::from(path)).filter(|path| path.is_file())
}

/// The same where the rank program is a script that looks for libtorch, as packages have it.
fn library_by(rank: &Path) -> Option<PathBuf> {
    let is_script = std::fs::read(rank).is_ok_and(|bytes| bytes.starts_with(b"#!"));
    let output = is_script.then(|| Command::new(rank).arg("--libtorch").output().ok())??;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Some(PathBuf::from(path)).filter(|path| path.is_file())
}

fn torch_version(torch: &Path) -> String {
    assigned(&text_of(&torch.join("version.py")), "__version__")
        .or_else(|| Some(text_of(&torch.join("build-version")).trim().to_owned()).filter(|text| !text.is_empty()))
        .unwrap_or_else(|| "of unknown version".into())
}

/// The text that a Python file assigns to `name`.
fn assigned(text: &str, name: &str) -> Option<String> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let value = rest.rsplit_once('=')?.1.trim();
    Some(value.trim_matches(['\'', '"']).to_owned()).filter(|value| value != "None" && !value.is_empty())
}

/// Version of the NCCL wheel beside libtorch.
fn nccl(torch: &Path) -> Option<String> {
    let entries = torch.canonicalize().ok()?.parent()?.read_dir().ok()?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let wheel = names.filter(|name| name.starts_with("nvidia_nccl") && name.ends_with(".dist-info")).max()?;
    Some(wheel.strip_suffix(".dist-info")?.rsplit('-').next()?.to_owned())
}

fn said(program: &str, words: &[&str]) -> String {
    match Command::new(program).args(words).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "not found".into(),
    }
}

fn os_name() -> String {
    let text = text_of(Path::new("/etc/os-release"));
    assigned(&text, "PRETTY_NAME").unwrap_or_else(|| "unknown".into())
}

fn processor() -> String {
    let text = text_of(Path::new("/proc/cpuinfo"));
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown".into(), |(_, name)| name.trim().to_owned())
}

fn text_of(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_and_shell_assignments_are_read() {
        let text = "__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n";
        assert_eq!(assigned(text, "__version__").as_deref(), Some("2.11.0+cu130"));
        assert_eq!(assigned(text, "cuda").as_deref(), Some("13.0"));
        assert_eq!(assigned(text, "hip"), None);
        assert_eq!(assigned("PRETTY_NAME=\"Debian\"\n", "PRETTY_NAME").as_deref(), Some("Debian"));
    }

    #[test]
    fn every_gpu_is_in_the_json() {
        let facts = vec![("GPUs", "2".to_owned()), (GPU, "0: a".to_owned()), (GPU, "1: b".to_owned())];
        assert_eq!(Value::from(by_name(&facts)), serde_json::json!({"GPUs": "2", "GPU": ["0: a", "1: b"]}));
    }

    #[test]
    fn facts_have_names_and_values() {
        for facts in [machine_facts(), limits()] {
            assert!(facts.iter().all(|(name, value)| !name.is_empty() && !value.is_empty()), "{facts:?}");
        }
    }
}
