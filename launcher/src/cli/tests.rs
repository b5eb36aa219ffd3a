//! Command lines, right and wrong.

use super::*;
use crate::run_dir::SplitChoice;
use std::os::unix::fs::PermissionsExt;

fn parse(line: &str) -> Result<Command, CliError> {
    Command::parse(std::iter::once("launch").chain(line.split_whitespace()).map(OsString::from))
}

fn wrong(line: &str) -> String {
    match parse(line) {
        Err(CliError::Usage(text)) => text,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn definition_is_sound() {
    definition().debug_assert();
}

#[test]
fn training_is_what_no_verb_means() {
    let line = "--gpus 3 --config configs/a.yaml --set a=1 --set b=2 --name r --resume auto --device cpu --strict";
    let Command::Train(run) = parse(line).unwrap() else { panic!() };
    assert_eq!((run.local_ranks(), run.config.set.len(), run.resume()), (Some(3), 2, Resume::Auto));
    assert_eq!((run.config.device, run.strict, run.nnodes), (Some(DeviceChoice::Cpu), true, 1));
    assert_eq!(run.resume_split, None);
    let Command::Train(run) = parse("--config a --resume auto --resume-split keep").unwrap() else { panic!() };
    assert_eq!(run.resume_split, Some(SplitChoice::Keep));
    assert!(matches!(parse("plan --gpus 2 --config a").unwrap(), Command::Plan(args) if args.run.gpus == Some(2)));
    assert!(matches!(parse("sample-data --task emg --out d").unwrap(), Command::SampleData(args) if args.seed == 42));
    assert!(matches!(parse("convert a --out b").unwrap(), Command::Convert(args) if args.split_ratio == "0.7,0.2,0.1"));
    assert!(parse("convert --out b").is_err());
    let batch = parse("batch --config a --step 3 --rank 1 --world 3 --out f.safetensors").unwrap();
    assert!(matches!(batch, Command::Batch(args) if (args.step, args.rank, args.world) == (3, 1, 3)));
}

#[test]
fn everything_behind_exec_is_the_programs() {
    let line = "--ranks 2 --cache 1GiB --exec prog --gpus 9 --exec -x -- y";
    let Command::Exec { run, with, program, args } = parse(line).unwrap() else { panic!() };
    assert_eq!((run.ranks, run.gpus, program), (Some(2), None, "prog".into()));
    assert_eq!(with, ProgramArgs { cache: Some(1 << 30), ..ProgramArgs::default() });
    assert!(matches!(parse("plan --gpus 2 --exec prog -x").unwrap(), Command::PlanExec { .. }));
    assert_eq!(args, ["--gpus", "9", "--exec", "-x", "--", "y"]);
}

#[test]
fn options_that_a_program_cannot_have_are_refused_and_a_dry_run_starts_none() {
    for option in ["--config a", "--python a:b", "--set a=1", "--device cpu", "--smart", "--stage a", "--from a"] {
        let name = option.split(' ').next().unwrap();
        assert!(wrong(&format!("{option} --exec prog")).starts_with(name), "{option}");
        assert!(wrong(&format!("plan {option} --exec prog")).starts_with(name), "{option}");
    }
    assert!(matches!(parse("--dry-run --exec prog").unwrap(), Command::PlanExec { .. }));
    let Command::PlanExec { form, .. } = parse("plan --json --machine m --exec prog").unwrap() else { panic!() };
    assert_eq!(form, PlanForm { json: true, machine: Some("m".into()) });
    assert!(wrong("plan --write-machine m --exec prog").starts_with("--write-machine"));
    assert!(wrong("plan --config a --cache 1GiB").starts_with("--cache goes with --exec"));
}

#[test]
fn lines_of_torchrun_mean_the_same() {
    let line = "--standalone --nproc_per_node=3 --max_restarts 1 --tee 3 --redirects 0:1 --exec train.py";
    let mut command = parse(line).unwrap();
    command.settle(|| panic!("a number needs no machine")).unwrap();
    let Command::Exec { run, with, .. } = command else { panic!() };
    assert_eq!((run.local_ranks(), run.max_restarts, with.given()), (Some(3), 1, Some("--redirects")));
    assert!(with.shows(0, false) && with.shows(1, true));
    let mut command = parse("--nproc-per-node gpu --exec train.py").unwrap();
    assert!(command.settle(|| (0, 4)).unwrap_err().to_string().contains("no GPU can be used"));
    let line = "--nnodes 2:2 --node-rank 1 --rdzv-endpoint host0:1234 --rdzv-id j --exec p";
    let Command::Exec { run, .. } = parse(line).unwrap() else { panic!() };
    assert_eq!((run.master_addr.as_deref(), run.master_port), (Some("host0"), Some(1234)));
    let Command::Exec { with, .. } = parse("--local-ranks-filter 0,2 --exec p").unwrap() else { panic!() };
    assert!(with.shows(2, false) && !with.shows(1, true) && with.given().is_none());
    assert!(wrong("--nproc-per-node 2 --gpus 2 --exec p").contains("cannot be used with"));
}

#[test]
fn verbs_around_a_run_are_read() {
    assert!(matches!(parse("export-metrics night --to mlflow"), Ok(Command::Around(Around::ExportMetrics(_)))));
    assert!(matches!(parse("completions zsh"), Ok(Command::Around(Around::Completions(_)))));
    assert!(wrong("export-metrics night --to x").contains("wandb-offline"));
    assert!(wrong("compare a").contains("2 values"));
    let base = "sweep --config a --name s --set a=1,2";
    assert!(matches!(parse(base), Ok(Command::Around(Around::Sweep(_)))));
    for (more, says) in [("--resume auto", "continues by itself"), ("--smart", "trains once")] {
        assert!(wrong(&format!("{base} {more}")).contains(says), "{more}");
    }
    assert!(wrong("sweep --config a --set a=1,2").contains("needs --name"));
    assert!(wrong("monitor --listen 0.0.0.0:9000").contains("on this machine alone"));
}

#[test]
fn colours_are_chosen_before_or_behind_a_verb() {
    for line in ["--color auto runs", "--color=auto runs", "runs --color auto"] {
        assert!(matches!(parse(line).unwrap(), Command::Around(_)), "{line}");
    }
    assert!(matches!(parse("--color auto --gpus 2 --config a").unwrap(), Command::Train(run) if run.gpus == Some(2)));
    assert!(
        matches!(parse("--color auto --ranks 2 --exec prog --color x").unwrap(), Command::Exec { args, .. } if args.len() == 2)
    );
    assert!(wrong("--color").contains("--color <WHEN>"));
    assert!(wrong("--color pink runs").contains("pink"));
}

#[test]
fn mistakes_say_what_to_write() {
    for (line, says) in [
        ("", "no config: name one with --config"),
        ("--gpus 0 --config a", "expected a whole number of 1 or more"),
        ("--gpus 2 --ranks 2 --config a", "cannot be used with"),
        ("--config a --device gpu", "expected auto, cpu or cuda"),
        ("--config a --resume auto --resume-split old", "expected keep or new"),
        ("--config a --resume-split keep", "--resume <auto|PATH>"),
        ("--config a --gpu 3", "--gpus"),
        ("--ranks 2 --exec", "--exec needs a program"),
        ("--config a --ranks 2 --exec p", "do not go together"),
        ("plan --exec", "--exec needs a program"),
        ("plan --config a --exec p", "do not go together"),
        ("--config a --cache 1GiB", "--cache goes with --exec"),
        ("--cache 40% --exec p", "such as 20GiB"),
        ("plan", "no config: name one with --config"),
        ("plan --machine a --write-machine b", "cannot be used with"),
        ("--config a --nnodes 2 --node-rank 2", "--node-rank 2 of --nnodes 2"),
        ("--config a --nnodes 2", "needs --master-addr and --master-port"),
        ("--config a --nnodes 2 --master-addr h --master-port 1", "needs --name"),
        ("batch --config a --step 1 --rank 3 --world 3 --out f", "--rank 3 of --world 3"),
    ] {
        let text = wrong(line);
        assert!(text.contains(says) && !text.starts_with("error"), "{line}: {text}");
    }
    assert!(wrong("bench-memory --steps 0").contains("--steps"));
    let help = |line: &str| parse(line).unwrap_err().to_string();
    assert!(help("--help").contains("--max-restarts") && !help("plan --help").contains("--max-restarts"));
    assert!(parse("plan --write-machine a").is_ok() && parse("plan --config a --machine b").is_ok());
    assert!(help("plan --help").contains("--strict") && parse("plan --config a --smart").is_ok());
    assert!(matches!(parse("--help"), Err(CliError::Shown(text)) if text.contains("sample-data")));
}

#[test]
fn device_decides_on_the_profile() {
    let cwd = tempfile::tempdir().unwrap();
    let text = "profiles: {cpu: {seed: 1}, cuda: {seed: 2}}\n";
    std::fs::write(cwd.path().join("a.yaml"), text).unwrap();
    let seed = |gpu, device| {
        let args = ConfigArgs { config: Some("a".into()), python: None, set: vec![], device };
        args.prepare(gpu, &Folders { cwd: cwd.path(), headroom: None, home: None }).unwrap().config.seed
    };
    assert_eq!((seed(true, None), seed(false, None)), (2, 1));
    assert_eq!((seed(true, Some(DeviceChoice::Cpu)), seed(false, Some(DeviceChoice::Cuda))), (1, 1));
}

#[test]
fn rank_program_and_home_are_found_from_the_executable() {
    let root = tempfile::tempdir().unwrap();
    let exe = root.path().join("target/release/launch");
    std::fs::create_dir_all(exe.parent().unwrap()).unwrap();
    assert!(home(&exe).is_none_or(|found| found != root.path()));
    std::fs::create_dir(root.path().join("configs")).unwrap();
    assert_eq!(home(&exe).as_deref(), Some(root.path()));
    assert!(rank_program(None, &exe).unwrap_err().to_string().contains("cargo build --release"));
    let rank = exe.with_file_name("rank");
    std::fs::write(&rank, "").unwrap();
    assert!(rank_program(None, &exe).unwrap_err().to_string().contains("cannot be executed"));
    std::fs::set_permissions(&rank, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(rank_program(None, &exe).unwrap(), rank);
    assert_eq!(rank_program(Some(rank.clone().into()), Path::new("/x/launch")).unwrap(), rank);
}
