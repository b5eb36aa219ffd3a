//! Keys through the real programs: help, paths, merge keys, and runs of an earlier version.

use crate::support::{Runs, launch_program, run};
use std::process::Command;

#[test]
fn help_explains_keys_sections_exit_codes_and_verbs() {
    let here = tempfile::tempdir().unwrap();
    let help = |words: &[&str]| run(Command::new(launch_program()).arg("help").args(words), here.path());
    for (words, says) in [
        (vec![], "  train "),
        (vec!["train"], "train.batch_size"),
        (vec!["train.batch_size"], "must be at least 1"),
        (vec!["MODEL.TDS_STAGES"], "MODEL.TDS_STAGES is another name of emg.model.tds_stages."),
        (vec!["exit-codes"], "75  Stopped on request"),
        (vec!["plan"], "Usage: launch plan"),
        (vec!["--schema"], "http://json-schema.org/draft-07/schema#"),
    ] {
        let ended = help(&words);
        assert!(ended.code == Some(0) && ended.out.contains(says), "{words:?}: {ended}");
    }
    let unknown = help(&["train.batch_sise"]);
    assert_eq!(unknown.code, Some(2), "{unknown}");
    assert!(unknown.err.contains("did you mean train.batch_size?"), "{unknown}");
}

/// `~` by file and by `--set`; the run's own config holds the path written out.
#[test]
fn a_tilde_is_the_home_folder_and_a_variable_is_refused() {
    let runs = Runs::new(&["train.max_steps=1"]);
    let home = runs.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let run_with = |set: &str| {
        let mut command = runs.command(&[]);
        command.env("HOME", &home).args(["--ranks", "1", "--name", "r", "--set", set]);
        run(&mut command, runs.path())
    };
    let ended = run_with("log.runs_dir=~/runs");
    assert_eq!(ended.code, Some(0), "{ended}");
    let saved = std::fs::read_to_string(home.join("runs/r/config.yaml")).unwrap();
    assert!(saved.contains(&format!("runs_dir: {}/runs\n", home.display())), "{saved}");
    assert!(!runs.path().join("~").exists());
    let refused = run_with("log.runs_dir=${HOME}/runs");
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.err.contains("log.runs_dir: ${HOME} in \"${HOME}/runs\" is not expanded"), "{refused}");
}

/// A checkpoint names its architecture: in the words of versions before tasks had sections.
#[test]
fn a_checkpoint_of_an_earlier_version_is_resumed() {
    let runs = Runs::new(&["log.save_every_steps=2"]);
    runs.finish("a", &["--ranks", "1", "--set", "train.max_steps=2"]);
    let state = runs.path().join("runs/a/checkpoints/step-2/state.json");
    let state: serde_json::Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    let earlier = concat!(
        r#"emg {"decoder_hidden_size":16,"decoder_mlp_hidden":[256,128],"decoder_num_layers":1,"#,
        r#""decoder_state_condition":true,"decoder_type":"lstm","dropout":0.0,"input_size":16,"#,
        r#""original_sampling_rate":2000.0,"output_scale":1.0,"output_size":20,"predict_velocity":false,"#,
        r#""rollout_freq":50.0,"tds_stages":[{"channels":4,"feature_width":4,"in_conv_kernel":5,"#,
        r#""in_conv_stride":4,"kernel_width":5,"num_blocks":1}]}"#,
    );
    assert!(state.to_string().contains(&serde_json::to_string(earlier).unwrap()), "{state}");
    runs.finish("a", &["--ranks", "1", "--resume", "auto", "--set", "train.max_steps=4"]);
}
