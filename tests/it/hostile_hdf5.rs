//! Files made to exhaust or to lead in circles: each one is left out with its reason, in little memory and finite time.

use crate::support::{Running, Runs, folder, run};
use hdf5::File;
use headroom::data::source::hdf5::write::{Row, Storage, write_session};
use std::fs;
use std::path::Path;

/// Chunks of noise: as long stored as decoded, about.
fn rows(count: usize) -> Vec<Row> {
    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0
    };
    let row = |n| Row {
        time: n as f64 / 2000.0,
        joint_angles: std::array::from_fn(|_| f64::from(noise()) + 0.1),
        emg: std::array::from_fn(|_| noise()),
    };
    (0..count).map(row).collect()
}

fn chunked() -> Storage {
    Storage { chunk_rows: Some(300), shuffle: false, ..Storage::default() }
}

fn empty(path: &Path, rows: usize, chunk: Option<usize>) {
    let file = File::create(path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let builder = group.new_dataset::<Row>().shape([rows]);
    match chunk {
        Some(chunk) => builder.chunk([chunk]).deflate(4).create("timeseries"),
        None => builder.create("timeseries"),
    }
    .unwrap();
}

/// Changes the bytes of a good file.
fn patched(path: &Path, change: impl FnOnce(&mut [u8])) {
    write_session(path, &chunked(), &[], &rows(1200)).unwrap();
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Where the first B-tree node of a kind (0: groups, 1: chunks) begins. HDF5 file format 3.0, III.A.1.
fn tree(bytes: &[u8], kind: u8) -> usize {
    bytes.windows(5).position(|five| five == [b'T', b'R', b'E', b'E', kind]).unwrap()
}

/// A chunk that inflates to a thousand times its rows.
fn bomb(bytes: &mut [u8]) {
    let stream = bytes.windows(2).enumerate().filter(|(_, two)| [0x78, 0x5e] == **two || [0x78, 0x9c] == **two);
    // The longest distance to the next one: two bytes alone may be anything.
    let at: Vec<usize> = stream.map(|(at, _)| at).collect();
    let longest = at.windows(2).max_by_key(|pair| pair[1] - pair[0]).unwrap();
    let room = longest[1] - longest[0];
    let (mut packed, mut packer) = (vec![0; 1 << 20], libdeflater::Compressor::default());
    let n = packer.zlib_compress(&vec![0; 900 * room], &mut packed).unwrap();
    assert!(n < room, "{n} bytes of bomb, {room} of room");
    bytes[longest[0]..longest[0] + n].copy_from_slice(&packed[..n]);
}

/// A node of the chunks' B-tree above the leaves whose child is the node itself.
fn chunk_circle(bytes: &mut [u8]) {
    let at = tree(bytes, 1);
    bytes[at + 5] = 1;
    // Behind the first key: size, mask, two offsets of eight bytes.
    let child = at + 24 + 24;
    bytes[child..child + 8].copy_from_slice(&(at as u64).to_le_bytes());
}

/// Its right sibling is itself.
fn sibling_circle(bytes: &mut [u8]) {
    let at = tree(bytes, 0);
    bytes[at + 16..at + 24].copy_from_slice(&(at as u64).to_le_bytes());
}

/// A node of the groups' B-tree above the leaves whose child is the node itself.
fn group_circle(bytes: &mut [u8]) {
    let at = tree(bytes, 0);
    bytes[at + 5] = 1;
    bytes[at + 32..at + 40].copy_from_slice(&(at as u64).to_le_bytes());
}

fn soft_circle(path: &Path) {
    let file = File::create(path).unwrap();
    file.link_soft("/b", "emg2pose").unwrap();
    file.link_soft("/emg2pose", "b").unwrap();
}

/// A group that holds itself, and its parent.
fn cycle(path: &Path) {
    write_session(path, &chunked(), &[], &rows(1200)).unwrap();
    let file = File::open_rw(path).unwrap();
    file.link_hard("/emg2pose", "emg2pose/self").unwrap();
    file.link_hard("/", "emg2pose/parent").unwrap();
}

type Make = Box<dyn Fn(&Path)>;

/// Name, what the warning says (empty: it trains), how it is made.
fn cases() -> Vec<(&'static str, &'static str, Make)> {
    let patch = |change: fn(&mut [u8])| -> Make { Box::new(move |path: &Path| patched(path, change)) };
    vec![
        ("bomb", "inflates to more than the 69600 bytes", patch(bomb)),
        ("extent", "rows of 232 bytes are not credible", Box::new(|path| empty(path, 1 << 54, Some(1000)))),
        ("extent_plain", "rows of 232 bytes are not credible", Box::new(|path| empty(path, 1 << 50, None))),
        ("chunk", "at most 268435456 are accepted", Box::new(|path| empty(path, 18_000_000, Some(18_000_000)))),
        ("promises", "were never written", Box::new(|path| empty(path, 18_513_000, Some(100_000)))),
        ("many_chunks", "are accepted: write larger chunks", Box::new(|path| empty(path, 15_000_000, Some(1)))),
        ("holes", "of them are stored", {
            Box::new(|path| {
                write_session(path, &chunked(), &[], &rows(1200)).unwrap();
                fs::File::options().write(true).open(path).unwrap().set_len(1 << 42).unwrap();
            })
        }),
        ("chunk_circle", "libhdf5 crashes on its metadata", patch(chunk_circle)),
        ("group_circle", "group_circle.hdf5", patch(group_circle)),
        ("sibling_circle", "", patch(sibling_circle)),
        ("soft_circle", "no group /emg2pose", Box::new(soft_circle)),
        ("cycle", "", Box::new(cycle)),
        ("external", "is a link to another file", {
            Box::new(|path| {
                let file = File::create(path).unwrap();
                file.link_external("/dev/stdin", "/emg2pose", "emg2pose").unwrap();
            })
        }),
        ("elsewhere", "its rows lie in another file", {
            Box::new(|path| {
                let file = File::create(path).unwrap();
                let good = path.with_file_name("good0.hdf5");
                file.link_external(good.to_str().unwrap(), "/emg2pose", "far").unwrap();
                file.link_soft("/far", "emg2pose").unwrap();
            })
        }),
    ]
}

/// Most memory that a process has had so far, bytes; 0: it is gone.
fn high_water(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}

/// The most that a child of `parent` has had at any time before `running` ends.
pub fn peak(running: &mut Running, parent: u32) -> u64 {
    let mut most = 0;
    running.until("the end", || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            most = most.max(high_water(pid));
        }
        false
    });
    most
}

#[test]
fn bombs_and_circles_are_left_out_in_little_memory() {
    let data = folder();
    let make = |name: &str| data.path().join(format!("{name}.hdf5"));
    (0..3).for_each(|n| write_session(&make(&format!("good{n}")), &chunked(), &[], &rows(1200)).unwrap());
    let set = format!("data.dataset_path={}", data.path().display());
    let runs = Runs::new(&["train.max_steps=3", &set]);
    let mut plain = runs.start("plain", &["--ranks", "1"]);
    let pid = plain.child.id();
    let usual = peak(&mut plain, pid);
    let ended = plain.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    let cases = cases();
    cases.iter().for_each(|(name, _, write)| write(&make(name)));
    let mut hostile = runs.start("hostile", &["--ranks", "1"]);
    let pid = hostile.child.id();
    let most = peak(&mut hostile, pid);
    let ended = hostile.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    for (name, says, _) in &cases {
        let warning =
            ended.out.lines().find(|line| line.contains("left out:") && line.contains(&format!("{name}.hdf5")));
        match warning {
            Some(line) => assert!(!says.is_empty() && line.contains(says), "{name}: {line}"),
            None => assert!(says.is_empty(), "{name} is not left out: {ended}"),
        }
    }
    let bomb = ended.out.lines().find(|line| line.contains("bomb.hdf5")).unwrap();
    assert!(bomb.contains(": chunk "), "{bomb}");
    println!("peak {} MB without hostile files, {} MB with them", usual >> 20, most >> 20);
    assert!(usual > 0 && most < usual + (150 << 20), "{usual} bytes without hostile files, {most} with them");
    assert!(runs.run("hostile").summary()["cache"]["hits"].is_u64());
}

/// A session whose rows from 600 on were never written; libhdf5 gives 7 for them.
fn half_written(path: &Path) {
    let file = File::create(path).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let seven = Row { time: 7.0, joint_angles: [7.0; 20], emg: [7.0; 16] };
    let builder = group.new_dataset::<Row>().shape([1200]).chunk([300]).with_dcpl(|plist| plist.fill_value(seven));
    builder.create("timeseries").unwrap().write_slice(&rows(600)[..], 0..600).unwrap();
}

#[test]
fn rows_that_nobody_wrote_and_files_held_elsewhere_are_left_out_and_named() {
    let data = folder();
    let make = |name: &str| data.path().join(format!("{name}.hdf5"));
    (0..3).for_each(|n| write_session(&make(&format!("good{n}")), &chunked(), &[], &rows(1200)).unwrap());
    half_written(&make("half"));
    write_session(&make("held"), &chunked(), &[], &rows(1200)).unwrap();
    let held = fs::File::open(make("held")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let set = format!("data.dataset_path={}", data.path().display());
    let runs = Runs::new(&["train.max_steps=2", &set]);
    let mut command = runs.command(&["--name", "held", "--ranks", "1"]);
    command.env_remove("HDF5_USE_FILE_LOCKING");
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let line = ended.out.lines().find(|line| line.contains("left out:") && line.contains("held.hdf5"));
    let line = line.unwrap_or_else(|| panic!("the file that is held is not left out: {ended}"));
    assert!(line.contains("is held by") && line.contains(&std::process::id().to_string()), "{line}");
    assert!(!line.contains("replace it"), "{line}");
    assert!(ended.out.contains("600 rows of 1 files were never written"), "{ended}");
    // The lock is gone: the same folder and index.
    drop(held);
    let mut command = runs.command(&["--name", "free", "--ranks", "1"]);
    command.env_remove("HDF5_USE_FILE_LOCKING");
    let ended = run(&mut command, runs.path());
    assert!(ended.code == Some(0) && !ended.out.contains("left out:"), "{ended}");
}

/// Part files away for a while: no verdict stays.
#[test]
fn a_virtual_session_trains_again_when_its_part_is_back() {
    let data = folder();
    let make = |name: &str| data.path().join(format!("{name}.hdf5"));
    (0..3).for_each(|n| write_session(&make(&format!("good{n}")), &chunked(), &[], &rows(1200)).unwrap());
    let part = data.path().join("rows.part");
    write_session(&part, &chunked(), &[], &rows(1200)).unwrap();
    let file = File::with_options().with_fapl(|access| access.libver_latest()).create(make("virtual")).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    let builder = group.new_dataset::<Row>().shape([1200]);
    let builder = builder.with_dcpl(|plist| plist.virtual_map("rows.part", "emg2pose/timeseries", 1200, .., 1200, ..));
    builder.create("timeseries").unwrap();
    drop((builder, group, file));
    let set = format!("data.dataset_path={}", data.path().display());
    let runs = Runs::new(&["train.max_steps=2", &set]);
    let left_out = |name: &str| {
        let ended = run(&mut runs.command(&["--name", name, "--ranks", "1"]), runs.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        let found = ended.out.lines().find(|line| line.contains("left out:")).map(String::from);
        assert!(!ended.out.contains("inverse kinematics failed"), "{ended}");
        found
    };
    let away = data.path().join("rows.away");
    fs::rename(&part, &away).unwrap();
    let line = left_out("away").expect("a part is missing");
    assert!(line.contains("virtual.hdf5") && line.contains("rows.part") && line.contains("bring it back"), "{line}");
    fs::rename(&away, &part).unwrap();
    assert_eq!(left_out("back"), None);
}
