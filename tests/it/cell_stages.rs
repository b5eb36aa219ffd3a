//! Task `cell`: what happens around stages and predictions: signals between stages, monitors, cells to begin with, and the names
//! and latents of predicted cells.

use crate::cell::{TRAINED, runs, stage};
use crate::support::{assert_same_checkpoint, launch_program, run, sample_cells};
use headroom::data::source::h5ad;
use rustix::process::Signal;
use std::fs;
use std::process::Command;

/// A stop while stages change: what is done stays, no later stage begins, and the resumed run ends with the same bits.
#[test]
fn a_signal_between_two_stages_keeps_what_is_done_and_loses_no_bit() {
    let runs = runs(&[]);
    let reference = runs.finish("reference", &["--ranks", "1"]);
    let mut running = runs.start("stopped", &["--ranks", "1"]);
    let run = runs.run("stopped");
    let done = run.path.join("latents/summary.json");
    assert!(running.until("the latents", || done.exists()), "it ended before it was stopped");
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert!(matches!(ended.code, Some(75 | 76)), "{ended}");
    assert!(ended.err.contains("--resume auto") || ended.out.contains("--resume auto"), "{ended}");
    assert_eq!(stage(&run, "autoencoder").summary()["status"], "finished");
    assert!(!run.path.join("classifier").exists(), "no later stage begins");
    runs.finish("stopped", &["--ranks", "1", "--resume", "auto"]);
    for (name, steps) in TRAINED {
        assert_same_checkpoint(&stage(&run, name), &stage(&reference, name), steps, name);
    }
    for file in ["latents/latents.bin", "sample/metrics.json", "sample/generated.h5ad"] {
        assert!(fs::read(run.path.join(file)).unwrap() == fs::read(reference.path.join(file)).unwrap(), "{file}");
    }
}

/// `launch monitor --run` and the tools that read logs find the stage that runs.
#[test]
fn a_run_with_stages_is_watched_and_analysed_by_its_name() {
    let runs = runs(&["stages.diffusion.train.max_steps=100000"]);
    let mut job = runs.start("watched", &["--ranks", "1"]);
    let path = runs.run("watched").path;
    let at = stage(&runs.run("watched"), "diffusion");
    assert!(job.until("the diffusion", || at.steps_so_far() > 5));
    let mut monitor = Command::new(launch_program());
    monitor.args(["monitor", "--duration", "1", "--interval", "0.5", "--run"]).arg(&path);
    let ended = run(&mut monitor, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("diffusion") && ended.out.contains("samples/s"), "{ended}");
    job.signal(Signal::TERM);
    assert_eq!(job.wait().code, Some(75));
    for verb in ["analyze", "doctor"] {
        let ended = run(Command::new(launch_program()).arg(verb).arg(&path), runs.path());
        assert_eq!(ended.code, Some(0), "{verb}: {ended}");
        assert!(ended.out.contains("autoencoder"), "{verb}: {ended}");
    }
}

/// Generation may begin with cells of another file, whose genes stand in another order: they are found by name. The batch of the
/// stage is that of `cell.sample.batch_size`.
#[test]
fn cells_to_begin_with_are_matched_by_gene() {
    let here = crate::support::folder();
    let (names, counts) = cells_by_gene();
    let write = |file: &str, order: &mut dyn Iterator<Item = usize>| {
        let order: Vec<usize> = order.collect();
        let path = here.path().join(file);
        let genes: Vec<String> = order.iter().map(|gene| names[*gene].clone()).collect();
        let mut writer = h5ad::write::Writer::create(&path, &genes, &h5ad::write::Storage::default()).unwrap();
        for cell in &counts {
            writer.rows(&order.iter().map(|gene| cell[*gene]).collect::<Vec<_>>()).unwrap();
        }
        writer.finish(None, &[]).unwrap();
        path
    };
    let same = write("same.h5ad", &mut (0..names.len()));
    let turned = write("turned.h5ad", &mut (0..names.len()).rev());
    let few = [
        "train.max_steps=5",
        "stages.diffusion.train.max_steps=5",
        "cell.sample.batch_size=7",
        "cell.sample.init_time=10",
    ];
    let runs = runs(&few);
    let sampled = |name: &str, path: &std::path::Path| {
        let set = format!("cell.sample.init_cells={}", path.display());
        let run = runs.finish(name, &["--ranks", "1", "--set", &set]);
        fs::read(run.path.join("sample/generated.h5ad")).unwrap()
    };
    let (a, b) = (sampled("same", &same), sampled("turned", &turned));
    assert!(a == b, "the order of genes in the file changes the cells");
}

/// Names of the sample cells' genes, and counts of some cells.
fn cells_by_gene() -> (Vec<String>, Vec<Vec<f32>>) {
    let wanted = h5ad::Wanted { matrix: "X".into(), label: None };
    let path = fs::read_dir(sample_cells()).unwrap().next().unwrap().unwrap().path();
    let genes = h5ad::open(&path, &wanted).unwrap().genes;
    // Any counts will do.
    let cell = |n: usize| (0..genes.len()).map(|gene| ((gene * 7 + n * 13) % 11 % 4) as f32).collect();
    let counts = (0..9).map(cell).collect();
    (genes, counts)
}

/// `launch predict` keeps the names of cells and adds their latents.
#[test]
fn predicted_cells_keep_their_names_and_have_latents() {
    let runs = runs(&["stages.diffusion.train.max_steps=5", "cell.sample.per_class=0"]);
    let run_of = runs.finish("trained", &["--ranks", "1"]);
    let here = crate::support::folder();
    let (genes, counts) = cells_by_gene();
    let names: Vec<String> = (0..counts.len()).map(|n| format!("cell-ä-{n}")).collect();
    let path = here.path().join("named.h5ad");
    let mut writer = h5ad::write::Writer::create(&path, &genes, &h5ad::write::Storage::default()).unwrap();
    counts.iter().for_each(|cell| writer.rows(cell).unwrap());
    writer.finish(Some(&names), &[]).unwrap();
    let out = here.path().join("out");
    let mut command = Command::new(launch_program());
    command.arg("predict").arg(&run_of.path).arg("--data").arg(&path).arg("--out").arg(&out).args(["--ranks", "1"]);
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let predicted = out.join("named.h5ad");
    assert_eq!(h5ad::cell_names(&predicted).unwrap(), names);
    let latents = h5ad::obsm(&predicted, "X_latent").unwrap();
    assert_eq!(latents.shape(), [names.len(), 8]);
    for row in latents.rows() {
        assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4, "latents have length 1");
    }
}
