//! A run's folder, `<log.runs_dir>/<run>/`: which one a command means, and what the launcher writes there.

mod origin;
mod stages;

pub use stages::{ConfigName, STAGES, StageOf, StagesOf};

use host::journal;
use host::lock::{self, LockError, RunLock};
use host::stamp::time_stamp;
use spec::config::{Config, is_folder_name};
pub use spec::contract::files::SplitChoice;
use spec::contract::{self, exit, shown};
use spec::job::{EarlierStage, Job, Work};
use spec::plan::Plan;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// Why there is no folder to run in, or nothing to resume from.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error(
        "the run {name} exists already ({path}): continue it with --resume auto, or choose another --name",
        path = shown(path)
    )]
    Exists { name: String, path: PathBuf },
    #[error("--name {0:?} cannot name a folder: use letters, digits, - _ . and start with none of - .")]
    BadName(String),
    #[error("--name {name} and --resume {path} mean different runs: leave --name out", path = shown(path))]
    OtherRun { name: String, path: PathBuf },
    #[error("--resume {path}: {problem}", path = shown(path))]
    NoCheckpoint { path: PathBuf, problem: String },
    #[error("cannot {what} {path} (log.runs_dir names another place)", path = shown(path))]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Locked(#[from] LockError),
    #[error(
        "the run folder {path}: its name is not UTF-8, and records and variables of ranks cannot hold it: set log.runs_dir \
         to another folder, or start in one",
        path = shown(.0)
    )]
    NotUtf8(PathBuf),
    #[error("cannot write the resolved config")]
    Config(#[from] spec::config::ConfigError),
}

impl RunDirError {
    /// The exit code of `launch` for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunDirError::NoCheckpoint { .. } => exit::CHECKPOINT,
            _ => exit::USAGE,
        }
    }
}

/// `--resume`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    #[default]
    No,
    /// The newest complete checkpoint of the named run, or of the newest run of the config. Without one a new training
    /// starts, so that a job that is queued again needs no other command.
    Auto,
    /// A run folder (its newest complete checkpoint) or a checkpoint folder.
    Path(PathBuf),
}

/// Inputs that decide on the folder.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    pub runs_dir: &'a Path,
    /// Name of the config: default run names begin with it.
    pub config_name: &'a str,
    pub name: Option<&'a str>,
    pub resume: &'a Resume,
    /// Nodes other than 0 join the folder that node 0 makes.
    pub node_rank: usize,
    pub now: SystemTime,
}

/// An existing run folder.
#[derive(Clone, Debug, PartialEq)]
pub struct RunDir {
    /// Absolute.
    pub path: PathBuf,
    /// Checkpoint folder to continue from, absolute.
    pub resume: Option<PathBuf>,
    /// `--resume-split`, for the job.
    pub resume_split: Option<SplitChoice>,
    /// For the job.
    pub work: Work,
    pub earlier: Vec<EarlierStage>,
    node_rank: usize,
}

impl RunDir {
    /// A folder that exists, for training from the beginning.
    pub fn at(path: PathBuf) -> Self {
        Self { path, resume: None, resume_split: None, work: Work::Train, earlier: Vec::new(), node_rank: 0 }
    }

    /// The same for other work than training.
    pub fn for_work(self, work: Work) -> Self {
        Self { work, ..self }
    }

    /// Finds or makes the folder.
    ///
    /// # Errors
    /// The name is taken and nothing is to be resumed; nothing there to resume from; the folder cannot be made.
    pub fn open(ask: &Ask) -> Result<Self, RunDirError> {
        if let Some(name) = ask.name.filter(|name| !is_folder_name(name)) {
            return Err(RunDirError::BadName(name.to_string()));
        }
        let runs_dir = utf8(absolute(ask.runs_dir)?)?;
        let (path, resume) = match (ask.resume, ask.name) {
            (Resume::Path(path), name) => resume_from(&utf8(absolute(path)?)?, name)?,
            (Resume::Auto, Some(name)) => known_or_new(runs_dir.join(name))?,
            (Resume::Auto, None) => match newest_run(&runs_dir, ask.config_name) {
                Some(path) => known_or_new(path)?,
                None => (make_fresh(&runs_dir, ask)?, None),
            },
            (Resume::No, Some(name)) if ask.node_rank == 0 => (make_named(&runs_dir, name)?, None),
            (Resume::No, Some(name)) => (known_or_new(runs_dir.join(name))?.0, None),
            (Resume::No, None) => (make_fresh(&runs_dir, ask)?, None),
        };
        Ok(Self { resume, node_rank: ask.node_rank, ..Self::at(path) })
    }

    /// Locks the folder for this process, and looks again for what there is to resume: another run may have ended in between.
    /// `say` gets a line when the lock of a process that has ended is taken over.
    ///
    /// # Errors
    /// Another process trains this run.
    pub fn lock(&mut self, resume: &Resume, say: impl FnMut(String)) -> Result<RunLock, RunDirError> {
        let lost = |other: String| {
            eprintln!(
                "launch: error: the run was taken over by {other}, since this process gave no sign of life: ending"
            );
            // The guard ends the ranks, which are not to save over the other run's checkpoints.
            std::process::exit(i32::from(exit::USAGE));
        };
        let lock = RunLock::take(&self.path, self.node_rank, "launch", say, Box::new(lost))?;
        let is_chosen = matches!(resume, Resume::Path(path) if step_of(path).is_some());
        if *resume != Resume::No && !is_chosen {
            self.resume_newest();
        }
        Ok(lock)
    }

    /// A folder for one job that leaves nothing behind: see [`RunDir::remove`].
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn scratch(runs_dir: &Path) -> Result<Self, RunDirError> {
        let path = utf8(runs_dir.join(format!(".batch-{}", std::process::id())))?;
        std::fs::create_dir_all(&path).map_err(|source| io_error("make", &path, source))?;
        Ok(Self::at(path))
    }

    /// True on the node that writes the files of the whole run, and for a training.
    pub fn writes_for_all(&self) -> bool {
        self.node_rank == 0 && self.work == Work::Train
    }

    /// Removes the folder and all in it.
    pub fn remove(self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }

    /// Name of the run.
    pub fn name(&self) -> String {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned()
    }

    /// Names the job among all of this machine: stages and predictions of several runs have folders of the same name.
    pub fn id(&self) -> String {
        let in_run = self.path.parent().is_some_and(|root| root.join(STAGES).is_file());
        if self.work == Work::Train && !in_run {
            return self.name();
        }
        let mut hasher = DefaultHasher::new();
        self.path.hash(&mut hasher);
        format!("{}-{:016x}", self.name(), hasher.finish())
    }

    /// Writes `config.yaml`, `plan.json` and `job.json` (on node R > 0: `plan.node<R>.json`, `job.node<R>.json`), and
    /// returns the job with the path of its file. Call it again with another `resume` before a restart.
    ///
    /// # Errors
    /// No room, no permission.
    pub fn write(&self, config: &Config, plan: &Plan) -> Result<(Job, PathBuf), RunDirError> {
        let node = if self.node_rank == 0 { String::new() } else { format!(".node{}", self.node_rank) };
        let job = Job {
            version: contract::VERSION,
            config: config.clone(),
            plan: plan.clone(),
            run_dir: self.path.clone(),
            resume: self.resume.clone(),
            start: new_start(),
            resume_split: self.resume_split,
            work: self.work.clone(),
            earlier: self.earlier.clone(),
            origin: Some(origin::origin(&self.path.join(format!("job{node}.json")))),
        };
        if self.node_rank == 0 {
            replace(&self.path.join("config.yaml"), config.to_yaml()?.as_bytes())?;
        }
        replace(&self.path.join(format!("plan{node}.json")), &json(plan, &self.path)?)?;
        let path = self.path.join(format!("job{node}.json"));
        replace(&path, &json(&job, &self.path)?)?;
        Ok((job, path))
    }

    /// Step of the checkpoint that the run continues from.
    pub fn resumed_step(&self) -> Option<u64> {
        self.resume.as_deref().and_then(step_of)
    }

    /// Name of the start that `job.json` is of; a summary with the same name is of this start, whatever the clock says.
    /// `None`: there is no such file, or it is of an earlier version.
    pub fn start(&self) -> Option<String> {
        let text = std::fs::read(self.path.join("job.json")).ok()?;
        let job: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(job.get("start")?.as_str()?.to_owned())
    }

    /// The folder of a stage of this run, which is made if it is missing. `resumes`: from its newest complete checkpoint.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn stage(&self, name: &str, resumes: bool) -> Result<Self, RunDirError> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).map_err(|source| io_error("make the folder of a stage", &path, source))?;
        let resume = resumes.then(|| newest_checkpoint(&path)).flatten();
        Ok(Self { resume, ..Self::at(path) })
    }

    /// Continues from the newest complete checkpoint, for a restart of the same run.
    pub fn resume_newest(&mut self) {
        self.resume = newest_checkpoint(&self.path).or(self.resume.take());
    }
}

/// The complete checkpoint of a run with the highest step: `checkpoints/step-<N>/` with a readable `state.json`, which
/// is written last.
pub fn newest_checkpoint(run_dir: &Path) -> Option<PathBuf> {
    let entries = run_dir.join("checkpoints").read_dir().ok()?.flatten();
    let complete = entries.map(|entry| entry.path()).filter(|path| is_complete(path));
    complete.filter_map(|path| Some((step_of(&path)?, path))).max_by_key(|(step, _)| *step).map(|(_, path)| path)
}

/// Epochs completed before the checkpoint, validations included. `None` means that it does not say.
pub fn epochs_done(checkpoint: &Path) -> Option<u64> {
    let text = std::fs::read(checkpoint.join("state.json")).ok()?;
    let whole: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let state = whole.get("state")?;
    let (mut steps, per_epoch) = (state.get("step")?.as_u64()?, state.get("steps_per_epoch")?.as_u64()?);
    // The first epochs may have other numbers of steps.
    let mut epochs = 0;
    for early in state.get("early").and_then(|early| early.as_array()).into_iter().flatten() {
        match steps.checked_sub(early.as_u64()?) {
            Some(left) => (steps, epochs) = (left, epochs + 1),
            None => return Some(finished(epochs, state)),
        }
    }
    Some(finished(epochs + steps.checked_div(per_epoch)?, state))
}

/// Epochs that are behind, the last one's validation included.
fn finished(epochs: u64, state: &serde_json::Value) -> u64 {
    let pending = state.get("unvalidated").is_some_and(|record| !record.is_null());
    epochs.saturating_sub(u64::from(pending))
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

fn is_complete(checkpoint: &Path) -> bool {
    let text = std::fs::read(checkpoint.join("state.json"));
    text.is_ok_and(|text| serde_json::from_slice::<serde_json::Value>(&text).is_ok())
}

/// A folder with its newest checkpoint; made where it is missing.
fn known_or_new(path: PathBuf) -> Result<(PathBuf, Option<PathBuf>), RunDirError> {
    std::fs::create_dir_all(&path).map_err(|source| io_error("make the run folder", &path, source))?;
    let resume = newest_checkpoint(&path);
    Ok((path, resume))
}

fn resume_from(path: &Path, name: Option<&str>) -> Result<(PathBuf, Option<PathBuf>), RunDirError> {
    let fail = |problem: &str| RunDirError::NoCheckpoint { path: path.to_path_buf(), problem: problem.to_string() };
    if !path.is_dir() {
        return Err(fail("no such folder: give a run folder, or a checkpoint folder checkpoints/step-<N> in it"));
    }
    let (run, checkpoint) = if step_of(path).is_some() {
        let run = path.parent().and_then(Path::parent).ok_or_else(|| fail("not inside a run folder"))?;
        if !is_complete(path) {
            return Err(fail("state.json is missing or broken: this checkpoint is incomplete, try an earlier one"));
        }
        (run.to_path_buf(), path.to_path_buf())
    } else {
        let newest = newest_checkpoint(path).ok_or_else(|| fail("holds no complete checkpoint"))?;
        (path.to_path_buf(), newest)
    };
    match name {
        Some(name) if run.file_name().is_none_or(|run| run != name) => {
            Err(RunDirError::OtherRun { name: name.to_string(), path: path.to_path_buf() })
        }
        _ => Ok((run, Some(checkpoint))),
    }
}

/// The run of this config whose job was written last, or whose stages began last.
pub fn newest_run(runs_dir: &Path, config_name: &str) -> Option<PathBuf> {
    let runs = runs_dir.read_dir().ok()?.flatten().map(|entry| entry.path());
    let of_config = runs.filter_map(|run| {
        let job = [run.join("job.json"), run.join(STAGES)].into_iter().find(|path| path.is_file())?;
        let written = job.metadata().ok()?.modified().ok()?;
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&job).ok()?).ok()?;
        (value.pointer("/config/name")?.as_str()? == config_name).then_some((written, run))
    });
    of_config.max().map(|(_, run)| run)
}

fn make_named(runs_dir: &Path, name: &str) -> Result<PathBuf, RunDirError> {
    let path = runs_dir.join(name);
    match make(runs_dir, &path)? {
        true => Ok(path),
        // A run that trains cannot be continued either.
        false => Err(lock::check(&path, 0)
            .err()
            .map_or_else(|| RunDirError::Exists { name: name.to_string(), path }, RunDirError::Locked)),
    }
}

/// `<config>-<YYYYmmdd-HHMMSS>` (UTC), with a number behind it when two runs start within one second.
fn make_fresh(runs_dir: &Path, ask: &Ask) -> Result<PathBuf, RunDirError> {
    let name = format!("{}-{}", ask.config_name, time_stamp(ask.now));
    let mut path = runs_dir.join(&name);
    for i in 2.. {
        if make(runs_dir, &path)? {
            break;
        }
        path = runs_dir.join(format!("{name}-{i}"));
    }
    Ok(path)
}

/// Creates the folder. Returns false if it existed.
fn make(runs_dir: &Path, path: &Path) -> Result<bool, RunDirError> {
    std::fs::create_dir_all(runs_dir).map_err(|source| io_error("make", runs_dir, source))?;
    match std::fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(io_error("make the run folder", path, source)),
    }
}

/// Readers see the old file or the new one, never half of it. A full disk is waited for, a few seconds.
///
/// # Errors
/// No room, no permission.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), RunDirError> {
    let sibling = path.with_added_extension("new");
    journal::replace(path, &sibling, bytes, journal::ROOM_LIMIT).map_err(|source| io_error("write", path, source))
}

/// A name that no other start has: the clock may have been set back, and a process number comes again.
fn new_start() -> String {
    static STARTS: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (pid, number) = (std::process::id(), STARTS.fetch_add(1, Ordering::Relaxed));
    format!("{:x}-{pid}-{number}", now.as_nanos())
}

fn json<T: serde::Serialize>(value: &T, path: &Path) -> Result<Vec<u8>, RunDirError> {
    serde_json::to_vec_pretty(value).map_err(|e| io_error("write to", path, e.into()))
}

fn absolute(path: &Path) -> Result<PathBuf, RunDirError> {
    std::path::absolute(path).map_err(|source| io_error("find", path, source))
}

fn utf8(path: PathBuf) -> Result<PathBuf, RunDirError> {
    if path.to_str().is_some() { Ok(path) } else { Err(RunDirError::NotUtf8(path)) }
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> RunDirError {
    RunDirError::Io { what, path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn open(runs_dir: &Path, name: Option<&str>, resume: &Resume) -> Result<RunDir, RunDirError> {
        RunDir::open(&Ask { runs_dir, config_name: "demo", name, resume, node_rank: 0, now: at(1_763_655_609) })
    }

    fn checkpoint(run: &Path, step: u64, state: Option<&str>) -> PathBuf {
        let folder = run.join(format!("checkpoints/step-{step}"));
        fs::create_dir_all(&folder).unwrap();
        if let Some(state) = state {
            fs::write(folder.join("state.json"), state).unwrap();
        }
        folder
    }

    fn demo() -> Config {
        Config { name: "demo".into(), ..spec::task::config("emg") }
    }

    #[test]
    fn fresh_runs_never_share_a_folder() {
        let runs = tempfile::tempdir().unwrap();
        let first = open(runs.path(), None, &Resume::No).unwrap();
        let second = open(runs.path(), None, &Resume::No).unwrap();
        assert_eq!((first.name(), second.name()), ("demo-20251120-162009".into(), "demo-20251120-162009-2".into()));
    }

    #[test]
    fn a_used_name_is_refused_unless_resumed() {
        let runs = tempfile::tempdir().unwrap();
        let first = open(runs.path(), Some("a"), &Resume::No).unwrap();
        let error = open(runs.path(), Some("a"), &Resume::No).unwrap_err();
        assert!(error.to_string().contains("the run a exists already"), "{error}");
        assert_eq!(error.exit_code(), exit::USAGE);
        assert_eq!(open(runs.path(), Some("a"), &Resume::Auto).unwrap(), first);
        assert!(matches!(open(runs.path(), Some("../a"), &Resume::No), Err(RunDirError::BadName(_))));
    }

    #[test]
    fn a_folder_whose_name_is_not_utf8_is_refused_by_that_name() {
        use std::os::unix::ffi::OsStrExt;
        let runs = tempfile::tempdir().unwrap();
        let odd = runs.path().join(std::ffi::OsStr::from_bytes(b"r\xff"));
        fs::create_dir(&odd).unwrap();
        for (runs_dir, resume) in [(odd.as_path(), Resume::No), (runs.path(), Resume::Path(odd.clone()))] {
            let error = open(runs_dir, Some("a"), &resume).unwrap_err();
            assert!(error.to_string().contains(r#"/r\xFF": its name is not UTF-8"#), "{error}");
            assert_eq!(error.exit_code(), exit::USAGE);
        }
        assert_eq!(fs::read_dir(&odd).unwrap().count(), 0, "nothing is made there");
    }

    #[test]
    fn starts_have_names_of_their_own() {
        let runs = tempfile::tempdir().unwrap();
        let run = open(runs.path(), Some("a"), &Resume::No).unwrap();
        assert_eq!(run.start(), None);
        let names = [(); 2].map(|()| {
            let (job, _) = run.write(&demo(), &Plan::default()).unwrap();
            assert_eq!(run.start().as_ref(), Some(&job.start));
            job.start
        });
        assert_ne!(names[0], names[1]);
    }

    #[test]
    fn auto_takes_the_newest_complete_checkpoint() {
        let runs = tempfile::tempdir().unwrap();
        let run = open(runs.path(), Some("a"), &Resume::No).unwrap();
        checkpoint(&run.path, 9, Some("{}"));
        let newest = checkpoint(&run.path, 20, Some("{}"));
        checkpoint(&run.path, 30, None);
        checkpoint(&run.path, 40, Some("{\"half\":"));
        fs::create_dir_all(run.path.join("checkpoints/step-50.new")).unwrap();
        fs::write(run.path.join("checkpoints/step-50.new/state.json"), "{}").unwrap();
        assert_eq!(open(runs.path(), Some("a"), &Resume::Auto).unwrap().resume, Some(newest.clone()));
        assert_eq!(open(runs.path(), None, &Resume::Path(run.path.clone())).unwrap().resume, Some(newest));
    }

    #[test]
    fn a_checkpoint_says_how_many_epochs_are_behind_it() {
        let runs = tempfile::tempdir().unwrap();
        let done = |state: &str| {
            let text = format!("{{\"step\":9,\"state\":{state}}}");
            epochs_done(&checkpoint(runs.path(), 9, Some(&text)))
        };
        assert_eq!(done(r#"{"step":9,"steps_per_epoch":2}"#), Some(4));
        assert_eq!(done(r#"{"step":8,"steps_per_epoch":2,"unvalidated":null}"#), Some(4));
        assert_eq!(done(r#"{"step":8,"steps_per_epoch":2,"unvalidated":{"step":8}}"#), Some(3));
        assert_eq!(done(r#"{"step":8,"steps_per_epoch":2,"early":[4,3]}"#), Some(2));
        assert_eq!(done(r#"{"step":9,"steps_per_epoch":2,"early":[4,3]}"#), Some(3));
        assert_eq!(done(r#"{"step":3,"steps_per_epoch":2,"early":[4,3]}"#), Some(0));
        assert_eq!((done(r#"{"step":8,"steps_per_epoch":0}"#), done("{}")), (None, None));
    }

    #[test]
    fn auto_without_a_name_takes_the_newest_run_of_the_config() {
        let runs = tempfile::tempdir().unwrap();
        let write = |name: &str, config: &Config, age_s: u64| {
            let run = open(runs.path(), Some(name), &Resume::No).unwrap();
            let (_, job) = run.write(config, &Plan::default()).unwrap();
            let time = at(1_763_655_609 - age_s);
            fs::File::options().write(true).open(job).unwrap().set_modified(time).unwrap();
            run.path
        };
        write("old", &demo(), 20);
        let new = write("new", &demo(), 10);
        write("other", &Config { name: "other".into(), ..demo() }, 0);
        assert_eq!(open(runs.path(), None, &Resume::Auto).unwrap().path, new);
        let empty = tempfile::tempdir().unwrap();
        let fresh = open(empty.path(), None, &Resume::Auto).unwrap();
        assert_eq!((fresh.name().as_str(), fresh.resume), ("demo-20251120-162009", None));
    }

    #[test]
    fn a_checkpoint_folder_leads_to_its_run() {
        let runs = tempfile::tempdir().unwrap();
        let run = open(runs.path(), Some("a"), &Resume::No).unwrap();
        let old = checkpoint(&run.path, 9, Some("{}"));
        checkpoint(&run.path, 20, Some("{}"));
        let broken = checkpoint(&run.path, 30, None);
        let resumed = open(runs.path(), None, &Resume::Path(old.clone())).unwrap();
        assert_eq!((resumed.path, resumed.resume), (run.path.clone(), Some(old.clone())));
        let mismatch = open(runs.path(), Some("b"), &Resume::Path(old)).unwrap_err();
        assert!(matches!(mismatch, RunDirError::OtherRun { .. }), "{mismatch}");
        for (path, says) in
            [(broken, "incomplete"), (runs.path().join("none"), "no such folder"), (runs.path().into(), "no complete")]
        {
            let error = open(runs.path(), None, &Resume::Path(path)).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.exit_code(), exit::CHECKPOINT);
        }
    }

    #[test]
    fn written_files_read_back() {
        let runs = tempfile::tempdir().unwrap();
        let run = open(runs.path(), Some("a"), &Resume::No).unwrap();
        let (job, path) = run.write(&demo(), &Plan::default()).unwrap();
        assert_eq!(serde_json::from_slice::<Job>(&fs::read(path).unwrap()).unwrap(), job);
        assert_eq!(job.run_dir, run.path);
        let text = fs::read_to_string(run.path.join("config.yaml")).unwrap();
        let again = spec::task::parse_config(&text, "config.yaml").unwrap().resolve("cpu", &[]).unwrap();
        assert_eq!(again, demo());
        let mut names: Vec<_> = fs::read_dir(&run.path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.yaml", "job.json", "plan.json"]);
    }
}
