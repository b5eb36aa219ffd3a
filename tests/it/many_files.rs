//! Tens of thousands of recordings: opening them stays small.

use crate::cache::path_of;
use crate::hostile_hdf5::peak;
use crate::support::{Runs, folder};
use std::fs;
use std::path::Path;

/// `HEADROOM_FILES` gives another number.
fn count() -> usize {
    std::env::var("HEADROOM_FILES").map_or(600, |count| count.parse().unwrap())
}

/// `count` names of one file.
fn linked(folder: &Path, count: usize) -> String {
    let set = path_of("gzip");
    let from = Path::new(set.split_once('=').unwrap().1).join("s0.hdf5");
    fs::create_dir_all(folder).unwrap();
    let first = folder.join("000000.hdf5");
    fs::copy(from, &first).unwrap();
    (1..count).for_each(|n| fs::hard_link(&first, folder.join(format!("{n:06}.hdf5"))).unwrap());
    format!("data.dataset_path={}", folder.display())
}

/// By what many files raise the peak of the largest rank, from its start to its end, over that of a few.
#[test]
fn opening_tens_of_thousands_of_files_takes_less_than_100_mb_per_rank() {
    let data = folder();
    let train = |name: &str, set: &str, runs: &Runs| {
        let mut running = runs.start(name, &["--ranks", "3", "--set", set]);
        let pid = running.child.id();
        let most = peak(&mut running, pid);
        let ended = running.wait();
        assert_eq!(ended.code, Some(0), "{ended}");
        most
    };
    let runs = Runs::new(&["train.max_steps=1", "data.max_val_windows=8", "data.cache_size_gb=0.01"]);
    let few = train("few", &linked(&data.path().join("few"), 6), &runs);
    let set = linked(&data.path().join("many"), count());
    for name in ["scanned", "indexed"] {
        let growth = train(name, &set, &runs).saturating_sub(few);
        println!("{} files, {name}: {:.1} MB more at the peak of a rank", count(), growth as f64 / 1e6);
        assert!(few > 0 && growth < 100_000_000, "{name}: {growth} bytes");
    }
}
