//! `launch sweep`: a grid of configs, one run after the other, each in processes of its own, so that all memory is given back between.

use super::super::helper::Helpers;
use super::super::{Error, io, print, shown};
use super::runs::is_training;
use crate::advise::{self, Overview, Standing};
use crate::cli::{CliError, SweepArgs};
use crate::console::aligned;
use crate::run_dir::{self, StagesOf};
use serde::{Deserialize, Serialize};
use spec::contract::exit;
use spec::plan::bytes_text;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

/// This program, also where its file was replaced by a newer build meanwhile.
const SELF: &str = "/proc/self/exe";
/// Key of the folder that the runs lie in.
const RUNS_DIR: &str = "log.runs_dir";
/// Most runs of one sweep.
const MOST_RUNS: usize = 1000;

/// `<name>.sweep.json` in the folder of the runs.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Sweep {
    config: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    python: Option<String>,
    /// Differences between runs: `key=value` of each, by run.
    points: Vec<Vec<String>>,
    /// Settings that they share.
    shared: Vec<String>,
}

/// Splits `key=a,b` at commas outside of brackets, braces and quotes.
fn values(set: &str) -> Option<(&str, Vec<&str>)> {
    let (key, text) = set.split_once('=')?;
    let (mut depth, mut quote, mut start, mut found) = (0usize, None, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '[' | '{') => depth += 1,
            (None, ']' | '}') => depth = depth.saturating_sub(1),
            (None, ',') if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(&text[start..]);
    Some((key, found))
}

impl Sweep {
    fn of(config: &str, sets: &[String]) -> Result<Self, String> {
        let (mut points, mut shared): (Vec<Vec<String>>, Vec<String>) = (vec![Vec::new()], Vec::new());
        let mut swept = BTreeSet::new();
        for set in sets {
            let (key, values) = values(set).ok_or_else(|| format!("--set {set}: expected KEY=VALUE"))?;
            // One value before a list is a default of the caller's; behind it, it would do nothing.
            if swept.contains(key) {
                return Err(format!("--set {set}: {key} has a list of values already: put all of them into one list"));
            }
            if let Some(empty) = values.iter().position(|value| value.trim().is_empty()).filter(|_| values.len() > 1) {
                return Err(format!("--set {set}: value {} is empty", empty + 1));
            }
            if values.len() == 1 {
                shared.push(set.clone());
                continue;
            }
            swept.insert(key);
            if key == RUNS_DIR {
                return Err(format!("--set {set}: all runs of a sweep lie in one folder"));
            }
            if points.len() * values.len() > MOST_RUNS {
                return Err(format!("a sweep of more than {MOST_RUNS} runs: give fewer values"));
            }
            let with = |point: &Vec<String>, value: &str| [point.clone(), vec![format!("{key}={value}")]].concat();
            points = points.iter().flat_map(|point| values.iter().map(|value| with(point, value))).collect();
        }
        if points.len() < 2 {
            return Err(
                "nothing to sweep over: give a key several values, such as --set train.learning_rate=1e-3,3e-4".into(),
            );
        }
        Ok(Self { config: config.to_owned(), python: None, points, shared })
    }
}

/// A point's run; of one in stages the last stage that has begun. `living`: its processes are there; `whole`: all of its stages
/// are wanted.
fn overview(folder: &Path, living: bool, whole: bool) -> Option<Overview> {
    let Some(stages) = StagesOf::read(folder) else { return Overview::read(folder, living) };
    let begun = stages.begun(folder);
    let mut found: Vec<Overview> = begun.iter().filter_map(|stage| Overview::read(stage, living)).collect();
    let done = |of: &Overview| matches!(of.standing, Standing::Finished | Standing::EarlyStopped);
    let last = found.iter().position(|stage| !done(stage)).or(found.len().checked_sub(1))?;
    let mut last = found.swap_remove(last);
    if whole && done(&last) && begun.len() < stages.stages.len() {
        last.standing = Standing::Unfinished;
    }
    Some(last)
}

pub(super) fn sweep(args: &SweepArgs) -> Result<u8, Error> {
    let run = &args.run;
    let name = run.name.as_deref().unwrap_or_default();
    let config = run.config.config.as_deref().unwrap_or_default();
    let sweep = Sweep::of(config, &run.config.set).map_err(CliError::Usage)?;
    let sweep = Sweep { python: run.config.python.clone(), ..sweep };
    let runs_dir = runs_dir(args)?;
    let list = runs_dir.join(format!("{name}.sweep.json"));
    let folder = |number: usize| runs_dir.join(format!("{name}-{number:03}"));
    if !run.dry_run {
        // One of which nothing has begun was a trial, or a mistake.
        let begun = (0..MOST_RUNS).any(|number| folder(number).is_dir());
        same_or_new(&list, &sweep, begun)?;
    }
    let whole = run.stage.is_none();
    let mut helpers = Helpers::take().map_err(io("cannot take signals", exit::INTERNAL))?;
    let mut code = exit::OK;
    for (number, point) in sweep.points.iter().enumerate() {
        let folder = folder(number);
        let words = point.join(" ");
        match overview(&folder, is_training(&folder), whole).map(|overview| overview.standing) {
            _ if run.dry_run => {}
            Some(Standing::Finished | Standing::EarlyStopped) => {
                print::say(format_args!("sweep: {} has finished already ({words})", shown(&folder)));
                continue;
            }
            Some(Standing::Running) => {
                return Err(Error::Target(format!("{} is trained by another launch: wait for it", shown(&folder))));
            }
            _ => {}
        }
        print::say(format_args!("sweep: run {} of {}: {words}", number + 1, sweep.points.len()));
        let ended = start(args, &format!("{name}-{number:03}"), &sweep.shared, point, &mut helpers)?;
        if ended != exit::OK {
            code = ended;
        }
        // A signal that came when the run had ended by itself is the sweep's alone.
        let asked = helpers.asked_to_end().is_some() && number + 1 < sweep.points.len();
        if asked && ended == exit::OK {
            code = exit::STOPPED;
        }
        let failed = ended != exit::OK && !args.keep_going;
        if asked || failed || matches!(ended, exit::STOPPED | exit::UNSTARTED) {
            break;
        }
    }
    if !run.dry_run {
        print::say(table(&sweep, folder, whole));
    }
    if matches!(code, exit::STOPPED | exit::UNSTARTED) {
        print::note("the sweep was stopped: the same command continues it");
    } else if code != exit::OK && !args.keep_going {
        print::note("the sweep ended with a run that failed: mend it and start the same command, or add --keep-going");
    }
    Ok(code)
}

/// Where the runs lie, by the config.
fn runs_dir(args: &SweepArgs) -> Result<PathBuf, Error> {
    let (exe, cwd) = super::super::here()?;
    let (headroom, home) = (crate::cli::home(&exe), std::env::home_dir());
    let folders = spec::config::Folders { cwd: &cwd, headroom: headroom.as_deref(), home: home.as_deref() };
    // Lists of values are no values; this key has none.
    let set = args.run.config.set.iter().filter(|set| set.starts_with(RUNS_DIR)).cloned().collect();
    let plain = crate::cli::ConfigArgs { set, ..args.run.config.clone() };
    Ok(plain.prepare(false, &folders)?.config.log.runs_dir)
}

/// A sweep of the same name that is another one is not continued. `begun`: there are runs of it.
fn same_or_new(list: &Path, sweep: &Sweep, begun: bool) -> Result<(), Error> {
    let known: Option<Sweep> = advise::json(list).filter(|known| begun || known == sweep);
    match known {
        Some(known) if known == *sweep => Ok(()),
        Some(_) => Err(Error::Target(format!(
            "{} is of another sweep: give this one another --name, or the same --config and --set",
            shown(list)
        ))),
        None => {
            let folder = list.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(folder).map_err(io(format!("cannot make {}", shown(folder)), exit::USAGE))?;
            Ok(run_dir::replace(list, &serde_json::to_vec_pretty(sweep).unwrap_or_default())?)
        }
    }
}

/// Runs one point in a launcher of its own; signals that this one gets are that one's too.
fn start(
    args: &SweepArgs,
    name: &str,
    shared: &[String],
    point: &[String],
    helpers: &mut Helpers,
) -> Result<u8, Error> {
    use std::os::unix::process::ExitStatusExt;
    let mut command = std::process::Command::new(SELF);
    command.arg0("launch").args(words(args, name, shared, point));
    let status = helpers.run(&mut command).map_err(io("cannot start a run", exit::INTERNAL))?;
    let signal = status.signal().map(|signal| i32::from(exit::SIGNAL_BASE) + signal);
    let code = status.code().or(signal).unwrap_or(i32::from(exit::INTERNAL));
    Ok(u8::try_from(code).unwrap_or(exit::INTERNAL))
}

fn words(args: &SweepArgs, name: &str, shared: &[String], point: &[String]) -> Vec<OsString> {
    let run = &args.run;
    let mut words: Vec<OsString> = vec!["--name".into(), name.into(), "--resume".into(), "auto".into()];
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            words.extend([OsString::from(name), value.into()]);
        }
    };
    option("--config", run.config.config.clone());
    option("--python", run.config.python.clone());
    option("--device", run.config.device.map(|device| device.word().to_owned()));
    option("--gpus", run.gpus.map(|count| count.to_string()));
    option("--ranks", run.ranks.map(|count| count.to_string()));
    option("--max-restarts", Some(run.max_restarts.to_string()));
    option("--log-level", run.log_level.clone());
    option("--stage", run.stage.clone());
    option("--from", run.from.clone());
    for set in shared.iter().chain(point) {
        option("--set", Some(set.clone()));
    }
    if run.strict {
        words.push("--strict".into());
    }
    if run.dry_run {
        words.push("--dry-run".into());
    }
    words
}

fn table(sweep: &Sweep, folder: impl Fn(usize) -> PathBuf, whole: bool) -> String {
    let keys: Vec<String> = sweep.points[0].iter().filter_map(|set| Some(set.split_once('=')?.0.to_owned())).collect();
    let mut rows = vec![
        [vec!["run".to_owned()], keys, ["status", "best", "samples/s", "time", "memory"].map(String::from).to_vec()]
            .concat(),
    ];
    for (number, point) in sweep.points.iter().enumerate() {
        let path = folder(number);
        let mut row = vec![path.file_name().unwrap_or_default().to_string_lossy().into_owned()];
        row.extend(point.iter().filter_map(|set| Some(set.split_once('=')?.1.to_owned())));
        let dash = || "-".to_owned();
        match overview(&path, false, whole) {
            Some(run) => {
                let best = run.best.as_ref().map(|best| format!("{} {}", best.metric, advise::number(best.value)));
                row.extend([run.standing.text().to_owned(), best.unwrap_or_else(dash)]);
                row.extend([
                    advise::number(run.samples_per_s),
                    advise::duration(run.wall_s),
                    bytes_text(run.peak_bytes),
                ]);
            }
            None => row.extend([String::from("not begun"), dash(), dash(), dash(), dash()]),
        }
        rows.push(row);
    }
    aligned(&rows, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(sets: &[&str]) -> Result<Sweep, String> {
        Sweep::of("c", &sets.iter().map(|set| (*set).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn every_value_meets_every_other_and_lists_are_one_value() {
        let found = sweep(&["a.b=1,2", "c=x", "d=[1,2],[3]"]).unwrap();
        assert_eq!(found.shared, ["c=x"]);
        let points: Vec<String> = found.points.iter().map(|point| point.join(" ")).collect();
        assert_eq!(points, ["a.b=1 d=[1,2]", "a.b=1 d=[3]", "a.b=2 d=[1,2]", "a.b=2 d=[3]"]);
        assert_eq!(values("k=\"a,b\",c"), Some(("k", vec!["\"a,b\"", "c"])));
        assert_eq!(sweep(&["d={a: 1, b: 2},null"]).unwrap().points.len(), 2);
        assert_eq!(sweep(&["a=3", "a=1,2"]).unwrap().points, [["a=1"], ["a=2"]]);
    }

    #[test]
    fn sweeps_over_nothing_or_too_much_are_refused() {
        for (sets, says) in [
            (vec!["a=1"], "several values"),
            (vec![], "several values"),
            (vec!["a"], "KEY=VALUE"),
            (vec!["a=1,,2"], "value 2 is empty"),
            (vec!["a=1,2", "a=3"], "a has a list of values already"),
            (vec!["log.runs_dir=a,b"], "in one folder"),
            (
                vec!["a=1,2,3,4,5,6,7,8", "b=1,2,3,4,5,6,7,8,9,10,11", "c=1,2,3,4,5,6,7,8,9,10,11,12"],
                "more than 1000 runs",
            ),
        ] {
            let error = sweep(&sets).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn another_sweep_of_the_same_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("s.sweep.json");
        let first = sweep(&["a=1,2"]).unwrap();
        same_or_new(&list, &first, false).unwrap();
        same_or_new(&list, &first, true).unwrap();
        let other = sweep(&["a=1,3"]).unwrap();
        let error = same_or_new(&list, &other, true).unwrap_err();
        assert!(error.to_string().contains("of another sweep"), "{error}");
        same_or_new(&list, &other, false).unwrap();
        let of_python = Sweep { python: Some("a:b".into()), ..sweep(&["a=1,3"]).unwrap() };
        assert!(same_or_new(&list, &of_python, true).is_err());
    }

    #[test]
    fn the_users_function_goes_to_every_run() {
        let line = "launch sweep --python a:b --name s --set x=1,2 --ranks 2";
        let parsed = crate::cli::Command::parse(line.split(' ').map(OsString::from)).unwrap();
        let crate::cli::Command::Around(crate::cli::Around::Sweep(args)) = parsed else { panic!() };
        let words = words(&args, "s-000", &[], &["x=1".into()]);
        let text: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(text.join(" "), "--name s-000 --resume auto --python a:b --ranks 2 --max-restarts 0 --set x=1");
    }

    #[test]
    fn a_run_in_stages_has_finished_once_all_of_them_have() {
        let dir = tempfile::tempdir().unwrap();
        let stage = |name: &str| crate::run_dir::StageOf { name: name.into(), kind: spec::config::StageKind::Train };
        let stages = StagesOf { stages: vec![stage("a"), stage("b")], ..StagesOf::default() };
        stages.write(dir.path()).unwrap();
        let standing = |whole| overview(dir.path(), false, whole).map(|found| found.standing);
        assert_eq!(standing(true), None);
        for (name, status, found, of_part) in [
            ("a", "finished", Standing::Unfinished, Standing::Finished),
            ("b", "stopped", Standing::Stopped, Standing::Stopped),
            ("b", "finished", Standing::Finished, Standing::Finished),
        ] {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("job.json"), r#"{"start": "x"}"#).unwrap();
            let status = serde_json::from_value(serde_json::json!(status)).unwrap();
            let summary = spec::contract::Summary { status, start: "x".into(), ..Default::default() };
            std::fs::write(folder.join("summary.json"), serde_json::to_vec(&summary).unwrap()).unwrap();
            assert_eq!((standing(true), standing(false)), (Some(found), Some(of_part)), "{name} {status:?}");
        }
    }
}
