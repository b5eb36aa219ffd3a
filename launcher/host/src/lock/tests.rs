use super::*;
use std::fs;
use std::sync::Mutex;

fn take(folder: &Path) -> Result<(RunLock, Vec<String>), LockError> {
    let mut lines = Vec::new();
    RunLock::take(folder, 0, "launch", |line| lines.push(line), Box::new(|_| {})).map(|lock| (lock, lines))
}

fn leave(folder: &Path, holder: &Holder) {
    fs::write(folder.join("run.lock"), serde_json::to_vec(holder).unwrap()).unwrap();
}

/// A process of this machine that has ended.
fn dead() -> Holder {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    Holder { pid, started: Some(1), ..Holder::this("launch") }
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_second_one_is_refused_by_both_names_until_the_first_ends() {
    let folder = tempfile::tempdir().unwrap();
    let (lock, lines) = take(folder.path()).unwrap();
    assert!(lines.is_empty() && check(folder.path(), 0).is_err());
    let error = take(folder.path()).unwrap_err().to_string();
    let (own, host) = (std::process::id(), Holder::this("launch").host);
    assert!(error.contains("is training already") && error.contains("--name"), "{error}");
    assert!(error.contains(&format!("process {own} on {host} (launch, since 20")), "{error}");
    assert!(error.contains(&format!("this is process {own} on {host}:")), "{error}");
    // Other nodes have locks beside it.
    let other = RunLock::take(folder.path(), 1, "launch", |_| {}, Box::new(|_| {})).unwrap();
    drop((lock, other));
    assert_eq!(names(folder.path()), Vec::<String>::new());
    assert!(take(folder.path()).unwrap().1.is_empty() && check(folder.path(), 0).is_ok());
}

#[test]
fn a_lock_of_a_dead_process_or_of_another_boot_is_taken_over_with_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut booted = Holder::this("launch");
    booted.boot = Some("an earlier boot".into());
    for (left, why) in [(dead(), "that process has ended"), (booted, "has been started again")] {
        leave(folder.path(), &left);
        let (lock, lines) = take(folder.path()).unwrap();
        assert!(matches!(&lines[..], [line] if line.contains(&left.shown()) && line.contains(why)), "{lines:?}");
        assert!(take(folder.path()).is_err());
        drop(lock);
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn a_lock_of_another_host_or_without_content_is_kept_while_it_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.lock");
    let other = Holder { host: "node2".into(), boot: Some("b".into()), machine: Some("m".into()), ..dead() };
    for content in [serde_json::to_vec(&other).unwrap(), b"{\"pid\": 4".to_vec(), Vec::new()] {
        fs::write(&path, &content).unwrap();
        let error = take(folder.path()).unwrap_err().to_string();
        assert!(error.contains("s ago; it is taken over when it was not touched for 300 s"), "{error}");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(301)).unwrap();
        let (_lock, lines) = take(folder.path()).unwrap();
        assert!(lines[0].contains("no sign of life for 5 minutes"), "{lines:?}");
    }
}

#[test]
fn of_many_that_find_a_dead_lock_at_once_one_gets_it() {
    for left in [Some(dead()), None] {
        let folder = tempfile::tempdir().unwrap();
        left.iter().for_each(|left| leave(folder.path(), left));
        let (won, refused) = (Mutex::new(Vec::new()), Mutex::new(0));
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| match take(folder.path()) {
                    Ok(lock) => won.lock().unwrap().push(lock),
                    Err(LockError::Held { .. }) => *refused.lock().unwrap() += 1,
                    Err(other) => panic!("{other}"),
                });
            }
        });
        assert_eq!((won.lock().unwrap().len(), *refused.lock().unwrap()), (1, 15));
        won.lock().unwrap().clear();
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn the_heartbeat_touches_the_file_restores_it_and_sees_its_loss() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.lock");
    let (lock, _) = take(folder.path()).unwrap();
    let mut file = File::options().write(true).open(&path).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    file.set_modified(long_ago).unwrap();
    assert_eq!(heartbeat(&path, &lock.own, &mut file), None);
    assert!(file.metadata().unwrap().modified().unwrap() > long_ago + Duration::from_secs(500));
    fs::remove_file(&path).unwrap();
    assert_eq!(heartbeat(&path, &lock.own, &mut file), None);
    assert!(take(folder.path()).is_err());
    let other = Holder { host: "node2".into(), ..dead() };
    leave(folder.path(), &other);
    assert_eq!(heartbeat(&path, &lock.own, &mut file), Some(other.clone()));
    drop(lock);
    assert!(path.exists(), "another's lock stays");
}

#[test]
fn ranks_of_a_run_are_found_by_their_environment() {
    let folder = tempfile::tempdir().unwrap();
    let start = |names: &[&str]| {
        let mut command = std::process::Command::new("sleep");
        command.arg("60").env_remove(env::CONTROL_FD).env(env::JOB, folder.path().join("job.json"));
        names.iter().for_each(|name| {
            command.env(name, "7");
        });
        command.spawn().unwrap()
    };
    let mut rank = start(&[env::CONTROL_FD]);
    // A user's own shell may have the job's name too.
    let mut other = start(&[]);
    let found = ranks_of(folder.path());
    [&mut rank, &mut other].into_iter().for_each(|child| child.kill().unwrap());
    // Dead ones count no more, reaped or not.
    while stat_of(&rank.id().to_string()).is_some_and(|(state, _)| state != 'Z') {
        std::thread::yield_now();
    }
    let left = ranks_of(folder.path());
    for child in [&mut rank, &mut other] {
        child.wait().unwrap();
    }
    assert_eq!((found, left), (vec![rank.id().to_string()], Vec::new()));
}
