//! Where a run comes from: command line, host, git commit. No values of the environment: they may be secrets.

use serde_json::Value;
use spec::job::Origin;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Variables whose names say nothing of a run.
const ORDINARY: [&str; 12] =
    ["_", "HOME", "LANG", "LOGNAME", "MAIL", "OLDPWD", "PATH", "PWD", "SHELL", "SHLVL", "TERM", "USER"];

/// Facts on this start; `first_t` stays that of the run's first start, which `earlier` tells.
pub fn origin(earlier: &Path) -> Origin {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let before: Option<Value> = std::fs::read(earlier).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let first_t = before.and_then(|job| job.pointer("/origin/first_t")?.as_f64()).unwrap_or(now);
    let cwd = std::env::current_dir().unwrap_or_default();
    let mut environment: Vec<String> =
        std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    environment.retain(|name| !ORDINARY.contains(&name.as_str()));
    environment.sort();
    Origin {
        t: now,
        first_t,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        command: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
        commit: commit(&cwd),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        environment,
        cwd,
    }
}

/// The commit that is checked out in the repository around `folder`, read from its files. `None`: there is no repository, or no
/// commit.
fn commit(folder: &Path) -> Option<String> {
    let git = folder.ancestors().map(|above| above.join(".git")).find(|git| git.exists())?;
    let git = if git.is_dir() { git } else { pointed_to(&git)? };
    let head = text(&git.join("HEAD"))?;
    let Some(name) = head.strip_prefix("ref: ") else { return hash(&head) };
    // A worktree has its own HEAD; its branches lie in the main folder.
    let common = text(&git.join("commondir")).map_or_else(|| git.clone(), |common| git.join(common));
    let loose = [git.join(name), common.join(name)].iter().find_map(|path| hash(&text(path)?));
    loose.or_else(|| {
        let packed = text(&common.join("packed-refs"))?;
        packed.lines().find_map(|line| hash(line.strip_suffix(name)?.trim_end()))
    })
}

/// `gitdir: PATH`, as worktrees and submodules have it.
fn pointed_to(file: &Path) -> Option<PathBuf> {
    let path = text(file)?;
    Some(file.parent()?.join(path.strip_prefix("gitdir: ")?))
}

fn text(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn hash(text: &str) -> Option<String> {
    let is_hash = [40, 64].contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_commit_is_found_loose_packed_detached_and_in_a_worktree() {
        let dir = tempfile::tempdir().unwrap();
        let (git, below) = (dir.path().join("a/.git"), dir.path().join("a/b/c"));
        fs::create_dir_all(git.join("refs/heads")).unwrap();
        fs::create_dir_all(&below).unwrap();
        let [one, two] = ["1", "2"].map(|digit| digit.repeat(40));
        fs::write(git.join("HEAD"), "ref: refs/heads/main\n").unwrap();
        assert_eq!(commit(&below), None);
        fs::write(git.join("packed-refs"), format!("# pack-refs\n{one} refs/heads/main\n")).unwrap();
        assert_eq!(commit(&below), Some(one.clone()));
        fs::write(git.join("refs/heads/main"), format!("{two}\n")).unwrap();
        assert_eq!(commit(&below), Some(two.clone()));
        let (tree, inner) = (dir.path().join("tree"), git.join("worktrees/tree"));
        fs::create_dir_all(&tree).unwrap();
        fs::create_dir_all(&inner).unwrap();
        fs::write(tree.join(".git"), format!("gitdir: {}\n", inner.display())).unwrap();
        fs::write(inner.join("HEAD"), "ref: refs/heads/main\n").unwrap();
        fs::write(inner.join("commondir"), "../..\n").unwrap();
        assert_eq!(commit(&tree), Some(two));
        fs::write(git.join("HEAD"), &one).unwrap();
        assert_eq!(commit(&below), Some(one));
    }

    #[test]
    fn an_origin_names_variables_and_holds_no_values() {
        let dir = tempfile::tempdir().unwrap();
        let job = dir.path().join("job.json");
        fs::write(&job, r#"{"origin": {"first_t": 5.0}}"#).unwrap();
        let found = origin(&job);
        assert_eq!(found.first_t, 5.0);
        assert!(!found.host.is_empty() && !found.command.is_empty() && found.t > 1e9);
        assert!(found.environment.iter().all(|name| !name.contains('=') && name != "PATH"));
        assert!(origin(&dir.path().join("none")).first_t > 1e9);
    }
}
