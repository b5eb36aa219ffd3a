//! Ranks of a task that run in the user's interpreter: which program that is, and what it is given.

use super::{Error, here, io};
use crate::cli;
use spec::config::Config;
use spec::contract::{env, exit, shown};
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package that the interpreter runs, and the trainer that the package loads.
const PACKAGE: &str = "headroom_rank";
const TRAINER: &str = "libheadroom_rank.so";
/// Most files of the user's modules that are looked at.
const MOST_FILES: usize = 10_000;

/// How ranks are started.
pub(super) struct Started {
    pub program: PathBuf,
    /// Before the words of the rank program's own command line.
    pub words: Vec<OsString>,
    pub env: Vec<(String, String)>,
    /// One process forks all ranks.
    pub forks: bool,
    /// Files that decide what the ranks do; kept measurements are void once one of them has changed.
    pub sources: Vec<PathBuf>,
}

impl Started {
    /// # Errors
    /// No interpreter, or no trainer for it.
    pub fn of(config: &Config, rank: &Path) -> Result<Self, Error> {
        let wanted = spec::task::find(&config.task).and_then(|task| task.interpreter(config));
        let Some(wanted) = wanted else {
            let program = rank.to_path_buf();
            return Ok(Self { program, words: Vec::new(), env: Vec::new(), forks: false, sources: Vec::new() });
        };
        let program = wanted
            .program
            .map(|named| if is_name(&named) { first_of(&[named.as_os_str()]).unwrap_or(named) } else { named })
            .or_else(|| first_of(&["python3", "python"].map(OsStr::new)))
            .ok_or_else(|| Error::Target("no python3 in PATH: name the interpreter in python.interpreter".into()))?;
        let program = std::path::absolute(&program).map_err(io("python.interpreter", exit::USAGE))?;
        if !program.is_file() {
            return Err(Error::Target(format!(
                "python.interpreter: no program at {}: name a Python that has PyTorch",
                shown(&program)
            )));
        }
        let (exe, _) = here()?;
        let trainer = std::env::var_os(env::TRAINER).map_or_else(|| exe.with_file_name(TRAINER), PathBuf::from);
        if !trainer.is_file() {
            return Err(Error::Target(format!(
                "no trainer for Python at {}: build it with `cargo build --release -p headroom-rank`",
                shown(&trainer)
            )));
        }
        let package = package(&exe)?;
        let mut section = config.task_section().clone();
        section["seed"] = config.seed.into();
        section["data"] = config.data.dataset_path.to_string_lossy().into_owned().into();
        let mut variables = vec![
            (env::TRAINER.to_owned(), trainer.display().to_string()),
            (env::PYTHON.to_owned(), section.to_string()),
        ];
        if std::env::var_os("PYTHONUNBUFFERED").is_none() {
            // Lines of the user's code appear when they are printed.
            variables.push(("PYTHONUNBUFFERED".into(), "1".into()));
        }
        let mut sources = vec![trainer];
        wanted.path.iter().for_each(|folder| modules(folder, &mut sources));
        Ok(Self { program, words: vec![package.into_os_string()], env: variables, forks: wanted.forks, sources })
    }

    /// A process with these words.
    pub fn command(&self, word: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.words).arg(word).envs(self.env.iter().cloned());
        command
    }

    /// Names, sizes and times of the files that decide what the ranks do.
    pub fn stamps(&self) -> Vec<(PathBuf, u64, i64, i64)> {
        let stamp = |path: &PathBuf| {
            let file = std::fs::metadata(path).ok()?;
            Some((path.clone(), file.len(), file.mtime(), file.mtime_nsec()))
        };
        self.sources.iter().filter_map(stamp).collect()
    }
}

/// The package beside this program, or in Headroom's own folder.
fn package(exe: &Path) -> Result<PathBuf, Error> {
    let beside = exe.with_file_name(PACKAGE);
    let own = cli::home(exe).map(|home| home.join("src/python").join(PACKAGE));
    let found = std::iter::once(beside.clone()).chain(own).find(|folder| folder.join("__main__.py").is_file());
    found.ok_or_else(|| Error::Target(format!("no folder {PACKAGE} at {}: reinstall Headroom", shown(&beside))))
}

/// A name without a folder, which PATH is for, as in a shell.
fn is_name(program: &Path) -> bool {
    program.components().count() == 1 && !program.as_os_str().as_encoded_bytes().contains(&b'/')
}

/// The first of these programs that is in PATH.
fn first_of(names: &[&OsStr]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    names.iter().find_map(|name| folders.iter().map(|folder| folder.join(name)).find(|at| at.is_file()))
}

/// Python files in `folder` and in the packages below it, sorted.
fn modules(folder: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        if into.len() >= MOST_FILES {
            return;
        }
        if path.extension().is_some_and(|extension| extension == "py") {
            into.push(path);
        } else if path.join("__init__.py").is_file() {
            modules(&path, into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_and_packages_are_looked_at_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.py", "pkg/__init__.py", "pkg/b.py", "data/c.py", "notes.txt"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let mut found = Vec::new();
        modules(folder.path(), &mut found);
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(folder.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("a.py"), Path::new("pkg/__init__.py"), Path::new("pkg/b.py")]);
    }

    #[test]
    fn a_bare_name_is_looked_for_in_path_and_a_path_is_not() {
        assert!(is_name(Path::new("python3.11")) && !is_name(Path::new("./python3")) && !is_name(Path::new("/a/b")));
        assert!(
            first_of(&[OsStr::new("no such program"), OsStr::new("sh")]).is_some_and(|found| found.ends_with("sh"))
        );
    }

    #[test]
    fn a_task_of_rust_runs_in_the_rank_program() {
        let config = spec::task::config("emg");
        let started = Started::of(&config, Path::new("/x/rank")).unwrap();
        assert_eq!((started.program.as_path(), started.words.len(), started.forks), (Path::new("/x/rank"), 0, false));
    }
}
