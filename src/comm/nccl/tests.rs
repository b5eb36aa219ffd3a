use super::*;
use crate::comm::conformance;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// A wheel's NCCL below one of this checkout's environments.
fn wheel() -> Option<PathBuf> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = [".venv", ".bench-venv"].map(|venv| root.join(venv).join("lib"));
    let versions = python.iter().filter_map(|lib| lib.read_dir().ok()).flatten().flatten();
    let found = versions.map(|entry| entry.path().join("site-packages/nvidia/nccl/lib/libnccl.so.2"));
    found.into_iter().find(|path| path.exists())
}

#[test]
fn the_config_has_the_layout_of_the_header() {
    // Layout of `ncclConfig_v22800` in C on 64-bit Linux.
    assert_eq!((size_of::<sys::Config>(), std::mem::offset_of!(sys::Config, blocking)), (80, 16));
    assert_eq!(size_of::<RawUniqueId>(), 128);
}

#[test]
fn versions_are_told_as_people_write_them() {
    assert_eq!([22809, 23007, 21400, 2708].map(version_text), ["2.28.9", "2.30.7", "2.14.0", "2.7.8"]);
}

#[test]
fn a_missing_library_and_one_that_is_not_nccl_are_error_values() {
    let at =
        |path: &str| sys::find(&sys::SearchPaths { named: Some(path.into()), torch: None }).err().unwrap().to_string();
    let missing = at("/nowhere/libnccl.so.2");
    assert!(missing.contains("HEADROOM_NCCL=/nowhere/libnccl.so.2"), "{missing}");
    let wrong = at("libm.so.6");
    assert!(wrong.contains("no function ncclGetVersion"), "{wrong}");
}

/// Runs in a separate process: a loaded library stays loaded, and other tests would find it.
#[test]
fn the_wheel_loads_and_refuses_a_world_without_a_device_with_an_error() {
    let Some(path) = wheel() else {
        eprintln!("skipped: no NCCL wheel in this checkout (scripts/setup --bench installs one)");
        return;
    };
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "comm::nccl::tests::as_a_process", "--nocapture"])
        .env("HEADROOM_TEST_NCCL", path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&status.stdout).into_owned() + &String::from_utf8_lossy(&status.stderr);
    assert!(status.status.success(), "{:?}: {text}", status.status.signal());
    assert!(text.contains("version 2."), "{text}");
}

/// The body of the test above; without its variable it has nothing to do.
#[test]
fn as_a_process() {
    let Some(path) = std::env::var_os("HEADROOM_TEST_NCCL") else { return };
    let nccl = Nccl::load(Some(path.clone().into())).unwrap();
    println!("version {} of {}", nccl.version(), nccl.origin());
    assert!(nccl.0.version >= sys::OLDEST && nccl.origin() == path.to_string_lossy());
    // The second look finds the mapped one, whatever is named.
    let again = sys::find(&sys::SearchPaths { named: Some("/nowhere".into()), torch: None }).unwrap();
    assert!(again.origin.ends_with("mapped already") && again.version == nccl.0.version);
    if torch::device::device_count().is_ok_and(|count| count > 0) {
        println!("skipped: this machine has a CUDA device, a world of one would succeed");
        return;
    }
    let mut config = sys::Config::non_blocking();
    let mut raw: RawComm = std::ptr::null_mut();
    let api = &nccl.0.api;
    // SAFETY: as in `connect`.
    let code = unsafe { (api.comm_init_rank_config)(&mut raw, 1, RawUniqueId([7; 128]), 0, &mut config) };
    let error = check(api, raw, "ncclCommInitRankConfig", code).unwrap_err().to_string();
    assert!(error.starts_with("ncclCommInitRankConfig: "), "{error}");
    println!("{error}");
    let place = Member { rank: 0, world_size: 1, device: 0 };
    let error = NcclCollective::new(nccl, [7; 128], place, Wire::F32, Duration::from_secs(5)).err().unwrap();
    assert!(error.to_string().contains("NCCL_P2P_DISABLE=1"), "{error}");
}

#[test]
fn a_world_of_one_keeps_the_contract_where_there_is_a_device() {
    let ready = torch::device::load_cuda().is_ok() && torch::device::device_count().is_ok_and(|count| count > 0);
    let (true, Ok(nccl)) = (ready, Nccl::load(None)) else {
        eprintln!("skipped: no CUDA device or no NCCL; `check-gpu` runs the same contract");
        return;
    };
    let place = Member { rank: 0, world_size: 1, device: 0 };
    let id = nccl.unique_id().unwrap();
    let collective = NcclCollective::new(nccl, id, place, Wire::F32, Duration::from_secs(60)).unwrap();
    conformance::check(&collective, Device::Cuda(0)).unwrap();
    conformance::of_nccl(&collective, Device::Cuda(0)).unwrap();
    let id = nccl.unique_id().unwrap();
    let narrow = NcclCollective::new(nccl, id, place, Wire::Bf16, Duration::from_secs(60)).unwrap();
    conformance::narrow_then_ended(&narrow, Device::Cuda(0)).unwrap();
    // Work that takes the device longer than no time at all: the wait ends the communicator, not only itself.
    let mut x = Tensor::ones([2048, 2048], (Kind::Float, Device::Cuda(0)));
    (0..100).for_each(|_| x = x.matmul(&x).clamp(0.0, 1.0));
    let mut event = Event::new(false).unwrap();
    event.record(Stream::current(0).unwrap()).unwrap();
    let late = collective.wait_for(&event, "a step", Duration::ZERO).unwrap_err();
    assert!(matches!(late, CommError::Timeout { .. }), "{late}");
    assert!(collective.lock().raw.is_null());
    assert_eq!(collective.barrier().unwrap_err().to_string(), late.to_string());
}
