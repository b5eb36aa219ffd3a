//! Sizes of a task's model and data, from `rank describe` or from an earlier answer of it.
//!
//! Answers are kept in `$XDG_CACHE_HOME/headroom/measured`, else `~/.cache/headroom/measured`, else `<log.runs_dir>/.measured`:
//! they belong to model and machine, not to a run, and `launch plan` makes no folder of runs. A file's name is the checksum
//! of all that shapes the model's passes, and of what shapes the data set. Where only the data set differs, the passes of a
//! kept answer serve again. Answers are void once libtorch or the rank program has changed.

use super::interpreter::Started;
use super::{Error, Ready, io, print, rank_program, torch_env};
use crate::supervise::prepare_helper;
use host::machine::dataset_facts;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use spec::config::Config;
use spec::contract::{CacheMode, Device, FileStamp, Gpu, Machine, Measured, VERSION, env, exit};
use spec::job::{DescribeJob, PassKind};
use spec::plan::{self, Shape};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Seconds that a measurement may take.
const LIMIT_S: f64 = 30.0;
/// Most compute threads of a measurement: more make no pass larger, and others work on this machine too.
const MOST_THREADS: usize = 4;
/// Beginning of the line in which the rank program says why it ends.
const ERROR: &str = "rank: error: ";
/// Answers that are kept, the newest.
const KEPT: usize = 200;
/// An answer that was cut short by a limit serves until the limit has grown by this factor.
const GROWN: f64 = 1.5;

/// A kept answer.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// The limit under which it was measured, bytes.
    limit_bytes: u64,
    measured: Measured,
}

/// Subject and limits of one measurement.
struct Wanted<'a> {
    config: &'a Config,
    /// `None`: on the CPU.
    gpu: Option<Gpu>,
    /// Name of the device that the plan is for.
    device: String,
    threads: usize,
    passes: PassKind,
    limit_bytes: u64,
}

/// How `rank describe` ended, and the last line that it wrote.
struct Ended {
    answer: Option<Measured>,
    /// `None`: its time was up.
    status: Option<ExitStatus>,
    /// Its last words.
    said: String,
}

/// Sizes for `ready`'s plan. Where nothing can be measured the answer says so, and the plan rests on assumptions.
///
/// # Errors
/// The budget is impossible, or no model can be built from this config.
pub(super) fn measured(ready: &Ready) -> Result<Measured, Error> {
    let budget = plan::budget_bytes(&ready.config, &ready.here)?;
    let wanted = Wanted::of(ready, budget);
    let program = match rank_program() {
        Ok(program) => program,
        Err(error) => return Ok(assumed(&wanted, &error.to_string())),
    };
    let started = Started::of(&ready.config, &program)?;
    let store = Store::of(&wanted, &started);
    if let Some(kept) = store.exact(wanted.limit_bytes) {
        return Ok(kept);
    }
    let known = store.same_model();
    if known.is_none() {
        print::note("measuring the model for its plan; the answer is kept for the next time");
    }
    let began = Instant::now();
    let is_fresh = known.is_none();
    let ended = ask(&started, &wanted, known).map_err(io("cannot measure the model", exit::INTERNAL))?;
    let measured = answer(ended, &wanted)?;
    if is_fresh {
        print::note(format_args!("measured in {:.1} s", began.elapsed().as_secs_f64()));
    }
    if measured.library.is_some() {
        store.keep(&Kept { limit_bytes: wanted.limit_bytes, measured: measured.clone() });
    }
    Ok(measured)
}

impl<'a> Wanted<'a> {
    /// A quarter of the budget, and never more than half of what is free now.
    fn of(ready: &'a Ready, budget_bytes: u64) -> Self {
        let limit_bytes = (budget_bytes / 4).min(ready.here.memfd_room_bytes() / 2);
        let threads = ready.here.cores.clamp(1, MOST_THREADS);
        let cuda = plan::device_of(&ready.config, &ready.machine, &ready.request) == Device::Cuda;
        let planned = ready.machine.gpus.first().filter(|_| cuda);
        let device = planned.map_or_else(|| "cpu".to_owned(), |gpu| gpu.name.clone());
        // The plan may be for another machine: its device is measured where one of its kind is here.
        let gpu = ready.here.gpus.iter().find(|gpu| cuda && gpu.name == device).cloned();
        Self { config: &ready.config, gpu, device, threads, passes: ready.passes, limit_bytes }
    }
}

/// Sizes to plan with where `rank describe` gives no answer.
fn assumed(wanted: &Wanted, why: &str) -> Measured {
    let mut measured = Measured::default();
    measured.model.device = wanted.device.clone();
    measured.model.short = Some(format!("not measured ({why}): lines of the model are missing or assumed"));
    measured.data.auto_policy = CacheMode::Pin;
    measured
}

/// # Errors
/// The program ended with the words why this config makes no model.
fn answer(ended: Ended, wanted: &Wanted) -> Result<Measured, Error> {
    let code = ended.status.and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
    if let Some(code @ (exit::USAGE | exit::DATA | exit::PLAN | exit::USER)) = code {
        // A program that knows no `describe` says how it is used.
        if let Some(text) = ended.said.strip_prefix(ERROR) {
            return Err(Error::Model { code, text: text.to_owned() });
        }
    }
    match ended.answer {
        Some(mut measured) if code != Some(exit::OK) => {
            let how = ended.status.map_or_else(|| format!("stopped after {LIMIT_S} s"), |status| status.to_string());
            measured
                .model
                .short
                .get_or_insert_with(|| "not all passes were made".into())
                .push_str(&format!(" ({how})"));
            Ok(measured)
        }
        Some(measured) => Ok(measured),
        None => {
            let how = ended.status.map_or_else(|| format!("no answer in {LIMIT_S} s"), |status| status.to_string());
            Ok(assumed(wanted, &format!("rank describe: {how}")))
        }
    }
}

/// Runs `rank describe` within its time.
fn ask(started: &Started, wanted: &Wanted, known: Option<Measured>) -> std::io::Result<Ended> {
    let job = DescribeJob {
        version: VERSION,
        config: wanted.config.clone(),
        device: wanted.gpu.clone(),
        threads: wanted.threads,
        limit_bytes: wanted.limit_bytes,
        limit_s: LIMIT_S * 0.9,
        passes: wanted.passes,
        known,
    };
    let mut command = started.command("describe");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // The user's own code may run in it.
    command.envs(torch_env(|name| std::env::var_os(name).is_some())).env_remove(env::JOIN_SECRET);
    if std::env::var_os("OMP_WAIT_POLICY").is_none() {
        // Threads that spin for each other on cores that others use make seconds of milliseconds.
        command.env("OMP_WAIT_POLICY", "passive");
    }
    prepare_helper(&mut command);
    let mut child = command.spawn()?;
    // Read all the while: a child whose pipe is full waits.
    let words = child.stderr.take().map(|mut err| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = err.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    let heard = hear(&mut child, &serde_json::to_vec(&job)?);
    if !matches!(heard, Ok((_, true))) {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let (out, in_time) = heard?;
    let said = words.and_then(|words| words.join().ok()).unwrap_or_default();
    let said = said.rfind(ERROR).map_or("", |at| said[at..].trim_end()).to_owned();
    // The last whole line: the process may have been ended within one.
    let whole = out.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let answer = whole.lines().last().and_then(|line| serde_json::from_str(line).ok());
    Ok(Ended { answer, status: in_time.then_some(status), said })
}

/// Gives the child its job and takes what it writes, until it ends; false: until its time was up.
fn hear(child: &mut Child, job: &[u8]) -> std::io::Result<(String, bool)> {
    let end = Instant::now() + Duration::from_secs_f64(LIMIT_S);
    if let Some(mut into) = child.stdin.take() {
        // It may end without reading: then its status says more than this write.
        let _ = into.write_all(job);
    }
    let (mut text, mut bytes) = (Vec::new(), [0; 16 << 10]);
    let Some(out) = &mut child.stdout else { return Ok((String::new(), true)) };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((String::from_utf8_lossy(&text).into_owned(), false));
        }
        let mut fds = [PollFd::new(&*out, PollFlags::IN)];
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match out.read(&mut bytes)? {
            0 => return Ok((String::from_utf8_lossy(&text).into_owned(), true)),
            n => text.extend_from_slice(&bytes[..n]),
        }
    }
}

/// Where answers are kept, and the two parts of a file's name.
struct Store {
    folder: PathBuf,
    model: String,
    data: String,
}

impl Store {
    fn of(wanted: &Wanted, started: &Started) -> Self {
        let shape = Shape::of(wanted.config);
        let facts = dataset_facts(&wanted.config.data.dataset_path);
        let Wanted { device, gpu, .. } = wanted;
        Self {
            folder: folder(&wanted.config.log.runs_dir),
            model: sum(&(
                VERSION,
                (stamp(&started.program), started.stamps()),
                &shape.model,
                device,
                gpu.is_some(),
                wanted.passes,
            )),
            data: sum(&(shape.data, facts.exists, facts.digest)),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.join(format!("{}-{}.json", self.model, self.data))
    }

    /// The answer for this model and these data.
    fn exact(&self, limit_bytes: u64) -> Option<Measured> {
        let kept = read(&self.file())?;
        let serves = kept.measured.model.short.is_none() || (limit_bytes as f64) < kept.limit_bytes as f64 * GROWN;
        serves.then_some(kept.measured)
    }

    /// The newest whole answer for this model, whatever the data set.
    fn same_model(&self) -> Option<Measured> {
        let of_model = |name: &str| name.strip_prefix(&self.model).is_some_and(|rest| rest.starts_with('-'));
        let newest = files(&self.folder).into_iter().find(|(_, name)| of_model(name))?;
        let kept = read(&self.folder.join(newest.1))?;
        kept.measured.model.short.is_none().then_some(kept.measured)
    }

    /// Nothing depends on it: what cannot be written is measured again.
    fn keep(&self, kept: &Kept) {
        let Ok(text) = serde_json::to_vec(kept) else { return };
        // A name of its own, since others may write the same answer.
        let partial = self.folder.join(format!("{}-{}.partial-{}", self.model, self.data, std::process::id()));
        let written = std::fs::create_dir_all(&self.folder).and_then(|()| std::fs::write(&partial, text));
        if written.and_then(|()| std::fs::rename(&partial, self.file())).is_err() {
            let _ = std::fs::remove_file(&partial);
            return;
        }
        for (_, name) in files(&self.folder).into_iter().skip(KEPT) {
            let _ = std::fs::remove_file(self.folder.join(name));
        }
    }
}

/// The folder of kept answers.
fn folder(runs_dir: &Path) -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
    let usable = caches.map(|caches| caches.join("headroom/measured")).filter(|folder| {
        let made = std::fs::create_dir_all(folder).is_ok();
        made && rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
    });
    usable.unwrap_or_else(|| runs_dir.join(".measured"))
}

/// A kept answer, if libtorch is still the file that it was measured with.
fn read(path: &Path) -> Option<Kept> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let library = kept.measured.library.as_ref()?;
    (stamp(Path::new(&library.path)).as_ref() == Some(library)).then_some(kept)
}

/// Answers in `folder` with their times, the newest first.
fn files(folder: &Path) -> Vec<((i64, i64), String)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok().filter(|name| name.ends_with(".json"))?;
            let file = entry.metadata().ok()?;
            Some(((file.mtime(), file.mtime_nsec()), name))
        })
        .collect();
    files.sort_by(|a, b| b.cmp(a));
    files
}

fn stamp(path: &Path) -> Option<FileStamp> {
    let file = std::fs::metadata(path).ok()?;
    let modified_ns = u64::try_from(file.mtime()).ok()?.checked_mul(1_000_000_000)? + file.mtime_nsec() as u64;
    Some(FileStamp { path: path.display().to_string(), bytes: file.len(), modified_ns })
}

fn sum(value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// The machine in `path`, as [`write_machine`] wrote it.
pub(super) fn read_machine(path: &Path) -> Result<Machine, Error> {
    let refused = |problem: String| {
        let way_out = "make one there with `launch plan --write-machine FILE`";
        Error::Target(format!("--machine {}: {problem}; {way_out}", path.display()))
    };
    let text = std::fs::read(path).map_err(|e| refused(e.to_string()))?;
    let machine: Machine = serde_json::from_slice(&text).map_err(|e| refused(e.to_string()))?;
    if machine.cores == 0 || machine.memory_bytes() == 0 {
        return Err(refused("no cores or no memory in it".into()));
    }
    Ok(machine)
}

/// Writes what is known of this machine.
pub(super) fn write_machine(machine: &Machine, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io { what: format!("cannot write {}", path.display()), code: exit::USAGE, source };
    let text = serde_json::to_vec_pretty(machine).map_err(|e| failed(e.into()))?;
    std::fs::write(path, text).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn store(folder: &Path, model: &str, data: &str) -> Store {
        Store { folder: folder.to_owned(), model: model.into(), data: data.into() }
    }

    fn kept(folder: &Path, parameters: u64) -> Kept {
        let library = folder.join("libtorch_cpu.so");
        if !library.exists() {
            std::fs::write(&library, "library").unwrap();
        }
        let mut measured = Measured { library: stamp(&library), ..Measured::default() };
        measured.model.parameters = parameters;
        Kept { limit_bytes: 1000, measured }
    }

    #[test]
    fn an_answer_serves_its_model_and_data_until_libtorch_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (here, other) = (store(folder.path(), "m", "d"), store(folder.path(), "m", "e"));
        assert!(here.exact(0).is_none() && here.same_model().is_none());
        here.keep(&kept(folder.path(), 7));
        assert_eq!(here.exact(0).unwrap().model.parameters, 7);
        assert!(other.exact(0).is_none());
        assert_eq!(other.same_model().unwrap().model.parameters, 7);
        assert!(store(folder.path(), "mm", "d").same_model().is_none());
        std::fs::write(folder.path().join("libtorch_cpu.so"), "another library").unwrap();
        assert!(here.exact(0).is_none() && other.same_model().is_none());
    }

    #[test]
    fn what_a_limit_cut_short_is_measured_again_when_it_has_grown() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), "m", "d");
        let mut short = kept(folder.path(), 7);
        short.measured.model.short = Some("memory ran out".into());
        store.keep(&short);
        assert!(store.exact(1000).is_some() && store.exact(1499).is_some());
        assert!(store.exact(1500).is_none() && store.same_model().is_none());
    }

    #[test]
    fn the_oldest_answers_go() {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..KEPT + 3 {
            store(folder.path(), &format!("m{n}"), "d").keep(&kept(folder.path(), n as u64));
        }
        assert_eq!(files(folder.path()).len(), KEPT);
        std::fs::write(store(folder.path(), "bad", "d").file(), "{").unwrap();
        assert!(store(folder.path(), "bad", "d").exact(0).is_none());
    }

    #[test]
    fn words_of_the_rank_refuse_and_a_dead_rank_leaves_assumptions() {
        let config = Config::default();
        let wanted = Wanted {
            config: &config,
            gpu: None,
            device: "cpu".into(),
            threads: 1,
            passes: PassKind::Train,
            limit_bytes: 1,
        };
        let ended = |raw: Option<i32>, said: &str, answer: Option<Measured>| {
            let status = raw.map(ExitStatus::from_raw);
            super::answer(Ended { answer, status, said: said.into() }, &wanted)
        };
        let refused = ended(Some(4 << 8), "rank: error: vgg.safetensors: no such file", None).unwrap_err();
        assert_eq!((refused.exit_code(), refused.to_string().as_str()), (4, "vgg.safetensors: no such file"));
        let killed = ended(Some(9), "", None).unwrap().model.short.unwrap();
        assert!(killed.contains("signal: 9"), "{killed}");
        let late = ended(None, "", Some(Measured::default())).unwrap().model.short.unwrap();
        assert!(late.contains("stopped after 30 s"), "{late}");
        let other = ended(Some(2 << 8), "", None).unwrap().model.short.unwrap();
        assert!(other.contains("exit status: 2"), "{other}");
        assert!(ended(Some(0), "", Some(Measured::default())).unwrap().model.short.is_none());
    }

    #[test]
    fn a_machine_survives_its_file_and_nonsense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.json");
        let machine = Machine { cores: 3, memory_total_bytes: 1 << 30, ..Machine::default() };
        write_machine(&machine, &path).unwrap();
        assert_eq!(read_machine(&path).unwrap(), machine);
        for text in ["{}", "", r#"{"cores": 0}"#] {
            std::fs::write(&path, text).unwrap();
            let error = read_machine(&path).unwrap_err();
            assert!(error.to_string().contains("--write-machine") && error.exit_code() == 2, "{error}");
        }
    }
}
